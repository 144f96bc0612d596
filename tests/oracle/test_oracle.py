"""The library against its definition in NumPy: codes bit for bit, attention by what it reads and how far off it is.

python test_oracle.py PATH/libalignedkv.so [--json FILE]    (numpy only; FILE gets the figures for README.md)
"""
import ctypes as C
import json
import pathlib
import sys

import numpy as np

import aligned
import paper
from abi import *

ROOT = pathlib.Path(__file__).resolve().parents[2]

passed = failed = 0


def check(ok, text):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print("FAILED:", text)


def rows(x):
    assert x.flags.c_contiguous and x.ndim == 3
    return Rows(data=x.ctypes.data, dtype={np.dtype(np.float32): F32, np.dtype(np.float16): F16}[x.dtype])


class Sequence:
    """A cache of one layer and one sequence. k [n, heads, d], v likewise; all float32 or float16."""

    def __init__(self, lib, k, v, group=1, planes=4, format=ALIGNED, exact_head=NONE, steps=None):
        self.lib, (_, self.heads, self.dk), (_, _, self.dv) = lib, k.shape, v.shape
        dtype = rows(k).dtype
        layer = Layer(n_q_heads=self.heads * group, n_kv_heads=self.heads, dim_k=self.dk, dim_v=self.dv, dtype_k=dtype, dtype_v=dtype,
                      planes_k=planes, planes_v=planes)
        self.cache, self.batch, self.sequence = C.c_void_p(), C.c_void_p(), C.c_uint64()
        lib("cache_create", lib.context, C.byref(sized(Cache, format=format, n_layers=1, layers=C.addressof(layer), exact_head=exact_head)), C.byref(self.cache))
        lib("sequence_create", self.cache, C.byref(self.sequence))
        lib("batch_create", self.cache, C.byref(sized(Batch)), C.byref(self.batch))
        at = 0
        for n in steps or [len(k)]:
            self.begin(n)
            part = np.ascontiguousarray(k[at:at + n]), np.ascontiguousarray(v[at:at + n])
            lib("quantize_kv", self.batch, 0, C.byref(rows(part[0])), C.byref(rows(part[1])), None)
            lib("batch_commit", self.batch)
            at += n

    def begin(self, n_new, n_q=0):
        n_new, n_q = C.c_int32(n_new), C.c_int32(n_q)
        step = sized(Batch, n_sequences=1, sequences=C.addressof(self.sequence), n_new=C.addressof(n_new), n_q=C.addressof(n_q))
        self.lib("batch_begin", self.batch, C.byref(step), None)

    def decode(self, n):
        k, v = np.empty((n, self.heads, self.dk), np.float32), np.empty((n, self.heads, self.dv), np.float32)
        self.lib("dequantize_kv", self.cache, self.sequence, 0, C.c_int64(0), C.c_int64(n), C.byref(rows(k)), C.byref(rows(v)), None)
        return k, v

    def attend(self, q, n, tolerance, mode):
        """One query row q [heads * g, d] over the first n tokens: out, bound, Stats."""
        q = np.ascontiguousarray(q[None])
        out, bound, stats = np.empty((1, q.shape[1], self.dv), np.float32), np.empty(q.shape[1], np.float32), Stats()
        to = C.c_int64(n)
        self.begin(0, 1)
        call = sized(Attention, q=rows(q), out=rows(out), tolerance=tolerance, mode=mode, kv_to=C.addressof(to), bound=bound.ctypes.data, stats=C.addressof(stats))
        self.lib("aligned_attention", self.batch, 0, C.byref(call))
        self.lib("batch_commit", self.batch)
        return out[0].astype(np.float64), bound, stats

    def close(self):
        self.lib("batch_destroy", self.batch)
        self.lib("cache_destroy", self.cache)


# ---------------------------------------------------------------- data
def load(path):
    """A safetensors file of f16 and f32 arrays."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    out = {}
    for name, t in json.loads(raw[8:8 + size]).items():
        if name != "__metadata__":
            a, b = t["data_offsets"]
            out[name] = np.frombuffer(raw, {"F16": np.float16, "F32": np.float32}[t["dtype"]], offset=8 + size + a, count=(b - a) // {"F16": 2, "F32": 4}[t["dtype"]]).reshape(t["shape"])
    return out


def synthetic(rng):
    """Rows that codes may stumble over: name, [n, heads, d]."""
    n, h, d = 300, 2, 32
    x = rng.standard_normal((n, h, d))
    yield "normal", x
    yield "subnormal", x * 1e-40
    yield "small", x * 1e-7
    yield "huge", x / np.abs(x).max() * 1e10
    yield "constant", np.full_like(x, 0.37)
    yield "zeros", np.zeros_like(x)
    yield "negative zeros", np.full_like(x, -0.0)
    yield "mixed magnitudes", x * 10.0 ** rng.integers(-12, 9, x.shape)
    yield "growing", x * 1.05 ** np.arange(n)[:, None, None]
    yield "one channel", x * (np.arange(d) == 5) * 1e4
    yield "powers of two", 2.0 ** rng.integers(-20, 20, x.shape)
    # Right at the largest value of every scale, and one step to either side.
    edges = np.concatenate([np.nextafter(aligned.LIMIT, np.float32(s)) if s is not None else aligned.LIMIT for s in (None, 0, 3e38)])
    edges = edges[edges <= aligned.LIMIT[-1]]
    yield "edges of scales", np.resize(edges, (n, h, d)) * np.where(rng.random((n, h, d)) < 0.5, -1, 1)


# ---------------------------------------------------------------- (a) codes
def oracle_decode(k, v, planes):
    out = np.empty(k.shape, np.float32), np.empty(v.shape, np.float32)
    for h in range(k.shape[1]):
        for o, x, encode in ((out[0], k, aligned.encode_k), (out[1], v, aligned.encode_v)):
            o[:, h] = aligned.decode(*encode(x[:, h].astype(np.float32)), planes)
    return out


def same_codes(lib, name, k, v, planes, steps=None):
    s = Sequence(lib, k, v, planes=planes, steps=steps)
    for what, got, want in zip("KV", s.decode(len(k)), oracle_decode(k, v, planes)):
        wrong = np.argwhere(got.view(np.uint32) != want.view(np.uint32))
        i = tuple(wrong[0]) if len(wrong) else ()
        check(not len(wrong), f"{what} of {name}, {planes} planes, {len(k)} rows{' one by one' if steps else ''}: {len(wrong)} differ, first {i}: {got[i]} is not {want[i]}" if i else "")
    s.close()


def codes(lib, traces):
    rng = np.random.default_rng(1)
    for name, x in synthetic(rng):
        for dtype in (np.float32, np.float16):
            if dtype == np.float16 and np.abs(x).max() > 6e4:
                continue
            k, v = x.astype(dtype), np.ascontiguousarray(x[::-1, :, :16]).astype(dtype)
            for planes in (2, 3, 4):
                same_codes(lib, f"{name} {dtype.__name__}", k, v, planes)
            same_codes(lib, f"{name} {dtype.__name__}", k, v, 4, steps=[1] * len(k))
    x = rng.standard_normal((400, 2, 48)).astype(np.float32)
    for n in (1, 2, 127, 128, 129, 255, 256, 257, 384, 400):
        same_codes(lib, "tile edges", x[:n], x[:n], 4)
    for i in range(8):
        cuts = np.unique(np.r_[0, rng.integers(1, 400, 6), 400])
        same_codes(lib, "random steps", x, x, 2 + i % 3, steps=[int(n) for n in np.diff(cuts)])
    for name in sorted(n[:-2] for n in traces if n.endswith(".k")):
        k, v = traces[f"{name}.k"], traces[f"{name}.v"]
        same_codes(lib, f"trace {name}", k, v, 4)
        same_codes(lib, f"trace {name}", k[:200], v[:200], 3, steps=[1] * 200)


# ---------------------------------------------------------------- (b) attention
def cases(traces, queries=4):
    """One layer at a time: k, v [n, heads, d] and (q row [heads * g, d], tokens it sees)."""
    for name in sorted(n[:-2] for n in traces if n.endswith(".k")):
        q, k, v = (traces[f"{name}.{c}"] for c in "qkv")
        picks = np.linspace(len(q) // 2, len(q) - 1, queries).astype(int)
        yield k, v, [(q[i], len(k) - len(q) + i + 1) for i in picks]


class Tally:
    """Errors and bits of many heads."""

    def __init__(self):
        self.errors, self.bits = [], []

    def add(self, out, want, bits):
        self.errors += list(np.linalg.norm(out - want, axis=1) / np.linalg.norm(want, axis=1))
        self.bits.append(bits)

    def figures(self):
        return np.mean(self.bits), np.median(self.errors), np.quantile(self.errors, 0.95)


def bits_of(stats, d):
    return 8 * (stats.bytes_k + stats.bytes_v) / (stats.tokens * 2 * d)


SETTINGS = [(EXPECTED, 1e-3), (EXPECTED, 3e-3), (EXPECTED, 1e-2), (GUARANTEED, 1e-1)]


def attention(lib, traces, source):
    ours = {(s, head): Tally() for s in SETTINGS for head in (NONE, 4)}
    oracle = {s: Tally() for s in SETTINGS}
    raw, exact = Tally(), Tally()
    for k, v, picks in cases(traces):
        plain, headed, rawly = (Sequence(lib, k, v, 2, exact_head=h, format=f) for h, f in ((NONE, ALIGNED), (4, ALIGNED), (NONE, RAW)))
        d = k.shape[2]
        for q, n in picks:
            per_head = [(q[2 * h:2 * h + 2].astype(np.float64), k[:n, h].astype(np.float64), v[:n, h].astype(np.float64)) for h in range(k.shape[1])]
            want = np.concatenate([aligned.attention(*x) for x in per_head])
            for mode, tolerance in SETTINGS:
                theirs = [aligned.progressive_attention(*x, tolerance, mode == GUARANTEED) for x in per_head]
                oracle[mode, tolerance].add(np.concatenate([t[0] for t in theirs]), want, np.mean([t[3:] for t in theirs]))
                for sequence, head in ((plain, NONE), (headed, 4)):
                    out, bound, stats = sequence.attend(q, n, tolerance, mode)
                    ours[(mode, tolerance), head].add(out, want, bits_of(stats, d))
                    worst = (np.abs(out - want).max(1) / bound).max()
                    check(worst <= 1, f"certificate exceeded: error / bound {worst:.3f} at tolerance {tolerance:g}")
            for tally, sequence, mode in ((raw, rawly, EXPECTED), (exact, plain, EXACT)):
                out, bound, stats = sequence.attend(q, n, 0, mode)
                tally.add(out, want, bits_of(stats, d))
                check((np.abs(out - want).max(1) <= bound).all(), "certificate exceeded")
        for s in (plain, headed, rawly):
            s.close()

    table = []

    def line(name, tally, beside=None):
        b, median, p95 = tally.figures()
        text = f"  {name:44s} {b:6.2f} bits  median {median:.1e}  p95 {p95:.1e}"
        if beside:
            text += "   (oracle {:.2f}, {:.1e}, {:.1e})".format(*beside.figures())
        print(text)
        table.append([name, f"{b:.2f}", f"{median:.1e}", f"{p95:.1e}"])

    print(f"relative L2 error of attention outputs on {source}")
    for (mode, tolerance) in SETTINGS:
        name = f"{('expected', 'guaranteed')[mode]}, tolerance {tolerance:g}"
        mine, theirs = ours[(mode, tolerance), NONE], oracle[mode, tolerance]
        line(name + " (no exact head)", mine, theirs)
        (b, median, p95), (ob, omedian, op95) = mine.figures(), theirs.figures()
        check(0.95 <= b / ob <= 1.05, f"{name}: {b:.3f} bits, oracle {ob:.3f}")
        check(median <= 1.1 * omedian, f"{name}: median error {median:.2e}, oracle {omedian:.2e}")
        check(p95 <= 1.1 * op95, f"{name}: p95 of errors {p95:.2e}, oracle {op95:.2e}")
        line(name, ours[(mode, tolerance), 4])
    line("exact (all 16 bits)", exact)
    line("raw f16", raw)
    check(max(exact.errors) < 1e-3, f"exact mode is off by {max(exact.errors):.1e}")
    check(max(raw.errors) < 1e-5, f"raw rows are off by {max(raw.errors):.1e}")
    return table


# ---------------------------------------------------------------- (c) the published format
def published(lib, traces):
    ours, theirs, worst = Tally(), Tally(), 0
    for k, v, picks in cases(traces):
        for h in range(k.shape[1]):
            s = Sequence(lib, np.ascontiguousarray(k[:, h:h + 1]), np.ascontiguousarray(v[:, h:h + 1]), format=PUBLISHED)
            for q, n in picks:
                q = q[2 * h]
                k64, v64 = k[:n, h].astype(np.float64), v[:n, h].astype(np.float64)
                want, kbits, vbits = paper.attention(q.astype(np.float64), k64, v64)
                out, bound, stats = s.attend(q[None], n, 0, EXPECTED)
                truth = aligned.attention(q[None].astype(np.float64), k64, v64)
                ours.add(out, truth, bits_of(stats, k.shape[2]))
                theirs.add(want[None], truth, (kbits + vbits) / 2)
                error = np.linalg.norm(out[0] - want) / np.linalg.norm(want)
                worst = max(worst, error)
                check(np.isinf(bound).all(), "the published scheme has no bound")
            s.close()
    print("  {:44s} {:6.2f} bits  median {:.1e}  p95 {:.1e}   (oracle {:.2f}, {:.1e}, {:.1e}; at most {:.1e} apart)".format(
        "AlignedKV as published", *ours.figures(), *theirs.figures(), worst))
    check(worst <= 2e-3, f"published format: {worst:.1e} away from its definition")
    check(abs(np.mean(ours.bits) / np.mean(theirs.bits) - 1) <= 0.03, f"published format: {np.mean(ours.bits):.2f} bits, oracle {np.mean(theirs.bits):.2f}")
    b, median, p95 = ours.figures()
    return [["AlignedKV as published", f"{b:.2f}", f"{median:.1e}", f"{p95:.1e}"]]


def made_up(rng):
    """Stands in for the traces: queries that find a few of their keys, two heads, 1000 tokens."""
    z = {}
    for layer in range(3):
        k, v = rng.standard_normal((2, 1000, 2, 64)) * 1.5 ** rng.standard_normal((2, 1, 2, 64))
        q = rng.standard_normal((16, 4, 64)) + 1.5 * k[rng.integers(0, 900, 16)].repeat(2, 1)
        z |= {f"p0.l{layer}.{c}": x.astype(np.float16) for c, x in zip("qkv", (q, k, v))}
    return z


def main(path, target=None):
    lib = Library(path)
    file = ROOT / "examples/data/traces.safetensors"
    traces = load(file) if file.exists() else {}
    codes(lib, traces)
    source = f"{file.name}: a language model at 2048 tokens" if traces else "made-up rows (examples/data/traces.safetensors is missing)"
    traces = traces or made_up(np.random.default_rng(2))
    table = attention(lib, traces, source)
    table += published(lib, traces)
    if target:
        title = "Relative L2 error of attention outputs against float64, on the rows of a small causal language model (2048 tokens, head_dim 64, GQA groups of 2):"
        figures = {"table": {"title": title, "columns": ["scheme", "bits read per element of K and V", "median", "95th percentile"],
                             "rows": [r for r in table if "no exact head" not in r[0]]}}
        pathlib.Path(target).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(target).write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{passed} passed, {failed} failed")
    return failed != 0


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if a != "--json"]
    sys.exit(main(*arguments))
