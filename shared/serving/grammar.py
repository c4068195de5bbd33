"""Week 12. Texts that are JSON for certain: before each draw, all tokens that would break it are ruled out.

    grammars = Grammars(tokenizer, tokenizer.vocab, ends=[end_of_text])
    form = grammars.json({"type": "object"})
    Request(prompt, max_new_tokens=200, form=form)

An automaton for the JSON schema follows the text and says at each place which tokens may come: the others'
logits become -inf. What is left is drawn as always, so the model decides what the JSON says, and not whether
it is JSON. A text that ends because it has reached its length is cut, and then is no whole JSON.

Source: Willard & Louf, "Efficient Guided Generation for Large Language Models" (2023). The automaton is
llguidance's.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from shared.extras import needs
from shared.tokenizers import Tokenizer

with needs("serve"):
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

AS_DUMPED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One line, as json.dumps writes it: a small model would otherwise fill a text with line breaks."""


class Form(Protocol):
    """What a text has to be, and how far it has come: JSON or a call here, a quote in `shared.retrieval`. A
    copy is made for each text.
    """

    def copy(self) -> "Form":
        """The same, at the same place, independent of this one."""

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""

    def mask(self, logits: Tensor) -> Tensor:
        """The logits [vocab_size] with -inf for all that may not come next.

        Raises ValueError where nothing may come, as when an automaton has reached one of its limits.
        """

    def push(self, token: int) -> None:
        """Goes on by a token. Raises ValueError for one that may not come."""


class GrammarForm(Form):
    """All of a text follows one grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int):
        self._matcher = matcher
        self._vocab_size = vocab_size

    def copy(self) -> "GrammarForm":
        """The same, at the same place, independent of this one."""
        return GrammarForm(self._matcher.deep_copy(), self._vocab_size)

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher.is_stopped()

    def allowed(self) -> Tensor:
        """Which tokens may come next: bool [vocab_size]."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool))

    def mask(self, logits: Tensor) -> Tensor:
        """A new tensor."""
        allowed = self.allowed()
        if not allowed.any():
            raise ValueError(self._matcher.get_error() or "no token may come here")
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))

    def push(self, token: int) -> None:
        """Goes on by a token. Raises ValueError for one that may not come."""
        if not self._matcher.consume_token(token):
            raise ValueError(f"token {token} may not come here: {self._matcher.get_error()}")


class _Vocabulary:
    """A tokenizer as llguidance asks for it, with one id more, for an end that no model can draw."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], special: Iterable[int]):
        self.tokenizer = tokenizer
        self.tokens = [*tokens, b""]
        self.eos_token_id = len(tokens)
        self.special_token_ids = [*special, self.eos_token_id]

    def __call__(self, text: str) -> list[int]:
        """How a text that the grammar forces is spelled, as far as the vocabulary can."""
        try:
            return self.tokenizer.encode_more(text)
        except ValueError:
            return []


class Grammars:
    """Makes forms for one model.

    vocab: the bytes of each id of the model, from 0 on; an id without any is never allowed. ends: the ids
    that end a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: Mapping[int, bytes], ends: Iterable[int] = ()):
        ends = list(ends)
        tokens = [vocab[i] for i in range(len(vocab))]
        special = {*tokenizer.special_tokens.values(), *ends}
        self._special = tokenizer.special_tokens
        self._vocab_size = len(tokens)
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(_Vocabulary(tokenizer, tokens, special)),
            n_vocab=len(tokens) + 1,
            eos_token=[*ends, len(tokens)],
            slices=LLTokenizer.json_slices(),
        )

    def json(self, schema: Mapping[str, Any]) -> GrammarForm:
        """JSON that a schema allows; {"type": "object"} is any object.

        Raises ValueError for a schema that is none or asks for what cannot be enforced, and where the
        vocabulary cannot write such JSON.
        """
        return self._form(LLMatcher.grammar_from_json_schema(_with_options(schema)), "schema")

    def lark(self, grammar: str) -> GrammarForm:
        """What a grammar in llguidance's dialect of Lark allows. Its parts: `literal` and `json_rule`.

        Raises ValueError as `json` does.
        """
        return self._form(grammar, "grammar")

    def literal(self, text: str) -> str:
        """A text as a part of a Lark grammar: its special tokens are asked for as tokens."""
        special = self._special
        names = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        parts = re.split(f"({names})", text) if special else [text]
        return " ".join(
            f"<[{special[part]}]>" if part in special else json.dumps(part, ensure_ascii=False)
            for part in parts
            if part
        )

    def json_rule(self, schema: Mapping[str, Any]) -> str:
        """JSON that a schema allows, as a part of a Lark grammar."""
        return f"%json {_with_options(schema)}"

    def _form(self, grammar: str, kind: str) -> GrammarForm:
        problem = LLMatcher.validate_grammar(grammar, self._tokenizer)
        if problem:
            raise ValueError(f"this {kind} cannot be followed: {problem}")
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        form = GrammarForm(matcher, self._vocab_size)
        if matcher.is_error() or not form.allowed().any():
            reason = matcher.get_error() or "no token of the model's vocabulary can begin it"
            raise ValueError(f"this {kind} cannot be followed: {reason}")
        return form


def _with_options(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": AS_DUMPED})
