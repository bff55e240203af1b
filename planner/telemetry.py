"""Log lines (one line, key=value) and traces of the planner. Traces are off unless an OTEL_* variable turns them on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

from opentelemetry import propagate, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter

from planner.protocol import Plan


def set_up_logging(level: str) -> None:
    """To stderr; `level` is a name of the logging module."""
    logging.basicConfig(
        level=level,
        stream=sys.stderr,
        format="%(asctime)s.%(msecs)03d %(levelname)s %(name)s %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
    )


def line(event: str, **fields: object) -> str:
    """`event key=value ...`, values quoted where they have to be; never more than one line."""
    return " ".join([event, *(f"{name}={_quoted(value)}" for name, value in fields.items())])


def _quoted(value: object) -> str:
    text = str(value)
    if text and not any(char in ' "=\n\r\t' for char in text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', "'").replace("\n", "\\n").replace("\r", "\\r") + '"'


class Tracing:
    """Spans of the planner; does nothing if tracing is off."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        """`environ`: OTEL_TRACES_EXPORTER (otlp, console, none), else on if OTEL_EXPORTER_OTLP_ENDPOINT is set."""
        exporter = _exporter(environ)
        self._provider: TracerProvider | None = None
        if exporter is not None:
            name = environ.get("OTEL_SERVICE_NAME") or "spotserve-planner"
            self._provider = TracerProvider(resource=Resource.create({"service.name": name}))
            self._provider.add_span_processor(BatchSpanProcessor(exporter))

    def record_plan(self, plan: Plan, decide_s: float, now_s: float) -> dict[str, str]:
        """A span from the cause of `plan` to now; returns the headers that carry its context."""
        if self._provider is None:
            return {}
        explanation = plan.explanation
        config = explanation.chosen
        span = self._provider.get_tracer("planner").start_span("plan", start_time=int(explanation.cause_at_s * 1e9))
        span.set_attributes(
            {
                "spotserve.epoch": plan.epoch,
                "spotserve.cause": explanation.cause,
                "spotserve.config": f"{config.data}x{config.pipeline}x{config.tensor}" if config else "none",
                "spotserve.decide_s": decide_s,
                "spotserve.wait_s": explanation.decided_at_s - explanation.cause_at_s,
                "spotserve.migration_s": explanation.migration_s,
                "spotserve.bytes_moved": explanation.bytes_moved,
                "spotserve.bytes_reused": explanation.bytes_reused,
            }
        )
        headers: dict[str, str] = {}
        propagate.inject(headers, context=trace.set_span_in_context(span))
        span.end(end_time=int(now_s * 1e9))
        return headers

    def close(self) -> None:
        if self._provider is not None:
            self._provider.shutdown()


def _exporter(environ: Mapping[str, str]) -> SpanExporter | None:
    endpoint = environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    kind = environ.get("OTEL_TRACES_EXPORTER") or ("otlp" if endpoint else "none")
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or kind == "none":
        return None
    if kind == "console":
        return ConsoleSpanExporter(out=sys.stderr)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()
