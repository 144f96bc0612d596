//! Where the bytes of a page lie, for each of the three formats, and how rows get into them.

use super::{Bits, Dtype, MAX_DIM, PLANES, Rows, RowsMut, TILE, aligned, published, raw};
use crate::cache::Turn;
use crate::{Error, Result};
use std::ops::Range;

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
    /// V is the first `dim_v` channels of K, and not stored by itself.
    pub v_is_prefix: bool,
}

impl Shape {
    /// Query heads that share a KV head.
    pub fn group(&self) -> usize {
        self.n_q_heads / self.n_kv_heads
    }

    /// Channels of V that are stored beside K.
    #[inline(always)]
    pub fn stored_v(&self) -> usize {
        if self.v_is_prefix { 0 } else { self.dim_v }
    }

    /// Tokens of a tile with V of their own.
    #[inline(always)]
    pub(super) fn v_tokens(&self) -> usize {
        if self.v_is_prefix { 0 } else { TILE }
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
    /// Pages end with marks.
    marked: bool,
}

/// Of each KV head, tokens of a tile whose K, and whose V, were no numbers: two words of 128 bits.
const MARKS: usize = 2 * size_of::<u128>();

/// Digit planes of K and of V, from one to before another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Planes {
    pub k: (usize, usize),
    pub v: (usize, usize),
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
        Layout { format, shape, part, marked: false }
    }

    /// The same with room for marks: which rows were no numbers, and are stored without them.
    pub fn with_marks(self) -> Layout {
        Layout { marked: true, ..self }
    }

    /// True if pages have marks.
    pub fn marked(&self) -> bool {
        self.marked
    }

    /// Bytes of a page: a tile of every KV head, and the marks.
    pub fn page_bytes(&self) -> usize {
        self.rows_bytes() + if self.marked { align(MARKS * self.shape.n_kv_heads) } else { 0 }
    }

    /// Bytes of its rows.
    pub fn rows_bytes(&self) -> usize {
        self.part * self.shape.n_kv_heads
    }

    /// Where K's (0) or V's (1) mark of a head is.
    fn mark_at(&self, head: usize, side: usize) -> std::ops::Range<usize> {
        let at = self.rows_bytes() + head * MARKS + side * size_of::<u128>();
        at..at + size_of::<u128>()
    }

    /// Tokens whose K (0) or V (1) was no number. Of tokens that were never marked, either way, this says nothing.
    #[inline(always)]
    pub fn marks(&self, page: &[u8], head: usize, side: usize) -> u128 {
        match page[..].get(self.mark_at(head, side)) {
            Some(bytes) if self.marked => u128::from_le_bytes(bytes.try_into().unwrap_or_default()),
            _ => 0,
        }
    }

    /// Marks the tokens `bad` among `some`, and no others of them.
    pub fn mark(&self, page: &mut [u8], head: usize, side: usize, some: u128, bad: u128) {
        if self.marked {
            let marks = self.marks(page, head, side) & !some | bad & some;
            page[self.mark_at(head, side)].copy_from_slice(&marks.to_le_bytes());
        }
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

    /// What lies beside rows that the engine keeps itself: plane 0 of K, and all scales.
    pub fn index(shape: Shape) -> Layout {
        Layout::new(Format::Aligned, Shape { planes_k: 1, planes_v: 0, ..shape })
    }

    /// Fails, naming the place, if a row among `first..first + n` of `k` or `v` cannot be stored.
    pub fn check(&self, k: &Rows, v: &Rows, n: usize) -> Result<()> {
        self.check_rows("key", k, 0..n)?;
        self.check_rows("value", v, 0..n)
    }

    /// The same of some rows of one of them.
    pub fn check_rows(&self, name: &str, rows: &Rows, some: impl Iterator<Item = usize>) -> Result<()> {
        for row in some {
            for head in 0..self.shape.n_kv_heads {
                let peak = rows.peak(row, head);
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

    /// A page of zeros, none of them a row. (Marks are made when there is one.)
    pub fn blank(&self, page: &mut [u8]) {
        match self.format {
            Format::Aligned => {
                for head in 0..self.shape.n_kv_heads {
                    aligned::blank(&self.shape, self.part_mut(page, head));
                }
            }
            _ => page.fill(0),
        }
    }

    /// Encodes K of a whole tile, as [`Layout::encode`] would.
    pub fn encode_keys(&self, page: &mut [u8], k: &Rows, skip: usize) {
        debug_assert!(self.format == Format::Aligned);
        for head in 0..self.shape.n_kv_heads {
            aligned::encode_keys(&self.shape, self.part_mut(page, head), None, k, head, skip, 0, TILE);
        }
    }

    /// The same of V.
    pub fn encode_values(&self, page: &mut [u8], v: &Rows, skip: usize) {
        debug_assert!(self.format == Format::Aligned);
        for head in 0..self.shape.n_kv_heads {
            aligned::encode_values(&self.shape, self.part_mut(page, head), v, head, skip, 0, TILE);
        }
    }

    /// Writes K of the tokens `new` over what is there. Of the others with rows, `written`, `k` holds those in `known`;
    /// the rest is known by the page alone.
    pub fn rewrite_keys(&self, page: &mut [u8], k: &Rows, new: u128, written: u128, known: u128) {
        for head in 0..self.shape.n_kv_heads {
            let part = self.part_mut(page, head);
            match self.format {
                Format::Aligned => aligned::rewrite_keys(&self.shape, part, k, head, new, written, known),
                Format::Raw => raw::write_keys(&self.shape, part, k, head, new),
                Format::Published => unreachable!("appended only"),
            }
        }
    }

    /// The same of V.
    pub fn rewrite_values(&self, page: &mut [u8], v: &Rows, new: u128) {
        for head in 0..self.shape.n_kv_heads {
            let part = self.part_mut(page, head);
            match self.format {
                Format::Aligned => aligned::rewrite_values(&self.shape, part, v, head, new),
                Format::Raw => raw::write_values(&self.shape, part, v, head, new),
                Format::Published => unreachable!("appended only"),
            }
        }
    }

    /// What a K row of `from`, decoded and encoded anew in `to`, had lost before that: in units of `to`'s scales.
    pub fn lost_keys(&self, from: &[u8], to: &[u8], head: usize) -> f32 {
        let tile = |page| aligned::Tile::new(&self.shape, self.part(page, head));
        let lost = aligned::lost_keys(&tile(from), &tile(to), self.shape.planes_k);
        // Rounding it to the caller's dtype, which can hold the row, moves it no further than it was off.
        if self.shape.dtype_k == Dtype::F32 { lost } else { 2.0 * lost }
    }

    /// Raises the slack of a tile.
    pub fn add_slack(&self, page: &mut [u8], head: usize, slack: f32) {
        aligned::add_slack(&self.shape, self.part_mut(page, head), slack);
    }

    /// Turns K of the tokens `some` of a page; `written` are all of it that may be read. Codes are made anew: what that
    /// loses is in the tile's slack, and so it is for the others if a scale has to grow. `scratch` has room for a tile of
    /// one head.
    pub(crate) fn turn_page(
        &self,
        page: &mut [u8],
        some: u128,
        written: u128,
        skip: usize,
        turn: &Turn,
        scratch: &mut [f32],
    ) {
        let s = &self.shape;
        for head in 0..s.n_kv_heads {
            let part = self.part_mut(page, head);
            match self.format {
                Format::Aligned => aligned::turn_keys(s, part, some, written, skip, turn, scratch),
                Format::Raw => turn_rows(part, s.dtype_k, 1, s.dim_k, Bits(some), turn),
                Format::Published => unreachable!("refused"),
            }
        }
    }

    /// Turns K rows of a block that keeps `n` as given, rounded to their dtype (and at most to its limits).
    pub(crate) fn turn_kept(&self, block: &mut [u8], n: usize, some: Bits, turn: &Turn) {
        assert!(block.len() >= self.kept_bytes(n));
        let s = &self.shape;
        turn_rows(&mut block[..self.kept_offset(n)], s.dtype_k, s.n_kv_heads, s.dim_k, some, turn);
    }

    /// V of a token, as it is stored.
    pub fn stored_value(&self, page: &[u8], head: usize, row: usize) -> aligned::StoredValue {
        aligned::Tile::new(&self.shape, self.part(page, head)).stored_value(row)
    }

    /// Stores it in a tile.
    pub fn store_value(&self, page: &mut [u8], head: usize, row: usize, value: &aligned::StoredValue) {
        aligned::store_value(&self.shape, self.part_mut(page, head), row, value);
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
                tile.decode_k(row, tile.known_k(), k);
                if shape.v_is_prefix {
                    v.copy_from_slice(&k[..shape.dim_v]);
                } else {
                    tile.decode_v(row, tile.known_v(), v);
                }
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

    /// All digit planes of K and of V that a page stores.
    pub fn planes(&self) -> Planes {
        Planes { k: (0, self.shape.planes_k), v: (0, self.shape.planes_v) }
    }

    /// Calls `f` with every stretch of a page that holds something of its first `rows` tokens, in order: the digit planes
    /// `planes`, and with the first one of K all else. What lies between them is of no account.
    pub fn stretches(&self, rows: usize, planes: Planes, mut f: impl FnMut(Range<usize>) -> Result<()>) -> Result<()> {
        for head in 0..self.shape.n_kv_heads {
            let start = head * self.part;
            let mut f = |range: Range<usize>| f(start + range.start..start + range.end);
            match self.format {
                Format::Aligned => aligned::stretches(&self.shape, rows, planes, &mut f)?,
                Format::Published => published::stretches(&self.shape, rows, &mut f)?,
                Format::Raw => raw::stretches(&self.shape, rows, &mut f)?,
            }
        }
        Ok(())
    }

    /// Fails if the first `rows` tokens of a page from outside are nothing that [`Layout::encode`] could have written and
    /// attention could not bear.
    pub fn check_page(&self, page: &[u8], rows: usize) -> Result<()> {
        for head in 0..self.shape.n_kv_heads {
            let part = self.part(page, head);
            let sound = match self.format {
                Format::Aligned => aligned::sound(&self.shape, part),
                Format::Published => published::sound(&self.shape, part, rows),
                Format::Raw => {
                    let tile = raw::Tile::new(&self.shape, part);
                    (0..rows).all(|row| tile.k.peak(row, 0).is_finite() && tile.v.peak(row, 0).is_finite())
                }
            };
            if !sound {
                return Err(Error::Corrupt(format!("head {head}: values that no rows have")));
            }
        }
        Ok(())
    }

    /// Planes of K and of V of a page that hold digits, from the first.
    pub fn known(&self, page: &[u8]) -> Planes {
        let (k, v) = match self.format {
            Format::Aligned => aligned::known(&self.shape, self.part(page, 0)),
            _ => (self.shape.planes_k, self.shape.planes_v),
        };
        Planes { k: (0, k), v: (0, v) }
    }

    /// Says which do.
    pub fn set_known(&self, page: &mut [u8], planes: Planes) {
        if self.format == Format::Aligned {
            for head in 0..self.shape.n_kv_heads {
                aligned::set_known(&self.shape, self.part_mut(page, head), planes.k.1, planes.v.1);
            }
        }
    }

    /// Bytes of a block that keeps `n` rows as given (exact head rows; the rows of an open tile).
    pub fn kept_bytes(&self, n: usize) -> usize {
        let s = &self.shape;
        self.kept_offset(n) + align(n * s.n_kv_heads * s.stored_v() * s.dtype_v.size())
    }

    /// Where V begins in it.
    pub fn kept_offset(&self, n: usize) -> usize {
        let s = &self.shape;
        align(n * s.n_kv_heads * s.dim_k * s.dtype_k.size())
    }

    /// The K and V rows of a block of [`Layout::kept_bytes`]`(n)`, which must be aligned to 64.
    pub fn kept<'a>(&self, block: &'a [u8], n: usize) -> (Rows<'a>, Rows<'a>) {
        assert!(block.len() >= self.kept_bytes(n));
        let s = &self.shape;
        let (k, v) = block.split_at(self.kept_offset(n));
        let k = Rows::contiguous(k, s.n_kv_heads, s.dtype_k, s.dim_k);
        (k, if s.v_is_prefix { k.prefix(s.dim_v) } else { Rows::contiguous(v, s.n_kv_heads, s.dtype_v, s.dim_v) })
    }

    /// The same of a block at an address.
    ///
    /// # Safety
    /// Rows that are read lie in such a block, which nobody writes during `'a`.
    pub unsafe fn kept_at<'a>(&self, address: u64, n: usize) -> (Rows<'a>, Rows<'a>) {
        let s = &self.shape;
        let rows = |address: u64, dtype: Dtype, dim: usize| {
            let stride = (dim * dtype.size()) as isize;
            // SAFETY: the contract.
            unsafe { Rows::new(address as *const u8, stride * s.n_kv_heads as isize, stride, dtype, dim) }
        };
        (rows(address, s.dtype_k, s.dim_k), rows(address + self.kept_offset(n) as u64, s.dtype_v, s.dim_v))
    }

    /// Copies row 0 of `k` and `v` into row `row` of such a block.
    pub fn keep(&self, block: &mut [u8], n: usize, row: usize, k: Rows, v: Rows) {
        self.keep_key(block, n, row, k);
        if !self.shape.v_is_prefix {
            self.keep_value(block, n, row, v);
        }
    }

    /// The same of K alone.
    pub fn keep_key(&self, block: &mut [u8], n: usize, row: usize, k: Rows) {
        assert!(row < n && block.len() >= self.kept_bytes(n));
        self.keep_row(&mut block[..self.kept_offset(n)], row, k);
    }

    /// The same of V alone.
    pub fn keep_value(&self, block: &mut [u8], n: usize, row: usize, v: Rows) {
        assert!(row < n && block.len() >= self.kept_bytes(n));
        self.keep_row(&mut block[self.kept_offset(n)..], row, v);
    }

    /// Writes values of one head into a block of one row, rounded to the layer's dtypes (and at most to their limits).
    pub fn keep_values(&self, block: &mut [u8], head: usize, k: &[f32], v: &[f32]) {
        assert!(block.len() >= self.kept_bytes(1) && (block.as_ptr() as usize).is_multiple_of(64));
        let s = &self.shape;
        let (to_k, to_v) = block.split_at_mut(self.kept_offset(1));
        for (to, dtype, x) in [(to_k, s.dtype_k, k), (to_v, s.dtype_v, v)] {
            let limit = if dtype == Dtype::F16 { f32::from(half::f16::MAX) } else { f32::MAX };
            let mut clamped = [0.0; MAX_DIM];
            let clamped = &mut clamped[..x.len()];
            for (to, x) in clamped.iter_mut().zip(x) {
                *to = x.clamp(-limit, limit);
            }
            let stride = (x.len() * dtype.size()) as isize;
            // SAFETY: exclusively borrowed, aligned, and large enough for every head: asserted above.
            let mut rows = unsafe { RowsMut::new(to.as_mut_ptr(), stride, stride, dtype, x.len()) };
            assert!(head < s.n_kv_heads);
            rows.write(0, head, clamped);
        }
    }

    /// The bytes of rows `rows` in such a block, of K and of V.
    pub fn kept_stretches(&self, n: usize, rows: Range<usize>) -> [Range<usize>; 2] {
        let (s, at) = (&self.shape, self.kept_offset(n));
        let (k, v) = (s.n_kv_heads * s.dim_k * s.dtype_k.size(), s.n_kv_heads * s.stored_v() * s.dtype_v.size());
        [rows.start * k..rows.end * k, at + rows.start * v..at + rows.end * v]
    }

    fn keep_row(&self, to: &mut [u8], row: usize, rows: Rows) {
        let bytes = rows.dim() * rows.dtype().size();
        for head in 0..self.shape.n_kv_heads {
            let at = (row * self.shape.n_kv_heads + head) * bytes;
            to[at..at + bytes].copy_from_slice(rows.bytes(0, head));
        }
    }
}

/// Turns some of the rows `[row][head][dim]`, which start on a cache line.
fn turn_rows(bytes: &mut [u8], dtype: Dtype, n_heads: usize, dim: usize, some: Bits, turn: &Turn) {
    let limit = if dtype == Dtype::F16 { f32::from(half::f16::MAX) } else { f32::MAX };
    let mut x = [0.0; MAX_DIM];
    let x = &mut x[..dim];
    let stride = (dim * dtype.size()) as isize;
    for row in some {
        assert!((row + 1) * n_heads * dim * dtype.size() <= bytes.len());
        for head in 0..n_heads {
            Rows::contiguous(bytes, n_heads, dtype, dim).read(row, head, x);
            turn.row(x);
            for x in x.iter_mut() {
                *x = x.clamp(-limit, limit);
            }
            // SAFETY: exclusively borrowed, aligned (asserted by `contiguous`), and the row lies within: asserted above.
            let mut rows = unsafe { RowsMut::new(bytes.as_mut_ptr(), stride * n_heads as isize, stride, dtype, dim) };
            rows.write(row, head, x);
        }
    }
}

const _: () = assert!(PLANES == 4);
