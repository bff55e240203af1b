"""The queue: bounded for the new, first come first served, the interrupted first, nobody waits for ever."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.core.admission_queue import AdmissionQueue


def make(max_waiting=3):
    return AdmissionQueue(max_waiting, queue_timeout_s=60.0, no_pipeline_timeout_s=300.0)


def drain(queue, now_s=0.0):
    order = []
    while (item := queue.first(now_s)) is not None:
        queue.take(item, now_s)
        order.append(item)
    return order


def test_first_come_first_served():
    queue = make()
    for item in "abc":
        assert queue.push([item], 600.0, 0.0).accepted
    assert drain(queue) == ["a", "b", "c"]


def test_full_takes_all_of_a_request_or_nothing():
    queue = make()
    assert queue.push(["a", "b"], 600.0, 0.0).accepted
    assert not queue.push(["c", "d"], 600.0, 0.0).accepted
    assert len(queue) == 2
    assert queue.push(["e"], 600.0, 0.0).accepted


def test_large_request_is_taken_when_nothing_waits():
    assert make().push(list("abcdef"), 600.0, 0.0).accepted


def test_interrupted_go_first_in_the_order_of_arrival_and_take_no_room():
    queue = make()
    queue.push(["a", "b", "c"], 600.0, 0.0)
    assert drain(queue) == ["a", "b", "c"]
    queue.push(["d", "e", "f"], 600.0, 1.0)
    for item in "cab":
        queue.put_back(item, 600.0, interrupted=True)
    assert len(queue) == 6
    assert not queue.push(["g"], 600.0, 1.0).accepted
    assert drain(queue) == ["a", "b", "c", "d", "e", "f"]


def test_refused_goes_back_to_its_place_after_a_pause():
    queue = make()
    queue.push(["a", "b"], 600.0, 0.0)
    queue.take("a", 0.0)
    queue.put_back("a", 600.0, interrupted=False, not_before_s=0.5)
    assert queue.first(0.0) == "b"
    assert queue.first(0.5) == "a"


def test_expiry():
    queue = make()
    queue.push(["a"], 600.0, 0.0)
    assert queue.expire(59.0, 0.0) == []
    assert queue.expire(60.0, 0.0) == ["a"]
    assert len(queue) == 0


def test_wait_without_a_pipeline_is_longer_and_starts_again_when_there_is_one():
    queue = make()
    queue.push(["a", "b"], 600.0, 0.0)
    assert queue.expire(200.0, None) == []
    assert queue.expire(201.0, 200.0) == []
    assert queue.expire(260.0, 200.0) == ["a", "b"]
    queue.push(["c"], 600.0, 0.0)
    assert queue.expire(300.0, None) == ["c"]


def test_interrupted_wait_until_their_deadline():
    queue = make()
    queue.push(["a"], 600.0, 0.0)
    queue.take("a", 0.0)
    queue.put_back("a", 600.0, interrupted=True)
    assert queue.expire(599.0, 0.0) == []
    assert queue.expire(600.0, 0.0) == ["a"]


def test_forget():
    queue = make()
    queue.push(["a", "b"], 600.0, 0.0)
    queue.forget("a")
    assert drain(queue) == ["b"]


def test_retry_after_follows_the_rate():
    queue = make(100)
    queue.push([f"x{i}" for i in range(60)], 600.0, 0.0)
    assert queue.retry_after_s(0.0) == 60
    for i in range(30):
        queue.take(f"x{i}", float(i))
    assert queue.retry_after_s(29.0) == 30
    assert queue.retry_after_s(1000.0) == 30
    assert make().retry_after_s(0.0) == 1


@given(st.lists(st.tuples(st.sampled_from(["push", "take", "back", "forget"]), st.integers(0, 9)), max_size=80))
def test_nothing_is_lost_or_doubled(script):
    queue = make(5)
    waiting: set[str] = set()
    away: set[str] = set()
    for step, (kind, number) in enumerate(script):
        item = f"i{number}"
        if kind == "push" and item not in waiting | away and queue.push([item], 1e9, step).accepted:
            waiting.add(item)
        elif kind == "take" and (first := queue.first(step)) is not None:
            queue.take(first, step)
            waiting.remove(first)
            away.add(first)
        elif kind == "back" and item in away:
            queue.put_back(item, 1e9, interrupted=True)
            away.remove(item)
            waiting.add(item)
        elif kind == "forget":
            queue.forget(item)
            waiting.discard(item)
            away.discard(item)
        assert len(queue) == len(waiting)
    assert sorted(drain(queue)) == sorted(waiting)
