//! AlignedKV as published (arXiv 2409.16546): the 16 bits of an f16 cut into 8 | 4 | 4, token-major, lossless.
//! K is read to a precision per channel, V to a precision per token; a dropped tail is replaced by its midpoint.
//! `alignment::published` has the criterion.

use super::layout::align;
use super::{MAX_DIM, Shape, Source, TILE};
use crate::Result;
use half::f16;
use std::ops::Range;

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
        // As in every plane: byte b holds channel b in its low nibble and channel b + dim / 2 in its high one. Blocks of
        // 16, so that short rows become vector code too.
        let (out_low, out_high) = out[..d].split_at_mut(half);
        let (high_low, high_high) = high.split_at(half);
        for b in (0..half).step_by(16) {
            let to = (b + 16).min(half);
            let digits = middle[b..to].iter().zip(&low[b..to]);
            for ((x, &h), (&m, &l)) in out_low[b..to].iter_mut().zip(&high_low[b..to]).zip(digits.clone()) {
                *x = u16::from(h) << 8 | (u16::from(m) & 15) << 4 | u16::from(l) & 15;
            }
            for ((x, &h), (&m, &l)) in out_high[b..to].iter_mut().zip(&high_high[b..to]).zip(digits) {
                *x = u16::from(h) << 8 | u16::from(m) & 0xf0 | u16::from(l) >> 4;
            }
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

/// See [`super::Layout::stretches`].
pub(super) fn stretches(s: &Shape, rows: usize, f: &mut impl FnMut(Range<usize>) -> Result<()>) -> Result<()> {
    for (start, d) in [(0, s.dim_k), (Offsets::new(s).v, s.dim_v)] {
        for (at, bytes) in [(0, d), (TILE * d, d / 2), (TILE * d + TILE * d / 2, d / 2)] {
            f(start + at..start + at + rows * bytes)?;
        }
    }
    Ok(())
}

/// True if the first `rows` rows are finite.
pub(super) fn sound(s: &Shape, part: &[u8], rows: usize) -> bool {
    let tile = Tile::new(s, part);
    let mut bits = [0u16; MAX_DIM];
    (0..rows).all(|row| {
        [tile.k, tile.v].into_iter().all(|cut| {
            cut.row(row, &mut bits[..cut.dim]);
            bits[..cut.dim].iter().all(|&bits| f16::from_bits(bits).is_finite())
        })
    })
}
