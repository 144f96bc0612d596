//! Rows without what is no number.

use super::{Dtype, Rows};
use crate::{Error, Result};

/// A copy of rows in which NaN and infinity are 0, and where they were.
#[derive(Debug)]
pub struct Clean {
    /// Aligned for any element.
    words: Vec<u64>,
    n_heads: usize,
    dtype: Dtype,
    dim: usize,
    bad: Vec<(usize, usize)>,
}

impl Clean {
    /// Of the first `n` rows; None if they hold numbers only, as almost always.
    pub fn new(rows: &Rows, n: usize, n_heads: usize) -> Result<Option<Clean>> {
        let memory = || Error::Memory(format!("a copy of {n} rows without NaN"));
        let mut bad = Vec::new();
        for row in 0..n {
            for head in 0..n_heads {
                if !rows.peak(row, head).is_finite() {
                    bad.try_reserve(1).map_err(|_| memory())?;
                    bad.push((row, head));
                }
            }
        }
        if bad.is_empty() {
            return Ok(None);
        }
        let (dtype, dim) = (rows.dtype(), rows.dim());
        let bytes = dim * dtype.size();
        let mut words = Vec::new();
        // Heads are a multiple of 8 channels: of whole words.
        words.try_reserve_exact(n * n_heads * bytes / 8).map_err(|_| memory())?;
        for row in 0..n {
            for head in 0..n_heads {
                let source = rows.bytes(row, head).as_chunks::<8>().0;
                words.extend(source.iter().map(|word| without(u64::from_ne_bytes(*word), dtype)));
            }
        }
        Ok(Some(Clean { words, n_heads, dtype, dim, bad }))
    }

    /// The copy.
    pub fn rows(&self) -> Rows<'_> {
        let stride = (self.dim * self.dtype.size()) as isize;
        // SAFETY: as many words as rows and heads need, borrowed, and aligned for every dtype.
        unsafe { Rows::new(self.words.as_ptr().cast(), stride * self.n_heads as isize, stride, self.dtype, self.dim) }
    }

    /// Row and head of what was no number, in order.
    pub fn bad(&self) -> &[(usize, usize)] {
        &self.bad
    }
}

/// A word of elements, those with all bits of the exponent set made 0.
fn without(word: u64, dtype: Dtype) -> u64 {
    let (bits, exponent) = match dtype {
        Dtype::F32 => (32, 0x7f80_0000),
        Dtype::F16 => (16, 0x7c00),
        Dtype::Bf16 => (16, 0x7f80),
    };
    let mut clean = word;
    for at in (0..64).step_by(bits) {
        if word >> at & exponent == exponent {
            clean &= !(((1 << bits) - 1) << at);
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn only_what_is_no_number_goes() {
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
                let x = |i: usize| if [17, 40, 41].contains(&i) { bad } else { i as f32 * 0.25 - 3.0 };
                let bytes: Vec<u8> = (0..3 * 2 * 8)
                    .flat_map(|i| match dtype {
                        Dtype::F32 => x(i).to_ne_bytes().to_vec(),
                        Dtype::F16 => f16::from_f32(x(i)).to_ne_bytes().to_vec(),
                        Dtype::Bf16 => bf16::from_f32(x(i)).to_ne_bytes().to_vec(),
                    })
                    .collect();
                let words: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|bytes| u64::from_ne_bytes(*bytes)).collect();
                let stride = 8 * dtype.size() as isize;
                // SAFETY: three rows of two heads of 8.
                let rows = unsafe { Rows::new(words.as_ptr().cast(), 2 * stride, stride, dtype, 8) };
                assert!(Clean::new(&rows, 1, 2).unwrap().is_none());
                let clean = Clean::new(&rows, 3, 2).unwrap().unwrap();
                assert_eq!(clean.bad(), [(1, 0), (2, 1)]);
                for i in 0..48 {
                    let want = if x(i).is_finite() { x(i) } else { 0.0 };
                    assert_eq!(clean.rows().element(i / 16, i / 8 % 2, i % 8), want, "{dtype:?} {i}");
                }
            }
        }
    }
}
