//! The CUDA backend: the same calls on device memory and the caller's stream. What it launches are the kernels in
//! `kernels/`; they travel in the library, compiled. The driver is looked for at run time.

mod attend;
mod device;
mod driver;
mod images;
mod mask;
pub mod params;
mod tables;

pub use attend::{Call, Cells, Workspace, attend};
pub use device::{Device, Event, Pinned, Stream, bytes_of};
pub use mask::Mask;
pub use tables::{Bounds, Scratches, Sight, Tables};

use crate::format::{MAX_DIM, Shape, TILE};
use params::{Share, Sums};

/// Tiles of a split, as on the CPU: results depend on it.
pub const SPLIT: usize = 8;

/// Query heads of a unit of attention: larger groups are several units, which decide apart.
pub const UNIT_HEADS: usize = 16;

/// Threads of a block that encodes.
pub const ENCODE_THREADS: u32 = 256;

/// Its shared memory (`Encoding` in `kernels/encode.cu`).
pub const ENCODE_SHARED_BYTES: usize = 4 * (2 * MAX_DIM + MAX_DIM / 4 + MAX_DIM / 8 + 5);

/// Shared memory of the kernels in `kernels/cells.cu`, and of `akv_adopt`.
pub const CELLS_SHARED_BYTES: usize = 16;

/// Shared memory of a block that merges.
pub const MERGE_SHARED_BYTES: usize = 4 * (MAX_DIM + 4);

/// Threads of a block that stores rows as given.
pub const STORE_THREADS: u32 = 256;

/// Shared memory of the blocks of `kernels/published.cu`.
pub const PUBLISHED_SHARED_BYTES: usize = UNIT_HEADS * MAX_DIM * 5 + 2 * MAX_DIM;

/// Threads of a block that attends, and its warps.
pub const ATTEND_THREADS: u32 = 128;
const WARPS: usize = ATTEND_THREADS as usize / 32;

/// Words of a digit row per lane of the compiled attention kernels: four lanes share one.
pub const WORDS: [usize; 5] = [2, 3, 4, 6, 8];

/// The first of them that has room for so many channels.
fn words_of(dim: usize) -> usize {
    WORDS.into_iter().find(|&words| words >= dim.div_ceil(32)).unwrap_or(8)
}

/// The one that serves a shape.
pub fn words(shape: &Shape) -> usize {
    words_of(shape.dim_k)
}

/// The dense kernel that serves a shape: there K and V have the same place.
pub fn dense_words(shape: &Shape) -> usize {
    words_of(shape.dim_k.max(shape.dim_v))
}

/// Bytes of shared memory of a block of the dense kernel (`DenseMemory` in `kernels/dense.cu`).
pub fn dense_shared_bytes(shape: &Shape) -> usize {
    let (words, rows) = (dense_words(shape), 64);
    let (dim, tokens) = (32 * words, if words <= 6 { 32 } else { 16 });
    4 * ((rows + tokens) * (dim + 4) + dim + tokens) + rows * (size_of::<Sums>() + 4)
}

/// Query heads of a unit, as shared memory has them, and the bytes of q in it (`Queries` in `kernels/unit.cuh`).
fn shared_q(shape: &Shape) -> (usize, usize) {
    let heads = shape.group().min(UNIT_HEADS).next_multiple_of(4);
    (heads, heads * 32 * words(shape) * 4)
}

/// Bytes of shared memory of a block that scans: q, and for each warp a tile's V scales, and what it scans (`Ring` in
/// `kernels/scan.cuh`).
pub fn scan_shared_bytes(shape: &Shape) -> usize {
    let (group, scales) = (32 * words(shape), 2 * words(shape) + TILE / 16 + 1);
    shared_q(shape).1 + WARPS * (TILE * 4 + 16 * (4 * group + scales))
}

/// Bytes of shared memory of a block that attends (`Memory` in `kernels/attend.cuh`), and that may scan before.
pub fn attend_shared_bytes(shape: &Shape) -> usize {
    let (heads, q) = shared_q(shape);
    let (parts, part) = (WARPS + 1, 9 * size_of::<f32>());
    let plan = 2 * TILE * size_of::<u16>() + 32 * size_of::<u32>() + 16 + 4 * (TILE + 1) * size_of::<f32>();
    let own = q + heads * size_of::<Share>() + SPLIT * plan + parts * 4 * (shape.dim_v * size_of::<f32>() + part) + 16;
    own.max(scan_shared_bytes(shape))
}

/// Units of attention of one query row.
pub fn units(shape: &Shape) -> usize {
    shape.n_kv_heads * shape.group().div_ceil(UNIT_HEADS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Dtype;

    /// A block of compute capability 8.6, 8.9 or 12.0 can have 99 KiB, the least of all.
    #[test]
    fn shared_memory_of_any_shape() {
        for group in (1..=UNIT_HEADS).chain([24, 128]) {
            for (dim_k, dim_v) in
                (16..=MAX_DIM).step_by(16).flat_map(|k| (16..=MAX_DIM).step_by(16).map(move |v| (k, v)))
            {
                let (dtype_k, dtype_v) = (Dtype::F16, Dtype::F16);
                let shape = Shape {
                    n_q_heads: group,
                    n_kv_heads: 1,
                    dim_k,
                    dim_v,
                    dtype_k,
                    dtype_v,
                    planes_k: 4,
                    planes_v: 4,
                    window: 0,
                    v_is_prefix: false,
                };
                for bytes in [scan_shared_bytes(&shape), attend_shared_bytes(&shape), dense_shared_bytes(&shape)] {
                    assert!(bytes <= 99 << 10, "{bytes} bytes: group {group}, head_dim {dim_k} and {dim_v}");
                }
            }
        }
    }
}
