"""The page of an evaluation and its plots."""

from __future__ import annotations

import base64
import doctest
import hashlib
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import pytest
from example_results import HOSTILE, SYSTEMS, make_result, make_results

from search_r3.errors import DataError
from search_r3.evaluation.report import page, plots
from search_r3.evaluation.report.page import SHOWN_QUERIES, choose_queries, default_pair, embed_json, write_page
from search_r3.evaluation.significance import compare

STEPS = [
    {"step": step, "reward_ndcg": 0.5, "dev_ndcg@10_direct": 0.4, "dev_ndcg@10_reason": 0.6}
    | {"audit_reward_error": 0.01, "audit_top10_overlap": 0.9, "audit_drift_mean": 0.1}
    for step in (1, 2)
]
VOID = {"meta", "link", "img", "input", "source", "wbr"}


class Page(HTMLParser):
    """What a reader of the HTML finds in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": [], "h1": [], "title": []}
        self.rows: list[list[tuple[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(self.html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if tag in self.texts:
            self.texts[tag].append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(("", dict(attrs).get("data-value")))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.texts:
            self.texts[self.open[-1]][-1] += data
        if "td" in self.open or "th" in self.open:
            text, value = self.rows[-1][-1]
            self.rows[-1][-1] = (" ".join(f"{text} {data}".split()), value)

    def blocks(self) -> list[dict[str, Any]]:
        return [json.loads(text) for text in self.texts["script"][:-1]]

    def row(self, *start: str) -> list[tuple[str, str | None]]:
        (found,) = [row for row in self.rows if [text for text, _ in row[: len(start)]] == list(start)]
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything on it."""
    folder = tmp_path_factory.mktemp("page")
    results = make_results()
    comparisons = [one.record() for one in compare(results, 50, 0)]
    rewards = {"before": [0.0, 0.4, 1.0], "after": [0.6, 1.0]}
    path = write_page(results, folder, title=HOSTILE, rewards=rewards, metrics=STEPS, comparisons=comparisons)
    assert path == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> Page:
    return Page(folder / "report.html")


@pytest.fixture
def unplotted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_plots", lambda *_: [])


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The figures that are drawn, instead of files."""
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure) is None)
    yield drawn


def test_the_page_needs_nothing_but_itself(found: Page) -> None:
    for tag, attributes in found.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith(("data:", "#")), (tag, name)
        assert not any(name.startswith("on") or name == "style" for name in attributes), tag
    assert "//" not in re.sub(r"^ *// .*$", "", found.texts["script"][-1], flags=re.M).replace("http://www.w3.org", "")
    assert not re.search(r"url\(|@import", found.texts["style"][0])


def test_the_policy_lets_run_that_script_and_that_style_alone(found: Page) -> None:
    (policy,) = [attributes["content"] for tag, attributes in found.tags if "http-equiv" in attributes]
    for kind, text in (("script", found.texts["script"][-1]), ("style", found.texts["style"][0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy


def test_texts_cannot_leave_their_place(found: Page) -> None:
    assert HOSTILE not in found.html
    assert "<img src=x" not in found.html
    assert "\u2028" not in "".join(found.texts["script"])
    assert len(found.texts["script"]) == 3, "two splits and the script"
    assert found.texts["h1"] == [HOSTILE]
    assert [block["queries"][0] for block in found.blocks()] == [HOSTILE, HOSTILE]
    script = found.texts["script"][-1]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|DOMParser|eval\(|Function\(", script)


def test_embedded_json_reads_back_whatever_it_holds() -> None:
    value = {"<!--": ["]]>", "\u2029&amp;", HOSTILE], "number": 0.1, "none": None}
    assert json.loads(embed_json(value)) == value
    assert not set(embed_json(value)) & set("<>&\u2028\u2029")
    assert doctest.testmod(page) == (0, 2)


def test_the_browser_holds_what_the_records_say(found: Page) -> None:
    results = make_results()
    for block, own in zip(found.blocks(), (results[:3], results[3:]), strict=True):
        names = [doc_id for doc_id, _ in block["documents"]]
        assert dict(block["documents"]).items() <= own[0].snippets.items()
        assert (block["collection"], block["split"]) == own[0].place
        assert (block["ids"], block["queries"]) == (own[0].query_ids, own[0].queries)
        assert block["pair"] == [1, 2]
        assert [{names[doc]: grade for doc, grade in row} for row in block["relevant"]] == own[0].relevant
        for run, result in zip(block["runs"], own, strict=True):
            assert run["name"] == result.system.name
            assert run["values"] == pytest.approx(result.per_query["ndcg@10"], abs=1e-6)
            top = [[(names[doc], score) for doc, score in row] for row in run["top"]]
            assert top == [[(doc_id, pytest.approx(score)) for doc_id, score in row] for row in result.top]
            assert run["reasoning"] == (result.reasoning or None)
            assert run["tokens"] == (result.reasoning_tokens or None)


def test_the_table_shows_the_numbers_of_the_records(found: Page) -> None:
    for result in make_results():
        _, _, _, queries, *cells = found.row(result.system.name, *result.place)
        low, high = result.intervals["ndcg@10"]
        assert cells[0][0] == f"{result.scores['ndcg@10']:.3f} ({low:.3f} to {high:.3f})"
        assert queries == ("12", "12")
        expected = [result.scores[name] for name in ("ndcg@10", "recall@100", "mrr@10", "map")]
        cost = result.cost
        expected += [cost.tokens_per_query, cost.ms_per_query, cost.queries_per_second, cost.documents_per_second]
        assert [float(value) if value else None for _, value in cells[:8]] == expected
        assert [text for text, _ in cells[1:4]] == [f"{value:.3f}" for value in expected[1:4]]


def test_the_gain_is_over_the_direct_mode_of_the_same_model(found: Page) -> None:
    _, direct, reason = make_results()[:3]
    gain = 100 * (reason.scores["ndcg@10"] - direct.scores["ndcg@10"]) / fmean(reason.reasoning_tokens)
    assert float(found.row("reason", "first", "test")[-1][1] or "nan") == pytest.approx(gain)
    assert found.row("reason", "first", "test")[-1][0] == f"{gain:+.3f}"
    assert found.row("direct", "first", "test")[-1] == ("", "")


def test_mean_rows_are_of_systems_that_stand_on_every_split(found: Page, tmp_path: Path, unplotted: None) -> None:
    results = make_results()
    mean = found.row("reason", "mean of all 2 splits")
    for cell, measure in zip(mean[2:6], ("ndcg@10", "recall@100", "mrr@10", "map"), strict=True):
        assert cell[0] == f"{fmean(results[i].scores[measure] for i in (2, 5)):.3f}"
    other = Page(write_page(results[1:], tmp_path, title="without bm25 on the first"))
    assert [row[0][0] for row in other.rows if row[1][0].startswith("mean of")] == ["direct", "reason"]


def test_the_best_of_each_split_is_marked(tmp_path: Path, unplotted: None) -> None:
    html = write_page(make_results(["first"]), tmp_path, title="best").read_text()
    best = [float(value) for value in re.findall(r'class="number best" data-value="([\d.]+)"', html)]
    for measure in ("ndcg@10", "mrr@10", "map"):
        assert max(result.scores[measure] for result in make_results(["first"])) in best
    assert make_result(*SYSTEMS[0], collection="first").scores["ndcg@10"] not in best


def test_what_can_be_operated_has_a_name_and_headings_have_a_scope(found: Page) -> None:
    opened: list[str] = []
    for tag, attributes in found.tags:
        opened.append(tag)
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
        if tag == "img":
            assert attributes["alt"]
        if tag == "select":
            assert opened[-2] == "label"
        if tag == "input" or attributes.get("role") in ("listbox", "region", "group"):
            assert attributes.get("aria-label") or attributes.get("aria-labelledby")
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["href"][1:] for tag, attributes in found.tags if tag == "a"} <= set(ids)


def test_provenance_is_complete(found: Page) -> None:
    for result in make_results():
        name = f"{result.collection.name} / {result.collection.split}"
        (row,) = [row for row in found.rows if [text for text, _ in row[:2]] == [result.system.name, name]]
        texts = [text for text, _ in row]
        identity = [result.system.model, result.system.revision, result.collection.hash]
        assert texts[2:7] == [*identity, "2026-01-02T03:04:05+00:00", result.key]
        for words in ("k1 1.5", "depth 100", "documents 40", "versions {'numpy': '2.0'}"):
            assert words in texts[7]


def test_the_tests_are_shown(found: Page) -> None:
    for one in compare(make_results(), 50, 0):
        row = found.row(one.collection, one.split, one.first, one.second)
        assert [float(value or "nan") for _, value in row[4:]] == [one.difference, one.p, one.p_holm]


def test_plots_are_files_and_stand_in_the_page_in_light_and_dark(folder: Path, found: Page) -> None:
    names = {"ndcg", "latency", "reasoning", "rollout_rewards", "reward", "account"}
    assert {path.name for path in (folder / "plots").iterdir()} == {f"{name}.png" for name in names}
    files = {path.read_bytes() for path in (folder / "plots").iterdir()}
    assert all(data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82") for data in files)
    light = [attributes for tag, attributes in found.tags if tag == "img"]
    dark = {attributes["srcset"] for tag, attributes in found.tags if tag == "source"}
    prefix = "data:image/png;base64,"
    assert {base64.b64decode(attributes["src"].removeprefix(prefix)) for attributes in light} == files
    assert len(dark) == 6
    assert not dark & {attributes["src"] for attributes in light}
    assert all(int(attributes["width"]) > int(attributes["height"]) > 100 for attributes in light)


def test_the_dark_theme_ends_with_its_block() -> None:
    before = dict(matplotlib.rcParams)
    with plots.dark_theme():
        assert matplotlib.rcParams["figure.facecolor"] == plots.DARK_GROUND
    assert dict(matplotlib.rcParams) == before


def test_a_large_split_shows_its_largest_changes_and_an_even_sample(tmp_path: Path, unplotted: None) -> None:
    results = make_results(["first"], queries=700)
    (block,) = Page(write_page(results, tmp_path, title="large")).blocks()
    listed = block["listed"]
    assert len(listed) == len(set(listed)) == SHOWN_QUERIES == len(block["ids"]) == len(block["relevant"])
    assert [len(run["values"]) for run in block["runs"]] == [700] * 3, "sums and the histogram are over all"
    assert block["ids"] == [results[0].query_ids[i] for i in listed]
    assert block["runs"][2]["reasoning"] == [results[2].reasoning[i] for i in listed]
    direct, reason = (result.per_query["ndcg@10"] for result in results[1:])
    differences = sorted((b - a, i) for i, (a, b) in enumerate(zip(direct, reason, strict=True)))
    least = differences[99][0], differences[-100][0]
    assert {i for difference, i in differences if not least[0] <= difference <= least[1]} <= set(listed)


def test_the_sample_is_even_where_nothing_changed() -> None:
    assert choose_queries([0.0] * 10, 5) == [0, 2, 4, 6, 8]
    assert choose_queries([0.1, -0.1], 5) == [0, 1]
    assert choose_queries([-0.5, *[0.0] * 8, 0.5], 6) == [0, 1, 3, 5, 7, 9]
    assert choose_queries([i / 10 for i in range(10)], 3) == [0, 4, 9], "no losses: more of the rest"


def test_relevant_documents_that_nobody_found_are_few(tmp_path: Path, unplotted: None) -> None:
    gains = {f"x{i:03d}": 1 for i in range(100)} | {"x050": 2}
    snippets = make_result().snippets | dict.fromkeys(gains, "text")
    top = [[("x099", 1.0), ("d00", 0.5)]]
    result = make_result(queries=1, relevant=[gains], snippets=snippets, top=top)
    (block,) = Page(write_page([result], tmp_path, title="many")).blocks()
    names = [doc_id for doc_id, _ in block["documents"]]
    shown = [names[doc] for doc, _ in block["relevant"][0]]
    assert shown == ["x099", "x050", *(f"x{i:03d}" for i in range(19))]
    assert block["relevant_in_all"] == [100]


def test_the_default_pair_is_of_one_model() -> None:
    names = ("direct/sft", "reason/sft", "direct/rl", "reason/rl")
    results = [make_result(name, mode=name.partition("/")[0]) for name in names]
    assert default_pair(results) == (results[2], results[3])
    assert default_pair(results[:3]) == (results[0], results[1])
    assert default_pair([results[0], results[3]]) == (results[0], results[3]), "of two models: first and last"
    assert default_pair(results[:1]) == (results[0], results[0])


def test_what_a_reader_should_know_stands_below_the_table(tmp_path: Path, unplotted: None) -> None:
    result = make_result()
    told = {
        "collection": result.collection.model_copy(update={"sample_of": 99}),
        "notes": ["<b>nothing</b> was found"],
    }
    page = write_page([result.model_copy(update=told)], tmp_path, title="t").read_text()
    assert "sample of 99" in page
    assert "<li>first, test: a sample: 12 of 99 queries, drawn by the seed</li>" in page
    assert "<li>first, test: reason: &lt;b&gt;nothing&lt;/b&gt; was found</li>" in page


def test_one_system_without_reasoning_makes_a_page(tmp_path: Path) -> None:
    path = write_page([make_result(*SYSTEMS[0])], tmp_path, title="lexical")
    found = Page(path)
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"ndcg.png", "latency.png"}
    assert "tiles" not in [attributes.get("class") for _, attributes in found.tags]
    assert found.blocks()[0]["pair"] == [0, 0]
    assert found.blocks()[0]["runs"][0]["reasoning"] is None


def test_two_systems_of_one_name_are_told_apart(tmp_path: Path, unplotted: None) -> None:
    results = [make_result(), make_result(key="0123456789"), make_result("direct", mode="direct")]
    (block,) = Page(write_page(results, tmp_path, title="twice")).blocks()
    assert [run["name"] for run in block["runs"]] == [f"reason ({results[0].key[:7]})", "reason (0123456)", "direct"]


def test_nothing_and_mixed_states_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no results .* run search-r3 evaluate first"):
        write_page([], tmp_path, title="none")
    changed = make_result("direct", mode="direct")
    changed = changed.model_copy(update={"collection": changed.collection.model_copy(update={"hash": "00"})})
    with pytest.raises(DataError, match="'reason' and 'direct' were evaluated on different states of 'first', test"):
        write_page([make_result(), changed], tmp_path, title="mixed")
    assert not list(tmp_path.iterdir())


def test_bars_and_intervals_are_those_of_the_results(figures: list[Any]) -> None:
    results = make_results([f"collection {i}" for i in range(18)])
    assert plots.plot_scores(results, Path("unused"))
    (figure,) = figures
    heights = sorted(bar.get_height() for axes in figure.axes for bar in axes.patches)
    assert heights == sorted(result.scores["ndcg@10"] for result in results)
    assert len(figure.axes) == 2, "54 bars fill two rows"
    drawn = sorted(
        tuple(segment[:, 1])
        for axes in figure.axes
        for container in axes.containers
        if hasattr(container, "has_yerr")
        for segment in container.lines[2][0].get_segments()
    )
    assert drawn == [pytest.approx(pair) for pair in sorted(result.intervals["ndcg@10"] for result in results)]
    left = [bar.get_x() for bar in figure.axes[0].patches]
    assert len({round(x, 6) for x in left}) == len(left), "no bar hides another"


def test_cost_is_latency_or_the_time_within_a_batch(figures: list[Any]) -> None:
    assert plots.plot_latency(make_results(), Path("unused"))
    points = [collection.get_offsets().tolist() for collection in figures[0].axes[0].collections]
    large = [place[0] for place in points if len(place) == 1]
    assert [x for x, _ in large] == pytest.approx([1000 / 900, 6.25, 41.5])
    results = make_results()
    means = [fmean(results[i + j].scores["ndcg@10"] for j in (0, 3)) for i in range(3)]
    assert [y for _, y in large] == pytest.approx(means)
    assert sum(len(place) for place in points) == 9


def test_systems_are_averaged_over_the_splits_that_all_share(figures: list[Any]) -> None:
    results = make_results()[:5]  # reason stands on the first collection alone
    assert plots.plot_latency(results, Path("unused"))
    points = [collection.get_offsets().tolist() for collection in figures[0].axes[0].collections]
    large = [place[0][1] for place in points if len(place) == 1]
    assert large == pytest.approx([result.scores["ndcg@10"] for result in results[:3]])


def test_reasoning_lengths_are_shares_of_the_queries(figures: list[Any]) -> None:
    assert plots.plot_reasoning(make_results(), Path("unused"))
    assert [axes.get_title() for axes in figures[0].axes] == ["first / test", "second / test"]
    for axes in figures[0].axes:
        assert sum(bar.get_height() for bar in axes.patches if hasattr(bar, "get_height")) == pytest.approx(1)


@pytest.mark.parametrize("name", ["reward_ndcg", "reward_ranking"])
def test_the_reward_is_plotted_by_its_name_and_by_that_of_release_0_1(figures: list[Any], name: str) -> None:
    assert plots.plot_training([{"step": 1, name: 0.25}, {"step": 2, name: 0.5}], Path("unused"))
    assert figures[0].axes[0].lines[0].get_xydata().tolist() == [[1.0, 0.25], [2.0, 0.5]]


def test_what_is_not_there_is_not_plotted(figures: list[Any]) -> None:
    path = Path("unused")
    assert not plots.plot_scores([], path)
    assert not plots.plot_latency([], path)
    assert not plots.plot_reasoning(make_results()[:2], path)
    assert not plots.plot_rewards({"before": []}, path)
    assert not plots.plot_training([{"step": 1, "loss": 1.0}], path)
    assert not plots.plot_account([{"step": 1, "reward_ranking": 1.0}], path)
    assert not figures


def test_a_system_has_one_colour_and_none_shares_it() -> None:
    modes = {"direct/sft": "direct", "reason/sft": "reason", "direct/rl": "direct", "reason/rl": "reason"}
    kinds = dict.fromkeys(["bm25", "bm25+reasoning/sft", "bm25+reasoning/rl"], "bm25") | dict.fromkeys(
        modes, "search-r3"
    )
    kinds["minilm"] = "sentence-transformers"
    results = [make_result(name, kind, modes.get(name, "")) for name, kind in kinds.items()]
    colours = plots.system_colours(results)
    assert list(colours) == list(kinds)
    assert len(set(colours.values())) == 8
    assert colours["reason/rl"] == plots.COLOURS["reason"][0]
    assert plots.system_colours([*results, *results]) == colours


def test_a_plot_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ndcg.png"
    path.write_bytes(b"old")

    def fail(self: Any, target: Path, **options: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plots.plot_scores(make_results(), path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("ndcg.png", b"old")]
