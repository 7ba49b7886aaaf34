"""What a run will take of a cluster: hours, memory of a card and disk, for models far larger than this machine holds.

The formula stands in `benchmarks.forecast`, the queue in `benchmarks.claims`. Two constants make it this machine's:
they are fitted to a few batches measured here, and others, held out, say how far to trust the formula
(`benchmarks.calibration`). With spec sheets and assumed shares in their place the same formula predicts cards that
nothing here was measured on (`benchmarks.outlook`). Written are benchmarks/results/cost_model.json and .png, and the
tables of docs/scale.md.

    python -m benchmarks.cost_model              # five minutes; use `chrt -f 50` on a machine that has other users
    python -m benchmarks.cost_model --predict    # keeps what was measured
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from rich.console import Console

from benchmarks import calibration, record
from benchmarks.cost_figure import plot
from benchmarks.cost_tables import (
    DOCS,
    HEADINGS,
    PACE_HEADINGS,
    cells,
    docs_tables,
    measured_table,
    pace_cells,
    predicted_table,
    scaling_table,
    write_docs,
)
from benchmarks.forecast import SHAPES
from benchmarks.outlook import DATASETS, LEVELS, Scaling, forecast, pace, scaling


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--predict", action="store_true", help="take what was measured from the record")
    options = parser.parse_args()
    path = record.RESULTS / "cost_model.json"
    if options.predict:
        kept = json.loads(path.read_text())
        environment, measured = kept["environment"], kept["measured"]
    else:
        environment, measured = record.environment(), measure()
    hashing = measured["hashing_bytes_per_second"]
    forecasts = [
        forecast(shape, level, *dataset, hashing)
        for shape in SHAPES
        for level in LEVELS
        for dataset in DATASETS
    ]
    paces = [pace(shape, level) for shape in SHAPES for level in LEVELS]
    curves = [scaling(shape, level) for shape in SHAPES for level in LEVELS]
    console = Console(width=150)
    tables = (
        measured_table(measured),
        predicted_table("what to ask for", HEADINGS, [cells(each) for each in forecasts]),
        predicted_table("a replica, samples of 512 tokens", PACE_HEADINGS, [pace_cells(p) for p in paces]),
        scaling_table(curves),
    )
    for table in tables:
        console.print(table)
    predicted = {
        "assumed": "spec sheets and shares of eaptk.cards; nothing of this was measured",
        "table": [asdict(each) for each in forecasts],
        "pace": [asdict(each) for each in paces],
        "scaling": [_scaling_facts(each) for each in curves],
    }
    record.write("cost_model", {"environment": environment, "measured": measured, "predicted": predicted})
    picture = plot(measured, curves)
    write_docs(docs_tables(forecasts, paces))
    print("written:", *(each.relative_to(DOCS.parents[1]) for each in (path, picture, DOCS)))


def measure() -> dict[str, Any]:
    """The machine's constants, and every measured batch beside what they predict of it."""
    found = calibration.measure()
    machine = calibration.fit(found)
    team = calibration.measure_team(machine)
    return {
        "rate": machine.rate,
        "bandwidth": machine.bandwidth,
        "hashing_bytes_per_second": calibration.hashing_rate(),
        "cases": [calibration.record(each, machine) for each in found],
        "team": team,
    }


def _scaling_facts(each: Scaling) -> dict[str, Any]:
    return {
        "shape": each.shape,
        "level": each.level,
        "seconds": {cards: pairs.seconds for cards, (_, pairs) in each.outcomes.items()},
        "efficiency": {cards: pairs.efficiency for cards, (_, pairs) in each.outcomes.items()},
        "seconds_with_all_rows": {cards: dense.seconds for cards, (dense, _) in each.outcomes.items()},
    }


if __name__ == "__main__":
    main()
