"""Week 11. What the readers of documents have in common: the lines that they give, and text from bytes."""

from pathlib import Path
from typing import NamedTuple


class Heading(NamedTuple):
    """A heading between the lines of a document. `level` 1 is the outermost."""

    level: int
    text: str


class Page(NamedTuple):
    """A page begins; the first is number 1."""

    number: int


Line = str | Heading | Page
"""What a reader gives, one after the other: lines of text, and what divides them."""


def decoded_file(path: Path) -> str:
    """A file's text: UTF-8, or UTF-16 with its mark. Raises ValueError for anything else."""
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
