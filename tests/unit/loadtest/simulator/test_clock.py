from loadtest.simulator.clock import Clock


def test_timers_fire_in_order_of_time_then_of_setting():
    clock, fired = Clock(), []
    clock.at(2.0, lambda: fired.append("late"))
    clock.at(1.0, lambda: fired.append("first"))
    clock.at(1.0, lambda: fired.append("second"))
    clock.run()
    assert fired == ["first", "second", "late"]
    assert clock.now_s == 2.0


def test_a_cancelled_timer_does_not_fire():
    clock, fired = Clock(), []
    timer = clock.at(1.0, lambda: fired.append("cancelled"))
    clock.at(0.5, timer.cancel)
    clock.run()
    assert fired == []
    assert clock.next_s() == float("inf")


def test_run_ends_at_its_limit_and_what_is_due_later_stays():
    clock, fired = Clock(), []
    clock.at(1.0, lambda: fired.append(1))
    clock.at(3.0, lambda: fired.append(3))
    clock.run(until_s=2.0)
    assert (fired, clock.now_s) == ([1], 2.0)
    clock.run(until_s=3.0)
    assert fired == [1, 3]


def test_run_ends_when_nobody_wants_it_to_go_on():
    clock = Clock()
    fired: list[float] = []
    for at_s in (1.0, 2.0, 3.0):
        clock.at(at_s, lambda: fired.append(clock.now_s))
    clock.run(wanted=lambda: len(fired) < 2)
    assert (fired, clock.now_s) == ([1.0, 2.0], 2.0)


def test_a_time_that_has_passed_means_now():
    clock, fired = Clock(5.0), []
    clock.at(1.0, lambda: fired.append(clock.now_s))
    clock.run()
    assert fired == [5.0]
