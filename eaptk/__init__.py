"""Edge Attribution Patching for Hugging Face language models.

    graph  = eaptk.Graph.from_model(model, granularity="head")
    scores = eaptk.attribute(model, batch, graph)
    run    = eaptk.score(model, dataset, out="runs/sft")

Names load on first use, so that `import eaptk` and the command line's help need neither torch nor transformers.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Answered": "selection",
    "Answers": "answers",
    "Architecture": "architecture",
    "Batch": "batch",
    "EaptkError": "errors",
    "EdgeScores": "attribution",
    "Graph": "graph",
    "Keep": "keep",
    "Node": "graph",
    "Run": "store",
    "Sample": "batch",
    "Study": "study_file",
    "answer_questions": "answers",
    "attribute": "attribution",
    "attribute_cuts": "attribution",
    "check": "identities",
    "collate": "batch",
    "compare": "comparison",
    "exact_effects": "intervention",
    "grade": "grading",
    "grade_answers": "grading",
    "measure": "metrics",
    "read_questions": "questions",
    "read_samples": "dataset",
    "read_study": "study_file",
    "register_architecture": "architecture",
    "run_study": "study",
    "score": "run",
    "score_cuts": "run",
    "select": "selection",
    "source_means": "attribution",
    "strongest": "edges",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'eaptk' has no attribute {name!r}")
    return getattr(import_module(f"eaptk.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
