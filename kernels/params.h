// What kernels are called with: one struct each, passed by value. The same structs are in src/backend/cuda/params.rs,
// whose tests compare sizes and offsets. Addresses are integers, so that both sides agree on every byte.
#pragma once

namespace akv {

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;
typedef long long i64;

enum Dtype { F32 = 0, F16 = 1, BF16 = 2 };

// Shape of a layer's attention.
struct Shape {
    i32 n_q_heads, n_kv_heads;
    i32 dim_k, dim_v;
    i32 planes_k, planes_v;
    i32 dtype_k, dtype_v;
    i32 format;  // FORMAT_*
    i32 reserved;
};

enum { FORMAT_ALIGNED = 0, FORMAT_PUBLISHED = 1, FORMAT_RAW = 2 };

// Rows of a caller: [row][head][dim].
struct Rows {
    u64 data;
    i64 stride_row, stride_head;
    i32 dtype;
    i32 reserved;
};

// A sequence, or a stream of cells, in one layer.
struct View {
    u64 pages;   // const u64 [tile]: addresses of its pages
    u64 head_k;  // the first n_exact rows as given, [row][n_kv_heads][dim_k]
    u64 head_v;
    u64 written;  // const u32 [tile][4]: cells with rows; 0 = all
    u64 id;       // of the sequence, for faults; 0 = a stream
    i64 first;    // slot of its first cell, among the engine's own rows
    i32 len;
    i32 n_exact;  // at most len
};

// A query row: it sees tokens from..to of its sequence, n in all.
struct QueryRow {
    i32 sequence;  // -1: there is no such row
    i32 from, to;
    i32 n;
    i32 dense;  // 0, or it reads all digits: 1 + its index among such rows of its sequence
    i32 reserved;
};

// Rows of one tile that are appended. Row i of the tile is row source + i - from of the caller's.
struct Append {
    u64 page;
    u64 kept;    // block of TILE rows as given, K and then V, or 0
    u64 head;    // block of `exact_head` such rows, of a first tile; or 0
    u64 base;    // page of a reopened tile, or 0
    u64 id;        // of the sequence, for faults
    i64 source;
    i32 tile;
    i32 from, to;   // to 0: nothing to do
    i32 base_rows;  // rows that only the base knows
    i32 exact_head;
    i32 reserved;
};

struct EncodeParams {
    Shape shape;
    Rows k, v;
    u64 appends;  // const Append [blocks in x]; blocks in y are KV heads
    u64 fault;    // Fault
    i32 layer;
    i32 reserved;
};

// Cells of a tile that are written: cell c takes row source + from[c] of the caller's. Before that, the tile whose rows were
// kept where its own go now may have to be encoded from them as a whole.
struct CellWrite {
    u64 page;
    u64 kept;       // block of TILE rows as given, K and then V; 0: the caller's are the tile's own, from row `source` on
    u64 head;       // block of `exact_head` such rows, for the first `skip` cells; or 0
    u64 written;    // u32 [4]: cells with rows, for attention; or 0
    u64 closed;     // the other tile's page, or 0
    i64 source;
    i64 slot;       // of the tile's first cell, for faults
    u32 cells[4];   // that are written
    u32 others[4];  // other cells with K
    u32 known[4];   // those whose K is at hand
    u32 seen[4];    // goes to `written`
    i32 skip, closed_skip;
    i32 exact_head;
    u32 what;       // WRITE_*
    u8 from[128];
};

enum {
    WRITE_BLANK = 1,    // nothing is in the page yet
    WRITE_K = 2,        // K of the cells
    WRITE_K_ALL = 4,    // K of all cells, as if appended
    WRITE_V = 8,
    WRITE_V_ALL = 16,
    CLOSE_K = 32,       // the same of the closed tile
    CLOSE_V = 64,
};

enum { MAX_WRITES = 12 };  // they travel with the kernel's parameters, of which there are at most 4 KiB

// Blocks: a write in x, a KV head in y. Writes of a launch have no memory in common.
struct WriteParams {
    Shape shape;
    Rows k, v;  // data 0: not written
    u64 fault;
    i32 layer;
    i32 reserved;
    CellWrite writes[MAX_WRITES];
};

// What a cell that was copied by value has from the one that it is a copy of. Blocks in y are KV heads.
struct AdoptParams {
    Shape shape;
    u64 from, to;  // pages
    i32 from_row, to_row;
    i32 key;    // non-zero: its K is known as stored there, and no better here
    i32 value;  // non-zero: its V is what is stored there
};

// The first fault of launched work. In memory of the host, which clears it.
struct Fault {
    u32 claimed;  // non-zero: by the first
    u32 status;   // FAULT_*, written last; 0 = none
    u64 sequence;
    i64 row;      // token of the sequence; of q and of outputs: query row of the call
    i32 layer;
    i32 head;
    u32 where;    // FAULT_IN_*
    u32 reserved;
};

enum { FAULT_NONFINITE = 1, FAULT_RANGE = 2, FAULT_OVERFLOW = 3 };
enum { FAULT_IN_K = 0, FAULT_IN_V = 1, FAULT_IN_Q = 2, FAULT_IN_OUT = 3, FAULT_IN_MASK = 4 };

// One tile's scan, for one query head.
struct alignas(16) Scanned {
    float max;             // largest score
    float e, e_vs, e_vs2;  // sums of e = exp(score - max), of e * V scale, of the square of that
    float worst, rough, q_worst, q_rms, slack, bend;  // see TileError
    float unit;            // largest V scale among the tokens seen
    float reserved;
};

// One split's scan, for one query head.
struct Partial {
    double sum, weighted;
    float max;
    float reserved;
};

// See Sums in src/alignment/certificate.rs.
struct Sums {
    double sum, weighted, spread, spread_weighted, value, square, n;
    float max, peak, bound;
    float reserved;
};

// What the published scheme decides by, for one query head.
struct Aim {
    double sum;
    float max;
    i32 alignment;
};

struct AttendParams {
    Shape shape;
    Rows q, out;
    Rows attached_k, attached_v;  // the engine's own, by slots, where pages are an index beside them; data 0 = pages have all
    u64 views;  // const View [sequence]
    u64 rows;   // const QueryRow [blocks in z]
    u64 sinks;   // const float [n_q_heads] or 0
    u64 slopes;  // the same: factors of what the mask adds
    // The mask, or 0: [row][mask_tiles] of cells that are seen, of the largest magnitude added, [TILE] of f16 added.
    u64 mask_seen, mask_peak, mask_added;
    u64 lse, bound, lse_bound, estimate, amplitude;  // float [row][n_q_heads] or 0
    u64 stats;    // Stats or 0
    u64 fault;    // Fault
    // Workspace. A unit is a query row on up to 16 query heads of one KV head: [row][KV head][16 of its query heads].
    u64 scores;    // float [unit][1 + tile][heads][TILE]; tile 0 = the rows that are kept as given
    u64 scanned;   // Scanned [unit][1 + tile][heads]
    u64 partials;  // Partial [unit][split][heads]
    u64 sums;      // Sums [unit][split][heads]
    u64 outs;      // float [unit][split][heads][dim_v]
    u64 peaks;     // u16 [unit][split][K, V][MAX_DIM], of FORMAT_PUBLISHED
    u64 aims;      // Aim [unit][heads], likewise
    u64 done;      // u32 [unit]: splits that are done; 0 between calls
    i32 max_tiles, mask_tiles;
    i32 mode;  // MODE_*
    i32 fused;  // non-zero: no scan has been launched before; contexts of one split only
    float scale, softcap, tolerance;
    i32 layer;
    i32 first_row;  // of the caller's, for faults
    i32 n_rows;
    i32 blocks;  // most of a unit in the scan and in the second phase: each takes its turns at the splits. No result depends on it
    i32 reserved;
};

enum { MODE_EXPECTED = 0, MODE_GUARANTEED = 1 };

// What a call read and did; the counts of akv_stats. Scale bytes, exact rows and bytes follow from these.
struct Stats {
    u64 planes_k[5], planes_v[5];  // tokens by planes read
    u64 tokens;        // seen through pages
    u64 tokens_exact;  // seen through rows as given
    u64 tokens_attached;  // seen through the engine's own rows alone
    u64 tiles, means;  // pairs of a tile and a KV head, with a token that is seen; those whose mean of V is read
    u64 bytes_k, bytes_v;  // of pages that have no digits
    u64 rows[3];       // query rows by PATH_*
};

// What a query row is computed by; bits of Report::path.
enum { PATH_PROGRESSIVE = 0, PATH_DENSE = 1, PATH_PUBLISHED = 2 };

// What a call read, as the caller is told: akv_stats.
struct Report {
    u64 bytes_k, bytes_v, bytes_scales, bytes_exact;
    u64 planes_k[5], planes_v[5];
    u64 tokens, dense_rows;
    i32 backend, isa, path, reserved;
};

struct ReportParams {
    Shape shape;
    u64 stats;  // Stats; 0 afterwards
    u64 to;     // Report
    i32 backend, reserved;
};

// A partial state: float [row], out [row][dim]; the latter four or 0.
struct State {
    u64 out, lse, bound, lse_bound, estimate, amplitude;
};

enum { MAX_STATES = 64 };

struct MergeParams {
    i32 n, dim;
    State out;
    State states[MAX_STATES];
};

struct DequantizeParams {
    Shape shape;
    View view;
    Rows k, v;  // data 0: not wanted
    u64 fault;
    i32 first, n;
    i32 layer;
    i32 clamps;  // non-zero: what a dtype cannot hold is its largest number, and no fault
    // Cells, of one tile: its page (0: those of the view), rows kept as given, which of them are, cells with rows.
    u64 page, kept;
    u32 fresh_k[4], fresh_v[4], written_k[4], written_v[4];
};

// A mask's rows from f16: what is seen, the largest magnitude that is added, and what is. Blocks are tiles, row by row.
struct MaskParams {
    u64 f16;     // const u16 [row][stride bytes], n_kv of them
    i64 stride;
    u64 seen;    // u32 [row][tiles][4]
    u64 peak;    // float [row][tiles]
    u64 added;   // u16 [row][tiles][TILE]
    u64 fault;
    i64 first_row;  // for faults
    i32 n_kv, tiles;
};

// Query rows that lie one after another, of one stream.
struct Span {
    i32 stream, rows;
    i32 n_kv;
    i32 dense;  // non-zero: they read all digits, and the first is this one among those of the span that do
};

enum { MAX_SPANS = 64 };

// What attention is told of cells, from what the device knows of them: a View for each span, a QueryRow for each row.
struct SpansParams {
    u64 pages;    // const u64 [stream][tile]
    u64 written;  // const u32 [stream][tile][4]
    u64 heads;    // const u64 [stream]: rows kept as given
    u64 n_exact;  // const u32 [stream]: how many they are
    u64 seen;     // the mask's, of the first of these rows; or 0
    u64 views;    // View [span]
    u64 rows;     // QueryRow [row]
    i64 n_slots;  // of a stream
    i64 head_v;   // where V begins in rows kept as given
    i32 tiles, mask_tiles;
    i32 first_span;  // what the first is called
    i32 n_spans;
    Span spans[MAX_SPANS];
};

// Writes value[i] to address[i].
struct Poke {
    u64 address, value;
};

struct PokeParams {
    u64 pokes;  // const Poke [n]
    u64 n;
};

// No struct has padding; Rust asserts the same sizes.
static_assert(sizeof(Shape) == 40 && sizeof(Rows) == 32 && sizeof(View) == 56, "");
static_assert(sizeof(QueryRow) == 24 && sizeof(Append) == 72 && sizeof(EncodeParams) == 128, "");
static_assert(sizeof(Fault) == 40 && sizeof(Scanned) == 48 && sizeof(Partial) == 24, "");
static_assert(sizeof(Sums) == 72 && sizeof(AttendParams) == 392 && sizeof(Stats) == 160, "");
static_assert(sizeof(MergeParams) == 3128 && sizeof(State) == 48 && sizeof(DequantizeParams) == 264, "");
static_assert(sizeof(CellWrite) == 264 && sizeof(WriteParams) == 3288 && sizeof(AdoptParams) == 72, "");
static_assert(sizeof(MaskParams) == 64 && sizeof(SpansParams) == 1112, "");
static_assert(sizeof(Report) == 144 && sizeof(ReportParams) == 64 && sizeof(PokeParams) == 16, "");

}  // namespace akv
