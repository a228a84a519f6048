"""Small valid GGUF models with random weights: `python tiny_model.py KIND FILE`.

KIND is llama, mamba or cohere2 (F32, some hundred kilobytes; the last has a window of 16 tokens in its layers), llama-q2_0 (one
kind of tensor in that type), or llama-q4_0 (33 MB).
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import gguf
import numpy as np

N_LAYER, N_HEAD, N_VOCAB = 2, 4, 96
N_INNER, N_STATE, N_CONV, N_DT = 128, 16, 4, 8


def write(kind: str, path: str) -> None:
    """Write a model, the same bytes every time."""
    architecture, is_large = kind.partition("-")[0], kind.endswith("q4_0")
    n_embd, n_ff = (1024, 8192) if is_large else (64, 128)
    random = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(N_LAYER)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("no_vocab")
    writer.add_head_count(0 if architecture == "mamba" else N_HEAD)
    writer.add_feed_forward_length(0 if architecture == "mamba" else n_ff)

    records: list[tuple[bytes, bytes]] = []

    def add_q2_0(name: str, n_rows: int, n_columns: int) -> None:
        """Q2_0 packs 64 weights into the 18 bytes that Q4_0 takes for 32: written as that, with the record put right below."""
        blocks = random.integers(0, 256, (n_rows, n_columns // 64, 18), dtype=np.uint8)
        blocks[..., :2] = np.frombuffer(np.float16(0.1).tobytes(), np.uint8)  # the scale
        writer.add_tensor(name, blocks.reshape(n_rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        record = name.encode() + struct.pack("<I", 2)
        records.append((record + struct.pack("<QQI", n_columns // 2, n_rows, 2), record + struct.pack("<QQI", n_columns, n_rows, 42)))

    def add(name: str, *shape: int, scale: float = 0.2, centre: float = 0.0) -> None:
        if kind.endswith("q2_0") and "ffn_gate" in name:
            add_q2_0(name, *shape)
            return
        values = (centre + scale * random.standard_normal(shape)).astype(np.float32)
        if is_large and name.startswith("blk.") and len(shape) == 2:
            quantised = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_0)
            writer.add_tensor(name, quantised, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        else:
            writer.add_tensor(name, values)

    add("token_embd.weight", N_VOCAB, n_embd, scale=1.0)
    add("output_norm.weight", n_embd, scale=0.0, centre=1.0)
    if architecture != "cohere2":
        add("output.weight", N_VOCAB, n_embd)
    for i in range(N_LAYER):
        add(f"blk.{i}.attn_norm.weight", n_embd, scale=0.0, centre=1.0)
        if architecture != "mamba":
            for name in ("q", "k", "v", "output"):
                add(f"blk.{i}.attn_{name}.weight", n_embd, n_embd)
            if architecture == "llama":
                add(f"blk.{i}.ffn_norm.weight", n_embd, scale=0.0, centre=1.0)
            add(f"blk.{i}.ffn_gate.weight", n_ff, n_embd)
            add(f"blk.{i}.ffn_up.weight", n_ff, n_embd)
            add(f"blk.{i}.ffn_down.weight", n_embd, n_ff)
        else:
            add(f"blk.{i}.ssm_in.weight", 2 * N_INNER, n_embd)
            add(f"blk.{i}.ssm_conv1d.weight", N_INNER, N_CONV)
            add(f"blk.{i}.ssm_conv1d.bias", N_INNER)
            add(f"blk.{i}.ssm_x.weight", N_DT + 2 * N_STATE, N_INNER)
            add(f"blk.{i}.ssm_dt.weight", N_INNER, N_DT)
            add(f"blk.{i}.ssm_dt.bias", N_INNER)
            add(f"blk.{i}.ssm_a", N_INNER, N_STATE, scale=0.1, centre=-1.0)
            add(f"blk.{i}.ssm_d", N_INNER)
            add(f"blk.{i}.ssm_out.weight", n_embd, N_INNER)
    if architecture == "mamba":
        writer.add_ssm_conv_kernel(N_CONV)
        writer.add_ssm_inner_size(N_INNER)
        writer.add_ssm_state_size(N_STATE)
        writer.add_ssm_time_step_rank(N_DT)
    else:
        writer.add_rope_dimension_count(n_embd // N_HEAD)
    if architecture == "cohere2":
        writer.add_layer_norm_eps(1e-5)
        writer.add_sliding_window(16)
        writer.add_logit_scale(0.25)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if records:
        data = Path(path).read_bytes()
        for written, meant in records:
            assert data.count(written) == 1
            data = data.replace(written, meant)
        Path(path).write_bytes(data)


if __name__ == "__main__":
    write(sys.argv[1], sys.argv[2])
