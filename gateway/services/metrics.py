"""Prometheus metrics. Names of vLLM where it has one (load tools and autoscalers look for them), else `spotserve_`.

Several gateway processes on one port share their numbers through files in PROMETHEUS_MULTIPROC_DIR, so that each of
them answers for all. What the pipelines say of themselves every gateway hears whole; it is not added up.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
    multiprocess,
)

from engine.protocol import PipelineState, ResumeStats

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
_DIRECTORY: Final = "PROMETHEUS_MULTIPROC_DIR"
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_WAITING: Final = "vllm:num_requests_waiting"
_QUEUED: Final = "spotserve_gateway_queue_length"


class Metrics:
    """The numbers of one gateway process, and the text for all of them."""

    def __init__(self, model_name: str) -> None:
        directory = os.environ.get(_DIRECTORY)
        if directory:
            _forget_dead(Path(directory))
        self._shared = bool(directory)
        self._registry = CollectorRegistry()
        self._model_name = model_name
        gauge, counter, histogram = self._gauge, self._counter, self._histogram
        self._running = gauge("vllm:num_requests_running", "Sequences that the pipelines run", of_fleet=True)
        self._waiting = gauge(_WAITING, "Requests that wait, in pipelines and gateways", of_fleet=True)
        self._kv_used = gauge("vllm:kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1", of_fleet=True)
        self._pipelines = gauge("spotserve_pipelines_ready", "Pipelines that take requests", of_fleet=True)
        self._queued = gauge(_QUEUED, "Choices that wait in the gateways")
        self._live = gauge("spotserve_gateway_choices_running", "Choices that pipelines run for the gateways")
        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of choices that a pipeline has begun")
        self._output_tokens = counter("vllm:generation_tokens", "Tokens in the engine's log")
        self._cached_tokens = counter("vllm:prefix_cache_hits", "Prompt tokens whose KV was there already")
        self._ended = counter("vllm:request_success", "Choices that have ended by themselves", "finished_reason")
        self._refused = counter("spotserve_requests_refused", "Requests that ended with an error", "code")
        self._migrations = counter("spotserve_migrations", "Times that a choice left its pipeline unfinished")
        self._resumed = counter("spotserve_resumed_requests", "Choices that went on in another pipeline")
        self._recomputed = counter("spotserve_recomputed_tokens", "Tokens computed again for that")
        self._pulled = counter("spotserve_pulled_tokens", "Tokens whose KV was moved instead")
        self._stalled = counter("spotserve_stalled_readers", "Streams cut because the client did not read")
        self.queue_wait_s = histogram("vllm:request_queue_time_seconds", "From arrival until a pipeline is chosen")
        self.first_token_s = histogram("vllm:time_to_first_token_seconds", "From arrival to the first token")
        self.token_s = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean of a choice's tokens after its first", _TOKEN_SECONDS
        )
        self.request_s = histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token")
        self.resume_s = histogram("spotserve_resume_seconds", "From resubmission to the first new token")
        self._cache_labels = {"model_name": model_name, "block_size": "0", "num_gpu_blocks": "0"}

    def add_tokens(self, *, prompt: int, output: int, cached: int) -> None:
        """Since the last call."""
        self._prompt_tokens.inc(prompt)
        self._output_tokens.inc(output)
        self._cached_tokens.inc(cached)

    def ended(self, finish: str) -> None:
        self._ended.labels(self._model_name, finish).inc()

    def refused(self, code: str) -> None:
        self._refused.labels(self._model_name, code).inc()

    def left_pipeline(self) -> None:
        self._migrations.inc()

    def resumed(self, stats: ResumeStats) -> None:
        self._resumed.inc()
        self._recomputed.inc(stats.recomputed_tokens)
        self._pulled.inc(stats.pulled_tokens)
        self.resume_s.observe(stats.waited_s)

    def stalled(self) -> None:
        self._stalled.inc()

    def observe(self, states: Sequence[PipelineState], num_ready: int, num_queued: int, num_running: int) -> None:
        """What is now: of the fleet, and of this process."""
        self._running.set(sum(state.running for state in states))
        self._waiting.set(sum(state.waiting for state in states))
        num_blocks = sum(state.total_kv_blocks for state in states)
        num_free = sum(state.free_kv_blocks for state in states)
        self._kv_used.set((num_blocks - num_free) / num_blocks if num_blocks else 0.0)
        self._pipelines.set(num_ready)
        self._queued.set(num_queued)
        self._live.set(num_running)
        block_size = max((state.kv_block_tokens for state in states), default=0)
        self._cache_labels |= {"block_size": str(block_size), "num_gpu_blocks": str(num_blocks)}

    def text(self) -> bytes:
        """In Prometheus' text format, for all processes of this gateway."""
        registry = self._registry
        if self._shared:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call] # has no types
        return generate_latest(_Collected(self._completed(list(registry.collect()))))

    def _completed(self, families: list[Metric]) -> Iterable[Metric]:
        """With the gateways' queues among the waiting, and the cache's shape."""
        by_name = {family.name: family for family in families}
        queued = sum(sample.value for sample in by_name[_QUEUED].samples) if _QUEUED in by_name else 0
        if _WAITING in by_name:
            waiting = by_name[_WAITING]
            waiting.samples = [one._replace(value=one.value + queued) for one in waiting.samples]
        info = Metric("vllm:cache_config_info", "Shape of the KV cache, all pipelines together", "gauge")
        info.add_sample("vllm:cache_config_info", self._cache_labels, 1)
        return [*families, info]

    def _gauge(self, name: str, text: str, *, of_fleet: bool = False) -> Gauge:
        mode = "livemostrecent" if of_fleet else "livesum"
        gauge = Gauge(name, text, ["model_name"], registry=self._registry, multiprocess_mode=mode)  # type: ignore[arg-type] # a literal
        return gauge.labels(self._model_name)

    def _counter(self, name: str, text: str, label: str | None = None) -> Counter:
        if label is not None:
            return Counter(name, text, ["model_name", label], registry=self._registry)
        return Counter(name, text, ["model_name"], registry=self._registry).labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
        histogram = Histogram(name, text, ["model_name"], registry=self._registry, buckets=buckets)
        return histogram.labels(self._model_name)


class _Collected:
    """What `generate_latest` wants of a registry."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _forget_dead(directory: Path) -> None:
    """Gauges of processes that have ended are not added up any more; what they have counted stays."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in directory.glob("gauge_live*.db"):
        match = re.search(r"_(\d+)\.db$", file.name)
        if match is not None and not _is_alive(int(match[1])):
            with contextlib.suppress(OSError):
                multiprocess.mark_process_dead(match[1])  # type: ignore[no-untyped-call] # has no types


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False
