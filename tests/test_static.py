"""What a GPU would run, read from the machine code: no spills, tensor cores, wide loads, shared memory that fits.

Compiled in a process of its own: this one has Triton's interpreter in place of its compiler.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KERNELS = [
    node
    for path in sorted((Path(__file__).parents[1] / "kernels").glob("*.py"))
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
]
#: What the record has beside these, sm_120, would take another half minute.
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    out = tmp_path_factory.mktemp("static") / "static.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.static",
        "--targets",
        *TARGETS,
        "--dtypes",
        "bfloat16",
        "float16",
        "--out",
        str(out),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Faults are this file's to report, by name; anything else that goes wrong leaves no result to read.
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert out.exists(), done.stderr
    found: list[Row] = json.loads(out.read_text())["rows"]
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_fits_the_target_without_a_fault(rows: list[Row], target: str) -> None:
    here = [row for row in rows if row["target"] == target]
    assert {row["kernel"]: row["faults"] for row in here if row["faults"]} == {}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_product_is_compiled_for_every_target(rows: list[Row], target: str, dtype: str) -> None:
    kinds = {row["kernel"] for row in rows if row["target"] == target and row["tensor"]}
    products = (
        "block",
        "block+norm",
        "block+patch",
        "block+norm+patch",
        "norm of 64",
        "norm of 128",
        "norm of 256",
        "norm of 512",
    )
    expansions = ("expand source", "expand source+patch", "expand destination", "head x128", "head x64")
    assert {f"{kind} {dtype}" for kind in (*products, *expansions)} <= kinds


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_no_kernel_asks_of_an_argument_what_only_tensors_have(kernel: ast.FunctionDef) -> None:
    """The compiler makes a Python integer of an argument that is 1; the interpreter never does."""
    arguments = {argument.arg for argument in kernel.args.args}
    asked = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(kernel)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in arguments
    }
    assert asked == set()
