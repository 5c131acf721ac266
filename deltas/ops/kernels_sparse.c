/* ds_sparse: a sparse matrix times the tokens of one segment, added in place; kernels.c includes this for each dtype. */
#ifndef DS_SPARSE_COMMON
#define DS_SPARSE_COMMON
#if defined(__FMA__)
#include <immintrin.h>
#endif
#define CHAINS 4 /* running sums of one row, so that an addition need not wait for the one before */
#define FEW_READS 65536 /* entries read below which waking the other threads costs more than it gives */

/* a * b + c, fused or not, but alike for one token and for LANES: left alone the compiler fuses vectors of one width
 * and not those of another. */
INLINE float add_product(float a, float b, float c) {
#if defined(__FMA__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}
INLINE vf add_products(vf a, vf b, vf c) {
#if LANES == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8 && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}
#endif

/* values . z[columns] for one token; z is [in]. Entry k is summed in chain k % CHAINS. */
INLINE float NAME(sparse_one)(const int32_t *columns, const T *values, int64_t count, const float *z) {
    float acc[CHAINS] = {0};
    int64_t k = 0;
    for (; k + CHAINS <= count; k += CHAINS) {
        UNROLL
        for (int c = 0; c < CHAINS; c++)
            acc[c] = add_product(NAME(load_one)(values + k + c), z[columns[k + c]], acc[c]);
    }
    UNROLL
    for (int c = 0; c < CHAINS - 1; c++)
        if (k + c < count) acc[c] = add_product(NAME(load_one)(values + k + c), z[columns[k + c]], acc[c]);
    return (acc[0] + acc[1]) + (acc[2] + acc[3]);
}

/* The same for LANES tokens; z is [in, LANES]. */
INLINE vf NAME(sparse_many)(const int32_t *columns, const T *values, int64_t count, const float *z) {
    vf acc[CHAINS] = {{0}};
    int64_t k = 0;
    for (; k + CHAINS <= count; k += CHAINS) {
        UNROLL
        for (int c = 0; c < CHAINS; c++)
            acc[c] = add_products(splat(NAME(load_one)(values + k + c)),
                                  load_f(z + (int64_t)columns[k + c] * LANES), acc[c]);
    }
    UNROLL
    for (int c = 0; c < CHAINS - 1; c++)
        if (k + c < count)
            acc[c] = add_products(splat(NAME(load_one)(values + k + c)),
                                  load_f(z + (int64_t)columns[k + c] * LANES), acc[c]);
    return (acc[0] + acc[1]) + (acc[2] + acc[3]);
}

/* y[t, row] += sum_k values[k] * x[t, columns[k]] over k of starts[row] .. starts[row + 1]. x is [tokens, in], y
 * [tokens, out]; starts int32 [out + 1], columns int32. The caller vouches for both: they are checked when packed. */
EXPORT int NAME(ds_sparse)(const int32_t *starts, const int32_t *columns, const void *entries, int64_t out,
                           int64_t in, const void *from, int64_t ldx, void *to, int64_t ldy, int64_t tokens) {
    const T *values = entries, *x = from;
    T *y = to;
    if (out == 0 || tokens == 0 || starts[out] == 0) return 0;
    const int lanes = tokens == 1 ? 1 : LANES;
    int64_t strips = (tokens + lanes - 1) / lanes, blocks = (out + PAIR - 1) / PAIR;
    size_t bytes = (size_t)round_up(strips * in * lanes, 16) * sizeof(float);
    float *turned = aligned_alloc(64, bytes); /* [strips, in, lanes] */
    if (turned == NULL) return NO_MEMORY;
    int threads = starts[out] * strips < FEW_READS ? 1 : omp_get_max_threads();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static) collapse(2)
        for (int64_t strip = 0; strip < strips; strip++)
            for (int64_t i = 0; i < in; i++) {
                float *z = turned + (strip * in + i) * lanes;
                for (int64_t t = 0; t < lanes; t++) {
                    int64_t token = strip * lanes + t;
                    z[t] = token < tokens ? NAME(load_one)(x + token * ldx + i) : 0.0f;
                }
            }
#pragma omp for schedule(dynamic, 4) collapse(2)
        for (int64_t strip = 0; strip < strips; strip++)
            for (int64_t block = 0; block < blocks; block++) {
                float sums[LANES][PAIR] = {{0}}; /* in the order of a pair's two vectors */
                const float *z = turned + strip * in * lanes;
                int64_t row0 = block * PAIR, rows = min64(PAIR, out - row0);
                int64_t token0 = strip * lanes, end = min64(lanes, tokens - token0);
                for (int64_t j = 0; j < rows; j++) {
                    int64_t k = starts[row0 + j], count = starts[row0 + j + 1] - k;
                    int64_t at = DS_BF16 ? (j & 1) * LANES + j / 2 : j;
                    if (lanes == 1)
                        sums[0][at] = NAME(sparse_one)(columns + k, values + k, count, z);
                    else {
                        vf sum = NAME(sparse_many)(columns + k, values + k, count, z);
                        for (int64_t t = 0; t < end; t++) sums[t][at] = sum[t];
                    }
                }
                for (int64_t t = 0; t < end; t++) {
                    T *place = y + (token0 + t) * ldy + row0;
                    pair v = NAME(load_some)(place, rows);
                    v.a += load_f(sums[t]);
                    v.b += load_f(sums[t] + LANES);
                    NAME(store_some)(place, v, rows);
                }
            }
    }
    free(turned);
    return 0;
}
