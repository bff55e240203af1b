"""The engine's side of a KV cache connector: its objects, a KV pool for each rank, and the calls in their order.

What a block holds is a function of the weights, of the rank's part of the model and of all tokens up to its end: a
block that was loaded into the wrong place, or saved before it was full, makes the tokens behind it wrong.
"""

from __future__ import annotations

import hashlib
import importlib
import pickle
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from trtllm_double.control import control

from tensorrt_llm._torch.pyexecutor.kv_cache_connector import RequestData, SchedulerOutput
from tensorrt_llm.llmapi.llm_args import TorchLlmArgs
from tensorrt_llm.mapping import Mapping

from .model import ModelConfig


@dataclass
class KvRequest:
    """What a connector sees of a request."""

    request_id: int
    ids: list[int]
    """The prompt, and its output as it comes."""
    cache_salt_id: int | None
    num_prompt: int
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_told: int = 0
    """Tokens, and blocks, that the connector was told."""
    num_blocks_told: int = 0

    @property
    def num_new(self) -> int:
        """Tokens that a decode step computes: the newest, of which speculation brings several."""
        return len(self.ids) - self.num_computed if self.num_computed >= self.num_prompt else 0

    def get_tokens(self, _beam: int) -> list[int]:
        return list(self.ids)


class KvConnector:
    def __init__(self, args: TorchLlmArgs, model: ModelConfig, num_blocks: int, weights: bytes) -> None:
        config = args.kv_connector_config
        assert config is not None
        num_layers = model.num_layers
        self._size = args.kv_cache_config.tokens_per_block
        self._weights = weights
        module = importlib.import_module(config.connector_module)
        self._scheduler = getattr(module, config.connector_scheduler_class)(args)
        make_worker = getattr(module, config.connector_worker_class)
        self._mappings = [_mapping(args, rank) for rank in range(args.world_size)]
        self._layers = [mapping.pp_layers(num_layers) for mapping in self._mappings]
        self._workers = [make_worker(args) for _ in self._mappings]
        # Of keys or values in a block, for each layer.
        num_elements = self._size * model.kv_bytes_per_token // (4 * num_layers * args.tensor_parallel_size)
        shapes = [(num_blocks, len(layers), 2, num_elements) for layers in self._layers]
        self._pools = [_pool(rank, shape) for rank, shape in enumerate(shapes)]
        for worker, pool in zip(self._workers, self._pools, strict=True):
            worker.register_kv_caches(pool)
        self._free = deque(range(num_blocks))
        self._requests: dict[int, KvRequest] = {}
        self._finished: list[int] = []
        control.log("connector", scheduler=type(self._scheduler).__name__, workers=len(self._workers))

    def begin(self, request_id: int, ids: list[int], num_on_device: int, salt: str) -> int:
        """A request is admitted; tokens behind those on the device that the connector has."""
        salt_id = int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8], "little") if salt else None
        request = self._requests[request_id] = KvRequest(request_id, ids, salt_id, len(ids))
        num_matched, is_async = self._scheduler.get_num_new_matched_tokens(request, num_on_device)
        if is_async:
            raise RuntimeError("loading in the background is not played")
        assert num_on_device + num_matched < len(ids), "nothing is left to compute"
        request.num_computed = num_on_device + num_matched
        self._allocate(request)
        self._scheduler.update_state_after_alloc(request, list(request.blocks))
        for index in range(num_on_device // self._size):
            self._compute(request, index, (index + 1) * self._size)
        return int(num_matched)

    def iterate(self, scheduled: Sequence[tuple[int, int]]) -> dict[int, bytes]:
        """One iteration, of (request id, tokens); by request what it saw of KV that is not its own."""
        output = SchedulerOutput()
        shares = [(self._requests[request_id], num_tokens) for request_id, num_tokens in scheduled]
        shares = [(request, max(num_tokens, request.num_new)) for request, num_tokens in shares]
        for request, num_tokens in shares:
            self._allocate(request)
            told = output.cached_requests if request.num_told else output.new_requests
            told.append(
                RequestData(
                    request_id=request.request_id,
                    new_tokens=request.ids[request.num_told :],
                    new_block_ids=request.blocks[request.num_blocks_told :],
                    computed_position=request.num_computed,
                    num_scheduled_tokens=num_tokens,
                )
            )
            request.num_told, request.num_blocks_told = len(request.ids), len(request.blocks)
        metadata = pickle.dumps(self._scheduler.build_connector_meta(output))  # It is broadcast.
        for worker in self._workers:
            worker.bind_connector_meta(pickle.loads(metadata))
            worker.start_load_kv(None)
        for worker, layers in zip(self._workers, self._layers, strict=True):
            for layer in layers:
                worker.wait_for_layer_load(layer, None)
        wrong = {request.request_id: self._wrong(request) for request, _ in shares}
        for request, num_tokens in shares:
            self._forward(request, num_tokens)
        finished, self._finished = self._finished, []
        for worker, layers in zip(self._workers, self._layers, strict=True):
            for layer in layers:
                worker.save_kv_layer(layer, None)
            worker.wait_for_save(None)
            assert worker.get_finished(finished, []) == ([], []), "saving in the background is not played"
            worker._clear_connector_meta()
        return {request_id: seen for request_id, seen in wrong.items() if seen}

    def finish(self, request_id: int) -> None:
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        if self._scheduler.request_finished(request, list(request.blocks)):
            raise RuntimeError("saving in the background is not played")
        self._finished.append(request_id)
        self._free.extend(request.blocks)

    def _allocate(self, request: KvRequest) -> None:
        while len(request.blocks) * self._size < len(request.ids):
            request.blocks.append(self._free.popleft())

    def _forward(self, request: KvRequest, num_tokens: int) -> None:
        first, last = request.num_computed, request.num_computed + num_tokens
        for index in range(first // self._size, -(-last // self._size)):
            self._compute(request, index, min(last, (index + 1) * self._size))
        request.num_computed = last

    def _compute(self, request: KvRequest, index: int, end: int) -> None:
        for rank, pool in enumerate(self._pools):
            pool[request.blocks[index]] = self._content(rank, request.ids[:end])

    def _content(self, rank: int, ids: list[int]) -> Any:
        import torch

        rows = []
        for layer in self._layers[rank]:
            facts = f"{layer} {self._mappings[rank].tp_rank} of {self._mappings[rank].tp_size}"
            digest = hashlib.blake2b(self._weights + facts.encode(), digest_size=16)
            digest.update(np.asarray(ids, np.int32).tobytes())
            rows.append(np.frombuffer(digest.digest(), np.uint8))
        _, num_layers, both, num_elements = self._pools[rank].shape
        row_bytes = 2 * both * num_elements
        content = torch.from_numpy(np.tile(np.stack(rows), (1, -(-row_bytes // 16)))[:, :row_bytes].copy())
        return content.view(torch.bfloat16).view(num_layers, both, num_elements)

    def _wrong(self, request: KvRequest) -> bytes:
        """The first block that holds something else than the KV of what stands before it."""
        for index in range(request.num_computed // self._size):
            for rank, pool in enumerate(self._pools):
                held = _bytes_of(pool[request.blocks[index]])
                if held != _bytes_of(self._content(rank, request.ids[: (index + 1) * self._size])):
                    control.log("wrong_kv", request_id=request.request_id, block=index, rank=rank)
                    return held
        return b""


def _mapping(args: TorchLlmArgs, rank: int) -> Mapping:
    tensor, stages = args.tensor_parallel_size, args.pipeline_parallel_size
    mapping = Mapping(args.world_size, rank, args.gpus_per_node or 1, tensor, stages)
    mapping.pp_partition = args.pp_partition
    return mapping


def _bytes_of(block: Any) -> bytes:
    import torch

    return bytes(block.view(torch.uint8).numpy().tobytes())


def _pool(rank: int, shape: tuple[int, ...]) -> Any:
    """A tensor in host memory that says it is on the GPU of the rank."""
    import torch

    class Pool(torch.Tensor):
        @property
        def device(self) -> torch.device:  # type: ignore[override] # a tensor's cannot be set either
            return torch.device("cuda", rank)

    return torch.Tensor._make_subclass(Pool, torch.zeros(shape, dtype=torch.bfloat16))
