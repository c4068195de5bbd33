"""Week 1. Speculative decoding: several tokens from one forward pass of the model, and the same text.

    lookup = Lookup()
    text = model.generate(prompt, speculate=lookup)
    print(lookup.tokens_per_step)    # 1 without speculation

To read nine tokens takes a model little longer than to read one: its weights have to come from memory once in
either case. So the next tokens are guessed, cheaply, and read together with the last one; the pass gives the
model's logits after each, by which the guesses are checked from the first on, up to one that the model does
not make too. That one is replaced by the model's own, and the rest is dropped. Where all are right the pass
gives one more token for nothing.

What guesses: `Lookup` (the text itself: what followed when these words first came up) or `Draft` (a
small model). Neither changes what is written. A greedy text is the same with and without, and so is a drawn
one with `Lookup` and a seed, as each token is drawn from the same logits in the same order. With `Draft` a
drawn text has the same distribution, and a seed gives the same text again, but another one than without.
("The same" is up to rounding: where a model reads several tokens at once with other sums than one, two tokens
that are all but equally likely may change places. decoder.c of week 8 gives the same bits.)

A gain where much is guessed right, as in an answer that quotes, or code; a loss where little is, as each
wrong guess was read in vain. `benchmarks/speculation.py` measures both.

Sources: Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding" (2023), and
Chen et al., "Accelerating Large Language Model Decoding with Speculative Sampling" (2023), for drafts and the
rule that keeps the distribution; Saxena, "Prompt Lookup Decoding" (2023), for guesses from the text.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shared.registry import LanguageModel
from shared.sampling.reading import TextReader

if TYPE_CHECKING:  # which imports this module
    from shared.sampling.generate import Row


FIRST_WIDTH = 2
"""How many tokens are proposed at first."""


@dataclass(frozen=True)
class Proposal:
    """Tokens that may come next."""

    tokens: Sequence[int] = ()
    drawn_from: Sequence[Tensor] | None = None
    """Of each token the probabilities [vocab_size] that it was drawn with; None where nothing was drawn."""


class Proposer(ABC):
    """Proposes what comes next in one text. k: how many tokens at a time, at most."""

    def __init__(self, k: int):
        self.k = k
        self.width = min(FIRST_WIDTH, k)
        """How many tokens to ask it for: where it is often wrong, few are read in vain."""

    def heed(self, all_right: bool) -> None:
        """Takes note of whether what it proposed was right: twice as many next time, or half."""
        self.width = min(self.k, 2 * self.width) if all_right else max(1, self.width // 2)

    @abstractmethod
    def propose(self, row: "Row", most: int) -> Proposal:
        """Up to `most` tokens to follow the text, which has grown since the last call."""


class Speculation(ABC):
    """How tokens are proposed, and a count of what came of it, over all texts that it was handed to.

    k: how many tokens are proposed at a time, at most: a text begins with `FIRST_WIDTH`, and its next
    proposal is twice as long where all of the last was right, else half as long. Raises ValueError where
    there would be none.
    """

    def __init__(self, k: int):
        if k < 1:
            raise ValueError(f"k={k} is out of range: at least 1 token must be proposed at a time")
        self.k = k
        self.steps = 0
        """Forward passes of the model, counted once for each text in them."""
        self.tokens = 0
        """Tokens that were written."""
        self.proposed = 0
        """Tokens that were proposed."""

    @property
    def tokens_per_step(self) -> float:
        """Tokens for each forward pass: from 1 to k + 1. Raises ValueError where nothing was written yet."""
        if not self.steps:
            raise ValueError("nothing was written with this speculation yet")
        return self.tokens / self.steps

    @abstractmethod
    def proposer(self, max_new_tokens: int, use_cache: bool) -> Proposer:
        """One for a new text."""

    def check(self, model: LanguageModel) -> None:
        """Raises ValueError where it cannot propose tokens for this model."""
        return

    def draw_on(
        self, model: LanguageModel, rows: Sequence["Row"], max_new_tokens: int, use_cache: bool
    ) -> Generator[list[tuple["Row", Tensor]], None, None]:
        """As `shared.sampling.generate.draw_on`, one row at a time."""
        if not max_new_tokens:
            return
        reader = TextReader(model, max_new_tokens, use_cache, forgetful=True)
        proposers = [self.proposer(max_new_tokens, use_cache) for _ in rows]
        while rows:
            proposals = []
            for number, (row, proposer) in enumerate(zip(rows, proposers)):
                left = max_new_tokens - len(row.written) - 1  # the last token comes without a proposal
                most = int(min(proposer.width, left, reader.room(number, row.tokens)))
                proposals.append(proposer.propose(row, most) if most > 0 else Proposal())
            texts = [row.tokens for row in rows]
            logits = reader.logits_along(texts, [proposal.tokens for proposal in proposals])
            self.steps += len(rows)
            for row, proposer, proposal, of_row in zip(rows, proposers, proposals, logits):
                self.proposed += len(proposal.tokens)
                before = len(row.tokens)
                for one in _drawn_along(row, proposal, of_row):
                    self.tokens += 1
                    yield [(row, one)]
                if proposal.tokens:
                    proposer.heed(len(row.tokens) - before > len(proposal.tokens))
            unended = [i for i, row in enumerate(rows) if not row.ended and len(row.written) < max_new_tokens]
            if len(unended) < len(rows):
                reader.keep(unended)
                rows = [rows[i] for i in unended]
                proposers = [proposers[i] for i in unended]


def _drawn_along(row: "Row", proposal: Proposal, logits: Tensor) -> Generator[Tensor, None, None]:
    """Adds tokens to a row: the proposed ones up to the first that is refused, and one more, the model's own.

    logits: [1 + proposed, vocab_size], of what follows the text and each proposed token. Yields those that
    each token was drawn from, when it stands in the row; ends early where the row is ended by then.
    """
    for place, of_token in enumerate(logits):
        if place == len(proposal.tokens) or proposal.drawn_from is None:
            row.draw(of_token)
        else:
            target, draft = row.distribution(of_token), proposal.drawn_from[place]
            row.tokens.append(keep_or_redraw(proposal.tokens[place], target, draft, row.generator))
        yield of_token
        if row.ended or place == len(proposal.tokens) or row.tokens[-1] != proposal.tokens[place]:
            return


def check_speculation(speculate: Speculation | None, model: LanguageModel) -> None:
    """Raises ValueError for what is no speculation, and for one that does not fit the model."""
    if speculate is None:
        return
    if not isinstance(speculate, Speculation):
        raise ValueError(f"speculate={speculate!r}: must be a Lookup(), a Draft(small_model), or None")
    speculate.check(model)


# ---- from the text itself


class Lookup(Speculation):
    """Proposes what followed the last tokens where they stood before, in the prompt or the text.

    k: how many tokens are proposed at a time, at most. longest, shortest: how many of the last tokens are
    looked for, the longest sequence first, and the first place where each stands. Raises ValueError for
    numbers out of range.
    """

    def __init__(self, k: int = 8, *, longest: int = 3, shortest: int = 2):
        super().__init__(k)
        if not 1 <= shortest <= longest:
            raise ValueError(
                f"shortest={shortest} and longest={longest}: must be at least 1, the longest no shorter"
            )
        self.longest = longest
        self.shortest = shortest

    def proposer(self, max_new_tokens: int = 0, use_cache: bool = True) -> "LookupProposer":
        """A table of the text's sequences."""
        return LookupProposer(self.k, range(self.longest, self.shortest - 1, -1))


class LookupProposer(Proposer):
    """The places in a text that follow the first of each of its sequences of tokens.

    sizes: of the sequences, the longest first.
    """

    def __init__(self, k: int, sizes: Sequence[int]):
        super().__init__(k)
        self._sizes = sizes
        self._place_after: dict[tuple[int, ...], int] = {}
        self._entered = 0  # the first place that is not in the table

    def propose(self, row: "Row", most: int) -> Proposal:
        """As `following`."""
        return Proposal(self.following(row.tokens, most))

    def following(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens to follow a text, which has grown since the last call."""
        self._enter(tokens)
        for size in self._sizes:
            place = self._place_after.get(tuple(tokens[-size:]))
            if place is not None:
                # What is proposed is copied on where the place is less than `most` from the end: a loop.
                text = list(tokens)
                for source in range(place, place + most):
                    text.append(text[source])
                return text[len(tokens) :]
        return []

    def _enter(self, tokens: Sequence[int]) -> None:
        for place in range(self._entered, len(tokens)):
            for size in self._sizes:
                if size <= place:
                    self._place_after.setdefault(tuple(tokens[place - size : place]), place)
        self._entered = len(tokens)


# ---- from a small model


class Draft(Speculation):
    """Proposes what a smaller model writes, drawn with the settings that the text is drawn with.

    draft: a model with the same vocabulary. k: how many tokens are proposed at a time, at most; each takes a
    forward pass of the draft. Raises ValueError for another vocabulary.
    """

    def __init__(self, draft: LanguageModel, k: int = 4):
        super().__init__(k)
        self.draft = draft

    def check(self, model: LanguageModel) -> None:
        """Raises ValueError for a model of another vocabulary."""
        own, theirs = (getattr(one.config, "vocab_size", None) for one in (self.draft, model))
        if own != theirs:
            raise ValueError(
                f"the draft has a vocabulary of {own} tokens and the model one of {theirs}: take a draft that"
                " was trained with the model's tokenizer"
            )
        tokenizers = self.draft.tokenizer, model.tokenizer
        if None not in tokenizers and len({id(one) for one in tokenizers}) > 1:
            ours, other = (one.vocab for one in tokenizers if one is not None)
            if ours != other:
                raise ValueError(
                    "the draft's tokens stand for other texts than the model's: take a draft that was trained"
                    " with the model's tokenizer"
                )

    def proposer(self, max_new_tokens: int, use_cache: bool) -> Proposer:
        """The draft with a cache for a text."""
        reader = TextReader(self.draft, max_new_tokens, use_cache, forgetful=True)
        return _Drafted(self.k, reader)

    def draw_on(
        self, model: LanguageModel, rows: Sequence["Row"], max_new_tokens: int, use_cache: bool
    ) -> Generator[list[tuple["Row", Tensor]], None, None]:
        """As `Speculation.draw_on`; leaves the draft in the mode that it was in."""
        was_training = self.draft.training
        try:
            yield from super().draw_on(model, rows, max_new_tokens, use_cache)
        finally:
            self.draft.train(was_training)


class _Drafted(Proposer):
    def __init__(self, k: int, reader: TextReader):
        super().__init__(k)
        self._reader = reader

    def propose(self, row: "Row", most: int) -> Proposal:
        proposed: list[int] = []
        distributions: list[Tensor] = []
        for _ in range(most):
            (logits,) = self._reader.next_logits([[*row.tokens, *proposed]])
            drawn_from = row.distribution(logits, proposed)
            proposed.append(int(torch.multinomial(drawn_from, 1, generator=row.generator)))
            distributions.append(drawn_from)
        return Proposal(proposed, distributions)


def keep_or_redraw(proposed: int, target: Tensor, draft: Tensor, generator: torch.Generator) -> int:
    """A token distributed as `target` says, from one that was drawn as `draft` says: the same one, as often
    as can be. Both [vocab_size].

    Source: Leviathan et al. (2023), section 2.3; Chen et al. (2023), theorem 1.
    """
    if torch.bernoulli(chance_to_keep(target, draft)[proposed], generator=generator):
        return proposed
    return int(torch.multinomial(redrawn_from(target, draft), 1, generator=generator))


def chance_to_keep(target: Tensor, draft: Tensor) -> Tensor:
    """How likely each token stays where the draft proposes it: min(1, target / draft), fp64 [vocab_size]."""
    return torch.where(target < draft, target.double() / draft.double(), 1.0)


def redrawn_from(target: Tensor, draft: Tensor) -> Tensor:
    """The probabilities of what replaces a refused token, fp64 [vocab_size]: more of what the draft proposes
    too seldom.
    """
    missing = (target.double() - draft.double()).clamp(min=0)
    if not missing.any():  # they are alike, up to rounding
        return target.double()
    return missing / missing.sum()
