//! Sequences as bytes: the same from any backend, for another cache, process or machine.
//!
//! Numbers are little-endian; whatever is summed ends with the CRC-32 of its bytes.
//!
//! | | bytes | |
//! |---|---|---|
//! | header | 64, summed | magic, version, format, layers of the cache, first layer, layers here, exact head, tokens (8 bytes), runs (8), flags |
//! | runs of positions | 16 each, summed by 4096 | first token, its position |
//! | then by layer: | 52, summed | heads, dims, dtypes, planes stored, planes known, if V is a part of K, if there are marks |
//! | exact head | summed, if there is one | K rows, V rows, as given |
//! | then by tile: | 32 | kind, base rows, planes of K and V (in the two low bytes), 0, which tokens live |
//! | its marks, if there are any | 32 a head, summed with the 32 | tokens whose K, and whose V, were no numbers |
//! | its page, or its base and its rows as given | summed with the 32 | see [`Layout::stretches`], [`Layout::kept_stretches`] |
//!
//! Tiles of which no token lives are empty. A stream of further digits (flag 1) has neither runs nor exact heads. Its tiles are the stored ones alone, others are
//! empty; before its digits a tile has, instead of marks, the sum of what the receiver must have of it.
//! Where V is a part of K there are no bytes of V, and its planes are K's.
//!
//! A tile whose rows are kept travels as these rows: its page is encoded anew, to the same bits. Nothing that a header
//! says is believed before its sum is right, and no memory is taken for more than has come.

use super::device::Edits;
use super::layer::{Layer, Page};
use super::memory::{Memory, Shared, reserve};
use super::sequence::Sequence;
use super::{Cache, Positions, Reader};
use crate::backend::cuda::{Device, Stream};
use crate::format::{Format, Layout, Planes, Shape, TILE, range_bits};
use crate::{Error, Result};
use crc32fast::Hasher;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

const MAGIC: [u8; 8] = *b"\x89AKVSEQ\n";
const VERSION: u32 = 1;

/// Bytes that a callback gets at once, at most.
const PIECE: usize = 1 << 16;

/// Runs of positions that are summed together.
const RUNS: usize = 4096;

/// Kinds of tiles.
const STORED: u32 = 0;
const GIVEN: u32 = 1;
/// Nothing: its tokens have been removed, or a stream of further digits has none of it.
const EMPTY: u32 = 2;

/// Flag of a stream of further digits.
const FURTHER: u32 = 1;

/// Fewest planes that a tile has.
const MIN_PLANES: usize = 2;

/// What of a sequence is to be exported.
#[derive(Debug, Clone, Copy, Default)]
pub struct Excerpt {
    /// Its first layer.
    pub first_layer: usize,
    /// Layers; None = all from there on.
    pub n_layers: Option<usize>,
    /// Planes of K and of V that the receiver will have, at most; None = all.
    pub planes: Option<(usize, usize)>,
    /// Those that it has: only further ones are wanted.
    pub known: Option<(usize, usize)>,
}

/// What comes first.
#[derive(Debug, Clone, Copy)]
struct Header {
    format: Format,
    n_layers: usize,
    layers: (usize, usize),
    exact_head: usize,
    len: usize,
    n_runs: usize,
    is_further: bool,
}

fn little<const N: usize>(words: [u32; N]) -> impl AsRef<[u8]> {
    let mut bytes = [[0u8; 4]; N];
    for (to, word) in bytes.iter_mut().zip(words) {
        *to = word.to_le_bytes();
    }
    struct Bytes<const N: usize>([[u8; 4]; N]);
    impl<const N: usize> AsRef<[u8]> for Bytes<N> {
        fn as_ref(&self) -> &[u8] {
            self.0.as_flattened()
        }
    }
    Bytes(bytes)
}

fn low(x: usize) -> u32 {
    x as u64 as u32
}

fn high(x: usize) -> u32 {
    (x as u64 >> 32) as u32
}

fn format_code(format: Format) -> u32 {
    match format {
        Format::Aligned => 0,
        Format::Published => 1,
        Format::Raw => 2,
    }
}

/// What must be the same in both caches: its word among a layer's, and its name. Query heads and windows are not stored.
fn layer_words(layout: &Layout) -> [(usize, &'static str, u32); 9] {
    let s = &layout.shape;
    [
        (0, "n_kv_heads", s.n_kv_heads as u32),
        (1, "dim_k", s.dim_k as u32),
        (2, "dim_v", s.dim_v as u32),
        (3, "dtype_k", s.dtype_k as u32),
        (4, "dtype_v", s.dtype_v as u32),
        (5, "planes_k", s.planes_k as u32),
        (6, "planes_v", s.planes_v as u32),
        (9, "v_is_prefix_of_k", s.v_is_prefix as u32),
        (10, "whether nan_policy is AKV_NAN_PROPAGATE", layout.marked() as u32),
    ]
}

// ---- bytes out, and in ----------------------------------------------------------------------------------------------

/// Collects what is written into pieces, and sums it.
struct Sink<'a> {
    write: &'a mut dyn FnMut(&[u8]) -> i32,
    buffer: Vec<u8>,
    /// Bytes of the buffer that are in the sum.
    summed: usize,
    sum: Hasher,
    done: u64,
}

impl<'a> Sink<'a> {
    fn new(write: &'a mut dyn FnMut(&[u8]) -> i32) -> Result<Sink<'a>> {
        let mut buffer = Vec::new();
        reserve(&mut buffer, PIECE)?;
        Ok(Sink { write, buffer, summed: 0, sum: Hasher::new(), done: 0 })
    }

    fn put(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            if self.buffer.len() == PIECE {
                self.flush()?;
            }
            let n = bytes.len().min(PIECE - self.buffer.len());
            self.buffer.extend_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
        }
        Ok(())
    }

    /// Sums what has come since the last seal.
    fn add(&mut self) {
        self.sum.update(&self.buffer[self.summed..]);
        self.summed = self.buffer.len();
    }

    /// Ends what is summed together.
    fn seal(&mut self) -> Result<()> {
        self.add();
        let sum = std::mem::take(&mut self.sum).finalize();
        self.put(&sum.to_le_bytes())?;
        self.summed = self.buffer.len();
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.add();
        let code = (self.write)(&self.buffer);
        if code != 0 {
            return Err(Error::Argument(format!("write returned {code} after {} bytes: expected 0", self.done)));
        }
        self.done += self.buffer.len() as u64;
        self.buffer.clear();
        self.summed = 0;
        Ok(())
    }
}

/// Takes what is read apart, never further than it is known to go.
struct Source<'a> {
    read: &'a mut dyn FnMut(&mut [u8]) -> i32,
    buffer: Vec<u8>,
    /// What of the buffer has been taken, and is there.
    at: usize,
    there: usize,
    sum: Hasher,
    done: u64,
}

impl<'a> Source<'a> {
    fn new(read: &'a mut dyn FnMut(&mut [u8]) -> i32) -> Result<Source<'a>> {
        let mut buffer = Vec::new();
        reserve(&mut buffer, PIECE)?;
        buffer.resize(PIECE, 0);
        Ok(Source { read, buffer, at: 0, there: 0, sum: Hasher::new(), done: 0 })
    }

    /// Hands `n` bytes to `f`, in pieces, in order.
    fn pieces(&mut self, n: usize, f: impl FnMut(&[u8])) -> Result<()> {
        let mut f = f;
        let mut left = n;
        while left > 0 {
            let n = left.min(PIECE);
            self.fill(n)?;
            f(&self.buffer[..n]);
            left -= n;
        }
        Ok(())
    }

    /// The next `n` bytes, at the buffer's start; at most a piece.
    fn fill(&mut self, n: usize) -> Result<()> {
        let code = (self.read)(&mut self.buffer[..n]);
        if code != 0 {
            return Err(Error::Corrupt(format!("the stream ends after {} bytes: read returned {code}", self.done)));
        }
        self.done += n as u64;
        self.sum.update(&self.buffer[..n]);
        (self.at, self.there) = (0, n);
        Ok(())
    }

    /// The stretches that `list` gives, into `to`. They are gone through twice: to know how many bytes may be asked for.
    fn stretches(
        &mut self,
        to: &mut [u8],
        list: impl Fn(&mut dyn FnMut(Range<usize>) -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        let mut left = 0;
        list(&mut |range| {
            left += range.len();
            Ok(())
        })?;
        (self.at, self.there) = (0, 0);
        list(&mut |range| {
            let mut to = &mut to[range];
            while !to.is_empty() {
                if self.at == self.there {
                    self.fill(left.min(PIECE))?;
                    left -= self.there;
                }
                let n = to.len().min(self.there - self.at);
                let (now, later) = to.split_at_mut(n);
                now.copy_from_slice(&self.buffer[self.at..self.at + n]);
                self.at += n;
                to = later;
            }
            Ok(())
        })
    }

    fn words<const N: usize>(&mut self) -> Result<[u32; N]> {
        let mut words = [0; N];
        self.fill(4 * N)?;
        for (word, bytes) in words.iter_mut().zip(self.buffer.as_chunks().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        Ok(words)
    }

    /// Fails unless the sum that follows is right; `what` it is of.
    fn seal(&mut self, what: &dyn Fn() -> String) -> Result<()> {
        let sum = std::mem::take(&mut self.sum).finalize();
        let [said] = self.words()?;
        self.sum = Hasher::new();
        if sum == said { Ok(()) } else { Err(Error::Corrupt(format!("{}: its checksum does not fit", what()))) }
    }
}

/// Bytes aligned as blocks are, of the process's heap: exporting takes nothing from a cache that is full.
#[derive(Default)]
struct Staging(Vec<Line>);

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

impl Staging {
    fn bytes(&mut self, n: usize) -> Result<&mut [u8]> {
        let lines = n.div_ceil(64);
        if self.0.len() < lines {
            reserve(&mut self.0, lines)?;
            self.0.resize(lines, Line([0; 64]));
        }
        // SAFETY: lines are plain bytes without padding.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), n) })
    }
}

/// The way to blocks, wherever they lie.
struct Access {
    device: Option<Arc<Device>>,
    staging: Staging,
}

impl Access {
    /// Waits for what has been launched.
    fn new(memory: &Memory) -> Result<Access> {
        let device = memory.device().cloned();
        if let Some(device) = &device {
            device.synchronize()?;
        }
        Ok(Access { device, staging: Staging::default() })
    }

    /// What a block holds.
    fn get<'a>(&'a mut self, block: &'a Shared) -> Result<&'a [u8]> {
        let Some(device) = &self.device else { return Ok(block) };
        let bytes = self.staging.bytes(block.size())?;
        // SAFETY: a block of the device, of that size.
        unsafe { device.download(bytes, block.address()) }?;
        Ok(bytes)
    }

    /// Fills a block that nobody else holds.
    fn set(&mut self, block: &mut Shared, fill: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<()> {
        let Some(device) = &self.device else { return fill(block.own()) };
        let bytes = self.staging.bytes(block.size())?;
        fill(bytes)?;
        // SAFETY: a block of the device, of that size.
        unsafe { device.upload(block.address(), bytes, Stream::DEFAULT) }
    }
}

// ---- export ---------------------------------------------------------------------------------------------------------

impl Excerpt {
    /// Which of the layers that have rows.
    fn layers(&self, cache: &Cache) -> Result<Range<usize>> {
        let (first, n_layers) = (self.first_layer, cache.layouts.len());
        if first >= n_layers {
            return Err(Error::Argument(format!("first_layer {first}: the cache has {n_layers} layers")));
        }
        let n = self.n_layers.unwrap_or(n_layers - first);
        if n > n_layers - first {
            return Err(Error::Argument(format!("n_layers {n} from {first} on: the cache has {n_layers} layers")));
        }
        let [start, end] = [first, first + n].map(|at| cache.stored.partition_point(|stored| stored.0 < at));
        if start == end {
            return Err(Error::Argument(format!("n_layers {n} from {first} on: expected one with rows of its own")));
        }
        Ok(start..end)
    }
}

/// Some layers of a sequence. Fails unless they have all tokens.
fn readers(sequence: &Sequence, cache: &Cache, layers: Range<usize>) -> Result<Vec<Reader>> {
    let mut readers: Vec<Reader> = Vec::new();
    reserve(&mut readers, layers.len())?;
    for layer in layers {
        readers.push(sequence.read(layer, cache.stored[layer].1)?);
    }
    // Layers that are to be imported, or appended to, do not have all tokens.
    let all = sequence.len.load(Relaxed).max(readers.first().map_or(0, Reader::n_tokens));
    if let Some(reader) = readers.iter().find(|reader| reader.n_tokens() != all) {
        let (layer, n, id) = (reader.layer.number, reader.n_tokens(), sequence.id);
        return Err(Error::Argument(format!("layer {layer}: has {n} of the {all} tokens of sequence {id}")));
    }
    Ok(readers)
}

/// See [`Cache::copy`]: what an import of an export would give.
pub(super) fn copy(from: &Cache, sequence: &Sequence, to: &Cache) -> Result<Sequence> {
    check_kind(("from_cache", "to_cache"), (from.config.format, from.stored.len()), to)?;
    for (&(_, theirs), &(number, ours)) in from.stored.iter().zip(&to.stored) {
        let words = layer_words(&theirs).map(|(_, _, word)| word);
        check_layer(("from_cache", "to_cache"), &words, &ours, number)?;
    }
    let readers = readers(sequence, from, 0..from.stored.len())?;
    let Some(first) = readers.first() else { return Err(Error::Internal("a cache without layers".into())) };
    let (memory, len) = (&to.memory, first.n_tokens());
    Sequence::with(memory, readers.len(), len, first.positions.copy(memory, len)?, |i| {
        readers[i].layer.copy(memory, to.stored[i], to.config.exact_tail, &first.positions)
    })
}

/// Fails unless what comes from elsewhere is of the cache's format and number of layers; `places`: what it is called, and
/// what the cache is.
fn check_kind(places: (&str, &str), (format, n_layers): (Format, usize), cache: &Cache) -> Result<()> {
    differ(places, "format", format, cache.config.format)?;
    differ(places, "n_layers", n_layers, cache.stored.len())
}

/// The same of a layer; `words` in the order of [`layer_words`].
fn check_layer(places: (&str, &str), words: &[u32; 9], layout: &Layout, number: usize) -> Result<()> {
    for ((_, name, ours), &theirs) in layer_words(layout).into_iter().zip(words) {
        differ(places, &format!("layer {number}: {name}"), theirs, ours)?;
    }
    Ok(())
}

/// What a stream and its cache are called.
const STREAM: (&str, &str) = ("the stream", "the cache");

/// See [`Cache::export`].
pub(super) fn export(
    cache: &Cache,
    sequence: &Sequence,
    excerpt: &Excerpt,
    write: &mut dyn FnMut(&[u8]) -> i32,
) -> Result<()> {
    let layers = excerpt.layers(cache)?;
    let readers = readers(sequence, cache, layers.clone())?;
    let Some(first) = readers.first() else { return Err(Error::Argument("n_layers 0: expected a layer".into())) };
    let (len, exact_head) = (first.n_tokens(), first.layer.exact_head);
    let n_runs = if excerpt.known.is_some() { 0 } else { first.positions.runs(len).len() };
    let mut sink = Sink::new(write)?;
    let mut access = Access::new(&cache.memory)?;
    let [a, b] = [0, 4].map(|at| u32::from_le_bytes([MAGIC[at], MAGIC[at + 1], MAGIC[at + 2], MAGIC[at + 3]]));
    let (n, flags) = (layers.len(), if excerpt.known.is_some() { FURTHER } else { 0 });
    let format = format_code(cache.config.format);
    let head = [a, b, VERSION, format, low(cache.stored.len()), low(layers.start), low(n), low(exact_head)];
    sink.put(little(head).as_ref())?;
    sink.put(little([low(len), high(len), low(n_runs), high(n_runs), flags, 0, 0]).as_ref())?;
    sink.seal()?;
    for (i, (first, position)) in first.positions.runs(len).take(n_runs).enumerate() {
        sink.put(&(first as u64).to_le_bytes())?;
        sink.put(&position.to_le_bytes())?;
        if (i + 1) % RUNS == 0 || i + 1 == n_runs {
            sink.seal()?;
        }
    }
    for reader in &readers {
        export_layer(reader, excerpt, &mut access, &mut sink)?;
    }
    if sink.buffer.is_empty() { Ok(()) } else { sink.flush() }
}

/// Planes of V are K's where it is a part of it.
fn as_stored(layout: &Layout, (k, v): (usize, usize)) -> (usize, usize) {
    (k, if layout.shape.v_is_prefix { k } else { v })
}

/// Those planes of a page that are wanted, and there.
fn wanted(layout: &Layout, page: &[u8], excerpt: &Excerpt) -> Planes {
    let Planes { k, v } = layout.known(page);
    let known = as_stored(layout, excerpt.known.unwrap_or((0, 0)));
    let (most_k, most_v) = as_stored(layout, excerpt.planes.unwrap_or((k.1, v.1)));
    let planes = |from: usize, there: usize, most: usize| (from, there.min(most).max(from));
    Planes { k: planes(known.0, k.1, most_k), v: planes(known.1, v.1, most_v) }
}

fn export_layer(reader: &Reader, excerpt: &Excerpt, access: &mut Access, sink: &mut Sink) -> Result<()> {
    let layer = &*reader.layer;
    let (layout, is_further) = (&layer.layout, excerpt.known.is_some());
    let known = as_stored(layout, excerpt.known.unwrap_or((0, 0)));
    let mut words = [0; 12];
    (words[7], words[8]) = (low(known.0), low(known.1));
    layer_words(layout).into_iter().for_each(|(at, _, word)| words[at] = word);
    sink.put(little(words).as_ref())?;
    sink.seal()?;
    let n_exact = layer.exact_head.min(layer.len);
    if let (Some(head), true) = (&layer.head, n_exact > 0 && !is_further) {
        let bytes = access.get(head)?;
        for stretch in layout.kept_stretches(layer.exact_head, 0..n_exact) {
            sink.put(&bytes[stretch])?;
        }
        sink.seal()?;
    }
    for (tile, page) in layer.pages[..layer.len.div_ceil(TILE)].iter().enumerate() {
        let rows = TILE.min(layer.len - tile * TILE);
        let live = range_bits(0, rows) & reader.positions.live(tile);
        let start = |kind: u32, base_rows: usize, planes: Planes, sink: &mut Sink| {
            let live = [0, 32, 64, 96].map(|at| (live >> at) as u32);
            let planes = low(planes.k.1 | planes.v.1 << 8);
            sink.put(little([kind, low(base_rows), planes, 0, live[0], live[1], live[2], live[3]]).as_ref())
        };
        let nothing = Planes { k: (0, 0), v: (0, 0) };
        match (&page.kept, &page.base) {
            (Some(_), _) if is_further => start(EMPTY, 0, nothing, sink)?,
            _ if live == 0 => start(EMPTY, 0, nothing, sink)?,
            (None, _) => {
                let bytes = access.get(&page.block)?;
                let planes = wanted(layout, bytes, excerpt);
                start(STORED, 0, planes, sink)?;
                if is_further {
                    sink.put(&sum_of(layout, bytes, rows, known)?.to_le_bytes())?;
                } else {
                    export_marks(layout, bytes, live, sink)?;
                }
                layout.stretches(rows, planes, |stretch| sink.put(&bytes[stretch]))?;
            }
            (Some(kept), base) => {
                let (mut from, mut planes) = (0, nothing);
                if let Some((base, base_rows)) = base {
                    (from, planes) = (*base_rows, layout.known(access.get(base)?));
                }
                start(GIVEN, from, planes, sink)?;
                if layout.marked() {
                    export_marks(layout, access.get(&page.block)?, live, sink)?;
                }
                if let Some((base, _)) = base {
                    let bytes = access.get(base)?;
                    layout.stretches(from, planes, |stretch| sink.put(&bytes[stretch]))?;
                }
                let bytes = access.get(kept)?;
                for stretch in layout.kept_stretches(TILE, from..rows) {
                    sink.put(&bytes[stretch])?;
                }
            }
        }
        sink.seal()?;
    }
    Ok(())
}

/// Marks of tokens that live, if there are any: of others they say nothing.
fn export_marks(layout: &Layout, page: &[u8], live: u128, sink: &mut Sink) -> Result<()> {
    for (head, side) in marks(layout) {
        sink.put(&(layout.marks(page, head, side) & live).to_le_bytes())?;
    }
    Ok(())
}

/// What pages have marks of, in order: heads, and sides of each.
fn marks(layout: &Layout) -> impl Iterator<Item = (usize, usize)> + use<> {
    let n = if layout.marked() { layout.shape.n_kv_heads } else { 0 };
    (0..2 * n).map(|i| (i / 2, i % 2))
}

/// The sum of what a receiver of further digits has of a tile.
fn sum_of(layout: &Layout, page: &[u8], rows: usize, known: (usize, usize)) -> Result<u32> {
    let mut sum = Hasher::new();
    layout.stretches(rows, Planes { k: (0, known.0), v: (0, known.1) }, |stretch| {
        sum.update(&page[stretch]);
        Ok(())
    })?;
    Ok(sum.finalize())
}

// ---- import ---------------------------------------------------------------------------------------------------------

/// A stream whose header is read.
struct Import<'a, 'b> {
    cache: &'a Cache,
    source: Source<'b>,
    access: Access,
    header: Header,
    positions: Positions,
    /// `positions` know which tokens have been removed.
    is_noted: bool,
}

/// See [`Cache::import`].
pub(super) fn import(cache: &Cache, read: &mut dyn FnMut(&mut [u8]) -> i32) -> Result<Sequence> {
    let mut import = Import::new(cache, read)?;
    if import.header.is_further {
        return Err(Error::Argument(
            "into 0: the stream has further digits of a sequence that has the first".to_owned(),
        ));
    }
    let (first, n) = import.header.layers;
    let mut layers = Vec::new();
    reserve(&mut layers, n)?;
    for layer in first..first + n {
        layers.push(import.layer(layer)?);
    }
    let Import { header, positions, .. } = import;
    let mut layers = layers.into_iter();
    let sequence = Sequence::with(&cache.memory, header.n_layers, header.len, positions, |i| {
        let here = if i >= first { layers.next() } else { None };
        here.map_or_else(|| header.empty(cache, i), Ok)
    })?;
    if header.len > 0 {
        sequence.n_missing.store(header.n_layers - n, Relaxed);
    }
    Ok(sequence)
}

/// The same, of layers that a sequence lacks.
pub(super) fn import_into(cache: &Cache, sequence: &Sequence, read: &mut dyn FnMut(&mut [u8]) -> i32) -> Result<()> {
    let _claim = sequence.claim()?;
    let mut import = Import::new(cache, read)?;
    if import.header.is_further {
        return import.further(sequence);
    }
    let ((first, n), len) = (import.header.layers, sequence.len.load(Relaxed));
    if import.header.len != len {
        let (id, n) = (sequence.id, import.header.len);
        return Err(Error::Argument(format!("sequence {id}: has {len} tokens, the stream {n}")));
    }
    let mut places = Vec::new();
    reserve(&mut places, n)?;
    for i in first..first + n {
        let place = sequence.write_layer(i)?;
        if place.len > 0 || len == 0 {
            return Err(Error::Argument(format!(
                "sequence {}: has layer {} of the stream already",
                sequence.id, place.number
            )));
        }
        if place.exact_head != import.header.exact_head {
            let (ours, theirs) = (place.exact_head, import.header.exact_head);
            return Err(Error::Argument(format!("sequence {}: exact head {ours}, the stream's {theirs}", sequence.id)));
        }
        places.push(place);
    }
    if !import.positions.runs(len).eq(sequence.read_positions()?.runs(len)) {
        return Err(Error::Argument(format!("sequence {}: positions are others than the stream's", sequence.id)));
    }
    let mut layers = Vec::new();
    reserve(&mut layers, n)?;
    for layer in first..first + n {
        layers.push(import.layer(layer)?);
    }
    if import.positions.removed() != sequence.read_positions()?.removed() {
        let id = sequence.id;
        return Err(Error::Argument(format!("sequence {id}: other tokens have been removed than of the stream")));
    }
    for (place, layer) in places.iter_mut().zip(layers) {
        **place = layer;
    }
    sequence.n_missing.fetch_sub(n, Relaxed);
    Ok(())
}

impl Header {
    /// A layer that is not there yet.
    fn empty(&self, cache: &Cache, layer: usize) -> Result<Layer> {
        Layer::new(&cache.memory, cache.stored[layer], self.exact_head, cache.config.exact_tail)
    }

    fn read(source: &mut Source) -> Result<Header> {
        source.fill(12)?;
        if source.buffer[..8] != MAGIC {
            return Err(Error::Corrupt("the stream is none of akv_sequence_export".to_owned()));
        }
        let version = u32::from_le_bytes([8, 9, 10, 11].map(|i| source.buffer[i]));
        if version > VERSION {
            return Err(Error::Version(format!("the stream has version {version}: this library knows {VERSION}")));
        }
        let words: [u32; 12] = source.words()?;
        source.seal(&|| "header".to_owned())?;
        let long = |i: usize| usize::try_from(u64::from(words[i]) | u64::from(words[i + 1]) << 32);
        let format = match words[0] {
            0 => Some(Format::Aligned),
            1 => Some(Format::Published),
            2 => Some(Format::Raw),
            _ => None,
        };
        let (format, Ok(len), Ok(n_runs)) = (format, long(5), long(7)) else {
            return Err(Error::Corrupt("header: numbers of tokens that no sequence has".to_owned()));
        };
        let [n_layers, first, n, exact_head] = [1, 2, 3, 4].map(|i| words[i] as usize);
        let sound = version > 0
            && n > 0
            && first.checked_add(n).is_some_and(|end| end <= n_layers)
            && exact_head <= TILE
            && len <= i64::MAX as usize
            && n_runs <= len
            && words[9] <= FURTHER
            && (n_runs > 0) == (len > 0 && words[9] != FURTHER)
            && words[10..] == [0; 2];
        match format {
            Some(format) if sound => Ok(Header {
                format,
                n_layers,
                layers: (first, n),
                exact_head,
                len,
                n_runs,
                is_further: words[9] == FURTHER,
            }),
            _ => Err(Error::Corrupt("header: numbers that no export writes".to_owned())),
        }
    }
}

impl<'a, 'b> Import<'a, 'b> {
    /// Reads up to the first layer.
    fn new(cache: &'a Cache, read: &'b mut dyn FnMut(&mut [u8]) -> i32) -> Result<Import<'a, 'b>> {
        let mut source = Source::new(read)?;
        let header = Header::read(&mut source)?;
        check_kind(STREAM, (header.format, header.n_layers), cache)?;
        if cache.lossless() && header.exact_head > 0 {
            return Err(Error::Corrupt("header: an exact head of rows that are all exact".to_owned()));
        }
        if cache.memory.device().is_some() && header.len > i32::MAX as usize {
            let (n, most) = (header.len, i32::MAX);
            return Err(Error::Argument(format!("the stream has {n} tokens: a device holds at most {most}")));
        }
        let mut positions = Positions::new(&cache.memory)?;
        let mut left = header.n_runs;
        while left > 0 {
            let n = left.min(RUNS);
            let mut sound = Ok(true);
            source.pieces(16 * n, |bytes| {
                for run in bytes.as_chunks::<16>().0 {
                    let (first, position) = run.split_at(8);
                    let word = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |x, &byte| x << 8 | u64::from(byte));
                    if let Ok(true) = sound {
                        let first = usize::try_from(word(first)).unwrap_or(usize::MAX);
                        sound = positions.add_run(first, word(position) as i64, header.len);
                    }
                }
            })?;
            source.seal(&|| "positions".to_owned())?;
            if !sound? {
                return Err(Error::Corrupt("positions: others than those of a sequence".to_owned()));
            }
            left -= n;
        }
        Ok(Import { cache, source, access: Access::new(&cache.memory)?, header, positions, is_noted: false })
    }

    /// What the next layer begins with: the planes that the receiver has.
    fn start(&mut self, index: usize) -> Result<(usize, usize)> {
        let ((index, layout), is_further) = (self.cache.stored[index], self.header.is_further);
        let words: [u32; 12] = self.source.words()?;
        self.source.seal(&|| format!("layer {index}"))?;
        check_layer(STREAM, &layer_words(&layout).map(|(at, ..)| words[at]), &layout, index)?;
        let (k, v) = (words[7] as usize, words[8] as usize);
        let sound = match is_further {
            false => (k, v) == (0, 0),
            true => {
                let Shape { planes_k, planes_v, .. } = layout.shape;
                !layout.lossless()
                    && as_stored(&layout, (k, v)) == (k, v)
                    && (MIN_PLANES..=planes_k).contains(&k)
                    && (MIN_PLANES..=planes_v).contains(&v)
            }
        };
        if sound && words[11] == 0 {
            return Ok((k, v));
        }
        Err(Error::Corrupt(format!("layer {index}: planes that it does not have")))
    }

    /// The next layer.
    fn layer(&mut self, index: usize) -> Result<Layer> {
        let (cache, header) = (self.cache, self.header);
        self.start(index)?;
        let mut layer = header.empty(cache, index)?;
        let (index, layout) = (layer.number, layer.layout);
        let n_exact = header.exact_head.min(header.len);
        if n_exact > 0 {
            let mut head = layer.head_block()?;
            let stretches = layout.kept_stretches(header.exact_head, 0..n_exact);
            let what = || format!("layer {index}, exact head");
            let source = &mut self.source;
            self.access.set(&mut head, |rows| {
                source.stretches(rows, |f| stretches.iter().cloned().try_for_each(f))?;
                source.seal(&what)?;
                check_rows(&layout, rows, header.exact_head, 0..n_exact, &what)
            })?;
            layer.head = Some(head);
        }
        let mut edits = Edits::new(&cache.memory);
        for tile in 0..header.len.div_ceil(TILE) {
            let rows = TILE.min(header.len - tile * TILE);
            let page = self.tile(&mut layer, index, tile, rows)?;
            layer.add_page(page)?;
            layer.encode_kept(tile, rows, &mut edits);
        }
        self.is_noted = true;
        layer.len = header.len;
        edits.run()?;
        layer.release();
        Ok(layer)
    }

    /// What a tile begins with: its kind, base rows and planes.
    fn start_tile(
        &mut self,
        layout: &Layout,
        rows: usize,
        what: &dyn Fn() -> String,
    ) -> Result<(u32, usize, Planes, u128)> {
        let [kind, base_rows, planes, zero, a, b, c, d] = self.source.words::<8>()?;
        let live = [d, c, b, a].into_iter().fold(0u128, |live, word| live << 32 | u128::from(word));
        let (k, v) = ((planes & 255) as usize, (planes >> 8) as usize);
        let Shape { planes_k, planes_v, .. } = layout.shape;
        let sound = match kind {
            STORED if layout.lossless() => (k, v) == (planes_k, planes_v),
            GIVEN if base_rows == 0 => planes == 0,
            EMPTY => planes == 0,
            _ => (MIN_PLANES..=planes_k).contains(&k) && (MIN_PLANES..=planes_v).contains(&v),
        };
        let sound = sound && as_stored(layout, (k, v)) == (k, v);
        let dead = range_bits(0, rows) & !live;
        if !sound || zero != 0 || live & !range_bits(0, rows) != 0 {
            return Err(Error::Corrupt(format!("{}: a kind of tile that there is not", what())));
        }
        if dead != 0 && self.access.device.is_some() {
            let text = format!("{}: tokens have been removed, which is not built yet on the CUDA backend", what());
            return Err(Error::Unsupported(text));
        }
        Ok((kind, base_rows as usize, Planes { k: (0, k), v: (0, v) }, live))
    }

    /// Tokens that a tile lacks: the first layer says which, the others must agree.
    fn note_removed(&mut self, tile: usize, rows: usize, live: u128) -> Result<()> {
        let mut dead = range_bits(0, rows) & !live;
        if self.is_noted {
            if dead != range_bits(0, rows) & !self.positions.live(tile) {
                return Err(Error::Corrupt(format!("tile {tile}: other tokens in one layer than in another")));
            }
            return Ok(());
        }
        while dead != 0 {
            let from = dead.trailing_zeros() as usize;
            let to = from + (dead >> from).trailing_ones() as usize;
            let room = self.positions.room_to_remove()?;
            self.positions.remove(room, tile * TILE + from, tile * TILE + to);
            dead &= !range_bits(from, to);
        }
        Ok(())
    }

    /// The next tile; the page of one whose rows are kept is still to be encoded.
    fn tile(&mut self, layer: &mut Layer, index: usize, tile: usize, rows: usize) -> Result<Page> {
        let layout = &{ layer.layout };
        let what = || format!("layer {index}, tile {tile}");
        let (kind, base_rows, planes, live) = self.start_tile(layout, rows, &what)?;
        let sound = match kind {
            STORED => base_rows == 0 && (rows == TILE || layout.lossless()),
            GIVEN => !layout.lossless() && (base_rows == 0 || (layer.skip(tile) + 1..=rows).contains(&base_rows)),
            // Only where tokens have been removed.
            _ => live == 0 && base_rows == 0 && rows == TILE && (tile + 1) * TILE < self.header.len,
        };
        let is_last = tile * TILE + rows == self.header.len;
        if !sound || (live == 0) != (kind == EMPTY) || is_last && live >> (rows - 1) == 0 {
            return Err(Error::Corrupt(format!("{}: a kind of tile that does not lie there", what())));
        }
        self.note_removed(tile, rows, live)?;
        if kind == EMPTY {
            self.source.seal(&what)?;
            let page = layer.empty_page()?;
            layer.empty(0..0, &page);
            return Ok(page);
        }
        if self.access.device.is_some() && base_rows + TILE * (kind == STORED) as usize > 0 && planes != layout.planes()
        {
            let text = format!("{}: only some of its digits, which is not built yet on the CUDA backend", what());
            return Err(Error::Unsupported(text));
        }
        let Import { source, access, .. } = self;
        // The page of the first rows, as far as they have come.
        let digits = |bytes: &mut [u8], rows: usize, source: &mut Source| {
            source.stretches(bytes, |f| layout.stretches(rows, planes, f))?;
            layout.set_known(bytes, planes);
            layout.check_page(bytes, rows).map_err(|error| Error::Corrupt(format!("{}, {error}", what())))
        };
        let mut block = layer.page()?;
        if layout.marked() {
            access.set(&mut block, |page| {
                for (head, side) in marks(layout) {
                    let words = source.words::<4>()?;
                    let bad = words.into_iter().rev().fold(0u128, |bad, word| bad << 32 | u128::from(word));
                    if bad & !live != 0 {
                        return Err(Error::Corrupt(format!("{}: marks of tokens that it does not have", what())));
                    }
                    layout.mark(page, head, side, u128::MAX, bad);
                }
                Ok(())
            })?;
        }
        if kind == STORED {
            access.set(&mut block, |bytes| digits(bytes, rows, source))?;
            source.seal(&what)?;
            return Ok(Page { block, kept: None, base: None });
        }
        let (mut base, mut kept) = (None, layer.kept()?);
        if base_rows > 0 {
            let mut block = layer.page()?;
            access.set(&mut block, |bytes| digits(bytes, base_rows, source))?;
            base = Some((block, base_rows));
        }
        access.set(&mut kept, |bytes| {
            let stretches = layout.kept_stretches(TILE, base_rows..rows);
            source.stretches(bytes, |f| stretches.iter().cloned().try_for_each(f))?;
            source.seal(&what)?;
            check_rows(layout, bytes, TILE, base_rows..rows, &what)
        })?;
        Ok(Page { block, kept: Some(kept), base })
    }

    /// Adds further digits to tiles that have the first ones only. They lie beside those that are read until all have
    /// come; tiles that others hold, too, are copied.
    fn further(&mut self, sequence: &Sequence) -> Result<()> {
        let ((first, n), len) = (self.header.layers, sequence.len.load(Relaxed));
        if self.access.device.is_some() {
            return Err(Error::Unsupported("further digits are not built yet on the CUDA backend".to_owned()));
        }
        let mut places = Vec::new();
        reserve(&mut places, n)?;
        for index in first..first + n {
            places.push(sequence.write_layer(index)?);
        }
        let mut grown: Vec<(usize, usize, Planes, Option<Shared>)> = Vec::new();
        for (i, layer) in places.iter_mut().enumerate() {
            let (index, layout) = (layer.number, layer.layout);
            let known = self.start(first + i)?;
            for tile in 0..self.header.len.div_ceil(TILE) {
                let what = || format!("layer {index}, tile {tile}");
                let rows = TILE.min(self.header.len - tile * TILE);
                let (kind, _, Planes { k, v }, _) = self.start_tile(&layout, rows, &what)?;
                let further = Planes { k: (known.0, k.1), v: (known.1, v.1) };
                if kind == EMPTY {
                    self.source.seal(&what)?;
                    continue;
                }
                if kind != STORED || rows < TILE || k.1 < known.0 || v.1 < known.1 {
                    return Err(Error::Corrupt(format!("{}: digits that cannot be further ones", what())));
                }
                let [sum] = self.source.words()?;
                let ours = layer.pages[..].get_mut(tile).filter(|page| page.kept.is_none() && (tile + 1) * TILE <= len);
                let ours = ours.filter(|page| layout.known(&page.block) == Planes { k: (0, known.0), v: (0, known.1) });
                let Some(page) = ours else {
                    // It has them, or is another one by now.
                    self.skip(&layout, further)?;
                    self.source.seal(&what)?;
                    continue;
                };
                if sum_of(&layout, &page.block, TILE, known)? != sum {
                    let id = sequence.id;
                    return Err(Error::Argument(format!("sequence {id}: {} is another one than the stream's", what())));
                }
                let mut copy = None;
                if !page.block.is_own() {
                    let mut block = Shared::new(&self.cache.memory, super::memory::Kind::Page, layout.page_bytes())?;
                    block.own().copy_from_slice(&page.block);
                    copy = Some(block);
                }
                reserve(&mut grown, 1)?;
                let block = copy.as_mut().unwrap_or(&mut page.block);
                self.source.stretches(block.own(), |f| layout.stretches(TILE, further, f))?;
                self.source.seal(&what)?;
                grown.push((i, tile, Planes { k: (0, k.1), v: (0, v.1) }, copy));
            }
        }
        for (i, tile, planes, copy) in grown {
            let layer = &mut *places[i];
            let page = &mut layer.pages[tile];
            if let Some(copy) = copy {
                page.block = copy;
            }
            layer.layout.set_known(page.block.own(), planes);
        }
        Ok(())
    }

    /// Reads digits that nobody wants.
    fn skip(&mut self, layout: &Layout, planes: Planes) -> Result<()> {
        let mut bytes = 0;
        layout.stretches(TILE, planes, |stretch| {
            bytes += stretch.len();
            Ok(())
        })?;
        self.source.pieces(bytes, |_| ())
    }
}

/// Fails for rows kept as given that could not have been appended.
fn check_rows(layout: &Layout, block: &[u8], n: usize, rows: Range<usize>, what: &dyn Fn() -> String) -> Result<()> {
    let (k, v) = layout.kept(block, n);
    let result = layout.check_rows("key", &k, rows.clone()).and_then(|()| layout.check_rows("value", &v, rows));
    result.map_err(|error| Error::Corrupt(format!("{}: {error}", what())))
}

/// Fails where what comes from elsewhere is not of a cache like ours.
fn differ<T: std::fmt::Debug + PartialEq>(places: (&str, &str), name: &str, theirs: T, ours: T) -> Result<()> {
    if theirs == ours {
        return Ok(());
    }
    Err(Error::Argument(format!("{name} is {theirs:?} in {}: expected {}'s, {ours:?}", places.0, places.1)))
}
