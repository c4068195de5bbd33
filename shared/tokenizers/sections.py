"""Week 1. Hugging Face's tokenizer.json: what several of our tokenizers write in it.

Source: the file format of the library `tokenizers`.
"""

from collections.abc import Mapping
from typing import Any

Section = dict[str, Any]
"""A section of tokenizer.json, or a step of one."""


def tokens_by_id(vocab: Mapping[str, int]) -> list[str]:
    """The tokens of a model's vocab, in the order of their ids."""
    return sorted(vocab, key=vocab.__getitem__)


def isolated(split: str) -> Section:
    """A step of a pre_tokenizer whose pieces are the matches, and what lies between them."""
    return {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}


def first_token(token: str, i: int) -> Section:
    """The post_processor that puts the special token with the id `i` before every text."""
    first, second = (
        [{"SpecialToken": {"id": token, "type_id": kind}}, {"Sequence": {"id": name, "type_id": kind}}]
        for kind, name in enumerate("AB")
    )
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": first + second,
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}},
    }
