/* One step of a decoder-only transformer over a ragged batch, a few layers at a time, by a pool of threads.
 *
 * Threads split each phase of a layer by outputs, never by the terms of a sum, so results do not depend on their number.
 * Between phases they wait for each other: some hundred nanoseconds in a loop, then asleep. Between steps they sleep.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "matrix.c"
#include "attention.c"

#define SPINS 400 /* looks at a barrier before a thread sleeps */

typedef struct {
    int32_t layers, width, heads, kv_heads, hidden, vocabulary, rope_size, adjacent;
    float epsilon;
    int32_t cache, blocks, most_rows, most_length, threads;
    size_t weight_bytes; /* of all matrices, as `engine_matrix_bytes` gives them */
} Shape;

typedef struct {
    Matrix query, key, value, output, gate, up, down;
    float *attention_norm, *mlp_norm;
    float *query_bias, *key_bias, *value_bias, *query_norm, *key_norm; /* or NULL */
} Layer;

/* The rows of a step. ids: -1 where `embeddings` has the input; angles: (rows, rope_size / 2) cosines, and sines; index:
 * of a token in its sequence; tables: of its sequence; follows: whether a row is the next token of the row before. */
typedef struct {
    int32_t rows;
    const int32_t *ids;
    const float *embeddings, *cosines, *sines;
    const int32_t *index;
    const int32_t *const *tables;
    const uint8_t *follows;
} Batch;

typedef struct {
    int threads, waiting;
    unsigned phase;
    pthread_mutex_t lock;
    pthread_cond_t all;
} Barrier;

typedef struct Engine {
    Shape of;
    Layer *layers;
    Matrix embedding, head;
    float *norm;
    uint8_t *weights, *cache;
    size_t weights_used;
    float *hidden, *projected, *mixed, *gated, *scores; /* scores: for each thread */
    Activations narrow, wide, attended; /* of width, hidden and heads * HEAD_SIZE inputs */
    Barrier barrier;
    pthread_t *pool;
    pthread_mutex_t lock;
    pthread_cond_t begun;
    unsigned job; /* counts the jobs that were begun */
    int ending;
    const Batch *batch;
    int first, end; /* layers; or, if first < 0, the head */
    const int32_t *wanted;
    int wanted_rows;
    float *logits;
} Engine;

typedef struct {
    Engine *engine;
    int number;
} Member;

/* Zeroed memory; NULL if there is none. The system gives large pages where 2 MB and more are asked for at once: weights
 * that lie in small pages are read at half the speed. ALLOCATE_EXACTLY: for sanitizers, which do not see the ends of
 * mapped memory. */
static void *allocate(size_t size)
{
#ifdef ALLOCATE_EXACTLY
    return calloc(1, size);
#else
    void *found = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED)
        return NULL;
#ifdef MADV_HUGEPAGE
    madvise(found, size, MADV_HUGEPAGE);
#endif
    return found;
#endif
}

static void release(void *memory, size_t size)
{
#ifdef ALLOCATE_EXACTLY
    (void)size;
    free(memory);
#else
    if (memory)
        munmap(memory, size);
#endif
}

/* --- threads */

static void wait_for_all(Barrier *barrier)
{
    const unsigned phase = __atomic_load_n(&barrier->phase, __ATOMIC_ACQUIRE);
    if (barrier->threads == 1)
        return;
    if (__atomic_add_fetch(&barrier->waiting, 1, __ATOMIC_ACQ_REL) == barrier->threads) {
        __atomic_store_n(&barrier->waiting, 0, __ATOMIC_RELAXED);
        pthread_mutex_lock(&barrier->lock);
        __atomic_store_n(&barrier->phase, phase + 1, __ATOMIC_RELEASE);
        pthread_cond_broadcast(&barrier->all);
        pthread_mutex_unlock(&barrier->lock);
        return;
    }
    for (int spin = 0; spin < SPINS; spin++) {
        if (__atomic_load_n(&barrier->phase, __ATOMIC_ACQUIRE) != phase)
            return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    pthread_mutex_lock(&barrier->lock);
    while (__atomic_load_n(&barrier->phase, __ATOMIC_ACQUIRE) == phase)
        pthread_cond_wait(&barrier->all, &barrier->lock);
    pthread_mutex_unlock(&barrier->lock);
}

/* this thread's part of `number` things */
#define MY_PART(number, from, to) \
    const int from = (int)((int64_t)(number) * me / threads), to = (int)((int64_t)(number) * (me + 1) / threads)

/* --- the phases of a layer */

static void quantise_rows(
    const float *rows, const float *norm, float epsilon, const Activations *to, int number, int me, int threads)
{
    MY_PART(number, from, end);
    for (int row = from; row < end; row++)
        quantise(rows + (size_t)row * to->inputs, norm, epsilon, to, row);
}

/* outputs[row][column + ...] = (or +=) matrix times row */
static void multiply_rows(
    const Matrix *matrix, const Activations *rows, int number, float *outputs, int stride, int adds, int me, int threads)
{
    MY_PART(matrix->rows / 16, from, end);
    for (int tile = from; tile < end; tile++)
        for (int row = 0; row < number; row += MOST_TOKENS) {
            const int tokens = number - row < MOST_TOKENS ? number - row : MOST_TOKENS;
            floats sums[MOST_TOKENS];
            product(matrix, tile, rows, row, tokens, sums);
            for (int t = 0; t < tokens; t++) {
                float *to = outputs + (size_t)(row + t) * stride + 16 * tile;
                store(to, adds ? add(load(to), sums[t]) : sums[t]);
            }
        }
}

/* outputs = silu(gate times row) * (up times row) */
static void gate_rows(const Layer *layer, const Activations *rows, int number, float *outputs, int me, int threads)
{
    MY_PART(layer->gate.rows / 16, from, end);
    for (int tile = from; tile < end; tile++)
        for (int row = 0; row < number; row += MOST_TOKENS) {
            const int tokens = number - row < MOST_TOKENS ? number - row : MOST_TOKENS;
            floats gates[MOST_TOKENS], ups[MOST_TOKENS];
            product(&layer->gate, tile, rows, row, tokens, gates);
            product(&layer->up, tile, rows, row, tokens, ups);
            for (int t = 0; t < tokens; t++) {
                const floats silu = divide(
                    gates[t], add(splat(1.0f), exponential(subtract(zeros(), gates[t]))));
                store(outputs + (size_t)(row + t) * layer->gate.rows + 16 * tile, multiply(silu, ups[t]));
            }
        }
}

static void add_bias(float *values, const float *bias, int size)
{
    if (bias)
        for (int i = 0; i < size; i += 16)
            store(values + i, add(load(values + i), load(bias + i)));
}

static void normalise_head(float *values, const float *norm, float epsilon)
{
    if (!norm)
        return;
    floats squares = zeros();
    for (int i = 0; i < HEAD_SIZE; i += 16)
        squares = multiply_add(load(values + i), load(values + i), squares);
    const floats scale = splat(1.0f / sqrtf(sum_of(squares) / (float)HEAD_SIZE + epsilon));
    for (int i = 0; i < HEAD_SIZE; i += 16)
        store(values + i, multiply(multiply(load(values + i), scale), load(norm + i)));
}

static void rotate(float *values, const float *cosines, const float *sines, int size, int adjacent, float scale)
{
    for (int i = 0; i < size / 2; i++) {
        float *first = values + (adjacent ? 2 * i : i), *second = values + (adjacent ? 2 * i + 1 : i + size / 2);
        const float a = *first, b = *second;
        *first = (a * cosines[i] - b * sines[i]) * scale;
        *second = (b * cosines[i] + a * sines[i]) * scale;
    }
    for (int i = size; i < HEAD_SIZE; i++)
        values[i] *= scale;
}

INLINE uint8_t *pool_of(const Engine *engine, int layer, int kv_head)
{
    const size_t head = (size_t)layer * engine->of.kv_heads + kv_head;
    return engine->cache + head * engine->of.blocks * block_bytes(engine->of.cache);
}

/* Bias, norm and rotary embedding of some rows' queries and keys; keys and values go into the cache. */
static void place_rows(Engine *engine, int number, int me, int threads)
{
    const Shape *of = &engine->of;
    const Batch *batch = engine->batch;
    const Layer *layer = engine->layers + number;
    const int queries = of->heads * HEAD_SIZE, keys = of->kv_heads * HEAD_SIZE, half = of->rope_size / 2;
    MY_PART(batch->rows, from, end);
    for (int row = from; row < end; row++) {
        float *query = engine->projected + (size_t)row * (queries + 2 * keys), *key = query + queries, *value = key + keys;
        const float *cosines = batch->cosines + (size_t)row * half, *sines = batch->sines + (size_t)row * half;
        const int slot = batch->index[row] % BLOCK, block = batch->tables[row][batch->index[row] / BLOCK];
        add_bias(query, layer->query_bias, queries);
        add_bias(key, layer->key_bias, keys);
        add_bias(value, layer->value_bias, keys);
        for (int head = 0; head < of->heads; head++) {
            normalise_head(query + head * HEAD_SIZE, layer->query_norm, of->epsilon);
            rotate(query + head * HEAD_SIZE, cosines, sines, of->rope_size, of->adjacent, 1.0f / sqrtf(HEAD_SIZE));
        }
        for (int head = 0; head < of->kv_heads; head++) {
            normalise_head(key + head * HEAD_SIZE, layer->key_norm, of->epsilon);
            rotate(key + head * HEAD_SIZE, cosines, sines, of->rope_size, of->adjacent, 1.0f);
            put(of->cache, pool_of(engine, number, head) + (size_t)block * block_bytes(of->cache), slot,
                key + head * HEAD_SIZE, value + head * HEAD_SIZE);
        }
    }
}

/* Attention of all rows: threads take turns at heads of keys and pairs of neighbouring tokens. */
static void attend_rows(Engine *engine, int number, int me, int threads)
{
    const Shape *of = &engine->of;
    const Batch *batch = engine->batch;
    const int queries = of->heads * HEAD_SIZE, stride = queries + 2 * of->kv_heads * HEAD_SIZE;
    const size_t most_scores = (size_t)of->most_length + 2 * BLOCK;
    int unit = 0;
    for (int head = 0; head < of->kv_heads; head++)
        for (int row = 0, tokens; row < batch->rows; row += tokens, unit++) {
            tokens = of->cache == CACHE_F16 && row + 1 < batch->rows && batch->follows[row + 1] ? 2 : 1;
            if (unit % threads != me)
                continue;
            Attention work = {
                .pool = pool_of(engine, number, head),
                .table = batch->tables[row],
                .length = batch->index[row + tokens - 1] + 1,
                .scores = engine->scores + (size_t)me * MOST_QUERIES * most_scores,
                .stride = most_scores,
            };
            for (int i = 0; i < tokens * QUERIES; i++) {
                const size_t at = (size_t)(head * QUERIES + i % QUERIES) * HEAD_SIZE;
                work.queries[i] = engine->projected + (size_t)(row + i / QUERIES) * stride + at;
                work.outputs[i] = engine->mixed + (size_t)(row + i / QUERIES) * queries + at;
            }
            attend(of->cache, &work, tokens);
        }
}

static void embed_rows(Engine *engine, int me, int threads)
{
    const int width = engine->of.width;
    MY_PART(engine->batch->rows, from, end);
    for (int row = from; row < end; row++) {
        float *to = engine->hidden + (size_t)row * width;
        const int id = engine->batch->ids[row];
        if (id < 0)
            memcpy(to, engine->batch->embeddings + (size_t)row * width, sizeof(float) * (size_t)width);
        else
            unpack_row(&engine->embedding, id, to);
    }
}

static void run_layer(Engine *engine, int number, int me, int threads)
{
    const Shape *of = &engine->of;
    const Layer *layer = engine->layers + number;
    const int rows = engine->batch->rows;
    const int queries = of->heads * HEAD_SIZE, keys = of->kv_heads * HEAD_SIZE, stride = queries + 2 * keys;
    Barrier *barrier = &engine->barrier;
    quantise_rows(engine->hidden, layer->attention_norm, of->epsilon, &engine->narrow, rows, me, threads);
    wait_for_all(barrier);
    multiply_rows(&layer->query, &engine->narrow, rows, engine->projected, stride, 0, me, threads);
    multiply_rows(&layer->key, &engine->narrow, rows, engine->projected + queries, stride, 0, me, threads);
    multiply_rows(&layer->value, &engine->narrow, rows, engine->projected + queries + keys, stride, 0, me, threads);
    wait_for_all(barrier);
    place_rows(engine, number, me, threads);
    wait_for_all(barrier);
    attend_rows(engine, number, me, threads);
    wait_for_all(barrier);
    quantise_rows(engine->mixed, NULL, 0, &engine->attended, rows, me, threads);
    wait_for_all(barrier);
    multiply_rows(&layer->output, &engine->attended, rows, engine->hidden, of->width, 1, me, threads);
    wait_for_all(barrier);
    quantise_rows(engine->hidden, layer->mlp_norm, of->epsilon, &engine->narrow, rows, me, threads);
    wait_for_all(barrier);
    gate_rows(layer, &engine->narrow, rows, engine->gated, me, threads);
    wait_for_all(barrier);
    quantise_rows(engine->gated, NULL, 0, &engine->wide, rows, me, threads);
    wait_for_all(barrier);
    multiply_rows(&layer->down, &engine->wide, rows, engine->hidden, of->width, 1, me, threads);
    wait_for_all(barrier);
}

static void run_head(Engine *engine, int me, int threads)
{
    const int width = engine->of.width;
    MY_PART(engine->wanted_rows, from, end);
    for (int i = from; i < end; i++)
        quantise(engine->hidden + (size_t)engine->wanted[i] * width, engine->norm, engine->of.epsilon, &engine->narrow, i);
    wait_for_all(&engine->barrier);
    multiply_rows(
        &engine->head, &engine->narrow, engine->wanted_rows, engine->logits, engine->head.rows, 0, me, threads);
    wait_for_all(&engine->barrier);
}

static void run_job(Engine *engine, int me)
{
    /* the caller may change these for its next job as soon as all threads are behind the last barrier */
    const int threads = engine->of.threads, first = engine->first, end = engine->end;
    if (first < 0) {
        run_head(engine, me, threads);
        return;
    }
    if (first == 0) {
        embed_rows(engine, me, threads);
        wait_for_all(&engine->barrier);
    }
    for (int layer = first; layer < end; layer++)
        run_layer(engine, layer, me, threads);
}

static void *member(void *given)
{
    Engine *engine = ((Member *)given)->engine;
    const int me = ((Member *)given)->number;
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
                            layer->query_norm, layer->key_norm};
        for (int j = 0; j < 7; j++)
            free(vectors[j]);
    }
    free(engine->layers);
    free(engine->norm);
    release(engine->weights, of->weight_bytes);
    release(engine->cache, cache_bytes(of));
    release(engine->hidden, sizeof(float) * (size_t)of->most_rows * of->width);
    release(engine->projected, projected_bytes(of));
    release(engine->mixed, sizeof(float) * (size_t)of->most_rows * of->heads * HEAD_SIZE);
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
    engine->gated = allocate(sizeof(float) * (size_t)of->most_rows * of->hidden);
    engine->scores = allocate(scores_bytes(of));
    int good = engine->layers && engine->weights && engine->cache && engine->hidden && engine->projected && engine->mixed && engine->gated
               && engine->scores && make_activations(&engine->narrow, of->width, of->most_rows)
               && make_activations(&engine->wide, of->hidden, of->most_rows)
               && make_activations(&engine->attended, of->heads * HEAD_SIZE, of->most_rows);
    engine->barrier.threads = of->threads;
    pthread_mutex_init(&engine->lock, NULL);
    pthread_mutex_init(&engine->barrier.lock, NULL);
    pthread_cond_init(&engine->begun, NULL);
    pthread_cond_init(&engine->barrier.all, NULL);
    engine->pool = good ? calloc((size_t)of->threads, sizeof(pthread_t)) : NULL;
    for (int i = 1; engine->pool && i < of->threads; i++) {
        Member *given = malloc(sizeof *given);
        if (given)
            *given = (Member){engine, i};
        if (!given || pthread_create(engine->pool + i, NULL, member, given)) {
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

/* Set a vector of weights. layer: -1 for the last norm; role: its number in the list below. 0 if there is no memory. */
int engine_vector(Engine *engine, int layer, int role, const float *values, int number)
{
    if (layer < 0)
        return (engine->norm = copied(values, number)) != NULL;
    Layer *at = engine->layers + layer;
    float **const vectors[] = {&at->attention_norm, &at->mlp_norm, &at->query_bias, &at->key_bias, &at->value_bias,
                               &at->query_norm, &at->key_norm};
    return (*vectors[role] = copied(values, number)) != NULL;
}

/* Return the bytes that a matrix takes in the engine's memory. */
size_t engine_matrix_bytes(int format, int rows, int inputs)
{
    return (size_t)((rows + 15) / 16) * tile_bytes(format, inputs);
}

/* Set a matrix from a file's blocks. layer: -1 for the embedding (role 0) and the head (role 1; without blocks it is the
 * embedding). rows: of the file; the tiles hold 16 or a multiple of it. 0 if it is more than was announced. */
int engine_matrix(Engine *engine, int layer, int role, int format, int rows, int inputs, const uint8_t *blocks, size_t row_bytes)
{
    Layer *at = engine->layers + (layer < 0 ? 0 : layer);
    Matrix *const matrices[] = {&at->query, &at->key, &at->value, &at->output, &at->gate, &at->up, &at->down};
    Matrix *matrix = layer >= 0 ? matrices[role] : role == 0 ? &engine->embedding : &engine->head;
    const size_t size = engine_matrix_bytes(format, rows, inputs);
    if (!blocks) {
        *matrix = engine->embedding;
        return 1;
    }
    if (engine->weights_used + size > engine->of.weight_bytes)
        return 0;
    *matrix = (Matrix){format, (rows + 15) / 16 * 16, inputs, engine->weights + engine->weights_used};
    engine->weights_used += size;
    for (int row = 0; row < rows; row++)
        pack_row(matrix, row, blocks + (size_t)row * row_bytes);
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

/* Copy a block of all layers and heads out of the cache (out: 1) or into it (out: 0). */
void engine_move_block(Engine *engine, int block, uint8_t *content, int out)
{
    const size_t size = block_bytes(engine->of.cache);
    for (int pool = 0; pool < engine->of.layers * engine->of.kv_heads; pool++) {
        uint8_t *mine = engine->cache + ((size_t)pool * engine->of.blocks + block) * size;
        memcpy(out ? content + pool * size : mine, out ? mine : content + pool * size, size);
    }
}

void engine_copy_block(Engine *engine, int source, int target)
{
    const size_t size = block_bytes(engine->of.cache);
    for (int pool = 0; pool < engine->of.layers * engine->of.kv_heads; pool++) {
        uint8_t *base = engine->cache + (size_t)pool * engine->of.blocks * size;
        memcpy(base + (size_t)target * size, base + (size_t)source * size, size);
    }
}
