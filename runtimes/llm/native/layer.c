/* The layers and the head of a decoder-only transformer over a ragged batch: what each thread of a pool does of them.
 *
 * Threads split each phase of a layer by outputs, never by the terms of a sum, so results do not depend on their number.
 * Between phases they wait for each other: some hundred nanoseconds in a loop, then asleep.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "matrix.c"
#include "attention.c"
#include "attention_int4.c"

#define SPINS 400 /* looks at a barrier before a thread sleeps */

typedef struct {
    int32_t layers, width, heads, kv_heads, hidden, vocabulary, rope_size, adjacent;
    float epsilon;
    int32_t cache, blocks, most_rows, most_length, threads;
    size_t weight_bytes; /* of all matrices, as `engine_matrix_bytes` gives them */
    float query_scale, score_cap, logit_cap, embedding_scale; /* caps: 0 for none */
    int32_t gelu, parallel; /* parallel: the feed-forward reads what attention reads */
} Shape;

typedef struct {
    Matrix query, key, value, output, gate, up, down; /* gate: without tiles if the feed-forward has no gate */
    float *attention_norm, *mlp_norm;
    float *query_bias, *key_bias, *value_bias, *query_norm, *key_norm; /* or NULL */
    float *attention_norm_bias, *output_bias, *post_attention_norm, *up_bias, *down_bias, *post_mlp_norm; /* or NULL */
    int32_t window, rope; /* window: how many tokens a token sees, or 0 for all; rope: the number of its angles */
} Layer;

/* The rows of a step. ids: -1 where `embeddings` has the input; cosines, sines: (rotary embeddings, rows, rope_size / 2);
 * index:
 * of a token in its sequence; tables: of its sequence; tails: of its sequence, by the number of the block, with the tails
 * of all layers and heads, or NULL for a cache that has none; follows: whether a row is the next token of the row before.
 */
typedef struct {
    int32_t rows;
    const int32_t *ids;
    const float *embeddings, *cosines, *sines;
    const int32_t *index;
    const int32_t *const *tables;
    uint8_t *const *const *tails;
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
    float *norm, *norm_bias, *head_bias; /* the biases, or NULL */
    uint8_t *weights, *cache;
    size_t weights_used;
    float *hidden, *projected, *mixed, *branch, *gated, *scores; /* scores: for each thread */
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
    const float *rows, const float *norm, const float *norm_bias, float epsilon, const Activations *to, int number, int me,
    int threads)
{
    MY_PART(number, from, end);
    for (int row = from; row < end; row++)
        quantise(rows + (size_t)row * to->inputs, norm, norm_bias, epsilon, to, row);
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

/* x / (1 + e**-x), or with gelu x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x**3))) / 2, which has the same form */
INLINE floats activated(floats x, int gelu)
{
    const floats cube = multiply(multiply(x, x), multiply(x, splat(0.044715f)));
    const floats slope = gelu ? multiply(add(x, cube), splat(1.59576912f)) : x;
    return divide(x, add(splat(1.0f), exponential(subtract(zeros(), slope))));
}

/* outputs = activated(gate times row) * (up times row), or without a gate activated(up times row) */
static void gate_rows(
    const Layer *layer, int gelu, const Activations *rows, int number, float *outputs, int me, int threads)
{
    MY_PART(layer->up.rows / 16, from, end);
    for (int tile = from; tile < end; tile++)
        for (int row = 0; row < number; row += MOST_TOKENS) {
            const int tokens = number - row < MOST_TOKENS ? number - row : MOST_TOKENS;
            floats gates[MOST_TOKENS], ups[MOST_TOKENS];
            if (layer->gate.tiles)
                product(&layer->gate, tile, rows, row, tokens, gates);
            product(&layer->up, tile, rows, row, tokens, ups);
            for (int t = 0; t < tokens; t++) {
                const floats up = layer->up_bias ? add(ups[t], load(layer->up_bias + 16 * tile)) : ups[t];
                const floats value = layer->gate.tiles ? multiply(activated(gates[t], gelu), up) : activated(up, gelu);
                store(outputs + (size_t)(row + t) * layer->up.rows + 16 * tile, value);
            }
        }
}

static void add_bias(float *values, const float *bias, int size)
{
    if (bias)
        for (int i = 0; i < size; i += 16)
            store(values + i, add(load(values + i), load(bias + i)));
}

/* hidden += norm(branch + bias): what a layer's attention or feed-forward adds, where either is there */
static void join_rows(Engine *engine, const float *bias, const float *norm, int number, int me, int threads)
{
    const int width = engine->of.width;
    MY_PART(number, from, end);
    for (int row = from; row < end; row++) {
        float *branch = engine->branch + (size_t)row * width, *hidden = engine->hidden + (size_t)row * width;
        add_bias(branch, bias, width);
        if (norm)
            normalise(branch, norm, engine->of.epsilon, width, branch);
        add_bias(hidden, branch, width);
    }
}

static void normalise_head(float *values, const float *norm, float epsilon)
{
    if (norm)
        normalise(values, norm, epsilon, HEAD_SIZE, values);
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

/* Return block 0 of a head of keys; heads: numbered through all layers. */
INLINE Block first_of(const Engine *engine, int head)
{
    uint8_t *keys = engine->cache + (size_t)head * engine->of.blocks * block_bytes(engine->of.cache);
    return (Block){keys, keys + (size_t)engine->of.blocks * key_bytes(engine->of.cache)};
}

INLINE Block block_of(const Engine *engine, int layer, int kv_head, int number)
{
    return block_at(first_of(engine, layer * engine->of.kv_heads + kv_head), engine->of.cache, number);
}

/* The tail that a row's token is in, for one layer and head. */
INLINE uint8_t *tail_of(const Engine *engine, int row, int layer, int kv_head)
{
    const Batch *batch = engine->batch;
    const size_t head = (size_t)layer * engine->of.kv_heads + kv_head;
    return batch->tails[row][batch->index[row] / GROUP_TOKENS] + head * TAIL_BYTES;
}

/* Bias, norm and rotary embedding of some rows' queries and keys; keys and values go into the cache. */
static void store_rows(Engine *engine, int number, int me, int threads)
{
    const Shape *of = &engine->of;
    const Batch *batch = engine->batch;
    const Layer *layer = engine->layers + number;
    const int queries = of->heads * HEAD_SIZE, keys = of->kv_heads * HEAD_SIZE, half = of->rope_size / 2;
    MY_PART(batch->rows, from, end);
    for (int row = from; row < end; row++) {
        float *query = engine->projected + (size_t)row * (queries + 2 * keys), *key = query + queries, *value = key + keys;
        const size_t angles = ((size_t)layer->rope * batch->rows + row) * half;
        const float *cosines = batch->cosines + angles, *sines = batch->sines + angles;
        const int tokens = block_tokens(of->cache), slot = batch->index[row] % tokens;
        const int block = batch->tables[row][batch->index[row] / tokens];
        add_bias(query, layer->query_bias, queries);
        add_bias(key, layer->key_bias, keys);
        add_bias(value, layer->value_bias, keys);
        for (int head = 0; head < of->heads; head++) {
            normalise_head(query + head * HEAD_SIZE, layer->query_norm, of->epsilon);
            rotate(query + head * HEAD_SIZE, cosines, sines, of->rope_size, of->adjacent, of->query_scale);
        }
        for (int head = 0; head < of->kv_heads; head++) {
            normalise_head(key + head * HEAD_SIZE, layer->key_norm, of->epsilon);
            rotate(key + head * HEAD_SIZE, cosines, sines, of->rope_size, of->adjacent, 1.0f);
            if (of->cache == CACHE_INT4)
                put_halves(in_tail(tail_of(engine, row, number, head), slot / BLOCK), slot % BLOCK,
                           key + head * HEAD_SIZE, value + head * HEAD_SIZE);
            else
                put(of->cache, block_of(engine, number, head, block), slot, key + head * HEAD_SIZE,
                    value + head * HEAD_SIZE);
        }
    }
}

/* Write the tails that are full to the cache: threads take turns at heads of keys and rows with a block's last token. */
static void pack_tails(Engine *engine, int number, int me, int threads)
{
    const Batch *batch = engine->batch;
    int unit = 0;
    for (int head = 0; head < engine->of.kv_heads; head++)
        for (int row = 0; row < batch->rows; row++)
            if (batch->index[row] % GROUP_TOKENS == GROUP_TOKENS - 1 && unit++ % threads == me) {
                const int block = batch->tables[row][batch->index[row] / GROUP_TOKENS];
                put_int4(block_of(engine, number, head, block), tail_of(engine, row, number, head));
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
                .first = block_of(engine, number, head, 0),
                .tail = of->cache == CACHE_INT4 ? tail_of(engine, row, number, head) : NULL,
                .table = batch->tables[row],
                .length = batch->index[row + tokens - 1] + 1,
                .window = engine->layers[number].window,
                .cap = of->score_cap,
                .scores = engine->scores + (size_t)me * MOST_QUERIES * most_scores,
                .stride = most_scores,
            };
            for (int i = 0; i < tokens * QUERIES; i++) {
                const size_t at = (size_t)(head * QUERIES + i % QUERIES) * HEAD_SIZE;
                work.queries[i] = engine->projected + (size_t)(row + i / QUERIES) * stride + at;
                work.outputs[i] = engine->mixed + (size_t)(row + i / QUERIES) * queries + at;
            }
            work.begin = first_block(&work, of->cache, tokens);
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
        for (int i = 0; id >= 0 && engine->of.embedding_scale != 1.0f && i < width; i += 16)
            store(to + i, multiply(load(to + i), splat(engine->of.embedding_scale)));
    }
}

static void run_layer(Engine *engine, int number, int me, int threads)
{
    const Shape *of = &engine->of;
    const Layer *layer = engine->layers + number;
    const int rows = engine->batch->rows;
    const int queries = of->heads * HEAD_SIZE, keys = of->kv_heads * HEAD_SIZE, stride = queries + 2 * keys;
    const int joins = layer->output_bias || layer->post_attention_norm, joins_mlp = layer->down_bias || layer->post_mlp_norm;
    Barrier *barrier = &engine->barrier;
    quantise_rows(
        engine->hidden, layer->attention_norm, layer->attention_norm_bias, of->epsilon, &engine->narrow, rows, me, threads);
    wait_for_all(barrier);
    multiply_rows(&layer->query, &engine->narrow, rows, engine->projected, stride, 0, me, threads);
    multiply_rows(&layer->key, &engine->narrow, rows, engine->projected + queries, stride, 0, me, threads);
    multiply_rows(&layer->value, &engine->narrow, rows, engine->projected + queries + keys, stride, 0, me, threads);
    wait_for_all(barrier);
    store_rows(engine, number, me, threads);
    wait_for_all(barrier);
    if (of->cache == CACHE_INT4) {
        pack_tails(engine, number, me, threads);
        wait_for_all(barrier);
    }
    attend_rows(engine, number, me, threads);
    wait_for_all(barrier);
    quantise_rows(engine->mixed, NULL, NULL, 0, &engine->attended, rows, me, threads);
    wait_for_all(barrier);
    multiply_rows(&layer->output, &engine->attended, rows, joins ? engine->branch : engine->hidden, of->width, !joins, me,
                  threads);
    wait_for_all(barrier);
    if (joins) /* a thread joins the rows that it quantises next */
        join_rows(engine, layer->output_bias, layer->post_attention_norm, rows, me, threads);
    if (!of->parallel)
        quantise_rows(engine->hidden, layer->mlp_norm, NULL, of->epsilon, &engine->narrow, rows, me, threads);
    wait_for_all(barrier);
    gate_rows(layer, of->gelu, &engine->narrow, rows, engine->gated, me, threads);
    wait_for_all(barrier);
    quantise_rows(engine->gated, NULL, NULL, 0, &engine->wide, rows, me, threads);
    wait_for_all(barrier);
    multiply_rows(&layer->down, &engine->wide, rows, joins_mlp ? engine->branch : engine->hidden, of->width, !joins_mlp, me,
                  threads);
    wait_for_all(barrier);
    if (joins_mlp) {
        join_rows(engine, layer->down_bias, layer->post_mlp_norm, rows, me, threads);
        wait_for_all(barrier);
    }
}

/* logits = capped(logits + bias), of the tiles that this thread multiplied */
static void finish_logits(Engine *engine, int me, int threads)
{
    MY_PART(engine->head.rows / 16, from, end);
    for (int row = 0; row < engine->wanted_rows; row++)
        for (int tile = from; tile < end; tile++) {
            float *at = engine->logits + (size_t)row * engine->head.rows + 16 * tile;
            add_bias(at, engine->head_bias ? engine->head_bias + 16 * tile : NULL, 16);
            if (engine->of.logit_cap > 0)
                store(at, capped(load(at), engine->of.logit_cap));
        }
}

static void run_head(Engine *engine, int me, int threads)
{
    const int width = engine->of.width;
    MY_PART(engine->wanted_rows, from, end);
    for (int i = from; i < end; i++)
        quantise(engine->hidden + (size_t)engine->wanted[i] * width, engine->norm, engine->norm_bias, engine->of.epsilon,
                 &engine->narrow, i);
    wait_for_all(&engine->barrier);
    multiply_rows(
        &engine->head, &engine->narrow, engine->wanted_rows, engine->logits, engine->head.rows, 0, me, threads);
    if (engine->head_bias || engine->of.logit_cap > 0)
        finish_logits(engine, me, threads);
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
