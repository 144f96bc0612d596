/* Attention through the C ABI against float64 attention over the caller's own K, V and q: outputs, LSE, bounds,
 * estimate, amplitude and statistics, over shapes, types, layouts in memory, formats, modes and parts of the context.
 */
#include "check.h"

enum { MAX_SEQUENCES = 4 };

/* What the rows are like. */
enum { NORMAL, PEAKED, OUTLIERS };

/* Zero stands for the usual: 2 KV heads of 64, f32, 4 planes, one sequence, expected mode at the default tolerance. */
typedef struct {
    int heads, group, dim, dim_v;
    int dtype_k, dtype_v, dtype_q, dtype_out;
    int format, planes_k, planes_v, window;
    uint32_t exact_head;
    int mode, visibility, call_window;
    float tolerance, scale;
    int n_seq, len[MAX_SEQUENCES], n_q[MAX_SEQUENCES];
    int data, gap, heads_outermost;
    int64_t jump; /* positions skip this much in the middle of a sequence */
    int split;    /* attends in parts as well and merges them */
} test_case;

typedef struct {
    double bits;        /* per element of K and V */
    double relative_l2; /* over all outputs */
    akv_stats stats;
} result;

/* Over all cases in expected mode: sum of squares of rms error / estimate, to see whether the estimate is one. */
static double calibration_sum;
static long calibration_n;

static akv_context *context;

/* States of one attention call, `[rows][heads]` each. */
typedef struct {
    float *lse, *bound, *lse_bound, *estimate, *amplitude;
} extras;

static extras extras_new(int n) {
    extras e;
    float **field[] = {&e.lse, &e.bound, &e.lse_bound, &e.estimate, &e.amplitude};
    for (int i = 0; i < 5; i++) {
        *field[i] = allocate((size_t)n * sizeof(float));
        for (int j = 0; j < n; j++) (*field[i])[j] = NAN;
    }
    return e;
}

static void extras_free(extras *e) {
    free(e->lse), free(e->bound), free(e->lse_bound), free(e->estimate), free(e->amplitude);
}

static void extras_into(const extras *e, akv_attention_desc *d) {
    d->lse = e->lse, d->bound = e->bound, d->lse_bound = e->lse_bound;
    d->estimate = e->estimate, d->amplitude = e->amplitude;
}

static float *random_rows(int n, int heads, int dim, int dtype, int data, float factor) {
    float *x = allocate((size_t)n * (size_t)heads * (size_t)dim * sizeof *x), *p = x;
    for (int i = 0; i < n; i++)
        for (int h = 0; h < heads; h++)
            for (int c = 0; c < dim; c++) {
                double y = normal() * factor;
                if (data == OUTLIERS && c % 13 == 5) y *= 8;  /* a large channel */
                if (data == OUTLIERS && i < 4) y *= 10;       /* an attention sink */
                if (data == OUTLIERS && i % 97 == 96) y *= 5; /* a large token */
                *p++ = rounded((float)y, dtype);
            }
    return x;
}

static int64_t position(const test_case *c, int token, int len) { return token + (token >= len / 2 ? c->jump : 0); }

/* Tokens that the row of token `index` sees. */
static void visible(const test_case *c, int index, int len, int *from, int *to) {
    int window = c->call_window ? c->call_window : c->window;
    *from = 0, *to = len;
    if (c->visibility == AKV_CAUSAL)
        while (position(c, *to - 1, len) > position(c, index, len)) --*to;
    if (window)
        while (*from < *to && position(c, *from, len) <= position(c, index, len) - window) ++*from;
}

/* Half an ulp of the output dtype at x, or of its smallest step. */
static double output_rounding(double x, int dtype) {
    return dtype == AKV_F32 ? 0 : dtype == AKV_F16 ? fabs(x) * 0x1.002p-11 + 0x1p-25 : fabs(x) * 0x1.02p-8 + 0x1p-100;
}

/* Attends in two parts, split differently in each row (one part may be empty), and merges them. */
static void check_split(const test_case *c, akv_batch *batch, const akv_attention_desc *desc, int n_rows, int n_q_heads,
                        const truth *want, const extras *whole) {
    int n = n_rows * n_q_heads, dim_v = c->dim_v;
    int64_t *cut = allocate((size_t)n_rows * sizeof *cut);
    extras e[3] = {extras_new(n), extras_new(n), extras_new(n)};
    float *out[3];
    akv_state state[3];
    for (int r = 0; r < n_rows; r++) cut[r] = r % 5 == 4 ? 0 : between(0, c->len[0]);
    for (int i = 0; i < 3; i++) {
        out[i] = allocate((size_t)n * (size_t)dim_v * sizeof(float));
        state[i] = (akv_state){out[i], e[i].lse, e[i].bound, e[i].lse_bound, e[i].estimate, e[i].amplitude};
    }
    for (int i = 0; i < 2; i++) {
        akv_attention_desc part = *desc;
        part.out = (akv_rows){.data = out[i], .dtype = AKV_F32};
        extras_into(&e[i], &part);
        part.stats = NULL;
        part.kv_to = i ? NULL : cut;
        part.kv_from = i ? cut : NULL;
        OK(akv_aligned_attention(batch, 0, &part));
    }
    for (int i = 0; i < n; i++)
        if (cut[i / n_q_heads] == 0) {
            CHECK(e[0].lse[i] == -INFINITY && e[0].amplitude[i] == 0, "empty part: lse %g, amplitude %g",
                  (double)e[0].lse[i], (double)e[0].amplitude[i]);
            for (int j = 0; j < dim_v; j++) CHECK(out[0][i * dim_v + j] == 0, "empty part: %g", (double)out[0][i * dim_v + j]);
        }
    /* Into memory of its own, then over the first input: the same. */
    OK(akv_merge_states(context, state, 2, n_rows, n_q_heads, dim_v, &state[2], NULL));
    OK(akv_merge_states(context, state, 2, n_rows, n_q_heads, dim_v, &state[0], NULL));
    CHECK(memcmp(out[0], out[2], (size_t)n * (size_t)dim_v * sizeof(float)) == 0, "merging in place differs");
    for (int i = 0; i < n; i++) {
        double error = 0, apart = fabs((double)e[2].lse[i] - want[i].lse);
        for (int j = 0; j < dim_v; j++) error = fmax(error, fabs((double)out[2][i * dim_v + j] - want[i].out[j]));
        CHECK(error <= e[2].bound[i], "merged: error %g, bound %g", error, (double)e[2].bound[i]);
        CHECK(apart <= e[2].lse_bound[i], "merged: lse is off by %g, bound %g", apart, (double)e[2].lse_bound[i]);
        CHECK(fabs((double)e[2].amplitude[i] / whole->amplitude[i] - 1) < 0.5, "merged: amplitude %g of %g",
              (double)e[2].amplitude[i], (double)whole->amplitude[i]);
    }
    for (int i = 0; i < 3; i++) extras_free(&e[i]), free(out[i]);
    free(cut);
}

/* seen_tiles: sum over query rows and KV heads of the tiles that they see tokens of through planes; means: of these, on
 * the progressive path, where a tile's mean of V is read too. */
static void check_stats(const test_case *c, const akv_stats *s, uint64_t seen, uint64_t seen_exactly, uint64_t seen_tiles,
                        uint64_t means, int n_rows, int dense) {
    if (on_cuda()) {
        /* There large groups are units of up to 16 heads, which read apart. */
        uint64_t units = ((uint64_t)c->group + 15) / 16;
        seen *= units, seen_exactly *= units, seen_tiles *= units, means *= units;
    }
    uint64_t planes_k = 0, planes_v = 0, bytes = s->bytes_scales + s->bytes_exact, bytes_k;
    uint64_t scales_k = seen_tiles * ((uint64_t)c->dim + 12), scales_v = seen - seen_exactly + means * (uint64_t)c->dim_v;
    uint64_t row_k = (uint64_t)c->dim * dtype_size(c->dtype_k), row_v = (uint64_t)c->dim_v * dtype_size(c->dtype_v);
    for (unsigned p = 0; p <= 4; p++) {
        planes_k += s->planes_k[p], planes_v += s->planes_v[p];
        bytes += p * (s->planes_k[p] * (uint64_t)c->dim + s->planes_v[p] * (uint64_t)c->dim_v) / 2;
    }
    CHECK(s->tokens == seen, "tokens %llu of %llu", (unsigned long long)s->tokens, (unsigned long long)seen);
    if (on_cuda()) CHECK(s->backend == AKV_CUDA && s->isa == 0, "%d %d", s->backend, s->isa);
    else CHECK(s->backend == AKV_CPU && s->isa >= AKV_ISA_SCALAR && s->isa <= AKV_ISA_AVX512, "%d %d", s->backend, s->isa);
    CHECK(s->dense_rows == (uint64_t)(dense < 0 ? n_rows : dense), "%llu dense rows", (unsigned long long)s->dense_rows);
    if (c->format == AKV_FORMAT_RAW) CHECK(s->bytes_k == seen * row_k && s->bytes_v == seen * row_v, "raw bytes");
    if (c->format != AKV_FORMAT_ALIGNED) return;
    /* Per tile K's scale bytes, 12 bytes of meta data and the mean of V, per token a scale byte of V. */
    bytes_k = seen_exactly * row_k + scales_k;
    CHECK(s->bytes_exact == seen_exactly * (row_k + row_v), "%llu bytes of exact rows", (unsigned long long)s->bytes_exact);
    CHECK(s->bytes_scales == scales_k + scales_v, "%llu bytes of scales", (unsigned long long)s->bytes_scales);
    for (unsigned p = 0; p <= 4; p++) bytes_k += p * s->planes_k[p] * (uint64_t)c->dim / 2;
    CHECK(s->bytes_k == bytes_k, "%llu bytes of K, %llu in parts", (unsigned long long)s->bytes_k, (unsigned long long)bytes_k);
    CHECK(planes_k == seen - seen_exactly, "K: %llu tokens in planes", (unsigned long long)planes_k);
    CHECK(planes_v == seen - seen_exactly, "V: %llu tokens in planes", (unsigned long long)planes_v);
    CHECK(s->planes_k[0] == 0, "%llu tokens without K", (unsigned long long)s->planes_k[0]);
    CHECK(bytes == s->bytes_k + s->bytes_v, "%llu bytes in parts, %llu in all", (unsigned long long)bytes,
          (unsigned long long)(s->bytes_k + s->bytes_v));
    CHECK(s->path == ((n_rows > dense && dense >= 0 ? AKV_PATH_PROGRESSIVE : 0) | (dense ? AKV_PATH_DENSE : 0)), "path %d", s->path);
}

static result run(test_case c) {
    int n_rows = 0, dense = 0, row = 0;
    double error_sum = 0, norm_sum = 0, scale;
    result res = {0};
    uint64_t seen = 0, seen_exactly = 0, seen_tiles = 0, means = 0;
    akv_cache *cache;
    akv_batch *batch;
    akv_sequence sequence[MAX_SEQUENCES];
    float *k[MAX_SEQUENCES], *v[MAX_SEQUENCES];
    int have[MAX_SEQUENCES] = {0};

    if (!c.heads) c.heads = 2;
    if (!c.group) c.group = 1;
    if (!c.dim) c.dim = 64;
    if (!c.dim_v) c.dim_v = c.dim;
    if (!c.n_seq) c.n_seq = 1;
    if (!c.planes_k) c.planes_k = 4;
    if (!c.planes_v) c.planes_v = 4;
    int n_q_heads = c.heads * c.group, lossy = c.format == AKV_FORMAT_ALIGNED;
    int head_rows = !lossy ? 0 : c.exact_head == AKV_NONE ? 0 : c.exact_head ? (int)c.exact_head : 4;
    double tolerance = c.tolerance > 0 ? c.tolerance : 1e-3f;
    if (tolerance < 2e-5) tolerance = 2e-5; /* what 16 bits leave */
    scale = c.scale != 0 ? c.scale : 1 / sqrt(c.dim);

    akv_layer_desc layer = {.n_q_heads = n_q_heads, .n_kv_heads = c.heads, .dim_k = c.dim, .dim_v = c.dim_v, .dtype_k = c.dtype_k,
                            .dtype_v = c.dtype_v, .planes_k = c.planes_k, .planes_v = c.planes_v, .window = c.window};
    akv_cache_desc desc = {.struct_size = sizeof desc, .format = c.format, .n_layers = 1, .layers = &layer, .exact_head = c.exact_head};
    akv_batch_desc bounds = {.struct_size = sizeof bounds};
    OK(akv_cache_create(context, &desc, &cache));
    OK(akv_batch_create(cache, &bounds, &batch));
    for (int s = 0; s < c.n_seq; s++) {
        OK(akv_sequence_create(cache, &sequence[s]));
        k[s] = random_rows(c.len[s], c.heads, c.dim, c.dtype_k, c.data, 1);
        v[s] = random_rows(c.len[s], c.heads, c.dim_v, c.dtype_v, c.data, 1);
        if (c.n_q[s] == 0) c.n_q[s] = 1;
        n_rows += c.n_q[s];
        if (c.n_q[s] > 8) dense += c.n_q[s];
    }
    if (c.mode == AKV_EXACT || c.format == AKV_FORMAT_RAW) dense = -1;

    /* Appends all sequences in steps of random sizes; attends in the last, whose query rows are partly new. */
    for (int last = 0; !last;) {
        int n_new[MAX_SEQUENCES], total = 0;
        last = 1;
        for (int s = 0; s < c.n_seq; s++) {
            int left = c.len[s] - have[s];
            n_new[s] = left > 40 ? between(1, left) : left;
            last &= n_new[s] == left;
            total += n_new[s];
        }
        buffer key = buffer_new(total, c.heads, c.dim, c.dtype_k, c.gap, c.heads_outermost);
        buffer value = buffer_new(total, c.heads, c.dim_v, c.dtype_v, c.gap, c.heads_outermost);
        int64_t *at = allocate((size_t)total * sizeof *at);
        int r = 0;
        for (int s = 0; s < c.n_seq; s++)
            for (int i = 0; i < n_new[s]; i++, r++) {
                int token = have[s] + i;
                at[r] = position(&c, token, c.len[s]);
                for (int h = 0; h < c.heads; h++) {
                    const float *x = k[s] + (size_t)(token * c.heads + h) * (size_t)c.dim;
                    const float *y = v[s] + (size_t)(token * c.heads + h) * (size_t)c.dim_v;
                    for (int j = 0; j < c.dim; j++) store(buffer_at(&key, r, h) + (size_t)j * dtype_size(c.dtype_k), c.dtype_k, x[j]);
                    for (int j = 0; j < c.dim_v; j++) store(buffer_at(&value, r, h) + (size_t)j * dtype_size(c.dtype_v), c.dtype_v, y[j]);
                }
            }
        akv_batch_desc step = {.struct_size = sizeof step, .n_sequences = (uint32_t)c.n_seq, .sequences = sequence, .n_new = n_new,
                               .n_q = last ? c.n_q : NULL, .positions = c.jump ? at : NULL};
        OK(akv_batch_begin(batch, &step, NULL));
        OK(akv_quantize_kv(batch, 0, &key.rows, &value.rows, NULL));
        for (int s = 0; s < c.n_seq; s++) have[s] += n_new[s];
        if (!last) OK(akv_batch_commit(batch));
        buffer_free(&key), buffer_free(&value), free(at);
    }

    float *q = random_rows(n_rows, n_q_heads, c.dim, c.dtype_q, NORMAL, c.data == PEAKED ? 4 : 1);
    buffer queries = buffer_new(n_rows, n_q_heads, c.dim, c.dtype_q, c.gap, c.heads_outermost);
    buffer out = buffer_new(n_rows, n_q_heads, c.dim_v, c.dtype_out, c.gap, c.heads_outermost);
    extras e = extras_new(n_rows * n_q_heads);
    truth *want = allocate((size_t)(n_rows * n_q_heads) * sizeof *want);
    buffer_fill(&queries, q);
    akv_attention_desc attention = {.struct_size = sizeof attention, .q = queries.rows, .out = out.rows, .scale = c.scale,
                                    .tolerance = c.tolerance, .mode = c.mode, .visibility = c.visibility,
                                    .window = c.call_window, .stats = allocate(sizeof(akv_stats))};
    extras_into(&e, &attention);
    int path;
    desc.layers = &layer;
    OK(akv_supports(context, &desc, &attention, &path));
    OK(akv_aligned_attention(batch, 0, &attention));
    res.stats = *attention.stats;
    free(attention.stats);
    CHECK((path & res.stats.path) == res.stats.path, "path %d, akv_supports said %d", res.stats.path, path);

    for (int s = 0; s < c.n_seq; s++)
        for (int i = 0; i < c.n_q[s]; i++, row++) {
            int from, to, exact_to;
            visible(&c, c.len[s] - c.n_q[s] + i, c.len[s], &from, &to);
            exact_to = to < head_rows ? to : head_rows;
            seen += (uint64_t)(c.heads * (to - from));
            if (exact_to > from) seen_exactly += (uint64_t)(c.heads * (exact_to - from));
            int coded = from > head_rows ? from : head_rows;
            uint64_t tiles = to > coded ? (uint64_t)(c.heads * ((to + 127) / 128 - coded / 128)) : 0;
            seen_tiles += tiles;
            if (dense >= 0 && c.n_q[s] <= 8) means += tiles;
            for (int h = 0; h < n_q_heads; h++) {
                int at = row * n_q_heads + h;
                truth *t = &want[at];
                double squares = 0, norm = 0, bound = e.bound[at], amplitude = e.amplitude[at];
                *t = attend(q + (size_t)at * (size_t)c.dim, scale, k[s], v[s], c.heads, h / c.group, c.dim, c.dim_v, from, to);
                for (int j = 0; j < c.dim_v; j++) {
                    double error = (double)buffer_get(&out, row, h, j) - t->out[j];
                    double limit = bound + output_rounding(fabs(t->out[j]) + bound, c.dtype_out);
                    CHECK(fabs(error) <= limit, "row %d head %d channel %d: error %g, bound %g, n %d..%d", row, h, j, error, bound, from, to);
                    squares += error * error, norm += t->out[j] * t->out[j];
                }
                error_sum += squares, norm_sum += norm;
                CHECK(fabs((double)e.lse[at] - t->lse) <= e.lse_bound[at], "row %d head %d: lse %g of %g, bound %g", row, h,
                      (double)e.lse[at], t->lse, (double)e.lse_bound[at]);
                if (c.format == AKV_FORMAT_PUBLISHED) {
                    CHECK(isinf(bound) && bound > 0, "bound %g", bound);
                    CHECK(sqrt(squares) <= 0.1 * sqrt(norm) + 0.02 * t->amplitude, "row %d head %d: relative error %g", row, h, sqrt(squares / norm));
                    continue;
                }
                CHECK(isfinite(bound) && bound >= 0, "bound %g", bound);
                CHECK(amplitude >= 0.6 * t->amplitude && amplitude <= 1.6 * t->amplitude, "amplitude %g of %g", amplitude, t->amplitude);
                CHECK(e.estimate[at] >= 0 && e.estimate[at] <= bound, "estimate %g, bound %g", (double)e.estimate[at], bound);
                double rms = sqrt(squares / c.dim_v);
                if (c.dtype_out != AKV_F32 || c.mode != AKV_EXPECTED || !lossy) continue;
                /* Where nearly all weight lies on exact rows, what is left is float rounding. */
                if (e.estimate[at] > 1e-5 * amplitude) calibration_sum += rms * rms / ((double)e.estimate[at] * e.estimate[at]), calibration_n++;
                if (c.planes_k == 4 && c.planes_v == 4 && rms > tolerance * t->amplitude) {
                    CHECK(rms <= 5 * tolerance * t->amplitude, "row %d head %d: rms error %g, tolerance * A %g", row, h, rms, tolerance * t->amplitude);
                }
            }
        }
    check_stats(&c, &res.stats, seen, seen_exactly, seen_tiles, means, n_rows, dense);
    CHECK(buffer_gaps_untouched(&out), "wrote between the rows of out");
    if (c.split) check_split(&c, batch, &attention, n_rows, n_q_heads, want, &e);
    OK(akv_batch_commit(batch));

    res.relative_l2 = norm_sum > 0 ? sqrt(error_sum / norm_sum) : 0;
    res.bits = 8.0 * (double)(res.stats.bytes_k + res.stats.bytes_v) / ((double)res.stats.tokens * (c.dim + c.dim_v));
    if (c.dtype_out == AKV_F32 && c.planes_k == 4 && c.planes_v == 4) {
        if (c.format == AKV_FORMAT_RAW) CHECK(res.relative_l2 < 1e-5, "raw: relative error %g", res.relative_l2);
        else if (lossy && c.mode == AKV_EXACT) CHECK(res.relative_l2 < 1e-4, "exact: relative error %g", res.relative_l2);
    }
    free(q), free(want), extras_free(&e), buffer_free(&queries), buffer_free(&out);
    for (int s = 0; s < c.n_seq; s++) free(k[s]), free(v[s]);
    OK(akv_batch_destroy(batch));
    OK(akv_cache_destroy(cache));
    return res;
}

static void group(const char *what) {
    static long before;
    if (what) printf("  %-40s %ld checks\n", what, check_count - before);
    before = check_count;
    fflush(stdout);
}

static void shapes(void) {
    static const int groups[] = {1, 2, 3, 5, 7, 8, 16, 64}, lengths[] = {1, 2, 127, 128, 129, 255, 256, 257, 1000};
    int small = small_run();
    for (int dim = 16; dim <= 256; dim += small ? 56 : 8) {
        int dim_v = dim % 24 == 0 ? 272 - dim : dim, t = dim / 8;
        run((test_case){.dim = dim, .dim_v = dim_v, .len = {257}, .dtype_k = t % 3, .dtype_v = t / 3 % 3, .dtype_q = t / 9 % 3,
                        .gap = dim % 7, .heads_outermost = t % 2});
        run((test_case){.dim = dim, .dim_v = dim_v, .len = {140}, .dtype_k = t / 3 % 3, .dtype_v = t % 3, .dtype_out = t % 3, .mode = AKV_EXACT});
    }
    group("head_dim 16 to 256, types, strides");
    for (int i = 0; i < 8; i++) run((test_case){.group = groups[i], .len = {300}, .n_q = {1 + i % 3}, .data = i % 3, .dtype_q = i % 3});
    group("GQA groups");
    for (int i = 0; i < 9; i++)
        for (int mode = AKV_EXPECTED; mode <= AKV_EXACT; mode++)
            if (!small || (i + mode) % 3 == 0)
                run((test_case){.len = {lengths[i]}, .mode = mode, .data = i % 3, .group = 2, .tolerance = mode == AKV_GUARANTEED ? 0.1f : 0});
    group("lengths and modes");
    for (int t = 0; t < 81; t += small ? 20 : 1)
        run((test_case){.dtype_k = t % 3, .dtype_v = t / 3 % 3, .dtype_q = t / 9 % 3, .dtype_out = t / 27, .len = {150}, .dim = 32, .gap = t % 3 * 5});
    group("types");
    for (int pk = 2; pk <= 4; pk++)
        for (int pv = 2; pv <= 4; pv++)
            for (int mode = AKV_EXPECTED; mode <= AKV_EXACT; mode++)
                if (!small || mode == AKV_EXPECTED)
                    run((test_case){.planes_k = pk, .planes_v = pv, .mode = mode, .len = {300}, .dim = 48, .data = mode, .tolerance = 1e-2f});
    group("planes");
    for (uint32_t head = 0; head <= 4; head++)
        for (int data = NORMAL; data <= OUTLIERS; data++)
            run((test_case){.exact_head = head == 0 ? AKV_NONE : head == 1 ? 1 : head == 2 ? 7 : head == 3 ? 127 : 128, .len = {200}, .n_q = {2}, .data = data});
    group("exact head");
    for (int i = 0; i < 6; i++) {
        static const float tolerances[] = {1e-1f, 3e-2f, 1e-2f, 3e-3f, 3e-4f, 1e-4f};
        run((test_case){.tolerance = tolerances[i], .len = {1000}, .group = 4, .data = i % 3});
        run((test_case){.tolerance = tolerances[i], .len = {500}, .mode = AKV_GUARANTEED, .data = i % 3, .scale = 0.3f});
    }
    group("tolerances");
}

static void rows(void) {
    int small = small_run();
    for (int n_q = 1; n_q <= 9; n_q++)
        for (int mode = AKV_EXPECTED; mode <= AKV_GUARANTEED; mode++)
            run((test_case){.len = {261}, .n_q = {n_q}, .group = 2, .mode = mode, .tolerance = mode ? 0.1f : 0, .visibility = n_q % 2});
    group("n_q 1 to 9");
    for (int visibility = AKV_CAUSAL; visibility <= AKV_FULL; visibility++)
        for (int format = AKV_FORMAT_ALIGNED; format <= AKV_FORMAT_RAW; format += 2)
            run((test_case){.len = {small ? 140 : 300}, .n_q = {small ? 140 : 300}, .group = 2, .heads = 1, .visibility = visibility, .format = format,
                            .mode = visibility ? AKV_EXACT : AKV_EXPECTED, .dtype_k = AKV_F16, .dtype_v = AKV_BF16});
    group("prefill");
    run((test_case){.n_seq = 4, .len = {700, 5, 260, 129}, .n_q = {1, 5, 70, 3}, .group = 3, .gap = 3});
    run((test_case){.n_seq = 4, .len = {1, 1000, 9, 256}, .n_q = {1, 2, 9, 1}, .group = 2, .visibility = AKV_FULL, .heads_outermost = 1});
    run((test_case){.n_seq = 3, .len = {333, 128, 127}, .n_q = {8, 9, 1}, .mode = AKV_EXACT, .dtype_q = AKV_F16, .dtype_out = AKV_F16});
    run((test_case){.n_seq = 2, .len = {333, 50}, .n_q = {20, 1}, .mode = AKV_GUARANTEED, .tolerance = 0.1f, .dtype_k = AKV_BF16});
    group("mixed prefill and decode");
    for (int window = 1; window <= 400; window = window * 3 + 1)
        for (int n_q = 1; n_q <= 10; n_q += 9) {
            run((test_case){.len = {390}, .n_q = {n_q}, .window = window});
            run((test_case){.len = {390}, .n_q = {n_q}, .window = 77, .call_window = window, .visibility = AKV_FULL, .group = 2});
            run((test_case){.len = {390}, .n_q = {n_q}, .window = window, .jump = 50, .mode = AKV_EXACT});
        }
    group("sliding windows, jumping positions");
    for (int i = 0; i < 6; i++) {
        run((test_case){.len = {300 + i}, .n_q = {3 + 4 * i}, .group = 2, .split = 1, .mode = i % 3, .tolerance = i % 3 ? 0.1f : 0, .data = i / 2});
        run((test_case){.len = {517}, .n_q = {5}, .split = 1, .format = AKV_FORMAT_RAW, .window = i * 60});
    }
    group("parts of the context, merged");
    for (int i = 0; i < 6; i++) {
        run((test_case){.format = AKV_FORMAT_RAW, .dtype_k = i % 3, .dtype_v = i / 2, .len = {1 + i * 77}, .n_q = {1 + (i > 2) * i}, .group = 1 + i, .data = i % 3});
        run((test_case){.format = AKV_FORMAT_PUBLISHED, .dtype_k = AKV_F16, .dtype_v = AKV_F16, .len = {1 + i * 77}, .group = 1 + i % 2, .dim = 16 + 48 * i});
    }
    group("formats");
}

/* A long flat context, the hard case: every token weighs the same. */
static void long_context(void) {
    int n = small_run() ? 4096 : 32768;
    for (int dim = 64; dim <= 128; dim *= 2) {
        static const float tolerances[] = {1e-2f, 1e-3f, 1e-4f, 1e-5f, 1e-7f};
        result exact = run((test_case){.len = {n}, .heads = 1, .dim = dim, .mode = AKV_EXACT, .n_q = {3}});
        printf("  n %d head_dim %d: exact %.2f bits, relative L2 %.1e\n", n, dim, exact.bits, exact.relative_l2);
        for (int i = 0; i < 5; i++) {
            result r = run((test_case){.len = {n}, .heads = 1, .dim = dim, .tolerance = tolerances[i], .n_q = {3}});
            printf("  n %d head_dim %d: tolerance %.0e %.2f bits, relative L2 %.1e\n", n, dim, (double)tolerances[i], r.bits, r.relative_l2);
            CHECK(r.bits <= 16 * 1.03, "tolerance %g reads %g bits", (double)tolerances[i], r.bits);
            if (tolerances[i] == 1e-4f && n == 32768) {
                CHECK(r.bits <= 8, "%g bits", r.bits);
                CHECK(r.relative_l2 <= 1.1e-2, "relative error %g", r.relative_l2);
            }
        }
    }
}

int main(int argc, char **argv) {
    akv_context_desc desc = {.struct_size = sizeof desc, .abi_version = AKV_ABI_VERSION};
    OK(akv_context_create(&desc, &context));
    if (argc > 1 && strcmp(argv[1], "long") == 0) long_context();
    else {
        shapes();
        rows();
        double calibration = calibration_n ? sqrt(calibration_sum / (double)calibration_n) : 0;
        printf("  rms error / estimate: %.2f over %ld heads\n", calibration, calibration_n);
        CHECK(calibration > 0.2 && calibration < 2, "rms error / estimate: %g", calibration);
    }
    OK(akv_context_destroy(context));
    return finish("attention");
}
