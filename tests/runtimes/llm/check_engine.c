#include <stdio.h>
/* runs a whole engine: a prompt in chunks beside another sequence, then single tokens; prints a hash of the logits */
static uint32_t state = 1, hash = 2166136261u;
static float next(void) { state = state * 1664525u + 1013904223u; return (float)(int)(state >> 8) / 8388608.0f - 1.0f; }
static void fill(float *values, int number, float by)
{
    for (int i = 0; i < number; i++)
        values[i] = next() * by;
}
int main(void)
{
    enum { LAYERS = 2, WIDTH = 96, KV = 2, HEADS = KV * QUERIES, HIDDEN = 64, WORDS = 37, LONG = 66, STEPS = 6 };
    enum { QUERY = HEADS * HEAD_SIZE, KEY = KV * HEAD_SIZE, ROPE = HEAD_SIZE / 2 * 2 };
    const int shapes[][2] = {{QUERY, WIDTH}, {KEY, WIDTH}, {KEY, WIDTH}, {WIDTH, QUERY}, {HIDDEN, WIDTH}, {HIDDEN, WIDTH},
                             {WIDTH, HIDDEN}};
    const int vectors[] = {WIDTH, WIDTH, QUERY, KEY, KEY, HEAD_SIZE, HEAD_SIZE, WIDTH, WIDTH, WIDTH, HIDDEN, WIDTH, WIDTH};
    static float values[(QUERY + WIDTH + HIDDEN) * (QUERY + WIDTH)], angles[2][2 * (LONG + 1) * ROPE / 2];
    for (int cache = CACHE_F16; cache <= CACHE_INT4; cache++) {
        const int length = 8 * block_tokens(cache);
        Shape shape = {LAYERS, WIDTH, HEADS, KV, HIDDEN, WORDS, ROPE, cache == 1, 1e-5f, cache, 8, LONG + 1, length, 3, 0,
                       0.2f, cache == 2 ? 5.0f : 0, cache == 2 ? 4.0f : 0, cache ? 1.5f : 1, cache == 1, cache == 1};
        shape.weight_bytes = engine_matrix_bytes(F32, WORDS, WIDTH);
        for (int i = 0; i < 7; i++)
            shape.weight_bytes += LAYERS * engine_matrix_bytes(F32, shapes[i][0], shapes[i][1]);
        Engine *engine = engine_new(&shape);
        if (!engine)
            return 1;
        fill(values, WORDS * WIDTH, 1);
        int good = engine_matrix(engine, -1, 0, F32, WORDS, WIDTH) && engine_matrix(engine, -1, 1, 0, 0, 0);
        engine_rows(engine, -1, 0, 0, WORDS, (uint8_t *)values, 4 * WIDTH);
        for (int layer = 0; layer < LAYERS; layer++) {
            for (int i = 0; i < 7; i++) {
                fill(values, shapes[i][0] * shapes[i][1], 0.2f);
                good &= engine_matrix(engine, layer, i, F32, shapes[i][0], shapes[i][1]);
                engine_rows(engine, layer, i, 0, shapes[i][0], (uint8_t *)values, 4 * shapes[i][1]);
            }
            for (int i = 0; i < (cache == CACHE_F16 ? 7 : 13); i++) {
                fill(values, vectors[i], 1);
                good &= engine_vector(engine, layer, i, values, vectors[i]);
            }
            engine_view(engine, layer, cache && layer ? 21 : 0, layer);
        }
        for (int i = 0; i < (cache == CACHE_F16 ? 1 : 3); i++) {
            fill(values, 48 > WIDTH ? 48 : WIDTH, 1);
            good &= engine_vector(engine, -1, i, values, i < 2 ? WIDTH : 48);
        }
        /* one matrix more than was announced has no room */
        if (!good || engine_matrix(engine, 0, 0, F32, QUERY, WIDTH))
            return 2;
        const int32_t first[] = {5, 0, 7, 3, 2}, second[] = {1, 6};
        uint8_t *memory[2][2]; /* tails of two blocks of two sequences */
        for (int i = 0; i < 4; i++)
            memory[i / 2][i % 2] = calloc(1, engine_tail_bytes(engine));
        for (int step = 0, done = 0; step < STEPS; step++) {
            const int32_t *tables[LONG + 1];
            int32_t ids[LONG + 1], index[LONG + 1], rows = 0, chunk = step < 3 ? LONG / 3 : 1;
            uint8_t follows[LONG + 1], *const *tails[LONG + 1];
            float logits[2 * 48];
            for (int i = 0; i < chunk; i++, rows++, done++) {
                ids[rows] = done % WORDS, index[rows] = done, tables[rows] = first, follows[rows] = i > 0;
                tails[rows] = memory[0];
            }
            ids[rows] = step, index[rows] = step, tables[rows] = second, follows[rows] = 0, tails[rows] = memory[1];
            rows++;
            fill(angles[0], 2 * rows * ROPE / 2, 1);
            fill(angles[1], 2 * rows * ROPE / 2, 1);
            Batch batch = {rows, ids, NULL, angles[0], angles[1], index, tables, tails, follows};
            engine_layers(engine, &batch, 0, 1);
            engine_layers(engine, &batch, 1, LAYERS);
            const int32_t wanted[] = {rows - 2, rows - 1};
            engine_logits(engine, wanted, 2, logits);
            for (size_t i = 0; i < sizeof logits; i++)
                hash = (hash ^ ((uint8_t *)logits)[i]) * 16777619u;
        }
        for (int i = 0; i < 4; i++)
            free(memory[i / 2][i % 2]);
        uint8_t *content = malloc(engine_block_bytes(engine));
        engine_copy_block(engine, 7, 3);
        engine_move_block(engine, 3, content, 1);
        engine_move_block(engine, 0, content, 0);
        free(content);
        engine_end(engine);
    }
    printf("%s %08x\n", LANES_NAME, hash);
    return 0;
}
