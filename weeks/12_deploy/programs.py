"""The model in other programs: exported, read by each of them, and raced against PyTorch."""

import logging
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from names import label_of_runs
from own import texts_by
from prompts import Prompts
from shared import checkpoint
from shared.course.workspace import Workspace
from shared.export import save_hf_folder, to_gguf, to_onnx
from shared.export.onnx import OnnxModel
from shared.models.gpt import GPT
from shared.quantization.race import SHORT_PROMPT, Contender, our_times, race, their_times, their_tokens
from shared.runtime import clock
from shared.sampling import generate
from shared.serving.llama_cpp import LlamaCpp

if TYPE_CHECKING:
    from run import Settings

ROUNDING = ("llama.cpp-F16", "llama.cpp-Q8_0")
"""These round the weights, and then write another text."""


@dataclass(frozen=True)
class Program:
    """A program with the model in it."""

    file: Path
    """The model's file, or its folder."""
    model: Any
    """What the functions take."""
    write: Callable[[Any, list[int], int], list[int]]
    """write(model, prompt, new_tokens): the likeliest tokens."""
    times: Callable[[Any, list[int], int], list[float]]
    """As `Contender.times`."""


def race_programs(
    name: str, model: GPT, prompts: Prompts, settings: "Settings", work: Workspace
) -> dict[str, dict[str, float]]:
    """Exports the model, and lets each program go on with the same prompts: how many tokens are as ours, how
    large, how fast, in turns.
    """
    print(f"{label_of_runs(name)}: exporting", flush=True)
    new_tokens = settings.new_tokens
    length = max(settings.prompt_tokens, SHORT_PROMPT) + new_tokens
    with tempfile.TemporaryDirectory() as folder, ExitStack() as at_the_end:
        programs = exported(model, Path(folder))
        programs |= exported_to_llama_cpp(model, Path(folder), length, at_the_end)
        begins = [prompts.part(300 + i, settings.prompt_tokens) for i in range(settings.compared)]
        texts = {
            key: [program.write(program.model, begin, new_tokens) for begin in begins]
            for key, program in programs.items()
        }
        hers = work.mine("TinyEngine", None)
        ours = texts["pytorch"] if hers is None else texts_by(hers, model, begins, new_tokens)
        contenders = {key: Contender(program.model, program.times) for key, program in programs.items()}
        speeds = race(
            contenders, prompts.part(200, settings.prompt_tokens), new_tokens, rounds=settings.rounds
        )
        our_speed = speeds["pytorch"]["decode_tokens_per_second"]
        rows = {}
        for key, program in programs.items():
            row = speeds[key] | {
                "megabytes": num_file_bytes(program.file) / 1e6,
                "texts": len(begins),
                "new_tokens": new_tokens,
            }
            if key not in ROUNDING:
                row["alike"] = min(map(count_common, ours, texts[key]))
            row["over_ours"] = row["decode_tokens_per_second"] / our_speed
            with work.log(f"{name}-{key}", settings) as log:
                log.artifact(text=model.tokenizer.decode(begins[0] + texts[key][0]))
                rows[key] = log.finish(**row)
    return rows


def count_common(a: Sequence[int], b: Sequence[int]) -> int:
    """With how many equal tokens both begin."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def num_file_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


# ---- PyTorch, transformers, ONNX Runtime


def exported(model: GPT, folder: Path) -> dict[str, Program]:
    """PyTorch, transformers and ONNX Runtime, their files in `folder`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # what transformers imports warns there
    disable_progress_bar()
    save_hf_folder(model, folder / "hf", model.tokenizer)
    to_onnx(model, folder / "model.onnx")
    onnx = OnnxModel(folder / "model.onnx", torch.get_num_threads())
    own_file = checkpoint.save(model, folder / "own") / "model.safetensors"
    theirs = AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    return {
        "pytorch": Program(own_file, model, our_tokens, our_times),
        "transformers": Program(folder / "hf", theirs, their_tokens, their_times),
        "onnx": Program(folder / "model.onnx", onnx, onnx_tokens, onnx_times),
    }


def our_tokens(model: GPT, prompt: list[int], new_tokens: int) -> list[int]:
    """The likeliest tokens, by `shared.sampling`."""
    return list(generate(model, prompt, new_tokens, temperature=0))


def onnx_tokens(model: OnnxModel, prompt: list[int], new_tokens: int) -> list[int]:
    """The likeliest tokens, by ONNX Runtime."""
    return run_onnx(model, prompt, new_tokens)[0]


def onnx_times(model: OnnxModel, prompt: list[int], new_tokens: int) -> list[float]:
    """A contender's times by ONNX Runtime."""
    return run_onnx(model, prompt, new_tokens)[1]


def run_onnx(model: OnnxModel, prompt: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens, and the moments at which the text began and each came."""
    tokens: list[int] = []
    times = [clock()]
    past, idx = model.new_cache(), np.array([prompt], np.int64)
    for _ in range(new_tokens):
        logits, past = model(idx, past)
        idx = logits[:, -1].argmax(-1)[:, None]
        tokens.append(int(idx[0, 0]))
        times.append(clock())
    return tokens, times


# ---- llama.cpp


def exported_to_llama_cpp(model: GPT, folder: Path, length: int, at_the_end: ExitStack) -> dict[str, Program]:
    """llama.cpp with three kinds of weights; none where its package is not installed, said aloud.

    length: tokens of the longest text. at_the_end: ends the processes.
    """
    if not find_spec("xllamacpp"):
        print("llama.cpp is not compared: its package xllamacpp is not installed (requirements-test.txt)")
        return {}
    programs = {}
    for kind in ("F32", "F16", "Q8_0"):
        path = to_gguf(model, folder / f"{kind}.gguf", model.tokenizer, kind)
        server = LlamaCpp(path, length, threads=torch.get_num_threads())
        at_the_end.callback(server.close)
        programs[f"llama.cpp-{kind}"] = Program(path, server, LlamaCpp.tokens, LlamaCpp.times)
    return programs
