#!/usr/bin/env python3
"""Decode attention on a GPU, side by side with PyTorch's SDPA (flash, cuDNN) and, where it is installed, FlashInfer.

  decode.py --library libalignedkv.so [--quick] [--only WORDS] [--out FOLDER]
  decode.py --library libalignedkv.so --check        without PyTorch: small cases against float64, nothing is timed
  decode.py --library libalignedkv.so --once         without PyTorch: each attention of the main case once, for a profiler

Every contender attends over as many layers as are needed to leave the L2 cache behind, each with rows of its own, in one
CUDA graph; graphs are replayed in turn, timed by CUDA events, and what counts is the median of a round's ratios. Times are
of one layer. Writes gpu_decode.json and gpu_decode.md.
"""
import argparse
import ctypes as C
import itertools
import json
import pathlib
import statistics
import sys
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
for folder in (HERE, HERE.parents[1] / "benches/peers", HERE.parents[1] / "tests/oracle"):
    sys.path.append(str(folder))
import abi  # noqa: E402
import inputs  # noqa: E402

TOLERANCES = (1e-2, 3e-3, 1e-3, 1e-4)
BEYOND_CACHE = 200e6  # bytes of K and V that a replay goes through, at least: four times the largest L2


def say(text):
    print(f"gpu_decode: {text}", file=sys.stderr, flush=True)


# ---- memory of the device ----

class Driver:
    """Through the driver alone."""

    def __init__(self):
        self.cuda, context, self.stream = C.CDLL("libcuda.so.1"), C.c_void_p(), C.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDevicePrimaryCtxRetain", C.byref(context), 0)
        self.call("cuCtxPushCurrent_v2", context)
        self.call("cuStreamCreate", C.byref(self.stream), 0)
        self.stream = self.stream.value

    def call(self, name, *args):
        if code := getattr(self.cuda, name)(*args):
            raise RuntimeError(f"{name}: error {code}")

    def to(self, x):
        p = C.c_uint64()
        self.call("cuMemAlloc_v2", C.byref(p), C.c_size_t(x.nbytes))
        self.call("cuMemcpyHtoDAsync_v2", p, C.c_void_p(x.ctypes.data), C.c_size_t(x.nbytes), C.c_void_p(self.stream))
        self.wait()
        return p.value

    def back(self, p, x):
        self.call("cuMemcpyDtoHAsync_v2", C.c_void_p(x.ctypes.data), C.c_uint64(p), C.c_size_t(x.nbytes), C.c_void_p(self.stream))
        self.wait()
        return x

    def wait(self):
        self.call("cuStreamSynchronize", C.c_void_p(self.stream))


class Torch:
    """PyTorch's; what it hands out lives as long as this."""

    def __init__(self):
        import torch
        self.torch, self.kept = torch, {}
        self.side = torch.cuda.Stream()
        torch.cuda.set_stream(self.side)
        self.stream = self.side.cuda_stream

    def to(self, x):
        t = self.torch.from_numpy(x).cuda()
        self.kept[t.data_ptr()] = t
        return t.data_ptr()

    def back(self, p, x):
        t = self.kept[p]
        self.wait()
        return t.cpu().numpy().reshape(x.shape)

    def wait(self):
        self.torch.cuda.synchronize()

    def free(self):
        self.kept.clear()
        self.torch.cuda.empty_cache()


# ---- ours ----

class Ours:
    """A cache with sequences of the same rows in every layer."""

    def __init__(self, library, memory, data, layers):
        self.lib, self.memory, self.layers = library, memory, layers
        q, k, v = data
        self.n_seq, heads, dim = q.shape
        kv_heads, lengths = k[0].shape[1], [len(x) for x in k]
        desc = (abi.Layer * layers)(*[abi.Layer(n_q_heads=heads, n_kv_heads=kv_heads, dim_k=dim, dtype_k=abi.F16, dtype_v=abi.F16)] * layers)
        self.cache, self.batch, prefill = C.c_void_p(), C.c_void_p(), C.c_void_p()
        library("cache_create", library.context, C.byref(abi.sized(abi.Cache, n_layers=layers, layers=C.addressof(desc))), C.byref(self.cache))
        library("batch_create", self.cache, C.byref(abi.sized(abi.Batch)), C.byref(prefill))
        bounds = abi.sized(abi.Batch, max_sequences=self.n_seq, max_q=self.n_seq, max_kv=max(lengths))
        library("batch_create", self.cache, C.byref(bounds), C.byref(self.batch))
        self.ids = (C.c_uint64 * self.n_seq)()
        for i in range(self.n_seq):
            library("sequence_create", self.cache, C.byref(self.ids, 8 * i))
        self.n_q = (C.c_int32 * self.n_seq)(*[1] * self.n_seq)
        for i, n in enumerate(lengths):
            new, one = C.c_int32(n), C.c_int32(1)
            step = abi.sized(abi.Batch, n_sequences=1, sequences=C.addressof(self.ids) + 8 * i, n_new=C.addressof(new), n_q=C.addressof(one))
            rows = [abi.Rows(data=memory.to(np.ascontiguousarray(x[i])), dtype=abi.F16) for x in (k, v)]
            library("batch_begin", prefill, C.byref(step), C.c_void_p(memory.stream))
            for layer in range(layers):
                library("quantize_kv", prefill, layer, C.byref(rows[0]), C.byref(rows[1]), C.c_void_p(memory.stream))
            library("batch_commit", prefill)
        memory.wait()
        library("batch_destroy", prefill)
        self.q = memory.to(np.ascontiguousarray(q, np.float16))
        self.out = memory.to(np.zeros(q.shape, np.float32))
        self.stats = memory.to(np.zeros(C.sizeof(abi.Stats), np.uint8))
        self.bound = memory.to(np.zeros(q.shape[:2], np.float32))
        self.shape = q.shape
        self.begin()

    def begin(self):
        step = abi.sized(abi.Batch, n_sequences=self.n_seq, sequences=C.addressof(self.ids), n_q=C.addressof(self.n_q))
        self.lib("batch_begin", self.batch, C.byref(step), C.c_void_p(self.memory.stream))

    def attend(self, layer, tolerance, stats=False):
        call = abi.sized(abi.Attention, q=abi.Rows(data=self.q, dtype=abi.F16), out=abi.Rows(data=self.out, dtype=abi.F32), tolerance=tolerance,
                         bound=self.bound, stats=self.stats if stats else None, stream=self.memory.stream)
        self.lib("aligned_attention", self.batch, layer, C.byref(call))

    def result(self, tolerance):
        """Outputs, bounds and statistics."""
        self.attend(0, tolerance, stats=True)
        self.memory.wait()
        self.lib("poll", self.lib.context, None, None, None)
        stats = abi.Stats.from_buffer_copy(self.memory.back(self.stats, np.zeros(C.sizeof(abi.Stats), np.uint8)).tobytes())
        return self.memory.back(self.out, np.zeros(self.shape, np.float32)), self.memory.back(self.bound, np.zeros(self.shape[:2], np.float32)), stats

    def close(self):
        self.memory.wait()
        self.lib("batch_destroy", self.batch)
        self.lib("cache_destroy", self.cache)


def bits(stats, dim):
    return 8 * (stats.bytes_k + stats.bytes_v) / (stats.tokens * 2 * dim)


# ---- inputs and truth ----

def load(heads, kv_heads, dim, n, batch, data, entropy, folder):
    """q [batch][heads][dim], K and V per sequence; at most two sequences differ."""
    path, distinct = pathlib.Path(folder) / "inputs", min(batch, 2)
    inputs.make(path, data, heads, kv_heads, dim, [n] * distinct, entropy)
    flat, q, k, v = np.fromfile(path, np.uint8), [], [], []
    size_q, size_kv = 4 * heads * dim, 2 * n * kv_heads * dim
    for i in range(distinct):
        at = i * (size_q + 2 * size_kv)
        q.append(flat[at:at + size_q].view(np.float32).reshape(heads, dim))
        k.append(flat[at + size_q:at + size_q + size_kv].view(np.float16).reshape(n, kv_heads, dim))
        v.append(flat[at + size_q + size_kv:at + size_q + 2 * size_kv].view(np.float16).reshape(n, kv_heads, dim))
    pick = lambda x: [x[i % distinct] for i in range(batch)]  # noqa: E731
    return np.stack(pick(q)).astype(np.float16), pick(k), pick(v)


def truth(q, k, v):
    """Attention in float64 of one sequence."""
    heads, dim = q.shape
    group = heads // k.shape[1]
    out = np.empty((heads, v.shape[2]))
    for h in range(heads):
        s = k[:, h // group].astype(np.float64) @ q[h].astype(np.float64) / np.sqrt(dim)
        p = np.exp(s - s.max())
        out[h] = p @ v[:, h // group].astype(np.float64) / p.sum()
    return out


def errors(out, want):
    """Relative L2 by head: median and 95th percentile."""
    e = np.linalg.norm(out - want, axis=-1) / np.linalg.norm(want, axis=-1)
    return {"error_median": float(np.median(e)), "error_p95": float(np.percentile(e, 95))}


def union(library, memory, n, batch, folder, tolerances=TOLERANCES):
    """Bits read where 1, 2, 4 and 8 query heads share a KV head: digits that any of them needs are read for all."""
    q, k, v = load(64, 8, 128, n, batch, "reallike", 3, folder)
    found = []
    for group in (1, 2, 4, 8):
        some = np.ascontiguousarray(q.reshape(batch, 8, 8, 128)[:, :, :group].reshape(batch, 8 * group, 128))
        ours = Ours(library, memory, (some, k, v), 1)
        for tolerance in tolerances:
            found.append({"n": n, "batch": batch, "group": group, "tolerance": tolerance, "bits": bits(ours.result(tolerance)[2], 128)})
        ours.lib("batch_commit", ours.batch)
        ours.close()
    return found


# ---- without PyTorch ----

def check(library):
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for heads, kv_heads, dim, n, batch in ((8, 2, 128, 700, 2), (4, 4, 64, 1300, 3), (16, 1, 64, 260, 1)):
            lib, memory = abi.Library(library, abi.CUDA), Driver()
            data = load(heads, kv_heads, dim, n, batch, "reallike", 3, folder)
            ours = Ours(lib, memory, data, 2)
            for tolerance in TOLERANCES:
                out, bound, stats = ours.result(tolerance)
                want = np.stack([truth(data[0][i], data[1][i], data[2][i]) for i in range(batch)])
                apart = np.abs(out - want).max(-1)
                ok = bool((apart <= bound).all()) and stats.backend == abi.CUDA
                failed += not ok
                say(f"{heads}/{kv_heads} heads, d {dim}, {batch} x {n} tokens, tolerance {tolerance:g}: {bits(stats, dim):.2f} bits, "
                    f"error {errors(out, want)['error_median']:.1e}, within bounds: {ok}")
            ours.close()
        for tolerance in TOLERANCES[:3:2]:
            read = [row["bits"] for row in union(abi.Library(library, abi.CUDA), Driver(), 260, 1, folder, [tolerance])]
            ok = read == sorted(read)
            failed += not ok
            say(f"1, 2, 4, 8 heads on a KV head, tolerance {tolerance:g}: {', '.join(f'{x:.2f}' for x in read)} bits, growing: {ok}")
    return failed


def once(library):
    lib, memory = abi.Library(library, abi.CUDA), Driver()
    heads, kv_heads, dim, n, batch, data, entropy = cases(True)[0]
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(lib, memory, load(heads, kv_heads, dim, n, batch, data, entropy, folder), 1)
    for tolerance in TOLERANCES:
        _, _, stats = ours.result(tolerance)
        say(f"tolerance {tolerance:g}: {bits(stats, dim):.2f} bits, planes of K {list(stats.planes_k)}, of V {list(stats.planes_v)}")
    return 0


# ---- side by side ----

def contenders(torch, lib, memory, data, layers, quick):
    """By name: a function that attends over all layers, and one that gives the first layer's outputs."""
    q, k, v = data
    batch, heads, dim = q.shape
    kv_heads, n = k[0].shape[1], len(k[0])
    found = {}
    bf = torch.bfloat16
    with torch.no_grad():
        tq = torch.from_numpy(q).cuda().to(bf)[:, :, None]
        tk, tv = (torch.stack([torch.from_numpy(np.ascontiguousarray(x.swapaxes(0, 1))).cuda().to(bf) for x in y]) for y in (k, v))
        ks, vs = ([x.clone() for _ in range(layers)] for x in (tk, tv))
        from torch.nn.attention import SDPBackend, sdpa_kernel
        for name, backend in (("sdpa flash bf16", SDPBackend.FLASH_ATTENTION), ("sdpa cudnn bf16", SDPBackend.CUDNN_ATTENTION)):
            def run(layer, backend=backend):
                with sdpa_kernel(backend):
                    return torch.nn.functional.scaled_dot_product_attention(tq, ks[layer], vs[layer], enable_gqa=heads != kv_heads)
            found[name] = (run, lambda run=run: run(0)[:, :, 0].float().cpu().numpy())
        try:
            import flashinfer
            for name, dtype in (("flashinfer bf16", bf), ("flashinfer fp8", torch.float8_e4m3fn)):
                page = 16
                pages = batch * -(-n // page)
                paged = [torch.zeros(pages, 2, page, kv_heads, dim, device="cuda", dtype=bf) for _ in range(layers)]
                for x in paged:
                    for i in range(batch):
                        at = x[i * (pages // batch):(i + 1) * (pages // batch)]
                        for which, t in ((0, tk), (1, tv)):
                            rows = torch.zeros(pages // batch * page, kv_heads, dim, device="cuda", dtype=bf)
                            rows[:n] = t[i].transpose(0, 1)
                            at[:, which] = rows.view(-1, page, kv_heads, dim)
                paged = [x.to(dtype) for x in paged]
                wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), "NHD",
                                                                        use_tensor_cores=heads // kv_heads >= 4)
                starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * (pages // batch)
                last = torch.full((batch,), (n - 1) % page + 1, dtype=torch.int32, device="cuda")
                wrapper.plan(starts, torch.arange(pages, dtype=torch.int32, device="cuda"), last, heads, kv_heads, dim, page,
                             q_data_type=bf, kv_data_type=dtype)
                flat = tq[:, :, 0].contiguous()
                found[name] = (lambda layer, w=wrapper, x=paged: w.run(flat, x[layer]),
                               lambda w=wrapper, x=paged: w.run(flat, x[0]).float().cpu().numpy())
        except ImportError:
            say("FlashInfer is not installed")
    ours = Ours(lib, memory, data, layers)
    for tolerance in TOLERANCES[:3:2] if quick else TOLERANCES:
        found[f"aligned {tolerance:g}"] = (lambda layer, t=tolerance: ours.attend(layer, t), lambda t=tolerance: ours.result(t))
    return found, ours


def kernels(torch, graph, layers):
    """Microseconds of each kernel per layer, in one replay."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    return {e.key: e.device_time_total / layers for e in profile.key_averages() if e.device_time_total}


def measure(torch, lib, case, quick, rounds, folder, copy):
    heads, kv_heads, dim, n, batch, data, entropy = case
    memory = Torch()
    layers = max(2, -(-int(BEYOND_CACHE) // (batch * n * kv_heads * dim * 4)))
    rows = load(heads, kv_heads, dim, n, batch, data, entropy, folder)
    found, ours = contenders(torch, lib, memory, rows, layers, quick)
    want = np.stack([truth(rows[0][i], rows[1][i], rows[2][i]) for i in range(min(batch, 2))])
    result, graphs = {}, {}
    for name, (run, out) in found.items():
        try:
            entry = {"contender": name}
            given = out()
            if isinstance(given, tuple):
                given, bound, stats = given
                entry |= {"bits": bits(stats, dim), "bytes": stats.bytes_k + stats.bytes_v,
                          "within_bounds": bool((np.abs(given[:len(want)] - want).max(-1) <= bound[:len(want)]).all())}
            entry |= errors(given[:len(want)].astype(np.float64), want)
            for layer in range(layers):
                run(layer)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=memory.side):
                for layer in range(layers):
                    run(layer)
            graphs[name], result[name] = graph, entry
        except Exception as error:  # a peer that lacks a shape says so in its row
            result[name] = {"contender": name, "failed": str(error).splitlines()[0][:200]}
            say(f"{name}: {result[name]['failed']}")
    times = {name: [] for name in graphs}
    for _ in range(3 + rounds):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / layers)
    peers = [name for name in graphs if not name.startswith("aligned")]
    for name in graphs:
        kept = times[name][3:]
        result[name]["us"] = statistics.median(kept)
        result[name]["faster_than_copy"] = batch * n * kv_heads * dim * 4 / copy * 1e6 / result[name]["us"]
        for what, of in (("bf16", [p for p in peers if "bf16" in p]), ("fp8", [p for p in peers if "fp8" in p])):
            if of and name not in peers:
                best = min(of, key=lambda p: statistics.median(times[p][3:]))
                result[name][f"faster_than_{what}"] = statistics.median(a / b for a, b in zip(times[best][3:], kept))
                result[name][f"best_{what}"] = best
    for name, graph in graphs.items():
        result[name]["kernels"] = kernels(torch, graph, layers)
    ours.lib("batch_commit", ours.batch)
    ours.close()
    memory.free()
    shape = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "n": n, "batch": batch, "data": data, "entropy": entropy, "layers": layers, "rounds": rounds}
    return [shape | r for r in result.values()]


def bandwidth(torch):
    """Bytes per second of a copy, which counts twice."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b, times = torch.empty_like(a), []
    for _ in range(23):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        b.copy_(a)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * len(a) / statistics.median(times[3:])


def cases(quick):
    main = (32, 8, 128, 32768, 8, "reallike", 3)
    if quick:
        return [main] + [(32, 8, 128, n, 8, "reallike", 3) for n in (2048, 8192)] + [(32, 8, 128, 32768, 8, "normal", None)]
    shapes = itertools.product(((32, 8), (32, 32), (64, 8)), (128, 64), (2048, 8192, 32768, 131072), (1, 8, 64), (("reallike", 3), ("normal", None)))
    return [main] + [c for (h, kv), d, n, b, (data, e) in shapes if (c := (h, kv, d, n, b, data, e)) != main and 16 * n * b * kv * d < 40e9]


def union_table(rows):
    if not rows:
        return []
    groups = sorted({r["group"] for r in rows})
    at = {(r["tolerance"], r["group"]): r["bits"] for r in rows}
    lines = [f"Bits per element of K and V where a KV head serves several query heads, {rows[0]['batch']} x {rows[0]['n']} tokens, reallike:", "",
             "| tolerance | " + " | ".join(f"{g} head{'s' if g > 1 else ''}" for g in groups) + " |", "|---" * (1 + len(groups)) + "|"]
    lines += [f"| {t:g} | " + " | ".join(f"{at[t, g]:.2f}" for g in groups) + " |" for t in TOLERANCES if (t, groups[0]) in at]
    return lines + [""]


def table(results):
    lines = ["# Decode attention on a GPU", "", f"{results['device']}, driver {results['driver']}, PyTorch {results['torch']}. alignedkv {results['library']}. Copy {results['copy'] / 1e12:.2f} TB/s. "
             f"Times are of one layer, in graphs; errors are relative L2 by head against float64. \"Copying bf16\": the bytes of K and V in bf16 at the copy's rate, which no kernel that reads them all beats.", "",
             *union_table(results.get("union", [])),
             "| case | contender | us | faster than bf16 | than copying bf16 | than fp8 | bits | error, median | p95 |", "|---" * 9 + "|"]
    number = lambda r, key, form: format(r[key], form) if key in r else ""  # noqa: E731
    for r in results["rows"]:
        case = f"{r['heads']}/{r['kv_heads']}, d {r['dim']}, {r['batch']} x {r['n']}, {r['data']}"
        cells = [case, r["contender"], r.get("failed") or number(r, "us", ".1f"), number(r, "faster_than_bf16", ".2f"), number(r, "faster_than_copy", ".2f"), number(r, "faster_than_fp8", ".2f"),
                 number(r, "bits", ".2f"), number(r, "error_median", ".1e"), number(r, "error_p95", ".1e")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True, type=pathlib.Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", help="cases whose description has all of these words")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("."))
    args = parser.parse_args()
    if args.check:
        return check(args.library)
    if args.once:
        return once(args.library)
    import torch
    lib = abi.Library(args.library, abi.CUDA)
    results = {"device": torch.cuda.get_device_name(), "driver": torch.version.cuda, "torch": torch.__version__, "library": lib.version(),
               "copy": bandwidth(torch), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        memory = Torch()
        results["union"] = union(lib, memory, 8192 if args.quick else 32768, 2, folder)
        memory.free()
        for case in cases(args.quick):
            if all(word in " ".join(map(str, case)).split() for word in args.only.split()):
                say(f"heads {case[0]}/{case[1]}, d {case[2]}, {case[4]} x {case[3]} tokens, {case[5]}")
                results["rows"] += measure(torch, lib, case, args.quick, args.rounds, folder, results["copy"])
                args.out.mkdir(parents=True, exist_ok=True)
                (args.out / "gpu_decode.json").write_text(json.dumps(results, indent=1) + "\n")
                (args.out / "gpu_decode.md").write_text(table(results))
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
