/* Products of weights in blocks with activations: 16 rows of weights at a time, a lane for each row.
 *
 * A tile holds 16 rows. For each group of 32 inputs it has the codes of all 16 rows, four inputs of a row side by side,
 * and then their scales; two groups go together where the scales of one take half a line of the processor's cache, so
 * that no vector crosses a line. A matrix is read without gaps from its first byte to its last. Activations are quantised to 8 bits in the same groups, so that sums within a group are whole
 * numbers and exact. What a row gives for a token depends on nothing but the two: not on other tokens of the step, not
 * on threads.
 */
#include "lanes.h"

#define GROUP_INPUTS 32
#if defined(WIDE512)
#define MOST_TOKENS 8 /* whose sums stay in registers while a tile is read once */
#else
#define MOST_TOKENS 4
#endif

enum { Q4_0, Q4_1, Q8_0, F16, BF16, F32 };

typedef struct {
    int32_t format, rows, inputs; /* rows: a multiple of 16; inputs: a multiple of 32 */
    uint8_t *tiles;
} Matrix;

/* Activations of some tokens. codes: (tokens, inputs); scales, sums: (tokens, inputs / 32), the sums of a group's codes;
 * values: (tokens, inputs), for weights that are not quantised. */
typedef struct {
    int32_t inputs;
    float *values;
    int8_t *codes;
    float *scales;
    int32_t *sums;
} Activations;

#define LINE 64 /* bytes of a line of the processor's cache */

/* Bytes of a group's codes, or of its floats, in a tile. */
INLINE size_t code_bytes(int format)
{
    switch (format) {
    case Q4_0:
    case Q4_1: return 256;
    case Q8_0: return 512;
    case F32: return 64 * GROUP_INPUTS;
    default: return 32 * GROUP_INPUTS;
    }
}

/* Groups that share a line of scales, which are float16. In Q4_1 a group has 16 scales and 16 minimums. */
INLINE int shared(int format) { return format == Q4_1 ? 1 : format <= Q8_0 ? 2 : 0; }

INLINE size_t pair_bytes(int format) { return (size_t)shared(format) * code_bytes(format) + LINE; }

INLINE size_t codes_at(int format, int group)
{
    const int number = shared(format);
    if (!number)
        return (size_t)group * code_bytes(format);
    return (size_t)(group / number) * pair_bytes(format) + (size_t)(group % number) * code_bytes(format);
}

INLINE size_t scales_at(int format, int group)
{
    const int number = shared(format);
    return number ? (size_t)(group / number + 1) * pair_bytes(format) - LINE + (size_t)(group % number) * 32 : 0;
}

INLINE size_t tile_bytes(int format, int inputs)
{
    const int groups = inputs / GROUP_INPUTS, number = shared(format);
    return number ? (size_t)((groups + number - 1) / number) * pair_bytes(format) : codes_at(format, groups);
}

/* Put one row of a file's blocks into its place in the tiles. blocks: as GGUF stores them. */
static void pack_row(const Matrix *matrix, int row, const uint8_t *blocks)
{
    const int lane = row % 16;
    uint8_t *tile = matrix->tiles + (size_t)(row / 16) * tile_bytes(matrix->format, matrix->inputs);
    for (int number = 0; number < matrix->inputs / GROUP_INPUTS; number++) {
        uint8_t *group = tile + codes_at(matrix->format, number), *of_group = tile + scales_at(matrix->format, number);
        switch (matrix->format) {
        case Q4_0:
        case Q4_1: {
            const int scales = matrix->format == Q4_0 ? 2 : 4;
            for (int i = 0; i < 16; i++) /* byte i of a block: inputs i and i + 16 */
                group[i / 4 * 64 + lane * 4 + i % 4] = blocks[scales + i];
            for (int i = 0; i < scales; i += 2)
                memcpy(of_group + 16 * i + 2 * lane, blocks + i, 2);
            blocks += scales + 16;
            break;
        }
        case Q8_0:
            for (int i = 0; i < 32; i++)
                group[i / 4 * 64 + lane * 4 + i % 4] = blocks[2 + i] ^ 128;
            memcpy(of_group + 2 * lane, blocks, 2);
            blocks += 34;
            break;
        case F32:
            for (int i = 0; i < 32; i++)
                memcpy(group + i * 64 + 4 * lane, blocks + 4 * i, 4);
            blocks += 128;
            break;
        default:
            for (int i = 0; i < 32; i++)
                memcpy(group + i * 32 + 2 * lane, blocks + 2 * i, 2);
            blocks += 64;
        }
    }
}

/* Write a row of the tiles as floats: the embedding of a token is a row of the same tiles. */
static void unpack_row(const Matrix *matrix, int row, float *values)
{
    const int lane = row % 16;
    const uint8_t *tile = matrix->tiles + (size_t)(row / 16) * tile_bytes(matrix->format, matrix->inputs);
    for (int number = 0; number < matrix->inputs / GROUP_INPUTS; number++) {
        const uint8_t *group = tile + codes_at(matrix->format, number);
        const uint8_t *of_group = tile + scales_at(matrix->format, number);
        for (int i = 0; i < 32; i++) {
            uint16_t half[2];
            float value;
            switch (matrix->format) {
            case Q4_0:
            case Q4_1: {
                const uint8_t both = group[i % 16 / 4 * 64 + lane * 4 + i % 4], code = i < 16 ? both & 15 : both >> 4;
                memcpy(half, of_group + 2 * lane, 2);
                if (matrix->format == Q4_0) {
                    value = half_to_float(half[0]) * ((float)code - 8.0f);
                } else {
                    memcpy(half + 1, of_group + 32 + 2 * lane, 2);
                    value = half_to_float(half[0]) * (float)code + half_to_float(half[1]);
                }
                break;
            }
            case Q8_0:
                memcpy(half, of_group + 2 * lane, 2);
                value = half_to_float(half[0]) * (float)(int8_t)(group[i / 4 * 64 + lane * 4 + i % 4] ^ 128);
                break;
            case F32:
                memcpy(&value, group + i * 64 + 4 * lane, 4);
                break;
            case F16:
                memcpy(half, group + i * 32 + 2 * lane, 2);
                value = half_to_float(half[0]);
                break;
            default: {
                uint32_t bits = 0;
                memcpy(half, group + i * 32 + 2 * lane, 2);
                bits = (uint32_t)half[0] << 16;
                memcpy(&value, &bits, 4);
            }
            }
            values[number * GROUP_INPUTS + i] = value;
        }
    }
}

/* The root-mean-square norm (Zhang and Sennrich, arXiv 1910.07467, equation 4). */
INLINE void normalise(const float *from, const float *weights, float epsilon, int size, float *to)
{
    floats squares = zeros();
    for (int i = 0; i < size; i += 16)
        squares = multiply_add(load(from + i), load(from + i), squares);
    const floats scale = splat(1.0f / sqrtf(sum_of(squares) / (float)size + epsilon));
    for (int i = 0; i < size; i += 16)
        store(to + i, multiply(multiply(load(from + i), scale), load(weights + i)));
}

/* LayerNorm (Ba et al., arXiv 1607.06450, equation 3). */
static void layer_normalise(const float *from, const float *weights, const float *bias, float epsilon, int size, float *to)
{
    floats sum = zeros(), squares = zeros();
    for (int i = 0; i < size; i += 16)
        sum = add(sum, load(from + i));
    const floats mean = splat(sum_of(sum) / (float)size);
    for (int i = 0; i < size; i += 16) {
        const floats away = subtract(load(from + i), mean);
        squares = multiply_add(away, away, squares);
    }
    const floats scale = splat(1.0f / sqrtf(sum_of(squares) / (float)size + epsilon));
    for (int i = 0; i < size; i += 16)
        store(to + i, multiply_add(multiply(subtract(load(from + i), mean), scale), load(weights + i), load(bias + i)));
}

/* Quantise a token's activations, after a norm if there are its weights: with a bias LayerNorm, else by the root of the
 * mean square. */
static void quantise(
    const float *from, const float *norm, const float *norm_bias, float epsilon, const Activations *to, int token)
{
    const int inputs = to->inputs, groups = inputs / GROUP_INPUTS;
    float *values = to->values + (size_t)token * inputs;
    int8_t *codes = to->codes + (size_t)token * inputs;
    if (norm_bias) {
        layer_normalise(from, norm, norm_bias, epsilon, inputs, values);
    } else if (norm) {
        normalise(from, norm, epsilon, inputs, values);
    } else if (from != values) {
        memcpy(values, from, sizeof(float) * (size_t)inputs);
    }
    for (int group = 0; group < groups; group++) {
        const floats a = load(values + group * 32), b = load(values + group * 32 + 16);
        const float most = largest_of(larger(absolute(a), absolute(b)));
        const floats inverse = splat(most > 0 ? 127.0f / most : 0.0f);
        const integers first = nearest(multiply(a, inverse)), second = nearest(multiply(b, inverse));
        store_signed_bytes(codes + group * 32, first);
        store_signed_bytes(codes + group * 32 + 16, second);
        to->scales[(size_t)token * groups + group] = most / 127.0f;
        int32_t sum = 0;
        for (int i = 0; i < 32; i++)
            sum += codes[group * 32 + i];
        to->sums[(size_t)token * groups + group] = sum;
    }
}

/* 16 rows with quantised weights times `tokens` tokens from `first` on; sums: (tokens,) a lane for each row */
INLINE void quantised_tile(
    const int format, const int tokens, const uint8_t *tile, const Activations *of, int first, floats *sums)
{
    const int inputs = of->inputs, groups = inputs / GROUP_INPUTS;
    const int8_t *codes = of->codes + (size_t)first * inputs;
    const float *scales = of->scales + (size_t)first * groups;
    const int32_t *code_sums = of->sums + (size_t)first * groups;
    UNROLL for (int t = 0; t < tokens; t++)
        sums[t] = zeros();
    for (int group = 0; group < groups; group++) {
        const uint8_t *own = tile + codes_at(format, group);
        bytes weights[8];
        if (format == Q8_0) {
            UNROLL for (int i = 0; i < 8; i++)
                weights[i] = load_bytes(own + 64 * i);
        } else {
            UNROLL for (int i = 0; i < 4; i++) {
                const bytes both = load_bytes(own + 64 * i);
                weights[i] = low_nibbles(both);
                weights[4 + i] = high_nibbles(both);
            }
        }
        if (tokens <= 2) /* one token waits for memory: ask for what comes sixteen groups later */
            UNROLL for (size_t at = 0; at < code_bytes(format) + LINE; at += LINE)
                PREFETCH(own + 16 * code_bytes(format) + at);
        const uint16_t *halves = (const uint16_t *)(tile + scales_at(format, group));
        const floats scale = load_halves(halves);
        const floats least = format == Q4_1 ? load_halves(halves + 16) : scale;
        UNROLL for (int t = 0; t < tokens; t++) {
            const int8_t *mine = codes + (size_t)t * inputs + group * GROUP_INPUTS;
            const int32_t code_sum = code_sums[t * groups + group];
            integers even = splat_integer(format == Q4_0 ? -8 * code_sum : format == Q8_0 ? -128 * code_sum : 0);
            integers odd = splat_integer(0); /* two sums, as each product waits for the one before it */
            UNROLL for (int i = 0; i < 8; i += 2) {
                even = format == Q8_0 ? dot(even, weights[i], mine + 4 * i) : dot_nibbles(even, weights[i], mine + 4 * i);
                odd = format == Q8_0 ? dot(odd, weights[i + 1], mine + 4 * i + 4)
                                     : dot_nibbles(odd, weights[i + 1], mine + 4 * i + 4);
            }
            const floats whole = to_floats(add_integers(even, odd)), own = splat(scales[t * groups + group]);
            if (format == Q4_1)
                sums[t] = multiply_add(
                    multiply_add(whole, scale, multiply(least, splat((float)code_sum))), own, sums[t]);
            else
                sums[t] = multiply_add(multiply(whole, own), scale, sums[t]);
        }
    }
}

/* the same with weights that are floats of 16 or 32 bits */
INLINE void float_tile(
    const int format, const int tokens, const uint8_t *tile, const Activations *of, int first, floats *sums)
{
    const float *values = of->values + (size_t)first * of->inputs;
    const int size = format == F32 ? 64 : 32;
    UNROLL for (int t = 0; t < tokens; t++)
        sums[t] = zeros();
    for (int i = 0; i < of->inputs; i++, tile += size) {
        const floats weights = format == F32   ? load((const float *)tile)
                               : format == F16 ? load_halves((const uint16_t *)tile)
                                               : load_bfloat16((const uint16_t *)tile);
        if (tokens <= 2)
            PREFETCH(tile + 1024);
        UNROLL for (int t = 0; t < tokens; t++)
            sums[t] = multiply_add(weights, splat(values[(size_t)t * of->inputs + i]), sums[t]);
    }
}

#define TOKENS(number) \
    case number: \
        if (format <= Q8_0) \
            quantised_tile(format, number, tile, of, first, sums); \
        else \
            float_tile(format, number, tile, of, first, sums); \
        break;

/* one function for each format, with a loop for each number of tokens */
#define TILE_FUNCTION(name, format_of_it) \
    static __attribute__((noinline)) void name( \
        int tokens, const uint8_t *tile, const Activations *of, int first, floats *sums) \
    { \
        const int format = format_of_it; \
        switch (tokens) { TOKENS(1) TOKENS(2) TOKENS(3) TOKENS(4) MORE_TOKENS } \
    }
#if MOST_TOKENS == 8
#define MORE_TOKENS TOKENS(5) TOKENS(6) TOKENS(7) TOKENS(8)
#else
#define MORE_TOKENS
#endif
TILE_FUNCTION(tile_q4_0, Q4_0)
TILE_FUNCTION(tile_q4_1, Q4_1)
TILE_FUNCTION(tile_q8_0, Q8_0)
TILE_FUNCTION(tile_f16, F16)
TILE_FUNCTION(tile_bf16, BF16)
TILE_FUNCTION(tile_f32, F32)

/* Rows 16 * tile to 16 * tile + 15 times up to MOST_TOKENS tokens. */
static void product(const Matrix *matrix, int tile, const Activations *of, int first, int tokens, floats *sums)
{
    static void (*const functions[])(int, const uint8_t *, const Activations *, int, floats *) = {
        tile_q4_0, tile_q4_1, tile_q8_0, tile_f16, tile_bf16, tile_f32};
    const uint8_t *from = matrix->tiles + (size_t)tile * tile_bytes(matrix->format, matrix->inputs);
    functions[matrix->format](tokens, from, of, first, sums);
}
