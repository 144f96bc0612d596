//! Sequences as bytes, and what may happen to bytes.

use std::ffi::{c_int, c_void};

/// `akv_write_fn` into a vector.
///
/// # Safety
/// `user` is a `Vec<u8>`, and `bytes` as documented.
pub unsafe extern "C" fn collect(user: *mut c_void, bytes: *const c_void, n: usize) -> c_int {
    // SAFETY: the contract.
    unsafe { (*user.cast::<Vec<u8>>()).extend_from_slice(std::slice::from_raw_parts(bytes.cast(), n)) };
    0
}

/// What an import reads: a stream, changed here and there.
#[derive(Default)]
pub struct Reading<'a> {
    pub bytes: &'a [u8],
    pub at: usize,
    /// Where, and what is xored.
    pub changes: Vec<(usize, u8)>,
    /// Checksums are made to fit: what they are of is read with care, too.
    pub sealed: bool,
    pub sum: crc32fast::Hasher,
}

/// `akv_read_fn` from a [`Reading`]; at its end it fails.
///
/// # Safety
/// `user` is a [`Reading`], and there is room for `n` bytes.
pub unsafe extern "C" fn read(user: *mut c_void, to: *mut c_void, n: usize) -> c_int {
    // SAFETY: the contract.
    let (r, to) = unsafe { (&mut *user.cast::<Reading>(), std::slice::from_raw_parts_mut(to.cast::<u8>(), n)) };
    let Some(bytes) = r.bytes.get(r.at..r.at + n) else { return 7 };
    to.copy_from_slice(bytes);
    for &(at, x) in r.changes.iter().filter(|(at, _)| (r.at..r.at + n).contains(at)) {
        to[at - r.at] ^= x;
    }
    r.at += n;
    // A sum is asked for by itself.
    if r.sealed && n == 4 {
        to.copy_from_slice(&std::mem::take(&mut r.sum).finalize().to_le_bytes());
    } else {
        r.sum.update(to);
    }
    0
}
