import numpy as np
import pytest

from loadtest.simulator.arrivals import Fixed, LogNormal, gamma, make_requests, per_minute, poisson


def rng(seed=7):
    return np.random.default_rng(seed)


def cv_of_gaps(arrivals_s):
    gaps = np.diff(arrivals_s)
    return gaps.std() / gaps.mean()


@pytest.mark.parametrize("cv", [0.2, 1.0, 3.0])
def test_gamma_has_the_rate_and_the_variation_that_it_names(cv):
    arrivals_s = gamma(2.0, cv, 50_000.0, rng())
    assert len(arrivals_s) == pytest.approx(100_000, rel=0.05)
    assert cv_of_gaps(arrivals_s) == pytest.approx(cv, rel=0.05)
    assert arrivals_s[0] >= 0
    assert arrivals_s[-1] < 50_000.0
    assert arrivals_s == sorted(arrivals_s)


def test_gamma_without_variation_is_even():
    assert gamma(0.5, 0.0, 9.0, rng()) == [2.0, 4.0, 6.0, 8.0]


def test_poisson():
    arrivals_s = poisson(1.0, 20_000.0, rng())
    assert cv_of_gaps(arrivals_s) == pytest.approx(1.0, rel=0.05)
    # Independent: the number in disjoint windows varies as much as its mean.
    counts = np.histogram(arrivals_s, bins=200, range=(0, 20_000))[0]
    assert counts.var() == pytest.approx(counts.mean(), rel=0.3)


def test_per_minute_follows_its_rates():
    arrivals_s = per_minute([10.0, 0.0, 20.0], rng(), scale=2.0)
    counts = np.histogram(arrivals_s, bins=[0, 60, 120, 180])[0]
    assert counts[0] == pytest.approx(1200, rel=0.1)
    assert counts[1] == 0
    assert counts[2] == pytest.approx(2400, rel=0.1)
    assert arrivals_s == sorted(arrivals_s)


def test_the_same_seed_gives_the_same_requests():
    def draw(seed):
        source = rng(seed)
        lengths = LogNormal(mean=100, cv=1.0, maximum=1000)
        return make_requests(gamma(1.0, 6.0, 1000.0, source), lengths, lengths, source)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_no_rate_no_requests():
    assert gamma(0.0, 6.0, 100.0, rng()) == []


@pytest.mark.parametrize(
    ("rate_per_s", "cv", "field"), [(-1.0, 1.0, "rate_per_s"), (1.0, -1.0, "cv"), (float("nan"), 1, "rate")]
)
def test_what_cannot_be_is_refused(rate_per_s, cv, field):
    with pytest.raises(ValueError, match=field):
        gamma(rate_per_s, cv, 10.0, rng())


def test_lognormal_lengths():
    lengths = LogNormal(mean=200, cv=0.5, maximum=10_000)
    source = rng()
    drawn = np.array([lengths.draw(source) for _ in range(20_000)])
    assert drawn.mean() == pytest.approx(200, rel=0.03)
    assert drawn.std() / drawn.mean() == pytest.approx(0.5, rel=0.05)


def test_lengths_stay_within_their_bounds():
    source = rng()
    drawn = {LogNormal(mean=2, cv=5.0, maximum=8).draw(source) for _ in range(1000)}
    assert min(drawn) == 1
    assert max(drawn) == 8


def test_fixed_lengths():
    source = rng()
    assert {Fixed(5).draw(source) for _ in range(10)} == {5}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fixed(0),
        lambda: LogNormal(mean=0, cv=1, maximum=5),
        lambda: LogNormal(mean=5, cv=-1, maximum=5),
        lambda: LogNormal(mean=5, cv=1, maximum=0),
    ],
)
def test_lengths_that_cannot_be_are_refused(make):
    with pytest.raises(ValueError, match=":"):
        make()
