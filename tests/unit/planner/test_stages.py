from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.core.stages import split_layers


@given(st.integers(1, 9), st.data(), st.floats(0, 12))
def test_split_is_a_partition_and_no_other_is_faster(num_layers, data, head):
    num_stages = data.draw(st.integers(1, num_layers))
    stages = split_layers(num_layers, num_stages, head)
    assert [n for first, last in stages for n in range(first, last + 1)] == list(range(num_layers))
    assert len(stages) == num_stages

    def slowest(sizes):
        return max([*sizes[:-1], sizes[-1] + head])

    best = min(
        slowest([b - a for a, b in zip((0, *cuts), (*cuts, num_layers), strict=True)])
        for cuts in combinations(range(1, num_layers), num_stages - 1)
    )
    assert slowest([last - first + 1 for first, last in stages]) == pytest.approx(best)


def test_head_makes_the_last_stage_shorter():
    assert split_layers(30, 3, 8.0) == [(0, 12), (13, 24), (25, 29)]


@pytest.mark.parametrize("num_stages", [0, 4])
def test_impossible_number_of_stages(num_stages):
    with pytest.raises(ValueError, match="num_stages"):
        split_layers(3, num_stages)
