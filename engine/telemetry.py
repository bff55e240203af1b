"""Tracing of the engine: set up by the usual OTEL_* variables, off when none is set.

A rank knows the times of a request only when they have passed, so spans are written after the fact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from engine.core.sequence import SequenceKey
from engine.protocol import GenerateRequest, TokenEntry

TRACEPARENT: Final = "traceparent"
_NS_PER_S: Final = 1_000_000_000
_propagator = TraceContextTextMapPropagator()


def configure(service_name: str, environ: Mapping[str, str]) -> None:
    """Install an exporter if the environment names one (OTEL_TRACES_EXPORTER, OTEL_EXPORTER_OTLP_ENDPOINT)."""
    exporter_name = environ.get("OTEL_TRACES_EXPORTER", "")
    endpoint = environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if exporter_name == "none" or environ.get("OTEL_SDK_DISABLED") == "true" or not (exporter_name or endpoint):
        return
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter

    exporter: SpanExporter
    if exporter_name == "console":
        exporter = ConsoleSpanExporter()
    else:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter()
    name = environ.get("OTEL_SERVICE_NAME", service_name)
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)


def shutdown() -> None:
    """Send what is left."""
    provider = trace.get_tracer_provider()
    close = getattr(provider, "shutdown", None)
    if close is not None:
        close()


@dataclass(slots=True)
class _Times:
    traceparent: str
    attempt: int
    submitted_s: float
    first_token_s: float | None = None
    num_tokens: int = 0


class RequestSpans:
    """One span an attempt in the engine, with children: wait or resume (queue, pull, prefill) and decode."""

    def __init__(self, rank: str, pipeline: str) -> None:
        self._tracer = trace.get_tracer("spotserve.engine")
        self._rank = rank
        self._pipeline = pipeline
        self._open: dict[SequenceKey, _Times] = {}

    def submitted(self, request: GenerateRequest, traceparent: str | None, now_s: float) -> None:
        """A request came; it is followed if it brings trace context. Its entries may come before its reply."""
        if traceparent is not None:
            key = SequenceKey(request.request_id, request.choice)
            self._open[key] = _Times(traceparent, request.attempt, now_s)

    def refused(self, request: GenerateRequest) -> None:
        """It was not accepted after all; an older attempt, if there is one, goes on."""
        key = SequenceKey(request.request_id, request.choice)
        times = self._open.get(key)
        if times is not None and times.attempt == request.attempt:
            del self._open[key]

    def ended(self, now_s: float) -> None:
        """The pipeline is over; what has not ended by an entry was broken off."""
        for times in self._open.values():
            self._write(times, "broken", now_s)
        self._open.clear()

    def entry(self, entry: TokenEntry, now_s: float) -> None:
        """Tokens were committed; writes the spans when the sequence ends here."""
        times = self._open.get(SequenceKey(entry.request_id, entry.choice))
        if times is None:
            return
        times.num_tokens += len(entry.ids)
        if entry.ids and times.first_token_s is None:
            times.first_token_s = now_s
            if entry.resume is not None:
                self._write_resume(times, entry, now_s)
        if entry.finish is not None or entry.interruption is not None:
            del self._open[SequenceKey(entry.request_id, entry.choice)]
            self._write(times, str(entry.finish or "interrupted"), now_s)

    def _write_resume(self, times: _Times, entry: TokenEntry, now_s: float) -> None:
        assert entry.resume is not None
        span = self._tracer.start_span(
            "engine.resume",
            _propagator.extract({TRACEPARENT: times.traceparent}),
            start_time=int(times.submitted_s * _NS_PER_S),
            attributes={
                "spotserve.pipeline": self._pipeline,
                "spotserve.attempt": times.attempt,
                "spotserve.pulled_tokens": entry.resume.pulled_tokens,
                "spotserve.recomputed_tokens": entry.resume.recomputed_tokens,
                "spotserve.pull_s": entry.resume.pull_s,
            },
        )
        span.end(int(now_s * _NS_PER_S))

    def _write(self, times: _Times, outcome: str, now_s: float) -> None:
        span = self._tracer.start_span(
            "engine.generate",
            _propagator.extract({TRACEPARENT: times.traceparent}),
            start_time=int(times.submitted_s * _NS_PER_S),
            attributes={
                "spotserve.pipeline": self._pipeline,
                "spotserve.rank": self._rank,
                "spotserve.attempt": times.attempt,
                "spotserve.num_tokens": times.num_tokens,
                "spotserve.outcome": outcome,
            },
        )
        context = trace.set_span_in_context(span)
        first_s = times.first_token_s if times.first_token_s is not None else now_s
        for name, start_s, end_s in (
            ("engine.prefill", times.submitted_s, first_s),
            ("engine.decode", first_s, now_s),
        ):
            child = self._tracer.start_span(name, context, start_time=int(start_s * _NS_PER_S))
            child.end(int(end_s * _NS_PER_S))
        span.end(int(now_s * _NS_PER_S))
