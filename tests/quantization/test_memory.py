"""How much memory a checkpoint takes while it is loaded: counted in tensors that are made, not in time."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from shared import checkpoint
from shared.models.gpt import GPT
from shared.quantization.modules import load_quantized, num_bytes, quantize, save_quantized
from shared.quantization.packing import SCHEMES, PackedWeight
from shared.runtime import ROOT
from tests.helpers import made
from tests.quantization.helpers import CONFIGS, SETTINGS, TIED, gpt, quiet, random


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("options", SETTINGS)
def test_packed_weights_are_loaded_as_they_are(config, options, tmp_path):
    """No weight is ever there in fp32, and none is made more than a few times: from the order of its columns
    to that of the kernel.
    """
    model = quantize(gpt(CONFIGS[config]), **SETTINGS[options], say=quiet)
    folder = save_quantized(model, tmp_path / "m")
    sizes = made(lambda: load_quantized(folder))
    numbers = max(module.in_features * module.out_features for module in packed_weights(model))
    largest = max(numbers, *(tensor.nbytes for tensor in model.parameters()))
    tables = sum(tensor.nbytes for tensor in model.buffers() if tensor.is_floating_point())
    assert max(sizes) <= largest, "a code takes a byte at most, and a number four"
    assert num_bytes(model) <= sum(sizes) <= 8 * num_bytes(model) + 4 * tables


def packed_weights(model: GPT) -> list[PackedWeight]:
    return [module for module in model.modules() if isinstance(module, PackedWeight)]


@pytest.mark.parametrize("shape", [(5, 96), (64, 64), (300, 32)])
@pytest.mark.parametrize("options", SETTINGS)
def test_a_packed_weight_without_values_has_the_types_and_shapes_of_one_with_them(options, shape):
    settings = {name: value for name, value in SETTINGS[options].items() if name != "scheme"}
    make = SCHEMES[SETTINGS[options]["scheme"]]
    full, empty = make(random(*shape), **settings), make(torch.empty(*shape, device="meta"), **settings)
    assert empty.settings == full.settings
    assert {name: (t.shape, t.dtype) for name, t in empty.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in full.state_dict().items()
    }
    assert all(t.is_meta for t in empty.buffers())


@pytest.mark.slow
def test_loading_does_not_import_the_compiler(tmp_path):
    """It takes 180 MB, and seconds."""
    folder = save_quantized(quantize(gpt(TIED), "nf4", say=quiet), tmp_path / "m")
    program = f"""
import sys
from shared.quantization.modules import load_quantized
load_quantized({str(folder)!r})
print("torch._dynamo" in sys.modules, "sympy" in sys.modules)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False False", done.stderr


@pytest.mark.parametrize("config", CONFIGS)
def test_a_plain_checkpoint_is_in_memory_once_while_it_is_loaded(config, tmp_path):
    model = gpt(replace(CONFIGS[config], n_layer=4))
    folder = checkpoint.save(model, tmp_path / "m")
    sizes = made(lambda: checkpoint.load(folder))
    assert num_bytes(model) <= sum(sizes) <= 1.1 * num_bytes(model)


def test_saving_makes_no_second_model(tmp_path):
    model = GPT(TIED)
    assert sum(made(lambda: checkpoint.save(model, tmp_path / "m"))) < 0.1 * num_bytes(model)
