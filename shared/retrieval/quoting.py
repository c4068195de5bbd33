"""Week 11. Answers that quote: a language model chooses words of a sentence, and can write nothing else.

    quoter = Quoter(load_model("smollm2"))
    quote = quoter.quote("What does a dog pay?", index.nearest_windows("What does a dog pay?", 5))
    print(quote.text, "|", quote.window.text)

Each of the sentences that are nearest to the question is read by itself. First they are ranked anew: a
sentence that answers a question makes it likely, so the question's log-probability after the sentence is
added to the cosine. Then the answer is written from the best sentence, all tokens that would leave it ruled
out: what is written is a span of it, word for word.

Sources: Sachan et al., "Improving Passage Retrieval with Zero-Shot Question Generation" (2022); Rajpurkar et
al., "SQuAD" (2016), for answers that are spans; De Cao et al., "Autoregressive Entity Retrieval" (2021), for
decoding that is constrained to given texts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shared.devices import device_of
from shared.models.gpt import GPT, KVCache
from shared.retrieval.evidence import Window
from shared.retrieval.spans import spans
from shared.tokenizers import Tokenizer
from shared.tokenizers.base import tokenizer_of

EXAMPLES = (
    "Orchard Cafe. Opening hours. The kitchen is open from 08:30 to 15:00, but on Sundays it closes at noon."
    "\nQuestion: Until when can one eat there at the end of the week?\nAnswer: noon\n\n",
    "Rowan Castle. The tower. It was built for Duke Almeric by the mason Joan Tervill, who needed 26 years"
    " for it.\nQuestion: Who made the tower?\nAnswer: Joan Tervill\n\n",
    "Chess club. Members. Newcomers pay 15 euros a year and bring a green cushion to sit on.\n"
    "Question: What does membership cost?\nAnswer: 15 euros\n\n",
    "Village bakery. Bread. The loaves cool on a stone shelf and are wrapped in linen before they are sold.\n"
    "Question: In which cloth does one carry the bread home?\nAnswer: linen\n\n",
)
"""What an answer looks like: the model goes on in the same way. None of it is about the documents."""
MOST_WORDS = 8
"""Words of a quoted answer, at most."""
ROOM = 96
"""Tokens of a quoted answer, at most: a number has one for each digit."""
LIKELIHOOD = 1.0
"""How much of a cosine a nat of the question's likelihood counts: chosen on half of week 11's questions."""


@dataclass(frozen=True)
class Quote:
    """A span of a sentence that may be the answer."""

    window: Window
    start: int
    """In the chunk's text, in characters."""
    end: int
    logprob: float
    """Of its tokens and of its end, summed, in nats."""
    relevance: float
    """Of the sentence: what sentences are ranked by."""

    @property
    def text(self) -> str:
        return self.window.chunk.text[self.start : self.end]


class SpanForm:
    """What an answer may be: a span of a text, and how far it has come. A copy is made for each answer.

    It does for quotes what a grammar does for JSON (week 12): `mask` rules tokens out, `push` goes on.
    ends: the tokens that end an answer.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, ends: Iterable[int], most_words: int = MOST_WORDS):
        self._ends = frozenset(ends)
        self._written = 0
        self._ended = False
        self._rows: list[_Row] = []
        for start, stops in spans(text, most_words).items():
            row = _Row.of(text, start, stops, tokenizer)
            if row.stops:
                self._rows.append(row)

    def copy(self) -> "SpanForm":
        """The same, at the same place, independent of this one."""
        other = SpanForm.__new__(SpanForm)
        other.__dict__ = dict(self.__dict__)
        return other

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""
        return self._ended or not any(len(row.ids) > self._written for row in self._rows)

    @property
    def place(self) -> tuple[int, int] | None:
        """Begin and end in the text, in characters; None for what is no span yet."""
        for row in self._rows:
            if self._written in row.stops:
                return row.start, row.stops[self._written]
        return None

    def allowed(self) -> list[int]:
        """The tokens that may come next."""
        following = {row.ids[self._written] for row in self._rows if len(row.ids) > self._written}
        if self.place is not None:
            following |= self._ends
        return sorted(following)

    def mask(self, logits: Tensor) -> Tensor:
        """The logits [vocab_size] with -inf for all that may not come next; a new tensor.

        Raises ValueError where nothing may come.
        """
        allowed = torch.tensor(self.allowed(), device=logits.device, dtype=torch.long)
        if self.complete or not len(allowed):
            raise ValueError("no token may come here: the text has no span to quote, or the answer has ended")
        masked = torch.full_like(logits, float("-inf"))
        masked[allowed] = logits[allowed]
        return masked

    def push(self, token: int) -> None:
        """Goes on by a token. Raises ValueError for one that may not come."""
        if token not in self.allowed():
            raise ValueError(f"token {token} may not come here: it leaves the text that is quoted")
        if token in self._ends and self.place is not None:
            self._ended = True
            return
        at = self._written
        self._rows = [row for row in self._rows if len(row.ids) > at and row.ids[at] == token]
        self._written += 1


class _Row(NamedTuple):
    """The spans that begin at one place."""

    start: int
    ids: list[int]
    """The longest of them, with the space before it."""
    stops: dict[int, int]
    """After so many tokens a span ends, and where that is in the text."""

    @classmethod
    def of(cls, text: str, start: int, ends: Sequence[int], tokenizer: Tokenizer) -> "_Row":
        ids = tokenizer.encode_more(f" {' '.join(text[start : ends[-1]].split())}")
        wanted = {len(f" {' '.join(text[start:end].split())}".encode()): end for end in ends}
        stops, length = {}, 0
        for number, i in enumerate(ids, 1):
            length += len(tokenizer.vocab[i])
            if length in wanted:
                stops[number] = wanted[length]
        return cls(start, ids, stops)


def examples_for(tokenizer: Tokenizer, room: int) -> list[int]:
    """As many of `EXAMPLES` as fit into so many tokens, as a prompt: fewer, or none, for a short context."""
    for count in range(len(EXAMPLES), 0, -1):
        ids = tokenizer.prompt("".join(EXAMPLES[:count]))
        if len(ids) <= room:
            return ids
    return tokenizer.prompt("")


class PromptParts(NamedTuple):
    """The prompt for one sentence, as tokens in three parts: the middle one's likelihood is looked at."""

    before: list[int]
    question: list[int]
    after: list[int]

    @property
    def ids(self) -> list[int]:
        return [*self.before, *self.question, *self.after]


def quoting_parts(question: str, window: Window, tokenizer: Tokenizer) -> PromptParts:
    """What the model reads after `EXAMPLES`: a sentence under its headings, and the question.

    Raises ValueError for an empty question.
    """
    question = " ".join(question.split())
    if not question:
        raise ValueError("there is no question: give one")
    place = ". ".join([window.chunk.title, *window.chunk.headings])
    sentence = " ".join(f"{place}. {window.text}".split())
    return PromptParts(
        tokenizer.encode_more(f"{sentence}\nQuestion:"),
        tokenizer.encode_more(f" {question}"),
        tokenizer.encode_more("\nAnswer:"),
    )


def ends_of_quotes(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a quote: those that begin a new line, and those that stand for no text."""
    newlines = {i for i, token in tokenizer.vocab.items() if token.startswith(b"\n")}
    return frozenset({*tokenizer.special_tokens.values(), *newlines})


def relevance(window: Window, likelihood: float) -> float:
    """What sentences are ranked by: the cosine, and the mean log-probability of the question's tokens after
    the sentence, in nats, times `LIKELIHOOD`.
    """
    return window.score + LIKELIHOOD * likelihood


class Read(NamedTuple):
    """A sentence that the model has read, with the question."""

    window: Window
    likelihood: float
    """Mean log-probability of the question's tokens after the sentence, in nats."""
    cache: KVCache
    logits: Tensor
    """For the answer's first token: [vocab_size]."""

    @property
    def relevance(self) -> float:
        """What sentences are ranked by."""
        return relevance(self.window, self.likelihood)


@torch.inference_mode()
def write_span(model: GPT, form: SpanForm, logits: Tensor, cache: KVCache) -> float:
    """Writes the likeliest token that the form allows, one after the other, to its end. Returns the summed
    log-probability of what was written, in nats.

    logits: [vocab_size], for the first token, after what the cache holds; the cache goes on.
    """
    logprob = 0.0
    while True:
        token = int(form.mask(logits).argmax())
        logprob += logits.log_softmax(-1)[token].item()
        form.push(token)
        if form.complete:
            return logprob
        row = torch.tensor([[token]], device=logits.device)
        logits = model(row, cache)[0, -1].float()


class Quoter:
    """Ranks sentences by how likely they make the question, and quotes the answer from the best: greedily.

    tokenizer: None takes the model's. sentences: how many are ranked.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer | None = None, sentences: int = 5):
        if sentences < 1:
            raise ValueError(f"sentences={sentences}: must be at least 1")
        self.model = model
        self.tokenizer = tokenizer_of(model, tokenizer)
        self.sentences = sentences
        self.ends = ends_of_quotes(self.tokenizer)
        self._example_ids = examples_for(self.tokenizer, model.config.block_size // 2)
        self._examples: KVCache | None = None

    def quote(self, question: str, windows: Sequence[Window]) -> Quote | None:
        """From the best of the first `sentences` windows; None where they have no word. Raises ValueError as
        `ranked` does.
        """
        for read in self.ranked(question, windows[: self.sentences]):
            quote = self.quote_from(read)
            if quote is not None:
                return quote
        return None

    @torch.inference_mode()
    def ranked(self, question: str, windows: Sequence[Window]) -> list[Read]:
        """The windows, the most relevant first.

        Raises ValueError for an empty question, and for one that does not fit the model.
        """
        found = []
        for window in windows:
            parts = quoting_parts(question, window, self.tokenizer)
            cache = self._after_examples(len(parts.ids))
            logits = self.model(self._row(parts.ids), cache)[0].float()
            begin, end = len(parts.before), len(parts.before) + len(parts.question)
            asked = torch.tensor(parts.question, device=logits.device)[:, None]
            likelihood = logits[begin - 1 : end - 1].log_softmax(-1).gather(1, asked).mean().item()
            found.append(Read(window, likelihood, cache, logits[-1]))
        return sorted(found, key=lambda read: -read.relevance)

    @torch.inference_mode()
    def quote_from(self, read: Read) -> Quote | None:
        """The answer that is written from a sentence; None where it has no word. Once for each `Read`, whose
        cache goes on.
        """
        form = SpanForm(read.window.text, self.tokenizer, self.ends)
        if not form.allowed():
            return None
        logprob = write_span(self.model, form, read.logits, read.cache)
        start, end = form.place or (0, 0)
        at = read.window.start
        return Quote(read.window, at + start, at + end, logprob, read.relevance)

    def _row(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=device_of(self.model))

    def _after_examples(self, more: int) -> KVCache:
        """A cache that has read the examples, with room for so many tokens more and an answer.

        Raises ValueError where that is more than the model can read.
        """
        read = len(self._example_ids)
        cache = self.model.new_cache(max_length=read + more + ROOM)
        if not read:
            return cache
        if self._examples is None:
            self._examples = self.model.new_cache(max_length=read)
            self.model(self._row(self._example_ids), self._examples)
        cache.begin_with(self._examples)
        return cache
