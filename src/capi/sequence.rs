//! Sequences: creation, forks, lengths, reading back.

use super::check::{Bytes, Grid, array, count, descriptor, disjoint, pointer, within, wrong, zero};
use super::guard;
use super::handle::CACHES;
use super::types::*;
use crate::cache::{Excerpt, Rope};
use crate::format::{Dtype, Format, MAX_LATENT, PLANES, RowsMut, Shape, TILE};
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

/// Takes the memory that `n_tokens` more tokens need, in all layers or in none: until they have been committed, steps
/// of them, of any size, do not fail with AKV_E_CAPACITY (but for the batch's bounds) or for want of pages.
/// akv_cache_usage counts it. Aborted steps leave it in place; akv_sequence_truncate, to any length, and
/// akv_sequence_destroy give back what is left of it. Less than there is already changes nothing. What else takes
/// memory (positions that do not follow each other, attention, forks, akv_sequence_shift) is not provided for, and
/// forks may hold on to rows that would have gone back to it: reserve again after a fork.
///
/// Errors: AKV_E_ARGUMENT, AKV_E_BUSY (in a begun batch, or read), AKV_E_CAPACITY, AKV_E_MEMORY, AKV_E_UNSUPPORTED on CUDA.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_sequence_reserve(
    cache: *mut akv_cache,
    sequence: akv_sequence,
    n_tokens: i64,
) -> akv_status {
    guard(|| {
        let cache = CACHES.get(cache, "cache")?;
        cache.cache.check_placement(false)?;
        cache.cache.reserve(sequence, count("n_tokens", n_tokens)?)
    })
}

/// Removes the tokens at positions `from_position <= p < to_position`: no query row sees them any more, and pages of which
/// nothing is left are given back. Indices and positions of the others do not change (what counts tokens by index, as
/// n_tokens, kv_from and akv_sequence_length, still counts those removed); tokens removed at the end of the sequence are
/// cut off, as by akv_sequence_truncate. Any number of times. AKV_E_BUSY while it is in a begun batch, or read;
/// AKV_E_UNSUPPORTED on CUDA and with AKV_FORMAT_PUBLISHED.
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
    guard(|| {
        let cache = CACHES.get(cache, "cache")?;
        cache.cache.check_placement(false)?;
        if from_position > to_position {
            return Err(wrong("to_position", to_position, format_args!("from_position ({from_position}) or more")));
        }
        cache.cache.remove(sequence, from_position, to_position)
    })
}

/// Adds `delta` to the positions `from_position <= p < to_position` and turns their K accordingly; `rope_per_layer` has
/// an element per layer; those of layers that share another's rows are not looked at. Causal visibility and windows go
/// by the new positions, which must not descend over the tokens that have not been removed. Rows that are kept as given
/// are turned, rounded to the layer's dtype, and count as given again; others are decoded, turned and encoded anew,
/// with an error that every later certificate contains. Other tokens stay as they are, but for those that share a tile
/// of 128 with some that turn: they may be encoded anew, too. Pages that forks share are copied first, all or nothing.
/// Takes a tile of K in binary32 of the process's heap.
///
/// Errors: AKV_E_ARGUMENT (rope, positions that would descend or overflow), AKV_E_BUSY, AKV_E_MEMORY, AKV_E_CAPACITY;
/// AKV_E_UNSUPPORTED on CUDA and with AKV_FORMAT_PUBLISHED.
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
    guard(|| {
        let cache = CACHES.get(cache, "cache")?;
        cache.cache.check_placement(false)?;
        if from_position > to_position {
            return Err(wrong("to_position", to_position, format_args!("from_position ({from_position}) or more")));
        }
        let layouts = cache.cache.layouts();
        // SAFETY: the caller's contract.
        let given = unsafe { array(rope_per_layer, layouts.len(), "rope_per_layer") }?;
        let ropes = given.iter().zip(layouts).enumerate().filter(|(layer, _)| cache.cache.home(*layer) == *layer);
        // SAFETY: the caller's contract.
        let ropes = ropes.map(|(i, (r, layout))| unsafe { rope(r, &format!("rope_per_layer[{i}]"), &layout.shape) });
        let ropes = ropes.collect::<Result<Vec<_>>>()?;
        cache.cache.shift(sequence, from_position, to_position, delta, &ropes)
    })
}

/// # Safety
/// What `rope` points to is as documented during `'a`.
unsafe fn rope<'a>(rope: &akv_rope, name: &str, shape: &Shape) -> Result<Rope<'a>> {
    let dim = shape.dim_k;
    zero(format_args!("{name}.reserved"), rope.reserved)?;
    within(format_args!("{name}.pairing"), rope.pairing, AKV_ROPE_INTERLEAVED..=AKV_ROPE_HALVES)?;
    let n_dims = within(format_args!("{name}.n_dims"), rope.n_dims, 0..=dim as i32)?;
    if n_dims % 2 != 0 {
        return Err(wrong(format_args!("{name}.n_dims"), n_dims, "an even number"));
    }
    let first_dim = within(format_args!("{name}.first_dim"), rope.first_dim, 0..=dim as i32 - n_dims)? as usize;
    if shape.v_is_prefix && n_dims > 0 && first_dim < shape.dim_v {
        let expected = format_args!("{} or more: V is the first channels of K, and does not turn", shape.dim_v);
        return Err(wrong(format_args!("{name}.first_dim"), first_dim, expected));
    }
    // SAFETY: the caller's contract.
    let inv_freq = unsafe { array(rope.inv_freq, n_dims as usize / 2, format_args!("{name}.inv_freq")) }?;
    if let Some((i, x)) = inv_freq.iter().enumerate().find(|(_, x)| !x.is_finite()) {
        return Err(wrong(format_args!("{name}.inv_freq[{i}]"), x, "a finite number"));
    }
    Ok(Rope { interleaved: rope.pairing == AKV_ROPE_INTERLEAVED, first_dim, inv_freq })
}

/// Number of tokens of a sequence in `layer`; those that the batch in progress has appended count. `layer` = -1:
/// committed tokens. Those that have been removed count, since others keep their indices.
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

/// Writes a sequence, or the part of it that `desc` names (NULL = all of it), as a byte stream with version and
/// checksums: the same bytes from any backend and instruction set. Layers that share another's rows add nothing to it.
/// A layer is exported with all its tokens, also those that a begun batch has appended: so layers can be sent, one call
/// each, while the next ones are still computed. `write` takes the stream in order, in pieces; only 64 KiB of the
/// process's heap are taken meanwhile (and a page with CUDA), nothing of max_bytes: a full cache can be swapped out.
/// The sequence is read until the call ends. On CUDA the call waits for all work of the CUDA context.
///
/// With planes_k and planes_v only the first digits of closed tiles are exported, and what is made from them reads no
/// others: its certificates include what is missing. An export with known_k and known_v has the digits that such a
/// sequence lacks, and makes it the same as the whole; it must come from the same tokens, before either side's tiles are
/// cut (others are left alone; forks that share tiles do not get them). Where v_is_prefix_of_k is 1 there is K alone, and
/// planes_k and known_k hold for both.
///
/// Errors: AKV_E_ARGUMENT (a layer that lacks tokens of the others; `write` returned other than 0), AKV_E_HANDLE,
/// AKV_E_BUSY (a layer is being written).
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_sequence_export(
    cache: *mut akv_cache,
    sequence: akv_sequence,
    desc: *const akv_export_desc,
    write: akv_write_fn,
    user: *mut c_void,
) -> akv_status {
    guard(|| {
        let cache = CACHES.get(cache, "cache")?;
        let write = write.ok_or_else(|| wrong("write", "NULL", "a function"))?;
        // SAFETY: the caller's contract.
        let desc = if desc.is_null() { None } else { Some(unsafe { descriptor(desc, "desc") }?) };
        let excerpt = desc.map_or(Ok(Excerpt::default()), |desc| excerpt(&desc, cache.cache.config().format))?;
        cache.cache.export(sequence, &excerpt, &mut |bytes: &[u8]| {
            // SAFETY: the caller's function, with the caller's pointer, and bytes that live through the call.
            unsafe { write(user, bytes.as_ptr().cast(), bytes.len()) }
        })
    })
}

fn excerpt(desc: &akv_export_desc, format: Format) -> Result<Excerpt> {
    zero("desc->flags", desc.flags)?;
    let first_layer = count("desc->first_layer", desc.first_layer.into())?;
    let n_layers = count("desc->n_layers", desc.n_layers.into())?;
    let planes = |names: [&str; 2], values: [i32; 2]| {
        let mut planes = [PLANES; 2];
        for ((name, value), planes) in names.into_iter().zip(values).zip(&mut planes) {
            *planes = match value {
                0 => PLANES,
                2..=4 if format == Format::Aligned => value as usize,
                _ if format == Format::Aligned => {
                    return Err(wrong(format_args!("desc->{name}"), value, "0, 2, 3 or 4"));
                }
                _ => return Err(wrong(format_args!("desc->{name}"), value, "0 with this format, which has no planes")),
            };
        }
        Ok((values != [0; 2]).then_some((planes[0], planes[1])))
    };
    let known = planes(["known_k", "known_v"], [desc.known_k, desc.known_v])?;
    if known.is_some() && (desc.known_k == 0 || desc.known_v == 0) {
        let name = if desc.known_k == 0 { "desc->known_k" } else { "desc->known_v" };
        return Err(wrong(name, 0, "planes of both K and V, or of neither"));
    }
    Ok(Excerpt {
        first_layer,
        n_layers: (n_layers > 0).then_some(n_layers),
        planes: planes(["planes_k", "planes_v"], [desc.planes_k, desc.planes_v])?,
        known,
    })
}

/// Reads such a stream, made by a cache of the same format, number of layers, KV heads, dims, dtypes, planes and
/// v_is_prefix_of_k, and with AKV_NAN_PROPAGATE on both sides or on neither (query heads, windows, exact_head, exact_tail,
/// backend and placement of pages may differ). `into` = 0: makes a sequence,
/// `*out`, which attends and goes on bit for bit like the one that was exported (as long as nothing is cut beyond the
/// smaller exact_tail of both). Otherwise the stream brings layers that
/// sequence `into` lacks, or further digits: one made from a part of the layers can be destroyed, read and added to, and
/// used in batches once it has all. `out` may be NULL then. On error there is no new sequence, and `into` is as before.
///
/// Errors: AKV_E_CORRUPT (damaged, no such stream, or `read` returned other than 0, as at the end of a file cut short),
/// AKV_E_VERSION (of a later version), AKV_E_ARGUMENT (of another kind of cache: says what differs), AKV_E_CAPACITY,
/// AKV_E_MEMORY; AKV_E_UNSUPPORTED for tiles that lack digits on CUDA. No memory is taken for more than the bytes that have
/// come.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_sequence_import(
    cache: *mut akv_cache,
    into: akv_sequence,
    read: akv_read_fn,
    user: *mut c_void,
    out: *mut akv_sequence,
) -> akv_status {
    guard(|| {
        let cache = CACHES.get(cache, "cache")?;
        let read = read.ok_or_else(|| wrong("read", "NULL", "a function"))?;
        let out = if into != 0 && out.is_null() { None } else { Some(pointer(out, "out")?) };
        let sequence = cache.cache.import((into != 0).then_some(into), &mut |bytes: &mut [u8]| {
            // SAFETY: the caller's function, with the caller's pointer, and bytes that live through the call.
            unsafe { read(user, bytes.as_mut_ptr().cast(), bytes.len()) }
        })?;
        if let Some(out) = out {
            // SAFETY: checked, and the caller's contract.
            unsafe { out.write(sequence) };
        }
        Ok(())
    })
}

/// Copies a sequence into `to_cache` (another one, of any context, or the same), as akv_sequence_import would make it of
/// all that akv_sequence_export writes, page by page and without the bytes between. Nothing is shared with the original.
/// On error there is no new sequence.
///
/// Errors: as akv_sequence_export and akv_sequence_import; AKV_E_UNSUPPORTED if one of the caches is on CUDA.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_sequence_copy(
    from_cache: *mut akv_cache,
    sequence: akv_sequence,
    to_cache: *mut akv_cache,
    out: *mut akv_sequence,
) -> akv_status {
    guard(|| {
        let from = CACHES.get(from_cache, "from_cache")?;
        let to = CACHES.get(to_cache, "to_cache")?;
        let out = pointer(out, "out")?;
        // SAFETY: checked, and the caller's contract.
        unsafe { out.write(from.cache.copy(sequence, &to.cache)?) };
        Ok(())
    })
}

/// Reads tokens `first..first + n` of a sequence back, as attention sees them with all stored planes: exact head rows
/// as given, others decoded (to at most 3e-5 of the largest magnitude that shares their scale with 4 planes). `key` is
/// `[n][n_kv_heads][dim_k]`, `value` `[n][n_kv_heads][dim_v]`, in any dtype; either may be NULL. AKV_E_RANGE, with
/// nothing written, if a value is too large for the dtype. Tokens that have been removed are zeros.
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
        let (mut k, mut v) = ([0.0; MAX_LATENT], [0.0; MAX_LATENT]);
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
    if view.written(token / TILE) >> (token % TILE) & 1 == 0 {
        k.fill(0.0);
        v.fill(0.0);
        return;
    }
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
