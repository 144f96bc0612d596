//! Calls on a CUDA context: checked like those on the CPU, as far as that can be done without reading the caller's
//! memory, and launched on the caller's stream.

use super::attention::{Limits, MAX_PROGRESSIVE, Options, apart, check_tokens, query_rows};
use super::batch::{Object, Step};
use super::check::{Grid, not_built, pointer, within, wrong};
use super::types::*;
use super::{cache, context};
use crate::backend::Mode;
use crate::backend::cuda::params::{
    self, AttendParams, DequantizeParams, EncodeParams, MAX_STATES, MergeParams, QueryRow, Span, SpansParams, State,
};
use crate::backend::cuda::{
    Bounds, Call, Cells, Device, MERGE_SHARED_BYTES, Mask, Sight, Stream, Tables, Workspace, attend, bytes_of,
};
use crate::cache::{Batch, Cache, Config, NanPolicy, Placement, SlotLayer};
use crate::format::{Format, Layout, TILE};
use crate::{Error, Result};
use std::ffi::c_void;
use std::sync::PoisonError;

/// Fails for caches that only the CPU has.
pub(super) fn check_config(config: &Config, name: &str) -> Result<()> {
    let on_cuda = "on the CUDA backend";
    if config.format != Format::Aligned && config.placement != Placement::Append {
        let expected = format_args!("AKV_FORMAT_ALIGNED (0) with cells {on_cuda}");
        return Err(not_built(format_args!("{name}->format"), format_args!("{:?}", config.format), expected));
    }
    if let Some(i) = config.layers.iter().position(|layer| layer.v_is_prefix) {
        return Err(not_built(format_args!("{name}->layers[{i}].v_is_prefix_of_k"), 1, format_args!("0 {on_cuda}")));
    }
    if let Some((i, other)) = config.shares.first() {
        let (field, expected) = (format_args!("{name}->layers[{i}].share_with"), format_args!("0 {on_cuda}"));
        return Err(not_built(field, other + 1, expected));
    }
    if config.nan != NanPolicy::Error {
        let expected = format_args!("AKV_NAN_ERROR (0) {on_cuda}");
        return Err(not_built(format_args!("{name}->nan_policy"), format_args!("{:?}", config.nan), expected));
    }
    Ok(())
}

/// Fails for attention that only the CPU has. `slots`: over cells.
pub(super) fn check_attention(desc: &akv_attention_desc, name: &str, slots: bool) -> Result<()> {
    for (field, null) in [("alibi_slopes", slots || desc.alibi_slopes.is_null()), ("tree", desc.tree.is_null())] {
        if !null {
            return Err(not_built(format_args!("{name}->{field}"), "not NULL", "NULL on the CUDA backend"));
        }
    }
    if desc.sink_tokens != 0 {
        return Err(not_built(format_args!("{name}->sink_tokens"), desc.sink_tokens, "0 on the CUDA backend"));
    }
    Ok(())
}

/// Addresses of a caller's rows.
pub(super) fn rows(grid: &Grid) -> params::Rows {
    let (data, stride_row, stride_head) = grid.address();
    params::Rows { data, stride_row, stride_head, dtype: grid.dtype as i32, reserved: 0 }
}

/// What kernels are told of query rows.
fn device_rows(rows: Vec<crate::backend::QueryRow>) -> Vec<QueryRow> {
    let (mut sequence, mut n_dense) = (None, 0);
    let row = |row: crate::backend::QueryRow| {
        if sequence != Some(row.sequence) {
            (sequence, n_dense) = (Some(row.sequence), 0);
        }
        n_dense += i32::from(row.dense);
        QueryRow {
            sequence: row.sequence as i32,
            from: row.from.min(row.to) as i32,
            to: row.to as i32,
            n: row.n as i32,
            dense: if row.dense { n_dense } else { 0 },
            reserved: 0,
        }
    };
    rows.into_iter().map(row).collect()
}

/// The tables of a batch.
pub(super) fn tables(cache: &Cache, bounds: &crate::cache::Bounds) -> Result<Tables> {
    let bounds = match (bounds.max_sequences, bounds.max_q, bounds.max_kv) {
        (Some(max_sequences), Some(max_q), Some(max_kv)) => Some(Bounds { max_sequences, max_q, max_kv }),
        _ => None,
    };
    let workspace = bounds.map_or((0, 0), |b| workspace(cache, b.max_q, b.max_kv));
    let mut tables = Tables::new(cache.memory(), cache.layouts().len(), bounds, workspace)?;
    for layout in cache.layouts() {
        let dense = layout.format == Format::Raw;
        tables.expect(Sight { causal: true, window: layout.shape.window, head: 0, dense });
    }
    Ok(tables)
}

/// Bytes that calls of `max_q` query rows over `max_kv` tokens need in any layer, and how many of them stay 0.
pub(super) fn workspace(cache: &Cache, max_q: usize, max_kv: usize) -> (usize, usize) {
    let most = |zeros: usize, what: fn(&Workspace) -> usize| {
        let of = |layout: &Layout, scans| what(&Workspace::new(layout, max_q, max_kv.div_ceil(TILE), scans, zeros));
        cache.layouts().iter().map(|layout| of(layout, false).max(of(layout, true))).max().unwrap_or(0)
    };
    let zeros = most(0, |workspace| workspace.zeros);
    (most(zeros, |workspace| workspace.bytes), zeros)
}

/// Tells the device of a step that has begun. Returns how many tiles each layer is appended to.
pub(super) fn begin(batch: &Batch, tables: &mut Tables, stream: Stream) -> Result<usize> {
    let plan = batch.plan()?;
    batch.lengths(|sequences| {
        tables.begin(&plan, stream, |sight| query_rows(sequences, sight, Limits::default()).map(device_rows))
    })??;
    Ok(plan.n_appends)
}

/// akv_quantize_kv, checked as far as the CPU's.
///
/// # Safety
/// The rows are device memory as documented.
pub(super) unsafe fn append(
    batch: &Object,
    step: &Step,
    layer: usize,
    k: &Grid,
    v: &Grid,
    stream: Stream,
) -> Result<()> {
    let (device, tables) = batch.device()?;
    let layout = &batch.owner.cache.layouts()[layer];
    batch.batch.append_on_device(layer, || {
        let capturing = device.is_capturing(stream)?;
        let (appends, n) = tables.appends(layer, step.n_appends, capturing)?;
        let call = EncodeParams {
            shape: layout.into(),
            k: rows(k),
            v: rows(v),
            appends,
            fault: device.fault_address(),
            layer: layer as i32,
            reserved: 0,
        };
        let (kernel, shared) = device.kernels()?.append(layout);
        // SAFETY: the caller's contract; the tables name pages that the step has reserved.
        unsafe { device.launch(kernel, [n, layout.shape.n_kv_heads, 1], shared, &call, stream) }
    })
}

/// An attention call, apart from what its rows see, checked as far as that can be done on the host.
struct Request<'a> {
    desc: &'a akv_attention_desc,
    options: Options,
    q: Grid,
    out: Grid,
    stream: Stream,
    capturing: bool,
}

impl<'a> Request<'a> {
    /// # Safety
    /// The stream in `desc` is one.
    unsafe fn new(
        context: &context::Object,
        device: &Device,
        desc: &'a akv_attention_desc,
        layout: &Layout,
        n_q: usize,
        slots: bool,
    ) -> Result<Request<'a>> {
        let shape = &layout.shape;
        let options = Options::new(desc, "desc", layout.format, shape, slots)?;
        check_attention(desc, "desc", slots)?;
        // SAFETY: the caller's contract.
        let stream = unsafe { context.stream("desc->stream", desc.stream) }?;
        if !desc.threads.is_null() {
            return Err(wrong("desc->threads", "not NULL", "NULL on the CUDA backend"));
        }
        let q = Grid::new(&desc.q, "desc->q", shape.n_q_heads, shape.dim_k)?;
        let out = Grid::new(&desc.out, "desc->out", shape.n_q_heads, shape.dim_v)?;
        for (name, p) in [("desc->sink_logits", desc.sink_logits), ("desc->alibi_slopes", desc.alibi_slopes)] {
            if !p.is_null() {
                pointer(p, name)?;
            }
        }
        apart(desc, &q, &out, n_q, shape)?;
        let capturing = device.is_capturing(stream)?;
        Ok(Request { desc, options, q, out, stream, capturing })
    }

    /// The caller's workspace, if there is one, which must be as large as `room`.
    fn workspace(&self, device: &Device, room: &Workspace) -> Result<Option<u64>> {
        let desc = self.desc;
        if desc.workspace.is_null() {
            return Ok(None);
        }
        if !(desc.workspace as usize).is_multiple_of(WORKSPACE_ALIGN) {
            let expected = format_args!("an address aligned to {WORKSPACE_ALIGN}");
            return Err(wrong("desc->workspace", format_args!("{:p}", desc.workspace), expected));
        }
        if desc.workspace_bytes < room.bytes {
            let expected = format_args!("at least {}", room.bytes);
            return Err(wrong("desc->workspace_bytes", desc.workspace_bytes, expected));
        }
        // SAFETY: the caller's workspace, which has at least as many bytes.
        unsafe { device.clear(desc.workspace as u64, room.zeros, self.stream) }?;
        Ok(Some(desc.workspace as u64))
    }

    /// What the kernels are told, but for what rows see.
    fn params(&self, device: &Device, layout: &Layout, layer: usize) -> AttendParams {
        let (desc, options) = (self.desc, &self.options);
        AttendParams {
            shape: layout.into(),
            q: rows(&self.q),
            out: rows(&self.out),
            sinks: desc.sink_logits as u64,
            slopes: desc.alibi_slopes as u64,
            lse: desc.lse as u64,
            bound: desc.bound as u64,
            lse_bound: desc.lse_bound as u64,
            estimate: desc.estimate as u64,
            amplitude: desc.amplitude as u64,
            fault: device.fault_address(),
            mode: if options.mode == Mode::Guaranteed { params::MODE_GUARANTEED } else { params::MODE_EXPECTED },
            scale: options.scale,
            softcap: options.softcap,
            tolerance: options.tolerance,
            layer: layer as i32,
            ..AttendParams::default()
        }
    }

    /// True if `n` query rows of a sequence or span read all digits.
    fn is_dense(&self, n: usize) -> bool {
        self.options.all_dense || n > MAX_PROGRESSIVE
    }

    /// If there are rows that read all digits, and others, among those of sequences or spans.
    fn kinds(&self, n_q: impl Iterator<Item = usize> + Clone) -> (bool, bool) {
        (n_q.clone().any(|n| self.is_dense(n)), n_q.clone().any(|n| !self.is_dense(n)))
    }

    /// The whole call, over sequences: there can be rows that read all digits, and others.
    fn call<'s>(&self, params: AttendParams, layout: &'s Layout, n_q: usize, (dense, scans): (bool, bool)) -> Call<'s> {
        let report = self.desc.stats as u64;
        Call { layout, params, cells: None, n_rows: n_q, n_tiles: 0, dense, scans, report, backend: AKV_CUDA }
    }
}

/// akv_aligned_attention.
///
/// # Safety
/// What `desc` points to is as documented.
pub(super) unsafe fn attention(batch: &Object, step: &Step, layer: usize, desc: &akv_attention_desc) -> Result<()> {
    let (device, mut tables) = batch.device()?;
    let layout = &batch.owner.cache.layouts()[layer];
    let n_q = step.n_q;
    // SAFETY: the caller's contract.
    let request = unsafe { Request::new(&batch.owner.context, device, desc, layout, n_q, false) }?;
    let (stream, capturing) = (request.stream, request.capturing);
    // SAFETY: the caller's contract; it is host memory.
    let limits = unsafe { Limits::new(desc, n_q) }?;
    let sight = request.options.sight();
    batch.batch.lengths(|sequences| check_tokens(sequences, sight, desc))??;
    batch.batch.check_appended(layer)?;

    let max_kv = match (capturing, batch.batch.bounds().max_kv) {
        (true, Some(bound)) => bound,
        _ => step.max_kv,
    };
    let max_rows = if capturing { batch.batch.bounds().max_q.unwrap_or(n_q) } else { n_q };
    // Replays of a graph have other rows than this step.
    let (dense, scans) = match capturing {
        true => (request.is_dense(max_rows), !request.options.all_dense),
        false => request.kinds(step.sequences.iter().map(|s| s.n_q)),
    };
    let tiles = max_kv.div_ceil(TILE);
    let room = Workspace::new(layout, max_rows, tiles, scans, tables.zeros);
    let start = match request.workspace(device, &room)? {
        Some(start) => start,
        None => tables.workspace(room.bytes, room.zeros, stream, capturing)?,
    };

    let known = if limits.is_empty() { tables.rows(sight, n_q, capturing)? } else { None };
    let (rows_at, n_rows) = match known {
        Some(known) => known,
        None if capturing => {
            return Err(Error::Unsupported(
                "a captured call takes its rows from the step's tables: attend with the same mode, visibility and window in \
                 a step before the one that is captured, and with neither kv_from nor kv_to"
                    .to_owned(),
            ));
        }
        None => {
            let rows = batch.batch.lengths(|s| query_rows(s, sight, limits).map(device_rows))??;
            // SAFETY: the workspace has room for them.
            unsafe { device.upload(room.rows(start), bytes_of(&rows), stream) }?;
            (room.rows(start), rows.len())
        }
    };
    let views = tables.views(layer, capturing)?;
    let params = AttendParams { views, rows: rows_at, ..request.params(device, layout, layer) };
    let call = Call { n_rows, n_tiles: tiles, ..request.call(params, layout, n_q, (dense, scans)) };
    // SAFETY: checked, and the caller's contract.
    unsafe { attend(device, &call, &room, start, stream) }
}

/// Query rows over cells that are at work at once, so that workspaces do not depend on how many there are. `scans`: not all
/// of them read all digits.
fn rows_over_cells(scans: bool) -> usize {
    if scans { 64 } else { 1024 }
}

/// Bytes that akv_slots_attention can do with over spans of up to `max_kv` cells, in any layer.
pub(super) fn slots_workspace(cache: &Cache, max_kv: usize) -> usize {
    let of =
        |layout: &Layout, scans| Workspace::new(layout, rows_over_cells(scans), max_kv.div_ceil(TILE), scans, 0).bytes;
    cache.layouts().iter().map(|layout| of(layout, true).max(of(layout, false))).max().unwrap_or(0)
}

/// akv_slots_attention, of spans that are checked.
///
/// # Safety
/// What `desc` points to is as documented.
pub(super) unsafe fn slots_attention(
    cache: &cache::Object,
    device: &Device,
    layer: usize,
    spans: &[akv_span],
    mask: Option<&Mask>,
    desc: &akv_attention_desc,
) -> Result<()> {
    let layout = &cache.cache.layouts()[layer];
    let n_q: usize = spans.iter().map(|span| span.n_q as usize).sum();
    // SAFETY: the caller's contract.
    let request = unsafe { Request::new(&cache.context, device, desc, layout, n_q, true) }?;
    let cells = cache.cache.read_slots(layer)?;
    let attached = cells.attached()?;
    let (mut list, mut max_kv) = (Vec::with_capacity(spans.len()), 0);
    for span in spans.iter().filter(|span| span.n_q > 0) {
        max_kv = max_kv.max(span.n_kv as usize);
        let (stream, n_kv, dense) = (span.stream, span.n_kv as i32, request.is_dense(span.n_q as usize).into());
        list.push(Span { stream, rows: span.n_q, n_kv, dense });
    }
    let (dense, scans) = request.kinds(list.iter().map(|span| span.rows as usize));
    let tiles = max_kv.div_ceil(TILE);
    let room = Workspace::new(layout, n_q.min(rows_over_cells(scans)), tiles, scans, 0);
    let start = match (request.workspace(device, &room)?, &cache.scratches) {
        (Some(start), _) => start,
        (None, _) if request.capturing => {
            let expected = "memory of akv_slots_workspace's size in a call that is captured";
            return Err(Error::Unsupported(format!("desc->workspace is NULL: expected {expected}")));
        }
        (None, Some(scratches)) => {
            scratches.lock().unwrap_or_else(PoisonError::into_inner).get(room.bytes, room.zeros, request.stream)?
        }
        (None, None) => return Err(Error::Internal("cells without workspaces".to_owned())),
    };
    cells.tell(device, request.stream, request.capturing)?;
    let mut params = request.params(device, layout, layer);
    if let Some((k, v)) = &attached {
        (params.attached_k, params.attached_v) = (k.into(), v.into());
    }
    if let Some(mask) = mask {
        mask.place(&mut params);
    }
    let spans_of_call: SpansParams = cells.spans()?;
    let call = Call {
        cells: Some(Cells { params: spans_of_call, spans: &list }),
        n_tiles: tiles,
        ..request.call(params, layout, n_q, (dense, scans))
    };
    // SAFETY: checked, and the caller's contract.
    unsafe { attend(device, &call, &room, start, request.stream) }
}

/// Fails for work whose books are the host's in a stream that is captured.
pub(super) fn check_not_captured(device: &Device, stream: Stream, call: &str) -> Result<()> {
    match device.is_capturing(stream)? {
        true => Err(Error::Unsupported(format!("{call}: expected a stream that is not captured"))),
        false => Ok(()),
    }
}

/// Makes launched work on cells, which nothing else uses meanwhile, happen before and after.
pub(super) fn apart_from_launched<T>(device: &Device, work: impl FnOnce() -> Result<T>) -> Result<T> {
    device.synchronize()?;
    let done = work()?;
    device.synchronize().map(|()| done)
}

/// akv_slots_read.
///
/// # Safety
/// The rows are device memory as documented.
pub(super) unsafe fn slots_read(
    cells: &SlotLayer,
    device: &Device,
    range: (usize, usize),
    rows_of: (Option<Grid>, Option<Grid>),
    stream: Stream,
) -> Result<()> {
    check_not_captured(device, stream, "akv_slots_read")?;
    let (key, value) = (rows_of.0.as_ref().map(rows), rows_of.1.as_ref().map(rows));
    // SAFETY: the caller's contract.
    let mut launch = unsafe { crate::cache::launcher(device, stream) };
    cells.read_on_device(range.0, range.1, key, value, &mut launch)
}

/// Alignment of a caller's workspace.
pub(super) const WORKSPACE_ALIGN: usize = 256;

/// akv_dequantize_kv.
///
/// # Safety
/// `key` and `value` are NULL, misaligned, or device memory as documented.
pub(super) unsafe fn dequantize(
    cache: &cache::Object,
    device: &Device,
    sequence: u64,
    layer: usize,
    range: (usize, usize),
    rows_of: (Option<Grid>, Option<Grid>),
    stream: Stream,
) -> Result<()> {
    let layout = &cache.cache.layouts()[layer];
    let none = params::Rows::default();
    let call = DequantizeParams {
        shape: layout.into(),
        view: cache.cache.device_view(sequence, layer, stream)?,
        k: rows_of.0.as_ref().map_or(none, rows),
        v: rows_of.1.as_ref().map_or(none, rows),
        fault: device.fault_address(),
        first: range.0 as i32,
        n: range.1 as i32,
        layer: layer as i32,
        ..DequantizeParams::default()
    };
    // SAFETY: the caller's contract; the view names pages of the cache.
    unsafe { device.launch(device.kernels()?.dequantize, [range.1, layout.shape.n_kv_heads, 1], 0, &call, stream) }
}

/// akv_merge_states, checked as on the CPU.
///
/// # Safety
/// The arrays are device memory as documented.
pub(super) unsafe fn merge(
    device: &Device,
    states: &[akv_state],
    rows: usize,
    dim: usize,
    out: &akv_state,
    stream: Stream,
) -> Result<()> {
    within("n", states.len(), 1..=MAX_STATES)?;
    let state = |s: &akv_state| State {
        out: s.out as u64,
        lse: s.lse as u64,
        bound: s.bound as u64,
        lse_bound: s.lse_bound as u64,
        estimate: s.estimate as u64,
        amplitude: s.amplitude as u64,
    };
    let mut call = MergeParams {
        n: states.len() as i32,
        dim: dim as i32,
        out: state(out),
        states: [State::default(); MAX_STATES],
    };
    for (to, from) in call.states.iter_mut().zip(states) {
        *to = state(from);
    }
    within("rows", rows, 0..=i32::MAX as usize)?;
    // SAFETY: the caller's contract.
    unsafe { device.launch(device.kernels()?.merge, [rows, 1, 1], MERGE_SHARED_BYTES, &call, stream) }
}

/// The error that a device's fault stands for.
pub(super) fn fault(found: &params::Fault) -> Error {
    let place = params::PLACES.get(found.place as usize).unwrap_or(&"?");
    let (sequence, layer, row, head) = (found.sequence, found.layer, found.row, found.head);
    let at = match found.place {
        0 | 1 if sequence == 0 => format!("{place}: slot {row}, layer {layer}, head {head}"),
        0 | 1 => format!("{place}: token {row} of sequence {sequence}, layer {layer}, head {head}"),
        4 => format!("{place}: row {row}, cell {head}"),
        _ if sequence == 0 => format!("{place}: query row {row}, layer {layer}, head {head}"),
        _ => format!("{place}: query row {row}, of sequence {sequence}, layer {layer}, head {head}"),
    };
    match found.status {
        params::FAULT_NONFINITE if found.place == 4 => Error::Argument(format!("{at}: NaN or +inf")),
        params::FAULT_NONFINITE => Error::NonFinite(format!("{at}: NaN or infinity")),
        params::FAULT_RANGE => Error::Range(format!("{at}: a value that the format, or the dtype, cannot hold")),
        _ => Error::Range(format!("{at}: scores beyond binary32, or outputs beyond their dtype")),
    }
}

const _: () = assert!(size_of::<params::Report>() == size_of::<akv_stats>() && size_of::<*mut c_void>() == 8);
