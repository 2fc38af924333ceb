/* The small operations of a decoder layer, each in one pass over its numbers: norms, the gate, rotation, attention.
 *
 * On a processor a training step spends half of its time outside of the large matrix products: torch makes each of
 * these of a dozen calls, and each call reads and writes everything. Here a row of numbers stays in the processor's
 * cache. `kernels.py` compiles this file with the machine's C compiler, once per type, and hands it torch's memory;
 * without a compiler the same is done by torch (`row_attention.py`, `fused_decoder.py`), and the tests hold the two
 * together. Sums are in float32; threads take fixed shares, so that every run gives the same numbers.
 *
 * Every function returns 0, or 1 where memory is short. NUMBER_BITS is 16 for bfloat16 and 32 for float. Widths are multiples of LANES. T tokens, E width, F half of the
 * gate's outputs, C heads of all kinds (queries first, then keys, then values), D head width, P prefix, S keys.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
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
#define QUERIES 48 /* of one head group that attend together */
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

INLINE void write(number *to, vector values)
{
    integers bits = (integers)values; /* to the nearest, ties to the even one */
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    halves found = __builtin_convertvector(bits, halves);
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
    float total = 0;
    for (int i = 0; i < LANES; i++) total += values[i];
    return total;
}

/* e^x to a few units in the last place; what is below -87 counts as that. NaN stays NaN. */
INLINE vector exponential(vector x)
{
    const float magic = 12582912.0f; /* adding it rounds to an integer */
    x = choose(x < -87.0f, all(-87.0f), x);
    x = choose(x > 88.0f, all(88.0f), x);
    vector shifted = x * 1.44269504f + magic;
    integers power = (integers)shifted - (integers)all(magic);
    vector whole = shifted - magic;
    vector r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    vector y = all(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return (vector)((integers)y + (power << 23));
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

/* c (rows, vectors x LANES) = [c +] a b, with a[r, k] at a[r * across + k * along]; sizes are known when compiled. */
INLINE void tile(const int rows, const int vectors, float *c, int64_t c_stride, const float *a, int64_t across,
                 int64_t along, const float *b, int64_t b_stride, int64_t inner, int add)
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
        for (int r = 0; r < rows; r++) {
            float left = a[r * across + k * along];
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) sums[r][v] += left * right[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) store(c + r * c_stride + v * LANES, sums[r][v]);
}

#define TILE(ROWS, VECTORS) \
    case ROWS * 8 + VECTORS: \
        tile(ROWS, VECTORS, to, c_stride, from, across, along, b + n, b_stride, inner, add); \
        break;
#if TILE_VECTORS == 4
#define TILES(ROWS) TILE(ROWS, 1) TILE(ROWS, 2) TILE(ROWS, 3) TILE(ROWS, 4)
#else
#define TILES(ROWS) TILE(ROWS, 1)
#endif

/* c (m, n) = [c +] a b; n is a multiple of LANES. */
static void product(float *c, int64_t c_stride, const float *a, int64_t across, int64_t along, const float *b,
                    int64_t b_stride, int64_t m, int64_t inner, int64_t columns, int add)
{
    for (int64_t n = 0; n < columns; n += TILE_VECTORS * LANES) {
        int64_t left = (columns - n) / LANES;
        int vectors = (int)(left < TILE_VECTORS ? left : TILE_VECTORS);
        for (int64_t r = 0; r < m; r += TILE_ROWS) {
            int rows = (int)(m - r < TILE_ROWS ? m - r : TILE_ROWS);
            float *to = c + r * c_stride + n;
            const float *from = a + r * across;
            switch (rows * 8 + vectors) {
                TILES(1) TILES(2) TILES(3) TILES(4)
#if TILE_ROWS == 6
                TILES(5) TILES(6)
#endif
            }
        }
    }
}

INLINE int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

/* A sequence: its tokens, and those before them that it sees whole. */
typedef struct {
    int64_t start, length, prefix_start, prefix_length;
} sequence;

/* Memory of one thread, each part for the longest sequence. */
typedef struct {
    float *key, *value, *turned_key, *turned_value, *dkey, *dvalue; /* (S, D), turned (D, S) */
    float *query, *dout, *dquery, *scores, *dscores;                /* (QUERIES, D), scores (QUERIES, S) */
    float *all;
} scratch;

static int make_scratch(scratch *s, int64_t keys, int64_t width)
{
    int64_t tokens = padded(keys) * width, tile_size = QUERIES * width, square = QUERIES * padded(keys);
    float *next = s->all = malloc(sizeof(float) * (size_t)(6 * tokens + 3 * tile_size + 2 * square));
    if (!next) return 0;
    float **parts[] = {&s->key, &s->value, &s->turned_key, &s->turned_value, &s->dkey, &s->dvalue};
    for (int i = 0; i < 6; i++, next += tokens) *parts[i] = next;
    s->query = next, s->dout = (next += tile_size), s->dquery = (next += tile_size);
    s->scores = (next += tile_size), s->dscores = next + square;
    return 1;
}

INLINE int64_t token_of(sequence s, int64_t key)
{
    return key < s.prefix_length ? s.prefix_start + key : s.start + key - s.prefix_length;
}

/* Copies one head of a sequence's tokens, prefix first, to (S, D) and, where wanted, (D, S) with zeros behind it. */
static void gather(float *to, float *turned, const number *head, int64_t stride, sequence s, int64_t width)
{
    int64_t keys = s.prefix_length + s.length, size = padded(keys);
    for (int64_t key = 0; key < keys; key++) {
        const number *from = head + token_of(s, key) * stride;
        for (int64_t d = 0; d < width; d += LANES) store(to + key * width + d, read(from + d));
    }
    memset(to + keys * width, 0, sizeof(float) * (size_t)((size - keys) * width));
    for (int64_t block = 0; turned && block < size; block += LANES)
        for (int64_t d = 0; d < width; d++)
            for (int i = 0; i < LANES; i++) turned[d * size + block + i] = to[(block + i) * width + d];
}

/* The queries of a key head's group are counted position first, then head: row r is head r % group at r / group. */
INLINE const number *query_row(const number *first, int64_t stride, sequence s, int64_t row, int64_t group,
                               int64_t width)
{
    return first + (s.start + row / group) * stride + row % group * width;
}

/* scores[r, :] = softmax over what row `first + r` sees, zero elsewhere; `seen` keys are looked at by the last one. */
static void weights(scratch *s, sequence q, int64_t first, int64_t rows, int64_t group, int64_t seen, int64_t size,
                    int64_t width)
{
    product(s->scores, size, s->query, width, 1, s->turned_key, size, rows, width, padded(seen), 0);
    for (int64_t r = 0; r < rows; r++) {
        float *row = s->scores + r * size;
        int64_t own = q.prefix_length + (first + r) / group + 1, whole = own / LANES * LANES;
        for (int64_t key = own; key < padded(seen); key++) row[key] = -INFINITY;
        vector most = all(-INFINITY), total = {0};
        for (int64_t key = 0; key < padded(own); key += LANES) {
            vector x = load(row + key);
            most = choose(x > most, x, most);
        }
        float top = most[0];
        for (int i = 1; i < LANES; i++) top = most[i] > top ? most[i] : top;
        for (int64_t key = 0; key < padded(own); key += LANES) {
            vector x = exponential(load(row + key) - top);
            if (key == whole)
                for (int i = (int)(own - whole); i < LANES; i++) x[i] = 0;
            total += x;
            store(row + key, x);
        }
        float inverse = 1.0f / sum(total);
        for (int64_t key = 0; key < padded(own); key += LANES) store(row + key, load(row + key) * inverse);
        for (int64_t key = padded(own); key < padded(seen); key++) row[key] = 0;
    }
}

static void load_queries(float *to, const number *first, int64_t stride, sequence s, int64_t row, int64_t rows,
                         int64_t group, int64_t width, float scale)
{
    for (int64_t r = 0; r < rows; r++) {
        const number *from = query_row(first, stride, s, row + r, group, width);
        for (int64_t d = 0; d < width; d += LANES) store(to + r * width + d, read(from + d) * scale);
    }
}

/* out (T, H, D) = softmax(q k' scale) v. */
int attend(number *out, const number *qkv, const sequence *sequences, int64_t count, int64_t longest, int64_t query,
           int64_t key, int64_t width, float scale, int threads)
{
    int64_t group = query / key, stride = (query + 2 * key) * width, out_stride = query * width;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        scratch s;
        int mine = make_scratch(&s, longest, width);
        if (!mine) failed = 1;
#pragma omp for schedule(static, 1) collapse(2)
        for (int64_t n = 0; n < count; n++)
            for (int64_t k = 0; k < key; k++) {
                if (!mine) continue;
                sequence q = sequences[n];
                int64_t size = padded(q.prefix_length + q.length);
                const number *queries = qkv + k * group * width;
                gather(s.key, s.turned_key, qkv + (query + k) * width, stride, q, width);
                gather(s.value, NULL, qkv + (query + key + k) * width, stride, q, width);
                for (int64_t row = 0; row < q.length * group; row += QUERIES) {
                    int64_t left = q.length * group - row, rows = left < QUERIES ? left : QUERIES;
                    int64_t seen = q.prefix_length + (row + rows - 1) / group + 1;
                    load_queries(s.query, queries, stride, q, row, rows, group, width, scale);
                    weights(&s, q, row, rows, group, seen, size, width);
                    product(s.dquery, width, s.scores, size, 1, s.value, width, rows, seen, width, 0);
                    for (int64_t r = 0; r < rows; r++) {
                        number *to = (number *)query_row(out + k * group * width, out_stride, q, row + r, group, width);
                        for (int64_t d = 0; d < width; d += LANES) write(to + d, load(s.dquery + r * width + d));
                    }
                }
            }
        free(mine ? s.all : NULL);
    }
    return failed;
}

/* The gradient of qkv from that of `out`. `sums` (threads, T, 2 K, D) is zero: keys and values of a prefix get gradients
 * from every sequence that sees it, and threads must not add to one place. */
int attend_backward(number *dqkv, float *sums, const number *dout, const number *out, const number *qkv,
                    const sequence *sequences, int64_t count, int64_t longest, int64_t tokens, int64_t query,
                    int64_t key, int64_t width, float scale, int threads)
{
    int64_t group = query / key, stride = (query + 2 * key) * width, out_stride = query * width;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        scratch s;
        int mine = make_scratch(&s, longest, width);
        if (!mine) failed = 1;
#pragma omp for schedule(static, 1) collapse(2)
        for (int64_t n = 0; n < count; n++)
            for (int64_t k = 0; k < key; k++) {
                if (!mine) continue;
                sequence q = sequences[n];
                int64_t keys = q.prefix_length + q.length, size = padded(keys);
                const number *queries = qkv + k * group * width;
                gather(s.key, s.turned_key, qkv + (query + k) * width, stride, q, width);
                gather(s.value, s.turned_value, qkv + (query + key + k) * width, stride, q, width);
                memset(s.dkey, 0, sizeof(float) * (size_t)(size * width));
                memset(s.dvalue, 0, sizeof(float) * (size_t)(size * width));
                for (int64_t row = 0; row < q.length * group; row += QUERIES) {
                    int64_t left = q.length * group - row, rows = left < QUERIES ? left : QUERIES;
                    int64_t seen = q.prefix_length + (row + rows - 1) / group + 1;
                    load_queries(s.query, queries, stride, q, row, rows, group, width, scale);
                    load_queries(s.dout, dout + k * group * width, out_stride, q, row, rows, group, width, 1.0f);
                    weights(&s, q, row, rows, group, seen, size, width);
                    product(s.dscores, size, s.dout, width, 1, s.turned_value, size, rows, width, padded(seen), 0);
                    product(s.dvalue, width, s.scores, 1, size, s.dout, width, seen, rows, width, 1);
                    for (int64_t r = 0; r < rows; r++) {
                        const number *was = query_row(out + k * group * width, out_stride, q, row + r, group, width);
                        vector products = {0};
                        for (int64_t d = 0; d < width; d += LANES) products += read(was + d) * load(s.dout + r * width + d);
                        float delta = sum(products);
                        for (int64_t at = r * size; at < r * size + padded(seen); at += LANES)
                            store(s.dscores + at, load(s.scores + at) * (load(s.dscores + at) - delta));
                    }
                    product(s.dquery, width, s.dscores, size, 1, s.key, width, rows, seen, width, 0);
                    product(s.dkey, width, s.dscores, 1, size, s.query, width, seen, rows, width, 1);
                    for (int64_t r = 0; r < rows; r++) {
                        number *to = (number *)query_row(dqkv + k * group * width, stride, q, row + r, group, width);
                        for (int64_t d = 0; d < width; d += LANES) write(to + d, load(s.dquery + r * width + d) * scale);
                    }
                }
                float *own_sums = sums + THREAD * tokens * 2 * key * width;
                for (int64_t at = 0; at < keys; at++) {
                    float *to = own_sums + (token_of(q, at) * 2 * key + k) * width;
                    for (int64_t d = 0; d < width; d += LANES) {
                        store(to + d, load(to + d) + load(s.dkey + at * width + d));
                        store(to + key * width + d, load(to + key * width + d) + load(s.dvalue + at * width + d));
                    }
                }
            }
        free(mine ? s.all : NULL);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t at = 0; at < 2 * key * width; at += LANES) {
                vector total = {0};
                for (int i = 0; i < threads; i++) total += load(sums + (i * tokens + t) * 2 * key * width + at);
                write(dqkv + t * stride + query * width + at, total);
            }
    }
    return failed;
}
