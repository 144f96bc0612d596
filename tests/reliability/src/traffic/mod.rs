//! The traffic of an engine: sequences are made, extended in mixed batches, attended, forked, copied, cut, read back and
//! destroyed, cells written and attended beside them, by one thread or many, and every answer is held against the model.

mod attention;
mod cells;
mod crowd;

use crate::api::*;
use crate::barrier::together;
use crate::counts::{Counts, add, found};
use crate::dice::Dice;
use crate::memory::Hooks;
use crate::model::*;
use crate::stream::{Reading, collect, read};
use crate::truth::{HeadRows, Truth, View};
use attention::{Outputs, Over};
use cells::Cells;
use crowd::Crowd;
use parking_lot::{Mutex, MutexGuard, RwLock};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// A fault of the program itself, to see that it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    Nothing,
    /// A channel of an output is changed.
    Output,
    /// A bound is taken for 0.
    Certificate,
    /// A token of a step is not appended.
    Token,
    /// A cell of those written is forgotten.
    Cell,
    /// A sequence is forgotten.
    Leak,
    /// A block of the heap is forgotten.
    Heap,
    /// The process ends.
    Crash,
    /// Two threads write the same word.
    Race,
}

impl Plant {
    pub const ALL: [(&'static str, Plant); 8] = [
        ("output", Plant::Output),
        ("certificate", Plant::Certificate),
        ("token", Plant::Token),
        ("cell", Plant::Cell),
        ("leak", Plant::Leak),
        ("heap", Plant::Heap),
        ("crash", Plant::Crash),
        ("race", Plant::Race),
    ];
}

/// How long, how many, how hard.
#[derive(Clone, Debug)]
pub struct Plan {
    pub threads: usize,
    pub seed: u64,
    pub until: Instant,
    /// Operations of each thread; 0 = no limit but the time.
    pub operations: u64,
    /// One allocation in so many fails; 0: none.
    pub fail_one_in: u64,
    /// One attention call in so many is checked.
    pub check_one_in: usize,
    pub plant: Plant,
}

/// A sequence that lives.
struct Live {
    id: akv_sequence,
    tokens: Vec<Token>,
}

type Slot = Mutex<Option<Live>>;

/// Caches, and what must be in them.
pub struct World<'a> {
    setup: &'a Setup,
    plan: &'a Plan,
    counts: &'a Counts,
    cache: Handle<akv_cache>,
    /// Of another context, with other rows kept as given: sequences come by on their way.
    elsewhere: Handle<akv_cache>,
    /// Not of every format.
    cells: Option<Cells>,
    slots: Vec<Slot>,
    /// Their ids, for calls that do not care whom they disturb.
    ids: Vec<AtomicU64>,
    crowd: RwLock<Crowd>,
    stop: AtomicBool,
}

/// Threads that the program brings to one call, at most.
const TEAM: i32 = 4;

/// Runs traffic over new caches, ends them, and looks at what is left.
pub fn run(setup: &Setup, plan: &Plan, dice: Dice, hooks: &'static Hooks, counts: &Counts) {
    let before = hooks.failed.load(Relaxed);
    let contexts = [setup.n_threads, 0].map(|n_threads| context(n_threads, hooks));
    hooks.fail_one_in.store(0, Relaxed);
    let setup = Setup { n_sequences: setup.n_sequences + 64, ..setup.clone() };
    let (status, cache) = setup.cache(contexts[0]);
    assert_eq!(status, AKV_OK, "{}", last_error());
    let exact = if setup.exact_tail == AKV_NONE { 0 } else { AKV_NONE };
    let (status, elsewhere) = Setup { exact_head: exact, exact_tail: exact, ..setup.clone() }.cache(contexts[1]);
    assert_eq!(status, AKV_OK, "{}", last_error());
    let (status, crowd) = batch(cache, TEAM, 1 << 20);
    assert_eq!(status, AKV_OK, "{}", last_error());
    let n = setup.n_sequences - 64;
    let world = World {
        setup: &setup,
        plan,
        counts,
        cache,
        elsewhere,
        cells: (setup.format != AKV_FORMAT_PUBLISHED).then(|| Cells::new(&setup, contexts[0])),
        slots: (0..n).map(|_| Mutex::default()).collect(),
        ids: (0..n).map(|_| AtomicU64::new(0)).collect(),
        crowd: RwLock::new(Crowd { batch: crowd, members: Vec::new(), begun: false }),
        stop: AtomicBool::new(false),
    };
    hooks.fail_one_in.store(plan.fail_one_in, Relaxed);
    if plan.threads == 1 {
        Worker::new(&world, dice).work();
    } else {
        together(plan.threads, |i| {
            let seed = plan.seed.wrapping_mul(1000).wrapping_add(i as u64);
            Worker::new(&world, Dice::Seeded(seed)).work();
        });
    }
    hooks.fail_one_in.store(0, Relaxed);
    world.end();
    // SAFETY: handles that nobody uses any more.
    let mut statuses = world.caches().map(|cache| unsafe { akv_cache_destroy(cache.0) }).collect::<Vec<_>>();
    // SAFETY: the same.
    statuses.extend(contexts.map(|context| unsafe { akv_context_destroy(context.0) }));
    if statuses.iter().any(|&status| status != AKV_OK) {
        found(&counts.wrong_answers, 1, || format!("at the end: {statuses:?}: {}", last_error()));
    }
    let (blocks, bytes) = (hooks.blocks.load(Relaxed), hooks.bytes.load(Relaxed));
    add(&counts.leaks_checked, 1);
    if (blocks, bytes) != (0, 0) {
        found(&counts.leaks, blocks.unsigned_abs().max(1), || format!("{blocks} blocks of {bytes} bytes are left"));
        hooks.blocks.store(0, Relaxed);
        hooks.bytes.store(0, Relaxed);
    }
    add(&counts.faults_injected, hooks.failed.load(Relaxed) - before);
}

impl World<'_> {
    fn caches(&self) -> impl Iterator<Item = Handle<akv_cache>> {
        [self.cache, self.elsewhere].into_iter().chain(self.cells.as_ref().map(|cells| cells.cache))
    }

    /// Ends all that lives, and counts what it leaves.
    fn end(&self) {
        let counts = self.counts;
        let mut worker = Worker::new(self, Dice::Seeded(self.plan.seed));
        let mut crowd = self.crowd.write();
        worker.end_of_crowd(&mut crowd);
        let mut tokens = 0;
        let slots = self.slots.iter().filter_map(|slot| slot.lock().take());
        let all: Vec<Live> = slots.chain(crowd.members.drain(..).map(|m| m.0)).collect();
        for live in &all {
            tokens += live.tokens.iter().filter(|t| !t.removed).count() as u64;
            worker.check_length(live.id, live.tokens.len());
            worker.read_back(live, 0, 1);
        }
        let held = usage(self.cache);
        add(&counts.tokens_checked, 1);
        if held.tokens != tokens || held.n_sequences as usize != all.len() {
            let text = format!("{} tokens of {} sequences", held.tokens, held.n_sequences);
            found(&counts.lost_tokens, held.tokens.abs_diff(tokens), || {
                format!("{text}: expected {tokens} of {}", all.len())
            });
        }
        for live in all {
            // SAFETY: a handle and an id.
            let status = unsafe { akv_sequence_destroy(self.cache.0, live.id) };
            worker.expect("destroy", status, &[]);
        }
        // SAFETY: a handle.
        let status = unsafe { akv_batch_destroy(crowd.batch.0) };
        worker.expect("batch_destroy", status, &[]);
        worker.end_of_cells();
        drop(worker);
        for cache in [self.cache, self.elsewhere] {
            let left = usage(cache);
            add(&counts.leaks_checked, 1);
            let of_sequences =
                left.pages_used + left.pages_shared + left.tokens + left.bytes_kept + left.n_sequences as u64;
            if of_sequences != 0 {
                found(&counts.leaks, left.pages_used.max(1), || format!("with no sequence left: {left:?}"));
            }
        }
    }
}

/// One thread of an engine.
struct Worker<'w, 'd> {
    world: &'w World<'w>,
    dice: Dice<'d>,
    batch: Handle<akv_batch>,
    /// For steps that do nothing.
    other: Handle<akv_batch>,
    /// The same, elsewhere.
    away: Handle<akv_batch>,
    dead: Vec<akv_sequence>,
    operations: u64,
    attended: u64,
    q: Packed,
    outputs: Outputs,
    again: Outputs,
    workspace: Vec<[u64; 8]>,
    bytes: Vec<u8>,
    key: Packed,
    value: Packed,
    rows: HeadRows,
    truth: Truth,
}

/// A sequence in a step of this thread.
struct Member<'w> {
    slot: MutexGuard<'w, Option<Live>>,
    id: akv_sequence,
    old_len: usize,
    n_new: usize,
    n_q: usize,
}

impl Member<'_> {
    fn tokens(&self) -> &[Token] {
        self.slot.as_ref().map_or(&[], |live| &live.tokens)
    }
}

impl Drop for Worker<'_, '_> {
    fn drop(&mut self) {
        for batch in [self.batch, self.other, self.away] {
            // SAFETY: a handle.
            let status = unsafe { akv_batch_destroy(batch.0) };
            self.expect("batch_destroy", status, &[]);
        }
    }
}

impl<'w, 'd> Worker<'w, 'd> {
    fn new(world: &'w World<'w>, dice: Dice<'d>) -> Self {
        let new = |cache| {
            let (status, batch) = batch(cache, TEAM, 1 << 20);
            assert_eq!(status, AKV_OK, "{}", last_error());
            batch
        };
        Worker {
            world,
            dice,
            batch: new(world.cache),
            other: new(world.cache),
            away: new(world.elsewhere),
            dead: Vec::new(),
            operations: 0,
            attended: 0,
            q: Packed::default(),
            outputs: Outputs::default(),
            again: Outputs::default(),
            workspace: Vec::new(),
            bytes: Vec::new(),
            key: Packed::default(),
            value: Packed::default(),
            rows: HeadRows::default(),
            truth: Truth::default(),
        }
    }

    fn work(&mut self) {
        let world = self.world;
        while !world.stop.load(Relaxed) && !self.dice.is_empty() {
            self.act();
            let limit = world.plan.operations;
            if limit > 0 && self.operations >= limit {
                break;
            }
            if self.operations.is_multiple_of(64) && Instant::now() >= world.plan.until {
                break;
            }
        }
    }

    /// Counts a call and what came of it: AKV_OK, what a plan allows, or what `also` names. Anything else is a finding.
    fn expect(&mut self, call: &str, status: akv_status, also: &[akv_status]) -> bool {
        self.operations += 1;
        let (plan, counts) = (self.world.plan, self.world.counts);
        add(&counts.operations, 1);
        if status == AKV_OK {
            return true;
        }
        let allowed = also.contains(&status)
            && match status {
                AKV_E_BUSY => plan.threads > 1,
                AKV_E_MEMORY => plan.fail_one_in > 0,
                _ => true,
            };
        if status == AKV_E_BUSY {
            add(&counts.busy, 1);
        }
        if !allowed {
            found(&counts.wrong_answers, 1, || {
                format!("{call}: {}: {} ({})", name(status), last_error(), self.world.setup.name)
            });
        } else if last_error().is_empty() {
            found(&counts.wrong_answers, 1, || format!("{call}: {} without a text", name(status)));
        }
        false
    }

    /// A call that must fail like that.
    fn refused(&mut self, call: &str, status: akv_status, expected: &[akv_status]) {
        self.operations += 1;
        let counts = self.world.counts;
        add(&counts.operations, 1);
        add(&counts.faults_injected, 1);
        if !expected.contains(&status) {
            found(&counts.wrong_answers, 1, || format!("{call}: {} instead of a refusal", name(status)));
        }
    }

    /// Alone, a call that failed has changed nothing.
    fn unchanged(&mut self, call: &str, before: &[akv_usage]) {
        let of = |u: &akv_usage| (u.n_sequences, u.bytes_used, u.bytes_kept, u.pages_used, u.pages_shared, u.tokens);
        for (before, after) in before.iter().zip(self.before()) {
            if of(before) != of(&after) {
                found(&self.world.counts.wrong_answers, 1, || {
                    format!("{call} failed and left {after:?}, after {before:?}")
                });
            }
        }
    }

    /// What the caches hold; nothing to compare with if others may be changing it.
    fn before(&self) -> Vec<akv_usage> {
        if self.world.plan.threads == 1 { self.world.caches().map(usage).collect() } else { Vec::new() }
    }

    fn act(&mut self) {
        match self.dice.below(100) {
            0..8 => self.create(),
            8..11 => self.destroy(),
            11..18 => self.fork(),
            18..26 => self.truncate(),
            26..32 => self.check_rows(),
            32..35 => self.stale(),
            35..37 => self.snapshot(),
            37 => self.reserve(),
            38..41 if self.world.setup.format != AKV_FORMAT_PUBLISHED => self.remove(),
            41..43 if self.world.setup.moves => self.shift(),
            43..50 if self.world.plan.threads > 1 => self.disturb(),
            50..62 if self.world.plan.threads > 1 => self.join_crowd(),
            62..66 => self.hand_over(),
            66..78 if self.world.cells.is_some() => self.use_cells(),
            _ => self.step(),
        }
    }

    /// A slot that holds a sequence, or that does not.
    fn slot(&mut self, live: bool) -> Option<(usize, MutexGuard<'w, Option<Live>>)> {
        for _ in 0..4 {
            let i = self.dice.below(self.world.slots.len());
            if let Some(slot) = self.world.slots[i].try_lock().filter(|slot| slot.is_some() == live) {
                return Some((i, slot));
            }
        }
        None
    }

    fn fill(&mut self, i: usize, slot: &mut Option<Live>, id: akv_sequence, tokens: Vec<Token>) {
        if self.dead.contains(&id) {
            found(&self.world.counts.wrong_answers, 1, || format!("id {id} comes a second time"));
        }
        self.world.ids[i].store(id, Relaxed);
        *slot = Some(Live { id, tokens });
    }

    fn create(&mut self) {
        let Some((i, mut slot)) = self.slot(false) else { return };
        let (before, mut id) = (self.before(), 0);
        // SAFETY: a handle and an output.
        let status = unsafe { akv_sequence_create(self.world.cache.0, &mut id) };
        match self.expect("create", status, &[AKV_E_MEMORY]) {
            true => self.fill(i, &mut slot, id, Vec::new()),
            false => self.unchanged("create", &before),
        }
    }

    fn destroy(&mut self) {
        let Some((_, mut slot)) = self.slot(true) else { return };
        let Some(live) = slot.take() else { return };
        // SAFETY: a handle and an id.
        let status = unsafe { akv_sequence_destroy(self.world.cache.0, live.id) };
        if self.expect("destroy", status, &[AKV_E_BUSY]) {
            self.dead.push(live.id);
        } else {
            *slot = Some(live);
        }
    }

    fn fork(&mut self) {
        let Some((_, slot)) = self.slot(true) else { return };
        let Some((i, mut to)) = self.slot(false) else { return };
        let Some(live) = slot.as_ref() else { return };
        let len = live.tokens.len();
        let n = if self.dice.one_in(2) { len } else { self.dice.below(len + 1) };
        let (before, mut id) = (self.before(), 0);
        let all = n == len && self.dice.one_in(2);
        // SAFETY: a handle, an id, an output.
        let status =
            unsafe { akv_sequence_fork(self.world.cache.0, live.id, if all { -1 } else { n as i64 }, &mut id) };
        if self.expect("fork", status, &[AKV_E_MEMORY, AKV_E_BUSY]) {
            if self.world.plan.plant == Plant::Leak {
                return; // its id is lost
            }
            let mut tokens = live.tokens[..n].to_vec();
            trim(&mut tokens);
            self.fill(i, &mut to, id, tokens);
        } else {
            self.unchanged("fork", &before);
        }
    }

    fn truncate(&mut self) {
        let Some((_, mut slot)) = self.slot(true) else { return };
        let Some(live) = slot.as_mut() else { return };
        let len = live.tokens.len();
        let back = if self.dice.one_in(3) { len } else { 70.min(len) };
        let n = len - self.dice.below(back + 1);
        let before = self.before();
        // SAFETY: a handle and an id.
        let status = unsafe { akv_sequence_truncate(self.world.cache.0, live.id, n as i64) };
        if self.expect("truncate", status, &[AKV_E_MEMORY, AKV_E_BUSY]) {
            live.tokens.truncate(n);
            trim(&mut live.tokens);
        } else {
            self.unchanged("truncate", &before);
        }
        let (id, len) = (live.id, live.tokens.len());
        self.check_length(id, len);
    }

    /// Takes memory ahead: a promise of which nothing can be seen but that it does not change anything.
    fn reserve(&mut self) {
        let Some((_, slot)) = self.slot(true) else { return };
        let Some(live) = slot.as_ref() else { return };
        let n = self.dice.below(300) as i64;
        // SAFETY: a handle and an id.
        let status = unsafe { akv_sequence_reserve(self.world.cache.0, live.id, n) };
        self.expect("reserve", status, &[AKV_E_MEMORY, AKV_E_BUSY]);
        self.check_length(live.id, live.tokens.len());
    }

    /// Removes tokens of a stretch of positions.
    fn remove(&mut self) {
        let Some((_, mut slot)) = self.slot(true) else { return };
        let Some(live) = slot.as_mut().filter(|live| !live.tokens.is_empty()) else { return };
        // Those of tokens that are still there ascend.
        let positions: Vec<i64> = live.tokens.iter().filter(|t| !t.removed).map(|t| t.position).collect();
        let first = self.dice.below(positions.len());
        let n = if self.dice.one_in(3) { positions.len() } else { 150 };
        let last = (first + self.dice.below(n)).min(positions.len() - 1);
        let (from, to) = (positions[first], positions[last] + 1);
        let before = self.before();
        // SAFETY: a handle and an id.
        let status = unsafe { akv_sequence_remove(self.world.cache.0, live.id, from, to) };
        if self.expect("remove", status, &[AKV_E_MEMORY, AKV_E_BUSY]) {
            live.tokens.iter_mut().for_each(|t| t.removed |= (from..to).contains(&t.position));
            trim(&mut live.tokens);
        } else {
            self.unchanged("remove", &before);
        }
        let (id, len) = (live.id, live.tokens.len());
        self.check_length(id, len);
    }

    /// Moves the tokens from some position on: closer to those before, as after a removal, or further away.
    fn shift(&mut self) {
        let Some((_, mut slot)) = self.slot(true) else { return };
        let Some(live) = slot.as_mut().filter(|live| !live.tokens.is_empty()) else { return };
        let from = live.tokens[self.dice.below(live.tokens.len())].position;
        let positions = || live.tokens.iter().filter(|t| !t.removed).map(|t| t.position);
        let before_it = positions().filter(|&p| p < from).max().unwrap_or(from - 3);
        let least = positions().filter(|&p| p >= from).min().map_or(0, |p| before_it - p);
        let delta = self.dice.pick(&[least, least / 2, 3, 0, 40]);
        let ropes: Vec<_> = self.world.setup.layers.iter().map(|l| frequencies(l.dim_k)).collect();
        let ropes: Vec<_> = ropes.iter().enumerate().map(|(i, f)| (rope(i, f), f)).collect();
        let per_layer: Vec<_> = ropes.iter().map(|r| r.0).collect();
        let before = self.before();
        // SAFETY: a handle, an id, a rope for every layer.
        let status =
            unsafe { akv_sequence_shift(self.world.cache.0, live.id, from, i64::MAX, delta, per_layer.as_ptr()) };
        if self.expect("shift", status, &[AKV_E_MEMORY, AKV_E_BUSY]) {
            for token in live.tokens.iter_mut().filter(|t| t.position >= from) {
                token.position += delta;
                token.turned += delta;
            }
        } else {
            self.unchanged("shift", &before);
        }
    }

    fn check_length(&mut self, id: akv_sequence, len: usize) {
        let mut n = -1;
        // SAFETY: a handle, an id, an output.
        let status = unsafe { akv_sequence_length(self.world.cache.0, id, -1, &mut n) };
        let counts = self.world.counts;
        add(&counts.tokens_checked, 1);
        if status != AKV_OK || n != len as i64 {
            found(&counts.lost_tokens, (n - len as i64).unsigned_abs().max(1), || {
                format!("sequence {id} has {n} tokens, not {len}: {}", name(status))
            });
        }
    }

    fn check_rows(&mut self) {
        let Some((_, slot)) = self.slot(true) else { return };
        let Some(live) = slot.as_ref() else { return };
        let n = 1 + self.dice.below(20);
        let first = self.dice.below(live.tokens.len() + 1);
        self.read_back(live, first, n);
    }

    /// Reads tokens back, as far as there are any, and compares.
    fn read_back(&mut self, live: &Live, first: usize, n: usize) {
        let setup = self.world.setup;
        let tokens = &live.tokens[first.min(live.tokens.len())..];
        let tokens = &tokens[..n.min(tokens.len())];
        let layer = self.dice.below(setup.layers.len());
        let shape = setup.layers[layer];
        let (key, value) = self.room(&shape, tokens.len());
        // SAFETY: a handle, an id, and room for the rows.
        let status = unsafe {
            let (first, n) = (first as i64, tokens.len() as i64);
            akv_dequantize_kv(self.world.cache.0, live.id, layer as i32, first, n, &key, &value, null_mut())
        };
        if self.expect("dequantize", status, &[AKV_E_BUSY]) {
            self.check_stored(layer, first, [tokens; 2]);
        }
    }

    /// Room for K and V of `n` tokens or cells, to read them back.
    fn room(&mut self, shape: &akv_layer_desc, n: usize) -> (akv_rows, akv_rows) {
        let [dk, dv] = [Part::K, Part::V].map(|part| n * shape.n_kv_heads as usize * dtype_dim(shape, part).1);
        self.key.resize(dk, AKV_F32);
        self.value.resize(dv, AKV_F32);
        (self.key.rows(), self.value.rows())
    }

    /// Compares what has been read back, K and V of some tokens or cells from `first` on.
    fn check_stored(&mut self, layer: usize, first: usize, tokens: [&[Token]; 2]) {
        let (setup, counts) = (self.world.setup, self.world.counts);
        let shape = setup.layers[layer];
        let heads = shape.n_kv_heads as usize;
        let mut given = [0.0; 256];
        for (part, tokens) in [Part::K, Part::V].into_iter().zip(tokens) {
            let (dtype, dim) = dtype_dim(&shape, part);
            for (i, token) in tokens.iter().enumerate() {
                for head in 0..heads {
                    if part == Part::K && token.turned != 0 && !token.removed {
                        continue; // how often it has been encoded anew is not known here: certificates tell
                    }
                    match token.removed {
                        true => given[..dim].fill(0.0),
                        false => row(token, layer, part, head, dtype, &mut given[..dim]),
                    }
                    let peak = given[..dim].iter().fold(0.0, |m: f32, x| m.max(x.abs()));
                    let error = setup.row_error(layer, part, peak) * (1 + token.copies) as f32;
                    let stored = if part == Part::K { &mut self.key } else { &mut self.value };
                    let off = (0..dim).find(|&c| {
                        let x = stored.get((i * heads + head) * dim + c);
                        (x - given[c]).abs() > error || x.is_nan()
                    });
                    if let Some(c) = off {
                        let x = stored.get((i * heads + head) * dim + c);
                        found(&counts.wrong_outputs, 1, || {
                            let (at, name) = (first + i, setup.name);
                            format!("{name}: token {at}, {part:?}, channel {c} is {x}, not {} +- {error}", given[c])
                        });
                    }
                }
            }
        }
        add(&counts.outputs_checked, (2 * tokens[0].len() * heads) as u64);
    }

    /// A sequence is copied: to the same cache, or elsewhere, where it attends and from where it comes back.
    fn hand_over(&mut self) {
        let Some((_, slot)) = self.slot(true) else { return };
        let Some((i, mut to)) = self.slot(false) else { return };
        let (Some(live), cache, elsewhere) = (slot.as_ref(), self.world.cache, self.world.elsewhere) else { return };
        let copied = if self.dice.one_in(3) {
            self.copy(cache, live.id, cache)
        } else {
            let Some(away) = self.copy(cache, live.id, elsewhere) else { return };
            let n_q = self.dice.below(live.tokens.len().min(12) + 1);
            let status = look(self.away, away, n_q);
            if self.expect("begin", status, &[AKV_E_MEMORY]) {
                let views = View::sequences([(&live.tokens[..], n_q)]);
                for layer in 0..self.world.setup.layers.len() {
                    self.attend(Over::Step(self.away), layer, &views);
                }
                // SAFETY: a handle.
                let status = unsafe { akv_batch_abort(self.away.0) };
                self.expect("abort", status, &[]);
            }
            let back = self.copy(elsewhere, away, cache);
            // SAFETY: a handle and an id.
            let status = unsafe { akv_sequence_destroy(elsewhere.0, away) };
            self.expect("destroy", status, &[]);
            back
        };
        if let Some(id) = copied {
            self.fill(i, &mut to, id, live.tokens.clone());
            self.check_length(id, live.tokens.len());
        }
    }

    fn copy(&mut self, from: Handle<akv_cache>, id: akv_sequence, to: Handle<akv_cache>) -> Option<akv_sequence> {
        let (before, mut copy) = (self.before(), 0);
        // SAFETY: handles, an id, an output.
        let status = unsafe { akv_sequence_copy(from.0, id, to.0, &mut copy) };
        let copied = self.expect("copy", status, &[AKV_E_MEMORY, AKV_E_BUSY]);
        if !copied {
            self.unchanged("copy", &before);
        }
        copied.then_some(copy)
    }

    /// A sequence goes out as bytes and comes in as another; or does not, if its bytes are damaged.
    fn snapshot(&mut self) {
        let Some((_, slot)) = self.slot(true) else { return };
        let Some((i, mut to)) = self.slot(false) else { return };
        let (Some(live), cache) = (slot.as_ref(), self.world.cache.0) else { return };
        self.bytes.clear();
        // SAFETY: a handle, an id, a function with its pointer.
        let status =
            unsafe { akv_sequence_export(cache, live.id, null(), Some(collect), (&raw mut self.bytes).cast()) };
        if !self.expect("export", status, &[AKV_E_BUSY]) {
            return;
        }
        let bytes = std::mem::take(&mut self.bytes);
        let mut reading = Reading { bytes: &bytes, ..Reading::default() };
        let damage = self.dice.below(4);
        match damage {
            0 => reading.bytes = &bytes[..self.dice.below(bytes.len().min(1 << 16))],
            1 => reading.changes = vec![(self.dice.bits() as usize % bytes.len(), 1 << self.dice.below(8))],
            _ => {}
        }
        let (before, mut id) = (self.before(), 0);
        // SAFETY: a handle, a function with its pointer, an output.
        let status = unsafe { akv_sequence_import(cache, 0, Some(read), (&raw mut reading).cast(), &mut id) };
        if damage < 2 {
            let memory = if self.world.plan.fail_one_in > 0 { AKV_E_MEMORY } else { AKV_E_CORRUPT };
            self.refused("import", status, &[AKV_E_CORRUPT, AKV_E_VERSION, AKV_E_ARGUMENT, memory]);
            self.unchanged("import", &before);
        } else if self.expect("import", status, &[AKV_E_MEMORY]) {
            let tokens = live.tokens.clone();
            self.fill(i, &mut to, id, tokens);
        } else {
            self.unchanged("import", &before);
        }
        self.bytes = bytes;
    }

    /// Ids that mean nothing.
    fn stale(&mut self) {
        let cache = self.world.cache.0;
        let dead = self.dead.last().copied().unwrap_or(u64::MAX);
        let id = self.dice.pick(&[dead, 0, u64::MAX, dead ^ 1 << 60]);
        let mut out = 0u64;
        let mut length = 0;
        let one = 1;
        let step = akv_batch_desc {
            struct_size: size::<akv_batch_desc>(),
            n_sequences: 1,
            sequences: &id,
            n_new: &one,
            ..zeroed()
        };
        // SAFETY: handles or none, and outputs.
        let (call, status) = unsafe {
            match self.dice.below(8) {
                0 => ("length", akv_sequence_length(cache, id, -1, &mut length)),
                1 => ("truncate", akv_sequence_truncate(cache, id, 0)),
                2 => ("destroy", akv_sequence_destroy(cache, id)),
                3 => ("fork", akv_sequence_fork(cache, id, -1, &mut out)),
                4 => ("begin", akv_batch_begin(self.batch.0, &step, null_mut())),
                5 => ("copy", akv_sequence_copy(cache, id, self.world.elsewhere.0, &mut out)),
                6 => ("a cache as a batch", akv_batch_commit(cache.cast())),
                _ => ("dequantize", akv_dequantize_kv(cache, id, 0, 0, 0, null(), null(), null_mut())),
            }
        };
        self.refused(call, status, &[AKV_E_HANDLE]);
    }

    /// Calls on whatever sequence, whoever uses it: they come through or are AKV_E_BUSY, and change nothing.
    fn disturb(&mut self) {
        let cache = self.world.cache.0;
        let id = self.world.ids[self.dice.below(self.world.ids.len())].load(Relaxed);
        let (mut fork, mut length) = (0u64, 0i64);
        let gone = [AKV_E_BUSY, AKV_E_HANDLE, AKV_E_ARGUMENT, AKV_E_MEMORY];
        match self.dice.below(5) {
            0 => {
                // SAFETY: a handle, an output.
                let status = unsafe { akv_sequence_fork(cache, id, -1, &mut fork) };
                if self.expect("fork", status, &gone) {
                    // SAFETY: a handle and an id.
                    let status = unsafe { akv_sequence_destroy(cache, fork) };
                    self.expect("destroy", status, &[]);
                }
            }
            1 => {
                // SAFETY: a handle.
                let status = unsafe { akv_sequence_truncate(cache, id, i64::MAX) };
                self.refused("truncate", status, &gone);
            }
            2 => {
                let layer = self.dice.below(self.world.setup.layers.len()) as i32;
                // SAFETY: a handle, an output.
                let status = unsafe { akv_sequence_length(cache, id, layer, &mut length) };
                self.expect("length", status, &gone);
            }
            3 => {
                let status = look(self.other, id, 1);
                if self.expect("begin", status, &gone) {
                    // SAFETY: a handle.
                    let status = unsafe { akv_batch_abort(self.other.0) };
                    self.expect("abort", status, &[]);
                }
            }
            _ => {
                usage(self.world.cache);
                self.expect("usage", AKV_OK, &[]);
            }
        }
    }

    /// One model step over some sequences.
    fn step(&mut self) {
        let world = self.world;
        let most = if self.dice.one_in(30) { 24 } else { 6 };
        let mut members: Vec<Member<'w>> = Vec::new();
        let (mut positions, mut consecutive) = (Vec::new(), true);
        for _ in 0..1 + self.dice.below(most) {
            let Some((_, mut slot)) = self.slot(true) else { continue };
            let Some(live) = slot.as_mut() else { continue };
            let old_len = live.tokens.len();
            let n = match self.dice.below(24) {
                0 => self.dice.below(300),
                1..3 => old_len.next_multiple_of(64) + self.dice.below(3) - old_len,
                3..6 => 0,
                6..10 => self.dice.below(5),
                _ => 1,
            };
            let n_new = n.min(world.setup.max_len.saturating_sub(old_len));
            let (new, in_order) = new_tokens(&mut self.dice, n_new, live.tokens.last().map(|t| t.position));
            positions.extend(new.iter().map(|t| t.position));
            consecutive &= in_order;
            live.tokens.extend(new);
            let len = live.tokens.len();
            let n_q = match self.dice.below(8) {
                0 => 0,
                1 => n_new,
                2 => self.dice.below(len.min(12) + 1),
                _ => len.min(1),
            };
            members.push(Member { id: live.id, slot, old_len, n_new, n_q });
        }
        if members.is_empty() {
            return;
        }
        let given = !consecutive || self.dice.one_in(2);
        let begun = self.begin(&members, given.then_some(&positions));
        let done = begun && self.work_on(&members, positions.len());
        if !done {
            for member in &mut members {
                if let Some(live) = member.slot.as_mut() {
                    live.tokens.truncate(member.old_len);
                }
            }
        } else if world.plan.plant == Plant::Token {
            // As if the last one had got lost on the way.
            if let Some(member) = members.iter().find(|m| m.n_new > 0) {
                // SAFETY: a handle and an id.
                unsafe { akv_sequence_truncate(world.cache.0, member.id, member.tokens().len() as i64 - 1) };
            }
        }
        for member in &members {
            self.check_length(member.id, member.tokens().len());
        }
    }

    fn begin(&mut self, members: &[Member], positions: Option<&Vec<i64>>) -> bool {
        let ids: Vec<_> = members.iter().map(|m| m.id).collect();
        let n_new: Vec<_> = members.iter().map(|m| m.n_new as i32).collect();
        let n_q: Vec<_> = members.iter().map(|m| m.n_q as i32).collect();
        let step = akv_batch_desc {
            struct_size: size::<akv_batch_desc>(),
            n_sequences: ids.len() as u32,
            sequences: ids.as_ptr(),
            n_new: n_new.as_ptr(),
            n_q: n_q.as_ptr(),
            positions: positions.map_or(null(), |p| p.as_ptr()),
            ..zeroed()
        };
        let before = self.before();
        // SAFETY: a handle, a descriptor with its arrays.
        let status = unsafe { akv_batch_begin(self.batch.0, &step, null_mut()) };
        let begun = self.expect("begin", status, &[AKV_E_MEMORY, AKV_E_BUSY]);
        if !begun {
            self.unchanged("begin", &before);
        }
        begun
    }

    /// Appends and attends in all layers; true if the step is committed.
    fn work_on(&mut self, members: &[Member], n_new: usize) -> bool {
        let end = self.dice.below(25);
        for layer in 0..self.world.setup.layers.len() {
            if end == 0 && layer > 0 {
                break; // aborted in the middle
            }
            self.append(self.batch, layer, n_new, |m| members[m].n_new, |m| members[m].tokens(), members.len());
            let views = View::sequences(members.iter().map(|m| (m.tokens(), m.n_q)));
            self.attend(Over::Step(self.batch), layer, &views);
        }
        if end <= 1 {
            // SAFETY: a handle.
            let status = unsafe { akv_batch_abort(self.batch.0) };
            self.expect("abort", status, &[]);
            return false;
        }
        loop {
            // SAFETY: a handle.
            let status = unsafe { akv_batch_commit(self.batch.0) };
            // Another thread may be looking at a length, or making a fork.
            if self.expect("commit", status, &[AKV_E_BUSY]) {
                return true;
            }
            if status != AKV_E_BUSY {
                return false;
            }
            std::thread::yield_now();
        }
    }

    fn append<'t>(
        &mut self,
        batch: Handle<akv_batch>,
        layer: usize,
        n_new: usize,
        new: impl Fn(usize) -> usize,
        tokens: impl Fn(usize) -> &'t [Token],
        n_members: usize,
    ) {
        let shape = self.world.setup.layers[layer];
        let ((tk, dk), (tv, dv)) = (dtype_dim(&shape, Part::K), dtype_dim(&shape, Part::V));
        let heads = shape.n_kv_heads as usize;
        self.key.resize(n_new * heads * dk, tk);
        self.value.resize(n_new * heads * dv, tv);
        let mut at = 0;
        for m in 0..n_members {
            let (all, n) = (tokens(m), new(m));
            self.key.put(at, &all[all.len() - n..], layer, &shape, Part::K);
            self.value.put(at, &all[all.len() - n..], layer, &shape, Part::V);
            at += n;
        }
        let (key, value) = (self.key.rows(), self.value.rows());
        if n_new > 0 && self.dice.one_in(40) {
            // A row that cannot be stored: nothing is.
            let i = self.dice.below(n_new * heads * dv);
            let good = self.value.get(i);
            let bad = self.dice.pick(&[f32::NAN, f32::INFINITY]);
            self.value.set(i, bad);
            // SAFETY: a handle, and rows.
            let status = unsafe { akv_quantize_kv(batch.0, layer as i32, &key, &value, null_mut()) };
            self.refused("quantize_kv of NaN", status, &[AKV_E_NONFINITE]);
            self.value.set(i, good);
        }
        loop {
            // SAFETY: a handle, and rows.
            let status = unsafe { akv_quantize_kv(batch.0, layer as i32, &key, &value, null_mut()) };
            if self.expect("quantize_kv", status, &[AKV_E_BUSY]) || status != AKV_E_BUSY {
                return;
            }
            std::thread::yield_now();
        }
    }
}

/// Begins a step in which one sequence's last tokens attend, and nothing is new.
fn look(batch: Handle<akv_batch>, id: akv_sequence, n_q: usize) -> akv_status {
    let (n_new, n_q) = (0, n_q as i32);
    let step = akv_batch_desc {
        struct_size: size::<akv_batch_desc>(),
        n_sequences: 1,
        sequences: &id,
        n_new: &n_new,
        n_q: &n_q,
        ..zeroed()
    };
    // SAFETY: a handle, a descriptor with its arrays.
    unsafe { akv_batch_begin(batch.0, &step, null_mut()) }
}

/// A plan's end.
pub fn within(seconds: f64) -> Instant {
    Instant::now() + Duration::from_secs_f64(seconds)
}
