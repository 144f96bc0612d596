//! Placements where the engine's cells are the truth (AKV_SLOTS, AKV_ATTACHED), and their masks.

use super::attention::{Asking, Frame, MAX_PROGRESSIVE, Scene};
use super::batch::WORKSPACE_ALIGN;
use super::check::{Bytes, Grid, array, count, descriptor, disjoint, pointer, within, wrong};
use super::handle::{CACHES, CONTEXTS, MASKS};
use super::sequence::{output, write_rows};
use super::types::*;
use super::{cache, context, device, guard};
use crate::backend::cpu::Cpu;
use crate::backend::cuda::{self, Stream};
use crate::backend::{AnyMask, Mask, QueryRow};
use crate::cache::{Hands, NanPolicy, SequenceView, SlotLayer, launcher};
use crate::error::{collect, reserve};
use crate::format::{Clean, Dtype, Rows, TILE};
use crate::{Error, Result};
use parking_lot::{RwLock, RwLockReadGuard};
use std::ffi::c_void;
use std::sync::Arc;

/// What an `akv_mask` stands for.
pub(super) struct MaskObject {
    mask: RwLock<AnyMask>,
    /// Its size, for calls that must not depend on getting the lock.
    max_rows: usize,
    max_kv: usize,
    /// Keeps it alive, and busy.
    context: Arc<context::Object>,
}

/// Most threads of a call that brings its own.
const MAX_THREADS: usize = 1024;

/// A stretch of slots.
fn stretch(layer: &SlotLayer, names: [&str; 2], first: i64, n: i64) -> Result<(usize, usize)> {
    let (first, n) = (count(names[0], first)?, count(names[1], n)?);
    if first.checked_add(n).is_none_or(|end| end > layer.n_slots()) {
        let [a, b] = names;
        let expected = format_args!("slots among 0 to {}", layer.n_slots() - 1);
        return Err(wrong(format_args!("{a}, {b}"), format_args!("{first}, {n}"), expected));
    }
    Ok((first, n))
}

/// Layers that `layer` names: one, or with -1 all.
fn layers(cache: &cache::Object, layer: i32) -> Result<std::ops::Range<usize>> {
    if layer == -1 {
        return Ok(0..cache.cache.layouts().len());
    }
    cache.layer(layer).map(|layer| layer..layer + 1)
}

/// Rows of one row per element, in the caller's memory.
///
/// # Safety
/// `rows` is NULL, misaligned, or describes `n` rows that are valid during `'a`.
unsafe fn input<'a>(
    rows: *const akv_rows,
    name: &str,
    n: usize,
    heads: usize,
    dim: usize,
    dtype: Dtype,
) -> Result<Option<Rows<'a>>> {
    if rows.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's contract.
    let grid = Grid::new(unsafe { &*pointer(rows, name)? }, name, heads, dim)?.expect(name, dtype)?;
    grid.bytes(name, n)?;
    // SAFETY: its extent is checked; the rest is the caller's contract.
    Ok(Some(unsafe { grid.rows() }))
}

/// # Safety
/// What the pointers point to is as documented.
unsafe fn write(
    cache: &cache::Object,
    layer: i32,
    slots: *const i64,
    n: i64,
    key: *const akv_rows,
    value: *const akv_rows,
    stream: Stream,
) -> Result<()> {
    let index = cache.layer(layer)?;
    let place = |error: Error| error.at(format_args!("layer {index}"));
    let mut cells = cache.cache.write_slots(index)?;
    let on = cache.context.device.as_deref();
    let n = count("n", n)?;
    // SAFETY: the caller's contract.
    let slots = unsafe { array(slots, n, "slots") }?;
    let last = cells.n_slots() as i64 - 1;
    for (i, &slot) in slots.iter().enumerate() {
        within(format_args!("slots[{i}]"), slot, 0..=last)?;
    }
    let (layout, shape) = (*cells.layout(), cells.layout().shape);
    if let Some((k, v)) = cells.attached()? {
        for (name, rows) in [("key", key), ("value", value)] {
            if !rows.is_null() {
                return Err(wrong(name, "not NULL", "NULL: AKV_ATTACHED has its rows from akv_attach_rows"));
            }
        }
        if let Some(on) = on {
            // SAFETY: the caller's contract.
            return unsafe { write_on_device(&mut cells, on, slots, None, None, stream) };
        }
        let changed = || slots.iter().map(|&slot| slot as usize);
        for (name, rows) in [("attached key", &k), ("attached value", &v)] {
            layout.check_rows(name, rows, changed()).map_err(place)?;
        }
        return cells.write(slots, None, None, &mut Hands::Host);
    }
    // SAFETY: the caller's contract.
    let (k, v) = unsafe {
        (
            input(key, "key", n, shape.n_kv_heads, shape.dim_k, shape.dtype_k)?,
            input(value, "value", n, shape.n_kv_heads, shape.dim_v, shape.dtype_v)?,
        )
    };
    if k.is_none() && v.is_none() {
        return Err(wrong("key, value", "NULL", "rows of one of them at least"));
    }
    if let Some(on) = on {
        // SAFETY: the caller's contract.
        return unsafe { write_on_device(&mut cells, on, slots, k, v, stream) };
    }
    let clean = |rows: &Option<Rows>| match (cache.cache.config().nan, rows) {
        (NanPolicy::Error, _) | (_, None) => Ok(None),
        (_, Some(rows)) => Clean::new(rows, n, shape.n_kv_heads),
    };
    let (clean_k, clean_v) = (clean(&k)?, clean(&v)?);
    let pairs = [("key", k, &clean_k), ("value", v, &clean_v)];
    let [k, v] = pairs.map(|(name, rows, clean)| (name, rows.map(|rows| clean.as_ref().map_or(rows, Clean::rows))));
    for (name, rows) in [k, v] {
        if let Some(rows) = rows {
            layout.check_rows(name, &rows, 0..n).map_err(place)?;
        }
    }
    cells.write(slots, k.1, v.1, &mut Hands::Host)?;
    if layout.marked() {
        let bad = [(k.1, &clean_k), (v.1, &clean_v)];
        cells.mark(slots, bad.map(|(rows, clean)| rows.map(|_| clean.as_ref().map_or(&[][..], Clean::bad))));
    }
    Ok(())
}

/// # Safety
/// The rows are device memory as documented.
unsafe fn write_on_device(
    cells: &mut SlotLayer,
    on: &cuda::Device,
    slots: &[i64],
    k: Option<Rows>,
    v: Option<Rows>,
    stream: Stream,
) -> Result<()> {
    device::check_not_captured(on, stream, "akv_slots_write")?;
    cells.tell(on, stream, false)?;
    // SAFETY: the caller's contract.
    let mut launch = unsafe { launcher(on, stream) };
    cells.write(slots, k, v, &mut Hands::Device(&mut launch))
}

/// What a query row sees of its span.
fn query_row(view: &SequenceView, sequence: usize, mask: Option<&Mask>, row: usize, dense: bool) -> QueryRow {
    let mut seen = QueryRow::new(sequence, 0, 0, dense);
    for tile in 0..view.len.div_ceil(TILE) {
        let within = crate::format::range_bits(0, TILE.min(view.len - tile * TILE));
        let cells = mask.map_or(u128::MAX, |mask| mask.seen(row, tile)) & view.written(tile) & within;
        if cells != 0 {
            if seen.n == 0 {
                seen.from = tile * TILE + cells.trailing_zeros() as usize;
            }
            seen.to = (tile + 1) * TILE - cells.leading_zeros() as usize;
            seen.n += cells.count_ones() as usize;
        }
    }
    seen
}

/// # Safety
/// What the pointers point to is as documented.
unsafe fn attend(
    cache: &cache::Object,
    layer: i32,
    spans: *const akv_span,
    n_spans: i32,
    desc: &akv_attention_desc,
) -> Result<()> {
    let cpu = &cache.context.cpu;
    let layer = cache.layer(layer)?;
    cache.cache.check_placement(true)?;
    let (n_streams, n_slots) = cache.cache.streams();
    let n_spans = count("n_spans", n_spans.into())?;
    // SAFETY: the caller's contract.
    let spans = unsafe { array(spans, n_spans, "spans") }?;
    let (mut n_q, mut max_kv) = (0usize, 0usize);
    for (i, span) in spans.iter().enumerate() {
        within(format_args!("spans[{i}].stream"), i64::from(span.stream), 0..=n_streams as i64 - 1)?;
        n_q += count(format_args!("spans[{i}].n_q"), span.n_q.into())?;
        max_kv = max_kv.max(within(format_args!("spans[{i}].n_kv"), span.n_kv, 0..=n_slots as i64)? as usize);
    }
    let mask = match desc.mask.is_null() {
        true => None,
        false => Some(MASKS.get(desc.mask, "desc->mask")?),
    };
    if let Some(mask) = &mask {
        if !Arc::ptr_eq(&mask.context, &cache.context) {
            return Err(Error::Handle("desc->mask is of another context than the cache".to_owned()));
        }
        if n_q > mask.max_rows || max_kv > mask.max_kv {
            let size = format!("{} rows, {} cells", mask.max_rows, mask.max_kv);
            return Err(wrong("desc->mask", size, format_args!("{n_q} rows, {max_kv} cells at least")));
        }
    }
    // Held to the end: a mask is not set meanwhile.
    let busy = || Error::Busy("desc->mask: is being set by another call".to_owned());
    if let Some(on) = &cache.context.device {
        let mask = mask.as_ref().map(|mask| mask.mask.try_read().ok_or_else(busy)).transpose()?;
        let mask = mask.as_deref().and_then(AnyMask::device);
        // SAFETY: the caller's contract.
        return unsafe { device::slots_attention(cache, on, layer, spans, mask, desc) };
    }
    let layout = &cache.cache.layouts()[layer];
    // SAFETY: the caller's contract.
    unsafe { cache.context.stream("desc->stream", desc.stream) }?;
    let place = |row: usize| {
        let mut end = 0;
        let span = spans.iter().position(|span| {
            end += span.n_q as usize;
            row < end
        });
        format!("layer {layer}, spans[{}]", span.unwrap_or(0))
    };
    let asking = Asking { n_q, max_kv, nan: cache.cache.config().nan, place: &place };
    // SAFETY: the caller's contract.
    let frame = unsafe { Frame::new(desc, layout, true, asking, MAX_THREADS, cpu) }?;
    let mask = mask.as_ref().map(|mask| mask.mask.try_read().ok_or_else(busy)).transpose();
    // From here on a thread that fails takes its error through the call, so that all of them meet at every barrier.
    let cells = cache.cache.read_slots(layer).and_then(|cells| cells.attached().map(|_| ()).map(|()| cells));
    let prepared: Result<(Option<RwLockReadGuard<AnyMask>>, RwLockReadGuard<SlotLayer>)> =
        mask.and_then(|mask| cells.map(|cells| (mask, cells)));
    let seen = prepared.as_ref().map_err(Clone::clone).and_then(|(mask, cells)| {
        let mask = mask.as_deref().and_then(AnyMask::host);
        let (mut views, mut rows) = (Vec::new(), Vec::new());
        reserve(&mut views, n_spans)?;
        reserve(&mut rows, n_q)?;
        for (i, span) in spans.iter().enumerate() {
            let view = cells.view(span.stream as usize, span.n_kv as usize);
            let dense = frame.options.all_dense || span.n_q as usize > MAX_PROGRESSIVE;
            for _ in 0..span.n_q {
                let row = query_row(&view, i, mask, rows.len(), dense);
                rows.push(QueryRow { many: span.n_q as usize > MAX_PROGRESSIVE, ..row });
            }
            views.push(view);
        }
        Ok((views, rows, mask))
    });
    let scene = seen.as_ref().map_err(Clone::clone);
    let scene = scene.map(|(sequences, rows, mask)| Scene { sequences, rows, mask: *mask, positions: None });
    // SAFETY: the caller's contract.
    unsafe { frame.run(cpu, scene, &cache.workspaces) }
}

/// Writes rows to `n` cells: row i of `key` `[n][n_kv_heads][dim_k]` (after RoPE) and `value`
/// `[n][n_kv_heads][dim_v]` goes to slot `slots[i]` (see akv_cache_desc.n_slots), in the layer's dtypes. AKV_SLOTS:
/// either may be NULL, then only the other is written. AKV_ATTACHED: both are NULL; the attached rows of these slots
/// have changed, K or V or both. A slot that is there twice holds the later row. All rows are checked first: on error
/// nothing is written. Writing takes no memory and cannot fail for lack of it.
///
/// Scales only grow while a tile of 128 cells is written to; one whose cells have all been written since it last was
/// closed gets the scales of its rows alone, as if it had been appended, once it is closed again. Rows of the last
/// written tiles (a sixteenth of the layer's, two per stream at least) are kept as given; others are closed. A write
/// to a closed one reopens it: rows that outgrow its scales re-encode what is there, and what that loses is in every
/// later certificate.
///
/// Errors: AKV_E_ARGUMENT, AKV_E_NONFINITE, AKV_E_RANGE, AKV_E_BUSY (attention or another write on the layer is
/// running). On CUDA rows that cannot be stored are akv_poll's to tell, a stream that is captured is AKV_E_UNSUPPORTED, and
/// after AKV_E_DEVICE what the slots hold is undefined.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_slots_write(
    cache: *mut akv_cache,
    layer: i32,
    slots: *const i64,
    n: i64,
    key: *const akv_rows,
    value: *const akv_rows,
    stream: *mut c_void,
) -> akv_status {
    guard(|| {
        let cache = CACHES.get(cache, "cache")?;
        // SAFETY: the caller's contract.
        let stream = unsafe { cache.context.stream("stream", stream) }?;
        // SAFETY: the caller's contract.
        unsafe { write(&cache, layer, slots, n, key, value, stream) }
    })
}

/// Reads slots `first..first + n` back, in any dtype: rows that are kept as given exactly, others decoded with all
/// stored planes, cells without rows as zeros. Either of `key` and `value` may be NULL. AKV_E_RANGE, with nothing
/// written, if a value is too large for the dtype (on CUDA infinity is written, and akv_poll tells of it); AKV_E_BUSY while
/// the layer is written. AKV_SLOTS only (attached rows are the caller's). On CUDA outside of capture.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_slots_read(
    cache: *mut akv_cache,
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
        let cells = cache.cache.read_slots(cache.layer(layer)?)?;
        if cells.is_index() {
            let expected = "expected AKV_SLOTS";
            return Err(Error::Argument(format!("cache is AKV_ATTACHED, whose rows are the caller's: {expected}")));
        }
        let (first, n) = stretch(&cells, ["first", "n"], first, n)?;
        if let Some(on) = &cache.context.device {
            let shape = &cells.layout().shape;
            // SAFETY: the caller's contract.
            return unsafe {
                let key = output(key, "key", n, shape.n_kv_heads, shape.dim_k)?;
                let value = output(value, "value", n, shape.n_kv_heads, shape.dim_v)?;
                if let (Some((_, k)), Some((_, v))) = (&key, &value) {
                    disjoint(&[("key", *k), ("value", *v)], &[])?;
                }
                let rows = (key.map(|(grid, _)| grid), value.map(|(grid, _)| grid));
                device::slots_read(&cells, on, (first, n), rows, stream)
            };
        }
        let read = |row: usize, head: usize, k: &mut [f32], v: &mut [f32]| {
            cells.read(first + row, head, k, v);
            cells.spread(first + row, head, k, v);
        };
        // SAFETY: the caller's contract.
        unsafe { write_rows(key, value, n, &cells.layout().shape, read) }
    })
}

/// Forgets slots `first..first + n`, in `layer` or, with -1, in all: they are not seen, and read as zeros. A tile of
/// which nothing is left starts afresh. AKV_E_BUSY, with nothing forgotten, while other calls use a layer.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_slots_invalidate(cache: *mut akv_cache, layer: i32, first: i64, n: i64) -> akv_status {
    guard(|| {
        let cache = CACHES.get(cache, "cache")?;
        // All locks before the first change.
        for mut cells in collect(layers(&cache, layer)?.map(|layer| cache.cache.write_slots(layer)))? {
            let (first, n) = stretch(&cells, ["first", "n"], first, n)?;
            cells.invalidate(first, n);
        }
        Ok(())
    })
}

/// Copies `n` slots from `from` on to those from `to` on, in `layer` or, with -1, in all. Whole tiles (cells of both
/// streams from the same multiple of 128 on) are copied as they are stored; other rows are decoded and written anew,
/// with an error that every later certificate contains. The two stretches must not overlap. AKV_SLOTS only.
/// AKV_E_BUSY (other calls use a layer) and AKV_E_MEMORY (room for a row): nothing is copied. On CUDA it waits for all work
/// of the CUDA context, before and after.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_slots_copy(cache: *mut akv_cache, layer: i32, from: i64, to: i64, n: i64) -> akv_status {
    guard(|| {
        let cache = CACHES.get(cache, "cache")?;
        // What can fail comes before the first change.
        let mut cells = collect(layers(&cache, layer)?.map(|layer| cache.cache.write_slots(layer)))?;
        let mut spares = Vec::new();
        reserve(&mut spares, cells.len())?;
        for cells in &cells {
            if cells.is_index() {
                let expected = "expected AKV_SLOTS";
                return Err(Error::Argument(format!("cache is AKV_ATTACHED, whose rows are the caller's: {expected}")));
            }
            stretch(cells, ["from", "n"], from, n)?;
            stretch(cells, ["to", "n"], to, n)?;
            spares.push(cells.spare_row()?);
        }
        // Checked not to be negative.
        let (from, to, n) = (from as usize, to as usize, n as usize);
        if from < to + n && to < from + n {
            return Err(wrong("to", to, format_args!("slots that do not overlap {from} to {}", from + n - 1)));
        }
        let mut copy = |hands: &mut Hands| {
            let mut both = cells.iter_mut().zip(&mut spares);
            both.try_for_each(|(cells, spare)| cells.copy(from, to, n, spare, hands))
        };
        match &cache.context.device {
            None => copy(&mut Hands::Host),
            Some(on) => device::apart_from_launched(on, || {
                // SAFETY: rows are those of the cells.
                let mut launch = unsafe { launcher(on, Stream::DEFAULT) };
                copy(&mut Hands::Device(&mut launch))
            }),
        }
    })
}

/// Names the engine's own rows of a layer (AKV_ATTACHED): `[n_streams * n_slots][n_kv_heads][dim]`, in the layer's
/// dtypes. Only read, in akv_slots_write and akv_slots_attention, and only where cells have been written; valid until
/// others are named or the cache is destroyed. Naming rows forgets what had been written. AKV_E_BUSY while other calls
/// use the layer.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_attach_rows(
    cache: *mut akv_cache,
    layer: i32,
    key: *const akv_rows,
    value: *const akv_rows,
) -> akv_status {
    guard(|| {
        let cache = CACHES.get(cache, "cache")?;
        let mut cells = cache.cache.write_slots(cache.layer(layer)?)?;
        if !cells.is_index() {
            return Err(Error::Argument("cache is AKV_SLOTS: expected AKV_ATTACHED".to_owned()));
        }
        let (shape, n) = (cells.layout().shape, cells.n_slots());
        pointer(key, "key")?;
        pointer(value, "value")?;
        // SAFETY: the caller's contract: the rows are valid until others are named or the cache is destroyed.
        let (k, v) = unsafe {
            (
                input(key, "key", n, shape.n_kv_heads, shape.dim_k, shape.dtype_k)?,
                input(value, "value", n, shape.n_kv_heads, shape.dim_v, shape.dtype_v)?,
            )
        };
        if let (Some(k), Some(v)) = (k, v) {
            cells.attach(k, v);
        }
        Ok(())
    })
}

/// Attention of query rows over cells, as akv_aligned_attention: the rows of `desc->q` and of the outputs lie span by
/// span, and row r of all sees, of its span's cells, what row r of `desc->mask` lets it see (all of them without a
/// mask). Cells without both K and V are never seen. Spans of up to 8 rows take the progressive path, longer ones the
/// dense one. visibility, window, kv_from, kv_to and tree must be 0 or NULL: the mask says it all.
///
/// `desc->threads` with nth > 1 needs `desc->workspace` (akv_slots_workspace); on CUDA so does a stream that is captured.
///
/// Flat attention is cheap with AKV_SLOTS; with AKV_ATTACHED a token that needs more than the index reads whole rows,
/// so that it can read more than the rows alone would have been.
///
/// Errors: as akv_aligned_attention; AKV_E_ARGUMENT (also a mask of too few rows or cells), AKV_E_HANDLE (a mask of
/// another context), AKV_E_BUSY (the layer is being written, or the mask set).
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_slots_attention(
    cache: *mut akv_cache,
    layer: i32,
    spans: *const akv_span,
    n_spans: i32,
    desc: *const akv_attention_desc,
) -> akv_status {
    guard(|| {
        let cache = CACHES.get(cache, "cache")?;
        // SAFETY: the caller's contract.
        unsafe { attend(&cache, layer, spans, n_spans, &descriptor(desc, "desc")?) }
    })
}

/// Size and alignment of the workspace that akv_slots_attention can do with, in any layer, over spans of up to `max_kv`
/// cells and on up to `max_threads` threads (0 = the context's; not used on CUDA). It does not depend on the number of
/// query rows: on CUDA they take turns, 64 at once, or 1024 where all read every digit.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_slots_workspace(
    cache: *const akv_cache,
    max_kv: i64,
    max_threads: i32,
    bytes: *mut usize,
    align: *mut usize,
) -> akv_status {
    guard(|| {
        let cache = CACHES.get(cache, "cache")?;
        cache.cache.check_placement(true)?;
        let max_kv = within("max_kv", max_kv, 0..=cache.cache.streams().1 as i64)? as usize;
        let nth = match within("max_threads", max_threads, 0..=MAX_THREADS as i32)? {
            0 => cache.context.cpu.n_threads(),
            n => n as usize,
        };
        let (bytes, align) = (pointer(bytes, "bytes")?, pointer(align, "align")?);
        if cache.context.device.is_some() {
            // SAFETY: checked, and the caller's contract.
            unsafe {
                bytes.write(device::slots_workspace(&cache.cache, max_kv));
                align.write(device::WORKSPACE_ALIGN);
            }
            return Ok(());
        }
        let most = cache.cache.layouts().iter().map(|layout| Cpu::workspace_bytes(layout, max_kv, nth)).max();
        // SAFETY: checked, and the caller's contract.
        unsafe {
            bytes.write(most.unwrap_or(0));
            align.write(WORKSPACE_ALIGN);
        }
        Ok(())
    })
}

/// Makes a mask of up to `max_rows` query rows and `max_kv` cells, for caches of `context`: as many layers and caches
/// as share what their rows see. Until they are set, rows see nothing. `*out` is written on success only.
///
/// On CUDA all of its memory is taken here: 276 bytes for each row and 128 cells.
///
/// Threads: a mask is used by any number of attention calls at once, or set by one call; otherwise AKV_E_BUSY.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_mask_create(
    context: *mut akv_context,
    max_rows: i64,
    max_kv: i64,
    out: *mut *mut akv_mask,
) -> akv_status {
    guard(|| {
        let context = CONTEXTS.get(context, "context")?;
        let out = pointer(out, "out")?;
        let rows = within("max_rows", max_rows, 1..=i64::from(i32::MAX))? as usize;
        let kv = within("max_kv", max_kv, 1..=i64::from(i32::MAX))? as usize;
        let mask = match &context.device {
            Some(on) => AnyMask::Device(cuda::Mask::new(on, context.allocator.clone(), rows, kv)?),
            None => AnyMask::Host(Mask::new(rows, kv)?),
        };
        let object = MaskObject { mask: RwLock::new(mask), max_rows: rows, max_kv: kv, context };
        // SAFETY: checked, and the caller's contract.
        unsafe { out.write(MASKS.insert(object)?) };
        Ok(())
    })
}

/// Sets rows `first_row..first_row + rows` of a mask from f16 `[rows][n_kv]`, `stride` bytes from a row to the next (0
/// = contiguous): -inf hides a cell, any other value is added to its score, times the query head's `alibi_slopes` if
/// there are any. Cells from `n_kv` on are hidden. The values are copied. Do it once per graph, not once per layer:
/// whole tiles that a row does not see are skipped. AKV_E_ARGUMENT for NaN and +inf, AKV_E_CAPACITY beyond the mask's
/// size, AKV_E_MEMORY (the first time that something is added); nothing is set then. On CUDA NaN and +inf hide a cell,
/// and akv_poll tells of them.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_mask_set(
    mask: *mut akv_mask,
    first_row: i64,
    rows: i64,
    n_kv: i64,
    f16: *const c_void,
    stride: i64,
    stream: *mut c_void,
) -> akv_status {
    guard(|| {
        let mask = MASKS.get(mask, "mask")?;
        // SAFETY: the caller's contract.
        let stream = unsafe { mask.context.stream("stream", stream) }?;
        let busy = || Error::Busy("mask: is in use by another call".to_owned());
        let (max_rows, max_kv) = (mask.max_rows, mask.max_kv);
        let mut mask = mask.mask.try_write().ok_or_else(busy)?;
        let (first_row, rows, n_kv) = (count("first_row", first_row)?, count("rows", rows)?, count("n_kv", n_kv)?);
        if first_row.checked_add(rows).is_none_or(|end| end > max_rows) {
            let max = max_rows;
            return Err(Error::Capacity(format!("first_row, rows: {first_row}, {rows} with {max} rows at most")));
        }
        if n_kv > max_kv {
            return Err(Error::Capacity(format!("n_kv {n_kv}: the mask has {max_kv} cells at most")));
        }
        let stride = if stride == 0 { 2 * n_kv } else { count("stride", stride)? };
        if stride % 2 != 0 || stride < 2 * n_kv && rows > 1 {
            return Err(wrong("stride", stride, format_args!("a multiple of 2, at least {}", 2 * n_kv)));
        }
        if rows == 0 || n_kv == 0 {
            return match &mut *mask {
                AnyMask::Host(mask) => mask.set(first_row, std::iter::repeat_n(&[][..], rows)),
                // SAFETY: no row is read.
                AnyMask::Device(mask) => unsafe { mask.set(first_row, rows, 0, 0, 0, stream) },
            };
        }
        let f16 = pointer(f16.cast::<u16>(), "f16")?;
        let extent = stride.checked_mul(rows - 1).and_then(|bytes| bytes.checked_add(2 * n_kv));
        Bytes::new(f16.cast::<u8>(), Some(extent.unwrap_or(usize::MAX)), "f16")?;
        // SAFETY: aligned, within the address space, and the caller's contract.
        let row = |i: usize| unsafe { std::slice::from_raw_parts(f16.byte_add(i * stride), n_kv) };
        match &mut *mask {
            AnyMask::Host(mask) => mask.set(first_row, (0..rows).map(row)),
            // SAFETY: the caller's contract.
            AnyMask::Device(mask) => unsafe { mask.set(first_row, rows, f16 as u64, stride, n_kv, stream) },
        }
    })
}

/// Destroys a mask. AKV_E_BUSY while calls use it.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_mask_destroy(mask: *mut akv_mask) -> akv_status {
    guard(|| MASKS.remove(mask, "mask", "let calls end that use it").map(drop))
}
