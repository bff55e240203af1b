import math

import msgspec
import pytest

from engine.core.scheduler import (
    ENDED_KEPT,
    ENDED_KEPT_S,
    SCORED_ROWS,
    CostEstimate,
    Scheduler,
    SchedulerLimits,
    SequenceKey,
    StepExtras,
)
from engine.core.sequence import Event, Sequence
from engine.errors import ProtocolError, TransitionError
from engine.protocol import (
    FinishReason,
    GenerateRequest,
    KvHolder,
    KvSource,
    RejectReason,
    ResumeStats,
    SamplingParams,
    TokenEntry,
    TokenLogprobs,
)

EOS = 2
PULL = CostEstimate(prefill_s_per_token=1.0, transfer_bytes_per_s=100.0, transfer_latency_s=1.0, kv_bytes_per_token=10)
HOLDER = KvHolder(rank="r", context_address="a", first_layer=0, last_layer=1, first_group=0, last_group=1)


def make_scheduler(cost=PULL, **limits):
    defaults = {"num_blocks": 64, "block_tokens": 4, "max_batch": 8, "max_model_len": 100}
    return Scheduler(SchedulerLimits(**(defaults | limits)), cost, "p0")


def make_request(request_id="a", num_prompt=3, *, committed=(), source_tokens=None, **fields) -> GenerateRequest:
    sampling = {"max_tokens": 8, "eos_token_ids": [EOS]} | fields.pop("sampling", {})
    source = None
    if source_tokens is not None:
        source = KvSource(
            pipeline="old",
            num_tokens=source_tokens,
            holders=[HOLDER],
            deadline_s=fields.pop("source_deadline_s", None),
        )
    return GenerateRequest(
        request_id=request_id,
        gateway=fields.pop("gateway", "g"),
        prompt_ids=fields.pop("prompt_ids", list(range(10, 10 + num_prompt))),
        committed_ids=list(committed),
        sampling=SamplingParams(**sampling),
        kv_source=source,
        **fields,
    )


def submit(scheduler, *args, now_s=0.0, **fields):
    reply = scheduler.submit(make_request(*args, **fields), now_s)
    assert reply.accepted, reply


def run_step(scheduler, token_id=5, now_s=0.0):
    """One tick and one step from beginning to end; its entries, the tick's among them."""
    _, out = scheduler.tick(now_s)
    step = scheduler.schedule(now_s)
    if step is not None:
        out += scheduler.commit(step.step_id, [token_id for s in step.slices if s.samples], now_s)
    scheduler.check_invariants()
    return [o.entry for o in out]


def rows(step):
    return {s.key.request_id: len(s.token_ids) for s in step.slices}


# --- Submission ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt_ids": []}, "prompt_ids"),
        ({"prompt_ids": [1, -1]}, "prompt_ids"),
        ({"prompt_ids": [1, 50]}, "prompt_ids"),
        ({"committed": [50]}, "committed_ids"),
        ({"sampling": {"max_tokens": 0}}, "sampling.max_tokens"),
        ({"sampling": {"min_tokens": -1}}, "sampling.min_tokens"),
        ({"sampling": {"temperature": -0.1}}, "sampling.temperature"),
        ({"sampling": {"temperature": math.nan}}, "sampling.temperature"),
        ({"sampling": {"temperature": math.inf}}, "sampling.temperature"),
        ({"sampling": {"top_p": 0.0}}, "sampling.top_p"),
        ({"sampling": {"top_p": 1.1}}, "sampling.top_p"),
        ({"sampling": {"top_k": -1}}, "sampling.top_k"),
        ({"sampling": {"min_p": 1.1}}, "sampling.min_p"),
        ({"sampling": {"presence_penalty": math.nan}}, "sampling.presence_penalty"),
        ({"sampling": {"frequency_penalty": math.inf}}, "sampling.frequency_penalty"),
        ({"sampling": {"repetition_penalty": 0.0}}, "sampling.repetition_penalty"),
        ({"sampling": {"logit_bias": {50: 1.0}}}, "sampling.logit_bias"),
        ({"sampling": {"logit_bias": {-1: 1.0}}}, "sampling.logit_bias"),
        ({"sampling": {"logit_bias": {1: math.nan}}}, "sampling.logit_bias"),
        ({"sampling": {"logprobs": 51}}, "sampling.logprobs"),
        ({"sampling": {"logprobs": -1}}, "sampling.logprobs"),
        ({"sampling": {"prompt_logprobs": 51}}, "sampling.prompt_logprobs"),
        ({"prompt_ids": [1] * 2000, "sampling": {"prompt_logprobs": 25}}, "sampling.prompt_logprobs"),
        ({"sampling": {"max_tokens": -1, "prompt_logprobs": 0}}, "sampling.max_tokens"),
        ({"sampling": {"grammar": "start: /a/", "eos_token_ids": []}}, "sampling.eos_token_ids"),
    ],
)
def test_invalid_request_names_its_field(fields, named):
    scheduler = make_scheduler(vocab_size=50)
    reply = scheduler.submit(make_request(**fields), 0.0)
    assert (reply.accepted, reply.reason) == (False, RejectReason.INVALID)
    assert reply.detail.startswith(named + ":")
    assert scheduler.counts().waiting == 0


def test_cancel_of_an_attempt_leaves_newer_ones_alone():
    scheduler = make_scheduler()
    submit(scheduler, attempt=2)
    assert scheduler.cancel("a", 0.0, 1) == []
    [out] = scheduler.cancel("a", 0.0, 2)
    assert out.entry.finish is FinishReason.CANCELLED


# --- Logprobs and what else a step yields ------------------------------------------------------------------------


def logprobs_of(*ids):
    return [TokenLogprobs(-float(token), token) for token in ids]


def run_scored(scheduler, token_id=5):
    """A step whose logprobs tell their token: -id."""
    scheduler.tick(0.0)
    step = scheduler.schedule(0.0)
    extras = StepExtras(
        {s.key: logprobs_of(token_id)[0] for s in step.slices if s.samples},
        {s.key: logprobs_of(*s.scored_ids) for s in step.slices},
    )
    out = scheduler.commit(step.step_id, [token_id] * sum(s.samples for s in step.slices), 0.0, extras)
    scheduler.check_invariants()
    return step, [o.entry for o in out]


def test_the_prompt_is_scored_chunk_by_chunk_and_sent_once():
    scheduler = make_scheduler(max_model_len=200)
    submit(scheduler, num_prompt=SCORED_ROWS + 6, sampling={"prompt_logprobs": 0, "logprobs": 0})
    step, entries = run_scored(scheduler)
    assert ([s.num_logits for s in step.slices], entries) == ([SCORED_ROWS], [])
    step, [entry] = run_scored(scheduler)
    assert [s.num_logits for s in step.slices] == [6]
    assert entry.prompt_logprobs == [None, *logprobs_of(*range(11, 10 + SCORED_ROWS + 6))]
    assert entry.logprobs == logprobs_of(5)
    step, [entry] = run_scored(scheduler, 6)
    assert ([s.num_logits for s in step.slices], entry.prompt_logprobs, entry.logprobs) == ([1], None, logprobs_of(6))
    again = scheduler.resend("a", 0, 0)
    assert again.logprobs == logprobs_of(5, 6)
    assert len(again.prompt_logprobs) == SCORED_ROWS + 6
    assert scheduler.resend("a", 0, 1).prompt_logprobs is None


def test_a_resume_scores_its_prompt_only_if_no_token_has_told_of_it():
    scheduler = make_scheduler()
    scoring = {"prompt_logprobs": 0, "logprobs": 0}
    submit(scheduler, "told", committed=[7], source_tokens=4, sampling=scoring)
    submit(scheduler, "untold", source_tokens=2, sampling=scoring)
    orders, _ = scheduler.tick(0.0)
    assert [order.key.request_id for order in orders] == ["told"], "KV of the prompt does not give its logits"
    scheduler.pull_done(orders[0].key, True, 0.1, 0.0)
    _, entries = run_scored(scheduler)
    assert {e.request_id: e.prompt_logprobs is None for e in entries} == {"told": True, "untold": False}
    assert scheduler.resend("told", 0, 0) is None, "the logprobs of what it was given are not known"
    assert scheduler.resend("told", 0, 1).logprobs == logprobs_of(5)


def test_an_evicted_sequence_scores_its_prompt_anew():
    scheduler = make_scheduler(num_blocks=6, block_tokens=4, max_step_tokens=2)
    submit(scheduler, "old", num_prompt=2, sampling={"max_tokens": 18})
    run_step(scheduler)
    submit(scheduler, "young", num_prompt=13, sampling={"prompt_logprobs": 0, "max_tokens": 2})
    told, num_starts = [], 0
    while scheduler.counts().running + scheduler.counts().waiting:
        step, entries = run_scored(scheduler)
        told += [e for e in entries if e.request_id == "young" and e.prompt_logprobs]
        num_starts += sum(s.key.request_id == "young" and not s.context_tokens for s in step.slices)
    assert num_starts == 2
    [entry] = told
    assert entry.prompt_logprobs == [None, *logprobs_of(*range(11, 23))]


def test_no_tokens_are_made_when_only_the_prompt_is_to_be_scored():
    scheduler = make_scheduler()
    submit(scheduler, sampling={"prompt_logprobs": 0, "max_tokens": 0})
    _, [entry] = run_scored(scheduler)
    assert (entry.ids, entry.finish, len(entry.prompt_logprobs)) == ([], FinishReason.LENGTH, 3)
    assert scheduler.counts().free_kv_blocks == scheduler.counts().total_kv_blocks


def test_a_sequence_that_cannot_go_on_ends_alone():
    scheduler = make_scheduler()
    submit(scheduler, "bad")
    submit(scheduler, "good")
    scheduler.tick(0.0)
    step = scheduler.schedule(0.0)
    out = scheduler.commit(step.step_id, [5, 5], 0.0, StepExtras(errors={SequenceKey("bad", 0): "why"}))
    bad, good = (o.entry for o in out)
    assert (bad.finish, bad.error, bad.ids) == (FinishReason.ERROR, "why", [])
    assert (good.finish, good.ids) == (None, [5])
    scheduler.check_invariants()


def test_the_end_of_a_grammar_ends_the_sequence_whatever_else_was_asked():
    scheduler = make_scheduler()
    submit(scheduler, sampling={"grammar": "start: /a/", "min_tokens": 5, "ignore_eos": True})
    [entry] = run_step(scheduler, EOS)
    assert entry.finish is FinishReason.STOP


def test_token_ids_are_not_bounded_without_a_vocabulary():
    submit(make_scheduler(), prompt_ids=[10**6])


def test_prompt_that_fills_the_model_is_too_long():
    scheduler = make_scheduler(max_model_len=10)
    assert scheduler.submit(make_request(num_prompt=10), 0.0).reason is RejectReason.TOO_LONG
    submit(scheduler, num_prompt=9)
    [entry] = run_step(scheduler)
    assert entry.finish is FinishReason.LENGTH


def test_sequence_that_can_never_fit_alone_is_too_long():
    # 8 prompt + 5 generated tokens, of which the last is never fed: 12 tokens, 3 blocks.
    scheduler = make_scheduler(num_blocks=3)
    reply = scheduler.submit(make_request(num_prompt=8, sampling={"max_tokens": 6}), 0.0)
    assert reply.reason is RejectReason.TOO_LONG
    submit(scheduler, num_prompt=8, sampling={"max_tokens": 5})
    entries = [entry for _ in range(5) for entry in run_step(scheduler)]
    assert entries[-1].finish is FinishReason.LENGTH


def test_waiting_is_bounded():
    scheduler = make_scheduler(max_batch=1)
    for number in range(4):
        submit(scheduler, str(number))
    assert scheduler.submit(make_request("4"), 0.0).reason is RejectReason.FULL
    # A newer attempt of one that waits needs no room.
    submit(scheduler, "3", attempt=1)
    scheduler.tick(0.0)
    submit(scheduler, "4")


def test_draining_takes_nothing_new_and_finishes_what_it_has():
    scheduler = make_scheduler()
    submit(scheduler, sampling={"max_tokens": 1})
    scheduler.drain()
    assert scheduler.submit(make_request("b"), 0.0).reason is RejectReason.DRAINING
    submit(scheduler)
    [entry] = run_step(scheduler)
    assert entry.finish is FinishReason.LENGTH
    assert scheduler.counts().free_slots == 0


def test_attempts():
    scheduler = make_scheduler()
    submit(scheduler, attempt=1)
    submit(scheduler, attempt=1)
    assert scheduler.counts().waiting == 1
    stale = scheduler.submit(make_request(attempt=0), 0.0)
    assert (stale.reason, stale.detail) == (RejectReason.INVALID, "attempt: stale attempt, 1 is known")
    run_step(scheduler, token_id=5)
    submit(scheduler, attempt=2, committed=[5, 6])
    [entry] = run_step(scheduler, token_id=7)
    assert (entry.attempt, entry.index, entry.ids) == (2, 2, [7])


def test_newer_attempt_waits_until_the_older_has_left_its_step():
    scheduler = make_scheduler(num_micro_batches=2)
    submit(scheduler)
    scheduler.tick(0.0)
    step = scheduler.schedule(0.0)
    submit(scheduler, attempt=1)
    submit(scheduler, "b")
    scheduler.tick(0.0)
    assert scheduler.counts().running == 1
    assert rows(scheduler.schedule(0.0)) == {"b": 3}
    assert scheduler.commit(step.step_id, [5], 0.0) == []
    scheduler.tick(0.0)
    assert rows(scheduler.schedule(0.0)) == {"a": 3}
    scheduler.check_invariants()


def test_same_attempt_of_an_ended_sequence_is_not_run_again():
    scheduler = make_scheduler()
    submit(scheduler, sampling={"max_tokens": 1})
    run_step(scheduler)
    submit(scheduler, sampling={"max_tokens": 1})
    assert run_step(scheduler) == []
    submit(scheduler, attempt=1, sampling={"max_tokens": 1})
    assert len(run_step(scheduler)) == 1


# --- Steps -----------------------------------------------------------------------------------------------------


def test_long_prompt_is_prefilled_in_chunks_beside_decodes():
    scheduler = make_scheduler(max_step_tokens=4)
    submit(scheduler, "short", num_prompt=2)
    run_step(scheduler)
    submit(scheduler, "long", num_prompt=7)
    steps = []
    for _ in range(4):
        scheduler.tick(0.0)
        steps.append(scheduler.schedule(0.0))
        scheduler.commit(steps[-1].step_id, [5] * sum(s.samples for s in steps[-1].slices), 0.0)
    assert [rows(step).get("long") for step in steps] == [3, 3, 1, 1]
    assert [rows(step)["short"] for step in steps] == [1, 1, 1, 1]
    long = [step.slices[-1] for step in steps[:2]] + [s for s in steps[2].slices if s.key.request_id == "long"]
    assert [(s.context_tokens, s.samples, len(s.blocks)) for s in long] == [
        (0, False, 1),
        (3, False, 2),
        (6, True, 2),
    ]
    assert [token_id for s in long for token_id in s.token_ids] == list(range(10, 17))


@pytest.mark.parametrize(("num_sequences", "sizes"), [(8, [2, 2, 2, 2]), (6, [2, 2, 1, 1]), (2, [1, 1, 0, 0])])
def test_sequences_are_spread_over_the_micro_batches(num_sequences, sizes):
    scheduler = make_scheduler(num_micro_batches=4)
    for number in range(num_sequences):
        submit(scheduler, str(number), num_prompt=1, sampling={"max_tokens": 50})
    scheduler.tick(0.0)
    steps = [scheduler.schedule(0.0) for _ in range(4)]
    assert [len(step.slices) if step else 0 for step in steps] == sizes
    assert scheduler.schedule(0.0) is None


def test_the_chunks_of_a_lone_prompt_keep_all_stages_busy():
    scheduler = make_scheduler(num_micro_batches=3, max_step_tokens=4)
    submit(scheduler, num_prompt=18)
    scheduler.tick(0.0)
    steps = [scheduler.schedule(0.0) for _ in range(3)]
    assert [(s.slices[0].context_tokens, len(s.slices[0].token_ids)) for s in steps] == [(0, 4), (4, 4), (8, 4)]
    assert scheduler.schedule(0.0) is None
    with pytest.raises(ProtocolError, match="overtaken"):
        scheduler.commit(steps[1].step_id, [], 0.0)
    assert scheduler.commit(steps.pop(0).step_id, [], 0.0) == []
    scheduler.check_invariants()
    steps.append(scheduler.schedule(0.0))
    scheduler.commit(steps.pop(0).step_id, [], 0.0)
    steps.append(scheduler.schedule(0.0))
    assert [s.slices[0].context_tokens for s in steps] == [8, 12, 16]
    assert steps[-1].slices[0].samples
    scheduler.commit(steps.pop(0).step_id, [], 0.0)
    assert scheduler.schedule(0.0) is None, "the first token must come back before it is fed"
    scheduler.commit(steps.pop(0).step_id, [], 0.0)
    [out] = scheduler.commit(steps.pop(0).step_id, [7], 0.0)
    assert out.entry.ids == [7]
    assert [s.token_ids for s in scheduler.schedule(0.0).slices] == [[7]]
    scheduler.check_invariants()


def test_a_cancelled_prompt_keeps_its_blocks_until_all_its_chunks_are_back():
    scheduler = make_scheduler(num_micro_batches=2, max_step_tokens=4)
    submit(scheduler, num_prompt=12)
    scheduler.tick(0.0)
    steps = [scheduler.schedule(0.0), scheduler.schedule(0.0)]
    scheduler.cancel("a", 0.0)
    for step in steps:
        assert scheduler.counts().free_kv_blocks == 61
        scheduler.check_invariants()
        assert scheduler.commit(step.step_id, [], 0.0) == []
    assert scheduler.counts().free_kv_blocks == 64


def test_a_prompt_with_chunks_in_flight_is_not_evicted():
    scheduler = make_scheduler(num_blocks=9, block_tokens=2, num_micro_batches=2, max_step_tokens=2)
    submit(scheduler, "old", num_prompt=3, sampling={"max_tokens": 12})
    run_step(scheduler)
    run_step(scheduler)
    submit(scheduler, "young", prompt_ids=[1] * 12, sampling={"max_tokens": 1})
    scheduler.tick(0.0)
    steps = [scheduler.schedule(0.0), scheduler.schedule(0.0)]
    launched = list(steps)
    num_stalls, ended = 0, []
    while steps:
        step = steps.pop(0)
        out = scheduler.commit(step.step_id, [5] * sum(s.samples for s in step.slices), 0.0)
        ended += [o.entry.request_id for o in out if o.entry.finish]
        step = scheduler.schedule(0.0)
        num_stalls += step is not None and not scheduler.counts().free_kv_blocks and "old" not in rows(step)
        steps += [] if step is None else [step]
        launched += steps[-1:]
        scheduler.check_invariants()
    assert num_stalls, "the older one was to need a block meanwhile"
    chunks = {s.context_tokens for step in launched for s in step.slices if s.key.request_id == "young"}
    assert chunks == {0, 2, 4, 6, 8, 10}, "never from its beginning again"
    assert ended == ["young", "old"]


def test_newcomers_do_not_all_stay_in_the_micro_batch_that_met_them():
    scheduler = make_scheduler(num_micro_batches=2)
    submit(scheduler, "0", num_prompt=1, sampling={"max_tokens": 50})
    scheduler.tick(0.0)
    steps = [scheduler.schedule(0.0)]
    for number in range(1, 8):
        submit(scheduler, str(number), num_prompt=1, sampling={"max_tokens": 50})
    scheduler.tick(0.0)
    for _ in range(6):
        steps.append(scheduler.schedule(0.0))
        done = steps.pop(0)
        scheduler.commit(done.step_id, [5] * len(done.slices), 0.0)
    steps.append(scheduler.schedule(0.0))
    assert [len(step.slices) for step in steps] == [4, 4]


def test_commit_refuses_what_it_did_not_order():
    scheduler = make_scheduler()
    submit(scheduler)
    scheduler.tick(0.0)
    step = scheduler.schedule(0.0)
    with pytest.raises(ProtocolError, match="step 99 is not in flight"):
        scheduler.commit(99, [], 0.0)
    with pytest.raises(ProtocolError, match="samples 1 tokens, not 2"):
        scheduler.commit(step.step_id, [5, 6], 0.0)
    [out] = scheduler.commit(step.step_id, [5], 0.0)
    assert (out.gateway, out.entry.ids) == ("g", [5])
    with pytest.raises(ProtocolError, match="is not in flight"):
        scheduler.commit(step.step_id, [5], 0.0)


@pytest.mark.parametrize(
    ("sampling", "token_ids", "finish"),
    [
        ({"max_tokens": 3}, [5, 5, 5], FinishReason.LENGTH),
        ({}, [5, EOS], FinishReason.STOP),
        ({"ignore_eos": True, "max_tokens": 3}, [EOS, 5, EOS], FinishReason.LENGTH),
        ({"stop_token_ids": [7]}, [5, 5, 7], FinishReason.STOP),
        ({"min_tokens": 2}, [EOS, EOS], FinishReason.STOP),
        ({"min_tokens": 2, "stop_token_ids": [7]}, [7, 5, 7], FinishReason.STOP),
        ({"max_tokens": 50}, [5] * 7, FinishReason.LENGTH),  # max_model_len
    ],
)
def test_finish(sampling, token_ids, finish):
    scheduler = make_scheduler(max_model_len=10)
    submit(scheduler, sampling=sampling)
    entries = [entry for token_id in token_ids for entry in run_step(scheduler, token_id)]
    assert [entry.ids for entry in entries] == [[token_id] for token_id in token_ids]
    assert [entry.finish for entry in entries] == [None] * (len(token_ids) - 1) + [finish]
    assert run_step(scheduler) == []
    assert scheduler.counts().free_kv_blocks == 64


def test_youngest_is_evicted_and_starts_again_with_its_tokens():
    scheduler = make_scheduler(num_blocks=5, block_tokens=2)
    submit(scheduler, "old", num_prompt=2)
    submit(scheduler, "young", num_prompt=2)
    for _ in range(3):
        run_step(scheduler)
    # Both want a third block, one is left.
    assert scheduler.counts().free_kv_blocks == 1
    scheduler.tick(0.0)
    step = scheduler.schedule(0.0)
    assert rows(step) == {"old": 1}
    assert scheduler.counts().waiting == 0
    scheduler.commit(step.step_id, [5], 0.0)
    run_step(scheduler)
    run_step(scheduler)
    assert scheduler.counts().waiting == 1
    entries = [entry for _ in range(20) for entry in run_step(scheduler)]
    ends = [(entry.request_id, entry.finish) for entry in entries if entry.finish]
    assert ends == [("old", FinishReason.LENGTH), ("young", FinishReason.LENGTH)]
    young = [entry for entry in entries if entry.request_id == "young"]
    assert [entry.index for entry in young] == list(range(young[0].index, 8))


def test_younger_waits_with_its_kv_for_a_block_while_the_older_is_in_a_step():
    scheduler = make_scheduler(num_blocks=3, block_tokens=2, num_micro_batches=2, max_batch=2)
    submit(scheduler, "old", num_prompt=2, sampling={"max_tokens": 3})
    submit(scheduler, "young", num_prompt=2, sampling={"max_tokens": 3})
    scheduler.tick(0.0)
    for step in [scheduler.schedule(0.0), scheduler.schedule(0.0)]:
        scheduler.commit(step.step_id, [5], 0.0)
    step = scheduler.schedule(0.0)
    assert rows(step) == {"old": 1}
    assert scheduler.schedule(0.0) is None
    assert (scheduler.counts().running, scheduler.counts().free_kv_blocks) == (2, 0)
    scheduler.commit(step.step_id, [EOS], 0.0)
    assert rows(scheduler.schedule(0.0)) == {"young": 1}
    scheduler.check_invariants()


def test_admission_keeps_a_spare_block_for_each_that_runs():
    scheduler = make_scheduler(num_blocks=6)
    submit(scheduler, "a", num_prompt=8)
    submit(scheduler, "b", num_prompt=12)
    submit(scheduler, "c", num_prompt=1)
    scheduler.tick(0.0)
    assert scheduler.counts().running == 2
    # c would fit, but not with a block to spare for a and b.
    assert (scheduler.counts().waiting, scheduler.counts().free_kv_blocks) == (1, 1)


def test_nobody_overtakes_the_one_that_does_not_fit_yet():
    scheduler = make_scheduler(num_blocks=6)
    submit(scheduler, "a", num_prompt=8)
    submit(scheduler, "big", num_prompt=15)
    submit(scheduler, "small", num_prompt=1)
    scheduler.tick(0.0)
    assert scheduler.counts().running == 1


def test_resumed_sequences_go_before_new_ones():
    scheduler = make_scheduler(max_batch=1)
    submit(scheduler, "new")
    submit(scheduler, "resumed", committed=[5])
    scheduler.tick(0.0)
    assert rows(scheduler.schedule(0.0)) == {"resumed": 4}


# --- Prefix caching ----------------------------------------------------------------------------------------------


def finish(scheduler):
    """Run all there is; the entries by request."""
    log: dict[str, list[TokenEntry]] = {}
    while scheduler.counts().running + scheduler.counts().waiting:
        for entry in run_step(scheduler):
            log.setdefault(entry.request_id, []).append(entry)
    return log


def test_a_sequence_reuses_the_full_blocks_of_what_began_alike():
    scheduler = make_scheduler(block_tokens=4)
    submit(scheduler, "first", num_prompt=10, sampling={"max_tokens": 4})
    [entry, *_] = finish(scheduler)["first"]
    assert entry.cached_tokens == 0
    # 13 tokens were fed: 10 of the prompt and 3 of the output.
    assert scheduler.counts().cached_kv_blocks == 3
    assert scheduler.counts().free_kv_blocks == 64
    submit(scheduler, "alike", prompt_ids=[*range(10, 20), 5, 5, 99, 98], sampling={"max_tokens": 2})
    submit(scheduler, "shorter", num_prompt=8, sampling={"max_tokens": 2})
    submit(scheduler, "different", prompt_ids=[9, *range(11, 20)], sampling={"max_tokens": 2})
    scheduler.tick(0.0)
    step = scheduler.schedule(0.0)
    contexts = {s.key.request_id: s.context_tokens for s in step.slices}
    # The last token is always fed, so that the block that it ends is computed again.
    assert contexts == {"alike": 12, "shorter": 4, "different": 0}
    tables = {s.key.request_id: s.blocks for s in step.slices}
    assert tables["alike"][0] == tables["shorter"][0]
    assert tables["alike"][1] != tables["shorter"][1]
    scheduler.check_invariants()
    out = scheduler.commit(step.step_id, [7] * 3, 0.0)
    assert {o.entry.request_id: o.entry.cached_tokens for o in out} == {"alike": 12, "shorter": 4, "different": 0}
    assert scheduler.resend("alike", 0, 0).cached_tokens == 12
    assert scheduler.resend("alike", 0, 1).cached_tokens == 0
    assert {e.cached_tokens for entries in finish(scheduler).values() for e in entries} == {0}


def test_prefixes_are_shared_with_a_sequence_that_still_runs():
    scheduler = make_scheduler(block_tokens=4)
    submit(scheduler, "a", num_prompt=9, sampling={"max_tokens": 30})
    run_step(scheduler)
    free = scheduler.counts().free_kv_blocks
    submit(scheduler, "b", num_prompt=9)
    run_step(scheduler)
    assert scheduler.counts().free_kv_blocks == free - 1
    scheduler.cancel("a", 0.0)
    finish(scheduler)
    assert scheduler.counts().free_kv_blocks == 64


def test_what_was_used_longest_ago_is_forgotten_first_and_nothing_without_need():
    scheduler = make_scheduler(num_blocks=6, block_tokens=4)
    prompts = {name: [start] * 8 for name, start in (("a", 10), ("b", 20))}
    for name, prompt in prompts.items():
        submit(scheduler, name, prompt_ids=prompt, sampling={"max_tokens": 1})
        finish(scheduler)
    assert scheduler.counts().cached_kv_blocks == 4
    submit(scheduler, "c", num_prompt=12, sampling={"max_tokens": 1})
    finish(scheduler)  # Two blocks were empty, and a's last block went.
    assert {name: len(scheduler._tables.pool.find_prefix(p).blocks) for name, p in prompts.items()} == {"a": 1, "b": 2}


def test_prefixes_are_not_kept_where_that_is_switched_off():
    scheduler = make_scheduler(prefix_caching=False)
    for name in "ab":
        submit(scheduler, name, num_prompt=9)
        assert {e.cached_tokens for e in finish(scheduler)[name]} == {0}
    assert scheduler.counts().cached_kv_blocks == 0


def test_kv_that_is_here_is_not_pulled_and_pulled_kv_can_be_found():
    scheduler = make_scheduler(block_tokens=4)
    submit(scheduler, "pulled", num_prompt=9, committed=[5], source_tokens=9)
    [order], _ = scheduler.tick(0.0)
    scheduler.pull_done(order.key, True, 0.5, 0.0)
    submit(scheduler, "same", num_prompt=9, committed=[5], source_tokens=8)
    submit(scheduler, "more", num_prompt=9, committed=[5], source_tokens=9)
    [order], _ = scheduler.tick(0.0)
    assert order.key.request_id == "more"
    scheduler.check_invariants()
    tables = {name: scheduler._sequences[SequenceKey(name, 0)].blocks for name in ("pulled", "same", "more")}
    assert tables["same"][:2] == tables["pulled"][:2]
    assert not set(order.blocks) & set(tables["pulled"])
    [entry] = [e for e in run_step(scheduler) if e.request_id == "same"]
    assert (entry.resume.pulled_tokens, entry.resume.recomputed_tokens, entry.cached_tokens) == (0, 0, 8)


def test_a_prompt_that_is_to_be_scored_is_computed_from_its_beginning():
    scheduler = make_scheduler(block_tokens=4)
    submit(scheduler, "a", num_prompt=9)
    finish(scheduler)
    submit(scheduler, "b", num_prompt=9, sampling={"prompt_logprobs": 0})
    scheduler.tick(0.0)
    [part] = scheduler.schedule(0.0).slices
    assert (part.context_tokens, part.scored_ids) == (0, list(range(11, 19)))


# --- Resume ----------------------------------------------------------------------------------------------------


def test_pulled_kv_leaves_one_row_to_feed():
    scheduler = make_scheduler()
    submit(scheduler, num_prompt=10, committed=[5, 6], source_tokens=11)
    [order], _ = scheduler.tick(0.0)
    assert (order.source.num_tokens, len(order.blocks), order.source.holders) == (11, 3, [HOLDER])
    assert scheduler.schedule(0.0) is None
    scheduler.pull_done(order.key, True, 0.25, 0.5)
    step = scheduler.schedule(0.5)
    [s] = step.slices
    assert (s.token_ids, s.context_tokens, s.index, s.blocks) == ([6], 11, 2, order.blocks)
    [out] = scheduler.commit(step.step_id, [7], 1.5)
    assert out.entry.index == 2
    assert out.entry.resume == ResumeStats(pulled_tokens=11, recomputed_tokens=0, pull_s=0.25, waited_s=1.5)
    [entry] = run_step(scheduler)
    assert entry.resume is None


def test_partial_pull_prefills_the_rest():
    scheduler = make_scheduler()
    submit(scheduler, num_prompt=10, committed=[5, 6], source_tokens=8)
    [order], _ = scheduler.tick(0.0)
    assert len(order.blocks) == 2
    scheduler.pull_done(order.key, True, 0.25, 0.0)
    step = scheduler.schedule(0.0)
    assert step.slices[0].token_ids == [18, 19, 5, 6]
    [out] = scheduler.commit(step.step_id, [7], 0.0)
    assert (out.entry.resume.pulled_tokens, out.entry.resume.recomputed_tokens) == (8, 0)


def test_last_known_token_is_fed_even_if_its_kv_is_held():
    scheduler = make_scheduler()
    submit(scheduler, num_prompt=10, source_tokens=14)
    [order], _ = scheduler.tick(0.0)
    assert order.source.num_tokens == 9
    scheduler.pull_done(order.key, True, 0.25, 0.0)
    step = scheduler.schedule(0.0)
    assert step.slices[0].token_ids == [19]
    [out] = scheduler.commit(step.step_id, [5], 0.0)
    assert (out.entry.resume.pulled_tokens, out.entry.resume.recomputed_tokens) == (9, 0)


def test_kv_evicted_after_its_pull_counts_as_recomputed():
    scheduler = make_scheduler(num_blocks=6, block_tokens=2, max_batch=2, prefix_caching=False)
    submit(scheduler, "old", num_prompt=2, committed=[5], sampling={"max_tokens": 9})
    submit(scheduler, "pulled", num_prompt=4, committed=[5], source_tokens=4)
    [order], _ = scheduler.tick(0.0)
    num_tokens = 3
    while scheduler.counts().free_kv_blocks or num_tokens < 7:
        num_tokens += len(run_step(scheduler))
    scheduler.pull_done(order.key, True, 0.25, 0.0)
    # Decodes take turns: the older is first, needs a block, and takes it from the one that was just pulled.
    run_step(scheduler)
    assert scheduler.counts().waiting == 1
    scheduler.cancel("old", 0.0)
    [entry] = run_step(scheduler)
    assert (entry.resume.pulled_tokens, entry.resume.recomputed_tokens) == (0, 4)


def test_kv_that_was_pulled_is_not_offered_again():
    scheduler = make_scheduler()
    submit(scheduler, num_prompt=10, source_tokens=9)
    [order], _ = scheduler.tick(0.0)
    scheduler.pull_done(order.key, True, 0.25, 0.0)
    [out] = scheduler.park("killed", [], None)
    assert out.entry.interruption.kv_source is None


def test_failed_pull_is_recomputed():
    scheduler = make_scheduler()
    submit(scheduler, num_prompt=10, committed=[5, 6], source_tokens=11)
    [order], _ = scheduler.tick(0.0)
    scheduler.pull_done(order.key, False, 2.0, 2.0)
    scheduler.check_invariants()
    [entry] = run_step(scheduler)
    assert (entry.resume.pulled_tokens, entry.resume.recomputed_tokens, entry.resume.pull_s) == (0, 11, 2.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_prompt": 2, "source_tokens": 1},  # recompute is sooner
        {"num_prompt": 20, "source_tokens": 0},
        {"num_prompt": 20, "source_tokens": 19, "source_deadline_s": 2.0},  # gone before it is here
        {"num_prompt": 20, "committed": [5]},
    ],
)
def test_kv_not_worth_pulling_is_recomputed(fields):
    scheduler = make_scheduler()
    submit(scheduler, **fields)
    assert scheduler.tick(0.0)[0] == []
    assert scheduler.schedule(0.0).slices[0].context_tokens == 0


@pytest.mark.parametrize(("num_held", "is_pulled"), [(0, False), (1, False), (2, True), (50, True)])
def test_kv_is_pulled_if_that_is_sooner_than_its_prefill(num_held, is_pulled):
    """1 s + 0.1 s a token against 1 s a token."""
    scheduler = make_scheduler()
    submit(scheduler, num_prompt=60, committed=[5], source_tokens=num_held)
    orders, _ = scheduler.tick(0.0)
    assert bool(orders) == is_pulled


def test_pulls_and_prefills_that_are_under_way_count():
    scheduler = make_scheduler(num_blocks=256)
    submit(scheduler, "long", num_prompt=90, committed=[5], source_tokens=90)
    submit(scheduler, "short", num_prompt=10, committed=[5], source_tokens=10)
    submit(scheduler, "shorter", num_prompt=6, committed=[5], source_tokens=6)
    orders, _ = scheduler.tick(0.0)
    # 10 s on the link; then 10 s of prefill are done as soon, and 6 s more of it are not: 1.6 s on the link.
    assert [order.key.request_id for order in orders] == ["long", "shorter"]


def test_complete_resume_finishes_at_once():
    scheduler = make_scheduler()
    submit(scheduler, num_prompt=3, committed=[5, EOS])
    _, [out] = scheduler.tick(0.0)
    assert (out.entry.index, out.entry.ids, out.entry.finish) == (2, [], FinishReason.STOP)
    assert scheduler.counts().running == scheduler.counts().waiting == 0
    scheduler.check_invariants()


def test_pull_done_without_a_pull_is_refused():
    scheduler = make_scheduler()
    submit(scheduler)
    for key in (SequenceKey("a", 0), SequenceKey("b", 0)):
        with pytest.raises(ProtocolError, match="no pull in flight"):
            scheduler.pull_done(key, True, 0.0, 0.0)


# --- Ends ------------------------------------------------------------------------------------------------------


def test_cancel_ends_all_choices_and_frees_blocks_when_the_step_returns():
    scheduler = make_scheduler()
    submit(scheduler, "a")
    submit(scheduler, "a", choice=1)
    submit(scheduler, "b")
    scheduler.tick(0.0)
    step = scheduler.schedule(0.0)
    out = scheduler.cancel("a", 0.0)
    assert [(o.entry.choice, o.entry.finish) for o in out] == [
        (0, FinishReason.CANCELLED),
        (1, FinishReason.CANCELLED),
    ]
    assert scheduler.counts().free_kv_blocks == 61
    [out] = scheduler.commit(step.step_id, [5, 5, 5], 0.0)
    assert out.entry.request_id == "b"
    assert scheduler.counts().free_kv_blocks == 63
    assert scheduler.cancel("a", 0.0) == []
    scheduler.check_invariants()


def test_pull_done_does_not_free_what_a_step_still_writes():
    scheduler = make_scheduler()
    submit(scheduler)
    scheduler.tick(0.0)
    scheduler.schedule(0.0)
    scheduler.cancel("a", 0.0)
    with pytest.raises(ProtocolError, match="no pull in flight"):
        scheduler.pull_done(SequenceKey("a", 0), True, 0.0, 0.0)
    assert scheduler.counts().free_kv_blocks == 63


def test_cancelled_pull_frees_its_blocks_when_it_returns():
    scheduler = make_scheduler()
    submit(scheduler, num_prompt=10, source_tokens=9)
    [order], _ = scheduler.tick(0.0)
    assert len(scheduler.cancel("a", 0.0)) == 1
    assert scheduler.counts().free_kv_blocks == 61
    scheduler.pull_done(order.key, True, 0.1, 0.1)
    assert scheduler.counts().free_kv_blocks == 64
    scheduler.check_invariants()


def test_deadline_drops_waiting_and_running():
    scheduler = make_scheduler(max_batch=1)
    submit(scheduler, "a", deadline_s=10.0)
    submit(scheduler, "b", deadline_s=20.0)
    submit(scheduler, "c")
    assert scheduler.next_deadline_s() == 10.0
    assert [e.finish for e in run_step(scheduler, now_s=9.9)] == [None]
    entries = run_step(scheduler, now_s=20.0)
    assert [(e.request_id, e.finish, e.error) for e in entries] == [
        ("a", FinishReason.ERROR, "deadline"),
        ("b", FinishReason.ERROR, "deadline"),
        ("c", None, None),
    ]
    assert scheduler.next_deadline_s() is None


def test_park_keeps_kv_and_says_where_it_is():
    scheduler = make_scheduler(max_batch=2)
    submit(scheduler, "running", num_prompt=6, deadline_s=50.0)
    run_step(scheduler)
    submit(scheduler, "pulling", num_prompt=10, committed=[5], source_tokens=10)
    submit(scheduler, "resumed", num_prompt=10, committed=[5], source_tokens=10)
    submit(scheduler, "new")
    [order], _ = scheduler.tick(0.0)
    step = scheduler.schedule(0.0)
    with pytest.raises(ProtocolError, match="in flight"):
        scheduler.park("preempted", [HOLDER], 30.0)
    scheduler.commit(step.step_id, [6], 0.0)
    entries = {o.entry.request_id: o.entry for o in scheduler.park("preempted", [HOLDER], 30.0)}
    scheduler.check_invariants()
    sources = {name: entry.interruption.kv_source for name, entry in entries.items()}
    assert sources["running"] == KvSource(pipeline="p0", num_tokens=7, holders=[HOLDER], blocks=[0, 1], deadline_s=30.0)
    assert sources["pulling"] == order.source
    assert sources["resumed"].pipeline == "old"
    assert sources["new"] is None
    assert all(entry.ids == [] and entry.finish is None for entry in entries.values())
    assert entries["running"].index == 2
    counts = scheduler.counts()
    assert (counts.parked, counts.running, counts.waiting, counts.free_slots) == (1, 0, 0, 0)
    # Its client's deadline is another pipeline's business now.
    assert scheduler.next_deadline_s() is None
    assert scheduler.tick(60.0) == ([], [])
    assert scheduler.submit(make_request("late"), 60.0).reason is RejectReason.DRAINING
    assert scheduler.park("again", [HOLDER], 30.0) == []
    scheduler.pull_done(order.key, True, 0.1, 60.0)
    scheduler.release("pulling", 0)
    scheduler.release("running", 0)
    assert scheduler.counts().free_kv_blocks == 64
    scheduler.check_invariants()


def test_park_without_holders_has_lost_its_kv():
    scheduler = make_scheduler()
    submit(scheduler)
    run_step(scheduler)
    [out] = scheduler.park("killed", [], None)
    assert (out.entry.interruption.reason, out.entry.interruption.kv_source) == ("killed", None)
    assert scheduler.counts().free_kv_blocks == 64


def test_cancelled_parked_sequence_ends_without_an_entry():
    scheduler = make_scheduler()
    submit(scheduler)
    run_step(scheduler)
    scheduler.park("preempted", [HOLDER], None)
    assert scheduler.cancel("a", 0.0) == []
    assert scheduler.counts().free_kv_blocks == 64
    scheduler.check_invariants()


def test_release_leaves_a_live_sequence_alone():
    scheduler = make_scheduler()
    submit(scheduler)
    run_step(scheduler)
    scheduler.release("a", 0)
    scheduler.release("unknown", 0)
    assert scheduler.counts().running == 1


def test_resend():
    scheduler = make_scheduler()
    submit(scheduler, committed=[5], sampling={"max_tokens": 3})
    for token_id in (6, 7):
        run_step(scheduler, token_id)
    entry = scheduler.resend("a", 0, 0)
    assert (entry.index, entry.ids, entry.finish) == (0, [5, 6, 7], FinishReason.LENGTH)
    assert scheduler.resend("a", 0, 3).ids == []
    assert scheduler.resend("a", 0, 4) is None
    assert scheduler.resend("a", 0, -1) is None
    assert scheduler.resend("a", 1, 0) is None


def test_ended_sequences_are_kept_for_a_while_and_in_bounded_number():
    scheduler = make_scheduler()
    for number in range(ENDED_KEPT + 2):
        submit(scheduler, str(number), sampling={"max_tokens": 1}, now_s=100.0)
        run_step(scheduler, now_s=100.0)
    scheduler.tick(100.0 + ENDED_KEPT_S - 1)
    assert [scheduler.resend(str(n), 0, 0) is None for n in (0, 1, 2, ENDED_KEPT + 1)] == [True, True, False, False]
    scheduler.tick(100.0 + ENDED_KEPT_S)
    assert scheduler.resend(str(ENDED_KEPT + 1), 0, 0) is None


def test_newer_attempt_is_kept_as_long_as_any_other():
    scheduler = make_scheduler()
    for request_id, attempt, now_s in (("a", 0, 100.0), ("b", 0, 101.0), ("a", 1, 200.0)):
        submit(scheduler, request_id, attempt=attempt, sampling={"max_tokens": 1}, now_s=now_s)
        run_step(scheduler, now_s=now_s)
    scheduler.tick(101.0 + ENDED_KEPT_S)
    assert scheduler.resend("a", 0, 0).attempt == 1
    assert scheduler.resend("b", 0, 0) is None


# --- What keeps it honest --------------------------------------------------------------------------------------


def test_unknown_transition_is_refused():
    sequence = Sequence(make_request(), (1, 0), 0.0)
    with pytest.raises(TransitionError, match="is waiting, which knows no event evict"):
        sequence.apply(Event.EVICT)
    assert sequence.state == "waiting"


def test_broken_invariant_tells_the_story():
    scheduler = make_scheduler()
    submit(scheduler, "lost")
    scheduler.tick(3.5)
    scheduler._tables.pool.allocate(1)
    with pytest.raises(AssertionError, match=r"(?s)1 references, 0 owners.*3\.5.*admit.*lost"):
        scheduler.check_invariants()


@pytest.mark.parametrize("name", ["num_blocks", "block_tokens", "max_batch", "max_model_len", "max_step_tokens"])
def test_limits_are_checked(name):
    with pytest.raises(ValueError, match=f"{name}: must be at least 1"):
        make_scheduler(**{name: 0})


def test_bandwidth_is_checked():
    with pytest.raises(ValueError, match="transfer_bytes_per_s"):
        CostEstimate(1.0, 0.0, 0.0, 1)


def test_entries_survive_the_wire():
    scheduler = make_scheduler()
    submit(scheduler, committed=[5])
    [entry] = run_step(scheduler)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(entry), type=type(entry)) == entry
