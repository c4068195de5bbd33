"""Week 11. From files to chunks: Markdown, plain text, HTML and PDF are read, cleaned, and cut into pieces
that can be found and quoted.

    documents, problems = load_documents("weeks/11_rag/handbook")
    chunks = chunk_documents(documents, gpt2_tokenizer())

A file that cannot be read is a problem that is said and kept; the others go on. A chunk knows where it
stands: its file, its title, the headings above it, its place in the section's text. Sections are never mixed
in one chunk.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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


def load_documents(path: str | Path, say: Callable[[str], None] = print) -> Loaded:
    """All documents in a folder, at any depth and in the order of their names; or the one in a file.

    Hidden files are passed over. What cannot be read (of another kind, binary, damaged, empty, encrypted,
    scanned without text) is said and kept in `problems`. Raises ValueError when the path does not exist, and
    when nothing in it can be read.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a folder with documents, or a file")
    if path.is_dir():
        base = path
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file, base))
    else:
        base = path.parent
        files = [path]
    if not files:
        raise ValueError(f"{path} has no files in it: put documents there ({', '.join(KINDS)})")
    documents: list[Document] = []
    problems: dict[str, str] = {}
    for file in files:
        source = file.relative_to(base).as_posix()
        try:
            documents.append(read_document(file, source))
        except (ValueError, OSError) as error:
            problems[source] = getattr(error, "strerror", None) or str(error)
            say(f"left out: {source}: {problems[source]}")
    if not documents:
        reasons = [f"{source}: {reason}" for source, reason in problems.items()]
        raise ValueError(f"{path} has no document that can be read: {'; '.join(reasons[:3])}")
    return Loaded(documents, problems)


def _hidden(file: Path, base: Path) -> bool:
    """Whether the file, or a folder between it and `base`, has a name that begins with a dot."""
    return any(part.startswith(".") for part in file.relative_to(base).parts)


def read_document(path: str | Path, source: str | None = None) -> Document:
    """One file as a document. source: what it will be called; None takes the file's name.

    Raises ValueError for a file that has no text to give.
    """
    path = Path(path)
    if path.suffix.lower() not in KINDS:
        raise ValueError(
            f"files of the kind {path.suffix or '(no suffix)'} are not read; there are: {', '.join(KINDS)}"
        )
    if path.stat().st_size > LARGEST:
        raise ValueError(
            f"{path.stat().st_size >> 20} MiB are more than the {LARGEST >> 20} that a document may have:"
            " split it"
        )
    lines = KINDS[path.suffix.lower()](path)
    return _document(source or path.name, path.stem, lines)


class _Heading(NamedTuple):
    level: int
    text: str


class _Page(NamedTuple):
    number: int


def _document(source: str, stem: str, lines: Iterable[str | _Heading | _Page]) -> Document:
    """Lines and headings as sections.

    The first heading of level 1 before any text is the title, else the file's name is.
    """
    title: str | None = None
    above: list[_Heading] = []
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
        if isinstance(line, _Page):
            page = line.number
        elif line.level == 1 and title is None and not sections:
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
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\xad\u200b\ufeff]", "", re.sub(r"\r\n?|\f", "\n", text))
    text = re.sub(r"[^\S\n]+", " ", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"it is not UTF-8 text (byte 0x{data[error.start]:02X} at {error.start}): a binary file, or"
            " another encoding"
        ) from None
    if "\0" in text:
        raise ValueError("it is a binary file: it has zero bytes in it")
    return text


def _plain(path: Path) -> Iterator[str]:
    yield from _read_text(path).splitlines()


MARKUP = (
    (re.compile(r"<!--.*?-->", re.S), ""),
    (re.compile(r"!\[([^\]\n]*)\]\([^)\n]*\)"), r"\1"),  # an image: what it shows
    (re.compile(r"\[([^\]\n]+)\]\([^)\n]*\)"), r"\1"),  # a link: its text
    (re.compile(r"(?<![\w*])(\*{1,3})(?=\S)([^*\n]+?)(?<=\S)\1(?![\w*])"), r"\2"),
    (re.compile(r"(?<![\w_])(_{1,3})(?=\S)([^_\n]+?)(?<=\S)\1(?![\w_])"), r"\2"),
)
"""What Markdown writes round words and a reader does not say."""


def _markdown(path: Path) -> Iterator[str | _Heading]:
    """Headings (# and underlined ones), outside of code; emphasis, links and comments reduced to their text.
    Front matter goes.
    """
    text = re.sub(r"\A---\n.*?\n---\n", "", _read_text(path).replace("\r\n", "\n"), flags=re.S)
    for i, part in enumerate(
        re.split(r"(^ {0,3}(?:```|~~~).*?(?:^ {0,3}(?:```|~~~)[ \t]*$|\Z))", text, flags=re.M | re.S)
    ):
        if i % 2:  # code stays as it is
            yield from part.splitlines()
            continue
        for pattern, shown in MARKUP:
            part = pattern.sub(shown, part)
        part = re.sub(
            r"^(\S.*)\n(=+|-{2,})[ \t]*$",
            lambda m: f"{'#' if m[2][0] == '=' else '##'} {m[1]}",
            part,
            flags=re.M,
        )
        for line in part.splitlines():
            heading = re.match(r" {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*$", line)
            yield _Heading(len(heading[1]), heading[2]) if heading else line


IGNORED = ("script", "style", "noscript", "template", "nav", "svg", "head", "title")
BLOCKS = (
    "address article aside blockquote br dd div dl dt figcaption figure footer form header hr li main ol p"
    " pre section table tr ul"
).split()
HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")


def _html(path: Path) -> Iterator[str | _Heading]:
    """Headings and visible text, blocks on lines of their own.

    <title> is the document's where the page has no <h1>.
    """
    try:
        from bs4 import BeautifulSoup
    except ImportError:
        raise ValueError(
            "reading HTML needs a package that is not installed: pip install beautifulsoup4"
        ) from None
    data = path.read_bytes()
    if b"\0" in data and data[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("it is a binary file: it has zero bytes in it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pages that look like something else; they are read all the same
        page = BeautifulSoup(data, "html.parser")
    if page.title and not page.h1:
        yield _Heading(1, " ".join(page.title.get_text().split()))
    _lay_out_as_lines(page)
    for line in page.get_text().split("\n"):
        if line.startswith("\0"):
            yield _Heading(int(line[1]), line[2:])
        else:
            yield line


def _lay_out_as_lines(page: Any) -> None:
    """Puts line breaks round the blocks of a page, and marks its headings by a zero byte and their level.

    No other zero byte is left in the text.
    """
    for tag in page(IGNORED):
        tag.decompose()
    for text in page(string=True):
        if not text.find_parent("pre"):
            text.replace_with(type(text)(re.sub(r"\s+", " ", text)))
    for tag in page(BLOCKS):
        tag.insert_before("\n")
        tag.insert_after("\n")
    for tag in page(["td", "th"]):
        tag.insert_before(" ")
    for tag in page(HEADINGS):
        heading = " ".join(tag.get_text().split())
        tag.replace_with(f"\n\0{tag.name[1]}{heading}\n")


def _pdf(path: Path) -> Iterator[str | _Page]:
    """The text of each page, by the library pypdf."""
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError:
        raise ValueError("reading PDFs needs a package that is not installed: pip install pypdf") from None
    try:
        reader = PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise ValueError("it is encrypted: save it without a password")
        pages = [page.extract_text() for page in reader.pages]
    except (
        PyPdfError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RecursionError,
        NotImplementedError,
    ) as error:
        raise ValueError(f"it is damaged or no PDF ({error})") from None
    if not any(map(str.strip, pages)):
        where = "its only page has" if len(pages) == 1 else f"its {len(pages)} pages have"
        raise ValueError(f"{where} no text, only pictures: a scan; run a text recognition (OCR) on it first")
    for number, text in enumerate(pages, 1):
        yield _Page(number)
        yield re.sub(r"(?<=\w)-\n(?=[a-z])", "", text)  # a word that was divided at the end of a line


KINDS: dict[str, Callable[[Path], Iterable[str | _Heading | _Page]]] = {
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
