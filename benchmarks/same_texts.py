"""Whether PyTorch, decoder.c and llama.cpp write the same texts with the same weights in fp32.

    python benchmarks/same_texts.py                              # SmolLM2, 64 tokens after 20 prompts
    python benchmarks/same_texts.py --log docs/speed/same_texts.jsonl

Each takes the likeliest token every time, from the same ids, until it has so many or one ends the text.
llama.cpp reads a GGUF file of type F32, with keys and values in fp32. Sums are rounded in different orders,
so two tokens that are all but equally likely may change places, after which two texts have nothing to do with
each other: where they part, PyTorch's two largest logits must be closer than `--near`, else this fails.
"""

import sys
import tempfile
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contenders import append_line, count_alike, write_gguf
from shared.checks import Checks
from shared.commandline import errors_for_people, parse_args
from shared.devices import device_name
from shared.models.gpt import GPT
from shared.models.names import OwnModelName
from shared.models.pretrained import load_model
from shared.quantization.decoder import Decoder
from shared.registry import SlotReader
from shared.runtime import commit, plain, table
from shared.sampling.reading import ForwardReader
from shared.serving.llama_cpp import LlamaCpp
from shared.tokenizers.base import ends_of, tokenizer_of
from shared.training.own_model import name_and_source

PROMPTS = (
    "Question: Why is the sky blue?\nAnswer:",
    "Question: What is the capital of Australia, and why is it not Sydney?\nAnswer:",
    "Question: How do I boil an egg so that the yolk stays soft?\nAnswer:",
    "Question: Who wrote The Count of Monte Cristo?\nAnswer:",
    "Question: What is the difference between weather and climate?\nAnswer:",
    "Once upon a time there was a lighthouse keeper who",
    "The ship sailed north for nine days before anyone on board saw land, and when they did",
    "Dear Sir or Madam,\n\nI am writing to complain about",
    "Photosynthesis is the process by which",
    "The three most important things to know about money are",
    "Ingredients for a simple tomato soup:\n-",
    "It was raining when Anna left the house. She had forgotten her umbrella, so",
    "def fibonacci(n):\n",
    "import json\n\ndef read_settings(path):\n    ",
    "SELECT name, COUNT(*) FROM orders",
    "<html>\n  <head>\n    <title>",
    "1, 1, 2, 3, 5, 8, 13,",
    "12 * 7 = 84\n13 * 7 = 91\n14 * 7 =",
    "January has 31 days, February has 28 days, March has",
    "| year | population |\n| --- | --- |\n| 1900 | 1,650 million |\n| 1950 |",
)
"""Questions, beginnings of texts, code, numbers."""


@dataclass(frozen=True)
class Settings:
    """Compares greedy texts."""

    model: OwnModelName = "smollm2"
    tokens: int = 64
    """New ones of a text, at most."""
    near: float = 1e-3
    """How far apart two logits may be at most that change places."""
    threads: int | None = None
    """Cores that compute; none: as many as PyTorch takes."""
    log: Path | None = None
    """A file to which all that is found is added, in lines of JSON."""

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.at_least(1, "tokens", "threads")
        checks.at_least(0, "near")
        checks.finish()


def likeliest(
    reader: SlotReader | ForwardReader, prompt: list[int], tokens: int, ends: Collection[int]
) -> list[int]:
    """The likeliest tokens after a prompt, read in slot 0, up to and with one that ends the text."""
    reader.lengths[0] = 0
    text: list[int] = []
    new = prompt
    while len(text) < tokens:
        token = int(reader.read([(0, new)])[-1].argmax())
        text.append(token)
        new = [token]
        if token in ends:
            break
    return text


def logits_along(reader: SlotReader | ForwardReader, prompt: list[int], text: list[int]) -> Tensor:
    """The logits [text, vocab_size] that each token of the text was taken from."""
    reader.lengths[0] = 0
    return reader.read([(0, [*prompt, *text[:-1]])], every=True)[len(prompt) - 1 :]


class Texts:
    """The three programs with one model, and what they make of a prompt."""

    def __init__(self, model: GPT, server: LlamaCpp, length: int, settings: Settings):
        self._pytorch = ForwardReader(model, 1, length)
        self._decoder = Decoder(model, 1, length)
        self._server = server
        self._tokenizer = tokenizer_of(model)
        self._ends = ends_of(self._tokenizer)
        self._settings = settings

    def compared(self, prompt: str) -> dict[str, Any]:
        """A line of the log."""
        ids = self._tokenizer.prompt(prompt)
        tokens = self._settings.tokens
        with torch.inference_mode():
            expected = likeliest(self._pytorch, ids, tokens, self._ends)
            others = {
                "decoder.c": likeliest(self._decoder, ids, tokens, self._ends),
                "llama.cpp": self._server.tokens(ids, tokens, ignore_ends=False),
            }
            logits = logits_along(self._pytorch, ids, expected)
            difference = (logits - logits_along(self._decoder, ids, expected)).abs().max().item()
        best = logits.topk(2).values
        gaps = (best[:, 0] - best[:, 1]).tolist()
        row: dict[str, Any] = {"prompt": prompt, "prompt_tokens": len(ids), "tokens": len(expected)}
        row |= {"smallest_gap": min(gaps), "decoder.c_largest_difference": difference, "parts": {}}
        for name, text in others.items():
            alike = count_alike(expected, text)
            if alike < len(expected):
                row["parts"][name] = {"alike": alike, "gap": gaps[alike]}
        row["text"] = self._tokenizer.decode(expected)
        return row


def print_found(rows: list[dict[str, Any]]) -> None:
    """A table, and a sentence on each other program."""
    print(
        table(
            {
                "prompt": " ".join(row["prompt"].split())[:40],
                "tokens": row["tokens"],
                "smallest gap": row["smallest_gap"],
                **{
                    name: f"parts after {row['parts'][name]['alike']}" if name in row["parts"] else "the same"
                    for name in ("decoder.c", "llama.cpp")
                },
            }
            for row in rows
        )
    )
    for name in ("decoder.c", "llama.cpp"):
        same = sum(name not in row["parts"] for row in rows)
        print(f"{name}: {same} of {len(rows)} texts are PyTorch's")


def check(rows: list[dict[str, Any]], near: float) -> None:
    """Raises ValueError for a text that parts from PyTorch's where one token is clearly the likeliest."""
    wrong = [
        f"{name} after {row['prompt']!r}: {part['alike']} tokens alike, then a gap of {part['gap']:.3g}"
        for row in rows
        for name, part in row["parts"].items()
        if part["gap"] > near
    ]
    if wrong:
        raise ValueError(
            f"texts part where the two largest logits are more than {near:g} apart: {'; '.join(wrong)}"
        )


def main(settings: Settings) -> None:
    """Compares, and prints what was found."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    _, source = name_and_source(settings.model)
    model = load_model(source, "cpu", torch.float32)
    length = max(len(tokenizer_of(model).prompt(prompt)) for prompt in PROMPTS) + settings.tokens
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = write_gguf(model, "F32", Path(folder))
        with closing(LlamaCpp(path, length, threads=torch.get_num_threads())) as server:
            device = device_name(torch.device("cpu"))
            head = {
                "benchmark": "same_texts",
                "settings": plain(settings),
                "device": device,
                "commit": commit(),
            }
            append_line(settings.log, head | {"llama.cpp": server.system, "PyTorch": torch.__version__})
            texts = Texts(model, server, length, settings)
            for prompt in PROMPTS:
                rows.append(texts.compared(prompt))
                append_line(settings.log, rows[-1])
    print_found(rows)
    check(rows, settings.near)


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
