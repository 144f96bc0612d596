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

/// A sequence in one layer.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct View {
    pub pages: u64,
    pub head_k: u64,
    pub head_v: u64,
    pub written: u64,
    pub id: u64,
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
}

/// What a call read; the counts of akv_stats. Scale bytes, exact rows and bytes follow from these.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Stats {
    pub planes_k: [u64; 5],
    pub planes_v: [u64; 5],
    pub tokens: u64,
    pub tokens_exact: u64,
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
    pub reserved: i32,
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
pub const PLACES: [&str; 4] = ["key", "value", "q", "out"];

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

/// Both sides assert the same sizes; no struct has padding.
const _: () = {
    assert!(size_of::<Shape>() == 40 && size_of::<Rows>() == 32 && size_of::<View>() == 48);
    assert!(size_of::<QueryRow>() == 24 && size_of::<Append>() == 72 && size_of::<EncodeParams>() == 128);
    assert!(size_of::<Fault>() == 40 && size_of::<Scanned>() == 48 && size_of::<Partial>() == 24);
    assert!(size_of::<Sums>() == 72 && size_of::<AttendParams>() == 320 && size_of::<Stats>() == 152);
    assert!(size_of::<MergeParams>() == 3128 && size_of::<State>() == 48 && size_of::<DequantizeParams>() == 176);
    assert!(size_of::<Report>() == 144 && size_of::<ReportParams>() == 64 && size_of::<PokeParams>() == 16);
};
