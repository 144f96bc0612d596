//! The CUDA kernels on the CPU (`kernels/host`), against the format, the alignment and the CPU backend. AKV_KERNELS_HOST
//! names the library that `make test-kernels` builds; blocks and warps go in many orders.

mod common;

use alignedkv::backend::cpu::Isa;
use alignedkv::backend::cuda::params::{Append, AttendParams, EncodeParams, Fault, QueryRow, Stats, View};
use alignedkv::backend::cuda::{self, Workspace, params};
use alignedkv::backend::{self, Mask, Mode};
use alignedkv::cache::{Allocator, Hands, Job, Memory, SequenceView, SlotLayer};
use alignedkv::format::{CENTRE, Dtype, Format, Layout, Rows, Shape, Source, TILE, aligned, scale};
use common::*;
use half::f16;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::Mutex;

type Launch = unsafe extern "C" fn(*const c_char, *const u32, u32, u32, *const c_void, u64, u64) -> c_int;

/// The kernels, one launch at a time.
struct Device {
    launch: Launch,
    sanitized: bool,
    error: unsafe extern "C" fn() -> *const c_char,
}

static DEVICE: Mutex<Option<Device>> = Mutex::new(None);

impl Device {
    fn load() -> Device {
        let path = std::env::var("AKV_KERNELS_HOST").expect("AKV_KERNELS_HOST: make test-kernels sets it");
        let path = CString::new(path).unwrap();
        // SAFETY: a library of ours, and its functions as kernels/host/runner.cpp declares them.
        unsafe {
            let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
            assert!(!library.is_null(), "{path:?} cannot be loaded");
            let find = |name: &CStr| {
                let symbol = libc::dlsym(library, name.as_ptr());
                assert!(!symbol.is_null(), "{name:?} is missing");
                symbol
            };
            let sanitized: unsafe extern "C" fn() -> c_int = std::mem::transmute(find(c"akv_host_sanitized"));
            Device {
                sanitized: sanitized() != 0,
                launch: std::mem::transmute::<*mut c_void, Launch>(find(c"akv_host_launch")),
                error: std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> *const c_char>(find(
                    c"akv_host_error",
                )),
            }
        }
    }
}

fn load() {
    DEVICE.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert_with(Device::load);
}

/// Runs a kernel on addresses of host memory.
fn launch<P>(
    name: &str,
    grid: [usize; 3],
    threads: u32,
    shared_bytes: usize,
    params: &P,
    seed: u64,
) -> Result<(), String> {
    load();
    let device = DEVICE.lock().unwrap_or_else(|e| e.into_inner());
    let device = device.as_ref().unwrap();
    let (name, grid) = (CString::new(name).unwrap(), grid.map(|n| n as u32));
    // SAFETY: parameters of the kernel's type; what they point to is the caller's claim.
    unsafe {
        let bytes = size_of::<P>() as u64;
        let params = (&raw const *params).cast();
        match (device.launch)(name.as_ptr(), grid.as_ptr(), threads, shared_bytes as u32, params, bytes, seed) {
            0 => Ok(()),
            _ => Err(CStr::from_ptr((device.error)()).to_string_lossy().into_owned()),
        }
    }
}

fn address<T>(x: &[T]) -> u64 {
    x.as_ptr() as u64
}

fn rows_of(rows: &Rows) -> params::Rows {
    rows.into()
}

/// Zeroed bytes that start on a cache line, nothing after them: sanitizers notice what goes beyond.
struct Aligned {
    start: *mut u8,
    bytes: usize,
}

impl Aligned {
    fn layout(bytes: usize) -> std::alloc::Layout {
        std::alloc::Layout::from_size_align(bytes, 64).unwrap()
    }

    fn new(bytes: usize) -> Aligned {
        // SAFETY: not empty.
        let start = unsafe { std::alloc::alloc_zeroed(Aligned::layout(bytes)) };
        assert!(bytes > 0 && !start.is_null());
        Aligned { start, bytes }
    }

    fn copy(from: &[u8]) -> Aligned {
        let mut copy = Aligned::new(from.len());
        copy.get_mut().copy_from_slice(from);
        copy
    }

    fn get(&self) -> &[u8] {
        // SAFETY: our own memory.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }

    fn get_mut(&mut self) -> &mut [u8] {
        // SAFETY: our own memory.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated like this.
        unsafe { std::alloc::dealloc(self.start, Aligned::layout(self.bytes)) };
    }
}

const DIMS: [usize; 9] = [16, 40, 64, 80, 96, 128, 192, 200, 256];
const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

/// A tile that grows in steps, some of them after it was reopened, is the CPU's byte for byte after each.
#[test]
fn encoded_bytes() {
    let mut rng = Rng::new(1);
    for case in 0..60 {
        let (dk, dv) = (DIMS[case % 9], DIMS[rng.below(9)]);
        let mut s = shape(1, 1 + rng.below(3), dk, dv, DTYPES[rng.below(3)], 2 + rng.below(3));
        s.dtype_v = DTYPES[rng.below(3)];
        let layout = Layout::new(Format::Aligned, s);
        let skip = [0, 0, 4, 128][rng.below(4)];
        let mut made = case_rows(&mut rng, case, &s);
        round(&mut made.0, s.dtype_k);
        round(&mut made.1, s.dtype_v);
        let (k, v) =
            (Packed::new(&made.0, s.n_kv_heads, dk, s.dtype_k), Packed::new(&made.1, s.n_kv_heads, dv, s.dtype_v));
        let mut page = Aligned::new(layout.page_bytes());
        let mut kept = Aligned::new(layout.kept_bytes(TILE));
        let head = Aligned::new(layout.kept_bytes(skip.max(1)));
        let (mut want, mut want_kept) = (Aligned::new(page.bytes), Aligned::new(kept.bytes));
        let (mut base, mut base_rows) = (None::<Aligned>, 0);
        let mut from = 0;
        while from < TILE {
            let to = if rng.below(3) == 0 { TILE } else { (from + 1 + rng.below(60)).min(TILE) };
            // What only the page knows from here on: a tile that was closed, and cut.
            if base.is_none() && from > skip && rng.below(4) == 0 {
                let copy = Aligned::copy(want.get());
                layout.reopen(want.get_mut());
                layout.reopen(page.get_mut());
                (base, base_rows) = (Some(copy), from);
                // Nobody may read these.
                let (k, v) = kept.get_mut().split_at_mut(layout.kept_bytes(TILE) / 2);
                k.fill(0xff);
                v.fill(0xff);
            }
            for row in from..to {
                layout.keep(want_kept.get_mut(), TILE, row, k.rows().skip(row), v.rows().skip(row));
            }
            let source = Source { k: k.rows(), v: v.rows(), base: base.as_ref().map(|base| base.get()), base_rows };
            layout.encode(want.get_mut(), &source, skip, from, to);

            let mut fault = [Fault::default()];
            let append = [Append {
                page: address(page.get()),
                kept: address(kept.get()),
                head: if skip > 0 { address(head.get()) } else { 0 },
                base: base.as_ref().map_or(0, |base| address(base.get())),
                source: from as i64,
                from: from as i32,
                to: to as i32,
                base_rows: base_rows as i32,
                exact_head: skip as i32,
                ..Append::default()
            }];
            let call = EncodeParams {
                shape: (&layout).into(),
                k: rows_of(&k.rows()),
                v: rows_of(&v.rows()),
                appends: address(&append),
                fault: fault.as_mut_ptr() as u64,
                ..EncodeParams::default()
            };
            let grid = [1, s.n_kv_heads, 1];
            launch("akv_encode", grid, cuda::ENCODE_THREADS, cuda::ENCODE_SHARED_BYTES, &call, rng.next()).unwrap();
            let told = format!("case {case}: {s:?} skip {skip} {from}..{to} base {base_rows}");
            assert_eq!(fault[0].status, 0, "{told}");
            let differs = page.get().iter().zip(want.get()).position(|(a, b)| a != b);
            assert_eq!(differs, None, "{told}: of {}", page.bytes);
            let (got_k, got_v) = layout.kept(kept.get(), TILE);
            let (want_k, want_v) = layout.kept(want_kept.get(), TILE);
            for row in from..to {
                for h in 0..s.n_kv_heads {
                    assert_eq!(got_k.bytes(row, h), want_k.bytes(row, h), "{told}");
                    assert_eq!(got_v.bytes(row, h), want_v.bytes(row, h), "{told}");
                    if row < skip {
                        let (exact_k, exact_v) = layout.kept(head.get(), skip);
                        assert_eq!(exact_k.bytes(row, h), want_k.bytes(row, h), "{told}");
                        assert_eq!(exact_v.bytes(row, h), want_v.bytes(row, h), "{told}");
                    }
                }
            }
            from = to;
        }
    }
}

/// Rows of a tile that make scales grow late, early, or not at all.
fn case_rows(rng: &mut Rng, case: usize, s: &Shape) -> (Vec<f32>, Vec<f32>) {
    let (mut k, mut v) = (rng.normals(TILE * s.n_kv_heads * s.dim_k), rng.normals(TILE * s.n_kv_heads * s.dim_v));
    let row = s.n_kv_heads * s.dim_k;
    for (i, x) in k.iter_mut().enumerate() {
        *x *= match case % 4 {
            0 => (1 + i / row) as f32,
            1 if i % 97 == 0 => 300.0,
            2 => 0.0,
            _ => 1.0,
        };
    }
    for (i, x) in v.iter_mut().enumerate() {
        *x *= if case.is_multiple_of(5) { 10f32.powi(-((i / s.dim_v) as i32 % 12)) } else { 1.0 };
    }
    (k, v)
}

/// What cannot be stored is a fault that names the row and head, and leaves numbers behind.
#[test]
fn faults_of_rows() {
    let s = shape(1, 2, 64, 64, Dtype::F32, 4);
    let layout = Layout::new(Format::Aligned, s);
    let mut rng = Rng::new(9);
    for (bad, status) in
        [(f32::NAN, params::FAULT_NONFINITE), (f32::NEG_INFINITY, params::FAULT_NONFINITE), (1e30, params::FAULT_RANGE)]
    {
        for value in [false, true] {
            let (mut k, mut v) = (rng.normals(10 * 128), rng.normals(10 * 128));
            let rows = if value { &mut v } else { &mut k };
            rows[7 * 128 + 64 + 5] = bad;
            let (k, v) = (Packed::new(&k, 2, 64, Dtype::F32), Packed::new(&v, 2, 64, Dtype::F32));
            let (page, mut fault) = (Aligned::new(layout.page_bytes()), [Fault::default()]);
            let append = [Append { page: address(page.get()), id: 9, tile: 3, to: 10, ..Append::default() }];
            let call = EncodeParams {
                shape: (&layout).into(),
                k: rows_of(&k.rows()),
                v: rows_of(&v.rows()),
                appends: address(&append),
                fault: fault.as_mut_ptr() as u64,
                layer: 5,
                reserved: 0,
            };
            launch("akv_encode", [1, 2, 1], cuda::ENCODE_THREADS, cuda::ENCODE_SHARED_BYTES, &call, 0).unwrap();
            let Fault { status: found, sequence, row, layer, head, place, .. } = fault[0];
            let found = (found, sequence, row, layer, head, place);
            assert_eq!(found, (status, 9, 3 * 128 + 7, 5, 1, u32::from(value)));
            let (mut out_k, mut out_v) = ([0.0; 64], [0.0; 64]);
            layout.decode(page.get(), 1, 7, &mut out_k, &mut out_v);
            assert_eq!(if value { out_v[5] } else { out_k[5] }, 0.0);
        }
    }
}

/// Does on the CPU, by the kernels, what a device is given.
fn run_job(job: &Job, seed: u64) -> alignedkv::Result<()> {
    let heads = |shape: &params::Shape| shape.n_kv_heads as usize;
    match job {
        Job::Write(call, n) => {
            let grid = [*n, heads(&call.shape), 1];
            launch("akv_write", grid, cuda::ENCODE_THREADS, cuda::ENCODE_SHARED_BYTES, *call, seed).unwrap();
        }
        Job::Read(call) => {
            launch("akv_dequantize", [call.n as usize, heads(&call.shape), 1], 64, 0, *call, seed).unwrap();
        }
        Job::Adopt(call) => {
            let grid = [1, heads(&call.shape), 1];
            launch("akv_adopt", grid, cuda::ENCODE_THREADS, cuda::CELLS_SHARED_BYTES, *call, seed).unwrap();
        }
        // SAFETY: blocks of the cells, which do not overlap.
        Job::Copy { to, from, bytes } => unsafe {
            std::ptr::copy_nonoverlapping(*from as *const u8, *to as *mut u8, *bytes);
        },
    }
    Ok(())
}

/// Cells that are written in any order, overwritten, forgotten and copied are the CPU's byte for byte after every call, and
/// are read back as the CPU reads them.
#[test]
fn cells() {
    let mut rng = Rng::new(12);
    let mut reopened = 0;
    for case in 0..28 {
        let (dk, dv) = (DIMS[case % 9], DIMS[rng.below(9)]);
        let mut s = shape(1, 1 + rng.below(2), dk, dv, DTYPES[rng.below(3)], 2 + rng.below(3));
        s.dtype_v = DTYPES[rng.below(3)];
        let is_index = case % 4 == 3;
        let layout = if is_index { Layout::index(s) } else { Layout::new(Format::Aligned, s) };
        let (n_streams, n_slots) = (1 + rng.below(2), [50, 300, 128, 640][rng.below(4)]);
        let (all, exact_head) = (n_streams * n_slots, [0, 4, 30][rng.below(3)]);
        let memory = [(); 2].map(|()| Memory::new(Allocator::default(), 0));
        let mut layers =
            [0, 1].map(|i| SlotLayer::new(&memory[i], 0, layout, n_streams, n_slots, exact_head, is_index).unwrap());
        // The engine's own rows, for all slots.
        let rows = |rng: &mut Rng, n: usize, scale: f32| {
            let mut make = |heads: usize, dim: usize, dtype: Dtype| {
                let mut x: Vec<f32> = rng.normals(n * heads * dim).iter().map(|x| x * scale).collect();
                round(&mut x, dtype);
                Packed::new(&x, heads, dim, dtype)
            };
            [make(s.n_kv_heads, dk, s.dtype_k), make(s.n_kv_heads, dv, s.dtype_v)]
        };
        let own = rows(&mut rng, all, 1.0);
        if is_index {
            for layer in &mut layers {
                // SAFETY: rows of all slots, which live longer than the layers are used.
                let own =
                    own.each_ref().map(|rows| unsafe { std::mem::transmute::<Rows<'_>, Rows<'static>>(rows.rows()) });
                layer.attach(own[0], own[1]);
            }
        }
        for step in 0..24 {
            let told =
                format!("case {case}: {s:?} index {is_index} {n_streams} x {n_slots} head {exact_head} step {step}");
            let work = |layer: &mut SlotLayer, seeds: &mut Rng, on_device: bool| {
                let mut launch = |job: &Job| run_job(job, seeds.next());
                let mut hands = if on_device { Hands::Device(&mut launch) } else { Hands::Host };
                let mut rng = Rng::new((100 * case + step) as u64);
                let n = 1 + rng.below(all);
                let first = rng.below(all - n + 1);
                match rng.below(8) {
                    0 => layer.invalidate(first, n),
                    1 if !is_index && all > 1 => {
                        // Whole tiles of another stream, or any.
                        let n = 1 + rng.below(all / 2);
                        let (from, to) = match n_streams {
                            2 if rng.below(2) == 0 => (0, n_slots),
                            _ => (rng.below(all / 2 - n + 1), all / 2 + rng.below(all.div_ceil(2) - n + 1)),
                        };
                        let n = n.min(to.abs_diff(from));
                        let mut spare = layer.spare_row().unwrap();
                        layer.copy(from, to, n, &mut spare, &mut hands).unwrap();
                    }
                    kind => {
                        let n = [1, 3, 40, n][rng.below(4)].min(all);
                        let start = rng.below(all - n + 1);
                        // A stretch, or anywhere, some more than once.
                        let slots: Vec<i64> =
                            (0..n).map(|i| if kind < 5 { start + i } else { rng.below(all) } as i64).collect();
                        let scale = 10f32.powi(rng.below(3) as i32);
                        let x = rows(&mut rng, n, scale);
                        let (k, v) = [(true, true), (true, false), (false, true)][rng.below(3)];
                        let (k, v) = (k.then_some(x[0].rows()), v.then_some(x[1].rows()));
                        let (k, v) = if is_index { (None, None) } else { (k, v) };
                        layer.write(&slots, k, v, &mut hands).unwrap();
                    }
                }
            };
            work(&mut layers[0], &mut rng, false);
            work(&mut layers[1], &mut rng, true);
            let [host, device] = &layers;
            for stream in 0..n_streams {
                let (a, b) = (host.view(stream, n_slots), device.view(stream, n_slots));
                assert_eq!(a.n_exact, b.n_exact, "{told}");
                for tile in 0..n_slots.div_ceil(TILE) {
                    let differs = a.page(tile).iter().zip(b.page(tile)).position(|(a, b)| a != b);
                    assert_eq!(differs, None, "{told} stream {stream} tile {tile} of {}", a.page(tile).len());
                    assert_eq!(a.written(tile), b.written(tile), "{told}");
                    let slack =
                        alignedkv::format::aligned::Tile::new(&layout.shape, layout.part(a.page(tile), 0)).meta.slack;
                    reopened += usize::from(slack > 0.0 && a.written(tile) != 0);
                }
            }
            if is_index || step % 4 != 3 {
                continue;
            }
            let packed = |dim: usize| vec![f32::NAN; all * s.n_kv_heads * dim];
            let (mut k, mut v) = (packed(dk), packed(dv));
            let into = |x: &mut Vec<f32>, dim: usize| params::Rows {
                data: x.as_mut_ptr() as u64,
                stride_row: (4 * s.n_kv_heads * dim) as i64,
                stride_head: (4 * dim) as i64,
                ..params::Rows::default()
            };
            let (to_k, to_v) = (into(&mut k, dk), into(&mut v, dv));
            device.read_on_device(0, all, Some(to_k), Some(to_v), &mut |job| run_job(job, 1)).unwrap();
            let (mut want_k, mut want_v) = (vec![0.0; dk], vec![0.0; dv]);
            for (slot, head) in (0..all).flat_map(|slot| (0..s.n_kv_heads).map(move |head| (slot, head))) {
                host.read(slot, head, &mut want_k, &mut want_v);
                let at = slot * s.n_kv_heads + head;
                assert_eq!(&k[at * dk..][..dk], &want_k[..], "{told} slot {slot}");
                assert_eq!(&v[at * dv..][..dv], &want_v[..], "{told} slot {slot}");
            }
        }
    }
    assert!(reopened > 100, "only {reopened} tiles had lost anything");
}

/// Rows `[token][head]` of K and V, of a kind each head, as the layer's dtypes hold them; and a row of q.
fn rows_of_kind(rng: &mut Rng, kind: usize, n: usize, s: &Shape) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let (d, dv) = (s.dim_k, s.dim_v);
    let (mut k, mut v) = (Vec::new(), Vec::new());
    let cases: Vec<Case> = (0..s.n_kv_heads).map(|_| common::case(rng, kind, n, d, dv, s.group())).collect();
    for row in 0..n {
        cases.iter().for_each(|c| k.extend_from_slice(&c.k[row * d..(row + 1) * d]));
        cases.iter().for_each(|c| v.extend_from_slice(&c.v[row * dv..(row + 1) * dv]));
    }
    round(&mut k, s.dtype_k);
    round(&mut v, s.dtype_v);
    (k, v, cases.iter().flat_map(|c| c.q.iter().copied()).collect())
}

/// Cells that are hidden, stretches of them, and what is added to the others.
fn random_mask(rng: &mut Rng, n_rows: usize, n: usize) -> Mask {
    let kinds = [0xfc00, 0, 0, 0, f16::from_f32(-1.5).to_bits(), f16::from_f32(2.25).to_bits()];
    let rows: Vec<Vec<u16>> = (0..n_rows)
        .map(|_| {
            let (kinds, gone) = (&kinds[..4 + 2 * rng.below(2)], rng.below(n));
            (0..n)
                .map(|i| if i / 200 == gone / 200 && i > 0 { 0xfc00 } else { kinds[rng.below(kinds.len())] })
                .collect()
        })
        .collect();
    let mut mask = Mask::new(n_rows, n).unwrap();
    mask.set(0, rows.iter().map(|row| &row[..])).unwrap();
    mask
}

/// Decode attention by the kernels: as the CPU backend, and within its bound of float64.
#[test]
fn attention() {
    let cpu = cpu(Isa::best(), 1);
    let mut rng = Rng::new(4);
    let (mut alike, mut calls) = (0, 0);
    for case in 0..120 {
        let (d, dv) = (DIMS[case % 9], DIMS[rng.below(9)]);
        let (g, kv_heads) = ([1, 2, 3, 4, 5, 8, 12, 16, 24][rng.below(9)], 1 + rng.below(2));
        let n = [1, 2, 127, 128, 129, 1 + rng.below(600), 1020 + rng.below(10), 2300][case % 8];
        let s = shape(g, kv_heads, d, dv, DTYPES[rng.below(3)], 2 + rng.below(3));
        let kind = if case % 3 == 0 { rng.below(KINDS) } else { 0 };
        let (k, v, mut q) = rows_of_kind(&mut rng, kind, n, &s);
        let more: Vec<f32> = rng.normals(q.len()).iter().map(|x| 2.0 * x).collect();
        q.extend(more);
        let run = Single::new(Format::Aligned, s, [0, 4, 30][rng.below(3)]);
        // In steps: what an open tile holds is attended too.
        let cut = rng.below(n + 1);
        for (a, b) in [(0, cut), (cut, n)] {
            if a < b {
                run.append(&k[a * kv_heads * d..b * kv_heads * d], &v[a * kv_heads * dv..b * kv_heads * dv]);
            }
        }
        let ranges = [(0, n), (rng.below(n), rng.below(n + 1))];
        let how = How {
            mode: [Mode::Expected, Mode::Guaranteed][rng.below(2)],
            tolerance: 10f32.powf(-1.0 - 3.0 * rng.uniform() as f32),
            scale: 1.0 / (d as f32).sqrt(),
            dense: false,
        };
        let sinks: Vec<f32> = rng.normals(s.n_q_heads);
        let masked = (rng.below(3) == 0).then(|| random_mask(&mut rng, 2, n));
        let bent = Bent {
            softcap: if rng.below(3) == 0 { 5.0 } else { 0.0 },
            sinks: (rng.below(3) == 0).then_some(&sinks[..]),
            mask: masked.as_ref(),
            slopes: None,
        };
        let told = format!("case {case}: kind {kind} g {g} d {d} dv {dv} n {n} {:?} {ranges:?} {how:?}", s.dtype_k);
        let want = match run.attend_bent(&cpu, &q, &ranges, how, bent) {
            Ok(want) => want,
            Err(_) => continue,
        };
        let rows = query_rows(&ranges, false);
        let (got, stats) = attend(&run, &q, &rows, how, bent, rng.next());
        let (again, _) = attend(&run, &q, &rows, how, bent, rng.next());
        assert_eq!(bits(&got), bits(&again), "{told}: depends on the order");
        calls += 1;
        let same = stats.planes_k == want.stats.planes_k && stats.planes_v == want.stats.planes_v;
        let tokens: u64 = stats.planes_k.iter().sum();
        // A larger group decides in parts.
        let parts = g.div_ceil(cuda::UNIT_HEADS) as u64;
        assert_eq!(stats.tokens, tokens, "{told}");
        assert_eq!(tokens, parts * want.stats.planes_k.iter().sum::<u64>(), "{told}");
        assert_eq!(stats.tokens + stats.tokens_exact, parts * want.stats.tokens, "{told}");
        alike += usize::from(same || g > cuda::UNIT_HEADS);
        for (row, &(from, to)) in ranges.iter().enumerate() {
            for head in 0..s.n_q_heads {
                let (at, kv_head) = (row * s.n_q_heads + head, head / g);
                let near = |a: f32, b: f32, most: f32| a == b || (a - b).abs() <= most;
                let amplitude = want.amplitude[at];
                assert!(
                    near(got.lse[at], want.lse[at], got.lse_bound[at] + want.lse_bound[at]),
                    "{told}: {} {}",
                    got.lse[at],
                    want.lse[at]
                );
                if from >= to && bent.sinks.is_none() && bent.mask.is_none() {
                    assert_eq!((got.lse[at], got.bound[at]), (f32::NEG_INFINITY, 0.0), "{told}");
                }
                if same {
                    assert!(
                        near(got.lse[at], want.lse[at], 2e-5 * (1.0 + want.lse[at].abs())),
                        "{told}: {} {}",
                        got.lse[at],
                        want.lse[at]
                    );
                    // Sums of V on tensor cores may round more.
                    for (a, b, unit, what) in [
                        (got.bound[at], want.bound[at], 80.0 * amplitude, "bound"),
                        (got.lse_bound[at], want.lse_bound[at], 1.0, "lse_bound"),
                        (got.estimate[at], want.estimate[at], amplitude, "estimate"),
                        (got.amplitude[at], want.amplitude[at], amplitude, "amplitude"),
                    ] {
                        assert!(near(a, b, 2e-3 * b.abs() + 1e-6 * unit), "{told}: {what} {a} {b}");
                    }
                }
                let out = &got.out[at * dv..(at + 1) * dv];
                if same {
                    let other = &want.out[at * dv..(at + 1) * dv];
                    let error = out.iter().zip(other).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
                    assert!(error <= 3e-5 * amplitude, "{told}: {error:e} of {amplitude:e}");
                }
                if from >= to || bent.softcap > 0.0 || bent.sinks.is_some() || bent.mask.is_some() {
                    continue;
                }
                let (k, v) = (of_head(&k, kv_heads, d, kv_head), of_head(&v, kv_heads, dv, kv_head));
                let q = &q[at * d..(at + 1) * d];
                let (truth, lse) =
                    attention64(q, &k[from * d..to * d], &v[from * dv..to * dv], dv, f64::from(how.scale));
                let error = out.iter().zip(&truth).fold(0.0f64, |m, (&a, b)| m.max((f64::from(a) - b).abs()));
                assert!(error <= f64::from(got.bound[at]), "{told}: error {error:e}, bound {:e}", got.bound[at]);
                assert!((f64::from(got.lse[at]) - lse).abs() <= f64::from(got.lse_bound[at]), "{told}");
            }
        }
    }
    assert!(calls > 90 && 20 * alike >= 19 * calls, "{alike} of {calls} read the same digits as the CPU");
}

/// Flat attention over values with a mean, which nobody but one token reads more of, and windows that begin inside of a tile.
#[test]
fn means_and_windows() {
    let mut rng = Rng::new(12);
    for (case, &from) in [0, 1, 127, 500, 773, 900, 1100, 1500, 2000, 2700].iter().enumerate() {
        let (n, d, mean) = (3000, [64, 128][case % 2], [0.5, 4.0, 64.0, 1000.0, 3e4][case % 5]);
        let s = shape(4, 1, d, d, Dtype::F16, 4);
        let (mut k, mut q) = (vec![0.0f32; n * d], vec![0.0; 4 * d]);
        k[2800 * d] = 30.0;
        q.iter_mut().step_by(d).for_each(|x| *x = 8.0);
        let mut v: Vec<f32> = rng.normals(n * d).iter().map(|x| mean + 0.1 * x).collect();
        round(&mut v, Dtype::F16);
        let run = Single::new(Format::Aligned, s, 4);
        run.append(&k, &v);
        let how = How { mode: Mode::Expected, tolerance: 1e-2, scale: 1.0 / (d as f32).sqrt(), dense: false };
        for seed in 0..6 {
            let (got, _) = attend(&run, &q, &query_rows(&[(from, n)], false), how, Bent::default(), seed);
            for head in 0..4 {
                let (truth, _) =
                    attention64(&q[head * d..][..d], &k[from * d..], &v[from * d..], d, f64::from(how.scale));
                let out = &got.out[head * d..][..d];
                let error = out.iter().zip(&truth).fold(0.0f64, |m, (&a, b)| m.max((f64::from(a) - b).abs()));
                assert!(
                    error <= f64::from(got.bound[head]) && error <= 0.02 * f64::from(mean),
                    "from {from}, mean {mean}: {error:e}"
                );
            }
        }
    }
}

/// Dense attention by the kernels: as the CPU backend, within its bound of float64, as exact as what is stored; whatever
/// the other rows.
#[test]
fn dense_attention() {
    let cpu = cpu(Isa::best(), 1);
    let mut rng = Rng::new(14);
    for case in 0..36 {
        let (d, dv) = (DIMS[case % 9], DIMS[rng.below(9)]);
        let (g, kv_heads) = ([1, 2, 3, 4, 5, 8, 12, 16, 24][rng.below(9)], 1 + rng.below(2));
        let n = [1, 127, 129, 1 + rng.below(400), 1020 + rng.below(10), 1 + rng.below(130)][case % 6];
        let format = [Format::Aligned, Format::Raw, Format::Aligned, Format::Published][rng.below(4)];
        let planes = if case % 2 == 0 || format != Format::Aligned { 4 } else { 2 + rng.below(3) };
        let dtype = if format == Format::Published { Dtype::F16 } else { DTYPES[rng.below(3)] };
        let s = shape(g, kv_heads, d, dv, dtype, planes);
        let kind = if case % 3 == 0 { rng.below(KINDS) } else { 0 };
        let (k, v, first_q) = rows_of_kind(&mut rng, kind, n, &s);
        let run = Single::new(format, s, [0, 4, 30][rng.below(3)]);
        let cut = rng.below(n + 1);
        for (a, b) in [(0, cut), (cut, n)] {
            if a < b {
                run.append(&k[a * kv_heads * d..b * kv_heads * d], &v[a * kv_heads * dv..b * kv_heads * dv]);
            }
        }
        // A prompt's end with a window or without, and any ranges.
        let n_rows = [1 + rng.below(12), 1 + rng.below(150 / g)][rng.below(2)];
        let window = 1 + rng.below(2 * n);
        let ranges: Vec<(usize, usize)> = (0..n_rows)
            .map(|i| match case % 4 {
                0 => (rng.below(n), rng.below(n + 1)),
                _ => {
                    let to = (n + i + 1).saturating_sub(n_rows).max(1);
                    (to.saturating_sub(window), to)
                }
            })
            .collect();
        let mut q = first_q;
        q.extend(rng.normals((n_rows - 1) * s.n_q_heads * d).iter().map(|x| 2.0 * x));
        let mode = [Mode::Exact, Mode::Expected][rng.below(2)];
        let how = How { mode, tolerance: 1e-3, scale: 1.0 / (d as f32).sqrt(), dense: true };
        let sinks: Vec<f32> = rng.normals(s.n_q_heads);
        let masked = (rng.below(3) == 0).then(|| random_mask(&mut rng, n_rows, n));
        let bent = Bent {
            softcap: if rng.below(3) == 0 { 5.0 } else { 0.0 },
            sinks: (rng.below(3) == 0).then_some(&sinks[..]),
            mask: masked.as_ref(),
            slopes: None,
        };
        let told = format!(
            "case {case}: {format:?} kind {kind} g {g} d {d} dv {dv} n {n} rows {n_rows} {:?} {how:?}",
            s.dtype_k
        );
        let Ok(want) = run.attend_bent(&cpu, &q, &ranges, how, bent) else { continue };
        let rows = query_rows(&ranges, true);
        let (got, stats) = attend(&run, &q, &rows, how, bent, rng.next());
        let parts = g.div_ceil(cuda::UNIT_HEADS) as u64;
        assert_eq!(stats.planes_k, want.stats.planes_k.map(|n| parts * n), "{told}");
        assert_eq!(stats.planes_v, want.stats.planes_v.map(|n| parts * n), "{told}");
        assert_eq!(stats.tokens + stats.tokens_exact, parts * want.stats.tokens, "{told}");
        let bytes = if format == Format::Aligned { [0; 2] } else { [want.stats.bytes_k, want.stats.bytes_v] };
        assert_eq!([stats.bytes_k, stats.bytes_v], bytes.map(|n| parts * n), "{told}");
        assert_eq!((stats.rows, stats.means), ([0, n_rows as u64, 0], 0), "{told}");
        if bent.mask.is_none() {
            // In two launches, and beside rows of another sequence, dense and (unless all are) not.
            let (cut, [per_q, per_out]) = (rng.below(n_rows), [d, dv].map(|d| s.n_q_heads * d));
            let mut halves = [&rows[..cut], &rows[cut..]].map(<[_]>::to_vec);
            let other = QueryRow { sequence: 1, dense: i32::from(format == Format::Raw), ..rows[0] };
            halves[0].push(other);
            halves[1].extend([QueryRow { dense: 1, ..other }, QueryRow { dense: 2, ..other }]);
            let q_of =
                [[&q[..cut * per_q], &q[..per_q]].concat(), [&q[cut * per_q..], &q[..per_q], &q[..per_q]].concat()];
            let of = |i: usize| attend(&run, &q_of[i], &halves[i], how, bent, 7 + i as u64).0;
            let (a, b) = (of(0), of(1));
            let whole = |x: &[f32], y: &[f32], per: usize| {
                [&x[..cut * per], &y[..(n_rows - cut) * per]].concat().iter().map(|x| x.to_bits()).collect::<Vec<_>>()
            };
            let of_call = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(whole(&a.out, &b.out, per_out), of_call(&got.out), "{told}: depends on other rows");
            assert_eq!(whole(&a.bound, &b.bound, s.n_q_heads), of_call(&got.bound), "{told}: depends on other rows");
            assert_eq!(whole(&a.lse, &b.lse, s.n_q_heads), of_call(&got.lse), "{told}: depends on other rows");
        } else {
            let (again, _) = attend(&run, &q, &rows, how, bent, rng.next());
            assert_eq!(bits(&got), bits(&again), "{told}: depends on the order");
        }
        let (mut squares, mut norm) = (0.0, 0.0);
        for (at, &(from, to)) in ranges.iter().flat_map(|range| std::iter::repeat_n(range, s.n_q_heads)).enumerate() {
            let near = |a: f32, b: f32, most: f32| a == b || (a - b).abs() <= most;
            let (amplitude, kv_head) = (want.amplitude[at], at % s.n_q_heads / g);
            assert!(near(got.lse[at], want.lse[at], 2e-5 * (1.0 + want.lse[at].abs()) + got.lse_bound[at]), "{told}");
            for (a, b, what) in
                [(got.estimate[at], want.estimate[at], "estimate"), (got.amplitude[at], amplitude, "amplitude")]
            {
                assert!(near(a, b, 2e-3 * b.abs() + 1e-6 * amplitude), "{told}: {what} {a} {b}");
            }
            // Tensor cores round more, the largest of all rows counts, not of those seen: the bound says so.
            assert!(
                got.bound[at] >= 0.99 * want.bound[at]
                    && (kind != 0 || got.bound[at] <= 12.0 * want.bound[at] + 1e-4 * amplitude),
                "{told}: bound {} {}",
                got.bound[at],
                want.bound[at]
            );
            let out = &got.out[at * dv..(at + 1) * dv];
            for (a, b) in out.iter().zip(&want.out[at * dv..]) {
                assert!((a - b).abs() <= 3e-5 * amplitude + 0.1 * got.bound[at], "{told}: {a} {b} of {amplitude:e}");
            }
            if from >= to || bent.softcap > 0.0 || bent.sinks.is_some() || bent.mask.is_some() {
                continue;
            }
            let (k, v) = (of_head(&k, kv_heads, d, kv_head), of_head(&v, kv_heads, dv, kv_head));
            let (truth, lse) = attention64(
                &q[at * d..(at + 1) * d],
                &k[from * d..to * d],
                &v[from * dv..to * dv],
                dv,
                f64::from(how.scale),
            );
            let errors = out.iter().zip(&truth).map(|(&a, b)| (f64::from(a) - b).abs());
            let error = errors.clone().fold(0.0, f64::max);
            assert!(error <= f64::from(got.bound[at]), "{told}: error {error:e}, bound {:e}", got.bound[at]);
            assert!((f64::from(got.lse[at]) - lse).abs() <= f64::from(got.lse_bound[at]), "{told}");
            squares += errors.map(|x| x * x).sum::<f64>();
            norm += truth.iter().map(|x| x * x).sum::<f64>();
        }
        if planes == 4 && kind == 0 {
            let most = if format == Format::Aligned { 1e-4 } else { 1e-5 };
            assert!(squares.sqrt() <= most * norm.sqrt(), "{told}: {:e} off", (squares / norm).sqrt());
        }
    }
}

/// The published scheme by the kernels: the same bits are read as on the CPU, and the outputs are the same but for rounding.
#[test]
fn published_attention() {
    let cpu = cpu(Isa::best(), 1);
    let mut rng = Rng::new(15);
    let (mut alike, mut calls) = (0, 0);
    for case in 0..20 {
        let (d, dv, kv_heads) = (DIMS[case % 9], DIMS[rng.below(9)], 1 + rng.below(2));
        let g = [1, 2, 3, 4, 8, 24][rng.below(6)];
        let n = [1, 31, 127, 129, 1 + rng.below(300), 1015 + rng.below(20)][case % 6];
        let s = shape(g, kv_heads, d, dv, Dtype::F16, 4);
        let kind = [0, 1, 5, 10][rng.below(4)];
        let (k, v, mut q) = rows_of_kind(&mut rng, kind, n, &s);
        q.extend(rng.normals(q.len()).iter().map(|x| 2.0 * x).collect::<Vec<_>>());
        let run = Single::new(Format::Published, s, 0);
        run.append(&k, &v);
        let ranges = [(0, n), (rng.below(n), rng.below(n + 1))];
        let how = How { mode: Mode::Expected, tolerance: 1e-3, scale: 1.0 / (d as f32).sqrt(), dense: false };
        let want = run.attend(&cpu, &q, &ranges, how).unwrap();
        let rows = query_rows(&ranges, false);
        let (got, stats) = attend(&run, &q, &rows, how, Bent::default(), rng.next());
        let (again, _) = attend(&run, &q, &rows, how, Bent::default(), rng.next());
        let told = format!("case {case}: g {g} d {d} dv {dv} n {n} {ranges:?}");
        assert_eq!(bits(&got), bits(&again), "{told}: depends on the order");
        // A row's bits are its own: with another one in its place, and beside dense rows.
        let others = [rows[0], QueryRow { dense: 1, sequence: 1, ..rows[1] }];
        let (other, _) = attend(&run, &q, &others, how, Bent::default(), rng.next());
        let first = |o: &Output| o.out[..s.n_q_heads * dv].iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(first(&got), first(&other), "{told}: depends on other rows");
        assert_eq!(stats.rows, [0, 0, 2], "{told}");
        let parts = g.div_ceil(cuda::UNIT_HEADS) as u64;
        assert_eq!(stats.tokens, parts * want.stats.tokens, "{told}");
        // What K is read to follows from exponents alone. (A larger group reads in parts.)
        assert!(parts > 1 || stats.bytes_k == want.stats.bytes_k, "{told}");
        calls += 1;
        let same = parts > 1 || stats.bytes_v == want.stats.bytes_v;
        alike += usize::from(same);
        for at in 0..2 * s.n_q_heads {
            let amplitude = want.amplitude[at];
            assert!(got.bound[at] == f32::INFINITY && got.lse_bound[at] == f32::INFINITY, "{told}");
            let (a, b) = (got.lse[at], want.lse[at]);
            assert!(a == b || (a - b).abs() <= 2e-5 * (1.0 + b.abs()), "{told}: {a} {b}");
            assert!((got.amplitude[at] - amplitude).abs() <= 1e-3 * amplitude, "{told}");
            for (a, b) in got.out[at * dv..(at + 1) * dv].iter().zip(&want.out[at * dv..]) {
                // Weights are f16, whose last bit may go either way.
                assert!((a - b).abs() <= 1e-3 * amplitude, "{told}: {a} {b} of {amplitude:e}");
            }
        }
    }
    assert!(10 * alike >= 9 * calls, "{alike} of {calls} read the same bits as the CPU");
}

/// Pages that lose nothing are the CPU's byte for byte; what cannot be stored is a fault, and 0.
#[test]
fn stored_bytes() {
    let mut rng = Rng::new(16);
    for case in 0..24 {
        let (dk, dv, heads) = (DIMS[case % 9], DIMS[rng.below(9)], 1 + rng.below(3));
        let format = [Format::Raw, Format::Published][case % 2];
        let dtypes = if format == Format::Raw { [DTYPES[rng.below(3)], DTYPES[rng.below(3)]] } else { [Dtype::F16; 2] };
        let s = Shape { dtype_v: dtypes[1], ..shape(1, heads, dk, dv, dtypes[0], 4) };
        let layout = Layout::new(format, s);
        let mut x = [rng.normals(TILE * heads * dk), rng.normals(TILE * heads * dv)];
        let bad = [None, Some((rng.below(2), rng.below(TILE)))][rng.below(2)];
        if let Some((which, row)) = bad {
            x[which][(row * heads + heads - 1) * [dk, dv][which] + 3] = f32::NAN;
        }
        let rows = |x: &[Vec<f32>; 2]| [0, 1].map(|i| Packed::new(&x[i], heads, [dk, dv][i], dtypes[i]));
        let [k, v] = rows(&x);
        let (page, mut want, mut fault) =
            (Aligned::new(layout.page_bytes()), Aligned::new(layout.page_bytes()), [Fault::default()]);
        let cut = 1 + rng.below(TILE - 1);
        for (from, to) in [(0, cut), (cut, TILE)] {
            let (source, [from_row, to_row]) = (from as i64, [from, to].map(|row| row as i32));
            let append = [Append {
                page: address(page.get()),
                source,
                tile: 2,
                from: from_row,
                to: to_row,
                ..Append::default()
            }];
            let call = EncodeParams {
                shape: (&layout).into(),
                k: rows_of(&k.rows()),
                v: rows_of(&v.rows()),
                appends: address(&append),
                fault: fault.as_mut_ptr() as u64,
                ..EncodeParams::default()
            };
            launch("akv_store", [1, heads, 1], cuda::STORE_THREADS, 0, &call, rng.next()).unwrap();
        }
        if let Some((which, row)) = bad {
            let Fault { status, row: found, head, place, .. } = fault[0];
            let found = (status, found, head, place);
            assert_eq!(found, (params::FAULT_NONFINITE, (2 * TILE + row) as i64, heads as i32 - 1, which as u32));
            x[which][(row * heads + heads - 1) * [dk, dv][which] + 3] = 0.0;
        } else {
            assert_eq!(fault[0].status, 0);
        }
        let [k, v] = rows(&x);
        layout.encode(want.get_mut(), &Source { k: k.rows(), v: v.rows(), base: None, base_rows: 0 }, 0, 0, TILE);
        assert!(page.get() == want.get(), "case {case}: {format:?} {s:?}");
    }
}

/// Query rows of a sequence.
fn query_rows(ranges: &[(usize, usize)], dense: bool) -> Vec<QueryRow> {
    let row = |(i, &(from, to)): (usize, &(usize, usize))| QueryRow {
        sequence: 0,
        from: from.min(to) as i32,
        to: to as i32,
        n: to.saturating_sub(from) as i32,
        dense: if dense { 1 + i as i32 } else { 0 },
        reserved: 0,
    };
    ranges.iter().enumerate().map(row).collect()
}

/// What must not depend on orders, nor on other rows.
fn bits(o: &Output) -> Vec<u32> {
    [&o.out, &o.lse, &o.bound, &o.lse_bound, &o.estimate, &o.amplitude]
        .into_iter()
        .flatten()
        .map(|x| x.to_bits())
        .collect()
}

/// A call as [`Single::attend_bent`], by the kernels. (Sequence 1 is another name of 0.)
fn attend(run: &Single, q: &[f32], rows: &[QueryRow], how: How, bent: Bent, seed: u64) -> (Output, Stats) {
    let n_rows = rows.len();
    let reader = run.cache.read(run.sequence, 0).unwrap();
    let view = reader.view();
    let tiles = view.len.div_ceil(TILE);
    let copies: Vec<Aligned> = (0..tiles).map(|tile| Aligned::copy(view.page(tile))).collect();
    let pages: Vec<u64> = copies.iter().map(|page| address(page.get())).collect();
    let (head_k, head_v) = view.exact.map_or((0, 0), |(k, v)| (k.address(0, 0) as u64, v.address(0, 0) as u64));
    let views = [View {
        pages: address(&pages),
        head_k,
        head_v,
        written: 0,
        id: 0,
        first: 0,
        len: view.len as i32,
        n_exact: view.n_exact as i32,
    }; 2];
    let at = || (0..n_rows).flat_map(|row| (0..tiles).map(move |tile| (row, tile)));
    let mask = bent.mask;
    let seen: Vec<u128> = at().map(|(row, tile)| mask.map_or(0, |mask| mask.seen(row, tile))).collect();
    let added: Vec<_> = at().map(|(row, tile)| mask.and_then(|mask| mask.added(row, tile))).collect();
    let peaks: Vec<f32> = added.iter().map(|added| added.map_or(0.0, |(_, peak)| peak)).collect();
    let added: Vec<[f16; TILE]> = added.iter().map(|added| added.map_or([f16::ZERO; TILE], |(x, _)| *x)).collect();
    let mut told = AttendParams { views: address(&views), mask_tiles: tiles as i32, ..AttendParams::default() };
    if mask.is_some() {
        (told.mask_seen, told.mask_peak, told.mask_added) = (address(&seen), address(&peaks), address(&added));
    }
    run_attention(view.layout, told, Some(&view), q, rows, tiles, how, bent, seed)
}

/// Runs the kernels of a call: `told` = what its rows see; `view` = the sequence whose scores are checked.
#[allow(clippy::too_many_arguments)]
fn run_attention(
    layout: &Layout,
    told: AttendParams,
    view: Option<&SequenceView>,
    q: &[f32],
    rows: &[QueryRow],
    tiles: usize,
    how: How,
    bent: Bent,
    seed: u64,
) -> (Output, Stats) {
    let s = &layout.shape;
    let (n_rows, heads) = (rows.len(), s.n_q_heads);
    let nothing = || vec![f32::NAN; n_rows * heads];
    let mut o = Output {
        out: vec![f32::NAN; n_rows * heads * s.dim_v],
        lse: nothing(),
        bound: nothing(),
        lse_bound: nothing(),
        estimate: nothing(),
        amplitude: nothing(),
        stats: Default::default(),
    };
    let (dense, scans) = (rows.iter().any(|row| row.dense != 0), rows.iter().any(|row| row.dense == 0));
    let workspace = Workspace::new(layout, n_rows, tiles, scans, 0);
    assert_eq!(workspace.chunk, n_rows);
    let mut scratch = Aligned::new(workspace.bytes);
    let splits = tiles.div_ceil(cuda::SPLIT).max(1);
    let (mut stats, mut fault) = ([Stats::default()], [Fault::default()]);
    let q = Packed::new(q, heads, s.dim_k, Dtype::F32);
    let stride = (s.dim_v * 4) as i64;
    let mut call = AttendParams {
        shape: layout.into(),
        q: rows_of(&q.rows()),
        out: params::Rows {
            data: o.out.as_mut_ptr() as u64,
            stride_row: stride * heads as i64,
            stride_head: stride,
            ..Default::default()
        },
        rows: address(rows),
        sinks: bent.sinks.map_or(0, address),
        slopes: bent.slopes.map_or(0, address),
        lse: o.lse.as_mut_ptr() as u64,
        bound: o.bound.as_mut_ptr() as u64,
        lse_bound: o.lse_bound.as_mut_ptr() as u64,
        estimate: o.estimate.as_mut_ptr() as u64,
        amplitude: o.amplitude.as_mut_ptr() as u64,
        stats: stats.as_mut_ptr() as u64,
        fault: fault.as_mut_ptr() as u64,
        mode: if how.mode == Mode::Guaranteed { params::MODE_GUARANTEED } else { params::MODE_EXPECTED },
        fused: i32::from(splits == 1),
        scale: how.scale,
        softcap: bent.softcap,
        tolerance: how.tolerance,
        n_rows: n_rows as i32,
        blocks: 1 + (seed % 3) as i32,
        ..told
    };
    let own = call.stats;
    workspace.place(scratch.get_mut().as_mut_ptr() as u64, &mut call);
    call.stats = own;
    let grid = [cuda::units(s), n_rows, splits];
    let (scan, attend, words) = (cuda::scan_shared_bytes(s), cuda::attend_shared_bytes(s), cuda::words(s));
    // A context of one split does not need the scan: `akv_attend` scans it, too.
    let published = scans && layout.format == Format::Published;
    let scans = scans && !published;
    let kernels = [
        (published, "published_peaks".to_owned(), 0),
        (published, "published_scores".to_owned(), cuda::PUBLISHED_SHARED_BYTES),
        (published, "published_align".to_owned(), 0),
        (published, "published_values".to_owned(), cuda::PUBLISHED_SHARED_BYTES),
        (scans, format!("scan_{words}"), scan),
        (scans, format!("attend_{words}"), attend),
        (dense, format!("dense_{}", cuda::dense_words(s)), cuda::dense_shared_bytes(s)),
    ];
    for (_, name, shared) in kernels.iter().filter(|kernel| kernel.0) {
        let grid = if name == "published_align" { [grid[0], grid[1], 1] } else { grid };
        launch(&format!("akv_{name}"), grid, cuda::ATTEND_THREADS, *shared, &call, seed).unwrap();
        if let Some(view) = view.filter(|_| name.starts_with("scan")) {
            check_scores(&call, s, view, rows, bent.mask);
        }
    }
    assert!(scratch.get()[..workspace.zeros].iter().all(|&byte| byte == 0));
    assert_eq!(fault[0].status, 0);
    (o, stats[0])
}

/// Attention over cells, in pages or beside the engine's own rows: what the kernels make of a mask and of spans is what the
/// host makes of them, and so are the results.
#[test]
fn attention_over_cells() {
    let cpu = cpu(Isa::best(), 1);
    let mut rng = Rng::new(14);
    let (mut alike, mut calls) = (0, 0);
    for case in 0..48 {
        let (d, dv, is_index) = (DIMS[case % 9], DIMS[rng.below(9)], case % 2 == 1);
        let given =
            shape([1, 2, 4, 5, 8][rng.below(5)], 1 + rng.below(2), d, dv, DTYPES[rng.below(3)], 2 + rng.below(3));
        let layout = if is_index { Layout::index(given) } else { Layout::new(Format::Aligned, given) };
        let s = &layout.shape;
        let n_slots = [60, 200, 300, 1200][case % 4];
        let exact_head = [0, 4, 30][rng.below(3)];
        let memory = Memory::new(Allocator::default(), 0);
        let mut layer = SlotLayer::new(&memory, 0, layout, 2, n_slots, exact_head, is_index).unwrap();
        let (mut k, mut v) =
            (rng.normals(2 * n_slots * s.n_kv_heads * d), rng.normals(2 * n_slots * s.n_kv_heads * dv));
        round(&mut k, s.dtype_k);
        round(&mut v, s.dtype_v);
        let slots: Vec<i64> = (0..2 * n_slots as i64).filter(|_| rng.below(4) > 0).collect();
        // Rows that nobody has written are not numbers.
        for slot in (0..2 * n_slots).filter(|slot| is_index && !slots.contains(&(*slot as i64))) {
            k[slot * s.n_kv_heads * d..][..s.n_kv_heads * d].fill(f32::NAN);
            v[slot * s.n_kv_heads * dv..][..s.n_kv_heads * dv].fill(f32::NAN);
        }
        let (k, v) = (Packed::new(&k, s.n_kv_heads, d, s.dtype_k), Packed::new(&v, s.n_kv_heads, dv, s.dtype_v));
        if is_index {
            // SAFETY: rows of all slots, which live longer than the layer is used.
            let own = [&k, &v].map(|rows| unsafe { std::mem::transmute::<Rows<'_>, Rows<'static>>(rows.rows()) });
            layer.attach(own[0], own[1]);
            layer.write(&slots, None, None, &mut Hands::Host).unwrap();
        } else {
            layer.write(&slots, Some(k.rows()), Some(v.rows()), &mut Hands::Host).unwrap();
        }

        // The mask, from f16.
        let spans = [(1, 1 + rng.below(2), 1 + rng.below(n_slots)), (0, [1, 9][rng.below(2)], n_slots)];
        let n_rows = spans[0].1 + spans[1].1;
        let (n_kv, adds) = (n_slots - rng.below(3).min(n_slots - 1), rng.below(2) == 1);
        let f16s: Vec<Vec<u16>> = (0..n_rows)
            .map(|_| {
                let hidden = rng.below(6);
                let bits = |i: usize| if adds { f16::from_f32(-((i % 50) as f32) / 8.0).to_bits() } else { 0 };
                (0..n_kv).map(|i| if i / 100 == hidden || rng.below(9) == 0 { 0xfc00 } else { bits(i) }).collect()
            })
            .collect();
        let mut mask = Mask::new(n_rows, n_slots).unwrap();
        mask.set(0, f16s.iter().map(|row| &row[..])).unwrap();
        let tiles = n_slots.div_ceil(TILE);
        let (mut seen, mut peak) = (vec![0u128; n_rows * tiles], vec![f32::NAN; n_rows * tiles]);
        let mut added = vec![[f16::NAN; TILE]; n_rows * tiles];
        let (flat, mut fault) = (f16s.concat(), [Fault::default()]);
        let call = params::MaskParams {
            f16: address(&flat),
            stride: 2 * n_kv as i64,
            seen: seen.as_mut_ptr() as u64,
            peak: peak.as_mut_ptr() as u64,
            added: added.as_mut_ptr() as u64,
            fault: fault.as_mut_ptr() as u64,
            first_row: 0,
            n_kv: n_kv as i32,
            tiles: tiles as i32,
        };
        launch("akv_mask", [n_rows * tiles, 1, 1], 128, cuda::CELLS_SHARED_BYTES, &call, rng.next()).unwrap();
        for (row, tile) in (0..n_rows).flat_map(|row| (0..tiles).map(move |tile| (row, tile))) {
            let at = row * tiles + tile;
            assert_eq!(seen[at], mask.seen(row, tile), "case {case}");
            match mask.added(row, tile) {
                Some((x, most)) => assert_eq!((&added[at], peak[at]), (x, most), "case {case}"),
                None => assert_eq!((added[at], peak[at]), ([f16::ZERO; TILE], 0.0), "case {case}"),
            }
        }

        // What the rows see.
        let all: Vec<_> = (0..2).map(|stream| layer.view(stream, n_slots)).collect();
        let each = || all.iter().flat_map(|view| (0..tiles).map(move |tile| (view, tile)));
        let pages: Vec<u64> = each().map(|(view, tile)| address(view.page(tile))).collect();
        let written: Vec<u128> = each().map(|(view, tile)| view.written(tile)).collect();
        let head = |view: &SequenceView| view.exact.filter(|_| !is_index).map_or(0, |(k, _)| k.address(0, 0) as u64);
        let heads: Vec<u64> = all.iter().map(head).collect();
        let n_exact: Vec<u32> = all.iter().map(|view| view.n_exact as u32).collect();
        let mut device_views = [View::default(); 2];
        let mut device_rows = vec![QueryRow::default(); n_rows];
        let mut call = params::SpansParams {
            pages: address(&pages),
            written: address(&written),
            heads: address(&heads),
            n_exact: address(&n_exact),
            seen: address(&seen),
            views: device_views.as_mut_ptr() as u64,
            rows: device_rows.as_mut_ptr() as u64,
            n_slots: n_slots as i64,
            head_v: layout.kept_offset(exact_head) as i64,
            tiles: tiles as i32,
            mask_tiles: tiles as i32,
            first_span: 0,
            n_spans: 2,
            spans: [params::Span::default(); params::MAX_SPANS],
        };
        let mut rows = Vec::new();
        let views: Vec<_> = spans.iter().map(|&(stream, _, n_kv)| layer.view(stream, n_kv)).collect();
        for (i, &(stream, n, n_kv)) in spans.iter().enumerate() {
            let dense = n > 8;
            call.spans[i] =
                params::Span { stream: stream as i32, rows: n as i32, n_kv: n_kv as i32, dense: i32::from(dense) };
            for _ in 0..n {
                let sees = |cell: &usize| {
                    (mask.seen(rows.len(), cell / TILE) & views[i].written(cell / TILE)) >> (cell % TILE) & 1 == 1
                };
                let cells: Vec<usize> = (0..n_kv).filter(sees).collect();
                let (from, to) = (cells.first().map_or(0, |&c| c), cells.last().map_or(0, |&c| c + 1));
                rows.push(backend::QueryRow { n: cells.len(), ..backend::QueryRow::new(i, from, to, dense) });
            }
        }
        launch("akv_spans", [n_rows, 1, 1], 128, cuda::CELLS_SHARED_BYTES, &call, rng.next()).unwrap();
        for (i, (got, want)) in device_rows.iter().zip(&rows).enumerate() {
            let index = if want.dense { 1 + i - (n_rows - spans[want.sequence].1) * want.sequence } else { 0 };
            let got = (got.sequence, got.from, got.to, got.n, got.dense);
            assert_eq!(
                got,
                (want.sequence as i32, want.from as i32, want.to as i32, want.n as i32, index as i32),
                "case {case} row {i}"
            );
        }

        let q: Vec<f32> = rng.normals(n_rows * s.n_q_heads * d).iter().map(|x| 2.0 * x).collect();
        let (sinks, slopes) = (rng.normals(s.n_q_heads), rng.normals(s.n_q_heads));
        let how = How {
            mode: [Mode::Expected, Mode::Guaranteed][rng.below(2)],
            tolerance: 10f32.powf(-1.0 - 3.0 * rng.uniform() as f32),
            scale: 1.0 / (d as f32).sqrt(),
            dense: false,
        };
        let bent = Bent {
            softcap: if rng.below(3) == 0 { 5.0 } else { 0.0 },
            mask: Some(&mask),
            sinks: (rng.below(3) == 0).then_some(&sinks[..]),
            slopes: (rng.below(2) == 0).then_some(&slopes[..]),
        };
        let told = format!("case {case}: {s:?} index {is_index} {n_slots} cells {spans:?} head {exact_head} {how:?}");
        let want = attend_views(&cpu, &views, &rows, &q, how, bent).unwrap();
        let mut params = AttendParams {
            views: address(&device_views),
            mask_seen: address(&seen),
            mask_peak: address(&peak),
            mask_added: address(&added),
            mask_tiles: tiles as i32,
            ..AttendParams::default()
        };
        if is_index {
            (params.attached_k, params.attached_v) = ((&k.rows()).into(), (&v.rows()).into());
        }
        let (got, stats) = run_attention(&layout, params, None, &q, &device_rows, tiles, how, bent, rng.next());
        let tokens = stats.tokens + stats.tokens_exact + stats.tokens_attached;
        assert_eq!(tokens, want.stats.tokens, "{told}");
        if rows.iter().all(|row| !row.dense) {
            calls += 1;
            alike += usize::from(stats.planes_k == want.stats.planes_k && stats.planes_v == want.stats.planes_v);
        }
        for at in 0..n_rows * s.n_q_heads {
            let near = |a: f32, b: f32, most: f32| a == b || (a - b).abs() <= most;
            assert!(got.bound[at].is_finite(), "{told}: bound {}", got.bound[at]);
            assert!(near(got.lse[at], want.lse[at], got.lse_bound[at] + want.lse_bound[at]), "{told}");
            assert!(near(got.amplitude[at], want.amplitude[at], 0.05 * want.amplitude[at] + 1e-6), "{told}");
            for c in 0..dv {
                let (a, b) = (got.out[at * dv + c], want.out[at * dv + c]);
                assert!(near(a, b, got.bound[at] + want.bound[at]), "{told}: {a} {b}");
            }
        }
    }
    assert!(calls > 15 && 10 * alike >= 9 * calls, "{alike} of {calls} read the same digits as the CPU");
}

/// The scores of all tokens that are seen, as the scan leaves them: bit for bit those of the integers that the format and
/// rounded q give, and those of the others minus infinity.
fn check_scores(call: &AttendParams, s: &Shape, view: &SequenceView, rows: &[QueryRow], mask: Option<&Mask>) {
    const LEVELS: f32 = 127.0 * 257.0;
    const MAGIC: f32 = 12_582_912.0;
    let (d, half, group) = (s.dim_k, s.dim_k / 2, s.group());
    let unit_heads = group.min(cuda::UNIT_HEADS);
    let parts = group.div_ceil(unit_heads);
    for (row, &QueryRow { from, to, .. }) in
        rows.iter().enumerate().filter(|(_, row)| row.sequence >= 0 && row.dense == 0)
    {
        let (from, to) = (from as usize, to as usize);
        for tile in from / TILE..to.div_ceil(TILE).max(from / TILE) {
            let seen: Vec<bool> = (TILE * tile..TILE * (tile + 1))
                .map(|i| (from.max(view.n_exact)..to).contains(&i))
                .enumerate()
                .map(|(i, seen)| seen && mask.is_none_or(|mask| mask.seen(row, tile) >> i & 1 != 0))
                .collect();
            if !seen.contains(&true) {
                continue;
            }
            for head in 0..s.n_q_heads {
                let (kv_head, in_group) = (head / group, head % group);
                let page = aligned::Tile::new(s, view.layout.part(view.page(tile), kv_head));
                // SAFETY: the call's q and workspace; all of a row, and of a unit's tile, is there.
                let (q, scores) = unsafe {
                    let q =
                        call.q.data as usize + row * call.q.stride_row as usize + head * call.q.stride_head as usize;
                    let unit = (row * s.n_kv_heads + kv_head) * parts + in_group / unit_heads;
                    let at = (unit * (call.max_tiles as usize + 1) + tile + 1) * unit_heads + in_group % unit_heads;
                    let scores = call.scores as *const f32;
                    (
                        std::slice::from_raw_parts(q as *const f32, d),
                        std::slice::from_raw_parts(scores.add(at * TILE), TILE),
                    )
                };
                let folded: Vec<f32> = (0..d).map(|c| q[c] * call.scale * scale(page.k_scales[c])).collect();
                let peak = folded.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                let (step, inverse) = if peak < 1e-30 { (0.0, 0.0) } else { (peak / LEVELS, LEVELS / peak) };
                let rounded: Vec<i32> = folded
                    .iter()
                    .map(|x| (x * inverse + MAGIC).to_bits().wrapping_sub(MAGIC.to_bits()) as i32)
                    .collect();
                let sum: i32 = rounded.iter().sum();
                for (i, &seen) in seen.iter().enumerate() {
                    let nibble = |c: usize| {
                        let byte = page.k0[i / 16 * 16 * half + c % half / 4 * 64 + i % 16 * 4 + c % 4];
                        i32::from(if c < half { byte & 15 } else { byte >> 4 })
                    };
                    let digits: i32 = (0..d).map(|c| (nibble(c) - 8) * rounded[c]).sum();
                    let want = if seen { (digits as f32 + CENTRE[1] * sum as f32) * step } else { f32::NEG_INFINITY };
                    assert_eq!(
                        scores[i].to_bits(),
                        want.to_bits(),
                        "row {row} tile {tile} head {head} token {i}: {} {want}",
                        scores[i]
                    );
                }
            }
        }
    }
}

/// Rows read back are what the format says, in every dtype.
#[test]
fn rows_read_back() {
    let mut rng = Rng::new(6);
    for case in 0..20 {
        let (d, dv, kv_heads) = (DIMS[case % 9], DIMS[rng.below(9)], 1 + rng.below(3));
        let format = [Format::Aligned, Format::Raw, Format::Aligned, Format::Published][case % 4];
        let of_rows = if format == Format::Published { Dtype::F16 } else { DTYPES[rng.below(3)] };
        let planes = if format == Format::Aligned { 2 + rng.below(3) } else { 4 };
        let s = shape(1, kv_heads, d, dv, of_rows, planes);
        let n = 1 + rng.below(400);
        let (mut k, mut v) = (rng.normals(n * kv_heads * d), rng.normals(n * kv_heads * dv));
        round(&mut k, s.dtype_k);
        round(&mut v, s.dtype_v);
        let run = Single::new(format, s, 4);
        run.append(&k, &v);
        let reader = run.cache.read(run.sequence, 0).unwrap();
        let view = reader.view();
        let pages: Vec<u64> = (0..n.div_ceil(TILE)).map(|tile| address(view.page(tile))).collect();
        let (head_k, head_v) = view.exact.map_or((0, 0), |(k, v)| (k.address(0, 0) as u64, v.address(0, 0) as u64));
        let n_exact = view.n_exact as i32;
        let device_view =
            View { pages: address(&pages), head_k, head_v, written: 0, id: 0, first: 0, len: n as i32, n_exact };
        let first = rng.below(n);
        let n = 1 + rng.below(n - first);
        let dtype = DTYPES[case % 3];
        let rows = |out: &mut Aligned, dim: usize| params::Rows {
            data: out.get_mut().as_mut_ptr() as u64,
            stride_row: (kv_heads * dim * dtype.size()) as i64,
            stride_head: (dim * dtype.size()) as i64,
            dtype: dtype as i32,
            reserved: 0,
        };
        let (mut out_k, mut out_v) =
            (Aligned::new(n * kv_heads * d * dtype.size()), Aligned::new(n * kv_heads * dv * dtype.size()));
        let mut fault = [Fault::default()];
        let call = params::DequantizeParams {
            shape: view.layout.into(),
            view: device_view,
            k: rows(&mut out_k, d),
            v: rows(&mut out_v, dv),
            fault: fault.as_mut_ptr() as u64,
            first: first as i32,
            n: n as i32,
            ..params::DequantizeParams::default()
        };
        launch("akv_dequantize", [n, kv_heads, 1], 64, 0, &call, rng.next()).unwrap();
        assert_eq!(fault[0].status, 0);
        let (got_k, got_v) =
            (Rows::contiguous(out_k.get(), kv_heads, dtype, d), Rows::contiguous(out_v.get(), kv_heads, dtype, dv));
        for (row, head) in (0..n).flat_map(|row| (0..kv_heads).map(move |head| (row, head))) {
            let token = first + row;
            let (mut want_k, mut want_v, mut k, mut v) = (vec![0.0; d], vec![0.0; dv], vec![0.0; d], vec![0.0; dv]);
            match view.exact {
                Some((exact_k, exact_v)) if token < view.n_exact => {
                    exact_k.read(token, head, &mut want_k);
                    exact_v.read(token, head, &mut want_v);
                }
                _ => view.layout.decode(view.page(token / TILE), head, token % TILE, &mut want_k, &mut want_v),
            }
            round(&mut want_k, dtype);
            round(&mut want_v, dtype);
            got_k.read(row, head, &mut k);
            got_v.read(row, head, &mut v);
            assert_eq!((k, v), (want_k, want_v), "case {case}: token {token} head {head}");
        }
    }
}

/// Merged states are the CPU's, whatever is missing, and in place.
#[test]
fn merged_states() {
    use alignedkv::backend::cpu::{State, merge};
    let mut rng = Rng::new(8);
    for case in 0..40 {
        let (rows, dim, n) = (1 + rng.below(5), DIMS[case % 9], 1 + rng.below(9));
        let mut outs: Vec<Vec<f32>> = (0..n).map(|_| rng.normals(rows * dim)).collect();
        let mut fields: Vec<[Vec<f32>; 5]> = (0..n)
            .map(|_| {
                let lse = rng
                    .normals(rows)
                    .iter()
                    .map(|x| if rng.below(5) == 0 { f32::NEG_INFINITY } else { 4.0 * x })
                    .collect();
                let mut small = |scale: f32| rng.normals(rows).iter().map(|x| scale * x.abs()).collect::<Vec<_>>();
                [lse, small(0.1), small(0.3), small(0.05), small(2.0)]
            })
            .collect();
        let without = rng.below(6);
        let states: Vec<State> = outs
            .iter()
            .zip(&fields)
            .map(|(out, [lse, bound, lse_bound, estimate, amplitude])| State {
                out,
                lse,
                bound: (without != 1).then_some(bound),
                lse_bound: (without != 2).then_some(lse_bound),
                estimate: (without != 3).then_some(estimate),
                amplitude: (without != 4).then_some(amplitude),
            })
            .collect();
        let want: Vec<_> = (0..rows)
            .map(|row| {
                let mut out = vec![0.0; dim];
                (merge(&states, row, dim, &mut out), out)
            })
            .collect();
        let addresses: Vec<params::State> = states
            .iter()
            .map(|s| params::State {
                out: address(s.out),
                lse: address(s.lse),
                bound: s.bound.map_or(0, address),
                lse_bound: s.lse_bound.map_or(0, address),
                estimate: s.estimate.map_or(0, address),
                amplitude: s.amplitude.map_or(0, address),
            })
            .collect();
        // The result takes the place of the last state.
        let out = params::State {
            out: outs[n - 1].as_mut_ptr() as u64,
            lse: fields[n - 1][0].as_mut_ptr() as u64,
            bound: fields[n - 1][1].as_mut_ptr() as u64,
            lse_bound: fields[n - 1][2].as_mut_ptr() as u64,
            estimate: fields[n - 1][3].as_mut_ptr() as u64,
            amplitude: fields[n - 1][4].as_mut_ptr() as u64,
        };
        let mut states = [params::State::default(); params::MAX_STATES];
        states[..n].copy_from_slice(&addresses);
        let call = params::MergeParams { n: n as i32, dim: dim as i32, out, states };
        launch("akv_merge", [rows, 1, 1], 64, cuda::MERGE_SHARED_BYTES, &call, rng.next()).unwrap();
        for (row, (merged, out)) in want.iter().enumerate() {
            let near = |a: f32, b: f32| a == b || (a - b).abs() <= 1e-5 * b.abs();
            assert_eq!(&outs[n - 1][row * dim..(row + 1) * dim], &out[..], "case {case}");
            let [lse, bound, lse_bound, estimate, amplitude] = &fields[n - 1];
            let pairs = [
                (lse[row], merged.lse),
                (bound[row], merged.bound),
                (lse_bound[row], merged.lse_bound),
                (estimate[row], merged.estimate),
                (amplitude[row], merged.amplitude),
            ];
            assert!(pairs.iter().all(|&(a, b)| near(a, b)), "case {case}: {pairs:?}");
            assert!(bound[row] >= merged.bound * (1.0 - 1e-6), "case {case}");
        }
    }
}

/// Parameters of the kernels in `kernels/host/planted.cu`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Planted {
    a: u64,
    b: u64,
    out: u64,
    n: i32,
    reserved: i32,
}

/// Threads and lanes that do not meet are an error that says where.
#[test]
fn planted_meetings_are_found() {
    let (a, mut out) = ([1.0f32; 64], [0.0f32; 64]);
    let call = Planted { a: address(&a), out: out.as_mut_ptr() as u64, ..Default::default() };
    for (name, threads, told) in [
        ("planted_skipped_barrier", 64, "thread 5 has ended"),
        ("planted_two_barriers", 64, "others at that in planted.cu"),
        ("planted_half_a_warp", 32, "has ended"),
    ] {
        for seed in 0..4 {
            let error = launch(name, [1, 1, 1], threads, 0, &call, seed).unwrap_err();
            assert!(error.contains(told), "{name}: {error}");
        }
    }
}

/// A barrier that is missing shows in the result, for one order of the warps or the other.
#[test]
fn planted_missing_barrier_is_found() {
    let right: Vec<f32> = (0..64).map(|i| (63 - i) as f32).collect();
    let run = |n: i32, seed: u64| {
        let mut out = [f32::NAN; 64];
        let call = Planted { out: out.as_mut_ptr() as u64, n, ..Default::default() };
        launch("planted_missing_barrier", [1, 1, 1], 64, 256, &call, seed).unwrap();
        out.as_slice() == right
    };
    assert!((0..8).all(|seed| run(1, seed)));
    assert!(!(0..8).any(|seed| run(0, seed)));
}

/// Memory beside what a kernel was given.
#[test]
fn planted_overruns_are_found() {
    load();
    if !DEVICE.lock().unwrap().as_ref().unwrap().sanitized {
        let call = Planted { n: 64 - 31, ..Default::default() };
        let error = launch("planted_shared_overrun", [1, 1, 1], 32, 256, &call, 0).unwrap_err();
        assert!(error.contains("beside its shared memory"), "{error}");
        return;
    }
    // The sanitizer ends the process: another one.
    for what in ["planted_shared_overrun", "planted_row_out_of_range"] {
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "planted_overrun", "--ignored", "--nocapture"])
            .env("AKV_PLANTED", what)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&child.stderr);
        assert!(!child.status.success() && text.contains("AddressSanitizer"), "{what}: {text}");
        assert!(text.contains("planted.cu"), "{what}: {text}");
    }
}

#[test]
#[ignore = "ends the process: planted_overruns_are_found runs it in another one"]
fn planted_overrun() {
    let (a, mut out) = (Aligned::new(4 * 32 * 10), [0.0f32; 32]);
    let name = std::env::var("AKV_PLANTED").unwrap();
    let n = if name == "planted_row_out_of_range" { 10 } else { 33 };
    let call = Planted { a: address(a.get()), out: out.as_mut_ptr() as u64, n, ..Default::default() };
    launch(&name, [1, 1, 1], 32, 256, &call, 0).unwrap();
}

/// Fragments in other lanes than the instruction has them give another product.
#[test]
fn planted_fragments_are_found() {
    let mut rng = Rng::new(2);
    let a: Vec<u8> = (0..16 * 32).map(|_| rng.below(256) as u8).collect();
    let b: Vec<u8> = (0..32 * 8).map(|_| rng.below(256) as u8).collect();
    let right: Vec<f32> = (0..16 * 8)
        .map(|at| {
            (0..32).map(|k| i32::from(a[at / 8 * 32 + k]) * i32::from(b[k * 8 + at % 8] as i8)).sum::<i32>() as f32
        })
        .collect();
    let run = |n: i32| {
        let mut out = vec![f32::NAN; 16 * 8];
        let call = Planted { a: address(&a), b: address(&b), out: out.as_mut_ptr() as u64, n, reserved: 0 };
        launch("planted_swapped_fragments", [1, 1, 1], 32, 0, &call, 0).unwrap();
        out
    };
    assert_eq!(run(1), right);
    assert_ne!(run(0), right);
    // The same of floats.
    let (a, b): (Vec<f32>, Vec<f32>) =
        ((0..128).map(|_| rng.below(64) as f32).collect(), (0..64).map(|_| rng.below(64) as f32).collect());
    let right: Vec<f32> = (0..128).map(|at| (0..8).map(|k| a[at / 8 * 8 + k] * b[k * 8 + at % 8]).sum()).collect();
    let run = |n: i32| {
        let mut out = vec![f32::NAN; 128];
        let call = Planted { a: address(&a), b: address(&b), out: out.as_mut_ptr() as u64, n, reserved: 0 };
        launch("planted_swapped_tf32", [1, 1, 1], 32, 0, &call, 0).unwrap();
        out
    };
    assert_eq!(run(1), right);
    assert_ne!(run(0), right);
    // And of f16.
    let (a, b): (Vec<f32>, Vec<f32>) =
        ((0..256).map(|_| rng.below(64) as f32).collect(), (0..128).map(|_| rng.below(64) as f32).collect());
    let right: Vec<f32> = (0..128).map(|at| (0..16).map(|k| a[at / 8 * 16 + k] * b[k * 8 + at % 8]).sum()).collect();
    let run = |n: i32| {
        let mut out = vec![f32::NAN; 128];
        let call = Planted { a: address(&a), b: address(&b), out: out.as_mut_ptr() as u64, n, reserved: 0 };
        launch("planted_swapped_f16", [1, 1, 1], 32, 0, &call, 0).unwrap();
        out
    };
    assert_eq!(run(1), right);
    assert_ne!(run(0), right);
}

/// Copies that are read too early, that start before what they overwrite has been read, or that nobody waits for.
#[test]
fn planted_copies_are_found() {
    let a: Vec<f32> = (0..256).map(|i| i as f32).collect();
    let bytes: Vec<u8> = a.iter().flat_map(|x| x.to_ne_bytes()).collect();
    let run = |n: i32, seed: u64| {
        let (from, mut out) = (Aligned::copy(&bytes), [f32::NAN; 256]);
        let call = Planted { a: address(from.get()), out: out.as_mut_ptr() as u64, n, ..Default::default() };
        launch("planted_copies", [1, 1, 1], 32, 512, &call, seed).map(|()| out.as_slice() == a)
    };
    assert!((0..8).all(|seed| run(3, seed) == Ok(true)));
    assert!((0..8).any(|seed| run(0, seed) == Ok(false)));
    assert!((0..8).any(|seed| run(1, seed) == Ok(false)));
    assert!((0..8).any(|seed| run(2, seed).is_err_and(|error| error.contains("nobody waits for"))));
}

/// What depends on the order of the blocks differs between seeds (attention is run twice, and must not).
#[test]
fn planted_order_is_found() {
    let run = |seed: u64| {
        let mut out = [0.0f32];
        let call = Planted { out: out.as_mut_ptr() as u64, ..Default::default() };
        launch("planted_order_of_blocks", [8, 1, 1], 32, 0, &call, seed).unwrap();
        out[0]
    };
    assert!((1..8).any(|seed| run(seed) != run(0)));
}
