//! AlignedKV as published (arXiv 2409.16546): the 16 bits of an f16 cut into 8 | 4 | 4, token-major, lossless.
//! K is read to a precision per channel, V to a precision per token; a dropped tail is replaced by its midpoint.
//! `alignment::published` has the criterion.

use super::layout::align;
use super::{Shape, Source, TILE};
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
    /// The f16 bits of a token's channel with all but the first `bits` (8, 12 or 16) replaced by their midpoint.
    #[inline(always)]
    pub fn bits(&self, row: usize, channel: usize, bits: u8) -> u16 {
        let (d, half) = (self.dim, self.dim / 2);
        let high = u16::from(self.bytes[row * d + channel]) << 8;
        if bits == 8 {
            return high | 0x80;
        }
        // As in every plane: byte b holds channel b in its low nibble and channel b + dim / 2 in its high one.
        let (byte, shift) = if channel < half { (channel, 0) } else { (channel - half, 4) };
        let middle = TILE * d + row * half + byte;
        let with_middle = high | u16::from((self.bytes[middle] >> shift) & 15) << 4;
        if bits == 12 {
            return with_middle | 8;
        }
        with_middle | u16::from((self.bytes[middle + TILE * half] >> shift) & 15)
    }

    /// A token's channel with its tail beyond `bits` replaced by the midpoint.
    #[inline(always)]
    pub fn value(&self, row: usize, channel: usize, bits: u8) -> f32 {
        f16::from_bits(self.bits(row, channel, bits)).to_f32()
    }

    /// A whole row, exactly.
    pub fn decode(&self, row: usize, out: &mut [f32]) {
        for (c, x) in out.iter_mut().enumerate() {
            *x = self.value(row, c, 16);
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
