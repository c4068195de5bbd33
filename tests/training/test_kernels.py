"""shared/training/kernels.py against torch's cross-entropy, in Triton's interpreter.

It runs in a process of its own, because Triton looks at its environment once, when it is imported.
"""

import math
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
import torch.nn.functional as F

from shared.runtime import ROOT
from shared.training.kernels import fused_cross_entropy

MANY = 5000  # more than one block


def by_torch(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())


def both(
    rows: tuple[int, ...],
    vocab_size: int,
    dtype: torch.dtype,
    ignored: float,
    *,
    scale: float = 1.0,
    layout: str = "plain",
    hidden: int = 0,
):
    """(loss, its type, gradient of the logits) by the kernel and by torch.

    layout: how the logits lie in memory; hidden: so many logits at -inf.
    """
    generator = torch.Generator().manual_seed(vocab_size)
    logits = scale * torch.randn(*rows, vocab_size, generator=generator)
    logits[..., :hidden] = -torch.inf
    targets = torch.randint(hidden, vocab_size, rows, generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = -100
    results = []
    for function in (fused_cross_entropy, by_torch):
        x = logits.to(dtype, copy=True).requires_grad_()
        given = x
        if layout == "padded":  # rows that are further apart than they are long
            given = F.pad(x, (0, 3))[..., :vocab_size]
        elif layout == "transposed":
            given = x.mT.contiguous().mT
        loss = function(given, targets)
        (3 * loss).backward()
        results.append((loss.item(), loss.dtype, x.grad))
    return results


def refused() -> list[str]:
    messages = []
    for logits, targets in [((2, 7), (3,)), ((2, 7), (2, 7)), ((7,), ())]:
        try:
            fused_cross_entropy(torch.zeros(logits), torch.zeros(targets))
        except ValueError as error:
            messages.append(str(error))
    return messages


def outside() -> list[float]:
    return [fused_cross_entropy(torch.zeros(2, 7), torch.tensor([3, target])).item() for target in (7, -1, 6)]


@pytest.fixture(scope="module")
def interpreter():
    """Calls a function of this module where TRITON_INTERPRET is set."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        patch.setenv("TRITON_INTERPRET", "1")
        pool.submit(len, ()).result()  # the process starts now, with that variable
        patch.undo()
        yield lambda function, *args, **named: pool.submit(function, *args, **named).result()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "vocab_size", "ignored"),
    [
        ((5,), 65, 0.0),
        ((4,), 1, 0.0),
        ((2, 3), 4096, 0.0),
        ((2, 3), 4097, 0.5),
        ((3,), MANY, 0.0),
        ((2, 2, 2), 130, 0.4),
    ],
)
def test_the_kernel_equals_torch(interpreter, rows, vocab_size, dtype, ignored):
    (loss, kind, grad), (expected, _, expected_grad) = interpreter(both, rows, vocab_size, dtype, ignored)
    assert kind == torch.float32
    assert loss == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["padded", "transposed"])
def test_how_the_logits_lie_in_memory_changes_nothing(interpreter, layout):
    (loss, _, grad), (expected, _, expected_grad) = interpreter(
        both, (2, 3), 70, torch.float32, 0.3, layout=layout
    )
    assert loss == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("changes", [{"scale": 1e4}, {"scale": 1e-4}, {"hidden": 4500}])
def test_logits_that_overflow_a_plain_softmax(interpreter, changes):
    """Far apart, all alike, and a whole first block at -inf."""
    (loss, _, grad), (expected, _, expected_grad) = interpreter(
        both, (3,), MANY, torch.float32, 0.0, **changes
    )
    assert loss == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-7)


def test_without_a_target_that_counts_the_loss_is_nan_as_torchs(interpreter):
    (loss, _, grad), (expected, _, expected_grad) = interpreter(both, (3,), 9, torch.float32, 1.0)
    assert math.isnan(loss)
    assert math.isnan(expected)
    assert grad.isfinite().all() == expected_grad.isfinite().all()


def test_a_target_outside_the_vocabulary_gives_no_number(interpreter):
    above, below, inside = interpreter(outside)
    assert math.isnan(above)
    assert math.isnan(below)
    assert inside == pytest.approx(math.log(7))


def test_shapes_that_do_not_fit_are_refused(interpreter):
    messages = interpreter(refused)
    assert len(messages) == 3
    assert all("give logits [..., vocab_size] and int64 targets [...]" in message for message in messages)


@pytest.mark.slow
def test_a_cpu_without_the_interpreter_is_told_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    imports = "import torch; from shared.training.kernels import fused_cross_entropy"
    program = f"{imports}; fused_cross_entropy(torch.zeros(2, 7), torch.zeros(2, dtype=torch.int64))"
    hide = "import sys; sys.modules['triton'] = None; "  # as where it isn't installed
    for before, message in (
        ("", "runs on a CUDA GPU, not on cpu.*TRITON_INTERPRET=1"),
        (hide, "needs Triton .Linux.: pip install triton"),
    ):
        run = subprocess.run(
            [sys.executable, "-c", before + program], capture_output=True, text=True, cwd=ROOT, timeout=120
        )
        assert re.search(f"ValueError: .*{message}", run.stderr)
