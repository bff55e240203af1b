"""A tiny random model in Hugging Face form, made at test time: real files, real tokenizer, decodes in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 48, 6, 6, 3, 96
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_tiny_model(directory: Path, *, layers: int = LAYERS, max_len: int = 2048, seed: int = 0) -> Path:
    """Write a llama-family model with untied random weights; greedy text of it does not settle on one token."""
    directory.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(directory / "tokenizer.json"))
    _write(
        directory / "tokenizer_config.json",
        {"chat_template": TEMPLATE, "eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"},
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "vocab_size": len(vocab),
        "max_position_embeddings": max_len,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    _write(directory / "config.json", config)
    _write(directory / "generation_config.json", {"eos_token_id": 2, "bos_token_id": 0})
    save_file(_weights(layers, len(vocab), seed), str(directory / "model.safetensors"))
    return directory


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content))


def _weights(layers: int, vocab_size: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        values: torch.Tensor = torch.randn(*shape, generator=generator)
        return values.mul_(float(1.5 / shape[-1] ** 0.5))

    kv_dim = HIDDEN // HEADS * KV_HEADS
    weights = {
        "model.embed_tokens.weight": torch.randn(vocab_size, HIDDEN, generator=generator),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": random(vocab_size, HIDDEN) * 2,
    }
    for i in range(layers):
        prefix = f"model.layers.{i}."
        weights |= {
            prefix + "input_layernorm.weight": torch.ones(HIDDEN),
            prefix + "post_attention_layernorm.weight": torch.ones(HIDDEN),
            prefix + "self_attn.q_proj.weight": random(HIDDEN, HIDDEN),
            prefix + "self_attn.k_proj.weight": random(kv_dim, HIDDEN),
            prefix + "self_attn.v_proj.weight": random(kv_dim, HIDDEN),
            prefix + "self_attn.o_proj.weight": random(HIDDEN, HIDDEN),
            prefix + "mlp.gate_proj.weight": random(INTERMEDIATE, HIDDEN),
            prefix + "mlp.up_proj.weight": random(INTERMEDIATE, HIDDEN),
            prefix + "mlp.down_proj.weight": random(HIDDEN, INTERMEDIATE),
        }
    return weights
