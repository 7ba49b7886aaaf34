"""What the manifest of a run says of its files."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eaptk.content import Rows, SampleArray, Summaries
from eaptk.errors import EaptkError
from eaptk.files import DAMAGED
from eaptk.graph import Graph
from eaptk.keep import Keep

#: Of the files as `eaptk.store` describes them. Version 1 had no checksums.
SCHEMA = 2


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a run directory, None if there is none.

    Raises:
        EaptkError: it is damaged, no manifest of a run, or of another schema version.
    """
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise EaptkError(f"{file} cannot be read ({error}); {DAMAGED}") from error
    if not isinstance(manifest, dict) or "schema" not in manifest:
        raise EaptkError(f"{file} is no manifest of a run: it has no schema version")
    if manifest["schema"] != SCHEMA:
        raise EaptkError(
            f"run {path} has schema version {manifest['schema']!r}, this eaptk knows {SCHEMA}; "
            f"use the eaptk that wrote it, or score again into another folder"
        )
    try:
        layout(path, manifest)
    except KeyError as error:
        raise EaptkError(f"{file} is damaged: it has no {error}; {DAMAGED}") from error
    except (TypeError, ValueError, EaptkError) as error:
        raise EaptkError(f"{file} is damaged ({error}); {DAMAGED}") from error
    return manifest


def layout(path: Path, manifest: Mapping[str, Any]) -> tuple[Keep, int, Rows | Summaries]:
    """What is kept of each sample of a run, how many there are, and in which files."""
    keep = Keep.from_dict(manifest, Graph.from_dict(manifest["graph"]))
    n_samples = int(manifest["dataset"]["samples"])
    if keep.histogram is None:
        return keep, n_samples, Rows(path, n_samples, keep.arrays)
    return keep, n_samples, Summaries(path, n_samples, keep.graph, keep.histogram, keep.n_edges)


def losses(path: Path, n_samples: int) -> SampleArray:
    """The losses of a run that is not finished."""
    return SampleArray(path / "loss.npy", (n_samples,), np.float64)


def command_line() -> str:
    """The command that runs, as a manifest records it, to be repeated."""
    program = Path(sys.argv[0])
    # Of `python -m eaptk`, which is what torchrun starts, Python has the file.
    name = program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([name, *sys.argv[1:]])
