import subprocess
import sys

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from engine import telemetry
from engine.protocol import FinishReason, GenerateRequest, Interruption, ResumeStats, SamplingParams, TokenEntry
from engine.telemetry import RequestSpans

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    # The global provider can be set once a process only, and the tests share one.
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> RequestSpans:
    return RequestSpans("i0-0", "p1")


def request(attempt: int = 0) -> GenerateRequest:
    return GenerateRequest(
        request_id="r", gateway="g", prompt_ids=[1], attempt=attempt, sampling=SamplingParams(max_tokens=9)
    )


def entry(
    index: int,
    *ids: int,
    finish: FinishReason | None = None,
    interruption: Interruption | None = None,
    resume: ResumeStats | None = None,
) -> TokenEntry:
    return TokenEntry(
        request_id="r",
        choice=0,
        attempt=0,
        index=index,
        ids=list(ids),
        finish=finish,
        interruption=interruption,
        resume=resume,
    )


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_finished_request_is_one_span_of_the_callers_trace_with_prefill_and_decode(
    spans: RequestSpans, exporter: InMemorySpanExporter
) -> None:
    spans.submitted(request(), TRACEPARENT, 10.0)
    spans.entry(entry(0, 5), 11.0)
    spans.entry(entry(1, 6, 7), 12.0)
    assert not exporter.get_finished_spans()
    spans.entry(entry(3, 8, finish=FinishReason.LENGTH), 13.5)
    written = by_name(exporter)
    assert set(written) == {"engine.generate", "engine.prefill", "engine.decode"}
    whole = written["engine.generate"]
    assert whole.parent is not None
    assert (f"{whole.parent.trace_id:032x}", f"{whole.parent.span_id:016x}") == (TRACE_ID, PARENT_ID)
    assert (whole.start_time, whole.end_time) == (10_000_000_000, 13_500_000_000)
    assert whole.attributes is not None
    assert whole.attributes["spotserve.num_tokens"] == 4
    assert whole.attributes["spotserve.outcome"] == "length"
    prefill, decode = written["engine.prefill"], written["engine.decode"]
    assert (prefill.start_time, prefill.end_time) == (10_000_000_000, 11_000_000_000)
    assert (decode.start_time, decode.end_time) == (11_000_000_000, 13_500_000_000)
    assert prefill.parent is not None
    assert whole.context is not None
    assert prefill.parent.span_id == whole.context.span_id


def test_an_interruption_ends_the_span_and_a_resume_has_its_own(
    spans: RequestSpans, exporter: InMemorySpanExporter
) -> None:
    spans.submitted(request(), TRACEPARENT, 10.0)
    spans.entry(entry(0, 5, resume=ResumeStats(pulled_tokens=8, recomputed_tokens=1, pull_s=0.2)), 11.0)
    spans.entry(entry(1, interruption=Interruption(reason="retired")), 12.0)
    written = by_name(exporter)
    assert written["engine.generate"].attributes is not None
    assert written["engine.generate"].attributes["spotserve.outcome"] == "interrupted"
    assert written["engine.resume"].attributes is not None
    assert written["engine.resume"].attributes["spotserve.pulled_tokens"] == 8


def test_requests_of_a_broken_pipeline_are_written_once(spans: RequestSpans, exporter: InMemorySpanExporter) -> None:
    spans.submitted(request(), TRACEPARENT, 10.0)
    spans.entry(entry(0, 5), 11.0)
    spans.ended(12.0)
    spans.ended(13.0)
    assert len(exporter.get_finished_spans()) == 3
    whole = by_name(exporter)["engine.generate"]
    assert whole.attributes is not None
    assert whole.attributes["spotserve.outcome"] == "broken"
    assert whole.end_time == 12_000_000_000


def test_a_refused_request_leaves_nothing_open(spans: RequestSpans, exporter: InMemorySpanExporter) -> None:
    spans.submitted(request(), TRACEPARENT, 10.0)
    spans.refused(request(attempt=1))  # Another attempt than the one that is followed.
    spans.refused(request())
    spans.ended(12.0)
    assert not exporter.get_finished_spans()
    spans.submitted(request(), TRACEPARENT, 10.0)
    spans.refused(request(attempt=1))
    spans.ended(12.0)
    assert exporter.get_finished_spans()


def test_without_trace_context_nothing_is_written(spans: RequestSpans, exporter: InMemorySpanExporter) -> None:
    spans.submitted(request(), None, 10.0)
    spans.entry(entry(0, 5, finish=FinishReason.STOP), 11.0)
    assert not exporter.get_finished_spans()


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"},
        {"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "console"},
    ],
)
def test_off_unless_asked_for(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[object] = []
    monkeypatch.setattr(trace, "set_tracer_provider", installed.append)
    telemetry.configure("test", environ)
    assert not installed


def test_an_exporter_that_the_environment_names_is_installed() -> None:
    # In a process of its own: the global provider can be set once only.
    code = """
from opentelemetry import trace
from engine import telemetry
telemetry.configure("spotserve-engine", {"OTEL_TRACES_EXPORTER": "console"})
trace.get_tracer("test").start_span("a span").end()
telemetry.shutdown()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert '"name": "a span"' in result.stdout
    assert '"service.name": "spotserve-engine"' in result.stdout
