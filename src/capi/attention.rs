//! Attention, and merging partial attention.

use super::batch::{Object, WORKSPACE_ALIGN, Workspaces};
use super::check::{Bytes, Field, Grid, array, count, descriptor, disjoint, optional, pointer, within, wrong, zero};
use super::handle::{BATCHES, CONTEXTS};
use super::types::*;
use super::{context, device, guard};
use crate::backend::cpu::{Cpu, State, merge};
use crate::backend::cuda::Sight;
use crate::backend::{Attention, Floats, Mask, Mode, QueryRow, TREE, Threads};
use crate::cache::{NanPolicy, Positions, SequenceView};
use crate::error::{collect, reserve};
use crate::format::{Clean, Format, Layout, MAX_DIM, MAX_LATENT, Rows, Shape};
use crate::{Error, Result};
use std::ffi::c_void;
use std::fmt::Display;
use std::ops::Deref;

/// Query rows of a sequence from which on decoding every tile once is cheaper than choosing digits per row.
pub(super) const MAX_PROGRESSIVE: usize = 8;

/// What an attention call asks for, apart from memory: checked here for `akv_aligned_attention` and `akv_supports`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Options {
    pub scale: f32,
    pub softcap: f32,
    pub tolerance: f32,
    pub mode: Mode,
    causal: bool,
    window: usize,
    sink_tokens: usize,
    /// No row takes another path than the dense one.
    pub all_dense: bool,
    /// AKV_PATH_* that rows can take.
    pub paths: i32,
}

impl Options {
    /// `slots`: for akv_slots_attention.
    pub fn new(d: &akv_attention_desc, name: &str, format: Format, shape: &Shape, slots: bool) -> Result<Options> {
        let at = |field| Field(&name, "->", field);
        zero(at("flags"), d.flags)?;
        Grid::new(&d.q, at("q"), shape.n_q_heads, shape.dim_k)?;
        Grid::new(&d.out, at("out"), shape.n_q_heads, shape.dim_v)?;
        if !d.scale.is_finite() {
            return Err(wrong(at("scale"), d.scale, "a finite factor, or 0 for 1 / sqrt(dim_k)"));
        }
        if !(d.tolerance >= 0.0 && d.tolerance.is_finite()) {
            return Err(wrong(at("tolerance"), d.tolerance, "a finite number above 0, or 0 for 1e-3"));
        }
        let mode = match d.mode {
            AKV_EXPECTED => Mode::Expected,
            AKV_GUARANTEED => Mode::Guaranteed,
            AKV_EXACT => Mode::Exact,
            other => return Err(wrong(at("mode"), other, "AKV_EXPECTED (0), AKV_GUARANTEED (1) or AKV_EXACT (2)")),
        };
        within(at("visibility"), d.visibility, AKV_CAUSAL..=AKV_FULL)?;
        let window = within(at("window"), d.window, 0..=i32::MAX)? as usize;
        let sink_tokens = within(at("sink_tokens"), d.sink_tokens, 0..=i32::MAX)? as usize;
        zero(at("reserved"), d.reserved)?;
        if !(d.logit_softcap >= 0.0 && d.logit_softcap.is_finite()) {
            return Err(wrong(at("logit_softcap"), d.logit_softcap, "a finite cap above 0, or 0 for none"));
        }
        if slots {
            zero(at("visibility"), d.visibility)?;
            zero(at("window"), d.window)?;
            zero(at("sink_tokens"), d.sink_tokens)?;
            if !d.alibi_slopes.is_null() && d.mask.is_null() {
                return Err(wrong(at("alibi_slopes"), "not NULL", "NULL without a mask, whose values they multiply"));
            }
        }
        let not_here = |field| {
            let call = if slots { "akv_slots_attention: its mask says it all" } else { "akv_aligned_attention" };
            Err(wrong(at(field), "not NULL", format_args!("NULL in {call}")))
        };
        let others = [("kv_from", d.kv_from.is_null()), ("kv_to", d.kv_to.is_null()), ("tree", d.tree.is_null())];
        match others.iter().find(|(_, null)| !null) {
            Some(&(field, _)) if slots => return not_here(field),
            _ if !slots && !d.mask.is_null() => return not_here("mask"),
            _ => {}
        }
        if format == Format::Published {
            let none = "with AKV_FORMAT_PUBLISHED";
            if d.logit_softcap != 0.0 {
                return Err(wrong(at("logit_softcap"), d.logit_softcap, format_args!("0 {none}")));
            }
            if d.sink_tokens != 0 {
                return Err(wrong(at("sink_tokens"), d.sink_tokens, format_args!("0 {none}")));
            }
            for (field, null) in [
                ("sink_logits", d.sink_logits.is_null()),
                ("alibi_slopes", d.alibi_slopes.is_null()),
                ("tree", d.tree.is_null()),
            ] {
                if !null {
                    return Err(wrong(at(field), "not NULL", format_args!("NULL {none}")));
                }
            }
        }
        let all_dense = mode == Mode::Exact || format == Format::Raw || shape.v_is_prefix;
        let paths = match format {
            _ if all_dense => AKV_PATH_DENSE,
            Format::Published => AKV_PATH_DENSE | AKV_PATH_PUBLISHED,
            _ => AKV_PATH_DENSE | AKV_PATH_PROGRESSIVE,
        };
        Ok(Options {
            scale: if d.scale == 0.0 { 1.0 / (shape.dim_k as f32).sqrt() } else { d.scale },
            softcap: d.logit_softcap,
            tolerance: if d.tolerance == 0.0 { 1e-3 } else { d.tolerance },
            mode,
            causal: d.visibility == AKV_CAUSAL,
            window: if window == 0 { shape.window } else { window },
            sink_tokens,
            all_dense,
            paths,
        })
    }

    /// What rows see.
    pub fn sight(&self) -> Sight {
        Sight { causal: self.causal, window: self.window, head: self.sink_tokens, dense: self.all_dense }
    }
}

/// The caller's threads.
struct Team {
    ith: usize,
    nth: usize,
    barrier: akv_barrier_fn,
    user: *mut c_void,
}

// SAFETY: `barrier` and `user` are made to be used by many threads.
unsafe impl Sync for Team {}

impl Team {
    /// # Safety
    /// `threads` is NULL, misaligned, or valid.
    unsafe fn new(threads: *const akv_threads, max_threads: usize) -> Result<Option<Team>> {
        if threads.is_null() {
            return Ok(None);
        }
        // SAFETY: checked, and the caller's contract.
        let t = unsafe { pointer(threads, "desc->threads")?.read() };
        let nth = count("desc->threads->nth", t.nth.into())?;
        if nth == 0 || nth > max_threads {
            return Err(wrong("desc->threads->nth", nth, format_args!("1 to max_threads ({max_threads})")));
        }
        let ith = within("desc->threads->ith", t.ith, 0..=t.nth - 1)? as usize;
        if nth > 1 && t.barrier.is_none() {
            return Err(wrong("desc->threads->barrier", "NULL", "a function if nth is above 1"));
        }
        Ok(Some(Team { ith, nth, barrier: t.barrier, user: t.user }))
    }

    fn wait(&self) {
        if let Some(barrier) = self.barrier {
            // SAFETY: the caller's function, with the caller's pointer.
            unsafe { barrier(self.user) }
        }
    }
}

/// Memory of an optional output of `n` floats: none if it is NULL.
fn floats(p: *mut f32, n: Option<usize>, name: impl Display) -> Result<Bytes> {
    if p.is_null() {
        return Ok(Bytes { from: 0, to: 0 });
    }
    Bytes::new(pointer(p, &name)?, n, name)
}

/// What each query row does not see, whatever else is said: `[rows]` each.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Limits<'a> {
    kv_from: Option<&'a [i64]>,
    kv_to: Option<&'a [i64]>,
    tree: Option<&'a [u64]>,
}

impl<'a> Limits<'a> {
    /// # Safety
    /// The arrays of `desc` are NULL, misaligned, or as documented during `'a`.
    pub unsafe fn new(desc: &akv_attention_desc, n_q: usize) -> Result<Limits<'a>> {
        // SAFETY: the caller's contract.
        let limits = unsafe {
            Limits {
                kv_from: optional(desc.kv_from, n_q, "desc->kv_from")?,
                kv_to: optional(desc.kv_to, n_q, "desc->kv_to")?,
                tree: optional(desc.tree, n_q, "desc->tree")?,
            }
        };
        for (name, array) in [("kv_from", limits.kv_from), ("kv_to", limits.kv_to)] {
            if let Some((i, &value)) = array.and_then(|a| a.iter().enumerate().find(|(_, v)| **v < 0)) {
                return Err(wrong(format_args!("desc->{name}[{i}]"), value, "0 or more"));
            }
        }
        Ok(limits)
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.kv_from.is_none() && self.kv_to.is_none() && self.tree.is_none()
    }
}

/// Fails for query rows that are no tokens, unless nothing asks where they are.
pub(super) fn check_tokens<P>(sequences: &[(usize, usize, P)], sight: Sight, desc: &akv_attention_desc) -> Result<()> {
    let Some(i) = sequences.iter().position(|(len, n_q, _)| n_q > len) else { return Ok(()) };
    let (len, n_q) = (sequences[i].0, sequences[i].1);
    let who = format_args!("for sequence {i} of the step, which has {n_q} query rows and {len} tokens");
    if sight.causal {
        return Err(wrong("desc->visibility", desc.visibility, format_args!("AKV_FULL (1) {who}")));
    }
    if sight.window != 0 {
        return Err(wrong("desc->window (or the layer's)", sight.window, format_args!("0 {who}")));
    }
    if !desc.alibi_slopes.is_null() {
        return Err(wrong("desc->alibi_slopes", "not NULL", format_args!("NULL {who}")));
    }
    Ok(())
}

/// Which tokens every query row sees. Sequences: tokens, query rows, positions.
pub(super) fn query_rows<P: Deref<Target = Positions>>(
    sequences: &[(usize, usize, P)],
    sight: Sight,
    limits: Limits,
) -> Result<Vec<QueryRow>> {
    let mut rows = Vec::new();
    reserve(&mut rows, sequences.iter().map(|s| s.1).sum())?;
    for (sequence, (len, n_q, positions)) in sequences.iter().enumerate() {
        let (len, n_q) = (*len, *n_q);
        let dense = sight.dense || n_q > MAX_PROGRESSIVE;
        for j in 0..n_q {
            let (token, r) = ((len + j).checked_sub(n_q), rows.len());
            // What is no token has none, and does not need one: `check_tokens`.
            let position = token.map_or(i64::MIN, |token| positions.at(token));
            let end = if sight.causal { positions.below(position.saturating_add(1), len) } else { len };
            let start = match sight.window {
                0 => 0,
                w => positions.below(position.saturating_sub(w as i64 - 1), len),
            };
            let start = if sight.head < start { start } else { 0 };
            // Checked to be 0 or more.
            let kv_from = limits.kv_from.map_or(0, |bound| bound[r] as usize);
            let kv_to = limits.kv_to.map_or(usize::MAX, |bound| bound[r] as usize);
            let mut row = QueryRow::new(sequence, start.max(kv_from), end.min(kv_to), dense);
            (row.position, row.many) = (position, n_q > MAX_PROGRESSIVE);
            let head = sight.head.min(start).min(row.to);
            if kv_from < head {
                row.head = (kv_from, head);
                row.n += head - kv_from;
            }
            row.n -= positions.removed_within(row.from, row.to) + positions.removed_within(row.head.0, row.head.1);
            if let Some(tree) = limits.tree {
                row.hidden = !tree[r];
                let token = |i: &usize| (len + i).wrapping_sub(TREE);
                let seen = |t: &usize| {
                    let within = (row.from..row.to).contains(t) || (row.head.0..row.head.1).contains(t);
                    within && positions.removed_within(*t, t + 1) == 0
                };
                row.n -= (0..TREE).filter(|i| row.hidden >> i & 1 == 1).map(|i| token(&i)).filter(seen).count();
            }
            rows.push(row);
        }
    }
    Ok(rows)
}

/// Fails for outputs that are misaligned, or share bytes with one another, with q or with the workspace.
pub(super) fn apart(desc: &akv_attention_desc, q: &Grid, out: &Grid, n_q: usize, shape: &Shape) -> Result<()> {
    let n = n_q.checked_mul(shape.n_q_heads);
    let stats = match desc.stats.is_null() {
        true => Bytes { from: 0, to: 0 },
        false => Bytes::new(pointer(desc.stats, "desc->stats")?, Some(1), "desc->stats")?,
    };
    let workspace = Bytes::new(desc.workspace.cast::<u8>(), Some(desc.workspace_bytes), "desc->workspace")?;
    disjoint(
        &[
            ("desc->out", out.bytes("desc->out", n_q)?),
            ("desc->lse", floats(desc.lse, n, "desc->lse")?),
            ("desc->bound", floats(desc.bound, n, "desc->bound")?),
            ("desc->lse_bound", floats(desc.lse_bound, n, "desc->lse_bound")?),
            ("desc->estimate", floats(desc.estimate, n, "desc->estimate")?),
            ("desc->amplitude", floats(desc.amplitude, n, "desc->amplitude")?),
            ("desc->stats", stats),
            ("desc->workspace", workspace),
        ],
        &[("desc->q", q.bytes("desc->q", n_q)?)],
    )
}

/// `place` tells where a row is.
fn finite(q: &Rows, n_rows: usize, n_heads: usize, place: impl Fn(usize) -> String) -> Result<()> {
    for row in 0..n_rows {
        for head in 0..n_heads {
            if !q.peak(row, head).is_finite() {
                let place = place(row);
                return Err(Error::NonFinite(format!("{place}: desc->q: NaN or infinity in row {row}, head {head}")));
            }
        }
    }
    Ok(())
}

/// An attention call, apart from what its rows see: all of it checked.
pub(super) struct Frame<'a> {
    desc: &'a akv_attention_desc,
    pub options: Options,
    shape: &'a Shape,
    n_q: usize,
    team: Option<Team>,
    q: Grid,
    /// q, where it was no number.
    clean: Option<Clean>,
    nan: NanPolicy,
    out: Grid,
    slopes: Option<&'a [f32]>,
    sinks: Option<&'a [f32]>,
    /// Bytes of workspace that it needs.
    needed: usize,
}

/// Whose query rows a call has, and how many.
pub(super) struct Asking<'a> {
    pub n_q: usize,
    /// Of the longest sequence.
    pub max_kv: usize,
    pub nan: NanPolicy,
    /// Tells where a row is.
    pub place: &'a dyn Fn(usize) -> String,
}

/// What the rows of a call see.
#[derive(Clone, Copy, Default)]
pub(super) struct Scene<'a> {
    pub sequences: &'a [SequenceView<'a>],
    pub rows: &'a [QueryRow],
    pub mask: Option<&'a Mask>,
    /// By sequences; unless there is a mask.
    pub positions: Option<&'a [&'a Positions]>,
}

impl<'a> Frame<'a> {
    /// Checks a call of some query rows. All threads of a call come to the same
    /// conclusion, before any of them waits.
    ///
    /// # Safety
    /// What `desc` points to is as documented during `'a`.
    pub unsafe fn new(
        desc: &'a akv_attention_desc,
        layout: &'a Layout,
        slots: bool,
        asking: Asking,
        max_threads: usize,
        cpu: &Cpu,
    ) -> Result<Frame<'a>> {
        let Asking { n_q, max_kv, nan, place } = asking;
        let shape = &layout.shape;
        let options = Options::new(desc, "desc", layout.format, shape, slots)?;
        // SAFETY: the caller's contract.
        let team = unsafe { Team::new(desc.threads, max_threads) }?;
        let nth = team.as_ref().map_or(1, |t| t.nth);
        let q = Grid::new(&desc.q, "desc->q", shape.n_q_heads, shape.dim_k)?;
        let out = Grid::new(&desc.out, "desc->out", shape.n_q_heads, shape.dim_v)?;
        // SAFETY: the caller's contract.
        let (slopes, sinks): (Option<&[f32]>, Option<&[f32]>) = unsafe {
            (
                optional(desc.alibi_slopes, shape.n_q_heads, "desc->alibi_slopes")?,
                optional(desc.sink_logits, shape.n_q_heads, "desc->sink_logits")?,
            )
        };
        for (name, values) in [("alibi_slopes", slopes), ("sink_logits", sinks)] {
            if let Some((i, x)) = values.and_then(|v| v.iter().enumerate().find(|(_, x)| !x.is_finite())) {
                return Err(wrong(format_args!("desc->{name}[{i}]"), x, "a finite number"));
            }
        }
        let workers = if team.is_some() { nth } else { cpu.n_threads() };
        let needed = Cpu::workspace_bytes(layout, max_kv, workers);
        if desc.workspace.is_null() {
            if nth > 1 {
                let call = if slots { "akv_slots_workspace" } else { "akv_batch_workspace" };
                let expected = format_args!("memory of {call}'s size if nth is above 1");
                return Err(wrong("desc->workspace", "NULL", expected));
            }
        } else if !(desc.workspace as usize).is_multiple_of(WORKSPACE_ALIGN) {
            let expected = format_args!("an address aligned to {WORKSPACE_ALIGN}");
            return Err(wrong("desc->workspace", format_args!("{:p}", desc.workspace), expected));
        } else if desc.workspace_bytes < needed {
            return Err(wrong("desc->workspace_bytes", desc.workspace_bytes, format_args!("at least {needed}")));
        }
        apart(desc, &q, &out, n_q, shape)?;
        let mut clean = None;
        if n_q > 0 {
            // SAFETY: its extent is checked.
            let q = unsafe { q.rows() };
            match nan {
                NanPolicy::Error => finite(&q, n_q, shape.n_q_heads, place)?,
                _ => clean = Clean::new(&q, n_q, shape.n_q_heads)?,
            }
        }
        Ok(Frame { desc, options, shape, n_q, team, q, clean, nan, out, slopes, sinks, needed })
    }

    /// Runs the call. A thread that has no scene takes its error through it, so that all of them meet at every barrier.
    ///
    /// # Safety
    /// As [`Frame::new`], and all threads of the call make it.
    pub unsafe fn run(&self, cpu: &Cpu, scene: Result<Scene>, workspaces: &Workspaces) -> Result<()> {
        let (desc, ith) = (self.desc, self.team.as_ref().map_or(0, |t| t.ith));
        if self.n_q == 0 {
            // SAFETY: checked, and the caller's contract.
            return unsafe { report(desc.stats, ith, Default::default(), cpu) };
        }
        // SAFETY: extents are checked; that all threads of a call write the same `out`, each its own rows and heads, is
        // the backend's business.
        let (q, out) = unsafe { (self.q.rows(), self.out.rows_mut()) };
        // SAFETY: checked for as many floats as there are rows and heads, and the caller's contract.
        let floats = |p: *mut f32| if p.is_null() { None } else { Some(unsafe { Floats::new(p) }) };
        let (scene, failed) = match scene {
            Ok(scene) => (scene, None),
            Err(error) => (Scene::default(), Some(error)),
        };
        let call = Attention {
            shape: self.shape,
            sequences: scene.sequences,
            rows: scene.rows,
            q: self.clean.as_ref().map_or(q, Clean::rows),
            lost: self.clean.as_ref().filter(|_| self.nan == NanPolicy::Propagate).map_or(&[], Clean::bad),
            out,
            scale: self.options.scale,
            softcap: self.options.softcap,
            mask: scene.mask,
            // They are what slopes are of.
            positions: scene.positions.filter(|_| self.slopes.is_some()),
            slopes: self.slopes,
            sinks: self.sinks,
            tolerance: self.options.tolerance,
            mode: self.options.mode,
            lse: floats(desc.lse),
            bound: floats(desc.bound),
            lse_bound: floats(desc.lse_bound),
            estimate: floats(desc.estimate),
            amplitude: floats(desc.amplitude),
        };
        let call = failed.map_or(Ok(&call), Err);
        let team = self.team.as_ref();
        let barrier = || team.map_or((), Team::wait);
        let threads = team.map(|t| Threads { ith: t.ith, nth: t.nth, barrier: &barrier });
        let stats = if desc.workspace.is_null() {
            // Alone: there is nobody to meet.
            let call = Ok(call?);
            workspaces.with(self.needed, |workspace| {
                // SAFETY: as large as needed, aligned as every block, and nobody else's.
                unsafe { cpu.attention(call, threads, workspace.as_mut_ptr()) }
            })
        } else {
            // SAFETY: checked above, and by the caller's contract this call's own.
            unsafe { cpu.attention(call, threads, desc.workspace.cast()) }
        }?;
        // SAFETY: checked, and the caller's contract.
        unsafe { report(desc.stats, ith, stats, cpu) }
    }
}

/// # Safety
/// What `desc` points to is as documented.
unsafe fn attend(batch: &Object, layer: i32, desc: &akv_attention_desc) -> Result<()> {
    let step = batch.step()?;
    let (cache, cpu) = (&batch.owner.cache, &batch.owner.context.cpu);
    let layer = batch.owner.layer(layer)?;
    if batch.owner.context.device.is_some() {
        // SAFETY: the caller's contract.
        return unsafe { device::attention(batch, &step, layer, desc) };
    }
    // SAFETY: on the CPU it must be NULL.
    unsafe { batch.owner.context.stream("desc->stream", desc.stream) }?;
    let layout = &cache.layouts()[layer];
    let place = |row: usize| {
        let mut end = 0;
        let sequence = step.sequences.iter().find(|s| {
            end += s.n_q;
            row < end
        });
        format!("layer {layer}, sequence {}", sequence.map_or(0, |s| s.sequence))
    };
    let asking = Asking { n_q: step.n_q, max_kv: step.max_kv, nan: cache.config().nan, place: &place };
    // SAFETY: the caller's contract.
    let frame = unsafe { Frame::new(desc, layout, false, asking, batch.max_threads, cpu) }?;
    // SAFETY: the caller's contract.
    let limits = unsafe { Limits::new(desc, step.n_q) }?;
    let prepared = batch.batch.read(layer);
    let seen = prepared.as_ref().map_err(Clone::clone).and_then(|readers| {
        let (readers, sight) = (readers.iter(), frame.options.sight());
        let views = collect(readers.clone().map(|(_, reader)| Ok(reader.view())))?;
        let positions = collect(readers.clone().map(|(_, reader)| Ok(reader.positions())))?;
        let of_step = collect(readers.map(|(step, reader)| Ok((reader.n_tokens(), step.n_q, reader.positions()))))?;
        check_tokens(&of_step, sight, desc)?;
        Ok((views, query_rows(&of_step, sight, limits)?, positions))
    });
    let scene = seen.as_ref().map_err(Clone::clone).map(|(sequences, rows, positions)| Scene {
        sequences,
        rows,
        mask: None,
        positions: Some(positions),
    });
    // SAFETY: the caller's contract.
    unsafe { frame.run(cpu, scene, &batch.workspaces) }
}

/// Writes the statistics of a call: one of its threads does.
///
/// # Safety
/// `to` is NULL or valid.
unsafe fn report(to: *mut akv_stats, ith: usize, s: crate::backend::Stats, cpu: &Cpu) -> Result<()> {
    if to.is_null() || ith > 0 {
        return Ok(());
    }
    let stats = akv_stats {
        bytes_k: s.bytes_k,
        bytes_v: s.bytes_v,
        bytes_scales: s.bytes_scales,
        bytes_exact: s.bytes_exact,
        planes_k: s.planes_k,
        planes_v: s.planes_v,
        tokens: s.tokens,
        dense_rows: s.dense_rows,
        backend: AKV_CPU,
        isa: context::isa_code(cpu.isa()),
        path: s.path,
        reserved: 0,
    };
    // SAFETY: the caller's contract.
    unsafe { to.write(stats) };
    Ok(())
}

/// The arrays of an `akv_state` as numbers of elements: `out`, then the five others.
fn state_arrays(s: &akv_state, out: usize, others: usize) -> [(&'static str, *mut f32, usize); 6] {
    [
        ("out", s.out, out),
        ("lse", s.lse, others),
        ("bound", s.bound, others),
        ("lse_bound", s.lse_bound, others),
        ("estimate", s.estimate, others),
        ("amplitude", s.amplitude, others),
    ]
}

/// Fails for arrays that are missing, misaligned, or in each other's way.
fn check_states(states: &[akv_state], n: usize, dim: usize, out: &akv_state) -> Result<()> {
    let sizes = n.checked_mul(dim).filter(|&n| n <= isize::MAX as usize / 4);
    let n_out = sizes.ok_or_else(|| wrong("rows", n, "states that fit the address space"))?;
    let check = |state: &akv_state, name: &dyn Display| -> Result<[Bytes; 6]> {
        let mut all = [Bytes { from: 0, to: 0 }; 6];
        for (i, (field, p, n)) in state_arrays(state, n_out, n).into_iter().enumerate() {
            let name = Field(name, "", field);
            if i < 2 {
                pointer(p, name)?;
            }
            all[i] = floats(p, Some(n), name)?;
        }
        Ok(all)
    };
    let outputs = check(out, &"out->")?;
    for i in 0..6 {
        if let Some(j) = (0..i).find(|&j| outputs[i].overlaps(&outputs[j])) {
            let names = state_arrays(out, 0, 0).map(|(name, ..)| name);
            return Err(wrong(
                format_args!("out->{}", names[i]),
                format_args!("in out->{}", names[j]),
                "separate memory",
            ));
        }
    }
    for (s, state) in states.iter().enumerate() {
        let inputs = check(state, &format_args!("states[{s}]."))?;
        for (i, output) in outputs.iter().enumerate() {
            // An element is read by all states before it is written, so the same array may be both.
            if let Some(j) = (0..6).find(|&j| output.overlaps(&inputs[j]) && !(i == j && *output == inputs[j])) {
                let names = state_arrays(out, 0, 0).map(|(name, ..)| name);
                return Err(wrong(
                    format_args!("out->{}", names[i]),
                    format_args!("in states[{s}].{}", names[j]),
                    "separate memory, or exactly the same array",
                ));
            }
        }
    }
    Ok(())
}

/// # Safety
/// What `states` and `out` point to is as documented, and checked.
unsafe fn merge_states(states: &[akv_state], n: usize, dim: usize, out: &akv_state) -> Result<()> {
    let mut parts: Vec<State> = Vec::new();
    reserve(&mut parts, states.len())?;
    let mut buffer = [0.0; MAX_LATENT];
    for i in 0..n {
        parts.clear();
        for s in states {
            // SAFETY: checked for n (times dim) floats; nothing is written while these borrows are used.
            unsafe {
                let one = |p: *mut f32| std::slice::from_raw_parts(p.add(i), 1);
                let some = |p: *mut f32| if p.is_null() { None } else { Some(one(p)) };
                parts.push(State {
                    out: std::slice::from_raw_parts(s.out.add(i * dim), dim),
                    lse: one(s.lse),
                    bound: some(s.bound),
                    lse_bound: some(s.lse_bound),
                    estimate: some(s.estimate),
                    amplitude: some(s.amplitude),
                });
            }
        }
        let merged = merge(&parts, 0, dim, &mut buffer[..dim]);
        // SAFETY: as above, and the borrows are not used any more.
        unsafe {
            std::ptr::copy_nonoverlapping(buffer.as_ptr(), out.out.add(i * dim), dim);
            for (p, value) in [
                (out.lse, merged.lse),
                (out.bound, merged.bound),
                (out.lse_bound, merged.lse_bound),
                (out.estimate, merged.estimate),
                (out.amplitude, merged.amplitude),
            ] {
                if !p.is_null() {
                    p.add(i).write(value);
                }
            }
        }
    }
    Ok(())
}

/// Attention of the step's query rows over their sequences' rows in one layer. Query row j of a sequence's n_q is its
/// token len - n_q + j, where len counts the step's new tokens. Sequences with up to 8 query rows take the progressive
/// path: plane 0 of all visible keys is scanned, every token's share of the error decides how many further digits of
/// its K and V are read, and the certificate says how far off the result can be. Longer ones (prefill), AKV_EXACT,
/// AKV_FORMAT_RAW and layers with v_is_prefix_of_k take the dense path. On the CPU a row's result, bit for bit, depends
/// on its sequence and on whether that has more than 8 query rows: not on the other rows, the other sequences of the
/// batch, or the number of threads.
///
/// Cross-attention: with AKV_FULL, no window and no alibi_slopes nothing depends on where a row is, and n_q may be
/// larger than len. Otherwise more query rows than tokens are AKV_E_ARGUMENT.
///
/// Errors: AKV_E_ARGUMENT (also if the layer lacks its akv_quantize_kv), AKV_E_NONFINITE (q), AKV_E_UNSUPPORTED,
/// AKV_E_BUSY (akv_quantize_kv on the same layer is running), AKV_E_MEMORY and AKV_E_CAPACITY (the batch's own
/// workspace): outputs are untouched. AKV_E_RANGE (scores beyond binary32, outputs beyond out's dtype) and
/// AKV_E_INTERNAL: they are undefined.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_aligned_attention(
    batch: *mut akv_batch,
    layer: i32,
    desc: *const akv_attention_desc,
) -> akv_status {
    guard(|| {
        let batch = BATCHES.get(batch, "batch")?;
        // SAFETY: the caller's contract.
        unsafe { attend(&batch, layer, &descriptor(desc, "desc")?) }
    })
}

/// Merges `n` partial states over disjoint parts of a context (see kv_from) into the state of the whole: outputs by
/// their LSE, bounds rigorously. Empty parts have lse = -inf. An array of `out` may be the same one of any of `states`,
/// but must not overlap others. `[rows][heads][dim]`, dim up to 576 (256 on CUDA), all f32, host memory on the CPU. On
/// the CPU what is NaN in a part (AKV_NAN_PROPAGATE) is NaN in the whole.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_merge_states(
    context: *mut akv_context,
    states: *const akv_state,
    n: i32,
    rows: i64,
    heads: i32,
    dim: i32,
    out: *const akv_state,
    stream: *mut c_void,
) -> akv_status {
    guard(|| {
        let context = CONTEXTS.get(context, "context")?;
        // SAFETY: the caller's contract.
        let stream = unsafe { context.stream("stream", stream) }?;
        let n = within("n", n, 1..=i32::MAX)? as usize;
        let (rows, heads) = (count("rows", rows)?, count("heads", heads.into())?);
        let max_dim = if context.device.is_some() { MAX_DIM } else { MAX_LATENT };
        let dim = within("dim", dim, 1..=max_dim as i32)? as usize;
        let elements =
            rows.checked_mul(heads).ok_or_else(|| wrong("rows", rows, "states that fit the address space"))?;
        // SAFETY: the caller's contract.
        unsafe {
            let (states, out) = (array(states, n, "states")?, &*pointer(out, "out")?);
            check_states(states, elements, dim, out)?;
            match &context.device {
                Some(device) => device::merge(device, states, elements, dim, out, stream),
                None => merge_states(states, elements, dim, out),
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Dtype;

    const SHAPE: Shape = Shape {
        n_q_heads: 8,
        n_kv_heads: 2,
        dim_k: 64,
        dim_v: 32,
        dtype_k: Dtype::F32,
        dtype_v: Dtype::F32,
        planes_k: 4,
        planes_v: 4,
        window: 100,
        v_is_prefix: false,
    };

    fn options(format: Format, change: impl Fn(&mut akv_attention_desc)) -> Result<Options> {
        // SAFETY: plain data.
        let mut desc: akv_attention_desc = unsafe { std::mem::zeroed() };
        change(&mut desc);
        Options::new(&desc, "desc", format, &SHAPE, false)
    }

    #[test]
    fn zeros_are_defaults() {
        let o = options(Format::Aligned, |_| ()).unwrap();
        assert_eq!((o.scale, o.tolerance, o.mode, o.causal, o.window), (0.125, 1e-3, Mode::Expected, true, 100));
        let o =
            options(Format::Aligned, |d| (d.scale, d.tolerance, d.visibility, d.window) = (0.5, 0.1, 1, 7)).unwrap();
        assert_eq!((o.scale, o.tolerance, o.causal, o.window), (0.5, 0.1, false, 7));
    }

    #[test]
    fn paths() {
        let paths = |format, mode| options(format, |d| d.mode = mode).unwrap().paths;
        assert_eq!(paths(Format::Aligned, AKV_EXPECTED), AKV_PATH_PROGRESSIVE | AKV_PATH_DENSE);
        assert_eq!(paths(Format::Published, AKV_EXPECTED), AKV_PATH_PUBLISHED | AKV_PATH_DENSE);
        assert_eq!(paths(Format::Raw, AKV_EXPECTED), AKV_PATH_DENSE);
        assert_eq!(paths(Format::Aligned, AKV_EXACT), AKV_PATH_DENSE);
    }

    #[test]
    fn every_field_is_checked_and_named() {
        type Case = (&'static str, fn(&mut akv_attention_desc));
        let cases: [Case; 18] = [
            ("desc->sink_tokens", |d| d.sink_tokens = -1),
            ("desc->reserved", |d| d.reserved = 1),
            ("desc->flags", |d| d.flags = 1),
            ("desc->logit_softcap", |d| d.logit_softcap = -30.0),
            ("desc->mask", |d| d.mask = std::ptr::dangling()),
            ("desc->q->dtype", |d| d.q.dtype = 9),
            ("desc->q->stride_head", |d| d.q.stride_head = 252),
            ("desc->out->reserved", |d| d.out.reserved = 1),
            ("desc->out->stride_row", |d| d.out.stride_row = -128),
            ("desc->scale", |d| d.scale = f32::NAN),
            ("desc->scale", |d| d.scale = f32::INFINITY),
            ("desc->tolerance", |d| d.tolerance = -1e-3),
            ("desc->tolerance", |d| d.tolerance = f32::NAN),
            ("desc->tolerance", |d| d.tolerance = f32::INFINITY),
            ("desc->mode", |d| d.mode = 3),
            ("desc->visibility", |d| d.visibility = 2),
            ("desc->visibility", |d| d.visibility = -1),
            ("desc->window", |d| d.window = -1),
        ];
        for (name, change) in cases {
            match options(Format::Aligned, change) {
                Err(Error::Argument(text)) if text.starts_with(&format!("{name} is ")) => {}
                other => panic!("{other:?} for {name}"),
            }
        }
        let cases: [Case; 5] = [
            ("desc->sink_tokens", |d| d.sink_tokens = 4),
            ("desc->logit_softcap", |d| d.logit_softcap = 30.0),
            ("desc->sink_logits", |d| d.sink_logits = std::ptr::dangling()),
            ("desc->alibi_slopes", |d| d.alibi_slopes = std::ptr::dangling()),
            ("desc->tree", |d| d.tree = std::ptr::dangling()),
        ];
        for (name, change) in cases {
            assert!(options(Format::Aligned, change).is_ok(), "{name}");
            match options(Format::Published, change) {
                Err(Error::Argument(text)) if text.starts_with(&format!("{name} is ")) => {}
                other => panic!("{other:?} for {name}"),
            }
        }
    }

    #[test]
    fn the_callers_threads() {
        unsafe extern "C" fn wait(_: *mut c_void) {}
        let barrier: akv_barrier_fn = Some(wait);
        let team = |ith, nth, barrier| {
            let threads = akv_threads { ith, nth, barrier, user: std::ptr::null_mut() };
            // SAFETY: valid.
            unsafe { Team::new(&threads, 4) }.map(|t| t.unwrap().nth)
        };
        assert_eq!(team(0, 1, None), Ok(1));
        assert_eq!(team(3, 4, barrier), Ok(4));
        let bad = [(0, 0, None), (0, -1, None), (1, 1, None), (-1, 2, barrier), (0, 5, barrier), (0, 2, None)];
        for (ith, nth, barrier) in bad {
            assert!(matches!(team(ith, nth, barrier), Err(Error::Argument(_))), "{ith} of {nth}");
        }
        // SAFETY: NULL means none.
        assert!(unsafe { Team::new(std::ptr::null(), 4) }.unwrap().is_none());
    }

    #[test]
    fn a_query_with_nan_is_found() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut q = vec![1.0f32; 3 * 8 * 64];
            q[(2 * 8 + 5) * 64 + 63] = bad;
            // SAFETY: plain data.
            let bytes = unsafe { std::slice::from_raw_parts(q.as_ptr().cast::<u8>(), 4 * q.len()) };
            let q = Rows::contiguous(bytes, 8, Dtype::F32, 64);
            let text = "layer 7: desc->q: NaN or infinity in row 2, head 5".to_owned();
            let place = |row: usize| format!("layer {}", row + 5);
            assert_eq!(finite(&q, 3, 8, place), Err(Error::NonFinite(text)));
            assert_eq!(finite(&q, 2, 8, place), Ok(()));
        }
    }

    #[test]
    fn states_overlap_only_as_a_whole() {
        let mut memory = [0f32; 64];
        let p = memory.as_mut_ptr();
        let null = std::ptr::null_mut();
        let state = |out: usize, lse: usize| akv_state {
            out: p.wrapping_add(out),
            lse: p.wrapping_add(lse),
            bound: null,
            lse_bound: null,
            estimate: null,
            amplitude: null,
        };
        // One element of 8 channels.
        let refused = |states: &[akv_state], out: akv_state, name: &str| match check_states(states, 1, 8, &out) {
            Err(Error::Argument(text)) if text.starts_with(name) => {}
            other => panic!("{other:?} for {name}"),
        };
        refused(&[state(0, 8), state(16, 24)], state(4, 32), "out->out is in states[0].out");
        refused(&[state(0, 8), state(16, 24)], state(32, 17), "out->lse is in states[1].out");
        refused(&[state(0, 8)], state(16, 17), "out->lse is in out->out");
        refused(&[akv_state { lse: null, ..state(0, 8) }], state(16, 24), "states[0].lse is NULL");
        refused(&[state(0, 8)], akv_state { out: null, ..state(16, 24) }, "out->out is NULL");
        refused(&[state(0, 8)], akv_state { bound: p.wrapping_byte_add(1), ..state(16, 24) }, "out->bound is 0x");
    }
}
