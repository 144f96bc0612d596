//! Positions of the tokens of a sequence, never descending.

use super::memory::{Memory, Table};
use crate::format::{TILE, range_bits};
use crate::{Error, Result};
use std::sync::Arc;

/// Runs of consecutive positions. The last one goes on for as long as there are tokens, so that appending in order
/// changes nothing here.
#[derive(Debug)]
pub struct Positions {
    runs: Table<Run>,
    /// Tokens that have been removed, in ascending stretches that do not touch. They keep their places and positions; the
    /// last token is none of them.
    removed: Table<(usize, usize)>,
}

/// Token `first + i` has position `position + i`, up to the next run.
#[derive(Debug, Clone, Copy)]
struct Run {
    first: usize,
    position: i64,
}

/// Room for the runs of new tokens.
pub(super) struct Room {
    pub n_runs: usize,
    table: Option<Table<Run>>,
}

impl Positions {
    pub(super) fn new(memory: &Arc<Memory>) -> Result<Positions> {
        Ok(Positions { runs: Table::with_capacity(memory, 1)?, removed: Table::with_capacity(memory, 0)? })
    }

    /// Position of token `index`.
    pub fn at(&self, index: usize) -> i64 {
        let run = self.runs.partition_point(|r| r.first <= index).checked_sub(1).map(|i| self.runs[i]);
        run.map_or(index as i64, |r| r.position.wrapping_add((index - r.first) as i64))
    }

    /// How far the tokens from `first` on are from `position`, backwards below 0: rounded to the nearest.
    #[inline(never)]
    pub fn distances(&self, first: usize, position: i64, out: &mut [f32]) {
        let mut done = 0;
        while done < out.len() {
            let token = first + done;
            let end = self.runs.get(self.runs.partition_point(|r| r.first <= token)).map_or(usize::MAX, |r| r.first);
            let n = (out.len() - done).min(end - token);
            let start = i128::from(self.at(token)) - i128::from(position);
            for (i, x) in out[done..done + n].iter_mut().enumerate() {
                // Beyond 2^53 rounded twice: by next to nothing the first time.
                *x = (start as f64 + i as f64) as f32;
            }
            done += n;
        }
    }

    /// Number of tokens (of the first `len`) whose position is below `position`.
    pub fn below(&self, position: i64, len: usize) -> usize {
        let next = self.runs.partition_point(|r| r.position < position);
        let Some(run) = next.checked_sub(1).map(|i| self.runs[i]) else { return 0 };
        let end = self.runs.get(next).map_or(len, |r| r.first).min(len);
        // Modulo 2^64 the difference of two i64 in order is right.
        let in_run = position.wrapping_sub(run.position) as u64;
        run.first.saturating_add(usize::try_from(in_run).unwrap_or(usize::MAX)).min(end)
    }

    /// Tokens of a tile that have not been removed.
    #[inline]
    pub fn live(&self, tile: usize) -> u128 {
        if self.removed.is_empty() {
            return u128::MAX;
        }
        let (start, end) = (tile * TILE, (tile + 1) * TILE);
        let removed = self.removed[self.removed.partition_point(|r| r.1 <= start)..].iter().take_while(|r| r.0 < end);
        !removed.fold(0, |dead, r| dead | range_bits(r.0.max(start) - start, r.1.min(end) - start))
    }

    /// How many tokens among `from..to` have been removed.
    pub fn removed_within(&self, from: usize, to: usize) -> usize {
        let removed = self.removed[self.removed.partition_point(|r| r.1 <= from)..].iter().take_while(|r| r.0 < to);
        removed.map(|r| r.1.min(to).saturating_sub(r.0.max(from))).sum()
    }

    /// The first `len` tokens without those at their end that have been removed.
    pub(super) fn trimmed(&self, len: usize) -> usize {
        let at = self.removed.partition_point(|r| r.1 < len);
        self.removed.get(at).map_or(len, |r| len.min(r.0))
    }

    /// Room for [`Positions::remove`].
    pub(super) fn room_to_remove(&self) -> Result<Option<Table<(usize, usize)>>> {
        self.removed.room(1)
    }

    /// Removes tokens `from..to`, which are some. Returns the whole stretch that is removed around them.
    pub(super) fn remove(&mut self, room: Option<Table<(usize, usize)>>, from: usize, to: usize) -> (usize, usize) {
        let removed = &mut self.removed;
        removed.adopt(room);
        let (first, last) = (removed.partition_point(|r| r.1 < from), removed.partition_point(|r| r.0 <= to));
        let mut whole = (from, to);
        if first == last {
            removed.push(whole);
            removed[first..].rotate_right(1);
            return whole;
        }
        whole = (from.min(removed[first].0), to.max(removed[last - 1].1));
        removed[first] = whole;
        let n = removed.len();
        removed.copy_within(last..n, first + 1);
        removed.truncate(n - (last - first - 1));
        whole
    }

    /// The first `len` tokens' positions, of which those of tokens `from..to` are `delta` more. An error if they descend.
    /// Runs begin with tokens that have not been removed: what removed ones would have is nobody's concern.
    pub(super) fn moved(&self, from: usize, to: usize, delta: i64, len: usize) -> Result<Positions> {
        let mut moved = self.fork(len)?;
        moved.runs.truncate(0);
        let (mut at, mut last) = (0, i64::MIN);
        while at < len {
            let next = self.removed.get(self.removed.partition_point(|r| r.1 <= at));
            if let Some(removed) = next.filter(|r| r.0 <= at) {
                at = removed.1;
                continue;
            }
            let run = self.runs.get(self.runs.partition_point(|r| r.first <= at)).map(|r| r.first);
            let ends = [next.map(|r| r.0), run, Some(from), Some(to), Some(len)];
            let end = ends.into_iter().flatten().filter(|&end| end > at).fold(len, usize::min);
            let by = if (from..to).contains(&at) { delta } else { 0 };
            let position = self.at(at).checked_add(by);
            let end_position = position.and_then(|p| p.checked_add_unsigned((end - at - 1) as u64));
            let (Some(position), Some(end_position)) = (position, end_position) else {
                let p = self.at(at);
                return Err(Error::Argument(format!("delta {delta}: position {p} of token {at} overflows")));
            };
            if position < last {
                return Err(Error::Argument(format!(
                    "delta {delta}: puts position {position} after {last}, token {at}"
                )));
            }
            let follows = |r: &Run| r.position.checked_add_unsigned((at - r.first) as u64) == Some(position);
            if !moved.runs.last().is_some_and(follows) {
                let room = moved.runs.room(1)?;
                moved.runs.adopt(room);
                moved.runs.push(Run { first: at, position });
            }
            (at, last) = (end, end_position);
        }
        Ok(moved)
    }

    /// Stretches of removed tokens.
    pub(super) fn removed(&self) -> &[(usize, usize)] {
        &self.removed
    }

    /// The runs of the first `len` tokens: their first token and its position.
    pub(super) fn runs(&self, len: usize) -> impl ExactSizeIterator<Item = (usize, i64)> {
        self.runs[..self.runs.partition_point(|r| r.first < len)].iter().map(|r| (r.first, r.position))
    }

    /// Adds a run to what is made from [`Positions::runs`], which has `len` tokens in all. False if it cannot be the next.
    pub(super) fn add_run(&mut self, first: usize, position: i64, len: usize) -> Result<bool> {
        let last = |r: &Run, end: usize| r.position.checked_add_unsigned((end - r.first - 1) as u64);
        let next = Run { first, position };
        let fits = match self.runs.last() {
            None => true,
            // Tokens between that have been removed may stand for any position.
            Some(before) => first > before.first && before.position <= position,
        };
        if !fits || first >= len || last(&next, len).is_none() {
            return Ok(false);
        }
        let room = self.runs.room(1)?;
        self.runs.adopt(room);
        self.runs.push(next);
        Ok(true)
    }

    /// Room to [`Positions::extend`] by these.
    pub(super) fn room(&self, len: usize, positions: &[i64]) -> Result<Room> {
        let mut n_runs = 0;
        for (i, &p) in positions.iter().enumerate() {
            let last = if i > 0 { Some(positions[i - 1]) } else { len.checked_sub(1).map(|l| self.at(l)) };
            n_runs += usize::from(!follows(last, p));
        }
        Ok(Room { n_runs, table: self.runs.room(n_runs)? })
    }

    /// Gives tokens `len..` these positions.
    pub(super) fn extend(&mut self, len: usize, positions: &[i64], room: Room) {
        self.runs.adopt(room.table);
        let mut last = len.checked_sub(1).map(|l| self.at(l));
        for (i, &position) in positions.iter().enumerate() {
            if !follows(last, position) {
                self.runs.push(Run { first: len + i, position });
            }
            last = Some(position);
        }
    }

    /// Keeps the first `len` tokens, the last of which is live.
    pub(super) fn truncate(&mut self, len: usize) {
        self.runs.truncate(self.runs.partition_point(|r| r.first < len));
        self.removed.truncate(self.removed.partition_point(|r| r.0 < len));
    }

    /// Those of the first `len` tokens.
    pub(super) fn fork(&self, len: usize) -> Result<Positions> {
        self.copy(self.runs.memory(), len)
    }

    /// The same in other memory.
    pub(super) fn copy(&self, memory: &Arc<Memory>, len: usize) -> Result<Positions> {
        let n = self.runs.partition_point(|r| r.first < len);
        let mut runs = Table::with_capacity(memory, n.max(1))?;
        self.runs[..n].iter().for_each(|&run| runs.push(run));
        let n = self.removed.partition_point(|r| r.0 < len);
        let mut removed = Table::with_capacity(memory, n)?;
        self.removed[..n].iter().for_each(|&stretch| removed.push(stretch));
        Ok(Positions { runs, removed })
    }
}

fn follows(last: Option<i64>, position: i64) -> bool {
    last.and_then(|l| l.checked_add(1)) == Some(position)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Allocator;

    #[test]
    fn as_a_plain_list() {
        let memory = Memory::new(Allocator::System, 0);
        let (mut positions, mut plain) = (Positions::new(&memory).unwrap(), Vec::<i64>::new());
        let mut x = 1u64;
        let mut random = |n: u64| {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (x >> 33) % n
        };
        for _ in 0..2000 {
            if random(4) == 0 {
                let n = random(plain.len() as u64 + 1) as usize;
                positions.truncate(n);
                plain.truncate(n);
            }
            let mut last = plain.last().copied().unwrap_or(i64::MIN);
            let new: Vec<i64> = (0..random(6))
                .map(|_| {
                    last = if random(40) == 0 { i64::MAX } else { last.saturating_add(random(3) as i64) };
                    if last == i64::MIN {
                        last = -5
                    }
                    last
                })
                .collect();
            let room = positions.room(plain.len(), &new).unwrap();
            positions.extend(plain.len(), &new, room);
            plain.extend(new);
            let fork = positions.fork(plain.len() / 2).unwrap();
            for (i, &p) in plain.iter().enumerate() {
                assert_eq!(positions.at(i), p);
                let mut far = [0.0; 3];
                let n = far.len().min(plain.len() - i);
                positions.distances(i, plain[i / 2], &mut far[..n]);
                for (j, &far) in far[..n].iter().enumerate() {
                    assert_eq!(far, (i128::from(plain[i + j]) - i128::from(plain[i / 2])) as f32);
                }
                if i < plain.len() / 2 {
                    assert_eq!(fork.at(i), p);
                }
            }
            for at in [i64::MIN, -6, -5, 0, plain.last().copied().unwrap_or(3), i64::MAX] {
                for len in [0, plain.len() / 2, plain.len()] {
                    assert_eq!(positions.below(at, len), plain[..len].partition_point(|&p| p < at), "{at} {len}");
                }
            }
        }
    }
}
