"""Week 11. From files to chunks: Markdown, plain text, HTML and PDF are read, cleaned, and cut into pieces
that can be found and quoted.

    documents, problems = load_documents("weeks/11_rag/handbook")
    chunks = chunk_documents(documents, gpt2_tokenizer())

A file that cannot be read is a problem that is said and kept; the others go on. A chunk knows where it
stands: its file, its title, the headings above it, its place in the section's text. Sections are never mixed
in one chunk.
"""

import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from shared.retrieval.folder import find_files, printable_path
from shared.retrieval.lines import Heading, Line, Page, decoded_file
from shared.retrieval.splitting import split
from shared.tokenizers import Tokenizer

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
    """The file's path below the folder that was read, with forward slashes."""
    title: str
    sections: tuple[Section, ...]


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
    path: str | Path, say: Callable[[str], None] = print, *, follow_links: bool = False
) -> Loaded:
    """All documents in a folder, at any depth and in the order of their names; or the one in a file.

    Hidden files are passed over. What cannot be read (of another kind, binary, damaged, empty, encrypted,
    scanned without text, a broken link, a pipe, a name that is not UTF-8) is said and kept in `problems`; so
    are links that lead out of the folder or to folders, unless `follow_links`. Raises ValueError when the
    path does not exist, and when nothing in it can be read.
    """
    path = Path(path)
    name = printable_path(path)
    if not path.exists():
        raise ValueError(f"{name} does not exist: give a folder with documents, or a file")
    files = {printable_path(path.name): path}
    problems: dict[str, str] = {}
    if path.is_dir():
        files, problems = find_files(path, follow_links)
    if not files and not problems:
        raise ValueError(f"{name} has no files in it: put documents there ({', '.join(KINDS)})")
    documents: list[Document] = []
    for source in sorted([*files, *problems], key=_parts):
        if source in files:
            try:
                documents.append(read_document(files[source], source))
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


def read_document(path: str | Path, source: str | None = None) -> Document:
    """One file as a document. source: what it will be called; None takes the file's name.

    Raises ValueError for a file that has no text to give, and OSError for one that cannot be opened.
    """
    path = Path(path)
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
    lines = KINDS[path.suffix.lower()](path)
    return _document(source or printable_path(path.name), printable_path(path.stem), lines)


def _document(source: str, stem: str, lines: Iterable[Line]) -> Document:
    """Lines and headings as sections.

    The first heading of level 1 before any text is the title, else the file's name is.
    """
    title: str | None = None
    above: list[Heading] = []
    text: list[str] = []
    page: int | None = None
    sections: list[Section] = []

    def close() -> None:
        section = clean_text("\n".join(text))
        if section:
            sections.append(Section(tuple(heading.text for heading in above), section, page))
        text.clear()

    for line in lines:
        if isinstance(line, str):
            text.append(line)
            continue
        close()
        if isinstance(line, Page):
            page = line.number
            continue
        line = Heading(line.level, clean_text(line.text))
        if line.level == 1 and title is None and not sections:
            title = line.text
            above.clear()
        elif line.text:
            above[:] = [*(heading for heading in above if heading.level < line.level), line]
    close()
    if not sections:
        raise ValueError("there is no text in it")
    return Document(source, title or stem.replace("-", " ").replace("_", " "), tuple(sections))


def clean_text(text: str) -> str:
    """The text with single spaces and single empty lines, without control characters and soft hyphens."""
    text = text.encode("utf-8", "replace").decode("utf-8")  # half of a pair of surrogates is no character
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\xad\u200b\ufeff]", "", re.sub(r"\r\n?|\f", "\n", text))
    text = re.sub(r"[^\S\n]+", " ", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()


# Readers are imported when a file of their kind is met: each needs a package of its own.


def _not_installed(error: ImportError, path: Path) -> ValueError:
    return ValueError(
        f"reading {path.suffix} needs the package {error.name}, which is not installed: pip install"
        " 'llm-weeks[rag]'"
    )


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
    documents: Iterable[Document], tokenizer: Tokenizer, size: int = 256, overlap: int = 32, window: int = 64
) -> list[Chunk]:
    """The documents' sections in chunks of at most `size` tokens, `overlap` of them shared with the next.

    Their windows are their sentences; one of more than `window` tokens is divided. Sizes count the text
    alone: title and headings come on top. Raises ValueError as `split` does.
    """
    chunks = []
    for document in documents:
        spans = (
            (section, span)
            for section in document.sections
            for span in split(section.text, tokenizer, size, overlap)
        )
        for number, (section, (start, end)) in enumerate(spans):
            text = section.text[start:end]
            windows = tuple(
                (at + a, at + b)
                for at, sentence in _sentences(text)
                for a, b in split(sentence, tokenizer, min(window, size), 0)
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
