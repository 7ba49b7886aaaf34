"""The report of a study, read as people read it: in a browser, by mouse and by keyboard, on paper, as Markdown."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from playwright.sync_api import Browser, Error, Locator, Page, sync_playwright
from studies import make_experiment, make_study

from eaptk.errors import EaptkError
from eaptk.report import write_report

#: A name that breaks out of HTML, of a script, of Markdown and of CSV wherever it is not escaped.
NASTY = '</script><img src=x onerror=alert(1)>, "|$x_1*'

STUDY = make_study(
    [
        make_experiment("GRPO seed 0", "GRPO", seed=1),
        make_experiment(NASTY, "DPO", names=("SFT", NASTY), seed=2, validated=False, columns=range(0, 45, 2)),
        make_experiment(
            "along", "along", names=("step 0", "step 1", "step 2"), steps=(0, 1, 2), seed=3, validated=False
        ),
    ],
    note=NASTY,
)
FIRST = STUDY.experiments[0].real
GRAPH = FIRST.graph
CHANGE, DIFFERENCE = "relative change, SFT → GRPO", "difference, SFT → GRPO"


def values(view: str) -> np.ndarray:
    """[e]: what the matrix shows of the first experiment, by the name of the view."""
    before, after = (metrics.strength for metrics in FIRST.metrics)
    return {
        "mean |W| of SFT": before,
        "mean |W| of GRPO": after,
        CHANGE: FIRST.relative_change(),
        DIFFERENCE: after - before,
    }[view]


VIEWS = ["mean |W| of SFT", "mean |W| of GRPO", CHANGE, DIFFERENCE]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_report(STUDY, tmp_path_factory.mktemp("study") / "report")


@pytest.fixture(scope="module")
def folder(written: list[Path]) -> Path:
    return written[0].parent


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = [
        path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))
    ]
    with sync_playwright() as playwright:
        try:
            launched = playwright.chromium.launch(
                executable_path=found[0] if found else None, args=["--no-sandbox"]
            )
        except Error as error:
            pytest.fail(
                f"no Chromium that starts ({str(error).splitlines()[0]}): "
                f"apt-get install chromium, or playwright install chromium"
            )
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Browser, folder: Path) -> Iterator[Page]:
    """The report on a laptop's screen. Whatever a test does: no error, and no request but for the file itself."""
    opened = browser.new_page(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    troubles: list[str] = []
    opened.on("console", lambda message: troubles.append(f"console: {message.text}"))
    opened.on("pageerror", lambda error: troubles.append(f"error: {error}"))
    opened.on("dialog", lambda dialog: (troubles.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    opened.on("request", lambda request: troubles.append(f"request: {request.url}"))
    opened.goto((folder / "index.html").as_uri())
    assert troubles == [f"request: {(folder / 'index.html').as_uri()}"]
    yield opened
    assert [trouble for trouble in troubles[1:] if not trouble.startswith("request: blob:")] == []
    opened.close()


def hover(page: Page, source: str, destination: str) -> str:
    """What the page says of a cell of the whole matrix under the mouse."""
    row = [node.name for node in GRAPH.sources].index(source)
    column = [node.name for node in GRAPH.destinations].index(destination)
    cells = page.locator("#cells")
    cells.scroll_into_view_if_needed()
    box = cells.bounding_box()
    assert box is not None
    page.mouse.move(
        box["x"] + (column + 0.5) * box["width"] / GRAPH.n_destinations,
        box["y"] + (row + 0.5) * box["height"] / GRAPH.n_sources,
    )
    return page.locator("#tip").inner_text()


def number(text: str) -> float:
    """A number as the page writes it."""
    return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)


def strongest(page: Page) -> list[tuple[str, float]]:
    spans = page.locator("#strongest li")
    pairs = [item.locator("span").all_inner_texts() for item in spans.all()]
    return [(name, number(amount)) for name, amount in pairs]


def download(page: Page) -> pd.DataFrame:
    with page.expect_download() as found:
        page.click("#csv")
    return pd.read_csv(found.value.path())


def option(page: Page, fieldset: str, kind: str) -> Locator:
    return page.locator(f"#{fieldset} input[value={kind}]")


def test_the_page_fits_a_laptop_and_shows_every_part(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") == 1280
    assert page.title() == "Study arithmetic"
    for heading in ("At a glance", "Every experiment", "Edges", "Along training", "How it was made"):
        assert page.get_by_role("heading", name=heading, exact=True).is_visible()
    broken = "[...document.images].filter((image) => !image.complete || !image.naturalWidth).length"
    assert page.evaluate(broken) == 0


def test_names_are_shown_to_the_letter(page: Page) -> None:
    assert NASTY in page.locator("#made").inner_text()
    assert page.locator("#experiments th").filter(has_text=NASTY).count() == 1
    page.select_option("#experiment", label=f"{NASTY}, arithmetic, α = 0.3")
    assert NASTY in page.locator("#cell").inner_text()
    assert page.locator("main img[src=x]").count() == 0


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("column", [5, 20, GRAPH.n_edges - 1])
def test_a_cell_under_the_mouse_is_named_and_valued(page: Page, view: str, column: int) -> None:
    page.select_option("#view", label=view)
    source, destination = GRAPH.edge_name(column).split("→")
    first, *models = hover(page, source, destination).split("\n")
    name, shown = first.split(": ")
    assert name == f"{source}→{destination}"
    assert number(shown) == pytest.approx(values(view)[column], rel=1e-3)
    for line, model, metrics in zip(models, FIRST.names, FIRST.metrics, strict=True):
        assert line.startswith(f"mean |W| of {model}: ")
        assert number(line.split(": ")[1]) == pytest.approx(metrics.strength[column], rel=1e-3)


def test_what_is_no_edge_and_what_is_no_finding_are_told_apart(page: Page) -> None:
    assert hover(page, "m2", "a0<q>") == "m2→a0<q>: no edge"
    assert hover(page, "input", "a0<q>").startswith("input→a0<q>: undefined")
    page.select_option("#experiment", label=f"{NASTY}, arithmetic, α = 0.3")
    assert hover(page, "input", "a0<k>") == "input→a0<k>: not measured"


@pytest.mark.parametrize("view", VIEWS)
def test_the_strongest_edges_are_the_strongest(page: Page, view: str) -> None:
    page.select_option("#view", label=view)
    page.fill("#top", "7")
    shown = strongest(page)
    sizes = np.nan_to_num(np.abs(values(view)))
    expected = np.argsort(-sizes, kind="stable")[:7]
    assert [name for name, _ in shown] == [GRAPH.edge_name(column) for column in expected]
    assert [amount for _, amount in shown] == pytest.approx(values(view)[expected], rel=1e-3)


def test_a_strong_edge_that_is_clicked_is_where_the_cursor_goes(page: Page) -> None:
    page.locator("#strongest button").nth(2).click()
    assert page.locator("#cell").inner_text().startswith(strongest(page)[2][0] + ":")
    assert page.evaluate("document.activeElement.id") == "cells"


def test_experiments_and_models_can_be_switched(page: Page) -> None:
    page.select_option("#experiment", label="along, arithmetic, α = 0.3")
    shown = page.locator("#view option").all_inner_texts()
    assert [view for view in shown if view.startswith("mean")] == [f"mean |W| of step {k}" for k in range(3)]
    page.select_option("#view", label="relative change, step 0 → step 1")
    change = STUDY.experiments[2].real.relative_change(1)
    text = hover(page, "a0", "m1").split("\n")[0]
    assert number(text.split(": ")[1]) == pytest.approx(change[GRAPH.column("a0", "m1")], rel=1e-3)


@pytest.mark.parametrize("kind", ["q", "k", "v", "mlp", "logits"])
def test_a_kind_of_destination_can_be_left_out(page: Page, kind: str) -> None:
    option(page, "destination-filter", kind).uncheck()
    left = {node.name for node in GRAPH.destinations if (node.branch or node.kind) != kind}
    assert set(download(page)["destination"]) == left


@pytest.mark.parametrize("kind", ["input", "attention", "mlp"])
def test_a_kind_of_source_can_be_left_out(page: Page, kind: str) -> None:
    option(page, "source-filter", kind).uncheck()
    page.fill("#top", "500")
    left = {node.name for node in GRAPH.sources if node.kind != kind}
    assert {name.split("→")[0] for name, _ in strongest(page)} <= left
    # m2 is read by the logits alone, and every kind has an edge.
    assert set(download(page)["source"]) == left


def test_layers_can_be_chosen_and_all_of_them_brought_back(page: Page) -> None:
    page.select_option("#source-filter [data-role=from]", "1")
    page.select_option("#destination-filter [data-role=to]", "1")
    table = download(page)
    assert set(table["source_layer"]) == {-1, 1, 2}
    assert set(table["destination_layer"]) == {0, 1, 3}
    page.click("#reset")
    assert len(download(page)) == GRAPH.n_edges


def test_filters_that_leave_nothing_say_so(page: Page) -> None:
    for kind in ("input", "attention", "mlp"):
        option(page, "source-filter", kind).uncheck()
    assert "passes the filters" in page.locator("#cell").inner_text()
    assert strongest(page) == []


@pytest.mark.parametrize("index", range(3))
def test_a_download_holds_the_numbers_of_the_comparison(page: Page, index: int) -> None:
    page.locator("#experiment").select_option(index=index)
    found, comparison = download(page), STUDY.experiments[index].real
    expected = comparison.edges_frame()
    differences = [name for name in found if name.startswith("difference ")]
    pd.testing.assert_frame_equal(
        found.drop(columns=differences)[list(expected)], expected, check_dtype=False, rtol=1e-5, atol=1e-6
    )
    for name, metrics in zip(comparison.names[1:], comparison.metrics[1:], strict=True):
        difference = metrics.strength - comparison.metrics[0].strength
        np.testing.assert_allclose(found[f"difference {name}"], difference, atol=1e-9)


def test_the_keyboard_moves_over_the_matrix_and_says_where_it_is(page: Page) -> None:
    page.locator("#csv").focus()
    while page.evaluate("document.activeElement.id") != "cells":
        page.keyboard.press("Tab")
    cell = page.locator("#cell")
    assert cell.get_attribute("aria-live") == "polite"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    places = []
    for key in (
        "Home",
        "PageUp",
        "ArrowDown",
        "End",
        "ArrowLeft",
        "ArrowUp",
        "ArrowUp",
        "PageDown",
        "ArrowRight",
    ):
        page.keyboard.press(key)
        places.append(cell.inner_text().split(":")[0])
    assert places == [
        "input→a0<q>",
        "input→a0<q>",
        "a0→a0<q>",
        "a0→logits",
        "a0→m2",
        "input→m2",
        "input→m2",
        "m2→m2",
        "m2→logits",
    ]
    box, cursor = (page.locator(f"#{name}").bounding_box() for name in ("cells", "cursor"))
    assert cursor["x"] + cursor["width"] == pytest.approx(box["x"] + box["width"])
    assert cursor["y"] + cursor["height"] == pytest.approx(box["y"] + box["height"])


def test_paper_has_pictures_where_the_screen_has_the_matrix(page: Page) -> None:
    picture = page.locator("#edges figure img").first
    assert page.locator("#cells").is_visible()
    assert not picture.is_visible()
    page.emulate_media(media="print")
    assert not page.locator("#cells").is_visible()
    assert picture.is_visible()
    assert page.locator("#edges figure").count() == 3


def test_seeds_can_be_hidden_and_are_always_printed(browser: Browser, tmp_path: Path) -> None:
    seeds = [make_experiment(f"GRPO seed {seed}", seed=seed, validated=False) for seed in range(2)]
    page = browser.new_page()
    page.goto(write_report(make_study(seeds), tmp_path)[0].as_uri())
    row = page.locator("#experiments tr.member").first
    assert row.is_visible()
    page.uncheck("#members")
    assert not row.is_visible()
    page.emulate_media(media="print")
    assert row.is_visible()
    page.close()


def test_a_study_without_seeds_has_no_box_to_hide_them(page: Page) -> None:
    assert page.locator("#members").count() == 0
    assert page.locator("tr.member").count() == 0


def test_every_picture_of_the_markdown_is_there(folder: Path, written: list[Path]) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"\]\((figures/[^)]+)\)", text))
    assert {path.relative_to(folder).as_posix() for path in written if path.suffix == ".png"} == shown
    assert all(path.stat().st_size > 0 for path in written)
    assert {path.suffix for path in written} == {".html", ".md", ".csv", ".png", ".svg"}


def test_every_difference_is_in_the_table_of_all(folder: Path) -> None:
    table = pd.read_csv(folder / "differences.csv")
    assert len(table) == sum(len(e.real.differences) + len(e.dense.differences) for e in STUDY.experiments)
    first = table[(table["family"] == "GRPO seed 0") & (table["convention"] == "dense")].iloc[0]
    assert first["difference"] == pytest.approx(STUDY.experiments[0].dense.differences[0].difference)
    assert table.loc[table["metric"] != "loss", "q"].notna().all()


def test_the_same_results_give_the_same_bytes(written: list[Path], folder: Path, tmp_path: Path) -> None:
    again = write_report(STUDY, tmp_path)
    assert [path.relative_to(tmp_path) for path in again] == [path.relative_to(folder) for path in written]
    changed = [
        old.name for old, new in zip(written, again, strict=True) if old.read_bytes() != new.read_bytes()
    ]
    assert changed == []


def test_the_histograms_range_is_said_as_it_was(folder: Path, tmp_path: Path) -> None:
    write_report(
        make_study([make_experiment(seed=4, upper=2.5), make_experiment("b", seed=5, upper=2.5)]), tmp_path
    )
    assert "100 bins on \\[0, 2.5\\], logarithms" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "bins up to the largest" in (folder / "report.md").read_text(encoding="utf-8")


def test_a_study_without_experiments_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EaptkError, match="no experiments to report"):
        write_report(replace(STUDY, experiments=()), tmp_path)


def test_a_report_that_cannot_be_written_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EaptkError, match="cannot write"):
        write_report(STUDY, tmp_path / "file" / "report")
