"""Plots and tables come from logs, and from nothing else."""

import json
import math

import matplotlib.image
import pytest

from shared.course import report, workspace
from shared.runtime import RunLog


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


def test_curves_draw_each_run_and_the_reference(runs, tmp_path):
    alone = report.curves(tmp_path / "alone.png", [report.Curve(runs["slow"], "slow")], "One")
    both = report.curves(
        tmp_path / "both.png",
        [report.Curve(runs["slow"], "slow")],
        "One",
        reference=[report.Curve(runs["fast"], "fast")],
    )
    a, b = matplotlib.image.imread(alone), matplotlib.image.imread(both)
    assert a.shape == b.shape and abs(a - b).mean() > 1e-3


def test_a_plot_is_the_same_every_time(runs, tmp_path):
    draw = lambda name: report.curves(
        tmp_path / name, [report.Curve(runs["slow"], "slow")], "One"
    ).read_bytes()
    assert draw("a.png") == draw("b.png")


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


def test_fill_writes_tables_and_figures_from_the_logs(monkeypatch, runs, tmp_path):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    text = report.fill(TABLE)
    assert (
        "| run | loss | time (s) |\n| --- | ---: | ---: |\n| fast | 2.00 | 0.5 |\n| the slow one | 3.00 | 0.5"
        " |\n<!-- end -->" in text
    )
    assert "It got <!-- = 04_mini_gpt/reference/toy/fast val_loss .1f -->2.0<!-- end -->." in text
    assert report.fill(text) == text and text.startswith("Before.")


def test_fill_names_a_marker_without_a_log(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="04_mini_gpt/reference/toy"):
        report.fill(TABLE)


def test_ladder_needs_runs_and_leaves_smoke_runs_out(monkeypatch, tmp_path):

    monkeypatch.setattr(workspace, "ROOT", tmp_path)
    monkeypatch.setenv("LLM_WEEKS_OUTPUT", str(tmp_path))
    assert report.ladder(tmp_path / "ladder.png", "toy", mine=True) is None
    for topic, preset, bits in (
        ("01_bigram", "laptop", 3.5),
        ("02_mlp", "laptop", 2.5),
        ("03_attention", "smoke", 9.0),
    ):
        folder = tmp_path / "logs" / topic / "mine" / preset / "toy"
        folder.mkdir(parents=True)
        (folder / "week.json").write_text(
            json.dumps({"preset": preset, "data": "toy", "seconds": 1, "metrics": {"bits_per_byte": bits}})
        )
    path = report.ladder(tmp_path / "ladder.png", "toy", mine=True)
    assert matplotlib.image.imread(path)[..., :3].std() > 0.01


@pytest.mark.parametrize("low, high", [(1.65, 2.05), (1.1, 2.4), (2.2, 4.3), (1.0, 12.0), (0.2, 35.0)])
def test_a_perplexity_stands_beside_its_loss(low, high):
    fig, ax = report.figure()
    ax.plot([0, 1], [low, high])
    report.perplexity_axis(ax)
    fig.canvas.draw()
    (right,) = ax.child_axes
    ticks = right.get_yticks()
    assert 3 <= len(ticks) <= 8 and [label.get_text() for label in right.get_yticklabels()] == [
        f"{tick:,g}" for tick in ticks
    ]
    for tick in ticks:
        assert right.transData.transform((0, tick))[1] == pytest.approx(
            ax.transData.transform((0, math.log(tick)))[1], abs=0.01
        )
