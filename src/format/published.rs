//! AlignedKV as published (arXiv 2409.16546): the 16 bits of an f16 cut into 8 | 4 | 4, token-major, lossless.
//! K is read to a precision per channel, V to a precision per token; a dropped tail is replaced by its midpoint.
//! `alignment::published` has the criterion.

use super::layout::align;
use super::{MAX_DIM, Shape, Source, TILE};
use half::f16;

pub(super) struct Offsets {
    v: usize,
    pub bytes: usize,
}

impl Offsets {
    pub fn new(s: &Shape) -> Offsets {
        let v = align(2 * TILE * s.dim_k);
        Offsets { v, bytes: v + align(2 * TILE * s.dim_v) }
    }
}

/// The cut rows of K or of V: `[token][dim]` high bytes, then `[token][dim / 2]` of the middle and of the low digits.
#[derive(Debug, Clone, Copy)]
pub struct Cut<'a> {
    bytes: &'a [u8],
    dim: usize,
}

impl Cut<'_> {
    /// The f16 bits of a row.
    #[inline(always)]
    pub fn row(&self, row: usize, out: &mut [u16]) {
        let (d, half) = (self.dim, self.dim / 2);
        let high = &self.bytes[row * d..][..d];
        let middle = &self.bytes[TILE * d + row * half..][..half];
        let low = &self.bytes[TILE * d + TILE * half + row * half..][..half];
        // As in every plane: byte b holds channel b in its low nibble and channel b + dim / 2 in its high one.
        for b in 0..half {
            let (m, l) = (u16::from(middle[b]), u16::from(low[b]));
            out[b] = u16::from(high[b]) << 8 | (m & 15) << 4 | l & 15;
            out[b + half] = u16::from(high[b + half]) << 8 | m & 0xf0 | l >> 4;
        }
    }

    /// A whole row, exactly.
    pub fn decode(&self, row: usize, out: &mut [f32]) {
        let mut bits = [0u16; MAX_DIM];
        self.row(row, &mut bits[..self.dim]);
        for (x, &b) in out.iter_mut().zip(&bits) {
            *x = f16::from_bits(b).to_f32();
        }
    }
}

/// One tile of one KV head.
#[derive(Debug, Clone, Copy)]
pub struct Tile<'a> {
    /// K rows.
    pub k: Cut<'a>,
    /// V rows.
    pub v: Cut<'a>,
}

impl<'a> Tile<'a> {
    /// The tile in a head's part of a page.
    pub fn new(s: &Shape, part: &'a [u8]) -> Tile<'a> {
        let (k, v) = part.split_at(Offsets::new(s).v);
        Tile { k: Cut { bytes: k, dim: s.dim_k }, v: Cut { bytes: v, dim: s.dim_v } }
    }
}

pub(super) fn encode(s: &Shape, part: &mut [u8], source: &Source, head: usize, from: usize, to: usize) {
    let (k, v) = part.split_at_mut(Offsets::new(s).v);
    for (part, rows) in [(k, source.k), (v, source.v)] {
        let (d, half) = (rows.dim(), rows.dim() / 2);
        let (high, digits) = part.split_at_mut(TILE * d);
        let (middle, low) = digits.split_at_mut(TILE * half);
        for row in from..to {
            let bytes = rows.bytes(row, head);
            let bits = |c: usize| u16::from_ne_bytes([bytes[2 * c], bytes[2 * c + 1]]);
            for c in 0..d {
                high[row * d + c] = (bits(c) >> 8) as u8;
            }
            for b in 0..half {
                let (x, y) = (bits(b), bits(b + half));
                middle[row * half + b] = ((x >> 4) & 15 | (y >> 4 & 15) << 4) as u8;
                low[row * half + b] = (x & 15 | (y & 15) << 4) as u8;
            }
        }
    }
}
