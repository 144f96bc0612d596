//! Pages against the definition of the format, in float64.

mod common;

use alignedkv::format::aligned::Tile;
use alignedkv::format::{Dtype, Format, LEFT, Layout, Source, TILE, scale};
use common::*;

fn rows(rng: &mut Rng, n: usize, d: usize, dtype: Dtype) -> Vec<f32> {
    let mut x = rng.normals(n * d);
    for (i, x) in x.iter_mut().enumerate() {
        match rng.below(40) {
            0 => *x *= 100.0,
            1 => *x = 0.0,
            2 => *x *= 1e-6,
            _ => *x *= 1.0 + (i % d) as f32,
        }
    }
    round(&mut x, dtype);
    x
}

fn page(layout: &Layout, source: &Source, skip: usize, steps: &[usize]) -> Vec<u64> {
    let mut page = vec![0u64; layout.page_bytes() / 8];
    for pair in steps.windows(2) {
        layout.encode(bytes_mut(&mut page), source, skip, pair[0], pair[1]);
    }
    page
}

fn bytes(page: &[u64]) -> &[u8] {
    // SAFETY: plain bytes.
    unsafe { std::slice::from_raw_parts(page.as_ptr().cast(), page.len() * 8) }
}

fn bytes_mut(page: &mut [u64]) -> &mut [u8] {
    // SAFETY: plain bytes.
    unsafe { std::slice::from_raw_parts_mut(page.as_mut_ptr().cast(), page.len() * 8) }
}

#[test]
fn a_prefix_is_within_what_it_leaves_out() {
    let mut rng = Rng::new(1);
    for round in 0..60 {
        let (d, dv) = (16 + 8 * rng.below(31), 16 + 8 * rng.below(31));
        let (heads, planes) = (1 + rng.below(3), 2 + rng.below(3));
        let dtype = [Dtype::F32, Dtype::F16, Dtype::Bf16][round % 3];
        let n = [1, 2, 127, 128][rng.below(4)];
        let s = shape(2, heads, d, dv, dtype, planes);
        let layout = Layout::new(Format::Aligned, s);
        let (k, v) = (rows(&mut rng, n, heads * d, dtype), rows(&mut rng, n, heads * dv, dtype));
        let (pk, pv) = (Packed::new(&k, heads, d, dtype), Packed::new(&v, heads, dv, dtype));
        let source = Source { k: pk.rows(), v: pv.rows(), base: None, base_rows: 0 };
        let skip = if n > 4 { rng.below(5) } else { 0 };
        let page = page(&layout, &source, skip, &[0, n]);
        for h in 0..heads {
            let tile = Tile::new(&s, layout.part(bytes(&page), h));
            let mut out = vec![0.0; 256];
            for row in skip..n {
                for p in 0..=planes {
                    if p > 0 {
                        tile.decode_k(row, p, &mut out[..d]);
                        for c in 0..d {
                            let x = f64::from(k[(row * heads + h) * d + c]);
                            let limit = f64::from(LEFT[p]) * f64::from(scale(tile.k_scales[c]));
                            assert!((f64::from(out[c]) - x).abs() <= limit * (1.0 + 1e-6), "K {row} {c} {p}");
                        }
                    }
                    let mean = if p == 0 { tile.mean(&mut out[..dv]) } else { 0.0 };
                    tile.decode_v(row, p, &mut out[..dv]);
                    for c in 0..dv {
                        let x = f64::from(v[(row * heads + h) * dv + c]);
                        let limit = f64::from(LEFT[p]) * f64::from(scale(tile.v_scales[row])) + f64::from(mean);
                        assert!((f64::from(out[c]) - x).abs() <= limit * (1.0 + 1e-6), "V {row} {c} {p}");
                    }
                }
            }
        }
    }
}

/// The mean of a closed tile is that of its tokens, but for rounding: half a sixteenth of its scale, and what V's own
/// planes leave out. An open tile has none.
#[test]
fn the_mean_is_the_mean() {
    let mut rng = Rng::new(4);
    for round in 0..40 {
        let (d, planes, dtype) = (16 + 8 * rng.below(31), 2 + rng.below(3), [Dtype::F32, Dtype::F16][round % 2]);
        let s = shape(1, 1, d, d, dtype, planes);
        let layout = Layout::new(Format::Aligned, s);
        let n = [TILE - 1, TILE][rng.below(2)];
        let skip = rng.below(5);
        let mut v = rows(&mut rng, n, d, dtype);
        v.iter_mut().enumerate().for_each(|(i, x)| *x += 3.0 * ((i % d) as f32).sin());
        common::round(&mut v, dtype);
        let packed = Packed::new(&v, 1, d, dtype);
        let source = Source { k: packed.rows(), v: packed.rows(), base: None, base_rows: 0 };
        let page = page(&layout, &source, skip, &[0, n / 2, n]);
        let tile = Tile::new(&s, layout.part(bytes(&page), 0));
        let mut mean = vec![0.0; d];
        let most = tile.mean(&mut mean);
        if n < TILE {
            assert_eq!(most, 0.0);
            continue;
        }
        let left: f64 = (skip..n).map(|i| f64::from(LEFT[planes]) * f64::from(scale(tile.v_scales[i]))).sum();
        let count = (n - skip) as f64;
        for c in 0..d {
            let want = (skip..n).map(|i| f64::from(v[i * d + c])).sum::<f64>() / count;
            let limit = f64::from(scale(tile.meta.v_mean)) / 32.0 * 1.0001 + left / count;
            assert!((f64::from(mean[c]) - want).abs() <= limit, "channel {c}: {} {want}", mean[c]);
            assert!(mean[c].abs() <= most);
        }
    }
}

/// What is in a page depends on the rows alone: in one call, or one by one with scales growing on the way.
#[test]
fn encoding_is_a_function_of_the_rows() {
    let mut rng = Rng::new(2);
    for format in [Format::Aligned, Format::Published, Format::Raw] {
        for round in 0..30 {
            let (d, heads, planes) = (16 + 8 * rng.below(8), 1 + rng.below(2), 2 + rng.below(3));
            let dtype = if format == Format::Published { Dtype::F16 } else { [Dtype::F32, Dtype::F16][round % 2] };
            let s = shape(1, heads, d, d, dtype, planes);
            let layout = Layout::new(format, s);
            let n = [1, 5, 64, 127, 128][rng.below(5)];
            let (k, v) = (rows(&mut rng, n, heads * d, dtype), rows(&mut rng, n, heads * d, dtype));
            let (pk, pv) = (Packed::new(&k, heads, d, dtype), Packed::new(&v, heads, d, dtype));
            let source = Source { k: pk.rows(), v: pv.rows(), base: None, base_rows: 0 };
            let skip = if format == Format::Aligned { rng.below(5) } else { 0 };
            let whole = page(&layout, &source, skip, &[0, n]);
            let single: Vec<usize> = (0..=n).collect();
            assert!(page(&layout, &source, skip, &single) == whole, "{format:?} n {n} skip {skip}: row by row");
            let cut = rng.below(n);
            if cut > 0 {
                assert!(page(&layout, &source, skip, &[0, cut, n]) == whole, "{format:?} n {n}: cut at {cut}");
            }
            if layout.lossless() {
                let (mut a, mut b) = (vec![0.0; d], vec![0.0; d]);
                for (row, h) in (0..n).flat_map(|r| (0..heads).map(move |h| (r, h))) {
                    layout.decode(bytes(&whole), h, row, &mut a, &mut b);
                    let at = (row * heads + h) * d;
                    assert!(a == k[at..at + d] && b == v[at..at + d], "{format:?}: row {row} head {h}");
                }
            }
        }
    }
}

/// A reopened tile knows its old rows as they were stored; growing scales cost what `Meta::slack` says.
#[test]
fn reopened_rows_stay_within_their_slack() {
    let mut rng = Rng::new(3);
    let mut grown = 0;
    for round in 0..200 {
        let (d, planes, dtype) = (16 + 8 * rng.below(4), 2 + rng.below(3), Dtype::F32);
        let s = shape(1, 1, d, d, dtype, planes);
        let layout = Layout::new(Format::Aligned, s);
        let (mut k, v) = (rows(&mut rng, TILE, d, dtype), rows(&mut rng, TILE, d, dtype));
        let old = k.clone();
        let left = 1 + rng.below(TILE - 1);
        for x in &mut k[left * d..] {
            *x *= 1.0 + (round % 7) as f32;
        }
        let (po, pk, pv) = (Packed::new(&old, 1, d, dtype), Packed::new(&k, 1, d, dtype), Packed::new(&v, 1, d, dtype));
        let first = Source { k: po.rows(), v: pv.rows(), base: None, base_rows: 0 };
        let base = page(&layout, &first, 0, &[0, TILE]);
        let mut again = base.clone();
        layout.reopen(bytes_mut(&mut again));
        let source = Source { k: pk.rows(), v: pv.rows(), base: Some(bytes(&base)), base_rows: left };
        let mut at = left;
        while at < TILE {
            let to = (at + 1 + rng.below(40)).min(TILE);
            layout.encode(bytes_mut(&mut again), &source, 0, at, to);
            at = to;
        }
        let tile = Tile::new(&s, layout.part(bytes(&again), 0));
        grown += usize::from(tile.meta.slack > 0.0);
        let mut out = vec![0.0; d];
        for row in 0..TILE {
            for p in 1..=planes {
                tile.decode_k(row, p, &mut out);
                for c in 0..d {
                    let limit = f64::from(LEFT[p] + tile.meta.slack) * f64::from(scale(tile.k_scales[c]));
                    let error = (f64::from(out[c]) - f64::from(k[row * d + c])).abs();
                    assert!(
                        error <= limit * (1.0 + 1e-6),
                        "row {row} of {left} + channel {c} planes {p}: {error} {limit}"
                    );
                }
            }
        }
    }
    assert!(grown > 50, "only {grown} tiles outgrew their scales: the test shows nothing");
}
