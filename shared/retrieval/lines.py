"""Week 11. What the readers of documents have in common: the lines that they give, and text from bytes."""

from pathlib import Path
from typing import NamedTuple

Value = str | int | float | bool | list[str]
"""What a document may say of itself: one of these for each field."""
Metadata = dict[str, Value]
"""What a document says of itself, by field."""


class Heading(NamedTuple):
    """A heading between the lines of a document. `level` 1 is the outermost."""

    level: int
    text: str


class Page(NamedTuple):
    """A page begins; the first is number 1."""

    number: int


class Facts(NamedTuple):
    """What the file says of itself."""

    metadata: Metadata


class Remark(NamedTuple):
    """Something that was not read as it was probably meant: for the file's owner."""

    text: str


Line = str | Heading | Page | Facts | Remark
"""What a reader gives: lines of text, what divides them, and what is said of the file."""


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


def keywords(text: str) -> list[str]:
    """The words of a list that is written with commas or semicolons.

    >>> keywords("pumps, valves; ")
    ['pumps', 'valves']
    """
    words = [" ".join(word.split()) for word in text.replace(";", ",").split(",")]
    return [word for word in words if word]
