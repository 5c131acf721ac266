/* ds_patch: the patches of many deltas at one site, in place; kernels.c includes this for each dtype. */
#ifndef DS_PATCH_COMMON
#define DS_PATCH_COMMON
enum { READS_X, READS_Y, READS_X_AND_Y, READS_RESIDUAL };
#define TOKENS 4                                  /* tokens that share one reading of the factors */
#define UNIT 16                                   /* tokens of one unit of work */
#define LINES ((int)(PAIR * sizeof(T) + 63) / 64) /* cache lines of a pair */
#define FEW 32768 /* multiply-adds below which waking the other threads costs more than it gives */
#if LANES == 16
#define DOT_ROWS 4
#else
#define DOT_ROWS 2
#endif

/* One line of the table: 12 fields of 8 bytes, in the order of deltas/ops/native.py's ENTRY_FIELDS. */
typedef struct {
    int64_t row0, rows, rank;
    const void *down, *down_bias, *up, *gain, *shift;
    int64_t out0, out, activation, reads;
} entry;
_Static_assert(sizeof(entry) == 96, "the table's layout");

INLINE int is_empty(const entry *e) { return e->rows <= 0 || (e->rank == 0 && e->gain == NULL && e->shift == NULL); }
INLINE int is_inside(const entry *e, int64_t tokens, int64_t in, int64_t columns) {
    return e->row0 >= 0 && e->row0 + e->rows <= tokens && e->out0 >= 0 && e->out >= 0 &&
           e->out0 + e->out <= columns && e->rank >= 0 && e->reads >= READS_X && e->reads <= READS_RESIDUAL &&
           (e->rank == 0 || e->out == in || e->reads == READS_X || e->reads == READS_RESIDUAL);
}

/* Whether e changes columns that the entry before it changes for the same tokens: then it must come later. */
INLINE int follows(const entry *e, const entry *before) {
    return e->row0 == before->row0 && e->rows == before->rows && e->out0 < before->out0 + before->out &&
           before->out0 < e->out0 + e->out;
}
INLINE int64_t units_of(const entry *table, int64_t i) {
    if (is_empty(&table[i]) || (i > 0 && follows(&table[i], &table[i - 1]))) return 0;
    return (table[i].rows + UNIT - 1) / UNIT;
}
/* A thread's place in the table: entry i has the units first .. first + count - 1. It only moves forward. */
typedef struct {
    int64_t i, first, count;
} cursor;
INLINE int64_t find(cursor *c, const entry *table, int64_t unit) {
    while (unit >= c->first + c->count) {
        c->first += c->count;
        c->count = units_of(table, ++c->i);
    }
    return c->i;
}
#endif

/* h[t][r] = z_t . down_r for n tokens and m rows of down; summed in the same order for every n and m. */
INLINE void NAME(dots)(int n, int m, const T *z, int64_t ldz, const T *down, int64_t in, float *h, int64_t ldh,
                       ahead *next) {
    ahead coming = *next;
    vf acc[4 * 8];
    UNROLL
    for (int k = 0; k < n * m; k++) acc[k] = splat(0.0f);
    int64_t i = 0;
    for (; i + PAIR <= in; i += PAIR) {
        NAME(strip) a[8];
        coming = fetch(coming, m * LINES);
        UNROLL
        for (int r = 0; r < m; r++) a[r] = NAME(load_strip)(down + r * in + i, PAIR);
        UNROLL
        for (int t = 0; t < n; t++) {
            NAME(strip) x = NAME(load_strip)(z + t * ldz + i, PAIR);
            UNROLL
            for (int r = 0; r < m; r++) acc[t * m + r] = NAME(add_products)(acc[t * m + r], x, a[r]);
        }
    }
    if (i < in) {
        UNROLL
        for (int r = 0; r < m; r++) {
            NAME(strip) a = NAME(load_strip)(down + r * in + i, in - i);
            UNROLL
            for (int t = 0; t < n; t++)
                acc[t * m + r] =
                    NAME(add_products)(acc[t * m + r], NAME(load_strip)(z + t * ldz + i, in - i), a);
        }
    }
    *next = coming;
    const int at_once = n * m < LANES ? n * m : LANES;
    UNROLL
    for (int k = 0; k < n * m; k += at_once) {
        float found[LANES] __attribute__((aligned(64)));
        store_f(found, sums(at_once, acc + k));
        UNROLL
        for (int j = 0; j < at_once; j++) h[(k + j) / m * ldh + (k + j) % m] = found[j];
    }
}

/* What `up` is multiplied by. Where two of its rows go in one instruction that is h rounded to bfloat16, as the
 * backbone's own layers would round it, and zero behind an odd rank. */
#if DS_BF16 && defined(DOT_BF16)
typedef T NAME(hidden);
INLINE void NAME(to_hidden)(float *h, int64_t rank, T *hidden) {
    if (rank % 2) h[rank] = 0.0f;
    for (int64_t r = 0; r < rank; r += LANES) {
        __m256bh rounded = _mm512_cvtneps_pbh((__m512)load_f(h + r));
        memcpy(hidden + r, &rounded, sizeof rounded);
    }
}
#else
typedef float NAME(hidden);
INLINE void NAME(to_hidden)(float *h, int64_t rank, float *hidden) {
    memcpy(hidden, h, (size_t)rank * sizeof(float));
}
#endif

/* y[t][0:count] = gain * y + h_t . up[:, 0:count] + shift for n tokens and `pairs` pairs of columns; the last
 * may be partial. */
INLINE void NAME(spread)(int n, int pairs, const NAME(hidden) *h, int64_t ldh, const T *up, int64_t rank,
                         int64_t out, const T *gain, const T *shift, T *y, int64_t ldy, int64_t count, ahead *next) {
    ahead coming = *next;
    pair acc[4][4];
    UNROLL
    for (int t = 0; t < n; t++) {
        UNROLL
        for (int p = 0; p < pairs; p++) acc[t][p] = NAME(load_some)(y + t * ldy + p * PAIR, count - p * PAIR);
    }
    if (gain != NULL) {
        UNROLL
        for (int p = 0; p < pairs; p++) {
            pair g = NAME(load_some)(gain + p * PAIR, count - p * PAIR);
            UNROLL
            for (int t = 0; t < n; t++) {
                acc[t][p].a *= g.a;
                acc[t][p].b *= g.b;
            }
        }
    }
#if DS_BF16 && defined(DOT_BF16)
    for (int64_t r = 0; r < rank; r += 2) { /* the products of two rows of up in one go */
        coming = fetch(coming, 2 * pairs * LINES);
        UNROLL
        for (int p = 0; p < pairs; p++) {
            const T *from = up + r * out + p * PAIR;
            vu lower = NAME(load_strip)(from, count - p * PAIR), upper = {0};
            if (r + 1 < rank) upper = NAME(load_strip)(from + out, count - p * PAIR);
            vu even = (vu)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)lower, (__m512i)(upper << 16));
            vu odd = (vu)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)(lower >> 16), (__m512i)upper);
            UNROLL
            for (int t = 0; t < n; t++) {
                int32_t both;
                memcpy(&both, h + t * ldh + r, sizeof both);
                vu w = (vu)_mm512_set1_epi32(both);
                acc[t][p].a = NAME(add_products)(acc[t][p].a, w, even);
                acc[t][p].b = NAME(add_products)(acc[t][p].b, w, odd);
            }
        }
    }
#else
    for (int64_t r = 0; r < rank; r++) {
        coming = fetch(coming, pairs * LINES);
        UNROLL
        for (int p = 0; p < pairs; p++) {
            pair b = NAME(load_some)(up + r * out + p * PAIR, count - p * PAIR);
            UNROLL
            for (int t = 0; t < n; t++) {
                acc[t][p].a += h[t * ldh + r] * b.a;
                acc[t][p].b += h[t * ldh + r] * b.b;
            }
        }
    }
#endif
    *next = coming;
    if (shift != NULL) {
        UNROLL
        for (int p = 0; p < pairs; p++) {
            pair s = NAME(load_some)(shift + p * PAIR, count - p * PAIR);
            UNROLL
            for (int t = 0; t < n; t++) {
                acc[t][p].a += s.a;
                acc[t][p].b += s.b;
            }
        }
    }
    UNROLL
    for (int t = 0; t < n; t++) {
        UNROLL
        for (int p = 0; p < pairs; p++) NAME(store_some)(y + t * ldy + p * PAIR, acc[t][p], count - p * PAIR);
    }
}

/* x + y for n tokens, [n, in], rounded as the backbone's own sum would be. */
static void NAME(add_inputs)(int n, const T *x, int64_t ldx, const T *y, int64_t ldy, int64_t in, T *z) {
    for (int t = 0; t < n; t++)
        for (int64_t i = 0; i < in; i += PAIR) {
            pair v = NAME(load_some)(x + t * ldx + i, in - i), w = NAME(load_some)(y + t * ldy + i, in - i);
            NAME(store_some)(z + t * in + i, (pair){v.a + w.a, v.b + w.b}, in - i);
        }
}

/* One entry for n tokens; x and y are at the first token, y at the entry's first column. */
INLINE void NAME(patch_tokens)(int n, const entry *e, const T *x, int64_t ldx, int64_t in, T *y, int64_t ldy,
                               float *scratch, ahead *next) {
    int64_t rank = e->rank, ldh = round_up(rank, LANES);
    const T *down = e->down, *bias = e->down_bias, *up = e->up, *gain = e->gain, *shift = e->shift;
    float *h = scratch;
    NAME(hidden) *hidden = (NAME(hidden) *)(scratch + TOKENS * ldh);
    if (rank > 0) {
        const int wide = n == 1 ? 2 * DOT_ROWS : DOT_ROWS;
        const T *z = e->reads == READS_Y ? y : x; /* as it lies */
        int64_t ldz = e->reads == READS_Y ? ldy : ldx;
        if (e->reads == READS_X_AND_Y) {
            T *both = (T *)(scratch + 2 * TOKENS * ldh);
            NAME(add_inputs)(n, x, ldx, y, ldy, in, both);
            z = both;
            ldz = in;
        }
        int64_t r = 0;
        for (; r + wide <= rank; r += wide) NAME(dots)(n, wide, z, ldz, down + r * in, in, h + r, ldh, next);
        for (; r + DOT_ROWS <= rank; r += DOT_ROWS)
            NAME(dots)(n, DOT_ROWS, z, ldz, down + r * in, in, h + r, ldh, next);
        for (; r < rank; r++) NAME(dots)(n, 1, z, ldz, down + r * in, in, h + r, ldh, next);
        if (bias != NULL || e->activation != IDENTITY)
            for (int t = 0; t < n; t++)
                for (r = 0; r < rank; r++) {
                    float v = h[t * ldh + r];
                    if (bias != NULL) v += NAME(load_one)(bias + r);
                    h[t * ldh + r] = activate(v, e->activation);
                }
        for (int t = 0; t < n; t++) NAME(to_hidden)(h + t * ldh, rank, hidden + t * ldh);
    }
    const int pairs = n == 1 && LANES == 16 ? 4 : 2;
    int64_t o = 0;
    for (; o + pairs * PAIR <= e->out; o += pairs * PAIR)
        NAME(spread)(n, pairs, hidden, ldh, up + o, rank, e->out, gain ? gain + o : NULL, shift ? shift + o : NULL,
                     y + o, ldy, pairs * PAIR, next + 1);
    for (; o < e->out; o += PAIR)
        NAME(spread)(n, 1, hidden, ldh, up + o, rank, e->out, gain ? gain + o : NULL, shift ? shift + o : NULL, y + o,
                     ldy, e->out - o, next + 1);
}

static void NAME(patch_unit)(const entry *e, int64_t token0, const T *x, int64_t ldx, int64_t in, T *y,
                             int64_t ldy, float *scratch, ahead *next) {
    int64_t end = min64(token0 + UNIT, e->rows), t = token0;
    const T *from = x + e->row0 * ldx;
    T *to = y + e->row0 * ldy + e->out0;
    for (; t + TOKENS <= end; t += TOKENS)
        NAME(patch_tokens)(TOKENS, e, from + t * ldx, ldx, in, to + t * ldy, ldy, scratch, next);
    for (; t < end; t++) NAME(patch_tokens)(1, e, from + t * ldx, ldx, in, to + t * ldy, ldy, scratch, next);
}

/* y[t, out0:out0+out] = gain * y + up^T act(down z_t + down_bias) + shift for the tokens of every entry; z by `reads`:
 * x, y's own columns, their sum, or x as the residual. x is [tokens, in], y [tokens, columns]. Entries may
 * overlap only where one directly follows the other in the table with the same tokens; then they apply in
 * order. */
EXPORT int NAME(ds_patch)(const void *lines, int64_t entries, const void *x, int64_t ldx, int64_t in, void *y,
                          int64_t ldy, int64_t tokens, int64_t columns) {
    const entry *table = lines;
    int64_t units = 0, work = 0, rank = 0;
    for (int64_t i = 0; i < entries; i++) {
        if (is_empty(&table[i])) continue;
        if (!is_inside(&table[i], tokens, in, columns)) return OUT_OF_RANGE;
        if (table[i].rank > rank) rank = table[i].rank;
        units += units_of(table, i);
        work += table[i].rows * (table[i].rank * (in + table[i].out) + table[i].out);
    }
    if (units == 0) return 0;
    int threads = work < FEW ? 1 : (int)min64(omp_get_max_threads(), units);
    int64_t each = TOKENS * round_up(in + 2 * round_up(rank, LANES), 16); /* floats: h, and a sum of two inputs */
    float *scratch = aligned_alloc(64, (size_t)(each * threads) * sizeof(float));
    if (scratch == NULL) return NO_MEMORY;
    int64_t taken = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *own = scratch + each * omp_get_thread_num();
        cursor c = {0, 0, units_of(table, 0)};
        int64_t unit, i, token0, coming;
#pragma omp atomic capture
        coming = taken++;
        while ((unit = coming) < units) { /* a thread knows its next unit, to fetch the factors meanwhile */
            i = find(&c, table, unit);
            token0 = (unit - c.first) * UNIT;
#pragma omp atomic capture
            coming = taken++;
            ahead next[2] = {{0}, {0}}; /* its down, its up */
            if (coming < units) {
                const entry *then = &table[find(&c, table, coming)];
                size_t row = (size_t)then->rank * sizeof(T);
                if (then != &table[i] && then->rank > 0) {
                    next[0] = (ahead){then->down, (const char *)then->down + row * (size_t)in};
                    next[1] = (ahead){then->up, (const char *)then->up + row * (size_t)then->out};
                }
            }
            do NAME(patch_unit)(&table[i], token0, x, ldx, in, y, ldy, own, next);
            while (++i < entries && !is_empty(&table[i]) && follows(&table[i], &table[i - 1]));
        }
    }
    free(scratch);
    return 0;
}
