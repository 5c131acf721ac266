/* ds_linear: y = x W^T + b, the backbone's own products; kernels.c includes this for each dtype.
 *
 * The weights lie in panels of PANEL outputs, in each the inputs one after another (bfloat16: two by two, as its
 * dot product takes them), so that they are read once and in ascending order. TILE tokens share a reading, with
 * their TILE x 3 vectors of sums in registers. Every output is one sum in ascending order of inputs, whatever
 * else the step computes. Only for 16 lanes, and bfloat16 only with its dot product: elsewhere ds_linear_panel
 * says 0.
 */
#ifndef DS_LINEAR_COMMON
#define DS_LINEAR_COMMON
enum { PANEL = 3 * LANES, TILE = 8, TILES_TOGETHER = 8 };
#define FEW_PRODUCTS 262144 /* multiply-adds below which waking the other threads costs more than it gives */
#endif

#if LANES == 16 && (!DS_BF16 || defined(DOT_BF16))
#if DS_BF16
#define INPUTS 2 /* of one step of a sum */
#else
#define INPUTS 1
#endif

INLINE vf NAME(times)(vf sum, const T *x, vf w) {
#if DS_BF16
    int32_t two;
    memcpy(&two, x, sizeof two);
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(two), (__m512bh)w);
#else
    return sum + splat(*x) * w;
#endif
}

/* m tokens' outputs of one panel; the first `out` of them exist. Few tokens wait for memory, so they fetch `next`. */
INLINE void NAME(tile)(int m, const T *x, int64_t ldx, const T *panel, const float *bias, int64_t in, T *y,
                       int64_t ldy, int64_t out, ahead *next) {
    vf acc[TILE * 3];
    UNROLL
    for (int k = 0; k < m * 3; k++) acc[k] = load_f(bias + k % 3 * LANES);
    ahead coming = *next;
    for (int64_t i = 0; i < in; i += INPUTS) {
        vf w[3];
        UNROLL
        for (int j = 0; j < 3; j++) memcpy(&w[j], panel + i * PANEL + j * LANES * INPUTS, sizeof w[j]);
        if (m < TILE) coming = fetch(coming, 3);
        UNROLL
        for (int t = 0; t < m; t++) {
            UNROLL
            for (int j = 0; j < 3; j++) acc[t * 3 + j] = NAME(times)(acc[t * 3 + j], x + t * ldx + i, w[j]);
        }
    }
    *next = coming;
    UNROLL
    for (int t = 0; t < m; t++) {
        UNROLL
        for (int j = 0; j < 3; j++) {
            int64_t n = min64(out - j * LANES, LANES);
            __mmask16 there = n <= 0 ? 0 : (__mmask16)(0xffffu >> (LANES - n));
#if DS_BF16
            _mm256_mask_storeu_epi16(y + t * ldy + j * LANES, there,
                                     (__m256i)_mm512_cvtneps_pbh((__m512)acc[t * 3 + j]));
#else
            _mm512_mask_storeu_ps(y + t * ldy + j * LANES, there, (__m512)acc[t * 3 + j]);
#endif
        }
    }
}

static void NAME(few)(int m, const T *x, int64_t ldx, const T *panel, const float *bias, int64_t in, T *y,
                      int64_t ldy, int64_t out, ahead *next) {
#define CASE(m)                                                        \
    case m: NAME(tile)(m, x, ldx, panel, bias, in, y, ldy, out, next); \
        break;
    switch (m) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) }
#undef CASE
}

EXPORT int64_t NAME(ds_linear_panel)(void) { return PANEL; }

/* w [out, in] with a row stride to panels [round_up(out, PANEL) * in], zeros behind the last output. */
EXPORT int NAME(ds_pack_linear)(const void *w, int64_t ldw, int64_t out, int64_t in, void *panels) {
    if (in % INPUTS != 0) return OUT_OF_RANGE;
#pragma omp parallel for schedule(static) if (out * in >= FEW_PRODUCTS)
    for (int64_t first = 0; first < out; first += PANEL) {
        T *to = (T *)panels + first * in;
        for (int64_t i = 0; i < in; i += INPUTS)
            for (int64_t o = first; o < first + PANEL; o++)
                for (int64_t k = i; k < i + INPUTS; k++)
                    *to++ = o < out ? ((const T *)w)[o * ldw + k] : 0;
    }
    return 0;
}

/* x [tokens, in], y [tokens, out], row strides; bias [out] or NULL. */
EXPORT int NAME(ds_linear)(const void *x, int64_t ldx, const void *panels, const void *bias, int64_t tokens,
                           int64_t in, int64_t out, void *y, int64_t ldy) {
    int64_t many = TILE * TILES_TOGETHER, blocks = (tokens + many - 1) / many;
    int64_t count = (out + PANEL - 1) / PANEL, units = blocks * count;
    if (in % INPUTS != 0) return OUT_OF_RANGE;
#pragma omp parallel if (tokens * in * out >= FEW_PRODUCTS)
    {
        int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        int64_t last = units * (thread + 1) / threads;
        for (int64_t unit = units * thread / threads; unit < last; unit++) {
            int64_t first = unit % count * PANEL, row = unit / count * many, end = min64(row + many, tokens);
            const T *panel = (const T *)panels + first * in;
            ahead next = {NULL, NULL};
            if (unit + 1 < last && first + PANEL < out)
                next = (ahead){(const char *)(panel + PANEL * in), (const char *)(panel + 2 * PANEL * in)};
            float b[PANEL] = {0};
            for (int64_t o = first; bias != NULL && o < min64(first + PANEL, out); o++)
                b[o - first] = NAME(load_one)((const T *)bias + o);
            for (; row < end; row += TILE)
                NAME(few)((int)min64(TILE, end - row), (const T *)x + row * ldx, ldx, panel, b, in,
                          (T *)y + row * ldy + first, ldy, out - first, &next);
        }
    }
    return 0;
}
#undef INPUTS
#else
EXPORT int64_t NAME(ds_linear_panel)(void) { return 0; }
EXPORT int NAME(ds_pack_linear)(const void *w, int64_t ldw, int64_t out, int64_t in, void *panels) {
    return OUT_OF_RANGE;
}
EXPORT int NAME(ds_linear)(const void *x, int64_t ldx, const void *panels, const void *bias, int64_t tokens,
                           int64_t in, int64_t out, void *y, int64_t ldy) {
    return OUT_OF_RANGE;
}
#endif
