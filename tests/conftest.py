"""Settings every test shares."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import settings

from eaptk import _native

# Kernels run on the CPU, in Triton's interpreter; it is chosen when triton is imported.
os.environ["TRITON_INTERPRET"] = "1"

# The same examples in every run: a failure here is a failure everywhere.
settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=20)
settings.load_profile("reproducible")

GOLDEN = sorted(
    path.parent for path in (Path(__file__).parents[2] / "shared" / "golden").glob("*/scores.npz")
)

# A kernel may forbid mounts; that `unshare` is not installed is for the tests that need it to report.
MOUNTS = shutil.which("unshare") is None or not subprocess.call(
    ["unshare", "--map-root-user", "--mount", "true"], stderr=subprocess.DEVNULL
)

# Values another tool computed and public benchmarks may lie beside the checkout, and the kernel may let a test
# mount a disk of its own. Without them their tests do not exist at all: none passes, none is skipped.
BENCHMARKS = (Path(__file__).parents[2] / "shared" / "data" / "gsm8k_test.jsonl").exists()

collect_ignore = [
    *([] if GOLDEN else ["test_golden.py"]),
    *([] if BENCHMARKS else ["test_grading_benchmarks.py"]),
    *([] if MOUNTS else ["test_disks.py"]),
    *([] if _native.lanes() else ["test_native.py"]),  # the reference is in its place
]


def pytest_report_header() -> str:
    golden = ", ".join(folder.name for folder in GOLDEN) or "none beside the checkout"
    return f"golden values: {golden}; disks of a test's own: {'yes' if MOUNTS else 'not on this machine'}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" in metafunc.fixturenames:
        metafunc.parametrize("golden", GOLDEN, ids=[folder.name for folder in GOLDEN])
