#!/usr/bin/env python3
"""Attention at decode on the CPU, side by side with ggml: builds the peers, makes inputs, measures, writes results.

  cpu_decode.py run --build DIR [--source LLAMA_CPP] [--full] [--only WORDS] [--list] [--out benches/results]
  cpu_decode.py report [--out benches/results]      rewrites cpu_decode.md and .svg from cpu_decode.json alone

run measures every case (about 15 minutes; --full: hours) or those whose name has all of WORDS, and merges their rows
into OUT/cpu_decode.json. Nothing else should run meanwhile. libalignedkv.a must lie in target/release (--library).
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.request

import inputs

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benches"))
import svg  # noqa: E402
ARCHIVE = "llama_cpp_python-0.3.36"  # the archive that bindings/llamacpp/ci.sh pins, too
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
URL = f"https://files.pythonhosted.org/packages/ec/e9/e7de2b0463ea3ffbf0ede6cb21b58c1258a8f6521aae45ca773a59fe7cf3/{ARCHIVE}.tar.gz"
KEPT_INPUTS = 6e9  # bytes


def say(text):
    print(f"cpu_decode: {text}", file=sys.stderr, flush=True)


# ---- cases ----

F16 = [f"ggml:f16:{layout}:{build}" for layout in ("llama", "contiguous") for build in ("native", "portable")]
OURS = ["aligned:3e-5", "aligned:1e-4", "aligned:1e-3", "aligned:3e-3", "aligned:1e-2", "aligned:1e-3:avx2", "exact", "raw", "raw:avx2", "scan", "roof"]
PEERS = F16 + [f"ggml:{t}:llama:native" for t in ("bf16", "q8_0", "q4_0")] + OURS
ALL_PEERS = F16 + [f"ggml:{t}:{layout}:{build}" for t, layout, build in
                   itertools.product(("bf16", "q8_0", "q4_0"), ("llama", "contiguous"), ("native", "portable"))] + OURS
BATCH = (512, 1024, 2048, 3072, 4096, 6144, 7168, 8704)


def case(heads, kv_heads, dim, lengths, data, entropy=None, threads=1, peers=PEERS):
    lengths = [lengths] if isinstance(lengths, int) else list(lengths)
    batch = f" in {len(lengths)} sequences" * (len(lengths) > 1)
    nats = f" {entropy:g} nats" if entropy else ""
    shape = f"{heads}/{kv_heads} heads, d {dim}, {sum(lengths)} tokens{batch}, {data}{nats}"
    return {"shape": shape, "name": f"{shape}, {threads} thread{'s' * (threads > 1)}", "heads": heads, "kv_heads": kv_heads, "dim": dim,
            "lengths": lengths, "data": data, "entropy": entropy, "threads": threads, "peers": peers}


MAIN = (32, 8, 128, 32768, "reallike", 3)


def quick():
    alike = [(32, 8, 128, n, "reallike", 3) for n in (512, 4096)] + [MAIN]
    alike += [(32, 32, 128, n, "reallike", 3) for n in (512, 32768)]
    alike += [(32, 8, 64, n, "real") for n in (512, 2048)]
    alike += [(64, 8, 128, 32768, "reallike", 3), (32, 8, 256, 8192, "reallike", 3)]
    alike += [(32, 8, 128, n, "normal") for n in (512, 4096, 32768)]
    alike += [(32, 8, 128, 32768, "reallike", nats) for nats in (1, 6)] + [(32, 8, 128, BATCH, "reallike", 3)]
    also_two = [0, 1, 2, 4, 6, 7, 11, 14]
    cases = [case(*c, threads=t) for i, c in enumerate(alike) for t in (1, 2) if t == 1 or i in also_two]
    return cases + [case(32, 8, 128, 131072, "reallike", 3, peers=F16[:2] + OURS)]


def full():
    kinds = [("real", None), ("reallike", 1), ("reallike", 3), ("reallike", 6), ("normal", None)]
    cases = []
    for (heads, kv), dim, lengths, (data, nats) in itertools.product(
            ((32, 8), (32, 32), (64, 8)), (64, 128, 256), (512, 2048, 8192, 32768, 131072, BATCH), kinds):
        tokens = lengths if isinstance(lengths, int) else sum(lengths)
        shortest = lengths if isinstance(lengths, int) else min(lengths)
        if data == "real" and dim != 64 or nats and nats > 0.8 * math.log(shortest) or 4 * tokens * kv * dim > 2.2e9:
            continue  # no such data; nearly uniform by need; two copies for each peer would not fit into memory
        cases += [case(heads, kv, dim, lengths, data, nats, t, ALL_PEERS) for t in (1, 2)]
    return cases


# ---- building ----

def call(command, log):
    with open(log, "w") as f:
        if subprocess.run(list(map(str, command)), stdout=f, stderr=subprocess.STDOUT).returncode:
            tail = "\n".join(pathlib.Path(log).read_text().splitlines()[-30:])
            sys.exit(f"{tail}\ncpu_decode: failed: {' '.join(map(str, command))}; its output is in {log}")


def source_tree(build):
    """llama.cpp's sources, fetched once into the build directory."""
    source, packed = build / "src", build / f"{ARCHIVE}.tar.gz"
    if source.exists():
        return source
    if not packed.exists():
        say(f"fetching {ARCHIVE}")
        with urllib.request.urlopen(URL) as response, open(build / "download", "wb") as f:
            shutil.copyfileobj(response, f)
        os.replace(build / "download", packed)
    found = hashlib.sha256(packed.read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"cpu_decode: {packed} has SHA-256 {found}, expected {SHA256}")
    unpacked, prefix = build / "unpacked", f"{ARCHIVE}/vendor/llama.cpp/"
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(packed) as tar:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        tar.extractall(unpacked, [m for m in tar if m.name.startswith((prefix + "ggml/", prefix + "include/", prefix + "LICENSE"))], **safe)
    os.replace(unpacked / prefix, source)
    shutil.rmtree(unpacked)
    return source


def build_program(build, source, library):
    """The program and the modules of ggml."""
    if not (library / "libalignedkv.a").exists():
        sys.exit(f"cpu_decode: no libalignedkv.a in {library}: cargo build --release --lib, or --library")
    say("building the peers (the first time takes minutes)")
    out = build / "ggml"
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not (out / "CMakeCache.txt").exists() else []
    call(["cmake", "-S", ROOT / "benches/peers/ggml", "-B", out, *generator, "-DCMAKE_BUILD_TYPE=Release", f"-DLLAMA_CPP_DIR={source}",
          f"-DALIGNEDKV_RELEASE={library}"], build / "configure.log")
    call(["cmake", "--build", out, "-j", cores()], build / "build.log")
    return out / "cpu_decode", [out / f"peer_{name}.so" for name in ("native", "portable")]


def cores():
    return len(os.sched_getaffinity(0))


def machine():
    read = lambda path: pathlib.Path(path).read_text()
    model = next((line.split(":", 1)[1].strip() for line in read("/proc/cpuinfo").splitlines() if line.startswith("model name")), "unknown")
    caches = sorted(pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"), key=lambda p: int(read(p / "level")))
    return {"cpu": model, "cores": cores(), "llc": read(caches[-1] / "size").strip() if caches else "unknown"}


# ---- running ----

def input_file(folder, c):
    """A case's input, made unless it is there, and its description."""
    version = hashlib.sha256(pathlib.Path(inputs.__file__).read_bytes()).hexdigest()[:8]
    lengths = "-".join(map(str, c["lengths"]))
    path = folder / f"{c['data']}{c['entropy'] or ''}_{c['heads']}_{c['kv_heads']}_{c['dim']}_{lengths}_{version}.bin"
    described = path.with_suffix(".json")
    if not (path.exists() and described.exists()):
        size = 4 * sum(c["lengths"]) * c["kv_heads"] * c["dim"]
        kept = sorted(folder.glob("*.bin"), key=lambda p: p.stat().st_mtime)
        while kept and sum(p.stat().st_size for p in kept) + size > KEPT_INPUTS:
            kept.pop(0).unlink()  # the one used longest ago
        described.write_text(json.dumps(inputs.make(path, c["data"], c["heads"], c["kv_heads"], c["dim"], c["lengths"], c["entropy"])))
    os.utime(path)
    return path, json.loads(described.read_text())


def measure(c, program, modules, folder, args, extra):
    path, about = input_file(folder, c)
    command = [program, "--input", path, "--heads", c["heads"], "--kv-heads", c["kv_heads"], "--dim", c["dim"],
               "--lengths", ",".join(map(str, c["lengths"])), "--threads", c["threads"], "--peers", ",".join(c["peers"]),
               "--rounds", args.rounds, "--seconds", args.seconds, "--data", c["data"],
               "--entropy", c["entropy"] or about["entropy"], "--peer-lib", ",".join(map(str, modules))]
    result = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, timeout=1800)
    if result.returncode:
        raise RuntimeError(f"the program ended with {result.returncode}")
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    if missing := set(c["peers"]) - {r["peer"] for r in rows}:
        say(f"no rows of {', '.join(sorted(missing))}")
    described = {k: about[k] for k in ("entropy_p5", "entropy_p95", "tokens_99", "mass_first", "mass_last_64")}
    asked = {"shape": c["shape"], "n_heads": c["heads"], "n_kv_heads": c["kv_heads"], "head_dim": c["dim"], "n_kv": sum(c["lengths"]),
             "lengths": c["lengths"], "batch": len(c["lengths"]), "data": c["data"], "entropy_asked": c["entropy"], "threads": c["threads"]}
    short = lambda v: float(f"{v:.5g}") if isinstance(v, float) else v
    return [{k: short(v) for k, v in {**r, **asked, **described, **extra}.items()} for r in rows]


def order(row):
    return (row["n_heads"], row["n_kv_heads"], row["head_dim"], row["data"], row["entropy_asked"] or 0, row["batch"], row["n_kv"],
            row["threads"], ALL_PEERS.index(row["peer"]) if row["peer"] in ALL_PEERS else len(ALL_PEERS), row["peer"])


def save(rows, out):
    rows.sort(key=order)
    text = "[\n" + ",\n".join(" " + json.dumps(r) for r in rows) + "\n]\n"
    (out / "cpu_decode.partial").write_text(text)
    os.replace(out / "cpu_decode.partial", out / "cpu_decode.json")


def load(out):
    path = out / "cpu_decode.json"
    return json.loads(path.read_text()) if path.exists() else []


def run(args):
    cases = [c for c in (full() if args.full else quick()) if all(w in c["name"] for w in args.only)]
    if args.list:
        print("\n".join(c["name"] for c in cases))
        return 0
    if not cases:
        sys.exit(f"cpu_decode: no case has {' '.join(args.only)} in its name (--list names them)")
    build = args.build.resolve()
    folder = build / "inputs"
    folder.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    program, modules = build_program(build, (args.source or source_tree(build)).resolve(), args.library.resolve())
    rows, extra, begin, failed = load(args.out), machine(), time.monotonic(), 0
    for i, c in enumerate(cases):
        elapsed = time.monotonic() - begin
        left = f", about {elapsed / i * (len(cases) - i) / 60:.1f} left" if i else ""
        say(f"case {i + 1} of {len(cases)}: {c['name']} ({elapsed / 60:.1f} minutes{left})")
        try:
            measured = measure(c, program, modules, folder, args, extra)
        except (RuntimeError, ValueError, KeyError, subprocess.TimeoutExpired) as e:
            failed += 1
            say(f"case failed: {e}")
            continue
        rows = [r for r in rows if (r["shape"], r["threads"]) != (c["shape"], c["threads"])] + measured
        save(rows, args.out)
    say(f"{len(cases) - failed} of {len(cases)} cases measured in {(time.monotonic() - begin) / 60:.1f} minutes")
    report(args)
    return 1 if failed else 0


# ---- report ----

def table(columns, rows):
    line = lambda cells: "| " + " | ".join(map(str, cells)) + " |"
    return "\n".join([line(columns), "|" + "---|" * len(columns), *map(line, rows)])


def label(peer):
    kind, *rest = peer.split(":")
    if kind == "ggml":
        return f"ggml {rest[0]}, {rest[2]}" + ", heads contiguous" * (rest[1] == "contiguous")
    name = {"aligned": "AlignedKV " + rest[0] if rest else "", "exact": "AlignedKV exact", "raw": "AlignedKV's f16 rows", "scan": "AlignedKV's scan alone", "roof": "memory roof"}[kind]
    return ", ".join([name, *(r.upper() for r in rest[kind == "aligned":])])


def number(value, digits=3):
    """Significant digits without an exponent."""
    return "" if value is None else f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}" if value else "0"


class Results:
    def __init__(self, rows):
        self.rows = rows
        self.by_case = {}
        for r in rows:
            self.by_case.setdefault((r["shape"], r["threads"]), {})[r["peer"]] = r
        self.shapes = list(dict.fromkeys(r["shape"] for r in rows))

    def get(self, spec, peer, threads=1):
        return self.by_case.get((spec if isinstance(spec, str) else case(*spec)["shape"], threads), {}).get(peer)

    def ours(self, spec, limit=None):
        """Our row of the default tolerance; with a limit to the error, the fastest tolerance that keeps it."""
        if limit is None:
            return self.get(spec, "aligned:1e-3")
        rows = [r for p in (*(p for p in OURS if p.startswith("aligned") and p.count(":") == 1), "exact") if (r := self.get(spec, p))]
        within = [r for r in rows if r["rel_l2"] <= limit]
        return max(within, key=lambda r: r["speedup_vs_ggml_f16"]) if within else min(rows, key=lambda r: r["rel_l2"], default=None)

    def roof(self, row):
        roof = self.get(row["shape"], "roof", row["threads"])
        return row["gb_per_s"] / roof["gb_per_s"] if roof and row.get("gb_per_s") else None


def targets(results):
    """What was aimed at, and what was reached: (case, aim, reached, held)."""
    out = []

    def faster(name, spec, least, error, bits=None):
        r = results.ours(spec, error)
        aim = f"at least {least:g}x, relative L2 at most {error:.0e}" + (f", at most {bits:g} bits" if bits else "")
        if not r:
            return out.append((name, aim, "not measured", ""))
        held = r["speedup_vs_ggml_f16"] >= least and r["rel_l2"] <= error and (bits is None or r["bits_per_element"] <= bits)
        reached = [f"{number(r['speedup_vs_ggml_f16'])}x, {r['rel_l2']:.1e}, {r['bits_per_element']:.2f} bits ({label(r['peer'])})"
                   for r in {r["peer"]: r for r in (r, results.ours(spec)) if r}.values()]
        out.append((name, aim, "; ".join(reached), held))

    def ratio(name, aim, unit, pairs, holds, pick, detail=""):
        values = [(number(v) + unit, v, where) for v, where in pairs if v is not None]
        if not values:
            return out.append((name, aim, "not measured", ""))
        text, worst, where = pick(values, key=lambda v: v[1])
        out.append((name, aim, text + (f" ({where})" if where else "") + detail, holds(worst)))

    def over(a, b):
        return a["us"] / b["us"] if a and b else None

    faster("32/8 heads, d 128, 32768 tokens, reallike 3 nats", MAIN, 20, 3e-3, 5)
    faster("32/32 heads, d 128, 32768 tokens, reallike 3 nats", (32, 32, 128, 32768, "reallike", 3), 10, 3e-3, 5)
    faster("32/8 heads, d 128, 4096 tokens, reallike 3 nats", (32, 8, 128, 4096, "reallike", 3), 12, 3e-3, 5)
    faster("32/8 heads, d 64, 2048 tokens, real", (32, 8, 64, 2048, "real"), 8, 3e-3, 5)
    short = dict.fromkeys(r["shape"] for r in results.rows if r["n_kv"] == 512 and r["batch"] == 1)
    ratio("any shape of 512 tokens", "at least 2x", "x",
          [(r["speedup_vs_ggml_f16"], s) for s in short if (r := results.ours(s))], lambda v: v >= 2, min)
    faster("32/8 heads, d 128, 32768 tokens, normal", (32, 8, 128, 32768, "normal"), 5, 1e-2)
    main = results.ours(MAIN, 3e-3)
    ratio("against our own f16 rows, 32/8 heads, d 128, 32768 tokens, reallike 3 nats", "at least 2.5x", "x",
          [(over(results.get(MAIN, "raw"), main), main and label(main["peer"]))], lambda v: v >= 2.5, min)
    ratio("2 threads against 1, the same case", "at least 1.7x", "x",
          [(over(results.get(MAIN, main["peer"]) if main else None, results.get(MAIN, main["peer"], 2) if main else None), "")], lambda v: v >= 1.7, min)
    wide, narrow = (results.get(MAIN, p) for p in ("aligned:1e-3", "aligned:1e-3:avx2"))
    ratio("AVX2 forced, the same case: share of the speed-up that is left", "at least half", "", [(over(wide, narrow), "")], lambda v: v >= 0.5, min)
    for name, peer, spec, least in (("our f16 rows, 32/32 heads", "raw", (32, 32, *MAIN[2:]), 0.85), ("our f16 rows, 32/8 heads", "raw", MAIN, 0.85),
                                    ("the scan alone, 32/32 heads", "scan", (32, 32, *MAIN[2:]), 0.8), ("the scan alone, 32/8 heads", "scan", MAIN, 0.6)):
        r = results.get(spec, peer)
        ratio(f"{name}, d 128, 32768 tokens: share of the memory roof", f"at least {100 * least:g}%", "%",
              [(100 * results.roof(r) if r else None, "")], lambda v, least=least: v >= 100 * least, min)
    long = [(n, r) for n in (4096, 32768, 131072) if (r := results.get((*MAIN[:3], n, *MAIN[4:]), "aligned:1e-3"))]
    ratio("time per token of context against the next shorter one (4096, 32768, 131072 tokens)", "at most 1.1 (linear)", "",
          [(b["us"] / m / (a["us"] / n), f"{n} to {m}") for (n, a), (m, b) in zip(long, long[1:])], lambda v: v <= 1.1, max)
    return out


def markdown(results):
    first = results.rows[0]
    machines = ", ".join(dict.fromkeys(f"{r['cpu']}, {r['cores']} cores, last-level cache {r['llc']}" for r in results.rows))
    builds = {k: v for r in results.rows if (k := r["peer"].rpartition(":")[2]) in ("native", "portable") and (v := r.get("build"))}
    parts = ["# Attention at decode on the CPU, side by side with ggml",
             f"Machine: {machines}. One query per sequence over K and V that lie in memory, not in the cache. All peers of a case run in turn, "
             "round after round; times are medians, and speed-ups are medians of each round's ratio to ggml's f16 in llama.cpp's cache layout "
             "(the faster of its builds). The error is the output's relative L2 distance from attention in f64 over the same f16 rows; bits "
             "are those read per element of K and V. The memory roof is what a plain sum reads with the same threads."
             + "".join(f"\n- {k} build of ggml: {v}" for k, v in sorted(builds.items())),
             "## What was aimed at, what was reached", "One thread unless said otherwise; against ggml f16 unless said otherwise.",
             table(["case", "aim", "reached", "held"], [(*t[:3], {True: "yes", False: "no", "": ""}[t[3]]) for t in targets(results)])]
    parts += ["## Data", "\n".join(f"- {name}: {text}" for name, text in inputs.ABOUT.items() if any(r["data"] == name for r in results.rows))]
    for shape in results.shapes:
        one, two = (results.by_case.get((shape, t), {}) for t in (1, 2))
        any_row = next(iter((one or two).values()))
        about = (f"Entropy of the softmax: {any_row['entropy']:.2f} nats in the mean over query heads (5% below {any_row['entropy_p5']:.2f}, 5% above "
                 f"{any_row['entropy_p95']:.2f}); {any_row['tokens_99']:.0f} tokens hold 99% of the mass.")
        if any_row["batch"] > 1:
            about += f" Sequences of {', '.join(map(str, any_row['lengths']))} tokens in one call."
        rows = []
        for peer in sorted(one.keys() | two.keys(), key=lambda p: order(one.get(p) or two[p])):
            a, b = one.get(peer, {}), two.get(peer, {})
            r, roof = a or b, peer == "roof"
            share = None if roof else results.roof(r)
            if peer == "scan":
                r = {**r, "rel_l2": None}  # no result that anybody would use
            rows.append([label(peer), number(a.get("us")) if not roof else "", number(b.get("us")) if not roof else "",
                         *(f"{number(x['speedup_vs_ggml_f16'])}x" if x.get("speedup_vs_ggml_f16") and not roof else "" for x in (a, b)),
                         f"{r['rel_l2']:.1e}" if r.get("rel_l2") is not None and not roof else "",
                         f"{r['bits_per_element']:.2f}" if r.get("bits_per_element") and not roof else "",
                         number(r.get("gb_per_s")), f"{100 * share:.0f}%" if share is not None else ""])
        columns = ["peer", "µs, 1 thread", "µs, 2 threads", "speed-up, 1 thread", "speed-up, 2 threads", "relative L2", "bits", "GB/s", "of the roof"]
        keep = [i for i, c in enumerate(columns) if two or "2 threads" not in c]
        parts += [f"## {shape[0].upper()}{shape[1:]}", about, table([columns[i] for i in keep], [[row[i] for i in keep] for row in rows])]
    return "\n\n".join(parts) + "\n"


# ---- plots ----

COLOURS = {"aligned:1e-4": "#56b4e9", "aligned:1e-3": "#0072b2", "aligned:3e-3": "#5e4fa2", "aligned:1e-2": "#cc79a7", "exact": "#117733",
           "raw": "#009e73", "ggml:f16": "#000", "ggml:bf16": "#777", "ggml:q8_0": "#d55e00", "ggml:q4_0": "#e69f00"}


def look(peer):
    colour = next((c for prefix, c in COLOURS.items() if peer.startswith(prefix)), "#444")
    return label(peer), colour, "6 4" if peer.endswith(("avx2", "portable")) else "2 3" if "contiguous" in peer else ""


def plot(*args):
    return svg.plot(*args, look=look)


def plots(results):
    """File name to SVG, of the main shape over contexts, and of its main length."""
    lengths = (512, 2048, 4096, 8192, 32768, 131072)
    over = [(n, results.by_case.get((case(*MAIN[:3], n, *MAIN[4:])["shape"], 1), {})) for n in lengths]
    used = [n for n, rows in over if rows]
    peers = [p for p in ALL_PEERS if any(p in rows for _, rows in over) and p != "roof"]
    some = [p for p in peers if "contiguous" not in p and p not in ("aligned:3e-5", "aligned:1e-4", "aligned:3e-3")]
    main = results.by_case.get((case(*MAIN)["shape"], 1), {})
    what = "32/8 heads of 128, 3 nats, 1 thread"
    return {
        "time": plot(f"Attention at decode: {what}", "tokens of context", "µs per call",
                     [(p, [(n, rows[p]["us"]) for n, rows in over if p in rows]) for p in some], True, True, used),
        "error": plot(f"Error against bits read: {what}, 32768 tokens", "bits read per element of K and V", "relative L2 error of the output",
                      [(p, [(r["bits_per_element"], r["rel_l2"])] if r.get("rel_l2") and r.get("bits_per_element") else [])
                       for p, r in main.items() if p not in ("roof", "scan") and "contiguous" not in p and "avx2" not in p], False, True),
        "roof": plot(f"Bytes read per second, against the memory roof: {what}", "tokens of context", "share of the roof",
                     [(p, [(n, s) for n, rows in over if p in rows and (s := results.roof(rows[p])) is not None]) for p in some], True, False, used),
    }


def report(args):
    rows = load(args.out)
    if not rows:
        sys.exit(f"cpu_decode: no rows in {args.out}/cpu_decode.json")
    results = Results(rows)
    (args.out / "cpu_decode.md").write_text(markdown(results))
    for name, text in plots(results).items():
        path = args.out / f"cpu_decode_{name}.svg"
        path.write_text(text) if text else path.unlink(missing_ok=True)
    say(f"wrote {args.out}/cpu_decode.md and plots")
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs, reports = commands.add_parser("run"), commands.add_parser("report")
    for p in (runs, reports):
        p.add_argument("--out", type=pathlib.Path, default=ROOT / "benches/results")
    runs.add_argument("--full", action="store_true", help="every shape, length, data and peer: hours")
    runs.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases whose name has all of these")
    runs.add_argument("--list", action="store_true", help="name the cases and stop")
    runs.add_argument("--build", type=pathlib.Path, required=True, help="where everything built and made is kept")
    runs.add_argument("--source", type=pathlib.Path, help="llama.cpp's source tree; otherwise a pinned one is fetched")
    runs.add_argument("--library", type=pathlib.Path, default=ROOT / "target/release", help="where libalignedkv.a lies")
    runs.add_argument("--rounds", type=int, default=30, help="at most, per case")
    runs.add_argument("--seconds", type=float, default=8, help="at most, per case (3 rounds at least)")
    args = parser.parse_args()
    return run(args) if args.command == "run" else report(args)


if __name__ == "__main__":
    sys.exit(main())
