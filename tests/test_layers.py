"""Imports point one way: no module imports from a floor above its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import eaptk

ROOT = Path(__file__).parents[1]

#: From the ground up. Modules of one floor do not import each other; within kernels/ they may.
FLOORS = [
    {"errors", "pipeline", "progress", "_native"},
    {"kernels"},
    {"architecture", "cards", "files", "halving", "journal", "locks", "sweep", "team", "weights"},
    {"graph", "records"},
    {"shards", "statistics"},
    {"keep", "kept", "loading"},
    {"pooled"},
    {"content"},
    {"layout"},
    {"writer"},
    {"batch", "sites"},
    {"losses"},
    {"capture", "division", "manifest", "plan"},
    {"passes", "request"},
    {"contraction"},
    {"segments"},
    {"attribution", "budget"},
    {"intervention"},
    {"identities"},
    {"dataset", "generate", "store"},
    {"answering", "edges", "scoring"},
    {"options", "prompts", "questions", "runs"},
    {"run"},
    {"answers", "metrics"},
    {"grading"},
    {"pairing"},
    {"resampling"},
    {"comparison"},
    {"experiment"},
    {"replicates", "selection", "sensitivity", "validation"},
    {"study_console", "typed"},
    {"study_file"},
    {"figures", "study_tables"},
    {"tables", "study_figures"},
    {"report"},
    {"study"},
    {"runs_cli", "score_cli", "study_cli"},
    {"cli"},
    {"__main__"},
]
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}

FILES = sorted([*ROOT.glob("eaptk/*.py"), *ROOT.glob("kernels/*.py")])


def module_of(path: Path) -> str:
    return "kernels" if path.parent.name == "kernels" else path.stem


def imported_modules(source: str, package: str = "eaptk") -> set[str]:
    """Modules of eaptk that `source`, a file of `package`, imports: inside functions too."""
    dotted = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            dotted += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(filter(None, [package if node.level else "", node.module]))
            dotted += [f"{origin}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in dotted if name.startswith("eaptk.")}


def test_the_parser_sees_every_form_of_import() -> None:
    source = """
import torch
import eaptk.graph
from eaptk import errors
from eaptk.batch import Batch
from . import losses
from .capture import capture
def later():
    from eaptk.kernels.references import edges
"""
    assert imported_modules(source) == {"graph", "errors", "batch", "losses", "capture", "kernels"}
    assert imported_modules("from .operands import Source", package="eaptk.kernels") == {"kernels"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_module_imports_from_a_floor_above(path: Path) -> None:
    if path == ROOT / "eaptk" / "__init__.py":
        assert imported_modules(path.read_text()) == set(), "the public face loads its names on first use"
        return
    module = module_of(path)
    package = "eaptk.kernels" if module == "kernels" else "eaptk"
    assert module in FLOOR, f"{module} has no floor yet: give it one here and in docs/architecture.md"
    for imported in imported_modules(path.read_text(), package) - {module}:
        assert imported in FLOOR, f"{module} imports {imported}, which has no floor"
        assert FLOOR[imported] < FLOOR[module], f"{module} imports {imported}, which is not below it"


@pytest.mark.parametrize("name", eaptk.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(eaptk, name).__module__.startswith("eaptk.")


def test_importing_the_package_loads_no_heavy_library() -> None:
    code = (
        "import sys, eaptk; print(*sorted({'torch', 'transformers', 'numpy', 'pandas'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert loaded.split() == []
