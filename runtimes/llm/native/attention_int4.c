/* Attention over a cache in 4 bits (Liu et al., KIVI, arXiv 2402.02750, section 3.3): blocks of 64 tokens, of one layer
 * and head. A dimension's keys share a scale and a minimum in a block; so do a token's values.
 *
 * Tokens of a block that is not full lie in its tail, in float16. A query sees the block that its own token is in as
 * that tail, and the blocks before it in 4 bits, whatever step they were computed in.
 */
#define PARTS (GROUP_TOKENS / BLOCK)
#define TAIL_BYTES (PARTS * 2 * HALVES_BYTES)

/* Where a block has its parts. Codes: 64 bytes hold 16 tokens of four dimensions (keys) or 16 dimensions of four tokens
 * (values); the next four are in the high halves of the bytes. Scales and minimums are float16. */
typedef struct {
    uint8_t *keys, *values;
    uint16_t *key_scales, *key_least, *value_scales, *value_least;
} Int4;

INLINE Int4 int4_at(Block block)
{
    uint16_t *of_keys = (uint16_t *)(block.keys + KEY_CODES), *of_values = (uint16_t *)(block.values + KEY_CODES);
    return (Int4){block.keys, block.values, of_keys, of_keys + HEAD_SIZE, of_values, of_values + GROUP_TOKENS};
}

/* Return where a tail has the keys and values of its `part`th 16 tokens. */
INLINE Block in_tail(const uint8_t *tail, int part)
{
    uint8_t *keys = (uint8_t *)tail + part * 2 * HALVES_BYTES;
    return (Block){keys, keys + HALVES_BYTES};
}

/* Four bits of sixteen values: code = (value - least) / scale, with scale and least as float16 holds them. */
INLINE void nibbles(floats value, floats scale, floats least, int8_t *codes)
{
    const floats steps = divide(subtract(value, least), larger(scale, splat(1e-20f)));
    store_signed_bytes(codes, nearest(smaller(larger(steps, zeros()), splat(15.0f))));
}

INLINE void steps_between(const floats lowest, const floats highest, uint16_t *scale, uint16_t *least)
{
    store_halves(scale, multiply(subtract(highest, lowest), splat(1.0f / 15.0f)));
    store_halves(least, lowest);
}

/* Write the 64 tokens of a tail to a block. */
static void put_int4(Block block, const uint8_t *tail)
{
    const Int4 to = int4_at(block);
    memset(to.keys, 0, KEY_CODES);
    memset(to.values, 0, KEY_CODES);
    for (int i = 0; i < HEAD_SIZE; i++) {
        floats lowest = splat(65504.0f), highest = splat(-65504.0f);
        for (int part = 0; part < PARTS; part++) {
            const floats keys = load_halves((const uint16_t *)in_tail(tail, part).keys + i * BLOCK);
            lowest = smaller(lowest, keys);
            highest = larger(highest, keys);
        }
        uint16_t scale[16], least[16];
        steps_between(splat(-largest_of(subtract(zeros(), lowest))), splat(largest_of(highest)), scale, least);
        to.key_scales[i] = scale[0];
        to.key_least[i] = least[0];
        for (int part = 0; part < PARTS; part++) {
            const floats keys = load_halves((const uint16_t *)in_tail(tail, part).keys + i * BLOCK);
            int8_t codes[16];
            nibbles(keys, splat(half_to_float(scale[0])), splat(half_to_float(least[0])), codes);
            uint8_t *row = to.keys + part * (KEY_CODES / PARTS) + i / 8 * 64;
            for (int t = 0; t < BLOCK; t++)
                row[t * 4 + i % 4] |= (uint8_t)(codes[t] << (i % 8 / 4 * 4));
        }
    }
    for (int t = 0; t < GROUP_TOKENS; t++) {
        const uint16_t *values = (const uint16_t *)in_tail(tail, t / BLOCK).values + t % BLOCK * HEAD_SIZE;
        floats lowest = splat(65504.0f), highest = splat(-65504.0f);
        for (int i = 0; i < HEAD_SIZE; i += 16) {
            lowest = smaller(lowest, load_halves(values + i));
            highest = larger(highest, load_halves(values + i));
        }
        uint16_t scale[16], least[16];
        steps_between(splat(-largest_of(subtract(zeros(), lowest))), splat(largest_of(highest)), scale, least);
        to.value_scales[t] = scale[0];
        to.value_least[t] = least[0];
        for (int i = 0; i < HEAD_SIZE; i += 16) {
            int8_t codes[16];
            nibbles(load_halves(values + i), splat(half_to_float(scale[0])), splat(half_to_float(least[0])), codes);
            uint8_t *row = to.values + t / 8 * (8 * HEAD_SIZE / 2) + i * 4;
            for (int j = 0; j < 16; j++)
                row[j * 4 + t % 4] |= (uint8_t)(codes[j] << (t % 8 / 4 * 4));
        }
    }
}

/* Numbers of 15 bits as two of 8, as in `Fine`: of queries (one for each dimension) or of weights (for each token). */
#define SPLIT_MOST (HEAD_SIZE > GROUP_TOKENS ? HEAD_SIZE : GROUP_TOKENS)
typedef struct {
    int8_t high[SPLIT_MOST], low[SPLIT_MOST];
    float scale, rest; /* rest: the part of the minimums */
} Split;

INLINE Split split(const float *values, const uint16_t *scales, const uint16_t *least, const int number)
{
    Split to;
    floats most = splat(1e-20f), rest = zeros(), scaled[SPLIT_MOST / 16];
    UNROLL for (int i = 0; i < number / 16; i++) {
        scaled[i] = multiply(load(values + 16 * i), load_halves(scales + 16 * i));
        rest = multiply_add(load(values + 16 * i), load_halves(least + 16 * i), rest);
        most = larger(most, absolute(scaled[i]));
    }
    const float largest = largest_of(most);
    to.scale = largest / FINE_MOST;
    to.rest = sum_of(rest);
    UNROLL for (int i = 0; i < number / 16; i++)
        split_in_two(scaled[i], splat(FINE_MOST / largest), to.high + 16 * i, to.low + 16 * i);
    return to;
}

INLINE floats joined(integers high, integers low, const Split *of)
{
    return multiply_add(to_floats(add_integers(times_128(high), low)), splat(of->scale), splat(of->rest));
}

INLINE void score_int4(const Attention *of, int group, floats *most)
{
    const Int4 block = int4_at(block_at(of->first, CACHE_INT4, of->table[group]));
    Split query[QUERIES];
    for (int q = 0; q < QUERIES; q++)
        query[q] = split(of->queries[q], block.key_scales, block.key_least, HEAD_SIZE);
    for (int part = 0; part < PARTS; part++) {
        const uint8_t *keys = block.keys + part * (KEY_CODES / PARTS);
        integers high[QUERIES], low[QUERIES];
        UNROLL for (int q = 0; q < QUERIES; q++)
            high[q] = low[q] = splat_integer(0);
        for (int i = 0; i < HEAD_SIZE; i += 8) {
            const bytes both = load_bytes(keys + i * 8), first = low_nibbles(both), second = high_nibbles(both);
            UNROLL for (int q = 0; q < QUERIES; q++) {
                high[q] = dot_nibbles(dot_nibbles(high[q], first, query[q].high + i), second, query[q].high + i + 4);
                low[q] = dot_nibbles(dot_nibbles(low[q], first, query[q].low + i), second, query[q].low + i + 4);
            }
        }
        UNROLL for (int q = 0; q < QUERIES; q++)
            keep_score(of, 1, q, group * PARTS + part, joined(high[q], low[q], &query[q]), &most[q]);
    }
}

INLINE void sum_int4(const Attention *of, int group, floats *total)
{
    const Int4 block = int4_at(block_at(of->first, CACHE_INT4, of->table[group]));
    Split weight[QUERIES];
    for (int q = 0; q < QUERIES; q++)
        weight[q] = split(of->scores + q * of->stride + group * GROUP_TOKENS, block.value_scales, block.value_least,
                          GROUP_TOKENS);
    for (int i = 0; i < HEAD_LANES; i++) {
        integers high[QUERIES], low[QUERIES];
        UNROLL for (int q = 0; q < QUERIES; q++)
            high[q] = low[q] = splat_integer(0);
        UNROLL for (int t = 0; t < GROUP_TOKENS; t += 8) {
            const bytes both = load_bytes(block.values + t / 8 * (8 * HEAD_SIZE / 2) + i * 64);
            const bytes first = low_nibbles(both), second = high_nibbles(both);
            UNROLL for (int q = 0; q < QUERIES; q++) {
                high[q] = dot_nibbles(dot_nibbles(high[q], first, weight[q].high + t), second, weight[q].high + t + 4);
                low[q] = dot_nibbles(dot_nibbles(low[q], first, weight[q].low + t), second, weight[q].low + t + 4);
            }
        }
        UNROLL for (int q = 0; q < QUERIES; q++)
            total[q * HEAD_LANES + i] = add(total[q * HEAD_LANES + i], joined(high[q], low[q], &weight[q]));
    }
}

INLINE void ask_for(const uint8_t *later, size_t bytes)
{
    for (size_t at = 0; at < bytes; at += 64)
        PREFETCH(later + at);
}

/* Attention of one token. of->tail: the block of the token itself; of->scores as in `attend_halves`. */
static __attribute__((noinline)) void attend_int4(const Attention *of)
{
    const int groups = (of->length - 1) / GROUP_TOKENS, parts = (of->length + BLOCK - 1) / BLOCK;
    const int begin = of->begin / PARTS;
    floats most[QUERIES], total[QUERIES * HEAD_LANES];
    float sums[QUERIES];
    UNROLL for (int q = 0; q < QUERIES; q++)
        most[q] = splat(HIDDEN_SCORE);
    for (int group = begin; group < groups; group++) {
        ask_for(keys_at(of, CACHE_INT4, later_than(group, groups)), INT4_KEY_BYTES);
        score_int4(of, group, most);
    }
    for (int b = groups * PARTS; b < parts; b++) {
        const uint16_t *keys = (const uint16_t *)in_tail(of->tail, b - groups * PARTS).keys;
        floats score[QUERIES];
        UNROLL for (int q = 0; q < QUERIES; q++)
            score[q] = zeros();
        for (int i = 0; i < HEAD_SIZE; i++) {
            const floats key = load_halves(keys + i * BLOCK);
            UNROLL for (int q = 0; q < QUERIES; q++)
                score[q] = multiply_add(key, splat(of->queries[q][i]), score[q]);
        }
        UNROLL for (int q = 0; q < QUERIES; q++)
            keep_score(of, 1, q, b, score[q], &most[q]);
    }
    weigh(of, 1, most, sums);
    UNROLL for (int i = 0; i < QUERIES * HEAD_LANES; i++)
        total[i] = zeros();
    for (int group = begin; group < groups; group++) {
        ask_for(values_at(of, CACHE_INT4, later_than(group, groups)), INT4_VALUE_BYTES);
        sum_int4(of, group, total);
    }
    for (int t = groups * GROUP_TOKENS; t < of->length; t++) {
        const int slot = t - groups * GROUP_TOKENS;
        const uint16_t *values = (const uint16_t *)in_tail(of->tail, slot / BLOCK).values + slot % BLOCK * HEAD_SIZE;
        UNROLL for (int i = 0; i < HEAD_LANES; i++) {
            const floats value = load_halves(values + i * 16);
            UNROLL for (int q = 0; q < QUERIES; q++)
                total[q * HEAD_LANES + i] =
                    multiply_add(splat(of->scores[q * of->stride + t]), value, total[q * HEAD_LANES + i]);
        }
    }
    UNROLL for (int q = 0; q < QUERIES; q++)
        UNROLL for (int i = 0; i < HEAD_LANES; i++)
            store(of->outputs[q] + i * 16, multiply(total[q * HEAD_LANES + i], splat(1.0f / sums[q])));
}

static void attend(int cache, const Attention *of, int tokens)
{
    if (cache == CACHE_INT4)
        attend_int4(of);
    else if (cache == CACHE_INT8)
        attend_int8_1(of);
    else if (tokens == 2)
        attend_halves_2(of);
    else
        attend_halves_1(of);
}
