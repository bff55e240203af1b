"""The benchmark of the gateway, on a very small scale: the machinery works and its figures mean what they say."""

import asyncio
import json
import sys

import msgspec
import nats
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from deploy.preflight import find_nats_server, free_port
from engine.protocol import (
    EngineSubjects,
    FinishReason,
    GenerateRequest,
    RejectReason,
    ResendReply,
    ResendRequest,
    SamplingParams,
    SubmitReply,
    TokenFrame,
)
from loadtest import gateway_bench
from loadtest.gateway_bench import GatewayOptions
from loadtest.http_load import LoadOptions, LoadProcess
from loadtest.openai_stub import StubOptions
from loadtest.processes import Process
from loadtest.scripted_engine import EngineOptions, ScriptedEngine, set_step

encode, decode = msgspec.msgpack.encode, msgspec.msgpack.decode


@pytest.fixture
def model(tmp_path):
    """A tokenizer and a chat template."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([gateway_bench.TEXT] * 20, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 8192, "eos_token_id": 0}
    (directory / "config.json").write_text(json.dumps(config))
    template = "{% for message in messages %}{{ message.content }}<|end|>{% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": template}))
    return directory


def test_all_figures_of_the_gateway(model, monkeypatch):
    monkeypatch.setattr(gateway_bench, "WARM_UP_S", 0.3)
    options = GatewayOptions(model=model, window_s=1.0, num_connections=4, num_streams=20, with_litellm=False)
    report = gateway_bench.run(options)
    figures = report.figures
    for loop in (figures.requests, figures.tokens, figures.flat_out_tokens):
        assert loop.per_cpu_s >= loop.per_s > 0
        assert loop.tokens_per_event >= 0.99
    # Four streams of 64 tokens at 10 ms a step: no faster than that, whatever the machine.
    assert figures.tokens.per_s <= 4 / gateway_bench.STEP_S * 1.1
    assert figures.delay.num_requests > 0
    assert 0 < figures.delay.p50_ms <= figures.delay.p99_ms
    assert (figures.many.num_streams, figures.many.num_errors) == (20, 0)
    assert figures.many.slowest_share > 0
    assert {check.name for check in report.checks} >= {"added delay, median", "memory of an idle stream"}
    assert str(report)


def test_load_and_stub(tmp_path):
    port = free_port()
    stub = StubOptions(port=port, texts=["a", " b", " c"])
    command = [sys.executable, "-m", "loadtest.openai_stub", msgspec.json.encode(stub).decode()]
    body = gateway_bench.chat_body(stream=True, num_tokens=3)
    with Process("stub", command, tmp_path) as process:
        options = LoadOptions(port=port, path="/v1/chat/completions", body=body, num_connections=2)
        process.wait_until(lambda: can_connect(port))
        throughput = gateway_bench.closed_loop(process, options, 0.5, 3)
        assert throughput.tokens_per_event == 1.0
        assert throughput.per_s > 10
        with LoadProcess(msgspec.structs.replace(options, port=free_port())) as load:
            gateway_bench.until(lambda: load.snapshot().num_errors > 0, "nobody listens there")


def can_connect(port):
    async def connect():
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        await writer.wait_closed()

    try:
        asyncio.run(connect())
    except OSError:
        return False
    return True


async def test_scripted_engine_speaks_the_protocol(tmp_path):
    url = f"nats://127.0.0.1:{free_port()}"
    command = [str(find_nats_server()), "-a", "127.0.0.1", "-p", url.rpartition(":")[2], "-js", "-sd", str(tmp_path)]
    with Process("nats-server", command, tmp_path) as server:
        await asyncio.to_thread(server.wait_until, lambda: can_connect(int(url.rpartition(":")[2])))
        client = await nats.connect(url)
        options = EngineOptions(nats_url=url, model="m", script=[5, 6, 7], num_slots=1, step_s=0.01)
        running = asyncio.create_task(ScriptedEngine(client, options).run())
        subjects = EngineSubjects("m")
        frames = await client.subscribe(subjects.all_tokens_of("gw"))
        await client.flush()

        async def submit(name):
            sampling = SamplingParams(max_tokens=5)
            request = GenerateRequest(request_id=name, gateway="gw", prompt_ids=[1], sampling=sampling)
            reply = await client.request(subjects.submit("p0"), encode(request), timeout=5)
            return decode(reply.data, type=SubmitReply)

        assert (await submit("a")).accepted
        assert (await submit("b")).reason is RejectReason.FULL
        log = [decode((await frames.next_msg(5)).data, type=TokenFrame).entries[0] for _ in range(5)]
        assert [(entry.index, entry.ids) for entry in log] == [(0, [5]), (1, [6]), (2, [7]), (3, [5]), (4, [6])]
        assert [entry.finish for entry in log] == [None] * 4 + [FinishReason.LENGTH]
        assert 0 < (await set_step(client, "m", 3600.0)).by_request_s["a"] < 5
        assert (await submit("c")).accepted
        question = encode(ResendRequest(request_id="c", choice=0, from_index=0))
        reply = await client.request(subjects.resend("p0"), question, timeout=5)
        entry = decode(reply.data, type=ResendReply).entry
        assert entry is not None
        assert entry.ids == []
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await client.close()
