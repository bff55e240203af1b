import pytest

from loadtest.simulator.context import kv_flows, position_units, pull_everything, weight_flows
from loadtest.simulator.network import Flow, Place
from planner.core.migration_planner import needed_units
from planner.protocol import Pipeline, Shard, Stage, Transfer, UnitRange

PLACES = {f"{instance}-{index}": Place(instance, f"{instance}-{index}") for instance in "ab" for index in (0, 1)}


def pipeline(name, *stages):
    """Each stage: (first layer, last layer, ranks)."""
    return Pipeline(
        id=name,
        stages=[
            Stage(
                first_layer=first,
                last_layer=last,
                shards=[
                    Shard(
                        rank=rank,
                        instance=rank[0],
                        first_group=index * 4 // len(ranks),
                        last_group=(index + 1) * 4 // len(ranks) - 1,
                    )
                    for index, rank in enumerate(ranks)
                ],
            )
            for first, last, ranks in stages
        ],
        max_batch=4,
        num_kv_blocks=10,
    )


@pytest.fixture
def model(make_scenario):
    return make_scenario().model


def test_units_of_a_position(model):
    two = pipeline("p1", (0, 1, ["a-0", "a-1"]), (2, 3, ["b-0", "b-1"]))
    for stage in two.stages:
        for shard in stage.shards:
            units = set().union(*(u.units() for u in position_units(model, two, shard.rank)))
            assert units == needed_units(model, stage, shard)
    assert position_units(model, two, "c-0") == []


def test_everything_is_pulled_once_and_from_those_who_have_it(model):
    two = pipeline("p1", (0, 1, ["a-0"]), (2, 3, ["a-1"]))
    held = {PLACES["a-0"]: position_units(model, two, "a-0"), PLACES["b-0"]: position_units(model, two, "a-0")}
    pulled = pull_everything(model, two, "a-0", held)
    units = [unit for transfer in pulled for unit in transfer.units.units()]
    assert len(units) == len(set(units))
    assert set(units) == needed_units(model, two.stages[0], two.stages[0].shards[0])
    assert {tuple(transfer.sources) for transfer in pulled} == {("b-0",)}
    # Nobody has the last stage: what the embedding does not cover comes from disk.
    sources = {tuple(t.sources) for t in pull_everything(model, two, "a-1", held) if t.units.first_layer >= 2}
    assert sources == {()}


def test_weights_come_from_the_first_source_that_lives(model):
    unit = UnitRange(first_layer=0, last_layer=0, first_group=0, last_group=1)
    transfers = [Transfer(units=unit, sources=["gone-0", "b-1", "a-0"]), Transfer(units=unit, sources=["gone-0"])]
    flows = weight_flows(model, transfers, PLACES)
    assert flows == [Flow(PLACES["b-1"], 2 * model.decoder_unit_bytes), Flow(None, 2 * model.decoder_unit_bytes)]


def test_kv_moves_only_where_it_is_not_yet(model):
    old = pipeline("p1", (0, 3, ["a-0", "a-1"]))
    new = pipeline("p2", (0, 1, ["a-0"]), (2, 3, ["b-0"]))
    flows = kv_flows(model, old, new, 10, PLACES)
    unit = 10 * model.kv_unit_bytes_per_token
    assert flows == {
        PLACES["a-0"]: [Flow(PLACES["a-1"], 4 * unit)],
        PLACES["b-0"]: [Flow(PLACES["a-0"], 4 * unit), Flow(PLACES["a-1"], 4 * unit)],
    }


def test_kv_of_the_same_shape_on_the_same_ranks_stays(model):
    old = pipeline("p1", (0, 1, ["a-0"]), (2, 3, ["a-1"]))
    assert kv_flows(model, old, old, 10, PLACES) == {}
