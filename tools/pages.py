"""Takes the programs out of the pages in docs, for a test to compile and run.

usage: pages.py ROOT OUT. A fenced block is a program if it has a main function: it goes to OUT/PAGE/programN.EXTENSION.
"""
import pathlib
import re
import shutil
import sys

EXTENSIONS = {"c": "c", "cpp": "cpp", "go": "go", "csharp": "cs"}
MAIN = r"\bint main\(|\bfunc main\(|\bstatic void Main\("


def main():
    root, out = map(pathlib.Path, sys.argv[1:])
    shutil.rmtree(out, ignore_errors=True)
    found = set()
    for page in sorted((root / "docs").glob("*.md")):
        blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.M | re.S)
        programs = [(language, text) for language, text in blocks if language in EXTENSIONS and re.search(MAIN, text)]
        for i, (language, text) in enumerate(programs):
            found.add(language)
            (out / page.stem).mkdir(parents=True, exist_ok=True)
            (out / page.stem / f"program{i}.{EXTENSIONS[language]}").write_text(text)
    if found != set(EXTENSIONS):
        sys.exit(f"pages: no program in {set(EXTENSIONS) - found}")


if __name__ == "__main__":
    main()
