//! Sequences: creation, forks, lengths, reading back.

use super::check::{Bytes, Grid, count, disjoint, pointer, wrong};
use super::handle::CACHES;
use super::types::*;
use super::{guard, unbuilt};
use crate::format::{Dtype, MAX_DIM, RowsMut, Shape, TILE};
use crate::{Error, Result, cache};
use half::{bf16, f16};
use std::ffi::c_void;

/// Makes an empty sequence. AKV_E_CAPACITY beyond max_sequences.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_sequence_create(cache: *mut akv_cache, out: *mut akv_sequence) -> akv_status {
    guard(|| {
        let cache = CACHES.get(cache, "cache")?;
        let out = pointer(out, "out")?;
        // SAFETY: checked, and the caller's contract.
        unsafe { out.write(cache.cache.create()?) };
        Ok(())
    })
}

/// Destroys a sequence. Pages that forks share stay with them. AKV_E_BUSY while it is in a begun batch.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_sequence_destroy(cache: *mut akv_cache, sequence: akv_sequence) -> akv_status {
    guard(|| CACHES.get(cache, "cache")?.cache.destroy(sequence))
}

/// Makes a new sequence of the first `n_tokens` tokens of another (-1 = all): whole tiles of 128 tokens are shared by
/// reference, the rest is copied. AKV_E_BUSY while it is in a begun batch.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_sequence_fork(
    cache: *mut akv_cache,
    sequence: akv_sequence,
    n_tokens: i64,
    out: *mut akv_sequence,
) -> akv_status {
    guard(|| {
        let cache = CACHES.get(cache, "cache")?;
        let out = pointer(out, "out")?;
        let n_tokens = match n_tokens {
            -1 => None,
            n => Some(usize::try_from(n).map_err(|_| wrong("n_tokens", n, "0 or more, or -1 for all"))?),
        };
        // SAFETY: checked, and the caller's contract.
        unsafe { out.write(cache.cache.fork(sequence, n_tokens)?) };
        Ok(())
    })
}

/// Keeps the first `n_tokens` tokens. Taking away at most exact_tail tokens is as if they had never been appended, bit
/// for bit; taking away more reopens the tile that is cut, whose rows are then known as they were stored: no error is
/// added unless later rows outgrow the tile's scales, and what that adds is in every later certificate. AKV_E_BUSY
/// while it is in a begun batch.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_sequence_truncate(
    cache: *mut akv_cache,
    sequence: akv_sequence,
    n_tokens: i64,
) -> akv_status {
    guard(|| CACHES.get(cache, "cache")?.cache.truncate(sequence, count("n_tokens", n_tokens)?))
}

/// Removes the tokens at positions `from_position <= p < to_position`. Not built yet: AKV_E_UNSUPPORTED.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_sequence_remove(
    cache: *mut akv_cache,
    sequence: akv_sequence,
    from_position: i64,
    to_position: i64,
) -> akv_status {
    let _ = (cache, sequence, from_position, to_position);
    guard(|| unbuilt("akv_sequence_remove"))
}

/// Adds `delta` to the positions `from_position <= p < to_position` and turns their K accordingly; `rope_per_layer` has
/// an element per layer. Not built yet: AKV_E_UNSUPPORTED.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_sequence_shift(
    cache: *mut akv_cache,
    sequence: akv_sequence,
    from_position: i64,
    to_position: i64,
    delta: i64,
    rope_per_layer: *const akv_rope,
) -> akv_status {
    let _ = (cache, sequence, from_position, to_position, delta, rope_per_layer);
    guard(|| unbuilt("akv_sequence_shift"))
}

/// Number of tokens of a sequence in `layer`; those that the batch in progress has appended count. `layer` = -1:
/// committed tokens.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_sequence_length(
    cache: *const akv_cache,
    sequence: akv_sequence,
    layer: i32,
    out: *mut i64,
) -> akv_status {
    guard(|| {
        let cache = CACHES.get(cache, "cache")?;
        let out = pointer(out, "out")?;
        let layer = if layer == -1 { None } else { Some(cache.layer(layer)?) };
        // SAFETY: checked, and the caller's contract.
        unsafe { out.write(cache.cache.length(sequence, layer)? as i64) };
        Ok(())
    })
}

/// Writes a sequence as a versioned, checksummed byte stream. Not built yet: AKV_E_UNSUPPORTED.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_sequence_export(
    cache: *mut akv_cache,
    sequence: akv_sequence,
    flags: u32,
    write: akv_write_fn,
    user: *mut c_void,
) -> akv_status {
    let _ = (cache, sequence, flags, write, user);
    guard(|| unbuilt("akv_sequence_export"))
}

/// Makes a sequence from such a stream; on error there is none. Not built yet: AKV_E_UNSUPPORTED.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_sequence_import(
    cache: *mut akv_cache,
    read: akv_read_fn,
    user: *mut c_void,
    out: *mut akv_sequence,
) -> akv_status {
    let _ = (cache, read, user, out);
    guard(|| unbuilt("akv_sequence_import"))
}

/// Reads tokens `first..first + n` of a sequence back, as attention sees them with all stored planes: exact head rows
/// as given, others decoded (to at most 3e-5 of the largest magnitude that shares their scale with 4 planes). `key` is
/// `[n][n_kv_heads][dim_k]`, `value` `[n][n_kv_heads][dim_v]`, in any dtype; either may be NULL. AKV_E_RANGE, with
/// nothing written, if a value is too large for the dtype.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_dequantize_kv(
    cache: *mut akv_cache,
    sequence: akv_sequence,
    layer: i32,
    first: i64,
    n: i64,
    key: *const akv_rows,
    value: *const akv_rows,
    stream: *mut c_void,
) -> akv_status {
    guard(|| {
        let cache = CACHES.get(cache, "cache")?;
        // SAFETY: the caller's contract.
        let stream = unsafe { cache.context.stream("stream", stream) }?;
        let layer = cache.layer(layer)?;
        let (first, n) = (count("first", first)?, count("n", n)?);
        let reader = cache.cache.read(sequence, layer)?;
        let len = reader.n_tokens();
        if first.checked_add(n).is_none_or(|end| end > len) {
            let expected = format_args!("tokens among the {len} of the sequence in layer {layer}");
            return Err(wrong("first, n", format_args!("{first}, {n}"), expected));
        }
        let shape = &cache.cache.layouts()[layer].shape;
        if let Some(device) = &cache.context.device {
            drop(reader);
            // SAFETY: the caller's contract.
            return unsafe {
                let key = output(key, "key", n, shape.n_kv_heads, shape.dim_k)?;
                let value = output(value, "value", n, shape.n_kv_heads, shape.dim_v)?;
                if let (Some((_, k)), Some((_, v))) = (&key, &value) {
                    disjoint(&[("key", *k), ("value", *v)], &[])?;
                }
                let rows = (key.map(|(grid, _)| grid), value.map(|(grid, _)| grid));
                super::device::dequantize(&cache, device, sequence, layer, (first, n), rows, stream)
            };
        }
        let view = reader.view();
        // SAFETY: the caller's contract.
        unsafe {
            write_rows(key, value, n, &view.layout.shape, |row, head, k, v| decode(&view, first + row, head, k, v))
        }
    })
}

/// Writes what `read(row, head, k, v)` gives of `n` rows, all of it or, if a value is too large, nothing.
///
/// # Safety
/// `key` and `value` are NULL, misaligned, or as documented.
pub(super) unsafe fn write_rows(
    key: *const akv_rows,
    value: *const akv_rows,
    n: usize,
    shape: &Shape,
    read: impl Fn(usize, usize, &mut [f32], &mut [f32]),
) -> Result<()> {
    // SAFETY: the caller's contract.
    let (key, value) = unsafe {
        (
            output(key, "key", n, shape.n_kv_heads, shape.dim_k)?,
            output(value, "value", n, shape.n_kv_heads, shape.dim_v)?,
        )
    };
    if let (Some((_, k)), Some((_, v))) = (&key, &value) {
        disjoint(&[("key", *k), ("value", *v)], &[])?;
    }
    type Use<'a> = &'a mut dyn FnMut(usize, usize, &[f32], &[f32]) -> Result<()>;
    let each = |f: Use| {
        let (mut k, mut v) = ([0.0; MAX_DIM], [0.0; MAX_DIM]);
        let (k, v) = (&mut k[..shape.dim_k], &mut v[..shape.dim_v]);
        for row in 0..n {
            for head in 0..shape.n_kv_heads {
                read(row, head, k, v);
                f(row, head, k, v)?;
            }
        }
        Ok(())
    };
    // All values are seen before the first is written.
    let narrow = |rows: &Option<(Grid, Bytes)>| rows.is_some_and(|(grid, _)| grid.dtype != Dtype::F32);
    if narrow(&key) || narrow(&value) {
        each(&mut |row, head, k, v| {
            for (name, rows, x) in [("key", &key, k), ("value", &value, v)] {
                if let Some((grid, _)) = rows {
                    fits(grid.dtype, x).map_err(|x| too_large(name, row, head, x, grid.dtype))?;
                }
            }
            Ok(())
        })?;
    }
    // SAFETY: `output` checked their extents; the rest is the caller's contract.
    let rows = |r: Option<(Grid, Bytes)>| r.map(|(grid, _)| unsafe { grid.rows_mut() });
    let (mut key, mut value): (Option<RowsMut>, Option<RowsMut>) = (rows(key), rows(value));
    each(&mut |row, head, k, v| {
        for (rows, x) in [(&mut key, k), (&mut value, v)] {
            if let Some(rows) = rows {
                rows.write(row, head, x);
            }
        }
        Ok(())
    })
}

/// Rows to be written, checked; None if the caller wants none.
///
/// # Safety
/// `rows` is NULL, misaligned, or valid.
pub(super) unsafe fn output(
    rows: *const akv_rows,
    name: &str,
    n: usize,
    heads: usize,
    dim: usize,
) -> Result<Option<(Grid, Bytes)>> {
    if rows.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's contract.
    let grid = Grid::new(unsafe { &*pointer(rows, name)? }, name, heads, dim)?;
    Ok(Some((grid, grid.bytes(name, n)?)))
}

/// A token as attention sees it with all planes.
fn decode(view: &cache::SequenceView, token: usize, head: usize, k: &mut [f32], v: &mut [f32]) {
    match &view.exact {
        Some((exact_k, exact_v)) if token < view.n_exact => {
            exact_k.read(token, head, k);
            exact_v.read(token, head, v);
        }
        _ => view.layout.decode(view.page(token / TILE), head, token % TILE, k, v),
    }
    for (side, x) in [k, v].into_iter().enumerate() {
        if view.layout.marks(view.page(token / TILE), head, side) >> (token % TILE) & 1 == 1 {
            x.fill(f32::NAN);
        }
    }
}

/// The first value that `dtype` would turn into infinity.
fn fits(dtype: Dtype, x: &[f32]) -> Result<(), f32> {
    let infinite = |x: f32| match dtype {
        Dtype::F32 => x.is_infinite(),
        Dtype::F16 => f16::from_f32(x).is_infinite(),
        Dtype::Bf16 => bf16::from_f32(x).is_infinite(),
    };
    x.iter().find(|&&x| infinite(x)).map_or(Ok(()), |&x| Err(x))
}

fn too_large(name: &str, row: usize, head: usize, x: f32, dtype: Dtype) -> Error {
    let largest = if dtype == Dtype::F16 { f16::MAX.to_f32() } else { bf16::MAX.to_f32() };
    let dtype = super::check::dtype_name(dtype);
    Error::Range(format!("{name}: {x:e} in row {row}, head {head}: {dtype} holds at most {largest:e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_becomes_infinite_does_not_fit() {
        assert_eq!(fits(Dtype::F16, &[1.0, -65504.0, 65519.0]), Ok(()));
        assert_eq!(fits(Dtype::F16, &[1.0, -65520.0]), Err(-65520.0));
        assert_eq!(fits(Dtype::Bf16, &[1e38]), Ok(()));
        assert_eq!(fits(Dtype::Bf16, &[f32::MAX]), Err(f32::MAX));
        assert_eq!(fits(Dtype::F32, &[f32::MAX]), Ok(()));
    }
}
