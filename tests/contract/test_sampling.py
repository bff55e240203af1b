"""Everything that chooses a token or tells about it is a function of the log: an interruption changes nothing of it.

The oracle is an undisturbed run on one rank. The interrupted run stops in the middle and goes on in another shape.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer

from engine.protocol import FinishReason, RejectReason, TokenEntry, TokenLogprobs
from tests.contract.fleet import Fleet, MakeBackend, Recorder, request, until

ONE, TWO, TENSOR3 = [["a"]], [["a"], ["b"]], [["a", "b", "c"]]
PROMPT = [5, 17, 40, 99, 120, 33, 71, 64, 82] * 3
EOS = 2
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"enum": ["small", "large"]},
        "numbers": {"type": "array", "items": {"type": "integer", "maximum": 999}, "minItems": 3, "maxItems": 6},
    },
    "required": ["name", "size", "numbers"],
    "additionalProperties": False,
}
GRAMMAR = LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_flexible": False})
FEATURES: dict[str, dict[str, Any]] = {
    "penalties": {"presence_penalty": 1.5, "frequency_penalty": 0.7, "repetition_penalty": 1.3},
    "logit_bias": {"logit_bias": {7: 5.5, 9: 4.0, 11: -100.0}, "temperature": 1.0, "seed": 3},
    "logprobs": {"logprobs": 3, "temperature": 1.0, "seed": 5},
    "prompt_logprobs": {"prompt_logprobs": 2, "logprobs": 0},
    "grammar": {"grammar": GRAMMAR, "eos_token_ids": [EOS], "temperature": 1.0, "seed": 4, "max_tokens": 120},
    "all": {
        "frequency_penalty": 0.3,
        "logit_bias": {20: 2.0},
        "grammar": GRAMMAR,
        "eos_token_ids": [EOS],
        "min_tokens": 30,
        "min_p": 0.02,
        "top_k": 40,
        "top_p": 0.95,
        "temperature": 0.8,
        "seed": 8,
        "logprobs": 4,
        "prompt_logprobs": 1,
        "max_tokens": 120,
    },
}


@dataclass
class Log:
    """One choice as its gateway folds it."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish: FinishReason | None = None

    def fold(self, entry: TokenEntry) -> None:
        assert entry.index == len(self.ids)
        self.ids += entry.ids
        if entry.logprobs is not None:
            assert len(entry.logprobs) == len(entry.ids)
            self.logprobs += entry.logprobs
        if entry.prompt_logprobs is not None:
            assert self.prompt_logprobs is None, "sent twice"
            self.prompt_logprobs = entry.prompt_logprobs
        self.finish = entry.finish


def folded(recorders: list[Recorder], choice: int = 0) -> Log:
    log = Log()
    for recorder in recorders:
        for entry in recorder.entries:
            if entry.choice == choice and entry.interruption is None:
                log.fold(entry)
    return log


async def finished(recorder: Recorder, *names: str) -> None:
    await until(lambda: all((last := recorder.last(name)) and last.finish for name in names))


async def undisturbed(make_backend: MakeBackend, choices: int = 1, **sampling: Any) -> list[Log]:
    async with Fleet(make_backend) as fleet:
        recorder = await fleet.serve("p0", [["oracle"]])
        for choice in range(choices):
            reply = await fleet.leaders["p0"].submit(request("r", PROMPT, choice=choice, **sampling))
            assert reply.accepted, reply
        await until(lambda: all(folded([recorder], choice).finish for choice in range(choices)))
        return [folded([recorder], choice) for choice in range(choices)]


async def interrupted(
    make_backend: MakeBackend,
    after: list[list[str]],
    choices: int = 1,
    num_tokens_before: int = 6,
    *,
    lose: bool = False,
    **sampling: Any,
) -> list[Log]:
    """Stopped after a few tokens and resumed on another pipeline, with the KV or (`lose`) without."""
    async with Fleet(make_backend) as fleet:
        old = await fleet.serve("p1", ONE)
        for choice in range(choices):
            reply = await fleet.leaders["p1"].submit(request("r", PROMPT, choice=choice, **sampling))
            assert reply.accepted, reply
        await until(lambda: all(len(folded([old], c).ids) >= num_tokens_before for c in range(choices)))
        fleet.leaders["p1"].arrange(None, 0.0)
        await until(lambda: "p1" in old.stopped)
        new = await fleet.serve("p2", after)
        for choice in range(choices):
            last = old.last("r", choice)
            assert last is not None
            assert last.interruption is not None, "it was to be stopped in the middle"
            source = None if lose else last.interruption.kv_source
            ids = folded([old], choice).ids
            resumed = request("r", PROMPT, choice=choice, committed_ids=ids, kv_source=source, attempt=1, **sampling)
            assert (await fleet.leaders["p2"].submit(resumed)).accepted
        await until(lambda: all(folded([old, new], choice).finish for choice in range(choices)))
        return [folded([old, new], choice) for choice in range(choices)]


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("after", "lose"), [(TWO, False), (TENSOR3, True)], ids=["kv moved", "recomputed"])
async def test_an_interruption_changes_nothing(
    make_backend: MakeBackend, feature: str, after: list[list[str]], lose: bool
) -> None:
    sampling = FEATURES[feature]
    expected = await undisturbed(make_backend, **sampling)
    assert await interrupted(make_backend, after, lose=lose, **sampling) == expected


async def test_three_choices_differ_and_survive_an_interruption(make_backend: MakeBackend) -> None:
    sampling: dict[str, Any] = {"temperature": 1.0, "seed": 11, "logprobs": 0}
    expected = await undisturbed(make_backend, 3, **sampling)
    assert len({tuple(log.ids) for log in expected}) == 3
    assert await interrupted(make_backend, TWO, 3, **sampling) == expected


async def test_output_under_a_grammar_parses_and_fits_the_schema(make_backend: MakeBackend, model_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    for seed in range(4):
        [log] = await undisturbed(make_backend, **(FEATURES["grammar"] | {"seed": seed, "ignore_eos": seed % 2 == 0}))
        assert log.finish is FinishReason.STOP
        assert log.ids[-1] == EOS
        answer = json.loads(tokenizer.decode(log.ids))
        assert list(answer) == ["name", "size", "numbers"]
        assert len(answer["name"]) <= 12
        assert answer["size"] in ("small", "large")
        assert 3 <= len(answer["numbers"]) <= 6


async def test_grammars_are_followed_side_by_side_in_all_micro_batches(
    make_backend: MakeBackend, model_dir: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    grammars = {f"r{i}": LLMatcher.grammar_from_regex(f"[{i}-{i + 2}]{{{5 + i}}}") for i in range(6)}
    async with Fleet(make_backend) as fleet:
        recorder = await fleet.serve("p1", [["a"], ["b"], ["c"]])
        for name, grammar in grammars.items():
            sampling: dict[str, Any] = {"grammar": grammar, "eos_token_ids": [EOS], "temperature": 1.0}
            assert (await fleet.leaders["p1"].submit(request(name, PROMPT, max_tokens=50, **sampling))).accepted
        assert (await fleet.leaders["p1"].submit(request("free", PROMPT, max_tokens=20))).accepted
        await finished(recorder, *grammars, "free")
        for i, name in enumerate(grammars):
            ids = recorder.tokens(name)
            assert ids[-1] == EOS
            assert set(tokenizer.decode(ids)) <= set("01234567"[i : i + 3])
            assert len(ids) == 5 + i + 1
        assert len(recorder.tokens("free")) == 20


async def test_a_grammar_that_does_not_compile_refuses_its_request_alone(make_backend: MakeBackend) -> None:
    async with Fleet(make_backend) as fleet:
        recorder = await fleet.serve("p1", ONE)
        bad = LLMatcher.grammar_from_json_schema({"type": "nonsense"})
        reply = await fleet.leaders["p1"].submit(request("bad", PROMPT, grammar=bad, eos_token_ids=[EOS]))
        assert (reply.accepted, reply.reason) == (False, RejectReason.INVALID)
        assert reply.detail.startswith("sampling.grammar: ")
        assert "nonsense" in reply.detail
        assert (await fleet.leaders["p1"].submit(request("good", PROMPT))).accepted
        await finished(recorder, "good")


async def test_output_that_leaves_its_grammar_ends_that_request_alone(make_backend: MakeBackend) -> None:
    async with Fleet(make_backend) as fleet:
        recorder = await fleet.serve("p1", ONE)
        grammar = LLMatcher.grammar_from_regex("[0-9]{9}")
        resumed = request("bad", PROMPT, grammar=grammar, eos_token_ids=[EOS], committed_ids=[70])
        assert (await fleet.leaders["p1"].submit(resumed)).accepted
        assert (await fleet.leaders["p1"].submit(request("good", PROMPT))).accepted
        await finished(recorder, "bad", "good")
        entry = recorder.last("bad")
        assert entry is not None
        assert (entry.finish, entry.ids) == (FinishReason.ERROR, [])
        assert (entry.error or "").startswith("sampling.grammar: ")
        assert len(recorder.tokens("good")) == 24


async def test_scoring_a_prompt_gives_the_logprobs_that_generation_gives(make_backend: MakeBackend) -> None:
    [generated] = await undisturbed(make_backend, logprobs=3)
    async with Fleet(make_backend) as fleet:
        recorder = await fleet.serve("p1", TWO)
        prompt = PROMPT * 4 + generated.ids  # Longer than one chunk of scored rows.
        scored = request("long", prompt, prompt_logprobs=0, max_tokens=0)
        exact = request("exact", PROMPT + generated.ids, prompt_logprobs=3, max_tokens=0)
        assert (await fleet.leaders["p1"].submit(scored)).accepted
        assert (await fleet.leaders["p1"].submit(exact)).accepted
        await finished(recorder, "long", "exact")
        entry = recorder.last("exact")
        assert entry is not None
        assert (entry.ids, entry.finish) == ([], FinishReason.LENGTH)
        assert entry.prompt_logprobs is not None
        assert entry.prompt_logprobs[len(PROMPT) :] == generated.logprobs
        long = recorder.last("long")
        assert long is not None
        assert long.prompt_logprobs is not None
        assert len(long.prompt_logprobs) == len(prompt)
        assert long.prompt_logprobs[0] is None
        assert all(one is not None and one.logprob < 0 and one.top_ids == [] for one in long.prompt_logprobs[1:])


async def test_cancel_of_an_old_attempt_leaves_the_newer_one_alone(make_backend: MakeBackend) -> None:
    async with Fleet(make_backend) as fleet:
        recorder = await fleet.serve("p1", ONE)
        leader = fleet.leaders["p1"]
        await leader.submit(request("r", PROMPT, max_tokens=400, attempt=2))
        leader.cancel("r", 1)
        await until(lambda: len(recorder.tokens("r")) >= 3)
        leader.cancel("r", 2)
        await until(lambda: (last := recorder.last("r")) is not None and last.finish is FinishReason.CANCELLED)


@pytest.mark.parametrize("shape", [ONE, TWO, TENSOR3], ids=["one", "two stages", "three shards"])
async def test_kv_that_is_reused_gives_the_same_tokens_and_logprobs(
    make_backend: MakeBackend, shape: list[list[str]]
) -> None:
    sampling: dict[str, Any] = {"logprobs": 2, "temperature": 1.0, "seed": 6, "max_tokens": 20}
    [expected] = await undisturbed(make_backend, **sampling)
    async with Fleet(make_backend) as fleet:
        recorder = await fleet.serve("p1", shape)
        leader = fleet.leaders["p1"]
        cached = {}
        for name, prompt, committed in (("cold", PROMPT, 0), ("warm", PROMPT, 0), ("resumed", PROMPT, 9)):
            ids = expected.ids[:committed]
            assert (await leader.submit(request(name, prompt, committed_ids=ids, **sampling))).accepted
            await finished(recorder, name)
            entries = [entry for entry in recorder.entries if entry.request_id == name]
            assert [i for e in entries for i in e.ids] == expected.ids[committed:]
            assert [p for e in entries for p in e.logprobs or []] == expected.logprobs[committed:]
            cached[name] = [entry.cached_tokens for entry in entries if entry.cached_tokens]
        # Blocks of 16 tokens: one of the prompt's 27, two of the 36 that the resume feeds.
        assert cached == {"cold": [], "warm": [16], "resumed": [27]}
        assert leader.snapshot().cached_kv_blocks == 2
        assert leader.snapshot().free_kv_blocks == leader.snapshot().total_kv_blocks
