"""Process groups of one pipeline: hops between stages, and the tensor group inside a stage.

Gloo on CPU; on CUDA activations go over NCCL and the small control messages over gloo. No global
`init_process_group`: each pipeline makes its own groups over its leader's store, under its own prefix, so that groups
of several pipelines live side by side and die apart.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from datetime import timedelta
from typing import Any, Final

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import ProcessGroupGloo

from engine.core.roles import Position
from engine.errors import PipelineBroken

FORM_TIMEOUT_S: Final = 20.0
_MEET_POLL_S: Final = 0.01
_IDLE_TIMEOUT: Final = timedelta(days=30)
"""A worker waits in a receive for as long as there is nothing to do; death shows as a closed connection."""
_ABORT_TIMEOUT: Final = timedelta(milliseconds=1)
_MAX_PENDING_SENDS: Final = 8
_CONTROL_TAG: Final = 0
_DATA_TAG: Final = 1
_UNUSED_TAG: Final = 99


def rendezvous_store(host: str) -> TCPStore:
    """The store that a rank offers to the pipelines that it leads; it listens on a free port."""
    return TCPStore(host, 0, is_master=True, wait_for_workers=False)


def _gloo(store: Any, index: int, size: int, host: str) -> ProcessGroupGloo:
    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined] # missing from the stub
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=FORM_TIMEOUT_S)
    options._threads = 1
    group = ProcessGroupGloo(store, index, size, options)
    group._set_default_timeout(_IDLE_TIMEOUT)
    return group


def _nccl(store: Any, index: int, size: int) -> Any:
    from torch.distributed import ProcessGroupNCCL

    return ProcessGroupNCCL(store, index, size, ProcessGroupNCCL.Options())


def _meet(store: TCPStore, position: Position, abandoned: threading.Event) -> str:
    """Wait until every member is at the leader's store; returns the prefix under which they form their groups.

    Gloo's own wait cannot be broken off, so it begins only when all are there. The leader opens a new round whenever it
    prepares the pipeline (an id may come back), so that nobody reads the addresses of an earlier try.
    """
    pipeline, ranks = position.pipeline.id, position.pipeline.ranks()
    current = f"{pipeline}/round"
    if position.leads:
        store.set(current, str(store.add(f"{pipeline}/num_rounds", 1)))
    deadline_s = time.monotonic() + FORM_TIMEOUT_S
    here = ""
    while True:
        number = store.get(current).decode() if store.check([current]) else ""
        if number:
            prefix = f"{pipeline}/{number}"
            here = f"{prefix}/here"
            store.set(f"{here}/{position.index}", "")
            missing = [rank for i, rank in enumerate(ranks) if not store.check([f"{here}/{i}"])]
            if not missing:
                return prefix
        else:
            missing = [position.pipeline.leader]
        if abandoned.wait(_MEET_POLL_S):
            if here:
                store.delete_key(f"{here}/{position.index}")
            raise PipelineBroken(pipeline, "it was discarded while its group was formed")
        if time.monotonic() > deadline_s:
            raise PipelineBroken(pipeline, f"{', '.join(missing)} did not come within {FORM_TIMEOUT_S:g} s")


class Communicator:
    """This rank's connections in one pipeline. Forming it blocks until every member has come.

    Set `abandoned` to break that off; groups that are formed all the same are closed again.

    Raises:
        PipelineBroken: a member did not come in time, or any later operation met a closed connection.

    """

    def __init__(self, position: Position, host: str, device: torch.device, abandoned: threading.Event) -> None:
        self.pipeline = position.pipeline.id
        self.device = device
        self._size = len(position.pipeline.ranks())
        self._tensor = position.pipeline.tensor
        self._sends: deque[tuple[Any, Tensor]] = deque()
        self.index = position.index
        self.shard = position.shard
        self._shards: Any = None
        leader = position.addresses.get(position.pipeline.leader)
        if leader is None:
            raise PipelineBroken(self.pipeline, f"the plan has no address of its leader {position.pipeline.leader}")
        store_host, _, port = leader.store_address.rpartition(":")
        try:
            store = TCPStore(
                store_host,
                int(port),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=FORM_TIMEOUT_S),
            )
            self._store = store
            try:
                self._form(store, position, host, abandoned)
            finally:
                if position.leads:
                    store.set(f"{self.pipeline}/round", "")
        except RuntimeError as error:
            raise PipelineBroken(self.pipeline, f"its group cannot be formed: {_short(error)}") from error
        if abandoned.is_set():
            self.abort()
            raise PipelineBroken(self.pipeline, "it was discarded while its group was formed")

    def _form(self, store: TCPStore, position: Position, host: str, abandoned: threading.Event) -> None:
        prefix = _meet(store, position, abandoned)
        on_cuda = self.device.type == "cuda"
        self._control = _gloo(PrefixStore(f"{prefix}/all", store), position.index, self._size, host)
        self._data = self._control
        if on_cuda:
            self._data = _nccl(PrefixStore(f"{prefix}/nccl", store), position.index, self._size)
        if self._tensor > 1:
            shard_store = PrefixStore(f"{prefix}/stage{position.stage}", store)
            self._shards = (
                _nccl(shard_store, position.shard, self._tensor)
                if on_cuda
                else _gloo(shard_store, position.shard, self._tensor, host)
            )

    # --- hops -------------------------------------------------------------------------------------------------

    def send_control(self, data: bytes, to: int) -> None:
        """Send a small message; returns before it has arrived."""
        body = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._post(self._control, torch.tensor([len(data)]), to, _CONTROL_TAG)
        self._post(self._control, body, to, _CONTROL_TAG)

    def receive_control(self, source: int) -> bytes:
        length = torch.empty(1, dtype=torch.int64)
        self._receive(self._control, length, source, _CONTROL_TAG)
        body = torch.empty(int(length[0]), dtype=torch.uint8)
        self._receive(self._control, body, source, _CONTROL_TAG)
        return body.numpy().tobytes()

    def send(self, x: Tensor, to: int) -> None:
        """Send a contiguous tensor; returns before it has arrived."""
        self._post(self._data, x.contiguous(), to, _DATA_TAG)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, source: int) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=self.device)
        self._receive(self._data, x, source, _DATA_TAG)
        return x

    def _post(self, group: Any, x: Tensor, to: int, tag: int) -> None:
        # The tensor must live until it is sent, so finished sends are collected late.
        with self._breaks():
            self._sends.append((group.send([x], to, tag), x))
            while len(self._sends) > _MAX_PENDING_SENDS:
                self._sends.popleft()[0].wait()

    def _receive(self, group: Any, x: Tensor, source: int, tag: int) -> None:
        with self._breaks():
            group.recv([x], source, tag).wait()

    def flush(self) -> None:
        """Wait until everything sent has arrived."""
        with self._breaks():
            while self._sends:
                self._sends.popleft()[0].wait()

    # --- the tensor group -------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        return self._tensor

    def all_reduce(self, x: Tensor) -> None:
        """Sum over the stage's shards, in place."""
        with self._breaks():
            self._shards.allreduce([x]).wait()

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """The `x` of every shard of the stage, by shard."""
        parts = [torch.empty_like(x) for _ in range(self._tensor)]
        with self._breaks():
            self._shards.allgather([parts], [x.contiguous()]).wait()
        return parts

    # --- the end ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _breaks(self) -> Any:
        try:
            yield
        except RuntimeError as error:
            raise PipelineBroken(self.pipeline, _short(error)) from error

    def abort(self) -> None:
        """Make a blocked operation of another thread fail, also when the peer never answers.

        Gloo has no abort of a pending receive, but a receive that times out closes its pair, and a closed pair fails
        whatever else waits on it, here and at the peer.
        """
        if self._data is not self._control:
            self._data.abort()
            if self._shards is not None:
                self._shards.abort()
        elif self._shards is not None:
            self._close_pairs(self._shards, self.shard, self._tensor)
        self._close_pairs(self._control, self.index, self._size)

    @staticmethod
    def _close_pairs(group: Any, index: int, size: int) -> None:
        for peer in range(size):
            if peer != index:
                with contextlib.suppress(RuntimeError):
                    group.recv([torch.empty(1)], peer, _UNUSED_TAG).wait(_ABORT_TIMEOUT)


class ShardGroup:
    """The tensor group of a stage, in the words of `stage_model.TensorGroup`."""

    def __init__(self, communicator: Communicator) -> None:
        self.size = communicator.size
        self.index = communicator.shard
        self.all_reduce = communicator.all_reduce
        self.all_gather = communicator.all_gather


def _short(error: Exception) -> str:
    """Gloo's text without the path of its source file."""
    text = str(error).splitlines()[0]
    return text.partition("] ")[2] or text
