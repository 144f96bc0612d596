"""Refreshes what README.md quotes: examples/quickstart.c and the figures in benches/results. --check only compares."""
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def quickstart():
    path = ROOT / "examples/quickstart.c"
    return f"```c\n{path.read_text()}```" if path.exists() else None


def figures():
    """benches/results/*.json with a "table": {"title", "columns", "rows"}; others are somebody else's."""
    tables = []
    for path in sorted((ROOT / "benches/results").glob("*.json")):
        data = json.loads(path.read_text())
        table = data.get("table") if isinstance(data, dict) else None
        if not table:
            continue
        line = lambda cells: "| " + " | ".join(str(c) for c in cells) + " |"
        rule = "|" + "---|" * len(table["columns"])
        tables.append("\n".join([table["title"], "", line(table["columns"]), rule, *map(line, table["rows"])]))
    return "\n\n".join(tables) or None


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
