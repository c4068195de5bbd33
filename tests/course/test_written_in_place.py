"""An answer with right values whose gradient cannot be computed, for it overwrites what the gradient needs.

Oracle: PyTorch, which refuses to go back through it.
"""

import pytest
import torch

from shared.course.exercise import Exercise, grade


def squares(x: torch.Tensor) -> torch.Tensor:
    return x * x


def overwriting(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    result = y.log() * x
    y.zero_()  # log needs its input to go back
    return result


def test_it_is_right_and_is_told_that_nothing_can_be_trained_through_it():
    exercise = Exercise(
        task="Square it.",
        reference=squares,
        cases=lambda generator: [(torch.rand(n, generator=generator),) for n in (2, 3)],
        mistakes=(),
        hints=("a", "b", "c"),
        differentiable=True,
    )
    x = torch.rand(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="inplace"):
        overwriting(x).sum().backward()
    verdict = grade(exercise, overwriting)
    assert verdict.status == "solved"
    assert "no model can be trained through it" in verdict.message
    assert "remark" not in grade(exercise, squares).message
