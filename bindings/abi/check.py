"""The binary interface against what is committed here, and what a build of the library shows of itself.

usage: check.py STAGE     a folder that make install wrote to (PREFIX=/usr); fails on a difference
       check.py --accept  takes the header as it is for the baseline: bindings/abi/alignedkv.abi

- The types and functions of the header are those of alignedkv.abi (libabigail's abidiff); functions may be added.
- The shared library exports symbols.txt and nothing else, and so does the static one: Rust's own symbols are local there.
- The shared library needs no younger glibc than docs/platforms.md says.
"""
import pathlib
import re
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BASELINE = HERE / "alignedkv.abi"


def run(*command, cwd=None):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=cwd)


def output(*command, cwd=None):
    result = run(*command, cwd=cwd)
    if result.returncode:
        sys.exit(f"abi: {' '.join(map(str, command))}: {result.stderr}")
    return result.stdout


def stub(folder):
    """A library of the header's functions without bodies, whose debug information describes the header's types."""
    header = (ROOT / "include/alignedkv.h").read_text()
    declarations = re.findall(r"^(\w[\w *]*\bakv_\w+\([^;{]*\));", header[header.index('extern "C"'):], re.M)
    library = folder / "libalignedkv.so"
    (folder / "stub.c").write_text("#include <alignedkv.h>\n" + "".join(d + " { __builtin_trap(); }\n" for d in declarations))
    output("cc", "-g", "-O0", "-shared", "-fPIC", f"-I{ROOT / 'include'}", "stub.c", "-Wl,-soname,libalignedkv.so.0", "-o", library, cwd=folder)
    return library


def symbols(*readelf):
    """Names of the global symbols that a library defines."""
    lines = (line.split() for line in output("readelf", "-W", *readelf).splitlines())
    return sorted({w[7].split("@")[0] for w in lines if len(w) > 7 and w[4] in ("GLOBAL", "WEAK", "UNIQUE") and w[6] not in ("UND", "ABS")})


def version(text):
    return tuple(map(int, text.split(".")))


def check(stage):
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        diff = run("abidiff", "--no-added-syms", BASELINE, stub(pathlib.Path(folder)))
        if diff.returncode:
            wrong.append(f"the header is not bindings/abi/alignedkv.abi; if that is meant, run make abi:\n{diff.stdout}{diff.stderr}")
    expected = (HERE / "symbols.txt").read_text().split()
    shared, static = stage / "usr/lib/libalignedkv.so", stage / "usr/lib/libalignedkv.a"
    for library, found in ((shared, symbols("--dyn-syms", shared)), (static, symbols("-s", static))):
        if found != expected:
            other = sorted(set(found) ^ set(expected))
            wrong.append(f"{library.name} and symbols.txt differ in {len(other)} symbols: {other[:10]}")
    dynamic = output("readelf", "-d", shared)
    if not re.search(r"SONAME.*\[libalignedkv\.so\.0\]", dynamic):
        wrong.append("the soname is not libalignedkv.so.0")
    if "NODELETE" not in dynamic:
        wrong.append("not marked nodelete")
    needed = max(re.findall(r"GLIBC_([0-9.]+)", output("readelf", "-V", shared)), key=version)
    documented = re.search(r"glibc ([0-9.]+) ", (ROOT / "docs/platforms.md").read_text())[1]
    if version(needed) > version(documented):
        wrong.append(f"the library needs glibc {needed}, and docs/platforms.md says {documented}")
    if wrong:
        sys.exit("abi: " + "\nabi: ".join(wrong))
    print(f"abi: {len(expected)} functions, glibc {needed}")


def main():
    if sys.argv[1] == "--accept":
        with tempfile.TemporaryDirectory() as folder:
            BASELINE.write_text(output("abidw", "--no-corpus-path", "--no-comp-dir-path", "--no-show-locs", stub(pathlib.Path(folder))))
    else:
        check(pathlib.Path(sys.argv[1]))


if __name__ == "__main__":
    main()
