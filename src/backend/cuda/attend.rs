//! Launching attention: its workspace, and its query rows in chunks that keep that small. Rows over cells are made on the
//! device, which knows what they see.

use super::device::{Device, Kernel, Stream};
use super::params::{
    Aim, AttendParams, MAX_SPANS, Partial, QueryRow, Report, ReportParams, Scanned, Span, SpansParams, Stats, Sums,
    View,
};
use super::{
    ATTEND_THREADS, CELLS_SHARED_BYTES, PUBLISHED_SHARED_BYTES, SPLIT, UNIT_HEADS, attend_shared_bytes,
    dense_shared_bytes, scan_shared_bytes, units,
};
use crate::Result;
use crate::format::{Format, Layout, MAX_DIM, TILE};

/// Most bytes of workspace, as far as one query row at a time keeps to it.
const MOST: usize = 256 << 20;

/// Most query rows of a launch: blocks in y.
const MOST_ROWS: usize = 1 << 15;

/// Blocks of a launch per multiprocessor, if there is work for them: of the scan as many as run at a time, of the second
/// phase, whose blocks differ in what they read, four times as many.
const SCANS: usize = 4;
const ATTENDS: usize = 12;

/// Where the parts of an attention call's workspace begin.
#[derive(Debug, Clone, Copy)]
pub struct Workspace {
    offsets: [usize; 10],
    /// Its size.
    pub bytes: usize,
    /// The first bytes, which must be 0 before the first call; every call leaves them so.
    pub zeros: usize,
    /// Query rows of a launch.
    pub chunk: usize,
    n_rows: usize,
    max_tiles: usize,
}

impl Workspace {
    /// Of up to `n_rows` query rows over up to `max_tiles` tiles, with at least `zeros` bytes that stay 0: calls that share
    /// memory agree on them. `scans`: not all of the rows are dense.
    pub fn new(layout: &Layout, n_rows: usize, max_tiles: usize, scans: bool, zeros: usize) -> Workspace {
        let of_row = Workspace::of(layout, 0, 1, max_tiles, scans, 0).bytes;
        let chunk = (MOST / of_row).clamp(1, MOST_ROWS).min(n_rows.max(1));
        Workspace::of(layout, n_rows, chunk, max_tiles, scans, zeros)
    }

    fn of(layout: &Layout, n_rows: usize, chunk: usize, max_tiles: usize, scans: bool, zeros: usize) -> Workspace {
        let shape = &layout.shape;
        let n_units = chunk * units(shape);
        let heads = n_units * shape.group().min(UNIT_HEADS);
        let of_unit = max_tiles.div_ceil(SPLIT).max(1);
        let splits = heads * of_unit;
        let (tiles, scanned) = if scans { (heads * (1 + max_tiles), splits) } else { (0, 0) };
        let published = usize::from(scans && layout.format == Format::Published);
        let sizes = [
            size_of::<Stats>(),
            n_units * size_of::<u32>(),
            n_rows * (size_of::<QueryRow>() + size_of::<View>()),
            tiles * TILE * size_of::<f32>(),
            tiles * size_of::<Scanned>(),
            scanned * size_of::<Partial>(),
            splits * size_of::<Sums>(),
            splits * shape.dim_v * size_of::<f32>(),
            published * n_units * of_unit * 2 * MAX_DIM * size_of::<u16>(),
            published * heads * size_of::<Aim>(),
        ];
        let (mut bytes, mut i) = (0, 0);
        let offsets = sizes.map(|size| {
            bytes = if i == 2 { bytes.max(zeros.next_multiple_of(256)) } else { bytes };
            let start = bytes;
            (bytes, i) = (bytes + size.next_multiple_of(256), i + 1);
            start
        });
        Workspace { offsets, bytes, zeros: offsets[2], chunk, n_rows, max_tiles }
    }

    /// Puts their addresses into a call.
    pub fn place(&self, start: u64, call: &mut AttendParams) {
        let [stats, done, _, scores, scanned, partials, sums, outs, peaks, aims] =
            self.offsets.map(|offset| start + offset as u64);
        (call.stats, call.done, call.scores, call.scanned, call.partials) = (stats, done, scores, scanned, partials);
        (call.sums, call.outs, call.peaks, call.aims) = (sums, outs, peaks, aims);
        call.max_tiles = self.max_tiles as i32;
    }

    /// Where query rows can be put that no table has.
    pub fn rows(&self, start: u64) -> u64 {
        start + self.offsets[2] as u64
    }

    /// The same of what they see: one for each row at most.
    fn views(&self, start: u64) -> u64 {
        self.rows(start) + (self.n_rows * size_of::<QueryRow>()) as u64
    }
}

/// Cells that a call's rows see, instead of tables.
#[derive(Debug)]
pub struct Cells<'a> {
    /// All but rows, views and spans.
    pub params: SpansParams,
    /// Of all query rows, in their order; none is empty.
    pub spans: &'a [Span],
}

impl Cells<'_> {
    /// Makes rows `first..first + n` of the call, and what they see, in its workspace.
    ///
    /// # Safety
    /// As [`attend`].
    unsafe fn launch(
        &self,
        device: &Device,
        call: &mut AttendParams,
        workspace: &Workspace,
        start: u64,
        (first, n): (usize, usize),
        stream: Stream,
    ) -> Result<()> {
        (call.rows, call.views) = (workspace.rows(start), workspace.views(start));
        let mut params = SpansParams { rows: call.rows, seen: call.mask_seen, ..self.params };
        (params.views, params.mask_tiles) = (call.views, call.mask_tiles);
        let (mut before, mut rows, mut at) = (0, 0, 0);
        for (i, span) in self.spans.iter().enumerate() {
            let (from, to) = (before.max(first), (before + span.rows as usize).min(first + n));
            before += span.rows as usize;
            if from < to {
                let dense = if span.dense == 0 { 0 } else { 1 + (from + span.rows as usize - before) as i32 };
                params.spans[at] = Span { rows: (to - from) as i32, dense, ..*span };
                (at, rows) = (at + 1, rows + to - from);
            }
            if at == MAX_SPANS || i + 1 == self.spans.len() {
                params.n_spans = at as i32;
                let grid = [rows, 1, 1];
                // SAFETY: the contract.
                unsafe { device.launch(device.kernels()?.spans, grid, CELLS_SHARED_BYTES, &params, stream) }?;
                params.first_span += at as i32;
                params.views += (at * size_of::<View>()) as u64;
                params.rows += (rows * size_of::<QueryRow>()) as u64;
                params.seen += if params.seen == 0 { 0 } else { (rows * params.mask_tiles as usize * TILE / 8) as u64 };
                (at, rows) = (0, 0);
            }
        }
        Ok(())
    }
}

/// An attention call on a device, but for its workspace.
#[derive(Debug)]
pub struct Call<'a> {
    /// Layout of the layer.
    pub layout: &'a Layout,
    /// All but the workspace, `stats` and `fused`.
    pub params: AttendParams,
    /// Cells that the rows see; None: `params` has rows and views.
    pub cells: Option<Cells<'a>>,
    /// Query rows.
    pub n_rows: usize,
    /// Most tiles that a row sees.
    pub n_tiles: usize,
    /// There can be rows that read all digits, and others.
    pub dense: bool,
    /// The same.
    pub scans: bool,
    /// Where statistics go, or 0.
    pub report: u64,
    /// `AKV_CUDA`.
    pub backend: i32,
}

/// Launches a call.
///
/// # Safety
/// The addresses in `call` are device memory, as `kernels/params.h` says, until the stream is done with it; `start` is
/// device memory of `workspace.bytes` that nothing else uses until then, and its first `zeros` bytes are 0.
pub unsafe fn attend(device: &Device, call: &Call, workspace: &Workspace, start: u64, stream: Stream) -> Result<()> {
    let (kernels, shape) = (device.kernels()?, &call.layout.shape);
    let splits = call.n_tiles.div_ceil(SPLIT).max(1);
    let mut params = AttendParams { fused: i32::from(splits == 1), ..call.params };
    workspace.place(start, &mut params);
    let stats = params.stats;
    if call.report == 0 {
        params.stats = 0;
    }
    let heads = shape.n_q_heads as u64 * size_of::<f32>() as u64;
    for first in (0..call.n_rows).step_by(workspace.chunk) {
        let n = workspace.chunk.min(call.n_rows - first);
        let grid = [units(shape), n, splits];
        // Blocks take turns at a unit's splits, so that there are about so many on a multiprocessor.
        let blocks = |of_each: usize| (of_each * device.multiprocessors).div_ceil(grid[0] * n).clamp(1, splits);
        params.n_rows = n as i32;
        if let Some(cells) = &call.cells {
            // SAFETY: the contract.
            unsafe { cells.launch(device, &mut params, workspace, start, (first, n), stream) }?;
        }
        let launch = |kernel: Kernel, grid: [usize; 3], shared: usize| {
            let params = AttendParams { blocks: grid[2] as i32, ..params };
            // SAFETY: the contract.
            unsafe { device.launch(kernel, grid, shared, &params, stream) }
        };
        match call.layout.format {
            Format::Published if call.scans => {
                let [peaks, scores, align, values] = kernels.published;
                launch(peaks, grid, 0)?;
                launch(scores, grid, PUBLISHED_SHARED_BYTES)?;
                launch(align, [grid[0], n, 1], 0)?;
                launch(values, grid, PUBLISHED_SHARED_BYTES)?;
            }
            _ if call.scans => {
                let (scan, attend) = kernels.attention(shape);
                if splits > 1 {
                    launch(scan, [grid[0], n, blocks(SCANS)], scan_shared_bytes(shape))?;
                }
                launch(attend, [grid[0], n, blocks(ATTENDS)], attend_shared_bytes(shape))?;
            }
            _ => {}
        }
        if call.dense {
            launch(kernels.dense(shape), grid, dense_shared_bytes(shape))?;
        }
        params.first_row += n as i32;
        params.q.data += n as u64 * params.q.stride_row as u64;
        params.out.data += n as u64 * params.out.stride_row as u64;
        params.rows += (n * size_of::<QueryRow>()) as u64;
        if params.mask_seen != 0 {
            let tiles = (n * params.mask_tiles as usize) as u64;
            params.mask_seen += tiles * (TILE / 8) as u64;
            params.mask_peak += tiles * size_of::<f32>() as u64;
            params.mask_added += tiles * (TILE * size_of::<u16>()) as u64;
        }
        for output in
            [&mut params.lse, &mut params.bound, &mut params.lse_bound, &mut params.estimate, &mut params.amplitude]
        {
            *output += if *output == 0 { 0 } else { n as u64 * heads };
        }
    }
    if call.report != 0 {
        let report =
            ReportParams { shape: call.layout.into(), stats, to: call.report, backend: call.backend, reserved: 0 };
        // SAFETY: the contract.
        unsafe { device.launch(kernels.report, [1, 1, 1], 0, &report, stream)? };
    }
    Ok(())
}

const _: () = assert!(ATTEND_THREADS.is_multiple_of(32) && size_of::<Report>() == 144);
