from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core.block_manager import BlockManager
from engine.core.prefix_index import ROOT, PrefixIndex
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


def test_a_free_block_with_content_can_be_shared_until_it_is_needed():
    manager = BlockManager(num_blocks=3, block_tokens=2)
    blocks = manager.allocate(2)
    assert blocks is not None
    node = manager.add_prefix(ROOT, [7, 8], blocks[0])
    manager.add_prefix(node, [9, 9], blocks[1])
    manager.free(blocks)
    assert manager.num_free == 3
    assert manager.find_prefix([7, 8, 9, 9, 1]).blocks == blocks
    assert manager.find_prefix([7, 8, 9]).blocks == blocks[:1]
    assert manager.find_prefix([9, 9]).blocks == []
    assert manager.num_kept(blocks) == 2
    manager.share(blocks[:1])
    manager.check_invariants([blocks[:1]])
    assert manager.allocate(3) is None
    taken = manager.allocate(2)
    assert taken is not None
    assert set(taken) == {2, blocks[1]}, "the empty one and the one that was kept"
    assert manager.find_prefix([7, 8, 9, 9]).blocks == blocks[:1]
    manager.check_invariants([taken, blocks[:1]])


def test_of_two_blocks_with_the_same_content_one_is_found_and_what_follows_hangs_on_both():
    index = PrefixIndex(2)
    first, second = index.add(ROOT, [1, 2], 5), index.add(ROOT, [1, 2], 6)
    assert first == second
    assert 6 not in index
    index.add(second, [3, 4], 7)
    assert index.find([1, 2, 3, 4]).blocks == [5, 7]
    index.drop(5)
    assert index.find([1, 2, 3, 4]).blocks == []
    index.add(ROOT, [1, 2], 8)
    assert index.find([1, 2, 3, 4]).blocks == [8], "out of reach: its node is gone"
    assert len(index) == 2


@given(st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=9), st.integers(0, 3)), max_size=30))
def test_what_is_found_holds_the_beginning_that_was_asked_for(requests):
    """Sequences come and go; the memory tells what each block really holds."""
    manager = BlockManager(num_blocks=7, block_tokens=2)
    memory: list[tuple[int, ...]] = [()] * 7
    owners: list[list[int]] = []
    for tokens, leaving in requests:
        node, blocks = manager.find_prefix(tokens)
        held = [token for block in blocks for token in memory[block]]
        assert held == tokens[: len(held)]
        num_new = manager.blocks_for(len(tokens)) - len(blocks)
        if num_new + manager.num_kept(blocks) > manager.num_free:
            manager.free(owners.pop(leaving % len(owners)))
            continue
        manager.share(blocks)
        new = manager.allocate(num_new)
        assert new is not None
        for start, block in zip(range(2 * len(blocks), len(tokens), 2), new, strict=True):
            memory[block] = tuple(tokens[start : start + 2])
            if len(memory[block]) == 2:
                node = manager.add_prefix(node, memory[block], block)
        owners.append(blocks + new)
        manager.check_invariants(owners)
        if leaving == 0:
            manager.free(owners.pop(0))
    assert manager.num_cached <= 7
