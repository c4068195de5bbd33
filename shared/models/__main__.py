"""Week 6. Writes text with a checkpoint of any week, or with another model; without --prompt it asks for one,
again and again.

    python -m shared.models --model checkpoints/04_mini_gpt/laptop/tinyshakespeare/headline/best
    python -m shared.models --model gemma3-270m --prompt "The sea is"
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from shared import checkpoint
from shared.commandline import errors_for_people, parse_args
from shared.devices import pick_device
from shared.models.names import ModelName
from shared.models.pretrained import is_hugging_faces, load_model
from shared.registry import LanguageModel, import_all_models
from shared.sampling.completion import generate_stream
from shared.sampling.generate import NEW_TOKENS
from shared.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Settings:
    """Writes text with a model."""

    model: ModelName
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
    model, tokenizer = load_with_tokenizer(settings)
    if settings.prompt is not None:
        write(model, tokenizer, settings.prompt, settings)
        return
    print("Type the beginning of a text and press Enter; an empty line ends.")
    while prompt := input("> "):
        try:
            write(model, tokenizer, prompt, settings)
        except ValueError as error:  # a character the model doesn't know: say so, and ask again
            print(f"error: {error}")


def load_with_tokenizer(settings: Settings) -> tuple[LanguageModel, Tokenizer]:
    """A checkpoint of any week, a GPT or not, or what else `load_model` takes; and its tokenizer.

    Raises ValueError where there is none of ours.
    """
    import_all_models()
    device = pick_device(settings.device)
    folder = checkpoint.find(Path(settings.model))
    if folder is not None and not is_hugging_faces(folder):
        loaded = checkpoint.load(settings.model, device=device)
        model, tokenizer = loaded.model, loaded.tokenizer
    else:
        model = load_model(settings.model, device)
        tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{settings.model} has no tokenizer of ours: its ids cannot be turned into text")
    return model, tokenizer


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
