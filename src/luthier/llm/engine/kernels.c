/* The small operations of a decoder layer, each in one pass over its numbers: norms, the gate, rotation, attention,
 * low-rank adapters; products of integers of 16 bits, and what those of 8 need before and behind them; and the softmax
 * over the vocabulary.
 *
 * On a processor a training step spends half of its time outside of the large matrix products: torch makes each of
 * these of a dozen calls, and each call reads and writes everything. Here a row of numbers stays in the processor's
 * cache. `kernels.py` compiles this file with the machine's C compiler, once per type, and hands it torch's memory;
 * without a compiler the same is done by torch (`layer_operations.py`), and the tests hold the two together. Sums are
 * in float32; threads take fixed shares, so that every run gives the same numbers.
 *
 * Every function returns 0, or 1 where memory is short. NUMBER_BITS is 16 for bfloat16 and 32 for float; INT8_MOST,
 * INT16_MOST, INT16_NORM, FINER and LEAST are those of `layer_operations.py`. Widths are multiples of LANES. T tokens,
 * I inputs, O outputs, R ranks, E width, F half of the gate's outputs, C heads of all kinds (queries first, then keys,
 * then values), D head width, P prefix, S keys.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

#define LANES 16
#if defined(__AVX512F__)
#define TILE_ROWS 6 /* results of so many rows and vectors are held in registers */
#define TILE_VECTORS 4
#else
#define TILE_ROWS 4
#define TILE_VECTORS 1
#endif
#define INNER 128 /* of the inner dimension of a product, what is computed with before going on */
#define QUERIES 48 /* of one head group that attend together, */
#define KEYS 64    /* to so many keys at once: what they need stays in the nearest cache */
#define INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

INLINE vector load(const float *from)
{
    vector found;
    memcpy(&found, from, sizeof found);
    return found;
}

INLINE void store(float *to, vector values) { memcpy(to, &values, sizeof values); }

#if NUMBER_BITS == 16
typedef uint16_t number;

INLINE vector read(const number *from)
{
    halves found;
    memcpy(&found, from, sizeof found);
    return (vector)(__builtin_convertvector(found, integers) << 16);
}

/* The upper half has the nearest bfloat16, of two the even one. */
INLINE integers rounded(vector values) { return (integers)values + 0x7fff + ((integers)values >> 16 & 1); }

INLINE void write(number *to, vector values)
{
    halves found = __builtin_convertvector(rounded(values) >> 16, halves);
    memcpy(to, &found, sizeof found);
}
#else
typedef float number;

INLINE vector read(const number *from) { return load(from); }
INLINE void write(number *to, vector values) { store(to, values); }
#endif

INLINE vector all(float value) { return (vector){0} + value; }

INLINE vector choose(integers which, vector yes, vector no)
{
    return (vector)((which & (integers)yes) | (~which & (integers)no));
}

INLINE float sum(vector values)
{
    float of[LANES];
    store(of, values);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) of[i] += of[half + i];
    return of[0];
}

INLINE float largest(vector values)
{
    float of[LANES];
    store(of, values);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) of[i] = of[i] > of[half + i] ? of[i] : of[half + i];
    return of[0];
}

INLINE vector larger(vector x, vector y) /* y where either is NaN */
{
#ifdef __AVX512F__
    return (vector)_mm512_max_ps((__m512)x, (__m512)y);
#else
    return choose(x > y, x, y);
#endif
}

/* e^x to a few units in the last place; what is below -87 counts as that. NaN stays NaN. */
INLINE vector exponential(vector x)
{
    x = larger(all(-87.0f), x);
#ifdef __AVX512F__
    vector whole = (vector)_mm512_roundscale_ps((__m512)(x * 1.44269504f), 0);
#else
    const float magic = 12582912.0f; /* adding it rounds to an integer */
    x = choose(x > 88.0f, all(88.0f), x);
    vector shifted = x * 1.44269504f + magic;
    vector whole = shifted - magic;
#endif
    vector r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    vector y = all(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
#ifdef __AVX512F__
    return (vector)_mm512_scalef_ps((__m512)y, (__m512)whole);
#else
    return (vector)((integers)y + (((integers)shifted - (integers)all(magic)) << 23));
#endif
}

INLINE float inverse_rms(const number *x, int64_t width, float epsilon)
{
    vector squares = {0};
    for (int64_t e = 0; e < width; e += LANES) squares += read(x + e) * read(x + e);
    return 1.0f / sqrtf(sum(squares) / (float)width + epsilon);
}

/* y = w x / rms(x) */
int rms_norm(number *y, const number *x, const number *weight, int64_t tokens, int64_t width, float epsilon,
              int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tokens; t++) {
        const number *from = x + t * width;
        float inverse = inverse_rms(from, width, epsilon);
        for (int64_t e = 0; e < width; e += LANES)
            write(y + t * width + e, read(from + e) * inverse * read(weight + e));
    }
    return 0;
}

/* dx = (w dy - x^ mean(x^ w dy)) / rms + more, with x^ = x / rms(x) */
int rms_norm_backward(number *dx, const number *dy, const number *x, const number *weight, const number *more,
                       int64_t tokens, int64_t width, float epsilon, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tokens; t++) {
        const number *at = x + t * width, *gradient = dy + t * width;
        float inverse = inverse_rms(at, width, epsilon);
        vector products = {0};
        for (int64_t e = 0; e < width; e += LANES) products += read(gradient + e) * read(weight + e) * read(at + e);
        float mean = sum(products) * inverse * inverse / (float)width;
        for (int64_t e = 0; e < width; e += LANES) {
            vector own = (read(gradient + e) * read(weight + e) - read(at + e) * mean) * inverse;
            write(dx + t * width + e, own + read(more + t * width + e));
        }
    }
    return 0;
}

INLINE vector sigmoid(vector x) { return 1.0f / (1.0f + exponential(-x)); }

/* y = silu(gate) up */
int gated(number *y, const number *gate_up, int64_t tokens, int64_t half, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tokens; t++) {
        const number *gate = gate_up + 2 * t * half, *up = gate + half;
        for (int64_t f = 0; f < half; f += LANES) {
            vector x = read(gate + f);
            write(y + t * half + f, x * sigmoid(x) * read(up + f));
        }
    }
    return 0;
}

/* From the gradient of y in `dy`: that of gate and up, and y again in the place of `dy`. */
int gated_backward(number *dgate_up, number *dy, const number *gate_up, int64_t tokens, int64_t half, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tokens; t++) {
        const number *gate = gate_up + 2 * t * half, *up = gate + half;
        number *dgate = dgate_up + 2 * t * half, *dup = dgate + half, *both = dy + t * half;
        for (int64_t f = 0; f < half; f += LANES) {
            vector x = read(gate + f), u = read(up + f), gradient = read(both + f);
            vector s = sigmoid(x), silu = x * s;
            write(dup + f, gradient * silu);
            write(dgate + f, gradient * u * s * (1.0f + x * (1.0f - s)));
            write(both + f, silu * u);
        }
    }
    return 0;
}

/* Rotates the first `rotated` heads of each token by its angles, in place; back where `sign` is -1. */
int rotate(number *heads, const float *cosine, const float *sine, int64_t tokens, int64_t rotated, int64_t stride,
            int64_t width, float sign, int threads)
{
    int64_t half = width / 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < rotated; h++) {
            number *head = heads + t * stride + h * width;
            for (int64_t d = 0; d < half; d += LANES) {
                vector first = read(head + d), second = read(head + half + d);
                vector c = load(cosine + t * width + d), s = load(sine + t * width + d) * sign;
                write(head + d, first * c - second * s);
                write(head + half + d, second * c + first * s);
            }
        }
    return 0;
}

/* Operands of products: where the processor multiplies pairs of bfloat16 and adds them in float32, they are such pairs
 * along the inner dimension (PAIR 2), each a word of 32 bits; elsewhere the words are float32 (PAIR 1). Left operands
 * are rows of `narrow` numbers, right ones rows of words. */
#if NUMBER_BITS == 16 && defined(__AVX512BF16__)
#define PAIR 2
typedef uint16_t narrow;

INLINE vector multiply_add(vector sums, int32_t left, vector right)
{
    return (vector)_mm512_dpbf16_ps((__m512)sums, (__m512bh)((integers){0} + left), (__m512bh)right);
}

INLINE int32_t word(const narrow *from)
{
    int32_t found;
    memcpy(&found, from, sizeof found);
    return found;
}

INLINE void narrow_down(narrow *to, vector values) { write(to, values); }

INLINE vector join(vector even, vector odd) /* words of two rows: the even one's number is the lower half */
{
    return (vector)((rounded(even) >> 16 & 0xffff) | (rounded(odd) & (int32_t)0xffff0000));
}
#else
#define PAIR 1
typedef float narrow;

INLINE vector multiply_add(vector sums, float left, vector right) { return sums + left * right; }
INLINE float word(const narrow *from) { return *from; }
INLINE void narrow_down(narrow *to, vector values) { store(to, values); }
#endif

/* c (rows, vectors x LANES) = [c +] a b, over `inner` words; the sizes of the tile are known when this is compiled. */
INLINE void tile(const int rows, const int vectors, float *c, int64_t c_stride, const narrow *a, int64_t a_stride,
                 const float *b, int64_t b_stride, int64_t inner, int add)
{
    vector sums[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) sums[r][v] = add ? load(c + r * c_stride + v * LANES) : (vector){0};
    for (int64_t k = 0; k < inner; k++) {
        vector right[TILE_VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) right[v] = load(b + k * b_stride + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++)
                sums[r][v] = multiply_add(sums[r][v], word(a + r * a_stride + k * PAIR), right[v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) store(c + r * c_stride + v * LANES, sums[r][v]);
}

#define TILE(ROWS, VECTORS) \
    case ROWS * 8 + VECTORS: \
        tile(ROWS, VECTORS, to, c_stride, from, a_stride, right, b_stride, length / PAIR, add || k > 0); \
        break;
#if TILE_VECTORS == 4
#define TILES(ROWS) TILE(ROWS, 1) TILE(ROWS, 2) TILE(ROWS, 3) TILE(ROWS, 4)
#else
#define TILES(ROWS) TILE(ROWS, 1)
#endif

/* c (m, n) = [c +] a (m, inner) b (inner, n); n is a multiple of LANES, inner of PAIR. Strides are of numbers in a and
 * of words in b; inner is above 0. What a tile reads of b stays in the nearest cache for all rows. */
static void product(float *c, int64_t c_stride, const narrow *a, int64_t a_stride, const float *b, int64_t b_stride,
                    int64_t m, int64_t inner, int64_t columns, int add)
{
    for (int64_t n = 0; n < columns; n += TILE_VECTORS * LANES) {
        int64_t left = (columns - n) / LANES;
        int vectors = (int)(left < TILE_VECTORS ? left : TILE_VECTORS);
        for (int64_t k = 0; k < inner; k += INNER) {
            int64_t length = inner - k < INNER ? inner - k : INNER;
            const float *right = b + k / PAIR * b_stride + n;
            for (int64_t r = 0; r < m; r += TILE_ROWS) {
                int rows = (int)(m - r < TILE_ROWS ? m - r : TILE_ROWS);
                float *to = c + r * c_stride + n;
                const narrow *from = a + r * a_stride + k;
                switch (rows * 8 + vectors) {
                    TILES(1) TILES(2) TILES(3) TILES(4)
#if TILE_ROWS == 6
                    TILES(5) TILES(6)
#endif
                }
            }
        }
    }
}

INLINE int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }
INLINE int64_t paired(int64_t count) { return (count + PAIR - 1) / PAIR * PAIR; }

/* A sequence: its tokens, and those before them that it sees whole. */
typedef struct {
    int64_t start, length, prefix_start, prefix_length;
} sequence;

/* Memory of one thread, for the longest sequence and one tile: Q queries (QUERIES) and K keys (KEYS). */
typedef struct {
    narrow *rows;                                        /* a head's tokens (S, D) */
    float *key_rows, *value_rows;                        /* right operands over keys: words (S / PAIR, D) */
    float *key_columns, *value_columns;                  /* right operands over D: words (S / K, D / PAIR, K) */
    float *dkey, *dvalue;                                /* (S / K, D, K) */
    narrow *query, *dout, *query_columns, *dout_columns; /* (Q, D), and (D, Q) */
    float *scores, *dscores;                             /* (Q, K) */
    narrow *over_keys;                                   /* scores as left operands over keys (Q, K) */
    float *over_queries;                                 /* and as right ones over queries: words (Q / PAIR, K) */
    float *out;                                          /* (Q, D) */
    vector total[QUERIES];
    float most[QUERIES], delta[QUERIES];
    float *all;
} scratch;

/* Returns the next part of a piece of memory, of so many words. */
INLINE void *take(float **next, size_t words)
{
    float *part = *next;
    *next += words;
    return part;
}

INLINE int64_t in_blocks(int64_t keys) { return (keys + KEYS - 1) / KEYS * KEYS; }

static int make_scratch(scratch *s, int64_t keys, int64_t width)
{
    size_t tokens = (size_t)(in_blocks(keys) * width), part = (size_t)(QUERIES * width), tile = QUERIES * KEYS;
    float *next = s->all = malloc(sizeof(float) * (7 * tokens + 5 * part + 4 * tile));
    if (!next) return 0;
    s->rows = take(&next, tokens);
    s->key_rows = take(&next, tokens), s->value_rows = take(&next, tokens);
    s->key_columns = take(&next, tokens), s->value_columns = take(&next, tokens);
    s->dkey = take(&next, tokens), s->dvalue = take(&next, tokens);
    s->query = take(&next, part), s->query_columns = take(&next, part);
    s->dout = take(&next, part), s->dout_columns = take(&next, part), s->out = take(&next, part);
    s->scores = take(&next, tile), s->dscores = take(&next, tile);
    s->over_keys = take(&next, tile), s->over_queries = take(&next, tile);
    return 1;
}

INLINE int64_t token_of(sequence s, int64_t key)
{
    return key < s.prefix_length ? s.prefix_start + key : s.start + key - s.prefix_length;
}

/* Copies one head of a sequence's tokens, prefix first, zeros behind: as rows (S, D) of numbers, and as right operands
 * where they are wanted. */
static void gather(scratch *s, float *over_keys, float *over_width, const number *head, int64_t stride, sequence q,
                   int64_t width)
{
    int64_t keys = q.prefix_length + q.length, size = padded(keys);
    for (int64_t key = 0; key < size; key++)
        for (int64_t d = 0; d < width; d += LANES)
            narrow_down(s->rows + key * width + d,
                        key < keys ? read(head + token_of(q, key) * stride + d) : (vector){0});
    for (int64_t key = 0; over_keys && key < size; key += PAIR)
        for (int64_t d = 0; d < width; d += LANES) {
            float *to = over_keys + key / PAIR * width + d;
#if PAIR == 2
            store(to, join(read(s->rows + key * width + d), read(s->rows + (key + 1) * width + d)));
#else
            store(to, load(s->rows + key * width + d));
#endif
        }
    for (int64_t key = 0; over_width && key < size; key += LANES) {
        float *block = over_width + key / KEYS * KEYS * width / PAIR + key % KEYS;
        for (int64_t d = 0; d < width; d += PAIR)
            for (int i = 0; i < LANES; i++)
                memcpy(block + d / PAIR * KEYS + i, s->rows + (key + i) * width + d, sizeof(float));
    }
}

/* The queries of a key head's group are counted position first, then head: row r is head r % group at r / group. */
INLINE const number *query_row(const number *first, int64_t stride, sequence s, int64_t row, int64_t group,
                               int64_t width)
{
    return first + (s.start + row / group) * stride + row % group * width;
}

/* Copies rows of queries as left operands over D, and as columns (D, QUERIES) over queries where they are wanted. */
static void gather_queries(narrow *to, narrow *columns, const number *first, int64_t stride, sequence s, int64_t row,
                           int64_t rows, int64_t group, int64_t width)
{
    for (int64_t r = 0; r < rows; r++) {
        const number *from = query_row(first, stride, s, row + r, group, width);
        for (int64_t d = 0; d < width; d += LANES) narrow_down(to + r * width + d, read(from + d));
    }
    for (int64_t d = 0; columns && d < width; d++)
        for (int64_t r = 0; r < paired(rows); r++) columns[d * QUERIES + r] = r < rows ? to[r * width + d] : 0;
}

/* A tile: `rows` queries from `row` on, and the `count` keys from `at` on (in whole vectors). */
typedef struct {
    int64_t row, rows, at, count;
} place;

/* How many of the keys of a tile query r of it sees. */
INLINE int64_t seen_by(sequence q, place tile, int64_t r, int64_t group)
{
    int64_t own = q.prefix_length + (tile.row + r) / group + 1 - tile.at;
    return own < 0 ? 0 : own < tile.count ? own : tile.count;
}

/* A vector of what a row of scores has from `key` on, `other` in the place of what is behind those that are seen. */
INLINE vector visible(vector values, int64_t key, int64_t seen, float other)
{
    if (key + LANES <= seen) return values;
    integers lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return choose(lane < (int32_t)(seen - key), values, all(other));
}

/* scores = e^(scale q k' - the largest so far), zero where a key is not seen. `total` and `out` go on from what there
 * was, made smaller where there is a larger one now (Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3). */
static void attention_weights(scratch *s, sequence q, place tile, int64_t group, int64_t width, float scale)
{
    const float *keys = s->key_columns + tile.at * width / PAIR;
    product(s->scores, KEYS, s->query, width, keys, KEYS, tile.rows, width, tile.count, 0);
    for (int64_t r = 0; r < tile.rows; r++) {
        float *row = s->scores + r * KEYS, *out = s->out + r * width;
        int64_t seen = seen_by(q, tile, r, group);
        vector most = all(-INFINITY), sums = {0};
        for (int64_t key = 0; key < seen; key += LANES) {
            vector x = visible(load(row + key), key, seen, -INFINITY);
            most = larger(most, x);
        }
        float top = largest(most) * scale;
        top = tile.at && s->most[r] > top ? s->most[r] : top;
        for (int64_t key = 0; key < tile.count; key += LANES) {
            vector x = {0};
            if (key < seen) x = visible(exponential(load(row + key) * scale - top), key, seen, 0);
            sums += x;
            store(row + key, x);
        }
        float shrink = tile.at ? expf(s->most[r] - top) : 0;
        s->total[r] = tile.at ? s->total[r] * shrink + sums : sums;
        for (int64_t d = 0; tile.at && shrink != 1 && d < width; d += LANES) store(out + d, load(out + d) * shrink);
        s->most[r] = top;
    }
}

/* Scores as left operands over keys. */
INLINE const narrow *over_keys(scratch *s, const float *scores, place tile)
{
#if PAIR == 1
    (void)s, (void)tile;
    return scores;
#else
    for (int64_t r = 0; r < tile.rows; r++)
        for (int64_t key = 0; key < tile.count; key += LANES)
            narrow_down(s->over_keys + r * KEYS + key, load(scores + r * KEYS + key));
    return s->over_keys;
#endif
}

/* Scores as right operands over queries. */
INLINE const float *over_queries(scratch *s, const float *scores, place tile)
{
#if PAIR == 1
    (void)s, (void)tile;
    return scores;
#else
    for (int64_t r = 0; r < tile.rows; r += PAIR)
        for (int64_t key = 0; key < tile.count; key += LANES) {
            vector odd = r + 1 < tile.rows ? load(scores + (r + 1) * KEYS + key) : (vector){0};
            store(s->over_queries + r / PAIR * KEYS + key, join(load(scores + r * KEYS + key), odd));
        }
    return s->over_queries;
#endif
}

/* Few sequences are cut into pieces of queries that cost the same, so that no thread waits long for another. */
INLINE int64_t pieces_of(int64_t items, int threads) { return items < 4 * threads ? threads : 1; }

/* The first query of a piece: those before it have their share of all that queries look at. */
INLINE int64_t cut(sequence q, int64_t piece, int64_t pieces)
{
    double before = (double)q.prefix_length, all = before + (double)q.length, share = (double)piece / (double)pieces;
    return (int64_t)(sqrt(before * before + (all * all - before * before) * share) - before + 0.5);
}

INLINE void put(number *to, const float *values, int64_t width, float factor)
{
    for (int64_t d = 0; d < width; d += LANES) write(to + d, load(values + d) * factor);
}

INLINE int64_t least(int64_t one, int64_t other) { return one < other ? one : other; }

/* The heads of a model: of queries and of keys, how many of the first share one of the second, and how wide one is. A
 * token of qkv is `stride` numbers behind the one before it, one of out `out_stride`. */
typedef struct {
    int64_t query, key, group, width, stride, out_stride;
    float scale;
} heads;

INLINE heads heads_of(int64_t query, int64_t key, int64_t width, float scale)
{
    return (heads){query, key, query / key, width, (query + 2 * key) * width, query * width, scale};
}

/* Where the queries, the key and the value of a group lie in a token of qkv, and its queries in one of out. */
INLINE int64_t queries_at(heads h, int64_t k) { return k * h.group * h.width; }
INLINE int64_t key_at(heads h, int64_t k) { return (h.query + k) * h.width; }
INLINE int64_t value_at(heads h, int64_t k) { return (h.query + h.key + k) * h.width; }

/* Where the sum of a row of queries lies in log_sums (T, H). */
INLINE int64_t sum_at(heads h, int64_t k, sequence q, int64_t row)
{
    return (q.start + row / h.group) * h.query + k * h.group + row % h.group;
}

/* How many keys the last of `rows` queries from `row` on sees, and their tile that begins at key `at`. */
INLINE int64_t keys_for(heads h, sequence q, int64_t row, int64_t rows)
{
    return q.prefix_length + (row + rows - 1) / h.group + 1;
}

INLINE place tile_at(heads h, sequence q, int64_t row, int64_t rows, int64_t at)
{
    return (place){row, rows, at, padded(least(keys_for(h, q, row, rows) - at, KEYS))};
}

/* What the queries of group k see that stand from `first` on in a sequence. */
static void attend_piece(scratch *s, number *out, float *log_sums, const number *qkv, heads h, int64_t k, sequence q,
                         int64_t first)
{
    int64_t width = h.width;
    gather(s, NULL, s->key_columns, qkv + key_at(h, k), h.stride, q, width);
    gather(s, s->value_rows, NULL, qkv + value_at(h, k), h.stride, q, width);
    for (int64_t row = first * h.group; row < q.length * h.group; row += QUERIES) {
        int64_t rows = least(q.length * h.group - row, QUERIES);
        gather_queries(s->query, NULL, qkv + queries_at(h, k), h.stride, q, row, rows, h.group, width);
        for (int64_t at = 0; at < keys_for(h, q, row, rows); at += KEYS) {
            place tile = tile_at(h, q, row, rows, at);
            attention_weights(s, q, tile, h.group, width, h.scale);
            const float *values = s->value_rows + at * width / PAIR;
            product(s->out, width, over_keys(s, s->scores, tile), KEYS, values, width, rows, tile.count, width, at > 0);
        }
        for (int64_t r = 0; r < rows; r++) {
            number *to = (number *)query_row(out + queries_at(h, k), h.out_stride, q, row + r, h.group, width);
            float total = sum(s->total[r]);
            put(to, s->out + r * width, width, 1.0f / total);
            log_sums[sum_at(h, k, q, row + r)] = s->most[r] + logf(total);
        }
    }
}

/* out (T, H, D) = softmax(q k' scale) v. `log_sums` (T, H) gets the logarithm of what the softmax divides by. */
int attend(number *out, float *log_sums, const number *qkv, const sequence *sequences, int64_t count, int64_t longest,
           int64_t query, int64_t key, int64_t width, float scale, int threads)
{
    heads h = heads_of(query, key, width, scale);
    int64_t pieces = pieces_of(count * key, threads);
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        scratch s;
        int mine = make_scratch(&s, longest, width);
        if (!mine) failed = 1;
#pragma omp for schedule(static, 1) collapse(3)
        for (int64_t n = 0; n < count; n++)
            for (int64_t k = 0; k < key; k++)
                for (int64_t piece = 0; piece < pieces; piece++) {
                    sequence q = sequences[n];
                    q.length = cut(sequences[n], piece + 1, pieces);
                    if (mine) attend_piece(&s, out, log_sums, qkv, h, k, q, cut(sequences[n], piece, pieces));
                }
        free(mine ? s.all : NULL);
    }
    return failed;
}

/* scores = the attention weights p, dscores = p (dout v' - delta): the gradient of the scores (Dao et al. 2022, arXiv
 * 2205.14135, algorithm 4, with `most` the logarithm of the softmax' sum). */
static void attention_gradients(scratch *s, sequence q, place tile, int64_t group, int64_t width, float scale)
{
    int64_t from = tile.at * width / PAIR;
    product(s->scores, KEYS, s->query, width, s->key_columns + from, KEYS, tile.rows, width, tile.count, 0);
    product(s->dscores, KEYS, s->dout, width, s->value_columns + from, KEYS, tile.rows, width, tile.count, 0);
    for (int64_t r = 0; r < tile.rows; r++) {
        float *row = s->scores + r * KEYS, *drow = s->dscores + r * KEYS;
        int64_t seen = seen_by(q, tile, r, group);
        for (int64_t key = 0; key < tile.count; key += LANES) {
            vector p = {0};
            if (key < seen) p = visible(exponential(load(row + key) * scale - s->most[r]), key, seen, 0);
            store(row + key, p);
            store(drow + key, p * (load(drow + key) - s->delta[r]));
        }
    }
}

/* What comes before the gradients of `rows` queries from `row` on: their numbers, the gradients of what attention gave
 * them, and for each the product of that with what it gave. */
static void gather_gradients(scratch *s, const number *dout, const number *out, const float *log_sums,
                             const number *qkv, heads h, int64_t k, sequence q, int64_t row, int64_t rows)
{
    const number *outputs = out + queries_at(h, k), *gradients = dout + queries_at(h, k);
    int64_t group = h.group, width = h.width;
    gather_queries(s->query, s->query_columns, qkv + queries_at(h, k), h.stride, q, row, rows, group, width);
    gather_queries(s->dout, s->dout_columns, gradients, h.out_stride, q, row, rows, group, width);
    for (int64_t r = 0; r < rows; r++) {
        const number *was = query_row(outputs, h.out_stride, q, row + r, group, width);
        const number *gradient = query_row(gradients, h.out_stride, q, row + r, group, width);
        vector products = {0};
        for (int64_t d = 0; d < width; d += LANES) products += read(was + d) * read(gradient + d);
        s->delta[r] = sum(products);
        s->most[r] = log_sums[sum_at(h, k, q, row + r)];
    }
}

/* Adds the gradients of a sequence's keys and values of group k to `sums` (T, 2 K, D). */
static void add_keys(float *sums, const scratch *s, heads h, int64_t k, sequence q)
{
    int64_t keys = q.prefix_length + q.length;
    for (int64_t block = 0; block < keys; block += LANES)
        for (int64_t d = 0; d < h.width; d++)
            for (int64_t at = block; at < least(keys, block + LANES); at++) {
                float *to = sums + (token_of(q, at) * 2 * h.key + k) * h.width + d;
                int64_t from = at / KEYS * KEYS * h.width + d * KEYS + at % KEYS;
                to[0] += s->dkey[from] * h.scale;
                to[h.key * h.width] += s->dvalue[from];
            }
}

/* The gradients of the queries of group k that stand from `first` on in a sequence, into dqkv; those of the keys and
 * values that they see are added to `sums` (T, 2 K, D). */
static void attend_backward_piece(scratch *s, number *dqkv, float *sums, const number *dout, const number *out,
                                  const float *log_sums, const number *qkv, heads h, int64_t k, sequence q,
                                  int64_t first)
{
    int64_t width = h.width, held = in_blocks(q.prefix_length + q.length) * width;
    gather(s, s->key_rows, s->key_columns, qkv + key_at(h, k), h.stride, q, width);
    gather(s, NULL, s->value_columns, qkv + value_at(h, k), h.stride, q, width);
    memset(s->dkey, 0, sizeof(float) * (size_t)held);
    memset(s->dvalue, 0, sizeof(float) * (size_t)held);
    for (int64_t row = first * h.group; row < q.length * h.group; row += QUERIES) {
        int64_t rows = least(q.length * h.group - row, QUERIES), inner = paired(rows);
        gather_gradients(s, dout, out, log_sums, qkv, h, k, q, row, rows);
        for (int64_t at = 0; at < keys_for(h, q, row, rows); at += KEYS) {
            place tile = tile_at(h, q, row, rows, at);
            attention_gradients(s, q, tile, h.group, width, h.scale);
            const float *scores = over_queries(s, s->scores, tile);
            product(s->dvalue + at * width, KEYS, s->dout_columns, QUERIES, scores, KEYS, width, inner, tile.count, 1);
            scores = over_queries(s, s->dscores, tile);
            product(s->dkey + at * width, KEYS, s->query_columns, QUERIES, scores, KEYS, width, inner, tile.count, 1);
            const float *keys = s->key_rows + at * width / PAIR;
            product(s->out, width, over_keys(s, s->dscores, tile), KEYS, keys, width, rows, tile.count, width, at > 0);
        }
        for (int64_t r = 0; r < rows; r++) {
            number *to = (number *)query_row(dqkv + queries_at(h, k), h.stride, q, row + r, h.group, width);
            put(to, s->out + r * width, width, h.scale);
        }
    }
    add_keys(sums, s, h, k, q);
}

/* The gradient of qkv from that of `out`. `sums` (threads, T, 2 K, D) is zero: keys and values of a prefix get
 * gradients from every sequence that sees it, and threads must not add to one place. */
int attend_backward(number *dqkv, float *sums, const number *dout, const number *out, const float *log_sums,
                    const number *qkv, const sequence *sequences, int64_t count, int64_t longest, int64_t tokens,
                    int64_t query, int64_t key, int64_t width, float scale, int threads)
{
    heads h = heads_of(query, key, width, scale);
    int64_t pieces = pieces_of(count * key, threads), all_keys = 2 * key * width;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        scratch s;
        int mine = make_scratch(&s, longest, width);
        if (!mine) failed = 1;
        float *own_sums = sums + THREAD * tokens * all_keys;
#pragma omp for schedule(static, 1) collapse(3)
        for (int64_t n = 0; n < count; n++)
            for (int64_t k = 0; k < key; k++)
                for (int64_t piece = 0; piece < pieces; piece++) {
                    sequence q = sequences[n];
                    int64_t first = cut(sequences[n], piece, pieces);
                    q.length = cut(sequences[n], piece + 1, pieces);
                    if (mine) attend_backward_piece(&s, dqkv, own_sums, dout, out, log_sums, qkv, h, k, q, first);
                }
        free(mine ? s.all : NULL);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t at = 0; at < all_keys; at += LANES) {
                vector total = {0};
                for (int i = 0; i < threads; i++) total += load(sums + (i * tokens + t) * all_keys + at);
                write(dqkv + t * h.stride + query * width + at, total);
            }
    }
    return failed;
}

/* Products of integers. A row of numbers becomes integers and a scale, such that each times the scale is the number;
 * what is not finite makes the scale NaN. */
typedef int8_t bytes __attribute__((vector_size(LANES)));
typedef int16_t shorts __attribute__((vector_size(2 * LANES)));

/* Rounds by adding a number that leaves no bits behind the point. */
INLINE integers nearest(vector x) { return (integers)(x + 12582912.0f) - (integers)all(12582912.0f); }

INLINE void write_bytes(int8_t *to, integers values)
{
    bytes found = __builtin_convertvector(values, bytes);
    memcpy(to, &found, sizeof found);
}

INLINE void write_shorts(int16_t *to, integers values)
{
    shorts found = __builtin_convertvector(values, shorts);
    memcpy(to, &found, sizeof found);
}

/* A row's numbers [times a factor for each column], and the greatest magnitude among them; NaN in `broken` where one is
 * not finite, else 0. */
INLINE float widest(float *row, const number *x, const float *times, int64_t width, float *broken)
{
    vector most = all(LEAST), wrong = {0};
    for (int64_t i = 0; i < width; i += LANES) {
        vector values = read(x + i);
        if (times) values *= load(times + i);
        store(row + i, values);
        most = larger((vector)((integers)values & 0x7fffffff), most);
        wrong += values * 0.0f;
    }
    *broken = sum(wrong);
    return largest(most);
}

/* Each row (T, W) [times factors] as integers up to INT8_MOST. `fine`, where it is not NULL, gets what rounding leaves,
 * in FINER parts of the scale. */
int to_int8(int8_t *codes, int8_t *fine, float *scales, const number *x, const float *times, int64_t tokens,
            int64_t width, int threads)
{
    float *memory = malloc(sizeof(float) * (size_t)(threads * width));
    if (!memory) return 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tokens; t++) {
        float broken, *row = memory + THREAD * width;
        float most = widest(row, x + t * width, times, width, &broken);
        scales[t] = most / INT8_MOST + broken;
        for (int64_t i = 0; i < width; i += LANES) {
            vector values = load(row + i) * (INT8_MOST / most);
            integers whole = nearest(values);
            write_bytes(codes + t * width + i, whole);
            values -= __builtin_convertvector(whole, vector);
            if (fine) write_bytes(fine + t * width + i, nearest(values * (float)FINER));
        }
    }
    free(memory);
    return 0;
}

/* Each row (T, W) as integers up to INT16_MOST whose squares add up, but for rounding, to that of INT16_NORM or less. */
int to_int16(int16_t *codes, float *scales, const number *x, int64_t tokens, int64_t width, int threads)
{
    float *memory = malloc(sizeof(float) * (size_t)(threads * width));
    if (!memory) return 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tokens; t++) {
        float broken, *row = memory + THREAD * width;
        float most = widest(row, x + t * width, NULL, width, &broken);
        vector squares = {0};
        for (int64_t i = 0; i < width; i += LANES) {
            vector values = load(row + i) * (1.0f / most);
            squares += values * values;
        }
        float by_norm = sqrtf(sum(squares)) / INT16_NORM, by_most = 1.0f / INT16_MOST;
        float scale = most * (by_norm > by_most ? by_norm : by_most);
        scales[t] = scale + broken;
        for (int64_t i = 0; i < width; i += LANES)
            write_shorts(codes + t * width + i, nearest(load(row + i) * (1.0f / scale)));
    }
    free(memory);
    return 0;
}

#define PANEL (TILE_VECTORS * LANES) /* outputs whose weights are laid out together, */
#define PANEL_ROWS (16 * TILE_ROWS)  /* for so many tokens at a time */

INLINE integers add_pairs(integers sums, integers left, integers right) /* of words: the products of both their halves */
{
#if defined(__AVX512VNNI__)
    return (integers)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)left, (__m512i)right);
#elif defined(__AVX512BW__)
    return sums + (integers)_mm512_madd_epi16((__m512i)left, (__m512i)right);
#elif defined(__AVX2__)
    __m256i a[2], b[2];
    memcpy(a, &left, sizeof a), memcpy(b, &right, sizeof b);
    for (int half = 0; half < 2; half++) a[half] = _mm256_madd_epi16(a[half], b[half]);
    memcpy(&left, a, sizeof a);
    return sums + left;
#else
    return sums + (left << 16 >> 16) * (right << 16 >> 16) + (left >> 16) * (right >> 16);
#endif
}

/* As `tile`: sums (rows, PANEL) = [sums +] x panel, over `words` pairs of the inputs. */
INLINE void integer_tile(const int rows, int32_t *to, int64_t to_stride, const int16_t *x, int64_t inputs,
                         const int32_t *panel, int64_t words, int add)
{
    integers sums[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; v++)
            if (add)
                memcpy(&sums[r][v], to + r * to_stride + v * LANES, sizeof(integers));
            else
                sums[r][v] = (integers){0};
    for (int64_t k = 0; k < words; k++) {
        integers right[TILE_VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; v++) memcpy(&right[v], panel + k * PANEL + v * LANES, sizeof(integers));
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            int32_t word;
            memcpy(&word, x + r * inputs + 2 * k, sizeof word);
#pragma GCC unroll 8
            for (int v = 0; v < TILE_VECTORS; v++)
                sums[r][v] = add_pairs(sums[r][v], (integers){0} + word, right[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; v++) memcpy(to + r * to_stride + v * LANES, &sums[r][v], sizeof(integers));
}

#define INTEGER_TILE(ROWS) \
    case ROWS: integer_tile(ROWS, to, to_stride, from, inputs, right, words, k > 0); break;

/* sums (rows, PANEL) = x (rows, I) panel; what a tile reads of the panel stays in the nearest cache for all rows. */
static void multiply_panel(int32_t *sums, int64_t to_stride, const int16_t *x, int64_t inputs, const int32_t *panel,
                           int64_t rows)
{
    for (int64_t k = 0; k < inputs / 2; k += INNER)
        for (int64_t r = 0; r < rows; r += TILE_ROWS) {
            int64_t words = inputs / 2 - k < INNER ? inputs / 2 - k : INNER;
            int32_t *to = sums + r * to_stride;
            const int16_t *from = x + r * inputs + 2 * k;
            const int32_t *right = panel + k * PANEL;
            switch (rows - r < TILE_ROWS ? rows - r : TILE_ROWS) {
                INTEGER_TILE(1) INTEGER_TILE(2) INTEGER_TILE(3) INTEGER_TILE(4)
#if TILE_ROWS == 6
                INTEGER_TILE(5) INTEGER_TILE(6)
#endif
            }
        }
}

/* Weights of some outputs (rows of I) as a right operand: words (I / 2, PANEL), 0 behind the last output. */
INLINE void lay_out(int32_t *panel, const int16_t *weight, int64_t inputs, int64_t outputs)
{
    for (int64_t i = 0; i < inputs; i += 2)
        for (int64_t o = 0; o < PANEL; o++) {
            int32_t word = 0;
            if (o < outputs) memcpy(&word, weight + o * inputs + i, sizeof word);
            panel[i / 2 * PANEL + o] = word;
        }
}

/* sums (T, O) = x (T, I) weight (O, I)', of integers whose sums fit (as those of `to_int16` do); I is even. */
int multiply_int16(int32_t *sums, const int16_t *x, const int16_t *weight, int64_t tokens, int64_t inputs,
                   int64_t outputs, int threads)
{
    int64_t panel_words = inputs / 2 * PANEL, scratch = PANEL_ROWS * PANEL;
    int64_t row_blocks = (tokens + PANEL_ROWS - 1) / PANEL_ROWS, panels = (outputs + PANEL - 1) / PANEL;
    int32_t *memory = malloc(sizeof(int32_t) * (size_t)(threads * (panel_words + scratch)));
    if (!memory) return 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int32_t *panel = memory + THREAD * (panel_words + scratch), *found = panel + panel_words;
        int64_t held = -1;
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < panels * row_blocks; unit++) {
            int64_t t = unit % row_blocks * PANEL_ROWS, rows = tokens - t < PANEL_ROWS ? tokens - t : PANEL_ROWS;
            int64_t first = unit / row_blocks * PANEL, columns = outputs - first < PANEL ? outputs - first : PANEL;
            if (held != first) lay_out(panel, weight + first * inputs, inputs, columns);
            held = first;
            int32_t *to = sums + t * outputs + first;
            if (columns == PANEL) {
                multiply_panel(to, outputs, x + t * inputs, inputs, panel, rows);
                continue;
            }
            multiply_panel(found, PANEL, x + t * inputs, inputs, panel, rows);
            for (int64_t r = 0; r < rows; r++)
                memcpy(to + r * outputs, found + r * PANEL, sizeof(int32_t) * (size_t)columns);
        }
    }
    free(memory);
    return 0;
}

/* A row of sums of products of integers, times its scale [and a factor for each column] [, added to `to`]. Without `add`
 * the sums may lie where the numbers go. */
INLINE void numbers_of(number *to, const int32_t *sums, float scale, const float *times, int64_t width, int add)
{
    for (int64_t i = 0; i < width; i += LANES) {
        integers found;
        memcpy(&found, sums + i, sizeof found);
        vector values = __builtin_convertvector(found, vector) * scale;
        if (times) values *= load(times + i);
        write(to + i, add ? read(to + i) + values : values);
    }
}

int from_integers(number *y, const int32_t *sums, const float *scales, const float *times, int64_t tokens,
                  int64_t width, int64_t add, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tokens; t++)
        numbers_of(y + t * width, sums + t * width, scales[t], times, width, add != 0);
    return 0;
}

#define ADAPTED 24 /* tokens of a tile: a multiple of TILE_ROWS */
#define COLUMNS (4 * LANES)

/* Low-rank adapters of layers that read the same input. Part p has the outputs from ends[p - 1] up to ends[p], and in
 * all that is low-rank (T, R) the columns from p rank; its weights are down (rank, I) and up (outputs, rank), in
 * float32. */
INLINE const float *up_row(const float *const *up, const int64_t *ends, int64_t rank, int64_t output)
{
    int64_t part = 0;
    while (output >= ends[part]) part++;
    return up[part] + (output - (part ? ends[part - 1] : 0)) * rank;
}

INLINE int64_t blocks_of(int64_t columns) { return (columns + COLUMNS - 1) / COLUMNS; }

INLINE float pack(float even, float odd) /* the word of two numbers along the inner dimension, or of the one */
{
#if PAIR == 2
    return join(all(even), all(odd))[0];
#else
    (void)odd;
    return even;
#endif
}

/* Rows of numbers as left operands: as they are, or converted into `held`. */
INLINE const narrow *operand(narrow *held, const number *rows, int64_t count)
{
#if PAIR == 2 || NUMBER_BITS == 32
    (void)held, (void)count;
    return rows;
#else
    for (int64_t i = 0; i < count; i += LANES) narrow_down(held + i, read(rows + i));
    return held;
#endif
}

/* Rounds sums to numbers; gives them as left operands too where `to` is not NULL. */
INLINE void settle(number *numbers, narrow *to, const float *sums, int64_t count)
{
    for (int64_t i = 0; i < count; i += LANES) {
        write(numbers + i, load(sums + i));
        if (to) narrow_down(to + i, read(numbers + i));
    }
}

/* The product of a tile, as numbers. Where those are float32 they are made in their place. */
#if NUMBER_BITS == 32
#define IN_PLACE(numbers, held) (numbers)
#define SETTLE(numbers, held, count) (void)0
#else
#define IN_PLACE(numbers, held) (held)
#define SETTLE(numbers, held, count) settle(numbers, NULL, held, count)
#endif

/* low = x down', y = low (scale up)'. With `scales`, and numbers of 32 bits, y holds sums of products of integers, to
 * whose numbers that is added in their place; a tile of them stays in the cache meanwhile. */
int adapt(number *y, number *low, const number *x, const float *const *down, const float *const *up,
          const int64_t *ends, int64_t parts, int64_t rank, int64_t tokens, int64_t inputs, float scale,
          const float *scales, const float *times, int threads)
{
    int64_t outputs = ends[parts - 1], all_ranks = parts * rank;
    int64_t tile_words = ADAPTED * (inputs + outputs + 2 * all_ranks);
    float *memory = malloc(sizeof(float) * (size_t)(inputs * all_ranks + rank * outputs + threads * tile_words));
    if (!memory) return 1;
    float *over_inputs = memory, *over_ranks = memory + inputs * all_ranks; /* words (I / PAIR, R), (rank / PAIR, O) */
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *out = over_ranks + rank * outputs + THREAD * tile_words, *sums = out + ADAPTED * outputs;
        narrow *held = (narrow *)(sums + ADAPTED * all_ranks), *left = held + ADAPTED * inputs;
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < inputs; i += PAIR)
            for (int64_t r = 0; r < all_ranks; r++) {
                const float *from = down[r / rank] + r % rank * inputs + i;
                over_inputs[i / PAIR * all_ranks + r] = pack(from[0], from[PAIR - 1]);
            }
#pragma omp for schedule(static)
        for (int64_t o = 0; o < outputs; o++) {
            const float *from = up_row(up, ends, rank, o);
            for (int64_t r = 0; r < rank; r += PAIR)
                over_ranks[r / PAIR * outputs + o] = pack(from[r] * scale, from[r + PAIR - 1] * scale);
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t += ADAPTED) {
            int64_t rows = tokens - t < ADAPTED ? tokens - t : ADAPTED;
            number *to = y + t * outputs;
            product(sums, all_ranks, operand(held, x + t * inputs, rows * inputs), inputs, over_inputs, all_ranks, rows,
                    inputs, all_ranks, 0);
            settle(low + t * all_ranks, left, sums, rows * all_ranks);
            for (int64_t r = 0; scales && r < rows; r++)
                numbers_of(to + r * outputs, (const int32_t *)(to + r * outputs), scales[t + r], times, outputs, 0);
            for (int64_t part = 0, first = 0; part < parts; first = ends[part++])
                product(IN_PLACE(to, out) + first, outputs, left + part * rank, all_ranks, over_ranks + first, outputs,
                        rows, rank, ends[part] - first, scales != NULL);
            SETTLE(to, out, rows * outputs);
        }
    }
    free(memory);
    return 0;
}

/* dlow = dy (scale up), dx = dlow down; with `scales` dx holds sums, as y in `adapt` */
int adapt_backward(number *dx, number *dlow, const number *dy, const float *const *down, const float *const *up,
                   const int64_t *ends, int64_t parts, int64_t rank, int64_t tokens, int64_t inputs, float scale,
                   const float *scales, const float *times, int threads)
{
    int64_t outputs = ends[parts - 1], all_ranks = parts * rank;
    int64_t tile_words = ADAPTED * (inputs + outputs + 2 * all_ranks);
    float *memory = malloc(sizeof(float) * (size_t)(inputs * all_ranks + rank * outputs + threads * tile_words));
    if (!memory) return 1;
    float *over_ranks = memory, *over_outputs = memory + inputs * all_ranks; /* words (R / PAIR, I), (O / PAIR, rank) */
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *out = over_outputs + rank * outputs + THREAD * tile_words, *sums = out + ADAPTED * inputs;
        narrow *held = (narrow *)(sums + ADAPTED * all_ranks), *left = held + ADAPTED * outputs;
#pragma omp for schedule(static) nowait
        for (int64_t r = 0; r < all_ranks; r += PAIR) {
            const float *from = down[r / rank] + r % rank * inputs;
            for (int64_t i = 0; i < inputs; i++)
                over_ranks[r / PAIR * inputs + i] = pack(from[i], from[(PAIR - 1) * inputs + i]);
        }
#pragma omp for schedule(static)
        for (int64_t o = 0; o < outputs; o += PAIR) {
            const float *from = up_row(up, ends, rank, o);
            for (int64_t r = 0; r < rank; r++)
                over_outputs[o / PAIR * rank + r] = pack(from[r] * scale, from[(PAIR - 1) * rank + r] * scale);
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t += ADAPTED) {
            int64_t rows = tokens - t < ADAPTED ? tokens - t : ADAPTED;
            number *to = dx + t * inputs;
            const narrow *from = operand(held, dy + t * outputs, rows * outputs);
            for (int64_t part = 0, first = 0; part < parts; first = ends[part++])
                product(sums + part * rank, all_ranks, from + first, outputs, over_outputs + first / PAIR * rank, rank,
                        rows, ends[part] - first, rank, 0);
            settle(dlow + t * all_ranks, left, sums, rows * all_ranks);
            for (int64_t r = 0; scales && r < rows; r++)
                numbers_of(to + r * inputs, (const int32_t *)(to + r * inputs), scales[t + r], times, inputs, 0);
            product(IN_PLACE(to, out), inputs, left, all_ranks, over_ranks, inputs, rows, all_ranks, inputs,
                    scales != NULL);
            SETTLE(to, out, rows * inputs);
        }
    }
    free(memory);
    return 0;
}

/* Columns of numbers (T, up to COLUMNS) as right operands over tokens: as they are, or as words in `held`. */
INLINE const float *over_tokens(float *held, int64_t *stride, const number *from, int64_t width, int64_t tokens,
                                int64_t columns)
{
#if NUMBER_BITS == 32
    (void)held, (void)tokens, (void)columns;
    *stride = width;
    return from;
#else
    *stride = COLUMNS;
    for (int64_t t = 0; t < tokens; t += PAIR)
        for (int64_t c = 0; c < columns; c += LANES) {
            vector values = read(from + t * width + c);
#if PAIR == 2
            values = join(values, t + 1 < tokens ? read(from + (t + 1) * width + c) : (vector){0});
#endif
            store(held + t / PAIR * COLUMNS + c, values);
        }
    return held;
#endif
}

/* ddown (R, I) = dlow' x; dup (O, rank) = scale dy' low, each output with the columns of its part; in float32. */
int adapter_gradients(float *ddown, float *dup, const number *dy, const number *x, const number *low,
                      const number *dlow, const int64_t *ends, int64_t parts, int64_t rank, int64_t tokens,
                      int64_t inputs, float scale, int threads)
{
    int64_t outputs = ends[parts - 1], all_ranks = parts * rank, length = paired(tokens);
    int64_t words = length * COLUMNS + all_ranks * COLUMNS;
    float *memory = malloc(sizeof(float) * (size_t)(2 * all_ranks * length + threads * words));
    if (!memory) return 1;
    narrow *low_rows = (narrow *)memory, *dlow_rows = low_rows + all_ranks * length; /* (R, T) */
    int64_t input_blocks = blocks_of(inputs), blocks = input_blocks;
    for (int64_t part = 0, first = 0; part < parts; first = ends[part++]) blocks += blocks_of(ends[part] - first);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *held = memory + 2 * all_ranks * length + THREAD * words, *sums = held + length * COLUMNS;
        int64_t stride;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < length; t += LANES)
            for (int64_t r = 0; r < all_ranks; r += LANES)
                for (int64_t at = t; at < length && at < t + LANES; at++) {
                    vector own = at < tokens ? read(low + at * all_ranks + r) : (vector){0};
                    vector back = at < tokens ? read(dlow + at * all_ranks + r) : (vector){0};
                    narrow own_row[LANES], back_row[LANES];
                    narrow_down(own_row, own), narrow_down(back_row, back);
                    for (int i = 0; i < LANES; i++) {
                        low_rows[(r + i) * length + at] = own_row[i];
                        dlow_rows[(r + i) * length + at] = back_row[i];
                    }
                }
#pragma omp for schedule(static, 1)
        for (int64_t block = 0; block < blocks; block++) {
            if (block < input_blocks) {
                int64_t at = block * COLUMNS, columns = inputs - at < COLUMNS ? inputs - at : COLUMNS;
                const float *right = over_tokens(held, &stride, x + at, inputs, tokens, columns);
                product(ddown + at, inputs, dlow_rows, length, right, stride, all_ranks, length, columns, 0);
                continue;
            }
            int64_t own = block - input_blocks, part = 0, first = 0; /* of the part's blocks */
            for (; own >= blocks_of(ends[part] - first); first = ends[part++]) own -= blocks_of(ends[part] - first);
            int64_t at = first + own * COLUMNS, columns = ends[part] - at < COLUMNS ? ends[part] - at : COLUMNS;
            const float *right = over_tokens(held, &stride, dy + at, outputs, tokens, columns);
            product(sums, COLUMNS, low_rows + part * rank * length, length, right, stride, rank, length, columns, 0);
            for (int64_t c = 0; c < columns; c++)
                for (int64_t r = 0; r < rank; r++) dup[(at + c) * rank + r] = sums[r * COLUMNS + c] * scale;
        }
    }
    free(memory);
    return 0;
}

/* Of each row of logits (B, V): the log-probability of its target, the token with the largest logit, and, where wanted,
 * in the logits' place the gradient of that log-probability, onehot(target) - softmax. */
int log_softmax(float *logprobs, int64_t *chosen, number *logits, const int64_t *targets, int64_t rows,
                int64_t vocabulary, int64_t gradient, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < rows; b++) {
        number *row = logits + b * vocabulary;
        vector most = all(-INFINITY), total = {0};
        integers place = {0}, here;
        for (int i = 0; i < LANES; i++) here[i] = i;
        for (int64_t v = 0; v < vocabulary; v += LANES, here += LANES) {
            vector x = read(row + v);
            place = (integers)choose(x > most, (vector)here, (vector)place);
            most = choose(x > most, x, most);
        }
        int best = 0;
        for (int i = 1; i < LANES; i++)
            if (most[i] > most[best] || (most[i] == most[best] && place[i] < place[best])) best = i;
        float top = most[best], target = read(row + targets[b] / LANES * LANES)[targets[b] % LANES];
        for (int64_t v = 0; v < vocabulary; v += LANES) total += exponential(read(row + v) - top);
        float whole = sum(total), shift = top + logf(whole);
        chosen[b] = place[best];
        logprobs[b] = target - shift;
        for (int64_t v = 0; gradient && v < vocabulary; v += LANES)
            write(row + v, -exponential(read(row + v) - shift));
        if (gradient) {
            int64_t block = targets[b] / LANES * LANES;
            vector near = -exponential(all(logprobs[b]));
            vector own = read(row + block);
            own[targets[b] % LANES] = 1.0f + near[0];
            write(row + block, own);
        }
    }
    return 0;
}
