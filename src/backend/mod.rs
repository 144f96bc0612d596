//! Backends: what computes. [`cpu`] is the embedded default.

pub mod cpu;
pub mod cuda;
mod mask;

pub use mask::Mask;

use crate::cache::{Positions, SequenceView};
use crate::format::{PLANES, Rows, RowsMut, Shape};

/// How errors of tokens are added up when deciding how many digits to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// As independent.
    Expected,
    /// As bounds.
    Guaranteed,
    /// All stored digits are read.
    Exact,
}

/// One query row of one sequence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QueryRow {
    /// Index in [`Attention::sequences`].
    pub sequence: usize,
    /// It sees tokens `from..to` (none if from >= to), as far as the mask lets it.
    pub from: usize,
    /// End of what it sees.
    pub to: usize,
    /// And these tokens, all below `from`: what a window leaves at the start. Start and end.
    pub head: (usize, usize),
    /// Of the last [`TREE`] tokens of the sequence, those that it does not see all the same: the highest bit is the last
    /// token.
    pub hidden: u64,
    /// Its position: what [`Attention::positions`] are relative to.
    pub position: i64,
    /// Number of tokens that it sees.
    pub n: usize,
    /// True: all digits are read; false: as [`Mode`] says.
    pub dense: bool,
    /// One of many of its sequence: sharing a decoded tile pays.
    pub many: bool,
}

/// Tokens at the end of a sequence that a row can see or not, each by itself: what a speculative tree may hold.
pub const TREE: usize = u64::BITS as usize;

impl QueryRow {
    /// A row that sees `from..to`.
    pub fn new(sequence: usize, from: usize, to: usize, dense: bool) -> QueryRow {
        QueryRow { sequence, from, to, n: to.saturating_sub(from), dense, ..QueryRow::default() }
    }
}

/// Shared output `[row][head]` of f32, contiguous.
#[derive(Debug, Clone, Copy)]
pub struct Floats(*mut f32);

// SAFETY: writers write disjoint elements (the contract of `set`).
unsafe impl Send for Floats {}
// SAFETY: as above.
unsafe impl Sync for Floats {}

impl Floats {
    /// # Safety
    /// `p` must be valid for writing every element that the call will set, for as long as it runs.
    pub unsafe fn new(p: *mut f32) -> Floats {
        Floats(p)
    }

    /// # Safety
    /// `index` is in bounds, and no other thread sets it at the same time.
    pub unsafe fn set(self, index: usize, value: f32) {
        // SAFETY: the contract of `new` and of this call.
        unsafe { *self.0.add(index) = value }
    }
}

/// One attention call over one layer. All arguments are valid; rows lie by sequence, in order.
pub struct Attention<'a> {
    /// Shape of the layer.
    pub shape: &'a Shape,
    /// Sequences.
    pub sequences: &'a [SequenceView<'a>],
    /// Query rows; index = row of `q` and of the outputs.
    pub rows: &'a [QueryRow],
    /// `[row][n_q_heads][dim_k]`, finite.
    pub q: Rows<'a>,
    /// Rows and heads of q, in order, whose outputs are NaN all the same.
    pub lost: &'a [(usize, usize)],
    /// `[row][n_q_heads][dim_v]`.
    pub out: RowsMut<'a>,
    /// Factor of the dot products.
    pub scale: f32,
    /// Cap c of the scores, c * tanh(score / c); 0 = none.
    pub softcap: f32,
    /// By query rows: what they see, and what is added to their scores.
    pub mask: Option<&'a Mask>,
    /// By sequences: where their tokens are. The distance from the query row, negative backwards, is added to scores,
    /// times `slopes`. Not with a mask.
    pub positions: Option<&'a [&'a Positions]>,
    /// `[n_q_heads]`: factors of what the mask or the distance adds; 1 without.
    pub slopes: Option<&'a [f32]>,
    /// `[n_q_heads]`: scores of a token more, whose value is 0.
    pub sinks: Option<&'a [f32]>,
    /// Relative to the amplitude.
    pub tolerance: f32,
    /// See [`Mode`].
    pub mode: Mode,
    /// Optional outputs.
    pub lse: Option<Floats>,
    /// Certificate.
    pub bound: Option<Floats>,
    /// Certificate of `lse`.
    pub lse_bound: Option<Floats>,
    /// Expected rms error of a channel.
    pub estimate: Option<Floats>,
    /// Sum of p * max|v|.
    pub amplitude: Option<Floats>,
}

/// The threads of a call.
#[derive(Clone, Copy)]
pub struct Threads<'a> {
    /// This one.
    pub ith: usize,
    /// How many.
    pub nth: usize,
    /// Barrier over all of them.
    pub barrier: &'a (dyn Fn() + Sync),
}

/// What a call read; the fields of `akv_stats`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Stats {
    pub bytes_k: u64,
    pub bytes_v: u64,
    pub bytes_scales: u64,
    pub bytes_exact: u64,
    pub planes_k: [u64; PLANES + 1],
    pub planes_v: [u64; PLANES + 1],
    pub tokens: u64,
    pub dense_rows: u64,
    /// Sum of `AKV_PATH_*`.
    pub path: i32,
}
