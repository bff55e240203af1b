from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from engine.backends.tensorrt_llm.kv_store import KvFiles, KvIdentity, chain


def identity(directory: Path, **changes: Any) -> KvIdentity:
    facts: dict[str, Any] = {"limit_bytes": 1 << 20, "model": "m", "dtype": "bfloat16", "block_tokens": 4}
    facts |= {"tensor": 2, "layers": [3, 3]} | changes
    return KvIdentity(str(directory), **facts)


@given(st.lists(st.integers(0, 200_000), max_size=40), st.lists(st.integers(0, 200_000), max_size=40))
def test_keys_agree_as_far_as_the_tokens_do_and_no_further(first: list[int], second: list[int]) -> None:
    keys = [chain(b"root", tokens, 4) for tokens in (first, second)]
    same = 0
    while same < min(map(len, keys)) and first[: (same + 1) * 4] == second[: (same + 1) * 4]:
        same += 1
    assert keys[0][:same] == keys[1][:same]
    assert not set(keys[0][same:]) & set(keys[1][same:])
    assert len(keys[0]) == len(first) // 4


def test_the_same_block_behind_another_prefix_has_another_key() -> None:
    assert chain(b"", [1, 2, 3, 4, 9, 9, 9, 9], 4)[1] != chain(b"", [9, 9, 9, 9], 4)[0]


def test_everything_that_changes_the_bytes_changes_the_root(tmp_path: Path) -> None:
    base = identity(tmp_path)
    changes: list[dict[str, Any]] = [
        {"model": "n"},
        {"dtype": "float16"},
        {"block_tokens": 8},
        {"tensor": 1},
        {"layers": [6]},
    ]
    roots = {base.root(None), base.root("salt"), *(identity(tmp_path, **change).root(None) for change in changes)}
    assert len(roots) == 7


def test_a_block_is_there_when_every_rank_has_written_its_part(tmp_path: Path) -> None:
    files = KvFiles(identity(tmp_path))
    for rank in range(4):
        assert not files.has("k")
        files.write("k", rank, bytes([rank]))
    assert files.has("k")
    assert [files.read("k", rank) for rank in range(4)] == [b"\0", b"\1", b"\2", b"\3"]
    assert files.read("other", 0) is None
    files.forget("k", 2)
    assert not files.has("k")


def test_the_oldest_blocks_go_when_there_are_too_many_bytes(tmp_path: Path) -> None:
    files = KvFiles(identity(tmp_path, limit_bytes=4000))
    for number in range(5):
        files.write(f"k{number}", 0, bytes(400))
    held = [number for number in range(5) if files.read(f"k{number}", 0) is not None]
    assert held == [3, 4]
