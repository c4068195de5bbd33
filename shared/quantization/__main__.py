"""Week 8. Quantizes a model from the command line.

    python -m shared.quantization --scheme int8 --out checkpoints/my-int8      # your newest model
    # in 4 bits by GPTQ, which looks at a text, and how much worse it is on another
    python -m shared.quantization --model smollm2 --scheme int4 --gptq a.txt --measure b.txt --out small
    # the output layer, and the embedding tied to it, stay as they are
    python -m shared.quantization --model smollm2 --scheme nf4 --skip lm_head --out small

What it writes is a checkpoint like another: load_model, `python -m shared.serving --model small` and
`python -m shared.export --model small --format gguf` take it.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from shared.checks import Checks
from shared.commandline import errors_for_people, parse_args
from shared.data.corpus import fixed_windows
from shared.devices import pick_device
from shared.evaluation import TextScore, score_text
from shared.models.gpt import GPT
from shared.models.names import OwnModelName
from shared.models.pretrained import load_model
from shared.quantization.gptq import gptq
from shared.quantization.modules import num_bytes, quantize, save_quantized
from shared.tokenizers import Tokenizer
from shared.training.own_model import name_and_source


@dataclass(frozen=True)
class Settings:
    """Rounds a model's linear layers to 8 or 4 bits."""

    out: Path
    """The folder to write, a new one."""
    scheme: Literal["int8", "int4", "nf4"]
    model: OwnModelName = "own"
    group_size: int | None = None
    """How many weights of a row share a scale: 32, 64, 128 or 256. If not given, 32 for int4, 64 for nf4 and
    the whole row for int8.
    """
    double_quant: bool | None = None
    """nf4: the scales in 8 bits too; on, if not given."""
    skip: tuple[str, ...] = ()
    """Linear layers that stay as they are, by name or pattern: lm_head, "blocks.0.*", "*.down_proj"."""
    gptq: Path | None = None
    """int4: a text like those that the model will meet; codes are chosen so that what the layers make of it
    stays (GPTQ).
    """
    gptq_tokens: int = 16_384
    """So many tokens of that text, from its beginning."""
    measure: Path | None = None
    """A text on which perplexity is measured before and after."""
    measure_tokens: int = 16_384
    """So many tokens of that text, from its beginning."""
    device: str = "auto"

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.at_least(2, "gptq_tokens", "measure_tokens")
        checks.require(
            self.gptq is None or self.scheme == "int4",
            f"gptq={self.gptq}: GPTQ chooses codes of int4, and the scheme is {self.scheme}",
        )
        taken = self.out.is_file() or (self.out.is_dir() and any(self.out.iterdir()))
        checks.require(not taken, f"out={self.out} is there already: choose a new folder")
        checks.finish()


def main(settings: Settings, say: Callable[[str], None] = print) -> Path:
    """Loads, measures, quantizes, saves, and says what became of it."""
    _, source = name_and_source(settings.model)
    model = load_model(source, pick_device(settings.device))
    before = _measured(model, settings)
    weights, megabytes = model.num_parameters(), num_bytes(model) / 1e6
    if settings.gptq is None:
        quantize(
            model, settings.scheme, settings.group_size, settings.double_quant, skip=settings.skip, say=say
        )
    else:
        windows = _windows(model, settings.gptq, settings.gptq_tokens)
        gptq(model, windows, settings.group_size or 32, skip=settings.skip, say=say)
    after = _measured(model, settings)
    save_quantized(model, settings.out, model.tokenizer)
    size = num_bytes(model)
    say(f"{megabytes:,.1f} MB -> {size / 1e6:,.1f} MB, {8 * size / weights:.2f} bits for each weight")
    if before is not None and after is not None:
        worse = after.perplexity / before.perplexity - 1
        say(
            f"perplexity of {after.tokens:,} tokens of {settings.measure}: {before.perplexity:.2f} ->"
            f" {after.perplexity:.2f} ({worse:+.2%})"
        )
    say(f"wrote {settings.out}")
    return settings.out


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a text in UTF-8: {error}") from None


def _tokenizer(model: GPT) -> Tokenizer:
    if model.tokenizer is None:
        raise ValueError("this model comes without a tokenizer of ours: leave out --gptq and --measure")
    return model.tokenizer


def _windows(model: GPT, path: Path, tokens: int) -> torch.Tensor:
    """The text's first tokens in rows of at most 512: int64 [texts, time]."""
    ids = torch.tensor(_tokenizer(model).encode(_read(path))[: tokens + 1], dtype=torch.int64)
    time = min(512, model.config.block_size, len(ids) - 1)
    if time < 1:
        raise ValueError(f"{path} has {len(ids)} tokens: GPTQ needs a text of some thousands")
    return fixed_windows(ids.numpy(), time)[0]


def _measured(model: GPT, settings: Settings) -> TextScore | None:
    """Perplexity on the text of --measure, each token with at least half a window before it."""
    if settings.measure is None:
        return None
    tokenizer = _tokenizer(model)
    text = tokenizer.decode(tokenizer.encode(_read(settings.measure))[: settings.measure_tokens])
    length = min(512, model.config.block_size)
    return score_text(model, text, tokenizer=tokenizer, block_size=length, stride=max(1, length // 2))


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
