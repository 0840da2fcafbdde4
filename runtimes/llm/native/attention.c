/* Attention over a paged cache: blocks of 16 tokens, each with the keys and values of one layer and one head.
 *
 * All keys of a layer and head lie before all of its values: both are read from the first block to the last, one after
 * the other, and where blocks follow one another the memory is read without gaps, which takes half the time.
 * Keys lie dimension by dimension, 16 tokens in a vector, so that scores need no sums across lanes; values lie token by
 * token. The queries that share a head of keys are worked on together, so that each block is read once. HEAD_SIZE and
 * QUERIES (to a head of keys) are constants of the model. What a query gives depends on its own tokens alone.
 */
#ifndef HEAD_SIZE /* of a model; these are for reading and checking this file alone */
#define HEAD_SIZE 64
#define QUERIES 3
#endif

#define BLOCK 16
#define HEAD_LANES (HEAD_SIZE / 16)
#define AHEAD 4 /* blocks between the one that is read and the one that is asked for */
#define HIDDEN_SCORE (-1e30f) /* of a token that a query does not see: its weight is 0 */

/* how keys and values are stored; bytes of the keys, and of the values, of a block (attention_int4.c has the third) */
enum { CACHE_F16, CACHE_INT8, CACHE_INT4 };
#define HALVES_BYTES (BLOCK * HEAD_SIZE * 2)
#define INT8_BYTES (BLOCK * HEAD_SIZE + BLOCK * 4)

#define MOST_QUERIES (2 * QUERIES) /* of two tokens, one after the other */

/* how many vectors of values are summed at a time: as registers last, in equal parts of a head */
#define PART(number, most) ((number) <= (most) && HEAD_LANES % (number) == 0) ? (number)
#define SUM_LANES(most) \
    (PART(16, most) : PART(8, most) : PART(6, most) : PART(5, most) : PART(4, most) : PART(3, most) : PART(2, most) : 1)
#if defined(WIDE512)
#define SUM_REGISTERS 24
#else
#define SUM_REGISTERS 6
#endif

#define GROUP_TOKENS 64 /* to a block in 4 bits */
#define KEY_CODES (GROUP_TOKENS * HEAD_SIZE / 2)
#define INT4_KEY_BYTES (KEY_CODES + 4 * HEAD_SIZE)
#define INT4_VALUE_BYTES (KEY_CODES + 4 * GROUP_TOKENS)

INLINE int block_tokens(int cache) { return cache == CACHE_INT4 ? GROUP_TOKENS : BLOCK; }

INLINE size_t key_bytes(int cache)
{
    return cache == CACHE_F16 ? HALVES_BYTES : cache == CACHE_INT8 ? INT8_BYTES : INT4_KEY_BYTES;
}

INLINE size_t value_bytes(int cache)
{
    return cache == CACHE_F16 ? HALVES_BYTES : cache == CACHE_INT8 ? INT8_BYTES : INT4_VALUE_BYTES;
}

INLINE size_t block_bytes(int cache) { return key_bytes(cache) + value_bytes(cache); }

/* Where a block of one layer and head has its keys and its values. */
typedef struct {
    uint8_t *keys, *values;
} Block;

/* Return block `number` of those that begin with the first. */
INLINE Block block_at(Block first, int cache, int number)
{
    return (Block){first.keys + (size_t)number * key_bytes(cache), first.values + (size_t)number * value_bytes(cache)};
}

/* --- writing */

static void put_halves(Block block, int slot, const float *key, const float *value)
{
    uint16_t *keys = (uint16_t *)block.keys, *values = (uint16_t *)block.values, halves[16];
    for (int i = 0; i < HEAD_SIZE; i += 16) {
        store_halves(halves, load(key + i));
        for (int j = 0; j < 16; j++)
            keys[(i + j) * BLOCK + slot] = halves[j];
        store_halves(values + slot * HEAD_SIZE + i, load(value + i));
    }
}

/* int8, a scale for each token's key and value; bytes are 128 more than the code, four of one dimension's neighbours
 * (keys) or of four tokens (values) side by side */
static void put_int8(Block block, int slot, const float *key, const float *value)
{
    uint8_t *keys = block.keys, *values = block.values;
    float *key_scales = (float *)(keys + BLOCK * HEAD_SIZE), *value_scales = (float *)(values + BLOCK * HEAD_SIZE);
    floats key_most = splat(1e-20f), value_most = splat(1e-20f);
    for (int i = 0; i < HEAD_SIZE; i += 16) {
        key_most = larger(key_most, absolute(load(key + i)));
        value_most = larger(value_most, absolute(load(value + i)));
    }
    const float key_scale = largest_of(key_most) / 127.0f, value_scale = largest_of(value_most) / 127.0f;
    key_scales[slot] = key_scale;
    value_scales[slot] = value_scale;
    for (int i = 0; i < HEAD_SIZE; i += 16) {
        int8_t codes[16];
        store_signed_bytes(codes, nearest(divide(load(key + i), splat(key_scale))));
        for (int j = 0; j < 16; j++)
            keys[(i + j) / 4 * 64 + slot * 4 + j % 4] = (uint8_t)(codes[j] + 128);
        store_signed_bytes(codes, nearest(divide(load(value + i), splat(value_scale))));
        for (int j = 0; j < 16; j++)
            values[slot / 4 * 4 * HEAD_SIZE + (i + j) * 4 + slot % 4] = (uint8_t)(codes[j] + 128);
    }
}

INLINE void put(int cache, Block block, int slot, const float *key, const float *value)
{
    if (cache == CACHE_F16)
        put_halves(block, slot, key, value);
    else
        put_int8(block, slot, key, value);
}

/* --- reading */

/* Work of `tokens` (1 or 2) tokens at one head of keys: queries and outputs, QUERIES for each token in turn; the last
 * token sees `length` tokens, the one before it one less; of these each sees the last `window`, or all if it is 0, which
 * are in the blocks from `begin` on; cap: c, where scores x become c tanh(x / c), or 0. first: block 0 of this layer
 * and head; table: of the sequence; tail: of the last token's block, or NULL; scores: (queries, stride) scratch. */
typedef struct {
    Block first;
    const uint8_t *tail;
    const int32_t *table;
    int length, window, begin;
    float cap;
    const float *queries[MOST_QUERIES];
    float *outputs[MOST_QUERIES];
    float *scores;
    size_t stride;
} Attention;

INLINE int seen(const Attention *of, int tokens, int query) { return of->length - (tokens - 1 - query / QUERIES); }

/* How many tokens are too far before a query to be seen. */
INLINE int unseen(const Attention *of, int tokens, int query)
{
    const int number = seen(of, tokens, query);
    return of->window && number > of->window ? number - of->window : 0;
}

/* Return the first block of 16 tokens that is read: the first of those that the cache stores together. */
INLINE int first_block(const Attention *of, int cache, int tokens)
{
    return unseen(of, tokens, 0) / block_tokens(cache) * (block_tokens(cache) / BLOCK);
}

INLINE const uint8_t *keys_at(const Attention *of, int cache, int number)
{
    return block_at(of->first, cache, of->table[number]).keys;
}

INLINE const uint8_t *values_at(const Attention *of, int cache, int number)
{
    return block_at(of->first, cache, of->table[number]).values;
}

/* Return the number of a block that will be read later. */
INLINE int later_than(int b, int blocks) { return b + AHEAD < blocks ? b + AHEAD : blocks - 1; }

/* Scores into weights: e**(score - largest); sums: (queries,) their sums. */
INLINE void weigh(const Attention *of, const int tokens, const floats *most, float *sums)
{
    const int blocks = (of->length + BLOCK - 1) / BLOCK;
    for (int q = 0; q < tokens * QUERIES; q++) {
        float *scores = of->scores + q * of->stride;
        const floats largest = splat(largest_of(most[q]));
        floats sum = zeros();
        for (int b = of->begin; b < blocks; b++) {
            floats weight = exponential(subtract(load(scores + b * BLOCK), largest));
            weight = first_lanes(seen(of, tokens, q) - b * BLOCK, weight, zeros());
            weight = first_lanes(unseen(of, tokens, q) - b * BLOCK, zeros(), weight);
            sum = add(sum, weight);
            store(scores + b * BLOCK, weight);
        }
        sums[q] = sum_of(sum);
    }
}

INLINE void keep_score(const Attention *of, const int tokens, int query, int b, floats score, floats *most)
{
    if (of->cap > 0)
        score = capped(score, of->cap);
    score = first_lanes(seen(of, tokens, query) - b * BLOCK, score, splat(HIDDEN_SCORE));
    score = first_lanes(unseen(of, tokens, query) - b * BLOCK, splat(HIDDEN_SCORE), score);
    *most = larger(*most, score);
    store(of->scores + query * of->stride + b * BLOCK, score);
}

INLINE void attend_halves(const Attention *of, const int tokens)
{
    const int queries = tokens * QUERIES, blocks = (of->length + BLOCK - 1) / BLOCK;
    floats most[MOST_QUERIES];
    float sums[MOST_QUERIES];
    UNROLL for (int q = 0; q < queries; q++)
        most[q] = splat(HIDDEN_SCORE);
    for (int b = of->begin; b < blocks; b++) {
        const uint16_t *keys = (const uint16_t *)keys_at(of, CACHE_F16, b);
        const uint8_t *later = keys_at(of, CACHE_F16, later_than(b, blocks));
        floats score[MOST_QUERIES];
        UNROLL for (int q = 0; q < queries; q++)
            score[q] = zeros();
        for (int i = 0; i < HEAD_SIZE; i += 2) {
            PREFETCH(later + i * 2 * BLOCK);
            UNROLL for (int j = i; j < i + 2; j++) {
                const floats key = load_halves(keys + j * BLOCK);
                UNROLL for (int q = 0; q < queries; q++)
                    score[q] = multiply_add(key, splat(of->queries[q][j]), score[q]);
            }
        }
        UNROLL for (int q = 0; q < queries; q++)
            keep_score(of, tokens, q, b, score[q], &most[q]);
    }
    weigh(of, tokens, most, sums);
    const int step = SUM_LANES(SUM_REGISTERS / queries);
    for (int from = 0; from < HEAD_LANES; from += step) {
        floats total[MOST_QUERIES * HEAD_LANES];
        UNROLL for (int i = 0; i < queries * step; i++)
            total[i] = zeros();
        for (int b = of->begin; b < blocks; b++) {
            const uint16_t *values = (const uint16_t *)values_at(of, CACHE_F16, b) + from * 16;
            const uint8_t *later = values_at(of, CACHE_F16, later_than(b, blocks));
            const int in_block = of->length - b * BLOCK < BLOCK ? of->length - b * BLOCK : BLOCK;
            for (int t = 0; t < in_block; t++) {
                UNROLL for (int i = 0; i < step; i += 2)
                    PREFETCH(later + 2 * (t * HEAD_SIZE + (from + i) * 16));
                UNROLL for (int i = 0; i < step; i++) {
                    const floats value = load_halves(values + t * HEAD_SIZE + i * 16);
                    UNROLL for (int q = 0; q < queries; q++)
                        total[q * step + i] = multiply_add(
                            splat(of->scores[q * of->stride + b * BLOCK + t]), value, total[q * step + i]);
                }
            }
        }
        UNROLL for (int q = 0; q < queries; q++)
            UNROLL for (int i = 0; i < step; i++)
                store(of->outputs[q] + (from + i) * 16, multiply(total[q * step + i], splat(1.0f / sums[q])));
    }
}

/* A number of 15 bits as two of 8: 128 * high + low, of a query or of weights, so that products with int8 lose nothing
 * of it that counts. */
typedef struct {
    int8_t high[HEAD_SIZE], low[HEAD_SIZE];
    int32_t high_sum, low_sum;
    float scale;
} Fine;

#define FINE_MOST 16000.0f /* high is then at most 125 */

INLINE void split_in_two(floats values, floats inverse, int8_t *high, int8_t *low)
{
    const integers whole = nearest(multiply(values, inverse)), above = over_128(whole);
    store_signed_bytes(high, above);
    store_signed_bytes(low, subtract_integers(whole, times_128(above)));
}

INLINE void refine(const float *values, Fine *to)
{
    floats most = splat(1e-20f);
    UNROLL for (int i = 0; i < HEAD_SIZE; i += 16)
        most = larger(most, absolute(load(values + i)));
    const float largest = largest_of(most);
    const floats inverse = splat(FINE_MOST / largest);
    to->scale = largest / FINE_MOST;
    to->high_sum = to->low_sum = 0;
    UNROLL for (int i = 0; i < HEAD_SIZE; i += 16)
        split_in_two(load(values + i), inverse, to->high + i, to->low + i);
    for (int i = 0; i < HEAD_SIZE; i++) {
        to->high_sum += to->high[i];
        to->low_sum += to->low[i];
    }
}

INLINE void attend_int8(const Attention *of, const int tokens)
{
    const int queries = tokens * QUERIES, blocks = (of->length + BLOCK - 1) / BLOCK;
    Fine query[MOST_QUERIES];
    floats most[MOST_QUERIES];
    UNROLL for (int q = 0; q < queries; q++) {
        refine(of->queries[q], &query[q]);
        most[q] = splat(HIDDEN_SCORE);
    }
    for (int b = of->begin; b < blocks; b++) {
        const uint8_t *keys = keys_at(of, CACHE_INT8, b), *later = keys_at(of, CACHE_INT8, later_than(b, blocks));
        integers high[MOST_QUERIES], low[MOST_QUERIES];
        UNROLL for (int q = 0; q < queries; q++) {
            high[q] = splat_integer(-128 * query[q].high_sum);
            low[q] = splat_integer(-128 * query[q].low_sum);
        }
        for (int i = 0; i < HEAD_SIZE / 4; i++) {
            PREFETCH(later + 64 * i);
            const bytes key = load_bytes(keys + 64 * i);
            UNROLL for (int q = 0; q < queries; q++) {
                high[q] = dot(high[q], key, query[q].high + 4 * i);
                low[q] = dot(low[q], key, query[q].low + 4 * i);
            }
        }
        const floats scales = load((const float *)(keys + BLOCK * HEAD_SIZE));
        UNROLL for (int q = 0; q < queries; q++) {
            const floats whole = to_floats(add_integers(times_128(high[q]), low[q]));
            keep_score(of, tokens, q, b, multiply(multiply(whole, splat(query[q].scale)), scales), &most[q]);
        }
    }
    float sums[MOST_QUERIES];
    weigh(of, tokens, most, sums);
    floats total[MOST_QUERIES * HEAD_LANES];
    UNROLL for (int i = 0; i < queries * HEAD_LANES; i++)
        total[i] = zeros();
    for (int b = of->begin; b < blocks; b++) {
        const uint8_t *values = values_at(of, CACHE_INT8, b), *later = values_at(of, CACHE_INT8, later_than(b, blocks));
        UNROLL for (size_t at = 0; at < INT8_BYTES; at += 64)
            PREFETCH(later + at);
        const floats scales = load((const float *)(values + BLOCK * HEAD_SIZE));
        int8_t high[MOST_QUERIES][BLOCK], low[MOST_QUERIES][BLOCK];
        float scale[MOST_QUERIES];
        int32_t weight_sum[MOST_QUERIES];
        for (int q = 0; q < queries; q++) {
            floats weight = multiply(load(of->scores + q * of->stride + b * BLOCK), scales);
            weight = first_lanes(of->length - b * BLOCK, weight, zeros()); /* scales of unused slots are arbitrary */
            const float largest = largest_of(weight);
            split_in_two(weight, splat(largest > 0 ? FINE_MOST / largest : 0.0f), high[q], low[q]);
            scale[q] = largest / FINE_MOST;
            weight_sum[q] = 0;
            for (int t = 0; t < BLOCK; t++)
                weight_sum[q] += 128 * high[q][t] + low[q][t];
        }
        for (int i = 0; i < HEAD_LANES; i++) {
            bytes value[4];
            UNROLL for (int t = 0; t < 4; t++)
                value[t] = load_bytes(values + t * 4 * HEAD_SIZE + i * 64);
            UNROLL for (int q = 0; q < queries; q++) {
                integers above = splat_integer(0), below = splat_integer(-128 * weight_sum[q]);
                UNROLL for (int t = 0; t < 4; t++) {
                    above = dot(above, value[t], high[q] + 4 * t);
                    below = dot(below, value[t], low[q] + 4 * t);
                }
                const floats whole = to_floats(add_integers(times_128(above), below));
                total[q * HEAD_LANES + i] = multiply_add(whole, splat(scale[q]), total[q * HEAD_LANES + i]);
            }
        }
    }
    UNROLL for (int q = 0; q < queries; q++)
        UNROLL for (int i = 0; i < HEAD_LANES; i++)
            store(of->outputs[q] + i * 16, multiply(total[q * HEAD_LANES + i], splat(1.0f / sums[q])));
}

static __attribute__((noinline)) void attend_halves_1(const Attention *of) { attend_halves(of, 1); }
static __attribute__((noinline)) void attend_halves_2(const Attention *of) { attend_halves(of, 2); }
static __attribute__((noinline)) void attend_int8_1(const Attention *of) { attend_int8(of, 1); }
