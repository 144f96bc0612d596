//! Calls on a CUDA context: checked like those on the CPU, as far as that can be done without reading the caller's
//! memory, and launched on the caller's stream.

use super::attention::{Limits, Options, apart, check_tokens, query_rows};
use super::batch::{Object, Step};
use super::cache;
use super::check::{Grid, not_built, pointer, within, wrong};
use super::types::*;
use crate::backend::Mode;
use crate::backend::cuda::params::{
    self, AttendParams, DequantizeParams, EncodeParams, MAX_STATES, MergeParams, QueryRow, State,
};
use crate::backend::cuda::{
    Bounds, Call, Device, MERGE_SHARED_BYTES, Sight, Stream, Tables, Workspace, attend, bytes_of,
};
use crate::cache::{Batch, Cache, Config, NanPolicy, Placement};
use crate::format::{Format, Layout, TILE};
use crate::{Error, Result};
use std::ffi::c_void;

/// Fails for caches that only the CPU has.
pub(super) fn check_config(config: &Config, name: &str) -> Result<()> {
    let on_cuda = "on the CUDA backend";
    if let Some(i) = config.layers.iter().position(|layer| layer.v_is_prefix) {
        return Err(not_built(format_args!("{name}->layers[{i}].v_is_prefix_of_k"), 1, format_args!("0 {on_cuda}")));
    }
    if config.nan != NanPolicy::Error {
        let expected = format_args!("AKV_NAN_ERROR (0) {on_cuda}");
        return Err(not_built(format_args!("{name}->nan_policy"), format_args!("{:?}", config.nan), expected));
    }
    if config.placement != Placement::Append {
        let expected = format_args!("AKV_APPEND (0) {on_cuda}");
        return Err(not_built(format_args!("{name}->placement"), "another placement", expected));
    }
    Ok(())
}

/// Fails for attention that only the CPU has.
pub(super) fn check_attention(desc: &akv_attention_desc, name: &str) -> Result<()> {
    for (field, null) in [("alibi_slopes", desc.alibi_slopes.is_null()), ("tree", desc.tree.is_null())] {
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
fn rows(grid: &Grid) -> params::Rows {
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

/// akv_aligned_attention.
///
/// # Safety
/// What `desc` points to is as documented.
pub(super) unsafe fn attention(batch: &Object, step: &Step, layer: usize, desc: &akv_attention_desc) -> Result<()> {
    let (device, mut tables) = batch.device()?;
    let layout = &batch.owner.cache.layouts()[layer];
    let (shape, n_q) = (&layout.shape, step.n_q);
    let options = Options::new(desc, "desc", layout.format, shape, false)?;
    check_attention(desc, "desc")?;
    // SAFETY: the caller's contract.
    let stream = unsafe { batch.owner.context.stream("desc->stream", desc.stream) }?;
    if !desc.threads.is_null() {
        return Err(wrong("desc->threads", "not NULL", "NULL on the CUDA backend"));
    }
    let q = Grid::new(&desc.q, "desc->q", shape.n_q_heads, shape.dim_k)?;
    let out = Grid::new(&desc.out, "desc->out", shape.n_q_heads, shape.dim_v)?;
    if !desc.sink_logits.is_null() {
        pointer(desc.sink_logits, "desc->sink_logits")?;
    }
    apart(desc, &q, &out, n_q, shape)?;
    // SAFETY: the caller's contract; it is host memory.
    let limits = unsafe { Limits::new(desc, n_q) }?;
    let sight = options.sight();
    batch.batch.lengths(|sequences| check_tokens(sequences, sight, desc))??;
    batch.batch.check_appended(layer)?;
    let capturing = device.is_capturing(stream)?;

    let max_kv = match (capturing, batch.batch.bounds().max_kv) {
        (true, Some(bound)) => bound,
        _ => step.max_kv,
    };
    let max_rows = if capturing { batch.batch.bounds().max_q.unwrap_or(n_q) } else { n_q };
    // Replays of a graph have other rows than this step.
    let is_dense = |n: usize| options.all_dense || n > super::attention::MAX_PROGRESSIVE;
    let (dense, scans) = match capturing {
        true => (is_dense(max_rows), !options.all_dense),
        false => (step.sequences.iter().any(|s| is_dense(s.n_q)), step.sequences.iter().any(|s| !is_dense(s.n_q))),
    };
    let tiles = max_kv.div_ceil(TILE);
    let room = Workspace::new(layout, max_rows, tiles, scans, tables.zeros);
    let start = if desc.workspace.is_null() {
        tables.workspace(room.bytes, room.zeros, stream, capturing)?
    } else {
        if !(desc.workspace as usize).is_multiple_of(WORKSPACE_ALIGN) {
            let expected = format_args!("an address aligned to {WORKSPACE_ALIGN}");
            return Err(wrong("desc->workspace", format_args!("{:p}", desc.workspace), expected));
        }
        if desc.workspace_bytes < room.bytes {
            let expected = format_args!("at least {}", room.bytes);
            return Err(wrong("desc->workspace_bytes", desc.workspace_bytes, expected));
        }
        // SAFETY: the caller's workspace, which has at least as many bytes.
        unsafe { device.clear(desc.workspace as u64, room.zeros, stream) }?;
        desc.workspace as u64
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
    let call = Call {
        layout,
        params: AttendParams {
            shape: layout.into(),
            q: rows(&q),
            out: rows(&out),
            views: tables.views(layer, capturing)?,
            rows: rows_at,
            sinks: desc.sink_logits as u64,
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
        },
        n_rows,
        n_tiles: tiles,
        dense,
        scans,
        report: desc.stats as u64,
        backend: AKV_CUDA,
    };
    // SAFETY: checked, and the caller's contract.
    unsafe { attend(device, &call, &room, start, stream) }
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
        reserved: 0,
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
        0 | 1 => format!("{place}: token {row} of sequence {sequence}, layer {layer}, head {head}"),
        _ => format!("{place}: query row {row}, of sequence {sequence}, layer {layer}, head {head}"),
    };
    match found.status {
        params::FAULT_NONFINITE => Error::NonFinite(format!("{at}: NaN or infinity")),
        params::FAULT_RANGE => Error::Range(format!("{at}: a value that the format, or the dtype, cannot hold")),
        _ => Error::Range(format!("{at}: scores beyond binary32, or outputs beyond their dtype")),
    }
}

const _: () = assert!(size_of::<params::Report>() == size_of::<akv_stats>() && size_of::<*mut c_void>() == 8);
