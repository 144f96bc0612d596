#!/usr/bin/env python3
"""Compiles the CUDA kernels for every architecture, with pinned compilers from PyPI: no CUDA toolkit, no GPU.

The binaries go deflated to kernels/images, with a manifest of what they were made from; the library carries them.
Fails if a kernel spills registers to memory, or needs more than kernels/budget.json allows. What each one needs goes to
benches/results/kernels.json, and as a table to kernels.md.
"""

import argparse
import concurrent.futures
import ctypes
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import zipfile
import zlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# Drivers that know none of these compile the PTX themselves: its version is the one that 530 and later can read.
PTX = "compute_80"
# Numbers are the CPU's bit for bit: nothing is contracted.
OPTIONS = ("--std=c++17", "--fmad=false")
WHEELS = {
    "nvrtc": ("nvidia-cuda-nvrtc-cu12==12.9.86", "210cf05005a447e29214e9ce50851e83fc5f4358df8b453155d5e1918094dcb4"),
    "nvrtc_ptx": ("nvidia-cuda-nvrtc-cu12==12.1.105", "339b385f50c309763ca65456ec75e17bbefcbbf2893f462cb8b90584cd27a1c2"),
    "nvdisasm": ("nvidia-cuda-nvdisasm==13.5.37", "d3fdbdd49fa53e2e4aacd3db8259d052bd2b049ececdcb69e92e083c6728e7ca"),
}
# Registers and threads of a multiprocessor (CUDA C++ Programming Guide, table of technical specifications).
REGISTERS = 65536
THREADS = {"sm_80": 2048, "sm_86": 1536, "sm_89": 1536, "sm_90": 2048, "sm_100": 2048, "sm_120": 1536}


def say(text):
    print(f"kernels: {text}", flush=True)


def tool(folder, name):
    """A wheel, unpacked."""
    requirement, digest = WHEELS[name]
    to = folder / name
    if to.exists():
        return to
    say(f"fetching {requirement}")
    download = folder / f"{name}.download"
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        pip = [folder / "venv/bin/python3", "-m", "pip"]
    subprocess.run([*pip, "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", download, requirement], check=True)
    wheel, = download.glob("*.whl")
    if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != digest:
        sys.exit(f"kernels: {wheel.name} has SHA-256 {found}, expected {digest}")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / f"{name}.unpacked")
    os.replace(folder / f"{name}.unpacked", to)
    wheel.unlink()
    download.rmdir()
    return to


class Compiler:
    """NVRTC."""

    def __init__(self, folder):
        library, = folder.rglob("libnvrtc.so.12")
        self.nvrtc = ctypes.CDLL(str(library))

    def compile(self, architecture):
        """The translation unit's binary, and what the compiler says of it."""
        program = ctypes.c_void_p()
        source = b'#include "alignedkv.cu"\n'
        self.nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels", 0, None, None)
        options = [*OPTIONS, f"--gpu-architecture={architecture}", f"-I{ROOT / 'kernels'}"]
        if architecture.startswith("sm_"):
            options.append("--ptxas-options=-v")
        options = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        failed = self.nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = self.get(program, "ProgramLog").decode().rstrip("\0")
        if failed:
            sys.exit(f"{log}\nkernels: {architecture}: NVRTC failed with {failed}")
        return self.get(program, "CUBIN" if architecture.startswith("sm_") else "PTX"), log

    def get(self, program, what):
        size = ctypes.c_size_t()
        getattr(self.nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(self.nvrtc, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw


def resources(architecture, log):
    """Rows by kernel, from what ptxas says."""
    rows, kernel = {}, None
    for line in log.splitlines():
        if m := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = rows.setdefault(m[1], {"kernel": m[1], "architecture": architecture, "spill_bytes": 0})
        elif kernel is not None and (m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)):
            # The first are the kernel's own; functions that it calls follow.
            kernel.setdefault("stack_bytes", int(m[1]))
            kernel["spill_bytes"] += int(m[2]) + int(m[3])
        elif kernel is not None and (m := re.search(r"Used (\d+) registers", line)):
            kernel["registers"] = int(m[1])
    return rows


def instructions(nvdisasm, cubin):
    """By kernel: instructions, functions that it calls included, and those of the scan's loop over heads: the smallest loop
    around all integer matrix products, what is rarely taken included."""
    text = subprocess.run([nvdisasm, "-c", cubin], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    found, code = {}, None
    for line in text.splitlines():
        if m := re.match(r"\s*\.text\.(\w+):", line):
            code, labels = found.setdefault(m[1], ([], {}))
        elif code is not None and (m := re.match(r"\s*(\S+):\s*$", line)):
            labels[m[1]] = len(code)
        elif code is not None and (m := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line)):
            code.append(m[1])
    counts = {}
    for kernel, (code, labels) in found.items():
        products = [i for i, x in enumerate(code) if "IMMA" in x]
        jumps = [(labels[m[1]], i) for i, x in enumerate(code) if (m := re.search(r"BRA.*`\((\S+)\)", x)) and m[1] in labels]
        around = [end - start + 1 for start, end in jumps if products and start <= products[0] and end >= products[-1]]
        counts[kernel] = (len(code), min(around, default=None))
    return counts


def threads(kernel):
    """Threads of a block, as the sources launch it."""
    return {"akv_encode": 256, "akv_write": 256, "akv_adopt": 256, "akv_merge": 64, "akv_dequantize": 64, "akv_poke": 256, "akv_report": 32}.get(kernel, 128)


def over_budget(rows):
    """What is more than is allowed, in words."""
    found = [f"{r['kernel']} for {r['architecture']} spills {r['spill_bytes']} bytes" for r in rows if r["spill_bytes"]]
    for entry in json.loads((ROOT / "kernels/budget.json").read_text()):
        matching = [r for r in rows if re.fullmatch(entry["kernel"], r["kernel"])]
        if not matching:
            found.append(f"kernels/budget.json names {entry['kernel']}, which is no kernel")
        found += [f"{r['kernel']} for {r['architecture']} has {r[entry['what']]} {entry['what']}, at most {entry['most']} are allowed"
                  for r in matching if r[entry["what"]] > entry["most"]]
    return found


def refuses():
    """What is too much must be found: spills, and one more than each entry of the budget allows."""
    sample = {"kernel": "akv_scan_4", "architecture": "planted", "spill_bytes": 0, "registers": 0, "per_64_tokens": 0}
    everything = [sample | {"kernel": k} for k in ("akv_scan_2", "akv_scan_3", "akv_attend_2", "akv_encode")]
    allowed = json.loads((ROOT / "kernels/budget.json").read_text())
    planted = [{"spill_bytes": 8}] + [{"kernel": entry["kernel"].replace("[234]", "4").replace("(encode|write)", "write"), entry["what"]: entry["most"] + 1} for entry in allowed]
    return not over_budget([sample] + everything) and all(len(over_budget([sample | p] + everything)) == 1 for p in planted)


def table(rows):
    kernels = list(dict.fromkeys(r["kernel"] for r in rows))
    by = {(r["kernel"], r["architecture"]): r for r in rows}
    lines = ["# What the CUDA kernels need", "",
             "By architecture: registers of a thread, share of a multiprocessor's threads that they leave room for, instructions of the "
             "kernel with the functions that it calls; for the scan also those per 64 tokens and 4 query heads, paths that are rarely taken included. Nothing is spilled to memory. Compiled, not run: this says nothing of speed.", "",
             "| kernel | " + " | ".join(ARCHITECTURES) + " |", "|---" * (1 + len(ARCHITECTURES)) + "|"]
    for k in kernels:
        cells = (by[k, a] for a in ARCHITECTURES)
        lines.append(f"| {k} | " + " | ".join(f"{r['registers']}, {100 * r['occupancy']:.0f}%, {r['instructions']}" + (f", {r['per_64_tokens']}" if "per_64_tokens" in r else "") for r in cells) + " |")
    return "\n".join(lines) + "\n"


def digest(data):
    return hashlib.sha256(data).hexdigest()


def manifest(images):
    """What the images were made from, and what they are."""
    sources = sorted(p for p in (ROOT / "kernels").iterdir() if p.suffix in (".cu", ".cuh", ".h"))
    return json.dumps({
        "sources": {p.name: digest(p.read_bytes()) for p in sources},
        "compilers": {name: WHEELS[name][0] for name in ("nvrtc", "nvrtc_ptx")},
        "options": OPTIONS,
        "images": {name: digest(data) for name, data in images.items()},
    }, indent=1) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=pathlib.Path, default=ROOT / "target/cuda", help="where the compilers are kept")
    parser.add_argument("--check", action="store_true", help="compare with benches/results instead of writing it")
    args = parser.parse_args()
    args.tools.mkdir(parents=True, exist_ok=True)
    cubins, ptx = Compiler(tool(args.tools, "nvrtc")), Compiler(tool(args.tools, "nvrtc_ptx"))
    nvdisasm, = tool(args.tools, "nvdisasm").rglob("nvdisasm")
    nvdisasm.chmod(0o755)

    def build(architecture):
        binary, log = (ptx if architecture == PTX else cubins).compile(architecture)
        path = args.tools / f"{architecture}.{'ptx' if architecture == PTX else 'cubin'}"
        path.write_bytes(binary)
        if architecture == PTX:
            return architecture, binary, []
        rows, counts = resources(architecture, log), instructions(nvdisasm, path)
        for r in rows.values():
            r["instructions"], loop = counts[r["kernel"]]
            if r["kernel"].startswith("akv_scan"):
                r["per_64_tokens"] = loop // 2  # a tile is 128 of them
            # Registers are handed out to warps by the 256.
            warps = REGISTERS // (-(-32 * r["registers"] // 256) * 256)
            blocks = 32 * warps // threads(r["kernel"])
            r["occupancy"] = min(1.0, blocks * threads(r["kernel"]) / THREADS[architecture])
        return architecture, binary, sorted(rows.values(), key=lambda r: r["kernel"])

    rows, images = [], {}
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for architecture, binary, found in pool.map(build, (*ARCHITECTURES, PTX)):
            say(f"{architecture}: {len(binary)} bytes")
            rows += found
            images[architecture] = binary.rstrip(b"\0") if architecture == PTX else binary
    if not refuses():
        sys.exit("kernels: what is over budget is not found")
    if problems := over_budget(rows):
        sys.exit("\n".join(f"kernels: {p}" for p in problems))
    results = ROOT / "benches/results"
    texts = {"kernels.json": "[\n" + ",\n".join(" " + json.dumps(r) for r in rows) + "\n]\n", "kernels.md": table(rows)}
    folder = ROOT / "kernels/images"
    if args.check:
        # Unpacked: how they are deflated is a matter of zlib's version.
        kept = {name: zlib.decompress((folder / f"{name}.z").read_bytes()) for name in images}
        if kept != images or (folder / "manifest.json").read_text() != manifest(images):
            sys.exit("kernels: kernels/images is not what the sources compile to: make kernels writes it")
    else:
        folder.mkdir(exist_ok=True)
        for name, data in images.items():
            (folder / f"{name}.z").write_bytes(zlib.compress(data, 9))
        (folder / "manifest.json").write_text(manifest(images))
    for name, text in texts.items():
        if not args.check:
            (results / name).write_text(text)
        elif not (results / name).exists() or (results / name).read_text() != text:
            sys.exit(f"kernels: benches/results/{name} is not what the kernels need now: make kernels writes it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
