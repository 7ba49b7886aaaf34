"""Settings every test shares."""

from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run: a failure here is a failure everywhere.
settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=20)
settings.load_profile("reproducible")

GOLDEN = sorted(
    path.parent for path in (Path(__file__).parents[2] / "shared" / "golden").glob("*/scores.npz")
)

# Values another tool computed may lie beside the checkout. Without them their tests do not exist at all:
# none passes, none is skipped.
collect_ignore = [] if GOLDEN else ["test_golden.py"]


def pytest_report_header() -> str:
    return f"golden values: {', '.join(folder.name for folder in GOLDEN) or 'none beside the checkout'}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" in metafunc.fixturenames:
        metafunc.parametrize("golden", GOLDEN, ids=[folder.name for folder in GOLDEN])
