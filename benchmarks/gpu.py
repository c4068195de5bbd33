"""What only a CUDA GPU shows, one measure at a time; `benchmarks/gpu.sh` runs them all.

    python benchmarks/gpu.py --measure gpt2            # tokens/s and MFU of GPT-2's training step, compiled
    python benchmarks/gpu.py --measure cross-entropy   # week 7's Triton kernel beside PyTorch's loss
    python benchmarks/gpu.py --measure decode          # week 12's step as a CUDA graph beside `generate`
    python benchmarks/gpu.py --measure engine          # week 12's engine: are its texts those of `generate`?
    python benchmarks/gpu.py --measure decode --smoke  # tiny, on a CPU: that it runs

A line that begins with "summary:" has the result; one with "not on this device:" or "left out at smoke size:"
what was not measured. What was compared and does not agree is an error.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.commandline import errors_for_people, parse_args
from shared.devices import device_name, pick_device
from shared.models.gpt import GPT, GPTConfig
from shared.registry import without_memory
from shared.runtime import clock, table
from shared.sampling import generate
from shared.sampling.generate import Sampling
from shared.serving.engine import Engine
from shared.serving.generation import Request
from shared.serving.reading import same_bits_in_every_row
from shared.serving.static import StaticDecoder
from shared.training import TrainConfig
from shared.training.kernels import fused_cross_entropy
from shared.training.profiling import CARDS, peak_memory, reset_peak_memory
from shared.training.tricks import NOT_MEASURED, measure_ladder

DATA_SHEETS = {card: teraflops for card, (teraflops, _) in CARDS.items()} | {"H200": 989}
"""Peak TFLOP/s in 16 bits, dense, by a part of the card's name."""
MFU_GOAL = 0.45
"""Of the data sheet's peak, for GPT-2 124M in bf16."""
LOGITS_APART = 1e-3
"""By how much the logits of one model in fp32, computed in two ways, may differ; they are about 1 in size."""
LOSS_APART = 1e-3
"""The same for a loss of bf16 logits; it is about 11."""


@dataclass(frozen=True)
class Settings:
    """Measures one thing."""

    measure: Literal["gpt2", "cross-entropy", "decode", "engine"]
    device: str = "auto"
    smoke: bool = False
    """Tiny, and without torch.compile."""
    turns: int = 3
    """How often each way is timed, in turns; the median counts."""


def gpt2(settings: Settings) -> GPTConfig:
    """GPT-2 124M with its vocabulary up to a multiple of 64; for smoke, a tiny one with the same blocks."""
    if settings.smoke:
        return GPTConfig(vocab_size=320, block_size=64, n_layer=2, n_head=2, n_embd=32)
    return GPTConfig.preset("gpt2", vocab_size=50304)


def not_here(what: str, why: object) -> None:
    """Says what cannot be measured on this device."""
    print(f"not on this device: {what}: {why}")


def left_out(what: str) -> None:
    """Says what a tiny run does not do: compiling takes a CPU a minute."""
    print(f"left out at smoke size: {what}")


def synchronize(device: torch.device) -> None:
    """Waits until the GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(ways: dict[str, Callable[[], object]], turns: int, device: torch.device) -> dict[str, float]:
    """Seconds of each way, in turns, once each has run to warm up: the medians."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(1 + turns):
        for name, work in ways.items():
            synchronize(device)
            started = clock()
            work()
            synchronize(device)
            if turn:
                times[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in times.items()}


# ---- GPT-2's training step


def measure_gpt2(settings: Settings, device: torch.device) -> None:
    """Tokens a second and MFU of training, in bf16 and in fp8, compiled; the batch is 32 x 1,024 tokens."""
    config = gpt2(settings)
    train = TrainConfig(steps=20, batch_size=32, block_size=1024, lr=6e-4, warmup_steps=2, beta2=0.95)
    if settings.smoke:
        train = replace(train, steps=4, batch_size=2, block_size=32)
        left_out("compiled training steps")
    rungs = [
        (name, {"precision": name, "sdpa": True, "fused": True, "compiled": not settings.smoke})
        for name in ("bf16", "fp8")
    ]
    rows = measure_ladder(config, train, device, seeds=(1,), ladder=rungs)
    shown = []
    for row in rows:
        if "ms" not in row:
            not_here(f"training in {row['step']}", row["note"].removeprefix(NOT_MEASURED))
            continue
        row["MFU, data sheet"] = share_of_data_sheet(config, train.block_size, row["tokens/s"], device)
        shown.append(row)
    if not shown:
        raise ValueError("no training step could be measured")
    print(table(shown))
    print("summary: " + "; ".join(speed_in_words(row) for row in shown))


def share_of_data_sheet(
    config: GPTConfig, block_size: int, tokens_per_second: float, device: torch.device
) -> float | None:
    """The MFU over the peak that the card's maker names; None for a card that is not in DATA_SHEETS."""
    name = device_name(device)
    peak = next((teraflops for card, teraflops in DATA_SHEETS.items() if card in name), None)
    if device.type != "cuda" or peak is None:
        return None
    with without_memory():
        flops = GPT(config).flops_per_token(block_size)
    return tokens_per_second * flops / (peak * 1e12)


def speed_in_words(row: dict) -> str:
    """A measured step in a few words."""
    words = f"{row['step']} {row['tokens/s']:,.0f} tokens/s, MFU {row['MFU']:.1%} of the measured peak"
    share = row["MFU, data sheet"]
    if share is not None:
        words += f", {share:.1%} of the data sheet's"
        if row["step"] == "bf16":
            words += f" (goal {MFU_GOAL:.0%}: {'reached' if share >= MFU_GOAL else 'not reached'})"
    return words


# ---- the loss


def measure_cross_entropy(settings: Settings, device: torch.device) -> None:
    """Loss and gradient of bf16 logits: week 7's kernel beside PyTorch's cross-entropy."""
    rows, vocab_size = (8, 320) if settings.smoke else (32 * 1024, 50304)
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(rows, vocab_size, device=device, dtype=torch.bfloat16, generator=generator)
    targets = torch.randint(vocab_size, (rows,), device=device, generator=generator)
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "PyTorch": by_pytorch,
        "PyTorch, compiled": torch.compile(by_pytorch),
        "ours, Triton": fused_cross_entropy,
    }
    if settings.smoke:
        left_out("PyTorch's loss, compiled")
        del losses["PyTorch, compiled"]
    try:
        fused_cross_entropy(logits[:1], targets[:1])
    except ValueError as error:
        not_here("our fused cross-entropy", error)
        del losses["ours, Triton"]

    def both(name: str) -> tuple[Tensor, Tensor]:
        x = logits.detach().requires_grad_()
        loss = losses[name](x, targets)
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    right = both("PyTorch")
    shown = []
    for name in losses:
        reset_peak_memory(device)
        held = peak_memory(device)
        loss, gradient = both(name)
        apart = (gradient - right[1]).abs().max() * rows  # the gradient of a single row's loss
        check_apart(f"{name}: the loss", (loss - right[0]).abs().item(), LOSS_APART)
        check_apart(f"{name}: a gradient", apart.item(), 0.01)  # bf16 has 8 bits for the fraction
        del loss, gradient
        peak = peak_memory(device)
        megabytes = None if peak is None or held is None else (peak - held) / 1e6
        shown.append({"way": name, "MB beyond the logits": megabytes})
    times = take_turns({name: partial(both, name) for name in losses}, settings.turns, device)
    for row in shown:
        row["ms"] = 1000 * times[row["way"]]
        row["times as fast as PyTorch"] = times["PyTorch"] / times[row["way"]]
    print(f"{rows:,} x {vocab_size:,} logits in bf16, forward and backward, on {device_name(device)}")
    print(table(shown))
    words = [f"{row['way']} {row['ms']:.2f} ms ({row['times as fast as PyTorch']:.2f} x)" for row in shown]
    print(f"summary: {'; '.join(words)}")


def by_pytorch(logits: Tensor, targets: Tensor) -> Tensor:
    """What a training step under autocast computes: the loss of the logits in fp32."""
    return F.cross_entropy(logits.float(), targets)


def check_apart(what: str, apart: float, allowed: float) -> None:
    """Raises ValueError where two ways to compute the same differ by more than rounding."""
    if not apart <= allowed:
        raise ValueError(
            f"{what} differs by {apart:.2g}, and {allowed:g} is allowed: one of the two is wrong"
        )


# ---- writing


@dataclass(frozen=True)
class Way:
    """A way to carry out a step of StaticDecoder."""

    name: str
    compiled: bool = False
    captured: bool = False


WAYS = (
    Way("static shapes"),
    Way("CUDA graph", captured=True),
    Way("compiled", compiled=True),
    Way("compiled, CUDA graph", compiled=True, captured=True),
)


def measure_decode(settings: Settings, device: torch.device) -> None:
    """Tokens a second of one text in bf16, greedily: `generate` beside steps of static shapes.

    First, in fp32, each way's logits are held against those of the model that reads the text at once.
    """
    torch.manual_seed(0)
    model = GPT(gpt2(settings)).to(device).eval()
    prompt, new = (8, 8) if settings.smoke else (64, 256)
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(model.config.vocab_size, (1, prompt + 8), generator=generator).to(device)

    def decoder_of(way: Way) -> StaticDecoder:
        return StaticDecoder(model, 1, prompt + new, compiled=way.compiled, captured=way.captured)

    ways, failures = [], []
    for way in possible_ways(settings, device):
        try:
            check_decoder(decoder_of(way), idx)
            ways.append(way)
        except (RuntimeError, ValueError) as error:
            failures.append(f"{way.name}: {type(error).__name__}: {error}")
    model.to(torch.bfloat16)
    ids = idx[0, :prompt].tolist()
    works: dict[str, Callable[[], object]] = {"generate": lambda: list(generate(model, ids, new, 0))}
    for way in ways:
        works[way.name] = partial(written, decoder_of(way), ids, new)
    times = take_turns(works, settings.turns, device)
    shown = [
        {"way": name, "tokens/s": new / seconds, "times as fast as generate": times["generate"] / seconds}
        for name, seconds in times.items()
    ]
    print(f"one text of {prompt} + {new} tokens in bf16, on {device_name(device)}")
    print(table(shown))
    words = [f"{row['way']} {row['tokens/s']:,.0f} tokens/s" for row in shown]
    print(f"summary: {'; '.join(words)}")
    if failures:
        raise ValueError(" | ".join(failures))


def written(decoder: StaticDecoder, ids: list[int], new: int) -> list[int]:
    """A text, greedily."""
    return list(decoder.generate(ids, new, Sampling(temperature=0)))


def possible_ways(settings: Settings, device: torch.device) -> list[Way]:
    """The ways that this device has, and that this size is worth; the others are named."""
    ways = []
    for way in WAYS:
        if way.captured and device.type != "cuda":
            not_here(way.name, "CUDA graphs need CUDA")
        elif way.compiled and settings.smoke:
            left_out(way.name)
        else:
            ways.append(way)
    return ways


def check_decoder(decoder: StaticDecoder, idx: Tensor) -> None:
    """Raises ValueError where the logits of a text that is read step by step are not those of the whole."""
    with torch.inference_mode():
        right = decoder.model(idx)[0]
    begun = idx.size(1) // 2
    for turn in range(2):  # what a replay leaves behind must not matter to the next text
        logits = [decoder.read(idx[:, :begun])[0].clone()]
        logits += [decoder.step(token[None])[0].clone() for token in idx[0, begun:]]
        apart = (torch.stack(logits) - right[begun - 1 :]).abs().max().item()
        check_apart(f"turn {turn + 1}: a logit", apart, LOGITS_APART)


# ---- serving


def measure_engine(settings: Settings, device: torch.device) -> None:
    """The engine's texts, written side by side in fp32, beside those of `generate`: they must be the same."""
    torch.manual_seed(0)
    model = GPT(gpt2(settings)).to(device).eval()
    requests, new = (4, 6) if settings.smoke else (12, 48)
    generator = torch.Generator().manual_seed(1)
    mixed = []
    for number in range(requests):
        length = 5 + 3 * number  # some are longer than what is read at a time
        prompt = torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()
        how = {"temperature": 0.5 * (number % 3), "top_p": 0.9 if number % 2 else None, "seed": number}
        mixed.append(Request(prompt, new - number % 4, **how))
    engine = Engine(model, slots=8, max_length=64 if settings.smoke else 128)
    try:
        generations = [engine.submit(request) for request in mixed]
        texts = [[token.id for token in generation] for generation in generations]
    finally:
        engine.close()
    alone = [
        list(generate(model, r.prompt, r.max_new_tokens, r.temperature, top_p=r.top_p, seed=r.seed))
        for r in mixed
    ]
    same = sum(a == b for a, b in zip(alone, texts))
    print(f"summary: {same} of {len(mixed)} texts ({sum(map(len, texts))} tokens) are those of generate")
    if same < len(mixed):
        raise ValueError(f"{len(mixed) - same} of {len(mixed)} texts are not those of generate")


MEASURES: dict[str, Callable[[Settings, torch.device], None]] = {
    "gpt2": measure_gpt2,
    "cross-entropy": measure_cross_entropy,
    "decode": measure_decode,
    "engine": measure_engine,
}


def main(settings: Settings) -> None:
    """Measures what the settings name."""
    same_bits_in_every_row()
    MEASURES[settings.measure](settings, pick_device(settings.device))


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
