#include <stdio.h>
/* runs all kernels on numbers from a generator, and prints a hash of what they give */
static uint32_t state = 1, hash = 2166136261u;
static uint32_t next(void) { state = state * 1664525u + 1013904223u; return state >> 8; }
static void mix(const void *from, size_t size)
{
    for (size_t i = 0; i < size; i++)
        hash = (hash ^ ((const uint8_t *)from)[i]) * 16777619u;
}
int main(void)
{
    enum { ROWS = 48, INPUTS = 96, STEPS = 11, BLOCKS = 3 };
    float *values = malloc(sizeof(float) * STEPS * INPUTS);
    uint8_t *raw = malloc(ROWS * INPUTS * 4);
    Activations of;
    make_activations(&of, INPUTS, STEPS);
    for (int i = 0; i < STEPS * INPUTS; i++)
        values[i] = (float)(int)(next() % 2001 - 1000) / 300.0f;
    for (int i = 0; i < STEPS; i++)
        quantise(values + i * INPUTS, i % 2 ? values : NULL, i % 2 && i % 3 ? values : NULL, 1e-5f, &of, i);
    mix(of.codes, STEPS * INPUTS);
    for (int format = Q4_0; format <= F32; format++) {
        Matrix matrix = {format, ROWS, INPUTS, allocate(3 * tile_bytes(format, INPUTS))};
        const size_t row_bytes = (size_t[]){54, 60, 102, 192, 192, 384}[format];
        for (int row = 0; row < ROWS; row++) {
            for (size_t i = 0; i < row_bytes; i++)
                raw[i] = (uint8_t)next();
            for (size_t i = 0; format <= Q8_0 && i < row_bytes; i += row_bytes / 3) { /* scales of about 1 */
                raw[i + 1] = 60;
                if (format == Q4_1)
                    raw[i + 3] = 52;
            }
            for (size_t i = 1; format >= F16 && format <= BF16 && i < row_bytes; i += 2)
                raw[i] = 60;
            for (size_t i = 0; format == F32 && i < row_bytes; i += 4)
                raw[i + 3] = 63;
            pack_row(&matrix, row, raw);
        }
        floats sums[MOST_TOKENS];
        for (int tile = 0; tile < ROWS / 16; tile++)
            for (int first = 0; first < STEPS; first += MOST_TOKENS) {
                const int tokens = STEPS - first < MOST_TOKENS ? STEPS - first : MOST_TOKENS;
                product(&matrix, tile, &of, first, tokens, sums);
                mix(sums, sizeof(floats) * tokens);
            }
        unpack_row(&matrix, 37, values);
        mix(values, sizeof(float) * INPUTS);
        release(matrix.tiles, 3 * tile_bytes(format, INPUTS));
    }
    for (int cache = CACHE_F16; cache <= CACHE_INT4; cache++) {
        enum { LONG = 40, LONGER = 2 * GROUP_TOKENS + LONG };
        const int length = cache == CACHE_INT4 ? LONGER : LONG;
        uint8_t *pool = allocate(BLOCKS * block_bytes(cache)), *tail = allocate(TAIL_BYTES);
        float key[HEAD_SIZE], value[HEAD_SIZE], query[MOST_QUERIES * HEAD_SIZE], output[MOST_QUERIES * HEAD_SIZE];
        const int32_t table[BLOCKS] = {2, 0, 1};
        const Block first = {pool, pool + BLOCKS * key_bytes(cache)};
        for (int t = 0; t < length; t++) {
            for (int i = 0; i < HEAD_SIZE; i++) {
                key[i] = (float)(int)(next() % 2001 - 1000) / 500.0f;
                value[i] = (float)(int)(next() % 2001 - 1000) / 500.0f;
            }
            const int slot = t % block_tokens(cache);
            const Block block = block_at(first, cache, table[t / block_tokens(cache)]);
            if (cache != CACHE_INT4)
                put(cache, block, slot, key, value);
            else
                put_halves(in_tail(tail, slot / BLOCK), slot % BLOCK, key, value);
            if (cache == CACHE_INT4 && slot == GROUP_TOKENS - 1)
                put_int4(block, tail);
        }
        for (int i = 0; i < MOST_QUERIES * HEAD_SIZE; i++)
            query[i] = (float)(int)(next() % 2001 - 1000) / 500.0f;
        Attention work = {.first = first, .tail = tail, .table = table, .length = length, .stride = LONGER + BLOCK};
        work.scores = malloc(sizeof(float) * MOST_QUERIES * work.stride);
        for (int i = 0; i < MOST_QUERIES; i++) {
            work.queries[i] = query + i * HEAD_SIZE;
            work.outputs[i] = output + i * HEAD_SIZE;
        }
        const int tokens = cache == CACHE_F16 ? 2 : 1;
        for (int window = 0; window < 80; window += 23, work.cap = 3) { /* all tokens, then the last ones, with a cap */
            work.window = window;
            work.begin = first_block(&work, cache, tokens);
            attend(cache, &work, tokens);
            mix(output, sizeof(float) * tokens * QUERIES * HEAD_SIZE);
        }
        free(work.scores);
        release(tail, TAIL_BYTES);
        release(pool, BLOCKS * block_bytes(cache));
    }
    end_activations(&of, STEPS);
    free(values);
    free(raw);
    printf("%s %08x\n", LANES_NAME, hash);
    return 0;
}
