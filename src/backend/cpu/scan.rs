//! Plane 0 of a tile against rounded q: integer dot products, exact, hence the same on every instruction set.
//!
//! Lanes are tokens: a word (4 channels of the low, 4 of the high nibbles) of 16 tokens is one cache line, and every
//! head multiplies it with 4 bytes of its own that all lanes share, so no sum crosses lanes.

use crate::format::TILE;
use crate::format::aligned::LANES;

/// `out[head][token]` = sum over channels of nibble * q. `k0` = plane 0 of a tile, `digits` = `[heads][2][2 * half]`: high
/// and low digits of rounded q.
/// Only the first `n_blocks` blocks of [`LANES`] tokens are computed. `next` = plane 0 of the tile that comes after, or
/// `k0` again: it is asked for on the way, as the processor's own prefetching ends with a page of memory.
pub type Scan = unsafe fn(k0: &[u8], next: &[u8], digits: &[i8], half: usize, n_blocks: usize, out: &mut [[i32; TILE]]);

fn check(k0: &[u8], digits: &[i8], half: usize, n_blocks: usize, heads: usize) {
    assert!(half.is_multiple_of(4) && n_blocks <= TILE / LANES);
    assert!(k0.len() >= n_blocks * LANES * half && digits.len() == heads * 4 * half);
}

/// Portable.
pub fn scalar(k0: &[u8], _: &[u8], digits: &[i8], half: usize, n_blocks: usize, out: &mut [[i32; TILE]]) {
    let heads = out.len();
    check(k0, digits, half, n_blocks, heads);
    for block in 0..n_blocks {
        let rows = &k0[block * LANES * half..(block + 1) * LANES * half];
        for (h, out) in out.iter_mut().enumerate() {
            let mut sums = [[0i32; LANES]; 2];
            for (w, line) in rows.chunks_exact(4 * LANES).enumerate() {
                let q = |digit: usize, c: usize| i32::from(digits[(2 * h + digit) * 2 * half + 4 * w + c]);
                for t in 0..LANES {
                    for j in 0..4 {
                        let byte = line[4 * t + j];
                        let (low, high) = (i32::from(byte & 15), i32::from(byte >> 4));
                        sums[0][t] += low * q(0, j) + high * q(0, half + j);
                        sums[1][t] += low * q(1, j) + high * q(1, half + j);
                    }
                }
            }
            for t in 0..LANES {
                out[block * LANES + t] = (sums[0][t] << 8) + sums[1][t];
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{avx2, avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use std::arch::x86_64::*;

    /// Channels `4 * w..` of q in one of the 4 parts of a head: high digits of the low and of the high nibbles' channels, low
    /// digits of the same.
    ///
    /// # Safety
    /// `4 * w + 4 <= half`, and `digits` has the head.
    #[inline(always)]
    unsafe fn quad(digits: &[i8], half: usize, head: usize, part: usize, w: usize) -> i32 {
        // SAFETY: the contract.
        unsafe { digits.as_ptr().add((4 * head + part) * half + 4 * w).cast::<i32>().read_unaligned() }
    }

    /// VNNI: 4 products and their sum per lane and instruction.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub fn avx512(k0: &[u8], next: &[u8], digits: &[i8], half: usize, n_blocks: usize, out: &mut [[i32; TILE]]) {
        let heads = out.len();
        check(k0, digits, half, n_blocks, heads);
        // As many accumulators as hide the latency of vpdpbusd, and fit in registers.
        let mut h = 0;
        while h < heads {
            let out = &mut out[h..];
            // SAFETY: `check` has bounded all reads; `out` has at least the heads of the block.
            unsafe {
                match out.len() {
                    1 => avx512_block::<1, 4>(k0, if h == 0 { next } else { k0 }, digits, half, n_blocks, h, out),
                    2 | 3 => avx512_block::<2, 4>(k0, if h == 0 { next } else { k0 }, digits, half, n_blocks, h, out),
                    4..8 => avx512_block::<4, 2>(k0, if h == 0 { next } else { k0 }, digits, half, n_blocks, h, out),
                    _ => avx512_block::<8, 1>(k0, if h == 0 { next } else { k0 }, digits, half, n_blocks, h, out),
                }
            }
            h += match out.len() {
                1 => 1,
                2 | 3 => 2,
                4..8 => 4,
                _ => 8,
            };
        }
    }

    /// `H` heads from `first` on, `B` blocks of tokens at a time.
    ///
    /// # Safety
    /// As `check` asserts; `out` has at least `H` heads.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn avx512_block<const H: usize, const B: usize>(
        k0: &[u8],
        next: &[u8],
        digits: &[i8],
        half: usize,
        n_blocks: usize,
        first: usize,
        out: &mut [[i32; TILE]],
    ) {
        let nibbles = _mm512_set1_epi8(15);
        let block_bytes = LANES * half;
        let mut block = 0;
        while block < n_blocks {
            let mut sums = [[[_mm512_setzero_si512(); 2]; B]; H];
            for w in 0..half / 4 {
                let mut low = [_mm512_setzero_si512(); B];
                let mut high = [_mm512_setzero_si512(); B];
                for b in 0..B {
                    // The last round may pass the end of the blocks: it reads the last one again.
                    let at = (block + b).min(n_blocks - 1) * block_bytes + w * 64;
                    // SAFETY: 64 bytes of word w of a block below n_blocks.
                    let line = unsafe { _mm512_loadu_si512(k0.as_ptr().add(at).cast()) };
                    // A prefetch is a hint: any address will do.
                    _mm_prefetch::<_MM_HINT_T0>(next.as_ptr().wrapping_add(at).cast());
                    low[b] = _mm512_and_si512(line, nibbles);
                    high[b] = _mm512_and_si512(_mm512_srli_epi16::<4>(line), nibbles);
                }
                for h in 0..H {
                    // SAFETY: 4 channels of a part of head first + h.
                    let q = |part: usize| unsafe { _mm512_set1_epi32(quad(digits, half, first + h, part, w)) };
                    for b in 0..B {
                        sums[h][b][0] = _mm512_dpbusd_epi32(sums[h][b][0], low[b], q(0));
                        sums[h][b][1] = _mm512_dpbusd_epi32(sums[h][b][1], low[b], q(2));
                        sums[h][b][0] = _mm512_dpbusd_epi32(sums[h][b][0], high[b], q(1));
                        sums[h][b][1] = _mm512_dpbusd_epi32(sums[h][b][1], high[b], q(3));
                    }
                }
            }
            for h in 0..H {
                for b in 0..B.min(n_blocks - block) {
                    let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(sums[h][b][0]), sums[h][b][1]);
                    // SAFETY: 16 lanes at (block + b) * 16 < TILE.
                    unsafe { _mm512_storeu_si512(out[h].as_mut_ptr().add((block + b) * LANES).cast(), sum) };
                }
            }
            block += B;
        }
    }

    /// Two products per 16-bit lane (at most 2 * 15 * 128: no saturation), then pairs of those.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn avx2(k0: &[u8], next: &[u8], digits: &[i8], half: usize, n_blocks: usize, out: &mut [[i32; TILE]]) {
        let heads = out.len();
        check(k0, digits, half, n_blocks, heads);
        let mut h = 0;
        while h < heads {
            // SAFETY: as in `avx512`.
            unsafe {
                if heads - h >= 2 {
                    avx2_block::<2>(k0, if h == 0 { next } else { k0 }, digits, half, n_blocks, h, &mut out[h..]);
                } else {
                    avx2_block::<1>(k0, if h == 0 { next } else { k0 }, digits, half, n_blocks, h, &mut out[h..]);
                }
            }
            h += if heads - h >= 2 { 2 } else { 1 };
        }
    }

    /// `H` heads from `first` on, 8 tokens at a time.
    ///
    /// # Safety
    /// As `check` asserts; `out` has at least `H` heads.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn avx2_block<const H: usize>(
        k0: &[u8],
        next: &[u8],
        digits: &[i8],
        half: usize,
        n_blocks: usize,
        first: usize,
        out: &mut [[i32; TILE]],
    ) {
        let (nibbles, ones) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
        for part in 0..2 * n_blocks {
            let start = part / 2 * LANES * half + part % 2 * 32;
            let mut sums = [[_mm256_setzero_si256(); 2]; H];
            for w in 0..half / 4 {
                // SAFETY: 32 bytes of word w of a block below n_blocks.
                let line = unsafe { _mm256_loadu_si256(k0.as_ptr().add(start + w * 64).cast()) };
                if part % 2 == 0 {
                    _mm_prefetch::<_MM_HINT_T0>(next.as_ptr().wrapping_add(start + w * 64).cast());
                }
                let low = _mm256_and_si256(line, nibbles);
                let high = _mm256_and_si256(_mm256_srli_epi16::<4>(line), nibbles);
                for (h, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: 4 channels of a part of head first + h.
                    let q = |part: usize| unsafe { _mm256_set1_epi32(quad(digits, half, first + h, part, w)) };
                    for (i, sum) in sums.iter_mut().enumerate() {
                        let pairs = _mm256_add_epi16(
                            _mm256_maddubs_epi16(low, q(2 * i)),
                            _mm256_maddubs_epi16(high, q(2 * i + 1)),
                        );
                        *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
                    }
                }
            }
            for h in 0..H {
                let sum = _mm256_add_epi32(_mm256_slli_epi32::<8>(sums[h][0]), sums[h][1]);
                // SAFETY: 8 lanes at part * 8 < TILE.
                unsafe { _mm256_storeu_si256(out[h].as_mut_ptr().add(part * 8).cast(), sum) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel by name, if this machine has it.
    fn kernels() -> Vec<(&'static str, Scan)> {
        let mut kernels: Vec<(&'static str, Scan)> = vec![("scalar", scalar)];
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
        kernels
    }

    #[test]
    fn exact_on_every_instruction_set() {
        let mut state = 1u64;
        let mut random = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as u32
        };
        for d in (16..=256).step_by(8) {
            let half = d / 2;
            for heads in [1, 2, 3, 4, 5, 7, 8, 9, 16, 17] {
                let extreme = random() % 4 == 0;
                let k0: Vec<u8> = (0..TILE * half).map(|_| if extreme { 0xff } else { random() as u8 }).collect();
                let digits: Vec<i8> = (0..heads * 2 * d).map(|_| if extreme { -128 } else { random() as i8 }).collect();
                for n_blocks in [1, 2, 3, 7, 8] {
                    // Straight from the definition.
                    let mut want = vec![[0i64; TILE]; heads];
                    for (h, want) in want.iter_mut().enumerate() {
                        for (i, want) in want[..n_blocks * LANES].iter_mut().enumerate() {
                            for b in 0..half {
                                let byte = k0[i / LANES * LANES * half + b / 4 * 64 + i % LANES * 4 + b % 4];
                                let at = h * 2 * d + b;
                                let q = |nibble: usize| {
                                    let at = at + nibble * half;
                                    256 * i64::from(digits[at]) + i64::from(digits[at + d])
                                };
                                *want += i64::from(byte & 15) * q(0) + i64::from(byte >> 4) * q(1);
                            }
                        }
                    }
                    for (name, kernel) in kernels() {
                        let mut got = vec![[i32::MIN; TILE]; heads];
                        // SAFETY: the kernel was found available.
                        unsafe { kernel(&k0, &k0, &digits, half, n_blocks, &mut got) };
                        for h in 0..heads {
                            for i in 0..n_blocks * LANES {
                                assert_eq!(i64::from(got[h][i]), want[h][i], "{name} d {d} head {h} token {i}");
                            }
                        }
                    }
                }
            }
        }
    }
}
