//! The CPU backend.
//!
//! A call is cut into units (a query row, or a block of them on the dense path, on one KV head) and splits of their
//! context. With units enough for all threads each takes whole units; otherwise the splits of every unit are shared,
//! with a barrier between the phases. Splits are absolute stretches of tiles and are merged in order, so the bits of a
//! result depend on neither.

mod dense;
mod fold;
mod math;
mod merge;
mod pool;
mod progressive;
mod published;
mod refine;
mod rows;
mod scan;
mod simd;
mod unit;
mod workspace;

pub use merge::{Merged, State, merge};

use super::{Attention, Stats, Threads};
use crate::alignment::Sums;
use crate::error::caught;
use crate::format::{Dtype, Layout, MAX_LATENT};
use crate::{Error, Result};
use parking_lot::{Mutex, MutexGuard};
use pool::{Pool, SpinBarrier};
use refine::Refine;
use scan::Scan;
use simd::Simd;
use std::sync::atomic::{AtomicUsize, Ordering};
use unit::{Path, Shares, Unit, Worker};
use workspace::{Arena, ThreadScratch, UnitScratch};

/// Instruction sets, worst to best.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Portable code.
    Scalar,
    /// AVX2, FMA, F16C.
    Avx2,
    /// AVX-512 F, BW, VL, VNNI.
    Avx512,
}

impl Isa {
    /// All of them.
    pub const ALL: [Isa; 3] = [Isa::Scalar, Isa::Avx2, Isa::Avx512];

    /// As AKV_ISA spells it.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }

    /// True if this machine has it.
    pub fn available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return match self {
            Isa::Scalar => true,
            Isa::Avx2 => {
                std::arch::is_x86_feature_detected!("avx2")
                    && std::arch::is_x86_feature_detected!("fma")
                    && std::arch::is_x86_feature_detected!("f16c")
            }
            Isa::Avx512 => {
                std::arch::is_x86_feature_detected!("avx512f")
                    && std::arch::is_x86_feature_detected!("avx512bw")
                    && std::arch::is_x86_feature_detected!("avx512vl")
                    && std::arch::is_x86_feature_detected!("avx512vnni")
            }
        };
        #[cfg(not(target_arch = "x86_64"))]
        return self == Isa::Scalar;
    }

    /// The best of this machine.
    pub fn best() -> Isa {
        Isa::ALL.into_iter().rev().find(|isa| isa.available()).unwrap_or(Isa::Scalar)
    }
}

/// What a thread does to a split, or to a whole unit.
#[derive(Clone, Copy)]
enum Phase {
    /// Scores of a split.
    Scan,
    /// Sums and outputs of a split.
    Attend,
    /// The unit's result, from its splits.
    Merge,
}

#[inline(always)]
fn step<S: Simd>(w: &mut Worker, unit: &Unit, split: usize, phase: Phase) {
    match (phase, unit.path) {
        (Phase::Scan, Path::Progressive) => progressive::scan::<S>(w, unit, split),
        (Phase::Scan, _) => {}
        (Phase::Attend, Path::Progressive) => progressive::refine::<S>(w, unit, split),
        (Phase::Attend, Path::Dense) => dense::split::<S>(w, unit, split),
        (Phase::Attend, Path::Published) => published::attend::<S>(w, unit),
        (Phase::Merge, _) => finish(w, unit),
    }
}

/// Merges a unit's splits in order and writes its outputs.
#[inline(always)]
fn finish(w: &mut Worker, unit: &Unit) {
    let (call, g, dv) = (w.call, w.call.shape.group(), w.call.shape.dim_v);
    let n = unit.n_rows * g;
    w.scratch.total[..n].fill(Sums::EMPTY);
    w.scratch.total_out[..n * dv].fill(0.0);
    for split in 0..unit.n_splits() {
        let (sums, outs) = w.state(unit, split);
        for at in 0..n {
            let (a, b) = w.scratch.total[at].merge(&sums[at]);
            let total = &mut w.scratch.total_out[at * dv..(at + 1) * dv];
            for (total, &x) in total.iter_mut().zip(&outs[at * dv..(at + 1) * dv]) {
                *total = *total * a + f64::from(x) * b;
            }
        }
    }
    if let Some(sinks) = call.sinks {
        for at in 0..n {
            // A token more, whose value is 0: nothing is known less well for it.
            let (a, _) = w.scratch.total[at].merge(&Sums::sink(sinks[unit.kv_head * g + at % g]));
            for total in &mut w.scratch.total_out[at * dv..(at + 1) * dv] {
                *total *= a;
            }
        }
    }
    let limit = if call.out.dtype() == Dtype::F16 { 65519.0 } else { f32::MAX };
    let lost = unit.lost(call);
    for at in 0..n {
        let (row, head) = (unit.row + at / g, unit.kv_head * g + at % g);
        let sums = &w.scratch.total[at];
        let mut out = [0.0f32; MAX_LATENT];
        let out = &mut out[..dv];
        let mut peak = 0.0f32;
        if sums.sum > 0.0 {
            for (x, &total) in out.iter_mut().zip(&w.scratch.total_out[at * dv..(at + 1) * dv]) {
                *x = (total / sums.sum) as f32;
                // NaN, where partial sums have been infinite both ways, is never the larger one.
                peak = if x.abs() <= peak { peak } else { x.abs() };
            }
        }
        w.overflow |= peak.is_nan() || peak > limit;
        let mut c = sums.certificate(peak);
        let is_lost = lost >> (at / g) & 1 == 1 || call.lost.binary_search(&(row, head)).is_ok();
        if unit.path == Path::Published || is_lost {
            (c.bound, c.lse_bound, c.estimate) = (f32::INFINITY, f32::INFINITY, f32::INFINITY);
        }
        if is_lost {
            (c.lse, c.amplitude) = (f32::NAN, f32::NAN);
            out.fill(f32::NAN);
        }
        let index = row * call.shape.n_q_heads + head;
        // SAFETY: a unit's rows and heads are its own, and one thread merges it; rows and heads are within the call's.
        unsafe {
            call.out.write_shared(row, head, out);
            for (floats, value) in [
                (call.lse, c.lse),
                (call.bound, c.bound),
                (call.lse_bound, c.lse_bound),
                (call.estimate, c.estimate),
                (call.amplitude, c.amplitude),
            ] {
                if let Some(floats) = floats {
                    floats.set(index, value);
                }
            }
        }
    }
    w.stats.count_unit(unit);
}

type Step = unsafe fn(&mut Worker, &Unit, usize, Phase);

/// Everything that is inlined into these is compiled for their instruction set.
fn scalar(w: &mut Worker, unit: &Unit, split: usize, phase: Phase) {
    step::<simd::Scalar>(w, unit, split, phase);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn avx2(w: &mut Worker, unit: &Unit, split: usize, phase: Phase) {
    step::<simd::Avx2>(w, unit, split, phase);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn avx512(w: &mut Worker, unit: &Unit, split: usize, phase: Phase) {
    step::<simd::Avx512>(w, unit, split, phase);
}

fn kernels(isa: Isa) -> (Step, Scan, Refine) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => (avx2, scan::avx2, refine::avx2),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => (avx512, scan::avx512, refine::avx512),
        _ => (scalar, scan::scalar, refine::scalar),
    }
}

/// Start of a workspace: what the threads of a call share.
#[repr(C, align(64))]
#[derive(Default)]
struct Shared {
    /// Next piece of work of each phase.
    next: [AtomicUsize; 3],
    /// Why a thread could not begin its part, or end it: what all of them return. Two, so that none still reads the
    /// one when another is at the next.
    failed: [Mutex<Option<Error>>; 2],
}

impl Shared {
    fn failed(&self, end: usize) -> MutexGuard<'_, Option<Error>> {
        self.failed[end].lock()
    }

    /// Meets the other threads at the beginning (0) or the end (1) of their parts: if one has failed, all fail alike,
    /// having waited equally often.
    fn meet<T>(&self, end: usize, ith: usize, wait: &dyn Fn(), result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.failed(end).get_or_insert_with(|| error.clone());
        }
        wait();
        let Some(error) = self.failed(end).clone() else { return result };
        // Nothing in a workspace is dropped by itself: once all have read it, the first thread does that.
        wait();
        if ith == 0 {
            *self.failed(end) = None;
        }
        wait();
        Err(error)
    }
}

/// The backend of a context: an instruction set, and threads if asked for.
#[derive(Debug)]
pub struct Cpu {
    isa: Isa,
    pool: Option<Pool>,
}

/// Units below `SHARED_UNITS * nth` are shared split by split.
const SHARED_UNITS: usize = 2;

impl Cpu {
    /// `isa` must be available. Starts n_threads - 1 workers.
    pub fn new(isa: Isa, n_threads: usize) -> Result<Cpu> {
        if !isa.available() {
            return Err(Error::Unsupported(format!("instruction set {}: this machine does not have it", isa.name())));
        }
        Ok(Cpu { isa, pool: if n_threads > 1 { Some(Pool::new(n_threads - 1)?) } else { None } })
    }

    /// Instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads, the caller's included; at least 1.
    pub fn n_threads(&self) -> usize {
        self.pool.as_ref().map_or(1, |pool| pool.n_workers() + 1)
    }

    /// Bytes of workspace (aligned to 64) of any call on this layout within these bounds.
    pub fn workspace_bytes(layout: &Layout, max_kv: usize, nth: usize) -> usize {
        let shape = &layout.shape;
        let mut unit = Arena::counting();
        UnitScratch::carve(&mut unit, shape, max_kv);
        let units = if nth > 1 { SHARED_UNITS * nth } else { 1 };
        size_of::<Shared>()
            + nth * (size_of::<Stats>().next_multiple_of(64) + ThreadScratch::bytes(shape))
            + units * unit.used()
    }

    /// Runs a call on this thread alone or, without `threads`, on the context's own. With `threads`, every one of them
    /// calls this with the same workspace; one that could not make its call passes the error, and all return it, having
    /// entered the barrier equally often.
    ///
    /// # Safety
    /// `workspace` is aligned to 64, has at least [`Cpu::workspace_bytes`] of the call's longest sequence and nth, and
    /// belongs to this call alone.
    pub unsafe fn attention(
        &self,
        call: Result<&Attention, Error>,
        threads: Option<Threads>,
        workspace: *mut u8,
    ) -> Result<Stats> {
        let alone = Threads { ith: 0, nth: 1, barrier: &|| {} };
        if let Some(threads) = threads {
            // SAFETY: the caller's contract.
            return unsafe { self.run(call, threads, workspace) };
        }
        let call = call?;
        if let Some(pool) = &self.pool {
            let nth = self.n_threads();
            let barrier = SpinBarrier::new(nth);
            let result = Mutex::new(Err(Error::Internal("a worker did not finish".to_owned())));
            let wait = || barrier.wait();
            let workspace = Workspace(workspace);
            let part = |ith: usize| {
                let threads = Threads { ith, nth, barrier: &wait };
                // SAFETY: the caller's contract; each thread its own ith.
                let stats = unsafe { self.run(Ok(call), threads, workspace.start()) };
                if ith == 0 {
                    *result.lock() = stats;
                }
            };
            if pool.run(&part) {
                return result.into_inner();
            }
        }
        // The context's threads are busy with another call: the bits are the same without them.
        // SAFETY: the caller's contract.
        unsafe { self.run(Ok(call), alone, workspace) }
    }

    /// One thread's part.
    ///
    /// # Safety
    /// As [`Cpu::attention`].
    unsafe fn run(&self, call: Result<&Attention, Error>, threads: Threads, workspace: *mut u8) -> Result<Stats> {
        let Threads { ith, nth, barrier } = threads;
        let wait = || {
            if nth > 1 {
                barrier();
            }
        };
        if ith == 0 {
            // SAFETY: the workspace starts with it, and no other thread reads it before the barrier.
            unsafe { workspace.cast::<Shared>().write(Shared::default()) };
        }
        wait();
        // SAFETY: written before the barrier; from here on only its atomics are touched.
        let shared = unsafe { &*workspace.cast::<Shared>() };
        let units = call.and_then(|call| caught(|| Ok((call, Unit::list(call)?))));
        let (call, units) = shared.meet(0, ith, &wait, units)?;

        let stats_bytes = size_of::<Stats>().next_multiple_of(64);
        let stats_at = |i: usize| workspace.wrapping_add(size_of::<Shared>() + i * stats_bytes).cast::<Stats>();
        let threads_start = workspace.wrapping_add(size_of::<Shared>() + nth * stats_bytes);
        let thread_bytes = ThreadScratch::bytes(call.shape);
        let units_start = threads_start.wrapping_add(nth * thread_bytes);
        let max_kv = units.iter().map(|u| u.to).max().unwrap_or(0);
        let unit_scratch = |i: usize| {
            let mut counting = Arena::counting();
            UnitScratch::carve(&mut counting, call.shape, max_kv);
            // SAFETY: unit i's part of the workspace, of the size that `workspace_bytes` counts.
            let mut arena = unsafe { Arena::new(units_start.wrapping_add(i * counting.used())) };
            UnitScratch::carve(&mut arena, call.shape, max_kv)
        };
        let (step, scan, refine) = kernels(self.isa);
        let mut worker = Worker {
            call,
            scan,
            refine,
            // SAFETY: this thread's own part of the workspace, which has room for all.
            scratch: unsafe {
                ThreadScratch::carve(&mut Arena::new(threads_start.wrapping_add(ith * thread_bytes)), call.shape)
            },
            unit: unit_scratch(ith),
            stats: Stats::default(),
            shares: Shares::NONE,
            overflow: false,
        };
        let take = |phase: Phase| shared.next[phase as usize].fetch_add(1, Ordering::Relaxed);
        // SAFETY: the instruction set was found available in `new`.
        let run = |worker: &mut Worker, unit: &Unit, split: usize, phase: Phase| unsafe {
            step(worker, unit, split, phase);
        };
        // A thread that panics, which is a bug, still meets the others.
        let mut result = Ok(());
        if nth == 1 || units.len() >= SHARED_UNITS * nth {
            result = caught(|| {
                while let Some(unit) = units.get(take(Phase::Merge)) {
                    for phase in [Phase::Scan, Phase::Attend] {
                        for split in 0..unit.n_splits() {
                            run(&mut worker, unit, split, phase);
                        }
                    }
                    run(&mut worker, unit, 0, Phase::Merge);
                }
                Ok(())
            });
        } else {
            for phase in [Phase::Scan, Phase::Attend, Phase::Merge] {
                let splits = |u: &Unit| if matches!(phase, Phase::Merge) { 1 } else { u.n_splits() };
                let n: usize = units.iter().map(splits).sum();
                let done = caught(|| {
                    loop {
                        let mut at = take(phase);
                        if at >= n {
                            return Ok(());
                        }
                        for (i, unit) in units.iter().enumerate() {
                            if at < splits(unit) {
                                worker.unit = unit_scratch(i);
                                run(&mut worker, unit, at, phase);
                                break;
                            }
                            at -= splits(unit);
                        }
                    }
                });
                result = result.and(done);
                wait();
            }
        }
        if worker.overflow && result.is_ok() {
            result = Err(Error::Range(
                "q: the scores (or the outputs in out's dtype) overflow: expected |q| * |k| * scale within binary32"
                    .to_owned(),
            ));
        }
        // SAFETY: this thread's own place; read by others after the barrier.
        unsafe { stats_at(ith).write(worker.stats) };
        shared.meet(1, ith, &wait, result)?;
        let mut stats = Stats::default();
        for i in 0..nth {
            // SAFETY: written by every thread before the barrier.
            stats.add(unsafe { &*stats_at(i) });
        }
        // Nobody may give the workspace back while others still read it.
        wait();
        Ok(stats)
    }
}

/// The start of a workspace, for the threads of a call.
#[derive(Clone, Copy)]
struct Workspace(*mut u8);

// SAFETY: threads of a call use disjoint parts of it, or its atomics.
unsafe impl Sync for Workspace {}

impl Workspace {
    fn start(self) -> *mut u8 {
        self.0
    }
}
