"""The double's model: logits are a function of the weights and of all ids so far, whatever the shape of the engine."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping as Dict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tensorrt_llm.mapping import Mapping
from tensorrt_llm.sampling_params import SamplingParams

_SHARED = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
_LAYER = (
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_len: int
    kv_bytes_per_token: int
    tied: bool
    generation: dict[str, Any]

    @classmethod
    def load(cls, model_dir: Path) -> ModelConfig:
        config = json.loads((model_dir / "config.json").read_text())
        path = model_dir / "generation_config.json"
        generation = json.loads(path.read_text()) if path.exists() else {}
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_size = config.get("head_dim") or config["hidden_size"] // heads
        return cls(
            vocab_size=config["vocab_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            max_len=config["max_position_embeddings"],
            kv_bytes_per_token=2 * 2 * kv_heads * head_size * config["num_hidden_layers"],
            tied=bool(config.get("tie_word_embeddings")),
            generation={"eos_token_id": config.get("eos_token_id")} | generation,
        )


def digest_of_weights(config: ModelConfig, mapping: Mapping, weights: Dict[str, Any]) -> dict[str, bytes]:
    """A digest of each tensor that the rank needs.

    Raises:
        KeyError: a tensor is missing; as the real model's loading would.

    """
    wanted = [f"model.layers.{i}.{part}.weight" for i in mapping.pp_layers(config.num_layers) for part in _LAYER]
    if mapping.is_first_pp_rank():
        wanted.append(_SHARED[0])
    if mapping.is_last_pp_rank():
        wanted += [_SHARED[1], _SHARED[0] if config.tied else _SHARED[2]]
    missing = [name for name in wanted if name not in weights]
    if missing:
        raise KeyError(f"{missing[0]} (and {len(missing) - 1} more) not in the weights of rank {mapping.rank}")
    return {name: hashlib.blake2b(_bytes_of(weights[name]), digest_size=8).digest() for name in wanted}


def _bytes_of(tensor: Any) -> Any:
    if isinstance(tensor, np.ndarray):
        return tensor
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


class Context:
    """All ids of one sequence, hashed as they come."""

    def __init__(self, weights: bytes, ids: list[int]) -> None:
        self._hash = hashlib.blake2b(weights, digest_size=16)
        self.ids: list[int] = []
        self.extend(ids)

    def extend(self, ids: list[int]) -> None:
        self.ids += ids
        self._hash.update(np.asarray(ids, np.int32).tobytes())

    def taint(self, seen: bytes) -> None:
        """KV of something else was attended to."""
        self._hash.update(seen)

    def logits(self, vocab_size: int) -> np.ndarray:
        return _generator(self._hash.digest()).standard_normal(vocab_size, np.float32) * np.float32(3.0)


def _generator(key: bytes) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, np.uint64)))


def choose(params: SamplingParams, logits: np.ndarray, num_prompt: int, ids: list[int], draw_key: bytes) -> int:
    """The engine's own sampling, after logits processors. Penalties count the prompt's tokens too, as there."""
    scores = logits.astype(np.float64)
    _penalise(params, scores, num_prompt, ids)
    if params.embedding_bias is not None:
        scores += np.asarray(params.embedding_bias, np.float64)
    for token in params.bad_token_ids or []:
        scores[token] = -np.inf
    if params._greedy_decoding:
        return int(np.argmax(scores))
    scores /= params.temperature if params.temperature is not None else 1.0
    order = np.argsort(-scores, kind="stable")
    probabilities = np.exp(scores[order] - scores[order[0]])
    probabilities /= probabilities.sum()
    keep = np.ones(len(order), bool)
    if params.top_k:
        keep[params.top_k :] = False
    if params.top_p is not None:
        keep &= np.concatenate([[True], np.cumsum(probabilities)[:-1] < params.top_p])
    if params.min_p:
        keep &= probabilities >= params.min_p * probabilities[0]
    cumulated = np.cumsum(np.where(keep, probabilities, 0.0))
    drawn = _generator(draw_key).random() * cumulated[-1]
    return int(order[min(int(np.searchsorted(cumulated, drawn, "right")), len(order) - 1)])


def _penalise(params: SamplingParams, scores: np.ndarray, num_prompt: int, ids: list[int]) -> None:
    if params.repetition_penalty not in (None, 1.0):
        seen = np.unique(ids)
        scores[seen] = np.where(
            scores[seen] > 0, scores[seen] / params.repetition_penalty, scores[seen] * params.repetition_penalty
        )
    counted = ids[min(params.prompt_ignore_length or 0, num_prompt) :]
    if counted and (params.presence_penalty or params.frequency_penalty):
        tokens, counts = np.unique(counted, return_counts=True)
        scores[tokens] -= (params.presence_penalty or 0.0) + (params.frequency_penalty or 0.0) * counts


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - float(logits.max())
    return shifted - math.log(float(np.exp(shifted).sum()))


def draw_key(seed: int, choice: int, index: int) -> bytes:
    return hashlib.blake2b(f"{seed} {choice} {index}".encode(), digest_size=16).digest()
