#!/usr/bin/env python3
"""Writes the demo model (examples/data/tinylm.safetensors) as a GGUF file of architecture `llama`.

usage: tinylm_gguf.py OUT.gguf        needs numpy and gguf (PyPI, or gguf-py of llama.cpp's sources)

Matrices are written in f32: llama.cpp rounds activations to f16 where weights are f16, and that noise would hide the
differences between KV caches.
"""
import json
import pathlib
import struct
import sys

import gguf
import numpy as np

DATA = pathlib.Path(__file__).resolve().parents[3] / "examples/data"


def add_byte_vocabulary(writer):
    """GPT-2's tokenizer without merges: a token is a byte, its id the byte's value."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)])
    writer.add_token_types([gguf.TokenType.NORMAL] * 256)
    writer.add_token_merges(["none none"])  # the list must not be empty; this one never applies
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def read_safetensors(path):
    data = path.read_bytes()
    (n,) = struct.unpack_from("<Q", data)
    for name, entry in json.loads(data[8 : 8 + n]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            dtype = {"F16": np.float16, "F32": np.float32}[entry["dtype"]]
            yield name, np.frombuffer(data[8 + n + begin : 8 + n + end], dtype).reshape(entry["shape"])


def interleave(weight, heads):
    """From RoPE on halves (channels i and i + d/2 turn together) to architecture llama's (2i and 2i + 1)."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def main():
    config = json.loads((DATA / "tinylm.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(sys.argv[1], "llama")
    writer.add_name("alignedkv tinylm")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    add_byte_vocabulary(writer)

    # The output matrix is the embedding's: llama.cpp takes that one if output.weight is missing.
    names = {"embed": "token_embd", "norm": "output_norm", "attn_norm": "attn_norm", "ffn_norm": "ffn_norm",
             "wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output",
             "w_gate": "ffn_gate", "w_up": "ffn_up", "w_down": "ffn_down"}
    for name, weight in read_safetensors(DATA / "tinylm.safetensors"):
        *layer, kind, _ = name.split(".")
        weight = weight.astype(np.float32)
        if kind in ("wq", "wk"):
            weight = interleave(weight, heads if kind == "wq" else kv_heads)
        writer.add_tensor(("blk." + layer[1] + "." if layer else "") + names[kind] + ".weight", weight)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
