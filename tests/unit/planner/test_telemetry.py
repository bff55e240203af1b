import pytest

from planner.telemetry import Tracing, line


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        (3, "3"),
        ("two words", '"two words"'),
        ("", '""'),
        ('a"b\nc', '"a\'b\\nc"'),
        ("a=b", '"a=b"'),
    ],
)
def test_lines_stay_one_line(value, shown):
    assert line("event", name=value) == f"event name={shown}"


def test_no_trace_unless_asked_for(make_world):
    world = make_world()
    world.join("i1")
    tracing = Tracing({})
    assert tracing.record_plan(world.plan, 0.001, world.now_s) == {}
    tracing.close()


def test_plan_span_says_what_was_decided(make_world, capsys):
    world = make_world()
    world.join("i1")
    tracing = Tracing({"OTEL_TRACES_EXPORTER": "console"})
    headers = tracing.record_plan(world.plan, 0.001, world.now_s)
    tracing.close()
    printed = capsys.readouterr().err
    assert headers["traceparent"].split("-")[1] in printed
    assert '"spotserve.epoch": 1' in printed
    assert '"spotserve.config": "1x1x1"' in printed
