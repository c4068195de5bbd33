"""Week 0. Tables and figures in Markdown that are filled in from the logs.

Text between markers is generated. A table has a row for each run, a column for each `key|heading|format`:

    <!-- table 04_mini_gpt/reference/tinyshakespeare classic,modern
        "best_val_loss|validation loss|.3f, seconds|time (s)|.0f" -->
    <!-- end -->

with the marker on one line; `name=label` gives a run another name in the table, `name?` is a run that has no
row as long as it is not there, and `key?` is one that some runs have not, such as the step at which a loss
was reached: a dash stands there. A single figure is

    <!-- = 04_mini_gpt/reference/tinyshakespeare/modern best_val_loss .3f -->1.497<!-- end -->

and text that a run kept (in its artifacts.json), cut at a line's end after so many characters, is

    <!-- text 01_bigram/reference/tinyshakespeare/network sample 200 -->
    <!-- end -->
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.runtime import ROOT, read_json

TABLE = re.compile(r"(<!-- table (\S+) (\S+) \"([^\"]*)\" -->\n).*?(<!-- end -->)", re.S)
TEXT = re.compile(r"(<!-- text (\S+) (\S+) (\d+) -->\n).*?(<!-- end -->)", re.S)
VALUE = re.compile(r"(<!-- = (\S+) (\S+) (\S+) -->).*?(<!-- end -->)", re.S)
DOCUMENTS = ("README.md", "weeks/*/log.md", "reports/*.md", "docs/*.md", "docs/posts/*.md")


def documents() -> list[Path]:
    """The Markdown files whose figures come from logs."""
    return [path for pattern in DOCUMENTS for path in sorted(ROOT.glob(pattern))]


def refill(text: str) -> str:
    """Markdown with every marked table and figure taken from `logs/` anew.

    Raises ValueError, naming the marker, where its log isn't there.
    """
    for marker, fill in ((TABLE, _table), (TEXT, _text), (VALUE, _figure)):
        text = marker.sub(_or_name_marker(fill), text)
    return text


def _or_name_marker(replace: Callable[[re.Match[str]], str]) -> Callable[[re.Match[str]], str]:
    def careful(match: re.Match[str]) -> str:
        try:
            return replace(match)
        except (FileNotFoundError, KeyError) as error:
            marker = match[0].splitlines()[0]
            raise ValueError(f"{marker}: {error!r}") from None

    return careful


def _figure(match: re.Match[str]) -> str:
    head, run, key, format, end = match.groups()
    return f"{head}{_logged(ROOT / 'logs' / run, key):{format}}{end}"


def _text(match: re.Match[str]) -> str:
    head, run, key, length, end = match.groups()
    kept = read_json(ROOT / "logs" / run / "artifacts.json")[key].strip()
    if len(kept) > int(length):
        kept = kept[: int(length)].rpartition("\n")[0].rstrip()
    return f"{head}```text\n{kept}\n```\n{end}"


def _table(match: re.Match[str]) -> str:
    head, folder, names, spec, end = match.groups()
    keys, headings, formats = zip(*(map(str.strip, column.split("|")) for column in spec.split(", ")))
    lines = [_row(["run", *headings]), "| --- |" + " ---: |" * len(headings)]
    for name in names.split(","):
        name, _, label = name.partition("=")
        run = ROOT / "logs" / folder / name.removesuffix("?")
        if name.endswith("?") and not run.exists():
            continue
        cells = [_cell(run, key, format) for key, format in zip(keys, formats)]
        lines.append(_row([label.replace("_", " ") or name.removesuffix("?"), *cells]))
    return head + "\n".join(lines) + "\n" + end


def _cell(run: Path, key: str, format: str) -> str:
    try:
        return f"{_logged(run, key.removesuffix('?')):{format}}"
    except KeyError:
        if key.endswith("?"):
            return "–"
        raise


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _logged(folder: Path, key: str) -> Any:
    """A value of a week's results, where the folder holds a week's runs, or of a run's summary."""
    week = folder / "week.json"
    if not week.exists():
        return read_json(folder / "summary.json")[key]
    results = read_json(week)
    return {**results["metrics"], "week_seconds": results["seconds"]}[key]
