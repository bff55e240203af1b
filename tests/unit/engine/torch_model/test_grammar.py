from __future__ import annotations

import pytest
import torch
from llguidance import LLMatcher
from tokenizers import Tokenizer

from engine.backends.torch.grammar import GrammarMasks, Grammars
from engine.core.scheduler import SequenceKey, StepSlice
from engine.errors import GrammarError
from engine.protocol import SamplingParams
from tests.tiny_model import make_tiny_model

VOCAB, EOS = 300, 2
"""Wider than the tokenizer, as padded output heads are."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return Tokenizer.from_file(str(model_dir / "tokenizer.json"))


@pytest.fixture
def masks(model_dir):
    return GrammarMasks(Grammars(model_dir / "tokenizer.json", VOCAB, [EOS]), 2, torch.device("cpu"))


def part(grammar: str, output: list[int], name: str = "r", eos: int = EOS) -> StepSlice:
    return StepSlice(
        key=SequenceKey(name, 0),
        token_ids=[5],
        context_tokens=0,
        blocks=[],
        samples=True,
        num_logits=1,
        sampling=SamplingParams(max_tokens=9, grammar=grammar, eos_token_ids=[eos]),
        tokens=[5, *output],
        num_prompt_tokens=1,
    )


def allowed(masks, *args, **kwargs) -> set[int]:
    mask = masks.mask(part(*args, **kwargs))
    assert mask.shape == (VOCAB,)
    return set(mask.nonzero()[:, 0].tolist())


def test_an_end_is_allowed_where_the_grammar_may_end_and_nothing_else_where_it_must(masks, tokenizer):
    grammar = LLMatcher.grammar_from_regex("a[bc]?")
    a, b, c = (tokenizer.token_to_id(letter) for letter in "abc")
    assert allowed(masks, grammar, []) == {a}
    assert allowed(masks, grammar, [a]) == {b, c, EOS}
    assert allowed(masks, grammar, [a, b]) == {EOS}
    assert allowed(masks, grammar, [a], eos=1) == {b, c, 1}, "the request's end tokens, not the tokenizer's"


def test_a_mask_is_a_function_of_the_output_whatever_was_asked_before(masks, tokenizer):
    grammar = LLMatcher.grammar_from_json_schema({"type": "array", "items": {"type": "integer"}})
    output = tokenizer.encode("[12,3]").ids
    straight = [allowed(masks, grammar, output[:n], name="fresh") for n in range(len(output) + 1)]
    growing = part(grammar, [])
    for n, token in enumerate([*output, None]):
        assert set(masks.mask(growing).nonzero()[:, 0].tolist()) == straight[n]
        allowed(masks, grammar, [], name="other")  # More sequences than matchers are kept.
        allowed(masks, grammar, output[:1], name="another")
        if token is not None:
            growing.tokens.append(token)
    assert straight[-1] >= {EOS}


def test_what_is_wrong_with_a_grammar_is_said_in_one_line(masks, model_dir, tokenizer):
    with pytest.raises(GrammarError, match="foo") as caught:
        masks.mask(part(LLMatcher.grammar_from_json_schema({"type": "foo"}), []))
    assert "\n" not in str(caught.value)
    digits = LLMatcher.grammar_from_regex("[0-9]{3}")
    with pytest.raises(GrammarError, match="grammar"):
        masks.mask(part(digits, tokenizer.encode("x").ids))
    with pytest.raises(GrammarError, match=r"missing/tokenizer.json"):
        Grammars(model_dir / "missing" / "tokenizer.json", VOCAB, [EOS]).compile(digits)


def test_the_least_recently_compiled_grammar_is_dropped(model_dir, monkeypatch):
    monkeypatch.setattr("engine.backends.torch.grammar.MAX_COMPILED", 2)
    grammars = Grammars(model_dir / "tokenizer.json", VOCAB, [])
    texts = [LLMatcher.grammar_from_regex(f"{i}+") for i in range(3)]
    first = grammars.compile(texts[0])
    assert grammars.compile(texts[0]) is first
    for text in texts:
        grammars.compile(text)
    assert grammars.compile(texts[0]) is not first
