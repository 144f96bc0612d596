//! Reading what a C caller passes: descriptors, arrays, rows. Nothing here trusts more than that a pointer which is
//! neither NULL nor misaligned points to what its documentation says.

use super::types::*;
use crate::format::{Dtype, Rows, RowsMut};
use crate::{Error, Result};
use std::fmt::Display;

/// The error of an argument.
pub(super) fn wrong(name: impl Display, value: impl Display, expected: impl Display) -> Error {
    Error::Argument(format!("{name} is {value}: expected {expected}"))
}

/// The error of a feature that is not built.
pub(super) fn not_built(name: impl Display, value: impl Display, expected: impl Display) -> Error {
    Error::Unsupported(format!("{name} is {value}, which is not built yet: expected {expected}"))
}

/// Name of a field, for a text that is put together only if there is something to say: what it is of, what joins them.
#[derive(Clone, Copy)]
pub(super) struct Field<'a>(pub &'a dyn Display, pub &'static str, pub &'static str);

impl Display for Field<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Field(of, joint, name) = self;
        write!(f, "{of}{joint}{name}")
    }
}

/// `value`, if it is one of `range`.
pub(super) fn within<T: PartialOrd + Display>(
    name: impl Display,
    value: T,
    range: std::ops::RangeInclusive<T>,
) -> Result<T> {
    if range.contains(&value) {
        return Ok(value);
    }
    Err(wrong(name, value, format_args!("{} to {}", range.start(), range.end())))
}

/// A count, which the C side holds in a signed integer.
pub(super) fn count(name: impl Display, value: i64) -> Result<usize> {
    usize::try_from(value).map_err(|_| wrong(name, value, "0 or more"))
}

pub(super) fn zero<T: PartialEq + Default + Display>(name: impl Display, value: T) -> Result<()> {
    if value == T::default() { Ok(()) } else { Err(wrong(name, value, 0)) }
}

/// A pointer to one `T` that is neither NULL nor misaligned, for reading or writing.
pub(super) fn pointer<T>(p: *const T, name: impl Display) -> Result<*mut T> {
    if p.is_null() {
        return Err(wrong(name, "NULL", "a pointer"));
    }
    if !p.is_aligned() {
        return Err(wrong(name, format_args!("{p:p}"), format_args!("an address aligned to {}", align_of::<T>())));
    }
    Ok(p.cast_mut())
}

/// `n` elements in the caller's memory.
///
/// # Safety
/// `p` is NULL, misaligned, or valid for reading `n` elements during `'a`.
pub(super) unsafe fn array<'a, T>(p: *const T, n: usize, name: impl Display) -> Result<&'a [T]> {
    if n == 0 {
        return Ok(&[]);
    }
    bytes_of(p.cast(), Some(n), size_of::<T>(), &name)?;
    let p = pointer(p, name)?;
    // SAFETY: not NULL, aligned, fits the address space, and the caller's contract.
    Ok(unsafe { std::slice::from_raw_parts(p, n) })
}

/// [`array`], where NULL means that there is none.
///
/// # Safety
/// As [`array`].
pub(super) unsafe fn optional<'a, T>(p: *const T, n: usize, name: impl Display) -> Result<Option<&'a [T]>> {
    if p.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's contract.
    unsafe { array(p, n, name) }.map(Some)
}

/// Structs that start with `uint32_t struct_size`.
///
/// # Safety
/// The type is repr(C), its first field is that u32, and every bit pattern is a value of it.
pub(super) unsafe trait Descriptor: Copy {
    const NAME: &'static str;
}

macro_rules! descriptors {
    ($($t:ident),*) => {$(
        // SAFETY: `types` declares it so: integers, floats, raw pointers and optional functions only.
        unsafe impl Descriptor for $t {
            const NAME: &'static str = stringify!($t);
        }
    )*};
}
descriptors!(akv_context_desc, akv_cache_desc, akv_batch_desc, akv_export_desc, akv_attention_desc, akv_usage);

/// No version of a descriptor will be larger: what claims to be was never initialised, and is not walked through.
const DESCRIPTOR_LIMIT: usize = 4096;

/// Checks a descriptor's address, its size, and that its caller uses nothing which this version does not know.
///
/// # Safety
/// `p` is NULL, misaligned, or points to a struct of `struct_size` bytes.
pub(super) unsafe fn sized<T: Descriptor>(p: *const T, name: &str) -> Result<*mut T> {
    let known = size_of::<T>();
    let p = pointer(p, name)?;
    // SAFETY: aligned, and by the contract the first field of a struct that the caller sized.
    let size = unsafe { *p.cast::<u32>() } as usize;
    if size < known || size > DESCRIPTOR_LIMIT {
        return Err(wrong(
            format_args!("{name}->struct_size"),
            size,
            format_args!("sizeof({}) = {known} or a later version's", T::NAME),
        ));
    }
    // SAFETY: the contract: `size` bytes, all of them initialised by a caller that knows a later version.
    let tail = unsafe { std::slice::from_raw_parts(p.cast::<u8>().add(known), size - known) };
    match tail.iter().position(|&b| b != 0) {
        None => Ok(p),
        Some(i) => Err(Error::Version(format!(
            "byte {} of {name} is set: this version of the library knows {known} bytes of {} and expects 0 beyond",
            known + i,
            T::NAME
        ))),
    }
}

/// Reads a descriptor.
///
/// # Safety
/// As [`sized`], with all fields initialised.
pub(super) unsafe fn descriptor<T: Descriptor>(p: *const T, name: &str) -> Result<T> {
    // SAFETY: the caller's contract; `sized` made sure of address and size.
    unsafe { Ok(sized(p, name)?.read()) }
}

/// The memory of `count` (None: the count itself overflowed) elements of `size` bytes at `p`.
fn bytes_of(p: *const u8, count: Option<usize>, size: usize, name: &impl Display) -> Result<Bytes> {
    let bytes = count.and_then(|n| n.checked_mul(size)).filter(|&b| b <= isize::MAX as usize);
    let from = p as usize;
    match bytes.and_then(|b| from.checked_add(b)) {
        Some(to) => Ok(Bytes { from, to }),
        None => Err(Error::Argument(format!("{name} is too large: its size overflows the address space"))),
    }
}

/// A range of the caller's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bytes {
    pub from: usize,
    pub to: usize,
}

impl Bytes {
    /// Of `count` elements; None is a count that overflowed.
    pub fn new<T>(p: *const T, count: Option<usize>, name: impl Display) -> Result<Bytes> {
        bytes_of(p.cast(), count, size_of::<T>(), &name)
    }

    pub fn overlaps(&self, other: &Bytes) -> bool {
        self.from.max(other.from) < self.to.min(other.to)
    }
}

/// Fails if a named output shares bytes with another output or with an input.
pub(super) fn disjoint(outputs: &[(&str, Bytes)], inputs: &[(&str, Bytes)]) -> Result<()> {
    for (i, (name, bytes)) in outputs.iter().enumerate() {
        for (other_name, other) in outputs[i + 1..].iter().chain(inputs) {
            if bytes.overlaps(other) {
                return Err(Error::Argument(format!("{name} overlaps {other_name}: expected separate memory")));
            }
        }
    }
    Ok(())
}

pub(super) fn dtype(name: impl Display, code: i32) -> Result<Dtype> {
    match code {
        AKV_F32 => Ok(Dtype::F32),
        AKV_F16 => Ok(Dtype::F16),
        AKV_BF16 => Ok(Dtype::Bf16),
        _ => Err(wrong(name, code, "AKV_F32 (0), AKV_F16 (1) or AKV_BF16 (2)")),
    }
}

pub(super) fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "AKV_F32",
        Dtype::F16 => "AKV_F16",
        Dtype::Bf16 => "AKV_BF16",
    }
}

/// `akv_rows` for a number of heads and channels, with its strides resolved.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    data: *mut u8,
    stride_row: usize,
    stride_head: usize,
    pub dtype: Dtype,
    heads: usize,
    dim: usize,
}

impl Grid {
    /// Checks everything but `data`, which [`Grid::bytes`] does, given the number of rows.
    pub fn new(rows: &akv_rows, name: impl Display, heads: usize, dim: usize) -> Result<Grid> {
        zero(format_args!("{name}->reserved"), rows.reserved)?;
        let dtype = dtype(format_args!("{name}->dtype"), rows.dtype)?;
        let size = dtype.size();
        let row = dim * size;
        let stride = |field: &str, value: i64, default: Option<usize>| {
            if value == 0 {
                return default.ok_or_else(|| wrong(format_args!("{name}->stride_head"), rows.stride_head, "less"));
            }
            usize::try_from(value).ok().filter(|&v| v >= row && v % size == 0).ok_or_else(|| {
                let expected = format_args!("0 or a multiple of {size}, at least {row} (the bytes of a head's row)");
                wrong(format_args!("{name}->{field}"), value, expected)
            })
        };
        let stride_head = stride("stride_head", rows.stride_head, Some(row))?;
        let stride_row = stride("stride_row", rows.stride_row, stride_head.checked_mul(heads))?;
        Ok(Grid { data: rows.data.cast(), stride_row, stride_head, dtype, heads, dim })
    }

    /// Its address and strides, in bytes.
    pub fn address(&self) -> (u64, i64, i64) {
        (self.data as u64, self.stride_row as i64, self.stride_head as i64)
    }

    /// Refuses a dtype other than the layer's.
    pub fn expect(self, name: &str, dtype: Dtype) -> Result<Grid> {
        if self.dtype == dtype {
            return Ok(self);
        }
        Err(wrong(
            format_args!("{name}->dtype"),
            dtype_name(self.dtype),
            format_args!("the layer's, {}", dtype_name(dtype)),
        ))
    }

    /// The memory of `n` rows, once `data` and its extent are checked. Heads within rows, or rows within heads, but
    /// no element may lie in two places.
    pub fn bytes(&self, name: &str, n: usize) -> Result<Bytes> {
        if n == 0 || self.heads == 0 {
            return Ok(Bytes { from: 0, to: 0 });
        }
        let (size, field) = (self.dtype.size(), format_args!("{name}->data"));
        if self.data.is_null() {
            return Err(wrong(field, "NULL", format_args!("{n} rows")));
        }
        if !(self.data as usize).is_multiple_of(size) {
            return Err(wrong(field, format_args!("{:p}", self.data), format_args!("an address aligned to {size}")));
        }
        let row = self.dim * size;
        let extent = |stride: usize, n: usize, last: usize| stride.checked_mul(n - 1)?.checked_add(last);
        let heads = extent(self.stride_head, self.heads, row);
        let rows = extent(self.stride_row, n, row);
        if n > 1
            && self.heads > 1
            && heads.is_some_and(|h| self.stride_row < h)
            && rows.is_some_and(|r| self.stride_head < r)
        {
            return Err(Error::Argument(format!(
                "{name}->stride_row is {}, {name}->stride_head is {}: expected {n} rows of {} heads of {row} bytes \
                 not to overlap",
                self.stride_row, self.stride_head, self.heads
            )));
        }
        bytes_of(self.data, heads.and_then(|h| extent(self.stride_row, n, h)), 1, &name)
    }

    /// # Safety
    /// [`Grid::bytes`] has passed for all rows that will be read, and their memory is as documented during `'a`.
    pub unsafe fn rows<'a>(&self) -> Rows<'a> {
        // SAFETY: the caller's contract; strides fit isize since the extent does (or no row is read).
        unsafe { Rows::new(self.data, self.stride_row as isize, self.stride_head as isize, self.dtype, self.dim) }
    }

    /// # Safety
    /// As [`Grid::rows`], for writing.
    pub unsafe fn rows_mut<'a>(&self) -> RowsMut<'a> {
        // SAFETY: as above.
        unsafe { RowsMut::new(self.data, self.stride_row as isize, self.stride_head as isize, self.dtype, self.dim) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::c_void;
    use std::mem::{MaybeUninit, zeroed};

    fn argument<T>(result: Result<T>, part: &str) {
        match result {
            Err(Error::Argument(text)) if text.contains(part) => {}
            Err(other) => panic!("{other:?} instead of {part:?}"),
            Ok(_) => panic!("no error instead of {part:?}"),
        }
    }

    #[test]
    fn descriptors_of_any_version() {
        #[repr(C)]
        struct Later {
            known: akv_usage,
            tail: [u8; 16],
        }
        // SAFETY: plain data.
        let mut later: Later = unsafe { zeroed() };
        let p: *const akv_usage = (&raw const later).cast();
        let size = size_of::<akv_usage>() as u32;
        let mut read = |struct_size: u32, set: Option<usize>| {
            later.known.struct_size = struct_size;
            later.tail = [0; 16];
            if let Some(i) = set {
                later.tail[i] = 1;
            }
            // SAFETY: `later` is as large as the sizes below, or the size is refused.
            unsafe { descriptor(p, "desc") }
        };
        assert!(read(size, None).is_ok());
        assert!(read(size, Some(0)).is_ok(), "what lies behind is not ours");
        assert!(read(size + 16, None).is_ok());
        assert!(read(size + 3, Some(3)).is_ok());
        for i in [0, 15] {
            assert!(
                matches!(read(size + 16, Some(i)), Err(Error::Version(text)) if text.contains(&(64 + i).to_string()))
            );
        }
        argument(read(size - 1, None), "desc->struct_size is 63: expected sizeof(akv_usage) = 64");
        argument(read(0, None), "desc->struct_size is 0");
        argument(read(0xcccc_cccc, None), "desc->struct_size");
        // SAFETY: NULL and misaligned pointers are refused before they are used.
        unsafe {
            argument(descriptor::<akv_usage>(std::ptr::null(), "desc"), "desc is NULL");
            argument(descriptor::<akv_usage>(p.byte_add(1), "desc"), "aligned to 8");
        }
    }

    #[test]
    fn arrays() {
        let x = [1i64, 2, 3];
        // SAFETY: valid, or refused.
        unsafe {
            assert_eq!(array(x.as_ptr(), 3, "x").unwrap(), x);
            assert!(array::<i64>(std::ptr::null(), 0, "x").unwrap().is_empty());
            assert!(optional::<i64>(std::ptr::null(), 3, "x").unwrap().is_none());
            argument(array::<i64>(std::ptr::null(), 3, "x"), "x is NULL");
            argument(array(x.as_ptr().byte_add(4), 2, "x"), "aligned to 8");
            argument(array(x.as_ptr(), usize::MAX / 2, "x"), "overflows");
        }
    }

    fn rows(data: *mut c_void, stride_row: i64, stride_head: i64) -> akv_rows {
        akv_rows { data, stride_row, stride_head, dtype: AKV_F16, reserved: 0 }
    }

    #[test]
    fn strides() {
        let mut memory = MaybeUninit::<[f32; 256]>::uninit();
        let data: *mut c_void = memory.as_mut_ptr().cast();
        let bytes = |stride_row, stride_head, n| {
            Grid::new(&rows(data, stride_row, stride_head), "key", 4, 16)?.bytes("key", n).map(|b| b.to - b.from)
        };
        assert_eq!(bytes(0, 0, 3).unwrap(), 3 * 4 * 32);
        assert_eq!(bytes(0, 40, 3).unwrap(), 2 * 160 + 3 * 40 + 32);
        assert_eq!(bytes(200, 0, 3).unwrap(), 400 + 128);
        assert_eq!(bytes(32, 96, 3).unwrap(), 3 * 4 * 32, "heads outside");
        assert_eq!(bytes(32, 0, 1).unwrap(), 128, "one row is never in its own way");
        argument(bytes(32, 64, 3), "not to overlap");
        argument(bytes(-128, 0, 3), "key->stride_row is -128");
        argument(bytes(0, -32, 3), "key->stride_head is -32");
        argument(bytes(129, 0, 3), "multiple of 2");
        argument(bytes(30, 0, 1), "at least 32");
        argument(bytes(0, 30, 1), "at least 32");
        argument(bytes(i64::MAX - 1, 0, 3), "overflows");
        argument(bytes(0, i64::MAX - 1, 3), "key->stride_head");
        argument(bytes(128, i64::MAX - 1, 3), "overflows");
        argument(bytes(0, 0, usize::MAX), "overflows");
    }

    #[test]
    fn rows_are_checked() {
        let mut memory = [0f32; 64];
        let data: *mut c_void = memory.as_mut_ptr().cast();
        let grid = |r: &akv_rows| Grid::new(r, "value", 1, 16);
        argument(grid(&akv_rows { dtype: 3, ..rows(data, 0, 0) }), "value->dtype is 3");
        argument(grid(&akv_rows { reserved: 1, ..rows(data, 0, 0) }), "value->reserved is 1");
        let f16 = grid(&rows(data, 0, 0)).unwrap();
        argument(f16.expect("value", Dtype::F32), "value->dtype is AKV_F16: expected the layer's, AKV_F32");
        let null = grid(&rows(std::ptr::null_mut(), 0, 0)).unwrap();
        argument(null.bytes("value", 1), "value->data is NULL");
        assert!(null.bytes("value", 0).is_ok());
        argument(grid(&rows(data.wrapping_byte_add(1), 0, 0)).unwrap().bytes("value", 1), "aligned to 2");
    }

    #[test]
    fn overlaps() {
        let b = |from, to| Bytes { from, to };
        assert!(disjoint(&[("a", b(0, 8)), ("b", b(8, 16))], &[("q", b(16, 24)), ("p", b(18, 20))]).is_ok());
        argument(disjoint(&[("a", b(0, 9)), ("b", b(8, 16))], &[]), "a overlaps b");
        argument(disjoint(&[("a", b(0, 8))], &[("q", b(7, 9))]), "a overlaps q");
        assert!(disjoint(&[("a", b(4, 4))], &[("q", b(0, 9))]).is_ok(), "nothing overlaps nothing");
    }
}
