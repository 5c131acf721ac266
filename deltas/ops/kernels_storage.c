/* Loading and storing of one storage type; included by kernels.c once per type. */
#if DS_BF16
#define T uint16_t

/* Round to nearest even; every NaN stays a (quiet) NaN. The result is in the upper half of each lane. */
INLINE vu NAME(round_up_half)(vf x) {
    vu u = (vu)x;
    vu rounded = u + 0x7fffu + ((u >> 16) & 1u);
    vu quiet = u | 0x00400000u;
    vu is_nan = (vu)(x != x);
    return (is_nan & quiet) | (~is_nan & rounded);
}
INLINE pair NAME(load)(const T *p) {
    vu u;
    memcpy(&u, p, sizeof u);
    return (pair){(vf)(u << 16), (vf)(u & 0xffff0000u)};
}
INLINE void NAME(store)(T *p, pair x) {
#if LANES == 16 && defined(__AVX512BF16__)
    const __m512i order = (__m512i)interleave_halves; /* numbers below 1.2e-38 become 0 here */
    vu u = (vu)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)x.b, (__m512)x.a));
#else
    vu u = (NAME(round_up_half)(x.a) >> 16) | (NAME(round_up_half)(x.b) & 0xffff0000u);
#endif
    memcpy(p, &u, sizeof u);
}
/* To the storage type's precision and back. */
INLINE vf NAME(rounded)(vf x) { return (vf)(NAME(round_up_half)(x) & 0xffff0000u); }
INLINE float NAME(load_one)(const T *p) {
    uint32_t u = (uint32_t)*p << 16;
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}
#else
#define T float
INLINE pair NAME(load)(const T *p) { return (pair){load_f(p), load_f(p + LANES)}; }
INLINE void NAME(store)(T *p, pair x) {
    store_f(p, x.a);
    store_f(p + LANES, x.b);
}
INLINE vf NAME(rounded)(vf x) { return x; }
INLINE float NAME(load_one)(const T *p) { return *p; }
#endif

INLINE pair NAME(rounded2)(pair x) { return (pair){NAME(rounded)(x.a), NAME(rounded)(x.b)}; }

/* The first n < PAIR elements, zeros behind them: never touches what lies behind. */
INLINE pair NAME(load_part)(const T *p, int64_t n) {
#if LANES == 16 && DS_BF16
    vu u = (vu)_mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1u), p);
    return (pair){(vf)(u << 16), (vf)(u & 0xffff0000u)};
#else
    T part[PAIR] = {0};
    memcpy(part, p, (size_t)n * sizeof(T));
    return NAME(load)(part);
#endif
}
INLINE void NAME(store_part)(T *p, pair x, int64_t n) {
    T part[PAIR];
    NAME(store)(part, x);
    memcpy(p, part, (size_t)n * sizeof(T));
}
/* `n` is what is left of a row: a whole pair, or its tail. */
INLINE pair NAME(load_some)(const T *p, int64_t n) {
    return n >= PAIR ? NAME(load)(p) : NAME(load_part)(p, n);
}
INLINE void NAME(store_some)(T *p, pair x, int64_t n) {
    if (n >= PAIR)
        NAME(store)(p, x);
    else
        NAME(store_part)(p, x, n);
}

/* PAIR numbers as a product takes them, and the sum's LANES floats after it: by the instruction that multiplies
 * two bfloat16 a lane where there is one (it takes numbers below 1.2e-38 for 0). */
#if DS_BF16 && defined(DOT_BF16)
typedef vu NAME(strip);
INLINE NAME(strip) NAME(load_strip)(const T *p, int64_t n) {
    vu u;
    if (n < PAIR) return (vu)_mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1u), p);
    memcpy(&u, p, sizeof u);
    return u;
}
INLINE vf NAME(add_products)(vf acc, NAME(strip) x, NAME(strip) y) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)y);
}
#else
typedef pair NAME(strip);
INLINE NAME(strip) NAME(load_strip)(const T *p, int64_t n) { return NAME(load_some)(p, n); }
INLINE vf NAME(add_products)(vf acc, NAME(strip) x, NAME(strip) y) { return acc + x.a * y.a + x.b * y.b; }
#endif
