"""Week 8. Which kernel multiplies by packed weights here: the first that is there and computes right."""

from functools import cache

import torch
import torch.nn.functional as F

from shared.quantization.packing import PACKED_ROWS, SCHEMES, PackedWeight

KERNELS = ("native", "torch")
"""What multiplies by packed weights on a CPU, the faster first: `shared.quantization.native`, and PyTorch's
own operations.
"""


@cache
def find_kernel(scheme: str, kernels: tuple[str, ...] = KERNELS) -> tuple[str | None, str]:
    """The first of `kernels` that works on this CPU with weights of this scheme, or None; and why each one
    before it does not.

    A kernel is tried on a small weight.
    """
    reasons: list[str] = []
    for kernel in kernels:
        try:
            if _computes_right(scheme, kernel):
                return kernel, "; ".join(reasons)
            reasons.append(f"{kernel}: it computes something else here")
        except NotImplementedError:
            reasons.append(f"{kernel}: it does not know {scheme}")
        except (AttributeError, RuntimeError) as error:
            # There is no compiler; or this PyTorch has no such operation, or not for this processor.
            reasons.append(f"{kernel}: {str(error).splitlines()[0]}")
    return None, "; ".join(reasons)


def _computes_right(scheme: str, kernel: str) -> bool:
    """Whether a small weight gives the product, and the rows, that it gives without the kernel."""
    weight = torch.linspace(-1, 1, 64 * 64).sin().view(64, 64)
    x = torch.linspace(-1, 1, 128).view(2, 64)
    packed = SCHEMES[scheme](weight)
    rows = packed.rows(slice(None))
    expected = F.linear(x, rows)
    packed.use_kernel(kernel)
    tolerance = 0.02 * expected.abs().max().item()
    close = torch.allclose(packed.product(x), expected, rtol=0.02, atol=tolerance)
    return close and torch.equal(packed.rows(slice(None)), rows)


def with_kernel(packed: PackedWeight, kernels: tuple[str, ...] = KERNELS) -> PackedWeight:
    """The same weight, set to use the first of `kernels` that works, if one does."""
    kernel, _ = find_kernel(packed.settings["scheme"], kernels)
    if kernel and packed.codes.is_cpu and packed.in_features % 32 == 0:
        packed.use_kernel(kernel)
    return packed


def how_computed(scheme: str, device: torch.device, kernels: tuple[str, ...] = KERNELS) -> str:
    """A line for people: how products with such weights are computed on `device`."""
    kernel, why_not = None, f"kernels for packed weights are for CPUs, not {device.type}"
    if device.type == "cpu":
        kernel, why_not = find_kernel(scheme, kernels)
    if kernel is None:
        return (
            f"{scheme}: no kernel multiplies by such weights here ({why_not}): they are unpacked for each"
            " product: less memory, not more speed"
        )
    how = "the course's kernel in C" if kernel == "native" else "PyTorch's kernel"
    without = f" (decoder.c is not used: {why_not})" if why_not else ""
    return (
        f"{scheme}: up to {PACKED_ROWS} rows at a time go through {how}{without}; for more, weights are"
        " unpacked"
    )
