//! The same bits whatever computes them, statistics that add up, and what happens when something goes wrong.

mod common;

use alignedkv::Error;
use alignedkv::backend::cpu::{Cpu, Isa};
use alignedkv::backend::{Attention, Mask, Mode, Threads};
use alignedkv::cache::{Allocator, Block, Memory};
use alignedkv::format::{Dtype, Format, Layout, RowsMut};
use common::*;
use half::f16;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// Every instruction set of this machine, on 1 to 3 threads.
fn cpus() -> Vec<Cpu> {
    let isas = Isa::ALL.into_iter().filter(|isa| isa.available());
    isas.flat_map(|isa| (1..=3).map(move |n| cpu(isa, n))).collect()
}

#[test]
fn same_bits_on_all_threads_and_instruction_sets() {
    let cpus = cpus();
    let mut rng = Rng::new(3);
    for case in 0..60 {
        let (d, dv) = (16 + 8 * rng.below(31), 16 + 8 * rng.below(31));
        let kv_heads = 1 + rng.below(2);
        let g = [1, 2, 3, 7, 8, 16, 33, 64][rng.below(8)];
        // Splits are of 1024 tokens.
        let n = [1 + rng.below(300), 1020 + rng.below(10), 2040 + rng.below(20), 1 + rng.below(3000)][case % 4];
        let format = [Format::Aligned, Format::Aligned, Format::Raw, Format::Published][rng.below(4)];
        let dtype = if format == Format::Published { Dtype::F16 } else { [Dtype::F32, Dtype::Bf16][rng.below(2)] };
        let s = shape(g, kv_heads, d, dv, dtype, 2 + rng.below(3));
        let (mut k, mut v) = (rng.normals(n * kv_heads * d), rng.normals(n * kv_heads * dv));
        round(&mut k, dtype);
        round(&mut v, dtype);
        let q: Vec<f32> = rng.normals(2 * s.n_q_heads * d).iter().map(|x| 2.0 * x).collect();
        let run = Single::new(format, s, rng.below(6));
        run.append(&k, &v);
        let ranges = [(if rng.below(2) == 0 { 0 } else { rng.below(n) }, n), (rng.below(n), rng.below(n + 1))];
        let how = How {
            mode: [Mode::Expected, Mode::Guaranteed, Mode::Exact][rng.below(3)],
            tolerance: 10f32.powf(-1.0 - 3.0 * rng.uniform() as f32),
            scale: 1.0 / (d as f32).sqrt(),
            dense: rng.below(4) == 0,
        };
        let told = format!("case {case}: {format:?} g {g} d {d} dv {dv} n {n} {ranges:?} {how:?}");
        let want = run.attend(&cpus[0], &q, &ranges, how).unwrap();
        for cpu in &cpus[1..] {
            let got = run.attend(cpu, &q, &ranges, how).unwrap();
            assert_eq!(got, want, "{told}: {:?} with {} threads", cpu.isa(), cpu.n_threads());
        }

        let (lens, stats) = (ranges.map(|(from, to)| to.saturating_sub(from)), &want.stats);
        assert_eq!(stats.tokens, (lens.iter().sum::<usize>() * kv_heads) as u64, "{told}");
        if format == Format::Aligned {
            let exact = stats.bytes_exact / ((d + dv) * dtype.size()) as u64;
            for planes in [stats.planes_k, stats.planes_v] {
                assert_eq!(planes.iter().sum::<u64>() + exact, stats.tokens, "{told}");
            }
            let digits = |planes: [u64; 5], d: usize| (0..5).map(|p| p as u64 * planes[p] * d as u64 / 2).sum::<u64>();
            let bytes = digits(stats.planes_k, d) + digits(stats.planes_v, dv) + stats.bytes_scales + stats.bytes_exact;
            assert_eq!(stats.bytes_k + stats.bytes_v, bytes, "{told}");
        }
        for (row, &(from, to)) in ranges.iter().enumerate() {
            for head in 0..s.n_q_heads {
                let (at, kv_head) = (row * s.n_q_heads + head, head / g);
                if from >= to {
                    assert_eq!(want.lse[at], f32::NEG_INFINITY);
                    assert!(format == Format::Published || want.bound[at] == 0.0);
                    continue;
                }
                let (k, v) = (of_head(&k, kv_heads, d, kv_head), of_head(&v, kv_heads, dv, kv_head));
                let q = &q[at * d..(at + 1) * d];
                let (out, lse) = attention64(q, &k[from * d..to * d], &v[from * dv..to * dv], dv, f64::from(how.scale));
                let error = want.out[at * dv..(at + 1) * dv].iter().zip(&out);
                let error = error.fold(0.0f64, |m, (&a, b)| m.max((f64::from(a) - b).abs()));
                assert!(error <= f64::from(want.bound[at]), "{told}: error {error:e}, bound {:e}", want.bound[at]);
                assert!((f64::from(want.lse[at]) - lse).abs() <= f64::from(want.lse_bound[at]), "{told}");
            }
        }
    }
}

/// Rows as given, by few heads (in place) and by many (decoded): every dtype, size, mask and cap, within the bound of
/// float64 and the same bits everywhere. Rows that nobody sees do not count, whatever they hold.
#[test]
fn rows_as_given() {
    let cpus: Vec<Cpu> = Isa::ALL.into_iter().filter(|isa| isa.available()).map(|isa| cpu(isa, 1)).collect();
    let mut rng = Rng::new(17);
    let (dims, dtypes) = ([16, 24, 32, 40, 64, 72, 80, 96, 128, 136, 200, 256], [Dtype::F16, Dtype::Bf16, Dtype::F32]);
    for case in 0..420 {
        let (d, dv) = (dims[rng.below(12)], dims[case % 12]);
        let (g, n) = ([1, 2, 3, 4, 5, 8][case % 6], [1, 15, 16, 17, 127, 128, 129, 1100][rng.below(8)]);
        let (n_q, kv_heads) = (1 + rng.below(3), 1 + rng.below(2));
        let mut s = shape(g, kv_heads, d, dv, dtypes[rng.below(3)], 4);
        s.dtype_v = dtypes[case % 3];
        let (mut k, mut v) = (rng.normals(n * kv_heads * d), rng.normals(n * kv_heads * dv));
        let masked = rng.below(2) == 0;
        // Rows that no query row sees.
        let hidden: Vec<bool> = (0..n).map(|i| masked && i > 0 && rng.below(4) == 0).collect();
        for i in (0..n).filter(|&i| hidden[i]) {
            k[i * kv_heads * d..(i + 1) * kv_heads * d].fill(6e4);
            v[i * kv_heads * dv..(i + 1) * kv_heads * dv].fill(-6e4);
        }
        round(&mut k, s.dtype_k);
        round(&mut v, s.dtype_v);
        let added: Vec<Vec<f32>> = (0..n_q)
            .map(|_| {
                let cell = |i: usize, r: usize, x: f32| match hidden[i] || r == 0 {
                    true => f32::NEG_INFINITY,
                    false => f16::from_f32(x).to_f32(),
                };
                (0..n)
                    .map(|i| if masked { cell(i, rng.below(3) + usize::from(i == 0), rng.normal()) } else { 0.0 })
                    .collect()
            })
            .collect();
        let mut mask = Mask::new(n_q, n).unwrap();
        let bits: Vec<Vec<u16>> =
            added.iter().map(|row| row.iter().map(|&x| f16::from_f32(x).to_bits()).collect()).collect();
        mask.set(0, bits.iter().map(|row| &row[..])).unwrap();
        let sinks = rng.normals(s.n_q_heads);
        let bent = Bent {
            softcap: if rng.below(3) == 0 { 5.0 } else { 0.0 },
            mask: masked.then_some(&mask),
            sinks: (rng.below(3) == 0).then_some(&sinks),
        };
        let q: Vec<f32> = rng.normals(n_q * s.n_q_heads * d).iter().map(|x| 2.0 * x).collect();
        let run = Single::new(Format::Raw, s, 0);
        run.append(&k, &v);
        let how = How { scale: 1.0 / (d as f32).sqrt(), ..EXPECTED };
        let told = format!("case {case}: g {g} d {d} dv {dv} n {n} n_q {n_q} {:?} {:?}", s.dtype_k, s.dtype_v);
        let ranges = vec![(0, n); n_q];
        let want = run.attend_bent(&cpus[0], &q, &ranges, how, bent).unwrap();
        for cpu in &cpus[1..] {
            let got = run.attend_bent(cpu, &q, &ranges, how, bent).unwrap();
            assert_eq!(got, want, "{told}: {:?}", cpu.isa());
        }
        for at in 0..n_q * s.n_q_heads {
            let (row, head) = (at / s.n_q_heads, at % s.n_q_heads);
            let (k, v) = (of_head(&k, kv_heads, d, head / g), of_head(&v, kv_heads, dv, head / g));
            let q = &q[at * d..(at + 1) * d];
            let (mut sum, mut out) = (0.0, vec![0.0f64; dv]);
            for i in (0..n).filter(|&i| added[row][i] > f32::NEG_INFINITY) {
                let dot: f64 = q.iter().zip(&k[i * d..]).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                let (score, cap) = (dot * f64::from(how.scale), f64::from(bent.softcap));
                let score = if cap > 0.0 { cap * (score / cap).tanh() } else { score };
                let e = (score + f64::from(added[row][i])).exp();
                sum += e;
                out.iter_mut().zip(&v[i * dv..]).for_each(|(out, &v)| *out += e * f64::from(v));
            }
            if let Some(sinks) = bent.sinks {
                sum += f64::from(sinks[head]).exp();
            }
            let error = want.out[at * dv..(at + 1) * dv].iter().zip(&out);
            let error = error.fold(0.0f64, |m, (&a, b)| m.max((f64::from(a) - b / sum).abs()));
            assert!(error <= f64::from(want.bound[at]), "{told}: error {error:e}, bound {:e}", want.bound[at]);
            // A decoded tile's peaks are of all its rows.
            assert!(want.bound[at] < 1e-2 || n_q * g > 8 && masked, "{told}: bound {:e}", want.bound[at]);
            assert!((f64::from(want.lse[at]) - sum.ln()).abs() <= f64::from(want.lse_bound[at]), "{told}");
        }
    }
}

const EXPECTED: How = How { mode: Mode::Expected, tolerance: 1e-3, scale: 1.0, dense: false };

/// Beyond binary32 upwards, downwards, and both ways in one sum.
#[test]
fn overflow_is_an_error() {
    let (d, n) = (16, 40);
    for (format, dtype) in [(Format::Aligned, Dtype::F32), (Format::Raw, Dtype::F32), (Format::Raw, Dtype::Bf16)] {
        for exact_head in [0, 2] {
            let large = if format == Format::Aligned { 3e10 } else { 3e38 };
            for (signs, q) in [([1.0, 1.0], 1e30), ([1.0, 1.0], -1e30), ([1.0, -1.0], 1e30), ([1.0, 1.0], 3e38)] {
                let k: Vec<f32> = (0..n * d).map(|i| signs[i % 2] * large).collect();
                let run = Single::new(format, shape(1, 1, d, d, dtype, 4), exact_head);
                run.append(&k, &vec![1.0; n * d]);
                for cpu in cpus() {
                    for how in [EXPECTED, How { dense: true, ..EXPECTED }] {
                        let got = run.attend(&cpu, &vec![q; d], &[(0, n)], how);
                        assert!(matches!(got, Err(Error::Range(_))), "{format:?} {signs:?} {q}: {got:?}");
                    }
                }
            }
        }
    }
    // Values whose sums leave binary32, both ways.
    let v: Vec<f32> = (0..n * d).map(|i| if i / d < 20 { 3e38 } else { -3e38 }).collect();
    let run = Single::new(Format::Raw, shape(1, 1, d, d, Dtype::F32, 4), 0);
    run.append(&vec![0.0; n * d], &v);
    let got = run.attend(&cpu(Isa::best(), 1), &vec![1.0; d], &[(0, n)], EXPECTED);
    assert!(matches!(got, Err(Error::Range(_))), "{got:?}");
}

/// Values that binary32 can sum but not square.
#[test]
fn an_estimate_is_a_number() {
    let (d, n) = (16, 40);
    let run = Single::new(Format::Raw, shape(1, 1, d, d, Dtype::F32, 4), 0);
    run.append(&vec![1e15; n * d], &vec![1e30; n * d]);
    let got = run.attend(&cpu(Isa::best(), 1), &vec![1e15; d], &[(0, n)], EXPECTED).unwrap();
    assert!(got.estimate[0] >= 0.0 && got.estimate[0] <= got.bound[0] && got.bound[0] < 3e30, "{got:?}");
}

/// A bug that panics in one thread ends the call in all of them.
#[test]
fn no_thread_waits_for_one_that_panicked() {
    let (d, n) = (16, 1900);
    for kv_heads in [1, 16] {
        let run = Single::new(Format::Aligned, shape(2, kv_heads, d, d, Dtype::F32, 4), 4);
        run.append(&vec![1.0; n * kv_heads * d], &vec![1.0; n * kv_heads * d]);
        let q = vec![1.0; 2 * kv_heads * d];
        for cpu in cpus() {
            for how in [EXPECTED, How { dense: true, ..EXPECTED }] {
                // Tokens that are not there, in the last split.
                let got = run.attend(&cpu, &q, &[(0, 2048)], how);
                assert!(matches!(got, Err(Error::Internal(_))), "{got:?}");
                assert!(run.attend(&cpu, &q, &[(0, n)], how).is_ok());
            }
        }
    }
}

/// A thread that cannot make its call takes the others with it: all return its error, after as many barriers.
#[test]
fn an_error_of_one_is_an_error_of_all() {
    let shape = shape(1, 1, 16, 16, Dtype::F32, 4);
    let layout = Layout::new(Format::Aligned, shape);
    let cpu = Cpu::new(Isa::best(), 1).unwrap();
    let (q, mut out) = (Packed::new(&[], 1, 16, Dtype::F32), [0.0f32; 16]);
    for nth in [2, 3] {
        for failing in 0..nth {
            let mut block =
                Block::new(&Memory::new(Allocator::System, 0), Cpu::workspace_bytes(&layout, 1, nth)).unwrap();
            let workspace = block.as_mut_ptr() as usize;
            let (barrier, entered) = (Barrier::new(nth), AtomicUsize::new(0));
            let wait = || {
                entered.fetch_add(1, SeqCst);
                barrier.wait();
            };
            // SAFETY: no row is ever written.
            let rows = unsafe { RowsMut::new(out.as_mut_ptr().cast(), 64, 64, Dtype::F32, 16) };
            let call = Attention {
                shape: &shape,
                sequences: &[],
                rows: &[],
                q: q.rows(),
                lost: &[],
                out: rows,
                scale: 1.0,
                softcap: 0.0,
                mask: None,
                positions: None,
                slopes: None,
                sinks: None,
                tolerance: 1e-3,
                mode: Mode::Expected,
                lse: None,
                bound: None,
                lse_bound: None,
                estimate: None,
                amplitude: None,
            };
            let (call, wait, cpu) = (&call, &wait, &cpu);
            std::thread::scope(|scope| {
                for ith in 0..nth {
                    scope.spawn(move || {
                        let fails = ith == failing;
                        let call = if fails { Err(Error::Busy("layer 0".to_owned())) } else { Ok(call) };
                        let threads = Threads { ith, nth, barrier: wait };
                        // SAFETY: large enough for a call without rows, and this call's alone.
                        let result = unsafe { cpu.attention(call, Some(threads), workspace as *mut u8) };
                        assert!(matches!(&result, Err(Error::Busy(text)) if text == "layer 0"), "{ith}: {result:?}");
                    });
                }
            });
            assert_eq!(entered.load(SeqCst) % nth, 0, "all enter the barrier equally often");
        }
    }
}
