//! Cells that are written in any order, rows that stay the engine's, and masks: through the C functions, against
//! float64 over the rows that the caller wrote.

mod common;

use alignedkv::capi::{attention::*, batch::*, cache::*, context::*, sequence::*, slots::*, status::*, types::*};
use alignedkv::format::{Dtype, PEAK, scale};
use common::{Rng, round};
use half::{bf16, f16};
use std::collections::{BTreeSet, VecDeque};
use std::ffi::c_void;
use std::ptr::{null, null_mut};
use std::sync::Barrier;

const TILE: usize = 128;
const INF: f32 = f32::INFINITY;

// ---- C, as an engine calls it ----------------------------------------------------------------------------------------

/// Plain data of the C interface, all zero.
fn zeroed<T: Copy>() -> T {
    // SAFETY: used for descriptors: integers, floats, pointers and optional functions.
    unsafe { std::mem::zeroed() }
}

fn text() -> String {
    let mut buffer = [0u8; 400];
    // SAFETY: memory of that size.
    unsafe { akv_last_error(buffer.as_mut_ptr().cast(), buffer.len(), null_mut()) };
    String::from_utf8_lossy(buffer.split(|&b| b == 0).next().unwrap()).into_owned()
}

#[track_caller]
fn ok(status: akv_status) {
    assert_eq!(status, AKV_OK, "{}", text());
}

fn code(dtype: Dtype) -> i32 {
    match dtype {
        Dtype::F32 => AKV_F32,
        Dtype::F16 => AKV_F16,
        Dtype::Bf16 => AKV_BF16,
    }
}

/// Rows `[n][heads][dim]` as an engine may hold them: rows or heads outermost, with gaps. What is not set is NaN in every
/// dtype, so that reading it shows.
struct Memory {
    words: Vec<u64>,
    rows: akv_rows,
    n: usize,
    dim: usize,
    dtype: Dtype,
}

impl Memory {
    fn new(n: usize, heads: usize, dim: usize, dtype: Dtype, gap: usize, heads_first: bool) -> Memory {
        let (part, pad) = ((dim + gap) * dtype.size(), gap * dtype.size());
        let (stride_row, stride_head) = if heads_first { (part, n * part + pad) } else { (heads * part + pad, part) };
        let bytes = n.max(1) * heads * part + (n + heads) * pad;
        let mut words = vec![u64::MAX; bytes.div_ceil(8)];
        let rows = akv_rows {
            data: words.as_mut_ptr().cast(),
            stride_row: stride_row as i64,
            stride_head: stride_head as i64,
            dtype: code(dtype),
            reserved: 0,
        };
        Memory { words, rows, n, dim, dtype }
    }

    fn at(&self, row: usize, head: usize) -> *mut u8 {
        assert!(row < self.n && !self.words.is_empty());
        let bytes = row * self.rows.stride_row as usize + head * self.rows.stride_head as usize;
        self.rows.data.cast::<u8>().wrapping_add(bytes)
    }

    /// Sets all heads of a row from `[heads][dim]`.
    fn set(&mut self, row: usize, x: &[f32]) {
        for (head, x) in x.chunks_exact(self.dim).enumerate() {
            let p = self.at(row, head);
            for (c, &x) in x.iter().enumerate() {
                // SAFETY: inside the words, by the layout; aligned, since strides are multiples of the element size.
                unsafe {
                    match self.dtype {
                        Dtype::F32 => p.cast::<f32>().add(c).write(x),
                        Dtype::F16 => p.cast::<f16>().add(c).write(f16::from_f32(x)),
                        Dtype::Bf16 => p.cast::<bf16>().add(c).write(bf16::from_f32(x)),
                    }
                }
            }
        }
    }

    fn get(&self, row: usize, head: usize, c: usize) -> f32 {
        let p = self.at(row, head);
        // SAFETY: as in `set`.
        unsafe {
            match self.dtype {
                Dtype::F32 => p.cast::<f32>().add(c).read(),
                Dtype::F16 => p.cast::<f16>().add(c).read().to_f32(),
                Dtype::Bf16 => p.cast::<bf16>().add(c).read().to_f32(),
            }
        }
    }
}

// ---- What cells hold: a plain model ----------------------------------------------------------------------------------

/// K or V of a layer: the rows that the caller wrote, and how far reading them back may be off.
struct Cells {
    width: usize,
    /// K: a scale is a channel's of a tile. V: a cell's.
    by_channel: bool,
    /// Error of a value that is stored, relative to the largest magnitude that its scale must hold.
    step: f32,
    /// `[slot][width]`.
    x: Vec<f32>,
    written: Vec<bool>,
    /// Still kept as given.
    given: Vec<bool>,
    /// `[slot][width]`: error from before the row was last encoded.
    error: Vec<f32>,
    /// Largest magnitude since the tile was empty: K `[tile][width]`, V `[slot][width]` (of the head, in all its channels).
    peak: Vec<f32>,
    dim: usize,
}

impl Cells {
    fn new(heads: usize, dim: usize, step: f32, by_channel: bool, slots: usize, tiles: usize) -> Cells {
        let width = heads * dim;
        Cells {
            width,
            by_channel,
            step,
            x: vec![0.0; slots * width],
            written: vec![false; slots],
            given: vec![false; slots],
            error: vec![0.0; slots * width],
            peak: vec![0.0; width * if by_channel { tiles } else { slots }],
            dim,
        }
    }

    fn row(&self, slot: usize) -> &[f32] {
        &self.x[slot * self.width..][..self.width]
    }

    fn peaks(&mut self, slot: usize, tile: usize) -> &mut [f32] {
        &mut self.peak[self.width * if self.by_channel { tile } else { slot }..][..self.width]
    }

    /// `cells` are those of the tile.
    fn write(&mut self, slot: usize, tile: usize, cells: std::ops::Range<usize>, row: &[f32]) {
        let (width, dim, step) = (self.width, self.dim, self.step);
        let stored: Vec<usize> =
            cells.clone().filter(|&o| self.by_channel && self.written[o] && !self.given[o]).collect();
        for c in 0..width {
            let head = c / dim * dim;
            let values = if self.by_channel { &row[c..c + 1] } else { &row[head..head + dim] };
            let magnitude = values.iter().fold(0.0, |m: f32, x| m.max(x.abs()));
            let old = self.peaks(slot, tile)[c];
            // Rows that are known as stored alone may have to be encoded again. (Scales are at least what rows need, and
            // at most what they ever needed: they may have shrunk.)
            let needed = |o: usize| self.x[o * width + c].abs();
            if !stored.is_empty() && cells.clone().all(|o| magnitude > needed(o)) {
                for &o in &stored {
                    self.error[o * width + c] += step * old.min(magnitude);
                }
            }
            let peak = &mut self.peaks(slot, tile)[c];
            *peak = peak.max(magnitude);
        }
        self.x[slot * width..][..width].copy_from_slice(row);
        self.error[slot * width..][..width].fill(0.0);
        (self.written[slot], self.given[slot]) = (true, true);
    }

    fn forget(&mut self, slot: usize) {
        let width = self.width;
        self.x[slot * width..][..width].fill(0.0);
        self.error[slot * width..][..width].fill(0.0);
        (self.written[slot], self.given[slot]) = (false, false);
    }

    /// How far channel `c` of a slot may be off when it is read back.
    fn allowed(&mut self, slot: usize, tile: usize, c: usize) -> f32 {
        if self.given[slot] || !self.written[slot] {
            return 0.0;
        }
        self.error[slot * self.width + c] + self.step * self.peaks(slot, tile)[c] + 1e-12
    }
}

#[derive(Clone, Copy, Debug)]
struct Setup {
    placement: i32,
    format: i32,
    heads: usize,
    group: usize,
    dim_k: usize,
    dim_v: usize,
    dtype_k: Dtype,
    dtype_v: Dtype,
    planes: usize,
    n_layers: usize,
    n_streams: usize,
    n_slots: usize,
    exact_head: u32,
    isa: i32,
    n_threads: i32,
    /// Rows in memory: elements between them, and heads outermost.
    gap: usize,
    heads_first: bool,
}

const SMALL: Setup = Setup {
    placement: AKV_SLOTS,
    format: AKV_FORMAT_ALIGNED,
    heads: 1,
    group: 2,
    dim_k: 16,
    dim_v: 16,
    dtype_k: Dtype::F32,
    dtype_v: Dtype::F32,
    planes: 4,
    n_layers: 1,
    n_streams: 1,
    n_slots: 300,
    exact_head: 0,
    isa: 0,
    n_threads: 0,
    gap: 0,
    heads_first: false,
};

impl Setup {
    fn n_q_heads(&self) -> usize {
        self.heads * self.group
    }

    fn tiles(&self) -> usize {
        self.n_slots.div_ceil(TILE)
    }

    fn tile(&self, slot: usize) -> usize {
        slot / self.n_slots * self.tiles() + slot % self.n_slots / TILE
    }

    /// Cells of a tile.
    fn cells(&self, tile: usize) -> std::ops::Range<usize> {
        let (start, first) = (tile / self.tiles() * self.n_slots, tile % self.tiles() * TILE);
        start + first..start + self.n_slots.min(first + TILE)
    }

    fn step(&self) -> f32 {
        match self.format {
            AKV_FORMAT_RAW => 0.0,
            _ => [6e-3, 4e-4, 3e-5][self.planes - 2] * 1.01,
        }
    }

    /// Tiles of a layer whose rows are kept as given.
    fn kept(&self) -> usize {
        (self.n_streams * self.tiles() / 16).max(2 * self.n_streams)
    }

    fn all_slots(&self) -> usize {
        self.n_streams * self.n_slots
    }

    fn shape(&self) -> akv_layer_desc {
        akv_layer_desc {
            n_q_heads: self.n_q_heads() as i32,
            n_kv_heads: self.heads as i32,
            dim_k: self.dim_k as i32,
            dim_v: self.dim_v as i32,
            dtype_k: code(self.dtype_k),
            dtype_v: code(self.dtype_v),
            planes_k: self.planes as i32,
            planes_v: self.planes as i32,
            ..zeroed()
        }
    }

    fn context(&self) -> Option<*mut akv_context> {
        let mut context = null_mut();
        let struct_size = size_of::<akv_context_desc>() as u32;
        let (abi_version, isa, n_threads) = (AKV_ABI_VERSION, self.isa, self.n_threads);
        let desc = akv_context_desc { struct_size, abi_version, isa, n_threads, ..zeroed() };
        // SAFETY: a descriptor and an output.
        match unsafe { akv_context_create(&desc, &mut context) } {
            AKV_E_UNSUPPORTED => None,
            status => {
                ok(status);
                Some(context)
            }
        }
    }
}

struct Layer {
    k: Cells,
    v: Cells,
    /// Tiles of the latest calls that wrote, and those of them whose rows are surely kept as given.
    calls: VecDeque<BTreeSet<usize>>,
    recent: BTreeSet<usize>,
    /// AKV_ATTACHED: the engine's rows.
    attached: Option<[Memory; 2]>,
}

impl Layer {
    /// What becomes of the rows in other cells when tiles are to be written: one that is reopened, or may be before its
    /// turn comes, is known as stored.
    fn open(&mut self, setup: &Setup, tiles: &BTreeSet<usize>) {
        let crowded = self.recent.union(tiles).count() > setup.kept();
        for &tile in tiles {
            if crowded || !self.recent.contains(&tile) {
                self.close(setup, tile);
            }
        }
    }

    fn close(&mut self, setup: &Setup, tile: usize) {
        for slot in setup.cells(tile) {
            (self.k.given[slot], self.v.given[slot]) = (false, false);
        }
    }

    /// What becomes of others when they have been written.
    fn wrote(&mut self, setup: &Setup, tiles: BTreeSet<usize>) {
        let before = std::mem::take(&mut self.recent);
        let either: Vec<usize> = before.union(&tiles).copied().collect();
        self.calls.push_back(tiles);
        let mut calls = 0;
        for tiles in self.calls.iter().rev() {
            let union: BTreeSet<_> = self.recent.union(tiles).copied().collect();
            if union.len() > setup.kept() {
                break;
            }
            self.recent = union;
            calls += 1;
        }
        self.calls.drain(..self.calls.len() - calls);
        for tile in either {
            if !self.recent.contains(&tile) {
                self.close(setup, tile);
            }
        }
    }
}

/// A cache, and what it should hold.
struct World {
    s: Setup,
    context: *mut akv_context,
    cache: *mut akv_cache,
    layers: Vec<Layer>,
}

impl World {
    fn new(s: Setup) -> World {
        World::try_new(s).expect("an instruction set of this machine")
    }

    /// None if the machine lacks the instruction set.
    fn try_new(s: Setup) -> Option<World> {
        let context = s.context()?;
        let shapes = vec![s.shape(); s.n_layers];
        let desc = akv_cache_desc {
            struct_size: size_of::<akv_cache_desc>() as u32,
            placement: s.placement,
            format: s.format,
            n_layers: s.n_layers as i32,
            layers: shapes.as_ptr(),
            exact_head: s.exact_head,
            n_streams: s.n_streams as u32,
            n_slots: s.n_slots as u64,
            ..zeroed()
        };
        let mut cache = null_mut();
        // SAFETY: descriptors and outputs.
        unsafe {
            ok(akv_supports(context, &desc, null(), null_mut()));
            ok(akv_cache_create(context, &desc, &mut cache));
        }
        let (slots, tiles) = (s.all_slots(), s.n_streams * s.tiles());
        let layer = |layer| {
            let attached = (s.placement == AKV_ATTACHED).then(|| {
                let k = Memory::new(slots, s.heads, s.dim_k, s.dtype_k, s.gap, s.heads_first);
                let v = Memory::new(slots, s.heads, s.dim_v, s.dtype_v, s.gap, s.heads_first);
                // SAFETY: rows of all slots, which live as long as the cache.
                ok(unsafe { akv_attach_rows(cache, layer, &k.rows, &v.rows) });
                [k, v]
            });
            Layer {
                k: Cells::new(s.heads, s.dim_k, s.step(), true, slots, tiles),
                v: Cells::new(s.heads, s.dim_v, s.step(), false, slots, tiles),
                calls: VecDeque::new(),
                recent: BTreeSet::new(),
                attached,
            }
        };
        let layers = (0..s.n_layers as i32).map(layer).collect();
        Some(World { s, context, cache, layers })
    }

    /// Writes rows `[n][heads][dim]` to slots; either of K and V may be missing.
    fn write(&mut self, layer: usize, slots: &[usize], k: Option<&[f32]>, v: Option<&[f32]>) {
        let s = self.s;
        let list: Vec<i64> = slots.iter().map(|&slot| slot as i64).collect();
        let l = &mut self.layers[layer];
        let tiles: BTreeSet<usize> = slots.iter().map(|&slot| s.tile(slot)).collect();
        l.open(&s, &tiles);
        for (i, &slot) in slots.iter().enumerate() {
            for (cells, x) in [(&mut l.k, k), (&mut l.v, v)] {
                if let Some(x) = x {
                    let row = &x[i * cells.width..][..cells.width];
                    cells.write(slot, s.tile(slot), s.cells(s.tile(slot)), row);
                    // So many tiles take turns that some may be reopened in this very call.
                    cells.given[slot] = tiles.len() <= s.kept();
                }
            }
        }
        l.wrote(&s, tiles);
        let n = slots.len() as i64;
        let status = if let Some([key, value]) = &mut l.attached {
            for &slot in slots {
                key.set(slot, l.k.row(slot));
                value.set(slot, l.v.row(slot));
            }
            // SAFETY: the slots; rows are attached.
            unsafe { akv_slots_write(self.cache, layer as i32, list.as_ptr(), n, null(), null(), null_mut()) }
        } else {
            let pack = |x: Option<&[f32]>, dim, dtype| {
                x.map(|x| {
                    let mut memory = Memory::new(slots.len(), s.heads, dim, dtype, s.gap, s.heads_first);
                    x.chunks_exact(s.heads * dim).enumerate().for_each(|(i, row)| memory.set(i, row));
                    memory
                })
            };
            let (key, value) = (pack(k, s.dim_k, s.dtype_k), pack(v, s.dim_v, s.dtype_v));
            let [key, value] = [&key, &value].map(|m| m.as_ref().map_or(null(), |m| &raw const m.rows));
            // SAFETY: the slots and as many rows.
            unsafe { akv_slots_write(self.cache, layer as i32, list.as_ptr(), n, key, value, null_mut()) }
        };
        ok(status);
    }

    /// Writes random rows, of K and V.
    fn fill(&mut self, rng: &mut Rng, layer: usize, slots: &[usize], factor: f32) {
        let (k, v) = self.random_rows(rng, slots.len(), factor);
        self.write(layer, slots, Some(&k), Some(&v));
    }

    fn random_rows(&self, rng: &mut Rng, n: usize, factor: f32) -> (Vec<f32>, Vec<f32>) {
        let mut make = |dim: usize, dtype| {
            let mut x: Vec<f32> = rng.normals(n * self.s.heads * dim).iter().map(|x| x * factor).collect();
            round(&mut x, dtype);
            x
        };
        (make(self.s.dim_k, self.s.dtype_k), make(self.s.dim_v, self.s.dtype_v))
    }

    fn some_layers(&self, layer: Option<usize>) -> (i32, std::ops::Range<usize>) {
        layer.map_or((-1, 0..self.s.n_layers), |l| (l as i32, l..l + 1))
    }

    fn invalidate(&mut self, layer: Option<usize>, first: usize, n: usize) {
        let s = self.s;
        let (code, layers) = self.some_layers(layer);
        // SAFETY: a handle.
        ok(unsafe { akv_slots_invalidate(self.cache, code, first as i64, n as i64) });
        for l in &mut self.layers[layers] {
            let mut tiles = BTreeSet::new();
            for slot in first..first + n {
                l.k.forget(slot);
                l.v.forget(slot);
                tiles.insert(s.tile(slot));
                if let Some(rows) = &mut l.attached {
                    rows[0].set(slot, &vec![f32::NAN; l.k.width]);
                    rows[1].set(slot, &vec![f32::NAN; l.v.width]);
                }
            }
            for tile in tiles {
                if !s.cells(tile).any(|slot| l.k.written[slot] || l.v.written[slot]) {
                    let slot = s.cells(tile).start;
                    l.k.peaks(slot, tile).fill(0.0);
                    s.cells(tile).for_each(|slot| l.v.peaks(slot, tile).fill(0.0));
                }
            }
        }
    }

    fn copy(&mut self, layer: Option<usize>, from: usize, to: usize, n: usize) {
        let s = self.s;
        let (code, layers) = self.some_layers(layer);
        // SAFETY: a handle.
        ok(unsafe { akv_slots_copy(self.cache, code, from as i64, to as i64, n as i64) });
        let tiles: BTreeSet<usize> = (to..to + n).map(|slot| s.tile(slot)).collect();
        for l in &mut self.layers[layers] {
            l.open(&s, &tiles);
            for i in 0..n {
                let (from, to) = (from + i, to + i);
                for cells in [&mut l.k, &mut l.v] {
                    let (source, target) = (s.tile(from), s.tile(to));
                    if !cells.written[from] {
                        cells.forget(to);
                        continue;
                    }
                    let width = cells.width;
                    let known: Vec<f32> = (0..width)
                        .map(|c| cells.error[from * width + c] + cells.step * cells.peaks(from, source)[c])
                        .collect();
                    let (row, peaks) = (cells.row(from).to_vec(), cells.peaks(from, source).to_vec());
                    cells.write(to, target, s.cells(target), &row);
                    cells.given[to] = false;
                    cells.error[to * width..][..width].copy_from_slice(&known);
                    cells.peaks(to, target).iter_mut().zip(peaks).for_each(|(p, q)| *p = p.max(q));
                }
            }
            l.wrote(&s, tiles.clone());
        }
    }

    /// Reads slots back and compares.
    fn check_rows(&mut self, layer: usize, first: usize, n: usize, told: &str) {
        let s = self.s;
        let key = Memory::new(n, s.heads, s.dim_k, Dtype::F32, s.gap, s.heads_first);
        let value = Memory::new(n, s.heads, s.dim_v, Dtype::F32, s.gap, !s.heads_first);
        // SAFETY: room for n rows.
        ok(unsafe {
            akv_slots_read(self.cache, layer as i32, first as i64, n as i64, &key.rows, &value.rows, null_mut())
        });
        let l = &mut self.layers[layer];
        for (name, cells, memory) in [("K", &mut l.k, key), ("V", &mut l.v, value)] {
            for i in 0..n {
                let slot = first + i;
                for c in 0..cells.width {
                    let (got, want) = (memory.get(i, c / cells.dim, c % cells.dim), cells.row(slot)[c]);
                    let allowed = cells.allowed(slot, s.tile(slot), c);
                    assert!(
                        (got - want).abs() <= allowed,
                        "{told}: {name} of slot {slot}, channel {c} is {got}, not {want} +- {allowed} (given: {}, written: {})",
                        cells.given[slot],
                        cells.written[slot],
                    );
                }
            }
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // SAFETY: handles; nothing that was made from them is left.
        unsafe {
            let (cache, context) = (akv_cache_destroy(self.cache), akv_context_destroy(self.context));
            assert!(std::thread::panicking() || (cache, context) == (AKV_OK, AKV_OK), "{cache} {context}: {}", text());
        }
    }
}

// ---- Attention -------------------------------------------------------------------------------------------------------

/// A mask and what it holds: `[rows][n_kv]`, as f16.
struct Mask {
    handle: *mut akv_mask,
    n_kv: usize,
    x: Vec<f32>,
}

impl Mask {
    /// Values are rounded to f16; their rows lie with gaps, and come in two calls.
    fn new(context: *mut akv_context, rows: usize, n_kv: usize, mut x: Vec<f32>) -> Mask {
        x.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32());
        let stride = n_kv + 5;
        let mut halves = vec![f16::NAN; rows * stride];
        for (halves, x) in halves.chunks_exact_mut(stride).zip(x.chunks_exact(n_kv.max(1))) {
            halves.iter_mut().zip(x).for_each(|(h, &x)| *h = f16::from_f32(x));
        }
        let mut handle = null_mut();
        // SAFETY: rows of n_kv halves each.
        unsafe {
            ok(akv_mask_create(context, rows as i64, n_kv.max(1) as i64, &mut handle));
            let set = |first: usize, n: usize| {
                let from = halves.as_ptr().add(first * stride);
                akv_mask_set(handle, first as i64, n as i64, n_kv as i64, from.cast(), 2 * stride as i64, null_mut())
            };
            ok(set(rows / 2, rows - rows / 2));
            ok(set(0, rows / 2));
        }
        Mask { handle, n_kv, x }
    }

    fn at(&self, row: usize, cell: usize) -> f32 {
        if cell < self.n_kv { self.x[row * self.n_kv + cell] } else { -INF }
    }
}

impl Drop for Mask {
    fn drop(&mut self) {
        // SAFETY: a handle.
        let status = unsafe { akv_mask_destroy(self.handle) };
        assert!(std::thread::panicking() || status == AKV_OK, "{}", text());
    }
}

const fn span(stream: i32, n_q: i32, n_kv: i64) -> akv_span {
    akv_span { stream, n_q, n_kv }
}

/// What is asked of attention.
struct Call<'a> {
    spans: &'a [akv_span],
    /// `[rows][n_q_heads][dim_k]`.
    q: Vec<f32>,
    mask: Option<&'a Mask>,
    softcap: f32,
    slopes: Option<Vec<f32>>,
    sinks: Option<Vec<f32>>,
    scale: f32,
    mode: i32,
    tolerance: f32,
}

impl<'a> Call<'a> {
    fn new(rng: &mut Rng, s: &Setup, spans: &'a [akv_span], mask: Option<&'a Mask>) -> Call<'a> {
        let rows: usize = spans.iter().map(|s| s.n_q as usize).sum();
        let q = rng.normals(rows * s.n_q_heads() * s.dim_k);
        Call { spans, q, mask, softcap: 0.0, slopes: None, sinks: None, scale: 0.0, mode: AKV_EXPECTED, tolerance: 0.0 }
    }

    fn how(&self) -> String {
        let spans: Vec<_> = self.spans.iter().map(|s| (s.stream, s.n_q, s.n_kv)).collect();
        format!(
            "spans {spans:?} mask {} softcap {} slopes {} sinks {} scale {} mode {} tolerance {}",
            self.mask.is_some(),
            self.softcap,
            self.slopes.is_some(),
            self.sinks.is_some(),
            self.scale,
            self.mode,
            self.tolerance
        )
    }
}

/// What attention wrote; all `[rows][n_q_heads]`, out times dim_v.
#[derive(Clone)]
struct Output {
    out: Vec<f32>,
    lse: Vec<f32>,
    bound: Vec<f32>,
    lse_bound: Vec<f32>,
    estimate: Vec<f32>,
    amplitude: Vec<f32>,
    stats: akv_stats,
}

impl Output {
    /// Everything of rows `from..to`, but the statistics.
    fn bits(&self, from: usize, to: usize, heads: usize, dim_v: usize) -> Vec<u32> {
        let mut bits: Vec<u32> =
            self.out[from * heads * dim_v..to * heads * dim_v].iter().map(|x| x.to_bits()).collect();
        for x in [&self.lse, &self.bound, &self.lse_bound, &self.estimate, &self.amplitude] {
            bits.extend(x[from * heads..to * heads].iter().map(|x| x.to_bits()));
        }
        bits
    }

    fn all_bits(&self, s: &Setup) -> Vec<u32> {
        self.bits(0, self.lse.len() / s.n_q_heads(), s.n_q_heads(), s.dim_v)
    }
}

unsafe extern "C" fn wait(barrier: *mut c_void) {
    // SAFETY: `attend` passes a Barrier.
    unsafe { &*barrier.cast::<Barrier>() }.wait();
}

impl World {
    /// Attends, on `nth` threads of the caller's, or (0) on this one or the context's.
    fn attend(&self, layer: usize, call: &Call, nth: usize) -> Output {
        let s = &self.s;
        let rows: usize = call.spans.iter().map(|s| s.n_q as usize).sum();
        let (heads, n) = (s.n_q_heads(), rows * s.n_q_heads());
        let nan = || vec![f32::NAN; n];
        let (lse, bound, lse_bound, estimate, amplitude) = (nan(), nan(), nan(), nan(), nan());
        let mut o =
            Output { out: vec![f32::NAN; n * s.dim_v], lse, bound, lse_bound, estimate, amplitude, stats: zeroed() };
        let mut q = Memory::new(rows, heads, s.dim_k, Dtype::F32, s.gap, s.heads_first);
        call.q.chunks_exact(heads * s.dim_k).enumerate().for_each(|(r, x)| q.set(r, x));
        let out = Memory::new(rows, heads, s.dim_v, Dtype::F32, s.gap, !s.heads_first);
        let slice = |x: &Option<Vec<f32>>| x.as_ref().map_or(null(), |x| x.as_ptr());
        let desc = akv_attention_desc {
            struct_size: size_of::<akv_attention_desc>() as u32,
            q: q.rows,
            out: out.rows,
            scale: call.scale,
            logit_softcap: call.softcap,
            tolerance: call.tolerance,
            mode: call.mode,
            alibi_slopes: slice(&call.slopes),
            sink_logits: slice(&call.sinks),
            mask: call.mask.map_or(null(), |m| m.handle),
            lse: o.lse.as_mut_ptr(),
            bound: o.bound.as_mut_ptr(),
            lse_bound: o.lse_bound.as_mut_ptr(),
            estimate: o.estimate.as_mut_ptr(),
            amplitude: o.amplitude.as_mut_ptr(),
            stats: &mut o.stats,
            ..zeroed()
        };
        let (spans, n_spans) = (call.spans.as_ptr(), call.spans.len() as i32);
        if nth == 0 {
            // SAFETY: valid descriptors, with room for all rows.
            ok(unsafe { akv_slots_attention(self.cache, layer as i32, spans, n_spans, &desc) });
        } else {
            let max_kv = call.spans.iter().map(|s| s.n_kv).max().unwrap_or(0);
            let (mut bytes, mut align) = (0, 0);
            // SAFETY: outputs.
            ok(unsafe { akv_slots_workspace(self.cache, max_kv, nth as i32, &mut bytes, &mut align) });
            // What is in it does not matter.
            let mut memory = vec![0xffu8; bytes + align];
            let workspace = memory.as_mut_ptr().wrapping_add(memory.as_ptr().align_offset(align)) as usize;
            let barrier = Barrier::new(nth);
            let (barrier, cache, spans, desc) =
                (&raw const barrier as usize, self.cache as usize, spans as usize, &raw const desc as usize);
            std::thread::scope(|scope| {
                for ith in 0..nth as i32 {
                    scope.spawn(move || {
                        let threads =
                            akv_threads { ith, nth: nth as i32, barrier: Some(wait), user: barrier as *mut c_void };
                        // SAFETY: what these point to outlives the scope; the workspace is as asked for.
                        unsafe {
                            let mut desc = (desc as *const akv_attention_desc).read();
                            desc.threads = &threads;
                            (desc.workspace, desc.workspace_bytes) = (workspace as *mut c_void, bytes);
                            let cache = cache as *mut akv_cache;
                            ok(akv_slots_attention(cache, layer as i32, spans as *const akv_span, n_spans, &desc));
                        }
                    });
                }
            });
        }
        let channels = (0..n).flat_map(|i| (0..s.dim_v).map(move |c| (i / heads, i % heads, c)));
        o.out.iter_mut().zip(channels).for_each(|(x, (row, head, c))| *x = out.get(row, head, c));
        o
    }

    /// Softmax attention in float64 of a query row over its cells: output, LSE, and A.
    fn truth(&self, layer: usize, call: &Call, span: &akv_span, row: usize, head: usize) -> (Vec<f64>, f64, f64) {
        let s = &self.s;
        let l = &self.layers[layer];
        let q = &call.q[(row * s.n_q_heads() + head) * s.dim_k..][..s.dim_k];
        let scale = if call.scale == 0.0 { 1.0 / (s.dim_k as f64).sqrt() } else { f64::from(call.scale) };
        let (cap, kv_head) = (f64::from(call.softcap), head / s.group);
        let slope = call.slopes.as_ref().map_or(1.0, |x| f64::from(x[head]));
        let mut seen = Vec::new();
        for cell in 0..span.n_kv as usize {
            let added = call.mask.map_or(0.0, |m| m.at(row, cell));
            if added == -INF {
                continue;
            }
            let slot = span.stream as usize * s.n_slots + cell;
            if !(l.k.written[slot] && l.v.written[slot]) {
                continue;
            }
            let k = &l.k.row(slot)[kv_head * s.dim_k..][..s.dim_k];
            let dot: f64 = k.iter().zip(q).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            let score = if cap > 0.0 { cap * (dot * scale / cap).tanh() } else { dot * scale };
            seen.push((slot, score + slope * f64::from(added)));
        }
        let sink = call.sinks.as_ref().map_or(f64::NEG_INFINITY, |x| f64::from(x[head]));
        let max = seen.iter().fold(sink, |m, &(_, score)| m.max(score));
        let (mut out, mut amplitude) = (vec![0.0; s.dim_v], 0.0);
        if max == f64::NEG_INFINITY {
            return (out, max, amplitude);
        }
        let sum = (sink - max).exp() + seen.iter().map(|(_, score)| (score - max).exp()).sum::<f64>();
        for (slot, score) in seen {
            let p = (score - max).exp() / sum;
            let v = &l.v.row(slot)[kv_head * s.dim_v..][..s.dim_v];
            out.iter_mut().zip(v).for_each(|(o, &v)| *o += p * f64::from(v));
            amplitude += p * v.iter().fold(0.0f64, |m, v| m.max(f64::from(v.abs())));
        }
        (out, max + sum.ln(), amplitude)
    }

    /// Attends and compares with the truth: `ratios` gets the rms error over A of every row and head, and the estimate's.
    fn check(&self, layer: usize, call: &Call, ratios: &mut Vec<(f64, f64)>, told: &str) -> Output {
        let s = &self.s;
        let o = self.attend(layer, call, 0);
        let (mut row, mut dense) = (0, 0);
        let told = || format!("{told}: layer {layer} {}", call.how());
        for span in call.spans {
            if span.n_q > 8 || call.mode == AKV_EXACT || s.format == AKV_FORMAT_RAW {
                dense += span.n_q as u64;
            }
            for _ in 0..span.n_q {
                for head in 0..s.n_q_heads() {
                    let at = row * s.n_q_heads() + head;
                    let told = || format!("{}; row {row} head {head}", told());
                    let (want, lse, amplitude) = self.truth(layer, call, span, row, head);
                    let (bound, lse_bound) = (f64::from(o.bound[at]), f64::from(o.lse_bound[at]));
                    assert!(bound >= 0.0 && bound.is_finite(), "{}: bound {bound}", told());
                    let mut squares = 0.0;
                    for (c, want) in want.iter().enumerate() {
                        let got = f64::from(o.out[at * s.dim_v + c]);
                        assert!(
                            (got - want).abs() <= bound,
                            "{}: channel {c} is {got}, not {want} +- {bound:e}",
                            told()
                        );
                        squares += (got - want).powi(2);
                    }
                    let got = f64::from(o.lse[at]);
                    let near = got == lse || (got - lse).abs() <= lse_bound;
                    assert!(near, "{}: lse {got}, not {lse} +- {lse_bound:e}", told());
                    if lse == f64::NEG_INFINITY {
                        assert!(bound < 1e-30 && o.amplitude[at] == 0.0, "{}", told());
                        row_is_zero(&o, at, s.dim_v);
                    }
                    let estimate = f64::from(o.estimate[at]);
                    assert!(estimate >= 0.0 && estimate <= bound, "{}: estimate {estimate}, bound {bound}", told());
                    let rms = (squares / s.dim_v as f64).sqrt();
                    ratios.push((rms / amplitude.max(1e-30), rms / estimate.max(1e-30)));
                }
                row += 1;
            }
        }
        assert_eq!(o.stats.dense_rows, dense, "{}", told());
        let paths =
            if dense > 0 { AKV_PATH_DENSE } else { 0 } | if row as u64 > dense { AKV_PATH_PROGRESSIVE } else { 0 };
        assert_eq!(o.stats.path & !paths, 0, "{}", told());
        o
    }
}

fn row_is_zero(o: &Output, at: usize, dim_v: usize) {
    assert!(o.out[at * dim_v..][..dim_v].iter().all(|&x| x == 0.0), "row and head {at}");
}

/// Kinds of [`mask`].
const MASKS: usize = 9;

/// What rows with `n_kv` cells may look at, and what that does to their scores.
fn mask(rng: &mut Rng, kind: usize, rows: usize, n_kv: usize) -> Vec<f32> {
    let mut x = vec![0.0; rows * n_kv];
    let density = rng.uniform().powi(2);
    let tiles: Vec<bool> = (0..n_kv.div_ceil(TILE)).map(|_| rng.below(2) == 0).collect();
    for (row, x) in x.chunks_exact_mut(n_kv.max(1)).enumerate() {
        let one = rng.below(n_kv.max(1));
        for (cell, x) in x.iter_mut().enumerate() {
            let seen = match kind {
                0 => true,
                1 => rng.uniform() < density,
                2 => tiles[cell / TILE],
                3 => tiles[cell / TILE] && rng.uniform() < density,
                4 => cell == one,
                5 => cell + rows <= n_kv + row,
                _ => rng.below(4) > 0,
            };
            *x = match kind {
                _ if !seen => -INF,
                // Distances, for ALiBi.
                6 => -(one.abs_diff(cell) as f32),
                7 => 4.0 - 12.0 * rng.uniform() as f32,
                // Where everything is far below, it is as if nothing were.
                8 => -60000.0 + 16.0 * rng.below(300) as f32,
                _ => 0.0,
            };
        }
    }
    x
}

#[test]
fn any_operations_in_any_order() {
    let mut rng = Rng::new(11);
    let cases = [
        (AKV_SLOTS, 1, 1, 40),
        (AKV_SLOTS, 2, 127, 40),
        (AKV_SLOTS, 3, 128, 60),
        (AKV_SLOTS, 1, 129, 60),
        (AKV_SLOTS, 3, 300, 90),
        (AKV_SLOTS, 2, 1000, 60),
        // More tiles than are kept as given.
        (AKV_SLOTS, 50, 200, 150),
        (AKV_ATTACHED, 1, 129, 40),
        (AKV_ATTACHED, 3, 300, 60),
        (AKV_ATTACHED, 50, 200, 90),
    ];
    for (case, (placement, n_streams, n_slots, operations)) in cases.into_iter().cycle().take(20).enumerate() {
        let format = if case >= 10 && case % 4 == 2 { AKV_FORMAT_RAW } else { AKV_FORMAT_ALIGNED };
        let placement = if format == AKV_FORMAT_RAW { AKV_SLOTS } else { placement };
        let dtypes = [Dtype::F32, Dtype::F16, Dtype::Bf16];
        let s = Setup {
            placement,
            heads: 1 + rng.below(2),
            group: 1 + rng.below(3),
            dim_k: [16, 24, 40][rng.below(3)],
            dim_v: [16, 24, 32][rng.below(3)],
            dtype_k: dtypes[rng.below(3)],
            dtype_v: dtypes[rng.below(3)],
            planes: if placement == AKV_ATTACHED || format == AKV_FORMAT_RAW { 4 } else { [4, 4, 2, 3][rng.below(4)] },
            format,
            n_layers: 2,
            n_streams,
            n_slots,
            exact_head: [0, AKV_NONE, 100][rng.below(3)],
            gap: rng.below(4),
            heads_first: rng.below(2) == 0,
            ..SMALL
        };
        let mut world = World::new(s);
        let all = s.all_slots();
        for operation in 0..operations {
            let told = format!("case {case}, operation {operation}: {s:?}");
            let layer = rng.below(2);
            let either = if rng.below(2) == 0 { None } else { Some(layer) };
            let factor = 10f32.powf(2.0 * rng.uniform() as f32 - 1.0);
            let (first, most) = (rng.below(all), 1 + rng.below(400));
            let n = most.min(all - first);
            match rng.below(12) {
                // A stretch, cells anywhere (some of them twice), whole tiles in any order, a cell in every tile.
                0..3 => world.fill(&mut rng, layer, &(first..first + n).collect::<Vec<_>>(), factor),
                3..5 => {
                    let slots: Vec<usize> = (0..n).map(|_| first + rng.below(n)).collect();
                    world.fill(&mut rng, layer, &slots, factor);
                }
                5 => {
                    let mut slots: Vec<usize> = s.cells(s.tile(first)).collect();
                    (0..slots.len()).for_each(|i| slots.swap(i, rng.below(i + 1)));
                    world.fill(&mut rng, layer, &slots, factor);
                }
                6 => {
                    let tiles = n_streams * s.tiles();
                    let slots: Vec<usize> =
                        (0..tiles).map(|tile| s.cells(tile).start + rng.below(s.cells(tile).len())).collect();
                    world.fill(&mut rng, layer, &slots, factor);
                }
                7..9 if placement == AKV_SLOTS => {
                    let slots: Vec<usize> = (0..n.min(50)).map(|_| rng.below(all)).collect();
                    let (k, v) = world.random_rows(&mut rng, slots.len(), factor);
                    if rng.below(2) == 0 {
                        world.write(layer, &slots, Some(&k), None);
                    } else {
                        world.write(layer, &slots, None, Some(&v));
                    }
                }
                9 => world.invalidate(either, first, n),
                10 => world.invalidate(either, s.cells(s.tile(first)).start, s.cells(s.tile(first)).len()),
                11 if placement == AKV_SLOTS && all > 1 => {
                    // Tile on tile, or cells anywhere.
                    let aligned = rng.below(2) == 0;
                    let start = |slot: usize| if aligned { s.cells(s.tile(slot)).start } else { slot };
                    let (from, to) = (start(first), start(rng.below(all)));
                    let n = most.min(from.abs_diff(to)).min(all - from.max(to));
                    world.copy(either, from, to, n);
                }
                _ => {}
            }
            if placement == AKV_SLOTS && operation % 5 == 0 {
                let (first, n) = if operation % 20 == 0 { (0, all) } else { (first, n) };
                world.check_rows(layer, first, n, &told);
            }
            if operation % 3 == 0 {
                let mut one = |most_q| {
                    let n_kv = [n_slots, 1 + rng.below(n_slots)][rng.below(2)] as i64;
                    span(rng.below(n_streams) as i32, 1 + rng.below(most_q) as i32, n_kv)
                };
                let spans = [one(3), one(10)];
                let (rows, n_kv) = ((spans[0].n_q + spans[1].n_q) as usize, spans[0].n_kv.max(spans[1].n_kv) as usize);
                let kind = rng.below(6);
                let x = mask(&mut rng, kind, rows, n_kv);
                let mask = Mask::new(world.context, rows, n_kv, x);
                let masked = rng.below(3) > 0;
                let mut call = Call::new(&mut rng, &s, &spans, masked.then_some(&mask));
                call.mode = rng.below(3) as i32;
                call.tolerance = 10f32.powf(-1.0 - 3.0 * rng.uniform() as f32);
                world.check(layer, &call, &mut Vec::new(), &told);
            }
        }
        for layer in 0..2 {
            if placement == AKV_SLOTS {
                world.check_rows(layer, 0, all, &format!("case {case}, at last: {s:?}"));
            }
        }
    }
}

#[test]
fn a_write_that_fails_writes_nothing() {
    let mut rng = Rng::new(12);
    let s = Setup { n_streams: 2, heads: 2, ..SMALL };
    let mut world = World::new(s);
    world.fill(&mut rng, 0, &(0..450).collect::<Vec<_>>(), 1.0);
    let spans = [span(0, 1, 300), span(1, 9, 300)];
    let call = Call::new(&mut rng, &s, &spans, None);
    let before = world.attend(0, &call, 0).all_bits(&s);
    let (k, v) = world.random_rows(&mut rng, 3, 100.0);
    for (bad, status) in [(f32::NAN, AKV_E_NONFINITE), (-INF, AKV_E_NONFINITE), (1e11, AKV_E_RANGE)] {
        for in_key in [false, true] {
            let (mut k, mut v) = (k.clone(), v.clone());
            *(if in_key { &mut k } else { &mut v }).last_mut().unwrap() = bad;
            let pack = |x: &[f32], dim| {
                let mut memory = Memory::new(3, s.heads, dim, Dtype::F32, 0, false);
                x.chunks_exact(s.heads * dim).enumerate().for_each(|(i, row)| memory.set(i, row));
                memory
            };
            let (k, v) = (pack(&k, s.dim_k), pack(&v, s.dim_v));
            // The bad row is the last one, and also where a later row hides it.
            for slots in [[5, 200, 599], [5, 599, 5]] {
                // SAFETY: three slots, three rows.
                let got = unsafe { akv_slots_write(world.cache, 0, slots.as_ptr(), 3, &k.rows, &v.rows, null_mut()) };
                assert_eq!(got, status, "{}", text());
                assert!(text().contains(if in_key { "key" } else { "value" }), "{}", text());
            }
        }
    }
    for slots in [[5i64, 200, 600], [5, -1, 3]] {
        let (k, v) = (
            Memory::new(3, s.heads, s.dim_k, Dtype::F32, 0, false),
            Memory::new(3, s.heads, s.dim_v, Dtype::F32, 0, false),
        );
        // SAFETY: three slots, three rows.
        let got = unsafe { akv_slots_write(world.cache, 0, slots.as_ptr(), 3, &k.rows, &v.rows, null_mut()) };
        assert!(got == AKV_E_ARGUMENT && text().contains("slots["), "{}", text());
    }
    world.check_rows(0, 0, 600, "after failed writes");
    assert_eq!(world.attend(0, &call, 0).all_bits(&s), before);
}

#[test]
fn attention_over_cells() {
    let mut rng = Rng::new(13);
    let dims = [16, 40, 64, 72, 80, 96, 128, 192, 256];
    let (mut relative, mut calibrated) = (Vec::new(), Vec::new());
    for case in 0..200 {
        let (placement, format) = [
            (AKV_SLOTS, AKV_FORMAT_ALIGNED),
            (AKV_ATTACHED, AKV_FORMAT_ALIGNED),
            (AKV_SLOTS, [AKV_FORMAT_ALIGNED, AKV_FORMAT_RAW][case % 2]),
        ][rng.below(3)];
        let s = Setup {
            placement,
            format,
            heads: 1 + rng.below(2),
            group: [1, 2, 3, 5, 7, 8][rng.below(6)],
            dim_k: dims[case % 9],
            dim_v: dims[if case % 2 == 0 { case % 9 } else { rng.below(9) }],
            dtype_k: [Dtype::F32, Dtype::F16][rng.below(2)],
            dtype_v: [Dtype::F32, Dtype::F16][rng.below(2)],
            n_streams: 3,
            n_slots: [1, 100, 127, 128, 129, 300, 300, 600][rng.below(8)],
            exact_head: [0, AKV_NONE, 30][rng.below(3)],
            gap: rng.below(3),
            heads_first: rng.below(2) == 0,
            ..SMALL
        };
        let mut world = World::new(s);
        // All of the first stream, most of the second, nothing of the third.
        let mut slots: Vec<usize> = (0..2 * s.n_slots).filter(|&slot| slot < s.n_slots || rng.below(5) > 0).collect();
        (0..slots.len()).for_each(|i| slots.swap(i, rng.below(i + 1)));
        for slots in slots.chunks(1 + rng.below(slots.len())) {
            world.fill(&mut rng, 0, slots, 1.0);
        }
        for round in 0..3 {
            let spans: Vec<akv_span> = (0..1 + rng.below(3))
                .map(|_| {
                    let n_kv = [s.n_slots, s.n_slots, rng.below(s.n_slots + 1)][rng.below(3)];
                    let stream = [0, 0, 1, 1, 2][rng.below(5)];
                    span(stream, [1, 1, 3, 8, 9, 33][rng.below(6)], n_kv as i64)
                })
                .collect();
            let rows: usize = spans.iter().map(|s| s.n_q as usize).sum();
            let n_kv = spans.iter().map(|s| s.n_kv as usize).max().unwrap();
            let kind = rng.below(MASKS + 1);
            // A mask may know fewer cells than there are, and more.
            let known = [n_kv, n_kv, n_kv + 40, n_kv][rng.below(4)];
            let x = if kind < MASKS { mask(&mut rng, kind, rows, known) } else { Vec::new() };
            let mask = (kind < MASKS).then(|| Mask::new(world.context, rows, known, x));
            let mut call = Call::new(&mut rng, &s, &spans, mask.as_ref());
            let peaked = [1.0, 1.0, 4.0][rng.below(3)];
            call.q.iter_mut().for_each(|x| *x *= peaked);
            call.mode = [AKV_EXPECTED, AKV_EXPECTED, AKV_GUARANTEED, AKV_EXACT][rng.below(4)];
            call.tolerance =
                [0.1, 0.3, 1e-2, 1e-3, 1e-4, 0.0][rng.below(if call.mode == AKV_GUARANTEED { 2 } else { 6 })];
            call.softcap = [0.0, 0.0, 30.0, 2.0][rng.below(4)];
            let heads = s.n_q_heads();
            call.slopes = (mask.is_some() && rng.below(3) == 0)
                .then(|| (0..heads).map(|h| 2f32.powf(-8.0 * (h + 1) as f32 / heads as f32)).collect());
            call.sinks = (rng.below(3) == 0).then(|| rng.normals(heads).iter().map(|x| 3.0 * x).collect());
            let told = format!("case {case}, round {round}: {s:?} mask {kind} of {known}");
            let mut ratios = Vec::new();
            let o = world.check(0, &call, &mut ratios, &told);
            let tolerance = f64::from(if call.tolerance == 0.0 { 1e-3 } else { call.tolerance });
            for (at, &(error, of_estimate)) in ratios.iter().enumerate() {
                let told = || format!("{told} {}: row and head {at}", call.how());
                let (bound, amplitude) = (o.bound[at], o.amplitude[at]);
                match call.mode {
                    AKV_GUARANTEED => assert!(
                        bound <= 1.0001 * call.tolerance * amplitude + 1e-12,
                        "{}: bound {bound:e}, A {amplitude}",
                        told()
                    ),
                    // As 16 bits are, unless scores are so large that binary32 rounds them.
                    AKV_EXACT if kind != 8 => {
                        assert!(error <= 3e-4, "{}: rms error {error:e} of A", told());
                        assert!(bound <= 0.05 * amplitude + 1e-12, "{}: bound {bound:e}, A {amplitude}", told());
                    }
                    _ => {
                        relative.push(error / (tolerance + 5e-5));
                        // An estimate is of digits, not of such rounding.
                        if kind != 8 && f64::from(o.estimate[at]) > 1e-5 * f64::from(amplitude) {
                            calibrated.push(of_estimate);
                        }
                    }
                }
            }
        }
    }
    relative.sort_by(f64::total_cmp);
    calibrated.sort_by(f64::total_cmp);
    let at = |x: &[f64], share: f64| x[((x.len() - 1) as f64 * share) as usize];
    println!(
        "{} rows; rms error / (tolerance A): median {:.3}, p99 {:.3}, largest {:.3}; / estimate: median {:.2}, p99 {:.2}",
        relative.len(),
        at(&relative, 0.5),
        at(&relative, 0.99),
        at(&relative, 1.0),
        at(&calibrated, 0.5),
        at(&calibrated, 0.99)
    );
    assert!(at(&relative, 0.99) < 1.5 && at(&relative, 1.0) < 5.0);
    assert!((0.2..1.5).contains(&at(&calibrated, 0.5)) && at(&calibrated, 0.99) < 4.0);
}

/// Whoever computes them, the bits are the same; and a row's do not depend on the other spans of its call.
#[test]
fn the_bits_do_not_depend_on_who_computes_them() {
    for placement in [AKV_SLOTS, AKV_ATTACHED] {
        let mut want: Option<Vec<Output>> = None;
        for (isa, n_threads) in [(AKV_ISA_SCALAR, 0), (AKV_ISA_AVX2, 0), (AKV_ISA_AVX512, 0), (0, 3)] {
            let mut rng = Rng::new(14);
            let (dim_k, dim_v, dtype_k) = (72, 40, Dtype::F16);
            let s = Setup {
                placement,
                heads: 2,
                group: 3,
                dim_k,
                dim_v,
                dtype_k,
                n_streams: 2,
                n_slots: 1200,
                isa,
                n_threads,
                ..SMALL
            };
            let Some(mut world) = World::try_new(s) else { continue };
            let slots: Vec<usize> = (0..s.all_slots()).filter(|_| rng.below(8) > 0).collect();
            world.fill(&mut rng, 0, &slots, 1.0);
            let spans = [span(0, 1, 1200), span(1, 12, 1100), span(0, 3, 5), span(1, 8, 1200)];
            let mut got = Vec::new();
            for kind in [1, 3, 7] {
                let x = mask(&mut rng, kind, 24, 1200);
                let mask = Mask::new(world.context, 24, 1200, x);
                for mode in [AKV_EXPECTED, AKV_GUARANTEED, AKV_EXACT] {
                    let mut call = Call::new(&mut rng, &s, &spans, Some(&mask));
                    (call.mode, call.tolerance) = (mode, if mode == AKV_GUARANTEED { 0.1 } else { 0.0 });
                    (call.softcap, call.sinks) =
                        (if kind == 7 { 20.0 } else { 0.0 }, (kind == 3).then(|| rng.normals(6)));
                    let o = world.attend(0, &call, 0);
                    for nth in 1..=4 {
                        assert_eq!(
                            world.attend(0, &call, nth).all_bits(&s),
                            o.all_bits(&s),
                            "{nth} threads, {}",
                            call.how()
                        );
                    }
                    let (mut row, width) = (0, s.n_q_heads() * s.dim_k);
                    for span in &spans {
                        let n = span.n_q as usize;
                        let mask = Mask::new(world.context, n, 1200, mask.x[row * 1200..(row + n) * 1200].to_vec());
                        let q = call.q[row * width..(row + n) * width].to_vec();
                        let sinks = call.sinks.clone();
                        let alone = Call {
                            spans: std::slice::from_ref(span),
                            q,
                            mask: Some(&mask),
                            sinks,
                            slopes: None,
                            ..call
                        };
                        let bits = world.attend(0, &alone, 0).all_bits(&s);
                        assert_eq!(bits, o.bits(row, row + n, s.n_q_heads(), dim_v), "row {row} alone, {}", call.how());
                        row += n;
                    }
                    got.push(o);
                }
            }
            let want = want.get_or_insert_with(|| got.clone());
            for (i, (got, want)) in got.iter().zip(want.iter()).enumerate() {
                assert_eq!(got.all_bits(&s), want.all_bits(&s), "isa {isa}, {n_threads} threads, call {i}");
            }
        }
    }
}

/// What is in tiles that a row does not see does not change a bit, however large it is; and hidden cells among visible
/// ones do no more than coarsen their tile's scales, which the certificate knows.
#[test]
fn hidden_cells_do_not_matter() {
    let mut rng = Rng::new(15);
    for placement in [AKV_SLOTS, AKV_ATTACHED] {
        let s = Setup { placement, heads: 2, n_streams: 2, n_slots: 900, dim_k: 64, dim_v: 48, ..SMALL };
        for n_q in [1, 8, 9] {
            for kind in [2, 3] {
                let mut world = World::new(s);
                world.fill(&mut rng, 0, &(0..s.all_slots()).collect::<Vec<_>>(), 1.0);
                let spans = [span(1, n_q, 900), span(0, 1, 900)];
                let mut x = mask(&mut rng, kind, n_q as usize + 1, 900);
                // The tiles from 256 on and the last, unfinished one stay hidden, whatever came out.
                x.chunks_exact_mut(900).for_each(|x| {
                    x[256..512].fill(-INF);
                    x[896..].fill(-INF);
                    x[0] = 0.0;
                });
                let mask = Mask::new(world.context, n_q as usize + 1, 900, x.clone());
                for mode in [AKV_EXPECTED, AKV_GUARANTEED, AKV_EXACT] {
                    let mut call = Call::new(&mut rng, &s, &spans, Some(&mask));
                    (call.mode, call.tolerance) = (mode, 0.1);
                    let told = format!("{placement} n_q {n_q} kind {kind}");
                    let before = world.check(0, &call, &mut Vec::new(), &told);
                    let tiles: BTreeSet<usize> = (0..900)
                        .filter(|&cell| (0..n_q as usize + 1).any(|row| mask.at(row, cell) != -INF))
                        .map(|cell| cell / TILE)
                        .collect();
                    let hidden: Vec<usize> =
                        (0..s.all_slots()).filter(|slot| !tiles.contains(&(slot % 900 / TILE))).collect();
                    assert!(!hidden.is_empty());
                    let loud: Vec<usize> = hidden.iter().copied().filter(|_| rng.below(3) == 0).collect();
                    world.fill(&mut rng, 0, &loud, if placement == AKV_SLOTS { 1e9 } else { 1e6 });
                    assert_eq!(world.attend(0, &call, 0).all_bits(&s), before.all_bits(&s), "{told}: {}", call.how());
                    world.invalidate(None, 256, 256);
                    assert_eq!(world.attend(0, &call, 0).all_bits(&s), before.all_bits(&s), "{told}: {}", call.how());
                    // Among visible cells.
                    let seen = |slot: usize| (0..n_q as usize + 1).any(|row| mask.at(row, slot % 900) != -INF);
                    let among: Vec<usize> =
                        (0..s.all_slots()).filter(|&slot| !seen(slot) && rng.below(20) == 0).collect();
                    world.fill(&mut rng, 0, &among, 30.0);
                    world.check(0, &call, &mut Vec::new(), &told);
                }
            }
        }
    }
}

#[test]
fn rows_that_see_nothing() {
    let mut rng = Rng::new(16);
    for placement in [AKV_SLOTS, AKV_ATTACHED] {
        let s = Setup { placement, heads: 2, ..SMALL };
        let mut world = World::new(s);
        world.fill(&mut rng, 0, &(0..250).collect::<Vec<_>>(), 1.0);
        // Rows that were never set, rows that hide all, no cells at all, and for comparison one that sees something.
        let mut handle = null_mut();
        // SAFETY: an output, and rows of 300 cells.
        unsafe {
            ok(akv_mask_create(world.context, 40, 300, &mut handle));
            let zeros = vec![f16::ZERO; 300];
            let hidden = vec![f16::NEG_INFINITY; 300];
            ok(akv_mask_set(handle, 1, 1, 300, hidden.as_ptr().cast(), 0, null_mut()));
            ok(akv_mask_set(handle, 2, 1, 7, zeros.as_ptr().cast(), 0, null_mut()));
            ok(akv_mask_set(handle, 3, 1, 0, zeros.as_ptr().cast(), 0, null_mut()));
        }
        let mut x = vec![-INF; 40 * 300];
        x[600..607].fill(0.0);
        let mask = Mask { handle, n_kv: 300, x };
        for mode in [AKV_EXPECTED, AKV_GUARANTEED, AKV_EXACT] {
            for spans in
                [vec![span(0, 5, 300)], vec![span(0, 20, 300)], vec![span(0, 5, 0), span(0, 0, 300), span(0, 12, 0)]]
            {
                for sinks in [None, Some(vec![0.0, -3.5, 80.0, -90.0])] {
                    for mask in [Some(&mask), None] {
                        let mut call = Call::new(&mut rng, &s, &spans, mask);
                        (call.mode, call.sinks) = (mode, sinks.clone());
                        let o = world.check(0, &call, &mut Vec::new(), "nothing");
                        let mut row = 0;
                        for span in &spans {
                            for _ in 0..span.n_q {
                                let sees = span.n_kv > 0 && (mask.is_none() || row == 2);
                                for head in 0..4 {
                                    let at = row * 4 + head;
                                    if !sees {
                                        row_is_zero(&o, at, s.dim_v);
                                        assert_eq!(o.lse[at], sinks.as_ref().map_or(-INF, |x| x[head]));
                                        assert!(
                                            o.bound[at] < 1e-30
                                                && o.amplitude[at] == 0.0
                                                && o.estimate[at] <= o.bound[at]
                                        );
                                    }
                                }
                                row += 1;
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The same sequence in AKV_APPEND, one query row of which sees all: what attention over `n` tokens gives.
fn appended(world: &World, n: usize, call: &Call) -> Output {
    let s = &world.s;
    let (shape, struct_size) = (s.shape(), size_of::<akv_cache_desc>() as u32);
    let desc = akv_cache_desc { struct_size, n_layers: 1, layers: &shape, exact_head: s.exact_head, ..zeroed() };
    let bounds = akv_batch_desc { struct_size: size_of::<akv_batch_desc>() as u32, ..zeroed() };
    let n_q = call.q.len() / (s.n_q_heads() * s.dim_k);
    let (mut cache, mut batch, mut sequence) = (null_mut(), null_mut(), 0);
    let (mut k, mut v) =
        (Memory::new(n, s.heads, s.dim_k, s.dtype_k, 0, false), Memory::new(n, s.heads, s.dim_v, s.dtype_v, 0, false));
    for slot in 0..n {
        k.set(slot, world.layers[0].k.row(slot));
        v.set(slot, world.layers[0].v.row(slot));
    }
    let nan = vec![f32::NAN; n_q * s.n_q_heads()];
    let mut o = Output {
        out: vec![f32::NAN; nan.len() * s.dim_v],
        lse: nan.clone(),
        bound: nan.clone(),
        lse_bound: nan.clone(),
        estimate: nan.clone(),
        amplitude: nan,
        stats: zeroed(),
    };
    let rows = |data: *const f32| akv_rows { data: data.cast_mut().cast(), dtype: AKV_F32, ..zeroed() };
    let desc_of = akv_attention_desc {
        struct_size: size_of::<akv_attention_desc>() as u32,
        q: rows(call.q.as_ptr()),
        out: rows(o.out.as_mut_ptr()),
        visibility: AKV_FULL,
        mode: call.mode,
        tolerance: call.tolerance,
        logit_softcap: call.softcap,
        sink_logits: call.sinks.as_ref().map_or(null(), |x| x.as_ptr()),
        lse: o.lse.as_mut_ptr(),
        bound: o.bound.as_mut_ptr(),
        lse_bound: o.lse_bound.as_mut_ptr(),
        estimate: o.estimate.as_mut_ptr(),
        amplitude: o.amplitude.as_mut_ptr(),
        stats: &mut o.stats,
        ..zeroed()
    };
    // SAFETY: valid descriptors, with room for all rows.
    unsafe {
        ok(akv_cache_create(world.context, &desc, &mut cache));
        ok(akv_batch_create(cache, &bounds, &mut batch));
        ok(akv_sequence_create(cache, &mut sequence));
        let (n_new, n_q) = (n as i32, n_q as i32);
        let step = akv_batch_desc { n_sequences: 1, sequences: &sequence, n_new: &n_new, n_q: &n_q, ..bounds };
        ok(akv_batch_begin(batch, &step, null_mut()));
        ok(akv_quantize_kv(batch, 0, &k.rows, &v.rows, null_mut()));
        ok(akv_aligned_attention(batch, 0, &desc_of));
        ok(akv_batch_commit(batch));
        ok(akv_batch_destroy(batch));
        ok(akv_cache_destroy(cache));
    }
    o
}

/// Whole tiles, whose cells were all written, are as if they had been appended: in any order, also after other rows.
#[test]
fn whole_tiles_are_as_if_appended() {
    let mut rng = Rng::new(17);
    for (case, exact_head) in [0, AKV_NONE, 7, 128, 0, AKV_NONE].into_iter().enumerate() {
        let planes = [4, 4, 3, 2][rng.below(4)];
        let s = Setup {
            heads: 2,
            dim_k: 40,
            dim_v: 24,
            dtype_k: Dtype::F16,
            planes,
            exact_head,
            n_slots: 500,
            n_streams: 2,
            ..SMALL
        };
        let mut world = World::new(s);
        let n = 384;
        for again in 0..3 {
            let mut tiles = [0, 1, 2];
            (0..3).for_each(|i| tiles.swap(i, rng.below(i + 1)));
            for tile in tiles {
                // Louder rows that are overwritten before the tile is whole.
                if case >= 4 {
                    let loud: Vec<usize> = (0..100).map(|i| tile * TILE + i).collect();
                    world.fill(&mut rng, 0, &loud, 50.0);
                }
                let mut slots: Vec<usize> = (tile * TILE..(tile + 1) * TILE).collect();
                (0..TILE).for_each(|i| slots.swap(i, rng.below(i + 1)));
                for slots in slots.chunks([1, 128, 50, 7][rng.below(4)]) {
                    world.fill(&mut rng, 0, slots, 1.0);
                }
            }
            // Scales only grow while a tile is written to: others take its place.
            if case >= 4 {
                assert!(s.tiles() >= s.kept());
                let others: Vec<usize> = (0..s.tiles()).map(|tile| s.n_slots + tile * TILE).collect();
                world.fill(&mut rng, 0, &others, 1.0);
            }
            for n_q in [1, 8, 9] {
                for mode in [AKV_EXPECTED, AKV_GUARANTEED, AKV_EXACT] {
                    let spans = [span(0, n_q, n)];
                    let mut call = Call::new(&mut rng, &s, &spans, None);
                    (call.mode, call.tolerance) = (mode, 0.05);
                    call.softcap = [0.0, 20.0][rng.below(2)];
                    call.sinks = (rng.below(2) == 0).then(|| rng.normals(s.n_q_heads()));
                    let got = world.check(0, &call, &mut Vec::new(), "as if appended");
                    let want = appended(&world, n as usize, &call);
                    let told = format!("exact_head {exact_head}, planes {planes}, time {again}: {}", call.how());
                    assert_eq!(got.all_bits(&s), want.all_bits(&s), "{told}");
                    assert_eq!(
                        (got.stats.bytes_k, got.stats.bytes_v),
                        (want.stats.bytes_k, want.stats.bytes_v),
                        "{told}"
                    );
                    // A mask that hides nothing is none.
                    let mask = Mask::new(world.context, n_q as usize, n as usize, vec![0.0; n_q as usize * n as usize]);
                    call.mask = Some(&mask);
                    assert_eq!(world.attend(0, &call, 0).all_bits(&s), want.all_bits(&s), "with a mask, {told}");
                }
            }
        }
    }
}

/// Beside an index the engine's rows need not be read in full.
#[test]
fn attached_rows_are_read_in_part() {
    let mut rng = Rng::new(18);
    for dtype in [Dtype::F16, Dtype::F32] {
        let s = Setup {
            placement: AKV_ATTACHED,
            dtype_k: dtype,
            dtype_v: dtype,
            dim_k: 64,
            dim_v: 64,
            n_slots: 2000,
            ..SMALL
        };
        let mut world = World::new(s);
        world.fill(&mut rng, 0, &(0..2000).collect::<Vec<_>>(), 1.0);
        let spans = [span(0, 1, 2000)];
        let mut call = Call::new(&mut rng, &s, &spans, None);
        // Most tokens have little weight.
        call.q.iter_mut().for_each(|x| *x *= 5.0);
        call.tolerance = 1e-2;
        let o = world.check(0, &call, &mut Vec::new(), "attached");
        let bits = |o: &Output| 8.0 * (o.stats.bytes_k + o.stats.bytes_v) as f64 / (o.stats.tokens * 128) as f64;
        println!("{dtype:?}: {:.2} bits", bits(&o));
        assert!(bits(&o) < 8.0 * dtype.size() as f64 * 0.75, "{} bits", bits(&o));
        assert_eq!(o.stats.tokens, 2000);
        // Half of them hidden: less is read.
        let x: Vec<f32> = (0..2000).map(|cell| if cell < 1024 { -INF } else { 0.0 }).collect();
        let mask = Mask::new(world.context, 1, 2000, x);
        call.mask = Some(&mask);
        let half = world.check(0, &call, &mut Vec::new(), "attached, half of it");
        assert!(half.stats.bytes_k < o.stats.bytes_k * 6 / 10, "{} of {}", half.stats.bytes_k, o.stats.bytes_k);
    }
}

/// Other rows, or the same ones named again: what had been written is forgotten until it is written anew.
#[test]
fn naming_rows_forgets_what_was_written() {
    let mut rng = Rng::new(19);
    let s = Setup { placement: AKV_ATTACHED, heads: 2, ..SMALL };
    let mut world = World::new(s);
    world.fill(&mut rng, 0, &(0..300).collect::<Vec<_>>(), 1.0);
    let [k, v] = world.layers[0].attached.as_ref().unwrap();
    // SAFETY: the same rows.
    ok(unsafe { akv_attach_rows(world.cache, 0, &k.rows, &v.rows) });
    for slot in 0..300 {
        let l = &mut world.layers[0];
        l.k.forget(slot);
        l.v.forget(slot);
        l.attached.as_mut().unwrap()[0].set(slot, &vec![f32::NAN; l.k.width]);
    }
    let spans = [span(0, 2, 300), span(0, 10, 299)];
    let call = Call::new(&mut rng, &s, &spans, None);
    world.check(0, &call, &mut Vec::new(), "forgotten");
    world.fill(&mut rng, 0, &(100..250).collect::<Vec<_>>(), 2.0);
    world.check(0, &call, &mut Vec::new(), "written anew");
}

/// All memory is taken when the cache is made, and given back with it.
#[test]
fn writing_takes_no_memory() {
    let mut rng = Rng::new(20);
    for placement in [AKV_SLOTS, AKV_ATTACHED] {
        let s = Setup { placement, n_layers: 2, n_streams: 3, n_slots: 1000, ..SMALL };
        let mut world = World::new(s);
        let usage = |world: &World| {
            let mut usage = akv_usage { struct_size: size_of::<akv_usage>() as u32, ..zeroed() };
            // SAFETY: an output.
            ok(unsafe { akv_cache_usage(world.cache, &mut usage) });
            usage.bytes_reserved
        };
        let before = usage(&world);
        assert!(before > 0);
        for layer in 0..2 {
            for _ in 0..10 {
                let slots: Vec<usize> = (0..500).map(|_| rng.below(3000)).collect();
                world.fill(&mut rng, layer, &slots, 1.0);
            }
        }
        world.invalidate(None, 100, 2000);
        assert_eq!(usage(&world), before);
    }
}

/// Rows that are copied carry the error of where they come from, whatever they come to lie among.
#[test]
fn copied_rows_are_known_as_they_were() {
    let mut rng = Rng::new(21);
    for planes in [4, 2] {
        for exact_head in [AKV_NONE, 20] {
            let s = Setup { planes, exact_head, dim_k: 32, n_slots: 1000, n_streams: 2, ..SMALL };
            let mut world = World::new(s);
            // Small rows under the scales of a large one, known as stored once other tiles have been written.
            world.fill(&mut rng, 0, &(128..256).collect::<Vec<_>>(), 1.0);
            world.fill(&mut rng, 0, &[130], 1e4);
            world.fill(&mut rng, 0, &(384..1000).collect::<Vec<_>>(), 1.0);
            // Among rows of their size, alone, and with others after them.
            world.copy(None, 140, 1140, 100);
            world.copy(None, 150, 1005, 10);
            world.fill(&mut rng, 0, &(1240..1400).collect::<Vec<_>>(), 1.0);
            world.copy(None, 1140, 1700, 50);
            for again in 0..40 {
                let spans = [span(1, 1, 1000), span(1, 9, 1000)];
                let x = (0..10 * 1000)
                    .map(|i| [i % 1000 / 10 == 14 + again % 10, i % 1000 < 20, i % 1000 / 10 == 70][again % 3])
                    .map(|seen| if seen && rng.below(3) == 0 { 0.0 } else { -INF })
                    .collect();
                let mask = Mask::new(world.context, 10, 1000, x);
                let mut call = Call::new(&mut rng, &s, &spans, Some(&mask));
                call.q.iter_mut().for_each(|x| *x *= 10.0);
                (call.mode, call.tolerance) = ([AKV_EXACT, AKV_GUARANTEED][again % 2], 0.1);
                world.check(0, &call, &mut Vec::new(), &format!("planes {planes}, exact_head {exact_head}, {again}"));
            }
            world.check_rows(0, 1000, 1000, "copied");
        }
    }
}

/// One cell per query row, and one channel of K or all of V: nothing hides an error.
fn check_worst(world: &World, rng: &mut Rng, slots: std::ops::Range<usize>, told: &str) {
    let s = &world.s;
    let key = Memory::new(slots.len(), s.heads, s.dim_k, Dtype::F32, 0, false);
    let value = Memory::new(slots.len(), s.heads, s.dim_v, Dtype::F32, 0, false);
    let (first, n) = (slots.start as i64, slots.len() as i64);
    // SAFETY: room for n rows.
    ok(unsafe { akv_slots_read(world.cache, 0, first, n, &key.rows, &value.rows, null_mut()) });
    let stream = slots.start / s.n_slots;
    let n_kv = slots.end - stream * s.n_slots;
    let l = &world.layers[0];
    let worst = |memory: &Memory, cells: &Cells, c: usize| {
        let error = |slot: usize| (memory.get(slot - slots.start, 0, c) - cells.row(slot)[c]).abs();
        slots.clone().max_by(|&a, &b| error(a).total_cmp(&error(b))).unwrap() - stream * s.n_slots
    };
    let n_q = s.dim_k + s.dim_v;
    let spans = [span(stream as i32, n_q as i32, n_kv as i64)];
    let mut x = vec![-INF; n_q * n_kv];
    let mut call = Call::new(rng, s, &spans, None);
    call.q.fill(0.0);
    for c in 0..s.dim_k {
        x[c * n_kv + worst(&key, &l.k, c)] = 0.0;
        (0..s.n_q_heads()).for_each(|h| call.q[(c * s.n_q_heads() + h) * s.dim_k + c] = 5.0);
    }
    for c in 0..s.dim_v {
        x[(s.dim_k + c) * n_kv + worst(&value, &l.v, c)] = 0.0;
    }
    let mask = Mask::new(world.context, n_q, n_kv, x);
    call.mask = Some(&mask);
    for mode in [AKV_EXACT, AKV_EXPECTED] {
        call.mode = mode;
        world.check(0, &call, &mut Vec::new(), told);
    }
}

/// What is encoded twice is off by the sum of both errors, and the bounds say so.
#[test]
fn bounds_hold_where_errors_add_up() {
    let mut rng = Rng::new(22);
    for planes in [4, 3, 2] {
        for growth in [1.15f32, 1.3, 2.0] {
            let s = Setup { planes, exact_head: AKV_NONE, n_slots: 1300, n_streams: 2, ..SMALL };
            let mut world = World::new(s);
            let others: Vec<usize> = (256..1300).collect();
            // Peaks of V rows at the limit of a scale: as stored, they may fit a smaller one.
            let limit = PEAK * scale(128);
            let (k, mut v) = world.random_rows(&mut rng, 256, 1.0);
            for row in v.chunks_exact_mut(s.dim_v) {
                row.iter_mut().for_each(|x| *x = x.clamp(-2.0, 2.0) * limit / 4.0);
                row[rng.below(s.dim_v)] = limit * (1.0 + s.step() / 2.0 * rng.uniform() as f32);
            }
            world.write(0, &(0..256).collect::<Vec<_>>(), Some(&k), Some(&v));
            world.fill(&mut rng, 0, &others, 1.0);
            let told = format!("planes {planes}, growth {growth}");
            for time in 0..4 {
                world.copy(None, 3, 1300 + 1 + 300 * time, 250);
                check_worst(&world, &mut rng, 1301 + 300 * time..1551 + 300 * time, &format!("{told}: copied, {time}"));
                check_worst(&world, &mut rng, 0..256, &format!("{told}: {time}"));
                // Each channel outgrows its scale.
                let peak: Vec<f32> = (0..s.dim_k)
                    .map(|c| growth * (0..128).fold(0.0f32, |m, slot| m.max(world.layers[0].k.row(slot)[c].abs())))
                    .collect();
                world.write(0, &[time], Some(&peak), None);
                world.fill(&mut rng, 0, &others, 1.0);
            }
        }
    }
}
