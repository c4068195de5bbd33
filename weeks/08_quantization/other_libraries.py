"""The same weights in other libraries, as contenders of week 8's race.

A library that is missing has no row, and that is said.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from shared.models.gpt import GPT
from shared.models.layers import swap_modules
from shared.models.pretrained import to_hf
from shared.quantization.race import Contender, our_times, their_times
from shared.sampling import generate


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, bitsandbytes does not warn of each product, nor torchao of its import."""
    loggers = [logging.getLogger(name) for name in ("bitsandbytes", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def installed(package: str) -> bool:
    """Whether a library is there; says so where it is not."""
    there = find_spec(package) is not None
    if not there:
        print(f"{package} is not installed, so it has no row: pip install {package}")
    return there


def with_transformers(model: GPT, folder: str) -> dict[str, Contender]:
    """The same weights in Hugging Face's own class of the model's family."""
    if not installed("transformers"):
        return {}
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(to_hf(model, folder), dtype=torch.float32)
    return {"transformers-fp32": Contender(theirs.eval(), their_times)}


def with_others(model: GPT) -> dict[str, Contender]:
    """Our GPT with the linear layers of bitsandbytes and torchao.

    The output layer stays tied to the embedding, in fp32; transformers leaves it out as well.
    """
    contenders = {}
    for package, functions in LIBRARIES.items():
        if not installed(package):
            continue
        for function in functions:
            row = function.__name__.replace("_", "-")
            try:
                other = function(deepcopy(model))
                list(generate(other, [1, 2], 1))
            except NOT_FOR_THIS_PROCESSOR as error:
                print(f"{row} does not run here, so it has no row: {str(error).splitlines()[0]}")
            else:
                contenders[row] = Contender(other, our_times)
    return contenders


NOT_FOR_THIS_PROCESSOR = (ImportError, NotImplementedError, RuntimeError, AssertionError, ValueError)


def _swap_inner(model: GPT, swapped: Callable[[nn.Linear], nn.Module]) -> GPT:
    inner = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    swap_modules(model, {name: swapped(linear) for name, linear in inner.items()})
    return model


def bitsandbytes_nf4(model: GPT) -> GPT:
    """NF4 with bitsandbytes' Linear4bit."""
    import bitsandbytes as bnb

    def swapped(linear: nn.Linear) -> nn.Module:
        sizes = (linear.in_features, linear.out_features)
        new = bnb.nn.Linear4bit(
            *sizes, bias=linear.bias is not None, compute_dtype=torch.float32, quant_type="nf4"
        )
        new.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4")
        new.bias = linear.bias
        return new.to("cpu")

    return _swap_inner(model, swapped)


def bitsandbytes_int8(model: GPT) -> GPT:
    """LLM.int8() with bitsandbytes' Linear8bitLt."""
    import bitsandbytes as bnb

    def swapped(linear: nn.Linear) -> nn.Module:
        sizes = (linear.in_features, linear.out_features)
        with_bias = linear.bias is not None
        new = bnb.nn.Linear8bitLt(*sizes, bias=with_bias, has_fp16_weights=False, threshold=6.0)
        new.weight = bnb.nn.Int8Params(linear.weight.detach(), requires_grad=False, has_fp16_weights=False)
        new.bias = linear.bias
        return new.to("cpu").eval()

    return _swap_inner(model, swapped)


class InBFloat16(nn.Module):
    """A linear layer whose product is computed in bfloat16, fp32 around it."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner = inner.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        """As the layer's, fp32 in and out."""
        return self.inner(x.bfloat16()).float()


def _is_inner(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name != "lm_head"


def _torchao(model: GPT, config: Any) -> GPT:
    from torchao.quantization import quantize_

    quantize_(model, config, filter_fn=_is_inner)
    return model


def torchao_int8(model: GPT) -> GPT:
    """torchao's int8 weights."""
    from torchao.quantization import Int8WeightOnlyConfig

    return _torchao(model, Int8WeightOnlyConfig())


def torchao_int4(model: GPT) -> GPT:
    """torchao's int4 weights in groups of 32, in the layout that its CPU kernel reads.

    In bfloat16: with fp32 that kernel is ten times slower.
    """
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return _torchao(_swap_inner(model, InBFloat16), PrototypeInt4WeightOnlyConfig(group_size=32))


LIBRARIES = {"bitsandbytes": (bitsandbytes_int8, bitsandbytes_nf4), "torchao": (torchao_int8, torchao_int4)}
"""By package: functions that give our GPT the package's linear layers."""
