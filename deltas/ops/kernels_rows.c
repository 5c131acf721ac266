/* Elementwise kernels over rows: norm, rotary embedding, activation, cache write. */
#ifndef DS_ROWS_COMMON
#define DS_ROWS_COMMON
#define FEW_ELEMENTS 16384 /* below this, one thread is faster */
#endif

/* y = weight * round(x * rsqrt(mean(x^2) + eps)), rounded where Llama's own code rounds. x, y [rows, n];
 * weight [n]. x and y may be the same. */
EXPORT int NAME(ds_rms_norm)(const void *x, int64_t ldx, const void *weight, float eps, int64_t rows,
                             int64_t n, void *y, int64_t ldy) {
#pragma omp parallel for schedule(static) if (rows * n >= FEW_ELEMENTS)
    for (int64_t row = 0; row < rows; row++) {
        const T *from = (const T *)x + row * ldx, *w = weight;
        T *to = (T *)y + row * ldy;
        pair squares = {splat(0.0f), splat(0.0f)};
        for (int64_t i = 0; i < n; i += PAIR) {
            pair v = NAME(load_some)(from + i, n - i);
            squares.a += v.a * v.a;
            squares.b += v.b * v.b;
        }
        float factor = 1.0f / sqrtf(sum(squares.a + squares.b) / (float)n + eps);
        for (int64_t i = 0; i < n; i += PAIR) {
            pair v = NAME(load_some)(from + i, n - i), g = NAME(load_some)(w + i, n - i);
            v.a = NAME(rounded)(v.a * factor) * g.a;
            v.b = NAME(rounded)(v.b * factor) * g.b;
            NAME(store_some)(to + i, v, n - i);
        }
    }
    return 0;
}

/* out = silu(gate) * up; all [rows, n] with row strides; silu is rounded to the storage type first, as a
 * layer of its own would. out may be gate or up. */
EXPORT int NAME(ds_silu_mul)(const void *gate, int64_t ldg, const void *up, int64_t ldu, int64_t rows,
                             int64_t n, void *out, int64_t ldo) {
#pragma omp parallel for schedule(static) if (rows * n >= FEW_ELEMENTS / 2)
    for (int64_t row = 0; row < rows; row++) {
        const T *g = (const T *)gate + row * ldg, *u = (const T *)up + row * ldu;
        T *to = (T *)out + row * ldo;
        for (int64_t i = 0; i < n; i += PAIR) {
            pair a = NAME(load_some)(g + i, n - i), b = NAME(load_some)(u + i, n - i);
            a.a = NAME(rounded)(silu_f(a.a)) * b.a;
            a.b = NAME(rounded)(silu_f(a.b)) * b.b;
            NAME(store_some)(to + i, a, n - i);
        }
    }
    return 0;
}

/* Rotates the first `rotary` dimensions (even) of every head in place: x * cos + rotate_half(x) * sin, each
 * product rounded to the storage type. x [tokens, heads, >= rotary], token and head strides; cos, sin
 * [tokens, rotary]. */
EXPORT int NAME(ds_rope)(void *x, int64_t x_token, int64_t x_head, int64_t tokens, int64_t heads,
                         const void *cos, const void *sin, int64_t ldc, int64_t rotary) {
    int64_t half = rotary / 2;
#pragma omp parallel for schedule(static) if (tokens * heads * rotary >= FEW_ELEMENTS)
    for (int64_t t = 0; t < tokens; t++) {
        const T *c = (const T *)cos + t * ldc, *s = (const T *)sin + t * ldc;
        for (int64_t head = 0; head < heads; head++) {
            T *p = (T *)x + t * x_token + head * x_head;
            for (int64_t i = 0; i < half; i += PAIR) {
                int64_t n = half - i;
                pair lo = NAME(load_some)(p + i, n), hi = NAME(load_some)(p + half + i, n);
                pair c0 = NAME(load_some)(c + i, n), c1 = NAME(load_some)(c + half + i, n);
                pair s0 = NAME(load_some)(s + i, n), s1 = NAME(load_some)(s + half + i, n);
                pair lc = NAME(rounded2)((pair){lo.a * c0.a, lo.b * c0.b});
                pair ls = NAME(rounded2)((pair){hi.a * s0.a, hi.b * s0.b});
                pair hc = NAME(rounded2)((pair){hi.a * c1.a, hi.b * c1.b});
                pair hs = NAME(rounded2)((pair){lo.a * s1.a, lo.b * s1.b});
                NAME(store_some)(p + i, (pair){lc.a - ls.a, lc.b - ls.b}, n);
                NAME(store_some)(p + half + i, (pair){hc.a + hs.a, hc.b + hs.b}, n);
            }
        }
    }
    return 0;
}

/* Writes new keys and values [tokens, kv_heads, head_dim] (token and head strides) into the caches at
 * (slots[t], head, positions[t]). Both caches have the same strides. */
EXPORT int NAME(ds_kv_write)(const void *k, int64_t k_token, int64_t k_head, const void *v, int64_t v_token,
                             int64_t v_head, void *k_cache, void *v_cache, int64_t c_slot, int64_t c_head,
                             int64_t c_token, int64_t c_slots, int64_t c_tokens, const int64_t *slots,
                             const int64_t *positions, int64_t tokens, int64_t kv_heads, int64_t head_dim) {
    for (int64_t t = 0; t < tokens; t++)
        if (slots[t] < 0 || slots[t] >= c_slots || positions[t] < 0 || positions[t] >= c_tokens)
            return OUT_OF_RANGE;
#pragma omp parallel for schedule(static) if (tokens * kv_heads * head_dim >= 2 * FEW_ELEMENTS)
    for (int64_t t = 0; t < tokens; t++) {
        int64_t at = slots[t] * c_slot + positions[t] * c_token;
        for (int64_t head = 0; head < kv_heads; head++) {
            size_t bytes = (size_t)head_dim * sizeof(T);
            memcpy((T *)k_cache + at + head * c_head, (const T *)k + t * k_token + head * k_head, bytes);
            memcpy((T *)v_cache + at + head * c_head, (const T *)v + t * v_token + head * v_head, bytes);
        }
    }
    return 0;
}
