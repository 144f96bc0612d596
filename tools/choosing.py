"""Writes what docs/choosing.md shows of the measurements in benches/results: plots beside it, tables inside. --check compares."""
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benches"))
import svg  # noqa: E402

DOCS = ROOT / "docs"
KINDS = [("normal", "random normal: flat, the hard case"), ("reallike 6 nats", "like a model's, 6 nats"),
         ("reallike 3 nats", "like a model's, 3 nats"), ("reallike 1 nats", "like a model's, 1 nat")]
COLOURS = ["#d55e00", "#e69f00", "#0072b2", "#009e73"]


def load(name):
    return json.loads((ROOT / "benches/results" / name).read_text())


def table(columns, rows):
    line = lambda cells: "| " + " | ".join(map(str, cells)) + " |"
    return "\n".join([line(columns), "|" + "---|" * len(columns), *map(line, rows)])


def decode():
    """One decode step of one layer over 32768 tokens, by kind of data: (tolerance, row), falling with the tolerance."""
    rows = load("cpu_decode.json")
    found = {}
    for kind, name in KINDS:
        shape = f"32/8 heads, d 128, 32768 tokens, {kind}"
        points = [(float(r["peer"].split(":")[1]), r) for r in rows
                  if r["shape"] == shape and r["threads"] == 1 and re.fullmatch(r"aligned:[^:]*", r["peer"])]
        found[name] = sorted(points, key=lambda p: p[0])
    return found


def look(name):
    names = [n for _, n in KINDS]
    return name.split(":")[0], COLOURS[names.index(name)], ""


def outputs():
    """File to text: plots, and the page with its tables."""
    files, tables = {}, {}
    by_kind = decode()
    for what, key, label, log in (("error", "rel_l2", "relative L2 error of the output", True), ("bits", "bits_per_element", "bits read per element of K and V", False),
                                  ("time", "us", "ms per call, 1 thread", False)):
        series = [(name, [(t, r[key] / (1000 if key == "us" else 1)) for t, r in points]) for name, points in by_kind.items()]
        files[f"choosing_{what}.svg"] = svg.plot(f"Tolerance and {what}: 32/8 heads of 128, 32768 tokens", "tolerance", label, series, True, log,
                                                 [3e-5, 1e-4, 1e-3, 3e-3, 1e-2], look)
    model = load("tinylm.json")
    ours = [r for r in model if r["scheme"] == "aligned"]
    rows = []
    for r in ours:
        how = f"{r['mode']}" + (f", tolerance {r['tolerance']:g}" if r["tolerance"] else "")
        rows.append([how, r["planes"], f"{r['bits_from_1024']:.2f}", f"{r['loss_delta_from_1024']:+.6f} ± {r['se_from_1024']:.6f}",
                     f"{r['max_certificate_over_amplitude']:.1e}" if r["max_certificate_over_amplitude"] is not None else "none",
                     f"{r['worst_error_over_certificate']:.2f}" if r["worst_error_over_certificate"] is not None else ""])
    tables["model"] = table(["mode", "planes stored", "bits read per element", "loss against f32, nats per byte", "largest bound, relative to A",
                             "largest error, relative to its bound"], rows)
    curve = sorted((r["bits_from_1024"], abs(r["loss_delta_from_1024"]) + r["se_from_1024"]) for r in ours if r["mode"] == "expected" and r["planes"] == 4)
    points = [(f"expected, {r['tolerance']:g}", [(r["bits_from_1024"], abs(r["loss_delta_from_1024"]) + r["se_from_1024"])]) for r in ours
              if r["mode"] == "expected" and r["planes"] == 4]
    points += [("2 planes, expected, 0.001" if r["planes"] == 2 else f"{r['mode']}" + (f", {r['tolerance']:g}" if r["tolerance"] else ""),
                [(r["bits_from_1024"], abs(r["loss_delta_from_1024"]) + r["se_from_1024"])]) for r in ours if r["mode"] != "expected" or r["planes"] != 4]
    points += [("published, 8 4 4 bits", [(r["bits_from_1024"], abs(r["loss_delta_from_1024"]) + r["se_from_1024"])]) for r in model if r["scheme"].startswith("published")]
    shades = lambda name: (name, "#0072b2" if name.startswith("expected") else "#d55e00" if name.startswith("2 planes") else "#777", "")
    files["choosing_loss.svg"] = svg.plot("Loss of a small language model, and bits read", "bits read per element of K and V", "change of the loss + its standard error, nats per byte",
                                          [*points, ("", curve)], False, True, None, lambda n: shades(n) if n else ("", "#0072b2", "2 3"))
    page = (DOCS / "choosing.md").read_text()
    for name, text in tables.items():
        page = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: f"{m[1]}{text}\n{m[2]}", page, flags=re.S)
    files["choosing.md"] = page
    return files


def main():
    stale = False
    for name, text in outputs().items():
        path = DOCS / name
        if path.exists() and path.read_text() == text:
            continue
        stale = True
        if "--check" in sys.argv:
            print(f"docs/{name} is stale: run `make readme`")
        else:
            path.write_text(text)
    return stale and "--check" in sys.argv


if __name__ == "__main__":
    sys.exit(main())
