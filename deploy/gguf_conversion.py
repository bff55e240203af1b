"""Turns a GGUF file of the llama architecture into a Hugging Face model directory.

Tensors are dequantized and stored as bfloat16. llama.cpp keeps the rows of q and k in the order of its own rotary
embedding (pairs side by side); Hugging Face rotates halves, so the rows are put back.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTROL_TOKEN: Final = 3
"""GGUF token type of a special token."""

Array = npt.NDArray[Any]

_LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_NAMES: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def convert_gguf(source: Path, target: Path, say: Callable[[str], None]) -> None:
    """Write config, weights, tokenizer and generation config of `source` into the existing directory `target`.

    Raises ValueError if the file is not of the llama architecture with a byte-level BPE tokenizer.
    """
    reader = gguf.GGUFReader(str(source))
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    if fields.get("general.architecture") != "llama" or fields.get("tokenizer.ggml.model") != "gpt2":
        raise ValueError(f"{source.name} is not a llama-architecture GGUF with a byte-level BPE tokenizer")
    tensor_names = {tensor.name for tensor in reader.tensors}
    config = model_config(fields, tied="output.weight" not in tensor_names)
    _write_json(target / "config.json", config)
    _write_json(target / "generation_config.json", generation_config(fields))
    _write_json(target / "tokenizer_config.json", tokenizer_config(fields))
    build_tokenizer(fields).save(str(target / "tokenizer.json"))
    say(f"converting {len(reader.tensors)} tensors to bfloat16")
    write_weights(reader.tensors, config, target / "model.safetensors")


def model_config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM."""
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields.get("llama.rope.dimension_count", hidden // heads),
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rope_scaling": None,
        # GGUF keeps it as float32: 1e-5 comes back as 9.99999975e-06.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def generation_config(fields: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json: where an answer ends."""
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with the chat template and the names of the special tokens."""
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "additional_special_tokens": _special_tokens(fields),
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
    }


def build_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE with each digit on its own, as SmolLM pre-tokenizes."""
    vocabulary = {token: number for number, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in _special_tokens(fields)])
    return tokenizer


def _special_tokens(fields: dict[str, Any]) -> list[str]:
    types = fields["tokenizer.ggml.token_type"]
    return [token for token, kind in zip(fields["tokenizer.ggml.tokens"], types, strict=True) if kind == CONTROL_TOKEN]


def write_weights(tensors: Any, config: dict[str, Any], path: Path) -> None:
    """Dequantize GGUF tensors into one safetensors file of bfloat16 under the Hugging Face names.

    The file is written here, a tensor at a time: numpy has no bfloat16, and the whole model need not be in memory.
    """
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        shape = [int(size) for size in reversed(tensor.shape)]  # GGUF counts from the fastest dimension
        end = offset + 2 * math.prod(shape)
        header[hugging_face_name(tensor.name)] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors:
            weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            part = tensor.name.split(".")[-2]
            if part in heads:
                weight = rows_in_rotated_halves(weight, heads[part])
            file.write(bfloat16_bits(weight).tobytes())


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; raises ValueError for an unknown tensor."""
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"
    raise ValueError(f"unknown tensor {name!r} in the GGUF file")


def rows_in_rotated_halves(weight: Array, num_heads: int) -> Array:
    """[num_heads * head_dim, columns]: each head's rows from (pair, side) order to (side, pair) order."""
    num_rows, num_columns = weight.shape
    pairs = weight.reshape(num_heads, num_rows // num_heads // 2, 2, num_columns)
    return pairs.swapaxes(1, 2).reshape(num_rows, num_columns)


def bfloat16_bits(values: Array) -> npt.NDArray[np.uint16]:
    """Finite float32 values to the bits of bfloat16, rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounding = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + rounding) >> np.uint32(16)).astype(np.uint16)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
