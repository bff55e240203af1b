import math

import pytest

from planner.core.rollout import ARRANGE_MARGIN_S, MAX_SENDS, RESEND_S, Retirement
from planner.protocol import Pipeline, Retiring


@pytest.fixture
def make_retirement():
    def make(deadline_s=None, shares_ranks=True, **fields):
        pipeline = Pipeline(id="p1", stages=[], max_batch=1, num_kv_blocks=1)
        retiring = Retiring(pipeline=pipeline, reason="", deadline_s=deadline_s)
        return Retirement(retiring=retiring, shares_ranks=shares_ranks, migration_s=2.0, **fields)

    return make


def test_acquisition_waits_for_the_new_ranks(make_retirement):
    assert make_retirement().arrange_at_s(False, 10.0) == math.inf
    assert make_retirement().arrange_at_s(True, 10.0) == 10.0


def test_preemption_waits_no_longer_than_it_can(make_retirement):
    assert make_retirement(deadline_s=40.0).arrange_at_s(False, 10.0) == 40.0 - 2.0 - ARRANGE_MARGIN_S
    assert make_retirement(deadline_s=40.0).arrange_at_s(True, 10.0) == 10.0
    assert make_retirement(deadline_s=40.0, shares_ranks=False).arrange_at_s(False, 10.0) == 10.0


def test_it_is_asked_again_after_it_should_have_stopped(make_retirement):
    assert make_retirement(num_sent=1, sent_at_s=10.0).arrange_at_s(True, 10.5) == 10.0 + RESEND_S
    with_deadline = make_retirement(deadline_s=40.0, num_sent=1, sent_at_s=10.0)
    assert with_deadline.arrange_at_s(True, 10.5) == 38.0 + RESEND_S
    assert make_retirement(num_sent=MAX_SENDS, sent_at_s=10.0).arrange_at_s(True, 99.0) == math.inf
