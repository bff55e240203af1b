"""Just-in-time arrangement: how long a pipeline under notice may go on before its KV must start to leave."""

from __future__ import annotations


def stop_at_s(now_s: float, deadline_s: float | None, migration_s: float, margin_s: float) -> float:
    """The point in time (Unix seconds) at which the last step must have been committed; never before `now_s`.

    `deadline_s` None is an acquisition: the new instance is there already, so every step taken is taken on the
    old configuration, and the time to stop is now.
    """
    if deadline_s is None:
        return now_s
    return max(now_s, deadline_s - migration_s - margin_s)


def steps_before_stop(
    now_s: float, deadline_s: float | None, migration_s: float, step_s: float, margin_s: float
) -> int:
    """The most steps of `step_s` each that still leave `migration_s + margin_s` before the deadline.

    0 for an acquisition (`deadline_s` None), and where it is too late already. Raises ValueError for a step time
    that is not positive.
    """
    if not step_s > 0:
        raise ValueError(f"step_s: must be positive, got {step_s}")
    return int((stop_at_s(now_s, deadline_s, migration_s, margin_s) - now_s) // step_s)
