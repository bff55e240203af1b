"""Keys, and what their rates and budgets let through."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.keys import KeyRing
from gateway.core.rate_limits import RateLimits, TokenBucket
from gateway.errors import ApiError
from gateway.protocol import KeyRecord, KeyUsage, hash_secret

SECRET = "s" * 43


def record(id_="aaaaaaaa", **limits):
    return KeyRecord(id=id_, salt="00ff", sha256=hash_secret("00ff", SECRET), **limits)


def admit(limits, key, prompt_tokens, now_s):
    limits.check(key, prompt_tokens, now_s)
    limits.admitted(key, prompt_tokens, now_s)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        f"Basic sk-aaaaaaaa-{SECRET}",
        f"sk-aaaaaaaa-{SECRET}",
        f"Bearer sk-aaaaaaaa-{SECRET}x",
        f"Bearer sk-bbbbbbbb-{SECRET}",
        "Bearer sk-00000000-",
        "Bearer sk-00000000-aaaaaaaaaaaaaaaaaaaaaaaa",
        "Bearer é",
    ],
)
def test_refused(header):
    with pytest.raises(ApiError) as caught:
        KeyRing([record()]).authenticate(header, 0.0)
    assert caught.value.status == 401
    assert SECRET not in caught.value.message


def test_accepted_until_it_expires():
    ring = KeyRing([record(expires_s=10.0, priority_class=3)])
    principal = ring.authenticate(f"bearer  sk-aaaaaaaa-{SECRET}", 9.9)
    assert (principal.id, principal.tenant.priority_class) == ("aaaaaaaa", 3)
    with pytest.raises(ApiError, match="expired"):
        ring.authenticate(f"Bearer sk-aaaaaaaa-{SECRET}", 10.0)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 40)), max_size=60))
def test_a_bucket_lets_through_its_limit_and_one_burst(steps):
    bucket, now_s, taken = TokenBucket(30, 0.0), 0.0, 0
    for pause_s, amount in steps:
        now_s += pause_s
        wait_s = bucket.wait_s(amount, now_s)
        if wait_s == 0.0:
            bucket.take(amount, now_s)
            taken += amount
            # A single amount above the limit is let through a full bucket, and leaves a debt.
            assert taken <= 30 + 30 * now_s / 60 + 10 + 1e-6
        else:
            now_s += wait_s + 1e-6
            assert bucket.wait_s(amount, now_s) == 0.0


def test_what_other_gateways_let_through_counts():
    limits, key = RateLimits("gw0"), record(requests_per_minute=10, budget_tokens=100)
    admit(limits, key, 5, 0.0)
    limits.observe(KeyUsage(gateway="gw1", requests={key.id: 6}, tokens={key.id: 20}), 0.0, past=False)
    limits.observe(KeyUsage(gateway="gw1", requests={key.id: 9}, tokens={key.id: 30}), 0.0, past=False)
    assert limits.headers(key, 0.0)["x-ratelimit-remaining-requests"] == "0"
    assert limits.used_tokens(key.id) == 35
    with pytest.raises(ApiError, match="10 requests a minute") as caught:
        admit(limits, key, 1, 0.0)
    assert caught.value.headers["retry-after"] == "6"
    limits.observe(KeyUsage(gateway="gw1", tokens={key.id: 95}), 6.0, past=False)
    with pytest.raises(ApiError, match="budget of 100 tokens"):
        admit(limits, key, 1, 6.0)


def test_a_budget_goes_on_after_a_restart_and_a_rate_begins_again():
    before, key = RateLimits("gw0"), record(requests_per_minute=1, budget_tokens=100)
    admit(before, key, 60, 0.0)
    after = RateLimits("gw0")
    admit(after, key, 10, 5.0)
    after.observe(before.usage(), 5.0, past=True)
    after.observe(KeyUsage(gateway="gw1", tokens={key.id: 7}), 5.0, past=True)
    assert after.used_tokens(key.id) == 77
    assert after.usage().tokens == {key.id: 70}
    after.observe(after.usage(), 5.0, past=False)
    assert after.used_tokens(key.id) == 77


def test_new_limits_of_a_key_hold_at_once():
    limits = RateLimits("gw0")
    admit(limits, record(requests_per_minute=1), 1, 0.0)
    admit(limits, record(requests_per_minute=2), 1, 0.0)
    admit(limits, record(), 1, 0.0)
    assert limits.headers(record(), 0.0) == {}
