//! What kernels are called with: the structs of `kernels/params.h`, field by field. Addresses are of device memory.
#![allow(missing_docs)]

use crate::format;

/// Shape of a layer's attention.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Shape {
    pub n_q_heads: i32,
    pub n_kv_heads: i32,
    pub dim_k: i32,
    pub dim_v: i32,
    pub planes_k: i32,
    pub planes_v: i32,
    pub dtype_k: i32,
    pub dtype_v: i32,
    pub format: i32,
    pub reserved: i32,
}

/// Rows of a caller: [row][head][dim].
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Rows {
    pub data: u64,
    pub stride_row: i64,
    pub stride_head: i64,
    pub dtype: i32,
    pub reserved: i32,
}

/// A sequence, or a stream of cells, in one layer.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct View {
    pub pages: u64,
    pub head_k: u64,
    pub head_v: u64,
    pub written: u64,
    pub id: u64,
    pub first: i64,
    pub len: i32,
    pub n_exact: i32,
}

/// A query row: it sees tokens from..to of its sequence (-1: there is no such row), n in all.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct QueryRow {
    pub sequence: i32,
    pub from: i32,
    pub to: i32,
    pub n: i32,
    pub dense: i32,
    pub reserved: i32,
}

/// Rows of one tile that are appended. Row i of the tile is row source + i - from of the caller's.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Append {
    pub page: u64,
    pub kept: u64,
    pub head: u64,
    pub base: u64,
    pub id: u64,
    pub source: i64,
    pub tile: i32,
    pub from: i32,
    pub to: i32,
    pub base_rows: i32,
    pub exact_head: i32,
    pub reserved: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct EncodeParams {
    pub shape: Shape,
    pub k: Rows,
    pub v: Rows,
    pub appends: u64,
    pub fault: u64,
    pub layer: i32,
    pub reserved: i32,
}

/// Cells of a tile that are written.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct CellWrite {
    pub page: u64,
    pub kept: u64,
    pub head: u64,
    pub written: u64,
    pub closed: u64,
    pub source: i64,
    pub slot: i64,
    pub cells: [u32; 4],
    pub others: [u32; 4],
    pub known: [u32; 4],
    pub seen: [u32; 4],
    pub skip: i32,
    pub closed_skip: i32,
    pub exact_head: i32,
    pub what: u32,
    pub from: [u8; format::TILE],
}

impl CellWrite {
    /// Nothing to do.
    pub const NONE: CellWrite = CellWrite {
        page: 0,
        kept: 0,
        head: 0,
        written: 0,
        closed: 0,
        source: 0,
        slot: 0,
        cells: [0; 4],
        others: [0; 4],
        known: [0; 4],
        seen: [0; 4],
        skip: 0,
        closed_skip: 0,
        exact_head: 0,
        what: 0,
        from: [0; format::TILE],
    };
}

/// [`CellWrite::what`].
pub const WRITE_BLANK: u32 = 1;
pub const WRITE_K: u32 = 2;
pub const WRITE_K_ALL: u32 = 4;
pub const WRITE_V: u32 = 8;
pub const WRITE_V_ALL: u32 = 16;
pub const CLOSE_K: u32 = 32;
pub const CLOSE_V: u32 = 64;

/// Most writes of a launch: they travel with the kernel's parameters.
pub const MAX_WRITES: usize = 12;

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct WriteParams {
    pub shape: Shape,
    pub k: Rows,
    pub v: Rows,
    pub fault: u64,
    pub layer: i32,
    pub reserved: i32,
    pub writes: [CellWrite; MAX_WRITES],
}

/// What a cell that was copied by value has from the one that it is a copy of.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct AdoptParams {
    pub shape: Shape,
    pub from: u64,
    pub to: u64,
    pub from_row: i32,
    pub to_row: i32,
    pub key: i32,
    pub value: i32,
}

/// A mask's rows from f16.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct MaskParams {
    pub f16: u64,
    pub stride: i64,
    pub seen: u64,
    pub peak: u64,
    pub added: u64,
    pub fault: u64,
    pub first_row: i64,
    pub n_kv: i32,
    pub tiles: i32,
}

/// Query rows that lie one after another, of one stream.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Span {
    pub stream: i32,
    pub rows: i32,
    pub n_kv: i32,
    pub dense: i32,
}

/// Most spans of a launch.
pub const MAX_SPANS: usize = 64;

/// What attention is told of cells.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct SpansParams {
    pub pages: u64,
    pub written: u64,
    pub heads: u64,
    pub n_exact: u64,
    pub seen: u64,
    pub views: u64,
    pub rows: u64,
    pub n_slots: i64,
    pub head_v: i64,
    pub tiles: i32,
    pub mask_tiles: i32,
    pub first_span: i32,
    pub n_spans: i32,
    pub spans: [Span; MAX_SPANS],
}

/// The first fault of launched work, in memory of the host; status 0 = none.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Fault {
    pub claimed: u32,
    pub status: u32,
    pub sequence: u64,
    pub row: i64,
    pub layer: i32,
    pub head: i32,
    pub place: u32,
    pub reserved: u32,
}

/// One tile's scan, for one query head.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Scanned {
    pub max: f32,
    pub e: f32,
    pub e_vs: f32,
    pub e_vs2: f32,
    pub worst: f32,
    pub rough: f32,
    pub q_worst: f32,
    pub q_rms: f32,
    pub slack: f32,
    pub bend: f32,
    pub unit: f32,
    pub reserved: f32,
}

/// One split's scan, for one query head.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Partial {
    pub sum: f64,
    pub weighted: f64,
    pub max: f32,
    pub reserved: f32,
}

/// See Sums in src/alignment/certificate.rs.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Sums {
    pub sum: f64,
    pub weighted: f64,
    pub spread: f64,
    pub spread_weighted: f64,
    pub value: f64,
    pub square: f64,
    pub n: f64,
    pub max: f32,
    pub peak: f32,
    pub bound: f32,
    pub reserved: f32,
}

/// What the published scheme decides by, for one query head.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Aim {
    pub sum: f64,
    pub max: f32,
    pub alignment: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct AttendParams {
    pub shape: Shape,
    pub q: Rows,
    pub out: Rows,
    pub attached_k: Rows,
    pub attached_v: Rows,
    pub views: u64,
    pub rows: u64,
    pub sinks: u64,
    pub slopes: u64,
    pub mask_seen: u64,
    pub mask_peak: u64,
    pub mask_added: u64,
    pub lse: u64,
    pub bound: u64,
    pub lse_bound: u64,
    pub estimate: u64,
    pub amplitude: u64,
    pub stats: u64,
    pub fault: u64,
    pub scores: u64,
    pub scanned: u64,
    pub partials: u64,
    pub sums: u64,
    pub outs: u64,
    pub peaks: u64,
    pub aims: u64,
    pub done: u64,
    pub max_tiles: i32,
    pub mask_tiles: i32,
    pub mode: i32,
    pub fused: i32,
    pub scale: f32,
    pub softcap: f32,
    pub tolerance: f32,
    pub layer: i32,
    pub first_row: i32,
    pub n_rows: i32,
    pub blocks: i32,
    pub reserved: i32,
}

/// What a call read; the counts of akv_stats. Scale bytes, exact rows and bytes follow from these.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Stats {
    pub planes_k: [u64; 5],
    pub planes_v: [u64; 5],
    pub tokens: u64,
    pub tokens_exact: u64,
    pub tokens_attached: u64,
    pub tiles: u64,
    pub means: u64,
    pub bytes_k: u64,
    pub bytes_v: u64,
    pub rows: [u64; 3],
}

/// What a call read, as the caller is told: `akv_stats`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Report {
    pub bytes_k: u64,
    pub bytes_v: u64,
    pub bytes_scales: u64,
    pub bytes_exact: u64,
    pub planes_k: [u64; 5],
    pub planes_v: [u64; 5],
    pub tokens: u64,
    pub dense_rows: u64,
    pub backend: i32,
    pub isa: i32,
    pub path: i32,
    pub reserved: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ReportParams {
    pub shape: Shape,
    pub stats: u64,
    pub to: u64,
    pub backend: i32,
    pub reserved: i32,
}

/// A partial state: float [row], out [row][dim]; the latter four or 0.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct State {
    pub out: u64,
    pub lse: u64,
    pub bound: u64,
    pub lse_bound: u64,
    pub estimate: u64,
    pub amplitude: u64,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct DequantizeParams {
    pub shape: Shape,
    pub view: View,
    pub k: Rows,
    pub v: Rows,
    pub fault: u64,
    pub first: i32,
    pub n: i32,
    pub layer: i32,
    pub clamps: i32,
    pub page: u64,
    pub kept: u64,
    pub fresh_k: [u32; 4],
    pub fresh_v: [u32; 4],
    pub written_k: [u32; 4],
    pub written_v: [u32; 4],
}

/// Most states that one call merges: they travel with the kernel's parameters.
pub const MAX_STATES: usize = 64;

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct MergeParams {
    pub n: i32,
    pub dim: i32,
    pub out: State,
    pub states: [State; MAX_STATES],
}

/// `value` goes to `address`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Poke {
    pub address: u64,
    pub value: u64,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct PokeParams {
    pub pokes: u64,
    pub n: u64,
}

/// See `kernels/alignment.cuh`: what a query head's tokens may leave out.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Share {
    pub scaled: f32,
    pub amplitude: f32,
    pub max: f32,
    pub mode: i32,
}

/// [`Fault::status`].
pub const FAULT_NONFINITE: u32 = 1;
/// A value that the format, or an output's dtype, cannot hold.
pub const FAULT_RANGE: u32 = 2;
/// Scores beyond binary32, or outputs beyond their dtype.
pub const FAULT_OVERFLOW: u32 = 3;

/// [`Fault::place`], as names.
pub const PLACES: [&str; 5] = ["key", "value", "q", "out", "mask"];

/// [`AttendParams::mode`].
pub const MODE_EXPECTED: i32 = 0;
/// Bounds add.
pub const MODE_GUARANTEED: i32 = 1;

impl From<&format::Layout> for Shape {
    fn from(layout: &format::Layout) -> Shape {
        let s = &layout.shape;
        Shape {
            n_q_heads: s.n_q_heads as i32,
            n_kv_heads: s.n_kv_heads as i32,
            dim_k: s.dim_k as i32,
            dim_v: s.dim_v as i32,
            planes_k: s.planes_k as i32,
            planes_v: s.planes_v as i32,
            dtype_k: s.dtype_k as i32,
            dtype_v: s.dtype_v as i32,
            format: match layout.format {
                format::Format::Aligned => 0,
                format::Format::Published => 1,
                format::Format::Raw => 2,
            },
            reserved: 0,
        }
    }
}

impl From<&format::Rows<'_>> for Rows {
    /// Addresses and strides; nothing is read.
    fn from(rows: &format::Rows) -> Rows {
        let at = |row, head| rows.address(row, head) as u64;
        Rows {
            data: at(0, 0),
            stride_row: at(1, 0).wrapping_sub(at(0, 0)) as i64,
            stride_head: at(0, 1).wrapping_sub(at(0, 0)) as i64,
            dtype: rows.dtype() as i32,
            reserved: 0,
        }
    }
}

/// Both sides assert the same sizes; no struct has padding.
const _: () = {
    assert!(size_of::<Shape>() == 40 && size_of::<Rows>() == 32 && size_of::<View>() == 56);
    assert!(size_of::<QueryRow>() == 24 && size_of::<Append>() == 72 && size_of::<EncodeParams>() == 128);
    assert!(size_of::<Fault>() == 40 && size_of::<Scanned>() == 48 && size_of::<Partial>() == 24);
    assert!(size_of::<Sums>() == 72 && size_of::<AttendParams>() == 392 && size_of::<Stats>() == 160);
    assert!(size_of::<MergeParams>() == 3128 && size_of::<State>() == 48 && size_of::<DequantizeParams>() == 264);
    assert!(size_of::<CellWrite>() == 264 && size_of::<WriteParams>() == 3288 && size_of::<AdoptParams>() == 72);
    assert!(size_of::<MaskParams>() == 64 && size_of::<Span>() == 16 && size_of::<SpansParams>() == 1112);
    assert!(size_of::<Report>() == 144 && size_of::<ReportParams>() == 64 && size_of::<PokeParams>() == 16);
};
