//! Rows as the caller gave them: `[token][dim]` of K, then of V, per tile and KV head.

use super::layout::align;
use super::{Bits, Rows, Shape, Source, TILE};
use crate::Result;
use std::ops::Range;

pub(super) struct Offsets {
    v: usize,
    pub bytes: usize,
}

impl Offsets {
    pub fn new(s: &Shape) -> Offsets {
        let v = align(TILE * s.dim_k * s.dtype_k.size());
        Offsets { v, bytes: v + align(TILE * s.stored_v() * s.dtype_v.size()) }
    }
}

/// One tile of one KV head.
#[derive(Debug, Clone, Copy)]
pub struct Tile<'a> {
    /// K rows (one head).
    pub k: Rows<'a>,
    /// V rows (one head).
    pub v: Rows<'a>,
}

impl<'a> Tile<'a> {
    /// The tile in a head's part of a page.
    pub fn new(s: &Shape, part: &'a [u8]) -> Tile<'a> {
        let (k, v) = part.split_at(Offsets::new(s).v);
        let k = Rows::contiguous(k, 1, s.dtype_k, s.dim_k);
        let v = if s.v_is_prefix { k.prefix(s.dim_v) } else { Rows::contiguous(v, 1, s.dtype_v, s.dim_v) };
        Tile { k, v }
    }
}

pub(super) fn encode(s: &Shape, part: &mut [u8], source: &Source, head: usize, from: usize, to: usize) {
    let (k, v) = part.split_at_mut(Offsets::new(s).v);
    write(k, &source.k, head, from..to);
    if !s.v_is_prefix {
        write(v, &source.v, head, from..to);
    }
}

pub(super) fn write_keys(s: &Shape, part: &mut [u8], k: &Rows, head: usize, new: u128) {
    write(&mut part[..Offsets::new(s).v], k, head, Bits(new));
}

pub(super) fn write_values(s: &Shape, part: &mut [u8], v: &Rows, head: usize, new: u128) {
    write(&mut part[Offsets::new(s).v..], v, head, Bits(new));
}

fn write(to: &mut [u8], rows: &Rows, head: usize, some: impl Iterator<Item = usize>) {
    let bytes = rows.dim() * rows.dtype().size();
    for row in some {
        to[row * bytes..(row + 1) * bytes].copy_from_slice(rows.bytes(row, head));
    }
}

/// See [`super::Layout::stretches`].
pub(super) fn stretches(s: &Shape, rows: usize, f: &mut impl FnMut(Range<usize>) -> Result<()>) -> Result<()> {
    let v = Offsets::new(s).v;
    f(0..rows * s.dim_k * s.dtype_k.size())?;
    f(v..v + rows * s.stored_v() * s.dtype_v.size())
}
