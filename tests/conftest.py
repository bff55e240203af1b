"""Options and fixtures of all tests."""

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"
DEFAULT_DATA = SHARED / "spotserve-data"
DEFAULT_TRTLLM_API = SHARED / "trtllm-api"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--spotserve-data",
        type=Path,
        default=DEFAULT_DATA,
        help="folder with the data of the SpotServe artifact (default: ../shared/spotserve-data)",
    )
    parser.addoption(
        "--trtllm-api",
        type=Path,
        default=DEFAULT_TRTLLM_API,
        help="folder with the tables of TensorRT-LLM's API (default: ../shared/trtllm-api)",
    )


@pytest.fixture(scope="session")
def spotserve_data(pytestconfig: pytest.Config) -> Path:
    """The artifact's data; tests that want it are skipped where it is absent."""
    folder = Path(pytestconfig.getoption("--spotserve-data"))
    if not (folder / "profiles").is_dir():
        pytest.skip(f"the SpotServe artifact's data is not in {folder}: give --spotserve-data")
    return folder


@pytest.fixture(scope="session")
def trtllm_api(pytestconfig: pytest.Config) -> Path:
    """The tables of TensorRT-LLM's API; tests that want them are skipped where they are absent."""
    folder = Path(pytestconfig.getoption("--trtllm-api"))
    if not (folder / "verified-1.2.1").is_dir():
        pytest.skip(f"the tables of TensorRT-LLM's API are not in {folder}: give --trtllm-api")
    return folder
