"""Our logits processor: a sequence that is resumed meets the same rules as one that never stopped."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.backends.tensorrt_llm.logits import RequestLogits, Vocabulary
from engine.protocol import SamplingParams
from tests.tiny_model import make_tiny_model

EOS, PROMPT = 2, [40, 41, 42]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    model: Path = make_tiny_model(tmp_path_factory.mktemp("tiny"))
    return Vocabulary(str(model / "tokenizer.json"), 259, (EOS,))


def scores(tokens: list[int]) -> Tensor:
    """Logits [1, 1, vocabulary] that depend on all tokens."""
    generator = torch.Generator().manual_seed(sum((i + 1) * token for i, token in enumerate(tokens)))
    return torch.randn((1, 1, 259), generator=generator)


def decode(
    sampling: SamplingParams, vocabulary: Vocabulary, resume_at: int | None = None, choice: int = 0
) -> list[int]:
    """As an engine would: the processor, then the best token. Resumed with a new processor at `resume_at`."""
    tokens = list(PROMPT)
    processor = RequestLogits(1, sampling, len(PROMPT), choice, vocabulary)
    while len(tokens) - len(PROMPT) < sampling.max_tokens and tokens[-1] != EOS:
        if len(tokens) - len(PROMPT) == resume_at:
            processor = pickle.loads(pickle.dumps(RequestLogits(2, sampling, len(PROMPT), choice, vocabulary)))
        logits = scores(tokens)
        processor(9, logits, [list(tokens)], None, None)
        tokens.append(int(logits[0, 0].argmax()))
    return tokens[len(PROMPT) :]


RULES: list[dict[str, Any]] = [
    {"temperature": 0.0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"temperature": 0.0, "repetition_penalty": 1.7},
    {"temperature": 0.0, "min_tokens": 9, "logit_bias": {EOS: 8.0}},
    {"temperature": 0.9, "seeded": True, "seed": 11, "top_p": 0.9, "top_k": 50},
    {"temperature": 0.9, "min_p": 0.02, "seed": 12},
    {"temperature": 0.0, "grammar": 'start: "ab" /[a-z]+/ "!"'},
]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("resume_at", [1, 5])
def test_a_resumed_sequence_goes_on_as_if_it_had_never_stopped(
    rules: dict[str, Any], resume_at: int, vocabulary: Vocabulary
) -> None:
    sampling = SamplingParams(max_tokens=12, eos_token_ids=[EOS], **rules)
    assert decode(sampling, vocabulary, resume_at) == decode(sampling, vocabulary)


def test_min_tokens_holds_off_the_end(vocabulary: Vocabulary) -> None:
    sampling = SamplingParams(max_tokens=12, temperature=0.0, eos_token_ids=[EOS], min_tokens=5, logit_bias={EOS: 50.0})
    assert len(decode(sampling, vocabulary)) == 6


def test_the_output_matches_its_grammar_after_a_resume(vocabulary: Vocabulary) -> None:
    sampling = SamplingParams(max_tokens=12, temperature=0.0, eos_token_ids=[EOS], grammar='start: "xyz" "!"')
    tokens = decode(sampling, vocabulary, resume_at=2)
    assert tokens[-1] == EOS
    assert len(tokens) == 5


def test_choices_of_one_seed_differ(vocabulary: Vocabulary) -> None:
    sampling = SamplingParams(max_tokens=12, temperature=1.0, seeded=True, seed=5)
    assert decode(sampling, vocabulary, choice=0) != decode(sampling, vocabulary, choice=1)


def test_a_grammar_that_cannot_be_followed_ends_the_request_and_raises_nothing(vocabulary: Vocabulary) -> None:
    sampling = SamplingParams(max_tokens=4, temperature=0.0, eos_token_ids=[EOS], grammar='start: "a"')
    logits = scores(PROMPT)
    RequestLogits(1, sampling, len(PROMPT), 0, vocabulary)(9, logits, [[*PROMPT, 200, 201]], None, None)
    assert int(logits[0, 0].argmax()) == EOS


def test_rows_wider_than_the_vocabulary_never_yield_padding_under_a_grammar(vocabulary: Vocabulary) -> None:
    sampling = SamplingParams(max_tokens=4, temperature=0.0, eos_token_ids=[EOS], grammar='start: "a"')
    logits = torch.zeros((1, 1, 320), dtype=torch.bfloat16)
    logits[0, 0, 300] = 9.0
    RequestLogits(1, sampling, len(PROMPT), 0, vocabulary)(9, logits, [list(PROMPT)], None, None)
    assert int(logits[0, 0].argmax()) < 259
