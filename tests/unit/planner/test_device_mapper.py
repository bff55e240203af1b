from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.core.device_mapper import assign, held_units, positions_of, reusable_bytes, share_inheritance
from planner.protocol import Pipeline, Shard, Stage, UnitRange


def rectangle(first_layer, last_layer, first_group=0, last_group=2):
    return UnitRange(first_layer=first_layer, last_layer=last_layer, first_group=first_group, last_group=last_group)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_assignment_is_as_good_as_any(data):
    num_positions = data.draw(st.integers(1, 4))
    num_ranks = data.draw(st.integers(num_positions, 5))
    weights = np.array(
        data.draw(
            st.lists(
                st.lists(st.integers(0, 20), min_size=num_positions, max_size=num_positions),
                min_size=num_ranks,
                max_size=num_ranks,
            )
        ),
        dtype=float,
    )
    ranks = [_rank(f"i{n}-0") for n in range(num_ranks)]
    positions = positions_of([(0, 5)], 1, 3, num_positions)
    chosen = [ranks.index(rank) for rank in assign(ranks, positions, weights)]
    assert len(set(chosen)) == num_positions
    best = max(
        sum(weights[rank, column] for column, rank in enumerate(order))
        for order in permutations(range(num_ranks), num_positions)
    )
    assert sum(weights[rank, column] for column, rank in enumerate(chosen)) == best


def _rank(name, **changes):
    from planner.core.fleet import Rank
    from planner.protocol import RankInventory

    inventory = RankInventory(
        rank=name, device="cpu", memory_bytes=1, context_address=name, store_address=name, **changes
    )
    return Rank(instance=name.rpartition("-")[0], inventory=inventory, deadline_s=None)


def test_reusable_bytes_count_shared_units(make_model, make_rank):
    model = make_model(num_layers=6)
    holder = make_rank("i1-0", [rectangle(-1, 2), rectangle(3, 6, 1, 1)])
    positions = positions_of([(0, 2), (3, 5)], 1, 3, 1)
    weights = reusable_bytes(model, [holder, make_rank("i2-0")], positions)
    decoder, embedding, head = model.decoder_unit_bytes, model.embedding_unit_bytes, model.head_unit_bytes
    assert weights[0, 0] == 3 * embedding + 9 * decoder
    assert weights[0, 1] == 3 * embedding + 3 * decoder + head, "a tied head needs the embedding as well"
    assert not weights[1].any()


def test_kv_counts_only_for_the_pipeline_that_inherits(make_model, make_rank):
    model = make_model(num_layers=6)
    rank = make_rank("i1-0", kv_tokens=10)
    stage = Stage(first_layer=0, last_layer=5, shards=[Shard(rank="i1-0", instance="i1", first_group=0, last_group=2)])
    old = Pipeline(id="p1", stages=[stage], max_batch=1, num_kv_blocks=1)
    positions = positions_of([(0, 2), (3, 5)], 1, 3, 2)
    weights = reusable_bytes(model, [rank], positions, [old], [[], ["p1"]])
    assert weights.tolist() == [[0, 0, 9 * 512 * 10, 9 * 512 * 10]]


def test_tensor_groups_stay_inside_an_instance(make_model, make_rank):
    model = make_model(num_layers=6, num_head_groups=4)
    ranks = [make_rank(f"i{instance}-{index}") for instance in (1, 2) for index in range(3)]
    positions = positions_of([(0, 5)], 2, 4, 2)
    chosen = assign(ranks, positions, reusable_bytes(model, ranks, positions))
    instances = [rank.instance for rank in chosen]
    assert instances[0] == instances[1]
    assert instances[2] == instances[3]


def test_tensor_group_spans_instances_if_it_must(make_model, make_rank):
    model = make_model(num_layers=6)
    ranks = [make_rank(f"i{n}-0") for n in range(3)]
    positions = positions_of([(0, 5)], 3, 3, 1)
    assert len({rank.id for rank in assign(ranks, positions, reusable_bytes(model, ranks, positions))}) == 3


def test_ranks_under_notice_come_last(make_model, make_rank):
    model = make_model(num_layers=6)
    full = make_rank("i1-0", [rectangle(-1, 6)], deadline_s=5.0)
    ranks = [full, make_rank("i2-0"), make_rank("i3-0")]
    positions = positions_of([(0, 2), (3, 5)], 1, 3, 1)
    chosen = assign(ranks, positions, reusable_bytes(model, ranks, positions))
    assert full not in chosen
    positions = positions_of([(0, 5)], 3, 3, 1)
    assert full in assign(ranks, positions, reusable_bytes(model, ranks, positions))


def test_too_few_ranks(make_model, make_rank):
    positions = positions_of([(0, 2), (3, 5)], 1, 3, 1)
    with pytest.raises(ValueError, match="1 for 2"):
        assign([make_rank("i1-0")], positions, np.zeros((1, 2)))


def test_inheritance_is_shared_evenly():
    old = [Pipeline(id=f"p{n}", stages=[], max_batch=1, num_kv_blocks=1) for n in range(4)]
    tokens = {"p0": 10, "p1": 50, "p2": 30, "p3": 5}
    assert share_inheritance(old, tokens, 2) == [["p1"], ["p2", "p0", "p3"]]
    assert share_inheritance(old, tokens, 0) == []


def test_ranges_outside_the_model_are_cut(make_model):
    model = make_model(num_layers=2)
    assert held_units(model, [rectangle(-9, 99, -9, 99)]).all()
    assert held_units(model, []).sum() == 0
