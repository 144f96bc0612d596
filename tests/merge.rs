//! Merged parts of a context: the bounds hold against float64 over the whole, whatever the parts were computed with.

mod common;

use alignedkv::backend::Mode;
use alignedkv::backend::cpu::{Cpu, Isa, Merged, State, merge};
use alignedkv::format::{Dtype, Format};
use common::*;

/// One element as [`merge`] takes it.
struct Part {
    out: Vec<f32>,
    m: Merged,
}

impl Part {
    fn of(o: &Output, head: usize, dv: usize) -> Part {
        let m = Merged {
            lse: o.lse[head],
            bound: o.bound[head],
            lse_bound: o.lse_bound[head],
            estimate: o.estimate[head],
            amplitude: o.amplitude[head],
        };
        Part { out: o.out[head * dv..(head + 1) * dv].to_vec(), m }
    }

    fn state(&self, with_lse_bound: bool) -> State<'_> {
        use std::slice::from_ref;
        State {
            out: &self.out,
            lse: from_ref(&self.m.lse),
            bound: Some(from_ref(&self.m.bound)),
            lse_bound: with_lse_bound.then(|| from_ref(&self.m.lse_bound)),
            estimate: Some(from_ref(&self.m.estimate)),
            amplitude: Some(from_ref(&self.m.amplitude)),
        }
    }
}

fn merged(parts: &[Part], with_lse_bound: bool) -> Part {
    let states: Vec<State> = parts.iter().map(|p| p.state(with_lse_bound)).collect();
    let mut out = vec![f32::NAN; parts[0].out.len()];
    let m = merge(&states, 0, out.len(), &mut out);
    Part { out, m }
}

fn error(out: &[f32], want: &[f64]) -> f64 {
    out.iter().zip(want).fold(0.0f64, |m, (&a, b)| m.max((f64::from(a) - b).abs()))
}

#[test]
fn never_exceeded() {
    let cpu = Cpu::new(Isa::best(), 1).unwrap();
    let cases: u64 = std::env::var("ALIGNEDKV_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(100_000);
    let mut rng = Rng::new(11);
    let (mut tightest, mut checked) = (0.0f64, 0u64);
    while checked < cases {
        let kind = rng.below(KINDS);
        let n = if rng.below(50) == 0 { 100 + rng.below(200) } else { 1 + rng.below(40) };
        let (d, dv, g) = (16 + 8 * rng.below(3), 16 + 8 * rng.below(2), 1 + rng.below(3));
        let dtype = [Dtype::F32, Dtype::F16, Dtype::Bf16][rng.below(3)];
        let Case { mut k, mut v, q } = case(&mut rng, kind, n, d, dv, g);
        round(&mut k, dtype);
        round(&mut v, dtype);
        let run = Single::new(Format::Aligned, shape(g, 1, d, dv, dtype, 2 + rng.below(3)), 2 * rng.below(3));
        run.append(&k, &v);
        for _ in 0..3 {
            let softmax = if rng.below(2) == 0 { 1.0 / (d as f32).sqrt() } else { 1.0 };
            // 2 to 5 parts; some are empty.
            let mut cuts = vec![0, n];
            cuts.extend((0..1 + rng.below(4)).map(|_| rng.below(n + 1)));
            cuts.sort_unstable();
            let parts: Vec<Output> = cuts
                .windows(2)
                .map(|cut| {
                    let mode = [Mode::Expected, Mode::Guaranteed, Mode::Exact][rng.below(3)];
                    let tolerance = 10f32.powf(-5.0 * rng.uniform() as f32);
                    let how = How { mode, tolerance, scale: softmax, dense: rng.below(8) == 0 };
                    run.attend(&cpu, &q, &[(cut[0], cut[1])], how).unwrap()
                })
                .collect();
            for h in 0..g {
                let told = || format!("kind {kind} cuts {cuts:?} d {d} dv {dv} g {g} {dtype:?} scale {softmax}");
                let (want, lse) = attention64(&q[h * d..(h + 1) * d], &k, &v, dv, f64::from(softmax));
                let mut parts: Vec<Part> = parts.iter().map(|o| Part::of(o, h, dv)).collect();
                let all = merged(&parts, true);
                // In two steps, and without the bounds of lse.
                let coarse = merged(&parts, false);
                let rest = parts.split_off(1 + rng.below(parts.len() - 1));
                let nested = merged(&[merged(&parts, true), merged(&rest, true)], true);
                let largest = v.iter().fold(0.0f64, |m, &x| m.max(f64::from(x.abs())));
                for (name, part) in [("all", &all), ("nested", &nested), ("without lse_bound", &coarse)] {
                    let (error, bound) = (error(&part.out, &want), f64::from(part.m.bound));
                    assert!(error <= bound, "{name}, {}: error {error:e}, bound {bound:e}", told());
                    assert!(bound <= 10.0 * largest + 1e-7, "{name}, {}: bound {bound:e}", told());
                    let (apart, lse_bound) = ((f64::from(part.m.lse) - lse).abs(), f64::from(part.m.lse_bound));
                    assert!(apart <= lse_bound, "{name}, {}: lse off by {apart:e}, bound {lse_bound:e}", told());
                    assert!(part.m.estimate >= 0.0 && part.m.amplitude >= 0.0, "{name}, {}", told());
                    tightest = tightest.max(error / bound.max(f64::MIN_POSITIVE));
                    checked += 1;
                }
                assert_eq!(coarse.m.lse_bound, f32::INFINITY);
            }
        }
    }
    println!("{checked} cases; largest error / bound {tightest:.3}");
}

#[test]
fn one_part_is_itself_and_none_is_empty() {
    let (out, unknown) = (vec![1.0, -2.0], [f32::NEG_INFINITY]);
    let m = Merged { lse: -3.0, bound: 0.25, lse_bound: 0.5, estimate: 0.125, amplitude: 2.0 };
    let empty =
        State { out: &[7.0, 7.0], lse: &unknown, bound: None, lse_bound: None, estimate: None, amplitude: None };
    let one = Part { out, m };
    let mut got = [f32::NAN; 2];
    let m = merge(&[empty, one.state(false), empty], 0, 2, &mut got);
    assert_eq!((got, m.lse, m.estimate, m.amplitude), ([1.0, -2.0], -3.0, 0.125, 2.0));
    assert!(m.bound >= 0.25 && m.bound < 0.251 && m.lse_bound == f32::INFINITY, "{m:?}");
    let m = merge(&[empty, empty], 0, 2, &mut got);
    let none = Merged { lse: f32::NEG_INFINITY, bound: 0.0, lse_bound: 0.0, estimate: 0.0, amplitude: 0.0 };
    assert_eq!(format!("{m:?} {got:?}"), format!("{none:?} {:?}", [0.0, 0.0]));
}

#[test]
fn what_is_unknown_stays_unknown() {
    let state = |lse: &'static [f32], bound: &'static [f32]| State {
        out: &[1.0],
        lse,
        bound: Some(bound),
        lse_bound: Some(&[0.5]),
        estimate: None,
        amplitude: None,
    };
    // The second part has no weight in binary64: 0 times infinity.
    let m = merge(&[state(&[0.0], &[0.1]), state(&[-2000.0], &[f32::INFINITY])], 0, 1, &mut [0.0]);
    let infinite = f32::INFINITY;
    assert_eq!((m.bound, m.estimate, m.amplitude), (infinite, infinite, infinite));
}

/// Merged states against any truth that their bounds allow, and against the worst.
#[test]
fn merged_bounds_hold() {
    let mut rng = Rng::new(13);
    let (mut tightest, mut tightest_lse) = (0.0f64, 0.0f64);
    for round in 0..20_000 {
        let (n, dim) = (1 + rng.below(4), 1 + rng.below(3));
        let exact = round % 8 == 0;
        let part = |rng: &mut Rng, x: f32| if exact { 0.0 } else { x * rng.uniform() as f32 };
        let size = 10f32.powi(rng.below(7) as i32 - 3);
        let heavy = rng.below(n);
        let (mut out, mut lse, mut bound, mut lse_bound) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for i in 0..n {
            out.push((0..dim).map(|_| size * rng.normal()).collect::<Vec<_>>());
            lse.push(vec![if i == heavy { 8.0 * rng.uniform() as f32 } else { rng.normal() }]);
            bound.push(vec![part(&mut rng, size)]);
            lse_bound.push(vec![part(&mut rng, 1.0)]);
        }
        if round % 3 == 0 {
            // One light part has all the values.
            let know_all = round % 2 == 0;
            (0..n).filter(|&i| n > 1 && i == heavy).for_each(|i| (out[i].fill(0.0), bound[i][0] = 0.0).1);
            (0..n).filter(|&i| know_all && i != heavy).for_each(|i| (bound[i][0], lse_bound[i][0]) = (0.0, 0.0));
        }
        if round % 5 == 0 {
            lse.iter_mut().for_each(|l| l[0] -= 3e4);
        }
        let states: Vec<State> = (0..n)
            .map(|i| State {
                out: &out[i],
                lse: &lse[i],
                bound: Some(&bound[i]),
                lse_bound: Some(&lse_bound[i]),
                estimate: None,
                amplitude: None,
            })
            .collect();
        let mut got = vec![0.0; dim];
        let merged = merge(&states, 0, dim, &mut got);
        for _ in 0..4 {
            let signs: Vec<[f64; 2]> = (0..n).map(|_| [0, 1].map(|_| rng.below(2) as f64 * 2.0 - 1.0)).collect();
            let l: Vec<f64> = (0..n).map(|i| f64::from(lse[i][0]) + signs[i][0] * f64::from(lse_bound[i][0])).collect();
            let max = l.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = l.iter().map(|l| (l - max).exp()).sum();
            for c in 0..dim {
                let o = |i: usize| f64::from(out[i][c]) + signs[i][1] * f64::from(bound[i][0]);
                let want: f64 = (0..n).map(|i| (l[i] - max).exp() / sum * o(i)).sum();
                let error = (f64::from(got[c]) - want).abs();
                assert!(error <= f64::from(merged.bound), "round {round}: error {error:e}, bound {:e}", merged.bound);
                tightest = tightest.max(if exact { 0.0 } else { error / f64::from(merged.bound) });
            }
            let error = (f64::from(merged.lse) - (max + sum.ln())).abs();
            assert!(error <= f64::from(merged.lse_bound), "round {round}: lse {error:e}, {:e}", merged.lse_bound);
            tightest_lse = tightest_lse.max(if exact { 0.0 } else { error / f64::from(merged.lse_bound) });
        }
    }
    println!("largest error / bound {tightest:.3}, of the lse {tightest_lse:.3}");
    assert!(tightest > 0.9 && tightest_lse > 0.9);
}
