"""What llama.cpp must be told to build a tiny mixture-of-experts model of each architecture.

Each row of `ARCHITECTURES` holds only what differs from `common()`. Keys are written without the leading
"<arch>." of the GGUF file. Which keys an architecture reads was taken from llama.cpp's `src/models/`,
as of llama-cpp-python 0.3.36; a key that an architecture does not know is ignored by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

Value: TypeAlias = bool | int | float | str | list[int] | list[float] | list[str]
Keys: TypeAlias = dict[str, Value]

N_VOCAB = 384
N_LAYER = 3  # one leading dense layer (where the architecture has it) leaves two with experts
N_HEAD = 4


@dataclass(frozen=True, slots=True)
class Arch:
    """One row: the geometry, the type its experts get by default, and the keys that differ."""

    keys: Keys = field(default_factory=dict)
    n_embd: int = 128
    n_ff: int = 96
    n_expert: int = 10
    file_type: str = "q8_0"
    # llama.cpp, asked for every tensor it knows, would make gate and up one fused tensor wherever it
    # can; files in the wild have them apart nearly always, so fusing is the exception here too.
    is_fused: bool = False
    has_expert_scales: bool = False


def common(n_embd: int, n_ff: int, n_expert: int, n_layer: int) -> Keys:
    """Return the keys most architectures share, for the given sizes (n_ff is that of one expert)."""
    head = n_embd // N_HEAD
    return {
        "vocab_size": N_VOCAB,
        "context_length": 512,
        "block_count": n_layer,
        "leading_dense_block_count": 1,
        "embedding_length": n_embd,
        "feed_forward_length": n_ff,
        "expert_feed_forward_length": n_ff,
        "expert_shared_feed_forward_length": 64,
        "expert_count": n_expert,
        "expert_used_count": 3,
        "expert_shared_count": 1,
        "expert_gating_func": SIGMOID,
        "expert_weights_norm": True,
        "expert_weights_scale": 1.0,
        "attention.head_count": N_HEAD,
        "attention.head_count_kv": 2,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": 1e-5,
        # Shorter than the prompts of the tests, so that the window takes part in the result.
        "attention.sliding_window": 16,
        "attention.sliding_window_pattern": alternate(1, 0, n_layer),
        "ssm.inner_size": 2 * n_embd,
        "rope.dimension_count": head,
        "rope.freq_base": 10000.0,
        "rope.freq_base_swa": 10000.0,
    }


def alternate(first: int, second: int, n_layer: int) -> list[int]:
    """Return one number per layer, the two taking turns."""
    return [second if layer % 2 else first for layer in range(n_layer)]


# Values of llama.cpp's gating enumeration.
SOFTMAX, SIGMOID, SOFTMAX_AFTER_TOP_K, SQRT_SOFTPLUS = 1, 2, 3, 4

# DeepSeek's routing in groups: 2 of 4 groups, then the top 3 of the 4 experts in them.
GROUPS: Keys = {"expert_group_count": 4, "expert_group_used_count": 2}

# Multi-head latent attention: the cache row is the latent (64) and the rotary part (32).
MLA: Keys = {
    "attention.head_count_kv": 1,
    "attention.q_lora_rank": 64,
    "attention.kv_lora_rank": 64,
    "attention.key_length": 96,
    "attention.value_length": 64,
    "attention.key_length_mla": 64,
    "attention.value_length_mla": 32,
    "rope.dimension_count": 32,
}

# Sparse attention: the indexer picks 16 of the earlier tokens.
INDEXER: Keys = {
    "attention.indexer.head_count": 4,
    "attention.indexer.key_length": 64,
    "attention.indexer.top_k": 16,
}

MAMBA2: Keys = {
    "ssm.conv_kernel": 4,
    "ssm.state_size": 32,
    "ssm.time_step_rank": 8,
    "ssm.group_count": 2,
}

# Qwen's gated delta net: inner_size = time_step_rank * state_size; every second layer attends.
DELTA_NET: Keys = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 128,
    "ssm.state_size": 32,
    "ssm.time_step_rank": 4,
    "ssm.group_count": 2,
    "full_attention_interval": 2,
    "rope.dimension_sections": [4, 4, 4, 4],
}

# Kimi's delta attention on layers without KV heads.
KDA: Keys = {
    **MLA,
    "attention.head_count": [4, 4, 4],
    "attention.head_count_kv": [0, 1, 0],
    "ssm.conv_kernel": 4,
    "kda.head_dim": 32,
    "kda.gate_lower_bound": -5.0,
}

HYPER_CONNECTIONS: Keys = {
    "hyper_connection.count": 4,
    "hyper_connection.sinkhorn_iterations": 2,
    "hyper_connection.epsilon": 1e-6,
}

GRANITE: Keys = {"logit_scale": 1.0, "residual_scale": 1.0, "embedding_scale": 4.0, "attention.scale": 0.2}

ARCHITECTURES: dict[str, Arch] = {
    "afmoe": Arch(),
    "arctic": Arch(),
    "bailingmoe": Arch(),
    "bailingmoe2": Arch(GROUPS, n_expert=8),
    "bailingmoe3": Arch({**KDA, "rope.dimension_sections": [8, 8, 0, 0]}),
    "cohere2moe": Arch({"logit_scale": 0.25}),
    "dbrx": Arch({"attention.clamp_kqv": 8.0}, n_embd=120, n_ff=84, file_type="f16"),
    "deepseek": Arch(),
    "deepseek2": Arch({**MLA, **GROUPS}, n_expert=8, file_type="q4_k_m"),
    "deepseek2-ocr": Arch({"attention.head_count_kv": N_HEAD}),
    "deepseek32": Arch({**MLA, **INDEXER, **GROUPS}, n_expert=8),
    "deepseek4": Arch(
        {
            **INDEXER,
            **HYPER_CONNECTIONS,
            "block_count": 4,
            "attention.head_count_kv": 1,
            "attention.q_lora_rank": 64,
            "attention.key_length": 64,
            "attention.value_length": 64,
            "rope.dimension_count": 32,
            "attention.output_group_count": 4,
            "attention.output_lora_rank": 32,
            "attention.compress_ratios": [0, 0, 4, 128],
            "attention.compress_rope_freq_base": 160000.0,
            "hash_layer_count": 2,
            "swiglu_clamp_exp": 10.0,
            "expert_gating_func": SQRT_SOFTPLUS,
        }
    ),
    "dots1": Arch({"attention.head_count_kv": N_HEAD}, file_type="iq4_nl"),
    "dots3note": Arch(
        {
            **MLA,
            **INDEXER,
            "attention.kv_lora_rank_swa": 64,
            "attention.key_length_swa": 96,
            "attention.value_length_swa": 64,
            "attention.key_length_mla_swa": 64,
            "attention.value_length_mla_swa": 32,
            "attention.indexer.types": alternate(0, 1, N_LAYER),
        }
    ),
    "ernie4_5-moe": Arch({"interleave_moe_layer_step": 1}, file_type="q4_1"),
    "exaone-moe": Arch(),
    "gemma4": Arch(
        {
            "block_count": 5,
            "leading_dense_block_count": 0,
            "attention.sliding_window_pattern": [1, 1, 1, 1, 0],
            "attention.shared_kv_layers": 0,
            "attention.key_length_swa": 32,
            "attention.value_length_swa": 32,
            "rope.dimension_count_swa": 32,
            # Each layer adds what it looks up in a table of its own.
            "embedding_length_per_layer_input": 32,
        },
        is_fused=True,
        has_expert_scales=True,
    ),
    "glm-dsa": Arch({**MLA, **INDEXER}),
    # The fourth layer is for multi-token prediction: its experts are in the file but never loaded.
    "glm4moe": Arch({"block_count": 4, "nextn_predict_layers": 1}),
    "glm5-next": Arch(
        {
            **KDA,
            **INDEXER,
            **HYPER_CONNECTIONS,
            "attention.head_count": N_HEAD,
            "attention.key_length": 64,
            "rope.dimension_count": 0,
            "attention.indexer.kpool": 4,
            "attention.indexer.kpool_select_tail": True,
        }
    ),
    "gpt-oss": Arch({"expert_gating_func": SOFTMAX_AFTER_TOP_K}, file_type="mxfp4"),
    "granite": Arch(GRANITE),
    "granite_swa": Arch(GRANITE),
    "granitehybrid": Arch({**MAMBA2, **GRANITE, "attention.head_count_kv": [0, 2, 0]}),
    "granitemoe": Arch(GRANITE, file_type="q5_1"),
    "grok": Arch(),
    "grovemoe": Arch({"expert_chunk_feed_forward_length": 64, "experts_per_group": 2, "expert_group_scale": 0.05}),
    "hunyuan-moe": Arch(file_type="q3_k_m"),
    "hy_v3": Arch(),
    "hy_v4": Arch(
        {
            **MLA,
            **INDEXER,
            **HYPER_CONNECTIONS,
            "hyper_connection.magnitude": 2.0,
            "swiglu_clamp_exp": 10.0,
            "attention.indexer.types": alternate(1, 0, N_LAYER),
        }
    ),
    "jamba": Arch(
        {
            "ssm.conv_kernel": 4,
            "ssm.state_size": 16,
            "ssm.time_step_rank": 16,
            "attention.head_count_kv": [0, 2, 0],
        }
    ),
    "kimi-k3": Arch(
        {
            **KDA,
            "attn_res.block_size": 2,
            "activation.situ_beta": 4.0,
            "activation.situ_linear_beta": 25.0,
            "expert_latent_length": 64,
        }
    ),
    "kimi-linear": Arch(KDA),
    "laguna": Arch(),
    "lfm2moe": Arch({"shortconv.l_cache": 3, "attention.head_count_kv": [0, 2, 0]}),
    "llada-moe": Arch(),
    "llama": Arch(n_embd=256, n_ff=256, file_type="q4_k_m"),
    "llama-embed": Arch(),
    "llama4": Arch({"block_count": 4, "interleave_moe_layer_step": 2, "expert_used_count": 1}),
    "maple": Arch({"swiglu_clamp_exp": 7.0}),
    "mellum": Arch(),
    "mimo2": Arch(file_type="mxfp4"),
    "minicpm": Arch(),
    "minimax-01": Arch({"residual_scale": 1.0, "full_attention_interval": 2}),
    "minimax-m2": Arch(file_type="bf16"),
    "minimax-m3": Arch(
        {
            **INDEXER,
            "attention.indexer.head_count": 2,
            "attention.indexer.block_size": 4,
            "attention.indexer.local_blocks": 1,
        }
    ),
    "mistral3": Arch(),
    "mistral4": Arch(MLA),
    # Layers: Mamba, attention, experts, experts; the two expert layers differ in size and in top-k.
    "nemotron_h_moe": Arch(
        {
            **MAMBA2,
            "block_count": 4,
            "feed_forward_length": [0, 0, 96, 96],
            "expert_feed_forward_length": [0, 0, 96, 160],
            "expert_used_count": [0, 0, 3, 2],
            "attention.head_count_kv": [0, 2, 0, 0],
            "moe_latent_size": 64,
        }
    ),
    "nomic-bert-moe": Arch({"block_count": 4, "moe_every_n_layers": 2, "attention.causal": False}),
    "olmoe": Arch({"attention.head_count_kv": N_HEAD}, n_embd=120, n_ff=84, file_type="f32"),
    "phimoe": Arch(file_type="q4_0"),
    "qwen2moe": Arch(file_type="q5_0"),
    "qwen35moe": Arch(DELTA_NET, is_fused=True, file_type="q6_k"),
    "qwen3moe": Arch(n_embd=256, n_ff=256, file_type="q4_k_m"),
    "qwen3next": Arch(DELTA_NET, file_type="mxfp4"),
    "qwen3vlmoe": Arch({"rope.dimension_sections": [4, 4, 4, 4]}),
    "qwen4exp": Arch(
        {
            **DELTA_NET,
            **INDEXER,
            "attention.indexer.key_length": 32,
            "rope.dimension_count": 32,
            "attention.compress_ratios": [4, 4, 4],
            "hyper_connection.count": 4,
            "hyper_connection.low_rank": 8,
            # The first layer adds what it looks up by hashes of the last two and three tokens, two rows by each.
            "ple.layers": [0],
            "ple.ngram_size": 3,
            "ple.heads_per_ngram": 2,
            "ple.conv_kernel": 4,
            "ple.eos_token_id": 2,
            "ple.layer_multipliers": [1, 1009, 2003],
            "ple.head_offsets": [0, 97, 198, 301],
            "ple.head_vocab_sizes": [97, 101, 103, 107],
            "embedding_length_per_layer_input": 32,
        }
    ),
    "rnd1": Arch(),
    "smallthinker": Arch(),
    "step35": Arch(),
}

# Arrays that llama.cpp reads as 64-bit numbers; it takes no others for them.
WIDE_ARRAYS: tuple[str, ...] = ("ple.layer_multipliers", "ple.head_offsets", "ple.head_vocab_sizes")

# Models `llama_cpp.Llama.eval` gets no logits from; they are made and loaded like the others.
WITHOUT_DECODE: dict[str, str] = {
    "llada-moe": "a diffusion model without KV cache, which Llama.eval refuses; llama_decode works",
    "llama-embed": "an embedding model: Llama(embedding=True).embed, not eval",
    "nomic-bert-moe": "an embedding model: Llama(embedding=True).embed, not eval",
    "rnd1": "a diffusion model without KV cache, which Llama.eval refuses; llama_decode works",
}

UNBUILDABLE: dict[str, str] = {
    "dflash": "a draft model, which llama.cpp runs only beside the model it drafts for",
    "graniteswitch": "has no experts: its MUL_MAT_ID nodes choose among LoRA adapters",
    "lfm2": "the loader knows expert tensors, but counts every layer as dense; lfm2moe is the one with experts",
    "paddleocr": "the loader takes expert tensors, but the graph is dense",
    "refact": "the loader takes expert tensors, but the graph is dense",
}


def tokenizer() -> Keys:
    """Return a SentencePiece-style vocabulary of `N_VOCAB` entries, good enough to read and write any text.

    Order: unknown, begin, end, the 256 bytes, a space and the printable ASCII characters, some pairs.
    """
    space = "\u2581"
    special = ["<unk>", "<s>", "</s>", "<mask>"]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    characters = [space] + [chr(code) for code in range(ord("!"), ord("~") + 1)]
    pairs = [f"{space}{letter}" for letter in "abcdefghilmnoprstuw"]
    pairs += ["th", "he", "in", "er", "an", "re", "on", "at", "en", "nd"]
    pieces = (special + byte_pieces + characters + pairs)[:N_VOCAB]
    assert len(pieces) == N_VOCAB
    normal, unknown, control, byte = 1, 2, 3, 6
    n_normal = N_VOCAB - len(special) - len(byte_pieces)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.token_type_count": 1,
        "tokenizer.ggml.tokens": pieces,
        # Pairs score above characters, so that they are merged.
        "tokenizer.ggml.scores": [0.0] * 260 + [-100.0] * len(characters) + [-1.0] * (n_normal - len(characters)),
        "tokenizer.ggml.token_type": [unknown, control, control, control] + [byte] * 256 + [normal] * n_normal,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.mask_token_id": 3,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
