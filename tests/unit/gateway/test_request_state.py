"""The life of one choice: every token once, in order, whatever is lost, doubled, late or from elsewhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol import (
    DEADLINE_PASSED,
    FinishReason,
    Interruption,
    KvHolder,
    KvSource,
    RejectReason,
    ResumeStats,
    SamplingParams,
    TokenEntry,
)
from gateway.core import request_state as rs
from gateway.core.request_state import ChoiceState, Phase

LOG = list(range(100, 140))
SOURCE = KvSource(
    pipeline="p0",
    num_tokens=3,
    holders=[KvHolder(rank="r0", context_address="h:1", first_layer=0, last_layer=1, first_group=0, last_group=0)],
)


def make(dispatched=True):
    state = ChoiceState("req", 0, [1, 2], SamplingParams(max_tokens=len(LOG), seed=4), 600.0)
    if dispatched:
        state.handle(rs.Dispatched("p0"), 0.0)
    return state


def entry(first, end, attempt=0, **extra):
    """The log from `first` up to `end` (exclusive)."""
    return TokenEntry(request_id="req", choice=0, attempt=attempt, index=first, ids=LOG[first:end], **extra)


def arrive(state, first, end, now_s=0.1, pipeline="p0", **extra):
    effects = state.handle(rs.EntryArrived(pipeline, entry(first, end, **extra)), now_s)
    state.check_invariants()
    return effects


def delivered(effects):
    return [i for effect in effects if isinstance(effect, rs.Deliver) for i in effect.ids]


def of(effects, type_):
    return [effect for effect in effects if isinstance(effect, type_)]


def test_tokens_in_order():
    state = make()
    assert arrive(state, 0, 2) == [rs.Deliver(LOG[:2], None, 0)]
    assert arrive(state, 2, 40, finish=FinishReason.LENGTH) == [rs.Deliver(LOG[2:], "length", 0)]
    assert state.phase is Phase.FINISHED


def test_repeats_are_dropped_and_what_is_beyond_is_taken():
    state = make()
    arrive(state, 0, 5)
    assert arrive(state, 0, 5) == []
    assert delivered(arrive(state, 3, 7)) == LOG[5:7]
    assert state.token_ids == LOG[:7]


def test_gap_is_asked_for_once():
    state = make()
    arrive(state, 0, 2)
    assert arrive(state, 4, 5) == [rs.AskResend("p0", 2)]
    assert arrive(state, 5, 6) == []
    effects = state.handle(rs.ResendAnswered("p0", 0, True, entry(2, 6), True), 0.2)
    assert delivered(effects) == LOG[2:6]


@pytest.mark.parametrize(("pipeline", "attempt"), [("p1", 0), ("p0", 1), ("p1", 1)])
def test_other_attempt_or_pipeline_is_fenced_off(pipeline, attempt):
    state = make()
    assert arrive(state, 0, 3, pipeline=pipeline, attempt=attempt) == []
    assert state.token_ids == []


def test_interruption_resumes_with_tokens_and_kv_and_releases_after_the_first_entry():
    state = make()
    effects = arrive(state, 0, 3, interruption=Interruption(reason="preempted", kv_source=SOURCE))
    assert delivered(effects) == LOG[:3]
    assert of(effects, rs.Requeue) == [rs.Requeue("p0", "preempted", backoff=False)]
    assert state.interrupted
    state.handle(rs.Dispatched("p1"), 1.0)
    request = state.generate_request("gw")
    assert (request.attempt, request.committed_ids, request.kv_source) == (1, LOG[:3], SOURCE)
    assert arrive(state, 3, 4, pipeline="p0") == []
    stats = ResumeStats(pulled_tokens=3)
    effects = arrive(state, 3, 4, pipeline="p1", attempt=1, resume=stats)
    assert effects == [rs.ReleaseHeld(SOURCE), rs.Resumed(stats), rs.Deliver(LOG[3:4], None, 0)]
    assert arrive(state, 4, 5, pipeline="p1", attempt=1) == [rs.Deliver(LOG[4:5], None, 0)]


def test_interruption_behind_a_gap_waits_for_the_gap():
    state = make()
    arrive(state, 0, 2)
    interruption = Interruption(reason="preempted", kv_source=SOURCE)
    assert arrive(state, 5, 5, interruption=interruption) == [rs.AskResend("p0", 2)]
    answer = rs.ResendAnswered("p0", 0, True, entry(2, 5, interruption=interruption), True)
    effects = state.handle(answer, 0.3)
    assert delivered(effects) == LOG[2:5]
    assert of(effects, rs.Requeue)


def test_broken_pipeline():
    state = make()
    arrive(state, 0, 3)
    assert state.handle(rs.PipelineBroken("p9", "x"), 1.0) == []
    assert state.handle(rs.PipelineBroken("p0", "lost"), 1.0) == [rs.Requeue("p0", "lost", backoff=False)]
    assert state.generate_request("gw").kv_source is None
    assert state.handle(rs.PipelineBroken("p0", "lost"), 1.0) == []


def test_kv_is_released_when_it_ends_before_the_resume():
    state = make()
    arrive(state, 0, 3, interruption=Interruption(reason="preempted", kv_source=SOURCE))
    assert state.cancel() == [rs.ReleaseHeld(SOURCE)]
    assert state.cancel() == []


def test_cancel_tells_the_pipeline():
    state = make()
    assert state.cancel() == [rs.Cancel("p0", 0)]
    assert arrive(state, 0, 1) == []


@pytest.mark.parametrize("reason", [RejectReason.FULL, RejectReason.DRAINING, RejectReason.NOT_LEADER])
def test_refused_is_offered_again_as_the_same_attempt(reason):
    state = make()
    effects = state.handle(rs.SubmitFailed(0, reason), 0.1)
    assert effects == [rs.Requeue("p0", str(reason), backoff=True)]
    assert state.attempt == 0
    assert not state.reached_last_pipeline


def test_no_answer_to_a_submit_fences_the_pipeline_off():
    state = make()
    state.handle(rs.SubmitFailed(0, None), 1.0)
    assert state.attempt == 1
    assert state.reached_last_pipeline
    assert arrive(state, 0, 1) == []
    assert state.cancel() == [rs.Cancel("p0", 1)]


def test_no_answer_after_tokens_have_come_means_nothing():
    state = make()
    arrive(state, 0, 1)
    assert state.handle(rs.SubmitFailed(0, None), 1.0) == []
    assert state.phase is Phase.STREAMING


@pytest.mark.parametrize("reason", [RejectReason.INVALID, RejectReason.TOO_LONG])
def test_bad_request_fails(reason):
    state = make()
    assert state.handle(rs.SubmitFailed(0, reason, "why"), 0.1) == [rs.Fail("why", reason)]
    assert state.phase is Phase.FINISHED


def test_engine_error_fails_after_its_tokens():
    state = make()
    effects = arrive(state, 0, 0, finish=FinishReason.ERROR, error="boom")
    assert effects == [rs.Fail("boom")]


def test_a_request_that_the_engine_ends_at_its_deadline_has_timed_out():
    state = make()
    effects = arrive(state, 0, 2, finish=FinishReason.ERROR, error=DEADLINE_PASSED)
    assert effects == [rs.Deliver(LOG[:2], None, 0), rs.TimedOut()]
    assert state.phase is Phase.FINISHED


def ask(state, now_s):
    assert state.handle(rs.Tick(), now_s) == [rs.AskResend("p0", len(state.token_ids))]


def test_silence_is_asked_about():
    state = make()
    assert state.handle(rs.Tick(), 1.4) == []
    ask(state, 1.5)
    assert state.handle(rs.Tick(), 1.6) == []
    assert state.handle(rs.ResendAnswered("p0", 0, True, entry(0, 0), True), 1.7) == []
    assert state.handle(rs.Tick(), 3.1) == []
    ask(state, 3.3)


@pytest.mark.parametrize(
    ("responded", "in_plan", "gives_up"),
    [(True, True, True), (True, False, True), (False, False, True), (False, True, False)],
)
def test_unhelpful_answers(responded, in_plan, gives_up):
    state = make()
    now_s = 1.5
    for round_number in range(3):
        ask(state, now_s)
        effects = state.handle(rs.ResendAnswered("p0", 0, responded, None, in_plan), now_s + 0.1)
        assert bool(effects) == (gives_up and round_number == 2)
        now_s += 0.7
    assert (state.phase is Phase.QUEUED) == gives_up


def test_retiring_pipeline_is_given_up_when_late_and_silent():
    state = make()
    state.handle(rs.PipelineRetires("p0", 5.0), 0.0)
    arrive(state, 0, 1, now_s=4.9)
    assert not of(state.handle(rs.Tick(), 5.5), rs.Requeue)
    assert of(state.handle(rs.Tick(), 6.5), rs.Requeue)
    assert state.attempt == 1


def test_timers_start_again_when_the_bus_is_back():
    state = make()
    state.handle(rs.PipelineRetires("p0", 2.0), 0.0)
    state.handle(rs.BusReturned(), 60.0)
    assert state.handle(rs.Tick(), 60.1) == []
    ask(state, 60.6)
    assert of(state.handle(rs.Tick(), 61.6), rs.Requeue)


events = st.lists(
    st.tuples(
        st.sampled_from(["frame", "lose", "repeat", "old", "interrupt", "break", "resend", "refuse", "tick"]),
        st.integers(1, 5),
    ),
    max_size=60,
)


@given(events)
def test_client_sees_every_token_once_whatever_happens(script):
    """An engine that follows the log, a bus that loses and repeats: the client's tokens are a prefix of the log."""
    state = make()
    sent, seen, now_s = 0, [], 0.0
    asked = False

    def carry_out(effects):
        nonlocal sent, asked
        seen.extend(delivered(effects))
        asked = asked or bool(of(effects, rs.AskResend))
        for requeue in of(effects, rs.Requeue):
            asked = False
            state.handle(rs.Dispatched(f"p{state.attempt}-{now_s}"), now_s)
            sent = len(state.token_ids)
            assert requeue.pipeline != state.pipeline

    for kind, count in script:
        now_s += 0.4
        end = min(sent + count, len(LOG))
        match kind:
            case "frame" | "interrupt":
                interruption = Interruption(reason="x") if kind == "interrupt" else None
                finish = FinishReason.LENGTH if end == len(LOG) and interruption is None else None
                made = entry(sent, end, state.attempt, interruption=interruption, finish=finish)
                sent = end
                carry_out(state.handle(rs.EntryArrived(state.pipeline or "", made), now_s))
            case "lose":
                sent = end
            case "repeat":
                made = entry(max(0, sent - count), sent, state.attempt)
                carry_out(state.handle(rs.EntryArrived(state.pipeline or "", made), now_s))
            case "old":
                made = entry(len(seen), min(len(seen) + count, len(LOG)), state.attempt - 1)
                carry_out(state.handle(rs.EntryArrived(state.pipeline or "", made), now_s))
            case "break":
                carry_out(state.handle(rs.PipelineBroken(state.pipeline or "", "x"), now_s))
            case "refuse":
                carry_out(state.handle(rs.SubmitFailed(state.attempt, None), now_s))
            case "resend" if asked:
                asked = False
                answer = entry(len(state.token_ids), sent, state.attempt)
                pipeline, attempt = state.pipeline or "", state.attempt
                carry_out(state.handle(rs.ResendAnswered(pipeline, attempt, True, answer, True), now_s))
            case _:
                carry_out(state.handle(rs.Tick(), now_s))
        state.check_invariants()
        assert seen == state.token_ids == LOG[: len(seen)]


def test_a_request_under_which_pipelines_break_ends_notices_do_not_count():
    state = rs.ChoiceState("r", 0, [1], SamplingParams(max_tokens=9), 1e9, max_broken=2)
    for number, noticed in enumerate((False, True, True)):
        state.handle(rs.Dispatched(f"p{number}"), 0.0)
        (effect,) = state.handle(rs.PipelineBroken(f"p{number}", "lost", noticed), 0.0)
        assert isinstance(effect, rs.Requeue)
    state.handle(rs.Dispatched("p9"), 0.0)
    (effect,) = state.handle(rs.PipelineBroken("p9", "instance lost"), 0.0)
    assert effect == rs.Fail("2 pipelines broke while they ran it; the last: instance lost")
    assert state.phase is rs.Phase.FINISHED


def test_an_engine_that_died_under_a_request_counts_as_broken():
    state = rs.ChoiceState("r", 0, [1], SamplingParams(max_tokens=9), 1e9, max_broken=2)
    interruption = Interruption(reason="CUDA error", broken=True)
    state.handle(rs.Dispatched("p0"), 0.0)
    effects = arrive(state, 0, 1, interruption=interruption)
    assert isinstance(effects[-1], rs.Requeue)
    state.handle(rs.Dispatched("p1"), 0.0)
    effects = arrive(state, 1, 2, pipeline="p1", attempt=1, interruption=interruption)
    assert effects[-1] == rs.Fail("2 pipelines broke while they ran it; the last: CUDA error")
