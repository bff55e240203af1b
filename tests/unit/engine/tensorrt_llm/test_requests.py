"""The table of an engine's requests: what the engine gets, what its answers mean, and what the gateways are told."""

from __future__ import annotations

from typing import Any

import pytest

from engine.backends.tensorrt_llm.requests import RequestTable, TableLimits
from engine.backends.tensorrt_llm.wire import Abort, Generate, Tokens
from engine.protocol import FinishReason, GenerateRequest, RejectReason, SamplingParams, TokenEntry, TokenLogprobs

EOS = 2


def table(max_batch: int = 2, **limits: int) -> RequestTable:
    return RequestTable(
        "p1", TableLimits(max_batch, limits.get("max_model_len", 64), limits.get("max_kv_tokens", 256), 300)
    )


def request(name: str = "r", committed: list[int] | None = None, attempt: int = 0, **sampling: Any) -> GenerateRequest:
    given: dict[str, Any] = {"max_tokens": 8, "eos_token_ids": [EOS]} | sampling
    return GenerateRequest(
        request_id=name,
        attempt=attempt,
        gateway="g",
        prompt_ids=[10, 11, 12],
        committed_ids=committed or [],
        sampling=SamplingParams(**given),
    )


def generates(of: RequestTable) -> list[Generate]:
    return [message for message in of.take().messages if isinstance(message, Generate)]


def entries(of: RequestTable) -> list[TokenEntry]:
    return [out.entry for out in of.take().entries]


def begin(of: RequestTable, **fields: Any) -> Generate:
    assert of.submit(request(**fields), 0.0).accepted
    return generates(of)[-1]


def test_the_engine_gets_no_more_than_it_runs_at_once() -> None:
    requests = table(max_batch=2)
    for name in "abc":
        assert requests.submit(request(name), 0.0).accepted
    assert [message.id for message in generates(requests)] == [1, 2]
    requests.heard(Tokens(id=1, ids=[EOS]), 1.0)
    messages = requests.take().messages
    assert [type(message) for message in messages] == [Abort, Generate]
    assert requests.num_waiting == 0


def test_a_resume_goes_on_behind_its_committed_ids_with_what_is_left() -> None:
    requests = table()
    message = begin(requests, committed=[20, 21, 22])
    assert (message.token_ids, message.num_prompt, message.max_tokens) == ([10, 11, 12, 20, 21, 22], 3, 5)
    requests.heard(Tokens(id=message.id, ids=[23, 24]), 1.0)
    (entry,) = entries(requests)
    assert (entry.index, entry.ids) == (3, [23, 24])
    assert entry.resume is not None
    assert entry.resume.recomputed_tokens == 5


def test_a_resume_that_is_complete_ends_at_once() -> None:
    requests = table()
    assert requests.submit(request(committed=[20, EOS]), 0.0).accepted
    (entry,) = entries(requests)
    assert (entry.index, entry.ids, entry.finish) == (2, [], FinishReason.STOP)


def test_our_own_stop_rules_end_a_sequence_and_abort_it_in_the_engine() -> None:
    requests = table()
    message = begin(requests, stop_token_ids=[77])
    requests.heard(Tokens(id=message.id, ids=[20, 77, 21]), 1.0)
    effects = requests.take()
    assert effects.messages == [Abort(id=message.id)]
    assert effects.entries[0].entry.ids == [20, 77]
    assert effects.entries[0].entry.finish is FinishReason.STOP
    requests.heard(Tokens(id=message.id, ids=[22]), 1.1)
    requests.heard(Tokens(id=message.id, ended=True, finish_reason="cancelled"), 1.2)
    assert entries(requests) == []


@pytest.mark.parametrize("stop_id", [None, EOS])
def test_a_stop_token_that_the_engine_took_back_ends_the_log(stop_id: int | None) -> None:
    requests = table()
    message = begin(requests)
    requests.heard(Tokens(id=message.id, ids=[20]), 1.0)
    requests.heard(Tokens(id=message.id, ended=True, finish_reason="stop", stop_id=stop_id), 1.1)
    first, last = entries(requests)
    assert first.ids == [20]
    assert (last.index, last.ids, last.finish) == (1, [EOS], FinishReason.STOP)


def test_a_taken_back_stop_token_without_logprob_is_left_out_and_ends_no_other_token() -> None:
    requests = table()
    message = begin(requests, logprobs=0)
    news = Tokens(id=message.id, ids=[20], logprobs=[TokenLogprobs(-1.0, 1)])
    requests.heard(news, 1.0)
    requests.heard(Tokens(id=message.id, ended=True, finish_reason="stop"), 1.1)
    first, last = entries(requests)
    assert (first.ids, first.finish) == ([20], None)
    assert (last.ids, last.finish, last.logprobs) == ([], FinishReason.STOP, [])


def test_a_length_that_the_engine_clamped_is_resumed_at_once() -> None:
    requests = table()
    message = begin(requests)
    requests.heard(Tokens(id=message.id, ids=[20, 21]), 1.0)
    requests.heard(Tokens(id=message.id, ended=True, finish_reason="length"), 1.1)
    effects = requests.take()
    (again,) = effects.messages
    assert isinstance(again, Generate)
    assert (again.token_ids[3:], again.max_tokens) == ([20, 21], 6)
    assert again.id != message.id
    assert [out.entry.finish for out in effects.entries] == [None]


def test_an_end_without_a_token_is_an_error_and_not_tried_for_ever() -> None:
    requests = table()
    message = begin(requests)
    requests.heard(Tokens(id=message.id, ended=True, finish_reason="length"), 1.0)
    (entry,) = entries(requests)
    assert entry.finish is FinishReason.ERROR
    assert "without a token" in (entry.error or "")


def test_an_error_of_one_request_ends_that_one() -> None:
    requests = table()
    begin(requests, name="a")
    second = begin(requests, name="b")
    requests.heard(Tokens(id=second.id, ended=True, error="RequestError: no"), 1.0)
    requests.tick(1.5)
    (entry,) = entries(requests)
    assert (entry.request_id, entry.finish, entry.error) == ("b", FinishReason.ERROR, "RequestError: no")
    assert requests.num_running == 1


def test_a_cancelled_end_that_nobody_asked_for_means_migrate() -> None:
    requests = table()
    message = begin(requests)
    requests.heard(Tokens(id=message.id, ids=[20]), 1.0)
    requests.heard(Tokens(id=message.id, ended=True, finish_reason="cancelled"), 1.1)
    first, last = entries(requests)
    assert first.ids == [20]
    assert (last.finish, last.index) == (None, 1)
    assert last.interruption is not None


def test_all_live_sequences_are_handed_back_and_nothing_is_taken_or_heard_after() -> None:
    requests = table(max_batch=1)
    message = begin(requests, name="a")
    assert requests.submit(request("b"), 0.0).accepted
    requests.heard(Tokens(id=message.id, ids=[20]), 0.5)
    requests.take()
    requests.interrupt_all("gone", 1.0)
    handed_back = entries(requests)
    assert [(e.request_id, e.index, e.interruption is not None) for e in handed_back] == [
        ("a", 1, True),
        ("b", 0, True),
    ]
    requests.heard(Tokens(id=message.id, ids=[21]), 1.1)
    assert entries(requests) == []
    assert requests.submit(request("c"), 1.2).reason is RejectReason.DRAINING
    entry = requests.resend("a", 0, 0)
    assert entry is not None
    assert entry.ids == [20]


def test_a_client_that_leaves_frees_the_slot_for_who_waits() -> None:
    requests = table(max_batch=1)
    first = begin(requests, name="a")
    assert requests.submit(request("b"), 0.0).accepted
    requests.cancel("a", 1.0)
    effects = requests.take()
    assert effects.messages[0] == Abort(id=first.id)
    assert isinstance(effects.messages[1], Generate)
    assert [out.entry.finish for out in effects.entries] == [FinishReason.CANCELLED]


def test_a_newer_attempt_replaces_the_older_without_an_entry() -> None:
    requests = table()
    first = begin(requests)
    assert requests.submit(request(attempt=1, committed=[20]), 1.0).accepted
    effects = requests.take()
    assert effects.messages[0] == Abort(id=first.id)
    assert effects.entries == []
    assert requests.submit(request(attempt=0), 1.0).reason is RejectReason.INVALID
    assert requests.submit(request(attempt=1), 1.0).accepted


def test_a_deadline_ends_what_runs_and_what_waits() -> None:
    requests = table(max_batch=1)
    for name in "ab":
        late = GenerateRequest(
            request_id=name, gateway="g", prompt_ids=[1], sampling=SamplingParams(max_tokens=2), deadline_s=5.0
        )
        assert requests.submit(late, 0.0).accepted
    requests.take()
    requests.tick(5.0)
    assert [(e.finish, e.error) for e in entries(requests)] == [(FinishReason.ERROR, "deadline")] * 2


@pytest.mark.parametrize(
    ("given", "limits", "reason", "detail"),
    [
        ({"prompt_logprobs": 1}, {}, RejectReason.INVALID, "sampling.prompt_logprobs"),
        ({"logprobs": 1, "seeded": True}, {}, RejectReason.INVALID, "sampling.logprobs"),
        ({"logprobs": 1, "presence_penalty": 1.0}, {}, RejectReason.INVALID, "sampling.logprobs"),
        ({"max_tokens": 0}, {}, RejectReason.INVALID, "sampling.max_tokens"),
        ({}, {"max_model_len": 3}, RejectReason.TOO_LONG, "3 of at most 2"),
        ({}, {"max_kv_tokens": 8}, RejectReason.TOO_LONG, "KV of 10 tokens"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_with_the_field(
    given: dict[str, Any], limits: dict[str, int], reason: RejectReason, detail: str
) -> None:
    reply = table(**limits).submit(request(**given), 0.0)
    assert reply.reason is reason
    assert detail in reply.detail


def test_a_queue_that_is_full_says_so() -> None:
    requests = table(max_batch=1)
    replies = [requests.submit(request(str(number)), 0.0) for number in range(6)]
    assert [reply.accepted for reply in replies] == [True] * 5 + [False]
    assert replies[-1].reason is RejectReason.FULL


def test_an_output_that_breaks_off_inside_its_grammar_is_an_error() -> None:
    checked: list[list[int]] = []

    def breach(grammar: str, ids: list[int]) -> str | None:
        checked.append(ids)
        return None if ids == [20, 21] else "not whole"

    requests = RequestTable("p1", TableLimits(2, 64, 256, 300), breach)
    for name, ids in (("whole", [20, 21, EOS]), ("broken", [20, EOS])):
        message = begin(requests, name=name, grammar="start: /a/")
        requests.heard(Tokens(id=message.id, ids=ids), 1.0)
    assert checked == [[20, 21], [20]]
    told = [requests.resend(name, 0, 0) for name in ("whole", "broken")]
    assert [(e.finish, e.error) for e in told if e is not None] == [
        (FinishReason.STOP, None),
        (FinishReason.ERROR, "sampling.grammar: not whole"),
    ]


BAD = "CUDA error in the forward pass"


def running(of: RequestTable, *names: str) -> dict[str, int]:
    """Requests that each have a token; the engine's id of each."""
    ids = {name: begin(of, name=name).id for name in names}
    for number, run_id in enumerate(ids.values()):
        of.heard(Tokens(id=run_id, ids=[20 + number]), 1.0)
    of.take()
    return ids


def fall(of: RequestTable, *run_ids: int, now_s: float = 2.0, error: str = BAD) -> None:
    for run_id in run_ids:
        of.heard(Tokens(id=run_id, ended=True, error=error), now_s)


def test_who_falls_together_begins_again_one_by_one_and_no_client_hears_of_it() -> None:
    requests = table(max_batch=3)
    fall(requests, *running(requests, "a", "b", "c").values())
    order = []
    for position in range(3):
        effects = requests.take()
        assert not effects.entries
        (again,) = effects.messages
        assert isinstance(again, Generate)
        order.append(again.token_ids[-1])
        requests.heard(Tokens(id=again.id, ids=[30 + position]), 3.0)
        assert requests.dead is None
        assert [out.entry.ids for out in requests._effects.entries] == [[30 + position]]
        requests._effects.entries.clear()
    assert order == [20, 21, 22]
    assert (requests.num_running, requests.num_waiting) == (3, 0)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_one_that_fells_the_others_is_found_and_ends_alone(position: int) -> None:
    requests = table(max_batch=3)
    names = ["a", "b", "c"]
    poison = names[position]
    ids = running(requests, *names)
    tokens = {name: 20 + number for number, name in enumerate(names)}
    fall(requests, *ids.values())
    ended: dict[str, TokenEntry] = {}
    alive: dict[str, int] = {}
    for _ in range(12):
        effects = requests.take()
        ended |= {out.entry.request_id: out.entry for out in effects.entries if out.entry.finish is not None}
        for message in effects.messages:
            if isinstance(message, Generate):
                alive[next(name for name in names if tokens[name] == message.token_ids[3])] = message.id
        assert requests.dead is None
        if poison in alive:
            fall(requests, *alive.values(), now_s=3.0)
            alive.clear()
        else:
            for name in list(alive):
                requests.heard(Tokens(id=alive[name], ids=[40]), 3.0)
    assert {name: (entry.finish, entry.error) for name, entry in ended.items() if entry.error} == {
        poison: (FinishReason.ERROR, BAD)
    }
    assert all(entry.finish is FinishReason.LENGTH for name, entry in ended.items() if name != poison)
    assert len(ended) == 3


def test_an_engine_that_fails_one_after_the_other_is_dead_and_all_are_handed_back() -> None:
    requests = table(max_batch=3)
    fall(requests, *running(requests, "a", "b", "c").values())
    for _ in range(2):
        assert requests.dead is None
        fall(requests, generates(requests)[-1].id)
    assert requests.dead is not None
    assert BAD in requests.dead
    requests.interrupt_all(requests.dead, 3.0, broken=True)
    handed = entries(requests)
    assert {entry.request_id for entry in handed} == {"a", "b", "c"}
    assert all(entry.interruption is not None and entry.interruption.broken for entry in handed)
    assert requests.is_idle


@pytest.mark.parametrize(("later_s", "is_dead"), [(5.0, True), (100.0, False)])
def test_an_engine_that_fails_all_twice_in_short_time_is_dead(later_s: float, is_dead: bool) -> None:
    requests = table()
    ids = running(requests, "a", "b")
    fall(requests, *ids.values())
    again = []
    for _ in range(2):
        again.append(generates(requests)[-1].id)
        requests.heard(Tokens(id=again[-1], ids=[30]), 2.5)
    fall(requests, *again, now_s=later_s)
    assert (requests.dead is not None) is is_dead


def test_errors_that_come_in_two_batches_are_one_failure() -> None:
    requests = table()
    first, second = running(requests, "a", "b").values()
    fall(requests, first)
    requests.tick(2.1)
    fall(requests, second, now_s=2.2)
    assert entries(requests) == []
    assert requests.num_running + requests.num_waiting == 2


def test_one_that_fails_while_another_goes_on_ends_with_its_error() -> None:
    requests = table()
    first, second = running(requests, "a", "b").values()
    fall(requests, first)
    requests.heard(Tokens(id=second, ids=[30]), 2.1)
    requests.tick(2.5)
    errors = [entry for entry in entries(requests) if entry.error is not None]
    assert [(entry.request_id, entry.error) for entry in errors] == [("a", BAD)]


def test_requests_that_were_wrong_from_the_start_are_no_failure_of_the_engine() -> None:
    requests = table()
    ids = [begin(requests, name=name).id for name in "ab"]
    fall(requests, *ids, error="Token ID out of range")
    requests.tick(5.0)
    assert [entry.finish for entry in entries(requests)] == [FinishReason.ERROR] * 2
    assert requests.dead is None


def test_new_requests_wait_while_it_is_open_whose_fault_it_was() -> None:
    requests = table(max_batch=4)
    fall(requests, *running(requests, "a", "b").values())
    assert len(generates(requests)) == 1
    assert requests.submit(request("new"), 2.1).accepted
    assert generates(requests) == []
    for request_id in "ab":
        requests.cancel(request_id, 2.2)
    assert [message.token_ids for message in generates(requests)][-1] == [10, 11, 12]
    assert requests.dead is None


def test_an_accused_whom_nobody_is_left_to_convict_is_handed_back() -> None:
    requests = table()
    fall(requests, *running(requests, "a", "b").values())
    fall(requests, generates(requests)[-1].id)
    requests.cancel("b", 2.2)
    assert requests.dead is not None
