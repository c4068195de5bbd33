"""Week 0. The progress page, as HTML with your runs in it and as Markdown with the course's own.

`python -m shared.course.report` makes both from the logs: `reports/index.html` and `reports/README.md`.
"""

import os
from collections.abc import Iterable
from html import escape
from pathlib import Path

from shared.course.progress import Runs, WeekReport, collect, seconds
from shared.course.runs import output_root
from shared.runtime import ROOT, write_atomically

TITLE = "Progress: a language model from nothing"
CSS = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --done: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: #fff; }
body { font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .2rem; }
p { margin: .3rem 0 1rem; }
.soft { color: var(--soft); }
a { color: var(--done); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem .7rem .4rem 0; white-space: nowrap; }
th, td { border-bottom: 1px solid var(--line); }
td:nth-child(4) { white-space: normal; }
th { color: var(--soft); font-weight: 600; font-size: .85rem; }
.number { text-align: right; }
.bar { display: inline-block; width: 5rem; height: .55rem; }
.bar { background: var(--line); border-radius: .3rem; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--done); }
figure { margin: 0 0 1.2rem; }
figure img { width: 100%; height: auto; border: 1px solid var(--line); border-radius: .4rem; }
figcaption { color: var(--soft); font-size: .9rem; }
.plots { display: grid; gap: 1rem; margin: 1rem 0; }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .9rem; margin: 0; }
pre { background: #f6f8fa; border-radius: .4rem; padding: .8rem 1rem; }
summary { cursor: pointer; color: var(--done); margin: .6rem 0; }
@media (max-width: 40rem) {
  .bar { display: none; }
  table { font-size: .78rem; }
  th { font-size: .72rem; }
  th, td { white-space: normal; padding-right: .3rem; }
}
"""
WEEKS_HEAD = (
    "<th>week</th><th>run</th><th>exercises</th><th>figure</th>"
    '<th class="number">yours</th><th class="number">the course\'s</th>'
)
INTRODUCTION = """\
# What the course measures

The course's own runs, on two cores without a GPU. `python -m shared.course.report` makes this page from \
`logs/`, and `index.html` beside it
with your runs in it. On one page: [SUMMARY.md](SUMMARY.md).

![Bits per byte of the same held-out text, week by week](ladder.png)

| week | | figure | the course's | seconds | exercises |
| --- | --- | --- | ---: | ---: | ---: |
"""


def write_page() -> Path:
    """Writes `reports/index.html`, with the learner's runs, and returns its path."""
    folder = output_root() / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "index.html", html_page(collect(), folder))
    return folder / "index.html"


# ---- HTML


def html_page(reports: list[WeekReport], folder: Path) -> str:
    """The page, to be kept in `folder`: one file without scripts; plots are linked from where they lie."""
    done = sum(report.mine is not None for report in reports)
    solved = sum(report.solved for report in reports)
    exercises = sum(report.exercises for report in reports)
    parts = [
        "<h1>A language model from nothing</h1>",
        f"<p>{done} of {len(reports)} weeks run, {solved} of {exercises} exercises solved."
        ' <span class="soft">Made from the logs by <code>python -m shared.course.report</code>.</span></p>',
    ]
    ladders = (output_root() / "reports" / "mine" / "ladder.png", ROOT / "reports" / "ladder.png")
    for ladder in ladders:
        if ladder.exists():
            parts.append(_image(ladder, folder, "Bits per byte of the same held-out text, week by week"))
            break
    parts.append(_html_table(WEEKS_HEAD, [_week_row(report) for report in reports]))
    parts += [_html_week(report, folder) for report in reports]
    body = "\n".join(parts)
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{TITLE}</title><style>{CSS}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _html_table(head: str, rows: list[str]) -> str:
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _week_row(report: WeekReport) -> str:
    """A week's cells in the table at the top."""
    name, yours, course = _first_figure(report)
    share = 100 * report.solved / max(1, report.exercises)
    cells = [
        f'<a href="#{report.topic}">{escape(report.title)}</a>',
        _run_as(report.mine),
        f'<span class="bar"><i style="width:{share:.0f}%"></i></span> {report.solved} of {report.exercises}',
        escape(name),
    ]
    return "".join(f"<td>{cell}</td>" for cell in cells) + _number_cells(yours, course)


def _number_cells(*values: str) -> str:
    return "".join(f'<td class="number">{escape(value)}</td>' for value in values)


def _first_figure(report: WeekReport) -> tuple[str, str, str]:
    figures = report.figures()
    return figures[0] if figures else ("", "", "")


def _run_as(runs: Runs | None) -> str:
    """Whether the learner has run a week. A smoke run is named: it shows that a week runs, no more."""
    if runs is None:
        return "not yet"
    return f"yes ({escape(runs.preset)})" if runs.preset == "smoke" else "yes"


def _html_week(report: WeekReport, folder: Path) -> str:
    mine = report.mine
    course = report.course
    parts = [
        f'<h2 id="{report.topic}">{escape(report.title)}</h2>',
        f'<p class="soft">{escape(report.about)}</p>',
    ]
    if mine is None:
        parts.append(
            f"<p>Not run yet: open <code>weeks/{report.topic}/notebook.ipynb</code>, or <code>python"
            f" weeks/{report.topic}/run.py</code>.</p>"
        )
    yours_head = escape(f"yours ({mine.preset}, {mine.data})" if mine else "yours")
    course_head = escape(f"the course's ({course.data})" if course else "the course's")
    head = f'<th>figure</th><th class="number">{yours_head}</th><th class="number">{course_head}</th>'
    rows = [
        f"<td>{escape(name)}</td>{_number_cells(yours, theirs)}" for name, yours, theirs in report.figures()
    ]
    parts.append(_html_table(head, rows))
    if mine:
        parts.append(_plots_and_sample(mine, "Yours", folder))
    if course:
        inside = _plots_and_sample(course, "The course's", folder)
        if mine:
            inside = f"<details><summary>The course's plots and text</summary>{inside}</details>"
        parts.append(inside)
    return "\n".join(parts)


def _plots_and_sample(runs: Runs, owner: str, folder: Path) -> str:
    images = "".join(_image(plot, folder, f"{owner}: {_words(plot)}") for plot in runs.plots)
    html = f'<div class="plots">{images}</div>'
    if runs.sample:
        html += f"<p>{owner}, what the model writes:</p><pre>{escape(runs.sample)}</pre>"
    return html


def _image(path: Path, folder: Path, caption: str) -> str:
    """A plot with its caption, linked from a page in `folder`."""
    source = escape(Path(os.path.relpath(path, folder)).as_posix())
    words = escape(caption)
    return (
        f'<figure><img src="{source}" alt="{words}" loading="lazy"><figcaption>{words}</figcaption></figure>'
    )


def _words(path: Path) -> str:
    return path.stem.replace("_", " ")


# ---- Markdown


def markdown_page(reports: Iterable[WeekReport]) -> str:
    """The course's own runs, in Markdown, for `reports/README.md`."""
    reports = list(reports)
    rows = []
    for report in reports:
        name, _, value = _first_figure(report)
        link = f"[{report.title}](#{_anchor(report.title)})"
        cells = [link, report.about, name, value, seconds(report.course), str(report.exercises)]
        rows.append(f"| {' | '.join(cells)} |\n")
    return INTRODUCTION + "".join(rows) + "".join(_markdown_week(report) for report in reports)


def _markdown_week(report: WeekReport) -> str:
    links = f"[Notebook](../weeks/{report.topic}/notebook.ipynb), [log](../weeks/{report.topic}/log.md)"
    lines = ["", f"## {report.title}", "", f"{report.about} {links}.", ""]
    if report.course:
        lines += ["| figure | the course's |", "| --- | ---: |"]
        lines += [f"| {name} | {value} |" for name, _, value in report.figures()]
        lines.append("")
        for plot in report.course.plots:
            source = plot.relative_to(ROOT / "reports").as_posix()
            lines.append(f"![{report.title}: {_words(plot)}]({source})")
        if report.course.sample:
            lines += ["", "What the model writes:", "", "```text", *report.course.sample.splitlines(), "```"]
    return "\n".join(lines) + "\n"


def _anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c == "-")
