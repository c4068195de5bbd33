"""The prompts with which week 12 asks its models."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shared.models.gpt import GPT

if TYPE_CHECKING:
    from run import Settings


class Prompts:
    """Parts of a text, another for each number: `prompts(7)` for the load; with a beginning that several
    share, and without.

    Raises ValueError where prompt and new tokens do not fit into the model's context, and for a text that is
    too short.
    """

    def __init__(self, model: GPT, tokens: Sequence[int], settings: "Settings"):
        self.tokens, self.settings = list(tokens), settings
        new_tokens = max(settings.new_tokens, settings.load.tokens, settings.study_load.tokens)
        longest = settings.shared_tokens + settings.prompt_tokens + new_tokens
        if longest > model.config.block_size:
            raise ValueError(
                f"shared_tokens, prompt_tokens and the new tokens make {longest}, more than the model's"
                f" block_size={model.config.block_size}"
            )
        if len(self.tokens) < 2 * longest:
            raise ValueError(
                f"the held-out text has {len(self.tokens)} tokens, and prompts of up to {longest} are cut"
                " from it: take a longer text"
            )

    def part(self, number: int, length: int) -> list[int]:
        """So many tokens of the text, from another place for each number."""
        start = 97 * number % (len(self.tokens) - length)
        return self.tokens[start : start + length]

    def __call__(self, number: int) -> list[int]:
        """A prompt of the usual length."""
        return self.part(number, self.settings.prompt_tokens)

    def pair(self, number: int) -> tuple[list[int], list[int]]:
        """A long prompt whose beginning nobody has read, and one whose beginning all of these have."""
        long = self.part(499, self.settings.shared_tokens - 1)
        return [number, *long, *self(number)], [0, *long, *self(number)]
