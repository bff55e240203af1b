from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.core import device_mapper
from planner.core.device_mapper import (
    SlotShape,
    held_units,
    map_devices,
    positions_of,
    reusable_bytes,
    share_inheritance,
)
from planner.core.fleet import Rank
from planner.protocol import ModelShape, Pipeline, RankInventory, Shard, Stage, UnitRange

TINY = ModelShape(
    name="tiny",
    num_layers=4,
    num_head_groups=4,
    decoder_unit_bytes=10,
    embedding_unit_bytes=7,
    head_unit_bytes=3,
    kv_unit_bytes_per_token=1,
    kv_block_tokens=16,
    max_model_len=64,
    hidden_bytes_per_token=8,
    tied_embeddings=False,
)
ONE_STAGE, TWO_STAGES = ((0, 3),), ((0, 1), (2, 3))


def rectangle(first_layer, last_layer, first_group=0, last_group=2):
    return UnitRange(first_layer=first_layer, last_layer=last_layer, first_group=first_group, last_group=last_group)


def rank(instance, index, units=(), deadline_s=None, kv_tokens=0):
    inventory = RankInventory(
        rank=f"{instance}-{index}",
        device="cpu",
        memory_bytes=1,
        context_address="a",
        store_address="s",
        units=list(units),
        kv_tokens=kv_tokens,
    )
    return Rank(instance=instance, inventory=inventory, deadline_s=deadline_s)


def old_pipeline(name, *stages):
    """`stages`: (first layer, last layer, ranks), the head groups of TINY in equal shares."""
    return Pipeline(
        id=name,
        stages=[
            Stage(
                first_layer=first,
                last_layer=last,
                shards=[
                    Shard(
                        rank=member.id,
                        instance=member.instance,
                        first_group=4 // len(members) * number,
                        last_group=4 // len(members) * (number + 1) - 1,
                    )
                    for number, member in enumerate(members)
                ],
            )
            for first, last, members in stages
        ],
        max_batch=1,
        num_kv_blocks=1,
    )


@st.composite
def fleets(draw, instance_sizes):
    """Ranks that hold anything, some with the KV of one of two retiring pipelines."""
    some_units = st.lists(
        st.builds(
            lambda a, b, c, d: rectangle(min(a, b), max(a, b), min(c, d), max(c, d)),
            st.integers(-1, 4), st.integers(-1, 4), st.integers(0, 3), st.integers(0, 3),
        ),
        max_size=2,
    )  # fmt: skip
    return [
        rank(f"i{number}", index, draw(some_units), kv_tokens=draw(st.integers(0, 30)))
        for number, size in enumerate(instance_sizes)
        for index in range(size)
    ]


def reused(ranks, chosen, slots, retiring, inherits):
    weights = reusable_bytes(TINY, ranks, positions_of(slots, 4), retiring, inherits)
    return sum(weights[ranks.index(member), column] for column, member in enumerate(chosen))


def most_reused(ranks, slots, retiring, inherits, accepts=lambda order: True):
    """By trying all placements."""
    positions = positions_of(slots, 4)
    weights = reusable_bytes(TINY, ranks, positions, retiring, inherits)
    return max(
        sum(weights[row, column] for column, row in enumerate(order))
        for order in permutations(range(len(ranks)), len(positions))
        if accepts([ranks[row] for row in order])
    )


def keeps_groups(slots):
    stages = [(position.slot, position.stage) for position in positions_of(slots, 4)]

    def accepts(order):
        return len(set(zip(stages, [member.instance for member in order], strict=True))) == len(set(stages))

    return accepts


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_mapping_of_single_ranks_is_optimal(data):
    ranks = data.draw(fleets(data.draw(st.sampled_from([(1, 1, 1, 1), (2, 3), (4, 1, 1)]))))
    slots = [SlotShape(stages, 1) for stages in data.draw(st.sampled_from([(TWO_STAGES,), (TWO_STAGES, ONE_STAGE)]))]
    retiring = [old_pipeline("p1", (0, 1, ranks[:1]), (2, 3, ranks[1:2])), old_pipeline("p2", (0, 3, ranks[2:4]))]
    inherits = share_inheritance(retiring, {"p1": 5}, len(slots))
    chosen = map_devices(TINY, ranks, slots, retiring, inherits)
    assert len({member.id for member in chosen}) == len(positions_of(slots, 4))
    assert reused(ranks, chosen, slots, retiring, inherits) == most_reused(ranks, slots, retiring, inherits)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_mapping_of_tensor_groups_is_optimal_with_one_group_to_an_instance(data):
    sizes, tensor = data.draw(st.sampled_from([((2, 2, 3), 2), ((3, 3), 2), ((2, 2, 2), 2), ((3, 3), 3)]))
    ranks = data.draw(fleets(sizes))
    slots = [SlotShape(TWO_STAGES, tensor)] if len(sizes) < 3 or data.draw(st.booleans()) else [SlotShape(ONE_STAGE, 2)]
    retiring = [old_pipeline("p1", (0, 3, ranks[:2])), old_pipeline("p2", (0, 1, ranks[2:3]), (2, 3, ranks[3:4]))]
    inherits = [["p1", "p2"]]
    chosen = map_devices(TINY, ranks, slots, retiring, inherits)
    assert keeps_groups(slots)(chosen)
    best = most_reused(ranks, slots, retiring, inherits, keeps_groups(slots))
    assert reused(ranks, chosen, slots, retiring, inherits) == best


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_mapping_of_few_groups_is_optimal_with_several_to_an_instance(data):
    ranks = data.draw(fleets((4, 3)))
    slots = data.draw(st.sampled_from([[SlotShape(TWO_STAGES, 2)], [SlotShape(ONE_STAGE, 2)] * 3]))
    retiring = [old_pipeline("p1", (0, 3, ranks[1:3]))]
    chosen = map_devices(TINY, ranks, slots, retiring, [["p1"]])
    assert keeps_groups(slots)(chosen)
    best = most_reused(ranks, slots, retiring, [["p1"]], keeps_groups(slots))
    assert reused(ranks, chosen, slots, retiring, [["p1"]]) == best


def test_many_aligned_groups_stay_where_they_are(make_model):
    """Nothing but the order of the ranks has changed: all context must be reused."""
    slots = [SlotShape(TWO_STAGES, 2)] * 8
    positions = positions_of(slots, 4)
    ranks = [
        rank(f"i{number // 4:02}", number % 4, [rectangle(*position.rectangle)], kv_tokens=100 + position.slot)
        for number, position in enumerate(positions)
    ]
    retiring = [
        old_pipeline(
            f"p{slot}", *((first, last, ranks[4 * slot + 2 * i :][:2]) for i, (first, last) in enumerate(TWO_STAGES))
        )
        for slot in range(8)
    ]
    inherits = share_inheritance(retiring, {p.id: 1 for p in retiring}, 8)
    mixed = [ranks[(number * 7) % 32] for number in range(32)]
    chosen = map_devices(TINY, mixed, slots, retiring, inherits)
    assert chosen == ranks


def test_thousands_of_single_ranks_are_matched_in_halves(monkeypatch):
    """With a limit of 8: nothing is lost where the sequences of a pipeline stay together."""
    monkeypatch.setattr(device_mapper, "MAX_SINGLES", 8)
    slots = [SlotShape(TWO_STAGES, 1)] * 16
    ranks = [
        rank(f"i{number:02}", 0, [rectangle(*position.rectangle)], kv_tokens=5 + position.slot)
        for number, position in enumerate(positions_of(slots, 4))
    ]
    retiring = [
        old_pipeline(f"p{slot}", (0, 1, ranks[2 * slot : 2 * slot + 1]), (2, 3, ranks[2 * slot + 1 : 2 * slot + 2]))
        for slot in range(16)
    ]
    inherits = share_inheritance(retiring, {}, 16)
    mixed = [ranks[(number * 7) % 32] for number in range(32)]
    chosen = map_devices(TINY, mixed, slots, retiring, inherits)
    kv_stays = reused(ranks, chosen, slots, retiring, inherits)
    assert kv_stays == sum(reusable_bytes(TINY, ranks, positions_of(slots, 4), retiring, inherits).max(axis=0))


def test_reusable_bytes_count_shared_units(make_model, make_rank):
    model = make_model(num_layers=6)
    holder = make_rank("i1-0", [rectangle(-1, 2), rectangle(3, 6, 1, 1)])
    positions = positions_of([SlotShape(((0, 2), (3, 5)), 1)], 3)
    weights = reusable_bytes(model, [holder, make_rank("i2-0")], positions)
    decoder, embedding, head = model.decoder_unit_bytes, model.embedding_unit_bytes, model.head_unit_bytes
    assert weights[0, 0] == 3 * embedding + 9 * decoder
    assert weights[0, 1] == 3 * embedding + 3 * decoder + head, "a tied head needs the embedding as well"
    assert not weights[1].any()


def test_kv_counts_only_for_the_pipeline_that_inherits(make_model, make_rank):
    model = make_model(num_layers=6)
    stage = Stage(first_layer=0, last_layer=5, shards=[Shard(rank="i1-0", instance="i1", first_group=0, last_group=2)])
    old = Pipeline(id="p1", stages=[stage], max_batch=1, num_kv_blocks=1)
    positions = positions_of([SlotShape(((0, 2), (3, 5)), 1)] * 2, 3)
    ranks = [make_rank("i1-0", kv_tokens=10)]
    both = 9 * model.kv_unit_bytes_per_token * 10
    assert reusable_bytes(model, ranks, positions, [old], [[], ["p1"]]).tolist() == [[0, 0, both, both]]
    runs_another = [make_rank("i1-0", kv_tokens=10, pipeline="p7")]
    assert not reusable_bytes(model, runs_another, positions, [old], [[], ["p1"]]).any()


def test_of_two_equal_stages_a_rank_takes_the_one_that_inherits_its_sequences():
    ranks = [rank(f"i{number}", 0, [rectangle(0, 3, 0, 3)], kv_tokens=9) for number in range(2)]
    retiring = [old_pipeline("p1", (0, 3, ranks[:1])), old_pipeline("p2", (0, 3, ranks[1:]))]
    slots = [SlotShape(ONE_STAGE, 1)] * 2
    assert map_devices(TINY, ranks, slots, retiring, [["p2"], ["p1"]]) == ranks[::-1]
    assert map_devices(TINY, ranks, slots, retiring, [["p1"], ["p2"]]) == ranks


def test_slots_of_unequal_shape(make_model):
    ranks = [rank(f"i{number // 4}", number % 4) for number in range(8)]
    slots = [SlotShape(ONE_STAGE, 1), SlotShape(TWO_STAGES, 2), SlotShape(ONE_STAGE, 2)]
    positions = positions_of(slots, 4)
    chosen = map_devices(TINY, ranks, slots)
    assert len({member.id for member in chosen}) == len(positions) == 7
    assert keeps_groups(slots)(chosen)
    assert [p.rectangle for p in positions if p.slot == 1] == [(0, 1, 0, 1), (0, 1, 2, 3), (2, 3, 0, 1), (2, 3, 2, 3)]


@pytest.mark.parametrize(
    ("sizes", "tensor", "num_instances"),
    [((1, 1, 1, 1), 4, 4), ((2, 2, 2), 4, 2), ((3, 1), 4, 2), ((2, 1, 1), 4, 3)],
)
def test_a_large_tensor_group_spans_instances_in_blocks(sizes, tensor, num_instances):
    ranks = [rank(f"i{number}", index) for number, size in enumerate(sizes) for index in range(size)]
    chosen = map_devices(TINY, ranks, [SlotShape(ONE_STAGE, tensor)])
    assert len({member.id for member in chosen}) == tensor
    assert len({member.instance for member in chosen}) == num_instances


@pytest.mark.parametrize("tensor", [1, 2])
def test_ranks_under_notice_come_last(tensor):
    full = [rank("i1", index, [rectangle(-1, 4, 0, 3)], deadline_s=5.0, kv_tokens=99) for index in range(2)]
    others = [rank(f"i{number}", index) for number in (2, 3) for index in range(2)]
    assert not set(_ids(full)) & set(_ids(map_devices(TINY, full + others, [SlotShape(TWO_STAGES, tensor)])))
    chosen = map_devices(TINY, full + others[: 2 * tensor - 1], [SlotShape(TWO_STAGES, tensor)])
    assert set(_ids(others[:tensor])) <= set(_ids(chosen)), "all whole groups that are not under notice"


def _ids(ranks):
    return [member.id for member in ranks]


def test_too_few_ranks(make_rank):
    with pytest.raises(ValueError, match="1 for 2"):
        map_devices(TINY, [make_rank("i1-0")], [SlotShape(TWO_STAGES, 1)])
    assert map_devices(TINY, [], []) == []


def test_inheritance_is_shared_evenly():
    old = [Pipeline(id=f"p{n}", stages=[], max_batch=1, num_kv_blocks=1) for n in range(4)]
    tokens = {"p0": 10, "p1": 50, "p2": 30, "p3": 5}
    assert share_inheritance(old, tokens, 2) == [["p1"], ["p2", "p0", "p3"]]
    assert share_inheritance(old, tokens, 0) == []


def test_most_progress_is_handed_on_where_room_is_short():
    old = [Pipeline(id=f"p{n}", stages=[], max_batch=1, num_kv_blocks=1) for n in range(4)]
    tokens = {"p0": 10, "p1": 50, "p2": 30, "p3": 5}
    assert share_inheritance(old, tokens, 2, room=[30, 30]) == [["p1"], ["p2"]]
    assert share_inheritance(old, tokens, 2, room=[50, 31]) == [["p1"], ["p2", "p0"]]


def test_ranges_outside_the_model_are_cut(make_model):
    model = make_model(num_layers=2)
    assert held_units(model, [rectangle(-9, 99, -9, 99)]).all()
    assert held_units(model, []).sum() == 0
    assert held_units(model, [rectangle(-9, -5)]).sum() == 0
