"""`LLM` and `AsyncLLM`: constructor rules, start-up phases, requests, the end."""

from __future__ import annotations

import atexit
import json
import os
import pickle
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

from trtllm_double import gpus
from trtllm_double.control import PhaseFailed, control

from tensorrt_llm._torch.models.checkpoints.hf.checkpoint_loader import HfCheckpointLoader
from tensorrt_llm._torch.models.modeling_utils import CHECKPOINT_LOADER_FORMAT_DEFAULT_MAPPING
from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.executor.engine import Engine
from tensorrt_llm.executor.model import ModelConfig, digest_of_weights
from tensorrt_llm.executor.result import RequestOutput
from tensorrt_llm.executor.utils import RequestError
from tensorrt_llm.executor.workers import JobWorkers, Workers
from tensorrt_llm.mapping import Mapping
from tensorrt_llm.sampling_params import SamplingParams

from .llm_args import TENSORRT_ENGINE_ONLY, LoadFormat, TorchLlmArgs

_NAMED_OUTSIDE_FIELDS = {"_mpi_session", "backend"}


class _Tokenizer:
    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        path = folder / "tokenizer_config.json"
        eos = json.loads(path.read_text()).get("eos_token") if path.exists() else None
        eos = eos["content"] if isinstance(eos, dict) else eos
        self.eos_token_id: int | None = self._tokenizer.token_to_id(eos) if eos else None

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids))


class LLM:
    def __init__(
        self,
        model: str | Path,
        tokenizer: Any = None,
        tokenizer_mode: Literal["auto", "slow"] = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._executor: Engine | None = None
        self._handle: _Handle | None = None
        self._workers: Workers | JobWorkers | None = None
        self.llm_id = f"{os.uname().nodename}-{os.getpid()}-{time.monotonic_ns()}"
        _check_names(kwargs)
        backend = kwargs.pop("backend", "pytorch")
        if backend not in (None, "pytorch", "_autodeploy"):
            raise ValueError(f"Unsupported backend: {backend}")
        os.environ.update(kwargs.get("env_overrides") or {})
        self.args = TorchLlmArgs(
            model=model,
            tokenizer=tokenizer,
            tokenizer_mode=tokenizer_mode,
            skip_tokenizer_init=skip_tokenizer_init,
            trust_remote_code=trust_remote_code,
            tensor_parallel_size=tensor_parallel_size,
            dtype=dtype,
            revision=revision,
            tokenizer_revision=tokenizer_revision,
            **kwargs,
        )
        control.log("start", kwargs={"model": model, "tensor_parallel_size": tensor_parallel_size} | kwargs)
        self._start_number = sum(1 for _ in control.journal("start"))
        if self.args.orchestrator_type == "ray":
            os.environ["TLLM_DISABLE_MPI"] = "1"  # For the whole process, and what it starts.
        if not self._is_deferred():
            self._build()

    def _is_deferred(self) -> bool:
        return False

    def _build(self) -> None:
        args, number = self.args, self._start_number
        control.phase("args", number)
        visible = gpus.visible()
        is_job = os.environ.get("TLLM_SPAWN_PROXY_PROCESS") == "1"
        if args.world_size > len(visible) and not is_job and not os.environ.get("RAY_LOCAL_WORLD_SIZE"):
            raise RuntimeError(f"Only {len(visible)} GPUs are available, but {args.world_size} are required.")
        _check_main_module()
        folder = Path(args.model)
        config = ModelConfig.load(folder)
        if config.num_heads % args.tensor_parallel_size:
            raise ValueError(
                f"num_attention_heads ({config.num_heads}) is not divisible by tp_size ({args.tensor_parallel_size})"
            )
        self._generation = config.generation
        self._tokenizer: _Tokenizer | None = None
        if not args.skip_tokenizer_init:
            self._tokenizer = _Tokenizer(Path(args.tokenizer or folder))
        try:
            control.phase("spawn", number)
            used_bytes = int(control.switches().gpu_memory_bytes * 0.8)
            self._workers = (
                JobWorkers(args.world_size, used_bytes) if is_job else Workers(visible[: args.world_size], used_bytes)
            )
            control.phase("weights", number)
            digest = self._load_weights(config)
            control.phase("kv", number)
            control.phase("warmup", number)
            self._executor = Engine(args, config, self._workers, digest, number)
        except PhaseFailed as error:
            self._stop_workers()
            raise RuntimeError("Executor worker returned error") from error
        except Exception as error:
            self._stop_workers()
            raise RuntimeError("Executor worker returned error") from error
        self._handle = _Handle(self._executor)
        control.log("ready", workers=self._workers.pids, start=number, max_seq_len=self._executor.max_seq_len)
        atexit.register(self.shutdown)

    def _stop_workers(self) -> None:
        if self._workers is not None:
            self._workers.stop()

    def _load_weights(self, config: ModelConfig) -> bytes:
        """A digest of all weights, the same for every shape."""
        args = self.args
        if args.load_format is LoadFormat.DUMMY:
            return b"dummy"
        loader = args.checkpoint_loader
        if loader is None or not control.switches().with_torch:
            loader = CHECKPOINT_LOADER_FORMAT_DEFAULT_MAPPING.get(args.checkpoint_format or "HF", HfCheckpointLoader)()
        found: dict[str, bytes] = {}
        for rank in range(args.world_size):
            mapping = Mapping(
                args.world_size, rank, args.gpus_per_node or 1, args.tensor_parallel_size, args.pipeline_parallel_size
            )
            mapping.pp_partition = args.pp_partition
            own: Any = pickle.loads(pickle.dumps(loader))  # Each rank is a process of its own.
            weights = own.load_weights(str(args.model), mapping=mapping)
            for name, digest in digest_of_weights(config, mapping, weights).items():
                if found.setdefault(name, digest) != digest:
                    raise RuntimeError(f"ranks disagree on {name}")
            own.cleanup()
        return b"".join(digest for _, digest in sorted(found.items()))

    # --- requests ---------------------------------------------------------------------------------------------

    def generate_async(
        self,
        inputs: Any,
        sampling_params: SamplingParams | None = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        streaming: bool = False,
        kv_cache_retention_config: Any = None,
        disaggregated_params: DisaggregatedParams | None = None,
        trace_headers: dict[str, str] | None = None,
        _postproc_params: Any = None,
        scheduling_params: Any = None,
        cache_salt: str | None = None,
    ) -> RequestOutput:
        executor = self._executor
        if executor is None or executor.is_shutdown:
            raise RuntimeError("LLM is shutting down")
        if executor.error is not None:
            error, executor.error = executor.error, None
            executor.shutdown()
            raise error
        if disaggregated_params is not None and self.args.cache_transceiver_config is None:
            raise AssertionError("disaggregated serving needs cache_transceiver_config")
        if lora_request is not None or prompt_adapter_request is not None:
            raise ValueError("LoRA is not enabled")
        if cache_salt is not None and not cache_salt:
            raise ValueError("cache_salt must not be empty")
        params = sampling_params if sampling_params is not None else SamplingParams()
        if not isinstance(params, SamplingParams):
            raise TypeError(f"Expected sampling_params to be SamplingParams, but got {type(params)}")
        prompt, prompt_ids = self._prompt(inputs)
        is_reused = params._is_set_up
        self._set_up(params)
        if len(prompt_ids) > (self.args.max_num_tokens or 8192) and not self.args.enable_chunked_prefill:
            raise RequestError(
                f"The sum of prompt length ({len(prompt_ids)}) should not exceed max_num_tokens "
                f"({self.args.max_num_tokens})"
            )
        request_id = executor.next_id()
        control.log(
            "request",
            request_id=request_id,
            num_prompt=len(prompt_ids),
            reused=is_reused,
            detokenize=params.detokenize,
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            stop=params.stop,
            n=params.n,
            end_id_given=getattr(params, "_end_id_given", False),
            processors=params.logits_processor is not None,
        )
        result = RequestOutput(  # It belongs to the loop that runs here, if one does.
            request_id,
            prompt,
            prompt_ids,
            params,
            streaming=streaming,
            executor=self._handle,
            decode=self._tokenizer.decode if self._tokenizer is not None else None,
        )
        control.log("made", request_id=request_id, loop=id(result.queue.loop) if result.queue.loop else None)
        executor.submit(result, params, prompt_ids, cache_salt or "")
        return result

    def _prompt(self, inputs: Any) -> tuple[str | None, list[int]]:
        if isinstance(inputs, dict):
            inputs = inputs.get("prompt_token_ids", inputs.get("prompt"))
        if isinstance(inputs, str):
            if self._tokenizer is None:
                raise ValueError("tokenizer is required to tokenize the prompt")
            return inputs, self._tokenizer.encode(inputs)
        if not isinstance(inputs, list):
            raise TypeError(f"The inputs must be type str or list of int, but got {type(inputs)}")
        assert isinstance(inputs[0], int)  # IndexError for an empty one, as there.
        return None, inputs

    def _set_up(self, params: SamplingParams) -> None:
        if params.end_id is None:
            if self._tokenizer is None:
                raise ValueError("tokenizer is required to initialize a default sampling_params")
            params._setup(self._tokenizer, self._generation)
        elif not params._is_set_up:
            control.log("end_id_given")
        params._is_set_up = True
        params._stream_interval = self.args.stream_interval
        params.return_perf_metrics = params.return_perf_metrics or self.args.return_perf_metrics

    def generate(
        self,
        inputs: Any,
        sampling_params: Any = None,
        use_tqdm: bool = True,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        kv_cache_retention_config: Any = None,
        disaggregated_params: Any = None,
        scheduling_params: Any = None,
        cache_salt: Any = None,
    ) -> Any:
        if isinstance(inputs, list) and inputs and not isinstance(inputs[0], int):
            return [self.generate(one, sampling_params, use_tqdm) for one in inputs]
        return self.generate_async(
            inputs,
            sampling_params,
            lora_request,
            prompt_adapter_request,
            disaggregated_params=disaggregated_params,
            cache_salt=cache_salt,
        ).result()

    # --- the rest ---------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> _Tokenizer | None:
        return self._tokenizer

    def get_stats(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        executor = self._executor
        if executor is None or not executor.has_served:
            return []
        time.sleep(timeout or 0.0)
        stats, executor.stats = executor.stats, []
        return stats

    async def get_stats_async(self, timeout: float | None = 2) -> AsyncIterator[dict[str, Any]]:
        import asyncio

        for entry in await asyncio.to_thread(self.get_stats, timeout):
            yield entry

    def get_kv_cache_events(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        assert self._executor is not None
        assert self._executor.has_served, "no request was served yet"
        return []

    async def get_kv_cache_events_async(self, timeout: float | None = 2) -> AsyncIterator[dict[str, Any]]:
        for entry in self.get_kv_cache_events(timeout):
            yield entry

    def _check_health(self) -> bool:
        """Only whether nobody has called shutdown."""
        return self._executor is not None and not self._executor.is_shutdown

    def _collective_rpc(self, method: str, *_args: Any, **_kwargs: Any) -> list[Any]:
        if self.args.orchestrator_type != "ray":
            raise ValueError(f"Executor type {type(self._executor)} does not support collective RPC.")
        raise NotImplementedError(method)

    def shutdown(self) -> None:
        executor = self._executor
        if executor is not None:
            executor.shutdown()
            self._executor = self._handle = None
        atexit.unregister(self.shutdown)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def __getstate__(self) -> Any:
        raise RuntimeError("LLM object can not be pickled.")


class AsyncLLM(LLM):
    """Ray only; its workers start when it is awaited."""

    def __init__(
        self,
        placement_groups: Any = None,
        placement_bundle_indices: Any = None,
        per_worker_gpu_share: float | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        kwargs |= {"orchestrator_type": "ray", "allreduce_strategy": "NCCL"}
        kwargs.setdefault("ray_worker_extension_cls", "tensorrt_llm.llmapi.rlhf_utils.WorkerExtension")
        super().__init__(*args, **kwargs)

    def _is_deferred(self) -> bool:
        return True

    async def setup_async(self) -> AsyncLLM:
        import asyncio

        if self._executor is None:
            await asyncio.to_thread(self._build)
        return self

    def __await__(self) -> Any:
        return self.setup_async().__await__()

    async def __aenter__(self) -> AsyncLLM:
        return await self.setup_async()

    async def __aexit__(self, *_: object) -> None:
        self.shutdown()

    def __enter__(self) -> AsyncLLM:
        raise RuntimeError("Please use 'async with AsyncLLM' instead")

    async def release(self, tags: list[str]) -> None:
        raise NotImplementedError

    async def resume(self, tags: list[str]) -> None:
        raise NotImplementedError

    async def update_weights(self, weights: dict[str, Any]) -> None:
        raise NotImplementedError

    async def collective_rpc(
        self, method: str, args: tuple = (), kwargs: dict | None = None, unique_reply_rank: int | None = None
    ) -> list[Any]:
        raise NotImplementedError


class _Handle:
    """What a result holds weakly of its executor: gone once that was shut down."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def abort_request(self, request_id: int) -> None:
        self._engine.abort(request_id)

    def shutdown(self) -> None:
        self._engine.shutdown()


def _check_names(kwargs: dict[str, Any]) -> None:
    for name in kwargs:
        if name in TENSORRT_ENGINE_ONLY:
            raise ValueError(f"{name} is only for the TensorRT engine: use tensorrt_llm._tensorrt_engine.LLM")
        if name not in TorchLlmArgs.model_fields and name not in _NAMED_OUTSIDE_FIELDS:
            raise ValueError(f"LLM got invalid argument: {name}")


def _check_main_module() -> None:
    """Workers import the main module again: without a guard each would start engines of its own."""
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    if path is not None and Path(path).suffix == ".py" and "__name__" not in Path(path).read_text():
        raise RuntimeError('the main module has no `if __name__ == "__main__":` guard')
