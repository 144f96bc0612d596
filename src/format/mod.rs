//! The stored numbers: scale bytes, codes, planes, tiles. This is the scalar truth that every backend must reproduce
//! bit for bit; everything about codes is binary32 arithmetic.
//!
//! A value `x` under scale byte `u` has the code `rint(x * inverse(u))`, stored as `u16 = code + 0x8888`. Its four hex
//! digits, most significant first, are the *planes*; a digit's value is `nibble - 8` and its weight `16^-k * scale`.
//! Digits average -1/2, so a prefix of p < 4 planes stands for its digits plus [`CENTRE`]`[p]`, and what it leaves out
//! is at most [`LEFT`]`[p]`, both in units of the scale.
//!
//! A *tile* is [`TILE`] tokens of one KV head of one layer. A *page* holds one tile of every KV head of a layer.

pub mod aligned;
mod clean;
mod layout;
pub mod published;
pub mod raw;
mod rows;
mod scale;

pub use clean::Clean;
pub use layout::{Format, Layout, Planes, Shape, Source};
pub use rows::{Dtype, Rows, RowsMut, finite_f16};
pub use scale::{PEAK_LIMIT, inverse, scale, scale_byte};

/// Tokens of a tile: they share one K scale per channel.
pub const TILE: usize = 128;
/// Largest head_dim.
pub const MAX_DIM: usize = 256;
/// Largest row of K of which V is a part.
pub const MAX_LATENT: usize = 576;
/// Largest GQA group.
pub const MAX_GROUP: usize = 64;
/// Largest group that shares rows of which V is a part.
pub const MAX_LATENT_GROUP: usize = 128;
/// Hex digits of a code.
pub const PLANES: usize = 4;
/// A stored code is `code + OFFSET`.
pub const OFFSET: i32 = 0x8888;
/// Largest code: digits 7, 7, 7, 7.
pub const CODE_MAX: i32 = 0x7777;
/// Smallest code: digits -8, -8, -8, -8.
pub const CODE_MIN: i32 = -0x8888;
/// Largest value in units of the scale.
pub const PEAK: f32 = CODE_MAX as f32 / 4096.0;

/// What `p` planes leave out on average, in units of the scale (p = 0 stands for the value 0).
pub const CENTRE: [f32; PLANES + 1] =
    [0.0, -0.5 * (1.0 / 16.0 + 1.0 / 256.0 + 1.0 / 4096.0), -0.5 * (1.0 / 256.0 + 1.0 / 4096.0), -0.5 / 4096.0, 0.0];

/// `|value - prefix of p planes| <= LEFT[p] * scale`: half of what the missing digits span, and the rounding of the
/// code and of its binary32 product (0.51 of the last digit).
pub const LEFT: [f32; PLANES + 1] = [
    PEAK,
    7.5 * (1.0 / 16.0 + 1.0 / 256.0 + 1.0 / 4096.0) + 0.51 / 4096.0,
    7.5 * (1.0 / 256.0 + 1.0 / 4096.0) + 0.51 / 4096.0,
    7.5 / 4096.0 + 0.51 / 4096.0,
    0.51 / 4096.0,
];

/// Code of `x`, given [`inverse`] of its scale byte. Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, as
/// `rint` does, and leaves it in the low bits: vector code everywhere.
#[inline(always)]
pub fn encode(x: f32, inverse: f32) -> u16 {
    const MAGIC: f32 = 12_582_912.0;
    let rounded = (x * inverse).clamp(CODE_MIN as f32, CODE_MAX as f32) + MAGIC;
    rounded.to_bits().wrapping_sub(MAGIC.to_bits()).wrapping_add(OFFSET as u32) as u16
}

/// Value of the first `planes` planes of a stored code, centred on what they leave out, in units of the scale: exact
/// in binary32, and so is its product with a scale.
#[inline(always)]
pub fn decode(stored: u16, planes: usize) -> f32 {
    if planes == 0 {
        return 0.0;
    }
    let low = 4 * (PLANES - planes);
    let prefix = i32::from(stored >> low) - (OFFSET >> low);
    prefix as f32 * (1.0 / (1 << (4 * (planes - 1))) as f32) + CENTRE[planes]
}

/// Tokens of a tile, as bits: those that are set, from the lowest.
#[derive(Debug, Clone, Copy)]
pub struct Bits(pub u128);

impl Iterator for Bits {
    type Item = usize;

    #[inline(always)]
    fn next(&mut self) -> Option<usize> {
        let i = self.0.trailing_zeros() as usize;
        self.0 &= self.0.wrapping_sub(1);
        (i < TILE).then_some(i)
    }
}

/// Tokens `from..to` of a tile, as bits.
#[inline(always)]
pub fn range_bits(from: usize, to: usize) -> u128 {
    debug_assert!(from <= to && to <= TILE);
    let below = |n: usize| if n == TILE { u128::MAX } else { (1 << n) - 1 };
    below(to) & !below(from)
}
