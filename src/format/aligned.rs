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

use super::layout::align;
use super::{LEFT, MAX_DIM, OFFSET, PLANES, Shape, Source, TILE, decode, encode as code_of, inverse, scale};

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
    pub fn new(s: &Shape) -> Offsets {
        let k_rest = align(TILE * s.dim_k / 2);
        let v = k_rest + align(TILE * (s.planes_k - 1) * s.dim_k / 2);
        let k_scales = v + align(TILE * s.planes_v * s.dim_v / 2);
        let v_scales = k_scales + align(s.dim_k);
        let v_mean = v_scales + align(TILE);
        let meta = v_mean + align(s.dim_v);
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
}

impl Meta {
    /// Bytes of it in a page.
    pub const BYTES: usize = 12;

    /// Of an open tile: what holds for any digits, so that it does not depend on how the rows came in.
    fn open(dim: usize, slack: f32) -> Meta {
        Meta { digit_sum: (8 * dim) as u16, digit_square_sum: (64 * dim) as u16, slack, v_mean: 0 }
    }

    fn read(bytes: &[u8]) -> Meta {
        Meta {
            digit_sum: u16::from_le_bytes([bytes[0], bytes[1]]),
            digit_square_sum: u16::from_le_bytes([bytes[2], bytes[3]]),
            slack: f32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
            v_mean: bytes[8],
        }
    }

    fn write(self, bytes: &mut [u8]) {
        bytes[0..2].copy_from_slice(&self.digit_sum.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.digit_square_sum.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.slack.to_le_bytes());
        bytes[8..12].copy_from_slice(&[self.v_mean, 0, 0, 0]);
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
    pub fn new(s: &Shape, part: &'a [u8]) -> Tile<'a> {
        let o = Offsets::new(s);
        Tile {
            k0: &part[..TILE * s.dim_k / 2],
            k_rest: &part[o.k_rest..o.k_rest + TILE * (s.planes_k - 1) * s.dim_k / 2],
            v: &part[o.v..o.v + TILE * s.planes_v * s.dim_v / 2],
            k_scales: &part[o.k_scales..o.k_scales + s.dim_k],
            v_scales: &part[o.v_scales..o.v_scales + TILE],
            v_mean: &part[o.v_mean..o.v_mean + s.dim_v],
            meta: Meta::read(&part[o.meta..]),
            dim_k: s.dim_k,
            dim_v: s.dim_v,
        }
    }

    /// Planes of K that are stored.
    #[inline(always)]
    pub fn planes_k(&self) -> usize {
        1 + self.k_rest.len() / (TILE * self.dim_k / 2)
    }

    /// Planes of V that are stored.
    #[inline(always)]
    pub fn planes_v(&self) -> usize {
        self.v.len() / (TILE * self.dim_v / 2)
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

    /// The first `planes` digits of a token's K channel, the others 0.
    #[inline(always)]
    fn k_stored(&self, row: usize, channel: usize, planes: usize) -> u16 {
        let half = self.dim_k / 2;
        let (b, shift) = place(channel, half);
        let mut stored = u16::from((self.k0[k0_place(row, b, half)] >> shift) & 15) << 12;
        for p in 1..planes {
            stored |= u16::from((self.k_row(row)[(p - 1) * half + b] >> shift) & 15) << (12 - 4 * p);
        }
        stored
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
        let unit = scale(self.meta.v_mean) * (1.0 / 16.0);
        let mut most = 0;
        for (x, &byte) in out.iter_mut().zip(self.v_mean) {
            *x = f32::from(byte as i8) * unit;
            most = most.max((byte as i8).unsigned_abs());
        }
        f32::from(most) * unit
    }
}

/// A token's V row at the precision of `planes` (at least 1) planes.
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
    let o = Offsets::new(s);
    let (planes, scales) = part.split_at_mut(o.k_scales);
    let (k_planes, v_planes) = planes.split_at_mut(o.v);
    let (k0, k_rest) = k_planes.split_at_mut(o.k_rest);
    let (k_scales, rest) = scales.split_at_mut(o.v_scales - o.k_scales);
    let (v_scales, rest) = rest.split_at_mut(o.v_mean - o.v_scales);
    let (v_mean, meta) = rest.split_at_mut(o.meta - o.v_mean);
    encode_k(s, base, source, head, skip, from, to, [k0, k_rest, &mut k_scales[..s.dim_k], meta]);
    encode_v(s, source, head, skip, from, to, v_planes, v_scales);
    // The mean is that of the values as stored, so that it does not depend on where the rows came from.
    let v_mean = &mut v_mean[..s.dim_v];
    v_mean.fill(0);
    if to == TILE && skip < TILE {
        let byte = encode_mean(s, skip, v_planes, v_scales, v_mean);
        Meta { v_mean: byte, ..Meta::read(meta) }.write(meta);
    }
}

#[allow(clippy::too_many_arguments)]
fn encode_k(
    s: &Shape,
    base: Option<&[u8]>,
    source: &Source,
    head: usize,
    skip: usize,
    from: usize,
    to: usize,
    [k0, k_rest, scales, meta]: [&mut [u8]; 4],
) {
    let (d, half, planes) = (s.dim_k, s.dim_k / 2, s.planes_k);
    let rest_row = (planes - 1) * half;
    let mut x = [0.0f32; MAX_DIM];
    let x = &mut x[..d];
    let base = base.map(|part| Tile::new(s, part));

    // Scales only ever grow while a tile is open: start from the smallest, or from what the page has.
    if from == 0 {
        scales.fill(0);
        Meta::open(d, 0.0).write(meta);
    }
    let mut peak = [0.0f32; MAX_DIM];
    for row in from.max(skip)..to {
        source.k.read(row, head, x);
        for (p, v) in peak.iter_mut().zip(x.iter()) {
            *p = if v.abs() > *p { v.abs() } else { *p };
        }
    }
    for c in 0..d {
        let byte = super::scale::smallest(peak[c]);
        if byte <= scales[c] {
            continue;
        }
        scales[c] = byte;
        // The rows before were encoded under a smaller scale: encode this channel of theirs anew.
        for row in skip..from {
            let value = match &base {
                Some(tile) if row < source.base_rows => {
                    decode(tile.k_stored(row, c, planes), planes) * scale(tile.k_scales[c])
                }
                _ => source.k.element(row, head, c),
            };
            let code = code_of(value, inverse(byte));
            let (b, shift) = place(c, half);
            for p in 0..planes {
                let at = if p == 0 {
                    &mut k0[k0_place(row, b, half)]
                } else {
                    &mut k_rest[row * rest_row + (p - 1) * half + b]
                };
                *at = *at & !(15 << shift) | (((code >> (12 - 4 * p)) & 15) as u8) << shift;
            }
        }
    }

    let factors: [f32; MAX_DIM] = std::array::from_fn(|c| scales.get(c).map_or(0.0, |&u| inverse(u)));
    let mut codes = [ZERO; MAX_DIM];
    let codes = &mut codes[..d];
    for row in from..to {
        if row < skip {
            codes.fill(ZERO);
        } else {
            source.k.read(row, head, x);
            for ((code, &v), &factor) in codes.iter_mut().zip(x.iter()).zip(&factors) {
                *code = code_of(v, factor);
            }
        }
        let mut first = [0u8; MAX_DIM / 2];
        pack(codes, 0, &mut first[..half]);
        for (b, word) in (0..half).step_by(4).zip(first.chunks_exact(4)) {
            let at = k0_place(row, b, half);
            k0[at..at + 4].copy_from_slice(word);
        }
        for p in 1..planes {
            let at = row * rest_row + (p - 1) * half;
            pack(codes, p, &mut k_rest[at..at + half]);
        }
    }

    // Rows that only the base knows carry its error, grown by what re-encoding them lost.
    let slack = base.map_or(0.0, |tile| {
        let lost = LEFT[planes] + tile.meta.slack;
        (0..d).fold(tile.meta.slack, |slack, c| {
            let (old, new) = (scale(tile.k_scales[c]), scale(scales[c]));
            if scales[c] > tile.k_scales[c] { slack.max(lost * (old / new)) } else { slack }
        })
    });
    let whole = if to == TILE { digit_sums(k0, half, skip) } else { (8 * d as u32, 64 * d as u32) };
    Meta { digit_sum: whole.0 as u16, digit_square_sum: whole.1 as u16, slack, v_mean: 0 }.write(meta);
}

/// Largest sum of magnitudes and of squares of a token's plane-0 digits.
fn digit_sums(k0: &[u8], half: usize, skip: usize) -> (u32, u32) {
    let mut most = (0, 0);
    for row in skip..TILE {
        let (mut sum, mut squares) = (0u32, 0u32);
        for b in 0..half {
            let byte = k0[k0_place(row, b, half)];
            let (low, high) = (i32::from(byte & 15) - 8, i32::from(byte >> 4) - 8);
            sum += low.unsigned_abs() + high.unsigned_abs();
            squares += (low * low + high * high) as u32;
        }
        most = (most.0.max(sum), most.1.max(squares));
    }
    most
}

#[allow(clippy::too_many_arguments)]
fn encode_v(
    s: &Shape,
    source: &Source,
    head: usize,
    skip: usize,
    from: usize,
    to: usize,
    v_planes: &mut [u8],
    v_scales: &mut [u8],
) {
    let (d, half, planes) = (s.dim_v, s.dim_v / 2, s.planes_v);
    let mut x = [0.0f32; MAX_DIM];
    let x = &mut x[..d];
    let mut codes = [ZERO; MAX_DIM];
    let codes = &mut codes[..d];
    for row in from..to {
        v_scales[row] = 0;
        codes.fill(ZERO);
        if row >= skip {
            source.v.read(row, head, x);
            let byte =
                super::scale::smallest(f32::from_bits(x.iter().fold(0, |m, v| m.max(v.to_bits() & 0x7fff_ffff))));
            v_scales[row] = byte;
            let factor = inverse(byte);
            for (code, &v) in codes.iter_mut().zip(x.iter()) {
                *code = code_of(v, factor);
            }
        }
        for p in 0..planes {
            let at = (row * planes + p) * half;
            pack(codes, p, &mut v_planes[at..at + half]);
        }
    }
}

/// Stores the mean of the V rows of a whole tile: binary32 sums in the order of the tokens. Returns its scale byte.
fn encode_mean(s: &Shape, skip: usize, v_planes: &[u8], v_scales: &[u8], v_mean: &mut [u8]) -> u8 {
    let (d, row_bytes) = (s.dim_v, s.planes_v * s.dim_v / 2);
    let (mut sums, mut x) = ([0.0f32; MAX_DIM], [0.0f32; MAX_DIM]);
    let (sums, x) = (&mut sums[..d], &mut x[..d]);
    for row in skip..TILE {
        decode_v(&v_planes[row * row_bytes..(row + 1) * row_bytes], v_scales[row], s.planes_v, x);
        for (sum, x) in sums.iter_mut().zip(x.iter()) {
            *sum += x;
        }
    }
    let n = (TILE - skip) as f32;
    let byte = super::scale::smallest(sums.iter().fold(0.0f32, |m, sum| m.max((sum / n).abs())));
    // Sixteenths of the scale: two digits.
    let factor = inverse(byte) * (1.0 / 256.0);
    for (code, sum) in v_mean.iter_mut().zip(sums.iter()) {
        *code = (sum / n * factor).round_ties_even() as i8 as u8;
    }
    byte
}

/// Forgets what only a whole tile has.
pub(super) fn reopen(s: &Shape, part: &mut [u8]) {
    let (v_mean, meta) = part[Offsets::new(s).v_mean..].split_at_mut(align(s.dim_v));
    v_mean.fill(0);
    let slack = Meta::read(meta).slack;
    Meta::open(s.dim_k, slack).write(meta);
}

const _: () = assert!(PLANES == 4 && 64 * 256 <= u16::MAX as usize);
