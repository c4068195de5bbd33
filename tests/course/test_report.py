"""Plots and tables come from logs, and from nothing else."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import matplotlib
import pytest

from shared.course import markdown, report
from shared.course import runs as found_runs
from shared.course.style import STYLE, style, use_style
from shared.runtime import ROOT, RunLog
from tests.pictures import assert_shows_something, drawn_figures


@pytest.fixture
def runs(tmp_path):
    for name, slope in (("fast", 2.0), ("slow", 1.0)):
        with RunLog(tmp_path / "logs" / "04_mini_gpt" / "reference" / "toy" / name) as log:
            for step in range(1, 6):
                log.log(step, val_loss=4 - slope * step / 5, seconds=step / 10)
            log.finish(val_loss=4 - slope, seconds=0.5)
    return report.read_runs(tmp_path / "logs" / "04_mini_gpt" / "reference" / "toy")


def test_series_holds_what_was_logged(runs):
    assert runs["slow"].series("val_loss") == ([1, 2, 3, 4, 5], [3.8, 3.6, 3.4, 3.2, 3.0])
    assert runs["slow"].series("val_loss", "seconds")[0] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert runs["slow"].series("no_such") == ([], [])


def line(ax, label):
    """A line's points, by what the legend calls it."""
    (found,) = [line for line in ax.lines if line.get_label() == label]
    return found.get_xydata().tolist()


def test_curves_draw_what_each_run_logged_and_the_reference(runs, tmp_path, monkeypatch):
    figures = drawn_figures(monkeypatch)
    slow, fast = (report.Curve(runs[name], name) for name in ("slow", "fast"))
    path = report.curves(
        tmp_path / "a.png",
        [slow],
        "One",
        x="seconds",
        xlabel="time",
        reference=[fast],
        levels={"floor": 1.5},
        ylim=(1, 5),
    )
    (ax,) = figures[path].axes
    assert (ax.get_title(), ax.get_xlabel()) == ("One", "time")
    assert ax.get_ylabel() == "validation loss (nats per token)" and ax.get_ylim() == (1, 5)
    for label, name in (("slow", "slow"), ("course: fast", "fast")):
        logged = [[row["seconds"], row["val_loss"]] for row in runs[name].rows]
        assert line(ax, label) == logged
    assert {y for _, y in line(ax, "floor: 1.500")} == {1.5} and len(ax.lines) == 3
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["course: fast", "slow", "floor: 1.500"]


def test_bars_are_as_long_as_their_values_and_named(tmp_path, monkeypatch):
    figures = drawn_figures(monkeypatch)
    values = {"a": 1.25, "b": 2.5}
    path = report.bars(tmp_path / "b.png", values, "Two", "loss", errors={"b": 0.5}, start=1)
    (ax,) = figures[path].axes
    assert (ax.get_title(), ax.get_xlabel()) == ("Two", "loss")
    assert (
        dict(zip((t.get_text() for t in ax.get_yticklabels()), (p.get_width() for p in ax.patches))) == values
    )
    assert [text.get_text() for text in ax.texts] == ["1.250", "2.500"]
    (spread,) = [c for c in ax.collections if c.get_segments()]
    assert [[x for x, _ in segment] for segment in spread.get_segments()] == [[1.25, 1.25], [2.0, 3.0]]
    assert ax.get_xlim()[0] == 1 and ax.get_xlim()[1] > 3.0


def test_a_heatmap_has_its_values_in_rows_and_columns(tmp_path):
    fig, ax = report.figure()
    report.heatmap(ax, [[0, 1, 2], [3, 4, 5]], "Three", "abc", "de", xlabel="x", ylabel="y", unit="z")
    assert ax.images[0].get_array().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", "c"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["d", "e"]
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("Three", "x", "y")
    assert fig.axes[1].get_ylabel() == "z"


@pytest.mark.slow
@pytest.mark.parametrize("topic", found_runs.weeks())
def test_plots_of_the_committed_logs_show_something(topic, tmp_path, monkeypatch):
    figures = drawn_figures(monkeypatch)
    with style():
        paths = report.load_script(topic, "figures").draw(
            ROOT / "logs" / topic / "reference" / "tinyshakespeare", tmp_path
        )
    assert figures.keys() == set(paths) and len(paths) >= 2
    for path, figure in figures.items():
        assert_shows_something(figure, path.name)


def test_the_check_of_plots_sees_an_empty_one(tmp_path):
    fig, ax = report.figure()
    ax.set(title="One", xlabel="x", ylabel="y")
    with pytest.raises(AssertionError, match="nothing is drawn"):
        assert_shows_something(fig, "empty")
    ax.plot([0, 1], [math.nan, math.nan])
    with pytest.raises(AssertionError, match="nothing is drawn"):
        assert_shows_something(fig, "not a number")
    ax.plot([0, 1], [1, 2])
    assert_shows_something(fig, "a line")
    ax.set_ylabel("")
    with pytest.raises(AssertionError, match="an axis says not what it is"):
        assert_shows_something(fig, "no name")


@pytest.mark.slow
def test_a_plot_is_the_same_every_time(runs, tmp_path):
    lines = [report.Curve(runs["slow"], "slow")]
    first, again = (report.curves(tmp_path / name, lines, "One") for name in ("a.png", "b.png"))
    assert first.read_bytes() == again.read_bytes()


def draw_everything(runs, folder):
    """A plot of each kind, and one that a week puts together itself."""
    report.curves(folder / "curves.png", [report.Curve(runs["slow"], "slow")], "One", levels={"a": 3.0})
    report.bars(folder / "bars.png", {"a": 1.0, "b": 2.0}, "Two", "loss", errors={"a": 0.5})
    with style():
        fig, (left, right) = report.figure(ncols=2)
        report.heatmap(left, [[0, 1], [2, 3]], "Three", "ab", "cd", xlabel="x", ylabel="y", unit="z")
        right.plot([1, 2], label="line")
        right.annotate("a text", (0, 1))
        right.legend()
        report.save_figure(fig, folder / "own.png")
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.mark.slow
def test_drawing_leaves_matplotlibs_parameters_as_they_were(runs, tmp_path):
    before = dict(matplotlib.rcParams)
    plots = draw_everything(runs, tmp_path / "a")
    assert dict(matplotlib.rcParams) == before and len(plots) == 3
    with matplotlib.rc_context({"font.size": 20, "axes.grid": False, "grid.alpha": 1}):  # another host's
        assert dict(matplotlib.rcParams) != before
        assert draw_everything(runs, tmp_path / "b") == plots


@pytest.mark.slow
def test_importing_the_course_leaves_matplotlibs_parameters_as_they_were():
    code = (
        "import matplotlib; before = dict(matplotlib.rcParams); import shared.course.report;"
        " assert dict(matplotlib.rcParams) == before"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_notebook_can_ask_for_the_style_of_all_its_plots():
    with matplotlib.rc_context():
        use_style()
        assert {name: matplotlib.rcParams[name] for name in STYLE} == STYLE


def test_reference_is_of_the_same_week_and_data(monkeypatch, runs, tmp_path):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    mine = tmp_path / "elsewhere" / "logs" / "04_mini_gpt" / "mine"
    assert set(report.reference_for(mine / "laptop" / "toy")) == {"fast", "slow"}
    assert report.reference_for(mine / "laptop" / "other") == {}
    assert report.reference_for(mine / "smoke" / "toy") == {}
    assert report.reference_for(tmp_path / "logs" / "04_mini_gpt" / "reference" / "toy") == {}


TABLE = """Before.

<!-- table 04_mini_gpt/reference/toy fast,slow=the_slow_one "val_loss|loss|.2f, seconds|time (s)|.1f" -->
stale
<!-- end -->

It got <!-- = 04_mini_gpt/reference/toy/fast val_loss .1f -->?<!-- end -->.
"""
FILLED = """\
| run | loss | time (s) |
| --- | ---: | ---: |
| fast | 2.00 | 0.5 |
| the slow one | 3.00 | 0.5 |
<!-- end -->"""


def test_refill_writes_tables_and_figures_from_the_logs(monkeypatch, runs, tmp_path):
    monkeypatch.setattr(markdown, "ROOT", tmp_path)
    text = markdown.refill(TABLE)
    assert FILLED in text
    assert "It got <!-- = 04_mini_gpt/reference/toy/fast val_loss .1f -->2.0<!-- end -->." in text
    assert markdown.refill(text) == text and text.startswith("Before.")


def test_a_dash_only_where_the_marker_allows_it(monkeypatch, runs, tmp_path):
    monkeypatch.setattr(markdown, "ROOT", tmp_path)
    head = '<!-- table 04_mini_gpt/reference/toy fast "val_loss|loss|.2f, target_step{}|step|,.0f" -->'
    filled = markdown.refill(head.format("?") + "\nstale\n<!-- end -->")
    assert filled.splitlines()[-2] == "| fast | 2.00 | – |"
    with pytest.raises(ValueError, match="target_step"):
        markdown.refill(head.format("") + "\nstale\n<!-- end -->")


def test_a_row_that_is_not_there_yet_is_left_out_only_where_the_marker_allows_it(monkeypatch, runs, tmp_path):
    monkeypatch.setattr(markdown, "ROOT", tmp_path)
    head = '<!-- table 04_mini_gpt/reference/toy {} "val_loss|loss|.2f" -->\nstale\n<!-- end -->'
    rows = markdown.refill(head.format("fast?=the_fast_one,none?,fast?")).splitlines()[3:-1]
    assert rows == ["| the fast one | 2.00 |", "| fast | 2.00 |"]
    with pytest.raises(ValueError, match="none"):
        markdown.refill(head.format("fast,none"))


def test_refill_writes_kept_text_up_to_the_end_of_a_line(monkeypatch, tmp_path):
    monkeypatch.setattr(markdown, "ROOT", tmp_path)
    folder = tmp_path / "logs" / "04_mini_gpt" / "toy"
    folder.mkdir(parents=True)
    text = "To be,\nor not to be:\nthat is the question"
    (folder / "artifacts.json").write_text(json.dumps({"sample": f"\n{text}\n"}), encoding="utf-8")
    for length, shown in ((100, text), (25, "To be,\nor not to be:"), (10, "To be,")):
        marker = f"<!-- text 04_mini_gpt/toy sample {length} -->"
        filled = markdown.refill(f"Look:\n{marker}\nold\n<!-- end -->\n")
        assert filled == f"Look:\n{marker}\n```text\n{shown}\n```\n<!-- end -->\n"
        assert markdown.refill(filled) == filled


def test_refill_names_a_marker_without_a_log(monkeypatch, tmp_path):
    monkeypatch.setattr(markdown, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="04_mini_gpt/reference/toy"):
        markdown.refill(TABLE)


def test_figures_that_are_nearly_alike_look_alike_on_the_ladder():
    figure = report._ladder_figure([{"01_bigram": 3.583}, {"01_bigram": 3.585}], "toy")
    low, high = figure.axes[0].get_ylim()
    assert high - low == pytest.approx(0.5) and low < 3.583 < high
    wide = report._ladder_figure([{"01_bigram": 3.5, "02_mlp": 2.5}], "toy").axes[0].get_ylim()
    assert wide[1] - wide[0] > 1


def test_ladder_needs_runs_and_leaves_smoke_runs_out(monkeypatch, tmp_path):
    monkeypatch.setattr(found_runs, "ROOT", tmp_path)
    monkeypatch.setenv("LLM_WEEKS_OUTPUT", str(tmp_path))
    assert report.ladder(tmp_path / "ladder.png", "toy", mine=True) is None
    runs = (("01_bigram", "laptop", 3.5), ("02_mlp", "laptop", 2.5), ("03_attention", "smoke", 9.0))
    for topic, preset, bits in runs:
        folder = tmp_path / "logs" / topic / "mine" / preset / "toy"
        folder.mkdir(parents=True)
        week = {"preset": preset, "data": "toy", "seconds": 1, "metrics": {"bits_per_byte": bits}}
        (folder / "week.json").write_text(json.dumps(week))
    figures = drawn_figures(monkeypatch)
    path = report.ladder(tmp_path / "ladder.png", "toy", mine=True)
    (ax,) = figures[path].axes
    assert line(ax, "yours") == [[0, 3.5], [1, 2.5]] and len(ax.lines) == 1
    assert [text.get_text() for text in ax.texts] == ["3.50", "2.50"]
    assert [tick.get_text()[:2] for tick in ax.get_xticklabels()] == ["1 ", "2 "]
    assert "toy" in ax.get_title() and ax.get_ylabel().startswith("bits per byte")


@pytest.mark.parametrize("low, high", [(1.65, 2.05), (1.1, 2.4), (2.2, 4.3), (1.0, 12.0), (0.2, 35.0)])
def test_a_perplexity_stands_beside_its_loss(low, high):
    fig, ax = report.figure()
    ax.plot([0, 1], [low, high])
    report.perplexity_axis(ax)
    fig.canvas.draw()
    (right,) = ax.child_axes
    ticks = right.get_yticks()
    labels = [label.get_text() for label in right.get_yticklabels()]
    assert 3 <= len(ticks) <= 8 and labels == [f"{tick:,g}" for tick in ticks]
    for tick in ticks:
        height = ax.transData.transform((0, math.log(tick)))[1]
        assert right.transData.transform((0, tick))[1] == pytest.approx(height, abs=0.01)


def test_scripts_of_two_weeks_are_kept_apart(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    for topic in ("01_a", "02_b"):
        folder = tmp_path / "weeks" / topic
        folder.mkdir(parents=True)
        (folder / "names.py").write_text(f'NAME = "{topic}"\n')
        (folder / "run.py").write_text("from names import NAME\n\n\nclass Settings:\n    name = NAME\n")
    before = list(sys.path)
    first, second = report.load_script("01_a"), report.load_script("02_b")
    assert (first.NAME, second.NAME) == ("01_a", "02_b")
    assert first.Settings.__module__ == "weeks.01_a.run" and sys.modules["weeks.01_a.run"] is first
    assert not {"run", "names"} & sys.modules.keys() and sys.path == before
    with pytest.raises(ModuleNotFoundError):
        report.load_script("01_a", "figures")


def test_the_courses_plots_go_where_its_pages_look_for_them(monkeypatch, output):
    drawn = []
    figures = SimpleNamespace(draw=lambda logs, folder: drawn.append((logs.name, folder)) or [])
    monkeypatch.setattr(report, "load_script", lambda topic, name: figures)
    report._draw_week("05_bpe", only_mine=False)
    folder = ROOT / "reports" / "05_bpe"
    assert drawn == [("shakespeare", folder / "shakespeare"), ("tinyshakespeare", folder)]
