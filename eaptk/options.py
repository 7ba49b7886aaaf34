"""What a run can be asked for, checked before anything is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from eaptk.attribution import ABLATIONS, Ablation
from eaptk.edges import choose_edges
from eaptk.errors import EaptkError
from eaptk.graph import Granularity, Graph, Qkv
from eaptk.keep import Keep, RowDtype
from eaptk.losses import LOSSES, LossFunction, LossName
from eaptk.manifest import loss_name
from eaptk.segments import check_segment
from eaptk.statistics import DEFAULT_BINS, Histogram

#: What a run can score: the losses of `attribute`, and the model's own answers.
RunLoss = LossName | Literal["self_nll"] | LossFunction
RUN_LOSSES = (*LOSSES, "self_nll")


@dataclass(frozen=True)
class Options:
    """Options of `eaptk.score`, which says what they mean.

    Raises:
        EaptkError: one of them cannot be, or not with another.
    """

    granularity: Granularity = "block"
    qkv: Qkv = "split"
    ablation: Ablation = "zero"
    loss: RunLoss = "nll"
    given_answers: bool = False
    max_new_tokens: int = 256
    tokens_per_batch: int | None = None
    segment: int | None = None
    row_dtype: RowDtype = "float32"
    metrics_only: bool = False
    bins: int | None = None
    upper: float | None = None
    edges: Any = None
    top: int | None = None
    layer_pairs: bool = False
    limit: int | None = None
    dtype: str | None = None
    device: str | None = None
    attention: str | None = None
    device_map: str | Mapping[str, int | str] | None = None
    offload_folder: str | os.PathLike[str] | None = None
    tensor_parallel: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("ablation", self.ablation, ABLATIONS),
            ("row_dtype", self.row_dtype, ("float32", "float16")),
            ("loss", None if callable(self.loss) else self.loss, (*RUN_LOSSES, None)),
        ):
            if value not in allowed:
                raise EaptkError(f"{name} is {value!r}; it must be one of {', '.join(filter(None, allowed))}")
        for name, number in (
            ("tokens_per_batch", self.tokens_per_batch),
            ("max_new_tokens", self.max_new_tokens),
        ):
            if number is not None and number < 1:
                raise EaptkError(f"{name} is {number}; it must be at least 1")
        name = loss_name(self.loss)
        if self.loss == "kl" and self.ablation != "patching":
            raise EaptkError(
                f"loss 'kl' compares with a corrupted run; use it with ablation 'patching', not {self.ablation!r}"
            )
        if self.given_answers and self.loss != "self_nll":
            raise EaptkError(f"given answers are the model's own with loss 'self_nll' only, not {name!r}")
        if self.segment is not None:
            check_segment(self.segment, self.loss)
        _ = self.histogram

    @property
    def answers_itself(self) -> bool:
        """Whether the model has to answer before it is scored."""
        return self.loss == "self_nll" and not self.given_answers

    @property
    def histogram(self) -> Histogram | None:
        """The bins of a run of metrics only."""
        if not self.metrics_only:
            if self.bins is not None or self.upper is not None:
                raise EaptkError(
                    "bins and range are for a run of metrics only; one with rows is counted when it is measured"
                )
            return None
        if self.row_dtype != "float32":
            raise EaptkError(
                f"row_dtype {self.row_dtype!r} is for rows, and a run of metrics only stores none"
            )
        if self.upper is None:
            raise EaptkError(
                "metrics only needs a range, as rows that are not kept cannot be counted anew: score some samples "
                "with rows (limit 64), see the histogram range that `eaptk metrics` finds, and give one with room "
                "to spare, the same for all runs to be compared"
            )
        return Histogram(DEFAULT_BINS if self.bins is None else int(self.bins), float(self.upper))

    def keep(self, graph: Graph) -> Keep:
        """What is kept of a row."""
        columns = None if self.edges is None else choose_edges(graph, self.edges)
        return Keep(graph, self.row_dtype, self.histogram, columns, self.top, self.layer_pairs)

    def for_loading(self) -> dict[str, Any]:
        """Those for a model given by name, that are given."""
        names = ("dtype", "device", "attention", "device_map", "offload_folder", "tensor_parallel")
        return {name: value for name in names if (value := getattr(self, name))}
