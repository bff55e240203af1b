"""How long a request will run, from those before it: exponentially weighted means. Pure."""

from __future__ import annotations

_WEIGHT = 0.05
"""Of the newest sample, once there are 20."""


class _Mean:
    def __init__(self) -> None:
        self.value = 0.0
        self._num = 0

    def add(self, sample: float) -> None:
        self._num += 1
        self.value += max(_WEIGHT, 1 / self._num) * (sample - self.value)


class ServiceTimes:
    """Means of what this gateway has seen; nothing is expected before the first request has ended."""

    def __init__(self) -> None:
        self._output_tokens = _Mean()
        self._prefill_s = _Mean()
        self._token_s = _Mean()
        self._known = False

    def first_token(self, waited_s: float) -> None:
        """A pipeline has given the first token `waited_s` after it was asked."""
        self._prefill_s.add(waited_s)

    def ended(self, num_tokens: int, decode_s: float) -> None:
        """A choice has ended after `num_tokens`; all but the first took `decode_s`."""
        self._known = True
        self._output_tokens.add(num_tokens)
        if num_tokens > 1:
            self._token_s.add(decode_s / (num_tokens - 1))

    def expected_output_tokens(self, max_tokens: int, *, to_the_end: bool = False) -> int:
        """Of a request that may have `max_tokens`; `to_the_end`: nothing else ends it (ignore_eos)."""
        if to_the_end or not self._known:
            return max_tokens
        return max(1, min(max_tokens, round(self._output_tokens.value)))

    def expected_s(self, num_output_tokens: int) -> float | None:
        """From the submission to the last token; None: nothing is known yet."""
        return self._prefill_s.value + num_output_tokens * self._token_s.value if self._known else None
