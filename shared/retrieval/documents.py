"""Week 11. From files to chunks: Markdown, plain text, HTML and PDF are read, cleaned, and cut into pieces
that can be found and quoted.

    documents, problems = load_documents("weeks/11_rag/handbook")
    chunks = chunk_documents(documents)
    changed = read_document("notes/sub/valves.md", "notes")     # of a folder; its source is sub/valves.md

A file that cannot be read is a problem that is said and kept; the others go on. A chunk knows where it
stands: its file, its title, the headings above it, its place in the section's text, and what its document
says of itself (YAML front matter, <meta>, a PDF's document information). Sections are never mixed in one
chunk.
"""

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from shared.retrieval.folder import find_files, printable_path
from shared.retrieval.lines import Facts, Heading, Line, Metadata, Page, Remark, decoded_file
from shared.retrieval.splitting import split
from shared.tokenizers import Tokenizer, gpt2_tokenizer

LARGEST = 64 << 20
"""Bytes of a file; a larger one is hardly a document, and is a problem."""


class Section(NamedTuple):
    """A part of a document under one heading."""

    headings: tuple[str, ...]
    """From the outermost to its own, without the document's title; () for what comes before the first."""
    text: str
    page: int | None = None
    """Of a PDF, from 1 up."""


@dataclass(frozen=True)
class Document:
    """What was in a file."""

    source: str
    """The file's path below the folder that was read, with forward slashes: `sub/valves.md`."""
    title: str
    sections: tuple[Section, ...]
    metadata: Metadata = field(default_factory=dict, hash=False)
    """What the file says of itself, by field."""


@dataclass(frozen=True)
class Chunk:
    """A piece of a section, as it is found and quoted. `windows` are the parts of it that are embedded one by
    one: a short text says one thing, and its embedding can tell which.
    """

    source: str
    title: str
    headings: tuple[str, ...]
    text: str
    start: int = 0
    """Where `text` begins in the section's text, in characters."""
    number: int = 0
    """Counts the document's chunks, from 0 up."""
    page: int | None = None
    windows: tuple[tuple[int, int], ...] = ()
    """Begin and end in `text`, in characters; none for the whole."""
    metadata: Metadata = field(default_factory=dict, hash=False)
    """The document's."""

    @property
    def fields(self) -> Metadata:
        """What a search can be narrowed by: `metadata`, and the chunk's own `source` and `title`."""
        return {**self.metadata, "source": self.source, "title": self.title}

    @property
    def id(self) -> str:
        """`source#number`: the same for the same place of an unchanged file."""
        return f"{self.source}#{self.number}"

    @property
    def place(self) -> str:
        """Title and headings, as a reader would write them: `Ferry fares > For residents`. A section may name
        its subject only here.
        """
        return " > ".join([self.title, *self.headings])

    @property
    def cite(self) -> str:
        """Where to look it up: `ferry-fares.md, For residents`."""
        return ", ".join([self.source, *self.headings[-1:], *([f"page {self.page}"] if self.page else [])])

    @property
    def passage(self) -> str:
        """The text under its place: what is searched for words, and what a model is given to read."""
        return f"{self.place}\n{self.text}"

    def window_texts(self) -> list[str]:
        """What is embedded: each window, after title and headings."""
        place = ". ".join([self.title, *self.headings])
        return [f"{place}. {self.text[a:b]}" for a, b in self.windows or ((0, len(self.text)),)]


# ---- reading


class Loaded(NamedTuple):
    """What `load_documents` found."""

    documents: list[Document]
    problems: dict[str, str]
    """For each file that is left out: why."""


def load_documents(
    path: str | Path,
    say: Callable[[str], None] = print,
    *,
    root: str | Path | None = None,
    follow_links: bool = False,
) -> Loaded:
    """All documents in a folder, at any depth and in the order of their names; or the one in a file.

    root: the folder from which the sources are named. None takes the folder itself, and for a lone file the
    one that it lies in; so give it for a part of a folder: `load_documents("notes/sub", root="notes")`.

    Hidden files are passed over. What cannot be read (of another kind, binary, damaged, empty, encrypted,
    scanned without text, a broken link, a pipe, a name that is not UTF-8) is said and kept in `problems`; so
    are links that lead out of the folder or to folders, unless `follow_links`. Front matter that is no YAML
    is said, and read as text. Raises ValueError when the path does not exist or lies outside of `root`, and
    when nothing in it can be read.
    """
    path = Path(path)
    name = printable_path(path)
    if not path.exists():
        raise ValueError(f"{name} does not exist: give a folder with documents, or a file")
    files = {printable_path(path.name): path}
    problems: dict[str, str] = {}
    if path.is_dir():
        files, problems = find_files(path, follow_links)
    if root is not None:
        below = source_below(path if path.is_dir() else path.parent, root)
        prefix = "" if below == "." else f"{below}/"
        files = {prefix + source: file for source, file in files.items()}
        problems = {prefix + source: reason for source, reason in problems.items()}
    if not files and not problems:
        raise ValueError(f"{name} has no files in it: put documents there ({', '.join(KINDS)})")
    documents: list[Document] = []
    for source in sorted([*files, *problems], key=_parts):
        if source in files:
            try:
                documents.append(_read(files[source], source, say))
            except Exception as error:  # whatever is wrong with one file, the others are read
                problems[source] = _reason(error)
        if source in problems:
            say(f"left out: {source}: {problems[source]}")
    if not documents:
        reasons = [f"{source}: {reason}" for source, reason in problems.items()]
        raise ValueError(f"{name} has no document that can be read: {'; '.join(reasons[:3])}")
    return Loaded(documents, problems)


def _parts(source: str) -> list[str]:
    return source.split("/")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, ValueError):
        return str(error)
    return f"it cannot be read ({type(error).__name__}: {error})"


def source_below(path: str | Path, root: str | Path) -> str:
    """A file's path below the folder `root`, with forward slashes: what its document is called.

    >>> source_below("notes/sub/valves.md", "notes")
    'sub/valves.md'

    Raises ValueError for a path that is not below it.
    """
    path, root = Path(os.path.abspath(path)), Path(os.path.abspath(root))
    if not path.is_relative_to(root):  # one of them may be written with links
        path, root = Path(os.path.realpath(path.parent)) / path.name, Path(os.path.realpath(root))
    if not path.is_relative_to(root):
        raise ValueError(
            f"{printable_path(path)} does not lie in {printable_path(root)}: give the folder that the other"
            " documents were loaded from"
        )
    return printable_path(path.relative_to(root).as_posix())


def read_document(path: str | Path, root: str | Path, say: Callable[[str], None] = print) -> Document:
    """One file of the folder `root` as a document, with the source that `load_documents(root)` gives it: so
    an index can be updated with it.

    Raises ValueError for a file that has no text to give and for one that is not in the folder, and OSError
    for one that cannot be opened.
    """
    return _read(Path(path), source_below(path, root), say)


def _read(path: Path, source: str, say: Callable[[str], None]) -> Document:
    """One file as a document that is called `source`. Raises what `read_document` does."""
    if path.suffix.lower() not in KINDS:
        raise ValueError(
            f"files of the kind {path.suffix or '(no suffix)'} are not read; there are: {', '.join(KINDS)}"
        )
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no file but a folder, a pipe, a socket or a device")
    if status.st_size > LARGEST:
        raise ValueError(
            f"{status.st_size >> 20} MiB are more than the {LARGEST >> 20} that a document may have: split it"
        )
    builder = _Builder()
    for line in KINDS[path.suffix.lower()](path):
        builder.take(line)
    for remark in builder.remarks:
        say(f"{source}: {remark}")
    return builder.document(source, printable_path(path.stem))


class _Builder:
    """Makes a document of a reader's lines. The first heading of level 1 before any text is its title."""

    def __init__(self) -> None:
        self.remarks: list[str] = []
        self._metadata: Metadata = {}
        self._title: str | None = None
        self._above: list[Heading] = []
        self._text: list[str] = []
        self._page: int | None = None
        self._sections: list[Section] = []

    def take(self, line: Line) -> None:
        if isinstance(line, str):
            self._text.append(line)
        elif isinstance(line, Remark):
            self.remarks.append(line.text)
        elif isinstance(line, Facts):
            self._metadata |= _cleaned(line.metadata)
        else:
            self._close()
            if isinstance(line, Page):
                self._page = line.number
            else:
                self._begin(Heading(line.level, clean_text(line.text)))

    def _begin(self, heading: Heading) -> None:
        if heading.level == 1 and self._title is None and not self._sections:
            self._title = heading.text
            self._above.clear()
        elif heading.text:
            self._above = [above for above in self._above if above.level < heading.level] + [heading]

    def _close(self) -> None:
        text = clean_text("\n".join(self._text))
        if text:
            headings = tuple(heading.text for heading in self._above)
            self._sections.append(Section(headings, text, self._page))
        self._text.clear()

    def document(self, source: str, stem: str) -> Document:
        """The document; its title is the file's name where no heading is. Raises ValueError for no text."""
        self._close()
        if not self._sections:
            raise ValueError("there is no text in it")
        title = self._title or stem.replace("-", " ").replace("_", " ")
        return Document(source, title, tuple(self._sections), self._metadata)


def _cleaned(metadata: Metadata) -> Metadata:
    """The same without what JSON or a terminal could not show."""
    cleaned: Metadata = {}
    for name, value in metadata.items():
        if isinstance(value, str):
            value = clean_text(value)
        elif isinstance(value, list):
            value = [clean_text(item) for item in value]
        cleaned[clean_text(name)] = value
    return cleaned


def clean_text(text: str) -> str:
    """The text with single spaces and single empty lines, without control characters and soft hyphens."""
    text = text.encode("utf-8", "replace").decode("utf-8")  # half of a pair of surrogates is no character
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\xad\u200b\ufeff]", "", re.sub(r"\r\n?|\f", "\n", text))
    text = re.sub(r"[^\S\n]+", " ", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()


# Readers are imported when a file of their kind is met: each needs a package of its own.


def _not_installed(error: ImportError, path: Path) -> ValueError:
    return ValueError(f"reading {path.suffix}: {error}")


def _plain(path: Path) -> Iterable[Line]:
    return decoded_file(path).splitlines()


def _markdown(path: Path) -> Iterable[Line]:
    try:
        from shared.retrieval.markdown import read_markdown
    except ImportError as error:
        raise _not_installed(error, path) from None
    return read_markdown(path)


def _html(path: Path) -> Iterable[Line]:
    try:
        from shared.retrieval.html import read_html
    except ImportError as error:
        raise _not_installed(error, path) from None
    return read_html(path)


def _pdf(path: Path) -> Iterable[Line]:
    try:
        from shared.retrieval.pdf import read_pdf
    except ImportError as error:
        raise _not_installed(error, path) from None
    return read_pdf(path)


KINDS: dict[str, Callable[[Path], Iterable[Line]]] = {
    ".md": _markdown,
    ".markdown": _markdown,
    ".txt": _plain,
    ".text": _plain,
    ".html": _html,
    ".htm": _html,
    ".pdf": _pdf,
}


# ---- cutting


def chunk_documents(
    documents: Iterable[Document],
    tokenizer: Tokenizer | None = None,
    size: int = 256,
    overlap: int = 32,
    window: int = 64,
) -> list[Chunk]:
    """The documents' sections in chunks of at most `size` tokens, `overlap` of them shared with the next.

    tokenizer: whose tokens are counted; None: GPT-2's, which is fetched on the first call.
    Their windows are their sentences; one of more than `window` tokens is divided. Sizes count the text
    alone: title and headings come on top. Raises ValueError as `split` does, and for two documents of one
    source.
    """
    counted = gpt2_tokenizer() if tokenizer is None else tokenizer
    chunks = []
    sources: set[str] = set()
    for document in documents:
        if document.source in sources:
            raise ValueError(
                f"two documents have the source {document.source}: load them from a folder that both lie in,"
                " or give it as root="
            )
        sources.add(document.source)
        spans = (
            (section, span)
            for section in document.sections
            for span in split(section.text, counted, size, overlap)
        )
        for number, (section, (start, end)) in enumerate(spans):
            text = section.text[start:end]
            windows = tuple(
                (at + a, at + b)
                for at, sentence in _sentences(text)
                for a, b in split(sentence, counted, min(window, size), 0)
            )
            chunks.append(
                Chunk(
                    source=document.source,
                    title=document.title,
                    headings=section.headings,
                    text=text,
                    start=start,
                    number=number,
                    page=section.page,
                    windows=windows,
                    metadata=document.metadata,
                )
            )
    return chunks


def _sentences(text: str) -> Iterator[tuple[int, str]]:
    """Where each sentence begins, and the sentence; a line of a list is one too. A line of 60 characters or
    more may be wrapped: the next one goes on, unless it is empty or begins with a mark of a list.
    """
    for match in re.finditer(
        r"\S.*?(?=(?<=[.!?:])\s|(?<![^\n]{60})\n|\n(?:\n|[-*+•|] |\d+[.)] )|\Z)", text, re.S
    ):
        yield match.start(), match[0]
