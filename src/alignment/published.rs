//! The criterion of AlignedKV as published (arXiv 2409.16546 and its public code): bits of K per channel from the
//! exponents of q and of the channel's largest |k|, bits of V per token from the score's exponent against the expected
//! output exponent. Everything is f16.

use half::f16;

/// Strided groups whose largest scores stand for the output in the choice for V.
pub const GROUPS: usize = 32;

/// Biased exponent of an f16.
pub fn exponent(bits: u16) -> i32 {
    i32::from(bits >> 10) & 31
}

/// Bits to read (8, 12, 16) of the K channels; `peak_k` = f16 bits of the channels' largest |k| over the context.
pub fn key_bits(q: &[f32], peak_k: &[u16], bits: &mut [u8]) {
    let e = |c: usize| exponent(f16::from_f32(q[c]).to_bits()) + exponent(peak_k[c]);
    let most = (0..q.len()).map(e).max().unwrap_or(0);
    for (c, b) in bits.iter_mut().enumerate() {
        let gap = most - e(c);
        *b = if gap >= 8 {
            8
        } else if gap >= 4 {
            12
        } else {
            16
        };
    }
}

/// Exponent, shifted to its place, that the V of a token is aligned to; `probe` = per channel, sum over the groups of
/// largest score times |v to 8 bits|; `peak_v` = f16 bits of the channels' largest |v|.
pub fn alignment(probe: &[f32], peak_v: &[u16]) -> i32 {
    let channel = |(x, &v): (&f32, &u16)| exponent(f16::from_f32(*x).to_bits()) - 1 + 15 - exponent(v);
    probe.iter().zip(peak_v).map(channel).min().unwrap_or(0) << 10
}

/// Bits to read (8, 12, 16) of the V of a token with weight `p`.
pub fn value_bits(alignment: i32, p: f16) -> u8 {
    let gap = alignment - i32::from(p.to_bits() as i16);
    if gap >= 0x800 {
        8
    } else if gap >= 0x400 {
        12
    } else {
        16
    }
}
