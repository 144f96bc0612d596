//! Where the bytes of a page lie, for each of the three formats, and how rows get into them.

use super::{Dtype, MAX_DIM, PLANES, Rows, TILE, aligned, published, raw};
use crate::{Error, Result};

/// How a cache stores its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Digit planes under shared scales: this library's own.
    Aligned,
    /// AlignedKV as published (arXiv 2409.16546): f16 bits cut 8 | 4 | 4, lossless.
    Published,
    /// Rows as the caller gave them.
    Raw,
}

/// Shape of the attention of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Query heads; a multiple of `n_kv_heads`.
    pub n_q_heads: usize,
    /// KV heads.
    pub n_kv_heads: usize,
    /// Channels of q and K.
    pub dim_k: usize,
    /// Channels of V and of the output.
    pub dim_v: usize,
    /// Element type of the caller's K rows, and of the rows that are kept as given.
    pub dtype_k: Dtype,
    /// The same of V.
    pub dtype_v: Dtype,
    /// Planes of K that are stored, 2 to 4.
    pub planes_k: usize,
    /// Planes of V that are stored, 2 to 4.
    pub planes_v: usize,
    /// Sliding window in positions; 0 = none.
    pub window: usize,
}

impl Shape {
    /// Query heads that share a KV head.
    pub fn group(&self) -> usize {
        self.n_q_heads / self.n_kv_heads
    }
}

/// Rows of one tile, by their index in the tile.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// K rows; row `i` is token `i` of the tile. Rows below `base_rows` are not there.
    pub k: Rows<'a>,
    /// V rows, likewise.
    pub v: Rows<'a>,
    /// The page of a reopened tile: it holds what is known of the first `base_rows` tokens.
    pub base: Option<&'a [u8]>,
    /// Tokens that only `base` knows; 0 without one.
    pub base_rows: usize,
}

/// Byte layout of a page.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// Format.
    pub format: Format,
    /// Shape.
    pub shape: Shape,
    part: usize,
}

/// Arrays start on cache lines.
pub(super) const fn align(bytes: usize) -> usize {
    bytes.next_multiple_of(64)
}

impl Layout {
    /// Layout of the pages of a layer.
    pub fn new(format: Format, shape: Shape) -> Layout {
        let part = match format {
            Format::Aligned => aligned::Offsets::new(&shape).bytes,
            Format::Published => published::Offsets::new(&shape).bytes,
            Format::Raw => raw::Offsets::new(&shape).bytes,
        };
        Layout { format, shape, part }
    }

    /// Bytes of a page: a tile of every KV head.
    pub fn page_bytes(&self) -> usize {
        self.part * self.shape.n_kv_heads
    }

    /// True if stored rows are exactly the caller's: nothing need be kept beside them.
    pub fn lossless(&self) -> bool {
        self.format != Format::Aligned
    }

    /// The part of a page that belongs to a KV head.
    pub fn part<'a>(&self, page: &'a [u8], head: usize) -> &'a [u8] {
        &page[head * self.part..(head + 1) * self.part]
    }

    fn part_mut<'a>(&self, page: &'a mut [u8], head: usize) -> &'a mut [u8] {
        &mut page[head * self.part..(head + 1) * self.part]
    }

    /// Fails, naming the place, if a row among `first..first + n` of `k` or `v` cannot be stored.
    pub fn check(&self, k: &Rows, v: &Rows, n: usize) -> Result<()> {
        let mut x = [0.0f32; MAX_DIM];
        for (name, rows) in [("key", k), ("value", v)] {
            let x = &mut x[..rows.dim()];
            for row in 0..n {
                for head in 0..self.shape.n_kv_heads {
                    rows.read(row, head, x);
                    // As integers, magnitudes order as they should, with infinity and NaN above all numbers.
                    let peak = f32::from_bits(x.iter().fold(0, |m, v| m.max(v.to_bits() & 0x7fff_ffff)));
                    if !peak.is_finite() {
                        return Err(Error::NonFinite(format!("{name}: NaN or infinity in row {row}, head {head}")));
                    }
                    if self.format == Format::Aligned && peak > super::PEAK_LIMIT {
                        let limit = super::PEAK_LIMIT;
                        return Err(Error::Range(format!(
                            "{name}: magnitude {peak:e} in row {row}, head {head}: the format holds at most {limit:e}"
                        )));
                    }
                }
            }
        }
        Ok(())
    }

    /// Encodes tokens `from..to` of a tile. Tokens below `from` are in the page already (from the same source);
    /// those below `skip` are kept exactly elsewhere, and stand in the page as zeros that no scale sees. What is in
    /// the page afterwards depends on the source and `to` alone, not on how many calls it took.
    ///
    /// The rows must have passed [`Layout::check`]. With a base, `from == base_rows` needs the page to be a copy of
    /// the base.
    pub fn encode(&self, page: &mut [u8], source: &Source, skip: usize, from: usize, to: usize) {
        debug_assert!(from < to && to <= TILE && source.base_rows <= from);
        let shape = &self.shape;
        for head in 0..shape.n_kv_heads {
            let base = source.base.map(|b| self.part(b, head));
            let part = self.part_mut(page, head);
            match self.format {
                Format::Aligned => aligned::encode(shape, part, base, source, head, skip, from, to),
                Format::Published => published::encode(shape, part, source, head, from, to),
                Format::Raw => raw::encode(shape, part, source, head, from, to),
            }
        }
    }

    /// Makes the page of a closed tile one of an open tile again: what is known of whole tiles only is forgotten.
    pub fn reopen(&self, page: &mut [u8]) {
        if self.format == Format::Aligned {
            for head in 0..self.shape.n_kv_heads {
                aligned::reopen(&self.shape, self.part_mut(page, head));
            }
        }
    }

    /// Token `row` of a tile as attention sees it with all stored planes.
    pub fn decode(&self, page: &[u8], head: usize, row: usize, k: &mut [f32], v: &mut [f32]) {
        let (shape, part) = (&self.shape, self.part(page, head));
        match self.format {
            Format::Aligned => {
                let tile = aligned::Tile::new(shape, part);
                tile.decode_k(row, shape.planes_k, k);
                tile.decode_v(row, shape.planes_v, v);
            }
            Format::Published => {
                let tile = published::Tile::new(shape, part);
                tile.k.decode(row, k);
                tile.v.decode(row, v);
            }
            Format::Raw => {
                let tile = raw::Tile::new(shape, part);
                tile.k.read(row, 0, k);
                tile.v.read(row, 0, v);
            }
        }
    }

    /// Bytes of a block that keeps `n` rows as given (exact head rows; the rows of an open tile).
    pub fn kept_bytes(&self, n: usize) -> usize {
        let s = &self.shape;
        align(n * s.n_kv_heads * s.dim_k * s.dtype_k.size()) + align(n * s.n_kv_heads * s.dim_v * s.dtype_v.size())
    }

    fn kept_split(&self, n: usize) -> usize {
        let s = &self.shape;
        align(n * s.n_kv_heads * s.dim_k * s.dtype_k.size())
    }

    /// The K and V rows of a block of [`Layout::kept_bytes`]`(n)`, which must be aligned to 64.
    pub fn kept<'a>(&self, block: &'a [u8], n: usize) -> (Rows<'a>, Rows<'a>) {
        assert!(block.len() >= self.kept_bytes(n));
        let s = &self.shape;
        let (k, v) = block.split_at(self.kept_split(n));
        (Rows::contiguous(k, s.n_kv_heads, s.dtype_k, s.dim_k), Rows::contiguous(v, s.n_kv_heads, s.dtype_v, s.dim_v))
    }

    /// Copies row 0 of `k` and `v` into row `row` of such a block.
    pub fn keep(&self, block: &mut [u8], n: usize, row: usize, k: Rows, v: Rows) {
        assert!(row < n && block.len() >= self.kept_bytes(n));
        let heads = self.shape.n_kv_heads;
        let (k_block, v_block) = block.split_at_mut(self.kept_split(n));
        for (to, rows) in [(k_block, k), (v_block, v)] {
            let bytes = rows.dim() * rows.dtype().size();
            for head in 0..heads {
                let at = (row * heads + head) * bytes;
                to[at..at + bytes].copy_from_slice(rows.bytes(0, head));
            }
        }
    }
}

const _: () = assert!(PLANES == 4);
