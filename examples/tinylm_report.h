/* The demo's output: a table, a JSON file, an SVG plot.
 * MIT OR Apache-2.0.
 */
#ifndef TINYLM_REPORT_H
#define TINYLM_REPORT_H

#include <stdint.h>

/* What one KV scheme measured. NAN: not applicable. Bits are per element of K, of V, of both. */
typedef struct {
    const char *scheme;    /* "exact-f32", "published-8-4-4", "aligned" */
    const char *mode;      /* "expected", "guaranteed", "exact"; NULL */
    double tolerance;
    int planes;            /* 0: not applicable */
    double loss;           /* nats per byte */
    double loss_delta, se; /* against exact-f32, with its standard error over the windows */
    double loss_delta_from_1024, se_from_1024;
    double bits_k, bits_v, bits;
    double bits_k_from_1024, bits_v_from_1024, bits_from_1024;
    double byte_share; /* of fp16 */
    double max_certificate, max_certificate_over_amplitude;
    double rms_over_estimate_median, rms_over_estimate_p99;   /* of rows that were measured */
    double rms_over_tolerance_median, rms_over_tolerance_p99; /* tolerance times amplitude */
    uint64_t certificates_checked;
    double worst_error_over_certificate;
    double tokens_per_s;
    int threads;
    const char *isa;
} result;

void print_header(void);
void print_row(const result *r);

/* Each prints what is wrong and exits if it cannot write. */
void write_json(const char *path, const result *rows, int n);
void write_svg(const char *path, const result *rows, int n);

#endif
