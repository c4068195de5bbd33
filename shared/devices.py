"""Week 0. Where models compute: the devices of this machine, of which one that computes wrong is not used.

>>> device = pick_device("cpu")
device: cpu (asked for)
"""

import math
import platform
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import chain
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
"""Where Linux names the processor."""
DEVICE_TOLERANCE = 1e-2
"""How far a device's losses may be from the CPU's, as a share of them.

Rounding differs by about 1e-5 between devices, TF32 by 1e-3; a wrong kernel is off by far more.
"""


def devices() -> list[torch.device]:
    """What this machine has, best first; the CPU is always last."""
    accelerators = []
    if torch.cuda.is_available():
        accelerators.append(torch.device("cuda"))
    if torch.backends.mps.is_available():
        accelerators.append(torch.device("mps"))
    return [*accelerators, torch.device("cpu")]


def device_name(device: torch.device) -> str:
    """What a person would call it: the card's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return f"{platform.machine()} {device.type}"


def _cpu_name() -> str:
    with suppress(OSError):
        for line in CPUINFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def training_losses(device: torch.device, steps: int = 20) -> list[float]:
    """Losses of a small fixed regression on `device`.

    Data, first weights and optimizer are the same everywhere, so the losses should be too.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator).to(device)
    y = torch.randn(64, 4, generator=generator).to(device)
    first = torch.randn(16, 32, generator=generator) / 4
    second = torch.randn(32, 4, generator=generator) / 6
    weights = [first.to(device).requires_grad_(), second.to(device).requires_grad_()]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    losses = []
    for _ in range(steps):
        hidden = torch.nn.functional.gelu(torch.nn.functional.layer_norm(x @ weights[0], (32,)))
        loss = (hidden @ weights[1] - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def wrong_by(device: torch.device) -> float:
    """The largest relative difference between 20 training losses on `device` and on the CPU.

    inf where the device crashes or a loss is not finite.
    """
    try:
        losses = training_losses(device)
        expected = training_losses(torch.device("cpu"))
    except RuntimeError:
        return math.inf
    if not all(map(math.isfinite, losses)):
        return math.inf
    return max(abs(loss - right) / right for loss, right in zip(losses, expected))


def pick_device(name: str = "auto", say: Callable[[str], None] = print) -> torch.device:
    """The device to use, and one line that says which and why. "auto" takes the best one that computes right.

    An accelerator is tried against the CPU first (20 small training steps); one that computes wrong is named
    and not used. Raises ValueError for a device that this machine doesn't have, or that was asked for by name
    and computes wrong.
    """
    if name != "auto":
        device = _named_device(name)
        say(f"device: {device} (asked for)")
        return device
    device = _best_device(say)
    say(f"device: {device} ({device_name(device)})")
    return device


@cache
def resolve_device(device: torch.device | str) -> torch.device:
    """The device that `device` stands for: "auto" is the best one that computes right.

    As `pick_device`, for calls in a program: each device is tried once, and only one that computes wrong is
    spoken of. Raises ValueError as it does.
    """
    if isinstance(device, torch.device):
        return device
    return _best_device(print) if device == "auto" else _named_device(device)


def _best_device(say: Callable[[str], None]) -> torch.device:
    for device in devices():
        if _computes_right(device):
            return device
        say(
            f"device: {device} computes wrong results, so it is not used"
            " (see `python -m shared.course doctor`)"
        )
    raise AssertionError("the CPU is always there")


def _named_device(name: str) -> torch.device:
    available = devices()
    names = f"auto, {', '.join(map(str, available))}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"no device is called {name!r}; this machine has: {names}") from None
    count = max(1, torch.cuda.device_count())
    if device.type not in {d.type for d in available} or (device.index or 0) >= count:
        raise ValueError(f"device {name!r} is not on this machine; it has: {names}")
    if not _computes_right(device):
        raise ValueError(
            f"device {name!r} computes wrong results (see `python -m shared.course doctor`): use --device cpu"
        )
    return device


def _computes_right(device: torch.device) -> bool:
    return device.type == "cpu" or wrong_by(device) <= DEVICE_TOLERANCE


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a model computes: the device of its first parameter, or buffer (packed weights are buffers).

    One that has neither computes on the CPU.
    """
    first = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if first is None else first.device
