"""Week 11. HTML as headings and lines of visible text, by the parser of lxml.

The page is taken as a stream of tags, so time grows with its length and nothing else.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.extras import needs
from shared.retrieval.lines import Facts, Heading, Line, Metadata, keywords

with needs("rag"):
    from bs4.dammit import UnicodeDammit
    from lxml.etree import HTMLParser, LxmlError

IGNORED = frozenset("script style noscript template nav svg title".split())
BLOCKS = (
    "address article aside blockquote br dd div dl dt figcaption figure footer form header hr li main ol p"
    " pre section table tr ul"
).split()
AFTER = dict.fromkeys(BLOCKS, "\n")
"""What ends the line where such a tag ends."""
BEFORE = AFTER | {"td": " ", "th": " "}
"""The same where it begins."""
BREAKS = str.maketrans("\n\r\f", "   ")
HEADINGS = frozenset(["h1", "h2", "h3", "h4", "h5", "h6"])
DEEPEST = 1000
"""Tags in each other: each end tag is looked for among all that are open."""
FOR_MACHINES = frozenset("viewport referrer robots theme-color color-scheme format-detection".split())
"""Names of <meta> that say nothing of the text."""
LONGEST_META = 1000
"""Characters of a <meta> that is read."""
STEP = 1 << 16
"""Bytes that are parsed before the depth is looked at again."""


def read_html(path: Path) -> Iterator[Line]:
    """Headings and visible text, blocks on lines of their own. <title> is a heading of level 1 that comes
    first, where the page shows no <h1>. Before all stands what each <meta name= content=> says of the page
    (of several with one name the first); its keywords are a list.

    Raises ValueError for binary files and for tags nested too deep.
    """
    data = path.read_bytes()
    if b"\0" in data and data[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("it is a binary file: it has zero bytes in it")
    page = _Page()
    parser = HTMLParser(target=page, encoding="utf-8", huge_tree=True)
    data = _decoded(data).encode("utf-8", "replace")
    try:
        for start in range(0, len(data), STEP):
            parser.feed(data[start : start + STEP])
            if page.deepest > DEEPEST:
                raise ValueError(f"its tags are nested more than {DEEPEST} deep")
        parser.close()
    except LxmlError as error:
        raise ValueError(f"it cannot be read as HTML ({error})") from None
    yield from page.lines()


def _decoded(data: bytes) -> str:
    """UTF-8 where it is, else by the file's mark or what it declares, else the likeliest encoding."""
    start = 0
    if b"\x1b" not in data:  # which switches alphabets in encodings of seven bits
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            start = error.start
    sample = data[:STEP] if start < STEP else data[:4096] + data[start : start + STEP]
    encoding = UnicodeDammit(sample, is_html=True).original_encoding
    if encoding is None:
        raise ValueError("its encoding cannot be told: save it as UTF-8")
    return data.decode(encoding, "replace")


class _Page:
    """What the parser tells of a page, as text. `lines` gives it when the page has ended."""

    def __init__(self) -> None:
        self.deepest = 0
        self._depth = 0
        self._hidden = 0  # tags that are open in an ignored one, with it
        self._pre = 0
        self._title: list[str] | None = None  # of the first <title> that is not a picture's
        self._in_title = False
        self._level = 0  # of the heading that is open
        self._heading: list[str] = []
        self._parts: list[str | Heading] = []
        self._metadata: Metadata = {}

    def start(self, tag: str, attributes: Any) -> None:
        """A tag begins."""
        self._depth += 1
        if self._depth > self.deepest:
            self.deepest = self._depth
        if tag == "meta":
            self._take(attributes)
        if self._hidden or tag in IGNORED:
            self._hidden += 1
            if tag == "title" and self._title is None and self._hidden == 1:
                self._title = []
                self._in_title = True
        elif tag in HEADINGS:
            self._end_heading()
            self._level = int(tag[1])
        else:
            self._pre += tag == "pre"
            self._divide(BEFORE.get(tag))

    def end(self, tag: str) -> None:
        """A tag ends; the parser says so of one that is not closed, too."""
        self._depth -= 1
        if self._hidden:
            self._hidden -= 1
            self._in_title = False
        elif tag in HEADINGS:
            self._end_heading()
        else:
            self._pre -= tag == "pre"
            self._divide(AFTER.get(tag))

    def data(self, text: str) -> None:
        """Text; a longer one comes in pieces."""
        if self._in_title and self._title is not None:
            self._title.append(text)
        elif self._level and not self._hidden:
            self._heading.append(text)
        elif not self._hidden:
            self._parts.append(text if self._pre else text.translate(BREAKS))

    def close(self) -> None:
        """The page has ended."""
        self._end_heading()

    def lines(self) -> Iterator[Line]:
        """What the page says of itself, and then its headings and lines."""
        if self._metadata:
            yield Facts(self._metadata)
        title = " ".join("".join(self._title or []).split())
        if title and not any(isinstance(part, Heading) and part.level == 1 for part in self._parts):
            yield Heading(1, title)
        text: list[str] = []
        for part in [*self._parts, Heading(0, "")]:
            if isinstance(part, str):
                text.append(part)
                continue
            yield from "".join(text).split("\n")
            text.clear()
            if part.level:
                yield part

    def _take(self, attributes: Any) -> None:
        """Keeps what a <meta> says of the page."""
        name = " ".join(attributes.get("name", "").lower().split())
        content = " ".join(attributes.get("content", "").split())
        if not name or not content or name in FOR_MACHINES or len(name) + len(content) > LONGEST_META:
            return
        self._metadata.setdefault(name, keywords(content) if name == "keywords" else content)

    def _divide(self, mark: str | None) -> None:
        if mark == "\n" and "".join(self._heading).strip():
            self._end_heading()  # it was not closed
        if mark:
            self._parts.append(mark)

    def _end_heading(self) -> None:
        if self._level:
            self._parts.append(Heading(self._level, " ".join("".join(self._heading).split())))
            self._heading.clear()
            self._level = 0
