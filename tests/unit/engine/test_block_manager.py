from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core.block_manager import BlockManager
from engine.errors import BlockError


def test_allocation_is_all_or_nothing():
    manager = BlockManager(num_blocks=4, block_tokens=16)
    assert manager.allocate(5) is None
    assert manager.num_free == 4
    blocks = manager.allocate(4)
    assert blocks is not None
    assert sorted(blocks) == [0, 1, 2, 3]
    assert manager.allocate(1) is None
    assert manager.allocate(0) == []


def test_blocks_for_rounds_up():
    manager = BlockManager(num_blocks=4, block_tokens=16)
    assert [manager.blocks_for(n) for n in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]


def test_shared_block_is_freed_by_its_last_owner():
    manager = BlockManager(num_blocks=2, block_tokens=16)
    blocks = manager.allocate(1)
    assert blocks is not None
    manager.share(blocks)
    manager.free(blocks)
    assert manager.num_free == 1
    manager.check_invariants([blocks])
    manager.free(blocks)
    assert manager.num_free == 2
    manager.check_invariants([])


@pytest.mark.parametrize("action", ["share", "free"])
@pytest.mark.parametrize("block", [-1, 1, 2])
def test_unowned_block_is_refused_without_a_change(action, block):
    manager = BlockManager(num_blocks=2, block_tokens=16)
    owned = manager.allocate(1)
    assert owned == [0]
    with pytest.raises(BlockError, match=f"cannot {action} block {block}"):
        getattr(manager, action)([0, block])
    manager.check_invariants([[0]])


def test_freeing_more_often_than_owned_is_refused_without_a_change():
    manager = BlockManager(num_blocks=2, block_tokens=16)
    manager.allocate(2)
    with pytest.raises(BlockError) as caught:
        manager.free([1, 0, 0])
    assert (caught.value.block, caught.value.num_refs) == (0, 1)
    manager.check_invariants([[0, 1]])


def test_check_invariants_tells_leak_false_sharing_and_double_free_apart():
    manager = BlockManager(num_blocks=2, block_tokens=16)
    manager.allocate(1)
    with pytest.raises(AssertionError, match="block 0: 1 references, 0 owners"):
        manager.check_invariants([])
    with pytest.raises(AssertionError, match="block 0: 1 references, 2 owners"):
        manager.check_invariants([[0], [0]])
    manager._free.append(1)
    with pytest.raises(AssertionError, match="block 1: 0 references, 2 times in the free list"):
        manager.check_invariants([[0]])


@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "free"]), st.integers(0, 5))))
def test_reference_counts_follow_the_owners(actions):
    manager = BlockManager(num_blocks=8, block_tokens=4)
    owners: list[list[int]] = []
    for action, number in actions:
        if action == "allocate":
            blocks = manager.allocate(number)
            assert (blocks is None) == (number > 8 - len({b for owner in owners for b in owner}))
            owners += [] if blocks is None else [blocks]
        elif owners and action == "share":
            shared = owners[number % len(owners)]
            manager.share(shared)
            owners.append(list(shared))
        elif owners:
            manager.free(owners.pop(number % len(owners)))
        manager.check_invariants(owners)
    assert manager.num_free == 8 - len(Counter(b for owner in owners for b in owner))
