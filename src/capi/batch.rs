//! Steps: batches, and appending.

use super::check::{Grid, array, count, descriptor, optional, pointer, within, wrong, zero};
use super::handle::{BATCHES, CACHES};
use super::types::*;
use super::{cache, device, guard};
use crate::backend::cpu::Cpu;
use crate::backend::cuda::{Device, Tables};
use crate::cache::{Batch, Block, Bounds, Memory, StepSequence};
use crate::error::reserve;
use crate::{Error, Result};
use parking_lot::{Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::ffi::c_void;
use std::sync::Arc;

/// What an `akv_batch` stands for.
pub(super) struct Object {
    pub batch: Batch,
    /// Bound of `akv_threads.nth`.
    pub max_threads: usize,
    /// Calls that work on the step hold it shared; begin, commit and abort exclusively, without waiting.
    step: RwLock<Step>,
    pub workspaces: Workspaces,
    /// On a device.
    tables: Option<Mutex<Tables>>,
    /// Keeps it alive, and busy.
    pub owner: Arc<cache::Object>,
}

/// What validation needs to know of the step in progress without waiting for readers or writers of its rows.
#[derive(Default)]
pub(super) struct Step {
    begun: bool,
    pub sequences: Vec<StepSequence>,
    pub n_new: usize,
    pub n_q: usize,
    /// Most tokens of a sequence once the step's new ones are in.
    pub max_kv: usize,
    /// Tiles that each layer is appended to.
    pub n_appends: usize,
}

impl Object {
    /// The step in progress, which does not end while the guard lives.
    pub fn step(&self) -> Result<RwLockReadGuard<'_, Step>> {
        let step = self.step.read();
        if step.begun { Ok(step) } else { Err(no_step()) }
    }

    /// The device that it computes on, and its tables.
    pub fn device(&self) -> Result<(&Arc<Device>, MutexGuard<'_, Tables>)> {
        match (&self.owner.context.device, &self.tables) {
            (Some(device), Some(tables)) => Ok((device, tables.lock())),
            _ => Err(Error::Internal("a batch without a device".to_owned())),
        }
    }

    fn exclusive(&self) -> Result<RwLockWriteGuard<'_, Step>> {
        let busy = || Error::Busy("batch: other calls are working on its step".to_owned());
        self.step.try_write().ok_or_else(busy)
    }
}

/// Scratch memory for calls that bring none, kept for later ones.
pub(super) struct Workspaces {
    free: Mutex<Vec<Block>>,
    memory: Arc<Memory>,
}

impl Workspaces {
    pub fn new(memory: &Arc<Memory>) -> Workspaces {
        Workspaces { free: Mutex::default(), memory: memory.clone() }
    }

    /// Runs `work` with a workspace of at least `bytes`.
    pub fn with<T>(&self, bytes: usize, work: impl FnOnce(&mut [u8]) -> Result<T>) -> Result<T> {
        let kept = self.free.lock().pop();
        let mut block = match kept.filter(|b| b.len() >= bytes) {
            Some(block) => block,
            // Contexts grow by a token at a time: not so their workspaces.
            None => Block::new(&self.memory, bytes.next_power_of_two())?,
        };
        let result = work(&mut block);
        self.free.lock().push(block);
        result
    }
}

/// Of attention's workspace.
pub(super) const WORKSPACE_ALIGN: usize = 64;

fn no_step() -> Error {
    Error::Argument("batch has no step in progress: expected akv_batch_begin before".to_owned())
}

/// Everything of a step's description that can be checked without the cache.
struct Request<'a> {
    sequences: Vec<StepSequence>,
    positions: Option<&'a [i64]>,
    n_new: usize,
    n_q: usize,
}

impl<'a> Request<'a> {
    /// # Safety
    /// The arrays of `desc` are NULL, misaligned, or as documented during `'a`.
    unsafe fn new(desc: &akv_batch_desc) -> Result<Request<'a>> {
        zero("desc->reserved", desc.reserved)?;
        zero("desc->max_sequences", desc.max_sequences)?;
        zero("desc->max_q", desc.max_q)?;
        zero("desc->max_kv", desc.max_kv)?;
        zero("desc->max_threads", desc.max_threads)?;
        let n = desc.n_sequences as usize;
        if n == 0 {
            return Err(wrong("desc->n_sequences", 0, "1 or more"));
        }
        // SAFETY: the caller's contract.
        let (ids, n_new, n_q) = unsafe {
            (
                array(desc.sequences, n, "desc->sequences")?,
                optional(desc.n_new, n, "desc->n_new")?,
                optional(desc.n_q, n, "desc->n_q")?,
            )
        };
        let at = |array: Option<&[i32]>, name: &str, i: usize| match array {
            Some(values) => count(format_args!("desc->{name}[{i}]"), values[i].into()).map(Some),
            None => Ok(None),
        };
        let mut sequences = Vec::new();
        reserve(&mut sequences, n)?;
        for (i, &sequence) in ids.iter().enumerate() {
            let n_new = at(n_new, "n_new", i)?.unwrap_or(0);
            let n_q = at(n_q, "n_q", i)?.unwrap_or(n_new);
            sequences.push(StepSequence { sequence, n_new, n_q });
        }
        // At most 2^32 summands below 2^31.
        let n_new = sequences.iter().map(|s| s.n_new).sum();
        let n_q = sequences.iter().map(|s| s.n_q).sum();
        // SAFETY: the caller's contract.
        let positions = unsafe { optional(desc.positions, n_new, "desc->positions") }?;
        Ok(Request { sequences, positions, n_new, n_q })
    }
}

fn bounds(desc: &akv_batch_desc) -> Result<Bounds> {
    zero("bounds->n_sequences", desc.n_sequences)?;
    zero("bounds->reserved", desc.reserved)?;
    for (name, null) in [
        ("sequences", desc.sequences.is_null()),
        ("n_new", desc.n_new.is_null()),
        ("n_q", desc.n_q.is_null()),
        ("positions", desc.positions.is_null()),
    ] {
        if !null {
            return Err(wrong(format_args!("bounds->{name}"), "not NULL", "NULL: akv_batch_begin takes the sequences"));
        }
    }
    let bound = |n: usize| if n == 0 { None } else { Some(n) };
    Ok(Bounds {
        max_sequences: bound(within("bounds->max_sequences", desc.max_sequences, 0..=i32::MAX)? as usize),
        max_q: bound(within("bounds->max_q", desc.max_q, 0..=i32::MAX)? as usize),
        max_kv: bound(within("bounds->max_kv", desc.max_kv, 0..=i64::from(i32::MAX))? as usize),
    })
}

/// Makes a batch: it carries one model step at a time through all layers. `bounds` holds max_sequences, max_q, max_kv,
/// max_threads; the rest is 0 or NULL. Steps beyond the bounds are AKV_E_CAPACITY. `*out` is written on success only.
///
/// Threads: begin, commit, abort and destroy are AKV_E_BUSY while other calls use the batch. In between,
/// akv_aligned_attention may run any number of times at once, also for different layers, and akv_quantize_kv for
/// different layers at once.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_batch_create(
    cache: *mut akv_cache,
    bounds: *const akv_batch_desc,
    out: *mut *mut akv_batch,
) -> akv_status {
    guard(|| {
        let owner = CACHES.get(cache, "cache")?;
        owner.cache.check_placement(false)?;
        let out = pointer(out, "out")?;
        // SAFETY: the caller's contract.
        let desc = unsafe { descriptor(bounds, "bounds") }?;
        let bounds = self::bounds(&desc)?;
        let max_threads = match within("bounds->max_threads", desc.max_threads, 0..=1024)? {
            0 => owner.context.cpu.n_threads(),
            n => n as usize,
        };
        let tables = match owner.context.device {
            Some(_) => Some(Mutex::new(device::tables(&owner.cache, &bounds)?)),
            None => None,
        };
        let object = Object {
            batch: Batch::new(owner.cache.clone(), bounds),
            max_threads,
            step: RwLock::default(),
            workspaces: Workspaces::new(owner.cache.memory()),
            tables,
            owner,
        };
        // SAFETY: checked, and the caller's contract.
        unsafe { out.write(BATCHES.insert(object)?) };
        Ok(())
    })
}

/// Begins a step: reserves the pages that its new tokens need in all layers, all or nothing, and makes the sequences
/// its own. Until commit or abort nothing fails for capacity. A sequence that is in another begun batch is AKV_E_BUSY;
/// one beyond the bounds or max_bytes AKV_E_CAPACITY; a batch that is begun already AKV_E_BUSY. Then, per layer:
/// akv_quantize_kv (if tokens are new), akv_aligned_attention. `stream` is NULL on the CPU; on CUDA call it outside
/// capture.
///
/// Errors: AKV_E_ARGUMENT (a count, a sequence that is there twice, descending positions), AKV_E_HANDLE, AKV_E_BUSY,
/// AKV_E_CAPACITY, AKV_E_MEMORY. The batch has no step then, and no sequence is changed.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_batch_begin(
    batch: *mut akv_batch,
    desc: *const akv_batch_desc,
    stream: *mut c_void,
) -> akv_status {
    guard(|| {
        let batch = BATCHES.get(batch, "batch")?;
        // SAFETY: the caller's contract.
        let stream = unsafe { batch.owner.context.stream("stream", stream) }?;
        // SAFETY: the caller's contract.
        let request = unsafe { Request::new(&descriptor(desc, "desc")?) }?;
        let mut step = batch.exclusive()?;
        if step.begun {
            return Err(Error::Busy("batch has a step in progress: commit or abort it first".to_owned()));
        }
        batch.batch.begin(&request.sequences, request.positions)?;
        let len = |s: &StepSequence| Ok(batch.owner.cache.length(s.sequence, None)? + s.n_new);
        let max_kv = request.sequences.iter().try_fold(0, |most, s| Ok(len(s)?.max(most)));
        let max_kv = max_kv.inspect_err(|_| batch.batch.abort())?;
        let mut n_appends = 0;
        if batch.tables.is_some() {
            let (_, mut tables) = batch.device()?;
            let begun = device::begin(&batch.batch, &mut tables, stream);
            n_appends = begun.inspect_err(|_| batch.batch.abort())?;
        }
        let (n_new, n_q) = (request.n_new, request.n_q);
        *step = Step { begun: true, sequences: request.sequences, n_new, n_q, max_kv, n_appends };
        Ok(())
    })
}

/// Ends a step: its tokens are part of their sequences. AKV_E_ARGUMENT, naming the layer, if akv_quantize_kv is missing
/// for one (the step stays begun), or if none is begun. AKV_E_BUSY while calls work on the step.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_batch_commit(batch: *mut akv_batch) -> akv_status {
    guard(|| {
        let batch = BATCHES.get(batch, "batch")?;
        let mut step = batch.exclusive()?;
        if !step.begun {
            return Err(no_step());
        }
        batch.batch.commit()?;
        step.begun = false;
        Ok(())
    })
}

/// Says that a CUDA graph has been launched, on the step's stream, in which akv_quantize_kv of all layers was captured in
/// an earlier step of this batch: the step's new tokens are in all layers, as if the calls had been made. The graph takes
/// the step's sequences and rows from what akv_batch_begin told the device, with the addresses of K, V, q and outputs that
/// it was captured with; query rows beyond the step's are left alone. Graphs of one batch must not run at the same time.
///
/// Errors: AKV_E_ARGUMENT (no step is begun, or it is not within the batch's bounds, so that the graph did nothing),
/// AKV_E_UNSUPPORTED on the CPU.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_batch_replayed(batch: *mut akv_batch) -> akv_status {
    guard(|| {
        let batch = BATCHES.get(batch, "batch")?;
        drop(batch.step()?);
        if batch.tables.is_none() {
            return Err(Error::Unsupported("akv_batch_replayed: the CPU has no graphs".to_owned()));
        }
        let (_, tables) = batch.device()?;
        if !tables.is_replayable() {
            let text = "batch: the step is not within its bounds, so that no graph can do its work";
            return Err(Error::Argument(text.to_owned()));
        }
        batch.batch.replayed()
    })
}

/// Ends a step as if it had not begun: every sequence is as before, bit for bit. AKV_OK if none is begun; AKV_E_BUSY
/// while calls work on the step.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_batch_abort(batch: *mut akv_batch) -> akv_status {
    guard(|| {
        let batch = BATCHES.get(batch, "batch")?;
        let mut step = batch.exclusive()?;
        if step.begun {
            batch.batch.abort();
            step.begun = false;
        }
        Ok(())
    })
}

/// Size and alignment of the workspace that any attention call within the batch's bounds can do with, in any layer, on
/// up to max_threads of the caller's threads or on the context's. AKV_E_ARGUMENT if max_kv has no bound.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_batch_workspace(
    batch: *const akv_batch,
    bytes: *mut usize,
    align: *mut usize,
) -> akv_status {
    guard(|| {
        let batch = BATCHES.get(batch, "batch")?;
        let (bytes, align) = (pointer(bytes, "bytes")?, pointer(align, "align")?);
        let bounds = batch.batch.bounds();
        let max_kv = bounds.max_kv.ok_or_else(|| wrong("the batch's max_kv", "0 (no bound)", "a bound"))?;
        if batch.tables.is_some() {
            let max_q = bounds.max_q.ok_or_else(|| wrong("the batch's max_q", "0 (no bound)", "a bound"))?;
            let (most, _) = device::workspace(&batch.owner.cache, max_q, max_kv);
            // SAFETY: checked, and the caller's contract.
            unsafe {
                bytes.write(most);
                align.write(device::WORKSPACE_ALIGN);
            }
            return Ok(());
        }
        // The context's threads serve a call that names none.
        let nth = batch.max_threads.max(batch.owner.context.cpu.n_threads());
        let layouts = batch.owner.cache.layouts().iter();
        let most = layouts.map(|layout| Cpu::workspace_bytes(layout, max_kv, nth)).max().unwrap_or(0);
        // SAFETY: checked, and the caller's contract.
        unsafe {
            bytes.write(most);
            align.write(WORKSPACE_ALIGN);
        }
        Ok(())
    })
}

/// Destroys a batch; a begun step is aborted. AKV_E_BUSY while calls are in it.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_batch_destroy(batch: *mut akv_batch) -> akv_status {
    guard(|| {
        let batch = BATCHES.remove(batch, "batch", "let calls end")?;
        batch.batch.abort();
        Ok(())
    })
}

/// Appends the step's new tokens in one layer: quantizes `key` `[sum of n_new][n_kv_heads][dim_k]` and `value` `[sum of
/// n_new][n_kv_heads][dim_v]` (NULL if the layer's v_is_prefix_of_k is 1), rows sequence by sequence, in the layer's
/// dtypes, K after RoPE. Once per layer and step (a second time is AKV_E_ARGUMENT, and so is a layer that
/// shares another's rows); without new tokens it does nothing.
/// All rows are checked first: on error nothing is appended, and the call may be made again.
///
/// Errors: AKV_E_ARGUMENT, AKV_E_NONFINITE, AKV_E_RANGE, AKV_E_BUSY (attention on the same layer is running).
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_quantize_kv(
    batch: *mut akv_batch,
    layer: i32,
    key: *const akv_rows,
    value: *const akv_rows,
    stream: *mut c_void,
) -> akv_status {
    guard(|| {
        let batch = BATCHES.get(batch, "batch")?;
        // SAFETY: the caller's contract.
        let stream = unsafe { batch.owner.context.stream("stream", stream) }?;
        let layer = batch.owner.layer(layer)?;
        batch.owner.cache.check_stored(layer)?;
        let step = batch.step()?;
        if step.n_new == 0 {
            return Ok(());
        }
        let shape = &batch.owner.cache.layouts()[layer].shape;
        // SAFETY: checked, and the caller's contract.
        let key = unsafe { &*pointer(key, "key")? };
        let key = Grid::new(key, "key", shape.n_kv_heads, shape.dim_k)?.expect("key", shape.dtype_k)?;
        key.bytes("key", step.n_new)?;
        if shape.v_is_prefix {
            if !value.is_null() {
                return Err(wrong("value", "not NULL", "NULL: the layer's V is a part of K"));
            }
            // SAFETY: checked for n_new rows, and the caller's contract.
            let key = unsafe { key.rows() };
            return batch.batch.append(layer, key, key.prefix(shape.dim_v));
        }
        // SAFETY: checked, and the caller's contract.
        let value = unsafe { &*pointer(value, "value")? };
        let value = Grid::new(value, "value", shape.n_kv_heads, shape.dim_v)?.expect("value", shape.dtype_v)?;
        value.bytes("value", step.n_new)?;
        if batch.tables.is_some() {
            // SAFETY: the caller's contract.
            return unsafe { device::append(&batch, &step, layer, &key, &value, stream) };
        }
        // SAFETY: checked for n_new rows, and the caller's contract.
        let (key, value) = unsafe { (key.rows(), value.rows()) };
        batch.batch.append(layer, key, value)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zeroed() -> akv_batch_desc {
        // SAFETY: plain data.
        unsafe { std::mem::zeroed() }
    }

    fn argument<T>(result: Result<T>, part: &str) {
        match result {
            Err(Error::Argument(text)) if text.contains(part) => {}
            Err(other) => panic!("{other:?} instead of {part:?}"),
            Ok(_) => panic!("no error instead of {part:?}"),
        }
    }

    fn request<'a>(
        ids: &[u64],
        n_new: &[i32],
        n_q: Option<&[i32]>,
        positions: Option<&'a [i64]>,
    ) -> Result<Request<'a>> {
        let desc = akv_batch_desc {
            n_sequences: ids.len() as u32,
            sequences: ids.as_ptr(),
            n_new: n_new.as_ptr(),
            n_q: n_q.map_or(std::ptr::null(), |a| a.as_ptr()),
            positions: positions.map_or(std::ptr::null(), |a| a.as_ptr()),
            ..zeroed()
        };
        // SAFETY: slices of the right lengths.
        unsafe { Request::new(&desc) }
    }

    #[test]
    fn steps() {
        let r = request(&[5, 3], &[2, 0], None, Some(&[4, 4])).unwrap();
        assert_eq!((r.n_new, r.n_q, r.positions.unwrap().len()), (2, 2, 2));
        let r = request(&[5, 3], &[2, 0], Some(&[1, 7]), None).unwrap();
        assert_eq!((r.n_new, r.n_q), (2, 8));
        assert_eq!((r.sequences[1].n_new, r.sequences[1].n_q), (0, 7));
        argument(request(&[5, 3], &[2, -1], None, None), "desc->n_new[1] is -1");
        argument(request(&[5, 3], &[2, 1], Some(&[-2, 1]), None), "desc->n_q[0] is -2");
        argument(request(&[], &[], None, None), "desc->n_sequences is 0");
        // SAFETY: NULL is refused.
        unsafe {
            argument(Request::new(&akv_batch_desc { n_sequences: 1, ..zeroed() }), "desc->sequences is NULL");
            argument(Request::new(&akv_batch_desc { max_kv: 1, ..zeroed() }), "desc->max_kv is 1");
            argument(Request::new(&akv_batch_desc { reserved: 1, ..zeroed() }), "desc->reserved is 1");
        }
    }

    #[test]
    fn zero_bounds_are_none() {
        let b = bounds(&zeroed()).unwrap();
        assert!(b.max_sequences.is_none() && b.max_q.is_none() && b.max_kv.is_none());
        let b = bounds(&akv_batch_desc { max_q: 3, max_kv: 4, ..zeroed() }).unwrap();
        assert_eq!((b.max_sequences, b.max_q, b.max_kv), (None, Some(3), Some(4)));
        argument(bounds(&akv_batch_desc { max_q: -3, ..zeroed() }), "bounds->max_q is -3");
        argument(bounds(&akv_batch_desc { n_sequences: 3, ..zeroed() }), "bounds->n_sequences is 3");
        argument(bounds(&akv_batch_desc { sequences: &7, ..zeroed() }), "bounds->sequences is not NULL");
    }
}
