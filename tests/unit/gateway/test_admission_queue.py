"""The queue: bounded for the new, first come first served, the interrupted first, nobody waits for ever."""

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.admission_queue import AGING_S, AdmissionQueue, Tenant


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


A, B = Tenant("a"), Tenant("b")


def test_keys_take_turns_by_the_tokens_they_have_had():
    queue = make(100)
    queue.push([f"a{i}" for i in range(6)], 600.0, 0.0, tenant=A, cost_tokens=100)
    queue.push([f"b{i}" for i in range(3)], 600.0, 0.0, tenant=B, cost_tokens=200)
    order = drain(queue)
    assert [item[0] for item in order] == list("abaabaaba")
    assert [item for item in order if item[0] == "a"] == [f"a{i}" for i in range(6)]


def test_a_choice_is_charged_with_what_it_has_really_cost():
    queue = make(100)
    queue.push(["a0", "a1"], 600.0, 0.0, tenant=A, cost_tokens=100)
    queue.push(["b0", "b1", "b2"], 600.0, 0.0, tenant=B, cost_tokens=100)
    assert (queue.first(0.0), queue.take("a0", 0.0)) == ("a0", None)
    assert (queue.first(0.0), queue.take("b0", 0.0)) == ("b0", None)
    queue.forget("a0", used_tokens=250)
    assert drain(queue) == ["b1", "b2", "a1"]


def test_a_key_that_was_away_saves_nothing_up():
    queue = make(1000)
    for i in range(50):
        queue.push([f"a{i}"], 600.0, 0.0, tenant=A, cost_tokens=100)
        queue.take(f"a{i}", 0.0)
    queue.push([f"b{i}" for i in range(4)], 600.0, 0.0, tenant=B, cost_tokens=100)
    queue.push([f"a{i}" for i in range(50, 54)], 600.0, 0.0, tenant=A, cost_tokens=100)
    assert [item[0] for item in drain(queue)] == list("babababa")


def test_classes_and_their_aging():
    queue = make(100)
    low, high = Tenant("low", 1), Tenant("high", 0)
    queue.push(["low0"], 600.0, 0.0, tenant=low)
    queue.push(["high0", "high1"], 600.0, 10.0, tenant=high)
    assert queue.first(10.0) == "high0"
    # After 15 s the low key's turn is as good as any other's; it has had less.
    queue.take("high0", 10.0)
    assert queue.first(14.0) == "high1"
    assert queue.first(15.0) == "low0"


def test_priority_of_a_request_is_among_those_of_its_key():
    queue = make(100)
    queue.push(["a0"], 600.0, 0.0, tenant=A, priority=1)
    queue.push(["a1"], 600.0, 0.0, tenant=A, priority=-7)
    queue.push(["b0"], 600.0, 0.0, tenant=B, priority=9)
    assert drain(queue) == ["a1", "b0", "a0"]
    queue.push(["a2"], 600.0, 0.0, tenant=A, priority=1)
    queue.push(["a3"], 600.0, 10.0, tenant=A, priority=-7)
    assert queue.first(14.0) == "a3"
    assert queue.first(15.0) == "a2"


def test_a_full_queue_sheds_the_newest_request_of_the_greediest():
    queue = make(4)
    queue.push(["a0", "a1"], 600.0, 0.0, tenant=A)
    queue.push(["a2", "a3"], 600.0, 0.0, tenant=A)
    assert not queue.push(["a4"], 600.0, 0.0, tenant=A).accepted
    admission = queue.push(["b0"], 600.0, 0.0, tenant=B)
    assert admission.accepted
    assert len(admission.shed) == 1
    assert admission.shed[0] in ("a2", "a3")
    assert drain(queue) == ["a0", "b0", "a1"]


def test_what_has_begun_is_not_shed():
    queue = make(2)
    queue.push(["a0", "a1"], 600.0, 0.0, tenant=A)
    queue.take("a0", 0.0)
    queue.push(["a2"], 600.0, 0.0, tenant=A)
    assert queue.push(["b0"], 600.0, 0.0, tenant=B).shed == ["a2"]
    assert drain(queue) == ["a1", "b0"]


_pushes = st.tuples(st.just("push"), st.integers(0, 3), st.integers(1, 3))
_others = st.tuples(st.sampled_from(["take", "back", "interrupt", "forget"]), st.integers(0, 20), st.just(0))


@settings(max_examples=200, deadline=None)
@given(st.lists(_pushes | _others, max_size=60))
def test_bound_holds_and_nothing_is_lost_between_keys(script):
    queue, waiting, away, pushed = make(6), set(), set(), 0
    for step, (kind, number, size) in enumerate(script):
        if kind == "push":
            items = [f"i{pushed + i}" for i in range(size)]
            pushed += size
            before = queue.num_new
            admission = queue.push(items, 1e9, step, tenant=Tenant(str(number), number % 2), cost_tokens=number + 1)
            if admission.accepted:
                waiting.update(items)
                assert queue.num_new <= 6 or before == 0
            else:
                assert queue.num_new == before
            # Their owner gives the whole requests up.
            shed = [item for item in waiting if item not in queue]
            assert set(admission.shed) <= set(shed)
            for item in shed:
                waiting.remove(item)
                queue.forget(item)
        elif kind == "take" and (first := queue.first(step)) is not None:
            queue.take(first, step)
            waiting.remove(first)
            away.add(first)
        elif kind in ("back", "interrupt") and away:
            item = sorted(away)[number % len(away)]
            queue.put_back(item, 1e9, interrupted=kind == "interrupt")
            away.remove(item)
            waiting.add(item)
        elif kind == "forget" and away | waiting:
            item = sorted(away | waiting)[number % len(away | waiting)]
            queue.forget(item, used_tokens=number)
            waiting.discard(item)
            away.discard(item)
        assert len(queue) == len(waiting)
    assert sorted(drain(queue, 1e6)) == sorted(waiting)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 50), min_size=30, max_size=30), min_size=2, max_size=4),
    st.integers(1, 100),
)
def test_backlogged_keys_get_the_same_number_of_tokens(costs, num_served):
    """Sheng et al., theorem 4.4: two keys that both wait differ by at most the two largest requests' costs."""
    queue = make(10_000)
    cost_of = {}
    for number, of_key in enumerate(costs):
        for i, cost in enumerate(of_key):
            queue.push([f"k{number}-{i}"], 1e9, 0.0, tenant=Tenant(f"k{number}"), cost_tokens=cost)
            cost_of[f"k{number}-{i}"] = cost
    served = [0] * len(costs)
    left = [len(of_key) for of_key in costs]
    for _ in range(num_served):
        item = queue.first(0.0)
        queue.take(item, 0.0)
        number = int(item[1 : item.index("-")])
        served[number] += cost_of[item]
        left[number] -= 1
        if not all(left):
            return
        assert max(served) - min(served) <= 2 * 50


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=5), st.integers(0, 4))
def test_nobody_starves(classes, victim):
    """One request of one key among endless ones of others, of whatever class: it goes within a bounded time."""
    queue = make(10_000)
    victim %= len(classes)
    queue.push(["victim"], 1e9, 0.0, tenant=Tenant(f"k{victim}", classes[victim]), cost_tokens=5)
    longest_s = (max(classes) - min(classes)) * AGING_S + 3 * len(classes) + 10
    now_s, number = 0.0, 0
    while queue.first(now_s) != "victim":
        for other, class_ in enumerate(classes):
            if other != victim:
                queue.push([f"x{number}"], 1e9, now_s, tenant=Tenant(f"k{other}", class_), cost_tokens=5)
                number += 1
        queue.take(queue.first(now_s), now_s)
        now_s += 1.0
        if queue.first(now_s) == "victim":
            break
        assert now_s <= longest_s
