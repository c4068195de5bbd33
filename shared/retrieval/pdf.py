"""Week 11. PDFs as pages of text, by the library pypdf. Encrypted ones that open without a password are read:
that needs the package cryptography.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from pypdf import PdfReader
from pypdf.errors import DependencyError

from shared.retrieval.lines import Line, Page


def read_pdf(path: Path) -> Iterator[Line]:
    """The text of each page, after its number.

    Raises ValueError for a PDF that needs a password, has no text, or is damaged.
    """
    pages = _pages(path)
    if not any(map(str.strip, pages)):
        where = "its only page has" if len(pages) == 1 else f"its {len(pages)} pages have"
        raise ValueError(f"{where} no text, only pictures: a scan; run a text recognition (OCR) on it first")
    for number, text in enumerate(pages, 1):
        yield Page(number)
        yield re.sub(r"(?<=\w)-\n(?=[a-z])", "", text)  # a word that was divided at the end of a line


def _pages(path: Path) -> list[str]:
    """The pages' texts. pypdf raises what it likes on damaged files, so everything is caught."""
    locked = False
    pages: list[str] = []
    try:
        reader = PdfReader(path)
        locked = reader.is_encrypted and not reader.decrypt("")
        if not locked:
            pages.extend(page.extract_text() for page in reader.pages)
    except DependencyError as error:
        raise ValueError(f"what pypdf needs for it is not installed: {error}") from None
    except Exception as error:
        raise ValueError(f"it is damaged or no PDF ({error or type(error).__name__})") from None
    if locked:
        raise ValueError("it is encrypted: save it without a password")
    return pages
