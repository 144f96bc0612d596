//! The CUDA backend: what its kernels (`kernels/`) are called with. Nothing launches them on a device yet: tests run them
//! on the CPU, as `kernels/host` lets them.

pub mod params;

use crate::format::{MAX_DIM, Shape, TILE};
use params::{AttendParams, Partial, Scanned, Share, Sums};

/// Tiles of a split, as on the CPU: results depend on it.
pub const SPLIT: usize = 8;

/// Query heads of a unit of attention: larger groups are several units, which decide apart.
pub const UNIT_HEADS: usize = 16;

/// Threads of a block that encodes.
pub const ENCODE_THREADS: u32 = 256;

/// Its shared memory (`Encoding` in `kernels/encode.cu`).
pub const ENCODE_SHARED_BYTES: usize = 4 * (2 * MAX_DIM + MAX_DIM / 8 + 5);

/// Shared memory of a block that merges.
pub const MERGE_SHARED_BYTES: usize = 4 * (MAX_DIM + 4);

/// Threads of a block that attends, and its warps.
pub const ATTEND_THREADS: u32 = 128;
const WARPS: usize = ATTEND_THREADS as usize / 32;

/// Words of a digit row per lane of the compiled attention kernels: four lanes share one.
pub const WORDS: [usize; 5] = [2, 3, 4, 6, 8];

/// The one that serves a shape.
pub fn words(shape: &Shape) -> usize {
    let least = shape.dim_k.div_ceil(32);
    WORDS.into_iter().find(|&words| words >= least).unwrap_or(8)
}

/// Bytes of shared memory of a block that attends (`Memory` in `kernels/attend.cuh`).
pub fn attend_shared_bytes(shape: &Shape) -> usize {
    let heads = shape.group().min(UNIT_HEADS).next_multiple_of(4);
    let q = heads * (32 * words(shape) + 4) * 4;
    let work = 2 * 2 * TILE + 4 * 4 * TILE + 2 * 4 * 4;
    let by_warp = heads * size_of::<Sums>() + work + heads * shape.dim_v * 4;
    q + heads * size_of::<Share>() + WARPS * by_warp + 16
}

/// Units of attention of one query row.
pub fn units(shape: &Shape) -> usize {
    shape.n_kv_heads * shape.group().div_ceil(UNIT_HEADS)
}

/// Where the parts of an attention call's workspace begin.
#[derive(Debug, Clone, Copy)]
pub struct Workspace {
    offsets: [usize; 6],
    /// Its size. The part that counts splits must be 0 before the first call.
    pub bytes: usize,
}

impl Workspace {
    /// Of up to `n_rows` query rows over up to `max_tiles` tiles.
    pub fn new(shape: &Shape, n_rows: usize, max_tiles: usize) -> Workspace {
        let n_units = n_rows * units(shape);
        let heads = n_units * shape.group().min(UNIT_HEADS);
        let (tiles, splits) = (heads * (1 + max_tiles), heads * max_tiles.div_ceil(SPLIT));
        let sizes = [
            n_units * size_of::<u32>(),
            tiles * TILE * size_of::<f32>(),
            tiles * size_of::<Scanned>(),
            splits * size_of::<Partial>(),
            splits * size_of::<Sums>(),
            splits * shape.dim_v * size_of::<f32>(),
        ];
        let mut bytes = 0;
        let offsets = sizes.map(|size| {
            let start = bytes;
            bytes += size.next_multiple_of(256);
            start
        });
        Workspace { offsets, bytes }
    }

    /// Puts their addresses into a call.
    pub fn place(&self, start: u64, max_tiles: usize, call: &mut AttendParams) {
        let [done, scores, scanned, partials, sums, outs] = self.offsets.map(|offset| start + offset as u64);
        (call.done, call.scores, call.scanned, call.partials) = (done, scores, scanned, partials);
        (call.sums, call.outs, call.max_tiles) = (sums, outs, max_tiles as i32);
    }
}
