"""Week 11. PDFs as pages of text, by the library pypdf. Encrypted ones that open without a password are read:
that needs the package cryptography.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.extras import needs
from shared.retrieval.lines import Facts, Heading, Line, Metadata, Page, keywords

with needs("rag"):
    from pypdf import PdfReader
    from pypdf.errors import DependencyError

FIELDS = ("/Title", "/Author", "/Subject", "/Keywords")
"""Of the document information."""
LONGEST_FIELD = 1000
"""Characters of a field that is read."""


def read_pdf(path: Path) -> Iterator[Line]:
    """The text of each page, after its number. First comes what the document information says: title (as a
    heading of level 1, too), author, subject and keywords.

    Raises ValueError for a PDF that needs a password, has no text, or is damaged.
    """
    pages, information = _opened(path)
    if not any(map(str.strip, pages)):
        where = "its only page has" if len(pages) == 1 else f"its {len(pages)} pages have"
        raise ValueError(f"{where} no text, only pictures: a scan; run a text recognition (OCR) on it first")
    metadata = _metadata(information)
    if metadata:
        yield Facts(metadata)
    if "title" in metadata:
        yield Heading(1, str(metadata["title"]))
    for number, text in enumerate(pages, 1):
        yield Page(number)
        yield re.sub(r"(?<=\w)-\n(?=[a-z])", "", text)  # a word that was divided at the end of a line


def _opened(path: Path) -> tuple[list[str], dict[str, str]]:
    """The pages' texts, and the document information. pypdf raises what it likes on damaged files, so
    everything is caught.
    """
    locked = False
    pages: list[str] = []
    information: dict[str, str] = {}
    try:
        reader = PdfReader(path)
        locked = reader.is_encrypted and not reader.decrypt("")
        if not locked:
            pages.extend(page.extract_text() for page in reader.pages)
            written: Any = reader.metadata or {}
            information = {name: str(written[name]) for name in FIELDS if name in written}
    except DependencyError as error:
        raise ValueError(f"what pypdf needs for it is not installed: {error}") from None
    except Exception as error:
        raise ValueError(f"it is damaged or no PDF ({error or type(error).__name__})") from None
    if locked:
        raise ValueError("it is encrypted: save it without a password")
    return pages, information


def _metadata(information: dict[str, str]) -> Metadata:
    metadata: Metadata = {}
    for name, text in information.items():
        text = " ".join(text.split())
        if text and len(text) <= LONGEST_FIELD:
            metadata[name.removeprefix("/").lower()] = keywords(text) if name == "/Keywords" else text
    return metadata
