from __future__ import annotations

import pytest

from engine.backends.tensorrt_llm.versions import check_version
from engine.errors import EngineUnavailable


@pytest.mark.parametrize("version", ["1.2.1", "1.2.2", "1.2.10", "1.2.1+cu130", "1.2.1.post1"])
def test_versions_with_the_arguments_of_1_2_1_are_taken(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.21.0", "1.1.0", "1.2.0", "1.2.0rc7", "1.2.1rc1", "1.2"])
def test_versions_that_corrupt_the_kv_cache_are_refused_with_the_reason(version: str) -> None:
    with pytest.raises(EngineUnavailable, match=r"corrupts the KV cache.*#12770.*pip install"):
        check_version(version)


@pytest.mark.parametrize("version", ["1.3.0", "1.3.0rc25", "2.0"])
def test_versions_with_other_arguments_are_refused(version: str) -> None:
    with pytest.raises(EngineUnavailable, match="arguments differ"):
        check_version(version)


def test_a_version_that_is_none_is_named() -> None:
    with pytest.raises(EngineUnavailable, match="'unknown'"):
        check_version("unknown")
