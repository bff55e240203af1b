from engine.core.roles import RoleChange, change_role, position_of, transfers_by_unit
from planner.protocol import (
    EMBEDDING_LAYER,
    Explanation,
    ModelShape,
    Pipeline,
    Plan,
    Retiring,
    Shard,
    Stage,
    Transfer,
    UnitRange,
)

MODEL = ModelShape(
    name="m",
    num_layers=6,
    num_head_groups=4,
    decoder_unit_bytes=1,
    embedding_unit_bytes=1,
    head_unit_bytes=1,
    kv_unit_bytes_per_token=1,
    kv_block_tokens=16,
    max_model_len=64,
    hidden_bytes_per_token=1,
    tied_embeddings=False,
)


def pipeline(name: str, *stages: list[str]) -> Pipeline:
    """`stages`: the ranks of each stage; layers and head groups are shared out evenly."""
    per_stage = MODEL.num_layers // len(stages)
    return Pipeline(
        id=name,
        stages=[
            Stage(
                first_layer=i * per_stage,
                last_layer=(i + 1) * per_stage - 1,
                shards=[
                    Shard(
                        rank=rank,
                        instance=rank,
                        first_group=j * MODEL.num_head_groups // len(ranks),
                        last_group=(j + 1) * MODEL.num_head_groups // len(ranks) - 1,
                    )
                    for j, rank in enumerate(ranks)
                ],
            )
            for i, ranks in enumerate(stages)
        ],
        max_batch=4,
        num_kv_blocks=8,
    )


def plan(*pipelines: Pipeline, retiring: tuple[Retiring, ...] = ()) -> Plan:
    return Plan(
        epoch=7,
        model=MODEL,
        pipelines=list(pipelines),
        retiring=list(retiring),
        transfers={},
        addresses={},
        explanation=Explanation(
            cause="test", cause_at_s=0, decided_at_s=0, arrivals_per_s=0, num_ranks=0, chosen=None, alternatives=[]
        ),
        next_pipeline_number=9,
    )


def change(
    new: Plan, running: str | None, prepared: set[str] | None = None, ended: set[str] | None = None
) -> RoleChange:
    return change_role(new, "a", running, frozenset(prepared or ()), frozenset(ended or ()))


def test_position_of_every_rank() -> None:
    new = plan(pipeline("p1", ["a"]), pipeline("p2", ["b", "c"], ["d", "e"]))
    positions = [position_of(new, rank) for rank in "abcde"]
    assert [p and (p.pipeline.id, p.stage, p.shard, p.index, p.leads) for p in positions] == [
        ("p1", 0, 0, 0, True),
        ("p2", 0, 0, 0, True),
        ("p2", 0, 1, 1, False),
        ("p2", 1, 0, 2, False),
        ("p2", 1, 1, 3, False),
    ]
    assert position_of(new, "unknown") is None


def test_a_position_needs_the_units_of_its_layers_and_groups_with_embedding_and_head_at_the_ends() -> None:
    new = plan(pipeline("p2", ["b", "c"], ["d", "e"]))
    first, last = position_of(new, "c"), position_of(new, "d")
    assert first is not None
    assert last is not None
    assert first.units(MODEL) == {(layer, group) for layer in (EMBEDDING_LAYER, 0, 1, 2) for group in (2, 3)}
    assert last.units(MODEL) == {(layer, group) for layer in (3, 4, 5, MODEL.num_layers) for group in (0, 1)}


def test_a_new_position_is_prepared_while_the_retiring_pipeline_goes_on() -> None:
    old, new = pipeline("p1", ["a"]), pipeline("p2", ["a"], ["b"])
    result = change(plan(new, retiring=(Retiring(pipeline=old, reason="shape"),)), "p1")
    assert result.abort is None
    assert result.discard == ()
    assert result.prepare is not None
    assert result.prepare.pipeline == new


def test_nothing_to_do_about_a_pipeline_that_stays() -> None:
    assert change(plan(pipeline("p1", ["a"])), "p1") == RoleChange()
    assert change(plan(pipeline("p1", ["a"])), None, {"p1"}) == RoleChange()


def test_a_broken_or_fenced_off_pipeline_is_aborted() -> None:
    old = pipeline("p1", ["a"], ["b"])
    assert change(plan(retiring=(Retiring(pipeline=old, reason="b died", broken=True),)), "p1").abort == "p1"
    assert change(plan(), "p1").abort == "p1"


def test_what_is_not_in_the_plan_is_discarded() -> None:
    result = change(plan(pipeline("p3", ["a"])), "p1", {"p2", "p0"})
    assert result.discard == ("p0", "p2")
    assert result.prepare is not None
    assert change(plan(), None, {"p2"}).discard == ("p2",)
    # Also if it retires: it never started, so there is nothing to arrange.
    retiring = Retiring(pipeline=pipeline("p2", ["a"]), reason="superseded")
    assert change(plan(retiring=(retiring,)), None, {"p2"}).discard == ("p2",)


def test_a_retiring_pipeline_that_comes_back_goes_on_running() -> None:
    old, new = pipeline("p1", ["a"]), pipeline("p2", ["a"], ["b"])
    assert change(plan(old), "p1", {"p2"}) == RoleChange(discard=("p2",))
    assert change(plan(old, new), "p1").prepare is None


def test_a_pipeline_that_has_ended_here_is_not_prepared_again() -> None:
    assert change(plan(pipeline("p1", ["a"])), None, ended={"p1"}) == RoleChange()


def test_sources_by_unit() -> None:
    transfers = [
        Transfer(units=UnitRange(first_layer=0, last_layer=1, first_group=0, last_group=0), sources=["b", "c"]),
        Transfer(units=UnitRange(first_layer=1, last_layer=1, first_group=1, last_group=1), sources=["c"]),
    ]
    assert transfers_by_unit(transfers) == {(0, 0): ["b", "c"], (1, 0): ["b", "c"], (1, 1): ["c"]}
