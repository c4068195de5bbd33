"""shared/models/layers.py against PyTorch's own layers: one row or many, in inference or training, whatever
the number of threads.
"""

import subprocess
import sys

import pytest
import torch
from torch import nn

from shared.models.gpt import GPT, GPTConfig
from shared.models.layers import Linear, RMSNorm, swap_modules
from shared.models.rotary import Rotary
from shared.registry import without_memory
from shared.runtime import ROOT


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (1, 1, 64), (2, 64), (3, 5, 64), (0, 64)])
@pytest.mark.parametrize("out", [1, 48, 53])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_pytorchs(shape, out, bias, threads):
    torch.manual_seed(0)
    ours, theirs = Linear(64, out, bias), nn.Linear(64, out, bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        strided = torch.randn(*shape[:-1], 128)[..., ::2]
        torch.testing.assert_close(ours(strided), theirs(strided), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (2, 3, 64)])
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e4, 0.0])
@pytest.mark.parametrize("eps", [1e-5, None])
def test_rmsnorm_is_pytorchs(shape, scale, eps):
    torch.manual_seed(0)
    ours, theirs = RMSNorm(64, eps=eps), nn.RMSNorm(64, eps=eps)
    ours.weight.data = theirs.weight.data = torch.randn(64)
    x = scale * torch.randn(shape)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-7)
        strided = scale * torch.randn(*shape[:-1], 128)[..., ::2]
        torch.testing.assert_close(ours(strided), theirs(strided), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("layer", [Linear(64, 32), RMSNorm(64, eps=1e-5)])
def test_other_types_and_autocast_go_pytorchs_way(layer):
    x = torch.randn(1, 64)
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == type(layer).__base__.forward(layer, x).dtype
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_a_norm_without_a_weight_goes_pytorchs_way():
    ours, theirs = RMSNorm(64, eps=1e-5, elementwise_affine=False), nn.RMSNorm(64, 1e-5, False)
    x = torch.randn(1, 64)
    with torch.inference_mode():
        assert torch.equal(ours(x), theirs(x))


def test_gradients_pass_through_a_single_row():
    layer, x = Linear(8, 4), torch.randn(1, 8, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0, keepdim=True))
    assert layer.weight.grad is not None


def nested() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()))


def test_modules_are_swapped_by_name_in_place_and_no_other_is_touched():
    model = nested()
    outer, inner = model[1], model[1][1]
    new = {"0": nn.Identity(), "1.0": nn.Identity()}
    swap_modules(model, new)
    assert model[0] is new["0"] and model[1][0] is new["1.0"]
    assert model[1] is outer and model[1][1] is inner
    assert [name for name, _ in model.named_modules()] == ["", "0", "1", "1.0", "1.1"]
    x = torch.randn(3, 4)
    assert torch.equal(model(x), x.tanh())


@pytest.mark.parametrize(
    ("name", "error"),
    [("2", AttributeError), ("1.2", AttributeError), ("x.0", AttributeError), ("", ValueError)],
)
def test_a_name_that_is_no_part_of_the_model_is_refused(name, error):
    model = nested()
    before = list(model.modules())
    with pytest.raises(error):
        swap_modules(model, {name: nn.Identity()})
    assert list(model.modules()) == before


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_a_model_without_memory_has_the_names_and_shapes_of_a_real_one(position):
    config = GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=16, position=position)
    with without_memory():
        model = GPT(config)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    real = GPT(config)
    for part in ("named_parameters", "named_buffers"):
        wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in getattr(real, part)()}
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in getattr(model, part)()} == wanted


@pytest.mark.slow
def test_a_model_without_memory_does_not_import_the_compiler():
    program = """
import sys
from shared.models.gpt import GPT, GPTConfig
from shared.models.rotary import Rotary
from shared.registry import without_memory
with without_memory():
    GPT(GPTConfig(position="rope"))
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


class OfAnotherKind(torch.Tensor):
    """As quantized weights of other libraries are: it knows one operation, PyTorch's linear layer."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            return super().__torch_function__(func, types, args, kwargs)
        if func.__name__ in ("bmm", "view", "matmul"):
            raise NotImplementedError(func.__name__)
        return super().__torch_function__(func, types, args, kwargs)


def test_a_weight_of_another_kind_goes_through_pytorchs_own_layer(threads):
    ours = Linear(64, 32)
    x = torch.randn(1, 64)
    expected = ours(x)
    ours.weight = nn.Parameter(ours.weight.detach().as_subclass(OfAnotherKind))
    with torch.inference_mode():
        torch.testing.assert_close(ours(x).as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_rotation_keeps_the_type_of_what_it_turns(dtype):
    """Its tables are in fp32; queries in bf16 beside keys in fp32 would stop at the product."""
    rotary = Rotary(8, 16, 10000.0)
    x = torch.randn(2, 3, 16, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    turned = rotary.at(slice(0, 16))(x)
    assert turned.dtype == dtype
    torch.testing.assert_close(turned, rotary.at(slice(0, 16))(x.float()).to(dtype), atol=0.02, rtol=0.02)
