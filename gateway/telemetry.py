"""Traces of the gateway: one server span a request, with a span for each wait in the queue and each attempt.

Off unless the usual OTEL_* variables name an exporter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_propagator = TraceContextTextMapPropagator()
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def tracer_provider(environ: Mapping[str, str]) -> TracerProvider | None:
    """A provider with the exporter that `environ` names; None if it names none."""
    exporter = _exporter(environ)
    if exporter is None:
        return None
    # A name given here would win over OTEL_SERVICE_NAME.
    named = {} if environ.get("OTEL_SERVICE_NAME") else {"service.name": "spotserve-gateway"}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def no_tracer() -> Tracer:
    """A tracer whose spans go nowhere."""
    return trace.NoOpTracer()


def _exporter(environ: Mapping[str, str]) -> SpanExporter | None:
    kind = environ.get("OTEL_TRACES_EXPORTER", "")
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or kind == "none":
        return None
    if kind == "console":
        return ConsoleSpanExporter()
    if not kind and not any(environ.get(name) for name in _ENDPOINTS):
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


class RequestTrace:
    """The server span of one request; nothing if nobody traces, neither here nor at the caller."""

    def __init__(self, tracer: Tracer, operation: str, model: str, headers: Mapping[str, str]) -> None:
        self._tracer = tracer
        traceparent = headers.get("traceparent", "")
        self._span: Span | None = None
        if not traceparent and isinstance(tracer, trace.NoOpTracer):
            return
        self._span = tracer.start_span(
            operation,
            context=_propagator.extract({"traceparent": traceparent}),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "spotserve",
                "gen_ai.request.model": model,
            },
        )
        self._context = trace.set_span_in_context(self._span)

    def choice(self, index: int) -> ChoiceTrace:
        return ChoiceTrace(self, index)

    @property
    def is_recorded(self) -> bool:
        return self._span is not None

    def child(self, name: str, attributes: Mapping[str, str | int | float]) -> Span:
        return self._tracer.start_span(name, context=self._context, attributes=dict(attributes))

    def end(self, *, prompt_tokens: int, completion_tokens: int, error: str | None = None) -> None:
        """Close the span; `error` marks it failed."""
        if self._span is None:
            return
        self._span.set_attribute("gen_ai.usage.input_tokens", prompt_tokens)
        self._span.set_attribute("gen_ai.usage.output_tokens", completion_tokens)
        if error is not None:
            self._span.set_status(StatusCode.ERROR, error)
        self._span.end()


class ChoiceTrace:
    """The spans of one choice: at any time it is in the queue, in an attempt, or ended."""

    def __init__(self, request: RequestTrace, index: int) -> None:
        self._request = request
        self._index = index
        self._span: Span | None = None

    def queued(self, reason: str) -> None:
        if not self._request.is_recorded:
            return
        self.end()
        self._span = self._request.child("queue", {"choice": self._index, "reason": reason})

    def attempt(
        self, pipeline: str, attempt: int, reason: str, why: Callable[[], Mapping[str, str | int | float]]
    ) -> None:
        """`why`: what spoke for the pipeline."""
        if not self._request.is_recorded:
            return
        self.end()
        attributes: dict[str, str | int | float] = {
            **why(),
            "choice": self._index,
            "pipeline": pipeline,
            "attempt": attempt,
            "reason": reason,
        }
        self._span = self._request.child("attempt", attributes)

    def event(self, name: str, attributes: Mapping[str, str | int | float]) -> None:
        if self._span is not None:
            self._span.add_event(name, dict(attributes))

    def headers(self) -> dict[str, str]:
        """Trace context for the pipeline: the current span as the parent."""
        carrier: dict[str, str] = {}
        if self._span is not None:
            _propagator.inject(carrier, context=trace.set_span_in_context(self._span))
        return carrier

    def end(self) -> None:
        if self._span is not None:
            self._span.end()
            self._span = None
