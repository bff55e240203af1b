import json

import pytest

from loadtest.errors import InputError
from loadtest.simulator.inputs import read_rates, read_requests, read_trace
from planner.protocol import Market


@pytest.fixture
def write(tmp_path):
    def write_lines(name, *lines):
        path = tmp_path / name
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
        return path

    return write_lines


ADD = [0, "add", {"nodes": ["n0", "n1"]}]
DONE = [60_000, "DONE", {"nodes": []}]
HEADER = "time_s,event,instance,market"


def test_artifact_trace(write):
    path = write(
        "trace_a.txt",
        ADD,
        [10_000, "remove", {"nodes": ["n0"]}],
        [20_000, "other", {"nodes": [], "required_tpt": 0.8}],
        [30_000, "add", {"nodes": ["n2"], "required_tpt": 0.6}],
        "",
        DONE,
    )
    trace = read_trace(path)
    assert (trace.name, trace.end_s) == ("trace_a", 60.0)
    assert [(e.at_s, e.added, e.removed, e.required_per_s) for e in trace.events] == [
        (0.0, ("n0", "n1"), (), None),
        (10.0, (), ("n0",), None),
        (20.0, (), (), 0.8),
        (30.0, ("n2",), (), None),
        (30.0, (), (), 0.6),
    ]


def test_csv_trace_joins_lines_of_the_same_time_and_market(write):
    path = write(
        "t.csv",
        HEADER,
        "# a comment",
        "0,add,a,spot",
        "0, add ,b,",
        "0,add,c,on_demand",
        "9.5,remove,a,",
        "9.5,remove,b",
        "20,end,,",
    )
    trace = read_trace(path)
    assert [(e.at_s, e.added, e.removed, e.market) for e in trace.events] == [
        (0.0, ("a", "b"), (), Market.SPOT),
        (0.0, ("c",), (), Market.ON_DEMAND),
        (9.5, (), ("a", "b"), Market.SPOT),
    ]
    assert trace.end_s == 20.0


@pytest.mark.parametrize(
    ("lines", "line", "field", "problem"),
    [
        ([ADD, [5, "remove", {"nodes": ["nX"]}], DONE], 2, "nodes", "never added"),
        ([ADD, [5, "remove", {"nodes": ["n0"]}], [6, "remove", {"nodes": ["n0"]}], DONE], 3, "nodes", "removed before"),
        ([ADD, [5, "add", {"nodes": ["n0"]}], DONE], 2, "nodes", "there already"),
        ([ADD, [5, "remove", {"nodes": ["n0"]}], [6, "add", {"nodes": ["n0"]}], DONE], 3, "nodes", "added again"),
        ([[9, "add", {"nodes": ["n0"]}], [5, "other", {}], DONE], 2, "time_ms", "goes back"),
        ([[-1, "add", {"nodes": ["n0"]}], DONE], 1, "time_ms", "negative"),
        ([["soon", "add", {"nodes": ["n0"]}], DONE], 1, "time_ms", "not a number"),
        ([[True, "add", {"nodes": ["n0"]}], DONE], 1, "time_ms", "not a number"),
        ([ADD, [5, "explode", {"nodes": []}], DONE], 2, "operation", "'explode'"),
        ([ADD, [5, "other", {"required_tpt": -1}], DONE], 2, "required_tpt", "negative"),
        ([ADD, [5, "add", {"nodes": "n7"}], DONE], 2, "nodes", "not a list"),
        ([ADD, [5, "add", []], DONE], 2, "nodes", "not an object"),
        ([ADD, [5, "add"], DONE], 2, None, "not an array of"),
        ([ADD, "[5, add]", DONE], 2, None, "not JSON"),
        ([ADD, DONE, [70_000, "add", {"nodes": ["n5"]}]], 3, "time_ms", "has ended"),
        ([ADD], None, "event", "no end"),
        ([[0, "other", {}], DONE], None, "event", "no instance"),
        ([ADD, [0, "DONE", {}]], None, "time", "ends at 0"),
        ([HEADER.replace("market", "price"), "0,add,a,"], 1, "header", HEADER),
        ([HEADER, "0,add,a,,,"], 2, None, "6 fields"),
        ([HEADER, "0,add,,"], 2, "instance", "empty"),
        ([HEADER, "x,add,a,"], 2, "time_s", "not a number"),
        ([HEADER, "nan,add,a,"], 2, "time_s", "not a number"),
        ([HEADER, "0,add,a,black"], 2, "market", "'black'"),
        ([HEADER, "0,vanish,a,"], 2, "event", "'vanish'"),
        ([HEADER, "5,add,a,", "4,remove,a,"], 3, "time_s", "goes back"),
        ([HEADER, "5,add,a,", "6,remove,b,"], 3, "instance", "never added"),
        ([HEADER, "0,add,a,"], None, "event", "no end"),
    ],
)
def test_a_bad_trace_is_refused_with_its_place(write, lines, line, field, problem):
    path = write("bad.csv" if "time_s" in str(lines[0]) else "bad.txt", *lines)
    with pytest.raises(InputError, match=r"bad\.(csv|txt)") as refused:
        read_trace(path)
    assert (refused.value.line, refused.value.field) == (line, field)
    assert problem in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.csv.*No such file"):
        read_trace(tmp_path / "nowhere.csv")


def test_a_file_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "binary.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary\.txt.*UTF-8"):
        read_trace(path)


def test_requests(write):
    requests = read_requests(write("q.txt", "0,2.5,512,0", "1,2.5,16,99"), output_tokens=128)
    assert [(r.id, r.arrival_s, r.prompt_tokens, r.output_tokens) for r in requests] == [
        (0, 2.5, 512, 128),
        (1, 2.5, 16, 128),
    ]


@pytest.mark.parametrize(
    ("lines", "line", "field"),
    [
        (["0,5,512,0", "1,4,512,0"], 2, "arrival_time_s"),
        (["0,5,512,0", "0,6,512,0"], 2, "request_id"),
        (["0,-5,512,0"], 1, "arrival_time_s"),
        (["0,5,0,0"], 1, "prompt_tokens"),
        (["0,5,many,0"], 1, "prompt_tokens"),
        (["x,5,1,0"], 1, "request_id"),
        (["0,5"], 1, None),
        ([""], None, None),
    ],
)
def test_bad_requests_are_refused_with_their_place(write, lines, line, field):
    with pytest.raises(InputError) as refused:
        read_requests(write("q.txt", *lines), output_tokens=1)
    assert (refused.value.line, refused.value.field) == (line, field)


def test_output_length_must_be_positive(write):
    with pytest.raises(InputError, match="output_tokens"):
        read_requests(write("q.txt", "0,5,512,0"), output_tokens=0)


def test_rates(write):
    assert read_rates(write("r.csv", "0.5,0,", "1.5")) == (0.5, 0.0, 1.5)


@pytest.mark.parametrize(("text", "field"), [("0.5,-1", "rate 2"), ("0.5,fast", "rate 2"), ("0,0", None)])
def test_bad_rates_are_refused(write, text, field):
    with pytest.raises(InputError) as refused:
        read_rates(write("r.csv", text))
    assert refused.value.field == field
