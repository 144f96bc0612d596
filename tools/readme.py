"""Refreshes what README.md quotes: examples/quickstart.c and the figures in benches/results. --check only compares."""
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def quickstart():
    path = ROOT / "examples/quickstart.c"
    return f"```c\n{path.read_text()}```" if path.exists() else None


def table(columns, rows):
    line = lambda cells: "| " + " | ".join(map(str, cells)) + " |"
    return "\n".join([line(columns), "|" + "---|" * len(columns), *map(line, rows)])


def figures():
    """benches/results/tinylm.json (make demo) and traces.json (make test-oracle), cpu_decode.json (make bench), as far as they are there."""
    parts = []
    path = ROOT / "benches/results/tinylm.json"
    if path.exists():
        rows = []
        for r in json.loads(path.read_text()):
            name = " ".join([r["scheme"], *([f"{r['mode']}"] if r["mode"] else []), *([f"{r['tolerance']:g}"] if r["tolerance"] else [])])
            if r["planes"] and r["planes"] < 4:
                name += f", {r['planes']} planes"
            rows.append([name, f"{r['bits_from_1024']:.2f}", f"{100 * r['byte_share']:.0f}%", f"{r['loss_delta_from_1024']:+.5f} ± {r['se_from_1024']:.5f}"])
        parts.append("Loss of a small causal language model, decoded token by token over 16 texts of 2048 bytes (`make demo`):\n\n"
                     + table(["scheme", "bits read per element, from token 1024", "bytes against f16, all tokens", "loss against f32, nats per byte, from token 1024"], rows))
    path = ROOT / "benches/results/cpu_decode.json"
    if path.exists():
        measured = {}
        for r in json.loads(path.read_text()):
            if r["peer"] == "aligned:1e-3":
                measured.setdefault(r["shape"], {})[r["threads"]] = r
        rows = [[shape, *(f"{by[t]['us']:.0f}" if t in by else "" for t in (1, 2)), *(f"{by[t]['speedup_vs_ggml_f16']:.1f}x" if t in by else "" for t in (1, 2)),
                 f"{by[1]['rel_l2']:.0e}", f"{by[1]['bits_per_element']:.2f}"] for shape, by in measured.items() if 1 in by]
        parts.append("One decode step of one layer on the CPU at the default tolerance, beside ggml's flash attention on an f16 cache in llama.cpp's layout "
                     "(the faster of two builds), in one process and in turns, K and V in memory, not in a cache (`make bench`; every peer, error and "
                     "aim, also those missed, in [`benches/results/cpu_decode.md`](benches/results/cpu_decode.md)):\n\n"
                     + table(["case", "µs, 1 thread", "µs, 2 threads", "against ggml f16, 1 thread", "2 threads", "relative L2 error", "bits read"], rows))
    path = ROOT / "benches/results/traces.json"
    if path.exists():
        data = json.loads(path.read_text())["table"]
        parts.append(data["title"] + "\n\n" + table(data["columns"], data["rows"]))
    return "\n\n".join(parts) or None


def main():
    readme = ROOT / "README.md"
    old = new = readme.read_text()
    for name, text in (("quickstart", quickstart()), ("figures", figures())):
        if text is not None:
            new = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: f"{m[1]}{text}\n{m[2]}", new, flags=re.S)
    if new == old:
        return 0
    if "--check" in sys.argv:
        print("README.md is stale: run `make readme`")
        return 1
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
