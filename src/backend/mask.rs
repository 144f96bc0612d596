//! Who sees which cell: read once per graph, used by every layer.

use crate::format::{TILE, range_bits};
use crate::{Error, Result};
use half::f16;

/// A cell that is not seen: -inf.
const HIDDEN: u16 = 0xfc00;

/// What query rows see of the cells of their stream, by tiles.
#[derive(Debug)]
pub struct Mask {
    max_rows: usize,
    max_kv: usize,
    /// `[row][tile]`: cells that are seen.
    seen: Vec<u128>,
    /// `[row][tile]`: largest magnitude that is added to a score.
    peak: Vec<f32>,
    /// `[row][tile][TILE]` of what is added, 0 where a cell is hidden; empty as long as nothing ever was.
    added: Vec<f16>,
}

impl Mask {
    /// Rows see nothing at first.
    pub fn new(max_rows: usize, max_kv: usize) -> Result<Mask> {
        let tiles = max_rows.checked_mul(max_kv.div_ceil(TILE));
        let (mut seen, mut peak) = (Vec::new(), Vec::new());
        resize(&mut seen, tiles)?;
        resize(&mut peak, tiles)?;
        Ok(Mask { max_rows, max_kv, seen, peak, added: Vec::new() })
    }

    /// Most rows.
    pub fn max_rows(&self) -> usize {
        self.max_rows
    }

    /// Most cells.
    pub fn max_kv(&self) -> usize {
        self.max_kv
    }

    fn tiles(&self) -> usize {
        self.max_kv.div_ceil(TILE)
    }

    /// Sets rows from `first` on: bits of f16 each, at most `max_kv` of them. Nothing is set on error.
    pub fn set<'a>(&mut self, first: usize, rows: impl Iterator<Item = &'a [u16]> + Clone) -> Result<()> {
        let mut adds = false;
        for (i, row) in rows.clone().enumerate() {
            let (mut bad, mut adding) = (false, false);
            for &x in row {
                bad |= x & 0x7fff > 0x7c00 || x == 0x7c00;
                adding |= x & 0x7fff != 0 && x != HIDDEN;
            }
            if bad {
                return Err(Error::Argument(format!("f16: NaN or +inf in row {i}: expected finite values or -inf")));
            }
            adds |= adding;
        }
        if adds && self.added.is_empty() {
            resize(&mut self.added, self.seen.len().checked_mul(TILE))?;
        }
        for (i, row) in rows.enumerate() {
            let tiles = self.tiles();
            let start = (first + i) * tiles;
            self.seen[start..start + tiles].fill(0);
            for (tile, cells) in row.chunks(TILE).enumerate() {
                self.set_tile(start + tile, cells);
            }
        }
        Ok(())
    }

    fn set_tile(&mut self, at: usize, cells: &[u16]) {
        let (any, all) = cells.iter().fold((0, 0xffff), |(any, all), &x| (any | x, all & x));
        let whole = range_bits(0, cells.len());
        (self.seen[at], self.peak[at]) = (if any == 0 { whole } else { 0 }, 0.0);
        if any == 0 || (any, all) == (HIDDEN, HIDDEN) {
            return;
        }
        let mut peak = 0;
        for (word, cells) in cells.chunks(64).enumerate() {
            let mut seen = 0u64;
            for (i, &x) in cells.iter().enumerate() {
                seen |= u64::from(x != HIDDEN) << i;
                peak = if x != HIDDEN && x & 0x7fff > peak { x & 0x7fff } else { peak };
            }
            self.seen[at] |= u128::from(seen) << (64 * word);
        }
        self.peak[at] = f16::from_bits(peak).to_f32();
        if peak > 0 {
            for (to, &x) in self.added[at * TILE..].iter_mut().zip(cells) {
                *to = if x == HIDDEN { f16::ZERO } else { f16::from_bits(x) };
            }
        }
    }

    /// Cells of a tile that a row sees.
    #[inline(always)]
    pub fn seen(&self, row: usize, tile: usize) -> u128 {
        self.seen[row * self.tiles() + tile]
    }

    /// What is added to the scores of a tile, and its largest magnitude; None if nothing is.
    #[inline(always)]
    pub fn added(&self, row: usize, tile: usize) -> Option<(&[f16; TILE], f32)> {
        let at = row * self.tiles() + tile;
        let peak = self.peak[at];
        if peak > 0.0 { Some((self.added.as_chunks().0.get(at)?, peak)) } else { None }
    }
}

fn resize<T: Copy + Default>(vec: &mut Vec<T>, n: Option<usize>) -> Result<()> {
    let failed = || Error::Memory("a mask of that many rows and cells".to_owned());
    let n = n.ok_or_else(failed)?;
    vec.try_reserve_exact(n).map_err(|_| failed())?;
    vec.resize(n, T::default());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_what_was_set() {
        let mut state = 7u64;
        let mut random = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize
        };
        for n_kv in [1, 63, 64, 65, 127, 128, 129, 300] {
            let mut mask = Mask::new(5, 300).unwrap();
            let kinds = [HIDDEN, 0, 0x8000, f16::from_f32(-2.5).to_bits(), f16::from_f32(7.0).to_bits()];
            for round in 0..40 {
                let choices = [1, 2, 2, 3, 5][round % 5];
                let rows: Vec<Vec<u16>> =
                    (0..3).map(|_| (0..n_kv).map(|_| kinds[(random() % choices + round) % 5]).collect()).collect();
                let first = random() % 3;
                mask.set(first, rows.iter().map(Vec::as_slice)).unwrap();
                for (r, row) in rows.iter().enumerate() {
                    for cell in 0..300 {
                        let (tile, at) = (cell / TILE, cell % TILE);
                        let want = row.get(cell).copied().unwrap_or(HIDDEN);
                        assert_eq!(mask.seen(first + r, tile) >> at & 1 == 1, want != HIDDEN);
                        if want != HIDDEN {
                            let (x, peak) =
                                mask.added(first + r, tile).map_or((0.0, 0.0), |(x, p)| (x[at].to_f32(), p));
                            assert_eq!(x, f16::from_bits(want).to_f32());
                            assert!(x.abs() <= peak);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_no_mask_is_refused_and_changes_nothing() {
        let mut mask = Mask::new(2, 200).unwrap();
        mask.set(0, [vec![0u16; 200], vec![0; 200]].iter().map(Vec::as_slice)).unwrap();
        for bad in [f16::NAN, f16::INFINITY] {
            let mut row = vec![HIDDEN; 200];
            row[199] = bad.to_bits();
            assert!(matches!(mask.set(0, [&row[..]].into_iter()), Err(Error::Argument(_))));
            assert_eq!(mask.seen(0, 1).count_ones(), 72);
        }
        assert!(matches!(Mask::new(usize::MAX, 129), Err(Error::Memory(_))));
    }
}
