//! Steps: new tokens of some sequences, in all layers or not at all.

use super::device::{Edits, Plan};
use super::layer::{Spare, released};
use super::memory::reserve;
use super::sequence::{Claim, Sequence};
use super::{Cache, NanPolicy, Positions, Reader};
use crate::format::{Clean, Rows, TILE};
use crate::{Error, Result};
use parking_lot::{RwLock, RwLockReadGuard};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed, Ordering::SeqCst};

/// Bounds of the steps of a batch; None = no bound.
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs)]
pub struct Bounds {
    pub max_sequences: Option<usize>,
    pub max_q: Option<usize>,
    pub max_kv: Option<usize>,
}

/// What a step does to one sequence.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct StepSequence {
    pub sequence: u64,
    pub n_new: usize,
    pub n_q: usize,
}

/// One step at a time over some sequences of a cache. Dropping it aborts the step, if one is begun.
#[derive(Debug)]
pub struct Batch {
    cache: Arc<Cache>,
    bounds: Bounds,
    step: RwLock<Option<Step>>,
}

#[derive(Debug)]
struct Step {
    members: Vec<Member>,
    /// New tokens of all members.
    n_new: usize,
    /// By layer that has rows: where appending stands.
    appended: Vec<AtomicU8>,
}

const NOT_YET: u8 = 0;
const RUNNING: u8 = 1;
const DONE: u8 = 2;

#[derive(Debug)]
struct Member {
    step: StepSequence,
    sequence: Arc<Sequence>,
    /// Tokens before the step, and tiles that there are pages for.
    len: usize,
    n_pages: usize,
    /// True if the step made new runs of positions.
    new_runs: bool,
    _claim: Claim,
}

impl Member {
    /// True if the step begins tiles.
    fn grows(&self) -> bool {
        (self.len + self.step.n_new).div_ceil(TILE) > self.len.div_ceil(TILE)
    }

    /// Pages that the step adds to each layer.
    fn new_pages(&self) -> usize {
        (self.len + self.step.n_new).div_ceil(TILE).saturating_sub(self.n_pages)
    }
}

fn no_step(call: &str) -> Error {
    Error::Argument(format!("{call}: no step is begun"))
}

fn in_use(call: &str) -> Error {
    Error::Busy(format!("{call}: the batch is in use by another call"))
}

impl Batch {
    /// A batch without a step.
    pub fn new(cache: Arc<Cache>, bounds: Bounds) -> Batch {
        Batch { cache, bounds, step: RwLock::new(None) }
    }

    /// Whose sequences it takes.
    pub fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// What every step keeps to.
    pub fn bounds(&self) -> &Bounds {
        &self.bounds
    }

    /// Begins a step. `positions`: of all new tokens, sequence by sequence; None = consecutive.
    pub fn begin(&self, step: &[StepSequence], positions: Option<&[i64]>) -> Result<()> {
        let mut current = self.step.try_write().ok_or_else(|| in_use("begin"))?;
        if current.is_some() {
            return Err(Error::Busy("begin: a step is begun already".into()));
        }
        self.check(step, positions)?;
        let mut begun = Step { members: Vec::new(), n_new: 0, appended: Vec::new() };
        reserve(&mut begun.members, step.len())?;
        let stored = &self.cache.stored;
        reserve(&mut begun.appended, stored.len())?;
        begun.appended.resize_with(stored.len(), || AtomicU8::new(NOT_YET));
        // Of each member: the positions to note.
        let mut new = Vec::new();
        reserve(&mut new, step.len())?;
        for &s in step {
            let member = self.member(s)?;
            new.push(member.positions(positions.map(|p| &p[begun.n_new..begun.n_new + s.n_new]))?);
            begun.members.push(member);
            begun.n_new += s.n_new;
        }
        let page_bytes = stored.iter().fold(0usize, |sum, (_, layout)| sum.saturating_add(layout.page_bytes()));
        let new_pages = begun.members.iter().fold(0usize, |sum, member| sum.saturating_add(member.new_pages()));
        self.cache.memory.check(page_bytes.saturating_mul(new_pages))?;
        begun.take_room(&new)?;
        *current = Some(begun);
        Ok(())
    }

    /// What can be said of a step without looking at its sequences.
    fn check(&self, step: &[StepSequence], positions: Option<&[i64]>) -> Result<()> {
        let sum = |what: &str, of: fn(&StepSequence) -> usize| {
            let sum = step.iter().try_fold(0usize, |sum, s| sum.checked_add(of(s)));
            sum.ok_or_else(|| Error::Argument(format!("{what}: the sum overflows")))
        };
        let (n_new, n_q) = (sum("n_new", |s| s.n_new)?, sum("n_q", |s| s.n_q)?);
        within("max_sequences", self.bounds.max_sequences, step.len(), "sequences")?;
        within("max_q", self.bounds.max_q, n_q, "query rows")?;
        if let Some(p) = positions.filter(|p| p.len() != n_new) {
            return Err(Error::Argument(format!("positions: {} of them for {n_new} new tokens", p.len())));
        }
        let mut ids = Vec::new();
        reserve(&mut ids, step.len())?;
        ids.extend(step.iter().map(|s| s.sequence));
        ids.sort_unstable();
        match ids.windows(2).find(|w| w[0] == w[1]) {
            Some(w) => Err(Error::Argument(format!("sequences: {} is there twice", w[0]))),
            None => Ok(()),
        }
    }

    fn member(&self, step: StepSequence) -> Result<Member> {
        let StepSequence { sequence: id, n_new, .. } = step;
        let sequence = self.cache.find(id)?;
        let claim = sequence.claim()?;
        sequence.check_whole()?;
        let len = sequence.len.load(Relaxed);
        let new_len = len
            .checked_add(n_new)
            .ok_or_else(|| Error::Argument(format!("n_new {n_new}: sequence {id} has {len} tokens")))?;
        within("max_kv", self.bounds.max_kv, new_len, format_args!("tokens of sequence {id}"))?;
        let n_pages = sequence.n_pages()?;
        Ok(Member { step, sequence, len, n_pages, new_runs: false, _claim: claim })
    }

    /// Appends the step's new tokens, sequence by sequence, in one layer.
    pub fn append(&self, layer: usize, k: Rows, v: Rows) -> Result<()> {
        self.append_once(layer, |step| self.append_rows(step, layer, k, v))
    }

    /// The same on a device, where `launch` makes the plan's work for the layer happen.
    pub fn append_on_device(&self, layer: usize, launch: impl FnOnce() -> Result<()>) -> Result<()> {
        self.append_once(layer, |step| {
            let mut layers = Vec::new();
            reserve(&mut layers, step.members.len())?;
            for member in step.members.iter().filter(|m| m.step.n_new > 0) {
                layers.push((member.sequence.write_layer(self.cache.homes[layer])?, member.step.n_new));
            }
            launch()?;
            layers.iter_mut().for_each(|(layer, n_new)| layer.advance(*n_new));
            Ok(())
        })
    }

    fn append_once(&self, layer: usize, work: impl FnOnce(&Step) -> Result<()>) -> Result<()> {
        let current = self.step.try_read().ok_or_else(|| in_use("append"))?;
        let step = current.as_ref().ok_or_else(|| no_step("append"))?;
        self.cache.check_layer(layer)?;
        self.cache.check_stored(layer)?;
        let flag = &step.appended[self.cache.homes[layer]];
        match flag.compare_exchange(NOT_YET, RUNNING, SeqCst, SeqCst) {
            Ok(_) => {}
            Err(RUNNING) => return Err(Error::Busy(format!("layer {layer}: is being appended by another call"))),
            Err(_) => return Err(Error::Argument(format!("layer {layer}: has been appended in this step already"))),
        }
        let result = work(step);
        flag.store(if result.is_ok() { DONE } else { NOT_YET }, SeqCst);
        result
    }

    fn append_rows(&self, step: &Step, layer: usize, k: Rows, v: Rows) -> Result<()> {
        let layout = &self.cache.layouts[layer];
        let shape = &layout.shape;
        if (k.dtype(), k.dim(), v.dtype(), v.dim()) != (shape.dtype_k, shape.dim_k, shape.dtype_v, shape.dim_v) {
            return Err(Error::Argument(format!("layer {layer}: rows are not of the layer's dtype and dim")));
        }
        let clean = |rows: &Rows| match self.cache.config.nan {
            NanPolicy::Error => Ok(None),
            _ => Clean::new(rows, step.n_new, shape.n_kv_heads),
        };
        let (clean_k, clean_v) = (clean(&k)?, clean(&v)?);
        let (k, v) = (clean_k.as_ref().map_or(k, Clean::rows), clean_v.as_ref().map_or(v, Clean::rows));
        let bad = [&clean_k, &clean_v].map(|clean| clean.as_ref().map_or(&[][..], Clean::bad));
        let mut row = 0;
        for Member { step: s, .. } in &step.members {
            if layout.check(&k.skip(row), &v.skip(row), s.n_new).is_err() {
                // Again, so that the row is counted from the first of the batch.
                let place = format!("layer {layer}, sequence {}", s.sequence);
                return layout.check(&k, &v, row + s.n_new).map_err(|error| error.at(&place));
            }
            row += s.n_new;
        }

        let mut layers = Vec::new();
        reserve(&mut layers, step.members.len())?;
        for member in step.members.iter().filter(|m| m.step.n_new > 0) {
            layers.push((member.sequence.write_layer(self.cache.homes[layer])?, member.step.n_new));
        }
        let mut row = 0;
        for (mut layer, n_new) in layers {
            layer.append(k.skip(row), v.skip(row), n_new);
            if layout.marked() {
                layer.mark(n_new, row, bad);
            }
            row += n_new;
        }
        Ok(())
    }

    /// Counts the step's new tokens as appended in all layers that lack them: a device has been told by a graph.
    pub fn replayed(&self) -> Result<()> {
        for &(layer, _) in &self.cache.stored {
            let current = self.step.try_read().ok_or_else(|| in_use("replayed"))?;
            let step = current.as_ref().ok_or_else(|| no_step("replayed"))?;
            if step.n_new > 0 && step.appended[self.cache.homes[layer]].load(SeqCst) == NOT_YET {
                self.append_on_device(layer, || Ok(()))?;
            }
        }
        Ok(())
    }

    /// What a device is told of the step that has begun.
    pub fn plan(&self) -> Result<Plan> {
        let current = self.step.try_read().ok_or_else(|| in_use("plan"))?;
        let step = current.as_ref().ok_or_else(|| no_step("plan"))?;
        let mut plan = Plan::default();
        let n_layers = self.cache.stored.len();
        reserve(&mut plan.views, n_layers * step.members.len())?;
        for layer in 0..n_layers {
            let before = plan.appends.len();
            let mut row = 0;
            for Member { step: s, sequence, len, .. } in &step.members {
                let mut rows = sequence.write_layer(layer)?;
                if rows.is_unlisted() {
                    rows.list(&mut plan.pokes);
                }
                plan.views.push(rows.device_view(s.sequence, len + s.n_new));
                rows.plan(s.sequence, row, s.n_new, &mut plan.appends);
                row += s.n_new;
            }
            plan.n_appends = plan.appends.len() - before;
        }
        Ok(plan)
    }

    /// Of each member: its tokens with the step's new ones, its query rows, its positions.
    pub fn lengths<T>(&self, work: impl FnOnce(&[(usize, usize, RwLockReadGuard<'_, Positions>)]) -> T) -> Result<T> {
        let current = self.step.try_read().ok_or_else(|| in_use("read"))?;
        let step = current.as_ref().ok_or_else(|| no_step("read"))?;
        let mut all = Vec::new();
        reserve(&mut all, step.members.len())?;
        for Member { step: s, sequence, len, .. } in &step.members {
            let busy = || Error::Busy(format!("sequence {}: being written", s.sequence));
            all.push((len + s.n_new, s.n_q, sequence.positions.try_read().ok_or_else(busy)?));
        }
        Ok(work(&all))
    }

    /// Fails unless the step's new tokens are in a layer.
    pub fn check_appended(&self, layer: usize) -> Result<()> {
        let current = self.step.try_read().ok_or_else(|| in_use("read"))?;
        current.as_ref().ok_or_else(|| no_step("read"))?.check_appended(&self.cache, layer)
    }

    /// Makes the step's tokens part of their sequences.
    pub fn commit(&self) -> Result<()> {
        let mut current = self.step.try_write().ok_or_else(|| in_use("commit"))?;
        let step = current.as_ref().ok_or_else(|| no_step("commit"))?;
        if step.n_new > 0
            && let Some(at) = step.appended.iter().position(|flag| flag.load(SeqCst) != DONE)
        {
            let layer = self.cache.stored[at].0;
            return Err(Error::Argument(format!("commit: layer {layer} has not been appended")));
        }
        let (keeps, tail) = (!self.cache.lossless(), self.cache.config.exact_tail);
        let mut layers = Vec::new();
        for Member { step: s, sequence, len, .. } in &step.members {
            if keeps && released(len + s.n_new, tail) > released(*len, tail) {
                reserve(&mut layers, sequence.layers.len())?;
                for i in 0..sequence.layers.len() {
                    layers.push(sequence.write_layer(i)?);
                }
            }
        }
        layers.iter_mut().for_each(|layer| layer.release());
        drop(layers);
        for Member { step: s, sequence, len, .. } in &step.members {
            sequence.len.store(len + s.n_new, Relaxed);
        }
        *current = None;
        Ok(())
    }

    /// Ends the step as if it had not begun. Waits for readers of what the step wrote: a thread that has a [`Reader`]
    /// of it must not call this.
    pub fn abort(&self) {
        let Some(step) = self.step.write().take() else { return };
        let mut edits = Edits::new(&self.cache.memory);
        for member in &step.members {
            let Member { step: s, sequence, len, new_runs, .. } = member;
            for ((_, layer), flag) in sequence.layers.iter().zip(&step.appended) {
                if s.n_new > 0 && (member.grows() || flag.load(SeqCst) != NOT_YET) {
                    layer.write().truncate(*len, Spare::default(), &mut edits);
                }
            }
            if *new_runs {
                sequence.positions.write().truncate(*len);
            }
        }
        if let (Some(device), Err(error)) = (self.cache.memory.device(), edits.run()) {
            device.fail(error);
        }
    }

    /// Shared access to the step's sequences in one layer, in the step's order, with their n_q.
    /// Busy if one is being written; an argument error if no step is begun.
    pub fn read(&self, layer: usize) -> Result<Vec<(StepSequence, Reader)>> {
        let current = self.step.try_read().ok_or_else(|| in_use("read"))?;
        let step = current.as_ref().ok_or_else(|| no_step("read"))?;
        self.cache.check_layer(layer)?;
        step.check_appended(&self.cache, layer)?;
        let mut readers = Vec::new();
        reserve(&mut readers, step.members.len())?;
        for member in &step.members {
            readers.push((member.step, member.sequence.read(self.cache.homes[layer], self.cache.layouts[layer])?));
        }
        Ok(readers)
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.abort();
    }
}

impl Step {
    fn check_appended(&self, cache: &Cache, layer: usize) -> Result<()> {
        let (state, layer) = (self.appended[cache.homes[layer]].load(SeqCst), cache.home(layer));
        match state {
            NOT_YET if self.n_new > 0 => {
                Err(Error::Argument(format!("layer {layer}: its new tokens have not been appended")))
            }
            RUNNING => Err(Error::Busy(format!("layer {layer}: is being appended"))),
            _ => Ok(()),
        }
    }

    /// Takes what the new tokens need, for all sequences and layers or for none.
    fn take_room(&mut self, new: &[&[i64]]) -> Result<()> {
        let n_layers = self.appended.len();
        let (mut layers, mut runs, mut with_runs) = (Vec::new(), Vec::new(), Vec::new());
        reserve(&mut runs, self.members.len())?;
        reserve(&mut with_runs, self.members.len())?;
        for (i, (member, &new)) in self.members.iter().zip(new).enumerate() {
            let Member { step: s, sequence, len, .. } = member;
            let busy = || Error::Busy(format!("sequence {}: being written", s.sequence));
            let room = sequence.positions.try_read().ok_or_else(busy)?.room(*len, new)?;
            if room.n_runs > 0 {
                runs.push((i, sequence.write_positions()?, *len, new, room));
            }
            if member.grows() || sequence.is_unlisted()? {
                reserve(&mut layers, n_layers)?;
                for layer in 0..n_layers {
                    let layer = sequence.write_layer(layer)?;
                    let room = layer.room(s.n_new)?;
                    layers.push((layer, s.n_new, room));
                }
            }
        }
        for (mut layer, n_new, room) in layers {
            layer.adopt(n_new, room);
        }
        for (i, mut positions, len, new, room) in runs {
            positions.extend(len, new, room);
            with_runs.push(i);
        }
        for i in with_runs {
            self.members[i].new_runs = true;
        }
        Ok(())
    }
}

impl Member {
    /// The positions to note, checked. Without any given they go on from the last one, which needs no note; the first
    /// is 0.
    fn positions<'a>(&self, given: Option<&'a [i64]>) -> Result<&'a [i64]> {
        let (id, n_new) = (self.step.sequence, self.step.n_new);
        let last = match self.len.checked_sub(1) {
            Some(last) => {
                let busy = || Error::Busy(format!("sequence {id}: being written"));
                Some(self.sequence.positions.try_read().ok_or_else(busy)?.at(last))
            }
            None => None,
        };
        let Some(given) = given else {
            return match last {
                Some(p) if p.checked_add_unsigned(n_new as u64).is_none() => {
                    Err(Error::Argument(format!("n_new {n_new}: positions of sequence {id} overflow after {p}")))
                }
                Some(_) => Ok(&[]),
                None => Ok(&[0][..n_new.min(1)]),
            };
        };
        let mut before = last.unwrap_or(i64::MIN);
        for &p in given {
            if p < before {
                return Err(Error::Argument(format!("positions: {p} after {before} in sequence {id}")));
            }
            before = p;
        }
        Ok(given)
    }
}

/// A capacity error unless `n` is within a bound.
fn within(name: &str, bound: Option<usize>, n: usize, what: impl std::fmt::Display) -> Result<()> {
    match bound {
        Some(bound) if n > bound => Err(Error::Capacity(format!("{name} {bound}: the step has {n} {what}"))),
        _ => Ok(()),
    }
}
