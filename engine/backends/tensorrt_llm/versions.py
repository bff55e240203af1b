"""Which TensorRT-LLM may be used."""

from __future__ import annotations

import re
from typing import Final

from engine.errors import EngineUnavailable

OLDEST: Final = (1, 2, 1)
FIRST_UNKNOWN: Final = (1, 3)
INSTALL: Final = "pip install 'spotserve[tensorrt]' on a machine with an NVIDIA driver"


def check_version(version: str) -> None:
    """Raises EngineUnavailable, with the reason, for a version whose arguments or results are not to be trusted."""
    numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    if numbers is None:
        raise EngineUnavailable(f"TensorRT-LLM {version!r} is no version that is known here; {INSTALL}")
    parts = tuple(int(number or 0) for number in numbers.groups())
    is_candidate = re.search(r"\d(a|b|rc|\.dev)\d*", version) is not None
    if parts < OLDEST or (parts == OLDEST and is_candidate):
        raise EngineUnavailable(
            f"TensorRT-LLM {version} corrupts the KV cache where block reuse meets chunked prefill "
            f"(NVIDIA/TensorRT-LLM#12770, fixed in 1.2.1), and both are in use here: {INSTALL}"
        )
    if parts[:2] >= FIRST_UNKNOWN:
        raise EngineUnavailable(
            f"TensorRT-LLM {version}: its arguments differ from those of 1.2.1, for which this is written; {INSTALL}"
        )
