/* The CPU kernels of deltaserve, for the rows of one step. build.py compiles this file where it runs.
 *
 * C11 with GNU vector extensions (gcc, clang) and OpenMP. Everything is written once over vectors of LANES
 * floats, as wide as the target has them, and compiled twice: float32 storage (suffix _f32) and bfloat16
 * storage (suffix _bf16, little-endian uint16). Arithmetic is float32. A token's result never depends on the
 * tokens beside it nor on the number of threads, so a row in a batch equals the row alone bit for bit, and a
 * NaN stays in its own row.
 *
 * Strides are in elements; the innermost dimension is contiguous. Functions return 0, NO_MEMORY, or
 * OUT_OF_RANGE (an index or a size that would leave the tensors; then nothing was written).
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define PAIR (2 * LANES) /* the granule of all loops: two float vectors, or one vector of bfloat16 */

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef struct {
    vf a, b;
} pair; /* PAIR floats; in bfloat16, a holds the even elements and b the odd ones */

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define EXPORT __attribute__((visibility("default")))
enum { NO_MEMORY = -1, OUT_OF_RANGE = -2 };
_Static_assert(sizeof(void *) == 8, "tables hold pointers in 8-byte fields");

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

INLINE vf splat(float x) { return (vf){0} + x; }
INLINE vf select_f(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

INLINE vf load_f(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store_f(float *p, vf v) { memcpy(p, &v, sizeof v); }

#if LANES == 16 && defined(__AVX512BF16__)
#define DOT_BF16
/* 0, 16, 1, 17, ... as 16-bit lanes. */
static const vu interleave_halves = {
    0 | 16 << 16,  1 | 17 << 16,  2 | 18 << 16,  3 | 19 << 16,  4 | 20 << 16,  5 | 21 << 16,
    6 | 22 << 16,  7 | 23 << 16,  8 | 24 << 16,  9 | 25 << 16,  10 | 26 << 16, 11 | 27 << 16,
    12 | 28 << 16, 13 | 29 << 16, 14 | 30 << 16, 15 | 31 << 16,
};
#endif

/* Bytes that the next unit of work will read. Each unit fetches them line by line among its own loads,
 * because memory is the bottleneck and the hardware's own prefetching starts anew with every short factor. */
typedef struct {
    const char *at, *end;
} ahead;
INLINE ahead fetch(ahead next, int lines) {
    if (next.at < next.end) {
        UNROLL
        for (int i = 0; i < lines; i++) __builtin_prefetch(next.at + 64 * i, 0, 2);
        next.at += 64 * lines;
    }
    return next;
}

/* [a0+a1, a2+a3, ..., b0+b1, ...] */
INLINE vf add_neighbours(vf a, vf b) {
#if LANES == 16
    const vi even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
#elif LANES == 8
    const vi even = {0, 2, 4, 6, 8, 10, 12, 14};
#else
    const vi even = {0, 2, 4, 6};
#endif
#if LANES == 16
    return (vf)_mm512_permutex2var_ps((__m512)a, (__m512i)even, (__m512)b) +
           (vf)_mm512_permutex2var_ps((__m512)a, (__m512i)(even + 1), (__m512)b);
#elif defined(__clang__)
#if LANES == 8
    (void)even;
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    (void)even;
    return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
#else
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
#endif
}

/* The vector that begins with the sums of `count` vectors, a power of two; each is summed in the same order for
 * every count. */
INLINE vf sums(int count, vf *v) {
    UNROLL
    for (int n = count / 2; n >= 1; n /= 2) {
        UNROLL
        for (int i = 0; i < n; i++) v[i] = add_neighbours(v[2 * i], v[2 * i + 1]);
    }
    UNROLL
    for (int n = LANES / count; n > 1; n /= 2) v[0] = add_neighbours(v[0], v[0]);
    return v[0];
}

INLINE float sum(vf v) { return sums(1, &v)[0]; }

/* The larger and the smaller of two; b where one is NaN. */
INLINE vf larger(vf a, vf b) {
#if LANES == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return select_f(a > b, a, b);
#endif
}
INLINE vf smaller(vf a, vf b) {
#if LANES == 16
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return select_f(a < b, a, b);
#endif
}

/* e^x to 2 units in the last place; 0 below -86.6, +inf above 88.7; NaN stays NaN. */
INLINE vf exp_f(vf x) {
    const vf magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
    vf bounded = smaller(splat(100.0f), larger(splat(-100.0f), x));
    vf t = bounded * 1.44269504088896341f + magic;
    vf n = t - magic;
    vf r = bounded - n * 0.693145751953125f - n * 1.428606765330187e-06f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
#if LANES == 16
    __mmask16 seen = _mm512_cmp_ps_mask((__m512)bounded, _mm512_set1_ps(-86.6f), _CMP_NLT_UQ);
    return (vf)_mm512_maskz_scalef_ps(seen, (__m512)p, (__m512)n);
#else
    vi exponent = (vi)t - (vi)magic + 126; /* of 2^(n-1), so that n = 128 still has a finite scale */
    p = p * (vf)(exponent << 23) * 2.0f;
    p = select_f(x < splat(-86.6f), splat(0.0f), p);
    return select_f(x > splat(88.72283f), splat(INFINITY), p);
#endif
}

INLINE vf silu_f(vf x) { return x / (exp_f(-x) + 1.0f); }

enum { IDENTITY, RELU, SILU, GELU, GELU_TANH, TANH, SIGMOID, LEAKY_RELU }; /* deltas.patches.Activation */

static float activate(float x, int64_t kind) {
    switch (kind) {
    case RELU: return x < 0 ? 0.0f : x; /* keeps NaN */
    case SILU: return x / (1.0f + expf(-x));
    case GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case TANH: return tanhf(x);
    case SIGMOID: return 1.0f / (1.0f + expf(-x));
    case LEAKY_RELU: return x < 0 ? 0.01f * x : x;
    default: return x;
    }
}

/* How many threads the next parallel region of the calling thread gets. */
EXPORT int ds_threads(void) { return omp_get_max_threads(); }

#define DS_BF16 0
#define NAME(x) x##_f32
#include "kernels_storage.c"
#include "kernels_patch.c"
#include "kernels_sparse.c"
#include "kernels_linear.c"
#include "kernels_rows.c"
#include "kernels_attention.c"
#include "kernels_ragged.c"
#undef DS_BF16
#undef NAME
#undef T

#define DS_BF16 1
#define NAME(x) x##_bf16
#include "kernels_storage.c"
#include "kernels_patch.c"
#include "kernels_sparse.c"
#include "kernels_linear.c"
#include "kernels_rows.c"
#include "kernels_attention.c"
#include "kernels_ragged.c"
