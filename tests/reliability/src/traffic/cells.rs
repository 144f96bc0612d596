//! Cells: rows come to any of them in any order, go, and are copied; masks say who sees which.

use super::attention::Over;
use super::{Plant, Worker};
use crate::api::*;
use crate::counts::{add, found};
use crate::model::*;
use crate::truth::{Shown, Sight, View};
use half::f16;
use parking_lot::{RwLock, RwLockWriteGuard};
use std::ops::Range;
use std::ptr::{null, null_mut};

/// A cache of cells, and what must be in it.
pub(super) struct Cells {
    pub cache: Handle<akv_cache>,
    /// Of each stream.
    n_slots: usize,
    /// Of each layer, K and V of every cell.
    layers: Vec<RwLock<[Vec<Token>; 2]>>,
    masks: [Mask; 2],
    /// What the cache took when it was made: nothing more for rows.
    fresh: akv_usage,
}

struct Mask {
    handle: Handle<akv_mask>,
    shown: RwLock<Shown>,
}

/// Query rows of a call, at most.
const ROWS: usize = 24;

impl Cells {
    pub fn new(setup: &Setup, context: Handle<akv_context>) -> Cells {
        let (status, cache) = setup.cells(context);
        assert_eq!(status, AKV_OK, "{}", last_error());
        let n_slots = setup.max_len;
        let mask = || {
            let mut mask = null_mut();
            // SAFETY: a handle and an output.
            let status = unsafe { akv_mask_create(context.0, ROWS as i64, n_slots as i64, &mut mask) };
            assert_eq!(status, AKV_OK, "{}", last_error());
            Mask { handle: Handle(mask), shown: RwLock::new(Shown::new(ROWS, n_slots)) }
        };
        let nothing = || RwLock::new([(); 2].map(|()| vec![Token::NONE; STREAMS * n_slots]));
        Cells {
            cache,
            n_slots,
            layers: setup.layers.iter().map(|_| nothing()).collect(),
            masks: [mask(), mask()],
            fresh: usage(cache),
        }
    }

    /// The layers that a call names, one or with -1 all, unless other threads use them.
    fn claim(&self, layer: i32) -> Option<Vec<RwLockWriteGuard<'_, [Vec<Token>; 2]>>> {
        let named = if layer < 0 { &self.layers[..] } else { &self.layers[layer as usize..][..1] };
        named.iter().map(RwLock::try_write).collect()
    }

    fn n(&self) -> usize {
        STREAMS * self.n_slots
    }
}

impl<'w> Worker<'w, '_> {
    fn cells(&self) -> Option<&'w Cells> {
        self.world.cells.as_ref()
    }

    pub(super) fn use_cells(&mut self) {
        let Some(cells) = self.cells() else { return };
        match self.dice.below(16) {
            0..5 => self.write_cells(cells),
            5 => self.invalidate(cells),
            6 => self.copy_cells(cells),
            7 => self.read_cells(cells),
            8 => self.set_mask(cells),
            9..11 if self.world.plan.threads > 1 => self.disturb_cells(cells),
            _ => self.attend_cells(cells),
        }
    }

    /// A layer, or all of them.
    fn some_layers(&mut self, cells: &Cells) -> i32 {
        self.dice.below(cells.layers.len() + 1) as i32 - 1
    }

    /// Slots to write: one, a run as of decoding or a prefill, or any.
    fn some_slots(&mut self, n: usize) -> Vec<i64> {
        let (first, run) = (self.dice.below(n), 1 + self.dice.below(n.min(300)));
        match self.dice.below(4) {
            0 => vec![first as i64],
            1 | 2 => (first..n.min(first + run)).map(|slot| slot as i64).collect(),
            // Some of them twice.
            _ => (0..run.min(60)).map(|_| self.dice.below(n) as i64).collect(),
        }
    }

    fn write_cells(&mut self, cells: &Cells) {
        let layer = self.dice.below(cells.layers.len());
        let Some(mut rows) = cells.layers[layer].try_write() else { return };
        let shape = self.world.setup.layers[layer];
        let slots = self.some_slots(cells.n());
        let (tokens, _) = new_tokens(&mut self.dice, slots.len(), None);
        let which = self.dice.pick(&[[true; 2], [true; 2], [true; 2], [true, false], [false, true]]);
        for (part, to) in [(Part::K, &mut self.key), (Part::V, &mut self.value)] {
            let (dtype, dim) = dtype_dim(&shape, part);
            to.resize(slots.len() * shape.n_kv_heads as usize * dim, dtype);
            to.put(0, &tokens, layer, &shape, part);
        }
        let write = |worker: &Self| {
            let (key, value) = (worker.key.rows(), worker.value.rows());
            let [key, value] = [(&key, which[0]), (&value, which[1])]
                .map(|(rows, given)| if given { std::ptr::from_ref(rows) } else { null() });
            let (layer, n) = (layer as i32, slots.len() as i64);
            // SAFETY: a handle, slots, and a row for each.
            unsafe { akv_slots_write(cells.cache.0, layer, slots.as_ptr(), n, key, value, null_mut()) }
        };
        if which[1] && self.dice.one_in(40) {
            // A row that cannot be stored: nothing is.
            let i = self.dice.below(slots.len());
            let good = self.value.get(i);
            self.value.set(i, f32::NAN);
            let status = write(self);
            self.refused("slots_write of NaN", status, &[AKV_E_NONFINITE, AKV_E_BUSY]);
            self.value.set(i, good);
        }
        let status = write(self);
        if !self.expect("slots_write", status, &[AKV_E_BUSY]) {
            return;
        }
        for (&slot, &token) in slots.iter().zip(&tokens) {
            for (rows, _) in rows.iter_mut().zip(which).filter(|(_, written)| *written) {
                rows[slot as usize] = token;
            }
        }
        if self.world.plan.plant == Plant::Cell {
            // As if its row had got lost on the way.
            // SAFETY: a handle.
            unsafe { akv_slots_invalidate(cells.cache.0, layer as i32, slots[0], 1) };
        }
    }

    fn invalidate(&mut self, cells: &Cells) {
        let layer = self.some_layers(cells);
        let Some(mut all) = cells.claim(layer) else { return };
        let first = self.dice.below(cells.n());
        let n = if self.dice.one_in(4) { cells.n() } else { self.dice.below(80) };
        let n = n.min(cells.n() - first);
        // SAFETY: a handle.
        let status = unsafe { akv_slots_invalidate(cells.cache.0, layer, first as i64, n as i64) };
        if self.expect("slots_invalidate", status, &[AKV_E_BUSY]) {
            all.iter_mut().flat_map(|rows| rows.iter_mut()).for_each(|rows| rows[first..first + n].fill(Token::NONE));
        }
    }

    /// Copies a stretch, or the whole of a stream, as it is stored.
    fn copy_cells(&mut self, cells: &Cells) {
        let layer = self.some_layers(cells);
        let Some(mut all) = cells.claim(layer) else { return };
        let (from, to, n) = if self.dice.one_in(3) {
            let from = self.dice.below(STREAMS) * cells.n_slots;
            (from, cells.n() - cells.n_slots - from, cells.n_slots)
        } else {
            let most = self.dice.pick(&[4, 150]);
            let n = 1 + self.dice.below(most);
            (self.dice.below(cells.n() - n), self.dice.below(cells.n() - n), n)
        };
        let before = self.before();
        // SAFETY: a handle.
        let status = unsafe { akv_slots_copy(cells.cache.0, layer, from as i64, to as i64, n as i64) };
        if from < to + n && to < from + n {
            self.refused("slots_copy onto itself", status, &[AKV_E_ARGUMENT, AKV_E_BUSY, AKV_E_MEMORY]);
            self.unchanged("slots_copy", &before);
        } else if self.expect("slots_copy", status, &[AKV_E_MEMORY, AKV_E_BUSY]) {
            for rows in all.iter_mut().flat_map(|rows| rows.iter_mut()) {
                rows.copy_within(from..from + n, to);
                rows[to..to + n].iter_mut().filter(|token| !token.removed).for_each(|token| token.copies += 1);
            }
        } else {
            self.unchanged("slots_copy", &before);
        }
    }

    fn read_cells(&mut self, cells: &Cells) {
        let layer = self.dice.below(cells.layers.len());
        let Some(rows) = cells.layers[layer].try_read() else { return };
        let first = self.dice.below(cells.n());
        let n = (1 + self.dice.below(20)).min(cells.n() - first);
        self.read_back_cells(cells, layer, &rows, first..first + n);
    }

    fn read_back_cells(&mut self, cells: &Cells, layer: usize, rows: &[Vec<Token>; 2], at: Range<usize>) {
        let (key, value) = self.room(&self.world.setup.layers[layer], at.len());
        let (first, n) = (at.start as i64, at.len() as i64);
        // SAFETY: a handle, and room for the rows.
        let status = unsafe { akv_slots_read(cells.cache.0, layer as i32, first, n, &key, &value, null_mut()) };
        if self.expect("slots_read", status, &[AKV_E_BUSY]) {
            self.check_stored(layer, at.start, rows.each_ref().map(|rows| &rows[at.clone()]));
        }
    }

    /// Sets some rows of a mask: causal as of a batch, all that is there, or holes and things added here and there.
    fn set_mask(&mut self, cells: &Cells) {
        let mask = &cells.masks[self.dice.below(cells.masks.len())];
        let Some(mut shown) = mask.shown.try_write() else { return };
        let first = self.dice.below(ROWS);
        let n = 1 + self.dice.below(ROWS - first);
        let n_kv = if self.dice.one_in(2) { cells.n_slots } else { 1 + self.dice.below(cells.n_slots) };
        let (kind, seen) = (self.dice.below(3), self.dice.below(n_kv + 1));
        let mut noise = crate::dice::Dice::Seeded(self.dice.bits());
        let mut value = |row: usize, cell: usize| match kind {
            0 if cell > seen + row => f32::NEG_INFINITY,
            2 => noise.pick(&[f32::NEG_INFINITY, f32::NEG_INFINITY, 0.0, 0.0, -1.5, 0.25, -60000.0]),
            _ => 0.0,
        };
        let set: Vec<Vec<f32>> = (0..n).map(|row| (0..n_kv).map(|cell| value(row, cell)).collect()).collect();
        let mut halves: Vec<u16> = set.iter().flatten().map(|&x| f16::from_f32(x).to_bits()).collect();
        let set_to = |halves: &[u16]| {
            let (first, n, n_kv) = (first as i64, n as i64, n_kv as i64);
            // SAFETY: a handle, and rows of that size.
            unsafe { akv_mask_set(mask.handle.0, first, n, n_kv, halves.as_ptr().cast(), 0, null_mut()) }
        };
        if self.dice.one_in(10) {
            let i = self.dice.below(halves.len());
            let good = std::mem::replace(&mut halves[i], self.dice.pick(&[f16::NAN, f16::INFINITY]).to_bits());
            let status = set_to(&halves);
            self.refused("mask_set of NaN", status, &[AKV_E_ARGUMENT, AKV_E_BUSY]);
            halves[i] = good;
        }
        let status = set_to(&halves);
        if self.expect("mask_set", status, &[AKV_E_BUSY]) {
            for (row, set) in set.iter().enumerate() {
                let to = shown.row(first + row);
                to.fill(f32::NEG_INFINITY);
                for (to, &x) in to.iter_mut().zip(set) {
                    *to = f16::from_f32(x).to_f32();
                }
            }
        }
    }

    fn attend_cells(&mut self, cells: &Cells) {
        let layer = self.dice.below(cells.layers.len());
        let Some(rows) = cells.layers[layer].try_read() else { return };
        let mask = &cells.masks[self.dice.below(cells.masks.len())];
        let Some(shown) = mask.shown.try_read() else { return };
        let masked = !self.dice.one_in(4);
        let (sight, mask) = if masked { (Sight::Mask(&shown), Some(mask.handle)) } else { (Sight::AllCells, None) };
        let (mut spans, mut views, mut first_row) = (Vec::new(), Vec::new(), 0);
        for _ in 0..1 + self.dice.below(3) {
            // Decode most often; up to all rows of the mask, on the path of prefills.
            let n_q = if self.dice.one_in(6) { self.dice.below(ROWS - first_row + 1) } else { 1 };
            if first_row + n_q > ROWS {
                break;
            }
            let stream = self.dice.below(STREAMS);
            // A few cells: those that are kept as given, at the start, among them.
            let most = self.dice.pick(&[cells.n_slots, cells.n_slots, 8]);
            let n_kv = if self.dice.one_in(2) { self.dice.below(most + 1) } else { most };
            spans.push(akv_span { stream: stream as i32, n_q: n_q as i32, n_kv: n_kv as i64 });
            let [k, v] = rows.each_ref().map(|rows| &rows[stream * cells.n_slots..][..n_kv]);
            views.push(View { k, v, n_q, first_row, sight });
            first_row += n_q;
        }
        self.attend(Over::Cells(cells.cache, &spans, mask), layer, &views);
    }

    /// Calls on layers and masks, whoever uses them: they come through or are AKV_E_BUSY, and change nothing.
    fn disturb_cells(&mut self, cells: &Cells) {
        let (cache, layer) = (cells.cache.0, self.dice.below(cells.layers.len()) as i32);
        let mask = cells.masks[self.dice.below(cells.masks.len())].handle;
        // SAFETY: handles; no rows and no cells.
        let (call, status) = unsafe {
            match self.dice.below(4) {
                0 => ("slots_invalidate", akv_slots_invalidate(cache, -1, 0, 0)),
                1 => ("slots_copy", akv_slots_copy(cache, layer, 0, 0, 0)),
                2 => ("mask_set", akv_mask_set(mask.0, 0, 0, 0, null(), 0, null_mut())),
                _ => ("slots_read", akv_slots_read(cache, layer, 0, 0, null(), null(), null_mut())),
            }
        };
        self.expect(call, status, &[AKV_E_BUSY, AKV_E_MEMORY]);
    }

    /// Looks at what cells hold at the end, and at the memory that all the traffic took: none.
    pub(super) fn end_of_cells(&mut self) {
        let Some(cells) = self.cells() else { return };
        let counts = self.world.counts;
        for (layer, rows) in cells.layers.iter().enumerate() {
            let rows = rows.read();
            for stream in 0..STREAMS {
                let first = stream * cells.n_slots;
                self.read_back_cells(cells, layer, &rows, first..first + cells.n_slots);
            }
        }
        let (held, rows) = (usage(cells.cache), cells.layers[0].read());
        let there = rows[0].iter().zip(&rows[1]).filter(|(k, v)| !k.removed && !v.removed).count() as u64;
        add(&counts.tokens_checked, 1);
        if held.tokens != there {
            found(&counts.lost_tokens, held.tokens.abs_diff(there), || {
                format!("{} cells have rows: expected {there}", held.tokens)
            });
        }
        let of = |u: &akv_usage| (u.pages_used, u.bytes_kept);
        add(&counts.leaks_checked, 1);
        if of(&held) != of(&cells.fresh) {
            found(&counts.leaks, 1, || format!("cells hold {held:?}, and held {:?} when they were made", cells.fresh));
        }
        for mask in &cells.masks {
            // SAFETY: a handle that nobody uses any more.
            let status = unsafe { akv_mask_destroy(mask.handle.0) };
            self.expect("mask_destroy", status, &[]);
        }
    }
}
