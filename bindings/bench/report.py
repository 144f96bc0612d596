"""What a call costs from every language: builds and runs the programs of this folder in turns, writes benches/results/bindings.*.

usage: report.py STAGE    a folder that make install wrote to (PREFIX=/usr)
"""
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ROUNDS, RUNS = 7, 400
AIM = 300  # ns above C, from Go
CALLS = {"length": "akv_sequence_length", "attention": "akv_aligned_attention, no query row", "attention_row": "akv_aligned_attention, 1 token of 1 head"}


def build(stage, folder):
    library = stage / "usr/lib"
    env = dict(os.environ, PKG_CONFIG_PATH=f"{library}/pkgconfig", PKG_CONFIG_SYSROOT_DIR=str(stage), LD_LIBRARY_PATH=str(library),
               PKG_CONFIG_ALLOW_SYSTEM_LIBS="1", PKG_CONFIG_ALLOW_SYSTEM_CFLAGS="1")
    run = lambda *command, cwd=HERE: subprocess.run([str(c) for c in command], cwd=cwd, env=env, check=True)
    run("cc", "-O2", "overhead.c", "-o", folder / "c", f"-I{stage}/usr/include", f"-L{library}", "-lalignedkv")
    run("go", "build", "-o", folder / "go", HERE / "overhead.go", cwd=ROOT / "bindings/go")
    run("mcs", "-unsafe", "-langversion:7.2", f"-out:{folder / 'csharp.exe'}", HERE / "Overhead.cs",
        *(ROOT / "bindings/csharp/src").glob("*.cs"))
    return {"C": [folder / "c"], "Go": [folder / "go"], "C#, Mono": ["mono", folder / "csharp.exe"]}, env


def main():
    best = {}
    with tempfile.TemporaryDirectory() as folder:
        programs, env = build(pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(folder))
        for _ in range(ROUNDS):  # in turns, so that what else the machine does meets all
            for language, command in programs.items():
                for line in subprocess.run(list(map(str, command)), env=env, check=True, capture_output=True, text=True).stdout.splitlines():
                    call, ns = line.split()
                    key = (language, call)
                    best[key] = min(best.get(key, 1e300), float(ns))
    rows = [{"language": language, "call": call, "ns": best[language, call], "ns_above_c": round(best[language, call] - best["C", call], 1)}
            for language in programs for call in CALLS]
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    out = ROOT / "benches/results"
    (out / "bindings.json").write_text(json.dumps({"cpu": cpu, "rounds": ROUNDS, "aim_ns_above_c": AIM, "rows": rows}, indent=1) + "\n")
    lines = ["# What a call costs", "",
             f"Nanoseconds of the smallest calls, the best of {RUNS * ROUNDS} short runs on {cpu} (`make bench-bindings`). The attention calls ask for lse, bound, "
             f"estimate and statistics. Aim: less than {AIM} ns above C from Go.", "",
             "| call | " + " | ".join(programs) + " | Go above C | C# above C |", "|" + "---|" * (len(programs) + 3)]
    for call, name in CALLS.items():
        lines.append(f"| {name} | " + " | ".join(f"{best[l, call]:.0f}" for l in programs)
                     + f" | {best['Go', call] - best['C', call]:+.0f} | {best['C#, Mono', call] - best['C', call]:+.0f} |")
    reached = max(best["Go", c] - best["C", c] for c in CALLS)
    lines += ["", f"From Go a call costs at most {reached:.0f} ns more: the aim is {'reached' if reached < AIM else 'missed'}."]
    (out / "bindings.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
