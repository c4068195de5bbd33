"""shared/course/exercise/building.py: what the grader asks of things that a learner builds."""

import pytest
import torch

from shared.course.exercise import NotRight
from shared.course.exercise.building import follows


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_drawn_tokens_may_be_five_standard_deviations_off_and_no_more(share):
    """A binomial count of n draws has the standard deviation √(n p (1 - p))."""
    total = 10_000
    deviation = (total * share * (1 - share)) ** 0.5
    probabilities = torch.tensor([share, 1 - share])
    for times, is_right in ((0, True), (4.8, True), (-4.8, True), (5.4, False), (-5.4, False)):
        first = round(total * share + times * deviation)
        counts = torch.tensor([first, total - first])
        if is_right:
            follows(counts, probabilities, "letters")
        else:
            with pytest.raises(NotRight):
                follows(counts, probabilities, "letters")
