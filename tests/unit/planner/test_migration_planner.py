from collections import Counter
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.core.device_mapper import SlotShape, map_devices
from planner.core.fleet import Rank
from planner.core.holders import MAX_SOURCES
from planner.core.links import Links, uniform_links
from planner.core.migration_planner import (
    KV_GROWTH,
    kv_migration_s,
    needed_units,
    plan_migration,
    transfer_bytes,
)
from planner.protocol import ModelShape, Pipeline, RankInventory, Shard, Stage, UnitRange

MODEL = ModelShape(
    name="tiny",
    num_layers=6,
    num_head_groups=3,
    decoder_unit_bytes=1000,
    embedding_unit_bytes=500,
    head_unit_bytes=100,
    kv_unit_bytes_per_token=10,
    kv_block_tokens=16,
    max_model_len=64,
    hidden_bytes_per_token=8,
    tied_embeddings=True,
)
ALL = UnitRange(first_layer=-1, last_layer=6, first_group=0, last_group=2)


def rank(name, units=(), deadline_s=None, kv_tokens=0, instance=None):
    inventory = RankInventory(
        rank=name,
        device="cpu",
        memory_bytes=1,
        context_address=name,
        store_address=name,
        units=list(units),
        kv_tokens=kv_tokens,
    )
    return Rank(instance=instance or name, inventory=inventory, deadline_s=deadline_s)


def pipeline(*names, tensor=1, name="p1", inherits=()):
    num_stages = len(names) // tensor
    size, width = 6 // num_stages, 3 // tensor
    stages = [
        Stage(
            first_layer=stage * size,
            last_layer=(stage + 1) * size - 1,
            shards=[
                Shard(
                    rank=names[stage * tensor + shard],
                    instance="i",
                    first_group=shard * width,
                    last_group=(shard + 1) * width - 1,
                )
                for shard in range(tensor)
            ],
        )
        for stage in range(num_stages)
    ]
    return Pipeline(id=name, stages=stages, max_batch=1, num_kv_blocks=1, inherits=list(inherits))


LINKS = Links(inter_bytes_per_s=1000.0, intra_bytes_per_s=5000.0, disk_bytes_per_s=500.0)

unit_range = st.builds(
    lambda a, b, c, d: UnitRange(
        first_layer=min(a, b), last_layer=max(a, b), first_group=min(c, d), last_group=max(c, d)
    ),
    st.integers(-1, 6), st.integers(-1, 6), st.integers(0, 2), st.integers(0, 2),
)  # fmt: skip


@st.composite
def migrations(draw):
    """Ranks that hold anything, on instances of one to three; new pipelines on some of them; one that retires."""
    num_ranks = draw(st.integers(4, 7))
    per_instance = draw(st.integers(1, 3))
    deadlines = [draw(st.sampled_from([None, None, 5.0])) for _ in range(num_ranks)]
    ranks = {
        f"r{n}": rank(
            f"r{n}",
            draw(st.lists(unit_range, max_size=2)),
            deadlines[n // per_instance],
            draw(st.integers(0, 5)),
            f"i{n // per_instance}",
        )
        for n in range(num_ranks)
    }
    names = draw(st.permutations(list(ranks)))
    num_first, tensor = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (3, 3)]))
    new = [pipeline(*names[:num_first], tensor=tensor, name="p8", inherits=["p1"])]
    if draw(st.booleans()) and num_first < 3:
        new.append(pipeline(*names[num_first : num_first + 2], name="p9"))
    retiring = [pipeline(*draw(st.permutations(names))[:2], name="p1")]
    return ranks, new, retiring


def positions(pipelines):
    return [(stage, shard) for p in pipelines for stage in p.stages for shard in stage.shards]


def held(member):
    return set().union(*(units.units() for units in member.inventory.units))


def layers_of(transfer):
    return range(transfer.units.first_layer, transfer.units.last_layer + 1)


@settings(max_examples=150, deadline=None)
@given(case=migrations())
def test_every_needed_unit_is_held_or_arrives_once_from_who_has_it(case):
    ranks, new, retiring = case
    migration = plan_migration(MODEL, new, ranks, LINKS, retiring=retiring)
    assert set(migration.transfers) <= {shard.rank for _, shard in positions(new)}
    needed_bytes = 0
    for stage, shard in positions(new):
        planned = migration.transfers.get(shard.rank, [])
        needed = needed_units(MODEL, stage, shard)
        needed_bytes += sum(MODEL.unit_bytes(layer) for layer, _ in needed)
        arriving = Counter(unit for transfer in planned for unit in transfer.units.units())
        assert arriving == Counter(needed - held(ranks[shard.rank]))
        for transfer in planned:
            holders = {name for name, member in ranks.items() if transfer.units.units() <= held(member)}
            assert holders.issuperset(transfer.sources)
            assert shard.rank not in transfer.sources
            assert len(transfer.sources) == len(set(transfer.sources)) == min(len(holders), MAX_SOURCES)
            if not holders:
                assert not any(transfer.units.units() & held(member) for member in ranks.values())
            staying = {name for name in holders if ranks[name].deadline_s is None}
            assert not staying or staying & set(transfer.sources), "one that does not leave is named"
        steps = [[migration.layer_order.index(layer) for layer in layers_of(transfer)] for transfer in planned]
        assert all(step == list(range(step[0], step[0] + len(step))) for step in steps)
        assert [step[0] for step in steps] == sorted(step[0] for step in steps), "in the order of the layers"
    moved = [transfer for planned in migration.transfers.values() for transfer in planned]
    assert migration.moved_bytes == transfer_bytes(MODEL, moved)
    assert migration.disk_bytes == transfer_bytes(MODEL, [t for t in moved if not t.sources])
    assert migration.reused_bytes == needed_bytes - migration.moved_bytes


def kv_moves(ranks, new, retiring):
    """(sender, receiver, bytes), by counting units."""
    for old in retiring:
        for heir in [p for p in new if old.id in p.inherits]:
            for stage, sender in positions([old]):
                for new_stage, receiver in positions([heir]):
                    units = {
                        unit
                        for unit in needed_units(MODEL, stage, sender) & needed_units(MODEL, new_stage, receiver)
                        if 0 <= unit[0] < MODEL.num_layers
                    }
                    if sender.rank != receiver.rank:
                        tokens = ranks[sender.rank].inventory.kv_tokens
                        yield sender.rank, receiver.rank, len(units) * tokens * MODEL.kv_unit_bytes_per_token


@settings(max_examples=150, deadline=None)
@given(case=migrations())
def test_seconds_are_those_of_the_busiest_link_and_stages_start_in_between(case):
    ranks, new, retiring = case
    migration = plan_migration(MODEL, new, ranks, LINKS, retiring=retiring)
    moves = [(*move[:2], KV_GROWTH * move[2]) for move in kv_moves(ranks, new, retiring)]
    moves += [
        (transfer.sources[0] if transfer.sources else None, name, transfer_bytes(MODEL, [transfer]))
        for name, planned in migration.transfers.items()
        for transfer in planned
    ]
    busy_s: Counter[tuple[str, str]] = Counter()
    for sender, receiver, size in moves:
        to = ranks[receiver].instance
        if sender is None:
            busy_s["disk", to] += size / LINKS.disk_bytes_per_s
        elif ranks[sender].instance == to:
            busy_s["from", sender] += size / LINKS.intra_bytes_per_s
            busy_s["to", receiver] += size / LINKS.intra_bytes_per_s
        else:
            busy_s["out", ranks[sender].instance] += size / LINKS.inter_bytes_per_s
            busy_s["in", to] += size / LINKS.inter_bytes_per_s
    busiest_s = max(busy_s.values(), default=0.0)
    assert migration.seconds == pytest.approx(LINKS.fixed_s + busiest_s if busiest_s else 0.0)
    assert migration.kv_bytes == sum(size for *_, size in kv_moves(ranks, new, retiring))
    for p in new:
        for stage, ready_s in zip(p.stages, migration.stage_ready_s[p.id], strict=True):
            names = {shard.rank for shard in stage.shards}
            receives = any(receiver in names and size for _, receiver, size in moves)
            assert (ready_s > LINKS.fixed_s) == receives
            assert ready_s <= migration.seconds + 1e-9
    assert set(migration.kv_seconds) == {"p1"}


def most_held_bytes(ranks, new, migration):
    """By going through the steps: receivers grow, then those that need the layer no more let it go."""
    needs = {shard.rank: needed_units(MODEL, stage, shard) for stage, shard in positions(new)}
    now = {name: held(ranks[name]) for name in needs}
    bounds = {name: max(_bytes(held(ranks[name])), _bytes(needs[name])) for name in needs}
    moving = {layer for planned in migration.transfers.values() for t in planned for layer in layers_of(t)}
    assert sorted(moving) == sorted(migration.layer_order)
    for name, needed in needs.items():
        now[name] = {unit for unit in now[name] if unit[0] in moving or unit in needed}
    most = 0
    for layer in migration.layer_order:
        for name in needs:
            arriving = {u for t in migration.transfers.get(name, []) for u in t.units.units() if u[0] == layer}
            now[name] = now[name] | arriving
            most = max(most, _bytes(now[name]) - bounds[name])
        for name, needed in needs.items():
            now[name] = {unit for unit in now[name] if unit[0] != layer or unit in needed}
    assert now == needs
    return most


def _bytes(units):
    return sum(MODEL.unit_bytes(layer) for layer, _ in units)


@settings(max_examples=150, deadline=None)
@given(case=migrations(), u_max_bytes=st.sampled_from([None, 0, 1000, 3000]))
def test_memory_bound_holds_at_every_step_or_the_excess_is_told(case, u_max_bytes):
    ranks, new, _ = case
    migration = plan_migration(MODEL, new, ranks, LINKS, u_max_bytes=u_max_bytes)
    assert migration.peak_bytes == most_held_bytes(ranks, new, migration)
    excess = migration.peak_bytes - u_max_bytes if u_max_bytes is not None else 0
    assert migration.exceeds_bytes == max(0, excess)


def test_unbounded_order_is_front_to_back():
    ranks = {"a": rank("a", [ALL]), "x": rank("x"), "y": rank("y")}
    migration = plan_migration(MODEL, [pipeline("x", "y")], ranks, LINKS)
    assert migration.layer_order == list(range(-1, 7))
    first, last = migration.stage_ready_s["p1"]
    assert first < last == migration.seconds


def test_what_only_victims_have_goes_first():
    back = UnitRange(first_layer=4, last_layer=5, first_group=0, last_group=2)
    rest = [
        UnitRange(first_layer=-1, last_layer=3, first_group=0, last_group=2),
        UnitRange(first_layer=6, last_layer=6, first_group=0, last_group=2),
    ]
    ranks = {"victim": rank("victim", [back, *rest], 5.0), "stays": rank("stays", rest), "new": rank("new")}
    migration = plan_migration(MODEL, [pipeline("new")], ranks, LINKS)
    assert migration.layer_order == [4, 5, -1, 0, 1, 2, 3, 6]
    assert migration.transfers["new"][0].sources == ["victim"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_mapping_moves_least(data):
    """Against every other mapping of single ranks: the identity and any greedy one are among them."""
    ranks = {
        f"r{n}": rank(f"r{n}", data.draw(st.lists(unit_range, max_size=2)), None, data.draw(st.integers(0, 900)))
        for n in range(4)
    }
    retiring = [pipeline("r0", "r1", name="p1"), pipeline("r2", "r3", name="p2")]
    slots = [SlotShape(((0, 2), (3, 5)), 1), SlotShape(((0, 5),), 1)]
    inherits = [["p2"], ["p1"]]

    def moved_bytes(order):
        new = [
            pipeline(*order[:2], name="p8", inherits=inherits[0]),
            pipeline(*order[2:3], name="p9", inherits=inherits[1]),
        ]
        migration = plan_migration(MODEL, new, ranks, LINKS, retiring=retiring)
        return migration.moved_bytes + migration.kv_bytes

    chosen = map_devices(MODEL, list(ranks.values()), slots, retiring, inherits)
    assert moved_bytes([member.id for member in chosen]) == min(map(moved_bytes, permutations(ranks, 3)))


def first_load(migration):
    load: Counter[str] = Counter()
    for planned in migration.transfers.values():
        for transfer in planned:
            load[transfer.sources[0]] += transfer_bytes(MODEL, [transfer])
    return load


def test_load_is_spread_over_the_holders():
    ranks = {name: rank(name, [ALL]) for name in ("a", "b", "c")} | {"new": rank("new")}
    load = first_load(plan_migration(MODEL, [pipeline("new")], ranks, LINKS))
    assert min(load[name] for name in "abc") > 0
    assert max(load.values()) <= sum(load.values()) / 2


def test_two_receivers_use_different_holders():
    ranks = {name: rank(name, [ALL]) for name in ("a", "b")} | {"x": rank("x"), "y": rank("y")}
    load = first_load(plan_migration(MODEL, [pipeline("x", "y")], ranks, LINKS))
    assert max(load.values()) <= 1.5 * min(load.values())


def test_the_own_instance_sends_first():
    far = {f"far{n}": rank(f"far{n}", [ALL]) for n in range(3)}
    ranks = far | {"near": rank("near", [ALL], instance="i"), "new": rank("new", instance="i")}
    migration = plan_migration(MODEL, [pipeline("new")], ranks, LINKS)
    assert set(first_load(migration)) == {"near"}
    assert migration.seconds == pytest.approx(LINKS.fixed_s + migration.moved_bytes / LINKS.intra_bytes_per_s)


def test_what_nobody_holds_comes_from_disk():
    migration = plan_migration(MODEL, [pipeline("new")], {"new": rank("new")}, LINKS)
    [transfer] = migration.transfers["new"]
    assert (transfer.units, transfer.sources) == (ALL, [])
    assert migration.seconds == pytest.approx(LINKS.fixed_s + migration.disk_bytes / LINKS.disk_bytes_per_s)


def test_nothing_to_do_takes_no_time():
    migration = plan_migration(MODEL, [pipeline("a")], {"a": rank("a", [ALL])}, LINKS)
    assert (migration.transfers, migration.seconds, migration.stage_ready_s) == ({}, 0.0, {"p1": [0.0]})
    assert plan_migration(MODEL, [], {}, LINKS, u_max_bytes=0).moved_bytes == 0


def test_kv_seconds_are_those_of_the_busiest_instance():
    old = pipeline("a", "b", "c")
    ranks = {
        "a": rank("a", kv_tokens=100, instance="i"),
        "b": rank("b", kv_tokens=10, instance="i"),
        "c": rank("c", kv_tokens=90),
    }
    expected = 0.2 + 2 * 3 * 10 * 110 * 1.5 / 1e6
    assert kv_migration_s(MODEL, old, ranks, uniform_links(1e6)) == pytest.approx(expected)
    assert kv_migration_s(MODEL, old, {}, LINKS) == LINKS.fixed_s


@pytest.mark.parametrize("field", ["inter_bytes_per_s", "intra_bytes_per_s", "disk_bytes_per_s"])
def test_link_rates_must_be_positive(field):
    rates = {"inter_bytes_per_s": 1.0, "intra_bytes_per_s": 1.0, "disk_bytes_per_s": 1.0}
    with pytest.raises(ValueError, match=field):
        Links(**{**rates, field: 0.0})
