//! A tile of digit planes.
//!
//! A plane of a token is a row of `dim / 2` bytes; byte `b` holds channel `b` in its low nibble and channel
//! `b + dim / 2` in its high one. A head's part of a page is, each array starting on a cache line:
//!
//! | array | shape | |
//! |---|---|---|
//! | K plane 0 | `[TILE / 16][dim_k / 8][16 tokens][4]` | what the scan reads: a word of 16 tokens is a cache line |
//! | K further planes | `[TILE][planes_k - 1][dim_k / 2]` | a token's lie together |
//! | V planes | `[TILE][planes_v][dim_v / 2]` | p planes of a token are the first p rows |
//! | K scale bytes | `[dim_k]` | |
//! | V scale bytes | `[TILE]` | |
//! | V mean | `[dim_v]` int8 | of a closed tile; in sixteenths of a scale of its own; all 0 while it is open |
//! | meta | 12 bytes | see [`Meta`] |
//!
//! Where V is a part of K there are no arrays of V.

use super::layout::align;
use super::{
    Bits, Dtype, LEFT, MAX_DIM, MAX_LATENT, OFFSET, PEAK, PLANES, Planes, Rows, Shape, Source, TILE, decode,
    encode as code_of, inverse, scale,
};
use crate::Result;
use crate::cache::Turn;
use std::ops::Range;

pub(super) struct Offsets {
    k_rest: usize,
    v: usize,
    k_scales: usize,
    v_scales: usize,
    v_mean: usize,
    meta: usize,
    pub bytes: usize,
}

impl Offsets {
    #[inline(always)]
    pub fn new(s: &Shape) -> Offsets {
        let (dim_v, v_tokens) = (s.stored_v(), s.v_tokens());
        let k_rest = align(TILE * s.dim_k / 2);
        let v = k_rest + align(TILE * (s.planes_k - 1) * s.dim_k / 2);
        let k_scales = v + align(TILE * s.planes_v * dim_v / 2);
        let v_scales = k_scales + align(s.dim_k);
        let v_mean = v_scales + align(v_tokens);
        let meta = v_mean + align(dim_v);
        Offsets { k_rest, v, k_scales, v_scales, v_mean, meta, bytes: meta + align(Meta::BYTES) }
    }
}

/// What attention knows about a tile beyond its codes and scales.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Meta {
    /// No token's plane-0 digits have a larger sum of magnitudes.
    pub digit_sum: u16,
    /// No token's plane-0 digits have a larger sum of squares.
    pub digit_square_sum: u16,
    /// Error beyond [`LEFT`], in units of the scale, that re-encoding reopened rows has left.
    pub slack: f32,
    /// Scale byte of the V mean.
    pub v_mean: u8,
    /// Last planes of K that are stored but hold nothing: they have not been imported.
    pub missing_k: u8,
    /// The same of V.
    pub missing_v: u8,
}

impl Meta {
    /// Bytes of it in a page.
    pub const BYTES: usize = 12;

    /// Bytes of it that do not depend on what has been imported.
    const LASTING: usize = 9;

    const NONE: Meta = Meta { digit_sum: 0, digit_square_sum: 0, slack: 0.0, v_mean: 0, missing_k: 0, missing_v: 0 };

    /// Of an open tile: what holds for any digits, so that it does not depend on how the rows came in.
    fn open(dim: usize, slack: f32) -> Meta {
        Meta { digit_sum: (8 * dim) as u16, digit_square_sum: (64 * dim) as u16, slack, ..Meta::NONE }
    }

    #[inline(always)]
    fn read(bytes: &[u8]) -> Meta {
        Meta {
            digit_sum: u16::from_le_bytes([bytes[0], bytes[1]]),
            digit_square_sum: u16::from_le_bytes([bytes[2], bytes[3]]),
            slack: f32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
            v_mean: bytes[8],
            missing_k: bytes[9],
            missing_v: bytes[10],
        }
    }

    fn write(self, bytes: &mut [u8]) {
        bytes[0..2].copy_from_slice(&self.digit_sum.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.digit_square_sum.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.slack.to_le_bytes());
        bytes[8..12].copy_from_slice(&[self.v_mean, self.missing_k, self.missing_v, 0]);
    }
}

/// One tile of one KV head.
#[derive(Debug, Clone, Copy)]
pub struct Tile<'a> {
    /// Plane 0 of K.
    pub k0: &'a [u8],
    /// Further planes of K.
    pub k_rest: &'a [u8],
    /// Planes of V.
    pub v: &'a [u8],
    /// Scale bytes of K, one per channel.
    pub k_scales: &'a [u8],
    /// Scale bytes of V, one per token.
    pub v_scales: &'a [u8],
    /// Mean of V over the tokens, as stored: see [`Tile::mean`].
    pub v_mean: &'a [u8],
    /// See [`Meta`].
    pub meta: Meta,
    dim_k: usize,
    dim_v: usize,
}

impl<'a> Tile<'a> {
    /// The tile in a head's part of a page.
    #[inline(always)]
    pub fn new(s: &Shape, part: &'a [u8]) -> Tile<'a> {
        let (o, dim_v) = (Offsets::new(s), s.stored_v());
        Tile {
            k0: &part[..TILE * s.dim_k / 2],
            k_rest: &part[o.k_rest..o.k_rest + TILE * (s.planes_k - 1) * s.dim_k / 2],
            v: &part[o.v..o.v + TILE * s.planes_v * dim_v / 2],
            k_scales: &part[o.k_scales..o.k_scales + s.dim_k],
            v_scales: &part[o.v_scales..o.v_scales + s.v_tokens()],
            v_mean: &part[o.v_mean..o.v_mean + dim_v],
            meta: Meta::read(&part[o.meta..]),
            dim_k: s.dim_k,
            dim_v,
        }
    }

    /// Planes of K that are stored.
    #[inline(always)]
    pub fn planes_k(&self) -> usize {
        1 + self.k_rest.len() / (TILE * self.dim_k / 2)
    }

    /// Planes of V that are stored: K's, where V is a part of it.
    #[inline(always)]
    pub fn planes_v(&self) -> usize {
        if self.dim_v == 0 { self.planes_k() } else { self.v.len() / (TILE * self.dim_v / 2) }
    }

    /// Planes of K that hold digits.
    #[inline(always)]
    pub fn known_k(&self) -> usize {
        self.planes_k() - usize::from(self.meta.missing_k)
    }

    /// Planes of V that hold digits.
    #[inline(always)]
    pub fn known_v(&self) -> usize {
        if self.dim_v == 0 { self.known_k() } else { self.planes_v() - usize::from(self.meta.missing_v) }
    }

    /// Planes 1 and up of a token's K, one after another.
    #[inline(always)]
    pub fn k_row(&self, row: usize) -> &'a [u8] {
        let bytes = self.k_rest.len() / TILE;
        &self.k_rest[row * bytes..(row + 1) * bytes]
    }

    /// The planes of a token's V, one after another.
    #[inline(always)]
    pub fn v_row(&self, row: usize) -> &'a [u8] {
        let bytes = self.v.len() / TILE;
        &self.v[row * bytes..(row + 1) * bytes]
    }

    /// A token's V as it is stored.
    pub fn stored_value(&self, row: usize) -> StoredValue {
        let (mut planes, from) = ([0; PLANES * MAX_DIM / 2], self.v_row(row));
        planes[..from.len()].copy_from_slice(from);
        StoredValue { planes, scale: self.v_scales[row] }
    }

    /// The first `planes` digits of a token's K channel, the others 0.
    #[inline(always)]
    fn k_stored(&self, row: usize, channel: usize, planes: usize) -> u16 {
        stored(self.k0, self.k_row(row), self.dim_k / 2, row, channel, planes)
    }

    /// K of a token at the precision of `planes` planes.
    pub fn decode_k(&self, row: usize, planes: usize, out: &mut [f32]) {
        for (c, x) in out.iter_mut().enumerate() {
            *x = decode(self.k_stored(row, c, planes), planes) * scale(self.k_scales[c]);
        }
    }

    /// V of a token at the precision of `planes` planes; with none, the mean of the tile.
    pub fn decode_v(&self, row: usize, planes: usize, out: &mut [f32]) {
        if planes == 0 {
            self.mean(out);
        } else {
            decode_v(self.v_row(row), self.v_scales[row], planes, out);
        }
    }

    /// Mean of V over the tokens of a closed tile, 0 in an open one: what tokens stand for of which no plane is read.
    /// They differ from it by less than from 0, and not all to the same side. Returns the largest magnitude.
    #[inline(always)]
    pub fn mean(&self, out: &mut [f32]) -> f32 {
        let unit = self.mean_unit();
        for (x, &byte) in out.iter_mut().zip(self.v_mean) {
            *x = f32::from(byte as i8) * unit;
        }
        self.mean_peak()
    }

    /// Largest magnitude of [`Tile::mean`].
    #[inline(always)]
    pub fn mean_peak(&self) -> f32 {
        let most = self.v_mean.iter().fold(0, |m, &byte| (byte as i8).unsigned_abs().max(m));
        f32::from(most) * self.mean_unit()
    }

    #[inline(always)]
    fn mean_unit(&self) -> f32 {
        scale(self.meta.v_mean) * (1.0 / 16.0)
    }
}

/// The first `planes` digits of a token's K channel, the others 0. `rest` = its further planes.
#[inline(always)]
fn stored(k0: &[u8], rest: &[u8], half: usize, row: usize, channel: usize, planes: usize) -> u16 {
    let (b, shift) = place(channel, half);
    let mut stored = u16::from((k0[k0_place(row, b, half)] >> shift) & 15) << 12;
    for p in 1..planes {
        stored |= u16::from((rest[(p - 1) * half + b] >> shift) & 15) << (12 - 4 * p);
    }
    stored
}

/// A token's V row at the precision of `planes` (at least 1) planes.
#[inline(always)]
fn decode_v(row: &[u8], scale_byte: u8, planes: usize, out: &mut [f32]) {
    let half = out.len() / 2;
    let mut stored = [0u16; MAX_DIM];
    let (low, high) = stored[..2 * half].split_at_mut(half);
    for (p, plane) in row.chunks_exact(half).take(planes).enumerate() {
        let shift = 12 - 4 * p;
        for ((l, h), &byte) in low.iter_mut().zip(high.iter_mut()).zip(plane) {
            *l |= u16::from(byte & 15) << shift;
            *h |= u16::from(byte >> 4) << shift;
        }
    }
    let unit = scale(scale_byte);
    for (x, &stored) in out.iter_mut().zip(&stored) {
        *x = decode(stored, planes) * unit;
    }
}

/// Tokens whose plane-0 words lie together: the scan always reads all tokens, so that lanes can be tokens and no sum
/// ever crosses lanes.
pub const LANES: usize = 16;

/// Place of byte `b` of a token's plane-0 row.
#[inline(always)]
fn k0_place(row: usize, b: usize, half: usize) -> usize {
    row / LANES * LANES * half + b / 4 * 4 * LANES + row % LANES * 4 + b % 4
}

/// Byte and shift of a channel in a plane's row.
#[inline(always)]
fn place(channel: usize, half: usize) -> (usize, u32) {
    if channel < half { (channel, 0) } else { (channel - half, 4) }
}

/// Digit `plane` of every code, two to a byte.
#[inline(always)]
fn pack(codes: &[u16], plane: usize, row: &mut [u8]) {
    let shift = 12 - 4 * plane;
    let (low, high) = codes.split_at(row.len());
    for ((byte, &l), &h) in row.iter_mut().zip(low).zip(high) {
        *byte = ((l >> shift) & 15 | ((h >> shift) & 15) << 4) as u8;
    }
}

const ZERO: u16 = OFFSET as u16;

/// A head's part of a page, to be written.
struct PartMut<'a> {
    k0: &'a mut [u8],
    k_rest: &'a mut [u8],
    v: &'a mut [u8],
    k_scales: &'a mut [u8],
    v_scales: &'a mut [u8],
    v_mean: &'a mut [u8],
    meta: &'a mut [u8],
}

impl<'a> PartMut<'a> {
    fn new(s: &Shape, part: &'a mut [u8]) -> PartMut<'a> {
        let o = Offsets::new(s);
        let (planes, scales) = part.split_at_mut(o.k_scales);
        let (k_planes, v) = planes.split_at_mut(o.v);
        let (k0, k_rest) = k_planes.split_at_mut(o.k_rest);
        let (k_scales, rest) = scales.split_at_mut(o.v_scales - o.k_scales);
        let (v_scales, rest) = rest.split_at_mut(o.v_mean - o.v_scales);
        let (v_mean, meta) = rest.split_at_mut(o.meta - o.v_mean);
        let (k_scales, v_mean) = (&mut k_scales[..s.dim_k], &mut v_mean[..s.stored_v()]);
        PartMut { k0, k_rest, v, k_scales, v_scales, v_mean, meta }
    }

    /// Writes the digits of a token's K codes.
    #[inline(always)]
    fn put_k(&mut self, row: usize, half: usize, planes: usize, codes: &[u16]) {
        let mut first = [0u8; MAX_LATENT / 2];
        pack(codes, 0, &mut first[..half]);
        for (b, word) in (0..half).step_by(4).zip(first[..half].chunks_exact(4)) {
            let at = k0_place(row, b, half);
            self.k0[at..at + 4].copy_from_slice(word);
        }
        for p in 1..planes {
            let at = (row * (planes - 1) + p - 1) * half;
            pack(codes, p, &mut self.k_rest[at..at + half]);
        }
    }

    /// Writes the digits of one channel of a token's K.
    #[inline(always)]
    fn put_k_channel(&mut self, row: usize, channel: usize, half: usize, planes: usize, code: u16) {
        let (b, shift) = place(channel, half);
        for p in 0..planes {
            let at = if p == 0 {
                &mut self.k0[k0_place(row, b, half)]
            } else {
                &mut self.k_rest[(row * (planes - 1) + p - 1) * half + b]
            };
            *at = *at & !(15 << shift) | (((code >> (12 - 4 * p)) & 15) as u8) << shift;
        }
    }
}

#[allow(clippy::too_many_arguments)]
pub(super) fn encode(
    s: &Shape,
    part: &mut [u8],
    base: Option<&[u8]>,
    source: &Source,
    head: usize,
    skip: usize,
    from: usize,
    to: usize,
) {
    encode_keys(s, part, base.map(|base| (base, source.base_rows)), &source.k, head, skip, from, to);
    if !s.v_is_prefix {
        encode_values(s, part, &source.v, head, skip, from, to);
    }
}

/// See [`super::Layout::stretches`].
pub(super) fn stretches(
    s: &Shape,
    rows: usize,
    planes: Planes,
    f: &mut impl FnMut(Range<usize>) -> Result<()>,
) -> Result<()> {
    let (o, half, half_v) = (Offsets::new(s), s.dim_k / 2, s.stored_v() / 2);
    if planes.k.0 == 0 && planes.k.1 > 0 {
        let (whole, more) = (rows / LANES * LANES * half, rows % LANES);
        f(0..whole)?;
        for word in (0..if more > 0 { half } else { 0 }).step_by(4) {
            let at = whole + word * LANES;
            f(at..at + 4 * more)?;
        }
    }
    // Planes from `from` to `to` of the `n` that lie together for every token.
    let mut digits = |start: usize, n: usize, bytes: usize, from: usize, to: usize| {
        if (from, to) == (0, n) {
            return f(start..start + rows * n * bytes);
        }
        for row in 0..if from < to && bytes > 0 { rows } else { 0 } {
            f(start + (row * n + from) * bytes..start + (row * n + to) * bytes)?;
        }
        Ok(())
    };
    digits(o.k_rest, s.planes_k - 1, half, planes.k.0.saturating_sub(1), planes.k.1.saturating_sub(1))?;
    digits(o.v, s.planes_v, half_v, planes.v.0, planes.v.1)?;
    if planes.k.0 == 0 {
        for (at, bytes) in [
            (o.k_scales, s.dim_k),
            (o.v_scales, rows.min(s.v_tokens())),
            (o.v_mean, s.stored_v()),
            (o.meta, Meta::LASTING),
        ] {
            f(at..at + bytes)?;
        }
    }
    Ok(())
}

/// True if what attention computes with is within what [`encode`] writes; digits and scales are, whatever they are.
pub(super) fn sound(s: &Shape, part: &[u8]) -> bool {
    let at = Offsets::new(s).meta;
    let meta = Meta::read(&part[at..]);
    let sums = usize::from(meta.digit_sum) <= 8 * s.dim_k && usize::from(meta.digit_square_sum) <= 64 * s.dim_k;
    sums && (0.0..=SLACK_LIMIT).contains(&meta.slack)
}

/// Planes of K and of V that hold digits.
pub(super) fn known(s: &Shape, part: &[u8]) -> (usize, usize) {
    let tile = Tile::new(s, part);
    (tile.known_k(), tile.known_v())
}

/// Says that the first planes hold digits, and the others nothing.
pub(super) fn set_known(s: &Shape, part: &mut [u8], k: usize, v: usize) {
    let at = Offsets::new(s).meta;
    let (missing_k, missing_v) = ((s.planes_k - k) as u8, (s.planes_v - v) as u8);
    Meta { missing_k, missing_v, ..Meta::read(&part[at..]) }.write(&mut part[at..]);
}

/// No tile has lost more: it would be worth nothing.
const SLACK_LIMIT: f32 = 65536.0;

/// Functions that are compiled for wide vectors too, and called so where the machine has them: the arithmetic is the same,
/// and so are the bytes.
macro_rules! widened {
    ($($(#[$doc:meta])* fn $name:ident = $body:ident($($arg:ident: $type:ty),*);)*) => {$(
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        pub(super) fn $name($($arg: $type),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $type),*) {
                    $body($($arg),*)
                }
                #[target_feature(enable = "avx2")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $type),*) {
                    $body($($arg),*)
                }
                use std::arch::is_x86_feature_detected as has;
                if has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq") {
                    // SAFETY: this machine has what it is compiled for.
                    return unsafe { avx512($($arg),*) };
                }
                if has!("avx2") {
                    // SAFETY: as above.
                    return unsafe { avx2($($arg),*) };
                }
            }
            $body($($arg),*)
        }
    )*};
}

widened! {
    /// K of [`encode`]. Scales only ever grow while a tile is open: they start from the smallest, or from what the page has.
    fn encode_keys = keys(s: &Shape, part: &mut [u8], base: Option<(&[u8], usize)>, k: &Rows, head: usize, skip: usize, from: usize, to: usize);
    /// V of [`encode`].
    fn encode_values = values(s: &Shape, part: &mut [u8], v: &Rows, head: usize, skip: usize, from: usize, to: usize);
}

#[allow(clippy::too_many_arguments)]
#[inline(always)]
fn keys(
    s: &Shape,
    part: &mut [u8],
    base: Option<(&[u8], usize)>,
    k: &Rows,
    head: usize,
    skip: usize,
    from: usize,
    to: usize,
) {
    let (d, half, planes) = (s.dim_k, s.dim_k / 2, s.planes_k);
    let mut part = PartMut::new(s, part);
    let mut x = [0.0f32; MAX_LATENT];
    let x = &mut x[..d];
    let base = base.map(|(part, rows)| (Tile::new(s, part), rows));
    if from == 0 {
        part.k_scales.fill(0);
    }
    let mut peak = [0.0f32; MAX_LATENT];
    for row in from.max(skip)..to {
        k.read_finite(row, head, x);
        raise(&mut peak, x);
    }
    for c in 0..d {
        let byte = super::scale::smallest(peak[c]);
        if byte <= part.k_scales[c] {
            continue;
        }
        part.k_scales[c] = byte;
        // The rows before were encoded under a smaller scale: encode this channel of theirs anew.
        for row in skip..from {
            let value = match &base {
                Some((tile, rows)) if row < *rows => {
                    let known = tile.known_k();
                    decode(tile.k_stored(row, c, known), known) * scale(tile.k_scales[c])
                }
                _ => k.element(row, head, c),
            };
            part.put_k_channel(row, c, half, planes, code_of(value, inverse(byte)));
        }
    }
    put_rows(s, &mut part, k, head, (from..to).map(|row| (row, row < skip)));

    // Rows that only the base knows carry its error, grown by what re-encoding them lost.
    let slack = base.map_or(0.0, |(tile, _)| {
        let lost = LEFT[tile.known_k()] + tile.meta.slack;
        (0..d).fold(tile.meta.slack, |slack, c| {
            let (old, new) = (scale(tile.k_scales[c]), scale(part.k_scales[c]));
            if part.k_scales[c] > tile.k_scales[c] { slack.max(lost * (old / new)) } else { slack }
        })
    });
    let whole = if to == TILE { digit_sums(part.k0, half, skip) } else { (8 * d as u32, 64 * d as u32) };
    let v_mean = if from == 0 { 0 } else { Meta::read(part.meta).v_mean };
    // And no more planes than it has.
    let Meta { missing_k, missing_v, .. } = base.map_or(Meta::NONE, |(tile, _)| tile.meta);
    let (digit_sum, digit_square_sum) = (whole.0 as u16, whole.1 as u16);
    Meta { digit_sum, digit_square_sum, slack, v_mean, missing_k, missing_v }.write(part.meta);
}

/// Raises the peaks to the magnitudes of a row.
#[inline(always)]
fn raise(peak: &mut [f32; MAX_LATENT], x: &[f32]) {
    for (p, v) in peak.iter_mut().zip(x.iter()) {
        *p = if v.abs() > *p { v.abs() } else { *p };
    }
}

/// Encodes K rows under the scales that the part has; `(row, true)` stands for zeros.
#[inline(always)]
fn put_rows(s: &Shape, part: &mut PartMut, k: &Rows, head: usize, rows: impl Iterator<Item = (usize, bool)>) {
    let d = s.dim_k;
    let mut factors = [0.0f32; MAX_LATENT];
    for (factor, &u) in factors.iter_mut().zip(part.k_scales.iter()) {
        *factor = inverse(u);
    }
    let (mut x, mut codes) = ([0.0f32; MAX_LATENT], [ZERO; MAX_LATENT]);
    let (x, codes) = (&mut x[..d], &mut codes[..d]);
    for (row, zero) in rows {
        if zero {
            codes.fill(ZERO);
        } else {
            k.read_finite(row, head, x);
            for ((code, &v), &factor) in codes.iter_mut().zip(x.iter()).zip(&factors) {
                *code = code_of(v, factor);
            }
        }
        part.put_k(row, d / 2, s.planes_k, codes);
    }
}

/// A tile of zeros, none of them a row.
pub(super) fn blank(s: &Shape, part: &mut [u8]) {
    let part = PartMut::new(s, part);
    for planes in [part.k0, part.k_rest, part.v] {
        planes.fill((ZERO >> 8) as u8);
    }
    for bytes in [part.k_scales, part.v_scales, part.v_mean] {
        bytes.fill(0);
    }
    Meta::open(s.dim_k, 0.0).write(part.meta);
}

/// Writes K of the tokens `new` over a tile in any state. Of the others that are there, `written`, `k` holds those in
/// `known`, the page alone the rest: if a scale must grow, what they lose is added to the tile's slack.
pub(super) fn rewrite_keys(s: &Shape, part: &mut [u8], k: &Rows, head: usize, new: u128, written: u128, known: u128) {
    let (d, half, planes) = (s.dim_k, s.dim_k / 2, s.planes_k);
    let mut part = PartMut::new(s, part);
    let mut x = [0.0f32; MAX_LATENT];
    let mut peak = [0.0f32; MAX_LATENT];
    for row in Bits(new) {
        k.read_finite(row, head, &mut x[..d]);
        raise(&mut peak, &x[..d]);
    }
    let others = written & !new;
    let meta = Meta::read(part.meta);
    let digits = planes - usize::from(meta.missing_k).min(planes);
    let (mut slack, lost) = (meta.slack, LEFT[digits] + meta.slack);
    for c in 0..d {
        let (old, byte) = (part.k_scales[c], super::scale::smallest(peak[c]));
        if byte <= old {
            continue;
        }
        part.k_scales[c] = byte;
        for row in Bits(others) {
            let value = if known >> row & 1 == 1 {
                k.element(row, head, c)
            } else {
                let rest = &part.k_rest[row * (planes - 1) * half..];
                decode(stored(part.k0, rest, half, row, c, digits), digits) * scale(old)
            };
            part.put_k_channel(row, c, half, planes, code_of(value, inverse(byte)));
        }
        if others & !known != 0 {
            slack = slack.max(lost * (scale(old) / scale(byte)));
        }
    }
    put_rows(s, &mut part, k, head, Bits(new).map(|row| (row, false)));
    Meta { v_mean: meta.v_mean, ..Meta::open(d, slack) }.write(part.meta);
}

/// See [`super::Layout::turn_page`].
pub(super) fn turn_keys(
    s: &Shape,
    part: &mut [u8],
    some: u128,
    written: u128,
    skip: usize,
    turn: &Turn,
    scratch: &mut [f32],
) {
    if some == 0 {
        return;
    }
    let (d, tile) = (s.dim_k, Tile::new(s, part));
    let (before, known) = (tile.meta, tile.known_k());
    let mut error = [0.0f32; MAX_LATENT];
    for (error, &u) in error.iter_mut().zip(tile.k_scales) {
        *error = (LEFT[known] + before.slack) * scale(u);
    }
    turn.errors(&mut error[..d]);
    let scratch = &mut scratch[..TILE * d];
    scratch.fill(0.0);
    for row in Bits(some) {
        let x = &mut scratch[row * d..(row + 1) * d];
        tile.decode_k(row, known, x);
        turn.row(x);
    }
    // SAFETY: floats are plain bytes.
    let bytes = unsafe { std::slice::from_raw_parts(scratch.as_ptr().cast(), 4 * scratch.len()) };
    let rows = Rows::contiguous(bytes, 1, Dtype::F32, d);
    // Tokens that have been removed stand for nothing.
    let is_whole = written & !some == 0;
    if is_whole {
        encode_keys(s, part, None, &rows, 0, skip, 0, TILE);
    } else {
        rewrite_keys(s, part, &rows, 0, some, written, some);
    }
    let tile = Tile::new(s, part);
    let lost = error[..d].iter().zip(tile.k_scales).fold(0.0f32, |lost, (error, &u)| lost.max(error / scale(u)));
    // With what binary32 rounds in a row that turns, at most as large as the scale can hold.
    let lost = lost * (1.0 + 4.0 * f32::EPSILON) + 4.0 * f32::EPSILON * PEAK;
    let Meta { v_mean, missing_v, .. } = before;
    let missing_k = if is_whole { 0 } else { before.missing_k };
    let meta = Meta { slack: tile.meta.slack.max(lost), v_mean, missing_k, missing_v, ..tile.meta };
    meta.write(PartMut::new(s, part).meta);
}

/// Writes V of the tokens `new` over a tile in any state. Its mean stays: any will do.
pub(super) fn rewrite_values(s: &Shape, part: &mut [u8], v: &Rows, head: usize, new: u128) {
    let mut part = PartMut::new(s, part);
    for row in Bits(new) {
        put_v(s, &mut part, v, head, row, false);
    }
}

/// A token's planes and scale byte of V.
pub struct StoredValue {
    planes: [u8; PLANES * MAX_DIM / 2],
    scale: u8,
}

/// Puts a token's V, as it is stored elsewhere, into a tile.
pub(super) fn store_value(s: &Shape, part: &mut [u8], row: usize, value: &StoredValue) {
    let (part, bytes) = (PartMut::new(s, part), s.planes_v * s.dim_v / 2);
    part.v[row * bytes..(row + 1) * bytes].copy_from_slice(&value.planes[..bytes]);
    part.v_scales[row] = value.scale;
}

/// The largest error of stored K in `from`, in units of the scales of `to`.
pub(super) fn lost_keys(from: &Tile, to: &Tile, planes: usize) -> f32 {
    let ratios = from.k_scales.iter().zip(to.k_scales).map(|(&from, &to)| scale(from) / scale(to));
    (LEFT[planes] + from.meta.slack) * ratios.fold(0.0, f32::max) * (1.0 + f32::EPSILON)
}

/// Raises the slack of a tile.
pub(super) fn add_slack(s: &Shape, part: &mut [u8], slack: f32) {
    let part = PartMut::new(s, part);
    let meta = Meta::read(part.meta);
    Meta { slack: meta.slack.max(slack), ..meta }.write(part.meta);
}

/// Largest sum of magnitudes and of squares of a token's plane-0 digits.
#[inline(always)]
fn digit_sums(k0: &[u8], half: usize, skip: usize) -> (u32, u32) {
    let mut most = (0, 0);
    for (block, bytes) in k0.chunks_exact(LANES * half).enumerate() {
        // By byte of a cache line, 4 of which are a token's: at most 32 lines of two digits.
        let (mut sums, mut squares) = ([0u16; 64], [0u16; 64]);
        for line in bytes.as_chunks::<64>().0 {
            for i in 0..64 {
                let (low, high) = (i16::from(line[i] & 15) - 8, i16::from(line[i] >> 4) - 8);
                sums[i] += low.unsigned_abs() + high.unsigned_abs();
                squares[i] += (low * low + high * high) as u16;
            }
        }
        for token in skip.saturating_sub(LANES * block)..LANES {
            let sum = |x: &[u16; 64]| x[4 * token..4 * token + 4].iter().map(|&x| u32::from(x)).sum();
            most = (most.0.max(sum(&sums)), most.1.max(sum(&squares)));
        }
    }
    most
}

#[inline(always)]
fn values(s: &Shape, part: &mut [u8], v: &Rows, head: usize, skip: usize, from: usize, to: usize) {
    let mut part = PartMut::new(s, part);
    for row in from..to {
        put_v(s, &mut part, v, head, row, row < skip);
    }
    // The mean is that of the values as stored, so that it does not depend on where the rows came from.
    part.v_mean.fill(0);
    if to == TILE && skip < TILE {
        let byte = encode_mean(s, skip, v, head, &mut part);
        Meta { v_mean: byte, ..Meta::read(part.meta) }.write(part.meta);
    }
}

/// Encodes a V row; `zero`: as zeros.
#[inline(always)]
fn put_v(s: &Shape, part: &mut PartMut, v: &Rows, head: usize, row: usize, zero: bool) {
    let (d, half, planes) = (s.dim_v, s.dim_v / 2, s.planes_v);
    let (mut x, mut codes) = ([0.0f32; MAX_DIM], [ZERO; MAX_DIM]);
    let (x, codes) = (&mut x[..d], &mut codes[..d]);
    part.v_scales[row] = 0;
    if !zero {
        v.read_finite(row, head, x);
        let byte = super::scale::smallest(f32::from_bits(x.iter().fold(0, |m, v| m.max(v.to_bits() & 0x7fff_ffff))));
        part.v_scales[row] = byte;
        let factor = inverse(byte);
        for (code, &v) in codes.iter_mut().zip(x.iter()) {
            *code = code_of(v, factor);
        }
    }
    for p in 0..planes {
        let at = (row * planes + p) * half;
        pack(codes, p, &mut part.v[at..at + half]);
    }
}

/// Stores the mean of the V rows of a whole tile: binary32 sums in the order of the tokens. Returns its scale byte.
#[inline(always)]
fn encode_mean(s: &Shape, skip: usize, v: &Rows, head: usize, part: &mut PartMut) -> u8 {
    let (d, row_bytes) = (s.dim_v, s.planes_v * s.dim_v / 2);
    let (mut sums, mut x) = ([0.0f32; MAX_DIM], [0.0f32; MAX_DIM]);
    let (sums, x) = (&mut sums[..d], &mut x[..d]);
    let known = s.planes_v - usize::from(Meta::read(part.meta).missing_v).min(s.planes_v);
    for row in skip..TILE {
        if s.planes_v == 0 {
            v.read_finite(row, head, x);
        } else {
            decode_v(&part.v[row * row_bytes..(row + 1) * row_bytes], part.v_scales[row], known, x);
        }
        for (sum, x) in sums.iter_mut().zip(x.iter()) {
            *sum += x;
        }
    }
    let n = (TILE - skip) as f32;
    let byte = super::scale::smallest(sums.iter().fold(0.0f32, |m, sum| m.max((sum / n).abs())));
    // Sixteenths of the scale: two digits.
    let factor = inverse(byte) * (1.0 / 256.0);
    for (code, sum) in part.v_mean.iter_mut().zip(sums.iter()) {
        *code = (sum / n * factor).round_ties_even() as i8 as u8;
    }
    byte
}

/// Forgets what only a whole tile has.
pub(super) fn reopen(s: &Shape, part: &mut [u8]) {
    let (v_mean, meta) = part[Offsets::new(s).v_mean..].split_at_mut(align(s.stored_v()));
    v_mean.fill(0);
    let Meta { slack, missing_k, missing_v, .. } = Meta::read(meta);
    Meta { missing_k, missing_v, ..Meta::open(s.dim_k, slack) }.write(meta);
}

const _: () = assert!(PLANES == 4 && 64 * MAX_LATENT <= u16::MAX as usize);
