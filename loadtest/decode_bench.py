"""Decode speed of the torch model beside `transformers` generate: same weights, dtype and threads, in one run.

Both decode greedily after the same random prompts. They take turns, and the best round of each counts: what else runs
on the machine only adds time. Where the model is not there, random weights of SmolLM2-135M's shape are used.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from engine.backends.torch.kv_pool import KvPool
from engine.backends.torch.sampler import sample
from engine.backends.torch.stage_model import SequenceSlice, SoloGroup, StageBatch, StageModel
from engine.backends.torch.weights import Checkpoint, WeightStore
from engine.protocol import SamplingParams
from loadtest.report import Check, Report, Table
from planner.protocol import EMBEDDING_LAYER

DEFAULT_MODEL: Final = Path("~/.cache/spotserve/models/SmolLM2-135M-Instruct")
RATIO_TARGET: Final = 1.3
BLOCK_TOKENS: Final = 16
CPU: Final = torch.device("cpu")


class DecodeOptions(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    """A Hugging Face directory; None: the default model."""
    dtype: str = "bfloat16"
    num_threads: int = 1
    streams: tuple[int, ...] = (1, 8)
    num_prompt_tokens: int = 32
    num_tokens: int = 64
    num_rounds: int = 3


class Comparison(msgspec.Struct):
    """Tokens per second of all streams together, best round, first token included."""

    streams: int
    spotserve_tokens_per_s: float
    transformers_tokens_per_s: float
    ratio: float
    equal_tokens: bool
    """Both chose the same ids; reduced precision may part them at a near tie."""


class Decoder:
    """One rank that holds the whole model."""

    def __init__(self, directory: Path, dtype: torch.dtype, max_tokens: int) -> None:
        checkpoint = Checkpoint(directory)
        self._config = checkpoint.config
        self._dtype = dtype
        store = WeightStore(self._config, dtype, CPU)
        groups = self._config.num_kv_heads
        for layer in range(EMBEDDING_LAYER, self._config.num_layers + 1):
            for group in range(groups):
                store.put(layer, group, checkpoint.load_unit(layer, group, dtype))
        last = self._config.num_layers - 1
        self._model = StageModel(self._config, 0, last, 0, groups - 1, store, SoloGroup(), "fast", max_tokens)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        each = -(-(len(prompts[0]) + new_tokens) // BLOCK_TOKENS)
        last_layer, last_group = self._config.num_layers - 1, self._config.num_kv_heads - 1
        num_blocks = each * len(prompts)
        pool = KvPool(self._config, 0, last_layer, 0, last_group, num_blocks, BLOCK_TOKENS, self._dtype, CPU)
        tables = [list(range(i * each, (i + 1) * each)) for i in range(len(prompts))]
        greedy = [SamplingParams(max_tokens=new_tokens, temperature=0.0)] * len(prompts)
        generated: list[list[int]] = [[] for _ in prompts]
        pieces, context = prompts, 0
        for index in range(new_tokens):
            slices = [SequenceSlice(len(p), context, t, num_logits=1) for p, t in zip(pieces, tables, strict=True)]
            batch = StageBatch([token for piece in pieces for token in piece], slices)
            logits = self._model.forward(batch, None, pool)
            tokens = sample(logits, greedy, [0] * len(prompts), [index] * len(prompts))
            context += len(pieces[0])
            pieces = [[token] for token in tokens]
            for ids, token in zip(generated, tokens, strict=True):
                ids.append(token)
        return generated


def load_reference(directory: Path, dtype: torch.dtype) -> Callable[[list[list[int]], int], list[list[int]]]:
    """A function like `Decoder.generate` over transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
        rows: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return rows

    return generate


def compare(options: DecodeOptions, directory: Path) -> list[Comparison]:
    """Run both in turns at every number of streams."""
    dtype: torch.dtype = getattr(torch, options.dtype)
    decoder = Decoder(directory, dtype, options.num_prompt_tokens + options.num_tokens)
    vocab_size = Checkpoint(directory).config.vocab_size
    runs = {"spotserve": decoder.generate, "transformers": load_reference(directory, dtype)}
    generator = torch.Generator().manual_seed(0)
    comparisons = []
    for streams in options.streams:
        shape = (streams, options.num_prompt_tokens)
        prompts: list[list[int]] = torch.randint(0, vocab_size, shape, generator=generator).tolist()
        best_s = dict.fromkeys(runs, float("inf"))
        tokens: dict[str, list[list[int]]] = {}
        for number in range(options.num_rounds):
            for name, generate in runs.items():
                start_s = time.perf_counter()
                tokens[name] = generate(prompts, options.num_tokens)
                elapsed_s = time.perf_counter() - start_s
                best_s[name] = min(best_s[name], elapsed_s)
                print(f"{streams} streams, round {number + 1}: {name} {elapsed_s:.2f} s", file=sys.stderr)
        rates = {name: streams * options.num_tokens / seconds for name, seconds in best_s.items()}
        comparisons.append(
            Comparison(
                streams=streams,
                spotserve_tokens_per_s=round(rates["spotserve"], 1),
                transformers_tokens_per_s=round(rates["transformers"], 1),
                ratio=round(rates["spotserve"] / rates["transformers"], 2),
                equal_tokens=tokens["spotserve"] == tokens["transformers"],
            )
        )
    return comparisons


def save_random_model(directory: Path) -> None:
    """Random weights of SmolLM2-135M's shape."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope_theta=100000.0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)


def run(options: DecodeOptions) -> Report:
    """Compare on this machine; torch keeps the number of threads afterwards."""
    torch.set_num_threads(options.num_threads)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(options.model).expanduser() if options.model else DEFAULT_MODEL.expanduser()
        if options.model is None and not directory.exists():
            directory = Path(scratch)
            save_random_model(directory)
        comparisons = compare(options, directory)
    checks = [
        Check(
            name=f"decode of {c.streams} stream(s) beside `generate`",
            value=c.ratio,
            unit="times",
            target=RATIO_TARGET,
            higher_is_better=True,
        )
        for c in comparisons
    ]
    figures = {"options": options, "comparisons": comparisons}
    return Report(name="decode", tables=[_table(options, comparisons)], checks=checks, figures=figures)


def _table(options: DecodeOptions, comparisons: list[Comparison]) -> Table:
    rows = [
        [
            str(c.streams),
            f"{c.spotserve_tokens_per_s:.1f}",
            f"{c.transformers_tokens_per_s:.1f}",
            f"{c.ratio:.2f}",
            "equal" if c.equal_tokens else "different",
        ]
        for c in comparisons
    ]
    title = (
        f"decode: tokens/s, {options.dtype}, {options.num_threads} thread(s), "
        f"{options.num_prompt_tokens} + {options.num_tokens} tokens, best of {options.num_rounds}"
    )
    return Table(title, ["streams", "spotserve", "transformers", "ratio", "tokens"], rows)
