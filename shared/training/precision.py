"""Week 7. Number formats for the Trainer: tf32, bf16, fp16 with a scaled loss, and fp8.

    Trainer(model, corpus, config, device=device, precision=precision("fp16", device))

Sources: Micikevicius et al., "Mixed Precision Training" (2018); Kalamkar et al., "A Study of BFLOAT16"
(2019); Micikevicius et al., "FP8 Formats for Deep Learning" (2022).

>>> precision("bf16").dtype
torch.bfloat16
"""

import platform
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from shared.devices import CPUINFO
from shared.training.execution import FP32, Precision
from shared.training.fp8 import to_fp8
from shared.training.profiling import matmul_peak


@dataclass(frozen=True)
class Float16(Precision):
    """fp16 with a scaled loss, for `Trainer(precision=...)`.

    fp16 ends at 65504 and, below 6·10⁻⁵, loses bits down to nothing at 6·10⁻⁸. So the loss is multiplied by a
    large number, the scale: small gradients are still there, and are divided by it before they are clipped. A
    step with a gradient that overflows is left out and halves the scale; many good steps double it.

    Where the scale has fallen below 1, overflows are not its fault, and the Trainer stops as it does in fp32.
    """

    dtype: torch.dtype = torch.float16
    scaler: GradScaler = field(default_factory=lambda: GradScaler("cpu"))

    @property
    def skips(self) -> bool:
        return self.scaler.get_scale() >= 1

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def unscale(self, optimizers: list[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)

    def step(self, optimizers: list[torch.optim.Optimizer]) -> None:
        super().step(optimizers)
        before = self.scaler.get_scale()
        self.scaler.update()
        skipped = not optimizers
        if skipped and self.scaler.get_scale() >= before:
            # The loss overflowed, and none of the gradients, so that the scaler has not seen it.
            self.scaler.update(before * self.scaler.get_backoff_factor())

    def state(self) -> dict[str, float]:
        state = self.scaler.state_dict()
        return {"loss_scale": state["scale"], "steps_since_skip": state["_growth_tracker"]}

    def restore(self, state: dict[str, float]) -> None:
        saved = {"scale": state["loss_scale"], "_growth_tracker": state["steps_since_skip"]}
        self.scaler.load_state_dict({**self.scaler.state_dict(), **saved})


@dataclass(frozen=True)
class TF32(Precision):
    """fp32 whose products of matrices round their inputs to TF32: fp32's 8 bits for the exponent, and 10 of
    its 23 for the fraction. All tensors stay fp32; the sums are fp32's.
    """

    def autocast(self, device: torch.device) -> AbstractContextManager:
        return _tf32_products()

    def backward(self, loss: Tensor) -> None:
        with _tf32_products():
            loss.backward()


@contextmanager
def _tf32_products() -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


@dataclass(frozen=True)
class Float8(Precision):
    """Products of the blocks' linear layers in fp8 (see `fp8.py`), the others in bf16 under autocast."""

    dtype: torch.dtype = torch.bfloat16

    def prepare(self, model: nn.Module) -> None:
        to_fp8(model)


PRECISION_NAMES = ("fp32", "tf32", "bf16", "fp16", "fp8")
NEEDED = {"tf32": ((8, 0), "Ampere"), "fp8": ((8, 9), "Ada")}
"""The compute capability of the first NVIDIA cards that can, and what they are called."""


def needed_card(name: str, device: torch.device | str = "cpu") -> str | None:
    """What a format needs and this device is not, as "needs an NVIDIA card ..."; None where it has it."""
    device = torch.device(device)
    if name not in NEEDED:
        return None
    capability, generation = NEEDED[name]
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    if is_nvidia and torch.cuda.get_device_capability(device) >= capability:
        return None
    major, minor = capability
    return f"needs an NVIDIA card of compute capability {major}.{minor} ({generation}) or newer"


def precision(name: str, device: torch.device | str = "cpu") -> Precision:
    """What `Trainer(precision=...)` takes: fp32, tf32, bf16 (autocast), fp16 (autocast and a scaled loss) or
    fp8 (in the blocks' linear layers; bf16 elsewhere).

    Tries one small step. Raises ValueError for another name, and for a format that the device cannot compute
    in.
    """
    device = torch.device(device)
    if name not in PRECISION_NAMES:
        raise ValueError(f"precision={name!r}: must be one of {', '.join(PRECISION_NAMES)}")
    needed = needed_card(name, device)
    if needed is not None:
        raise ValueError(f"precision={name!r} {needed}, not {device}: use fp32 or bf16 there")
    # Where autocast or the scaler switches itself off, it only warns.
    with warnings.catch_warnings(action="ignore"):
        works = _works(_by_name(name, device), device)
    if not works:
        raise ValueError(f"precision={name!r} does not work on {device}: use fp32 there, or another device")
    return _by_name(name, device)


def format_peak(name: str, device: torch.device | str = "cpu", size: int | None = None) -> float:
    """FLOP/s of a large product of matrices in a format, by `matmul_peak`; of fp8, whose steps compute partly
    in bf16, it is bf16's.
    """
    if name == "tf32":
        with _tf32_products():
            return matmul_peak(device, torch.float32, size)
    dtypes = {"fp32": torch.float32, "fp16": torch.float16}
    return matmul_peak(device, dtypes.get(name, torch.bfloat16), size)


def _by_name(name: str, device: torch.device) -> Precision:
    if name == "fp16":
        return Float16(scaler=GradScaler(device.type))
    return {"fp32": FP32, "tf32": TF32(), "bf16": Precision(torch.bfloat16), "fp8": Float8()}[name]


def _works(chosen: Precision, device: torch.device) -> bool:
    """Whether one small step on the device is in this format and has finite gradients."""
    try:
        model = nn.Sequential(nn.Linear(16, 16, device=device))
        chosen.prepare(model)
        with chosen.autocast(device):
            out = model(torch.ones(16, 16, device=device))
        optimizer = torch.optim.SGD(model.parameters())
        chosen.backward(out.float().mean())
        chosen.unscale([optimizer])
        gradients = [p.grad for p in model.parameters()]
        return out.dtype == chosen.dtype and all(
            g is not None and bool(g.isfinite().all()) for g in gradients
        )
    except (RuntimeError, AssertionError):  # a device that torch was built without is an AssertionError
        return False


def bf16_units(device: torch.device | str = "cpu") -> tuple[bool, str]:
    """Whether a CPU or a GPU of CUDA has units for bf16 products, and how one knows and what follows.

    A CPU on Linux says so itself; elsewhere a product in bf16 is timed against one in fp32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        has_units = major >= 8
        how = f"compute capability {major}.{minor}; they come with 8.0"
    elif device.type == "cpu" and platform.system() == "Linux":
        names = {"avx512_bf16", "amx_bf16", "bf16"}  # Intel's and AMD's, Intel's for tiles, Arm's
        flags = names & set(re.findall(r"\w+", CPUINFO.read_text(encoding="utf-8")))
        has_units = bool(flags)
        named = ", ".join(sorted(flags)) if flags else "neither avx512_bf16 nor amx_bf16"
        how = f"/proc/cpuinfo names {named}"
    else:
        ratio = matmul_peak(device, torch.bfloat16) / matmul_peak(device)
        has_units = ratio > 1.2
        how = f"a bf16 product runs at {ratio:.2f} × the speed of fp32"
    if has_units:
        return True, f"bf16 units ({how})"
    consequence = "each number is widened to fp32 and the result rounded, so bf16 saves memory and costs time"
    return False, f"no bf16 units ({how}): {consequence}"
