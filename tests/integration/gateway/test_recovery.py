"""Streams outlive what happens to pipelines and to the bus: same tokens, none lost, none twice."""

import asyncio
import json

import msgspec
import openai
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from engine.protocol import RejectReason
from planner.protocol import LoadReport


async def until(condition, timeout_s=10.0):
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


class Stream:
    """A streamed completion that is read in the background; `ids` grows."""

    def __init__(self, stack, **arguments):
        body = {"model": "tiny-chat", "prompt": "abc", "max_tokens": 60, "seed": 7, **arguments}
        self._body = {**body, "stream": True, "return_token_ids": True}
        self._stack = stack
        self.ids = []
        self.events = []
        self.task = asyncio.create_task(self._read())

    async def _read(self):
        async with self._stack.http.stream("POST", "/v1/completions", json=self._body) as response:
            self.response = response
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                self.events.append(event)
                if "choices" in event:
                    self.ids.extend(event["choices"][0]["token_ids"])

    @property
    def text(self):
        return "".join(event["choices"][0]["text"] for event in self.events)

    async def progress(self, num_tokens):
        await until(lambda: len(self.ids) >= num_tokens)


@pytest.mark.parametrize("with_kv", [True, False])
async def test_interruption_resumes_in_the_heir(stack, expected, tokenizer, with_kv):
    engine, p0 = stack.engine, stack.engine.pipelines["p0"]
    stream = Stream(stack)
    await stream.progress(5)
    p1, p2 = await engine.add("p1"), await engine.add("p2")
    await engine.plan("p1", "p2", inherits={"p2": ["p0"]}, retiring={"p0": False})
    for pipeline in (p1, p2):
        await pipeline.publish_state()
    await stack.until_ready("p1", "p2")
    await p0.interrupt(with_kv=with_kv)
    await stream.task
    first, resumed = p0.submitted[0], p2.submitted[0]
    assert not p1.submitted
    assert stream.ids == expected(first)
    assert stream.text == tokenizer.decode(expected(first))
    assert (resumed.attempt, resumed.sampling) == (1, first.sampling)
    assert resumed.committed_ids == expected(first)[: len(resumed.committed_ids)]
    assert len(resumed.committed_ids) >= 5
    if with_kv:
        assert resumed.kv_source.num_tokens == len(resumed.committed_ids)
        await until(lambda: engine.released)
        rank, message = engine.released[0]
        assert (rank, message.pipeline, message.request_id) == ("p0-rank", "p0", first.request_id)
    else:
        assert resumed.kv_source is None


async def test_broken_pipeline_is_left_at_once(stack, expected):
    engine, p0 = stack.engine, stack.engine.pipelines["p0"]
    streams = [Stream(stack, seed=seed) for seed in range(4)]
    for stream in streams:
        await stream.progress(5)
    p1 = await engine.add("p1")
    await p0.kill()
    await engine.plan("p1", retiring={"p0": True})
    for stream in streams:
        await stream.task
    by_seed = {request.sampling.seed: request for request in p0.submitted}
    for seed, stream in enumerate(streams):
        assert stream.ids == expected(by_seed[seed])
    assert all(r.attempt == 1 and r.kv_source is None and r.committed_ids for r in p1.submitted)


async def test_silent_pipeline_that_the_plan_dropped_unseen(stack, expected):
    """No plan reaches the gateway about p0; a resend answer "unknown" tells that the sequence is lost."""
    p0 = stack.engine.pipelines["p0"]
    stream = Stream(stack)
    await stream.progress(5)
    for task in p0._tasks.values():
        task.cancel()
    request = p0.submitted[0]
    p0._entries.clear()
    p0._tasks["state"] = asyncio.create_task(p0._publish_states())
    await stream.task
    assert stream.ids == expected(request)
    assert p0.submitted[1].attempt == 1


async def test_retiring_pipeline_that_never_hands_back(stack, expected):
    engine, p0 = stack.engine, stack.engine.pipelines["p0"]
    stream = Stream(stack)
    await stream.progress(5)
    await engine.add("p1")
    await p0.kill()
    await engine.plan("p1", retiring={"p0": False})
    await stream.task
    assert stream.ids == expected(p0.submitted[0])


async def test_lost_frames_are_asked_for_again(stack, expected):
    p0 = stack.engine.pipelines["p0"]
    p0.lost_indices = {0, 7, 8, 20, 59}
    stream = Stream(stack)
    await stream.task
    assert stream.ids == expected(p0.submitted[0])
    assert {r.from_index for r in p0.resends} >= {0, 7, 20, 59}
    assert len(p0.submitted) == 1


async def test_no_pipeline_then_one(make_stack, expected):
    stack = await make_stack()
    stream = Stream(stack)
    await stack.until_counts(waiting=1)
    p0 = await stack.engine.add("p0")
    await stack.engine.plan("p0")
    await stack.ready()
    await stream.task
    assert stream.ids == expected(p0.submitted[0])


async def test_nothing_left_then_another_instance(stack, expected):
    """Down to no pipeline, the interrupted request waits, and goes on with what comes later."""
    engine, p0 = stack.engine, stack.engine.pipelines["p0"]
    stream = Stream(stack)
    await stream.progress(5)
    await engine.plan(retiring={"p0": False})
    await p0.interrupt(with_kv=False)
    await stack.until_counts(running=0, waiting=1)
    await engine.plan()
    await engine.add("p1")
    await engine.plan("p1")
    await stream.task
    assert stream.ids == expected(p0.submitted[0])


async def test_no_pipeline_is_503_in_time(make_stack):
    stack = await make_stack(no_pipeline_timeout_s=0.3)
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as caught:
            await stack.sdk.completions.create(model="tiny-chat", prompt="abc", stream=stream)
        assert caught.value.status_code == 503
        assert caught.value.type == "service_unavailable_error"
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60


async def test_busy_pipelines_are_503_after_the_queue_timeout(make_stack):
    stack = await make_stack(queue_timeout_s=0.3)
    await stack.engine.add("p0", free_slots=0)
    await stack.engine.plan("p0")
    await stack.ready()
    with pytest.raises(openai.InternalServerError) as caught:
        await stack.sdk.completions.create(model="tiny-chat", prompt="abc")
    assert "busy" in caught.value.message


async def test_full_queue_is_429(make_stack):
    stack = await make_stack(max_queue=2)
    waiting = [Stream(stack) for _ in range(2)]
    await stack.until_counts(waiting=2)
    with pytest.raises(openai.RateLimitError) as caught:
        await stack.sdk.completions.create(model="tiny-chat", prompt="abc")
    assert caught.value.code == "queue_full"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    for stream in waiting:
        stream.task.cancel()
    await asyncio.gather(*(stream.task for stream in waiting), return_exceptions=True)
    await stack.until_counts(waiting=0)


async def test_time_limit_ends_a_stream_with_an_error_event(make_stack):
    stack = await make_stack(request_timeout_s=0.5)
    p0 = await stack.engine.add("p0", step_s=0.05)
    await stack.engine.plan("p0")
    await stack.ready()
    stream = Stream(stack)
    await stream.task
    assert stream.events[-1]["error"]["type"] == "timeout_error"
    assert stream.ids
    assert stream.events[-2]["choices"][0]["finish_reason"] is None
    await until(lambda: p0.cancelled)


async def test_more_requests_than_slots(make_stack, expected):
    stack = await make_stack()
    for name in ("p0", "p1"):
        await stack.engine.add(name, free_slots=2, step_s=0.002)
    await stack.engine.plan("p0", "p1")
    await stack.ready()
    streams = [Stream(stack, seed=seed, max_tokens=20) for seed in range(12)]
    await asyncio.gather(*(stream.task for stream in streams))
    submitted = {r.sampling.seed: r for pipeline in stack.engine.pipelines.values() for r in pipeline.submitted}
    assert [s.ids for s in streams] == [expected(submitted[seed]) for seed in range(12)]
    assert all(pipeline.submitted for pipeline in stack.engine.pipelines.values())


async def test_unseeded_request_keeps_its_seed(stack, expected):
    engine, p0 = stack.engine, stack.engine.pipelines["p0"]
    stream = Stream(stack, seed=None)
    await stream.progress(5)
    p1 = await engine.add("p1")
    await engine.plan("p1", retiring={"p0": True})
    await p0.kill()
    await stream.task
    assert p1.submitted[0].sampling == p0.submitted[0].sampling
    assert stream.ids == expected(p0.submitted[0])


async def test_refusals_are_retried_elsewhere(stack, expected):
    engine, p0 = stack.engine, stack.engine.pipelines["p0"]
    p1 = await engine.add("p1")
    await engine.plan("p0", "p1")
    await stack.ready()
    await p1.publish_state()
    p0.refuse_with = [RejectReason.FULL] * 50
    stream = Stream(stack)
    await stream.task
    assert stream.ids == expected(p1.submitted[0])


async def test_nats_restart(tmp_path, nats_factory, make_stack, expected):
    server = nats_factory(tmp_path)
    stack = await make_stack(url=server.url)
    p0 = await stack.engine.add("p0", step_s=0.05)
    await stack.engine.plan("p0")
    await stack.ready()
    streams = [Stream(stack, seed=seed) for seed in range(3)]
    for stream in streams:
        await stream.progress(3)
    await asyncio.to_thread(server.stop)
    await until(lambda: not stack.engine.client.is_connected)
    p0.lost_indices = set(range(10, 40))
    await asyncio.sleep(2)
    assert not any(stream.task.done() for stream in streams)
    await asyncio.to_thread(server.start)
    for stream in streams:
        await stream.task
    by_seed = {request.sampling.seed: request for request in p0.submitted}
    assert [s.ids for s in streams] == [expected(by_seed[seed]) for seed in range(3)]
    assert all(r.attempt == 0 for r in p0.submitted)


async def test_trace_of_an_interrupted_request(make_stack, expected):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    stack = await make_stack(tracer=provider.get_tracer("test"))
    engine = stack.engine
    p0 = await engine.add("p0")
    await engine.plan("p0")
    await stack.ready()
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    stack.http.headers["traceparent"] = f"00-{trace_id}-b7ad6b7169203331-01"
    stream = Stream(stack)
    await stream.progress(5)
    p1 = await engine.add("p1")
    await engine.plan("p1", retiring={"p0": False})
    await p1.publish_state()
    await p0.interrupt(with_kv=True)
    await stream.task
    await until(lambda: any(s.name == "text_completion" for s in exporter.get_finished_spans()))
    spans = exporter.get_finished_spans()
    assert sorted(s.name for s in spans) == ["attempt", "attempt", "queue", "queue", "text_completion"]
    assert {format(s.context.trace_id, "032x") for s in spans} == {trace_id}
    attempts = [s for s in spans if s.name == "attempt"]
    attributes = [dict(s.attributes or {}) for s in attempts]
    assert [(a["pipeline"], a["attempt"]) for a in attributes] == [("p0", 0), ("p1", 1)]
    assert p1.headers[0]["traceparent"].split("-")[2] == format(attempts[1].context.span_id, "016x")
    server_span = next(s for s in spans if s.name == "text_completion")
    assert dict(server_span.attributes or {})["gen_ai.usage.output_tokens"] == 60


async def test_keep_alive_comments_only_in_silence(make_stack):
    stack = await make_stack(keep_alive_s=0.1)
    await stack.engine.add("p0", step_s=0.25)
    await stack.engine.plan("p0")
    await stack.ready()
    body = {"model": "tiny-chat", "prompt": "abc", "max_tokens": 3, "stream": True}
    events = (await stack.http.post("/v1/completions", json=body)).content.split(b"\n\n")
    assert events[0].startswith(b"data: {")
    assert events.count(b": keep-alive") == 4
    assert events[-2:] == [b"data: [DONE]", b""]


async def test_slow_reader_blocks_only_itself(stack, expected):
    """A client that does not read; the others go on, and it gets everything later."""
    p0 = stack.engine.pipelines["p0"]
    p0.step_s = 0
    body = {"model": "tiny-chat", "prompt": "abc", "max_tokens": 200, "n": 8, "stream": True}
    async with stack.http.stream("POST", "/v1/completions", json={**body, "return_token_ids": True}) as slow:
        await until(lambda: len(p0.submitted) == 8)
        fast = Stream(stack, max_tokens=20)
        await fast.task
        assert fast.ids == expected(next(r for r in p0.submitted if r.sampling.seed == 7))
        ids: dict[int, list[int]] = {i: [] for i in range(8)}
        async for line in slow.aiter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                ids[choice["index"]] += choice["token_ids"]
    by_choice = {r.choice: r for r in p0.submitted if r.sampling.max_tokens == 200}
    assert ids == {i: expected(by_choice[i]) for i in range(8)}


async def test_load_is_reported(stack):
    reports = []

    async def on_report(message):
        reports.append(msgspec.msgpack.decode(message.data, type=LoadReport))

    client = stack.engine.client
    await client.subscribe(f"{stack.engine.subjects.prefix}.load.*", cb=on_report)
    stack.engine.pipelines["p0"].step_s = 0.1
    stream = Stream(stack, max_tokens=20, prompt=[5, 6, 7])
    await until(lambda: any(report.running for report in reports))
    await stream.task
    await until(lambda: reports[-1].mean_output_tokens)
    last = reports[-1]
    assert (last.gateway, last.mean_prompt_tokens, last.mean_output_tokens) == ("gw", 3.0, 20.0)
    assert last.arrivals_per_s == pytest.approx(1 / 30)


async def test_malformed_messages_are_dropped(stack, expected):
    engine, p0 = stack.engine, stack.engine.pipelines["p0"]
    stream = Stream(stack)
    await stream.progress(3)
    for subject in (
        engine.subjects.tokens("gw", "p0"),
        engine.subjects.state("p0"),
        f"{engine.subjects.prefix}.plan",
    ):
        for data in (b"", b"\xc1", b"\x81\xa4type\xa5Other"):
            await engine.client.publish(subject, data)
    await stream.task
    assert stream.ids == expected(p0.submitted[0])
