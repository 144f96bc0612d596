//! Moving tokens to other positions: their K turns with them, by rotary position embedding.

use super::device::Edits;
use super::layer::{Layer, Page};
use super::memory::{Memory, Shared, reserve};
use super::sequence::Sequence;
use super::{Positions, memory::Kind};
use crate::Result;
use crate::format::{Bits, TILE, range_bits};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// How K of a layer turns by position.
#[derive(Debug, Clone, Copy)]
pub struct Rope<'a> {
    /// Channels 2i and 2i + 1 turn together; otherwise i and i + the number of frequencies.
    pub interleaved: bool,
    /// First channel that turns.
    pub first_dim: usize,
    /// Radians per position; two channels each.
    pub inv_freq: &'a [f32],
}

/// What turning by some positions does to a row of K.
#[derive(Debug)]
pub(crate) struct Turn {
    /// Two channels, and the cosine and sine of their angle.
    pairs: Vec<(usize, usize, f64, f64)>,
}

impl Turn {
    fn new(rope: &Rope, delta: i64) -> Result<Turn> {
        let mut pairs = Vec::new();
        reserve(&mut pairs, rope.inv_freq.len())?;
        for (i, &frequency) in rope.inv_freq.iter().enumerate() {
            let (a, b) = if rope.interleaved { (2 * i, 2 * i + 1) } else { (i, i + rope.inv_freq.len()) };
            let angle = delta as f64 * f64::from(frequency);
            pairs.push((rope.first_dim + a, rope.first_dim + b, angle.cos(), angle.sin()));
        }
        Ok(Turn { pairs })
    }

    /// Turns a row.
    pub fn row(&self, x: &mut [f32]) {
        for &(a, b, cos, sin) in &self.pairs {
            let (p, q) = (f64::from(x[a]), f64::from(x[b]));
            (x[a], x[b]) = ((p * cos - q * sin) as f32, (p * sin + q * cos) as f32);
        }
    }

    /// Bounds of the errors of its channels, from those before.
    pub fn errors(&self, e: &mut [f32]) {
        for &(a, b, cos, sin) in &self.pairs {
            let (p, q, cos, sin) = (f64::from(e[a]), f64::from(e[b]), cos.abs(), sin.abs());
            (e[a], e[b]) = ((p * cos + q * sin) as f32, (p * sin + q * cos) as f32);
        }
    }
}

/// Blocks for what others hold, too.
#[derive(Default)]
struct Spare {
    block: Option<Shared>,
    kept: Option<Shared>,
    base: Option<Shared>,
}

/// Tokens `from..to` of a tile that have not been removed.
fn some(positions: &Positions, tile: usize, from: usize, to: usize) -> u128 {
    let start = tile * TILE;
    let [from, to] = [from, to].map(|at| at.clamp(start, start + TILE) - start);
    range_bits(from, to) & positions.live(tile)
}

fn copy_of(block: &Shared, memory: &Arc<Memory>, kind: Kind) -> Result<Option<Shared>> {
    if block.is_own() {
        return Ok(None);
    }
    let mut copy = Shared::new(memory, kind, block.size())?;
    copy.own().copy_from_slice(block);
    Ok(Some(copy))
}

fn replace(block: &mut Shared, spare: Option<Shared>) {
    if let Some(spare) = spare {
        *block = spare;
    }
}

impl Sequence {
    /// Moves the tokens whose positions are `from..to` by `delta`. On error nothing has changed.
    pub fn shift(&self, memory: &Arc<Memory>, from: i64, to: i64, delta: i64, ropes: &[Rope]) -> Result<()> {
        let _claim = self.claim()?;
        self.check_whole()?;
        let len = self.len.load(Relaxed);
        let mut positions = self.write_positions()?;
        let (from, to) = (positions.below(from, len), positions.below(to, len));
        if delta == 0 || from >= to || positions.removed_within(from, to) == to - from {
            return Ok(());
        }
        let moved = positions.moved(from, to, delta, len)?;
        let tiles = from / TILE..to.div_ceil(TILE);
        let mut layers = Vec::new();
        reserve(&mut layers, self.layers.len())?;
        let mut room = 0;
        for (i, rope) in ropes.iter().enumerate() {
            let layer = self.write_layer(i)?;
            let mut spares = Vec::new();
            reserve(&mut spares, tiles.len())?;
            for tile in tiles.clone() {
                let some = some(&positions, tile, from, to);
                spares.push(if some == 0 { Spare::default() } else { layer.spare_to_turn(memory, tile, some)? });
            }
            let head = match &layer.head {
                Some(head) if from < layer.exact_head => copy_of(head, memory, Kind::Kept)?,
                _ => None,
            };
            room = room.max(TILE * layer.layout.shape.dim_k);
            layers.push((layer, spares, head, Turn::new(rope, delta)?));
        }
        let mut scratch: Vec<f32> = Vec::new();
        reserve(&mut scratch, room)?;
        scratch.resize(room, 0.0);
        for (mut layer, spares, head, turn) in layers {
            if let Some(head) = head {
                layer.head = Some(head);
            }
            layer.turn_head(some(&positions, 0, from, to), &turn);
            for (tile, spare) in tiles.clone().zip(spares) {
                let some = some(&positions, tile, from, to);
                if some != 0 {
                    layer.turn_tile(memory, tile, some, spare, &turn, &mut scratch);
                }
            }
        }
        *positions = moved;
        Ok(())
    }
}

impl Layer {
    fn spare_to_turn(&self, memory: &Arc<Memory>, tile: usize, some: u128) -> Result<Spare> {
        let Page { block, kept, base } = &self.pages[tile];
        let kept = match kept {
            Some(kept) => copy_of(kept, memory, Kind::Kept)?,
            None => None,
        };
        let base = match base {
            Some((base, rows)) if some & range_bits(0, *rows) != 0 => copy_of(base, memory, Kind::Page)?,
            _ => None,
        };
        Ok(Spare { block: copy_of(block, memory, Kind::Page)?, kept, base })
    }

    fn turn_head(&mut self, some: u128, turn: &Turn) {
        let rows = Bits(some & range_bits(0, self.exact_head.min(self.len)));
        if let Some(head) = &mut self.head
            && rows.0 != 0
        {
            self.layout.turn_kept(head.own(), self.exact_head, rows, turn);
        }
    }

    fn turn_tile(&mut self, memory: &Memory, tile: usize, some: u128, spare: Spare, turn: &Turn, scratch: &mut [f32]) {
        let (skip, rows) = (self.skip(tile).min(self.len), TILE.min(self.len - tile * TILE));
        let (head, page) = (range_bits(0, skip), &mut self.pages[tile]);
        replace(&mut page.block, spare.block);
        let Some(kept) = &mut page.kept else {
            // Removed tokens need not be known any more, unless they lie among others.
            self.layout.turn_page(page.block.own(), some & !head, range_bits(0, rows) & !head, skip, turn, scratch);
            return;
        };
        replace(kept, spare.kept);
        let mut base_rows = 0;
        if let Some((base, n)) = &mut page.base {
            base_rows = *n;
            let known = range_bits(0, *n);
            if some & known != 0 {
                replace(base, spare.base);
                self.layout.turn_page(base.own(), some & known & !head, known & !head, skip, turn, scratch);
            }
        }
        self.layout.turn_kept(kept.own(), TILE, Bits(some & (range_bits(base_rows, TILE) | head)), turn);
        self.encode_kept(tile, rows, &mut Edits::new(memory));
    }
}
