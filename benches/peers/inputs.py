#!/usr/bin/env python3
"""Inputs of the decode benchmark: q, K and V of one decode step, written to a file and described (NumPy only).

  inputs.py --data reallike --heads 32 --kv-heads 8 --dim 128 --lengths 32768 --entropy 3 --out FILE

A file is, per sequence and little-endian: q f32 [heads][dim], K f16 [n][kv_heads][dim], V f16 [n][kv_heads][dim].
The query is the last position's: it sees all n tokens, scores are q . k / sqrt(dim).

real      K, V (after RoPE) and q of the demo model over passages of examples/data/eval.txt. dim is 64.
reallike  any dim of 64, 128, 256: drawn with the means and covariances of the demo model's heads, and what large models
          have and the demo model lacks: outlier channels, an attention sink, recency; at an entropy that is asked for.
normal    K, V, q ~ N(0, 1): flat attention, the worst case.
The same arguments give the same file.
"""
import argparse
import functools
import json
import math
import os
import pathlib
import struct
import sys

import numpy as np

DATA = pathlib.Path(__file__).resolve().parents[2] / "examples/data"
PASSAGE = 2048  # bytes: the demo model's context
ABOUT = {
    "real": "K, V and q of the demo model. A KV head is a head of one of its layers over a passage of text; query heads are the model's own "
            "two per KV head at the last position, and for larger groups those of the positions before. Contexts longer than 2048 are "
            "passages joined, each with positions from 0: attention stays mostly within few of them, and beyond 32768 passages repeat.",
    "reallike": "drawn with per-head means and covariances of the demo model (2 or 4 heads side by side for 128 or 256 channels), heavy "
                "tails, outlier channels, a sink (first token: 20 to 50% of the mass in 9 of 10 heads, small V) and recency; each query "
                "head's temperature is set for the entropy asked for.",
    "normal": "K, V and q ~ N(0, 1): flat attention, the worst case.",
}


# ---- the demo model: what its heads see ----

def safetensors(path):
    blob = path.read_bytes()
    (n,) = struct.unpack("<Q", blob[:8])
    for name, t in json.loads(blob[8:8 + n]).items():
        if name != "__metadata__":
            begin, end = t["data_offsets"]
            yield name, np.frombuffer(blob[8 + n + begin:8 + n + end], {"F16": "<f2", "F32": "<f4"}[t["dtype"]]).reshape(t["shape"])


@functools.cache
def demo_model(work):
    """q f32 [passage][layer][2048][4][64], k and v f16 [passage][layer][2048][2][64], kept in `work` for the next run."""
    kept = pathlib.Path(work) / "demo-model.npz"
    if kept.exists():
        with np.load(kept) as z:
            return z["q"], z["k"], z["v"]
    config = json.loads((DATA / "tinylm.json").read_text())
    w = {name: t.astype(np.float32) for name, t in safetensors(DATA / "tinylm.safetensors")}
    dim, layers = config["head_dim"], config["num_hidden_layers"]
    angle = np.arange(PASSAGE)[:, None] * config["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
    cos, sin = np.cos(angle).astype(np.float32)[:, None], np.sin(angle).astype(np.float32)[:, None]
    causal = np.triu(np.full((PASSAGE, PASSAGE), -np.inf, np.float32), 1)

    def norm(x, gain):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + np.float32(config["rms_norm_eps"])) * gain

    def rope(x):
        a, b = np.split(x, 2, -1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def passage(tokens):
        x = w["embed.weight"][tokens]
        for i in range(layers):
            layer = {name.split(".", 2)[2]: t for name, t in w.items() if name.startswith(f"layers.{i}.")}
            y = norm(x, layer["attn_norm.weight"])
            q, k, v = ((y @ layer[f"w{c}.weight"].T).reshape(PASSAGE, -1, dim) for c in "qkv")
            q, k = rope(q), rope(k)
            yield q, k.astype(np.float16), v.astype(np.float16)
            if i + 1 == layers:
                return
            out = np.empty_like(q)
            for h in range(q.shape[1]):
                kv = h * k.shape[1] // q.shape[1]
                p = q[:, h] @ k[:, kv].T * np.float32(dim**-0.5) + causal
                p = np.exp(p - p.max(-1, keepdims=True))
                out[:, h] = p @ v[:, kv] / p.sum(-1, keepdims=True)
            x = x + out.reshape(PASSAGE, -1) @ layer["wo.weight"].T
            y = norm(x, layer["ffn_norm.weight"])
            gate = y @ layer["w_gate.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * (y @ layer["w_up.weight"].T)) @ layer["w_down.weight"].T

    text = np.frombuffer((DATA / "eval.txt").read_bytes(), np.uint8)
    per_layer = [list(passage(tokens)) for tokens in text[:len(text) // PASSAGE * PASSAGE].reshape(-1, PASSAGE)]
    q, k, v = (np.stack([np.stack([layer[c] for layer in p]) for p in per_layer]) for c in range(3))
    partial = kept.with_suffix(".partial.npz")
    np.savez(partial, q=q, k=k, v=v)
    os.replace(partial, kept)
    return q, k, v


def real_head(work, seed, index, group, n):
    """Query heads and rows of the index-th KV head: heads of all layers over one passage, then over the next."""
    q, k, v = demo_model(work)
    passages, layers, _, kv_heads, _ = k.shape
    layer, head, first = index // kv_heads % layers, index % kv_heads, seed + index // (layers * kv_heads)
    own = q.shape[3] // kv_heads
    order = [(first - i) % passages for i in range(-(-n // PASSAGE))][::-1]  # the query's passage comes last
    last = min(n, PASSAGE) - 1
    rows = [np.concatenate([x[p, layer, :last + 1, head] for p in order])[-n:] for x in (k, v)]
    which = index // (layers * kv_heads) if group < own else 0  # a group of one: each of the model's heads in turn
    return np.stack([q[order[-1], layer, last - j // own, head * own + (which + j) % own] for j in range(group)]), *rows


# ---- drawn like the demo model, and like larger ones ----

@functools.cache
def statistics(work):
    """Mean and covariance's Cholesky factor of k, v and each query head, per layer and KV head."""
    q, k, v = demo_model(work)
    _, layers, _, kv_heads, _ = k.shape
    own = q.shape[3] // kv_heads

    def of(x):
        x = x.reshape(-1, x.shape[-1]).astype(np.float64)
        factor = np.linalg.cholesky(np.cov(x.T) + 1e-6 * np.eye(x.shape[1]))
        return x.mean(0).astype(np.float32), factor.astype(np.float32)

    return [{"k": of(k[:, i, :, h]), "v": of(v[:, i, :, h]), "q": [of(q[:, i, :, h * own + j]) for j in range(own)]}
            for i in range(layers) for h in range(kv_heads)]


def draw(rng, blocks, n, spread=None):
    """n rows: blocks of channels, each with its own mean and covariance, times a row's spread."""
    dim = len(blocks[0][0])
    rows = rng.standard_normal((n, dim * len(blocks)), np.float32)
    if spread is not None:
        rows *= spread
    for i, (mean, factor) in enumerate(blocks):
        part = rows[:, i * dim:(i + 1) * dim]
        part[:] = part @ factor.T + mean
    return rows


def temperatures(x, target):
    """Factors per row of scores x [g][n] whose softmax has `target` nats each: Newton on log t, kept inside a bracket."""
    low, high = np.full(len(x), -12.0), np.full(len(x), 12.0)
    x = x - x.max(1, keepdims=True)
    log_t = -np.log(x.std(1)) + 0.5
    for _ in range(40):
        t = np.exp(log_t)[:, None]
        p = np.exp(t * x)
        total = p.sum(1)
        p /= total[:, None]
        mean = (p * x).sum(1)
        entropy = np.log(total) - t[:, 0] * mean
        slope = -t[:, 0]**2 * ((p * x * x).sum(1) - mean**2)
        if np.abs(entropy - target).max() < 1e-5:
            break
        low, high = np.where(entropy > target, log_t, low), np.where(entropy > target, high, log_t)
        with np.errstate(divide="ignore", invalid="ignore"):
            step = log_t - (entropy - target) / slope
        log_t = np.where((step > low) & (step < high), step, (low + high) / 2)
    return np.exp(log_t)


def mixed(p, rest):
    """Entropy of a token of mass p and others whose own entropy is `rest`."""
    return -p * np.log(p) - (1 - p) * np.log(1 - p) + (1 - p) * rest


def reallike_head(work, rng, index, group, dim, n, entropy):
    heads = statistics(work)
    width = len(heads[0]["k"][0])
    blocks = [heads[(index * (dim // width) + i) % len(heads)] for i in range(dim // width)]
    spread = np.exp(0.25 * rng.standard_normal((n, 1), np.float32))  # heavy tails: some rows stand out in all channels
    k = draw(rng, [b["k"] for b in blocks], n, spread)
    v = draw(rng, [b["v"] for b in blocks], n, np.exp(0.25 * rng.standard_normal((n, 1), np.float32)))
    q = np.concatenate([draw(rng, [b["q"][j % len(b["q"])] for b in blocks], 1) for j in range(group)])
    mean, sigma = k.mean(0), k.std(0)

    # Outlier channels: a large offset that all tokens share and 4 to 8 times the spread; q is small there.
    outliers = rng.choice(dim, dim // 32, replace=False)
    size = rng.uniform(4, 8, len(outliers)).astype(np.float32)
    k[:, outliers] = (k[:, outliers] - mean[outliers]) * size + rng.choice([-1, 1], len(outliers)) * 2 * size * sigma.mean()
    q[:, outliers] /= size

    # Recency: a direction in which k falls with the logarithm of the distance, and q has some of it.
    content = (q @ (k - k.mean(0)).T).std(1)
    age = -np.log1p(np.arange(n - 1, -1, -1, dtype=np.float32) / 16)
    age = (age - age.mean())[:, None]
    direction = (0.1 * sigma * rng.standard_normal(dim, np.float32))[None]
    k += age * direction
    share = rng.uniform(0.4, 2.4) * rng.uniform(0.7, 1.3, group).astype(np.float32)
    q += ((share * content - q @ direction[0]) / (direction @ direction.T)[0])[:, None] * direction

    # The sink's share of the mass; where the entropy asked for leaves no room for it, a smaller one.
    sink = np.where(rng.random(group) < 0.9, rng.uniform(0.2, 0.5, group), 0.02)
    room = 0.9 * math.log(n - 1)
    while (big := mixed(sink, room) < entropy).any():
        sink[big] *= 0.9
        if sink.min() < 1e-6:
            raise ValueError(f"entropy {entropy}: softmax over {n} tokens has at most {math.log(n):.2f} nats, too few for it and a sink")
    while (low := mixed(sink, 0.0) > 0.9 * entropy).any():
        sink[low] *= 0.9
    rest = (entropy - mixed(sink, 0.0)) / (1 - sink)

    k = k.astype(np.float16)
    scores = q.astype(np.float64) @ k[1:].T.astype(np.float64) / math.sqrt(dim)
    t = temperatures(scores, rest)
    q = (q * t[:, None]).astype(np.float32)
    scores *= t[:, None]
    top = scores.max(1)
    wanted = top + np.log(np.exp(scores - top[:, None]).sum(1)) + np.log(sink / (1 - sink))
    # The key next to the mean that gives each query head of the group its share.
    centre = k[1:].mean(0, dtype=np.float32).astype(np.float64)
    k[0] = centre + np.linalg.lstsq(q.astype(np.float64), wanted * math.sqrt(dim) - q @ centre, rcond=None)[0]
    v[0] *= 0.05
    return q, k, v.astype(np.float16)


def normal_head(rng, group, dim, n):
    rows = [rng.standard_normal((n, dim), np.float32).astype(np.float16) for _ in "kv"]
    return rng.standard_normal((group, dim), np.float32), *rows


# ---- files ----

def measure(q, k):
    """Per query head: entropy, tokens that hold 99% of the mass, the first token's share, the last 64 tokens'."""
    s = q.astype(np.float64) @ k.T.astype(np.float64) / math.sqrt(q.shape[1])
    s -= s.max(1, keepdims=True)
    p = np.exp(s)
    p /= (total := p.sum(1, keepdims=True))
    held = 1 + (np.cumsum(-np.sort(-p, 1), 1) < 0.99).sum(1)
    return np.stack([np.log(total[:, 0]) - (p * s).sum(1), np.minimum(held, p.shape[1]), p[:, 0], p[:, -64:].sum(1)], 1)


def make(out, data, heads, kv_heads, dim, lengths, entropy=None, seed=1, work=None):
    """Writes a file and returns its description."""
    if data not in ABOUT:
        raise ValueError(f"data {data}: expected one of {', '.join(ABOUT)}")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads: expected a multiple of {kv_heads} KV heads")
    if data == "real" and dim != 64 or dim not in (64, 128, 256):
        raise ValueError(f"dim {dim}: expected 64" + ", 128 or 256" * (data != "real"))
    if (entropy is not None) != (data == "reallike"):
        raise ValueError("an entropy is asked for with reallike, and only there")
    if min(lengths) < 64:
        raise ValueError(f"lengths {lengths}: expected at least 64 tokens each")
    out = pathlib.Path(out)
    work, group, measured = str(work or out.parent), heads // kv_heads, []
    partial = out.with_suffix(".partial")
    with open(partial, "wb+") as f:
        f.truncate(sum(4 * heads * dim + 4 * n * kv_heads * dim for n in lengths))
        begin = 0
        for i, n in enumerate(lengths):
            q = np.memmap(f, "<f4", "r+", begin, (kv_heads, group, dim))
            kv = np.memmap(f, "<f2", "r+", begin + q.nbytes, (2, n, kv_heads, dim))
            begin += q.nbytes + kv.nbytes
            for h in range(kv_heads):
                rng = np.random.default_rng([seed, i, h])
                if data == "real":
                    parts = real_head(work, seed - 1, i * kv_heads + h, group, n)
                elif data == "reallike":
                    parts = reallike_head(work, rng, i * kv_heads + h, group, dim, n, entropy)
                else:
                    parts = normal_head(rng, group, dim, n)
                if not all(np.isfinite(x).all() for x in parts):
                    raise ValueError(f"KV head {h} of sequence {i}: values beyond f16")
                q[h], kv[0, :, h], kv[1, :, h] = parts
                measured.append(measure(parts[0], parts[1]))
    os.replace(partial, out)
    m = np.concatenate(measured)
    low, high = np.percentile(m[:, 0], [5, 95])
    return {"data": data, "about": ABOUT[data], "heads": heads, "kv_heads": kv_heads, "dim": dim, "lengths": list(lengths), "seed": seed,
            "entropy_asked": entropy, "entropy": round(m[:, 0].mean(), 4), "entropy_p5": round(low, 4), "entropy_p95": round(high, 4),
            "tokens_99": round(m[:, 1].mean(), 1), "mass_first": round(m[:, 2].mean(), 4), "mass_last_64": round(m[:, 3].mean(), 4)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=ABOUT, required=True)
    parser.add_argument("--heads", type=int, required=True)
    parser.add_argument("--kv-heads", type=int, required=True)
    parser.add_argument("--dim", type=int, required=True)
    parser.add_argument("--lengths", type=lambda s: [int(n) for n in s.split(",")], required=True)
    parser.add_argument("--entropy", type=float, help="nats per query head (reallike)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", required=True)
    try:
        print(json.dumps(make(**vars(parser.parse_args()))))
    except ValueError as e:
        sys.exit(f"inputs.py: {e}")


if __name__ == "__main__":
    main()
