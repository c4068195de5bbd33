"""How fast a quantized GPT writes beside the same model in fp32, transformers, bitsandbytes and torchao: SmolLM2, batch 1, one run.

    python benchmarks/decode.py

Prefill is reading the prompt, decode is writing one token after the other; the time to the first token is what a person waits. For each
token that is written, every weight is read from memory once, so the memory's bandwidth, measured here too, sets a limit to decoding that
only smaller weights can raise. Contenders take turns, and the median of several rounds counts, so that a slow minute of the machine does
not meet one of them alone. transformers runs its own `generate` on the same weights; the rest runs ours.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from shared.assets import fetch
from shared.commandline import errors_for_people, parse_args
from shared.models.gpt import GPT
from shared.models.pretrained import load_smollm2, to_hf
from shared.quantization import num_bytes, quantize
from shared.runtime import clock, device_name, table
from shared.sampling import generate


@dataclass(frozen=True)
class Settings:
    """Times prefill, the first token and decoding, and prints them beside each model's size and the memory's limit."""

    prompt_tokens: int = 256
    new_tokens: int = 48
    rounds: int = 3
    """The median of so many rounds counts."""
    others: bool = True
    """Also bitsandbytes and torchao, where they are installed."""


class Stopwatch:
    """When each token came: what transformers calls a streamer."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, ids: Tensor) -> None:
        self.times.append(clock())

    def end(self) -> None:
        pass


def our_times(model: GPT, prompt: list[int], new_tokens: int) -> list[float]:
    """The moments at which generation began and at which each token came."""
    times = [clock()]
    for _ in generate(model, prompt, new_tokens, temperature=0):
        times.append(clock())
    return times


def their_times(model: nn.Module, prompt: list[int], new_tokens: int) -> list[float]:
    """The same of transformers' `generate`. A streamer is given the prompt first."""
    watch, started = Stopwatch(), clock()
    ids = torch.tensor([prompt])
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, streamer=watch,
        pad_token_id=0,
    )  # fmt: skip
    return [started, *watch.times[1:]]


def bandwidth(megabytes: int = 512, repeats: int = 7) -> float:
    """Bytes per second that all threads together read from memory: the best of several sums over an array no cache holds."""
    array = torch.ones(megabytes * 2**18)
    best = float("inf")
    for _ in range(repeats):
        started = clock()
        array.sum()
        best = min(best, clock() - started)
    return array.numel() * 4 / best


def with_bitsandbytes(model: GPT) -> GPT:
    """NF4 by bitsandbytes for all but the output layer, which it cannot tie."""
    import bitsandbytes as bnb

    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]:
        swapped = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        swapped.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, swapped.to("cpu"))
    return model


def with_torchao(model: GPT) -> GPT:
    """int8 weights by torchao for all but the output layer, which it cannot tie."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != "lm_head")
    return model


def contenders(model: GPT, folder: str, others: bool) -> dict[str, tuple[nn.Module, Callable[..., list[float]], int | None]]:
    """Each with its model, how its tokens are timed, and its size in bytes."""
    theirs = AutoModelForCausalLM.from_pretrained(to_hf(model, folder), dtype=torch.float32).eval()
    found = {"transformers, fp32": (theirs, their_times, num_bytes(model)), "ours, fp32": (model, our_times, num_bytes(model))}
    for scheme in ("int8", "int4", "nf4"):
        quantized = quantize(deepcopy(model), scheme)
        found[f"ours, {scheme}"] = (quantized, our_times, num_bytes(quantized))
    for package, build in {"bitsandbytes": with_bitsandbytes, "torchao": with_torchao}.items() if others else ():
        if find_spec(package) is None:
            print(f"{package} is not installed, so it has no row: pip install {package}")
        else:
            found[package] = (build(deepcopy(model)), our_times, None)
    return found


def main(s: Settings) -> list[dict]:
    """Prints the table, and returns its rows."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load_smollm2()
    text = fetch("shakespeare").read_text(encoding="utf-8")[: 8 * s.prompt_tokens]
    prompt = tokenizer.encode(text)[: s.prompt_tokens]
    with tempfile.TemporaryDirectory() as folder:
        found = contenders(model, folder, s.others)
        speed = bandwidth()
        measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in found}
        for number in range(s.rounds + 1):  # the first round warms up
            for name, (contender, times, _) in found.items():
                short = times(contender, prompt[:16], s.new_tokens)
                long = times(contender, prompt, 1)
                if number:
                    measured[name].append((len(prompt) / (long[1] - long[0]), (s.new_tokens - 1) / (short[-1] - short[1]), short[1] - short[0]))
    print(f"{device_name(torch.device('cpu'))}; memory {speed / 1e9:.1f} GB/s; a prompt of {len(prompt)} tokens, {s.new_tokens} new ones after 16")
    rows = []
    for name, (_, _, size) in found.items():
        prefill, decode, first = (statistics.median(values) for values in zip(*measured[name]))
        rows.append({
            "model": name, "prefill tokens/s": prefill, "first token ms": 1000 * first, "decode tokens/s": decode,
            "times transformers": decode / (rows[0]["decode tokens/s"] if rows else decode),
            "MB": size and size / 1e6, "of fp32": size and size / num_bytes(model), "memory's limit tokens/s": size and speed / size,
        })  # fmt: skip
    print("\n" + table(rows))
    return rows


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
