"""Week 11. Markdown as headings and lines of text, by the library markdown-it-py.

Marks that a reader does not say (emphasis, the addresses of links, comments) go; lists, tables and code stay
as they are written. Nothing else is lost: where a mark is not closed, it is text.

Source: CommonMark 0.31.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from shared.extras import needs
from shared.retrieval.front_matter import split_front_matter
from shared.retrieval.lines import Facts, Heading, Line, Remark, decoded_file

with needs("rag"):
    from markdown_it import MarkdownIt
    from markdown_it.rules_block import StateBlock, html_block, reference
    from markdown_it.token import Token

DEEPEST = 32
"""Of quotes and lists in each other; markdown-it would drop what is deeper."""
LONGEST = 10_000
"""Characters that marks are looked for in at once: the time for brackets grows with the square of it."""
MARKS = re.compile(r"[\\`*_\[<&]")
"""Without one of these, the text of a paragraph is what is written."""
LINE = r"[^\s\d#>+*_=~`<\[\\&-][^\n\\`*_\[<&]*\n"
"""A line that cannot begin anything but a paragraph, and has no marks."""
OPENED = r"(?:[^\s\d#>+*_=~`<\[\\&-]|<!--)[^\n\\`*_\[<&]*+(?:<!--[^\n\\`*_\[<&]*+)*+\n"
"""The same where no comment ends any more: what would begin one is text."""
PLAIN, PLAIN_TO_THE_END = (re.compile(rf"(?:(?:{line})++(?:\n+|\Z))+") for line in (LINE, OPENED))
"""Whole paragraphs of such lines."""
ENDS = (
    (re.compile(r"<!--"), "-->"),
    (re.compile(r"<\?"), "?>"),
    (re.compile(r"<!\[CDATA\["), "]]>"),
    (re.compile(r"<![a-z]", re.I), ">"),
    (re.compile(r"<(?:script|pre|style|textarea)\b", re.I), "</"),
)
"""HTML that goes on over empty lines, and what must come after it."""


def read_markdown(path: Path) -> Iterator[Line]:
    """The headings and the text of a file. What its front matter says comes first, a title there as a heading
    of level 1.

    Headings inside of quotes and lists are text. Raises ValueError as `decoded_file` does, and where quotes
    and lists are nested too deep.
    """
    title, metadata, text, remark = split_front_matter(re.sub(r"\r\n?", "\n", decoded_file(path) + "\n"))
    parser = _parser()
    env: dict = {}
    tokens = parser.parse(text, env)
    if any(token.nesting == 1 and token.level >= DEEPEST - 1 for token in tokens):
        raise ValueError(f"its quotes and lists are nested more than {DEEPEST} deep")
    lines = _Lines(parser, env)
    if remark:
        yield Remark(remark)
    if metadata:
        yield Facts(metadata)
    if title:
        yield Heading(1, title)
    first = True
    for line in lines.of(tokens):
        if not (first and line == Heading(1, title)):  # said twice
            yield line
        first = False


# ---- blocks


def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"maxNesting": DEEPEST})
    parser.disable(["inline", "text_join"])  # done here, where it is needed
    blocks = parser.block.ruler
    blocks.before("code", "plain", _plain_paragraphs)
    blocks.at("html_block", _closed_html, {"alt": ["paragraph", "reference", "blockquote"]})
    blocks.at("reference", _reference_but_no_footnote)
    return parser


def _plain_paragraphs(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """Takes paragraphs of mere words at once; line by line costs twenty times as much."""
    if state.level or state.blkIndent:
        return False
    at = state.bMarks[start]
    found = (PLAIN if at <= _last(state, "-->") else PLAIN_TO_THE_END).match(state.src, at)
    if not found:
        return False
    content = found[0].rstrip()
    token = state.push("plain", "", 0)
    token.content = content
    token.map = [start, start + content.count("\n") + 1]
    state.line = start + found[0].count("\n")
    return True


def _closed_html(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """HTML that begins and never ends would take all that follows; it is text instead."""
    at = state.bMarks[start] + state.tShift[start]
    if not state.src.startswith("<", at):
        return False
    for begins, closing in ENDS:
        if begins.match(state.src, at) and _last(state, closing) < at:
            return False
    return html_block(state, start, end, silent)


def _last(state: StateBlock, closing: str) -> int:
    """Where `closing` stands for the last time, or -1. It is looked for once in a text."""
    places = state.env.setdefault("last", {})
    if closing not in places:
        places[closing] = state.src.rfind(closing)
    return places[closing]


def _reference_but_no_footnote(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """Where a link's address stands is not shown; a footnote `[^1]: Free.` is."""
    footnote = state.src.startswith("[^", state.bMarks[start] + state.tShift[start])
    return not footnote and reference(state, start, end, silent)


class _Lines:
    """The lines of a parsed text."""

    def __init__(self, parser: MarkdownIt, env: dict):
        self._parser = parser
        self._env = env

    def of(self, tokens: Sequence[Token]) -> Iterator[Line]:
        """The lines that the tokens stand for, with empty ones where the text has some."""
        marks = ""  # of the list's items that begin here
        heading = 0
        said = 0  # lines of the source
        for token in tokens:
            if token.type == "heading_open" and not token.level:
                heading = int(token.tag[1])
            elif token.type == "list_item_open":
                marks += f"{token.info}{token.markup} "
            elif token.type == "list_item_close" and marks:
                yield marks
                marks = ""
            elif token.type == "inline" and heading:
                yield Heading(heading, " ".join(self._spoken(token.content).split()))
                heading = 0
            elif token.map and not token.nesting and token.type != "hr":
                if token.map[0] > said:
                    yield ""
                yield from (marks + self._shown(token)).split("\n")
                marks = ""
                said = token.map[1]

    def _shown(self, token: Token) -> str:
        """A block's text."""
        if token.type == "inline":
            return self._spoken(token.content)
        if token.type == "html_block":
            return _without_comments(token.content)
        if token.type == "fence":
            return f"{token.markup}{token.info}\n{token.content}{token.markup}"
        return token.content

    def _spoken(self, content: str) -> str:
        """A paragraph's text without the marks round its words."""
        if not MARKS.search(content):
            return content
        if len(content) > LONGEST:
            lines = content.split("\n")
            return "\n".join(map(self._spoken, lines)) if len(lines) > 1 else content
        tokens: list[Token] = []
        self._parser.inline.parse(content, self._parser, self._env, tokens)
        return _words(tokens)


def _words(tokens: Sequence[Token]) -> str:
    return "".join(map(_word, tokens))


def _word(token: Token) -> str:
    if token.type == "image":
        return _words(token.children or [])
    if token.type in ("softbreak", "hardbreak"):
        return "\n"
    if token.type == "code_inline":
        blank = " " if "`" in token.content else ""
        return token.markup + blank + token.content + blank + token.markup
    if token.type == "html_inline":
        return _without_comments(token.content)
    return token.content


def _without_comments(html: str) -> str:
    """HTML as it is written, but for its comments."""
    kept = []
    at = 0
    while (start := html.find("<!--", at)) >= 0:
        end = html.find("-->", start + 2)
        if end < 0:
            break
        kept.append(html[at:start])
        at = end + len("-->")
    return "".join([*kept, html[at:]])
