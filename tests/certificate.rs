//! The certificate is never exceeded, and says something: random and adversarial small cases against float64.

mod common;

use alignedkv::alignment::{ScoreError, Sums};
use alignedkv::backend::Mode;
use alignedkv::backend::cpu::{Cpu, Isa};
use alignedkv::format::{Dtype, Format, LEFT, PEAK, TILE, decode, encode, inverse, scale};
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

/// How much of their bounds the errors of output and LSE of one query head are, if within them.
fn used(got: &Output, q: &[f32], k: &[f32], v: &[f32], dv: usize, told: &str) -> (f64, f64) {
    let (want, lse) = attention64(q, k, v, dv, 1.0);
    let error = got.out.iter().zip(&want).fold(0.0f64, |m, (&a, b)| m.max((f64::from(a) - b).abs()));
    let lse_error = (f64::from(got.lse[0]) - lse).abs();
    let (bound, lse_bound) = (f64::from(got.bound[0]), f64::from(got.lse_bound[0]));
    assert!(error <= bound, "{told}: error {error:e}, bound {bound:e}");
    assert!(lse_error <= lse_bound, "{told}: lse off by {lse_error:e}, bound {lse_bound:e}");
    (error / bound, lse_error / lse_bound)
}

/// V rows that are all zeros but for `loud`, whose values are the largest that a scale can stand for.
fn one_loud(n: usize, dv: usize, loud: usize) -> Vec<f32> {
    let mut v = vec![0.0; n * dv];
    v[loud * dv..(loud + 1) * dv].fill(PEAK * scale(128));
    v
}

/// Where errors conspire the bounds are all but reached, so that nothing in them can be missing. Most of the weight is
/// on tokens without values, one light token has them all, and what is left out of K moves the two apart.
#[test]
fn reached_where_errors_conspire() {
    let cpu = Cpu::new(Isa::best(), 1).unwrap();
    // An open tile: a whole one knows the mean of its values.
    let (n, dv) = (TILE - 1, 16);
    for (d, planes) in [(16, 2), (16, 3), (40, 4), (128, 2)] {
        for (dense, shift) in [(false, 0.2f32), (false, 1.0), (true, 0.2), (true, 1.0)] {
            if dense && planes == 4 {
                continue; // Nothing is left out.
            }
            // All read all there is, or nobody reads more than plane 0.
            let (read, tolerance) = if dense { (planes, 1e-3) } else { (1, 1e6) };
            let digits = |from: usize, to: usize| (from..to).map(|k| 16f32.powi(-(k as i32))).sum::<f32>();
            let (head, tail) = (7.0 * digits(0, read), digits(read, 4));
            let unit = scale(130);
            let sign = |c: usize| if c % 3 == 1 { -1.0 } else { 1.0 };
            let q: Vec<f32> = (0..d).map(|c| sign(c) * shift / (LEFT[read] * unit * d as f32)).collect();
            for loud in [0, 77, n - 1] {
                let k: Vec<f32> = (0..n * d)
                    .map(|i| {
                        let up = (i / d == loud) == (sign(i % d) > 0.0);
                        (head + if up { 7.0 } else { -8.0 } * tail) * unit
                    })
                    .collect();
                let v = one_loud(n, dv, loud);
                let run = Single::new(Format::Aligned, shape(1, 1, d, dv, Dtype::F32, planes), 0);
                run.append(&k, &v);
                let how = How { mode: Mode::Expected, tolerance, scale: 1.0, dense };
                let told = format!("d {d} planes {planes} dense {dense} shift {shift} loud {loud}");
                let got = run.attend(&cpu, &q, &[(0, n)], how).unwrap();
                let (out, lse) = used(&got, &q, &k, &v, dv, &told);
                assert!(out > 0.8 && lse > 0.8, "{told}: only {out:.3}, {lse:.3} of the bounds are needed");
            }
        }
    }
}

/// The same with q: rounding it for the scan is all the error there is.
#[test]
fn reached_where_q_is_rounded() {
    let cpu = Cpu::new(Isa::best(), 1).unwrap();
    let (n, dv) = (TILE, 16);
    for d in [32, 128, 256] {
        // Channel 0 sets the step; it is the same in all tokens. The others are rounded to 0.
        let step = 0.6 / (4 * d) as f32;
        let unit = scale(128);
        let q: Vec<f32> = (0..d).map(|c| step / unit * if c == 0 { 127.0 * 257.0 } else { 0.499 }).collect();
        for loud in [3, 60] {
            // The last token has the smallest digits: not those that count.
            let digit = |t: usize| {
                if t == loud {
                    7.0
                } else if t == n - 1 {
                    0.0
                } else {
                    -7.0
                }
            };
            let k: Vec<f32> = (0..n * d).map(|i| unit * if i % d == 0 { 7.0 } else { digit(i / d) }).collect();
            let v = one_loud(n, dv, loud);
            let run = Single::new(Format::Aligned, shape(1, 1, d, dv, Dtype::F32, 4), 0);
            run.append(&k, &v);
            let how = How { mode: Mode::Guaranteed, tolerance: 1e-6, scale: 1.0, dense: false };
            let told = format!("d {d} loud {loud}");
            let (out, lse) = used(&run.attend(&cpu, &q, &[(0, n)], how).unwrap(), &q, &k, &v, dv, &told);
            assert!(out > 0.65 && lse > 0.65, "{told}: only {out:.3}, {lse:.3} of the bounds are needed");
        }
    }
}

/// The same with rows of a reopened tile whose scales have grown: what they lost twice is in the bound.
#[test]
fn reached_where_a_tile_is_reopened() {
    let cpu = Cpu::new(Isa::best(), 1).unwrap();
    let (d, dv, planes, kept) = (16, 16, 2, 100);
    for old in [128u8, 129, 130, 131] {
        let new = old + 1;
        let stored = |x: f32, byte: u8| decode(encode(x, inverse(byte)) & 0xff00, planes) * scale(byte);
        // The two values, as far as possible below and above what both become.
        let mut cells = std::collections::BTreeMap::<u32, (f32, f32)>::new();
        for i in 0..60_000 {
            let x = i as f32 * 1e-4 * scale(old);
            let cell = cells.entry(stored(stored(x, old), new).to_bits()).or_insert((x, x));
            cell.1 = x;
        }
        let way = |(&bits, &(a, b)): (&u32, &(f32, f32))| (f32::from_bits(bits) - a).min(b - f32::from_bits(bits));
        let cell = cells.iter().max_by(|&a, &b| way(a).total_cmp(&way(b))).unwrap();
        let (quiet, loud) = *cell.1;
        let known = LEFT[planes] * (scale(old) + scale(new));
        assert!(way(cell) > 0.7 * known, "{} of {known}", way(cell));
        let q = vec![0.7 / (known * d as f32); d];
        // Tokens that set the old scale go; one that needs the new one, and has no weight, comes.
        let mut k: Vec<f32> = (0..200 * d).map(|i| if i / d == 7 { loud } else { quiet }).collect();
        k[150 * d..].fill(-PEAK * scale(old));
        k[110 * d..120 * d].fill(-PEAK * scale(old));
        let mut v = one_loud(200, dv, 7);
        let run = Single::new(Format::Aligned, shape(1, 1, d, dv, Dtype::F32, planes), 0);
        run.append(&k, &v);
        run.cache.truncate(run.sequence, kept).unwrap();
        k.truncate(kept * d);
        v.truncate(kept * dv);
        let more = vec![-PEAK * scale(new); d];
        run.append(&more, &vec![0.0; dv]);
        k.extend(more);
        v.extend(vec![0.0; dv]);
        for dense in [false, true] {
            let how = How { mode: Mode::Guaranteed, tolerance: 1e-6, scale: 1.0, dense };
            let got = run.attend(&cpu, &q, &[(0, kept + 1)], how).unwrap();
            let (out, lse) = used(&got, &q, &k, &v, dv, &format!("scale {old} dense {dense}"));
            assert!(out > 0.6 && lse > 0.6, "only {out:.3}, {lse:.3} of the bounds are needed");
        }
    }
}

/// In guaranteed mode the bound meets the tolerance for every head, but for what all digits, and q's rounding, leave.
#[test]
fn guaranteed_is_guaranteed() {
    let cpu = Cpu::new(Isa::best(), 1).unwrap();
    let mut rng = Rng::new(11);
    for round in 0..300 {
        let kind = [0, 5, 9, 0, 8][round % 5];
        let n = if round % 60 == 59 { 1500 } else { 1 + rng.below(300) };
        let (d, g) = (16 + 16 * rng.below(4), 1 + rng.below(4));
        let Case { k, v, q } = case(&mut rng, kind, n, d, d, g);
        let run = Single::new(Format::Aligned, shape(g, 1, d, d, Dtype::F32, 4), 0);
        run.append(&k, &v);
        let tolerance = 10f32.powf(-0.5 - rng.uniform() as f32);
        let how = How { mode: Mode::Guaranteed, tolerance, scale: 1.0 / (d as f32).sqrt(), dense: false };
        let got = run.attend(&cpu, &q, &[(0, n)], how).unwrap();
        let exact = run.attend(&cpu, &q, &[(0, n)], How { mode: Mode::Exact, ..how }).unwrap();
        for h in 0..g {
            let limit = tolerance * got.amplitude[h] + 2.0 * exact.bound[h];
            let told = format!("kind {kind} n {n} d {d} tolerance {tolerance} A {}", got.amplitude[h]);
            assert!(got.bound[h] <= limit, "{told}: bound {}, of all digits {}", got.bound[h], exact.bound[h]);
        }
    }
}

/// The same where tokens are alike, so that all of them use up their shares at one tolerance or another.
#[test]
fn guaranteed_where_shares_are_used_up() {
    let cpu = Cpu::new(Isa::best(), 1).unwrap();
    let mut rng = Rng::new(14);
    let (n, d) = (100, 64);
    let k = rng.normals(n * d);
    let v: Vec<f32> = (0..n * d).map(|_| PEAK * scale(128) * if rng.below(2) == 0 { 1.0 } else { -1.0 }).collect();
    let direction = rng.normals(d);
    let run = Single::new(Format::Aligned, shape(1, 1, d, d, Dtype::F32, 4), 0);
    run.append(&k, &v);
    let mut most = 0.0f32;
    for i in 0..400 {
        let (tolerance, size) = (0.01 * 1.1f32.powi(i % 20), 1e-4 * 1.3f32.powi(i / 20));
        let q: Vec<f32> = direction.iter().map(|x| size * x).collect();
        let how = How { mode: Mode::Guaranteed, tolerance, scale: 1.0, dense: false };
        let got = run.attend(&cpu, &q, &[(0, n)], how).unwrap();
        let part = got.bound[0] / (tolerance * got.amplitude[0]);
        assert!(part <= 1.0, "q {size} tolerance {tolerance}: the bound is {part} of it");
        most = most.max(part);
    }
    assert!(most > 0.8, "at most {most} of the tolerance is used");
}

/// Tokens of whose V nothing is read stand for the mean of their tile, and what they differ from it is in the bound.
#[test]
fn what_is_not_read_is_the_mean() {
    let cpu = Cpu::new(Isa::best(), 1).unwrap();
    let (n, d) = (2 * TILE, 16);
    let how = How { mode: Mode::Expected, tolerance: 1e6, scale: 1.0, dense: false };
    // Tile 0 has the values 1, tile 1 the values -3; token 40 is an exception.
    let mut v: Vec<f32> = (0..n * d).map(|i| if i < TILE * d { 1.0 } else { -3.0 }).collect();
    v[40 * d..41 * d].fill(-1.0);
    let run = Single::new(Format::Aligned, shape(1, 1, d, d, Dtype::F32, 4), 0);
    run.append(&vec![0.0; n * d], &v);
    let q = vec![0.0; d];
    let attend = |from, to| {
        let got = run.attend(&cpu, &q, &[(from, to)], how).unwrap();
        assert_eq!(got.stats.planes_v[0], (to - from) as u64, "V was read");
        let (want, _) = attention64(&q, &vec![0.0; (to - from) * d], &v[from * d..to * d], d, 1.0);
        let error = (f64::from(got.out[0]) - want[0]).abs();
        assert!(error <= f64::from(got.bound[0]), "{from}..{to}: error {error}, bound {}", got.bound[0]);
        error
    };
    // The mean is known to half a sixteenth of its scale.
    assert!(attend(0, n) < 0.05 && attend(TILE, n) < 0.05);
    assert!(attend(40, 41) > 1.9, "the exception is not near the mean");
}

/// Sums over parts of a context, merged in any order, are those of the whole.
#[test]
fn sums_add_over_parts() {
    let mut rng = Rng::new(12);
    for round in 0..2000 {
        let loose = round % 4 == 0;
        let tokens: Vec<(f32, ScoreError, f32, f64)> = (0..1 + rng.below(6))
            .map(|_| {
                let bound = rng.uniform() as f32 * if loose { 70.0 } else { 1.0 };
                let left = LEFT[rng.below(5)];
                (6.0 * rng.normal(), ScoreError { bound, rms: bound / 3.0 }, left, rng.uniform())
            })
            .collect();
        let of = |tokens: &[(f32, ScoreError, f32, f64)], reference: f32| {
            let mut sums = Sums::at(reference);
            for &(s, error, left, unit) in tokens {
                let e = f64::from(s - reference).exp();
                let class = [e, e * unit, (e * unit).powi(2)];
                sums.add_scores(error, class);
                sums.add_values(left, 0.1, class);
                sums.note(1, unit as f32 * PEAK);
            }
            sums
        };
        let max = tokens.iter().fold(f32::NEG_INFINITY, |m, t| m.max(t.0));
        let want = of(&tokens, max).certificate(0.5);
        let mut sums = Sums::EMPTY;
        for token in &tokens {
            sums.merge(&of(std::slice::from_ref(token), token.0));
            // As a part that is empty, or a new reference.
            sums.merge(&Sums::at(token.0 + rng.below(2) as f32));
            sums.merge(&Sums::EMPTY);
        }
        let got = sums.certificate(0.5);
        let same = |a: f32, b: f32| (a - b).abs() <= 1e-5 * a.abs().max(b.abs()) + 1e-7;
        assert!(
            same(got.lse, want.lse)
                && same(got.bound, want.bound)
                && same(got.lse_bound, want.lse_bound)
                && same(got.estimate, want.estimate)
                && same(got.amplitude, want.amplitude),
            "{got:?} {want:?}"
        );
    }
    // A large LSE is rounded by more than anything else is off.
    for max in [1e5f32, 3e6, -7e7] {
        let mut sums = Sums::at(max);
        sums.add_scores(ScoreError { bound: 0.0, rms: 0.0 }, [1.7; 3]);
        let (c, lse) = (sums.certificate(1.0), f64::from(max) + 1.7f64.ln());
        assert!((f64::from(c.lse) - lse).abs() <= f64::from(c.lse_bound));
    }
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
