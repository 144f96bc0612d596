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
    """By kernel: instructions, functions that it calls included. Of a scan also what a tile costs (see `tile_loop`), and the
    instructions of the function that takes the other tiles."""
    text = subprocess.run([nvdisasm, "-c", cubin], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    found, code = {}, None
    for line in text.splitlines():
        if m := re.match(r"\s*\.text\.(\w+):", line):
            code, labels = found.setdefault(m[1], ([], {}))
        elif code is not None and (m := re.match(r"\s*(\S+):\s*$", line)):
            labels[m[1]] = len(code)
        elif code is not None and (m := re.match(r"\s+(?:\.L\w+:)?\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line)):
            code.append(m[1])
    counts = {}
    for kernel, (code, labels) in found.items():
        counts[kernel] = {"instructions": len(code)}
        if kernel.startswith("akv_scan"):
            starts = sorted(i for name, i in labels.items() if name.startswith("$")) + [len(code)]
            other, = (i for name, i in labels.items() if name.startswith("$") and "scan_others" in name)
            # A tile is 128 tokens.
            counts[kernel] |= {"per_64_tokens": -(-tile_loop(kernel, code, labels) // 2),
                               "other_tiles": min(i for i in starts if i > other) - other}
    return counts


def tile_loop(kernel, code, labels):
    """Instructions of a scan's loop over tiles, with one round of the loop over heads in it: what a tile all of whose tokens
    are seen costs, for up to four query heads. All branches of it count, each instruction once; what a warp runs that has
    diverged, which this one never does, does not, nor what is called for tiles of another kind after the loop."""
    def after(i):
        m = re.match(r"(@\S+ )?(\S+)( !?U?P\d)?", code[i])
        conditional, operation = m[1] or m[3], m[2]
        m = re.search(r"`\((\S+)\)", code[i])
        to = m and labels.get(m[1])
        if operation.startswith("BRA.DIV"):
            return [i + 1]
        if operation.startswith("BRA.CONV"):
            return [to]
        if operation.startswith("BRA") or operation.startswith("CALL") and m[1].startswith(".L"):
            return [to, i + 1] if conditional else [to]
        return [] if operation.startswith(("EXIT", "RET")) and not conditional else [i + 1]

    # Depth first: edges back to where the path has come from close loops.
    before, state, backward, path = {}, {0: 1}, [], [(0, iter(after(0)))]
    while path:
        i, successors = path[-1]
        j = next(successors, None)
        if j is None:
            state[i] = 2
            path.pop()
            continue
        before.setdefault(j, []).append(i)
        if j not in state:
            state[j] = 1
            path.append((j, iter(after(j))))
        elif state[j] == 1:
            backward.append((i, j))
    loops = {}
    for i, head in backward:
        loop, left = loops.setdefault(head, {head}), [i]
        while left:
            j = left.pop()
            if j not in loop:
                loop.add(j)
                left += before[j]
    products = {i for i in state if "IMMA" in code[i]}
    around = sorted((loop for loop in loops.values() if products and products <= loop), key=len)
    if len(around) != 3 or any(loop < around[1] and loop != around[0] for loop in loops.values()):
        sys.exit(f"kernels: {kernel} is no loop over splits with one over tiles and one over heads in it: it cannot be counted")
    return len(around[1])


def threads(kernel):
    """Threads of a block, as the sources launch it."""
    return {"akv_encode": 256, "akv_write": 256, "akv_adopt": 256, "akv_merge": 64, "akv_dequantize": 64, "akv_poke": 256, "akv_report": 32}.get(kernel, 128)


def allowances():
    """What may be needed at most: entries with patterns of kernels and, if not of all, of architectures."""
    return [{"architecture": ".*"} | entry for entry in json.loads((ROOT / "kernels/budget.json").read_text())]


def over_budget(rows):
    """What is more than is allowed, in words."""
    found = [f"{r['kernel']} for {r['architecture']} spills {r['spill_bytes']} bytes" for r in rows if r["spill_bytes"]]
    for entry in allowances():
        if not any(re.fullmatch(entry["kernel"], r["kernel"]) for r in rows):
            found.append(f"kernels/budget.json names {entry['kernel']}, which is no kernel")
        found += [f"{r['kernel']} for {r['architecture']} has {r[entry['what']]} {entry['what']}, at most {entry['most']} are allowed"
                  for r in rows if re.fullmatch(entry["kernel"], r["kernel"]) and re.fullmatch(entry["architecture"], r["architecture"])
                  and r[entry["what"]] > entry["most"]]
    return found


def refuses(rows):
    """What is too much must be found: spills, and one more than each entry of the budget allows, wherever it applies."""
    nothing = [{"kernel": r["kernel"], "architecture": r["architecture"], "spill_bytes": 0, "registers": 0, "per_64_tokens": 0} for r in rows]
    planted = [(nothing[0], {"spill_bytes": 8})]
    planted += [(r, {entry["what"]: entry["most"] + 1}) for entry in allowances() for r in nothing
                if re.fullmatch(entry["kernel"], r["kernel"]) and re.fullmatch(entry["architecture"], r["architecture"])]
    return not over_budget(nothing) and all(over_budget([r | more if r is row else r for r in nothing]) for row, more in planted)


def table(rows):
    kernels = list(dict.fromkeys(r["kernel"] for r in rows))
    by = {(r["kernel"], r["architecture"]): r for r in rows}
    lines = ["# What the CUDA kernels need", "",
             "By architecture: registers of a thread, share of a multiprocessor's threads that they leave room for, instructions of the "
             "kernel with the functions that it calls. Nothing is spilled to memory. Compiled, not run: this says nothing of speed.", "",
             "For the scan also, in bold, the instructions of a warp per 64 tokens and up to 4 query heads: half of its loop over tiles of 128, "
             "with the loads, q folded with the tile's scales, products, scores, softmax sums and stores. All branches in the loop count, each "
             "instruction once. The loop is for tiles all of whose tokens are seen, without soft cap and added mask, and head_dim 64, 96, 128, 192 "
             "or 256; other tiles (the last one of a context) go through a function of its own, whose length comes last.", "",
             "| kernel | " + " | ".join(ARCHITECTURES) + " |", "|---" * (1 + len(ARCHITECTURES)) + "|"]
    for k in kernels:
        cells = (by[k, a] for a in ARCHITECTURES)
        lines.append(f"| {k} | " + " | ".join(f"{r['registers']}, {100 * r['occupancy']:.0f}%, {r['instructions']}" +
                                              (f", **{r['per_64_tokens']}**, {r['other_tiles']}" if "per_64_tokens" in r else "") for r in cells) + " |")
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
    parser.add_argument("--only", help="architectures, as sm_80,sm_90: compile for these, hold them against the budget, print their rows and write nothing")
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
            r |= counts[r["kernel"]]
            # Registers are handed out to warps by the 256.
            warps = REGISTERS // (-(-32 * r["registers"] // 256) * 256)
            blocks = 32 * warps // threads(r["kernel"])
            r["occupancy"] = min(1.0, blocks * threads(r["kernel"]) / THREADS[architecture])
        return architecture, binary, sorted(rows.values(), key=lambda r: r["kernel"])

    rows, images = [], {}
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for architecture, binary, found in pool.map(build, args.only.split(",") if args.only else (*ARCHITECTURES, PTX)):
            say(f"{architecture}: {len(binary)} bytes")
            rows += found
            images[architecture] = binary.rstrip(b"\0") if architecture == PTX else binary
    if args.only:
        for r in rows:
            print(json.dumps(r))
    if not refuses(rows):
        sys.exit("kernels: what is over budget is not found")
    if problems := over_budget(rows):
        sys.exit("\n".join(f"kernels: {p}" for p in problems))
    if args.only:
        return 0
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
