import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.core.queueing import mean_service_and_wait_s, pooled_wait_s


def erlang_c_wait_s(num_servers, arrivals_per_s, service_s):
    """Mean wait of M/M/c."""
    offered = arrivals_per_s * service_s
    load = offered / num_servers
    last = offered**num_servers / math.factorial(num_servers) / (1 - load)
    waits = last / (sum(offered**n / math.factorial(n) for n in range(num_servers)) + last)
    return waits * service_s / (num_servers * (1 - load))


@pytest.mark.parametrize("max_batch", [1, 3, 10])
@pytest.mark.parametrize("load", [0.1, 0.5, 0.9])
def test_shared_rate_is_mm1(max_batch, load):
    # Whatever the batch, work is done at one rate: the time in the system is that of M/M/1.
    service_s, wait_s = mean_service_and_wait_s(np.full(max_batch, 2.0), 2.0 * load, variability=1.0)
    assert service_s + wait_s == pytest.approx(1 / (2.0 * (1 - load)))


@pytest.mark.parametrize("num_servers", [1, 2, 8])
@pytest.mark.parametrize("load", [0.1, 0.5, 0.9])
def test_sequences_that_do_not_slow_each_other_are_servers(num_servers, load):
    completions = np.arange(1, num_servers + 1) / 3.0
    arrivals_per_s = load * num_servers / 3.0
    service_s, wait_s = mean_service_and_wait_s(completions, arrivals_per_s, variability=1.0)
    assert service_s == pytest.approx(3.0)
    assert wait_s == pytest.approx(erlang_c_wait_s(num_servers, arrivals_per_s, 3.0))


def test_equal_lengths_wait_half_as_long():
    completions = np.array([1.0, 1.5])
    equal, random = (mean_service_and_wait_s(completions, 1.2, variability) for variability in (0.5, 1.0))
    assert equal[0] == random[0]
    assert equal[1] == pytest.approx(random[1] / 2)


def test_no_arrivals_and_too_many():
    completions = np.array([0.5, 0.8])
    assert mean_service_and_wait_s(completions, 0.0) == (2.0, 0.0)
    assert mean_service_and_wait_s(completions, 0.8) == (math.inf, math.inf)


def test_large_batches_do_not_overflow():
    completions = np.linspace(0.1, 50.0, 2000)
    for arrivals_per_s in (1e-6, 1.0, 49.9):
        service_s, wait_s = mean_service_and_wait_s(completions, arrivals_per_s)
        assert 0 < service_s < math.inf
        assert 0 <= wait_s < math.inf


@settings(max_examples=100, deadline=None)
@given(
    rates=st.lists(st.floats(0.1, 2.0), min_size=1, max_size=20),
    loads=st.tuples(st.floats(0.01, 0.95), st.floats(0.01, 0.95)),
)
def test_wait_grows_with_load(rates, loads):
    completions = np.cumsum(np.array(rates))
    low, high = (mean_service_and_wait_s(completions, load * float(completions[-1]))[1] for load in sorted(loads))
    assert low <= high * (1 + 1e-9)


@pytest.mark.parametrize("load", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("num_pipelines", [1, 2, 5, 12])
def test_pooled_wait_is_near_the_multi_server_queue(load, num_pipelines):
    one_s = erlang_c_wait_s(1, load / 2.0, 2.0)
    exact_s = erlang_c_wait_s(num_pipelines, num_pipelines * load / 2.0, 2.0)
    # Off by more only where there is next to no wait: 2.5 % of a service of 2 s.
    assert pooled_wait_s(one_s, load, num_pipelines) == pytest.approx(exact_s, rel=0.1, abs=0.05)


def test_bursts_wait_longer_and_even_arrivals_hardly():
    completions = np.array([1.0, 1.5])
    service_s, waits_s = zip(*(mean_service_and_wait_s(completions, 1.2, v) for v in (0.0, 0.5, 18.5)), strict=True)
    assert service_s[0] == service_s[1] == service_s[2]
    assert waits_s[0] == 0.0 < waits_s[1]
    assert waits_s[2] == pytest.approx(37 * waits_s[1])
