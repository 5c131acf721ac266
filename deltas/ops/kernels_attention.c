/* ds_decode_attention: one query token per row over a slot cache; kernels.c includes this once per storage
 * type. */
#ifndef DS_ATTENTION_COMMON
#define DS_ATTENTION_COMMON
#define BLOCK 256 /* keys of one unit of work */
#define GROUP 8   /* query heads of one unit of work: they share the reading of its keys and values */
#define HEAD_DIM_MAX 512
#if LANES == 16
#define SHARE 4 /* query heads that share a reading of values from registers */
#else
#define SHARE 2
#endif

INLINE int64_t blocks_of(int64_t length) { return length > BLOCK ? (length + BLOCK - 1) / BLOCK : 1; }

/* A thread's place among the tasks: they run over rows, key heads, chunks of heads and blocks of keys. */
typedef struct {
    int64_t row, first, spill; /* the row's first task; the tasks before it of rows longer than one block */
    int64_t unit, block;       /* of the current task */
} place;
INLINE void move_to(place *at, int64_t task, const int64_t *lengths, int64_t per_row) {
    int64_t blocks;
    while (task >= at->first + (blocks = blocks_of(lengths[at->row])) * per_row) {
        at->first += blocks * per_row;
        if (blocks > 1) at->spill += blocks * per_row;
        at->row++;
    }
    at->unit = (task - at->first) / blocks;
    at->block = (task - at->first) % blocks;
}
/* Keys and values that the next task will read. */
typedef struct {
    const char *k, *v;
    int64_t n;
} block_ahead;
#endif

#if DS_BF16 && defined(__AVX512BF16__)
#define PRODUCT_BF16 1
#define Q_TYPE uint16_t
#else
#define PRODUCT_BF16 0
#define Q_TYPE float
#endif

INLINE void NAME(fetch_token)(const char *p, int64_t j, int64_t token, int64_t head_dim) {
    const char *at = p + j * token * (int64_t)sizeof(T);
    for (int64_t i = 0; i < head_dim * (int64_t)sizeof(T); i += 64) __builtin_prefetch(at + i, 0, 2);
}
/* The products of q (padded to PAIR) and one key, still to be summed over the lanes. */
INLINE vf NAME(products)(const Q_TYPE *q, const T *key, int64_t head_dim) {
    vf acc = splat(0.0f);
    int64_t d = 0;
#if PRODUCT_BF16
    UNROLL
    for (; d + PAIR <= head_dim; d += PAIR)
        acc = (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(q + d),
                                   (__m512bh)_mm512_loadu_si512(key + d));
    if (d < head_dim)
        acc = (vf)_mm512_dpbf16_ps(
            (__m512)acc, (__m512bh)_mm512_loadu_si512(q + d),
            (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)((1u << (head_dim - d)) - 1u), key + d));
#else
    UNROLL
    for (; d < head_dim; d += PAIR) {
        pair kv = NAME(load_some)(key + d, head_dim - d);
        acc += load_f(q + d) * kv.a;
        acc += load_f(q + d + LANES) * kv.b;
    }
#endif
    return acc;
}

/* scores[j] = scale * q . k_j for n keys; entries up to the next multiple of LANES become -inf. */
INLINE void NAME(scores)(const Q_TYPE *q, const T *k, int64_t k_token, int64_t n, int64_t head_dim,
                         float scale, float *scores, const block_ahead *next) {
    vf part[LANES];
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
        const T *key = k + j * k_token;
        for (int64_t i = j; i < j + LANES && i < next->n; i++)
            NAME(fetch_token)(next->k, i, k_token, head_dim);
        UNROLL
        for (int l = 0; l < LANES; l++) part[l] = NAME(products)(q, key + l * k_token, head_dim);
        store_f(scores + j, sums(LANES, part) * scale);
    }
    if (j < n) {
        for (int l = 0; l < LANES; l++)
            part[l] = NAME(products)(q, k + min64(j + l, n - 1) * k_token, head_dim);
        store_f(scores + j, sums(LANES, part) * scale);
        for (j = n; j % LANES != 0; j++) scores[j] = -INFINITY;
    }
}

/* scores[j] = cap * tanh(scores[j] / cap), which keeps them between -cap and cap. */
INLINE void NAME(soften)(float *scores, int64_t n, float cap) {
    for (int64_t j = 0; j < n; j++) scores[j] = cap * tanhf(scores[j] / cap);
}

/* Scores to unnormalised probabilities in place; returns their sum, and in *top the subtracted maximum. */
INLINE float NAME(exponentials)(float *scores, int64_t n, float *top) {
    vf m = splat(-INFINITY), total = splat(0.0f);
    for (int64_t j = 0; j < n; j += LANES) {
        vf s = load_f(scores + j);
        m = select_f(s > m, s, m);
    }
    float best = m[0];
    for (int l = 1; l < LANES; l++) best = m[l] > best ? m[l] : best;
    for (int64_t j = 0; j < n; j += LANES) {
        vf p = exp_f(load_f(scores + j) - best);
        total += p;
        store_f(scores + j, p);
    }
    *top = best;
    return sum(total);
}

/* acc[h][0:count] = sum over n keys of p[h][j] * v_j[0:count] for `heads` heads; p has BLOCK columns. */
INLINE void NAME(weigh)(int heads, int pairs, const float *p, const T *v, int64_t v_token, int64_t n,
                        int64_t count, float *acc, int64_t padded, const block_ahead *next,
                        int64_t head_dim) {
    pair sum_[SHARE][2];
    UNROLL
    for (int h = 0; h < heads; h++) {
        UNROLL
        for (int c = 0; c < pairs; c++) sum_[h][c] = (pair){splat(0.0f), splat(0.0f)};
    }
    for (int64_t j = 0; j < n; j++) {
        if (j < next->n) NAME(fetch_token)(next->v, j, v_token, head_dim);
        UNROLL
        for (int c = 0; c < pairs; c++) {
            pair value = NAME(load_some)(v + j * v_token + c * PAIR, count - c * PAIR);
            UNROLL
            for (int h = 0; h < heads; h++) {
                sum_[h][c].a += p[h * BLOCK + j] * value.a;
                sum_[h][c].b += p[h * BLOCK + j] * value.b;
            }
        }
    }
    UNROLL
    for (int h = 0; h < heads; h++) {
        UNROLL
        for (int c = 0; c < pairs; c++) {
            store_f(acc + h * padded + c * PAIR, sum_[h][c].a);
            store_f(acc + h * padded + c * PAIR + LANES, sum_[h][c].b);
        }
    }
}

INLINE void NAME(weigh_all)(int heads, const float *p, const T *v, int64_t v_token, int64_t n,
                            int64_t head_dim, float *acc, int64_t padded, const block_ahead *next) {
    const block_ahead none = {0};
    int64_t d = 0;
    for (; d + 2 * PAIR <= head_dim; d += 2 * PAIR)
        NAME(weigh)(heads, 2, p, v + d, v_token, n, 2 * PAIR, acc + d, padded, d == 0 ? next : &none,
                    head_dim);
    for (; d < head_dim; d += PAIR)
        NAME(weigh)(heads, 1, p, v + d, v_token, n, head_dim - d, acc + d, padded, d == 0 ? next : &none,
                    head_dim);
}

/* Divides by the sum and stores one head. */
INLINE void NAME(finish)(const float *acc, float total, T *out, int64_t head_dim) {
    float inverse = 1.0f / total;
    for (int64_t d = 0; d < head_dim; d += PAIR)
        NAME(store_some)(out + d, (pair){load_f(acc + d) * inverse, load_f(acc + d + LANES) * inverse},
                         head_dim - d);
}

/* Merges one head's blocks, in order, into the first record: its sums and its total. */
static void NAME(merge_blocks)(float *records, int64_t record, int64_t blocks, int h, int64_t padded) {
    float *acc = records + h * padded, *top = records + GROUP * padded + h, *total = top + GROUP;
    for (int64_t b = 1; b < blocks; b++) {
        const float *other = records + b * record;
        float other_top = other[GROUP * padded + h], other_total = other[GROUP * padded + GROUP + h];
        float best = other_top > *top ? other_top : *top;
        float mine = expf(*top - best), theirs = expf(other_top - best);
        for (int64_t d = 0; d < padded; d += LANES)
            store_f(acc + d, load_f(acc + d) * mine + load_f(other + h * padded + d) * theirs);
        *total = *total * mine + other_total * theirs;
        *top = best;
    }
}

/* n keys for up to GROUP query heads: sums acc [heads, padded], and per head the maximum and the total.
 * bias: what is added to the first head's scores, those of the others bias_head further on; or NULL. */
static void NAME(attend_block)(int heads, const Q_TYPE *q, const T *k, const T *v, int64_t token, int64_t n,
                               int64_t head_dim, int64_t padded, float scale, float softcap,
                               const float *bias, int64_t bias_head, float *acc, float *top, float *total,
                               const block_ahead *next) {
    const block_ahead none = {0};
    float p[GROUP * BLOCK] __attribute__((aligned(64)));
    for (int h = 0; h < heads; h++) {
        const block_ahead *then = h == 0 ? next : &none;
        if (head_dim == 64) /* the usual sizes, with loops that the compiler can unroll */
            NAME(scores)(q + h * padded, k, token, n, 64, scale, p + h * BLOCK, then);
        else if (head_dim == 128)
            NAME(scores)(q + h * padded, k, token, n, 128, scale, p + h * BLOCK, then);
        else
            NAME(scores)(q + h * padded, k, token, n, head_dim, scale, p + h * BLOCK, then);
        if (softcap > 0.0f) NAME(soften)(p + h * BLOCK, n, softcap);
        if (bias != NULL)
            for (int64_t j = 0; j < n; j++) p[h * BLOCK + j] += bias[h * bias_head + j];
    }
    for (int h = 0; h < heads; h++) total[h] = NAME(exponentials)(p + h * BLOCK, n, top + h);
    for (int h = 0; h < heads; h += SHARE) {
        const float *ph = p + h * BLOCK;
        const block_ahead *then = h == 0 ? next : &none;
        switch (heads - h) {
        case 1: NAME(weigh_all)(1, ph, v, token, n, head_dim, acc + h * padded, padded, then); break;
#if SHARE > 2
        case 2: NAME(weigh_all)(2, ph, v, token, n, head_dim, acc + h * padded, padded, then); break;
        case 3: NAME(weigh_all)(3, ph, v, token, n, head_dim, acc + h * padded, padded, then); break;
#endif
        default: NAME(weigh_all)(SHARE, ph, v, token, n, head_dim, acc + h * padded, padded, then); break;
        }
    }
}

/* out[row, h] = softmax(scale * q[row, h] . K)^T V over lengths[row] tokens of slots[row] from firsts[row] on
 * (from 0 without firsts), zeros where the length is 0; heads / kv_heads query heads share a key head. Both
 * caches have the same strides. The tokens of a prompt are rows too: of one slot, with growing lengths.
 * Where softcap is positive, scores become softcap * tanh(score / softcap) first; then bias, unless it is
 * NULL, is added: bias[row, h, j] for the j-th visible key, its keys next to each other.
 *
 * Work is cut into blocks of BLOCK keys whatever the batch, and blocks are merged in order: so a long context
 * uses all threads, and a row's result does not depend on its neighbours. */
EXPORT int NAME(ds_decode_attention)(const void *q, int64_t q_row, int64_t q_head, const void *k,
                                     const void *v, int64_t c_slot, int64_t c_head, int64_t c_token,
                                     int64_t c_slots, int64_t c_tokens, const int64_t *slots,
                                     const int64_t *firsts, const int64_t *lengths, int64_t rows,
                                     int64_t heads, int64_t kv_heads, int64_t head_dim, float scale,
                                     float softcap, const float *bias, int64_t bias_row,
                                     int64_t bias_head, void *out, int64_t out_row, int64_t out_head) {
    if (head_dim > HEAD_DIM_MAX) return OUT_OF_RANGE;
    int64_t share = heads / kv_heads, chunks = (share + GROUP - 1) / GROUP, padded = round_up(head_dim, PAIR);
    int64_t per_row = kv_heads * chunks; /* units of one block of a row */
    int64_t tasks = 0, spilled = 0, keys = 0;
    for (int64_t i = 0; i < rows; i++) {
        int64_t first = firsts == NULL ? 0 : firsts[i];
        if (slots[i] < 0 || slots[i] >= c_slots || first < 0 || first > c_tokens ||
            lengths[i] > c_tokens - first)
            return OUT_OF_RANGE;
        int64_t blocks = blocks_of(lengths[i]);
        tasks += blocks * per_row;
        if (blocks > 1) spilled += blocks * per_row;
        keys += lengths[i];
    }
    if (tasks == 0) return 0;
    int64_t record =
        GROUP * (padded + LANES); /* acc [GROUP, padded], then GROUP tops, GROUP totals, and room */
    float *store = NULL;
    if (spilled > 0 && (store = aligned_alloc(64, (size_t)(spilled * record) * sizeof(float))) == NULL)
        return NO_MEMORY;
    int64_t taken = 0;
#pragma omp parallel if (keys * heads * head_dim >= FEW_ELEMENTS)
    {
        place at = {0}, later;
        float local[GROUP * HEAD_DIM_MAX] __attribute__((aligned(64)));
        Q_TYPE qs[GROUP * HEAD_DIM_MAX] __attribute__((aligned(64)));
        int64_t task, coming;
#pragma omp atomic capture
        coming = taken++;
        while ((task = coming) < tasks) {
            move_to(&at, task, lengths, per_row);
#pragma omp atomic capture
            coming = taken++;
            block_ahead next = {0};
            if (coming < tasks) {
                later = at;
                move_to(&later, coming, lengths, per_row);
                int64_t from = slots[later.row] * c_slot + later.unit / chunks * c_head +
                               ((firsts == NULL ? 0 : firsts[later.row]) + later.block * BLOCK) * c_token;
                next = (block_ahead){(const char *)((const T *)k + from), (const char *)((const T *)v + from),
                                     min64(BLOCK, lengths[later.row] - later.block * BLOCK)};
            }
            int64_t row = at.row, kv = at.unit / chunks, h0 = kv * share + at.unit % chunks * GROUP;
            int n_heads = (int)min64(GROUP, (kv + 1) * share - h0);
            T *to = (T *)out + row * out_row + h0 * out_head;
            if (lengths[row] <= 0) {
                for (int h = 0; h < n_heads; h++) memset(to + h * out_head, 0, (size_t)head_dim * sizeof(T));
                continue;
            }
            for (int h = 0; h < n_heads; h++) {
                const T *from = (const T *)q + row * q_row + (h0 + h) * q_head;
#if PRODUCT_BF16
                memset(qs + h * padded, 0, (size_t)padded * sizeof(T));
                memcpy(qs + h * padded, from, (size_t)head_dim * sizeof(T));
#else
                for (int64_t d = 0; d < head_dim; d += PAIR) {
                    pair x = NAME(load_some)(from + d, head_dim - d);
                    store_f(qs + h * padded + d, x.a);
                    store_f(qs + h * padded + d + LANES, x.b);
                }
#endif
            }
            int64_t from = slots[row] * c_slot + kv * c_head +
                           ((firsts == NULL ? 0 : firsts[row]) + at.block * BLOCK) * c_token;
            int64_t n = min64(BLOCK, lengths[row] - at.block * BLOCK);
            int whole = blocks_of(lengths[row]) == 1;
            float top[GROUP], total[GROUP];
            float *acc = whole ? local : store + (at.spill + task - at.first) * record;
            const float *added =
                bias == NULL ? NULL : bias + row * bias_row + h0 * bias_head + at.block * BLOCK;
            NAME(attend_block)(n_heads, qs, (const T *)k + from, (const T *)v + from, c_token, n, head_dim,
                               padded, scale, softcap, added, bias_head, acc, top, total, &next);
            if (whole) {
                for (int h = 0; h < n_heads; h++)
                    NAME(finish)(acc + h * padded, total[h], to + h * out_head, head_dim);
            } else {
                memcpy(acc + GROUP * padded, top, sizeof top);
                memcpy(acc + GROUP * padded + GROUP, total, sizeof total);
            }
        }
    }
    for (int64_t row = 0, spill = 0; row < rows && spilled > 0; row++) {
        int64_t blocks = blocks_of(lengths[row]);
        if (blocks <= 1) continue;
        for (int64_t unit = 0; unit < per_row; unit++, spill += blocks) {
            int64_t kv = unit / chunks, h0 = kv * share + unit % chunks * GROUP;
            int n_heads = (int)min64(GROUP, (kv + 1) * share - h0);
            float *records = store + spill * record;
            for (int h = 0; h < n_heads; h++) {
                NAME(merge_blocks)(records, record, blocks, h, padded);
                NAME(finish)(records + h * padded, records[GROUP * padded + GROUP + h],
                             (T *)out + row * out_row + (h0 + h) * out_head, head_dim);
            }
        }
    }
    free(store);
    return 0;
}
#undef PRODUCT_BF16
#undef Q_TYPE
