/* The demo's output: a table, a JSON file, an SVG plot.
 * MIT OR Apache-2.0.
 */
#include "tinylm_report.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* "aligned 1e-3", "aligned 1e-3, 2 planes", "aligned exact", ... */
static void label(const result *r, char *out, size_t cap) {
    if (isnan(r->tolerance)) {
        snprintf(out, cap, "%s%s%s", r->scheme, r->mode ? " " : "", r->mode ? r->mode : "");
        return;
    }
    const int exponent = (int)floor(log10(r->tolerance) + 1e-6);
    snprintf(out, cap, "%s %.0fe%d%s%s", r->scheme, r->tolerance / pow(10.0, exponent), exponent,
             r->mode[0] == 'g' ? " guaranteed" : "", r->planes == 2 ? ", 2 planes" : "");
}

/* A number in `width` columns, or a word where there is none. */
static void cell(int width, const char *format, double x, const char *none) {
    char text[32];
    snprintf(text, sizeof text, format, x);
    printf(" %*s", width, isfinite(x) ? text : none);
}

void print_header(void) {
    const char *line = "%-26s %8s %17s %17s | %17s | %17s | %5s | %17s | %27s | %8s\n";
    printf(line, "", "loss", "loss - exact", "same, from 1024", "bits read", "same, from 1024", "of",
           "certificate", "rms/estimate |   rms/toler.", "tokens");
    printf(line, "KV scheme", "nats", "1e-4 nats", "1e-4 nats", "K     V  both", "K     V  both", "fp16",
           "largest   / ampl.", "median   p99 | median   p99", "/s");
}

static void difference(double x, double se) {
    char text[40];
    snprintf(text, sizeof text, "%+.2f +- %.2f", 1e4 * x, 1e4 * se);
    printf(" %17s", isfinite(x) && se > 0 ? text : "-");
}

void print_row(const result *r) {
    char name[48];
    label(r, name, sizeof name);
    printf("%-26s %8.6f", name, r->loss);
    difference(r->loss_delta, r->se);
    difference(r->loss_delta_from_1024, r->se_from_1024);
    printf(" |");
    cell(5, "%.2f", r->bits_k, "-");
    cell(5, "%.2f", r->bits_v, "-");
    cell(5, "%.2f", r->bits, "-");
    printf(" |");
    cell(5, "%.2f", r->bits_k_from_1024, "-");
    cell(5, "%.2f", r->bits_v_from_1024, "-");
    cell(5, "%.2f", r->bits_from_1024, "-");
    printf(" |");
    cell(5, "%.0f%%", 100 * r->byte_share, "-");
    printf(" |");
    cell(8, "%.1e", r->max_certificate, "none");
    cell(8, "%.1e", r->max_certificate_over_amplitude, "none");
    printf(" |");
    cell(6, "%.2f", r->rms_over_estimate_median, "-");
    cell(5, "%.2f", r->rms_over_estimate_p99, "-");
    printf(" |");
    cell(6, "%.2f", r->rms_over_tolerance_median, "-");
    cell(5, "%.2f", r->rms_over_tolerance_p99, "-");
    printf(" |");
    cell(8, "%.0f", r->tokens_per_s, "-");
    printf("\n");
    fflush(stdout);
}

static FILE *create(const char *path) {
    FILE *f = fopen(path, "w");
    if (!f) {
        fprintf(stderr, "cannot write %s\n", path);
        exit(1);
    }
    return f;
}

static void finish(FILE *f, const char *path) {
    const int failed = ferror(f);
    if (fclose(f) != 0 || failed) {
        fprintf(stderr, "cannot write %s\n", path);
        exit(1);
    }
    printf("wrote %s\n", path);
}

static void json_number(FILE *f, const char *key, double x) {
    if (isfinite(x)) fprintf(f, ", \"%s\": %.7g", key, x);
    else fprintf(f, ", \"%s\": null", key);
}

void write_json(const char *path, const result *rows, int n) {
    FILE *f = create(path);
    fprintf(f, "[\n");
    for (int i = 0; i < n; i++) {
        const result *r = &rows[i];
        fprintf(f, " {\"scheme\": \"%s\"", r->scheme);
        json_number(f, "tolerance", r->tolerance);
        if (r->mode) fprintf(f, ", \"mode\": \"%s\"", r->mode);
        else fprintf(f, ", \"mode\": null");
        json_number(f, "planes", r->planes ? r->planes : NAN);
        json_number(f, "loss", r->loss);
        json_number(f, "loss_delta", r->loss_delta);
        json_number(f, "se", r->se);
        json_number(f, "loss_delta_from_1024", r->loss_delta_from_1024);
        json_number(f, "se_from_1024", r->se_from_1024);
        json_number(f, "bits_k", r->bits_k);
        json_number(f, "bits_v", r->bits_v);
        json_number(f, "bits", r->bits);
        json_number(f, "bits_k_from_1024", r->bits_k_from_1024);
        json_number(f, "bits_v_from_1024", r->bits_v_from_1024);
        json_number(f, "bits_from_1024", r->bits_from_1024);
        json_number(f, "byte_share", r->byte_share);
        json_number(f, "max_certificate", r->max_certificate);
        json_number(f, "max_certificate_over_amplitude", r->max_certificate_over_amplitude);
        json_number(f, "rms_over_estimate_median", r->rms_over_estimate_median);
        json_number(f, "rms_over_estimate_p99", r->rms_over_estimate_p99);
        json_number(f, "rms_over_tolerance_median", r->rms_over_tolerance_median);
        json_number(f, "rms_over_tolerance_p99", r->rms_over_tolerance_p99);
        json_number(f, "certificates_checked", (double)r->certificates_checked);
        json_number(f, "worst_error_over_certificate", r->worst_error_over_certificate);
        json_number(f, "tokens_per_s", r->tokens_per_s);
        json_number(f, "threads", r->threads);
        fprintf(f, ", \"isa\": \"%s\"}%s\n", r->isa, i + 1 < n ? "," : "");
    }
    fprintf(f, "]\n");
    finish(f, path);
}

/* ---- plot: loss difference over bits read, positions 1024 and up ---- */

enum { WIDTH = 760, HEIGHT = 440, LEFT = 90, RIGHT = 20, TOP = 50, BOTTOM = 60, MOST_BITS = 18 };

static double x_of(double bits) { return LEFT + bits / MOST_BITS * (WIDTH - LEFT - RIGHT); }

static double y_of(double value, double low, double high) {
    return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM);
}

void write_svg(const char *path, const result *rows, int n) {
    /* The range of all error bars, and the ticks' distance: 1, 2 or 5 times a power of ten. */
    double low = 0, high = 0;
    for (int i = 0; i < n; i++) {
        if (!isfinite(rows[i].loss_delta_from_1024) || rows[i].bits_from_1024 > MOST_BITS) continue;
        low = fmin(low, rows[i].loss_delta_from_1024 - rows[i].se_from_1024);
        high = fmax(high, rows[i].loss_delta_from_1024 + rows[i].se_from_1024);
    }
    if (!(high > low)) high = low + 1e-3;
    double step = pow(10, floor(log10((high - low) / 4)));
    if (step * 20 < high - low) step *= 5;
    else if (step * 8 < high - low) step *= 2;
    low = step * floor(low / step - 0.2);
    high = step * ceil(high / step + 0.8); /* room for labels */

    FILE *f = create(path);
    fprintf(f,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" font-family=\"sans-serif\""
            " font-size=\"13\">\n"
            "<rect width=\"%d\" height=\"%d\" fill=\"#fff\"/>\n"
            "<text x=\"%d\" y=\"26\" font-size=\"16\">"
            "tinylm: loss against exact attention, from position 1024</text>\n",
            WIDTH, HEIGHT, WIDTH, HEIGHT, LEFT);
    for (long k = lround(low / step); k <= lround(high / step); k++) {
        const double value = (double)k * step, y = y_of(value, low, high);
        fprintf(f, "<path d=\"M%d %.1fH%d\" stroke=\"%s\"/>", LEFT, y, WIDTH - RIGHT, k == 0 ? "#444" : "#ddd");
        fprintf(f, "<text x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%g</text>\n", LEFT - 8, y + 4, k == 0 ? 0 : value);
    }
    for (int bits = 0; bits <= MOST_BITS; bits += 2) {
        fprintf(f, "<path d=\"M%.1f %dv5\" stroke=\"#444\"/>", x_of(bits), HEIGHT - BOTTOM);
        fprintf(f, "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%d</text>\n", x_of(bits),
                HEIGHT - BOTTOM + 20, bits);
    }
    fprintf(f, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">bits read per element of K and V</text>\n",
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 18);
    fprintf(f,
            "<text transform=\"translate(22 %d) rotate(-90)\" text-anchor=\"middle\">"
            "difference, nats per byte (bars: one standard error)</text>\n",
            (TOP + HEIGHT - BOTTOM) / 2);

    for (int i = 0; i < n; i++) {
        const result *r = &rows[i];
        if (!isfinite(r->loss_delta_from_1024) || r->bits_from_1024 > MOST_BITS) continue;
        char name[48];
        label(r, name, sizeof name);
        const double x = x_of(r->bits_from_1024), y = y_of(r->loss_delta_from_1024, low, high);
        const double top = y_of(r->loss_delta_from_1024 + r->se_from_1024, low, high);
        const char *colour = r->scheme[0] == 'a' ? (r->planes == 2 ? "#d55e00" : "#0072b2") : "#666";
        fprintf(f, "<path d=\"M%.1f %.1fV%.1f\" stroke=\"%s\" stroke-width=\"1.5\"/>", x, top, 2 * y - top, colour);
        fprintf(f, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"%s\"/>", x, y, colour);
        /* Labels lean away from their neighbours'; that of 2 planes starts where its twin's with 4 ends. */
        fprintf(f,
                "<text transform=\"translate(%.1f %.1f) rotate(-55)\" x=\"%d\" font-size=\"11\" fill=\"%s\">"
                "%s</text>\n",
                x + 4, top - 6, r->planes == 2 ? 80 : 0, colour, name);
    }
    fprintf(f, "</svg>\n");
    finish(f, path);
}
