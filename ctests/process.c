/* The library and its process: what a child of fork() may do, and two copies of the library in one process. */
#define _GNU_SOURCE
#include "check.h"
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

enum { HEADS = 2, Q_HEADS = 4, DIM = 32, TOKENS = 300, MORE = 90 };

static float q[Q_HEADS * DIM], key[(TOKENS + MORE) * HEADS * DIM], value[(TOKENS + MORE) * HEADS * DIM];

/* The calls of one copy of the library. */
#define CALLS(X)                                                                                              \
    X(akv_context_create) X(akv_context_destroy) X(akv_cache_create) X(akv_cache_destroy) X(akv_batch_create)  \
    X(akv_batch_destroy) X(akv_sequence_create) X(akv_sequence_destroy) X(akv_sequence_length) X(akv_batch_begin) \
    X(akv_batch_commit) X(akv_quantize_kv) X(akv_aligned_attention) X(akv_last_error) X(akv_cache_usage)

typedef struct {
#define FIELD(name) __typeof__(&name) name;
    CALLS(FIELD)
#undef FIELD
} library;

static const library ours = {
#define OURS(name) .name = name,
    CALLS(OURS)
#undef OURS
};

/* Those of a copy that was loaded; 0 if something is missing. */
static int find(library *l, void *handle) {
    void *symbol;
#define FIND(name)                           \
    symbol = dlsym(handle, #name);           \
    if (!symbol) return 0;                   \
    memcpy(&l->name, &symbol, sizeof symbol);
    CALLS(FIND)
#undef FIND
    return 1;
}

typedef struct {
    akv_context *context;
    akv_cache *cache;
    akv_batch *batch;
    akv_sequence sequence;
} engine;

#define DONE(call)                                                              \
    do {                                                                        \
        akv_status status_ = (call);                                            \
        char text_[300] = "";                                                   \
        if (status_ != AKV_OK) l->akv_last_error(text_, sizeof text_, NULL);    \
        REQUIRE(status_ == AKV_OK, "%d: %s", status_, text_);                   \
    } while (0)

static engine start(const library *l, int n_threads) {
    engine e = {0};
    akv_context_desc context = {.struct_size = sizeof context, .abi_version = AKV_ABI_VERSION, .n_threads = n_threads};
    akv_layer_desc layer = {.n_q_heads = Q_HEADS, .n_kv_heads = HEADS, .dim_k = DIM};
    akv_cache_desc cache = {.struct_size = sizeof cache, .n_layers = 1, .layers = &layer};
    akv_batch_desc bounds = {.struct_size = sizeof bounds};
    DONE(l->akv_context_create(&context, &e.context));
    DONE(l->akv_cache_create(e.context, &cache, &e.cache));
    DONE(l->akv_batch_create(e.cache, &bounds, &e.batch));
    DONE(l->akv_sequence_create(e.cache, &e.sequence));
    return e;
}

/* Appends rows, and attends the last one. */
static void step(const library *l, const engine *e, int from, int n, float *out) {
    int32_t n_new = n, n_q = 1;
    akv_rows k = {.data = key + from * HEADS * DIM}, v = {.data = value + from * HEADS * DIM};
    akv_batch_desc tokens = {.struct_size = sizeof tokens, .n_sequences = 1, .sequences = &e->sequence, .n_new = &n_new, .n_q = &n_q};
    akv_attention_desc attention = {.struct_size = sizeof attention, .q = {.data = q}, .out = {.data = out}};
    DONE(l->akv_batch_begin(e->batch, &tokens, NULL));
    DONE(l->akv_quantize_kv(e->batch, 0, &k, &v, NULL));
    DONE(l->akv_aligned_attention(e->batch, 0, &attention));
    DONE(l->akv_batch_commit(e->batch));
}

static void end(const library *l, const engine *e) {
    DONE(l->akv_batch_destroy(e->batch));
    DONE(l->akv_cache_destroy(e->cache));
    DONE(l->akv_context_destroy(e->context));
}

static float first[Q_HEADS * DIM], second[Q_HEADS * DIM]; /* outputs of the two steps */

/* ---- fork() */

static void forks(void) {
    const library *l = &ours;
    float out[Q_HEADS * DIM];
    engine e = start(l, 3);
    step(l, &e, 0, TOKENS, out);
    CHECK(memcmp(out, first, sizeof out) == 0, "three threads give other bits");
    fflush(stdout);
    pid_t child = fork();
    REQUIRE(child >= 0, "no child");
    if (child == 0) {
        /* All is there but the context's threads: it works without them, to the same bits, and ends without waiting for
         * them. What the child does, the parent never sees. */
        alarm(60);
        step(l, &e, TOKENS, MORE, out);
        CHECK(memcmp(out, second, sizeof out) == 0, "the child has other bits");
        engine own = start(l, 3); /* a context of the child's has its threads */
        step(l, &own, 0, TOKENS, out);
        CHECK(memcmp(out, first, sizeof out) == 0, "the child's own context has other bits");
        end(l, &own);
        end(l, &e);
        fflush(stdout);
        _exit(check_failures != 0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with %#x", (unsigned)status);
    int64_t length = 0;
    DONE(l->akv_sequence_length(e.cache, e.sequence, -1, &length));
    CHECK(length == TOKENS, "%d tokens after the child's step", (int)length);
    step(l, &e, TOKENS, MORE, out);
    CHECK(memcmp(out, second, sizeof out) == 0, "other bits after the child's step");
    end(l, &e);
}

/* ---- copies */

static void with_copy(const library *theirs, const char *how) {
    const library *l = &ours;
    float out[Q_HEADS * DIM];
    akv_layer_desc layer = {.n_q_heads = Q_HEADS, .n_kv_heads = HEADS, .dim_k = DIM};
    akv_cache_desc desc = {.struct_size = sizeof desc, .n_layers = 1, .layers = &layer};
    akv_cache *cache = NULL;
    akv_sequence other = 0;
    int64_t length;
    CHECK(theirs->akv_context_create != ours.akv_context_create, "%s: not a copy", how);
    engine a = start(l, 0), b = start(theirs, 0);
    /* In turns, so that one would notice the other. */
    step(l, &a, 0, TOKENS, out);
    CHECK(memcmp(out, first, sizeof out) == 0, "%s: ours has other bits", how);
    step(theirs, &b, 0, TOKENS, out);
    CHECK(memcmp(out, first, sizeof out) == 0, "%s: the copy has other bits", how);
    step(l, &a, TOKENS, MORE, out);
    CHECK(memcmp(out, second, sizeof out) == 0, "%s: ours has other bits", how);
    step(theirs, &b, TOKENS, MORE, out);
    CHECK(memcmp(out, second, sizeof out) == 0, "%s: the copy has other bits", how);
    /* Each refuses what is the other's, and does nothing with it. */
    const struct {
        const library *l;
        const engine *of;
    } pairs[] = {{l, &b}, {theirs, &a}};
    for (int i = 0; i < 2; i++) {
        const library *who = pairs[i].l;
        const engine *e = pairs[i].of;
        akv_usage usage = {.struct_size = sizeof usage};
        CHECK(who->akv_cache_create(e->context, &desc, &cache) == AKV_E_HANDLE && !cache, "%s: a foreign context is taken", how);
        CHECK(who->akv_sequence_create(e->cache, &other) == AKV_E_HANDLE && !other, "%s: a foreign cache is taken", how);
        CHECK(who->akv_cache_usage(e->cache, &usage) == AKV_E_HANDLE, "%s: a foreign cache is read", how);
        CHECK(who->akv_batch_commit(e->batch) == AKV_E_HANDLE, "%s: a foreign batch is taken", how);
        CHECK(who->akv_batch_destroy(e->batch) == AKV_E_HANDLE, "%s: a foreign batch is destroyed", how);
        CHECK(who->akv_context_destroy(e->context) == AKV_E_HANDLE, "%s: a foreign context is destroyed", how);
        char text[300] = "";
        who->akv_last_error(text, sizeof text, NULL);
        CHECK(strstr(text, "another copy of the library"), "%s: %s", how, text);
    }
    CHECK(ours.akv_sequence_length(a.cache, b.sequence, -1, &length) == AKV_E_HANDLE, "%s: a foreign sequence is taken", how);
    CHECK(theirs->akv_sequence_length(b.cache, a.sequence, -1, &length) == AKV_E_HANDLE, "%s: a foreign sequence is taken", how);
    end(theirs, &b);
    end(l, &a);
}

static void copies(void) {
    char path[] = "/tmp/alignedkv-copy-XXXXXX", command[4096];
    library theirs;
    int fd = mkstemp(path);
    REQUIRE(fd >= 0, "no temporary file");
    close(fd);
    snprintf(command, sizeof command, "cp '%s' %s", SHARED_LIBRARY, path);
    REQUIRE(system(command) == 0, "%s", command);
    void *copy = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    REQUIRE(copy && find(&theirs, copy), "%s", dlerror());
    with_copy(&theirs, "dlopen of a copied file");
    dlclose(copy);
    unlink(path);
#ifndef __SANITIZE_ADDRESS__
    /* The very same file in a namespace of its own, as a plugin host may load it: with a C library of its own, too. */
    copy = dlmopen(LM_ID_NEWLM, SHARED_LIBRARY, RTLD_NOW | RTLD_LOCAL);
    REQUIRE(copy && find(&theirs, copy), "%s", dlerror());
    with_copy(&theirs, "dlmopen");
    dlclose(copy);
#endif
}

int main(void) {
    const library *l = &ours;
    for (int i = 0; i < Q_HEADS * DIM; i++) q[i] = (float)normal();
    for (int i = 0; i < (TOKENS + MORE) * HEADS * DIM; i++) key[i] = (float)normal(), value[i] = (float)normal();
    engine e = start(l, 0);
    step(l, &e, 0, TOKENS, first);
    step(l, &e, TOKENS, MORE, second);
    end(l, &e);
    CHECK(memcmp(first, second, sizeof first) != 0, "the steps cannot be told apart");
    forks();
    copies();
    return finish("process");
}
