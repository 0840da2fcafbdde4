/* An engine: its threads, which sleep between steps, its memory, and what Python calls. */
#include "layer.c"

typedef struct {
    Engine *engine;
    int number;
} Worker;

static void *worker(void *given)
{
    Engine *engine = ((Worker *)given)->engine;
    const int me = ((Worker *)given)->number;
    unsigned done = 0;
    free(given);
    for (;;) {
        pthread_mutex_lock(&engine->lock);
        while (engine->job == done && !engine->ending)
            pthread_cond_wait(&engine->begun, &engine->lock);
        done = engine->job;
        const int ending = engine->ending;
        pthread_mutex_unlock(&engine->lock);
        if (ending)
            return NULL;
        run_job(engine, me);
    }
}

static void run_with_all(Engine *engine)
{
    if (engine->of.threads > 1) {
        pthread_mutex_lock(&engine->lock);
        engine->job++;
        pthread_cond_broadcast(&engine->begun);
        pthread_mutex_unlock(&engine->lock);
    }
    run_job(engine, 0);
}

/* --- what Python calls */

const char *engine_lanes(void) { return LANES_NAME; }

static int make_activations(Activations *to, int inputs, int rows)
{
    to->inputs = inputs;
    to->values = allocate(sizeof(float) * (size_t)rows * inputs);
    to->codes = allocate((size_t)rows * inputs);
    to->scales = allocate(sizeof(float) * (size_t)rows * inputs / GROUP_INPUTS);
    to->sums = allocate(sizeof(int32_t) * (size_t)rows * inputs / GROUP_INPUTS);
    return to->values && to->codes && to->scales && to->sums;
}

static void end_activations(Activations *of, int rows)
{
    release(of->values, sizeof(float) * (size_t)rows * of->inputs);
    release(of->codes, (size_t)rows * of->inputs);
    release(of->scales, sizeof(float) * (size_t)rows * of->inputs / GROUP_INPUTS);
    release(of->sums, sizeof(int32_t) * (size_t)rows * of->inputs / GROUP_INPUTS);
}

static size_t cache_bytes(const Shape *of)
{
    return (size_t)of->layers * of->kv_heads * of->blocks * block_bytes(of->cache);
}

static size_t scores_bytes(const Shape *of)
{
    return sizeof(float) * of->threads * MOST_QUERIES * ((size_t)of->most_length + 2 * BLOCK);
}

static size_t projected_bytes(const Shape *of)
{
    return sizeof(float) * (size_t)of->most_rows * (of->heads + 2 * of->kv_heads) * HEAD_SIZE;
}

void engine_end(Engine *engine)
{
    const Shape *of = &engine->of;
    if (engine->pool) {
        pthread_mutex_lock(&engine->lock);
        engine->ending = 1;
        pthread_cond_broadcast(&engine->begun);
        pthread_mutex_unlock(&engine->lock);
        for (int i = 1; i < of->threads; i++)
            if (engine->pool[i])
                pthread_join(engine->pool[i], NULL);
        free(engine->pool);
    }
    for (int i = 0; engine->layers && i < of->layers; i++) {
        Layer *layer = engine->layers + i;
        float *vectors[] = {layer->attention_norm, layer->mlp_norm, layer->query_bias, layer->key_bias, layer->value_bias,
                            layer->query_norm, layer->key_norm, layer->attention_norm_bias, layer->output_bias,
                            layer->post_attention_norm, layer->up_bias, layer->down_bias, layer->post_mlp_norm};
        for (size_t j = 0; j < sizeof vectors / sizeof *vectors; j++)
            free(vectors[j]);
    }
    free(engine->layers);
    free(engine->norm);
    free(engine->norm_bias);
    free(engine->head_bias);
    release(engine->weights, of->weight_bytes);
    release(engine->cache, cache_bytes(of));
    release(engine->hidden, sizeof(float) * (size_t)of->most_rows * of->width);
    release(engine->projected, projected_bytes(of));
    release(engine->mixed, sizeof(float) * (size_t)of->most_rows * of->heads * HEAD_SIZE);
    release(engine->branch, sizeof(float) * (size_t)of->most_rows * of->width);
    release(engine->gated, sizeof(float) * (size_t)of->most_rows * of->hidden);
    release(engine->scores, scores_bytes(of));
    end_activations(&engine->narrow, of->most_rows);
    end_activations(&engine->wide, of->most_rows);
    end_activations(&engine->attended, of->most_rows);
    free(engine);
}

/* Return a new engine without weights, or NULL if memory or threads cannot be had. */
Engine *engine_new(const Shape *shape)
{
    Engine *engine = calloc(1, sizeof *engine);
    if (!engine)
        return NULL;
    engine->of = *shape;
    const Shape *of = &engine->of;
    engine->layers = calloc((size_t)of->layers, sizeof(Layer));
    engine->weights = allocate(of->weight_bytes);
    engine->cache = allocate(cache_bytes(of));
    engine->hidden = allocate(sizeof(float) * (size_t)of->most_rows * of->width);
    engine->projected = allocate(projected_bytes(of));
    engine->mixed = allocate(sizeof(float) * (size_t)of->most_rows * of->heads * HEAD_SIZE);
    engine->branch = allocate(sizeof(float) * (size_t)of->most_rows * of->width);
    engine->gated = allocate(sizeof(float) * (size_t)of->most_rows * of->hidden);
    engine->scores = allocate(scores_bytes(of));
    int good = engine->layers && engine->weights && engine->cache && engine->hidden && engine->projected && engine->mixed && engine->branch
               && engine->gated && engine->scores && make_activations(&engine->narrow, of->width, of->most_rows)
               && make_activations(&engine->wide, of->hidden, of->most_rows)
               && make_activations(&engine->attended, of->heads * HEAD_SIZE, of->most_rows);
    engine->barrier.threads = of->threads;
    pthread_mutex_init(&engine->lock, NULL);
    pthread_mutex_init(&engine->barrier.lock, NULL);
    pthread_cond_init(&engine->begun, NULL);
    pthread_cond_init(&engine->barrier.all, NULL);
    engine->pool = good ? calloc((size_t)of->threads, sizeof(pthread_t)) : NULL;
    for (int i = 1; engine->pool && i < of->threads; i++) {
        Worker *given = malloc(sizeof *given);
        if (given)
            *given = (Worker){engine, i};
        if (!given || pthread_create(engine->pool + i, NULL, worker, given)) {
            free(given);
            engine->pool[i] = 0;
            good = 0;
            break;
        }
    }
    if (good && engine->pool)
        return engine;
    engine_end(engine);
    return NULL;
}

static float *copied(const float *values, int number)
{
    float *copy = malloc(sizeof(float) * (size_t)number);
    if (copy)
        memcpy(copy, values, sizeof(float) * (size_t)number);
    return copy;
}

/* Set a vector of weights, of a multiple of 16 values. layer: -1 for those behind the layers; role: its number in the
 * lists below. 0 if there is no memory. */
int engine_vector(Engine *engine, int layer, int role, const float *values, int number)
{
    Layer *at = engine->layers + (layer < 0 ? 0 : layer);
    float **const behind[] = {&engine->norm, &engine->norm_bias, &engine->head_bias};
    float **const vectors[] = {&at->attention_norm, &at->mlp_norm, &at->query_bias, &at->key_bias, &at->value_bias,
                               &at->query_norm, &at->key_norm, &at->attention_norm_bias, &at->output_bias,
                               &at->post_attention_norm, &at->up_bias, &at->down_bias, &at->post_mlp_norm};
    return (*(layer < 0 ? behind : vectors)[role] = copied(values, number)) != NULL;
}

/* Say what a layer sees, and which of the rotary embeddings it has. */
void engine_view(Engine *engine, int layer, int window, int rope)
{
    engine->layers[layer].window = window;
    engine->layers[layer].rope = rope;
}

/* Return the bytes that a matrix takes in the engine's memory. */
size_t engine_matrix_bytes(int format, int rows, int inputs)
{
    return (size_t)((rows + 15) / 16) * tile_bytes(format, inputs);
}

static Matrix *matrix_of(Engine *engine, int layer, int role)
{
    Layer *at = engine->layers + (layer < 0 ? 0 : layer);
    Matrix *const matrices[] = {&at->query, &at->key, &at->value, &at->output, &at->gate, &at->up, &at->down};
    return layer >= 0 ? matrices[role] : role == 0 ? &engine->embedding : &engine->head;
}

/* Let the next matrices begin at this byte of the engine's memory for weights. */
void engine_place(Engine *engine, size_t at) { engine->weights_used = at; }

/* Put rows of a matrix into its tiles, from `first` on. blocks: as the file has them. */
void engine_rows(Engine *engine, int layer, int role, int first, int rows, const uint8_t *blocks, size_t row_bytes)
{
    for (int row = 0; row < rows; row++)
        pack_row(matrix_of(engine, layer, role), first + row, blocks + (size_t)row * row_bytes);
}

/* Make room for a matrix. layer: -1 for the embedding (role 0) and the head (role 1; without rows it is the embedding).
 * rows: of the file; the tiles hold 16 or a multiple of it. 0 if it is more than was announced. */
int engine_matrix(Engine *engine, int layer, int role, int format, int rows, int inputs)
{
    Matrix *matrix = matrix_of(engine, layer, role);
    const size_t size = engine_matrix_bytes(format, rows, inputs);
    if (!rows) {
        *matrix = engine->embedding;
        return 1;
    }
    if (engine->weights_used + size > engine->of.weight_bytes)
        return 0;
    *matrix = (Matrix){format, (rows + 15) / 16 * 16, inputs, engine->weights + engine->weights_used};
    engine->weights_used += size;
    return 1;
}

void engine_layers(Engine *engine, const Batch *batch, int first, int end)
{
    engine->batch = batch;
    engine->first = first;
    engine->end = end;
    run_with_all(engine);
}

/* logits: (rows, vocabulary rounded up to 16) */
void engine_logits(Engine *engine, const int32_t *wanted, int rows, float *logits)
{
    engine->wanted = wanted;
    engine->wanted_rows = rows;
    engine->logits = logits;
    engine->first = -1;
    run_with_all(engine);
}

size_t engine_block_bytes(const Engine *engine)
{
    return (size_t)engine->of.layers * engine->of.kv_heads * block_bytes(engine->of.cache);
}

/* Return the bytes of a tail of all layers and heads. */
size_t engine_tail_bytes(const Engine *engine)
{
    return (size_t)engine->of.layers * engine->of.kv_heads * TAIL_BYTES;
}

/* Copy a block of all layers and heads out of the cache (out: 1) or into it (out: 0). */
void engine_move_block(Engine *engine, int block, uint8_t *content, int out)
{
    const int cache = engine->of.cache;
    const size_t keys = key_bytes(cache), values = value_bytes(cache);
    for (int head = 0; head < engine->of.layers * engine->of.kv_heads; head++, content += keys + values) {
        const Block mine = block_at(first_of(engine, head), cache, block);
        memcpy(out ? content : mine.keys, out ? mine.keys : content, keys);
        memcpy(out ? content + keys : mine.values, out ? mine.values : content + keys, values);
    }
}

void engine_copy_block(Engine *engine, int source, int target)
{
    const int cache = engine->of.cache;
    for (int head = 0; head < engine->of.layers * engine->of.kv_heads; head++) {
        const Block from = block_at(first_of(engine, head), cache, source);
        const Block to = block_at(first_of(engine, head), cache, target);
        memcpy(to.keys, from.keys, key_bytes(cache));
        memcpy(to.values, from.values, value_bytes(cache));
    }
}
