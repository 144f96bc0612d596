//! Sixteen lanes of binary32 (or of i32 on their way there), per instruction set. The operations and their order are the
//! same everywhere, and what is fused in one is fused in all, so results are the same bits.
//!
//! Everything is inlined into functions that enable the instruction set (`super::kernels`); called from anywhere else
//! it would still be right, only slow. Closures that `core` calls are elsewhere: kernels loop.

use half::{bf16, f16};

/// Lanes of a vector.
pub const LANES: usize = 16;

/// Sixteen f32.
///
/// # Safety
/// Implementations may use instructions that the machine lacks: only code that was entered through the kernels of an
/// available instruction set may name them. That is what makes their (safe) methods sound.
pub unsafe trait Simd: Copy {
    /// Registers for 16 sums and what is added to them. (Without: for 4.)
    const WIDE: bool;
    /// Runs it, compiled for this instruction set.
    fn enter(kernel: impl Kernel);
    fn splat(x: f32) -> Self;
    fn load(x: &[f32; LANES]) -> Self;
    fn store(self, x: &mut [f32; LANES]);
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    /// `self * a + b`, rounded once.
    fn fma(self, a: Self, b: Self) -> Self;
    /// Larger of each lane; `other`'s if `self`'s is NaN.
    fn max(self, other: Self) -> Self;
    fn abs(self) -> Self;
    fn div(self, other: Self) -> Self;
    /// Entries of a table; lanes are their indices.
    fn pick(self, table: &[f32; 8]) -> Self;
    /// Lanes whose bit is set, of the others `other`.
    fn keep(self, bits: u16, other: Self) -> Self;
    /// `self` where `x > limit`, 0 elsewhere.
    fn where_above(self, x: Self, limit: Self) -> Self;
    /// Bit l is set where lane l is above the limit.
    fn above(self, limit: f32) -> u16;
    /// Sum of the lanes, as a tree: halves are added until one is left.
    fn sum(self) -> f32;
    /// Largest of the lanes, none of which is NaN.
    fn most(self) -> f32;
    /// The bits of each lane, moved left by 23.
    fn shift_to_exponent(self) -> Self;
    fn from_i32(x: &[i32; LANES]) -> Self;
    /// The scales of scale bytes.
    fn scales(bytes: &[u8; LANES]) -> Self;
    /// The signed digits of `N` planes as numbers in units of the first one's, exact: those of the low nibbles, and of the
    /// high ones.
    ///
    /// # Safety
    /// [`LANES`] bytes are readable at `planes + p * stride` for p < N.
    unsafe fn digits<const N: usize>(planes: *const u8, stride: usize) -> (Self, Self);
    fn from_f16(x: &[f16; LANES]) -> Self;
    fn from_bf16(x: &[bf16; LANES]) -> Self;
    /// Lane i is what `fold` makes of the lanes of vector i: those 8 apart first, then 4, 2 and 1.
    fn fold_rows(x: &[Self; LANES], fold: impl Fn(Self, Self) -> Self) -> Self;
    /// Lane i of vector j is lane j of vector i.
    fn transpose(x: &[Self; LANES]) -> [Self; LANES];
}

/// A loop that is compiled by itself, so that all registers are its own.
pub trait Kernel {
    /// Always inlined.
    fn run<S: Simd>(self);
}

/// Asks for the cache line of an address, which need not be one.
#[inline(always)]
pub fn prefetch(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, that every x86_64 has and that no address makes fail.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Portable: the definition.
#[derive(Clone, Copy)]
pub struct Scalar([f32; LANES]);

impl Scalar {
    #[inline(always)]
    fn map(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Scalar(std::array::from_fn(|l| f(self.0[l], other.0[l])))
    }
}

// SAFETY: no instructions beyond the target's.
unsafe impl Simd for Scalar {
    const WIDE: bool = false;
    #[inline(never)]
    fn enter(kernel: impl Kernel) {
        kernel.run::<Self>();
    }
    #[inline(always)]
    fn splat(x: f32) -> Self {
        Scalar([x; LANES])
    }
    #[inline(always)]
    fn load(x: &[f32; LANES]) -> Self {
        Scalar(*x)
    }
    #[inline(always)]
    fn store(self, x: &mut [f32; LANES]) {
        *x = self.0;
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.map(other, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.map(other, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.map(other, |a, b| a * b)
    }
    #[inline(always)]
    fn fma(self, a: Self, b: Self) -> Self {
        Scalar(std::array::from_fn(|l| self.0[l].mul_add(a.0[l], b.0[l])))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.map(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn abs(self) -> Self {
        Scalar(self.0.map(f32::abs))
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.map(other, |a, b| a / b)
    }
    #[inline(always)]
    fn pick(self, table: &[f32; 8]) -> Self {
        Scalar(self.0.map(|x| table[x as usize & 7]))
    }
    #[inline(always)]
    fn keep(self, bits: u16, other: Self) -> Self {
        Scalar(std::array::from_fn(|l| if bits >> l & 1 == 1 { self.0[l] } else { other.0[l] }))
    }
    #[inline(always)]
    fn where_above(self, x: Self, limit: Self) -> Self {
        Scalar(std::array::from_fn(|l| if x.0[l] > limit.0[l] { self.0[l] } else { 0.0 }))
    }
    #[inline(always)]
    fn above(self, limit: f32) -> u16 {
        self.0.iter().enumerate().fold(0, |bits, (l, &x)| bits | u16::from(x > limit) << l)
    }
    #[inline(always)]
    fn sum(mut self) -> f32 {
        for width in [8, 4, 2, 1] {
            for i in 0..width {
                self.0[i] += self.0[i + width];
            }
        }
        self.0[0]
    }
    #[inline(always)]
    fn most(self) -> f32 {
        self.0.iter().fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m })
    }
    #[inline(always)]
    fn shift_to_exponent(self) -> Self {
        Scalar(self.0.map(|x| f32::from_bits(x.to_bits() << 23)))
    }
    #[inline(always)]
    fn from_i32(x: &[i32; LANES]) -> Self {
        Scalar(x.map(|x| x as f32))
    }
    #[inline(always)]
    fn scales(bytes: &[u8; LANES]) -> Self {
        Scalar(bytes.map(crate::format::scale))
    }
    #[inline(always)]
    unsafe fn digits<const N: usize>(planes: *const u8, stride: usize) -> (Self, Self) {
        let (mut low, mut high) = ([0i32; LANES], [0i32; LANES]);
        for p in 0..N {
            // SAFETY: the contract.
            let plane = unsafe { &*planes.add(p * stride).cast::<[u8; LANES]>() };
            for l in 0..LANES {
                low[l] = low[l] << 4 | i32::from(plane[l] & 15);
                high[l] = high[l] << 4 | i32::from(plane[l] >> 4);
            }
        }
        let value = |x: i32| (x - offset::<N>()) as f32 * unit::<N>();
        (Scalar(low.map(value)), Scalar(high.map(value)))
    }
    #[inline(always)]
    fn from_f16(x: &[f16; LANES]) -> Self {
        Scalar(x.map(f16::to_f32))
    }
    #[inline(always)]
    fn from_bf16(x: &[bf16; LANES]) -> Self {
        Scalar(x.map(bf16::to_f32))
    }
    #[inline(always)]
    fn fold_rows(x: &[Self; LANES], fold: impl Fn(Self, Self) -> Self) -> Self {
        let mut rows = *x;
        for width in [8, 4, 2, 1] {
            rows = rows.map(|row| fold(row, Scalar(std::array::from_fn(|l| row.0[(l + width) % LANES]))));
        }
        Scalar(rows.map(|row| row.0[0]))
    }
    #[inline(always)]
    fn transpose(x: &[Self; LANES]) -> [Self; LANES] {
        std::array::from_fn(|j| Scalar(std::array::from_fn(|i| x[i].0[j])))
    }
}

/// What the nibbles of `N` digits of 0 make.
const fn offset<const N: usize>() -> i32 {
    0x8888 >> (16 - 4 * N)
}

/// Weight of the last of `N` digits.
const fn unit<const N: usize>() -> f32 {
    1.0 / (1u32 << (4 * (N - 1))) as f32
}

/// Values of nibbles as digits, by plane.
#[cfg(target_arch = "x86_64")]
const DIGITS: [[f32; 16]; 4] = {
    let (mut table, mut p) = ([[0.0; 16]; 4], 0);
    while p < 4 {
        let mut nibble = 0;
        while nibble < 16 {
            table[p][nibble] = (nibble as f32 - 8.0) / (1u32 << (4 * p)) as f32;
            nibble += 1;
        }
        p += 1;
    }
    table
};

/// Bits of a scale: `(byte << 21) + SCALE_BITS` (see `format::scale`).
#[cfg(target_arch = "x86_64")]
const SCALE_BITS: i32 = (95 << 23) + (1 << 20);

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{DIGITS, Kernel, LANES, SCALE_BITS, Simd, bf16, f16, offset, unit};
    use std::arch::x86_64::*;

    /// Sum of 8 lanes.
    #[inline(always)]
    unsafe fn sum8(x: __m256) -> f32 {
        // SAFETY: see the impls.
        unsafe {
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }

    /// Largest of 8 lanes.
    #[inline(always)]
    unsafe fn most8(x: __m256) -> f32 {
        // SAFETY: see the impls.
        unsafe {
            let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        }
    }

    /// Two halves.
    #[derive(Clone, Copy)]
    pub struct Avx2(__m256, __m256);

    // SAFETY: named only by the kernels of AVX2 (the trait's rule); loads and stores are of whole arrays.
    unsafe impl Simd for Avx2 {
        const WIDE: bool = false;
        #[inline(always)]
        fn enter(kernel: impl Kernel) {
            #[inline(never)]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn compiled(kernel: impl Kernel) {
                kernel.run::<Avx2>();
            }
            // SAFETY: see the impl.
            unsafe { compiled(kernel) }
        }
        #[inline(always)]
        fn splat(x: f32) -> Self {
            // SAFETY: see the impl.
            unsafe { Avx2(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
        }
        #[inline(always)]
        fn load(x: &[f32; LANES]) -> Self {
            // SAFETY: see the impl.
            unsafe { Avx2(_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))) }
        }
        #[inline(always)]
        fn store(self, x: &mut [f32; LANES]) {
            // SAFETY: see the impl.
            unsafe {
                _mm256_storeu_ps(x.as_mut_ptr(), self.0);
                _mm256_storeu_ps(x.as_mut_ptr().add(8), self.1);
            }
        }
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            // SAFETY: see the impl.
            unsafe { Avx2(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
        }
        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            // SAFETY: see the impl.
            unsafe { Avx2(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)) }
        }
        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            // SAFETY: see the impl.
            unsafe { Avx2(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
        }
        #[inline(always)]
        fn fma(self, a: Self, b: Self) -> Self {
            // SAFETY: see the impl.
            unsafe { Avx2(_mm256_fmadd_ps(self.0, a.0, b.0), _mm256_fmadd_ps(self.1, a.1, b.1)) }
        }
        #[inline(always)]
        fn max(self, other: Self) -> Self {
            // SAFETY: see the impl.
            unsafe { Avx2(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1)) }
        }
        #[inline(always)]
        fn abs(self) -> Self {
            // SAFETY: see the impl.
            unsafe {
                let sign = _mm256_set1_ps(-0.0);
                Avx2(_mm256_andnot_ps(sign, self.0), _mm256_andnot_ps(sign, self.1))
            }
        }
        #[inline(always)]
        fn div(self, other: Self) -> Self {
            // SAFETY: see the impl.
            unsafe { Avx2(_mm256_div_ps(self.0, other.0), _mm256_div_ps(self.1, other.1)) }
        }
        #[inline(always)]
        fn pick(self, table: &[f32; 8]) -> Self {
            // SAFETY: see the impl.
            unsafe {
                let table = _mm256_loadu_ps(table.as_ptr());
                Avx2(
                    _mm256_permutevar8x32_ps(table, _mm256_cvtps_epi32(self.0)),
                    _mm256_permutevar8x32_ps(table, _mm256_cvtps_epi32(self.1)),
                )
            }
        }
        #[inline(always)]
        fn keep(self, bits: u16, other: Self) -> Self {
            // SAFETY: see the impl.
            unsafe {
                let lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
                let set = |bits: u16| {
                    let bits = _mm256_and_si256(_mm256_set1_epi32(i32::from(bits)), lanes);
                    _mm256_castsi256_ps(_mm256_cmpeq_epi32(bits, lanes))
                };
                let (low, high) = (set(bits & 0xff), set(bits >> 8));
                Avx2(_mm256_blendv_ps(other.0, self.0, low), _mm256_blendv_ps(other.1, self.1, high))
            }
        }
        #[inline(always)]
        fn where_above(self, x: Self, limit: Self) -> Self {
            // SAFETY: see the impl.
            unsafe {
                Avx2(
                    _mm256_and_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(x.0, limit.0), self.0),
                    _mm256_and_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(x.1, limit.1), self.1),
                )
            }
        }
        #[inline(always)]
        fn above(self, limit: f32) -> u16 {
            // SAFETY: see the impl.
            unsafe {
                let limit = _mm256_set1_ps(limit);
                let low = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(self.0, limit));
                let high = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(self.1, limit));
                (low | high << 8) as u16
            }
        }
        #[inline(always)]
        fn sum(self) -> f32 {
            // SAFETY: see the impl.
            unsafe { sum8(_mm256_add_ps(self.0, self.1)) }
        }
        #[inline(always)]
        fn most(self) -> f32 {
            // SAFETY: see the impl.
            unsafe { most8(_mm256_max_ps(self.0, self.1)) }
        }
        #[inline(always)]
        fn shift_to_exponent(self) -> Self {
            // SAFETY: see the impl.
            unsafe {
                let (low, high) = (_mm256_castps_si256(self.0), _mm256_castps_si256(self.1));
                let (low, high) = (_mm256_slli_epi32::<23>(low), _mm256_slli_epi32::<23>(high));
                Avx2(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high))
            }
        }
        #[inline(always)]
        fn from_i32(x: &[i32; LANES]) -> Self {
            // SAFETY: see the impl.
            unsafe {
                let (low, high) = (x.as_ptr().cast(), x.as_ptr().add(8).cast());
                Avx2(_mm256_cvtepi32_ps(_mm256_loadu_si256(low)), _mm256_cvtepi32_ps(_mm256_loadu_si256(high)))
            }
        }
        #[inline(always)]
        fn scales(bytes: &[u8; LANES]) -> Self {
            // SAFETY: see the impl.
            unsafe {
                let mut halves = [_mm256_setzero_ps(); 2];
                for (i, half) in halves.iter_mut().enumerate() {
                    let u = _mm256_cvtepu8_epi32(_mm_loadl_epi64(bytes.as_ptr().add(8 * i).cast()));
                    let bits = _mm256_add_epi32(_mm256_slli_epi32::<21>(u), _mm256_set1_epi32(SCALE_BITS));
                    *half = _mm256_castsi256_ps(bits);
                }
                Avx2(halves[0], halves[1])
            }
        }
        #[inline(always)]
        unsafe fn digits<const N: usize>(planes: *const u8, stride: usize) -> (Self, Self) {
            // SAFETY: see the impl; the contract.
            unsafe {
                let mut halves = [(_mm256_setzero_ps(), _mm256_setzero_ps()); 2];
                for (i, half) in halves.iter_mut().enumerate() {
                    let (mut low, mut high) = (_mm256_setzero_si256(), _mm256_setzero_si256());
                    for p in 0..N {
                        let x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(planes.add(p * stride + 8 * i).cast()));
                        low = _mm256_or_si256(_mm256_slli_epi32::<4>(low), _mm256_and_si256(x, _mm256_set1_epi32(15)));
                        high = _mm256_or_si256(_mm256_slli_epi32::<4>(high), _mm256_srli_epi32::<4>(x));
                    }
                    let (offset, unit) = (_mm256_set1_epi32(offset::<N>()), _mm256_set1_ps(unit::<N>()));
                    let value = |x| _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(x, offset)), unit);
                    *half = (value(low), value(high));
                }
                (Avx2(halves[0].0, halves[1].0), Avx2(halves[0].1, halves[1].1))
            }
        }
        #[inline(always)]
        fn from_f16(x: &[f16; LANES]) -> Self {
            // SAFETY: see the impl.
            unsafe {
                let (low, high) = (x.as_ptr().cast(), x.as_ptr().add(8).cast());
                Avx2(_mm256_cvtph_ps(_mm_loadu_si128(low)), _mm256_cvtph_ps(_mm_loadu_si128(high)))
            }
        }
        #[inline(always)]
        fn from_bf16(x: &[bf16; LANES]) -> Self {
            // SAFETY: see the impl.
            unsafe {
                let (low, high) = (x.as_ptr().cast(), x.as_ptr().add(8).cast());
                let low = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(low)));
                let high = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(high)));
                Avx2(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high))
            }
        }
        #[inline(always)]
        fn fold_rows(x: &[Self; LANES], fold: impl Fn(Self, Self) -> Self) -> Self {
            // SAFETY: see the impl.
            unsafe {
                let mut groups = [x[0]; 4];
                for e in 0..4 {
                    // Rows e, 4 + e, 8 + e, 12 + e: one 128-bit part each in the end.
                    let [p, q, r, s] = [x[e], x[4 + e], x[8 + e], x[12 + e]];
                    let a = fold(Avx2(p.0, q.0), Avx2(p.1, q.1));
                    let b = fold(Avx2(r.0, s.0), Avx2(r.1, s.1));
                    groups[e] = fold(
                        Avx2(_mm256_permute2f128_ps::<0x20>(a.0, a.1), _mm256_permute2f128_ps::<0x20>(b.0, b.1)),
                        Avx2(_mm256_permute2f128_ps::<0x31>(a.0, a.1), _mm256_permute2f128_ps::<0x31>(b.0, b.1)),
                    );
                }
                let [p, q, r, s] = groups;
                let a = fold(
                    Avx2(_mm256_shuffle_ps::<0x44>(p.0, q.0), _mm256_shuffle_ps::<0x44>(p.1, q.1)),
                    Avx2(_mm256_shuffle_ps::<0xee>(p.0, q.0), _mm256_shuffle_ps::<0xee>(p.1, q.1)),
                );
                let b = fold(
                    Avx2(_mm256_shuffle_ps::<0x44>(r.0, s.0), _mm256_shuffle_ps::<0x44>(r.1, s.1)),
                    Avx2(_mm256_shuffle_ps::<0xee>(r.0, s.0), _mm256_shuffle_ps::<0xee>(r.1, s.1)),
                );
                fold(
                    Avx2(_mm256_shuffle_ps::<0x88>(a.0, b.0), _mm256_shuffle_ps::<0x88>(a.1, b.1)),
                    Avx2(_mm256_shuffle_ps::<0xdd>(a.0, b.0), _mm256_shuffle_ps::<0xdd>(a.1, b.1)),
                )
            }
        }
        #[inline(always)]
        fn transpose(x: &[Self; LANES]) -> [Self; LANES] {
            // SAFETY: see the impl.
            unsafe {
                let mut out = *x;
                for h in 0..2 {
                    // Four rows each; channel 4 j + c of this half of them is part j of number c.
                    let mut quarters = [[_mm256_setzero_ps(); 4]; 4];
                    for g in 0..4 {
                        let mut rows = [_mm256_setzero_ps(); 4];
                        for i in 0..4 {
                            rows[i] = if h == 0 { x[4 * g + i].0 } else { x[4 * g + i].1 };
                        }
                        let [p, q, r, s] = rows;
                        let (a, b) = (_mm256_unpacklo_ps(p, q), _mm256_unpackhi_ps(p, q));
                        let (c, d) = (_mm256_unpacklo_ps(r, s), _mm256_unpackhi_ps(r, s));
                        quarters[g] = [
                            _mm256_shuffle_ps::<0x44>(a, c),
                            _mm256_shuffle_ps::<0xee>(a, c),
                            _mm256_shuffle_ps::<0x44>(b, d),
                            _mm256_shuffle_ps::<0xee>(b, d),
                        ];
                    }
                    let [p, q, r, s] = quarters;
                    for c in 0..4 {
                        out[8 * h + c] = Avx2(
                            _mm256_permute2f128_ps::<0x20>(p[c], q[c]),
                            _mm256_permute2f128_ps::<0x20>(r[c], s[c]),
                        );
                        out[8 * h + 4 + c] = Avx2(
                            _mm256_permute2f128_ps::<0x31>(p[c], q[c]),
                            _mm256_permute2f128_ps::<0x31>(r[c], s[c]),
                        );
                    }
                }
                out
            }
        }
    }

    /// Lanes 8 to 15.
    #[inline(always)]
    unsafe fn upper(x: __m512) -> __m256 {
        // SAFETY: see the impls.
        unsafe { _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(x))) }
    }

    /// One register.
    #[derive(Clone, Copy)]
    pub struct Avx512(__m512);

    // SAFETY: named only by the kernels of AVX-512 (the trait's rule); loads and stores are of whole arrays.
    unsafe impl Simd for Avx512 {
        const WIDE: bool = true;
        #[inline(always)]
        fn enter(kernel: impl Kernel) {
            #[inline(never)]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
            fn compiled(kernel: impl Kernel) {
                kernel.run::<Avx512>();
            }
            // SAFETY: see the impl.
            unsafe { compiled(kernel) }
        }
        #[inline(always)]
        fn splat(x: f32) -> Self {
            // SAFETY: see the impl.
            unsafe { Avx512(_mm512_set1_ps(x)) }
        }
        #[inline(always)]
        fn load(x: &[f32; LANES]) -> Self {
            // SAFETY: see the impl.
            unsafe { Avx512(_mm512_loadu_ps(x.as_ptr())) }
        }
        #[inline(always)]
        fn store(self, x: &mut [f32; LANES]) {
            // SAFETY: see the impl.
            unsafe { _mm512_storeu_ps(x.as_mut_ptr(), self.0) }
        }
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            // SAFETY: see the impl.
            unsafe { Avx512(_mm512_add_ps(self.0, other.0)) }
        }
        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            // SAFETY: see the impl.
            unsafe { Avx512(_mm512_sub_ps(self.0, other.0)) }
        }
        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            // SAFETY: see the impl.
            unsafe { Avx512(_mm512_mul_ps(self.0, other.0)) }
        }
        #[inline(always)]
        fn fma(self, a: Self, b: Self) -> Self {
            // SAFETY: see the impl.
            unsafe { Avx512(_mm512_fmadd_ps(self.0, a.0, b.0)) }
        }
        #[inline(always)]
        fn max(self, other: Self) -> Self {
            // SAFETY: see the impl.
            unsafe { Avx512(_mm512_max_ps(self.0, other.0)) }
        }
        #[inline(always)]
        fn abs(self) -> Self {
            // SAFETY: see the impl.
            unsafe { Avx512(_mm512_abs_ps(self.0)) }
        }
        #[inline(always)]
        fn div(self, other: Self) -> Self {
            // SAFETY: see the impl.
            unsafe { Avx512(_mm512_div_ps(self.0, other.0)) }
        }
        #[inline(always)]
        fn pick(self, table: &[f32; 8]) -> Self {
            // SAFETY: see the impl.
            unsafe {
                // Its upper half is not looked at: indices are below 8.
                let table = _mm512_castps256_ps512(_mm256_loadu_ps(table.as_ptr()));
                Avx512(_mm512_permutexvar_ps(_mm512_cvtps_epi32(self.0), table))
            }
        }
        #[inline(always)]
        fn keep(self, bits: u16, other: Self) -> Self {
            // SAFETY: see the impl.
            unsafe { Avx512(_mm512_mask_blend_ps(bits, other.0, self.0)) }
        }
        #[inline(always)]
        fn where_above(self, x: Self, limit: Self) -> Self {
            // SAFETY: see the impl.
            unsafe { Avx512(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(x.0, limit.0), self.0)) }
        }
        #[inline(always)]
        fn above(self, limit: f32) -> u16 {
            // SAFETY: see the impl.
            unsafe { _mm512_cmp_ps_mask::<_CMP_GT_OQ>(self.0, _mm512_set1_ps(limit)) }
        }
        #[inline(always)]
        fn sum(self) -> f32 {
            // SAFETY: see the impl.
            unsafe { sum8(_mm256_add_ps(_mm512_castps512_ps256(self.0), upper(self.0))) }
        }
        #[inline(always)]
        fn most(self) -> f32 {
            // SAFETY: see the impl.
            unsafe { most8(_mm256_max_ps(_mm512_castps512_ps256(self.0), upper(self.0))) }
        }
        #[inline(always)]
        fn shift_to_exponent(self) -> Self {
            // SAFETY: see the impl.
            unsafe { Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(self.0)))) }
        }
        #[inline(always)]
        fn from_i32(x: &[i32; LANES]) -> Self {
            // SAFETY: see the impl.
            unsafe { Avx512(_mm512_cvtepi32_ps(_mm512_loadu_si512(x.as_ptr().cast()))) }
        }
        #[inline(always)]
        fn scales(bytes: &[u8; LANES]) -> Self {
            // SAFETY: see the impl.
            unsafe {
                let u = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes.as_ptr().cast()));
                let bits = _mm512_add_epi32(_mm512_slli_epi32::<21>(u), _mm512_set1_epi32(SCALE_BITS));
                Avx512(_mm512_castsi512_ps(bits))
            }
        }
        #[inline(always)]
        unsafe fn digits<const N: usize>(planes: *const u8, stride: usize) -> (Self, Self) {
            // SAFETY: see the impl; the contract.
            unsafe {
                let (mut low, mut high) = (_mm512_setzero_ps(), _mm512_setzero_ps());
                for p in 0..N {
                    let x = _mm512_cvtepu8_epi32(_mm_loadu_si128(planes.add(p * stride).cast()));
                    // A permutation looks at the lowest 4 bits only.
                    let table = _mm512_loadu_ps(DIGITS[p].as_ptr());
                    let l = _mm512_permutexvar_ps(x, table);
                    let h = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(x), table);
                    (low, high) = if p == 0 { (l, h) } else { (_mm512_add_ps(low, l), _mm512_add_ps(high, h)) };
                }
                (Avx512(low), Avx512(high))
            }
        }
        #[inline(always)]
        fn from_f16(x: &[f16; LANES]) -> Self {
            // SAFETY: see the impl.
            unsafe { Avx512(_mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast()))) }
        }
        #[inline(always)]
        fn from_bf16(x: &[bf16; LANES]) -> Self {
            // SAFETY: see the impl.
            unsafe {
                let x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
                Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(x)))
            }
        }
        #[inline(always)]
        fn fold_rows(x: &[Self; LANES], fold: impl Fn(Self, Self) -> Self) -> Self {
            // SAFETY: see the impl.
            unsafe {
                let mut groups = [_mm512_setzero_ps(); 4];
                for e in 0..4 {
                    // Rows e, 4 + e, 8 + e, 12 + e: one 128-bit part each in the end.
                    let [p, q, r, s] = [x[e].0, x[4 + e].0, x[8 + e].0, x[12 + e].0];
                    let a =
                        fold(Avx512(_mm512_shuffle_f32x4::<0x44>(p, q)), Avx512(_mm512_shuffle_f32x4::<0xee>(p, q)));
                    let b =
                        fold(Avx512(_mm512_shuffle_f32x4::<0x44>(r, s)), Avx512(_mm512_shuffle_f32x4::<0xee>(r, s)));
                    groups[e] = fold(
                        Avx512(_mm512_shuffle_f32x4::<0x88>(a.0, b.0)),
                        Avx512(_mm512_shuffle_f32x4::<0xdd>(a.0, b.0)),
                    )
                    .0;
                }
                let [p, q, r, s] = groups;
                let a = fold(Avx512(_mm512_shuffle_ps::<0x44>(p, q)), Avx512(_mm512_shuffle_ps::<0xee>(p, q)));
                let b = fold(Avx512(_mm512_shuffle_ps::<0x44>(r, s)), Avx512(_mm512_shuffle_ps::<0xee>(r, s)));
                fold(Avx512(_mm512_shuffle_ps::<0x88>(a.0, b.0)), Avx512(_mm512_shuffle_ps::<0xdd>(a.0, b.0)))
            }
        }
        #[inline(always)]
        fn transpose(x: &[Self; LANES]) -> [Self; LANES] {
            // SAFETY: see the impl.
            unsafe {
                // Four rows each; channel 4 j + c of them is part j of number c.
                let mut quarters = [[_mm512_setzero_ps(); 4]; 4];
                for g in 0..4 {
                    let [p, q, r, s] = [x[4 * g].0, x[4 * g + 1].0, x[4 * g + 2].0, x[4 * g + 3].0];
                    let (a, b) = (_mm512_unpacklo_ps(p, q), _mm512_unpackhi_ps(p, q));
                    let (c, d) = (_mm512_unpacklo_ps(r, s), _mm512_unpackhi_ps(r, s));
                    quarters[g] = [
                        _mm512_shuffle_ps::<0x44>(a, c),
                        _mm512_shuffle_ps::<0xee>(a, c),
                        _mm512_shuffle_ps::<0x44>(b, d),
                        _mm512_shuffle_ps::<0xee>(b, d),
                    ];
                }
                let [p, q, r, s] = quarters;
                let mut out = *x;
                for c in 0..4 {
                    let (a, b) = (_mm512_shuffle_f32x4::<0x88>(p[c], q[c]), _mm512_shuffle_f32x4::<0x88>(r[c], s[c]));
                    out[c] = Avx512(_mm512_shuffle_f32x4::<0x88>(a, b));
                    out[8 + c] = Avx512(_mm512_shuffle_f32x4::<0xdd>(a, b));
                    let (a, b) = (_mm512_shuffle_f32x4::<0xdd>(p[c], q[c]), _mm512_shuffle_f32x4::<0xdd>(r[c], s[c]));
                    out[4 + c] = Avx512(_mm512_shuffle_f32x4::<0x88>(a, b));
                    out[12 + c] = Avx512(_mm512_shuffle_f32x4::<0xdd>(a, b));
                }
                out
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Turned and folded rows of a set of instructions are those of the definition, bit for bit.
    fn check<S: Simd>() {
        let x: [[f32; LANES]; LANES] =
            std::array::from_fn(|i| std::array::from_fn(|l| ((i * LANES + l) as f32 * 0.37).sin() * 1e3));
        let bits = |x: [f32; LANES]| x.map(f32::to_bits);
        let out = |x: S| {
            let mut lanes = [0.0; LANES];
            x.store(&mut lanes);
            bits(lanes)
        };
        let (got, want) = (x.map(|x| S::load(&x)), x.map(Scalar));
        assert_eq!(out(S::fold_rows(&got, S::add)), bits(Scalar::fold_rows(&want, Scalar::add).0));
        assert_eq!(out(S::fold_rows(&got, S::max)), bits(Scalar::fold_rows(&want, Scalar::max).0));
        assert_eq!(S::transpose(&got).map(out), Scalar::transpose(&want).map(|x| bits(x.0)));
        assert_eq!(out(got[0].fma(got[1], got[2])), bits(want[0].fma(want[1], want[2]).0));
        let (halves, shorts) = (x.map(|x| x.map(f16::from_f32)), x.map(|x| x.map(bf16::from_f32)));
        assert_eq!(out(S::from_f16(&halves[3])), bits(Scalar::from_f16(&halves[3]).0));
        assert_eq!(out(S::from_bf16(&shorts[3])), bits(Scalar::from_bf16(&shorts[3]).0));
    }

    #[test]
    fn instruction_sets_agree() {
        check::<Scalar>();
        #[cfg(target_arch = "x86_64")]
        if super::super::Isa::Avx2.available() {
            check::<Avx2>();
        }
        #[cfg(target_arch = "x86_64")]
        if super::super::Isa::Avx512.available() {
            check::<Avx512>();
        }
    }
}
