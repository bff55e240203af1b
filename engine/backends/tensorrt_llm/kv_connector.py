"""TensorRT-LLM's KV cache connector over `kv_store`: blocks outlive their engine, for the next one of the same shape.

Off by default, and never run on hardware: see the README. Imported by the engine's processes alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from tensorrt_llm._torch.pyexecutor.kv_cache_connector import KvCacheConnectorScheduler, KvCacheConnectorWorker

from engine.backends.tensorrt_llm.kv_store import KvFiles, chain, read_identity


@dataclass(slots=True)
class Blocks:
    """What the ranks have to do in one iteration: (key, block id)."""

    loads: list[tuple[str, int]] = field(default_factory=list)
    saves: list[tuple[str, int]] = field(default_factory=list)


@dataclass(slots=True)
class _Known:
    root: bytes
    tokens: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    first_load: int = 0
    num_loads: int = 0
    num_saved: int = 0


class BlockScheduler(KvCacheConnectorScheduler):
    """On rank 0: which blocks are loaded and saved."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        self._identity = read_identity()
        self._files = KvFiles(self._identity)
        self._known: dict[int, _Known] = {}

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens behind those on the device whose blocks are kept here; the last token is always computed."""
        size, tokens = self._identity.block_tokens, list(request.get_tokens(0))
        known = _Known(self._identity.root(getattr(request, "cache_salt_id", None)))
        self._known[request.request_id] = known
        if num_computed_tokens % size:
            return 0, False
        keys = chain(known.root, tokens, size)[: (len(tokens) - 1) // size]
        known.first_load = num_computed_tokens // size
        for key in keys[known.first_load :]:
            if not self._files.has(key):
                break
            known.num_loads += 1
        return known.num_loads * size, False

    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        """The blocks come with the iteration."""

    def build_connector_meta(self, scheduler_output: Any) -> Blocks:
        """What this iteration completes is saved behind it; what a new request matched is loaded before."""
        work = Blocks()
        for data in scheduler_output.new_requests:
            known = self._known.setdefault(data.request_id, _Known(self._identity.root(None)))
            self._extend(known, data)
            for index in range(known.first_load, known.first_load + known.num_loads):
                work.loads.append((known.keys[index], known.block_ids[index]))
            known.num_saved = known.first_load + known.num_loads
            self._save(known, data, work)
        for data in scheduler_output.cached_requests:
            if data.request_id in self._known:
                known = self._known[data.request_id]
                self._extend(known, data)
                self._save(known, data, work)
        return work

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        """All saves are done in their iteration: nothing is left to wait for."""
        self._known.pop(request.request_id, None)
        return False

    def _extend(self, known: _Known, data: Any) -> None:
        known.tokens += data.new_tokens
        known.block_ids += data.new_block_ids
        size = self._identity.block_tokens
        num_full = len(known.tokens) // size
        if num_full > len(known.keys):
            parent = bytes.fromhex(known.keys[-1]) if known.keys else known.root
            known.keys += chain(parent, known.tokens[len(known.keys) * size :], size)

    def _save(self, known: _Known, data: Any, work: Blocks) -> None:
        """Blocks that are full once this iteration has run."""
        num_computed = data.computed_position + data.num_scheduled_tokens
        num_full = min(num_computed // self._identity.block_tokens, len(known.keys), len(known.block_ids))
        for index in range(known.num_saved, num_full):
            if not self._files.has(known.keys[index]):
                work.saves.append((known.keys[index], known.block_ids[index]))
        known.num_saved = max(known.num_saved, num_full)


class BlockWorker(KvCacheConnectorWorker):
    """On every rank: copies its slice of a block between the pool and the files."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        self._files = KvFiles(read_identity())
        self._pool: torch.Tensor | None = None

    def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None:
        self._pool = kv_cache_tensor
        facts = f"{list(kv_cache_tensor.shape)} strides {list(kv_cache_tensor.stride())} {kv_cache_tensor.dtype}"
        self._files.note_layout(self._rank, facts)

    @property
    def _rank(self) -> int:
        """On one node the number of its GPU."""
        assert self._pool is not None, "no KV cache was registered"
        return self._pool.device.index or 0

    def start_load_kv(self, stream: Any) -> None:
        """Before the forward pass."""
        for key, block in self._work().loads:
            data, target = self._files.read(key, self._rank), self._block(block)
            if data is None or len(data) != target.numel():
                # The engine counts on it: to go on would be to answer from another prompt's KV. The next one must not.
                self._files.forget(key, self._rank)
                raise RuntimeError(f"KV block {key} of rank {self._rank} is gone, or has another size")
            target.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8).view(target.shape))

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """Loads are done before the pass begins."""

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """Whole blocks are saved behind the pass."""

    def wait_for_save(self, stream: Any) -> None:
        """Behind the forward pass."""
        work = self._work()
        if work.saves and hasattr(stream, "synchronize"):
            stream.synchronize()
        for key, block in work.saves:
            self._files.write(key, self._rank, self._block(block).cpu().contiguous().numpy().tobytes())

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        """Nothing goes on in the background."""
        return [], []

    def _block(self, block: int) -> torch.Tensor:
        assert self._pool is not None, "no KV cache was registered"
        return self._pool[block].view(torch.uint8)

    def _work(self) -> Blocks:
        work = self.get_connector_meta()
        return work if isinstance(work, Blocks) else Blocks()
