//! Rows as engines hold them: `[row][head][dim]` in f32, f16 or bf16, with byte strides.

use half::{bf16, f16, slice::HalfFloatSliceExt};
use std::marker::PhantomData;

/// Element type of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
}

impl Dtype {
    /// Bytes of an element.
    pub const fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }
}

/// Borrowed rows, converted to f32 as they are read.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    data: *const u8,
    stride_row: isize,
    stride_head: isize,
    dtype: Dtype,
    dim: usize,
    _memory: PhantomData<&'a [u8]>,
}

// SAFETY: a `Rows` is a shared borrow of plain bytes, like `&[u8]`.
unsafe impl Send for Rows<'_> {}
// SAFETY: as above.
unsafe impl Sync for Rows<'_> {}

impl<'a> Rows<'a> {
    /// # Safety
    /// For every row and head that will be read, `data + row * stride_row + head * stride_head` must point to `dim`
    /// readable elements, aligned for `dtype`, that nobody writes during `'a`.
    pub unsafe fn new(data: *const u8, stride_row: isize, stride_head: isize, dtype: Dtype, dim: usize) -> Self {
        Rows { data, stride_row, stride_head, dtype, dim, _memory: PhantomData }
    }

    /// Contiguous `[row][head][dim]` over bytes that are aligned for `dtype`.
    pub fn contiguous(bytes: &'a [u8], n_heads: usize, dtype: Dtype, dim: usize) -> Self {
        assert_eq!(bytes.as_ptr() as usize % dtype.size(), 0);
        let stride_head = (dim * dtype.size()) as isize;
        // SAFETY: the bytes are borrowed for 'a and aligned. Reads check no bound: whoever builds these (layouts, tests)
        // asks only for rows that the bytes hold.
        unsafe { Rows::new(bytes.as_ptr(), stride_head * n_heads as isize, stride_head, dtype, dim) }
    }

    /// The same rows from row `n` on.
    pub fn skip(self, n: usize) -> Self {
        Rows { data: self.data.wrapping_offset(n as isize * self.stride_row), ..self }
    }

    /// The first `dim` elements of the same rows.
    pub fn prefix(self, dim: usize) -> Self {
        assert!(dim <= self.dim);
        Rows { dim, ..self }
    }

    /// Elements of a row of one head.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Where a row of one head starts; it need not be one of those that can be read.
    #[inline(always)]
    pub fn address(&self, row: usize, head: usize) -> *const u8 {
        self.data.wrapping_offset(row as isize * self.stride_row + head as isize * self.stride_head)
    }

    /// The bytes of one row of one head, as the caller gave them.
    pub fn bytes(&self, row: usize, head: usize) -> &'a [u8] {
        // SAFETY: the contract of `new`.
        unsafe { std::slice::from_raw_parts(self.address(row, head), self.dim * self.dtype.size()) }
    }

    /// One row of one head as f32.
    pub fn read(&self, row: usize, head: usize, out: &mut [f32]) {
        let p = self.address(row, head);
        assert_eq!(out.len(), self.dim);
        // SAFETY: the contract of `new`: `dim` aligned elements.
        unsafe {
            match self.dtype {
                Dtype::F32 => out.copy_from_slice(std::slice::from_raw_parts(p.cast::<f32>(), self.dim)),
                Dtype::F16 => std::slice::from_raw_parts(p.cast::<f16>(), self.dim).convert_to_f32_slice(out),
                Dtype::Bf16 => std::slice::from_raw_parts(p.cast::<bf16>(), self.dim).convert_to_f32_slice(out),
            }
        }
    }

    /// The same of a row that holds numbers only (an infinity or NaN becomes some number): vector code of whoever calls it.
    #[inline(always)]
    pub fn read_finite(&self, row: usize, head: usize, out: &mut [f32]) {
        let p = self.address(row, head);
        assert_eq!(out.len(), self.dim);
        // SAFETY: the contract of `new`: `dim` aligned elements, of which all bits are integers.
        unsafe {
            match self.dtype {
                Dtype::F32 => out.copy_from_slice(std::slice::from_raw_parts(p.cast::<f32>(), self.dim)),
                Dtype::F16 => {
                    for (x, &bits) in out.iter_mut().zip(std::slice::from_raw_parts(p.cast::<u16>(), self.dim)) {
                        *x = finite_f16(bits);
                    }
                }
                Dtype::Bf16 => {
                    for (x, &bits) in out.iter_mut().zip(std::slice::from_raw_parts(p.cast::<u16>(), self.dim)) {
                        *x = f32::from_bits(u32::from(bits) << 16);
                    }
                }
            }
        }
    }

    /// Largest magnitude in one row of one head; infinity or NaN if the row has any. As integers, magnitudes order as they
    /// should, with those above all numbers.
    pub fn peak(&self, row: usize, head: usize) -> f32 {
        let p = self.address(row, head);
        // SAFETY: the contract of `new`: `dim` aligned elements, of which all bits are integers.
        unsafe {
            let halves = || std::slice::from_raw_parts(p.cast::<i16>(), self.dim);
            let half = || halves().iter().fold(0, |m: i16, x| m.max(x & 0x7fff)) as u16;
            match self.dtype {
                Dtype::F32 => {
                    let x = std::slice::from_raw_parts(p.cast::<i32>(), self.dim);
                    f32::from_bits(x.iter().fold(0, |m: i32, x| m.max(x & 0x7fff_ffff)) as u32)
                }
                Dtype::F16 => f16::from_bits(half()).to_f32(),
                Dtype::Bf16 => bf16::from_bits(half()).to_f32(),
            }
        }
    }

    /// One element as f32.
    pub fn element(&self, row: usize, head: usize, channel: usize) -> f32 {
        debug_assert!(channel < self.dim);
        let p = self.address(row, head);
        // SAFETY: the contract of `new`, and channel < dim.
        unsafe {
            match self.dtype {
                Dtype::F32 => *p.cast::<f32>().add(channel),
                Dtype::F16 => (*p.cast::<f16>().add(channel)).to_f32(),
                Dtype::Bf16 => (*p.cast::<bf16>().add(channel)).to_f32(),
            }
        }
    }
}

/// The bits of a finite f16 as f32, in vector arithmetic, subnormals too: an exponent of 112 more.
#[inline(always)]
pub fn finite_f16(bits: u16) -> f32 {
    let magnitude = f32::from_bits(u32::from(bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    f32::from_bits(magnitude.to_bits() | u32::from(bits & 0x8000) << 16)
}

/// Rows to be written, converted from f32.
#[derive(Debug)]
pub struct RowsMut<'a> {
    data: *mut u8,
    stride_row: isize,
    stride_head: isize,
    dtype: Dtype,
    dim: usize,
    _memory: PhantomData<&'a mut [u8]>,
}

// SAFETY: an exclusive borrow of plain bytes, like `&mut [u8]`.
unsafe impl Send for RowsMut<'_> {}
// SAFETY: shared access goes only through `write_shared`, whose contract forbids two writers of a row.
unsafe impl Sync for RowsMut<'_> {}

impl RowsMut<'_> {
    /// # Safety
    /// As [`Rows::new`], but writable and not read or written by others meanwhile.
    pub unsafe fn new(data: *mut u8, stride_row: isize, stride_head: isize, dtype: Dtype, dim: usize) -> Self {
        RowsMut { data, stride_row, stride_head, dtype, dim, _memory: PhantomData }
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Writes one row of one head.
    pub fn write(&mut self, row: usize, head: usize, x: &[f32]) {
        // SAFETY: `&mut self` excludes other writers.
        unsafe { self.write_shared(row, head, x) }
    }

    /// Writes one row of one head while other threads write other rows or heads.
    ///
    /// # Safety
    /// No two threads may write the same row and head.
    pub unsafe fn write_shared(&self, row: usize, head: usize, x: &[f32]) {
        assert_eq!(x.len(), self.dim);
        let p = self.data.wrapping_offset(row as isize * self.stride_row + head as isize * self.stride_head);
        // SAFETY: the contract of `new`, and of this call.
        unsafe {
            match self.dtype {
                Dtype::F32 => std::slice::from_raw_parts_mut(p.cast::<f32>(), self.dim).copy_from_slice(x),
                Dtype::F16 => std::slice::from_raw_parts_mut(p.cast::<f16>(), self.dim).convert_from_f32_slice(x),
                Dtype::Bf16 => std::slice::from_raw_parts_mut(p.cast::<bf16>(), self.dim).convert_from_f32_slice(x),
            }
        }
    }
}
