"""How long it takes to read documents whose form once made the time grow with the square of their length.

    python benchmarks/documents.py

Each is read at a quarter of a megabyte and at a whole one. Four times the text should take about four times
as long; with the square it would be sixteen. What is nested too deep is refused, which is timed as well.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from shared.commandline import errors_for_people, parse_args
from shared.devices import device_name
from shared.retrieval.documents import read_document
from shared.retrieval.splitting import split
from shared.runtime import table
from shared.tokenizers import Tokenizer, gpt2_tokenizer
from timing import seconds

PAGES = {
    "HTML: paragraphs": ("<p>The ferry leaves at nine, they say.</p>\n", ".html"),
    "HTML: rows that are not closed": ("<tr><td>nine<td>noon", ".html"),
    "HTML: comments that are not closed": ("nine <!-- ", ".html"),
    "HTML: <div> in each other": ("<div>", ".html"),
    "Markdown: paragraphs": ("The ferry leaves at nine, they say.\n\n", ".md"),
    "Markdown: paragraphs with marks": ("The *ferry* leaves at [nine](b.md), they say.\n\n", ".md"),
    "Markdown: comments that are not closed": ("<!--\n", ".md"),
    "Markdown: the same in paragraphs": ("nine <!--\n\n", ".md"),
    "Markdown: rows": ("| nine | noon | ten |\n", ".md"),
    "Markdown: lists": ("- nine or noon\n", ".md"),
    "text: paragraphs": ("The ferry leaves at nine, they say.\n\n", ".txt"),
}
"""What is repeated, and in which kind of file."""
TEXTS = {
    "split: no spaces": "ferry",
    "split: Chinese": "末班渡轮晚上九点离开码头",
    "split: words": "the ferry leaves ",
}


@dataclass(frozen=True)
class Settings:
    """Times reading and splitting at two lengths."""

    megabytes: float = 1.0
    repeats: int = 3
    """The median of so many runs counts."""


def reading(text: str, suffix: str) -> Callable[[Path], str]:
    """What reads a file with this text, and says how that ended."""

    def read(folder: Path) -> str:
        path = folder / f"page{suffix}"
        path.write_text(text, encoding="utf-8")
        try:
            return f"{len(read_document(path, folder).sections)} sections"
        except ValueError as error:
            return f"refused: {error}"

    return read


def splitting(text: str, tokenizer: Tokenizer) -> Callable[[Path], str]:
    """What splits a text."""

    def cut(folder: Path) -> str:
        return f"{len(split(text, tokenizer, 256, 32))} pieces"

    return cut


def cases(size: int) -> dict[str, Callable[[Path], str]]:
    """All that is measured, with texts of `size` bytes, by name."""
    work = {}
    for name, (part, suffix) in PAGES.items():
        before = "<table>" if "rows" in name and suffix == ".html" else "start\n\n"
        work[name] = reading(before + part * (size // len(part)), suffix)
    tokenizer = gpt2_tokenizer()
    for name, part in TEXTS.items():
        work[name] = splitting(part * (size // len(part.encode())), tokenizer)
    return work


def main(settings: Settings) -> None:
    """Prints the table."""
    size = int(settings.megabytes * 1e6)
    print(f"{device_name(torch.device('cpu'))}; median of {settings.repeats} runs")
    rows = []
    whole = cases(size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case, quarter_work in cases(size // 4).items():
            quarter_work(folder)  # loads the libraries
            quarter = seconds(partial(quarter_work, folder), settings.repeats)
            full = seconds(partial(whole[case], folder), settings.repeats)
            row = {"document": case, f"{size / 4e6:g} MB, s": quarter, f"{size / 1e6:g} MB, s": full}
            rows.append(row | {"times": full / quarter, "result": whole[case](folder)})
    print("\n" + table(rows))


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
