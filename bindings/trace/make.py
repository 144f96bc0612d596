"""Writes the trace that programs of all languages attend: 300 tokens of a real model's layer, prefilled, and 40 decode steps.

usage: make.py OUT. Little-endian: i32 n_q_heads, n_kv_heads, dim, prompt, steps; then f16 K, V [prompt + steps][n_kv_heads][dim]
and q [steps][n_q_heads][dim].
"""
import json
import pathlib
import struct
import sys

PROMPT, STEPS = 260, 40
ROOT = pathlib.Path(__file__).resolve().parents[2]


def main():
    data = (ROOT / "examples/data/traces.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    layer = next(name[:-2] for name in sorted(header) if name.endswith(".k"))
    parts = []
    for name, rows in (("k", PROMPT + STEPS), ("v", PROMPT + STEPS), ("q", STEPS)):
        t = header[f"{layer}.{name}"]
        assert t["dtype"] == "F16" and t["shape"][0] >= rows, t
        begin = start + t["data_offsets"][0]
        parts.append(data[begin:begin + 2 * rows * t["shape"][1] * t["shape"][2]])
    n_q_heads, dim = header[f"{layer}.q"]["shape"][1:]
    sizes = struct.pack("<5i", n_q_heads, header[f"{layer}.k"]["shape"][1], dim, PROMPT, STEPS)
    pathlib.Path(sys.argv[1]).write_bytes(sizes + b"".join(parts))


if __name__ == "__main__":
    main()
