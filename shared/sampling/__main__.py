"""Week 1. Writes text with a checkpoint of any week; without --prompt it asks for one, again and again.

python -m shared.sampling --checkpoint checkpoints/04_mini_gpt/laptop/tinyshakespeare/headline/best \\
    --prompt "ROMEO:"
"""

import sys
from dataclasses import dataclass

from shared import checkpoint
from shared.commandline import errors_for_people, parse_args
from shared.devices import pick_device
from shared.registry import LanguageModel, import_all_models
from shared.sampling.completion import generate_stream
from shared.sampling.generate import NEW_TOKENS
from shared.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Settings:
    """Writes text with a checkpoint of any week."""

    checkpoint: str
    """A checkpoint's folder."""
    prompt: str | None = None
    """What to go on from; none asks for one, again and again."""
    max_new_tokens: int = NEW_TOKENS
    temperature: float = 1.0
    """0 always takes the likeliest token; 1 draws as the model believes."""
    top_k: int | None = None
    """Draw only from the k likeliest tokens."""
    top_p: float | None = None
    """Draw only from the likeliest tokens that together reach this probability."""
    repetition_penalty: float = 1.0
    """Above 1, what stands there already is less likely to come."""
    stop: tuple[str, ...] = ()
    """Texts at which to end."""
    seed: int | None = None
    device: str = "auto"


def main(settings: Settings) -> None:
    """Goes on from the prompt, or from each that is typed."""
    import_all_models()
    loaded = checkpoint.load(settings.checkpoint, device=pick_device(settings.device))
    if loaded.tokenizer is None:
        raise ValueError(
            f"{settings.checkpoint} was saved without a tokenizer: its ids cannot be turned into text"
        )
    if settings.prompt is not None:
        write(loaded.model, loaded.tokenizer, settings.prompt, settings)
        return
    print("Type the beginning of a text and press Enter; an empty line ends.")
    while prompt := input("> "):
        try:
            write(loaded.model, loaded.tokenizer, prompt, settings)
        except ValueError as error:  # a character the model doesn't know: say so, and ask again
            print(f"error: {error}")


def write(model: LanguageModel, tokenizer: Tokenizer, prompt: str, settings: Settings) -> None:
    """Prints the prompt and what the model writes after it, as it is drawn."""
    pieces = generate_stream(
        model,
        prompt,
        settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        stop=settings.stop,
        seed=settings.seed,
        tokenizer=tokenizer,
    )
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    with errors_for_people():
        try:
            main(parse_args(Settings, sys.argv[1:], __doc__))
        except EOFError:
            sys.exit()
