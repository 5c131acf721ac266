/* ds_ragged_attention: packed rows of any length, each attending to itself; kernels.c includes this for each
 * dtype. */
#ifndef DS_RAGGED_COMMON
#define DS_RAGGED_COMMON
#if LANES == 16
#define QUERIES 8 /* queries that share one reading of keys and values */
#else
#define QUERIES 4
#endif

/* One line of the table: 5 fields of 8 bytes, in the order of deltas/ops/native.py's ROW_FIELDS. */
typedef struct {
    int64_t row0, rows;        /* the row's tokens */
    const void *keys, *values; /* what it sees before its own: [before, kv_heads, head_dim], contiguous */
    int64_t before;
} ragged_row;
_Static_assert(sizeof(ragged_row) == 40, "the table's layout");

/* [a0, b0, a1, b1, ...] of the lower halves, and of the upper ones */
INLINE void interleave(vf a, vf b, vf *low, vf *high) {
#if LANES == 16
    const vi first = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    *low = (vf)_mm512_permutex2var_ps((__m512)a, (__m512i)first, (__m512)b);
    *high = (vf)_mm512_permutex2var_ps((__m512)a, (__m512i)(first + 8), (__m512)b);
#elif defined(__clang__) && LANES == 8
    *low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    *high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#elif defined(__clang__)
    *low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    *high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#else
#if LANES == 8
    const vi first = {0, 8, 1, 9, 2, 10, 3, 11};
#else
    const vi first = {0, 4, 1, 5};
#endif
    *low = __builtin_shuffle(a, b, first);
    *high = __builtin_shuffle(a, b, first + LANES / 2);
#endif
}

/* Transposes LANES vectors in place: every round turns the bits of (vector, lane) by one. */
INLINE void transpose(vf v[LANES]) {
    vf turned[LANES];
    UNROLL
    for (int n = 1; n < LANES; n *= 2) {
        UNROLL
        for (int i = 0; i < LANES / 2; i++)
            interleave(v[i], v[i + LANES / 2], &turned[2 * i], &turned[2 * i + 1]);
        UNROLL
        for (int i = 0; i < LANES; i++) v[i] = turned[i];
    }
}

/* The largest lane; NaN does not count. */
INLINE float highest(vf v) {
    UNROLL
    for (int n = 1; n < LANES; n *= 2) {
        vf low, high;
        interleave(v, v, &low, &high);
        v = larger(high, low);
    }
    return v[0];
}

/* Scores to unnormalised probabilities in place; n is a multiple of LANES. Returns their sum. */
INLINE float soft(float *scores, int64_t n) {
    vf top = splat(-INFINITY), total = splat(0.0f);
    for (int64_t j = 0; j < n; j += LANES) top = larger(load_f(scores + j), top);
    float best = highest(top);
    for (int64_t j = 0; j < n; j += LANES) {
        vf p = exp_f(load_f(scores + j) - best);
        total += p;
        store_f(scores + j, p);
    }
    return sum(total);
}

/* scores[t][0:vectors*LANES] = q_t . k_j for n queries; keys [padded, ldk] has one key in each column. */
INLINE void score_columns(int n, int vectors, const float *q, int64_t padded, const float *keys, int64_t ldk,
                          float *scores) {
    vf acc[QUERIES][2];
    UNROLL
    for (int t = 0; t < n; t++) {
        UNROLL
        for (int c = 0; c < vectors; c++) acc[t][c] = splat(0.0f);
    }
    for (int64_t d = 0; d < padded; d++) {
        vf k[2];
        UNROLL
        for (int c = 0; c < vectors; c++) k[c] = load_f(keys + d * ldk + c * LANES);
        UNROLL
        for (int t = 0; t < n; t++) {
            UNROLL
            for (int c = 0; c < vectors; c++) acc[t][c] += q[t * padded + d] * k[c];
        }
    }
    UNROLL
    for (int t = 0; t < n; t++) {
        UNROLL
        for (int c = 0; c < vectors; c++) store_f(scores + t * ldk + c * LANES, acc[t][c]);
    }
}

/* scores for the keys first .. last, both multiples of LANES */
INLINE void score_range(int n, const float *q, int64_t padded, const float *keys, int64_t ldk, int64_t first,
                        int64_t last, float *scores) {
    int64_t j = first;
    for (; j + 2 * LANES <= last; j += 2 * LANES) score_columns(n, 2, q, padded, keys + j, ldk, scores + j);
    for (; j < last; j += LANES) score_columns(n, 1, q, padded, keys + j, ldk, scores + j);
}
#endif

/* The keys of one row and head side by side, [padded, ldk], zeros behind the last, and the values [n, padded],
 * as float32; the prefix's come first. Dimensions are in the order in which load has them. */
static void NAME(gather_row)(const ragged_row *row, const T *k, int64_t k_token, const T *v, int64_t v_token,
                             int64_t kv_head, int64_t kv_heads, int64_t head_dim, float *keys, int64_t ldk,
                             float *values, int64_t padded) {
    int64_t n = row->before + row->rows, token = kv_heads * head_dim;
    const T *keys_before = (const T *)row->keys + kv_head * head_dim;
    const T *values_before = (const T *)row->values + kv_head * head_dim;
    for (int64_t j = 0; j < n; j += LANES)
        for (int64_t d = 0; d < padded; d += PAIR) {
            const T *from = k + (j - row->before) * k_token + d;
            vf a[LANES], b[LANES];
            UNROLL
            for (int l = 0; l < LANES; l++) {
                pair key = {splat(0.0f), splat(0.0f)};
                if (j + l < row->before)
                    key = NAME(load_some)(keys_before + (j + l) * token + d, head_dim - d);
                else if (j + l < n)
                    key = NAME(load_some)(from + l * k_token, head_dim - d);
                a[l] = key.a;
                b[l] = key.b;
            }
            transpose(a);
            transpose(b);
            UNROLL
            for (int l = 0; l < LANES; l++) {
                store_f(keys + (d + l) * ldk + j, a[l]);
                store_f(keys + (d + LANES + l) * ldk + j, b[l]);
            }
        }
    for (int64_t j = 0; j < n; j++)
        for (int64_t d = 0; d < padded; d += PAIR) {
            const T *from = j < row->before ? values_before + j * token : v + (j - row->before) * v_token;
            pair value = NAME(load_some)(from + d, head_dim - d);
            store_f(values + j * padded + d, value.a);
            store_f(values + j * padded + d + LANES, value.b);
        }
}

/* out_t = sum over the keys first .. last of p[t][j] v_j, times factors[t], for n queries. */
INLINE void NAME(weigh_rows)(int n, const float *p, int64_t ldk, const float *values, int64_t padded,
                             int64_t first, int64_t last, const float *factors, T *out, int64_t out_token,
                             int64_t head_dim) {
    for (int64_t d = 0; d < padded; d += PAIR) {
        vf acc[QUERIES][2];
        UNROLL
        for (int t = 0; t < n; t++) acc[t][0] = acc[t][1] = splat(0.0f);
        for (int64_t j = first; j < last; j++) {
            vf a = load_f(values + j * padded + d), b = load_f(values + j * padded + d + LANES);
            UNROLL
            for (int t = 0; t < n; t++) {
                acc[t][0] += p[t * ldk + j] * a;
                acc[t][1] += p[t * ldk + j] * b;
            }
        }
        UNROLL
        for (int t = 0; t < n; t++)
            NAME(store_some)(out + t * out_token + d, (pair){acc[t][0] * factors[t], acc[t][1] * factors[t]},
                             head_dim - d);
    }
}

/* n queries of one head, from token t0 of their row on. */
INLINE void NAME(attend_rows)(int n, int64_t t0, const ragged_row *row, const T *q, int64_t q_token,
                              const float *keys, int64_t ldk, const float *values, int64_t padded,
                              int64_t head_dim, float scale, int64_t window, float *scratch, T *out,
                              int64_t out_token) {
    int64_t before = row->before, count = before + row->rows, first = 0, last = count;
    float *qs = scratch, *scores = scratch + QUERIES * padded, factors[QUERIES];
    if (window > 0) {
        if (before == 0 && t0 >= window) first = (t0 - window + 1) / LANES * LANES;
        last = min64(count, before + t0 + n - 1 + window);
    }
    int64_t end = round_up(last, LANES);
    for (int t = 0; t < n; t++)
        for (int64_t d = 0; d < padded; d += PAIR) {
            pair x = NAME(load_some)(q + t * q_token + d, head_dim - d);
            store_f(qs + t * padded + d, x.a * scale);
            store_f(qs + t * padded + d + LANES, x.b * scale);
        }
    score_range(n, qs, padded, keys, ldk, first, end, scores);
    for (int t = 0; t < n; t++) {
        float *s = scores + t * ldk;
        if (window > 0) {
            for (int64_t j = first > before ? first : before; j <= before + t0 + t - window; j++) s[j] = -INFINITY;
            for (int64_t j = before + t0 + t + window; j < last; j++) s[j] = -INFINITY;
        }
        for (int64_t j = last; j < end; j++) s[j] = -INFINITY;
        factors[t] = 1.0f / soft(s + first, end - first);
    }
    NAME(weigh_rows)(n, scores, ldk, values, padded, first, last, factors, out, out_token, head_dim);
}

/* out[t, h] = softmax(scale * q[t, h] . K)^T V, where K and V are those of the tokens of t's row, behind the
 * row's prefix. heads / kv_heads query heads share a key head. With a window > 0, token i sees the tokens j of
 * its row with |i - j| < window, and the whole prefix. Every row is computed as if it were alone. */
EXPORT int NAME(ds_ragged_attention)(const void *q, int64_t q_token, int64_t q_head, const void *k,
                                     int64_t k_token, int64_t k_head, const void *v, int64_t v_token,
                                     int64_t v_head, int64_t tokens, const void *lines, int64_t rows,
                                     int64_t heads, int64_t kv_heads, int64_t head_dim, float scale,
                                     int64_t window, void *out, int64_t out_token, int64_t out_head) {
    const ragged_row *table = lines;
    int64_t longest = 0, work = 0, padded = round_up(head_dim, PAIR), share = heads / kv_heads;
    for (int64_t i = 0; i < rows; i++) {
        const ragged_row *row = &table[i];
        if (row->row0 < 0 || row->rows < 0 || row->rows > tokens - row->row0 || row->before < 0 ||
            (row->before > 0 && (row->keys == NULL || row->values == NULL)))
            return OUT_OF_RANGE;
        int64_t n = row->before + row->rows;
        if (n > longest) longest = n;
        work += n * row->rows * heads * head_dim;
    }
    int64_t tasks = rows * kv_heads, ldk = round_up(longest, LANES), taken = 0;
    if (tasks == 0 || longest == 0) return 0;
    int threads = work < FEW_ELEMENTS ? 1 : (int)min64(omp_get_max_threads(), tasks);
    int64_t each = round_up(ldk * (2 * padded + QUERIES) + QUERIES * padded, 16);
    float *scratch = aligned_alloc(64, (size_t)(each * threads) * sizeof(float));
    if (scratch == NULL) return NO_MEMORY;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *keys = scratch + each * omp_get_thread_num(), *values = keys + ldk * padded;
        float *own = values + ldk * padded;
        int64_t task;
        for (;;) {
#pragma omp atomic capture
            task = taken++;
            if (task >= tasks) break;
            const ragged_row *row = &table[task / kv_heads];
            int64_t kv_head = task % kv_heads, count = round_up(row->before + row->rows, LANES);
            NAME(gather_row)(row, (const T *)k + row->row0 * k_token + kv_head * k_head, k_token,
                             (const T *)v + row->row0 * v_token + kv_head * v_head, v_token, kv_head, kv_heads,
                             head_dim, keys, count, values, padded);
            for (int64_t head = kv_head * share; head < (kv_head + 1) * share; head++) {
                const T *from = (const T *)q + row->row0 * q_token + head * q_head;
                T *to = (T *)out + row->row0 * out_token + head * out_head;
                int64_t t = 0;
                for (; t + QUERIES <= row->rows; t += QUERIES)
                    NAME(attend_rows)(QUERIES, t, row, from + t * q_token, q_token, keys, count, values, padded,
                                      head_dim, scale, window, own, to + t * out_token, out_token);
                for (; t + 2 <= row->rows; t += 2)
                    NAME(attend_rows)(2, t, row, from + t * q_token, q_token, keys, count, values, padded,
                                      head_dim, scale, window, own, to + t * out_token, out_token);
                for (; t < row->rows; t++)
                    NAME(attend_rows)(1, t, row, from + t * q_token, q_token, keys, count, values, padded,
                                      head_dim, scale, window, own, to + t * out_token, out_token);
            }
        }
    }
    free(scratch);
    return 0;
}
