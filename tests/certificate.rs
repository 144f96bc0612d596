//! The certificate is never exceeded, and says something: random and adversarial small cases against float64.

mod common;

use alignedkv::backend::Mode;
use alignedkv::backend::cpu::{Cpu, Isa};
use alignedkv::format::{Dtype, Format, scale};
use common::*;

const KINDS: usize = 12;

struct Case {
    k: Vec<f32>,
    v: Vec<f32>,
    q: Vec<f32>,
}

/// Values whose further digits are all `low`, under a scale that the first row sets.
fn digits(rng: &mut Rng, n: usize, d: usize, low: f32) -> Vec<f32> {
    let unit = scale(120 + rng.below(16) as u8);
    let tail = low * (1.0 / 16.0 + 1.0 / 256.0 + 1.0 / 4096.0);
    (0..n * d)
        .map(|i| {
            let first = if i < d { 7.0 } else { rng.below(14) as f32 - 7.0 };
            (first + if i < d { 0.4 } else { tail }) * unit
        })
        .collect()
}

fn case(rng: &mut Rng, kind: usize, n: usize, d: usize, dv: usize, g: usize) -> Case {
    let (mut k, mut v, mut q) = (rng.normals(n * d), rng.normals(n * dv), rng.normals(g * d));
    match kind {
        1 => {
            for _ in 0..1 + n / 8 {
                k[rng.below(n * d)] *= 1e3;
                v[rng.below(n * dv)] *= 1e3;
            }
        }
        2 => {
            for i in 1..n {
                k.copy_within(0..d, i * d);
            }
        }
        3 => q.fill(0.0),
        4 => {
            let huge = 10f32.powi(1 + rng.below(6) as i32);
            q.iter_mut().for_each(|x| *x *= huge);
        }
        5 => v.iter_mut().enumerate().for_each(|(i, x)| *x *= 10f32.powi(-((i / dv) as i32 % 12))),
        6 => k = digits(rng, n, d, -8.0),
        7 => k = digits(rng, n, d, 7.0),
        8 => {
            // Errors of all channels push the same way.
            let low = if rng.below(2) == 0 { -8.0 } else { 7.0 };
            k = digits(rng, n, d, low);
            q.iter_mut().for_each(|x| *x = x.abs());
            v = digits(rng, n, dv, -8.0);
        }
        9 => {
            let at = rng.below(n);
            for c in 0..d {
                k[at * d + c] = 3.0 * q[c];
            }
        }
        10 => k.iter_mut().enumerate().for_each(|(i, x)| *x *= (i / d + 1) as f32),
        11 => {
            q.iter_mut().for_each(|x| *x *= 1e-20);
            k.iter_mut().for_each(|x| *x *= 1e-6);
        }
        _ => {}
    }
    Case { k, v, q }
}

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
