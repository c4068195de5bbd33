"""The graded exercises of week 4: the norm, rotary positions, the gated MLP, the residual stream, one step
with a cache, counting parameters.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from shared.course.exercise import Exercise, Mistake
from shared.models.attention import attention_weights
from shared.models.gpt import Rotary

# ---- 1. the norm


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _norm_cases(generator: Generator) -> list[tuple]:
    def case(batch: int, time: int, n_embd: int, eps: float, scale: float = 2.0) -> tuple:
        x = scale * torch.randn(batch, time, n_embd, generator=generator) + 1
        return x, torch.randn(n_embd, generator=generator), torch.randn(n_embd, generator=generator), eps

    return [
        case(2, 3, 5, 1e-5),
        case(4, 2, 8, 0.1),
        case(1, 6, 3, 1e-5),
        case(3, 1, 4, 1e-3, scale=0.1),  # here eps can be seen
        case(2, 5, 2, 0.5),
        (torch.full((1, 2, 4), 3.0), torch.ones(4), torch.zeros(4), 1e-5),  # no variance at all
    ]


def _normed(x: Tensor, eps: float, dim: int | tuple[int, ...] = -1) -> Tensor:
    return (x - x.mean(dim, keepdim=True)) / (x.var(dim, keepdim=True, unbiased=False) + eps).sqrt()


LAYER_NORM = Exercise(
    task="""A norm keeps the numbers that flow through a deep network at one size. Write LayerNorm by hand,
    without F.layer_norm. `x` is float32 [batch, time, n_embd], `weight` and `bias` are float32 [n_embd]. At
    each position, by itself, take away the mean over the channels, divide by the root of (variance + eps),
    then multiply by `weight` and add `bias`. The variance is the mean of the squared differences from the
    mean. Return the shape of x.""",
    reference=layer_norm,
    cases=_norm_cases,
    mistakes=(
        Mistake(
            "unbiased variance",
            lambda x, weight, bias, eps: (
                (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + eps).sqrt() * weight + bias
            ),
            "The variance was divided by n - 1, which is what x.var and x.std do unless told otherwise."
            " LayerNorm divides by n. At width 768 the difference is small, and no published weights quite"
            " fit.",
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


# ---- 2. rotary positions


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
    ]


def _turned(
    x: Tensor, start: int, theta: float, sign: int = 1, interleaved: bool = False, halved: bool = False
) -> Tensor:
    """Rotary positions with one of their parts wrong."""
    pairs = x.size(-1) // 2
    frequency = theta ** (-torch.arange(pairs) / (2 * pairs if halved else pairs))
    angle = sign * torch.outer(
        torch.arange(start, start + x.size(2)).float(), frequency
    )  # [time, head_dim / 2]
    cos, sin = angle.cos(), angle.sin()
    a, b = x.unflatten(-1, (pairs, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)
    turned = a * cos - b * sin, a * sin + b * cos
    return torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)


ROTATE = Exercise(
    task="""RoPE tells attention where a token stands by turning its query and key. `x` is float32 [batch,
    n_head, time, head_dim], head_dim even; its positions are start, start + 1 and so on. Channels i and i +
    head_dim/2 form a pair (a, b). At position p turn it by the angle p * theta^(-2i/head_dim): it becomes (a
    cos - b sin, a sin + b cos), in the same two places. Return the same shape. Scores then depend only on
    distances.""",
    reference=rotate,
    cases=_rotate_cases,
    mistakes=(
        Mistake(
            "neighbours paired instead of halves",
            lambda x, start, theta: _turned(x, start, theta, interleaved=True),
            "Channels 0 and 1 were paired, then 2 and 3. Some models do that, but in the layout of Llama that"
            " we use channel i belongs with i + head_dim/2. Mixing the two up with trained weights gives"
            " nonsense.",
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


# ---- 3. the gated MLP


def gated_mlp(x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
    return (F.silu(x @ gate_weight.T) * (x @ up_weight.T)) @ down_weight.T


def _mlp_cases(generator: Generator) -> list[tuple]:
    def case(batch: int, time: int, n_embd: int, hidden: int) -> tuple[Tensor, ...]:
        shapes = (batch, time, n_embd), (hidden, n_embd), (hidden, n_embd), (n_embd, hidden)
        return tuple(torch.randn(shape, generator=generator) for shape in shapes)

    return [case(2, 3, 4, 7), case(3, 2, 5, 5), case(1, 4, 3, 8), case(4, 1, 2, 3), case(1, 1, 6, 1)]


GATED_MLP = Exercise(
    task="""Llama's MLP, SwiGLU, lets one half of the network decide how much of the other passes. `x` is
    float32 [batch, time, n_embd]; `gate_weight` and `up_weight` are [hidden, n_embd], `down_weight` is
    [n_embd, hidden], in nn.Linear's layout and without biases. Multiply SiLU of the gate branch, element by
    element, with the up branch, and bring the product down again. Return float32 [batch, time, n_embd].
    SiLU(z) is z * sigmoid(z).""",
    reference=gated_mlp,
    cases=_mlp_cases,
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


# ---- 4. the residual stream


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


MLP_SUBLAYER = Exercise(
    task="""In a deep model the residual stream runs from the embedding to the last layer, and each part only
    adds to it. Write the MLP half of a pre-norm block. `x` is float32 [batch, time, n_embd], `up_weight`
    [hidden, n_embd], `down_weight` [n_embd, hidden], in nn.Linear's layout and without biases. Add to x what
    the MLP makes of the normed x. The norm is F.layer_norm(x, (n_embd,)), the activation F.gelu. Return
    float32 [batch, time, n_embd]; x itself stays.""",
    reference=mlp_sublayer,
    cases=_sublayer_cases,
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
            " has anything to say or not. It belongs in front.",
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


# ---- 5. one step with a cache


def decode_step(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
    return attention_weights(q, keys, None) @ values, keys, values


def _decode_cases(generator: Generator) -> list[tuple]:
    def case(batch: int, n_head: int, past: int, head_dim: int) -> tuple[Tensor, ...]:
        new = [torch.randn(batch, n_head, 1, head_dim, generator=generator) for _ in range(3)]
        return *new, *(torch.randn(batch, n_head, past, head_dim, generator=generator) for _ in range(2))

    return [
        case(2, 3, 5, 4),
        case(3, 2, 2, 6),
        case(1, 4, 7, 3),
        case(2, 2, 1, 5),
        case(1, 2, 0, 4),
        case(4, 1, 3, 8),
    ]


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


def _unscaled(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return decode_step(q * math.sqrt(q.size(-1)), k, v, past_k, past_v)


DECODE_STEP = Exercise(
    task="""To write one more token, a model need not read the text again: the keys and values of the past do
    not change. `q`, `k`, `v` are float32 [batch, n_head, 1, head_dim], of the new token alone; `past_k` and
    `past_v` are [batch, n_head, past, head_dim], where past may be 0. The new token attends to the past and
    to itself. Return (out, keys, values): out is [batch, n_head, 1, head_dim], and keys and values are
    [batch, n_head, past + 1, head_dim], oldest first, for the next step.""",
    reference=decode_step,
    cases=_decode_cases,
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


# ---- 6. counting parameters


def count_parameters(vocab_size: int, block_size: int, n_layer: int, n_embd: int) -> int:
    attention = 4 * n_embd * n_embd + 4 * n_embd  # q, k, v, o and their biases
    mlp = 2 * n_embd * 4 * n_embd + 4 * n_embd + n_embd
    norm = 2 * n_embd
    return (vocab_size + block_size) * n_embd + n_layer * (attention + mlp + 2 * norm) + norm


def _parameters_cases(generator: Generator) -> list[tuple]:
    sizes = torch.randint(2, 40, (2, 4), generator=generator).tolist()
    return [
        (50257, 1024, 12, 768),
        (65, 64, 4, 128),
        (7, 3, 1, 2),
        (1, 1, 1, 1),
        *(tuple(row) for row in sizes),
    ]


COUNT_PARAMETERS = Exercise(
    task="""How large is a GPT? Return the number of parameters, an int, of one built like GPT-2. It has a
    token embedding [vocab_size, n_embd] and a learned position embedding [block_size, n_embd]. Each of its
    n_layer blocks has two LayerNorms (weight and bias), four attention projections n_embd to n_embd, and an
    MLP from n_embd to 4 n_embd and back; all these linear layers have biases. A last LayerNorm follows. The
    output layer shares the token embedding's weight and has no bias. For GPT-2's sizes (50257, 1024, 12, 768)
    it is 124,439,808.""",
    reference=count_parameters,
    cases=_parameters_cases,
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
            "norms have no bias",
            lambda vocab_size, block_size, n_layer, n_embd: (
                count_parameters(vocab_size, block_size, n_layer, n_embd) - (2 * n_layer + 1) * n_embd
            ),
            "The LayerNorms were counted with a weight only. Each has a bias of n_embd as well.",
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


EXERCISES: tuple[Exercise, ...] = (LAYER_NORM, ROTATE, GATED_MLP, MLP_SUBLAYER, DECODE_STEP, COUNT_PARAMETERS)
