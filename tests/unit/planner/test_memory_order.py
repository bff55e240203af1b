from itertools import permutations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.core.memory_order import memory_order


def peak_of(grow, release, room, order):
    beyond, peak = -room, 0.0
    for layer in order:
        peak = max(peak, (beyond + grow[layer]).max())
        beyond = beyond + grow[layer] - release[layer]
    return peak


@st.composite
def moves(draw):
    num_layers, num_ranks = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    sizes = st.lists(st.integers(0, 4), min_size=num_ranks, max_size=num_ranks)
    grow, release = (np.array([draw(sizes) for _ in range(num_layers)], dtype=float) for _ in range(2))
    return grow, release, np.array(draw(sizes), dtype=float)


@settings(max_examples=200, deadline=None)
@given(moves=moves(), bound=st.integers(0, 6))
def test_the_bound_is_kept_whenever_some_order_keeps_it(moves, bound):
    grow, release, room = moves
    preferred = range(len(grow))
    order, peak = memory_order(grow, release, room, bound, preferred)
    assert sorted(order) == list(preferred)
    assert peak == peak_of(grow, release, room, order)
    least = min(peak_of(grow, release, room, other) for other in permutations(preferred))
    assert (peak <= bound) == (least <= bound)


@settings(max_examples=50, deadline=None)
@given(moves=moves())
def test_without_a_bound_the_preferred_order_stays(moves):
    preferred = list(reversed(range(len(moves[0]))))
    grow, release, room = moves
    order, _ = memory_order(grow, release, room, float("inf"), preferred)
    assert order == preferred


def test_a_large_model_is_ordered_in_bounded_time():
    """Every layer swaps between two ranks: the bound of half a layer cannot be kept, that of one can."""
    grow = np.tile([[1.0, 0.0], [0.0, 1.0]], (40, 1))
    release = grow[:, ::-1].copy()
    order, peak = memory_order(grow, release, np.zeros(2), 1.0, range(80))
    assert peak == 1.0
    assert sorted(order) == list(range(80))
    assert memory_order(grow, release, np.zeros(2), 0.5, range(80))[1] == 1.0
