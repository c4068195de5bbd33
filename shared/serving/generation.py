"""Week 12. What the engine is asked for, and what it gives back token by token.

A `Request` says what to write and how; `Engine.submit` returns the `Generation` that fills up with `Token`s.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import NamedTuple

import torch

from shared.sampling.generate import check_sampling
from shared.sampling.penalties import Penalties
from shared.sampling.speculation import LookupProposer
from shared.serving.grammar import Form

REASONS = ("stop", "length", "cancelled", "timeout", "error")
"""Why a text ended."""

SEEDS = 2**64
"""A seed is a whole number of 64 bits with a sign, as in OpenAI's API."""


def check_long_seed(seed: int) -> int:
    """The seed again, or ValueError for one out of range."""
    if not -SEEDS // 2 <= seed < SEEDS // 2:
        raise ValueError(f"{seed} is out of range: a seed is a whole number from -2^63 to 2^63 - 1")
    return seed


def later_seed(seed: int, number: int) -> int:
    """The seed that comes `number` after another one; after the largest comes the smallest."""
    return (seed + number + SEEDS // 2) % SEEDS - SEEDS // 2


class Token(NamedTuple):
    """One token of a text, with log-probabilities where the request asks for them.

    They are the model's own, before temperature and filters.
    """

    id: int
    logprob: float | None = None
    """None also for the first token of a prompt, which has no context to be predicted from."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest ids at this place with their log-probabilities, the likeliest first."""


@dataclass(frozen=True)
class Request:
    """What to write.

    Raises ValueError for values out of range; `Engine.submit` refuses what its model cannot do.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    penalties: Penalties = Penalties()
    form: Form | None = None
    """What the text has to be; it ends where nothing may follow."""
    seed: int | None = None
    """None draws differently each time."""
    stop: Sequence[int | Sequence[int]] = ()
    """Tokens, or sequences of tokens, at which to end; they are not part of the text."""
    adapter: str | None = None
    """Name of a LoRA adapter on the model; None is the base model alone."""
    logprobs: int | None = None
    """How many of the likeliest tokens to name at each place; 0: only the token's own log-probability."""
    score_prompt: bool = False
    """Log-probabilities of the prompt's tokens too (`Generation.prompt`)."""
    scored_from: int = 0
    """With `score_prompt`: the tokens before this place need no log-probabilities, and may be taken over from
    an earlier text. `Generation.prompt` then begins somewhere before this place.
    """
    timeout: float | None = None
    """Seconds from submission to the end."""

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise ValueError("generation needs at least one token to start from: give a prompt")
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} is out of range: at least 0")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs={self.logprobs} is out of range: at least 0, or none")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout={self.timeout} is out of range: seconds above 0, or none")
        check_sampling(self.temperature, self.top_k, self.top_p)
        if self.seed is not None:
            check_long_seed(self.seed)


class Generation:
    """A submitted request, and its text as far as it is written.

    Iterating yields the tokens as they come. With `listen` they go to that function instead, called in the
    engine's thread with each token and with None at the end.
    """

    def __init__(
        self, request: Request, listen: Callable[[Token | None], None] | None, wake: Callable[[], None]
    ):
        self.request = request
        self.finish_reason: str | None = None
        """None while it runs; then one of `REASONS`."""
        self.prompt: list[Token] = []
        """With `score_prompt`: the prompt's tokens with log-probabilities, as far as it has been read."""
        self.slot: int | None = None
        """Number of the slot in which it is, or was, written; None while it waits."""
        self.read = 0
        """Tokens of the prompt read so far."""
        self.reused = 0
        """Tokens of the prompt whose keys and values were taken over from an earlier text."""
        self.drawn = 0
        """Tokens drawn so far, those of a stop sequence included."""
        self.held: list[Token] = []
        """Tokens drawn but not delivered: they may be the beginning of a stop sequence."""
        self.ending: list[Token] = []
        """The tokens of the stop sequence that ended it."""
        self.form = None if request.form is None else request.form.copy()
        """How far the form has come."""
        self.proposer: LookupProposer | None = None
        """Looks up what may come next; None where the engine has not asked for it yet."""
        self.cancelled = False
        self.deadline = None if request.timeout is None else time.monotonic() + request.timeout
        self.generator = torch.Generator()
        if request.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(request.seed)
        self.stops = [[stop] if isinstance(stop, int) else list(stop) for stop in request.stop]
        self._arrived: SimpleQueue[Token | None] = SimpleQueue()
        self._listen = listen or self._arrived.put
        self._wake = wake

    def __iter__(self) -> Iterator[Token]:
        """Raises RuntimeError where the engine could not go on; for the other endings see `finish_reason`."""
        while (token := self._arrived.get()) is not None:
            yield token
        if self.finish_reason == "error":
            raise RuntimeError("the engine could not finish this text: its log says why")

    def cancel(self) -> None:
        """Ends it before the engine's next step; does nothing where it has ended."""
        self.cancelled = True
        self._wake()

    def is_late(self, now: float) -> bool:
        """Whether its time is over at `now`, a moment of `time.monotonic`."""
        return self.deadline is not None and now > self.deadline

    def deliver(self, token: Token | None) -> None:
        """Hands a token on (called by the engine). A listener that raises cancels the text."""
        try:
            self._listen(token)
        except Exception:
            self.cancelled = True
