"""Week 6. Where documents come from, and how they are cleaned.

They are data sets of the Hugging Face hub, streamed, or local files of the same form.

Sources: Penedo et al., "The FineWeb Datasets" (2024); Gokaslan & Cohen, "OpenWebText Corpus" (2019); Merity
et al., "Pointer Sentinel Mixture Models" (WikiText, 2016).
"""

import glob
import json
import re
import reprlib
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from shared.assets import LOCAL
from shared.extras import needs
from shared.network import network_failure
from shared.tokenizers.bpe import END_OF_TEXT

HUB = {
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "main", "sample/10BT/*.parquet"),
    # The commit in which its author uploaded the rows as Parquet: main may hold a loading script, which
    # `datasets` no longer runs.
    "openwebtext": (
        "Skylion007/openwebtext",
        "7577b918bd30b25df0b88bb718dc8a6c80cb619b",
        "data/train-*.parquet",
    ),
    "wikitext-103": ("Salesforce/wikitext", "main", "wikitext-103-raw-v1/train-*.parquet"),
}
"""Sources on the Hugging Face hub: data set, branch or commit, files."""
KINDS = {".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
WIKI_TITLE = re.compile(r"\s*= [^=\s](?:.*[^=\s])? =\s*")
WIKI_HEADING = re.compile(r"=(?: =)+")  # = = Heading = =
WIKI_SPACES = [
    (re.compile(r'(?<!\S)" ([^"\n]*) "(?!\S)'), r'"\1"'),
    (re.compile(r"(?<!\S)([(\[]) "), r"\1"),
    (re.compile(r' ([,.;:!?)\]]|\'(?:s|t|ve|re|ll|d|m))(?![^\s"])'), r"\1"),
    (re.compile(r" @([-,.])@ "), r"\1"),
]
"""WikiText has spaces round every sign; these take them out."""


def clean(text: str, wikitext: bool = False) -> str:
    r"""A document as it is tokenized.

    In Unicode NFC, lines ended by \n, no control characters but \n and tab, no white space at the end of a
    line, at most one empty line in a row, none around the text. wikitext: also without the spaces that
    WikiText puts round signs.

    >>> clean("Cafe\u0301 \r\n\n\n\nopen\x07\t\n")
    'Café\n\nopen'
    >>> clean(' = = Size = = \n The " red @-@ tipped " one ( 1 @,@ 000 kg ) isn \'t small . \n', True)
    '== Size ==\nThe "red-tipped" one (1,000 kg) isn\'t small.'
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = unicodedata.normalize("NFC", CONTROL.sub("", text))
    if wikitext:
        text = _without_wiki_spaces("\n".join(line.strip() for line in text.split("\n")))
    else:
        text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _without_wiki_spaces(text: str) -> str:
    text = WIKI_HEADING.sub(lambda heading: heading[0].replace(" ", ""), text)
    for pattern, replacement in WIKI_SPACES:
        text = pattern.sub(replacement, text)
    return text


def describe_source(source: str, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """What identifies a source: a commit of the hub's data set, or the files and their sizes.

    known: what an earlier call said, whose commit is kept; None takes today's. Raises ValueError for what is
    none of HUB and no file or folder of one of KINDS, and where the hub cannot be reached.
    """
    if source in HUB:
        return _describe_dataset(source, known)
    path = Path(source)
    if not path.exists():
        raise ValueError(f"--source {source}: neither a file, nor a folder, nor one of {', '.join(HUB)}")
    candidates = [path] if path.is_file() else path.rglob("*")
    files = [f for f in candidates if f.is_file() and f.suffix in KINDS and f.stat().st_size]
    kinds = {KINDS[file.suffix] for file in files}
    sizes = {file.relative_to(path).as_posix(): file.stat().st_size for file in sorted(files)}
    if len(kinds) != 1:
        raise ValueError(
            f"--source {source}: give files that are not empty, of one kind of {', '.join(KINDS)}; found:"
            f" {', '.join(sizes) or 'none'}"
        )
    return {"name": path.name, "kind": kinds.pop(), "files": sizes}


def _describe_dataset(source: str, known: dict[str, Any] | None) -> dict[str, Any]:
    dataset, branch, files = HUB[source]
    if known is not None and known.get("dataset") == dataset:
        revision = known["revision"]
    else:
        with _errors_in_a_line(source):
            from huggingface_hub import HfApi

            revision = HfApi().dataset_info(dataset, revision=branch, timeout=20).sha
    return {"name": source, "kind": "parquet", "dataset": dataset, "revision": revision, "files": files}


def stream_documents(
    source: str, known: dict[str, Any], column: str, wikitext: bool, skip: int
) -> Iterator[tuple[int, str]]:
    """A source's documents, not cleaned, each with the number of rows read when it ends.

    known: what `describe_source` said of the source. skip: rows to leave out, so that a stream that ended
    after a document goes on with the next. A row of .txt is a line, and a file's end; of WikiText (wikitext)
    a line; of all else a document, in the field `column`. Raises ValueError for what cannot be read.
    """
    is_text = known["kind"] == "text"
    rows: Iterator[Any]
    if is_text:
        files = [Path(source) / name for name in known["files"]]
        rows = islice(chain.from_iterable(map(_lines_and_end, files)), skip, None)
    elif known["kind"] == "json":
        files = [Path(source) / name for name in known["files"]]
        rows = islice(chain.from_iterable(_json_texts(file, column) for file in files), skip, None)
    else:
        rows = _rows(source, known, column, skip)
    texts = _numbered(rows, skip)
    if wikitext or is_text:
        return _joined(texts, wikitext)
    return texts


@contextmanager
def _errors_in_a_line(source: str) -> Iterator[None]:
    """Whatever `datasets` and the libraries below it may raise, as a ValueError that says what to do."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"--source {source}: {error}") from None
    except Exception as error:
        if getattr(error, "errno", None) in LOCAL:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        failure = network_failure(error) if source in HUB else None
        if failure:
            reason = f"{failure}; {reason}"
        message = f"--source {source} cannot be read ({reason})"
        if source in HUB:
            message += (
                ": run again when it can be reached; without a network, give a local file or folder (.jsonl,"
                " .parquet, .txt): --source PATH"
            )
        raise ValueError(message) from error


def _rows(source: str, known: dict[str, Any], column: str, skip: int) -> Iterator[Any]:
    """The field `column` of each row of Parquet files, on the hub or here."""
    paths: str | list[str]
    if "dataset" in known:
        paths = f"hf://datasets/{known['dataset']}@{known['revision']}/{known['files']}"
    else:
        paths = [glob.escape(str(Path(source).absolute() / name)) for name in known["files"]]
    with _errors_in_a_line(source):
        with needs("data"):
            import datasets

        stream = datasets.load_dataset(known["kind"], data_files=paths, split="train", streaming=True)
        # In Arrow's format, rows that are skipped are not decoded.
        for table in stream.select_columns(column).skip(skip).with_format("arrow").iter(1000):
            yield from table[column].to_pylist()


def _json_texts(file: Path, column: str) -> Iterator[str]:
    """The field `column` of each line of a .jsonl file; "" where it is null.

    Read line by line: `datasets` decides on a type for many rows at once, and writes them all as JSON where
    one is no text. Raises ValueError, with the line's number, for a line that is no object with such a text.
    """
    for number, line in enumerate(_lines(file), 1):
        line = line.removeprefix("\ufeff")
        if line.strip():
            yield _json_text(line, column, f"{file}, line {number}")


def _json_text(line: str, column: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error}): mend or delete it") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no object with the field {column!r}: mend or delete it")
    if column not in row:
        names = ", ".join(map(repr, row)) or "none"
        raise ValueError(
            f"{where} has no field {column!r} but {names}: choose another --column, or delete the line"
        )
    text = row[column]
    if not isinstance(text, str | None):
        raise ValueError(
            f"{where}: {column!r} is {reprlib.repr(text)}, which is not a text: choose another --column, or"
            " delete the line"
        )
    if text and not _is_unicode(text):
        raise ValueError(f"{where}: {column!r} has half a surrogate pair, which is no character: mend it")
    return text or ""


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(file: Path) -> Iterator[str]:
    offset = 0
    with open(file, "rb") as opened:
        for line in opened:
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file} is not UTF-8 text: byte {line[error.start]:#04x} at offset"
                    f" {offset + error.start}"
                ) from None
            offset += len(line)


def _lines_and_end(file: Path) -> Iterator[str]:
    yield from _lines(file)
    yield END_OF_TEXT


def _numbered(rows: Iterable[Any], skipped: int) -> Iterator[tuple[int, str]]:
    for number, row in enumerate(rows, skipped + 1):
        if not isinstance(row, str | None):
            raise ValueError(f"row {number} is {row!r}, which is not a text: choose another --column")
        yield number, row or ""


def _joined(lines: Iterable[tuple[int, str]], wikitext: bool) -> Iterator[tuple[int, str]]:
    """Documents of many lines: parted by lines that are <|endoftext|>, in WikiText also by titles."""
    part: list[str] = []
    number = 0
    title_may_come = True  # only after an empty line: a table's cell may look like a title
    for number, line in lines:
        line = line.rstrip("\r\n")
        if line == END_OF_TEXT:
            yield number, "\n".join(part)
            part = []
        elif wikitext and title_may_come and WIKI_TITLE.fullmatch(line):
            yield number - 1, "\n".join(part)
            part = [line]
        else:
            part.append(line)
        title_may_come = not line.strip() or line == END_OF_TEXT
    if part:
        yield number, "\n".join(part)
