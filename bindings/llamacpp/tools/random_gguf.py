#!/usr/bin/env python3
"""Writes a random model with the attention shape of Llama-3.1-8B (32 query and 8 KV heads of 128 channels) and little
else: small embeddings, a tiny FFN, a byte vocabulary. For timing attention.

usage: random_gguf.py OUT.gguf [--layers N] [--sharpness S]        needs numpy and gguf

K and V have entries of variance 1. Scores have a standard deviation of about S: with 1 attention is nearly flat, the
worst case of a cache that is read in part; the entropy over n tokens is about ln(n) - S^2 / 2.
"""
import argparse

import gguf
import numpy as np

from tinylm_gguf import add_byte_vocabulary

HEADS, KV_HEADS, DIM, EMBEDDING, FFN = 32, 8, 128, 512, 32


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sharpness", type=float, default=1.0)
    args = parser.parse_args()

    writer = gguf.GGUFWriter(args.out, "llama")
    writer.add_name(f"random, sharpness {args.sharpness:g}")
    writer.add_context_length(131072)
    writer.add_embedding_length(EMBEDDING)
    writer.add_block_count(args.layers)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(DIM)
    writer.add_value_length(DIM)
    writer.add_rope_dimension_count(DIM)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    add_byte_vocabulary(writer)

    rng = np.random.default_rng(1)

    def matrix(name, n_out, n_in, gain=1.0):
        weight = rng.standard_normal((n_out, n_in), dtype=np.float32) * np.float32(gain / np.sqrt(n_in))
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name + ".weight", gguf.quantize(weight, kind), raw_dtype=kind)

    def norm(name):
        writer.add_tensor(name + ".weight", np.ones(EMBEDDING, np.float32))

    matrix("token_embd", 256, EMBEDDING)
    norm("output_norm")
    for i in range(args.layers):
        block = f"blk.{i}."
        norm(block + "attn_norm")
        matrix(block + "attn_q", HEADS * DIM, EMBEDDING, args.sharpness)
        matrix(block + "attn_k", KV_HEADS * DIM, EMBEDDING)
        matrix(block + "attn_v", KV_HEADS * DIM, EMBEDDING)
        matrix(block + "attn_output", EMBEDDING, HEADS * DIM)
        norm(block + "ffn_norm")
        matrix(block + "ffn_gate", FFN, EMBEDDING)
        matrix(block + "ffn_up", FFN, EMBEDDING)
        matrix(block + "ffn_down", EMBEDDING, FFN)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
