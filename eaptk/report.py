"""The report of a study: one HTML file that needs nothing else, the same as Markdown, figures, and a table.

    index.html        tables, pictures and an edge matrix to explore; no request leaves it
    report.md         tables and pictures, for where HTML is not rendered
    figures/          every picture as PNG and SVG
    differences.csv   every number of every comparison

The page carries the mean |W| of every edge as float32. What is defined, and so is a finding, is decided here
(`Comparison.relative_change`) and goes along as a bit an edge; the page only divides.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from eaptk.errors import EaptkError
from eaptk.experiment import Experiment, StudyResults
from eaptk.figures import save_figure
from eaptk.files import whole_file
from eaptk.graph import Graph, Node
from eaptk.replicates import correct
from eaptk.study_figures import study_figures
from eaptk.study_tables import (
    Cell,
    StudyTable,
    all_differences,
    conventions,
    facts_table,
    funnels,
    glance,
    headline,
    label,
    markdown,
    notes,
    reasons,
    validations,
)

#: A picture of more than this is one of thousands of edges, finer than the eye; its file has them all.
_MOST_BYTES = 300_000


@dataclass(frozen=True)
class _Picture:
    """A figure that is written: its files, its caption, and itself for the page."""

    stem: str
    caption: str
    webp: bytes = field(repr=False)
    width: int

    def to_html(self) -> str:
        source = base64.b64encode(self.webp).decode()
        caption = html.escape(self.caption)
        return (
            f'<figure><img alt="{caption}" width="{self.width}" src="data:image/webp;base64,{source}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )

    def to_markdown(self) -> str:
        return f"![{markdown(self.caption)}](figures/{self.stem}.png)\n\n*{markdown(self.caption)}*"


@dataclass(frozen=True)
class _Part:
    """A section of the report, in the order in which it is read: text, tables, pictures.

    Args:
        anchor: a word for it.
        folded: whether the page shows its pictures only when asked to.
        page_only: HTML that has no place in Markdown, before the tables.
    """

    anchor: str
    title: str
    text: tuple[str, ...]
    tables: Sequence[StudyTable] = ()
    pictures: Sequence[_Picture] = ()
    folded: str = ""
    page_only: str = ""

    def to_html(self) -> str:
        return (
            f'<section id="{self.anchor}"><h2>{html.escape(self.title)}</h2>\n{self.text_html()}\n'
            f"{self.page_only}"
            + "\n".join(table.to_html() for table in self.tables)
            + f"\n{self.pictures_html()}</section>"
        )

    def text_html(self) -> str:
        return "\n".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in self.text)

    def pictures_html(self) -> str:
        pictures = "\n".join(picture.to_html() for picture in self.pictures)
        if self.folded and pictures:
            return f"<details><summary>{html.escape(self.folded)}</summary>\n{pictures}\n</details>"
        return pictures

    def to_markdown(self) -> str:
        blocks = [f"## {markdown(self.title)}", *map(markdown, self.text)]
        blocks += [table.to_markdown() for table in self.tables]
        blocks += [picture.to_markdown() for picture in self.pictures]
        return "\n\n".join(blocks)


def write_report(results: StudyResults, folder: str | Path) -> list[Path]:
    """Write index.html, report.md, differences.csv and figures/ into `folder`; returns their paths.

    Differences are corrected over the whole study first (`eaptk.replicates.correct`). The same results give the
    same bytes.

    Raises:
        EaptkError: there is no experiment to report, or a file cannot be written.
    """
    if not results.experiments:
        raise EaptkError(f"study {results.name} has no experiments to report; run its comparisons first")
    folder = Path(folder)
    results = correct(results)
    pictures, paths = _write_pictures(results, folder / "figures")
    parts = _parts(results, pictures)
    contents = {
        "index.html": _page(results, parts),
        "report.md": _markdown(results, parts),
        "differences.csv": all_differences(results).to_csv(index=False),
    }
    written = []
    for name, content in contents.items():
        path = folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                temporary.write_text(content, encoding="utf-8", newline="\n")
        except OSError as error:
            raise EaptkError(f"cannot write the report to {path}: {error.strerror}") from error
        written.append(path)
    return written + paths


def _write_pictures(results: StudyResults, folder: Path) -> tuple[dict[str, list[_Picture]], list[Path]]:
    """Every picture by the part of the report it belongs to, and the files."""
    pictures: dict[str, list[_Picture]] = {}
    paths: list[Path] = []
    stems: dict[str, int] = {}
    for found in study_figures(results):
        # Names that differ in signs alone would share their files.
        stems[found.stem] = stems.get(found.stem, 0) + 1
        stem = found.stem if stems[found.stem] == 1 else f"{found.stem}-{stems[found.stem]}"
        png, svg = save_figure(found.figure, folder / stem)
        paths += [png, svg]
        width = round(90 * found.figure.get_size_inches()[0])
        pictures.setdefault(found.section, []).append(
            _Picture(stem, found.caption, _small(png, width), width)
        )
    return pictures, paths


def _small(png: Path, width: int) -> bytes:
    """A picture for the page: WebP, a third of the bytes; heatmaps of large graphs no finer than they are shown."""
    from PIL import Image

    small = io.BytesIO()
    with Image.open(png) as image:
        whole = image.convert("RGB")
    whole.save(small, "WEBP", lossless=True)
    if small.tell() <= _MOST_BYTES:
        return small.getvalue()
    small = io.BytesIO()
    whole.resize((width, round(whole.height * width / whole.width))).save(small, "WEBP", quality=90)
    return small.getvalue()


def _parts(results: StudyResults, pictures: dict[str, list[_Picture]]) -> list[_Part]:
    everything = all_differences(results)
    experiments = headline(results)
    # Rows that the box hides.
    seeds = any("member" in table.kinds for table in experiments)
    parts = [
        _Part("glance", "At a glance", _GLANCE, glance(results), pictures.get("metrics", ())),
        _Part(
            "experiments", "Every experiment", _EXPERIMENTS, experiments, page_only=_SEEDS if seeds else ""
        ),
        _Part("conventions", "Real edges and the dense convention", _CONVENTIONS, conventions(results)),
        _Part(
            "edges",
            "Edges",
            _EDGES,
            pictures=pictures.get("edges", ()),
            folded="Every family as a picture",
        ),
        _Part(
            "entropy",
            "Output entropy of every node",
            _ENTROPY,
            pictures=pictures.get("entropy", ()),
            folded="Every family as a picture",
        ),
    ]
    for anchor, title, text in (
        ("training", "Along training", _TRAINING),
        ("diversity", "Diversity across samples", _DIVERSITY),
        ("sensitivity", "Sensitivity of the complexity", _SENSITIVITY),
    ):
        if anchor in pictures:
            parts.append(_Part(anchor, title, text, pictures=pictures[anchor]))
    validation = validations(results)
    if validation is not None:
        tables = (validation,)
        parts.append(
            _Part(
                "validation",
                "First order against exact ablation",
                _VALIDATION,
                tables,
                pictures["validation"],
            )
        )
    parts.append(
        _Part(
            "selection",
            "Questions and answers",
            (_SELECTION, *(f"Left at “{name}”: {'; '.join(why)}." for name, why in reasons(results).items())),
            funnels(results),
            pictures.get("lengths", ()),
        )
    )
    if found := notes(results):
        rows = tuple((Cell(note), Cell(f"{len(where)}", ("; ".join(where),))) for note, where in found)
        parts.append(_Part("notes", "Notes", (_NOTES,), (StudyTable("", ("note", "experiments"), rows),)))
    parts.append(
        _Part(
            "numbers",
            "Every number",
            (
                f"{len(everything):,} differences in both conventions are in differences.csv, beside this report.",
            ),
            page_only=f'<div class="screen">{_numbers(everything)}</div>',
        )
    )
    parts.append(_Part("made", "How it was made", (), (facts_table(results.facts),)))
    return parts


_GLANCE = (
    "The difference of each metric to the baseline in per cent of the baseline's value, the mean over the "
    "families (seeds) of a method, and below it an interval and how many families are resolved upwards, downwards, "
    "and not at all. Over several families the interval is for new seeds and new questions and the arrow says that "
    "it excludes 0, corrected for nothing; of a single family the interval is for new questions, and the arrow "
    "says that the difference is resolved. A question mark says that no direction is shown by these data.",
)
_EXPERIMENTS = (
    "Each cell: difference in per cent of the baseline's value (as it is where that value is not positive), its "
    "paired bootstrap interval, both values, effect size d (paired, Cohen's d_z) and Holm-corrected p of a paired "
    "permutation test; for the loss, which is shown beside and is no hypothesis, the plain p. An arrow stands "
    "where the interval excludes 0 and so does the test after correction over the whole study (Benjamini and "
    "Hochberg); everything else is unresolved and marked so. “At equal loss” is what differs between answers of "
    "equal loss: confidence alone moves every gradient.",
)
_SEEDS = '<p class="screen"><label><input type="checkbox" id="members" checked> show every seed</label></p>'
_CONVENTIONS = (
    "The same differences with real edges alone, and as the paper counts: with the structural zeros of the "
    "sources × destinations matrix. Relative differences of the intensity are the same in both by construction; "
    "those of complexity and kurtosis are not.",
)
_EDGES = (
    "Mean |W| of every edge, sources down in order of writing, destinations across in order of reading, and its "
    "change against the baseline. A relative change is undefined, and grey, for edges below 0.01% of the "
    "largest strength in both models and for those that are 0 by identity; where there is no edge there is no cell.",
)
_ENTROPY = ("How evenly the strength of a source spreads over its outgoing edges, before and after.",)
_TRAINING = ("Every metric of every checkpoint of a training run, with intervals against the first.",)
_DIVERSITY = ("1 − the mean correlation of the edge vectors of two samples, baseline and model.",)
_SENSITIVITY = (
    "The complexity is the entropy of a histogram, whose bins and range nobody can derive: a difference that "
    "changes its sign with them is one of the histogram.",
)
_VALIDATION = (
    "A score is the first-order effect of ablating an edge. Here a random subset of edges, drawn evenly over the "
    "ranking of their strengths, is ablated for real, one at a time, and the change of the loss measured. Slope: "
    "least squares of exact against first-order through 0.",
)
_SELECTION = (
    "How many questions came in and went on at each stage. Answers are cut to a share α of the reference length: "
    "the smallest of the models' mean lengths (paper-code), or the mean of them (paper-text)."
)
_NOTES = "What must be known to trust the numbers, and of which experiments."


def _intro(results: StudyResults) -> list[str]:
    """What was done, and what of it is resolved, in a few sentences."""
    experiments = results.experiments
    first = experiments[0].real
    n_families = len({e.family for e in experiments})
    datasets = list(dict.fromkeys(e.dataset for e in experiments))
    alphas = sorted({e.alpha for e in experiments})
    tested = [d for e in experiments for d in e.real.differences if d.metric != "loss"]
    resolved = sum(d.direction != "unresolved" for d in tested)
    surely = sum(d.direction != "unresolved" and (d.p_holm or 0) <= 1 - d.confidence for d in tested)
    resampling, graph = first.resampling, first.graph
    tops = {e.real.metrics[0].upper for e in experiments}
    ends = f"on [0, {min(tops):.3g}]" if len(tops) == 1 else "up to the largest |W| of an experiment's models"
    n_edges = " or ".join(f"{n:,}" for n in sorted({e.real.graph.n_edges for e in experiments}))
    return [
        f"{_count(len(experiments), 'experiment')}: {_count(n_families, 'family', 'families')} of models on "
        f"{', '.join(datasets)} at α = {', '.join(f'{alpha:g}' for alpha in alphas)}, questions selected by "
        f"protocol {results.protocol}. {n_edges} edges, {graph.granularity} level, "
        f"{first.ablation} ablation. Intervals: {resampling.confidence:.0%}, paired bootstrap of questions, "
        f"{resampling.n_resamples:,} draws, seed {resampling.seed}; tests: as many paired permutations; complexity: "
        f"{first.metrics[0].bins} bins {ends}, logarithms to base "
        f"{_base(first.metrics[0].log_base)}.",
        f"Of {len(tested):,} differences over real edges {resolved:,} are resolved at a false discovery rate of "
        f"{1 - resampling.confidence:.0%} over the whole study, {surely:,} of them also after Holm's correction "
        f"within their experiment.",
    ]


def _count(n: int, one: str, more: str | None = None) -> str:
    return f"{n:,} {one if n == 1 else more or one + 's'}"


def _base(base: float) -> str:
    return "e" if base == np.e else f"{base:g}"


def _page(results: StudyResults, parts: Sequence[_Part]) -> str:
    assets = files("eaptk") / "assets"
    script = (assets / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    edges = next(part for part in parts if part.anchor == "edges")
    at = parts.index(edges)
    links = (f'<a href="#{part.anchor}">{part.anchor.capitalize()}</a>' for part in parts)
    return Template((assets / "report.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(f"Study {results.name}"),
        style=(assets / "report.css").read_text(encoding="utf-8"),
        # The page runs this one script and asks for nothing, whatever the names in it say.
        script_hash=f"sha256-{digest}",
        intro="\n".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in _intro(results)),
        navigation="\n".join(links),
        before="\n".join(part.to_html() for part in parts[:at]),
        edges_text=edges.text_html(),
        edges_pictures=edges.pictures_html(),
        after="\n".join(part.to_html() for part in parts[at + 1 :]),
        data=_script_safe(_edge_data(results.experiments)),
        script=script,
    )


def _markdown(results: StudyResults, parts: Sequence[_Part]) -> str:
    blocks = [f"# Study {markdown(results.name)}", *map(markdown, _intro(results))]
    return "\n\n".join([*blocks, *(part.to_markdown() for part in parts)]) + "\n"


def _edge_data(experiments: Iterable[Experiment]) -> dict[str, Any]:
    """What the edge matrix shows: graphs, and of each experiment every model's strengths, packed.

    An experiment holds ``strength``, [k, e] float32, and ``undefined``, [k − 1, e] bits, least significant first:
    where the relative change against the baseline is no finding. Both little-endian, base64.
    """
    graphs: dict[Graph, int] = {}
    found = []
    for experiment in experiments:
        comparison = experiment.real
        columns = comparison.metrics[0].columns
        strength = np.stack([metrics.strength for metrics in comparison.metrics]).astype("<f4")
        changes = np.stack([comparison.relative_change(k) for k in range(1, len(experiment.names))])
        whole = len(columns) == comparison.graph.n_edges
        found.append(
            {
                "label": label(experiment),
                "family": experiment.family,
                "names": experiment.names,
                "graph": graphs.setdefault(comparison.graph, len(graphs)),
                "columns": None if whole else columns.tolist(),
                "strength": base64.b64encode(strength.tobytes()).decode(),
                "undefined": base64.b64encode(
                    np.packbits(np.isnan(changes), bitorder="little").tobytes()
                ).decode(),
            }
        )
    return {"graphs": [_nodes(graph) for graph in graphs], "experiments": found}


def _nodes(graph: Graph) -> dict[str, Any]:
    def plain(node: Node) -> dict[str, Any]:
        return {"name": node.name, "layer": node.layer, "kind": node.branch or node.kind}

    return {
        "sources": [plain(node) for node in graph.sources],
        "destinations": [plain(node) for node in graph.destinations],
        "reach": graph.reach.tolist(),
    }


def _script_safe(data: Any) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _numbers(everything: Any) -> str:
    """All differences as a table to unfold."""
    shown = everything.drop(columns=["method", "baseline", "confidence"])
    rows = tuple(
        tuple(Cell(_number(value)) for value in row) for row in shown.itertuples(index=False, name=None)
    )
    table = StudyTable("", tuple(name.replace("_", " ") for name in shown.columns), rows)
    return f"<details><summary>Show them here</summary>{table.to_html()}</details>"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return "–" if np.isnan(value) else f"{value:.4g}"
    return "–" if value is None else str(value)
