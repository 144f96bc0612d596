/* Prefill in one process, decoding in another: the KV cache travels over a socket, layer by layer, while the next
 * layers are still computed.
 *
 *   kv_transfer [--data DIR] [--results STEM]        (make test-transfer builds and runs it)
 *
 * The prefill process runs the prompts of 16 texts through the demo model. Once a layer has its tokens in the cache, a
 * second thread exports it with akv_sequence_export into the socket, and the first goes on with the next layer. The
 * decode process makes a sequence of the first layer's stream and adds the others to it, then generates and predicts.
 * Here one is a child of the other, connected by TCP on this machine; an engine would have them on two.
 *
 * The prefill process goes on by itself, too, with the same sequences, for comparison: the decode process must get the
 * same logits, bit for bit. What moves is compared with K and V in f16, and what two planes instead of four do to the
 * text and to the loss is measured against attention over the rows as given, in f32.
 *
 * FEWER PLANES. The cache has four digit planes on both sides, and what is sent may have the first two alone: the
 * decode process then reads no others. In the last run generation starts with them, and the other two follow meanwhile
 * (akv_export_desc.known_k); once they are there they are added to the sequences, which go on as if they had been
 * whole.
 *
 * MIT OR Apache-2.0.
 */
#define _DEFAULT_SOURCE
#include <alignedkv.h>

#include <arpa/inet.h>
#include <math.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "tinylm_model.h"

enum {
    PROMPT = 1500,               /* tokens of each text that are prefilled */
    GREEDY = 128,                /* tokens that are generated after it */
    REST = CONTEXT - 1 - PROMPT, /* tokens whose successors are predicted instead */
};

/* How K and V are kept, on both sides. */
typedef struct {
    int32_t format, dtype, mode;
} scheme;

static const scheme GIVEN = {AKV_FORMAT_RAW, AKV_F32, AKV_EXACT}; /* what all is compared with */
static const scheme ALIGNED = {AKV_FORMAT_ALIGNED, AKV_F16, AKV_EXPECTED};

/* Planes that are sent before generation starts, and whether the others follow. */
static const struct {
    const char *name;
    int32_t planes;
    bool follow;
} RUNS[] = {{"4 planes", 4, false}, {"2 planes", 2, false}, {"2 planes, then the others", 2, true}};
enum { N_RUNS = sizeof RUNS / sizeof RUNS[0] };

/* What one process makes of the sequences once they are in its cache. */
typedef struct {
    uint8_t text[GREEDY][LANES];
    float logits[GREEDY][LANES * VOCAB];
    double loss[LANES]; /* nats per byte, over the texts' own continuations */
} continuation;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

/* An example ends at the first error. An engine would return it, after akv_batch_abort if a step is begun. */
static void check(akv_status status, const char *call) {
    if (status == AKV_OK) return;
    char text[512];
    akv_last_error(text, sizeof text, NULL);
    fprintf(stderr, "%s: %s: %s\n", call, akv_status_string(status), text);
    exit(1);
}

/* ---- the socket ---- */

typedef struct {
    int fd;
    uint64_t bytes; /* that went through */
} wire;

/* akv_write_fn. */
static int put(void *user, const void *bytes, size_t n) {
    wire *w = user;
    for (const char *p = bytes; n > 0;) {
        const ssize_t some = write(w->fd, p, n);
        if (some <= 0) return 1;
        p += some, n -= (size_t)some, w->bytes += (uint64_t)some;
    }
    return 0;
}

/* Bytes in memory. */
typedef struct {
    char *bytes;
    size_t n, at, room;
} memory;

/* akv_write_fn. */
static int put_memory(void *user, const void *bytes, size_t n) {
    memory *m = user;
    if (m->n + n > m->room) {
        char *more = realloc(m->bytes, m->room = 2 * (m->n + n));
        if (!more) return 1;
        m->bytes = more;
    }
    memcpy(m->bytes + m->n, bytes, n);
    m->n += n;
    return 0;
}

/* akv_read_fn. */
static int get_memory(void *user, void *bytes, size_t n) {
    memory *m = user;
    if (n > m->n - m->at) return 1;
    memcpy(bytes, m->bytes + m->at, n);
    m->at += n;
    return 0;
}

/* akv_read_fn. */
static int get(void *user, void *bytes, size_t n) {
    wire *w = user;
    for (char *p = bytes; n > 0;) {
        const ssize_t some = read(w->fd, p, n);
        if (some <= 0) return 1;
        p += some, n -= (size_t)some, w->bytes += (uint64_t)some;
    }
    return 0;
}

static void send_all(wire *w, const void *bytes, size_t n) {
    if (put(w, bytes, n)) die("send");
}

static void receive_all(wire *w, void *bytes, size_t n) {
    if (get(w, bytes, n)) die("receive");
}

/* Both ends of a TCP connection on this machine. */
static void connect_both(int ends[2]) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    const int listener = socket(AF_INET, SOCK_STREAM, 0), yes = 1;
    if (listener < 0 || bind(listener, (void *)&address, size) || listen(listener, 1)) die("listen");
    if (getsockname(listener, (void *)&address, &size)) die("getsockname");
    ends[0] = socket(AF_INET, SOCK_STREAM, 0);
    if (ends[0] < 0 || connect(ends[0], (void *)&address, size)) die("connect");
    ends[1] = accept(listener, NULL, NULL);
    if (ends[1] < 0) die("accept");
    close(listener);
    for (int i = 0; i < 2; i++) setsockopt(ends[i], IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
}

/* ---- the library: a cache, and steps of all sequences ---- */

/* K and V of generated tokens, as they are appended later: a text's tokens one after another. */
enum { ROW = KV_HEADS * DIM };
typedef struct {
    int n; /* tokens so far */
    float k[LAYERS][LANES][GREEDY][ROW], v[LAYERS][LANES][GREEDY][ROW];
} rows_made;

typedef struct {
    const scheme *scheme;
    akv_context *context;
    akv_cache *cache;
    akv_batch *batch;
    akv_sequence sequences[LANES];
    int n;           /* sequences of a step */
    rows_made *kept; /* NULL: nobody needs the steps' rows again */
} kv_cache;

static void open_kv(kv_cache *kv, const scheme *s) {
    const akv_context_desc machine = {.struct_size = sizeof machine, .abi_version = AKV_ABI_VERSION};
    akv_layer_desc layers[LAYERS];
    for (int i = 0; i < LAYERS; i++) {
        layers[i] = (akv_layer_desc){
            .n_q_heads = HEADS, .n_kv_heads = KV_HEADS, .dim_k = DIM, .dtype_k = s->dtype, .dtype_v = s->dtype};
    }
    const akv_cache_desc desc = {
        .struct_size = sizeof desc, .format = s->format, .n_layers = LAYERS, .layers = layers, .exact_tail = AKV_NONE};
    const akv_batch_desc bounds = {.struct_size = sizeof bounds};
    *kv = (kv_cache){.scheme = s};
    check(akv_context_create(&machine, &kv->context), "akv_context_create");
    check(akv_cache_create(kv->context, &desc, &kv->cache), "akv_cache_create");
    check(akv_batch_create(kv->cache, &bounds, &kv->batch), "akv_batch_create");
}

static void close_kv(kv_cache *kv) {
    check(akv_batch_destroy(kv->batch), "akv_batch_destroy");
    check(akv_cache_destroy(kv->cache), "akv_cache_destroy"); /* with its sequences */
    check(akv_context_destroy(kv->context), "akv_context_destroy");
}

static void begin(kv_cache *kv, const akv_sequence *sequences, int n, int32_t new_each, int32_t queries_each) {
    int32_t n_new[LANES], n_q[LANES];
    for (int i = 0; i < n; i++) n_new[i] = new_each, n_q[i] = queries_each;
    const akv_batch_desc step = {
        .struct_size = sizeof step, .n_sequences = (uint32_t)n, .sequences = sequences, .n_new = n_new, .n_q = n_q};
    check(akv_batch_begin(kv->batch, &step, NULL), "akv_batch_begin");
}

/* Appends n rows to a layer. */
static void append_rows(kv_cache *kv, int layer, int n, const float *k, const float *v) {
    akv_rows key = {.data = (void *)k, .dtype = AKV_F32}, value = {.data = (void *)v, .dtype = AKV_F32};
    uint16_t *half = NULL;
    if (kv->scheme->dtype == AKV_F16) {
        half = allocate((size_t)(2 * n * ROW) * sizeof *half);
        for (int i = 0; i < n * ROW; i++) {
            half[i] = half_from_float(k[i]);
            half[n * ROW + i] = half_from_float(v[i]);
        }
        key = (akv_rows){.data = half, .dtype = AKV_F16};
        value = (akv_rows){.data = half + n * ROW, .dtype = AKV_F16};
    }
    check(akv_quantize_kv(kv->batch, layer, &key, &value, NULL), "akv_quantize_kv");
    free(half);
}

static void attend_rows(kv_cache *kv, int layer, const float *q, float *out) {
    const akv_attention_desc desc = {.struct_size = sizeof desc,
                                     .q = {.data = (void *)q, .dtype = AKV_F32},
                                     .out = {.data = out, .dtype = AKV_F32},
                                     .mode = kv->scheme->mode};
    check(akv_aligned_attention(kv->batch, layer, &desc), "akv_aligned_attention");
}

/* One token of each sequence (attend_fn). */
static void attend(void *user, int layer, const float *q, const float *k, const float *v, float *out) {
    kv_cache *kv = user;
    append_rows(kv, layer, kv->n, k, v);
    attend_rows(kv, layer, q, out);
    for (int i = 0; kv->kept && i < kv->n; i++) {
        memcpy(kv->kept->k[layer][i][kv->kept->n], k + i * ROW, ROW * sizeof(float));
        memcpy(kv->kept->v[layer][i][kv->kept->n], v + i * ROW, ROW * sizeof(float));
    }
}

static uint8_t most_likely(const float *logits) {
    int best = 0;
    for (int i = 1; i < VOCAB; i++) best = logits[i] > logits[best] ? i : best;
    return (uint8_t)best;
}

/* What both processes do with sequences of PROMPT tokens: `first` follow them. */
static void go_on(kv_cache *kv, model *m, const char *texts, const uint8_t *first, continuation *c) {
    akv_sequence forks[LANES];
    uint8_t tokens[LANES];
    kv->n = LANES;
    for (int i = 0; i < LANES; i++)
        check(akv_sequence_fork(kv->cache, kv->sequences[i], -1, &forks[i]), "akv_sequence_fork");
    memcpy(tokens, first, sizeof tokens);
    for (int t = 0; t < GREEDY; t++) {
        memcpy(c->text[t], tokens, sizeof tokens);
        begin(kv, forks, LANES, 1, 1);
        model_step(m, tokens, LANES, PROMPT + t, attend, kv, c->logits[t]);
        check(akv_batch_commit(kv->batch), "akv_batch_commit");
        for (int i = 0; i < LANES; i++) tokens[i] = most_likely(c->logits[t] + i * VOCAB);
    }
    float *logits = allocate(LANES * VOCAB * sizeof(float));
    for (int i = 0; i < LANES; i++) c->loss[i] = 0;
    for (int t = PROMPT; t < PROMPT + REST; t++) {
        for (int i = 0; i < LANES; i++) tokens[i] = (uint8_t)texts[i * CONTEXT + t];
        begin(kv, kv->sequences, LANES, 1, 1);
        model_step(m, tokens, LANES, t, attend, kv, logits);
        check(akv_batch_commit(kv->batch), "akv_batch_commit");
        for (int i = 0; i < LANES; i++) {
            c->loss[i] += negative_log_likelihood(logits + i * VOCAB, (uint8_t)texts[i * CONTEXT + t + 1]) / REST;
        }
    }
    free(logits);
}

/* Appends the tokens that another cache has made meanwhile. */
static void catch_up(kv_cache *kv, const rows_made *made) {
    if (made->n == 0) return;
    float *k = allocate((size_t)(2 * LANES * made->n * ROW) * sizeof(float)), *v = k + LANES * made->n * ROW;
    begin(kv, kv->sequences, LANES, made->n, 0);
    for (int l = 0; l < LAYERS; l++) {
        for (int i = 0; i < LANES; i++) {
            memcpy(k + i * made->n * ROW, made->k[l][i], (size_t)(made->n * ROW) * sizeof(float));
            memcpy(v + i * made->n * ROW, made->v[l][i], (size_t)(made->n * ROW) * sizeof(float));
        }
        append_rows(kv, l, LANES * made->n, k, v);
    }
    check(akv_batch_commit(kv->batch), "akv_batch_commit");
    free(k);
}

/* Digits that follow: read into memory by a thread, so that generation does not wait, and added between two steps. */
typedef struct {
    wire *from;
    memory streams;
    atomic_bool arrived;
} follower;

static void *receive_rest(void *user) {
    follower *f = user;
    uint64_t n;
    receive_all(f->from, &n, sizeof n);
    f->streams.bytes = allocate(n);
    f->streams.n = n;
    receive_all(f->from, f->streams.bytes, n);
    atomic_store(&f->arrived, true);
    return NULL;
}

static void add_digits(kv_cache *kv, memory *streams) {
    for (int i = 0; i < LANES; i++) {
        for (int l = 0; l < LAYERS; l++) {
            check(akv_sequence_import(kv->cache, kv->sequences[i], get_memory, streams, NULL), "akv_sequence_import");
        }
    }
}

/* Generates with the first planes, then with all. The decode process (`f`) adds the other digits when they have come;
 * the prefill process, for comparison, goes on after `after` tokens with the sequences that it had from the start
 * (`whole`), and appends to them what has been generated. Returns how many tokens were made before. */
static int generate(kv_cache *kv, model *m, const uint8_t *first, follower *f, kv_cache *whole, int after,
                    continuation *c) {
    uint8_t tokens[LANES];
    rows_made *made = allocate(sizeof *made);
    bool all = false;
    kv->n = LANES;
    kv->kept = made;
    memcpy(tokens, first, sizeof tokens);
    for (int t = 0; t < GREEDY; t++) {
        /* One token at least with the first planes, and half of them with all. */
        while (f && t == GREEDY / 2 && !atomic_load(&f->arrived)) usleep(1000);
        if (!all && (f ? t > 0 && atomic_load(&f->arrived) : t == after)) {
            all = true;
            kv->kept = NULL;
            if (f) {
                add_digits(kv, &f->streams);
            } else {
                catch_up(whole, made);
                kv = whole;
                kv->n = LANES;
            }
        }
        memcpy(c->text[t], tokens, sizeof tokens);
        begin(kv, kv->sequences, LANES, 1, 1);
        model_step(m, tokens, LANES, PROMPT + t, attend, kv, c->logits[t]);
        check(akv_batch_commit(kv->batch), "akv_batch_commit");
        if (!all) made->n++;
        for (int i = 0; i < LANES; i++) tokens[i] = most_likely(c->logits[t] + i * VOCAB);
    }
    const int n = made->n;
    free(made);
    return n;
}

/* ---- prefill: one thread computes layers, one sends them ---- */

typedef struct {
    kv_cache *kv;
    int i;          /* of the sequences */
    int32_t planes; /* that are sent */
    wire *to;       /* NULL: nothing is sent */
    memory *copy;   /* what is sent goes here, too */
    pthread_mutex_t lock;
    pthread_cond_t more;
    int computed; /* layers that can be sent */
    double sent_at[LAYERS], computed_at;
} prefill;

/* akv_write_fn: to the socket, and kept. */
static int put_both(void *user, const void *bytes, size_t n) {
    prefill *p = user;
    return put(p->to, bytes, n) || put_memory(p->copy, bytes, n);
}

static void *send_layers(void *user) {
    prefill *p = user;
    for (int l = 0; l < LAYERS; l++) {
        pthread_mutex_lock(&p->lock);
        while (p->computed <= l) pthread_cond_wait(&p->more, &p->lock);
        pthread_mutex_unlock(&p->lock);
        const akv_export_desc part = {
            .struct_size = sizeof part, .first_layer = l, .n_layers = 1, .planes_k = p->planes, .planes_v = p->planes};
        check(akv_sequence_export(p->kv->cache, p->kv->sequences[p->i], &part, put_both, p), "akv_sequence_export");
        p->sent_at[l] = now();
    }
    return NULL;
}

/* attend_prompt_fn. */
static void attend_prompt(void *user, int layer, int n, const float *q, const float *k, const float *v, float *out) {
    prefill *p = user;
    append_rows(p->kv, layer, n, k, v);
    attend_rows(p->kv, layer, q, out);
    pthread_mutex_lock(&p->lock);
    p->computed = layer + 1;
    pthread_cond_signal(&p->more);
    pthread_mutex_unlock(&p->lock);
}

/* Sequence `i` of the cache, of the first PROMPT tokens of a text. Returns how many layers had been sent when the last
 * one was computed. */
static int run_prefill(kv_cache *kv, model *m, int i, const uint8_t *text, int32_t planes, wire *to, memory *copy,
                       float *logits) {
    prefill p = {.kv = kv,
                 .i = i,
                 .planes = planes,
                 .to = to,
                 .copy = copy,
                 .lock = PTHREAD_MUTEX_INITIALIZER,
                 .more = PTHREAD_COND_INITIALIZER};
    pthread_t sender;
    check(akv_sequence_create(kv->cache, &kv->sequences[i]), "akv_sequence_create");
    begin(kv, &kv->sequences[i], 1, PROMPT, PROMPT);
    if (to && pthread_create(&sender, NULL, send_layers, &p)) die("pthread_create");
    model_prefill(m, text, PROMPT, attend_prompt, &p, logits);
    p.computed_at = now();
    int early = 0;
    if (to) pthread_join(sender, NULL);
    for (int l = 0; l < LAYERS; l++) early += to && p.sent_at[l] < p.computed_at;
    check(akv_batch_commit(kv->batch), "akv_batch_commit");
    return early;
}

/* The digits that were not sent before, of all sequences: their size, then their streams. */
static void send_rest(kv_cache *kv, int32_t planes, wire *to) {
    memory streams = {0};
    for (int i = 0; i < LANES; i++) {
        for (int l = 0; l < LAYERS; l++) {
            const akv_export_desc part = {
                .struct_size = sizeof part, .first_layer = l, .n_layers = 1, .known_k = planes, .known_v = planes};
            check(akv_sequence_export(kv->cache, kv->sequences[i], &part, put_memory, &streams), "akv_sequence_export");
        }
    }
    const uint64_t n = streams.n;
    send_all(to, &n, sizeof n);
    send_all(to, streams.bytes, n);
    free(streams.bytes);
}

/* ---- decode ---- */

static void receive_sequences(kv_cache *kv, akv_read_fn read, void *user) {
    for (int i = 0; i < LANES; i++) {
        check(akv_sequence_import(kv->cache, 0, read, user, &kv->sequences[i]), "akv_sequence_import");
        for (int l = 1; l < LAYERS; l++) {
            check(akv_sequence_import(kv->cache, kv->sequences[i], read, user, NULL), "akv_sequence_import");
        }
    }
}

static void run_decode(bool follow, model *m, const char *texts, wire *w) {
    kv_cache kv;
    uint8_t first[LANES];
    continuation *c = allocate(sizeof *c);
    int32_t n = 0;
    open_kv(&kv, &ALIGNED);
    receive_sequences(&kv, get, w);
    receive_all(w, first, sizeof first);
    if (follow) {
        follower f = {.from = w};
        pthread_t receiver;
        if (pthread_create(&receiver, NULL, receive_rest, &f)) die("pthread_create");
        n = generate(&kv, m, first, &f, NULL, 0, c);
        pthread_join(receiver, NULL);
        free(f.streams.bytes);
    } else {
        go_on(&kv, m, texts, first, c);
    }
    send_all(w, &n, sizeof n);
    send_all(w, c, sizeof *c);
    free(c);
    close_kv(&kv);
}

/* ---- what comes of it ---- */

typedef struct {
    const char *name;
    double bytes, f16_bytes; /* per text */
    double loss_difference, se;
    int same_text, same_bits, early; /* of LANES texts; of their logits; of LANES * LAYERS layers */
    double bytes_at_start; /* that had been sent when generation began, and tokens that were generated before */
    int switched;          /* the rest had come; 0: all came first */
} result;

static bool failed;

#define EXPECT(condition, ...)                                      \
    do {                                                            \
        if (!(condition)) {                                         \
            failed = true;                                          \
            printf("FAILED: %s (line %d): ", #condition, __LINE__); \
            printf(__VA_ARGS__);                                    \
            printf("\n");                                           \
        }                                                           \
    } while (0)

static void compare(const continuation *here, const continuation *there, const continuation *truth, int i, result *r) {
    bool same_bits = here->loss[i] == there->loss[i], same_text = true;
    for (int t = 0; t < GREEDY; t++) {
        same_bits &= !memcmp(here->logits[t] + i * VOCAB, there->logits[t] + i * VOCAB, VOCAB * sizeof(float));
        same_text &= there->text[t][i] == truth->text[t][i];
    }
    r->same_bits += same_bits;
    r->same_text += same_text;
}

/* What one process makes of the rows as given. */
static void run_truth(model *m, const char *texts, continuation *truth) {
    kv_cache kv;
    float logits[VOCAB];
    uint8_t first[LANES];
    open_kv(&kv, &GIVEN);
    for (int i = 0; i < LANES; i++) {
        run_prefill(&kv, m, i, (const uint8_t *)texts + i * CONTEXT, 0, NULL, NULL, logits);
        first[i] = most_likely(logits);
    }
    go_on(&kv, m, texts, first, truth);
    close_kv(&kv);
}

/* One run, on the prefill side. */
static result run(int which, model *m, const char *texts, wire *w, const continuation *truth) {
    const int32_t planes = RUNS[which].planes;
    const bool follow = RUNS[which].follow;
    kv_cache kv, part; /* `part`: what the decode process has, here */
    result r = {
        .name = RUNS[which].name, .f16_bytes = 2.0 * 2 * PROMPT * LAYERS * KV_HEADS * DIM, .loss_difference = NAN};
    float logits[VOCAB];
    uint8_t first[LANES];
    memory copy = {0};
    int32_t n;
    open_kv(&kv, &ALIGNED);
    open_kv(&part, &ALIGNED);
    w->bytes = 0;
    for (int i = 0; i < LANES; i++) {
        r.early += run_prefill(&kv, m, i, (const uint8_t *)texts + i * CONTEXT, planes, w, &copy, logits);
        first[i] = most_likely(logits);
    }
    r.bytes = r.bytes_at_start = (double)w->bytes / LANES;
    send_all(w, first, sizeof first);
    if (follow) {
        w->bytes = 0;
        send_rest(&kv, planes, w);
        r.bytes += (double)w->bytes / LANES;
    }
    continuation *here = allocate(sizeof *here), *there = allocate(sizeof *there);
    if (planes < 4) receive_sequences(&part, get_memory, &copy);
    if (!follow) go_on(planes < 4 ? &part : &kv, m, texts, first, here);
    receive_all(w, &n, sizeof n);
    receive_all(w, there, sizeof *there);
    if (follow) generate(&part, m, first, NULL, &kv, r.switched = n, here);
    for (int i = 0; i < LANES; i++) compare(here, there, truth, i, &r);
    if (!follow) {
        double squares = 0;
        r.loss_difference = 0;
        for (int i = 0; i < LANES; i++) r.loss_difference += (there->loss[i] - truth->loss[i]) / LANES;
        for (int i = 0; i < LANES; i++) squares += pow(there->loss[i] - truth->loss[i] - r.loss_difference, 2);
        r.se = sqrt(squares / (LANES - 1) / LANES);
    }
    free(here), free(there), free(copy.bytes);
    close_kv(&kv);
    close_kv(&part);
    return r;
}

static FILE *create(const char *stem, const char *ending) {
    char path[1024];
    snprintf(path, sizeof path, "%s.%s", stem, ending);
    FILE *f = fopen(path, "w");
    if (!f) die(path);
    printf("writing %s\n", path);
    return f;
}

/* NAN: "null" or "-". */
static const char *number(double x, const char *format, const char *none) {
    static char buffers[4][40];
    static int next;
    char *buffer = buffers[next++ % 4];
    if (isfinite(x)) snprintf(buffer, sizeof buffers[0], format, x);
    else snprintf(buffer, sizeof buffers[0], "%s", none);
    return buffer;
}

static void write_results(const char *stem, const result *rows) {
    FILE *f = create(stem, "json");
    fprintf(f, "[\n");
    for (int i = 0; i < N_RUNS; i++) {
        const result *r = &rows[i];
        fprintf(f,
                " {\"sent\": \"%s\", \"prompt\": %d, \"bytes_per_text\": %.0f, \"f16_bytes_per_text\": %.0f, "
                "\"share\": %.5g, ",
                r->name, PROMPT, r->bytes, r->f16_bytes, r->bytes / r->f16_bytes);
        fprintf(f, "\"share_at_start\": %.5g, ", (r->bytes_at_start > 0 ? r->bytes_at_start : r->bytes) / r->f16_bytes);
        fprintf(f, "\"loss_difference\": %s, \"se\": %s, ", number(r->loss_difference, "%.5g", "null"),
                number(isfinite(r->loss_difference) ? r->se : NAN, "%.5g", "null"));
        fprintf(f,
                "\"same_logits\": %d, \"same_text\": %d, \"texts\": %d, \"layers_sent_early\": %d, \"layers\": %d}%s\n",
                r->same_bits, r->same_text, LANES, r->early, LANES * LAYERS, i + 1 < N_RUNS ? "," : "");
    }
    fprintf(f, "]\n");
    fclose(f);
    f = create(stem, "md");
    fprintf(
        f,
        "Written by `make results` (examples/kv_transfer.c): the demo model's KV cache from a prefill process to a "
        "decode process, over TCP, layer by layer while the next layers are computed. %d texts, prompts of %d bytes; "
        "then %d tokens are generated greedily, and the texts' own next %d bytes are predicted. \"Same logits\": "
        "texts whose generated tokens' logits are, bit for bit, those of the prefill process going on by itself with "
        "what it has sent. \"Same text\" and the loss are against attention over rows as given, in f32, in one "
        "process. \"2 planes, then the others\": generation starts with two planes, and goes on with all when the "
        "rest has come.\n\n"
        "| what is sent | bytes per text | of f16 | when generation starts | same logits | same text | loss "
        "difference, nats per byte |\n"
        "|---|---|---|---|---|---|---|\n",
        LANES, PROMPT, GREEDY, REST);
    for (int i = 0; i < N_RUNS; i++) {
        const result *r = &rows[i];
        fprintf(f, "| %s | %.0f | %.1f%% | %.1f%% | %d of %d | %d of %d | ", r->name, r->bytes,
                100 * r->bytes / r->f16_bytes,
                100 * (r->bytes_at_start > 0 ? r->bytes_at_start : r->bytes) / r->f16_bytes, r->same_bits, LANES,
                r->same_text, LANES);
        if (isfinite(r->loss_difference)) fprintf(f, "%+.5f ± %.5f |\n", r->loss_difference, r->se);
        else fprintf(f, "- |\n");
    }
    fclose(f);
}

int main(int argc, char **argv) {
    const char *data = "examples/data", *stem = NULL;
    for (int i = 1; i < argc; i += 2) {
        if (i + 1 < argc && strcmp(argv[i], "--data") == 0) {
            data = argv[i + 1];
        } else if (i + 1 < argc && strcmp(argv[i], "--results") == 0) {
            stem = argv[i + 1];
        } else {
            fprintf(stderr, "usage: %s [--data DIR] [--results STEM]\n", argv[0]);
            return 2;
        }
    }
    int ends[2];
    connect_both(ends);
    const pid_t child = fork();
    if (child < 0) die("fork");
    close(ends[child == 0 ? 0 : 1]);
    wire w = {.fd = ends[child == 0 ? 1 : 0]};

    char path[1024];
    size_t size;
    snprintf(path, sizeof path, "%s/tinylm.safetensors", data);
    model *m = model_load(path, 1);
    snprintf(path, sizeof path, "%s/eval.txt", data);
    char *texts = read_file(path, &size);
    if (size < LANES * CONTEXT) {
        fprintf(stderr, "%s: %zu bytes, expected %d\n", path, size, LANES * CONTEXT);
        return 1;
    }
    if (child == 0) {
        for (int i = 0; i < N_RUNS; i++) run_decode(RUNS[i].follow, m, texts, &w);
        free(texts);
        model_free(m);
        return 0;
    }
    result rows[N_RUNS];
    continuation *truth = allocate(sizeof *truth);
    run_truth(m, texts, truth);
    for (int i = 0; i < N_RUNS; i++) {
        rows[i] = run(i, m, texts, &w, truth);
        const result *r = &rows[i];
        printf(
            "%s: %.0f bytes per text (%.1f%% of f16), loss difference %s, of %d texts %d with the same logits, %d with "
            "the same text; %d of %d layers sent before the prompt was done\n",
            r->name, r->bytes, 100 * r->bytes / r->f16_bytes, number(r->loss_difference, "%+.6f", "-"), LANES,
            r->same_bits, r->same_text, r->early, LANES * LAYERS);
        fflush(stdout);
        EXPECT(r->same_bits == LANES, "%s: %d of %d texts go on with the same bits", r->name, r->same_bits, LANES);
        EXPECT(r->bytes_at_start <= (RUNS[i].planes == 2 ? 0.55 : 1.1) * r->f16_bytes, "%s: %g bytes", r->name,
               r->bytes_at_start);
        if (RUNS[i].follow) {
            EXPECT(r->switched > 0 && r->switched <= GREEDY / 2, "the rest after %d tokens", r->switched);
        } else {
            EXPECT(fabs(r->loss_difference) < 1e-3, "%s: loss differs by %g", r->name, r->loss_difference);
        }
    }
    int status;
    if (waitpid(child, &status, 0) != child || status != 0) {
        printf("FAILED: the decode process\n");
        failed = true;
    }
    if (stem && !failed) write_results(stem, rows);
    free(truth);
    free(texts);
    model_free(m);
    return failed;
}
