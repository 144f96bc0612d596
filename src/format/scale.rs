//! Scale bytes. `u` stands for the binary32 with bits `(u << 21) + (95 << 23) + (1 << 20)`: 2^e times 1.125, 1.375,
//! 1.625 or 1.875. Exact, cheap to make, and never a power of two, so that f16 and bf16 inputs do not sit on rounding
//! ties, which would bias sums.

use super::{CODE_MAX, PEAK};
use crate::{Error, Result};

/// The scale that `byte` stands for, 2^-32 to 2^32.
#[inline(always)]
pub const fn scale(byte: u8) -> f32 {
    f32::from_bits(((byte as u32) << 21) + (95 << 23) + (1 << 20))
}

const INVERSE: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut u = 0;
    while u < 256 {
        table[u] = (4096.0 / scale(u as u8) as f64) as f32;
        u += 1;
    }
    table
};

const LIMIT: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut u = 0;
    while u < 256 {
        table[u] = (scale(u as u8) as f64 * (CODE_MAX as f64 / 4096.0)) as f32;
        u += 1;
    }
    table
};

/// Largest magnitude that can be stored at all.
pub const PEAK_LIMIT: f32 = LIMIT[255];

/// `4096 / scale(byte)`, rounded to binary32: what a value is multiplied with to get its code.
#[inline(always)]
pub fn inverse(byte: u8) -> f32 {
    INVERSE[byte as usize]
}

/// Smallest scale byte that holds `|x| <= peak`.
pub fn scale_byte(peak: f32) -> Result<u8> {
    if peak.is_nan() || peak > PEAK_LIMIT {
        return Err(Error::Range(format!("magnitude {peak:e} cannot be stored: expected at most {PEAK_LIMIT:e}")));
    }
    Ok(smallest(peak))
}

/// [`scale_byte`] of a peak that is known to fit. Guesses from the exponent, then steps to the exact place.
#[inline]
pub(super) fn smallest(peak: f32) -> u8 {
    let bits = (peak / PEAK).to_bits();
    let mut u = (bits >> 21).saturating_sub(95 << 2).min(255) as usize;
    while u < 255 && LIMIT[u] < peak {
        u += 1;
    }
    while u > 0 && LIMIT[u - 1] >= peak {
        u -= 1;
    }
    u as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smallest_byte_that_holds_the_peak() {
        let mut x = 1e-12f32;
        while x < PEAK_LIMIT {
            for peak in [x, x.next_up(), x.next_down()] {
                let byte = scale_byte(peak).unwrap();
                assert!(peak <= LIMIT[byte as usize]);
                assert!(byte == 0 || peak > LIMIT[byte as usize - 1]);
            }
            x *= 1.0371;
        }
        for u in 0..=255u8 {
            assert_eq!(scale_byte(LIMIT[u as usize]).unwrap(), u);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for bad in [PEAK_LIMIT.next_up(), f32::INFINITY, f32::NAN] {
            assert!(scale_byte(bad).is_err(), "{bad}");
        }
        assert_eq!(scale_byte(0.0).unwrap(), 0);
        assert_eq!(scale_byte(f32::from_bits(1)).unwrap(), 0);
    }
}
