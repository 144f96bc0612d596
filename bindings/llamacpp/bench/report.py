#!/usr/bin/env python3
"""Merges what quality and speed measured into a JSON file, an SVG plot and a Markdown table.

usage: report.py --out DIR [--version TEXT] QUALITY.json [SPEED.json ...]    writes DIR/llamacpp.json and .svg, prints the table
       report.py --check QUALITY.json                                        holds the demo model's figures to their limits
"""
import argparse
import json
import math
import pathlib
import sys

DEFAULT = "alignedkv slots"  # the placement and, with " 1e-3", the tolerance that are the default


def load(path):
    return json.loads(pathlib.Path(path).read_text())


def check(quality):
    """At tolerance 1e-3 no worse than q8_0 with fewer bits; with all digits as good as exact."""
    by_name = {s["name"]: s for s in quality["schemes"]}
    limits = []
    for placement, bits in (("slots", 5), ("attached", 6)):
        ours, exact = by_name[f"alignedkv {placement} 1e-3"], by_name[f"alignedkv {placement} exact"]
        limits += [
            (f"{placement} 1e-3: mean KLD against q8_0's", ours["kld_mean"], by_name["q8_0"]["kld_mean"]),
            (f"{placement} 1e-3: bits read per element", ours["bits"], bits),
            (f"{placement} exact: mean KLD", exact["kld_mean"], 1e-5),
        ]
    good = True
    for name, value, limit in limits:
        holds = value is not None and value <= limit
        good &= holds
        print(f"{'ok  ' if holds else 'FAIL'} {name}: {value} (limit {limit:g})")
    return good


def table(columns, rows):
    line = lambda cells: "| " + " | ".join(map(str, cells)) + " |"
    return "\n".join([line(columns), "|" + "---|" * len(columns), *map(line, rows)])


def markdown(quality, speeds):
    windows = quality["windows"]
    rows = []
    for s in quality["schemes"][1:]:
        same = sum(d == quality["greedy"] for d in s["first_difference"])
        rows.append([s["name"], f"{s['bits']:.2f}", f"{s['kld_mean']:.1e}", f"{s['kld_max']:.1e}",
                     f"{s['ppl']:.4f}", f"{s['ln_ppl_delta']:+.5f} ± {s['ln_ppl_delta_se'] or math.nan:.5f}", f"{same} of {windows}"])
    parts = [f"Predictions of the demo model inside llama.cpp, against an f32 cache without flash attention: {windows} texts, tokens "
             f"{quality['decoded_from']} to {quality['window'] - 1} decoded one by one:\n\n"
             + table(["KV cache", "bits read per element", "mean KLD", "largest KLD", "perplexity", "ln(perplexity) - truth's",
                      f"same greedy text ({quality['greedy']} tokens)"], rows)]
    for speed in speeds:
        rows = []
        for n in sorted({r["n"] for r in speed["rows"]}):
            for threads in sorted({r["threads"] for r in speed["rows"]}):
                for r in speed["rows"]:
                    if (r["n"], r["threads"]) == (n, threads):
                        rows.append([n, threads, r["name"], f"{r['bits']:.2f}", f"{r['attention_us']:.0f}", f"{r['speedup']:.2f}",
                                     f"{r['whole_speedup']:.2f}"])
        parts.append(f"Time of attention per token at decode, {speed['model']}: {speed['layers']} layers, {speed['heads']} query and "
                     f"{speed['kv_heads']} KV heads of 128, random weights (attention's entropy over {speed['entropy_tokens']} tokens: "
                     f"{speed['entropy_nats']:.1f} nats, {math.log(speed['entropy_tokens']):.1f} if uniform), {speed['cpu']}:\n\n"
                     + table(["tokens", "threads", "KV cache", "bits read per element", "attention, µs", "faster than f16",
                              "whole model faster than f16"], rows))
    return "\n\n".join(parts)


# ---- plot: divergence over bits read on the left, attention's time over the context's length on the right ----

WIDTH, HEIGHT, TOP, BOTTOM = 1000, 440, 56, 60
COLOURS = {"alignedkv slots": "#0072b2", "alignedkv attached": "#d55e00", "q8_0": "#666", "f16": "#000", "q4_0": "#666"}


def colour(name):
    return next((c for prefix, c in COLOURS.items() if name.startswith(prefix)), "#666")


class Axes:
    """Two axes, each linear or logarithmic (base 10 or 2)."""

    def __init__(self, left, right, x_range, y_range, log_x):
        self.left, self.right, self.log_x = left, right, log_x
        self.x_range = [math.log2(v) for v in x_range] if log_x else x_range
        self.y_range = [math.log10(v) for v in y_range]

    def x(self, v):
        v = math.log2(v) if self.log_x else v
        return self.left + (v - self.x_range[0]) / (self.x_range[1] - self.x_range[0]) * (self.right - self.left)

    def y(self, v):
        share = (math.log10(v) - self.y_range[0]) / (self.y_range[1] - self.y_range[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def frame(self, title, x_label, y_label, x_ticks):
        out = [f'<text x="{self.left}" y="26" font-size="16">{title}</text>']
        low, high = self.y_range
        ticks = [(m * 10.0**k, f"{m}e{k}") for k in range(math.floor(low), math.ceil(high)) for m in ((1, 2, 5) if high - low < 3 else (1,))]
        for v, text in ticks:
            if low <= math.log10(v) <= high:
                out.append(f'<path d="M{self.left} {self.y(v):.1f}H{self.right}" stroke="#ddd"/>'
                           f'<text x="{self.left - 8}" y="{self.y(v) + 4:.1f}" text-anchor="end">{text}</text>')
        for v in x_ticks:
            out.append(f'<path d="M{self.x(v):.1f} {HEIGHT - BOTTOM}v5" stroke="#444"/>'
                       f'<text x="{self.x(v):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{v}</text>')
        middle = (TOP + HEIGHT - BOTTOM) / 2
        out.append(f'<text x="{(self.left + self.right) / 2}" y="{HEIGHT - 18}" text-anchor="middle">{x_label}</text>')
        out.append(f'<text transform="translate({self.left - 52} {middle}) rotate(-90)" text-anchor="middle">{y_label}</text>')
        return out


def svg(quality, speeds):
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>']
    points = [s for s in quality["schemes"] if s["kld_mean"] and s["bits"] <= 18]
    low, high = min(s["kld_mean"] for s in points), max(s["kld_mean"] for s in points)
    axes = Axes(80, 480, [0, 18], [low / 2, high * 2], False)
    out += axes.frame("demo model: divergence from an f32 cache", "bits read per element of K and V", "mean KL divergence, nats",
                      range(0, 19, 2))
    for s in points:
        x, y, c = axes.x(s["bits"]), axes.y(s["kld_mean"]), colour(s["name"])
        label = s["name"].removeprefix("alignedkv ")
        dx, dy, anchor = 7, 4, "start"
        if label.endswith("exact"):  # both lie at the right edge, one upon the other
            dx, dy, anchor = 4, -8 if label.startswith("slots") else 16, "end"
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{c}"/>'
                   f'<text x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}" font-size="11" fill="{c}">{label}</text>')
    if speeds:
        speed = speeds[0]
        threads = min(r["threads"] for r in speed["rows"])
        rows = [r for r in speed["rows"] if r["threads"] == threads and r["attention_us"] > 0]
        lengths = sorted({r["n"] for r in rows})
        span = [min(lengths), max(lengths)] if len(lengths) > 1 else [lengths[0] / 2, lengths[0] * 2]
        values = [r["attention_us"] for r in rows]
        axes = Axes(590, WIDTH - 120, span, [min(values) / 1.5, max(values) * 1.5], True)
        out += axes.frame(f"{speed['model'].removesuffix('.gguf')} model: attention, {threads} thread{'s' * (threads > 1)}", "tokens of context",
                          f"µs per token, {speed['layers']} layers", lengths)
        for name in dict.fromkeys(r["name"] for r in rows):
            line = sorted((r["n"], r["attention_us"]) for r in rows if r["name"] == name)
            path = "L".join(f"{axes.x(n):.1f} {axes.y(us):.1f}" for n, us in line)
            dots = "".join(f'<circle cx="{axes.x(n):.1f}" cy="{axes.y(us):.1f}" r="3" fill="{colour(name)}"/>' for n, us in line)
            out.append(f'<path d="M{path}" fill="none" stroke="{colour(name)}" stroke-width="1.5"/>{dots}'
                       f'<text x="{axes.x(line[-1][0]) + 7:.1f}" y="{axes.y(line[-1][1]) + 4:.1f}" font-size="11" fill="{colour(name)}">{name}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def headline(quality, speeds):
    """The figures that are quoted: default tolerance and placement, one thread, 8192 tokens, the first speed file."""
    by_name = {s["name"]: s for s in quality["schemes"]}
    ours = by_name.get(f"{DEFAULT} 1e-3", {})
    out = {
        "kld_mean_alignedkv": ours.get("kld_mean"),
        "kld_mean_f16": by_name["f16"]["kld_mean"],
        "kld_mean_q8_0": by_name["q8_0"]["kld_mean"],
        "kld_mean_q4_0": by_name["q4_0"]["kld_mean"],
        "ppl_alignedkv": ours.get("ppl"),
        "ppl_f16": by_name["f16"]["ppl"],
        "bits_per_element": ours.get("bits"),
    }
    rows = speeds[0]["rows"] if speeds else []
    for key, name in (("alignedkv", DEFAULT), ("f16", "f16"), ("q8_0", "q8_0")):
        out[f"attention_us_{key}_8k"] = next((r["attention_us"] for r in rows if (r["name"], r["n"], r["threads"]) == (name, 8192, 1)), None)
    out["attention_speedup_8k"] = next((r["speedup"] for r in rows if (r["name"], r["n"], r["threads"]) == (DEFAULT, 8192, 1)), None)
    return out


def dumps(x, indent=""):
    """JSON with a line per scheme and per row."""
    deep = lambda v: isinstance(v, (dict, list)) and any(isinstance(w, (dict, list)) for w in (v.values() if isinstance(v, dict) else v))
    if not deep(x) or isinstance(x, dict) and "first_difference" in x:
        return json.dumps(x)
    inner = indent + " "
    if isinstance(x, dict):
        return "{\n" + ",\n".join(f"{inner}{json.dumps(k)}: {dumps(v, inner)}" for k, v in x.items()) + "\n" + indent + "}"
    return "[\n" + ",\n".join(inner + dumps(v, inner) for v in x) + "\n" + indent + "]"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--version", default="")
    parser.add_argument("quality")
    parser.add_argument("speed", nargs="*")
    args = parser.parse_args()
    quality, speeds = load(args.quality), [load(p) for p in args.speed]
    if args.check:
        return 0 if check(quality) else 1
    print(markdown(quality, speeds))
    if args.out:
        merged = {**headline(quality, speeds), "llama_cpp": args.version, "quality": quality, "speed": speeds}
        (args.out / "llamacpp.json").write_text(dumps(merged) + "\n")
        (args.out / "llamacpp.svg").write_text(svg(quality, speeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
