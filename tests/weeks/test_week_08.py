"""weeks/08_quantization: what SmoothQuant and AWQ promise."""

import pytest
import torch

from shared.course.report import load_script

outliers = load_script("08_quantization", "outliers")


def layer(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight [48, 128], and inputs [200, 128] to choose by and to measure on; three channels are large."""
    generator = torch.Generator().manual_seed(seed)
    large = torch.ones(128)
    large[[3, 40, 99]] = 60.0
    weight = torch.randn(48, 128, generator=generator)
    seen, held_out = torch.randn(2, 200, 128, generator=generator) * large
    return weight, seen, held_out


@pytest.mark.parametrize("seed", range(5))
def test_smoothing_changes_no_product_and_shares_what_is_large(seed):
    weight, seen, _ = layer(seed)
    scale = outliers.smooth_scales(weight, seen)
    torch.testing.assert_close((seen / scale) @ (weight * scale).T, seen @ weight.T, atol=1e-3, rtol=1e-4)
    largest = [(seen / scale).abs().amax(0), (weight * scale).abs().amax(0)]
    torch.testing.assert_close(*largest)  # at α = 0.5 both have the same largest value in every channel


@pytest.mark.parametrize("seed", range(5))
def test_awq_is_never_behind_rounding_to_nearest_on_what_it_has_seen(seed):
    weight, seen, held_out = layer(seed)
    exact = seen @ weight.T
    awq = (seen @ outliers.awq_rounded(weight, seen).T - exact).norm()
    nearest = (seen @ outliers._in_int4(weight).T - exact).norm()
    assert awq < 0.9 * nearest  # large channels: there is something to gain
    errors = outliers.errors_of(weight, seen, held_out)
    assert errors["int4_awq"] < errors["int4_nearest"] and errors["int8_smooth"] < errors["int8_both"]
