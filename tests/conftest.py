"""Options and fixtures of all tests."""

from pathlib import Path

import pytest

DEFAULT_DATA = Path(__file__).parents[2] / "shared" / "spotserve-data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--spotserve-data",
        type=Path,
        default=DEFAULT_DATA,
        help="folder with the data of the SpotServe artifact (default: ../shared/spotserve-data)",
    )


@pytest.fixture(scope="session")
def spotserve_data(pytestconfig: pytest.Config) -> Path:
    """The artifact's data; tests that want it are skipped where it is absent."""
    folder = Path(pytestconfig.getoption("--spotserve-data"))
    if not (folder / "profiles").is_dir():
        pytest.skip(f"the SpotServe artifact's data is not in {folder}: give --spotserve-data")
    return folder
