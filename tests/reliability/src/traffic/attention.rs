//! Attention calls, and what their results must be.

use super::{Plant, TEAM, Worker};
use crate::api::*;
use crate::barrier::{Barrier, together};
use crate::counts::{Counts, add, found};
use crate::dice::Dice;
use crate::model::*;
use crate::truth::{Ask, Sight, Truth, View};
use std::ptr::{null, null_mut};
use std::sync::atomic::AtomicU64;

/// What an attention call writes.
#[derive(Default)]
pub(super) struct Outputs {
    out: Packed,
    /// lse, bound, lse_bound, estimate, amplitude.
    floats: [Vec<f32>; 5],
}

impl Outputs {
    fn resize(&mut self, rows: usize, shape: &akv_layer_desc, dtype: i32) {
        let n = rows * shape.n_q_heads as usize;
        self.out.resize(n * dtype_dim(shape, Part::V).1, dtype);
        self.floats.iter_mut().for_each(|f| {
            f.clear();
            f.resize(n, f32::NAN);
        });
    }

    fn same(&mut self, other: &mut Outputs) -> bool {
        let bits = |f: &[f32]| f.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        self.out.words() == other.out.words() && self.floats.iter().zip(&other.floats).all(|(a, b)| bits(a) == bits(b))
    }
}

/// Where attention goes.
#[derive(Clone, Copy)]
pub(super) enum Over<'a> {
    /// The step of a batch.
    Step(Handle<akv_batch>),
    /// Spans of cells, of which a mask, if there is one, shows some.
    Cells(Handle<akv_cache>, &'a [akv_span], Option<Handle<akv_mask>>),
}

impl Over<'_> {
    /// # Safety
    /// The descriptor's arrays suffice for the rows of the step or the spans.
    unsafe fn attention(self, layer: usize, desc: &akv_attention_desc) -> akv_status {
        match self {
            // SAFETY: the contract.
            Over::Step(batch) => unsafe { akv_aligned_attention(batch.0, layer as i32, desc) },
            Over::Cells(cache, spans, mask) => {
                let desc = akv_attention_desc { mask: mask.map_or(null_mut(), |mask| mask.0), ..*desc };
                // SAFETY: the contract.
                unsafe { akv_slots_attention(cache.0, layer as i32, spans.as_ptr(), spans.len() as i32, &desc) }
            }
        }
    }

    /// Status, size and alignment of a workspace.
    fn workspace(self) -> (akv_status, usize, usize) {
        let (mut bytes, mut align) = (0, 0);
        // SAFETY: handles and outputs.
        let status = unsafe {
            match self {
                Over::Step(batch) => akv_batch_workspace(batch.0, &mut bytes, &mut align),
                Over::Cells(cache, spans, _) => {
                    let max_kv = spans.iter().map(|span| span.n_kv).max().unwrap_or(0);
                    akv_slots_workspace(cache.0, max_kv, TEAM, &mut bytes, &mut align)
                }
            }
        };
        (status, bytes, align)
    }
}

impl Worker<'_, '_> {
    fn ask(&mut self, views: &[View], shape: &akv_layer_desc) -> Ask {
        let cells = views.iter().any(View::of_cells);
        let masked = views.iter().any(|view| matches!(view.sight, Sight::Mask(_)));
        let published = self.world.setup.format == AKV_FORMAT_PUBLISHED;
        let dice = &mut self.dice;
        let mode = dice.below(3) as i32;
        let sinks = dice.one_in(6) && !published;
        let n_q: usize = views.iter().map(|v| v.n_q).sum();
        let mut ranges = None;
        if dice.one_in(8) && !cells {
            let longest = views.iter().map(|v| v.k.len()).max().unwrap_or(0);
            let from = (0..n_q).map(|_| dice.below(longest / 2 + 1) as i64).collect::<Vec<_>>();
            let to = from.iter().map(|&f| f + dice.below(longest + 1) as i64).collect();
            ranges = Some((from, to));
        }
        Ask {
            mode,
            tolerance: dice.pick(&[0.0, 0.0, 1e-2, 1e-1]),
            full: dice.one_in(4) && !cells,
            window: if dice.one_in(5) && !cells { 1 + dice.below(300) as i32 } else { 0 },
            softcap: if dice.one_in(6) && !published { 10.0 } else { 0.0 },
            scale: dice.pick(&[0.0, 0.0, 0.3]),
            sinks: sinks.then(|| (0..shape.n_q_heads).map(|_| dice.below(9) as f32 - 4.0).collect()),
            ranges,
            slopes: (masked && dice.one_in(3))
                .then(|| (0..shape.n_q_heads).map(|_| dice.pick(&[0.0, 0.5, 1.0, -0.25])).collect()),
        }
    }

    /// Attends in a layer, and looks at the results.
    pub(super) fn attend(&mut self, over: Over, layer: usize, views: &[View]) {
        let world = self.world;
        let shape = world.setup.layers[layer];
        let n_q: usize = views.iter().map(|v| v.n_q).sum();
        let ((_, dk), heads) = (dtype_dim(&shape, Part::K), shape.n_q_heads as usize);
        let ask = self.ask(views, &shape);
        let (q_dtype, out_dtype) = (self.dice.below(3) as i32, self.dice.below(3) as i32);
        let spread = self.dice.pick(&[0.05f32, 0.5, 2.0]);
        self.q.resize(n_q * heads * dk, q_dtype);
        let mut noise = Dice::Seeded(self.dice.bits());
        // Of all channels; or of one, so that errors do not average out and bounds are almost reached.
        let channel = self.dice.one_in(6).then(|| self.dice.below(dk));
        for i in 0..n_q * heads * dk {
            let x = (noise.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0;
            self.q.set(i, if channel.is_none_or(|c| c == i % dk) { x * spread } else { 0.0 });
        }
        let mut outputs = std::mem::take(&mut self.outputs);
        outputs.resize(n_q, &shape, out_dtype);
        let mut stats = zeroed::<akv_stats>();
        let [lse, bound, lse_bound, estimate, amplitude] = outputs.floats.each_mut().map(|f| f.as_mut_ptr());
        let desc = akv_attention_desc {
            struct_size: size::<akv_attention_desc>(),
            q: self.q.rows(),
            out: outputs.out.rows(),
            scale: ask.scale,
            logit_softcap: ask.softcap,
            tolerance: ask.tolerance,
            mode: ask.mode,
            visibility: if ask.full { AKV_FULL } else { AKV_CAUSAL },
            window: ask.window,
            alibi_slopes: ask.slopes.as_ref().map_or(null(), |s| s.as_ptr()),
            sink_logits: ask.sinks.as_ref().map_or(null(), |s| s.as_ptr()),
            kv_from: ask.ranges.as_ref().map_or(null(), |r| r.0.as_ptr()),
            kv_to: ask.ranges.as_ref().map_or(null(), |r| r.1.as_ptr()),
            lse,
            bound,
            lse_bound,
            estimate,
            amplitude,
            stats: &mut stats,
            ..zeroed()
        };
        if n_q > 0 && self.dice.one_in(40) {
            let i = self.dice.below(n_q * heads * dk);
            let good = self.q.get(i);
            self.q.set(i, f32::NAN);
            // SAFETY: a handle, a descriptor with its arrays.
            let status = unsafe { over.attention(layer, &desc) };
            self.refused("attention of NaN", status, &[AKV_E_NONFINITE]);
            self.q.set(i, good);
        }
        // SAFETY: a handle, a descriptor with its arrays.
        let status = unsafe { over.attention(layer, &desc) };
        if self.expect("attention", status, &[AKV_E_MEMORY, AKV_E_BUSY]) {
            self.attended += 1;
            if n_q > 0 && self.dice.one_in(150) {
                self.again_by_threads(over, layer, &desc, &mut outputs, n_q, out_dtype);
            }
            self.plant(&mut outputs);
            let check = n_q > 0 && (self.attended as usize).is_multiple_of(world.plan.check_one_in);
            self.check_stats(&stats, views, &ask, &shape);
            if check {
                self.check_outputs(&mut outputs, views, &ask, layer, out_dtype);
            }
        }
        self.outputs = outputs;
    }

    /// Tokens attended are the model's.
    fn check_stats(&mut self, stats: &akv_stats, views: &[View], ask: &Ask, shape: &akv_layer_desc) {
        let mut tokens = 0;
        for view in views {
            for r in 0..view.n_q {
                if view.is_removed(r) {
                    return;
                }
                tokens += view.seen(r, ask, shape.window).count() as u64 * shape.n_kv_heads as u64;
            }
        }
        let counts = self.world.counts;
        add(&counts.tokens_checked, 1);
        if stats.tokens != tokens {
            found(&counts.lost_tokens, stats.tokens.abs_diff(tokens), || {
                format!("{} tokens attended instead of {tokens}: {ask:?}", stats.tokens)
            });
        }
    }

    fn plant(&mut self, outputs: &mut Outputs) {
        let attended = self.attended;
        match self.world.plan.plant {
            Plant::Output if !outputs.floats[1].is_empty() => {
                // Half of the largest magnitude that V may have, in one channel of every row.
                let dim = outputs.out.words().len() * 8 / outputs.floats[1].len();
                for i in (0..outputs.floats[1].len()).map(|i| i * dim / 4) {
                    let x = outputs.out.get(i);
                    outputs.out.set(i, x + PEAK);
                }
            }
            Plant::Certificate => outputs.floats[1].fill(0.0),
            Plant::Heap if attended.is_multiple_of(10) => _ = std::hint::black_box(Box::leak(Box::new(1u64))),
            Plant::Crash if attended.is_multiple_of(20) => std::process::abort(),
            Plant::Race => {
                static WORD: AtomicU64 = AtomicU64::new(0);
                // SAFETY: none, which is the point: threads write it at once.
                unsafe { *std::hint::black_box(WORD.as_ptr()) += 1 };
            }
            _ => {}
        }
    }

    /// The same call by several threads of ours: the same bits.
    fn again_by_threads(
        &mut self,
        over: Over,
        layer: usize,
        desc: &akv_attention_desc,
        outputs: &mut Outputs,
        n_q: usize,
        out_dtype: i32,
    ) {
        let (status, bytes, align) = over.workspace();
        self.expect("workspace", status, &[]);
        // The batch is bounded by far more tokens than there are: a workspace for these is enough.
        let bytes = bytes.min(4 << 20);
        self.workspace.resize(bytes.div_ceil(64) + 1, [0; 8]);
        let offset = self.workspace.as_ptr().cast::<u8>().align_offset(align);
        let workspace = self.workspace.as_mut_ptr().wrapping_byte_add(offset).cast();
        let mut again = std::mem::take(&mut self.again);
        again.resize(n_q, &self.world.setup.layers[layer], out_dtype);
        let [lse, bound, lse_bound, estimate, amplitude] = again.floats.each_mut().map(|f| f.as_mut_ptr());
        let (stats, out) = (null_mut(), again.out.rows());
        let desc = akv_attention_desc {
            out,
            lse,
            bound,
            lse_bound,
            estimate,
            amplitude,
            stats,
            workspace,
            workspace_bytes: bytes,
            ..*desc
        };
        let nth = 2 + self.dice.below(TEAM as usize - 1);
        let barrier = Barrier::new(nth);
        unsafe extern "C" fn wait(user: *mut std::ffi::c_void) {
            // SAFETY: the barrier below.
            unsafe { &*user.cast::<Barrier>() }.wait();
        }
        let (call, address) = (&raw const desc as usize, &raw const barrier as usize);
        let statuses = together(nth, |ith| {
            let (ith, nth, user) = (ith as i32, nth as i32, address as *mut std::ffi::c_void);
            let threads = akv_threads { ith, nth, barrier: Some(wait), user };
            // SAFETY: the descriptor and what it points to outlive the threads.
            unsafe {
                let desc = akv_attention_desc { threads: &threads, ..*(call as *const akv_attention_desc) };
                over.attention(layer, &desc)
            }
        });
        let all_ok = statuses.iter().all(|&s| s == AKV_OK);
        for status in statuses {
            self.expect("attention by threads", status, &[AKV_E_BUSY]);
        }
        if all_ok && !outputs.same(&mut again) {
            found(&self.world.counts.wrong_outputs, 1, || format!("{nth} threads give other bits"));
        }
        self.again = again;
    }

    /// Outputs of some rows, against float64.
    fn check_outputs(&mut self, outputs: &mut Outputs, views: &[View], ask: &Ask, layer: usize, out_dtype: i32) {
        let (setup, counts) = (self.world.setup, self.world.counts);
        let shape = &setup.layers[layer];
        let ((_, dk), (_, dv)) = (dtype_dim(shape, Part::K), dtype_dim(shape, Part::V));
        let (heads, group) = (shape.n_q_heads as usize, (shape.n_q_heads / shape.n_kv_heads) as usize);
        let kv_head = self.dice.below(shape.n_kv_heads as usize);
        let (mut rows, mut truth) = (std::mem::take(&mut self.rows), std::mem::take(&mut self.truth));
        for view in views.iter().filter(|v| v.n_q > 0) {
            // A few rows of each sequence or span, of one KV head.
            rows.load(view, layer, shape, kv_head);
            for _ in 0..view.n_q.min(3) {
                let r = self.dice.below(view.n_q);
                if view.is_removed(r) {
                    continue;
                }
                let seen = view.seen(r, ask, shape.window);
                for head in kv_head * group..(kv_head + 1) * group {
                    let i = (view.first_row + r) * heads + head;
                    let mut q = [0.0; 256];
                    (0..dk).for_each(|c| q[c] = self.q.get(i * dk + c));
                    let slope = ask.slopes.as_ref().map_or(1.0, |s| f64::from(s[head]));
                    let added = |t| slope * view.added(r, t);
                    truth.attend(&q[..dk], &rows, seen.clone(), added, ask, ask.sinks.as_ref().map(|s| s[head]));
                    let mut out = [0.0; 256];
                    (0..dv).for_each(|c| out[c] = outputs.out.get(i * dv + c));
                    let floats = outputs.floats.each_ref().map(|f| f[i]);
                    let stored = setup.stored_error(layer, &q[..dk], ask.scale);
                    let what = check_output(&truth, &out[..dv], floats, ask, setup, out_dtype, stored, counts);
                    if let Some((counter, what)) = what {
                        let (name, tokens, n_q) = (setup.name, view.k.len(), view.n_q);
                        let place = if view.of_cells() { "cells" } else { "tokens" };
                        found(counter, 1, || {
                            let seen = seen.clone().count();
                            format!(
                                "{name}: layer {layer}, row {r} of {n_q} over {tokens} {place}, head {head}: {what}; \
                                 sees {seen}, {ask:?}"
                            )
                        });
                    }
                }
            }
        }
        (self.rows, self.truth) = (rows, truth);
    }
}

/// What is wrong with an output, if anything is: which count it goes to, and why. `floats` as in [`Outputs`]; `stored` is
/// the error, relative to A, that the stored digits make likely.
#[allow(clippy::too_many_arguments)]
fn check_output<'c>(
    truth: &Truth,
    out: &[f32],
    floats: [f32; 5],
    ask: &Ask,
    setup: &Setup,
    out_dtype: i32,
    stored: f64,
    counts: &'c Counts,
) -> Option<(&'c AtomicU64, String)> {
    let [lse, bound, lse_bound, estimate, _] = floats;
    add(&counts.outputs_checked, 1);
    // Rounding to the output's dtype is nobody's error.
    let rounding = |x: f64| match out_dtype {
        AKV_F16 => x.abs() * 5e-4 + 1e-7,
        AKV_BF16 => x.abs() * 4e-3,
        _ => x.abs() * 2e-7,
    };
    let errors = out.iter().zip(&truth.out).map(|(&x, &t)| (f64::from(x) - t).abs() - rounding(t));
    let error = errors.fold(0.0, |m: f64, e| if e <= m { m } else { e });
    let lse_error = if f64::from(lse) == truth.lse { 0.0 } else { (f64::from(lse) - truth.lse).abs() };
    if error.is_nan() || lse_error.is_nan() || lse_error.is_infinite() {
        return Some((&counts.wrong_outputs, format!("NaN: lse {lse}, error {error}")));
    }
    if setup.format == AKV_FORMAT_PUBLISHED && ask.mode != AKV_EXACT {
        let wrong = error > 0.3 * truth.amplitude || lse_error > 0.5;
        return wrong.then(|| (&counts.wrong_outputs, format!("off by {error}, lse by {lse_error}")));
    }
    // So is what turning K by other roundings than the library's makes of scores.
    let turned = if setup.moves { 1e-4 } else { 0.0 };
    let (error, lse_error) = (error - turned * truth.amplitude, lse_error - turned);
    add(&counts.certificates_checked, 2);
    if setup.format != AKV_FORMAT_PUBLISHED {
        let slack = 1e-9 + 2e-7 * truth.lse.abs();
        if error > f64::from(bound) || bound.is_nan() {
            return Some((&counts.certificates_exceeded, format!("off by {error}, bound {bound}")));
        }
        if truth.lse.is_finite() && (lse_error > f64::from(lse_bound) + slack || lse_bound.is_nan()) {
            return Some((&counts.certificates_exceeded, format!("lse off by {lse_error}, bound {lse_bound}")));
        }
    }
    // What the certificate allows may still be far from what was asked for, and from what the stored digits can tell.
    let tolerance = match ask.mode {
        AKV_EXACT => 0.0,
        _ if ask.tolerance == 0.0 => 1e-3,
        _ => f64::from(ask.tolerance),
    };
    // Scores are binary32: a mask can make them large.
    let rounded = 1e-5 + if truth.lse.is_finite() { 1e-6 * truth.lse.abs() } else { 0.0 };
    let limit = (100.0 * tolerance + rounded + 8.0 * stored) * truth.amplitude + f64::from(f32::MIN_POSITIVE);
    if error > limit && f64::from(bound) >= truth.amplitude {
        // Scores so large and so close that their digits do not tell the tokens apart: the certificate says so.
        add(&counts.off_as_certified, 1);
        return None;
    }
    if error > limit {
        let text =
            format!("off by {error}, more than {limit}; A {}, bound {bound}, estimate {estimate}", truth.amplitude);
        return Some((&counts.wrong_outputs, text));
    }
    None
}
