import pytest

from loadtest.simulator.network import Flow, Network, Place
from planner.core.links import Links

A0, A1, B0, C0 = Place("a", "a-0"), Place("a", "a-1"), Place("b", "b-0"), Place("c", "c-0")


@pytest.fixture
def network():
    return Network(Links(inter_bytes_per_s=100.0, intra_bytes_per_s=1000.0, disk_bytes_per_s=10.0, fixed_s=0.5))


def test_each_kind_of_link_has_its_rate(network):
    done_s = network.move({A0: [Flow(B0, 100)], A1: [Flow(A0, 100)], C0: [Flow(None, 100)]}, 10.0)
    assert done_s == {A0: 11.5, A1: pytest.approx(10.6), C0: 20.5}


def test_a_sender_serves_one_receiver_after_the_other(network):
    done_s = network.move({A0: [Flow(B0, 100)], C0: [Flow(B0, 100)]}, 0.0)
    assert sorted(done_s.values()) == [1.5, 2.5]


def test_ranks_of_one_instance_share_its_network(network):
    done_s = network.move({A0: [Flow(B0, 100)], A1: [Flow(C0, 100)]}, 0.0)
    assert sorted(done_s.values()) == [1.5, 2.5]


def test_links_are_busy_for_later_moves(network):
    network.move({A0: [Flow(B0, 100)]}, 0.0)
    assert network.move({A0: [Flow(C0, 100)]}, 0.0) == {A0: 2.5}


def test_what_would_come_too_late_does_not_move(network):
    assert network.move({A0: [Flow(B0, 1000)]}, 0.0, by_s=5.0) == {A0: 10.5}
    assert network.move({A0: [Flow(B0, 100)]}, 0.0, by_s=5.0) == {A0: 1.5}


def test_nothing_to_move_takes_no_time(network):
    assert network.move({A0: []}, 3.0) == {A0: 3.0}
