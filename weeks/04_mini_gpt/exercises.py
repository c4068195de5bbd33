"""The graded exercises of week 4: the norm, the gated MLP, the residual stream, the block, counting and
initializing parameters, rotary positions, one step with a cache, and the whole GPT.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from shared.course.exercise import Exercise, Mistake, NotRight, building, random_int
from shared.evaluation import cross_entropy
from shared.models import gpt
from shared.models.attention import CausalSelfAttention, attention_weights
from shared.models.gpt import MLP, GPTConfig, make_norm
from shared.models.rotary import Rotary
from shared.runtime import seed_everything

# ---- 1. the norm


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _norm_cases(generator: Generator) -> list[tuple]:
    def case(batch: int, time: int, n_embd: int, eps: float, scale: float = 2.0, mean: float = 1.0) -> tuple:
        x = scale * torch.randn(batch, time, n_embd, generator=generator) + mean
        return x, torch.randn(n_embd, generator=generator), torch.randn(n_embd, generator=generator), eps

    return [
        case(2, 3, 5, 1e-5),
        case(4, 2, 8, 0.1),
        case(1, 6, 3, 1e-5),
        case(3, 1, 4, 1e-3, scale=0.1),  # here eps can be seen
        case(2, 5, 2, 0.5),
        case(1, 1, 2, 1e-5),
        case(3, 4, 7, 1e-5, scale=10.0, mean=1000.0),
        (torch.full((1, 2, 4), 3.0), torch.ones(4), torch.zeros(4), 1e-5),  # no variance at all
    ]


def _by_squares(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = x.square().mean(-1, keepdim=True) - mean.square()
    return (x - mean) / (variance + eps).sqrt() * weight + bias


def _normed(x: Tensor, eps: float, dim: int | tuple[int, ...] = -1) -> Tensor:
    return (x - x.mean(dim, keepdim=True)) / (x.var(dim, keepdim=True, unbiased=False) + eps).sqrt()


LAYER_NORM_STUB = """def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    # your code here
    ...
"""


LAYER_NORM = Exercise(
    task="""A norm keeps the numbers that flow through a deep network at one size. Write LayerNorm by hand,
    out of sums, products and roots. `x` is float32 [batch, time, n_embd], `weight` and `bias` are float32
    [n_embd]. At each position, by itself, take away the mean over the channels, divide by
    $\\sqrt{\\text{variance} + \\text{eps}}$, then multiply by `weight` and add `bias`. The variance is the
    mean of the squared differences from the mean; the mean may be a hundred times larger than they are.
    Return the shape of x.""",
    reference=layer_norm,
    cases=_norm_cases,
    forbids=(
        F.layer_norm,
        nn.LayerNorm,
        F.group_norm,
        F.instance_norm,
        F.batch_norm,
        "layer_norm",
        "native_layer_norm",
        "group_norm",
        "instance_norm",
        "batch_norm",
    ),
    differentiable=True,
    tolerance=1e-4,
    stub=LAYER_NORM_STUB,
    mistakes=(
        Mistake(
            "unbiased variance",
            lambda x, weight, bias, eps: (
                (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + eps).sqrt() * weight + bias
            ),
            "The variance was divided by n - 1, which is what x.var and x.std do unless told otherwise."
            " LayerNorm divides by n. At width 768 the difference is small, and weights that were trained"
            " with n then give slightly wrong results.",
        ),
        Mistake(
            "eps outside the root",
            lambda x, weight, bias, eps: (
                (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, unbiased=False) + eps) * weight
                + bias
            ),
            "eps was added to the standard deviation, not to the variance. Where the channels hardly differ,"
            " the two divide by quite different numbers.",
        ),
        Mistake(
            "unbiased deviation plus eps",
            lambda x, weight, bias, eps: (
                (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + eps) * weight + bias
            ),
            "Two things in one line: x.std divides by n - 1 unless told otherwise, and eps was added to the"
            " standard deviation. LayerNorm divides by n, and eps is added to the variance, under the root.",
        ),
        Mistake(
            "the mean is not taken away",
            lambda x, weight, bias, eps: x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias,
            "This divides by the root mean square and leaves the mean in: that is RMSNorm. It is a good norm,"
            " the one that Llama uses, but another one.",
        ),
        Mistake(
            "normed over time",
            lambda x, weight, bias, eps: _normed(x, eps, dim=1) * weight + bias,
            "Mean and variance were taken over the positions, dimension 1. Then each position depends on all"
            " others, the later ones too. A norm looks at the channels of one position.",
        ),
        Mistake(
            "normed over the whole sequence",
            lambda x, weight, bias, eps: _normed(x, eps, dim=(1, 2)) * weight + bias,
            "One mean and one variance were taken for all positions together. Each position has its own;"
            " otherwise the future leaks in, and a padded batch gives other results than a single text.",
        ),
        Mistake(
            "the variance as a difference of squares",
            _by_squares,
            "The variance was computed as the mean of the squares minus the square of the mean. On paper the"
            " two are equal; in float32 they are two large numbers whose difference is small, and what is"
            " left of it is rounding. Take the mean away first, then square.",
        ),
        Mistake(
            "eps is missing",
            lambda x, weight, bias, eps: _normed(x, 0.0) * weight + bias,
            "eps was not used. Where all channels are equal the variance is 0, and 0/0 is nan; where they"
            " hardly differ, eps is what keeps the result small.",
        ),
        Mistake(
            "the bias is added before the weight",
            lambda x, weight, bias, eps: (_normed(x, eps) + bias) * weight,
            "The bias was multiplied by the weight as well. The order is: norm, times weight, plus bias.",
        ),
    ),
    hints=(
        "Mean and variance along the last dimension, with keepdim=True so that they line up with x.",
        (
            "The variance is ((x - mean) ** 2).mean(-1, keepdim=True). x.var divides by n - 1 unless you pass"
            " unbiased=False. eps goes under the root."
        ),
        "(x - mean) / torch.sqrt(variance + eps) * weight + bias.",
    ),
)


# ---- 2. the gated MLP


def gated_mlp(x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
    return (F.silu(x @ gate_weight.T) * (x @ up_weight.T)) @ down_weight.T


def _mlp_cases(generator: Generator) -> list[tuple]:
    def case(batch: int, time: int, n_embd: int, hidden: int) -> tuple[Tensor, ...]:
        shapes = (batch, time, n_embd), (hidden, n_embd), (hidden, n_embd), (n_embd, hidden)
        return tuple(torch.randn(shape, generator=generator) for shape in shapes)

    x, gate_weight, up_weight, down_weight = case(1, 3, 2, 4)
    far = x, gate_weight * 200 / (x @ gate_weight.T).abs().max(), up_weight, down_weight
    return [
        case(2, 3, 4, 7),
        case(3, 2, 5, 5),
        case(1, 4, 3, 8),
        case(4, 1, 2, 3),
        case(1, 1, 6, 1),
        far,  # exp of 200 does not fit in float32
    ]


def _overflowing_silu(z: Tensor) -> Tensor:
    power = z.exp()
    return z * power / (1 + power)


def _silu_by_a_quotient(z: Tensor) -> Tensor:
    return z / (1 + (-z).exp())


GATED_MLP_STUB = """def gated_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
) -> Tensor:
    # your code here
    ...
"""


GATED_MLP = Exercise(
    task="""Llama's MLP, SwiGLU, lets one half of the network decide how much of the other passes. `x` is
    float32 [batch, time, n_embd]; `gate_weight` and `up_weight` are [hidden, n_embd], `down_weight` is
    [n_embd, hidden], in nn.Linear's layout and without biases. Multiply SiLU of the gate branch, element by
    element, with the up branch, and bring the product down again. Return float32 [batch, time, n_embd].
    $\\text{SiLU}(z) = z \\cdot \\text{sigmoid}(z)$; z may be as large as 200, either way, and neither the
    result nor its gradient may become nan.""",
    reference=gated_mlp,
    cases=_mlp_cases,
    differentiable=True,
    tolerance=1e-4,
    stub=GATED_MLP_STUB,
    mistakes=(
        Mistake(
            "the activation is on the wrong branch",
            lambda x, gate_weight, up_weight, down_weight: gated_mlp(x, up_weight, gate_weight, down_weight),
            "SiLU was applied to the up branch. A model trained like this from the start would work as well:"
            " the two matrices only change names. But the weights of Llama and SmolLM2 expect SiLU on the"
            " gate.",
        ),
        Mistake(
            "GELU instead of SiLU",
            lambda x, gate_weight, up_weight, down_weight: (
                (F.gelu(x @ gate_weight.T) * (x @ up_weight.T)) @ down_weight.T
            ),
            "The activation is GELU, so this is GEGLU. The curves look alike, but trained weights notice the"
            " difference in every layer.",
        ),
        Mistake(
            "ReLU instead of SiLU",
            lambda x, gate_weight, up_weight, down_weight: (
                (F.relu(x @ gate_weight.T) * (x @ up_weight.T)) @ down_weight.T
            ),
            "The gate is a ReLU, which makes it ReGLU. SiLU is smooth, and lets a little through below 0.",
        ),
        Mistake(
            "exp overflows",
            lambda x, gate_weight, up_weight, down_weight: (
                (_overflowing_silu(x @ gate_weight.T) * (x @ up_weight.T)) @ down_weight.T
            ),
            "The sigmoid was written as exp(z) / (1 + exp(z)). Above z = 88, exp is infinite in float32, and"
            " infinity over infinity is nan. torch.sigmoid, or F.silu itself, has no such limit.",
        ),
        Mistake(
            "the gradient overflows",
            lambda x, gate_weight, up_weight, down_weight: (
                (_silu_by_a_quotient(x @ gate_weight.T) * (x @ up_weight.T)) @ down_weight.T
            ),
            "SiLU was written as z / (1 + exp(-z)). For z = -200 exp(-z) is infinite, and the result, z /"
            " inf, is still right: 0. The gradient is not: backward multiplies the 0 by exp(-z), and 0 times"
            " infinity is nan. torch.sigmoid, or F.silu itself, has no such limit.",
        ),
        Mistake(
            "sigmoid instead of SiLU",
            lambda x, gate_weight, up_weight, down_weight: (
                ((x @ gate_weight.T).sigmoid() * (x @ up_weight.T)) @ down_weight.T
            ),
            "The gate is a plain sigmoid, which is the older GLU. SiLU is the gate's value times its"
            " sigmoid.",
        ),
        Mistake(
            "no gate",
            lambda x, gate_weight, up_weight, down_weight: F.silu(x @ up_weight.T) @ down_weight.T,
            "`gate_weight` was not used: this is an ordinary MLP with SiLU. The product of two branches is"
            " the point of SwiGLU.",
        ),
        Mistake(
            "the branches are added",
            lambda x, gate_weight, up_weight, down_weight: (
                (F.silu(x @ gate_weight.T) + x @ up_weight.T) @ down_weight.T
            ),
            "The two branches were added. A sum cannot switch anything off; a gate multiplies.",
        ),
        Mistake(
            "no activation",
            lambda x, gate_weight, up_weight, down_weight: (
                ((x @ gate_weight.T) * (x @ up_weight.T)) @ down_weight.T
            ),
            "The gate has no SiLU, so the branches are multiplied as they are. The gate should be nearly 0"
            " for every negative value, and here it changes the sign instead.",
        ),
    ),
    hints=(
        "Three matrix products, and between them one activation and one multiplication.",
        (
            "Two branches of shape [batch, time, hidden]: x @ gate_weight.T and x @ up_weight.T. Only one of"
            " them goes through F.silu."
        ),
        "(F.silu(x @ gate_weight.T) * (x @ up_weight.T)) @ down_weight.T.",
    ),
)


# ---- 3. the residual stream


def mlp_sublayer(x: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
    return x + _mlp(_plain_norm(x), up_weight, down_weight)


def _plain_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _mlp(x: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
    return F.gelu(x @ up_weight.T) @ down_weight.T


def _sublayer_cases(generator: Generator) -> list[tuple]:
    def case(batch: int, time: int, n_embd: int, hidden: int) -> tuple[Tensor, ...]:
        x = 3 * torch.randn(batch, time, n_embd, generator=generator) + 1
        return (
            x,
            torch.randn(hidden, n_embd, generator=generator),
            torch.randn(n_embd, hidden, generator=generator),
        )

    return [case(2, 3, 4, 7), case(3, 2, 6, 5), case(1, 5, 3, 8), case(4, 1, 5, 3), case(1, 1, 4, 1)]


MLP_SUBLAYER_STUB = """def mlp_sublayer(x: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
    # your code here
    ...
"""


MLP_SUBLAYER = Exercise(
    task="""In a deep model the residual stream runs from the embedding to the last layer, and each part only
    adds to it. Write the MLP half of a pre-norm block. `x` is float32 [batch, time, n_embd], `up_weight`
    [hidden, n_embd], `down_weight` [n_embd, hidden], in nn.Linear's layout and without biases. Add to x what
    the MLP makes of the normed x. The norm is F.layer_norm(x, (n_embd,)), the activation F.gelu. Return
    float32 [batch, time, n_embd]; x itself stays.""",
    reference=mlp_sublayer,
    cases=_sublayer_cases,
    forbids=(MLP,),
    differentiable=True,
    stub=MLP_SUBLAYER_STUB,
    mistakes=(
        Mistake(
            "no residual",
            lambda x, up_weight, down_weight: _mlp(_plain_norm(x), up_weight, down_weight),
            "x was not added. Each layer then has to pass on all that the earlier ones found, and the"
            " gradient reaches the first layer only through all the others: deep models do not learn that"
            " way.",
        ),
        Mistake(
            "post-norm",
            lambda x, up_weight, down_weight: _plain_norm(x + _mlp(x, up_weight, down_weight)),
            "The sum was normed, not the MLP's input. That is the block of 2017: it norms the stream itself"
            " in every layer, and without a careful warmup a deep one does not train.",
        ),
        Mistake(
            "the normed stream is added",
            lambda x, up_weight, down_weight: _plain_norm(x) + _mlp(_plain_norm(x), up_weight, down_weight),
            "The MLP's output was added to the normed x. Only the MLP's input is normed; the stream goes past"
            " the norm untouched. Here x was probably overwritten by its norm.",
        ),
        Mistake(
            "no norm",
            lambda x, up_weight, down_weight: x + _mlp(x, up_weight, down_weight),
            "The MLP reads x as it is. The stream grows from layer to layer, so without a norm later layers"
            " get larger and larger inputs.",
        ),
        Mistake(
            "the output is normed",
            lambda x, up_weight, down_weight: x + _plain_norm(_mlp(x, up_weight, down_weight)),
            "The norm stands behind the MLP. Then every layer adds a vector of the same length, whether it"
            " has anything to say or not, and the MLP reads the stream at whatever size it has. There are"
            " models that norm a layer's output (OLMo 2), or input and output (Gemma 2); pre-norm, which is"
            " asked for here, norms the input.",
        ),
        Mistake(
            "the tanh approximation of GELU",
            lambda x, up_weight, down_weight: (
                x + F.gelu(_plain_norm(x) @ up_weight.T, approximate="tanh") @ down_weight.T
            ),
            'This is GELU approximated by a tanh, GPT-2\'s (`approximate="tanh"`). The two differ by less'
            " than a thousandth, and weights trained with one are a little off with the other. Here F.gelu is"
            " asked for as it stands.",
        ),
    ),
    hints=(
        (
            "Two paths: x goes straight through, and a copy goes through the norm and the MLP. They meet in a"
            " sum."
        ),
        "Give the normed x a name of its own, so that x is still there for the sum.",
        "h = F.layer_norm(x, (n_embd,)); return x + F.gelu(h @ up_weight.T) @ down_weight.T.",
    ),
)


# ---- 4. the block


class Block(nn.Module):
    def __init__(self, attn: nn.Module, mlp: nn.Module, norm: Callable[[], nn.Module]):
        super().__init__()
        self.attn_norm = norm()
        self.attn = attn
        self.mlp_norm = norm()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


BLOCK_STUB = """class Block(nn.Module):
    def __init__(self, attn: nn.Module, mlp: nn.Module, norm: Callable[[], nn.Module]):
        super().__init__()
        # your code here: self.attn_norm, self.attn, self.mlp_norm, self.mlp
        ...

    def forward(self, x: Tensor) -> Tensor:
        # [batch, time, n_embd] -> [batch, time, n_embd]
        # your code here
        ...
"""


class _PastMean(nn.Module):
    """In the place of attention: the mean of what came so far, without a parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1) / torch.arange(1, x.size(1) + 1).view(1, -1, 1)


MEAN, ATTENTION = "a mean of the past, RMSNorm", "attention, LayerNorm"
"""What a case's block is made of."""


def _block_parts(made_of: str, n_embd: int) -> tuple[nn.Module, nn.Module, Callable[[], nn.Module]]:
    """An attention, an MLP and what makes a norm, for a block."""
    if made_of == MEAN:
        mlp = nn.Sequential(nn.Linear(n_embd, 3), nn.Tanh(), nn.Linear(3, n_embd))
        return _PastMean(), mlp, partial(nn.RMSNorm, n_embd, eps=1e-5)
    config = GPTConfig(n_embd=n_embd, n_head=2, mlp_hidden=5, bias=False)
    return CausalSelfAttention(n_embd, 2), MLP(config), partial(nn.LayerNorm, n_embd)


@torch.no_grad()
def _spread_weights(module: nn.Module) -> None:
    """Weights so large that each one shows in the output."""
    generator = Generator().manual_seed(1)
    for parameter in module.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(0.5 * drawn + (1.0 if parameter.dim() == 1 else 0.0))


def _block_cases(generator: Generator) -> list[tuple]:
    def case(made_of: str, batch: int, time: int, n_embd: int) -> tuple[str, Tensor]:
        return made_of, 3 * torch.randn(batch, time, n_embd, generator=generator) + 1

    return [
        case(MEAN, 1, 1, 2),
        case(MEAN, 2, 3, 4),
        case(ATTENTION, 1, 4, 6),
        case(ATTENTION, 3, 2, 4),
        case(ATTENTION, 2, 5, 8),
    ]


def _observe_block(answer: Callable, made_of: str, x: Tensor) -> Iterator[tuple[str, Any]]:
    n_embd = x.size(-1)
    reference = Block(*_block_parts(made_of, n_embd))
    _spread_weights(reference)
    attn, mlp, norm = _block_parts(made_of, n_embd)
    block = building.built(answer, reference, attn, mlp, norm)
    if getattr(block, "attn", None) is not attn or getattr(block, "mlp", None) is not mlp:
        raise NotRight(
            "self.attn and self.mlp have to be the very modules that were handed in: who builds a model"
            " decides what is in its blocks."
        )
    _leaves_its_input(block, x)
    leaf = x.clone().requires_grad_()
    out = building.method(block, "forward")(leaf)
    than = "Both norms, attention and the MLP have a part in what a block gives."
    building.uses_every_parameter(block, out, reference(x).detach(), "the output", than)
    yield "the output", out
    if not isinstance(out, Tensor):
        return
    yield from building.gradients_of(block, building.weighted(out))
    yield "the gradient of x", torch.autograd.grad(building.weighted(block(leaf)), leaf)[0]
    optimizer = torch.optim.SGD(block.parameters(), lr=0.01)
    for step in range(1, 4):
        loss = block(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield f"the loss of training step {step}", loss.detach()


@torch.no_grad()
def _leaves_its_input(block: nn.Module, x: Tensor) -> None:
    """Raises NotRight where forward writes into the stream that it was given."""
    given = x.clone()
    building.method(block, "forward")(given)
    if not torch.equal(given, x):
        raise NotRight(
            "forward writes into the x that it was given, as x += ... does. Whoever called the block still"
            " has that tensor, and autograd may need its old values for the gradient, so that backward"
            " fails. x = x + ... makes a new tensor."
        )


class _PostNormBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.attn_norm(x + self.attn(x))
        return self.mlp_norm(x + self.mlp(x))


class _ParallelBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.attn_norm(x)) + self.mlp(self.mlp_norm(x))


class _NormedStreamBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.attn_norm(x)
        x = x + self.attn(x)
        x = self.mlp_norm(x)
        return x + self.mlp(x)


class _NoResidualBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.mlp_norm(self.attn(self.attn_norm(x))))


class _OneNormBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.attn_norm(x))


class _HalfLostBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class _TwiceAddedBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        attended = x + self.attn(self.attn_norm(x))
        return x + attended + self.mlp(self.mlp_norm(attended))


class _NormedOutputsBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn_norm(self.attn(x))
        return x + self.mlp_norm(self.mlp(x))


class _SharedNormBlock(Block):
    def __init__(self, attn: nn.Module, mlp: nn.Module, norm: Callable[[], nn.Module]):
        super().__init__(attn, mlp, norm)
        self.mlp_norm = self.attn_norm


class _InPlaceBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        x += self.attn(self.attn_norm(x))
        x += self.mlp(self.mlp_norm(x))
        return x


class _HalfResidualBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        return self.mlp(self.mlp_norm(x))


class _OtherOrderBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(self.mlp_norm(x))
        return x + self.attn(self.attn_norm(x))


BLOCK = Exercise(
    task="""Build the block, the unit that a transformer repeats. `Block(attn, mlp, norm)` is an nn.Module.
    It is handed two modules, `attn` and `mlp`, each from [batch, time, n_embd] to the same shape, and keeps
    these very modules as `self.attn` and `self.mlp`. `norm` is a function without arguments that makes a new
    norm; it is called twice, for `self.attn_norm` and `self.mlp_norm`. forward(x) is pre-norm: attention
    reads the stream through `attn_norm` and its output is added to the stream; then the MLP reads the new
    stream through `mlp_norm` and its output is added in turn. Nothing else changes the stream.""",
    reference=Block,
    cases=_block_cases,
    observe=_observe_block,
    stub=BLOCK_STUB,
    points=3,
    forbids=(gpt.Block,),
    tolerance=1e-4,
    valid=lambda made_of, x: made_of == MEAN or (made_of == ATTENTION and x.size(-1) % 2 == 0),
    mistakes=(
        Mistake(
            "post-norm",
            _PostNormBlock,
            "The sums were normed, not what the two parts read. That is the order of 2017: the stream itself"
            " passes through a norm at every step, and a deep stack needs a careful warmup to train.",
        ),
        Mistake(
            "attention and MLP side by side",
            _ParallelBlock,
            "The MLP read the stream as it was before attention. Some models do that (GPT-J), since the two"
            " can then run at once; here the MLP has to see what attention has just gathered.",
        ),
        Mistake(
            "the normed stream is added",
            _NormedStreamBlock,
            "x was overwritten by its norm, so the sums begin from the normed stream. Only what the parts"
            " read is normed; the stream passes by.",
        ),
        Mistake(
            "no residuals",
            _NoResidualBlock,
            "Each part replaces the stream. All that is not passed on is lost, and so is the gradient's short"
            " way back: both outputs are added to x.",
        ),
        Mistake(
            "the second residual is missing",
            _HalfResidualBlock,
            "After attention the stream was kept, after the MLP it was replaced: the MLP's output is added"
            " too.",
        ),
        Mistake(
            "the first residual is missing",
            _HalfLostBlock,
            "After the MLP the stream was kept, after attention it was replaced: attention's output is added"
            " too.",
        ),
        Mistake(
            "the stream is added twice",
            _TwiceAddedBlock,
            "The result holds x two times: attention's sum has it already, and x was added once more at the"
            " end. After the first residual go on with the new stream only.",
        ),
        Mistake(
            "the outputs are normed",
            _NormedOutputsBlock,
            "The norms stand behind attention and MLP: x + norm(part(x)). They belong in front of them, on"
            " what the parts read: x + part(norm(x)).",
        ),
        Mistake(
            "one norm for both",
            _OneNormBlock,
            "attn_norm is used twice and mlp_norm never. Each norm has weights of its own, since the two"
            " parts want different scales.",
        ),
        Mistake(
            "norm is called once",
            _SharedNormBlock,
            "attn_norm and mlp_norm are one module: norm() was called once, and its result has two names. A"
            " step of training on one of them changes the other. Call norm() for each.",
        ),
        Mistake(
            "the stream is changed in place",
            _InPlaceBlock,
            "x += ... writes into the tensor that the caller handed in, and that autograd may need as it was."
            " x = x + ... makes a new one.",
        ),
        Mistake(
            "the MLP comes first",
            _OtherOrderBlock,
            "The MLP is in front of the attention. In every published GPT and Llama attention gathers first,"
            " and weights trained in that order mean nothing in the other.",
        ),
    ),
    hints=(
        "Two lines in forward, each of the form x = x + part(norm(x)).",
        "self.attn_norm = norm() and self.mlp_norm = norm(): two calls, so that each has its own weights.",
        "x = x + self.attn(self.attn_norm(x)), then return x + self.mlp(self.mlp_norm(x)).",
    ),
)


# ---- 5. counting parameters


def count_parameters(vocab_size: int, block_size: int, n_layer: int, n_embd: int) -> int:
    attention = 4 * n_embd * n_embd + 4 * n_embd  # q, k, v, o and their biases
    mlp = 2 * n_embd * 4 * n_embd + 4 * n_embd + n_embd
    norm = 2 * n_embd
    return (vocab_size + block_size) * n_embd + n_layer * (attention + mlp + 2 * norm) + norm


def _parameters_cases(generator: Generator) -> list[tuple]:
    sizes = torch.randint(2, 40, (2, 4), generator=generator).tolist()
    return [
        (7, 3, 1, 2),  # the first is the one that is shown: it can be counted by hand
        (50257, 1024, 12, 768),
        (65, 64, 4, 128),
        (1, 1, 1, 1),
        *(tuple(row) for row in sizes),
    ]


def _observe_count(
    answer: Callable, vocab_size: int, block_size: int, n_layer: int, n_embd: int
) -> Iterator[tuple[str, Any]]:
    count = answer(vocab_size, block_size, n_layer, n_embd)
    if isinstance(count, float):
        raise NotRight(
            "a number of parameters is an int, and it is a float: did a / or a float factor make it one?"
        )
    yield "", count


def _count_without(a_block: int, vocab_size: int, block_size: int, n_layer: int, n_embd: int) -> int:
    """a_block: how often n_embd is missing in each block."""
    return count_parameters(vocab_size, block_size, n_layer, n_embd) - a_block * n_layer * n_embd


COUNT_PARAMETERS_STUB = """def count_parameters(
    vocab_size: int,
    block_size: int,
    n_layer: int,
    n_embd: int,
) -> int:
    # your code here
    ...
"""


COUNT_PARAMETERS = Exercise(
    task="""How large is a GPT? Return the number of parameters, an int, of one built like GPT-2. It has a
    token embedding [vocab_size, n_embd] and a learned position embedding [block_size, n_embd]. Each of its
    n_layer blocks has two LayerNorms (weight and bias), four attention projections n_embd to n_embd, and an
    MLP from n_embd to 4 n_embd and back; all these linear layers have biases. A last LayerNorm follows. The
    output layer shares the token embedding's weight and has no bias. For GPT-2's sizes (50257, 1024, 12,
    768) it is 124,439,808.""",
    reference=count_parameters,
    cases=_parameters_cases,
    observe=_observe_count,
    forbids=(gpt.GPT, gpt.GPT.num_parameters),
    stub=COUNT_PARAMETERS_STUB,
    mistakes=(
        Mistake(
            "the output layer is counted again",
            lambda vocab_size, block_size, n_layer, n_embd: (
                count_parameters(vocab_size, block_size, n_layer, n_embd) + vocab_size * n_embd
            ),
            "The output layer has the token embedding's weight, the very same tensor, so it is counted once."
            " For GPT-2 that is 38.6 million.",
        ),
        Mistake(
            "biases are forgotten",
            lambda vocab_size, block_size, n_layer, n_embd: (
                count_parameters(vocab_size, block_size, n_layer, n_embd) - 9 * n_layer * n_embd
            ),
            "The linear layers' biases are missing: four of n_embd in the attention, one of 4 n_embd and one"
            " of n_embd in the MLP.",
        ),
        Mistake(
            "positions are forgotten",
            lambda vocab_size, block_size, n_layer, n_embd: count_parameters(vocab_size, 0, n_layer, n_embd),
            "The position embedding is missing. It is learned in GPT-2, a vector of n_embd for each of"
            " block_size places.",
        ),
        Mistake(
            "the last norm is forgotten",
            lambda vocab_size, block_size, n_layer, n_embd: (
                count_parameters(vocab_size, block_size, n_layer, n_embd) - 2 * n_embd
            ),
            "One LayerNorm is missing: the one after the last block. A pre-norm stream is never normed"
            " itself, so the output layer needs a norm before it.",
        ),
        Mistake(
            "12 is the number of layers",
            lambda vocab_size, block_size, n_layer, n_embd: (
                (vocab_size + block_size) * n_embd
                + n_layer * (n_layer * n_embd**2 + 13 * n_embd)
                + 2 * n_embd
            ),
            "The 12 in 12 n_embd² was taken for the number of layers. It is 4 + 8: four matrices of the"
            " attention, and two of the MLP that are four times as large. That GPT-2 has 12 layers as well is"
            " chance.",
        ),
        Mistake(
            "norms have no bias",
            lambda vocab_size, block_size, n_layer, n_embd: (
                count_parameters(vocab_size, block_size, n_layer, n_embd) - (2 * n_layer + 1) * n_embd
            ),
            "The LayerNorms were counted with a weight only. Each has a bias of n_embd as well.",
        ),
        Mistake(
            "4 n_embd are missing in each block",
            partial(_count_without, 4),
            "Three things in a block have 4 n_embd parameters, and one of them was not counted: the biases of"
            " the four attention projections, the bias of the MLP's inner layer, or the two LayerNorms.",
        ),
        Mistake(
            "5 n_embd are missing in each block",
            partial(_count_without, 5),
            "The MLP's two biases have 4 n_embd and n_embd parameters. They were not counted.",
        ),
        Mistake(
            "3 n_embd are missing in each block",
            partial(_count_without, 3),
            "The bias of the MLP's inner layer has 4 n_embd parameters, as many as the layer has outputs, and"
            " was counted with n_embd. Or one of the attention's four biases was counted, and three not.",
        ),
        Mistake(
            "2 n_embd are missing in each block",
            partial(_count_without, 2),
            "A block has two LayerNorms, one in front of the attention and one in front of the MLP, each with"
            " a weight and a bias. One of the two was counted, or both without their biases.",
        ),
        Mistake(
            "n_embd is missing in each block",
            partial(_count_without, 1),
            "One bias was not counted. The likeliest are the MLP's second one, n_embd for the way back, and"
            " that of the attention's output projection.",
        ),
        Mistake(
            "no output projection in the attention",
            lambda vocab_size, block_size, n_layer, n_embd: (
                count_parameters(vocab_size, block_size, n_layer, n_embd)
                - n_layer * (n_embd * n_embd + n_embd)
            ),
            "The attention was counted with three projections. Besides queries, keys and values there is the"
            " output projection, which combines the heads.",
        ),
    ),
    hints=(
        (
            "A linear layer from a to b with a bias has a * b + b parameters, a LayerNorm 2 * n_embd. Count"
            " one block first."
        ),
        (
            "A block: 4 n_embd² + 4 n_embd in the attention, 8 n_embd² + 5 n_embd in the MLP, 4 n_embd in its"
            " two norms. What is there besides the blocks?"
        ),
        "(vocab_size + block_size) * n_embd + n_layer * (12 * n_embd**2 + 13 * n_embd) + 2 * n_embd.",
    ),
)


# ---- 6. initialization


@torch.no_grad()
def initialize(model: nn.Module, n_layer: int) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            into_stream = name.endswith(("o_proj", "down_proj"))
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * n_layer) if into_stream else 0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            nn.init.ones_(module.weight)


def _initialize_cases(generator: Generator) -> list[tuple]:
    return [
        ("nano", 2, 64, False),
        ("nano", 3, 64, True),
        ("mini", 2, 64, False),
        ("nano", 8, 64, True),
        ("mini", random_int(generator, 3, 7), 64, False),
    ]


def _observe_initialize(
    answer: Callable, preset: str, n_layer: int, n_embd: int, bias: bool
) -> Iterator[tuple[str, Any]]:
    config = GPTConfig.preset(preset, n_layer=n_layer, n_embd=n_embd, n_head=2, bias=bias, vocab_size=300)
    model = MiniGPT(config, partial(CausalSelfAttention, bias=bias), Block)
    _spread_weights(model)
    before = dict(model.named_parameters())
    numbers = {name: parameter.detach().clone() for name, parameter in before.items()}
    seed_everything(int(n_layer))
    answer(model, n_layer)
    after = dict(model.named_parameters())
    if any(after[name] is not parameter for name, parameter in before.items()):
        raise NotRight(
            "a parameter was replaced by a new one. An optimizer, or a tied output layer, would still"
            " hold the old one: fill the numbers in place, as nn.init.normal_ does."
        )
    if any(parameter.grad_fn is not None or not parameter.requires_grad for parameter in after.values()):
        raise NotRight("the parameters are not trainable any more: work under torch.no_grad().")
    _fills_everything(model, numbers)
    drawn = {name: p.detach().clone() for name, p in after.items() if p.dim() == 2}
    for name, parameter in after.items():
        if parameter.dim() == 1:
            yield name, parameter.detach().clone()
    for name, values in drawn.items():
        _check_drawn(name, values, n_layer)
    first = list(drawn.values())
    if any(torch.equal(a, b) for at, a in enumerate(first) for b in first[:at]):
        raise NotRight("two weights got the very same numbers: draw each anew, without setting a seed.")
    answer(model, n_layer)
    if all(torch.equal(drawn[name], after[name]) for name in drawn):
        raise NotRight("each call makes the same numbers: the seed belongs to whoever calls, not in here.")


def _fills_everything(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Raises NotRight for parameters that kept their numbers, and for constants that are others."""
    kept, off = {}, {}
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        where = f"the {kind} of nn.{type(model.get_submodule(layer)).__name__}"
        if torch.equal(parameter, before[name]):
            kept.setdefault(where, name)
        elif parameter.dim() == 1 and not bool((parameter == (kind == "weight")).all()):
            off.setdefault(where, name)
    if kept:
        raise NotRight(
            f"what it had before is still in {_listed(kept)}. Every parameter is filled: linear layers and"
            " embeddings are drawn, the weights of norms are 1, biases are 0."
        )
    if off:
        raise NotRight(f"the weight of a norm is 1 everywhere, and a bias is 0; not so {_listed(off)}.")


def _listed(found: dict[str, str]) -> str:
    return ", ".join(f"{where} (`{name}`)" for where, name in found.items())


def _check_drawn(name: str, values: Tensor, n_layer: int) -> None:
    """Raises NotRight where a weight is not drawn from the distribution that the task names."""
    into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
    wanted = 0.02 / math.sqrt(2 * n_layer) if into_stream else 0.02
    kind = "a projection into the stream" if into_stream else "a weight"
    if "embedding" in name:
        kind = "an embedding"
    std = float(values.std())
    if abs(std / wanted - 1) > 0.1:
        factors = {
            "it was not scaled": math.sqrt(2 * n_layer),
            "it was scaled by 1/sqrt(n_layer)": math.sqrt(2),
            "it was scaled by 1/(2 n_layer), without the root": 1 / math.sqrt(2 * n_layer),
        }
        known = [text for text, factor in factors.items() if abs(std / wanted / factor - 1) < 0.08]
        because = f" {known[0]}, as it seems." if known and into_stream else ""
        if not into_stream and abs(std * math.sqrt(2 * n_layer) / wanted - 1) < 0.08:
            because = " Only o_proj and down_proj are scaled."
        raise NotRight(
            f"{kind} has the standard deviation {std:.4f} and should have {wanted:.4f} (`{name}`).{because}"
        )
    if abs(float(values.mean())) > 5 * wanted / math.sqrt(values.numel()):
        raise NotRight(f"{kind} has the mean {float(values.mean()):.4f} and should have 0 (`{name}`).")
    if float(values.abs().max()) < 2.5 * wanted:
        raise NotRight(
            f"{kind} is not drawn from a normal distribution: of {values.numel()} numbers none is farther"
            f" from 0 than 2.5 standard deviations (`{name}`)."
        )


@torch.no_grad()
def _initialize_by(model: nn.Module, n_layer: int, scale: float) -> None:
    initialize(model, n_layer)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.normal_(parameter, std=0.02 * scale)


@torch.no_grad()
def _initialize_all(model: nn.Module, n_layer: int) -> None:
    for name, parameter in model.named_parameters():
        into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
        nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layer) if into_stream else 0.02)


@torch.no_grad()
def _initialize_linears(model: nn.Module, n_layer: int) -> None:
    kept = {name: p.clone() for name, p in model.named_parameters() if "embedding" in name}
    initialize(model, n_layer)
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.copy_(kept[name])


@torch.no_grad()
def _initialize_but(left_out: type[nn.Module], kind: str, model: nn.Module, n_layer: int) -> None:
    """left_out: modules whose parameter `kind` stays what it was."""
    parts = [module for module in model.modules() if isinstance(module, left_out)]
    kept = [(p, p.clone()) for p in (getattr(part, kind, None) for part in parts) if p is not None]
    initialize(model, n_layer)
    for parameter, numbers in kept:
        parameter.copy_(numbers)


@torch.no_grad()
def _initialize_up(model: nn.Module, n_layer: int) -> None:
    initialize(model, n_layer)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layer))


INITIALIZE_STUB = """def initialize(model: nn.Module, n_layer: int) -> None:
    # your code here
    ...
"""


INITIALIZE = Exercise(
    task="""Give a GPT the numbers that it starts from. `model` is any nn.Module made of nn.Linear,
    nn.Embedding and norms (nn.LayerNorm, nn.RMSNorm), `n_layer` its number of blocks. Fill its parameters in
    place: weights of linear layers and embeddings from a normal distribution of mean 0 and standard
    deviation 0.02; those of the projections that write into the residual stream, the modules whose names (in
    `model.named_modules()`) end in `o_proj` and `down_proj`, with $0.02/\\sqrt{2\\, n_{\\text{layer}}}$;
    biases 0; the norms' weights 1 (and their biases, where there are any, 0). Parameters stay the same
    trainable objects. Set no seed: the caller has done that. Return nothing.""",
    reference=initialize,
    cases=_initialize_cases,
    observe=_observe_initialize,
    points=3,
    forbids=(gpt.GPT.init_weights,),
    valid=lambda preset, n_layer, n_embd, bias: n_layer >= 2 and n_embd >= 64 and n_embd % 4 == 0,
    stub=INITIALIZE_STUB,
    mistakes=(
        Mistake(
            "the projections into the stream are not scaled",
            lambda model, n_layer: _initialize_by(model, n_layer, 1.0),
            "o_proj and down_proj have 0.02 like the rest. Each of the 2 n_layer parts then adds as much as"
            " one alone would, and the stream's variance grows with the depth. If your code asks for the two"
            " names, does the test ever match? A module's name ends in `o_proj`, that of its parameter in"
            " `o_proj.weight`.",
        ),
        Mistake(
            "scaled by 1/sqrt(n_layer)",
            lambda model, n_layer: _initialize_by(model, n_layer, n_layer**-0.5),
            "The 2 is missing: each block writes to the stream twice, once from the attention and once from"
            " the MLP.",
        ),
        Mistake(
            "scaled by 1/(2 n_layer)",
            lambda model, n_layer: _initialize_by(model, n_layer, 1 / (2 * n_layer)),
            "The root is missing. Variances of independent parts add up, and a variance is the square of a"
            " standard deviation: to divide it by 2 n_layer, divide the deviation by the root of that.",
        ),
        Mistake(
            "norms and biases are drawn too",
            _initialize_all,
            "Every parameter was drawn, the norms' weights and the biases too. A norm with weights near 0"
            " makes everything behind it vanish: norms start at 1, biases at 0.",
        ),
        Mistake(
            "the embeddings are left out",
            _initialize_linears,
            "The embeddings kept what they had. nn.Embedding draws from N(0, 1), 50 times too large: with"
            " tied weights the first logits are then huge, and the first loss far above ln V.",
        ),
        Mistake(
            "RMSNorm is left out",
            partial(_initialize_but, nn.RMSNorm, "weight"),
            "The weights of RMSNorm kept what they had: it is no nn.LayerNorm, so isinstance(module,"
            " nn.LayerNorm) passes it over. Ask for both, or take every parameter with one dimension.",
        ),
        Mistake(
            "LayerNorm is left out",
            partial(_initialize_but, nn.LayerNorm, "weight"),
            "The weights of LayerNorm kept what they had. That they are 1 in a new module does not help a"
            " model that has been trained: `initialize` fills every parameter.",
        ),
        Mistake(
            "the biases of linear layers are left out",
            partial(_initialize_but, nn.Linear, "bias"),
            "The biases of nn.Linear kept what they had. A new layer draws them from a uniform distribution;"
            " GPT-2 starts them at 0.",
        ),
        Mistake(
            "all projections are scaled",
            _initialize_up,
            "All layers whose name ends in _proj were scaled. Only what writes into the stream is: o_proj and"
            " down_proj. The others read from it.",
        ),
    ),
    hints=(
        "model.named_modules() gives (name, module) for every part; isinstance tells what it is.",
        'name.endswith(("o_proj", "down_proj")) finds what writes into the stream. nn.init.normal_(weight,'
        " std=...), nn.init.zeros_ and nn.init.ones_ fill in place, without a gradient.",
        "for each module: Linear or Embedding: nn.init.normal_(module.weight, std=0.02, or 0.02 /"
        " math.sqrt(2 * n_layer)); a bias that is not None: zeros_; a norm: ones_(module.weight).",
    ),
)


# ---- 7. rotary positions


def rotate(x: Tensor, start: int, theta: float) -> Tensor:
    end = start + x.size(2)
    return Rotary(x.size(3), end, theta).at(slice(start, end))(x)


def _rotate_cases(generator: Generator) -> list[tuple]:
    def case(
        batch: int, n_head: int, time: int, head_dim: int, start: int, theta: float
    ) -> tuple[Tensor, int, float]:
        return torch.randn(batch, n_head, time, head_dim, generator=generator), start, theta

    return [
        case(2, 3, 5, 8, 0, 10000.0),
        case(1, 2, 4, 6, 3, 100.0),
        case(3, 1, 1, 4, 7, 10000.0),  # one new token after seven
        case(2, 2, 6, 2, 0, 10.0),
        case(1, 4, 3, 4, 20, 10000.0),
        case(1, 1, 9, 10, 60, 500.0),
    ]


def _frequencies(pairs: int, theta: float, denominator: int) -> Tensor:
    return theta ** (-torch.arange(pairs) / denominator)


def _turned_with_new_values(x: Tensor, start: int, theta: float) -> Tensor:
    pairs = x.size(-1) // 2
    angle = torch.outer(
        torch.arange(start, start + x.size(2)).float(), _frequencies(pairs, theta, pairs)
    )  # [time, head_dim / 2]
    a, b = x.chunk(2, dim=-1)
    a = a * angle.cos() - b * angle.sin()
    b = a * angle.sin() + b * angle.cos()
    return torch.cat([a, b], dim=-1)


def _turned(
    x: Tensor, start: int, theta: float, sign: int = 1, interleaved: bool = False, halved: bool = False
) -> Tensor:
    """Rotary positions with one of their parts wrong."""
    pairs = x.size(-1) // 2
    frequency = _frequencies(pairs, theta, 2 * pairs if halved else pairs)
    angle = sign * torch.outer(
        torch.arange(start, start + x.size(2)).float(), frequency
    )  # [time, head_dim / 2]
    cos, sin = angle.cos(), angle.sin()
    a, b = x.unflatten(-1, (pairs, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)
    turned = a * cos - b * sin, a * sin + b * cos
    return torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)


def _turned_and_sorted(x: Tensor, start: int, theta: float) -> Tensor:
    a_and_b = _turned(x, start, theta, interleaved=True)
    return torch.cat([a_and_b[..., 0::2], a_and_b[..., 1::2]], dim=-1)


ROTATE_STUB = """def rotate(x: Tensor, start: int, theta: float) -> Tensor:
    # your code here
    ...
"""


ROTATE = Exercise(
    task="""RoPE tells attention where a token stands by turning its query and key. `x` is float32 [batch,
    n_head, time, head_dim], head_dim even; its positions are start, start + 1 and so on. Channels $i$ and $i
    + \\text{head\\_dim}/2$ form a pair $(a, b)$. At position $p$ turn it by the angle $\\varphi = p \\cdot
    \\text{theta}^{-2i/\\text{head\\_dim}}$: it becomes $(a \\cos\\varphi - b \\sin\\varphi,\\ a
    \\sin\\varphi + b \\cos\\varphi)$, in the same two places. Return float32, the same shape. Scores then
    depend only on distances.""",
    reference=rotate,
    cases=_rotate_cases,
    forbids=(Rotary,),
    differentiable=True,
    tolerance=1e-4,
    valid=lambda x, start, theta: x.size(-1) % 2 == 0 and 0 <= start < 100 and theta > 1,
    stub=ROTATE_STUB,
    mistakes=(
        Mistake(
            "neighbours paired instead of halves",
            lambda x, start, theta: _turned(x, start, theta, interleaved=True),
            "Channels 0 and 1 were paired, then 2 and 3. Some models do that, but in the layout that"
            " Hugging Face gives Llama, and that we use, channel i belongs with i + head_dim/2. Mixing them"
            " up with trained weights gives nonsense.",
        ),
        Mistake(
            "cut as neighbours, joined as halves",
            _turned_and_sorted,
            "x was cut into its even and its odd channels (x[..., 0::2] and x[..., 1::2]), and the results"
            " were joined by torch.cat, as if they were halves. So the numbers come back at other places:"
            " channel i belongs with i + head_dim/2, and both stay where they were. x.chunk(2, dim=-1) cuts"
            " as torch.cat joins.",
        ),
        Mistake(
            "turned the wrong way",
            lambda x, start, theta: _turned(x, start, theta, sign=-1),
            "The sign of the sine is wrong, so the pairs turn backwards. A model trained like this from the"
            " start would work; weights trained with the usual direction would not.",
        ),
        Mistake(
            "positions begin at 0",
            lambda x, start, theta: _turned(x, 0, theta),
            "`start` was not used. With a cache, a new token comes in alone, and would always be taken for"
            " the first of the text: all its distances to the keys in the cache are wrong.",
        ),
        Mistake(
            "positions are off by one",
            lambda x, start, theta: _turned(x, start + 1, theta),
            "Positions were counted from start + 1. The first token stands at position 0 and is not turned at"
            " all. A shift of everything would not change the scores, a shift of only some tokens does.",
        ),
        Mistake(
            "b is turned with the new a",
            _turned_with_new_values,
            "a got its new value before b was computed from it, so b is turned with the wrong one. It also"
            " happens in silence: `a, b = out.chunk(2, -1)` are views, and writing into `out` changes them."
            " Compute both from the old values.",
        ),
        Mistake(
            "all pairs turn at one speed",
            lambda x, start, theta: _turned(x, start, 1.0),
            "theta was not used: every pair turns by one radian a step. Then no pair is slow, and a distance"
            " of 6 looks like one of 0: a turn is 6.28 radians.",
        ),
        Mistake(
            "the frequencies grow",
            lambda x, start, theta: _turned(x, start, 1 / theta),
            "The exponent has the wrong sign, so pair 1 turns faster than pair 0, by up to theta radians a"
            " step. The first pair is the fastest, one radian a step, and all others are slower.",
        ),
        Mistake(
            "the frequencies fall too slowly",
            lambda x, start, theta: _turned(x, start, theta, halved=True),
            "The exponent is -2i/head_dim for pair number i; here the 2 is missing. Then the time of the"
            " slowest turn grows with √theta, not with theta, and far distances look like near ones.",
        ),
    ),
    hints=(
        "First the angles, [time, head_dim/2]: positions times frequencies. Then cut x into its two halves.",
        (
            "frequency = theta ** (-torch.arange(0, head_dim, 2) / head_dim); the angles are"
            " torch.outer(positions, frequency). a, b = x.chunk(2, dim=-1)."
        ),
        "With cos and sin of the angles: torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).",
    ),
)


# ---- 8. one step with a cache


def decode_step(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
    return attention_weights(q, keys, None) @ values, keys, values


def _decode_cases(generator: Generator) -> list[tuple]:
    def case(batch: int, n_head: int, past: int, head_dim: int) -> tuple[Tensor, ...]:
        new = [torch.randn(batch, n_head, 1, head_dim, generator=generator) for _ in range(3)]
        return *new, *(torch.randn(batch, n_head, past, head_dim, generator=generator) for _ in range(2))

    q, k, *rest = case(1, 2, 4, 6)
    return [
        case(2, 3, 5, 4),
        case(3, 2, 2, 6),
        case(1, 4, 7, 3),
        case(2, 2, 1, 5),
        case(1, 2, 0, 4),
        case(4, 1, 3, 8),
        (
            400 * q / q.norm(),
            k / k.norm() * 9,
            *rest,
        ),  # scores far apart: exp of the largest does not fit in float32
    ]


def _overflowing_step(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _, keys, values = decode_step(q, k, v, past_k, past_v)
    power = (q @ keys.transpose(-2, -1) / math.sqrt(q.size(-1))).exp()
    return power / power.sum(-1, keepdim=True) @ values, keys, values


def _lined_up_with_the_first(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _, keys, values = decode_step(q, k, v, past_k, past_v)
    return F.scaled_dot_product_attention(q, keys, values, is_causal=True), keys, values


def _without_new(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _, keys, values = decode_step(q, k, v, past_k, past_v)
    return attention_weights(q, past_k, None) @ past_v, keys, values


def _without_past(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _, keys, values = decode_step(q, k, v, past_k, past_v)
    return attention_weights(q, k, None) @ v, keys, values


def _not_kept(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    out, _, _ = decode_step(q, k, v, past_k, past_v)
    return out, past_k, past_v


def _softmax_over_queries(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _, keys, values = decode_step(q, k, v, past_k, past_v)
    scores = q @ keys.transpose(-2, -1) / math.sqrt(q.size(-1))
    return scores.softmax(-2) @ values, keys, values


def _unscaled(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return decode_step(q * math.sqrt(q.size(-1)), k, v, past_k, past_v)


DECODE_STEP_STUB = """def decode_step(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # your code here
    ...
"""


DECODE_STEP = Exercise(
    task="""To write one more token, a model need not read the text again: the keys and values of the past do
    not change. `q`, `k`, `v` are float32 [batch, n_head, 1, head_dim], of the new token alone; `past_k` and
    `past_v` are [batch, n_head, past, head_dim], where past may be 0. The new token attends to the past and
    to itself. Return (out, keys, values): out is [batch, n_head, 1, head_dim], and keys and values are
    [batch, n_head, past + 1, head_dim], oldest first, for the next step. Scores are divided by
    $\\sqrt{\\text{head\\_dim}}$ and may be hundreds apart.""",
    reference=decode_step,
    cases=_decode_cases,
    forbids=(attention_weights,),
    differentiable=True,
    valid=lambda q, k, v, past_k, past_v: q.shape == k.shape == v.shape and q.size(2) == 1,
    stub=DECODE_STEP_STUB,
    mistakes=(
        Mistake(
            "the new key is forgotten",
            _without_new,
            "The token attends to the past only. It should see itself too, as the causal mask's diagonal"
            " says; otherwise the text written with a cache differs from the one written without.",
        ),
        Mistake(
            "only the new key is seen",
            _without_past,
            "The token attends to itself alone, so its output is its own value. The past is in the cache in"
            " order to be read.",
        ),
        Mistake(
            "the new key overwrites the last",
            lambda q, k, v, past_k, past_v: decode_step(q, k, v, past_k[:, :, :-1], past_v[:, :, :-1]),
            "The new key and value took the place of the last ones, so the token before was lost. They belong"
            " one place further.",
        ),
        Mistake(
            "the cache does not grow",
            _not_kept,
            "The old keys and values were returned, so the next step will not know of this token. Each step"
            " has to hand on the longer cache.",
        ),
        Mistake(
            "the new key comes first",
            lambda q, k, v, past_k, past_v: decode_step(q, past_k, past_v, k, v),
            "The new key was put in front of the old ones. The output does not show it yet, but a sliding"
            " window, or a causal mask over several new tokens, relies on the order of the text.",
        ),
        Mistake(
            "a causal mask lined up with the first key",
            _lined_up_with_the_first,
            "With is_causal=True PyTorch lines the mask up with the first key: its one query may see key 0"
            " alone. The newest token stands at the end, where there is nothing to hide: no mask at all.",
        ),
        Mistake(
            "exp overflows",
            _overflowing_step,
            "exp of a score above 88 is infinite in float32, and infinity over infinity is nan. softmax takes"
            " the largest score away first, which changes nothing else.",
        ),
        Mistake(
            "softmax over the queries",
            _softmax_over_queries,
            "softmax ran along dimension -2, the queries. There is one query, so each weight is 1 whatever"
            " its score is, and the output is the sum of all values. The weights of one query over all keys"
            " sum to one: softmax(-1).",
        ),
        Mistake(
            "no 1/sqrt(d)",
            _unscaled,
            "The scores were not divided by √head_dim. One step with a cache must give exactly what the whole"
            " forward gives.",
        ),
    ),
    hints=(
        (
            "First make the cache longer by one, then attend with the one query to all of it. Does a single"
            " newest token need a mask?"
        ),
        (
            "torch.cat along the time dimension, dim=2, the past first. There is no later key, so there is"
            " nothing to hide."
        ),
        (
            "keys = torch.cat([past_k, k], dim=2), values alike; out = (q @ keys.transpose(-2, -1) /"
            " √head_dim).softmax(-1) @ values."
        ),
    ),
)


# ---- 9. the whole GPT


Cached = list[tuple[Tensor, Tensor]]


def _heads(x: Tensor, n_head: int) -> Tensor:
    """[batch, time, n_embd] -> [batch, n_head, time, head_dim]."""
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)


class MiniGPT(nn.Module):
    def __init__(
        self, config: GPTConfig, attention: Callable[..., nn.Module], block: Callable[..., nn.Module]
    ):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(
            block(attention(config.n_embd, config.n_head), MLP(config), partial(make_norm, config))
            for _ in range(config.n_layer)
        )
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.token_embedding.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.token_embedding(idx)
        if self.config.position == "learned":
            x = x + self.position_embedding.weight[: idx.size(1)]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))

    def step(self, idx: Tensor, cache: Cached) -> tuple[Tensor, Cached]:
        x = self.token_embedding(idx) + self.position_embedding.weight[self._read(cache)]
        longer = []
        for number, block in enumerate(self.blocks):
            h = block.attn_norm(x)
            attn = block.attn
            q, k, v = (_heads(p(h), self.config.n_head) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
            past = self._past(cache, number, k, v)
            out, keys, values = decode_step(q, k, v, *past)
            x = x + attn.o_proj(out.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.mlp_norm(x))
            longer.append((keys, values))
        return self.lm_head(self.norm(x)), longer

    def _read(self, cache: Cached) -> int:
        return cache[0][0].size(2) if cache else 0

    def _past(self, cache: Cached, number: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return cache[number] if cache else (k[:, :, :0], v[:, :, :0])

    @torch.no_grad()
    def generate(self, idx: Tensor, length: int) -> Tensor:
        cache: Cached = []
        for t in range(idx.size(1)):
            logits, cache = self.step(idx[:, t : t + 1], cache)
        for n in range(length):
            idx = torch.cat([idx, logits[:, -1:].argmax(-1)], dim=1)
            if n + 1 < length:
                logits, cache = self.step(idx[:, -1:], cache)
        return idx


MINI_GPT_STUB = """class MiniGPT(nn.Module):
    def __init__(
        self,
        config: GPTConfig,
        attention: Callable[..., nn.Module],
        block: Callable[..., nn.Module],
    ):
        super().__init__()
        self.config = config
        # your code here: self.token_embedding, self.position_embedding, self.blocks,
        # self.norm, self.lm_head
        ...

    def forward(self, idx: Tensor) -> Tensor:
        # int64 [batch, time] -> logits [batch, time, vocab_size]
        # your code here
        ...

    def step(self, idx: Tensor, cache: list) -> tuple[Tensor, list]:
        # idx int64 [batch, 1], the next token; cache: [] at first, then a pair (keys,
        # values) for each block, each [batch, n_head, past, head_dim]
        # -> logits [batch, 1, vocab_size], and the cache one position longer
        # your code here
        ...

    def generate(self, idx: Tensor, length: int) -> Tensor:
        # int64 [batch, time] -> int64 [batch, time + length]
        # your code here
        ...
"""


class _TurnedAttention(CausalSelfAttention):
    """Attention with QK-norm that turns its queries and keys itself."""

    def __init__(self, n_embd: int, n_head: int):
        super().__init__(n_embd, n_head, qk_norm=partial(nn.RMSNorm, eps=1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, rotate=partial(rotate, start=0, theta=10000.0))


class _CheckingBlock(Block):
    """The usual block, which says what is wrong with the `norm` that it is handed."""

    def __init__(self, attn: nn.Module, mlp: nn.Module, norm: Callable[[], nn.Module]):
        if isinstance(norm, nn.Module) or norm is make_norm:
            what = "make_norm itself, which wants a config" if norm is make_norm else "a module"
            raise NotRight(
                f"the `norm` that `block` got is {what}. A block calls norm(), twice, so that each of its"
                " norms has weights of its own: hand it a function without arguments that makes a norm,"
                " such as partial(make_norm, config)."
            )
        super().__init__(attn, mlp, norm)


class _ReversedBlock(_CheckingBlock):
    """Not the usual block, so that one sees whether the block that was handed in is used."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.mlp_norm(x)) - self.attn(self.attn_norm(x))


GPT_KINDS = ("classic", "other parts", "modern")


def _gpt_parts(kind: str) -> tuple[str, Callable[..., nn.Module], type[Block]]:
    """The preset, the attention and the block of a case."""
    if kind == "modern":
        return "mini", _TurnedAttention, _CheckingBlock
    if kind == "other parts":
        return "nano", partial(CausalSelfAttention, window=2), _ReversedBlock
    return "nano", CausalSelfAttention, _CheckingBlock


def _gpt_cases(generator: Generator) -> list[tuple]:
    def case(kind: str, n_layer: int, n_head: int, n_embd: int, batch: int, time: int) -> tuple:
        idx = torch.randint(7, (batch, time), generator=generator)
        return kind, n_layer, n_head, n_embd, 9, idx

    return [
        case("classic", 1, 1, 4, 1, 3),
        case("classic", 2, 2, 8, 2, 5),
        case("classic", 3, 4, 8, 3, 4),
        case("classic", 1, 2, 4, 2, 1),
        case("other parts", 2, 2, 8, 2, 5),
        case("modern", 2, 2, 8, 2, 6),
    ]


def _observe_gpt(
    answer: Callable, kind: str, n_layer: int, n_head: int, n_embd: int, block_size: int, idx: Tensor
) -> Iterator[tuple[str, Any]]:
    preset, attention, block = _gpt_parts(kind)
    sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, vocab_size=7)
    config = GPTConfig.preset(preset, **sizes)
    reference = MiniGPT(config, attention, block)
    _spread_weights(reference)
    model = building.built(answer, reference, config, attention, block)
    is_tied = model.lm_head.weight is model.token_embedding.weight
    if is_tied != config.tie_weights:
        raise NotRight(
            f"config.tie_weights is {config.tie_weights}, and the output layer"
            f" {'shares' if is_tied else 'does not share'} the token embedding's weight. To share it is to"
            " have the same Parameter, not a copy: self.lm_head.weight = self.token_embedding.weight."
        )
    logits = building.method(model, "forward")(idx)
    if config.position == "learned":
        is_right = _is_close(logits, reference(idx))
        every = list(range(idx.size(1)))
        read = every if is_right else _positions_read(model, partial(model.forward, idx))
        yield "the positions that forward reads", _named(read)
    yield "the logits", logits
    if not isinstance(logits, Tensor):
        return
    yield from building.gradients_of(model, building.weighted(logits))
    if kind == "classic":
        yield from _observe_writing(model, idx, block_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for number in range(1, 4):
        loss = cross_entropy(model(idx), idx.roll(-1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield f"the loss of training step {number}", loss.detach()


def _observe_writing(model: Any, idx: Tensor, block_size: int) -> Iterator[tuple[str, Any]]:
    """One token after the other with the cache, and generate."""
    whole = model(idx).detach()
    cache: Any = []
    for t in range(idx.size(1)):
        given = list(cache)
        numbers = [part.clone() for part in _tensors(given)]
        logits, longer = building.method(model, "step")(idx[:, t : t + 1], cache)
        if t == 0:
            than = "forward uses it at the same position: compare the two line by line."
            building.uses_every_parameter(model, logits, whole[:, :1], "step 1", than)
        is_right = _is_close(logits, whole[:, t : t + 1])
        read = [t] if is_right else _read_by_step(model, idx[:, t : t + 1], given)
        yield f"the position that step {t + 1} reads", _named(read)
        yield f"the logits of step {t + 1}", logits
        yield f"the cache after step {t + 1}", [part for pair in longer for part in pair]
        _leaves_the_cache(cache, given, numbers)
        cache = longer
    again, _ = model.step(idx[:, t : t + 1], given)
    if not torch.allclose(again, logits, atol=1e-5):
        raise NotRight(
            "the same step, taken twice from one cache, gives two results: `step` keeps something of the text"
            " elsewhere. All that it knows of the past comes with the cache, so that a text can go on in two"
            " ways."
        )
    yield from _observe_generate(model, idx, block_size - idx.size(1))


def _is_close(logits: Any, right: Tensor) -> bool:
    is_alike = isinstance(logits, Tensor) and (logits.shape, logits.dtype) == (right.shape, right.dtype)
    return is_alike and torch.allclose(logits, right, atol=1e-4)


def _named(positions: Iterable[int]) -> str:
    """As text: the properties that the grader looks for in numbers mean nothing here."""
    return ", ".join(map(str, positions)) or "none"


def _read_by_step(model: Any, token: Tensor, cache: list) -> list[int]:
    """The positions whose embeddings a step reads that goes on from the cache."""

    def logits() -> Any:
        copied = [tuple(part.clone() for part in pair) for pair in cache]
        return model.step(token, copied)[0]

    return _positions_read(model, logits)


@torch.no_grad()
def _positions_read(model: Any, logits_of: Callable[[], Any]) -> list[int]:
    """The rows of position_embedding on which logits depend: each in turn changes its sign. Empty where what
    comes back are no logits.
    """
    weight, before = model.position_embedding.weight, logits_of()
    if not isinstance(before, Tensor):
        return []
    read = []
    for position in range(len(weight)):
        weight[position] *= -1
        if not torch.allclose(logits_of(), before, atol=1e-6, equal_nan=True):
            read.append(position)
        weight[position] *= -1
    return read


def _tensors(cache: list) -> list[Tensor]:
    return [part for pair in cache for part in pair if isinstance(part, Tensor)]


def _leaves_the_cache(cache: Any, given: list, numbers: list[Tensor]) -> None:
    """Raises NotRight where `step` changed the cache that it was handed."""
    is_same = len(cache) == len(given) and all(now is before for now, before in zip(cache, given))
    if not is_same or not all(map(torch.equal, _tensors(given), numbers)):
        what = "numbers in a tensor of it" if is_same else "the list itself, by append or cache[i] = ..."
        raise NotRight(
            f"`step` changed the cache that it was given ({what}). Whoever holds that cache, to go on in two"
            " ways from one place, has lost it: return a new, longer one."
        )


def _observe_generate(model: Any, idx: Tensor, length: int) -> Iterator[tuple[str, Any]]:
    fed: list[Tensor] = []
    hook = model.token_embedding.register_forward_hook(lambda module, given, out: fed.append(given[0]))
    written = building.method(model, "generate")(idx, length)
    hook.remove()
    read = sum(tokens.size(1) for tokens in fed)
    _reads_what_is_written(fed, written, idx, length)
    _goes_on_by_the_likeliest(model, written, idx, length)
    yield "what generate writes", written
    if read > idx.size(1) + length:
        raise NotRight(
            f"generate is right, and reads {read} positions to write {length} tokens after {idx.size(1)}: it"
            " begins anew for each token. With the cache each position is read once."
        )
    yield "what generate writes for length 0", model.generate(idx, 0)


def _reads_what_is_written(fed: list[Tensor], written: Any, idx: Tensor, length: int) -> None:
    """Raises NotRight where the tokens that the model was fed are not its own text, each once, in order."""
    if not isinstance(written, Tensor) or written.shape != (len(idx), idx.size(1) + length):
        return
    if any(tokens.shape[:-1] != idx.shape[:1] for tokens in fed) or not fed:
        return
    read = torch.cat(fed, dim=1)
    if read.size(1) > written.size(1) or torch.equal(read, written[:, : read.size(1)]):
        return
    wrong = int((read != written[:, : read.size(1)]).any(0).int().argmax())
    row = int((read[:, wrong] != written[:, wrong]).int().argmax())
    raise NotRight(
        f"at position {wrong} generate fed the token {int(read[row, wrong])}, and the text has"
        f" {int(written[row, wrong])} there. So a token is in the cache twice, or is missing, and all behind"
        " it stand at other positions than in the text: feed each given token once, then each new one once."
    )


@torch.no_grad()
def _goes_on_by_the_likeliest(model: Any, written: Any, idx: Tensor, length: int) -> None:
    """Raises NotRight where a new token is not the one to which forward gives the largest logit."""
    is_text = isinstance(written, Tensor) and written.shape == (len(idx), idx.size(1) + length)
    if not is_text or written.dtype != idx.dtype or length == 0:
        return
    known = (written >= 0) & (written < model.token_embedding.weight.size(0))
    if not torch.equal(written[:, : idx.size(1)], idx) or not bool(known.all()):
        return
    logits = model(written[:, :-1])[:, idx.size(1) - 1 :]
    new = written[:, idx.size(1) :]
    behind = logits.max(-1).values - logits.gather(-1, new[:, :, None])[:, :, 0]
    if bool((behind > 1e-3).any()):
        at = int((behind > 1e-3).any(0).int().argmax())
        row = int(behind[:, at].argmax())
        raise NotRight(
            f"generate puts token {int(new[row, at])} at position {idx.size(1) + at} of row {row}, and after"
            f" what stands there the likeliest is {int(logits[row, at].argmax())}: argmax of the logits at"
            " the last position, for each row by itself."
        )


class _WithoutPositions(MiniGPT):
    def forward(self, idx: Tensor) -> Tensor:
        x = self.token_embedding(idx)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


class _FromOne(MiniGPT):
    def forward(self, idx: Tensor) -> Tensor:
        x = self.token_embedding(idx)
        if self.config.position == "learned":
            x = x + self.position_embedding.weight[1 : idx.size(1) + 1]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


class _AllFromOne(_FromOne):
    def _read(self, cache: Cached) -> int:
        return super()._read(cache) + 1


class _OnePosition(MiniGPT):
    def forward(self, idx: Tensor) -> Tensor:
        x = self.token_embedding(idx)
        if self.config.position == "learned":
            x = x + self.position_embedding.weight[idx.size(1) - 1]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


class _WithoutLastNorm(MiniGPT):
    def forward(self, idx: Tensor) -> Tensor:
        x = self.token_embedding(idx)
        if self.config.position == "learned":
            x = x + self.position_embedding.weight[: idx.size(1)]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


class _OneBlock(MiniGPT):
    def __init__(
        self, config: GPTConfig, attention: Callable[..., nn.Module], block: Callable[..., nn.Module]
    ):
        super().__init__(config, attention, block)
        self.blocks = nn.ModuleList([self.blocks[0]] * config.n_layer)


class _Untied(MiniGPT):
    def __init__(
        self, config: GPTConfig, attention: Callable[..., nn.Module], block: Callable[..., nn.Module]
    ):
        super().__init__(config, attention, block)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)


class _AlwaysFirst(MiniGPT):
    def _read(self, cache: Cached) -> int:
        return 0


class _OneTooFar(MiniGPT):
    def _read(self, cache: Cached) -> int:
        return super()._read(cache) + 1


class _OneBehind(MiniGPT):
    def _read(self, cache: Cached) -> int:
        return max(super()._read(cache) - 1, 0)


class _OneTooFarLater(MiniGPT):
    def _read(self, cache: Cached) -> int:
        return super()._read(cache) + bool(cache)


class _NumberOfBlocks(MiniGPT):
    def _read(self, cache: Cached) -> int:
        return len(cache)


class _StepWithoutResidual(MiniGPT):
    def step(self, idx: Tensor, cache: Cached) -> tuple[Tensor, Cached]:
        x = self.token_embedding(idx) + self.position_embedding.weight[self._read(cache)]
        longer = []
        for number, block in enumerate(self.blocks):
            h, attn = block.attn_norm(x), block.attn
            q, k, v = (_heads(p(h), self.config.n_head) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
            out, keys, values = decode_step(q, k, v, *self._past(cache, number, k, v))
            x = attn.o_proj(out.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.mlp_norm(x))
            longer.append((keys, values))
        return self.lm_head(self.norm(x)), longer


class _StepByBlock(MiniGPT):
    def step(self, idx: Tensor, cache: Cached) -> tuple[Tensor, Cached]:
        x = self.token_embedding(idx) + self.position_embedding.weight[self._read(cache)]
        longer = []
        for number, block in enumerate(self.blocks):
            h = block.attn_norm(x)
            k, v = (_heads(p(h), self.config.n_head) for p in (block.attn.k_proj, block.attn.v_proj))
            pairs = zip(self._past(cache, number, k, v), (k, v))
            keys, values = (torch.cat(pair, dim=2) for pair in pairs)
            longer.append((keys, values))
            x = block(x)
        return self.lm_head(self.norm(x)), longer


class _Forgetful(MiniGPT):
    def _past(self, cache: Cached, number: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k[:, :, :0], v[:, :, :0]


class _StepWithoutLastNorm(MiniGPT):
    def step(self, idx: Tensor, cache: Cached) -> tuple[Tensor, Cached]:
        norm, self.norm = self.norm, nn.Identity()  # type: ignore[assignment]
        result = super().step(idx, cache)
        self.norm = norm
        return result


class _OneAttention(MiniGPT):
    def __init__(
        self, config: GPTConfig, attention: Callable[..., nn.Module], block: Callable[..., nn.Module]
    ):
        layer = attention(config.n_embd, config.n_head)
        super().__init__(config, lambda n_embd, n_head: layer, block)


class _ChangedCache(MiniGPT):
    def step(self, idx: Tensor, cache: Cached) -> tuple[Tensor, Cached]:
        logits, cache[:] = super().step(idx, cache)
        return logits, cache


class _ReadsLastTwice(MiniGPT):
    @torch.no_grad()
    def generate(self, idx: Tensor, length: int) -> Tensor:
        cache: Cached = []
        for token in idx.unbind(1):
            _, cache = self.step(token[:, None], cache)
        for _ in range(length):
            logits, cache = self.step(idx[:, -1:], cache)
            idx = torch.cat([idx, logits[:, -1:].argmax(-1)], dim=1)
        return idx


class _SharedCache(MiniGPT):
    def _past(self, cache: Cached, number: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return super()._past(cache, 0, k, v)


class _Rereading(MiniGPT):
    @torch.no_grad()
    def generate(self, idx: Tensor, length: int) -> Tensor:
        for _ in range(length):
            idx = torch.cat([idx, self(idx)[:, -1:].argmax(-1)], dim=1)
        return idx


MINI_GPT = Exercise(
    task="""Put the whole model together. `MiniGPT(config, attention, block)` is an nn.Module. `config` is a
    GPTConfig; `attention(n_embd, n_head)` makes an attention layer, such as your `MultiHeadAttention` of
    week 3; `block(attn, mlp, norm)` makes a block, such as yours. It has

    - `token_embedding`, an nn.Embedding, and where config.position is "learned" a `position_embedding` for
      the positions 0 to block_size - 1 (where it is "rope", attention knows the positions itself);
    - `blocks`, an nn.ModuleList of n_layer blocks, each with an attention of its own, an `MLP(config)` and
      norms that `make_norm(config)` makes (both from shared.models.gpt);
    - `norm`, one more norm, and `lm_head`, an nn.Linear to vocab_size without bias. Where config.tie_weights
      is true, its weight is the token embedding's.

    forward(idx) takes int64 [batch, time], adds to each token's embedding that of its position, runs the
    blocks in order, norms, and returns the logits [batch, time, vocab_size].

    The rest is for learned positions and blocks like yours (their parts: `attn_norm`, `attn` with `q_proj`,
    `k_proj`, `v_proj`, `o_proj`, `mlp_norm`, `mlp`):

    - step(idx, cache) reads one token more, int64 [batch, 1], and returns (logits [batch, 1, vocab_size],
      the longer cache). Its logits are those of forward at that position; your `decode_step` does the
      attention.
    - The cache is an empty list at first, then a list of one pair (keys, values) for each block, each
      [batch, n_head, past, head_dim]. The one that step was given stays as it is.
    - generate(idx, length) goes on with each row by the likeliest token, `length` times, and returns int64
      [batch, time + length], the given tokens first. It uses the cache: each position is read at most once,
      and the last new token need not be read. time + length is at most config.block_size.""",
    reference=MiniGPT,
    cases=_gpt_cases,
    observe=_observe_gpt,
    stub=MINI_GPT_STUB,
    points=3,
    forbids=(gpt.GPT, gpt.Block, gpt.KVCache),
    tolerance=1e-4,
    valid=lambda kind, n_layer, n_head, n_embd, block_size, idx: (
        kind in GPT_KINDS and n_embd % (2 * n_head) == 0 and 0 < idx.size(1) < block_size
    ),
    mistakes=(
        Mistake(
            "positions are not added",
            _WithoutPositions,
            "forward does not use position_embedding. Attention alone sees a set, not an order: without"
            " positions, only the causal mask tells where a token stands.",
        ),
        Mistake(
            "forward counts positions from 1",
            _FromOne,
            "The first token got the embedding of position 1, and a text of block_size tokens finds none for"
            " its last. Positions count from 0: torch.arange(time).",
        ),
        Mistake(
            "all positions count from 1",
            _AllFromOne,
            "forward and step agree with each other, and both begin at position 1. A text of block_size"
            " tokens finds no embedding for its last, and trained weights expect the first token at 0.",
        ),
        Mistake(
            "all tokens get the last one's position",
            _OnePosition,
            "forward adds the embedding of position time - 1 to every token, so that all stand at one place."
            " Each has its own: rows 0 to time - 1 of the table, [time, n_embd], one for each token.",
        ),
        Mistake(
            "the last norm is missing",
            _WithoutLastNorm,
            "The stream goes to the output layer as it is. A pre-norm stream is never normed on its way and"
            " grows with every block, so it is normed once before the logits.",
        ),
        Mistake(
            "one block for all layers",
            _OneBlock,
            "All layers are one and the same block: [block] * n_layer repeats the object, not its weights."
            " Make a new one for each layer.",
        ),
        Mistake(
            "the weights are not tied",
            _Untied,
            "The output layer has a table of its own although config.tie_weights is true. The state looks the"
            " same, but the two drift apart in training.",
        ),
        Mistake(
            "every step is at position 0",
            _AlwaysFirst,
            "step takes each token for the first of the text. It stands at the position that the cache has"
            " reached: cache[0][0].size(2).",
        ),
        Mistake(
            "positions in step are one too far",
            _OneTooFar,
            "step takes each token for the one behind it. Positions count from 0: with nothing in the cache"
            " the token stands at 0, and with n positions in it at n.",
        ),
        Mistake(
            "positions in step are one too far after the first",
            _OneTooFarLater,
            "The first token stands at 0, which is right, and each later one was taken for the one behind it."
            " Where the cache holds n positions, they are 0 to n - 1, and the new token stands at n:"
            " cache[0][0].size(2), without + 1.",
        ),
        Mistake(
            "the number of blocks is taken for the position",
            _NumberOfBlocks,
            "The cache is a list of one pair for each block, so len(cache) is the number of blocks, the same"
            " in every step. How far the text has come stands in the shape of the keys: cache[0][0].size(2).",
        ),
        Mistake(
            "positions in step lag behind",
            _OneBehind,
            "step gives a token the position of the last one in the cache, cache[0][0].size(2) - 1. It stands"
            " behind that: at cache[0][0].size(2).",
        ),
        Mistake(
            "step has no residual around attention",
            _StepWithoutResidual,
            "step replaces the stream by what attention gives. forward adds it: x = x + attn(attn_norm(x)).",
        ),
        Mistake(
            "step forgets the past",
            _Forgetful,
            "step does not use the keys and values in the cache, so each token sees itself alone.",
        ),
        Mistake(
            "step calls the block",
            _StepByBlock,
            "step fills the cache and then calls block(x), whose attention does not know of it: handed one"
            " position, it sees that token alone. Go through the block's parts, with `decode_step` in the"
            " place of its attention.",
        ),
        Mistake(
            "all blocks read the first block's cache",
            _SharedCache,
            "Each block has keys and values of its own: block number i goes on with cache[i].",
        ),
        Mistake(
            "one attention for all layers",
            _OneAttention,
            "attention(n_embd, n_head) was called once, and its layer stands in every block. Call it for each"
            " block: otherwise all layers look at the text with the same weights.",
        ),
        Mistake(
            "step leaves the last norm out",
            _StepWithoutLastNorm,
            "forward norms the stream before lm_head, and step does not. Its logits have to be those of"
            " forward at the same position.",
        ),
        Mistake(
            "step changes the cache that it was given",
            _ChangedCache,
            "The given list became the longer one, by append or cache[i] = ... Whoever keeps a cache, to go"
            " on in two ways from one place, has lost it. Begin a new list in each call.",
        ),
        Mistake(
            "the last given token is read twice",
            _ReadsLastTwice,
            "generate reads all given tokens, and then the last of them once more to get its logits. Its key"
            " is in the cache twice, and every later token stands one position too far. The logits of the"
            " last step are there already.",
        ),
        Mistake(
            "generate reads everything again",
            _Rereading,
            "generate calls forward on the whole text for each token. The text is right, the work grows with"
            " its square: `step` and the cache read each position once.",
        ),
    ),
    hints=(
        "forward first; compare its parts with the list. Then step: what forward does to one position, with"
        " decode_step in the place of attention's softmax.",
        "In step, for each block: h = block.attn_norm(x); q, k, v from block.attn.q_proj(h) and so on, cut"
        " into heads [batch, n_head, 1, head_dim]; out, keys, values = decode_step(q, k, v, *past); add"
        " block.attn.o_proj of the joined heads; then the MLP's half. An empty past is k[:, :, :0].",
        "heads: x.unflatten(-1, (n_head, -1)).transpose(1, 2); joined: out.transpose(1, 2).flatten(2)."
        " The position is cache[0][0].size(2) if cache else 0. generate feeds idx[:, t : t + 1] for each t,"
        " then logits[:, -1:].argmax(-1), one after the other.",
    ),
)


EXERCISES: tuple[Exercise, ...] = (
    LAYER_NORM,
    GATED_MLP,
    MLP_SUBLAYER,
    BLOCK,
    COUNT_PARAMETERS,
    INITIALIZE,
    ROTATE,
    DECODE_STEP,
    MINI_GPT,
)
