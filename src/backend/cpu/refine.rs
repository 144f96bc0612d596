//! One further plane of listed K rows against rounded q: integer dot products as in the scan, but rows lie anywhere, so
//! lanes are channels.

use crate::format::{MAX_DIM, TILE};

/// `out[head][token]` = sum over channels of nibble * rounded q, of the tokens listed. `rows` starts at the plane of token
/// 0; tokens lie `stride` bytes apart, a plane has `half` bytes. `digits` = `[heads][2][2 * half]` of rounded q.
pub type Refine =
    unsafe fn(rows: &[u8], stride: usize, half: usize, tokens: &[u8], digits: &[i8], out: &mut [[i32; TILE]]);

fn check(rows: &[u8], stride: usize, half: usize, tokens: &[u8], digits: &[i8], out: &[[i32; TILE]]) {
    let last = tokens.iter().fold(0, |m, &t| if t > m { t } else { m });
    assert!(2 * half <= MAX_DIM && usize::from(last) < TILE && digits.len() == 4 * half * out.len());
    assert!(tokens.is_empty() || rows.len() >= usize::from(last) * stride + half);
}

/// Portable.
pub fn scalar(rows: &[u8], stride: usize, half: usize, tokens: &[u8], digits: &[i8], out: &mut [[i32; TILE]]) {
    check(rows, stride, half, tokens, digits, out);
    for token in tokens.iter().map(|&token| usize::from(token)) {
        let row = &rows[token * stride..][..half];
        for (digits, out) in digits.chunks_exact(4 * half).zip(out.iter_mut()) {
            let mut sums = [0i32; 2];
            for (sum, q) in sums.iter_mut().zip(digits.chunks_exact(2 * half)) {
                let (low, high) = q.split_at(half);
                for ((&byte, &l), &h) in row.iter().zip(low).zip(high) {
                    *sum += i32::from(byte & 15) * i32::from(l) + i32::from(byte >> 4) * i32::from(h);
                }
            }
            out[token] = (sums[0] << 8) + sums[1];
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{avx2, avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use std::arch::x86_64::*;

    /// Heads whose sums are folded at once.
    const HEADS: usize = 4;

    /// VNNI: 64 channels per instruction.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub fn avx512(rows: &[u8], stride: usize, half: usize, tokens: &[u8], digits: &[i8], out: &mut [[i32; TILE]]) {
        check(rows, stride, half, tokens, digits, out);
        for (digits, out) in digits.chunks(HEADS * 4 * half).zip(out.chunks_mut(HEADS)) {
            // SAFETY: `check` has bounded rows and tokens; parts 0..C cover `half` channels.
            unsafe {
                if half <= 64 {
                    avx512_block::<1>(rows, stride, half, tokens, digits, out);
                } else {
                    avx512_block::<2>(rows, stride, half, tokens, digits, out);
                }
            }
        }
    }

    /// Up to HEADS heads; a row in C parts of up to 64 bytes.
    ///
    /// # Safety
    /// As `check` asserts; `half` is at most 64 * C.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn avx512_block<const C: usize>(
        rows: &[u8],
        stride: usize,
        half: usize,
        tokens: &[u8],
        digits: &[i8],
        out: &mut [[i32; TILE]],
    ) {
        let nibbles = _mm512_set1_epi8(15);
        let mut lanes = [0u64; C];
        // By part, head, digit: q of the low and of the high nibbles. Heads that are not there are zeros.
        let mut q = [[[[_mm512_setzero_si512(); 2]; 2]; HEADS]; C];
        for c in 0..C {
            let count = (half - 64 * c).min(64);
            lanes[c] = if count == 64 { u64::MAX } else { (1 << count) - 1 };
            for (q, digits) in q[c].iter_mut().zip(digits.chunks_exact(4 * half)) {
                for (q, digits) in q.iter_mut().zip(digits.chunks_exact(2 * half)) {
                    // SAFETY: masked to `half` channels from the start and from the middle of the digits.
                    *q = unsafe {
                        [
                            _mm512_maskz_loadu_epi8(lanes[c], digits.as_ptr().add(64 * c)),
                            _mm512_maskz_loadu_epi8(lanes[c], digits.as_ptr().add(half + 64 * c)),
                        ]
                    };
                }
            }
        }
        for token in tokens.iter().map(|&token| usize::from(token)) {
            let mut sums = [[_mm512_setzero_si512(); 2]; HEADS];
            for c in 0..C {
                // SAFETY: masked to the row's `half` bytes, which lie within `rows`.
                let line =
                    unsafe { _mm512_maskz_loadu_epi8(lanes[c], rows.as_ptr().add(token * stride + 64 * c).cast()) };
                let low = _mm512_and_si512(line, nibbles);
                let high = _mm512_and_si512(_mm512_srli_epi16::<4>(line), nibbles);
                for (sums, q) in sums.iter_mut().zip(&q[c]) {
                    for (sum, [l, h]) in sums.iter_mut().zip(q) {
                        *sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(*sum, low, *l), high, *h);
                    }
                }
            }
            let [a, b, c, d] = sums.map(|[high, low]| _mm512_add_epi32(_mm512_slli_epi32::<8>(high), low));
            // Four sums at once: within quarters of the registers, then over them.
            let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            let all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
            let all = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64::<1>(all));
            let all = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256::<1>(all));
            let all = [
                _mm_cvtsi128_si32(all),
                _mm_extract_epi32::<1>(all),
                _mm_extract_epi32::<2>(all),
                _mm_extract_epi32::<3>(all),
            ];
            for (out, sum) in out.iter_mut().zip(all) {
                out[token] = sum;
            }
        }
    }

    /// Two products per 16-bit lane (at most 2 * 15 * 128: no saturation), then pairs of those.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn avx2(rows: &[u8], stride: usize, half: usize, tokens: &[u8], digits: &[i8], out: &mut [[i32; TILE]]) {
        check(rows, stride, half, tokens, digits, out);
        let (nibbles, ones) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
        let whole = half / 32 * 32;
        for token in tokens.iter().map(|&token| usize::from(token)) {
            let row = &rows[token * stride..][..half];
            for (digits, out) in digits.chunks_exact(4 * half).zip(out.iter_mut()) {
                let mut sums = [0i32; 2];
                for (sum, q) in sums.iter_mut().zip(digits.chunks_exact(2 * half)) {
                    let mut lanes = _mm256_setzero_si256();
                    let mut at = 0;
                    while at < whole {
                        // SAFETY: 32 bytes of the row and of either half of q.
                        let (line, l, h) = unsafe {
                            (
                                _mm256_loadu_si256(row.as_ptr().add(at).cast()),
                                _mm256_loadu_si256(q.as_ptr().add(at).cast()),
                                _mm256_loadu_si256(q.as_ptr().add(half + at).cast()),
                            )
                        };
                        let low = _mm256_and_si256(line, nibbles);
                        let high = _mm256_and_si256(_mm256_srli_epi16::<4>(line), nibbles);
                        let pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, l), _mm256_maddubs_epi16(high, h));
                        lanes = _mm256_add_epi32(lanes, _mm256_madd_epi16(pairs, ones));
                        at += 32;
                    }
                    let four = _mm_add_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256::<1>(lanes));
                    let two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
                    *sum = _mm_cvtsi128_si32(two) + _mm_extract_epi32::<1>(two);
                    for c in whole..half {
                        *sum +=
                            i32::from(row[c] & 15) * i32::from(q[c]) + i32::from(row[c] >> 4) * i32::from(q[half + c]);
                    }
                }
                out[token] = (sums[0] << 8) + sums[1];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_on_every_instruction_set() {
        let mut state = 3u64;
        let mut random = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as u32
        };
        let mut kernels: Vec<(&str, Refine)> = vec![("scalar", scalar)];
        #[cfg(target_arch = "x86_64")]
        {
            use crate::backend::cpu::Isa;
            if Isa::Avx2.available() {
                kernels.push(("avx2", avx2));
            }
            if Isa::Avx512.available() {
                kernels.push(("avx512", avx512));
            }
        }
        for d in (16..=256).step_by(8) {
            let half = d / 2;
            for heads in [1, 2, 3, 4, 5, 8, 9] {
                for planes in 1..=3 {
                    let extreme = random() % 4 == 0;
                    let stride = planes * half;
                    let rows: Vec<u8> =
                        (0..TILE * stride).map(|_| if extreme { 0xff } else { random() as u8 }).collect();
                    let digits: Vec<i8> =
                        (0..heads * 2 * d).map(|_| if extreme { -128 } else { random() as i8 }).collect();
                    let n = [1, 5, TILE][random() as usize % 3];
                    let tokens: Vec<u8> =
                        (0..n).map(|i| if n == TILE { i } else { random() as usize % TILE } as u8).collect();
                    let plane = random() as usize % planes;
                    for (name, kernel) in &kernels {
                        let mut got = vec![[i32::MIN; TILE]; heads];
                        // SAFETY: the kernel was found available.
                        unsafe { kernel(&rows[plane * half..], stride, half, &tokens, &digits, &mut got) };
                        for &token in &tokens {
                            for (h, digits) in digits.chunks_exact(2 * d).enumerate() {
                                let q = |c: usize| 256 * i64::from(digits[c]) + i64::from(digits[d + c]);
                                let want: i64 = (0..half)
                                    .map(|b| {
                                        let byte = rows[usize::from(token) * stride + plane * half + b];
                                        i64::from(byte & 15) * q(b) + i64::from(byte >> 4) * q(half + b)
                                    })
                                    .sum();
                                assert_eq!(
                                    i64::from(got[h][usize::from(token)]),
                                    want,
                                    "{name} d {d} head {h} token {token}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}
