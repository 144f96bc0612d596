//! The certificate is never exceeded, and says something: random and adversarial small cases against float64.

mod common;

use alignedkv::backend::Mode;
use alignedkv::backend::cpu::{Cpu, Isa};
use alignedkv::format::{Dtype, Format};
use common::*;

#[test]
fn never_exceeded() {
    let cpu = Cpu::new(Isa::best(), 1).unwrap();
    let cases: u64 = std::env::var("ALIGNEDKV_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(200_000);
    let mut rng = Rng::new(7);
    let (mut tightest, mut checked) = (0.0f64, 0u64);
    let mut calibrated = Vec::new();
    while checked < cases {
        let kind = rng.below(KINDS);
        let n = match rng.below(50) {
            0 => 100 + rng.below(200),
            1..5 => 1,
            _ => 1 + rng.below(40),
        };
        let (d, dv, g) = (16 + 8 * rng.below(3), 16 + 8 * rng.below(2), 1 + rng.below(3));
        let dtype = [Dtype::F32, Dtype::F16, Dtype::Bf16][rng.below(3)];
        let Case { mut k, mut v, mut q } = case(&mut rng, kind, n, d, dv, g);
        round(&mut k, dtype);
        round(&mut v, dtype);
        round(&mut q, Dtype::F32);
        let run = Single::new(Format::Aligned, shape(g, 1, d, dv, dtype, 2 + rng.below(3)), 2 * rng.below(3));
        // In one step, or row after row.
        if rng.below(4) == 0 && n < 40 {
            for i in 0..n {
                run.append(&k[i * d..(i + 1) * d], &v[i * dv..(i + 1) * dv]);
            }
        } else {
            run.append(&k, &v);
        }
        for _ in 0..4 {
            let mode = [Mode::Expected, Mode::Guaranteed, Mode::Exact][rng.below(3)];
            let tolerance = 10f32.powf(-5.0 * rng.uniform() as f32);
            let softmax = if rng.below(2) == 0 { 1.0 / (d as f32).sqrt() } else { 1.0 };
            let from = if rng.below(3) == 0 { rng.below(n) } else { 0 };
            let how = How { mode, tolerance, scale: softmax, dense: rng.below(8) == 0 };
            let got = run.attend(&cpu, &q, &[(from, n)], how).unwrap();
            for h in 0..g {
                let (want, lse) =
                    attention64(&q[h * d..(h + 1) * d], &k[from * d..], &v[from * dv..], dv, f64::from(softmax));
                let out = &got.out[h * dv..(h + 1) * dv];
                let error = out.iter().zip(&want).fold(0.0f64, |m, (&a, b)| m.max((f64::from(a) - b).abs()));
                let told = || format!("kind {kind} n {n} from {from} d {d} dv {dv} g {g} {dtype:?} {how:?}");
                let bound = f64::from(got.bound[h]);
                assert!(error <= bound, "{}: error {error:e}, bound {bound:e}", told());
                let lse_error = (f64::from(got.lse[h]) - lse).abs();
                assert!(lse_error <= f64::from(got.lse_bound[h]), "{}: lse off by {lse_error:e}", told());
                let hull = 2.001 * v.iter().fold(0.0f32, |m, x| m.max(x.abs())) + 2e-9;
                assert!(got.bound[h] <= hull * 1.3, "{}: the bound {bound:e} says less than the hull {hull:e}", told());
                if bound > 0.0 {
                    tightest = tightest.max(error / bound);
                }
                if kind == 0 && mode == Mode::Expected && n > 8 {
                    let rms = (out.iter().zip(&want).map(|(&a, b)| (f64::from(a) - b).powi(2)).sum::<f64>()
                        / dv as f64)
                        .sqrt();
                    calibrated.push(rms / f64::from(got.estimate[h]));
                }
                checked += 1;
            }
        }
    }
    calibrated.sort_by(f64::total_cmp);
    let (median, p99) = (calibrated[calibrated.len() / 2], calibrated[calibrated.len() * 99 / 100]);
    println!(
        "{checked} cases; largest error / bound {tightest:.3}; rms error / estimate: median {median:.2}, p99 {p99:.2}"
    );
    assert!((0.3..1.5).contains(&median), "estimates are off: median {median}");
}

/// Tiles that are reopened when their rows are no longer kept, and whose scales later rows outgrow, again and again.
#[test]
fn reopened_tiles_carry_their_error() {
    let cpu = Cpu::new(Isa::best(), 1).unwrap();
    let mut rng = Rng::new(5);
    let (d, dv, g) = (16, 16, 2);
    let mut tightest = 0.0f64;
    for case in 0..400 {
        let run = Single::new(Format::Aligned, shape(g, 1, d, dv, Dtype::F32, 2 + rng.below(3)), 2 * rng.below(3));
        let (mut k, mut v): (Vec<f32>, Vec<f32>) = (Vec::new(), Vec::new());
        for round in 0..1 + rng.below(4) {
            let keep = rng.below(k.len() / d + 1);
            run.cache.truncate(run.sequence, keep).unwrap();
            k.truncate(keep * d);
            v.truncate(keep * dv);
            let more = if round == 0 { 192 + rng.below(150) } else { 1 + rng.below(250) };
            let growth = 10f32.powf(2.0 * rng.uniform() as f32 - 0.5);
            let (new_k, new_v): (Vec<f32>, Vec<f32>) =
                (rng.normals(more * d).iter().map(|x| x * growth).collect(), rng.normals(more * dv));
            run.append(&new_k, &new_v);
            k.extend(new_k);
            v.extend(new_v);
        }
        let n = k.len() / d;
        let q: Vec<f32> = rng.normals(g * d).iter().map(|x| 0.3 * x).collect();
        for mode in [Mode::Expected, Mode::Guaranteed, Mode::Exact] {
            let how = How { mode, tolerance: 10f32.powf(-4.0 * rng.uniform() as f32), scale: 0.25, dense: false };
            let got = run.attend(&cpu, &q, &[(0, n)], how).unwrap();
            for h in 0..g {
                let (want, lse) = attention64(&q[h * d..(h + 1) * d], &k, &v, dv, 0.25);
                let out = &got.out[h * dv..(h + 1) * dv];
                let error = out.iter().zip(&want).fold(0.0f64, |m, (&a, b)| m.max((f64::from(a) - b).abs()));
                assert!(error <= f64::from(got.bound[h]), "case {case} {mode:?}: {error:e}, bound {:e}", got.bound[h]);
                assert!((f64::from(got.lse[h]) - lse).abs() <= f64::from(got.lse_bound[h]), "case {case} {mode:?}");
                tightest = tightest.max(error / f64::from(got.bound[h]));
            }
        }
    }
    println!("largest error / bound {tightest:.3}");
}
