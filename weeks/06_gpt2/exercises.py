"""The graded exercises of week 6: initialization, others' weights, scoring choices, packing, reading shards,
accumulated gradients, weight decay, a data-parallel step, MFU.
"""

import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shared.course.exercise import Exercise, Mistake, NotRight, building, random_int
from shared.data.corpus import fixed_windows
from shared.data.shards import ShardedTokens
from shared.evaluation import cross_entropy
from shared.models.config import MODERN
from shared.models.formats import Layout
from shared.models.gpt import GPT, GPTConfig
from shared.models.pretrained import from_hf
from shared.models.weights import build_gpt
from shared.registry import without_memory
from shared.training.optim import build_optimizers

# ---- 1. initialization


def initial_std(name: str, shape: tuple[int, ...], n_layer: int) -> float:
    return _std(name, shape, 0.02 / math.sqrt(2 * n_layer))


def _std(name: str, shape: tuple[int, ...], residual: float, plain: float = 0.02) -> float:
    """residual: of the matrices that write into the residual stream. plain: of all other matrices."""
    if len(shape) < 2:
        return 0.0
    return residual if name.removesuffix(".weight").endswith(("o_proj", "down_proj")) else plain


def _by_block(name: str, shape: tuple[int, ...], n_layer: int) -> float:
    block = next((int(part) for part in name.split(".") if part.isdigit()), 0)
    return _std(name, shape, 0.02 / math.sqrt(2 * (block + 1)))


def _xavier(name: str, shape: tuple[int, ...], n_layer: int) -> float:
    std = math.sqrt(2 / sum(shape))
    return _std(name, shape, residual=std, plain=std)


def _vectors_too(name: str, shape: tuple[int, ...], n_layer: int) -> float:
    any_matrix = (1, 1)
    return initial_std(name.removesuffix(".bias"), any_matrix, n_layer)


def _std_cases(generator: Generator) -> list[tuple]:
    def case(module: str, *sizes: int) -> tuple[str, tuple[int, ...], int]:
        n_layer = random_int(generator, 4, 20)
        n_embd = 4 * random_int(generator, 2, 40)
        block = random_int(generator, 0, n_layer - 1)
        return f"blocks.{block}.{module}", tuple(size * n_embd for size in sizes), n_layer

    return [
        ("blocks.3.attn.o_proj.weight", (768, 768), 12),
        ("blocks.3.attn.q_proj.weight", (768, 768), 12),
        ("norm.weight", (768,), 12),
        ("token_embedding.weight", (50257, 768), 12),
        ("position_embedding.weight", (1024, 768), 12),
        ("lm_head.weight", (1000, 64), 3),
        ("blocks.1.mlp.gate_proj.weight", (128, 64), 3),
        case("attn.o_proj.weight", 1, 1),
        case("mlp.down_proj.weight", 1, 4),
        case("mlp.down_proj.bias", 1),
        case("attn_norm.weight", 1),
    ]


GPT_NAME = re.compile(
    r"(token_embedding|position_embedding|norm|lm_head|blocks\.\d+\.(attn_norm|mlp_norm|attn\.[qkvo]_proj"
    r"|mlp\.(up|gate|down)_proj))\.(weight|bias)"
)


def _is_parameter(name: str, shape: tuple[int, ...], n_layer: int) -> bool:
    """Whether a GPT of n_layer blocks can have it."""
    if not GPT_NAME.fullmatch(name) or n_layer < 1 or not all(shape):
        return False
    blocks = [int(part) for part in name.split(".") if part.isdigit()]
    is_vector = name.endswith("bias") or "norm." in name
    return len(shape) == (1 if is_vector else 2) and max(blocks, default=0) < n_layer


INITIAL_STD = Exercise(
    task="""How large are a GPT's weights before it has learned anything? Return the standard deviation, a
    float, with which the parameter `name` of `shape` is initialized in a GPT-2 of `n_layer` blocks.

    The names are those that `GPT.named_parameters()` gives, for all the GPTs of this course. Outside of the
    blocks: `token_embedding.weight`, `position_embedding.weight`, `norm.weight`, `norm.bias`, and where the
    output layer is not tied, `lm_head.weight`. In block number i: `blocks.i.` and then `attn_norm`,
    `attn.q_proj`, `attn.k_proj`, `attn.v_proj`, `attn.o_proj`, `mlp_norm`, `mlp.up_proj`, `mlp.down_proj` and
    where the MLP is a SwiGLU, `mlp.gate_proj`; each with `.weight` and perhaps `.bias`.

    Embeddings and the weights of linear layers are drawn with 0.02. Two layers in each block, `attn.o_proj`
    and `mlp.down_proj`, add to the residual stream. Their weights are drawn smaller: so that all these
    additions of the whole model together have the variance that a single one would have with 0.02. Biases
    (all 0) and the gains of norms (all 1) begin as constants, which have a standard deviation of 0.""",
    reference=initial_std,
    cases=_std_cases,
    forbids=(GPT,),
    valid=_is_parameter,
    mistakes=(
        Mistake(
            "the residual projections are not scaled",
            lambda name, shape, n_layer: _std(name, shape, 0.02),
            "o_proj and down_proj were drawn with 0.02 like the rest. Each block adds to the stream twice, so"
            " the stream grows with depth.",
        ),
        Mistake(
            "one addition in each block",
            lambda name, shape, n_layer: _std(name, shape, 0.02 / math.sqrt(n_layer)),
            "You counted n_layer additions. A block makes two, one after the attention and one after the MLP:"
            " 2 n_layer in all.",
        ),
        Mistake(
            "the root is forgotten",
            lambda name, shape, n_layer: _std(name, shape, 0.02 / (2 * n_layer)),
            "0.02 was divided by 2 n_layer. It is the variances of independent summands that add up, so the"
            " standard deviation takes the root.",
        ),
        Mistake(
            "the block's own number",
            _by_block,
            "The number of the block was used in place of how many there are. In GPT-2 all blocks start"
            " alike, the first one too.",
        ),
        Mistake(
            "Xavier",
            _xavier,
            "The deviation was worked out from the shape, √(2 / (in + out)). That is a sound rule, but"
            " GPT-2's is 0.02 whatever the width.",
        ),
        Mistake(
            "the output layer is scaled as well",
            lambda name, shape, n_layer: initial_std(name.replace("lm_head", "o_proj"), shape, n_layer),
            "lm_head got the smaller deviation too. It reads the stream and makes logits of it; it adds"
            " nothing to it.",
        ),
        Mistake(
            "biases and gains are drawn",
            _vectors_too,
            "Vectors got the deviation of a matrix. A bias starts as 0 and a norm's gain as 1 everywhere:"
            " nothing about them is random.",
        ),
    ),
    hints=(
        (
            "Three kinds of parameter: vectors, the two matrices that add to the stream, and all other"
            " matrices."
        ),
        (
            "How many additions does the whole model make? The variances of independent summands add up; a"
            " variance is a deviation squared."
        ),
        (
            "0.0 if len(shape) < 2; 0.02 / math.sqrt(2 * n_layer) if the name ends with o_proj.weight or"
            " down_proj.weight; otherwise 0.02."
        ),
    ),
)


# ---- 2. one Conv1D of GPT-2's


def split_c_attn(weight: Tensor, bias: Tensor, n_head: int) -> tuple[Tensor, ...]:
    return *weight.T.chunk(3), *bias.chunk(3)


def _keys_first(weight: Tensor, bias: Tensor, n_head: int) -> tuple[Tensor, ...]:
    q_weight, k_weight, v_weight, q_bias, k_bias, v_bias = split_c_attn(weight, bias, n_head)
    return k_weight, q_weight, v_weight, k_bias, q_bias, v_bias


def _per_head(weight: Tensor, bias: Tensor, n_head: int) -> tuple[Tensor, ...]:
    n_embd = len(weight)
    weights = weight.T.reshape(n_head, 3, -1, n_embd).transpose(0, 1).reshape(3, -1, n_embd)
    biases = bias.view(n_head, 3, -1).transpose(0, 1).reshape(3, -1)
    return *weights, *biases


def _every_third(weight: Tensor, bias: Tensor, n_head: int) -> tuple[Tensor, ...]:
    return *(weight.T[i::3] for i in range(3)), *(bias[i::3] for i in range(3))


def _split_cases(generator: Generator) -> list[tuple]:
    def case(n_embd: int, n_head: int) -> tuple[Tensor, Tensor, int]:
        """Whole numbers, none of them twice: one sees where each has gone."""
        weight = torch.randperm(3 * n_embd**2, generator=generator).view(n_embd, -1)
        return weight.float(), -1.0 - torch.randperm(3 * n_embd, generator=generator), n_head

    return [case(2, 1), case(6, 2), case(2, 2), case(6, 3), case(9, 1), case(12, 4), case(1, 1), case(5, 5)]


SPLIT_C_ATTN = Exercise(
    task="""Hugging Face's GPT-2 keeps an attention's three projections in one Conv1D, c_attn: `weight` is
    float32 [n_embd, 3 n_embd], `bias` [3 n_embd], and it computes x @ weight + bias, which is all queries,
    then all keys, then all values. Our GPT has three nn.Linear, which compute x @ weight.T + bias. Return
    what to load into them: (q_weight, k_weight, v_weight, q_bias, k_bias, v_bias), each weight [n_embd,
    n_embd], each bias [n_embd]. The heads have the same order in both; `n_head` is given in case you need
    it.""",
    reference=split_c_attn,
    stub="""def split_c_attn(
    weight: torch.Tensor,
    bias: torch.Tensor,
    n_head: int,
) -> tuple[torch.Tensor, ...]:
    # your code here
    ...
""",
    cases=_split_cases,
    forbids=(Layout.ours,),
    valid=lambda weight, bias, n_head: (
        list(weight.shape) == [len(bias) // 3, len(bias)]
        and len(bias) % 3 == 0
        and n_head >= 1
        and len(weight) % n_head == 0
    ),
    mistakes=(
        Mistake(
            "not transposed",
            lambda weight, bias, n_head: (*weight.chunk(3, dim=1), *bias.chunk(3)),
            "The parts are cut out rightly, but Conv1D keeps [in, out] and nn.Linear [out, in]. Here both are"
            " square, so loading does not complain, and the model writes nonsense.",
        ),
        Mistake(
            "reshaped, not transposed",
            lambda weight, bias, n_head: (*weight.reshape(3, len(weight), -1), *bias.chunk(3)),
            "The shape is right, but view and reshape keep the numbers in their old order, row by row. Only a"
            " transpose exchanges axes.",
        ),
        Mistake(
            "reshaped first, then transposed",
            lambda weight, bias, n_head: (
                *weight.reshape(3, len(weight), -1).transpose(1, 2),
                *bias.chunk(3),
            ),
            "weight was reshaped to (3, n_embd, n_embd), and each part transposed. But the reshape cuts along"
            " the inputs, and every part has some of the queries, keys and values. Transpose the whole first,"
            " then cut.",
        ),
        Mistake(
            "every third output",
            _every_third,
            "Outputs 0, 3, 6 and so on were taken for the queries. c_attn does not deal them out in turn: all"
            " queries come first, then all keys, then all values.",
        ),
        Mistake(
            "split along the inputs",
            lambda weight, bias, n_head: (*weight.T.chunk(3, dim=1), *bias.chunk(3)),
            "The cut went through the inputs. Queries, keys and values lie side by side along the outputs,"
            " the axis of 3 n_embd.",
        ),
        Mistake(
            "keys first",
            _keys_first,
            "Queries and keys were exchanged. The order in c_attn is q, k, v. No shape gives this away; only"
            " the outputs of the two models do.",
        ),
        Mistake(
            "split head by head",
            _per_head,
            "This expects q, k and v of the first head, then those of the second. GPT-NeoX and Megatron keep"
            " them so; GPT-2 has all queries first.",
        ),
    ),
    hints=(
        "Which axis of weight belongs to the outputs? And which one does nn.Linear keep them in?",
        (
            "Transpose once, then the outputs are the rows: [3 n_embd, n_embd], queries on top. chunk(3) cuts"
            " the first axis in three."
        ),
        "return (*weight.T.chunk(3), *bias.chunk(3)). The number of heads is not needed.",
    ),
)


# ---- 3. weights that others trained


INSIDE = {
    "ln_1": "attn_norm",
    "attn.c_proj": "attn.o_proj",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
"""Our names of the modules in a block, by theirs."""
OUTSIDE = {"wte": "token_embedding", "wpe": "position_embedding", "ln_f": "norm", "lm_head": "lm_head"}


def load_hf_weights(model: GPT, state: dict[str, Tensor]) -> None:
    model.load_state_dict(_ours(model, state))


def _ours(
    model: GPT,
    state: dict[str, Tensor],
    transposed: tuple[str, ...] = ("attn.", "mlp."),
    order: str = "qkv",
    head: str = "lm_head.weight",
) -> dict[str, Tensor]:
    """transposed: how the names of modules begin whose weights are. order: of the parts of c_attn. head: the
    tied head's name.
    """
    ours = {}
    for key, tensor in state.items():
        name = key.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        module, kind = name.rsplit(".", 1)
        if not module.startswith("h."):
            ours[f"{OUTSIDE[module]}.{kind}"] = tensor
            continue
        _, number, part = module.split(".", 2)
        if kind == "weight" and part.startswith(transposed):
            tensor = tensor.T
        if part == "attn.c_attn":
            for letter, third in zip(order, tensor.chunk(3)):
                ours[f"blocks.{number}.attn.{letter}_proj.{kind}"] = third
        else:
            ours[f"blocks.{number}.{INSIDE[part]}.{kind}"] = tensor
    if model.config.tie_weights:
        ours[head] = ours["token_embedding.weight"]
    return ours


def _load_cases(generator: Generator) -> list[tuple]:
    # Here, since it takes seconds, and only this exercise needs it.
    from transformers import GPT2Config, GPT2LMHeadModel

    def case(
        n_layer: int, n_head: int, n_embd: int, *, tied: bool, form: str
    ) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
        sizes = dict(vocab_size=random_int(generator, 5, 9), n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        theirs = GPT2LMHeadModel(
            GPT2Config(**sizes, n_positions=4, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None)
        )
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
        if form == "hub":
            if tied:
                del state["lm_head.weight"]
            state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
            for block in range(n_layer):
                state[f"h.{block}.attn.bias"] = torch.ones(4, 4).tril().view(1, 1, 4, 4)
                state[f"h.{block}.attn.masked_bias"] = torch.tensor(-1e4)
        idx = torch.randint(sizes["vocab_size"], (2, 4), generator=generator)
        return {**sizes, "block_size": 4, "tie_weights": tied}, state, idx

    return [
        case(1, 1, 2, tied=True, form="object"),
        case(2, 2, 8, tied=True, form="object"),
        case(2, 3, 6, tied=True, form="hub"),
        case(1, 2, 4, tied=False, form="object"),
        case(11, 1, 2, tied=False, form="hub"),
    ]


def _observe_load(
    answer: Callable, sizes: dict[str, Any], state: dict[str, Tensor], idx: Tensor
) -> Iterator[tuple[str, Any]]:
    def fresh() -> GPT:
        building.seed_everything(0)
        return GPT(GPTConfig(**sizes))

    model = fresh()
    _fill(answer, model, state)
    if not sizes["tie_weights"] and torch.equal(model.lm_head.weight, fresh().lm_head.weight):
        raise NotRight(
            "model.lm_head.weight still has its random numbers. Where model.config.tie_weights is false, the"
            " head is a parameter of its own, and `state` has numbers for it, under lm_head.weight."
        )
    _is_cut_rightly(model, state)
    for name, parameter in model.named_parameters():
        yield name, parameter.detach().clone()
    with torch.no_grad():
        yield "the logits", model(idx)
    is_tied = model.lm_head.weight is model.token_embedding.weight
    if is_tied != sizes["tie_weights"]:
        raise NotRight(
            "the numbers are right, but the head is no longer what it was: where model.config.tie_weights is"
            " true, model.lm_head.weight and model.token_embedding.weight stay one parameter, and where it is"
            " false they stay two."
        )
    before = {name: tensor.clone() for name, tensor in state.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    if not all(torch.equal(before[name], tensor) for name, tensor in state.items()):
        raise NotRight(
            "the model and `state` share memory: training the model would change the file's tensors under"
            " your hands. Copy the numbers: parameter.copy_(tensor) under torch.no_grad(), or"
            " model.load_state_dict."
        )
    if sizes["n_layer"] <= 2:  # a deep model says no more of it, and takes long
        _refuses_misfits(answer, fresh, state)


def _explain_loaded(yours: Any, sizes: dict[str, Any], state: dict[str, Tensor], idx: Tensor) -> str | None:
    """Whose numbers a parameter has."""
    if not isinstance(yours, Tensor):
        return None
    ours = _ours(GPT(GPTConfig(**sizes)), state)
    for name, tensor in ours.items():
        if torch.equal(tensor, yours):
            return f"These are the numbers of `{name}`."
    for name, tensor in ours.items():
        if torch.equal(tensor.T, yours):
            return f"These are the numbers of `{name}`, transposed."
    for name, tensor in state.items():
        if yours.numel() <= tensor.numel() and bool(torch.isin(yours, tensor).all()):
            return f"All its numbers are from `{name}` of `state`, but it has not those that belong together."
    return None


def _fill(answer: Callable, model: GPT, state: dict[str, Tensor]) -> None:
    """Raises NotRight where the answer crashes because it took a bias for a mask."""
    try:
        answer(model, state)
    except Exception as error:
        if not any(f"{letter}_proj.bias" in str(error) for letter in "qkv"):
            raise
        raise NotRight(
            "it crashed, and it was the bias of q_proj, k_proj or v_proj that it missed. Was it taken for a"
            " mask? `h.0.attn.c_attn.bias` ends with attn.bias as well; .attn.bias with a dot in front is the"
            f" mask's alone. ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        ) from error


def _is_cut_rightly(model: GPT, state: dict[str, Tensor]) -> None:
    """Raises NotRight where the parts of c_attn.weight hold numbers of more than one of q, k and v."""
    for number, block in enumerate(model.blocks):
        whole = next(t for name, t in state.items() if name.endswith(f"h.{number}.attn.c_attn.weight"))
        wanted = [set(part.flatten().tolist()) for part in whole.chunk(3, dim=1)]
        for letter in "qkv":
            own = set(getattr(block.attn, f"{letter}_proj").weight.flatten().tolist())
            met = [name for name, part in zip("qkv", wanted) if len(own & part) > 1]  # one may be chance
            if len(met) > 1:
                raise NotRight(
                    f"c_attn.weight was cut at the wrong places: {letter}_proj has numbers that belong to"
                    f" {' and '.join(met)}. It is [n_embd, 3 n_embd], and q, k and v lie side by side along"
                    " the second axis: chunk(3, dim=1), or .T first and then chunk(3). A reshape to"
                    " (3, n_embd, n_embd) cuts the first axis, and each part gets some of all three."
                )


def _refuses_misfits(answer: Callable, fresh: Callable[[], GPT], state: dict[str, Tensor]) -> None:
    """Raises NotRight for an answer that takes tensors that are not the model's, and says nothing."""
    gone = next(name for name in state if name.endswith("h.0.ln_2.bias"))
    prefix = gone.removesuffix("h.0.ln_2.bias")
    without = {name: tensor for name, tensor in state.items() if name != gone}
    another_block = state | {f"{prefix}h.99.ln_1.weight": state[gone]}
    misshapen = state | {f"{prefix}wpe.weight": torch.zeros(2, len(state[gone]))}
    headless = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    one_row = state | {f"{prefix}wpe.weight": torch.zeros(1, len(state[gone]))}
    one_number = state | {f"{prefix}ln_f.bias": torch.zeros(1)}
    three_numbers = state | {f"{prefix}h.0.attn.c_attn.bias": torch.zeros(3)}
    strict = "load_state_dict raises it by itself, unless it is told strict=False"
    spread = "copy_ and fill_ spread it over all: compare the shapes, which load_state_dict does by itself"
    damages = [
        (without, f"{gone} was missing from `state`, and the model kept its random numbers: {strict}"),
        (another_block, f"`state` had {prefix}h.99.ln_1.weight, of a block that the model has not: {strict}"),
        (misshapen, f"{prefix}wpe.weight had 2 positions, and the model has 4"),
        (one_row, f"{prefix}wpe.weight had 1 position, and the model has 4; {spread}"),
        (one_number, f"{prefix}ln_f.bias had a single number; {spread}"),
        (three_numbers, f"{prefix}h.0.attn.c_attn.bias had 3 numbers; {spread}"),
    ]
    for name in (f"{prefix}foo.weight", f"{prefix}h.0.ln_3.weight", "lm_head.bias"):
        surplus = state | {name: state[gone]}
        damages.append((surplus, f"`state` had {name}, and the model has no place for it"))
    if not fresh().config.tie_weights:
        damages.append((headless, "lm_head.weight was missing for a head that is not tied"))
    for damaged, what in damages:
        try:
            answer(fresh(), damaged)
        except Exception:
            continue
        raise NotRight(f"no error was raised, though {what}.")


def _loaded_as(**other: Any) -> Callable[[GPT, dict[str, Tensor]], None]:
    """A mistake in translating."""

    def load(model: GPT, state: dict[str, Tensor]) -> None:
        model.load_state_dict(_ours(model, state, **other))

    return load


def _load_reshaped(model: GPT, state: dict[str, Tensor]) -> None:
    ours = _ours(model, state, transposed=())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attn." in name and name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                number, letter = name.split(".")[1], name.split(".")[3][0]
                key = next(k for k in state if k.endswith(f"h.{number}.attn.c_attn.weight"))
                ours[name] = state[key].chunk(3, dim=1)["qkv".index(letter)]
            parameter.copy_(ours[name].reshape(parameter.shape))


def _load_square_as_is(model: GPT, state: dict[str, Tensor]) -> None:
    """Only what does not fit is transposed."""
    model.load_state_dict(_ours(model, state, transposed=("attn.c_attn", "mlp.")))


def _load_what_fits(model: GPT, state: dict[str, Tensor]) -> None:
    ours = _ours(model, {name: t for name, t in state.items() if _place(name)[1]})
    own = model.state_dict()
    fitting = {name: t for name, t in ours.items() if name in own and t.shape == own[name].shape}
    model.load_state_dict(fitting, strict=False)


def _place(name: str) -> tuple[bool, bool]:
    """Of one of their names, whether it is in a block, and whether what follows is known there."""
    module = name.removeprefix("transformer.").rsplit(".", 1)[0]
    if not module.startswith("h."):
        return False, module in OUTSIDE
    return True, module.split(".", 2)[2] in {*INSIDE, "attn.c_attn", "attn"}


def _load_passing_over(in_blocks: bool) -> Callable[[GPT, dict[str, Tensor]], None]:
    """A loader that is silent about unknown names: those in the blocks, or those outside of them."""

    def load(model: GPT, state: dict[str, Tensor]) -> None:
        known = {}
        for name, tensor in state.items():
            is_in_a_block, is_known = _place(name)
            if is_known or is_in_a_block != in_blocks:
                known[name] = tensor
        load_hf_weights(model, known)

    return load


def _load_reshaped_parts(model: GPT, state: dict[str, Tensor]) -> None:
    cut = {}
    for name, tensor in state.items():
        if name.endswith("c_attn.weight"):
            tensor = torch.cat([*tensor.reshape(3, len(tensor), -1)], dim=1)
        cut[name] = tensor
    load_hf_weights(model, cut)


def _load_spread(model: GPT, state: dict[str, Tensor]) -> None:
    ours = _ours(model, state)
    if ours.keys() != model.state_dict().keys():
        raise ValueError("the names differ")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(ours[name])


def _load_untied(model: GPT, state: dict[str, Tensor]) -> None:
    load_hf_weights(model, state)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def _load_always_tied(model: GPT, state: dict[str, Tensor]) -> None:
    ours = _ours(model, state)
    ours["lm_head.weight"] = ours["token_embedding.weight"]
    model.load_state_dict(ours)


LOAD_HF_WEIGHTS = Exercise(
    task="""Fill a GPT with the weights of a GPT-2 of Hugging Face's. `model` is our GPT with GPT-2's parts,
    `state` maps their names to tensors, as `GPT2LMHeadModel.state_dict()` gives it, or as the file on the hub
    has it: there the names lack the first part, `transformer.`. Copy every tensor into the parameter it
    belongs to, in place; return nothing.

    Their names, and ours: `wte` is token_embedding, `wpe` position_embedding, `ln_f` norm, `lm_head` lm_head;
    `h.i` is blocks.i, and in it `ln_1` is attn_norm, `attn.c_attn` q_proj, k_proj and v_proj of attn in one
    (your `split_c_attn`), `attn.c_proj` attn.o_proj, `ln_2` mlp_norm, `mlp.c_fc` mlp.up_proj, `mlp.c_proj`
    mlp.down_proj. All layers in the blocks but the norms are Conv1D: their weights are [in, out].

    - Where `model.config.tie_weights` is true, the output layer's weight is the embedding's, and stays one
      parameter with it; `state` may have it a second time as lm_head.weight, or leave it out. (Of such a
      model, `model.state_dict()` lists lm_head.weight and `model.named_parameters()` does not.) Where it is
      false, lm_head.weight has numbers of its own.
    - Older files also keep masks, `attn.bias` and `attn.masked_bias` in each block: skip these two.
    - An error must be raised where a parameter of the model finds no tensor, a tensor finds no parameter, or
      their shapes differ. Any kind of error will do.""",
    reference=load_hf_weights,
    cases=_load_cases,
    observe=_observe_load,
    explain=_explain_loaded,
    points=3,
    stub="""def load_hf_weights(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    # model.config.tie_weights says whether the head is the embedding
    # your code here
    ...
""",
    forbids=(from_hf, build_gpt, Layout.ours),
    valid=lambda sizes, state, idx: (
        idx.dim() == 2 and idx.size(1) <= sizes["block_size"] and int(idx.max()) < sizes["vocab_size"]
    ),
    mistakes=(
        Mistake(
            "Conv1D is not transposed",
            _load_reshaped,
            "The weights were copied as they lie. Conv1D keeps [in, out] and nn.Linear [out, in]: a reshape"
            " gives the right shape and the wrong matrix. Transpose: tensor.T.",
        ),
        Mistake(
            "square weights are not transposed",
            _load_square_as_is,
            "attn.c_proj was copied without a transpose. It is square, [n_embd, n_embd], so its shape does"
            " not complain; but it is a Conv1D like the others.",
        ),
        Mistake(
            "keys and queries are exchanged",
            _loaded_as(order="kqv"),
            "c_attn holds queries, keys and values in this order. Queries and keys were exchanged.",
        ),
        Mistake(
            "what does not fit is passed over",
            _load_what_fits,
            "The right weights are loaded, but a tensor that is missing, left over or of another shape goes"
            " by in silence: strict=False, or a loop with `if name in ...`. Half of a model then keeps its"
            " random numbers, and still writes something.",
        ),
        Mistake(
            "an unknown name outside of the blocks is passed over",
            _load_passing_over(in_blocks=False),
            "The right weights are loaded, but a tensor whose name is in no block and not in your table goes"
            " by in silence: an `if` and `elif` without an `else`. A tensor that finds no parameter is an"
            " error: look names up with table[name], or end with `else: raise KeyError(name)`.",
        ),
        Mistake(
            "an unknown part of a block is passed over",
            _load_passing_over(in_blocks=True),
            "The right weights are loaded, but of a block's tensors one whose name is not in your table goes"
            " by in silence: an `if` and `elif` without an `else`. Only the two masks may be skipped; end"
            " with `else: raise KeyError(name)`.",
        ),
        Mistake(
            "c_attn is cut with a reshape",
            _load_reshaped_parts,
            "c_attn.weight is [n_embd, 3 n_embd], and q, k and v lie side by side in each row. A reshape to"
            " (3, n_embd, n_embd) cuts the rows apart, so that each part has some of all three: transpose,"
            " then chunk(3).",
        ),
        Mistake(
            "a tensor that is too small is spread",
            _load_spread,
            "parameter.copy_(tensor) repeats a single row or number until it fills the parameter, and says"
            " nothing. Where the shapes differ, an error must be raised: compare them before each copy, or"
            " use load_state_dict.",
        ),
        Mistake(
            "the tied head is a copy",
            _load_untied,
            "The head has the right numbers, but is a parameter of its own now. In training the two would"
            " drift apart, and the model would have 38 million parameters more than GPT-2.",
        ),
        Mistake(
            "every head is tied",
            _load_always_tied,
            "The embedding was copied into the head although model.config.tie_weights is false. There `state`"
            " has a lm_head.weight of its own.",
        ),
    ),
    hints=(
        "Translate first, load afterwards: build a dict of our names and tensors, then load_state_dict.",
        "For a name in a block: _, number, part = module.split('.', 2). Transpose a weight where part begins"
        " with attn. or mlp.; a table gives our name of part; c_attn goes into three with chunk(3).",
        "At the end: if model.config.tie_weights: ours['lm_head.weight'] = ours['token_embedding.weight'];"
        " model.load_state_dict(ours), which raises for whatever is missing, left over or of another shape.",
    ),
)


# ---- 4. scoring choices


def score_choices(
    logits: list[Tensor], ids: list[Tensor], n_context: int, choices: list[str]
) -> tuple[list[float], int]:
    return _scored(_sums(_logprobs(logits), ids, n_context), map(len, choices))


def _scored(sums: list[float], lengths: Iterable[int]) -> tuple[list[float], int]:
    scores = [total / length for total, length in zip(sums, lengths)]
    return scores, scores.index(max(scores))


def _logprobs(logits: list[Tensor]) -> list[Tensor]:
    return [x.log_softmax(-1) for x in logits]


def _sums(values: list[Tensor], ids: list[Tensor], start: int, back: int = 1) -> list[float]:
    """For each row the sum of `values` [time, vocab_size] at its ids from `start` on, each of which is looked
    up `back` places earlier.
    """
    sums = []
    for x, row in zip(values, ids):
        looked_up = x[start - back : len(x) - back].gather(1, row[start:, None])
        sums.append(looked_up.sum().item())
    return sums


def _own_place(
    logits: list[Tensor], ids: list[Tensor], n_context: int, choices: list[str]
) -> tuple[list[float], int]:
    return _scored(_sums(_logprobs(logits), ids, n_context, back=0), map(len, choices))


def _for_each_token(
    logits: list[Tensor], ids: list[Tensor], n_context: int, choices: list[str]
) -> tuple[list[float], int]:
    return _scored(_sums(_logprobs(logits), ids, n_context), [len(row) - n_context for row in ids])


def _not_divided(
    logits: list[Tensor], ids: list[Tensor], n_context: int, choices: list[str]
) -> tuple[list[float], int]:
    return _scored(_sums(_logprobs(logits), ids, n_context), [1] * len(choices))


def _for_each_byte(
    logits: list[Tensor], ids: list[Tensor], n_context: int, choices: list[str]
) -> tuple[list[float], int]:
    lengths = [len(text.encode("utf-8")) for text in choices]
    return _scored(_sums(_logprobs(logits), ids, n_context), lengths)


def _best_of_sums(
    logits: list[Tensor], ids: list[Tensor], n_context: int, choices: list[str]
) -> tuple[list[float], int]:
    scores, _ = score_choices(logits, ids, n_context, choices)
    _, best = _not_divided(logits, ids, n_context, choices)
    return scores, best


def _last_of_equals(
    logits: list[Tensor], ids: list[Tensor], n_context: int, choices: list[str]
) -> tuple[list[float], int]:
    scores, _ = score_choices(logits, ids, n_context, choices)
    return scores, len(scores) - 1 - scores[::-1].index(max(scores))


def _mean_and_divided(
    logits: list[Tensor], ids: list[Tensor], n_context: int, choices: list[str]
) -> tuple[list[float], int]:
    lengths = [len(text) * (len(row) - n_context) for row, text in zip(ids, choices)]
    return _scored(_sums(_logprobs(logits), ids, n_context), lengths)


def _log_of_softmax(
    logits: list[Tensor], ids: list[Tensor], n_context: int, choices: list[str]
) -> tuple[list[float], int]:
    logprobs = [x.softmax(-1).log() for x in logits]
    return _scored(_sums(logprobs, ids, n_context), map(len, choices))


def _lowest(
    logits: list[Tensor], ids: list[Tensor], n_context: int, choices: list[str]
) -> tuple[list[float], int]:
    scores, _ = score_choices(logits, ids, n_context, choices)
    return scores, scores.index(min(scores))


def _choice_cases(generator: Generator) -> list[tuple]:
    def draw(n: int) -> tuple[Tensor, Tensor]:
        """Logits of n places, and n ids."""
        return 2 * torch.randn(n, 9, generator=generator), torch.randint(9, (n,), generator=generator)

    def case(n_context: int, *choices: str) -> tuple[list[Tensor], list[Tensor], int, list[str]]:
        context_logits, context = draw(n_context)
        rows = [draw(random_int(generator, 1, 6)) for _ in choices]
        logits = [torch.cat([context_logits, x]) for x, _ in rows]
        ids = [torch.cat([context, row]) for _, row in rows]
        return logits, ids, n_context, list(choices)

    logits, ids, n_context, choices = case(3, "left", "right")
    tie = [logits[0]] * 3, [ids[0]] * 3, n_context, ["left", "west", "here"]
    sure = [100 * x for x in logits], ids, n_context, choices
    return [
        case(4, "Use a knife.", "Use the blunt end of a large wooden spoon."),
        case(6, "boil it", "freeze it overnight, then boil it", "throw it away"),
        case(2, "salt", "sugar, two spoons of it"),
        case(5, "a", "ab", "abcdefgh", "abcd"),
        case(1, "Open the window.", "Shut it."),
        case(3, "Schließe die Tür.", "気をつけて", "ça va ☕"),
        case(2, "the only one"),
        tie,
        sure,
    ]


def _is_choice(logits: list[Tensor], ids: list[Tensor], n_context: int, choices: list[str]) -> bool:
    """Whether each row has a context and a choice."""
    if not (len(logits) == len(ids) == len(choices) > 0 and n_context >= 1 and all(choices)):
        return False
    return all(
        x.dim() == 2 and len(x) == len(row) > n_context and int(row.max()) < x.size(1)
        for x, row in zip(logits, ids)
    )


SCORE_CHOICES = Exercise(
    task="""PIQA asks which of several answers is right. A base model cannot be asked, but it can be measured:
    which answer does it find the most probable for its length?

    For choice i, `ids[i]` (int64 [time]) holds the context, `n_context` tokens (at least 1), and then the
    choice's tokens (at least 1); `logits[i]` (float32 [time, vocab_size]) is what the model returned for all
    of them; `choices[i]` is the choice's text.

    A choice's score is the sum of the log-probabilities of its tokens, each given all before it, divided by
    the number of characters of the text, `len(text)`: not its bytes, not its tokens. Logits may be 200 apart,
    so take log_softmax, not the logarithm of a softmax. Return (scores, best): a list of floats, and the
    number of the best choice, an int; of several that are equally good, the first. This is the measure called
    acc_norm.""",
    reference=score_choices,
    stub="""def score_choices(
    logits: list[torch.Tensor],
    ids: list[torch.Tensor],
    n_context: int,
    choices: list[str],
) -> tuple[list[float], int]:
    # your code here
    ...
""",
    cases=_choice_cases,
    valid=_is_choice,
    mistakes=(
        Mistake(
            "the context is scored too",
            lambda logits, ids, n_context, choices: score_choices(logits, ids, 1, choices),
            "The context's tokens were counted as well. They are the same for all choices, but divided by"
            " different lengths they favour the longest text. Score only what comes after.",
        ),
        Mistake(
            "off by one",
            _own_place,
            "Each token was looked up in the logits of its own place. Those already say what comes after it;"
            " a token's own are one place earlier.",
        ),
        Mistake(
            "divided by tokens",
            _for_each_token,
            "The sum was divided by the number of tokens. That depends on the tokenizer; characters do not,"
            " so models can be compared.",
        ),
        Mistake(
            "divided by bytes",
            _for_each_byte,
            "The sum was divided by the bytes of the text. In English that is the same; an ä has two bytes,"
            " and a Japanese character three. acc_norm counts characters: len(text).",
        ),
        Mistake(
            "the best of the plain sums",
            _best_of_sums,
            "The scores are right, but the best was picked by the sums before the division. So the length"
            " still decides.",
        ),
        Mistake(
            "of equals the last",
            _last_of_equals,
            "Of several choices that are equally good the last was taken: >= where > is meant. The task says"
            " the first, as max and argmax do.",
        ),
        Mistake(
            "a mean over the tokens as well",
            _mean_and_divided,
            "The mean of the log-probabilities was taken, and then divided by the characters. The score is"
            " their sum, divided once.",
        ),
        Mistake(
            "the logarithm of a probability",
            _log_of_softmax,
            "softmax first and the logarithm afterwards: where logits are 200 apart, a probability is rounded"
            " to 0 and its logarithm is -inf. log_softmax takes both steps at once.",
        ),
        Mistake(
            "not divided",
            _not_divided,
            "This is the plain sum, the measure called acc. Every further token makes a text less probable,"
            " so short choices are favoured.",
        ),
        Mistake(
            "the lowest is chosen",
            _lowest,
            "The scores are right, but the lowest was taken for the best. Log-probabilities are negative: the"
            " best is the one nearest to 0.",
        ),
        Mistake(
            "logits instead of log-probabilities",
            lambda logits, ids, n_context, choices: _scored(_sums(logits, ids, n_context), map(len, choices)),
            "The logits were added up as they are. A logit says something only beside the others of its"
            " place: log_softmax compares it with those.",
        ),
    ),
    hints=(
        "Which row of the logits speaks about the choice's first token? It is not the one of that token.",
        (
            "log_softmax over the last dimension; logits at place t belong to the token at t + 1. So take the"
            " rows from n_context - 1 on, less the last."
        ),
        (
            "logprobs = x[n_context - 1 : -1].log_softmax(-1); sum of logprobs.gather(1, row[n_context:,"
            " None]), .item(), divided by len(choice)."
        ),
    ),
)


# ---- 5. packing documents


def pack_documents(documents: list[list[int]], end_of_text: int, block_size: int) -> tuple[Tensor, Tensor]:
    return _rows(_stream(documents, end_of_text), block_size, block_size)


def _stream(documents: list[list[int]], end_of_text: int) -> list[int]:
    return [token for document in documents for token in (end_of_text, *document)]


def _rows(stream: list[int], block_size: int, step: int) -> tuple[Tensor, Tensor]:
    """Windows of block_size and the token after them, each `step` after the one before; perhaps none."""
    starts = range(0, len(stream) - block_size, step)
    windows = torch.tensor([stream[start : start + block_size + 1] for start in starts], dtype=torch.int64)
    windows = windows.view(-1, block_size + 1)  # the shape of no window is [0]
    return windows[:, :-1], windows[:, 1:]


def _not_separated(documents: list[list[int]], end_of_text: int, block_size: int) -> tuple[Tensor, Tensor]:
    stream = [token for document in documents for token in document]
    return _rows(stream, block_size, block_size)


def _separated_after(documents: list[list[int]], end_of_text: int, block_size: int) -> tuple[Tensor, Tensor]:
    stream = [token for document in documents for token in (*document, end_of_text)]
    return _rows(stream, block_size, block_size)


def _not_shifted(documents: list[list[int]], end_of_text: int, block_size: int) -> tuple[Tensor, Tensor]:
    inputs, _ = pack_documents(documents, end_of_text, block_size)
    return inputs, inputs


def _each_alone(documents: list[list[int]], end_of_text: int, block_size: int) -> tuple[Tensor, Tensor]:
    parts = [_rows([end_of_text, *document], block_size, block_size) for document in documents]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def _one_row_less(documents: list[list[int]], end_of_text: int, block_size: int) -> tuple[Tensor, Tensor]:
    inputs, targets = pack_documents(documents, end_of_text, block_size)
    return inputs[:-1], targets[:-1]


def _overlapping(documents: list[list[int]], end_of_text: int, block_size: int) -> tuple[Tensor, Tensor]:
    return _rows(_stream(documents, end_of_text), block_size, 1)


def _without_empty(documents: list[list[int]], end_of_text: int, block_size: int) -> tuple[Tensor, Tensor]:
    return pack_documents([document for document in documents if document], end_of_text, block_size)


def _rest_padded(documents: list[list[int]], end_of_text: int, block_size: int) -> tuple[Tensor, Tensor]:
    stream = _stream(documents, end_of_text)
    missing = -(len(stream) - 1) % block_size if stream else 0
    return _rows(stream + [end_of_text] * missing, block_size, block_size)


def _pack_cases(generator: Generator) -> list[tuple]:
    def case(count: int, longest: int, end_of_text: int, block_size: int) -> tuple[list[list[int]], int, int]:
        lengths = [random_int(generator, block_size, longest + 1) for _ in range(count)]
        documents = [torch.randint(1, 50, (n,), generator=generator).tolist() for n in lengths]
        return documents, end_of_text, block_size

    small = [[5, 6, 7], [8], [9, 10, 11, 12]]  # a stream of 11 tokens
    return [
        (small, 0, 3),
        (small, 0, 2),  # all 10 targets are used
        (small, 50256, 4),
        ([[5, 6, 7], [8, 9, 10, 11]], 0, 3),  # 9 tokens: 3 divides them, but there are 8 targets
        (small, 0, 11),  # as long as the stream: no row
        ([[4, 3], [], [2], []], 1, 2),
        ([[7, 7, 8]], 0, 1),
        case(3, 9, 0, 4),
        case(5, 7, 50, 2),
        case(4, 8, 99, 7),
    ]


PACK_DOCUMENTS = Exercise(
    task="""A web page is rarely as long as a row of the batch, so documents are packed. `documents` is a list
    of lists of token ids. Let each begin with the token `end_of_text`, the first one too, and join them all
    into one stream; of an empty document, that token is all there is. Cut the stream into rows, side by side.
    Return (inputs, targets), int64 [rows, block_size] each, where a target is the token after its input.

    Every token of the stream but the first should be the target of exactly one input; only at the very end of
    the stream, what fills no whole row is left out. A stream of block_size tokens or fewer fills none: then
    both are [0, block_size]. The documents themselves stay as they are.

    An example: the documents [5, 6, 7] and [8], the mark 0 and rows of 2. The stream is 0, 5, 6, 7, 0, 8; the
    inputs are [[0, 5], [6, 7]], the targets [[5, 6], [7, 0]], and the 8 is left out.""",
    reference=pack_documents,
    stub="""def pack_documents(
    documents: list[list[int]],
    end_of_text: int,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    # your code here
    ...
""",
    cases=_pack_cases,
    forbids=(fixed_windows,),
    valid=lambda documents, end_of_text, block_size: block_size >= 1,
    mistakes=(
        Mistake(
            "nothing between documents",
            _not_separated,
            "The documents were joined without end_of_text. The model then learns that a recipe goes on as a"
            " football match, and never to stop.",
        ),
        Mistake(
            "nothing before the first document",
            lambda documents, end, size: _rows(_stream(documents, end)[1:], size, size),
            "end_of_text was put between the documents only. The first one needs it as well: its first token"
            " is to be predicted too.",
        ),
        Mistake(
            "the last row is left out",
            _one_row_less,
            "There is one row too few: a row that was whole went missing at the end. (n - 1) // block_size"
            " rows fit into n tokens.",
        ),
        Mistake(
            "the rows overlap",
            _overlapping,
            "The rows begin one token apart, so nearly every token is a target block_size times. They lie"
            " side by side: block_size apart.",
        ),
        Mistake(
            "empty documents vanish",
            _without_empty,
            "A document without tokens was dropped. It still begins with end_of_text: the stream has as many"
            " of those as there are documents.",
        ),
        Mistake(
            "the rest is padded",
            _rest_padded,
            "What was left at the end was filled up to a whole row. The model would learn from targets that"
            " nobody wrote: leave it out.",
        ),
        Mistake(
            "end-of-text comes after",
            _separated_after,
            "end_of_text ends each document instead of beginning it. Others do so too; but then nothing"
            " stands before the first document, and our shards and the zero-shot evaluation count on its"
            " being there.",
        ),
        Mistake(
            "each document is cut alone",
            _each_alone,
            "Every document lost what fills no whole row, and short ones vanished. Padding instead would"
            " waste arithmetic. Join first, then cut: a row may hold the end of one document and the"
            " beginning of the next.",
        ),
        Mistake(
            "targets are not shifted",
            _not_shifted,
            "The targets are the inputs themselves. The model learns to copy what it sees, its loss falls to"
            " nearly 0, and it can write nothing.",
        ),
        Mistake(
            "a token is lost between rows",
            lambda documents, end, size: _rows(_stream(documents, end), size, size + 1),
            "The stream was cut into pieces of block_size + 1 that share nothing, so the first token of each"
            " is never a target. The next row begins with the last target of the one before: go on by"
            " block_size.",
        ),
    ),
    hints=(
        "First make one long list. How many whole rows are in it, if each row also needs the token after it?",
        (
            "A stream of n tokens has n - 1 targets, so (n - 1) // block_size rows. Inputs start at 0,"
            " targets at 1, both block_size apart."
        ),
        (
            "rows = (len(stream) - 1) // block_size; inputs = torch.tensor(stream[: rows *"
            " block_size]).view(rows, block_size); the targets likewise from stream[1 : rows * block_size"
            " + 1]."
        ),
    ),
)


# ---- 6. reading shards


class ShardReader:
    def __init__(
        self, paths: list[str], batch_size: int, block_size: int, rank: int = 0, world_size: int = 1
    ):
        self.shards = [np.memmap(path, dtype=np.uint16, mode="r") for path in paths]
        self.starts = np.cumsum([0, *map(len, self.shards)]).tolist()
        self.batch_size = batch_size
        self.block_size = block_size
        self.rank = rank
        self.world_size = world_size
        self.position = 0

    def read(self, start: int, stop: int) -> Tensor:
        parts = [
            shard[max(0, start - begin) : max(0, stop - begin)]
            for begin, shard in zip(self.starts, self.shards)
        ]
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    def next_batch(self) -> tuple[Tensor, Tensor]:
        own = self.batch_size * self.block_size
        if self.position + own * self.world_size + 1 > self.starts[-1]:
            self.position = 0
        start = self.position + self.rank * own
        tokens = self.read(start, start + own + 1)
        self.position += own * self.world_size
        shape = self.batch_size, self.block_size
        return tokens[:-1].view(shape), tokens[1:].view(shape)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


SHARD_READER_STUB = """class ShardReader:
    def __init__(
        self,
        paths: list[str],
        batch_size: int,
        block_size: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        # np.memmap(path, dtype=np.uint16, mode="r") opens a file without reading it
        # your code here
        ...

    def read(self, start: int, stop: int) -> torch.Tensor:
        # tokens number start, ..., stop - 1 of all shards: int64 [stop - start]
        # your code here
        ...

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        # inputs and targets: int64 [batch_size, block_size] each
        # your code here
        ...

    def state_dict(self) -> dict:
        # your code here
        ...

    def load_state_dict(self, state: dict) -> None:
        # your code here
        ...
"""


def _reader_cases(generator: Generator) -> list[tuple]:
    def case(
        lengths: list[int], batch_size: int, block_size: int, world_size: int, is_counted: bool = True
    ) -> tuple[list[np.ndarray], int, int, int]:
        """is_counted: the ids are 0, 1, 2 and so on, so that each says where it stands; else random."""
        total = sum(lengths)
        ids = torch.arange(total) if is_counted else torch.randint(50257, (total,), generator=generator)
        shards = np.split(ids.numpy().astype(np.uint16), np.cumsum(lengths)[:-1])
        return shards, batch_size, block_size, world_size

    return [
        case([13], 1, 3, 1),  # 4 batches, and the last target: all is used
        case([20], 2, 3, 1),
        case([5, 6, 7], 1, 4, 1),
        case([7, 2, 1, 9], 2, 4, 1, is_counted=False),  # a batch out of four shards
        case([25], 2, 2, 3),  # two batches of three processes, and the last target
        case([11, 13, 16], 1, 5, 2),
        case([30, 30], 3, 2, 2, is_counted=False),
        case([9, 40], 1, 1, 4),
    ]


def _can_be_read(shards: list[np.ndarray], batch_size: int, block_size: int, world_size: int) -> bool:
    if not (batch_size >= 1 and block_size >= 1 and world_size >= 1 and all(map(len, shards))):
        return False
    return sum(map(len, shards)) > batch_size * block_size * world_size


def _observe_reader(
    answer: Callable, shards: list[np.ndarray], batch_size: int, block_size: int, world_size: int
) -> Iterator[tuple[str, Any]]:
    building.takes(answer, "paths", "batch_size", "block_size", "rank", "world_size")
    # Windows does not delete a file that is mapped.
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        paths = [str(Path(folder) / f"train_{number:05d}.bin") for number in range(len(shards))]
        for path, shard in zip(paths, shards):
            shard.tofile(path)
        yield from _observe_read(answer(paths, batch_size, block_size), shards)
        together = batch_size * block_size * world_size
        readers = [answer(paths, batch_size, block_size, rank, world_size) for rank in range(world_size)]
        whole = (sum(map(len, shards)) - 1) // together
        for number in range(whole + 1):
            for rank, reader in enumerate(readers):
                x, y = _batch_after(reader, number, whole)
                yield f"batch {number + 1}, inputs of rank {rank}", x
                yield f"batch {number + 1}, targets of rank {rank}", y
        for reader in readers:
            reader.next_batch()
        yield from _observe_resumed(answer, paths, readers, (batch_size, block_size))
        if whole >= 3:
            yield from _observe_more_processes(answer, paths, readers, (batch_size, block_size))
        _changes_with_its_file(answer(paths, batch_size, block_size), paths[0], shards[0])


def _observe_read(reader: Any, shards: list[np.ndarray]) -> Iterator[tuple[str, Any]]:
    read = building.method(reader, "read")
    total = sum(map(len, shards))
    yield "read(0, 2)", read(0, 2)
    edge = len(shards[0])
    if edge < total:
        yield f"read({edge - 1}, {edge + 1}), across a border", read(edge - 1, edge + 1)
        yield f"read({edge}, {edge + 1}), the second shard's first", read(edge, edge + 1)
    yield f"read(0, {total}), everything", read(0, total)
    yield f"read({total - 1}, {total}), the last", read(total - 1, total)


def _next_batch(reader: Any) -> tuple[Tensor, Tensor]:
    try:
        batch = building.method(reader, "next_batch")()
    except StopIteration:
        raise NotRight(
            "next_batch ends at the end of the stream (StopIteration). Training goes on as long as it likes:"
            " where too few tokens are left, the reader begins again at token 0."
        ) from None
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        raise NotRight("next_batch returns two tensors: the inputs and the targets.")
    return batch[0], batch[1]


def _batch_after(reader: Any, number: int, whole: int) -> tuple[Tensor, Tensor]:
    """The next batch after `number` of the `whole` that fit. Raises NotRight for a crash at the end."""
    try:
        return _next_batch(reader)
    except NotRight:
        raise
    except Exception as error:
        if number < whole:
            raise
        raise NotRight(
            f"next_batch crashed ({type(error).__name__}: {' '.join(str(error).split())[:120]}) where the"
            " stream has too few tokens left for all processes, and should begin again. Is the very last"
            " target counted? position + batch_size · block_size · world_size + 1 tokens are needed."
        ) from error


def _observe_resumed(
    answer: Callable, paths: list[str], readers: list[Any], shape: tuple[int, int]
) -> Iterator[tuple[str, Any]]:
    """What readers do that take up the state of others, beside those others."""
    state = building.method(readers[0], "state_dict")()
    try:
        kept = json.dumps(state, sort_keys=True)
    except TypeError as error:
        raise NotRight(
            f"the state cannot be written as JSON ({error}): a dict of plain numbers is wanted, no tensors"
            " and no arrays."
        ) from None
    if any(json.dumps(reader.state_dict(), sort_keys=True) != kept for reader in readers):
        raise NotRight(
            "after equally many batches the state differs from rank to rank. Only the first process writes"
            " the checkpoint, and all read it: keep what they have in common, how far all have come."
        )
    resumed = []
    for rank in range(len(readers)):
        reader = answer(paths, *shape, rank, len(readers))
        reader.next_batch()
        building.method(reader, "load_state_dict")(json.loads(kept))
        resumed.append(reader)
    alone = answer(paths, *shape)
    alone.load_state_dict(json.loads(kept))
    for rank, (reader, original) in enumerate(zip(resumed, readers)):
        yield f"resumed, the next inputs of rank {rank}", reader.next_batch()[0]
        original.next_batch()
    yield "resumed by a single process, its next inputs", alone.next_batch()[0]
    if json.dumps(state, sort_keys=True) != kept:
        raise NotRight("a state that was taken earlier changes as the reader goes on: return a new dict.")


def _observe_more_processes(
    answer: Callable, paths: list[str], readers: list[Any], shape: tuple[int, int]
) -> Iterator[tuple[str, Any]]:
    """What twice as many processes read that go on where these are, up to the end and from the beginning."""
    twice = answer(paths, *shape, 0, 2 * len(readers))
    twice.load_state_dict(readers[0].state_dict())
    for number in range(1, 4):
        yield f"resumed by twice as many processes, inputs {number} of rank 0", twice.next_batch()[0]


def _changes_with_its_file(reader: Any, path: str, shard: np.ndarray) -> None:
    """Raises NotRight for a reader that holds the tokens in memory: it does not see that the file changed."""
    changed = shard ^ 1
    with open(path, "r+b") as file:
        file.write(changed.tobytes())
    if not np.array_equal(reader.read(0, len(shard)).numpy(), changed.astype(np.int64)):
        raise NotRight(
            "the tokens are right, but all of them are held in memory: the file was changed, and the reader"
            " still has the old ones. A real corpus has 20 GB. np.memmap opens a file without reading it, and"
            " a slice of it reads what it needs; np.fromfile, np.array and np.concatenate of whole shards"
            " read everything."
        )


def _explain_batch(
    yours: Any, shards: list[np.ndarray], batch_size: int, block_size: int, world_size: int
) -> str | None:
    """Where in the stream the tokens of a wrong batch stand."""
    if not isinstance(yours, Tensor) or yours.shape != (batch_size, block_size):
        return None
    stream, own = np.concatenate(shards).astype(np.int64), yours.flatten().numpy()
    begins = [at for at in range(len(stream) - len(own) + 1) if np.array_equal(stream[at:][: len(own)], own)]
    if not begins:
        if not np.isin(own, stream).all():
            return None
        return "Its tokens stand in the stream, but not side by side: a batch is one stretch, read in order."
    place = f"It begins at token {begins[0]} of the stream"
    if begins[0] in np.cumsum([len(shard) for shard in shards]):
        place += ", where a shard begins"
    together = len(own) * world_size
    start = begins[0] - begins[0] % together
    if start + together + 1 > len(stream):
        return (
            f"{place}. From token {start} on all processes together need {together} inputs and one token"
            f" more, and {len(stream) - start} are left: so all of them begin again at token 0."
        )
    if begins[0] % len(own) in (0, 1):
        return f"{place}. That is a batch, but not the one that was due."
    return (
        f"{place}. Inputs begin at multiples of batch_size · block_size = {len(own)}, since no token is"
        " passed over or read twice."
    )


class _StopsAtBorders(ShardReader):
    def next_batch(self) -> tuple[Tensor, Tensor]:
        need = self.batch_size * self.block_size * self.world_size + 1
        end = min(stop for stop in self.starts if stop > self.position)
        if self.position + need > end:
            self.position = end if end < self.starts[-1] else 0
        return super().next_batch()


class _SkipsToFitting(ShardReader):
    def next_batch(self) -> tuple[Tensor, Tensor]:
        need = self.batch_size * self.block_size * self.world_size + 1
        borders = [self.position, *(start for start in self.starts if start > self.position)]
        fitting = (begin for begin, end in zip(borders, borders[1:]) if begin + need <= end)
        self.position = next(fitting, 0)
        return super().next_batch()


class _OwnEnd(ShardReader):
    def next_batch(self) -> tuple[Tensor, Tensor]:
        own = self.batch_size * self.block_size
        if self.position + self.rank * own + own + 1 > self.starts[-1]:
            self.position = 0
        start = self.position + self.rank * own
        tokens = self.read(start, start + own + 1)
        self.position += own * self.world_size
        shape = self.batch_size, self.block_size
        return tokens[:-1].view(shape), tokens[1:].view(shape)


class _TargetsAreInputs(ShardReader):
    def next_batch(self) -> tuple[Tensor, Tensor]:
        x, _ = super().next_batch()
        return x, x.clone()


class _GoesRound(ShardReader):
    def next_batch(self) -> tuple[Tensor, Tensor]:
        own, total = self.batch_size * self.block_size, self.starts[-1]
        stream = torch.cat([self.read(0, total)] * 2)
        start = (self.position + self.rank * own) % total
        self.position = (self.position + own * self.world_size) % total
        shape = self.batch_size, self.block_size
        return stream[start : start + own].view(shape), stream[start + 1 : start + own + 1].view(shape)


class _RankInPosition(ShardReader):
    def __init__(
        self, paths: list[str], batch_size: int, block_size: int, rank: int = 0, world_size: int = 1
    ):
        super().__init__(paths, batch_size, block_size, rank, world_size)
        self.position = rank * batch_size * block_size

    def next_batch(self) -> tuple[Tensor, Tensor]:
        own = self.batch_size * self.block_size
        if self.position + own + 1 > self.starts[-1]:
            self.position = self.rank * own
        tokens = self.read(self.position, self.position + own + 1)
        self.position += own * self.world_size
        shape = self.batch_size, self.block_size
        return tokens[:-1].view(shape), tokens[1:].view(shape)


class _AllAlike(ShardReader):
    def __init__(
        self, paths: list[str], batch_size: int, block_size: int, rank: int = 0, world_size: int = 1
    ):
        super().__init__(paths, batch_size, block_size, 0, world_size)


class _OwnSteps(ShardReader):
    def next_batch(self) -> tuple[Tensor, Tensor]:
        batch = super().next_batch()
        self.position -= self.batch_size * self.block_size * (self.world_size - 1)
        return batch


class _LosesTargets(ShardReader):
    def next_batch(self) -> tuple[Tensor, Tensor]:
        batch = super().next_batch()
        self.position += 1
        return batch


class _ForgetsTheEnd(ShardReader):
    def next_batch(self) -> tuple[Tensor, Tensor]:
        together = self.batch_size * self.block_size * self.world_size
        if self.position + together + 1 >= self.starts[-1]:
            self.position = 0
        return super().next_batch()


class _DealsRows(ShardReader):
    def next_batch(self) -> tuple[Tensor, Tensor]:
        batch_size, rank, world_size = self.batch_size, self.rank, self.world_size
        self.batch_size, self.rank, self.world_size = batch_size * world_size, 0, 1
        x, y = super().next_batch()
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        return x[rank::world_size], y[rank::world_size]


class _InMemory(ShardReader):
    def __init__(
        self, paths: list[str], batch_size: int, block_size: int, rank: int = 0, world_size: int = 1
    ):
        super().__init__(paths, batch_size, block_size, rank, world_size)
        self.shards = [np.fromfile(path, dtype=np.uint16) for path in paths]  # type: ignore[misc]


class _BeginsAnew(ShardReader):
    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = 0


class _CountsBatches(ShardReader):
    def state_dict(self) -> dict[str, int]:
        return {"batches": self.position // (self.batch_size * self.block_size * self.world_size)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["batches"] * self.batch_size * self.block_size * self.world_size


class _Signed(ShardReader):
    def read(self, start: int, stop: int) -> Tensor:
        return super().read(start, stop).to(torch.int16).long()


SHARD_READER = Exercise(
    task="""Ten billion tokens lie on disk in shards: files of uint16 numbers (ids up to 65,535), one token
    after the other, written by array.tofile. To training they are one long stream, the tokens of the first
    file, then those of the second. `ShardReader(paths, batch_size, block_size, rank, world_size)` reads it in
    order, a batch at a time, for one of `world_size` processes: the one numbered `rank`.

    - `read(start, stop)` returns the stream's tokens number start to stop - 1, int64 [stop - start], wherever
      the borders of the shards lie.
    - `next_batch()` returns (inputs, targets), int64 [batch_size, block_size] each: rows that lie side by
      side in the stream, the targets one token on, so that the last target is also the next row's first
      input. At each call all processes together read one stretch of batch_size · block_size · world_size
      inputs. Rank 0 takes its first part, rank 1 the part after that, and so on; the next call goes on behind
      the stretch.
    - Where the stream has too few tokens left for all of them (one more is needed, for the very last target),
      `next_batch` begins again at token 0.
    - `state_dict()` returns how far all have come, a dict of plain numbers that can be written as JSON, the
      same on every rank. `load_state_dict(state)` goes on from there, in a reader of any rank, also where the
      number of processes is another now.
    - A whole shard is never held in memory: np.memmap maps a file, and reads the slices that you ask for.

    An example: the shards [0, 1, 2, 3, 4] and [5, 6, 7, 8, 9], batch_size 1, block_size 2, two processes. The
    first call gives rank 0 the inputs [[0, 1]] and the targets [[1, 2]], and rank 1 [[2, 3]] and [[3, 4]].
    The second gives the inputs [[4, 5]] and [[6, 7]]. A third would need tokens 8 to 12, so it begins again,
    with [[0, 1]] and [[2, 3]].""",
    reference=ShardReader,
    cases=_reader_cases,
    observe=_observe_reader,
    stub=SHARD_READER_STUB,
    points=3,
    forbids=(ShardedTokens,),
    valid=_can_be_read,
    explain=_explain_batch,
    mistakes=(
        Mistake(
            "batches end at a shard's border",
            _StopsAtBorders,
            "Where a shard has too few tokens left for a batch, the rest was passed over and the next shard"
            " begun. Each shard loses its end: a batch takes what is left, and the beginning of the next.",
        ),
        Mistake(
            "a shard's end is passed over",
            _SkipsToFitting,
            "A batch that did not fit into what was left of a shard was begun in the next shard that has room"
            " for it. The shards are one stream: a batch takes what is left of one, and the beginning of the"
            " next.",
        ),
        Mistake(
            "each rank looks for its own end",
            _OwnEnd,
            "A rank begins again when its own part does not fit. Near the end rank 0 still fits and reads on,"
            " while the last rank begins again: from then on they are at different places. All have to ask"
            " whether the whole stretch fits, position + batch_size · block_size · world_size + 1.",
        ),
        Mistake(
            "the targets are the inputs",
            _TargetsAreInputs,
            "Inputs and targets are the same tokens, so a model learns to repeat what it has just read. The"
            " targets begin one token later.",
        ),
        Mistake(
            "a batch goes round the end",
            _GoesRound,
            "Where the stream ended in the middle of a batch, its rest was taken from the beginning. The task"
            " begins again at token 0 with a whole batch: otherwise the last document runs into the first.",
        ),
        Mistake(
            "the rank is in the position",
            _RankInPosition,
            "Each process keeps a position of its own, which begins at rank · batch_size · block_size. They"
            " come to the end at different calls, and the states differ from rank to rank. Keep one position"
            " that all have in common, and add the rank's part when reading.",
        ),
        Mistake(
            "all ranks read the same",
            _AllAlike,
            "Every process got the same rows, so eight GPUs compute one gradient eight times. Rank r begins"
            " r · batch_size · block_size tokens after rank 0.",
        ),
        Mistake(
            "the ranks overlap",
            _OwnSteps,
            "Each process goes on by its own batch only, and so comes to what its neighbour has just read. A"
            " call moves all of them on by batch_size · block_size · world_size.",
        ),
        Mistake(
            "a token is lost between batches",
            _LosesTargets,
            "A batch reads one token more than it has inputs, for the last target, and the next batch went on"
            " behind that one. It is the next batch's first input: move on by the inputs alone.",
        ),
        Mistake(
            "the last batch is left out",
            _ForgetsTheEnd,
            "A batch that fits exactly, with its last target as the stream's last token, was not read: >="
            " where > is meant.",
        ),
        Mistake(
            "the rows are dealt one by one",
            _DealsRows,
            "Each process took every world_size-th row. That works too, but the task has each rank take one"
            " part in a piece, which is one read from disk.",
        ),
        Mistake(
            "everything is in memory",
            _InMemory,
            "The tokens are right, but they are all held in memory: the file was changed, and the reader did"
            " not see it. Use np.memmap, and cut slices out of it when they are needed.",
        ),
        Mistake(
            "a resumed reader begins anew",
            _BeginsAnew,
            "After load_state_dict the batches come from the beginning again. A run that was interrupted ten"
            " times would have read the first tenth of its data ten times.",
        ),
        Mistake(
            "the state counts batches",
            _CountsBatches,
            "The state says how many batches were read. With another number of processes a batch of all is"
            " of another size, and the reader goes on in the wrong place: keep the position in tokens.",
        ),
        Mistake(
            "ids become negative",
            _Signed,
            "Ids above 32,767 came out negative: two bytes were read as int16. They are uint16; turn them"
            " into int64 at once.",
        ),
    ),
    hints=(
        "Keep a list of memmaps, where each begins in the stream, and one number: the position of all.",
        "read: from each shard take shard[max(0, start - begin) : max(0, stop - begin)], which is empty where"
        " nothing is wanted of it, and join the pieces. next_batch: one read of batch_size · block_size + 1"
        " tokens from position + rank · batch_size · block_size on.",
        "tokens = self.read(at, at + n + 1); x = tokens[:-1].view(batch_size, block_size); y = tokens[1:]."
        "view(...); self.position += n * world_size; and before all this, position = 0 if position + n *"
        " world_size + 1 > total.",
    ),
)


# ---- 7. accumulated gradients


def accumulated_gradient(weight: Tensor, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    return _accumulated(weight, batches, lambda n, total: n / total)


def _accumulated(
    weight: Tensor,
    batches: list[tuple[Tensor, Tensor]],
    factor: Callable[[int, int], float],
    clear: bool = False,
) -> Tensor:
    """factor: what a micro-batch's mean loss is multiplied by, from the number of its examples and of all.
    clear: whether the gradient is set back before each micro-batch.
    """
    weight = weight.clone().requires_grad_()
    total = sum(len(y) for _, y in batches)
    for x, y in batches:
        if clear:
            weight.grad = None
        loss = F.cross_entropy(x @ weight.T, y)
        (loss * factor(len(y), total)).backward()
    return weight.grad


def _accumulation_cases(generator: Generator) -> list[tuple]:
    def case(vocab_size: int, features: int, *sizes: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        def batch(n: int) -> tuple[Tensor, Tensor]:
            x = torch.randn(n, features, generator=generator)
            return x, torch.randint(vocab_size, (n,), generator=generator)

        weight = torch.randn(vocab_size, features, generator=generator)
        return weight, [batch(n) for n in sizes]

    return [
        case(5, 3, 4, 4),
        case(4, 2, 6, 1),
        case(7, 4, 2, 5, 3),
        case(3, 3, 1, 1, 8, 2),
        case(6, 2, 3),
        case(2, 1, 1, 2),
    ]


def _observe_accumulation(
    answer: Callable, weight: Tensor, batches: list[tuple[Tensor, Tensor]]
) -> Iterator[tuple[str, Any]]:
    passes = []

    def counted(backward: Callable) -> Callable:
        def run(*arguments: Any, **options: Any) -> Any:
            passes.append(1)
            return backward(*arguments, **options)

        return run

    engine = torch.autograd
    with (
        patch.object(engine, "backward", counted(engine.backward)),
        patch.object(engine, "grad", counted(engine.grad)),
    ):
        gradient = answer(weight, batches)
    yield "the gradient", gradient
    if weight.requires_grad or weight.grad is not None:
        raise NotRight(
            "the gradient is right, but `weight` is not as it was: it now requires gradients, or holds one in"
            " .grad. Whoever owns it did not ask for that: work on weight.clone().requires_grad_()."
        )
    if len(passes) != len(batches):
        raise NotRight(
            f"the gradient is right, but backward ran {len(passes)} times for {len(batches)} micro-batches."
            " Once for each: only then is the graph of a micro-batch gone from memory before the next one"
            " begins, which is the whole point. Losses that are added up first, or micro-batches that are"
            " joined, are all held at once."
        )


def _one_backward(weight: Tensor, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    weight = weight.clone().requires_grad_()
    total = sum(len(y) for _, y in batches)
    losses = [F.cross_entropy(x @ weight.T, y) * len(y) / total for x, y in batches]
    torch.stack(losses).sum().backward()
    return weight.grad


def _on_weight_itself(weight: Tensor, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    weight.grad = None
    weight.requires_grad_()
    total = sum(len(y) for _, y in batches)
    for x, y in batches:
        (F.cross_entropy(x @ weight.T, y) * (len(y) / total)).backward()
    return weight.grad


ACCUMULATED_GRADIENT = Exercise(
    task="""GPT-2 was trained on half a million tokens in each step; few machines hold as many. So a step
    reads them in micro-batches, and adds up their gradients.

    The model is one layer: `weight` is float32 [vocab_size, features], its logits are x @ weight.T. `batches`
    is a list of (x, y), x float32 [n, features], y int64 [n], and n differs from one to the next. Return the
    gradient with respect to weight, float32 [vocab_size, features], of the cross-entropy averaged over all
    examples of all micro-batches.

    Never hold two at once: call backward once for each micro-batch. `weight` itself stays as it is, in its
    values, its requires_grad and its .grad: work on weight.clone().requires_grad_().""",
    reference=accumulated_gradient,
    stub="""def accumulated_gradient(
    weight: torch.Tensor,
    batches: list[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    # your code here
    ...
""",
    cases=_accumulation_cases,
    observe=_observe_accumulation,
    valid=lambda weight, batches: (
        weight.dim() == 2
        and len(batches) > 0
        and all(
            len(x) == len(y) > 0 and x.shape[1:] == weight.shape[1:] and int(y.max()) < len(weight)
            for x, y in batches
        )
    ),
    mistakes=(
        Mistake(
            "not divided",
            lambda weight, batches: _accumulated(weight, batches, lambda n, total: 1),
            "The gradients of the means were added up as they are. With 8 micro-batches the gradient is 8"
            " times as long, and clipping cuts it.",
        ),
        Mistake(
            "a mean of means",
            lambda weight, batches: _accumulated(weight, batches, lambda n, total: 1 / len(batches)),
            "Each micro-batch counts alike, so the examples of a small one count for more. That is right only"
            " where all are of one size, as the Trainer's are. Weigh each by its share of the examples.",
        ),
        Mistake(
            "divided twice",
            lambda weight, batches: _accumulated(weight, batches, lambda n, total: n / total / len(batches)),
            "Each loss has its share already, and then all was divided by the number of micro-batches as"
            " well. The shares sum to 1: that is enough.",
        ),
        Mistake(
            "gradients are cleared in between",
            lambda weight, batches: _accumulated(weight, batches, lambda n, total: n / total, clear=True),
            "Only the last micro-batch is left: the gradient was cleared before each backward. zero_grad"
            " belongs after the step, once.",
        ),
        Mistake(
            "one backward for all",
            _one_backward,
            "The gradient is right, but all micro-batches were held at once: their losses were added up, or"
            " they were joined, and backward ran once. That takes the memory of the large batch. backward for"
            " each frees its graph.",
        ),
        Mistake(
            "weight itself gets the gradient",
            _on_weight_itself,
            "The gradient is right, but `weight` now requires gradients and holds one. Work on a copy that"
            " is yours: weight.clone().requires_grad_().",
        ),
        Mistake(
            "a sum, not a mean",
            lambda weight, batches: _accumulated(weight, batches, lambda n, total: n),
            "This is the gradient of the summed loss. It grows with the batch, and the learning rate would"
            " have to shrink in turn.",
        ),
    ),
    hints=(
        (
            "backward adds to .grad, so the adding up happens by itself. What must each loss be multiplied by"
            " beforehand?"
        ),
        (
            "A micro-batch of n examples has a mean loss, F.cross_entropy(x @ w.T, y). Of the large batch's"
            " mean it makes up n / total."
        ),
        (
            "total = sum(len(y) for _, y in batches); for x, y in batches: (F.cross_entropy(x @ w.T, y) *"
            " len(y) / total).backward(); return w.grad."
        ),
    ),
)


# ---- 8. weight decay


def decay_groups(shapes: dict[str, tuple[int, ...]]) -> tuple[list[str], list[str]]:
    return _groups(shapes, lambda name: len(shapes[name]) >= 2)


def _groups(shapes: dict[str, tuple[int, ...]], decays: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """decays: whether the parameter of a name is decayed."""
    return [name for name in shapes if decays(name)], [name for name in shapes if not decays(name)]


def _decay_cases(generator: Generator) -> list[tuple]:
    def case(**settings: object) -> tuple[dict[str, tuple[int, ...]]]:
        sizes = dict(
            vocab_size=random_int(generator, 20, 90),
            n_layer=random_int(generator, 1, 4),
            n_head=2,
            n_embd=4 * random_int(generator, 2, 9),
        )
        with without_memory():
            model = GPT(GPTConfig(**sizes, **settings))
        return ({name: tuple(p.shape) for name, p in model.named_parameters()},)

    theirs = {
        "wte.weight": (50, 8),
        "h.0.ln_1.weight": (8,),
        "h.0.attn.c_attn.weight": (8, 24),
        "h.0.attn.c_attn.bias": (24,),
        "ln_f.bias": (8,),
    }
    odd = {"scale": (), "conv.weight": (8, 4, 3), "norm_mix.weight": (4, 4), "conv.bias": (8,), "gain": (1,)}
    return [
        case(),
        case(bias=False),
        case(**MODERN),
        (theirs,),
        (odd,),
        ({"weight": (3, 2), "bias": (3,)},),
        ({"b": (2,), "a": (2, 2), "c": (1, 1)},),
    ]


DECAY_GROUPS = Exercise(
    task="""Weight decay pulls weights towards 0. That suits matrices, and embeddings are matrices too. It
    does not suit vectors: a bias, or the gain of a norm, which should stay near 1. `shapes` maps the names of
    a model's parameters to their shapes. Return two lists of names, those that AdamW decays and those that it
    does not, each in the order of `shapes`. The shape decides, never the name, since the model may be another
    library's, where a norm is called ln_1. Such models also have single numbers, of shape (), which are gains
    like a norm's; and convolutions, whose weights have the shape (out, in, width): a matrix for each place in
    a window, so they are decayed as matrices are.""",
    reference=decay_groups,
    cases=_decay_cases,
    forbids=(build_optimizers,),
    mistakes=(
        Mistake(
            "norm gains are decayed",
            lambda shapes: _groups(shapes, lambda name: name.endswith("weight")),
            "Whatever is called weight was decayed, and so is the gain of a norm: attn_norm.weight. It is a"
            " vector; decay pulls it from 1 to 0.",
        ),
        Mistake(
            "biases are decayed",
            lambda shapes: _groups(shapes, lambda name: "norm" not in name),
            "Everything but the norms was decayed, the linear layers' biases too. A bias is a vector: it only"
            " shifts, and need not be held small.",
        ),
        Mistake(
            "two dimensions and no more",
            lambda shapes: _groups(shapes, lambda name: len(shapes[name]) == 2),
            "Only shapes of exactly two sizes were decayed. The weight of a convolution has three or four"
            " and is a matrix of matrices: >= 2, not == 2.",
        ),
        Mistake(
            "a weight of three dimensions is in neither list",
            lambda shapes: (
                [name for name in shapes if len(shapes[name]) == 2],
                [name for name in shapes if len(shapes[name]) < 2],
            ),
            "The weight of a convolution is in neither list, so the optimizer would never move it. Whatever"
            " has two dimensions or more is decayed: >= 2, not == 2.",
        ),
        Mistake(
            "a single number is in neither list",
            lambda shapes: (
                [name for name in shapes if len(shapes[name]) >= 2],
                [name for name in shapes if len(shapes[name]) == 1],
            ),
            "A single number, of shape (), is in neither list, so the optimizer would never move it. It is a"
            " gain, and not decayed: < 2, not == 1.",
        ),
        Mistake(
            "a single number is decayed",
            lambda shapes: _groups(shapes, lambda name: len(shapes[name]) != 1),
            "Everything but the vectors was decayed, a single number (shape ()) too. It is a gain like"
            " theirs.",
        ),
        Mistake(
            "the two lists are exchanged",
            lambda shapes: decay_groups(shapes)[::-1],
            "The lists are right, but the first one is to hold the names that are decayed.",
        ),
        Mistake(
            "everything is decayed",
            lambda shapes: _groups(shapes, lambda name: True),
            "This is what AdamW(model.parameters(), weight_decay=0.1) does. The vectors need a group of their"
            " own, with a decay of 0.",
        ),
        Mistake(
            "embeddings are left out",
            lambda shapes: _groups(shapes, lambda name: len(shapes[name]) >= 2 and "embedding" not in name),
            "The embeddings were not decayed. Some do leave them out; here all matrices decay, and GPT-2's"
            " embedding is also its output layer.",
        ),
        Mistake(
            "norms are known by their name",
            lambda shapes: _groups(shapes, lambda name: not name.endswith("bias") and "norm" not in name),
            "This is right as long as a norm has norm in its name and a bias ends with bias. In other models"
            " (Hugging Face's GPT-2 has ln_1) vectors have other names, and are decayed in silence. Ask the"
            " shape.",
        ),
    ),
    hints=(
        (
            "Names differ from one library to the next. What is it that a bias and the gain of a norm share,"
            " and no matrix has?"
        ),
        (
            "A parameter is decayed if its shape has two sizes or more. Go through shapes.items() once for"
            " each list."
        ),
        (
            "decayed = [name for name, shape in shapes.items() if len(shape) >= 2], the other list with < 2;"
            " return decayed, others."
        ),
    ),
)


# ---- 9. a data-parallel step


class Group(Protocol):
    """Processes that work together, as one of them sees them."""

    rank: int
    world_size: int

    def all_reduce(self, tensor: Tensor) -> None:
        """Replaces the tensor by the sum of what all processes give, in each of them."""
        ...


def ddp_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[tuple[Tensor, Tensor]],
    group: Group,
) -> float:
    total = _local_backward(model, optimizer, micro_batches)
    _average_gradients(model, group)
    optimizer.step()
    return _mean_loss(total, group)


def _local_backward(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[tuple[Tensor, Tensor]],
    clear: bool = True,
    share: float | None = None,
) -> Tensor:
    """Leaves this process's gradients in .grad, and returns its loss. share: of a micro-batch."""
    if clear:
        optimizer.zero_grad()
    total = torch.zeros(())
    for x, y in micro_batches:
        loss = cross_entropy(model(x), y) * (share or 1 / len(micro_batches))
        loss.backward()
        total += loss.detach()
    return total


def _average_gradients(model: nn.Module, group: Group, divide: bool = True) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            group.all_reduce(parameter.grad)
            if divide:
                parameter.grad /= group.world_size


def _mean_loss(total: Tensor, group: Group) -> float:
    group.all_reduce(total)
    return total.item() / group.world_size


class _Exchange:
    """What the threads that stand for processes have in common: the tensors that they add up."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.given: list[Tensor] = []
        self.sum: Tensor | None = None
        self.rounds = 0
        self.ended = 0
        self.changed = threading.Condition()

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all threads, once all have come."""
        with self.changed:
            here = self.rounds
            self.given.append(tensor.detach().clone())
            if len(self.given) == self.world_size:
                if len({part.shape for part in self.given}) > 1:
                    raise NotRight("the processes reduce tensors of different shapes in the same call.")
                self.sum = torch.stack(self.given).sum(0)
                self.given = []
                self.rounds += 1
                self.changed.notify_all()
            while self.rounds == here:
                if self.ended:
                    raise NotRight(
                        "one process waits in all_reduce for another that is done already: for real, the run"
                        " would hang. All must call it equally often."
                    )
                self.changed.wait(0.5)
            assert self.sum is not None
            return self.sum

    def leave(self) -> None:
        with self.changed:
            self.ended += 1
            self.changed.notify_all()


class _Member:
    """A process of a group that is a thread."""

    def __init__(self, exchange: _Exchange, rank: int):
        self.exchange = exchange
        self.rank = rank
        self.world_size = exchange.world_size
        self.sent = 0
        """Numbers that were given to all_reduce."""

    def all_reduce(self, tensor: Tensor) -> None:
        if not isinstance(tensor, Tensor):
            raise NotRight(f"all_reduce takes a tensor, and got {type(tensor).__name__}.")
        self.sent += tensor.numel()
        with torch.no_grad():
            tensor.copy_(self.exchange.add(tensor))


def _all_at_once(work: Callable[[_Member], Any], world_size: int) -> list[tuple[Any, int]]:
    """For each rank what `work` returns, and how many numbers it sent; all ranks run at once."""
    exchange = _Exchange(world_size)
    members = [_Member(exchange, rank) for rank in range(world_size)]
    results: list[Any] = [None] * world_size
    errors: list[Exception] = []

    def run(member: _Member) -> None:
        try:
            results[member.rank] = work(member)
        except Exception as error:
            errors.append(error)
        finally:
            exchange.leave()

    threads = [threading.Thread(target=run, args=(member,), daemon=True) for member in members]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        threads[0].join(0.01)
    if errors:  # one that waits for another says less than the other's own error
        raise min(errors, key=lambda error: isinstance(error, NotRight))
    return [(result, member.sent) for result, member in zip(results, members)]


def _ddp_cases(generator: Generator) -> list[tuple]:
    def case(optimizer: str, lr: float, frozen: bool, sizes: tuple) -> tuple[str, float, bool, Tensor]:
        """sizes: steps, processes, micro-batches, rows, tokens in a row and one."""
        return optimizer, lr, frozen, torch.randint(4, sizes, generator=generator)

    return [
        case("SGD", 0.5, False, (1, 1, 1, 2, 4)),
        case("SGD", 0.5, False, (1, 2, 1, 2, 4)),
        case("SGD", 0.5, False, (2, 2, 2, 1, 3)),
        case("SGD", 0.3, True, (2, 3, 1, 1, 4)),
        case("AdamW", 0.05, False, (3, 2, 3, 2, 3)),
        case("AdamW", 0.05, True, (2, 4, 1, 1, 5)),
    ]


def _small_model(frozen: bool) -> nn.Module:
    """frozen: whether its bias does not learn."""
    model = nn.Sequential(OrderedDict(embedding=nn.Embedding(4, 2), head=nn.Linear(2, 4)))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters(), 1):
            values = torch.linspace(-2, 2, parameter.numel()).mul(number).sin()
            parameter.copy_(values.view(parameter.shape))
    model.get_parameter("head.bias").requires_grad_(not frozen)
    return model


def _observe_ddp(
    answer: Callable, optimizer: str, lr: float, frozen: bool, tokens: Tensor
) -> Iterator[tuple[str, Any]]:
    """tokens: int64 [steps, processes, micro-batches, rows, time + 1]."""
    world_size = tokens.size(1)
    models = [_small_model(frozen) for _ in range(world_size)]
    optimizers = [getattr(torch.optim, optimizer)(model.parameters(), lr=lr) for model in models]
    trained = sum(p.numel() for p in models[0].parameters() if p.requires_grad)

    for step, of_all in enumerate(tokens, 1):

        def work(member: _Member, of_all: Tensor = of_all) -> Any:
            micro_batches = [(rows[:, :-1].clone(), rows[:, 1:].clone()) for rows in of_all[member.rank]]
            return answer(models[member.rank], optimizers[member.rank], micro_batches, member)

        results = _all_at_once(work, world_size)
        last = world_size - 1
        loss = results[0][0]
        if isinstance(loss, Tensor):
            raise NotRight("the loss comes back as a tensor: .item() makes it a Python float.")
        for rank in sorted({0, last}):
            for name, parameter in models[rank].named_parameters():
                yield f"{name} of rank {rank} after step {step}", parameter.detach().clone()
        yield f"the loss that rank 0 returns in step {step}", loss
        yield f"the loss that rank {last} returns in step {step}", results[last][0]
        sent = max(numbers for _, numbers in results)
        if sent > trained + of_all.size(1):
            raise NotRight(
                f"the numbers are right, but {sent} of them went through all_reduce in a step of"
                f" {of_all.size(1)} micro-batches, and the model has {trained} that learn. Between machines"
                " that is the slow part: let the gradients add up in .grad, and reduce each once, after the"
                " last micro-batch."
            )


def _ddp_with(
    clear: bool = True, share: float | None = None, divide: bool = True, reduce: bool = True
) -> Callable[..., float]:
    """A step with one thing changed."""

    def step(model: nn.Module, optimizer: Any, micro_batches: list, group: Group) -> float:
        total = _local_backward(model, optimizer, micro_batches, clear, share)
        if reduce:
            _average_gradients(model, group, divide)
        optimizer.step()
        return _mean_loss(total * (1 / len(micro_batches) if share else 1), group)

    return step


def _alone(model: nn.Module, optimizer: Any, micro_batches: list, group: Group) -> float:
    total = _local_backward(model, optimizer, micro_batches)
    optimizer.step()
    return total.item()


def _never_divided(model: nn.Module, optimizer: Any, micro_batches: list, group: Group) -> float:
    total = _local_backward(model, optimizer, micro_batches, share=1.0)
    _average_gradients(model, group)
    optimizer.step()
    return _mean_loss(total, group)


def _summed_loss(model: nn.Module, optimizer: Any, micro_batches: list, group: Group) -> float:
    return ddp_step(model, optimizer, micro_batches, group) * group.world_size


def _summed_loss_of_all(model: nn.Module, optimizer: Any, micro_batches: list, group: Group) -> float:
    return _summed_loss(model, optimizer, micro_batches, group) * len(micro_batches)


def _own_loss(model: nn.Module, optimizer: Any, micro_batches: list, group: Group) -> float:
    total = _local_backward(model, optimizer, micro_batches)
    _average_gradients(model, group)
    optimizer.step()
    return total.item()


def _reduced_each_time(model: nn.Module, optimizer: Any, micro_batches: list, group: Group) -> float:
    optimizer.zero_grad()
    total = torch.zeros(())
    for x, y in micro_batches:
        loss = cross_entropy(model(x), y) / len(micro_batches)
        loss.backward()
        _average_gradients(model, group)
        total += loss.detach()
    optimizer.step()
    return _mean_loss(total, group)


def _reduced_again(model: nn.Module, optimizer: Any, micro_batches: list, group: Group) -> float:
    optimizer.zero_grad()
    total = torch.zeros(())
    for x, y in micro_batches:
        loss = cross_entropy(model(x), y) / len(micro_batches)
        loss.backward()
        _average_gradients(model, group, divide=False)
        total += loss.detach()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= group.world_size
    optimizer.step()
    return _mean_loss(total, group)


def _with_loss(of: Callable[[list[Tensor]], Tensor]) -> Callable[..., float]:
    """A right step that returns another loss. of: from those of the micro-batches."""

    def step(model: nn.Module, optimizer: Any, micro_batches: list, group: Group) -> float:
        with torch.no_grad():
            losses = [cross_entropy(model(x), y) for x, y in micro_batches]
        ddp_step(model, optimizer, micro_batches, group)
        return _mean_loss(of(losses).clone(), group)

    return step


def _loss_after(model: nn.Module, optimizer: Any, micro_batches: list, group: Group) -> float:
    ddp_step(model, optimizer, micro_batches, group)
    with torch.no_grad():
        losses = [cross_entropy(model(x), y) for x, y in micro_batches]
    return _mean_loss(torch.stack(losses).mean(), group)


def _cleared_in_between(model: nn.Module, optimizer: Any, micro_batches: list, group: Group) -> float:
    total = torch.zeros(())
    for x, y in micro_batches:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y) / len(micro_batches)
        loss.backward()
        total += loss.detach()
    _average_gradients(model, group)
    optimizer.step()
    return _mean_loss(total, group)


def _step_for_each(model: nn.Module, optimizer: Any, micro_batches: list, group: Group) -> float:
    losses = [ddp_step(model, optimizer, [micro_batch], group) for micro_batch in micro_batches]
    return sum(losses) / len(losses)


def _first_alone(model: nn.Module, optimizer: Any, micro_batches: list, group: Group) -> float:
    return ddp_step(model, optimizer, micro_batches[:1], group)


def _one_steps(model: nn.Module, optimizer: Any, micro_batches: list, group: Group) -> float:
    total = _local_backward(model, optimizer, micro_batches)
    _average_gradients(model, group)
    if group.rank == 0:
        optimizer.step()
    return _mean_loss(total, group)


def _own_last_loss(model: nn.Module, optimizer: Any, micro_batches: list, group: Group) -> float:
    with torch.no_grad():
        loss = [cross_entropy(model(x), y).item() for x, y in micro_batches][-1]
    ddp_step(model, optimizer, micro_batches, group)
    return loss


def _weights_averaged(model: nn.Module, optimizer: Any, micro_batches: list, group: Group) -> float:
    total = _local_backward(model, optimizer, micro_batches)
    optimizer.step()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                group.all_reduce(parameter)
                parameter /= group.world_size
    return _mean_loss(total, group)


DDP_STEP = Exercise(
    task="""Data parallelism by hand: what DistributedDataParallel does in a step. Every process has the whole
    model, with the same weights, an optimizer of its own, and its own rows of the batch. `micro_batches` is
    this process's part: a list of (x, y), int64 [rows, time] each, all of one size and equally many in every
    process; `model(x)` gives logits [rows, time, vocab_size]. `group.world_size` says how many processes
    there are, and `group.all_reduce(tensor)` replaces a tensor, in place, by the sum of what all processes
    give; it waits until all have called it.

    1. Clear the old gradients.
    2. Run every micro-batch forward and backward, so that .grad holds the gradient of the mean cross-entropy
       of all of them.
    3. Average each parameter's gradient over the processes (a parameter that is frozen has none: .grad is
       None). Gradients may travel once a step, not once a micro-batch.
    4. Let the optimizer take a step. So every process takes the same step, that of one process on the whole
       batch, and the weights stay alike.
    5. Return the mean loss of the whole batch before the step, over all micro-batches and processes: a Python
       float, the same in every process.

    Where a case fails, `tokens` is [step, process, micro-batch, row, place]: a row without its last token is
    a row of x, and without its first one of y.""",
    reference=ddp_step,
    cases=_ddp_cases,
    observe=_observe_ddp,
    points=3,
    stub="""def ddp_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[tuple[torch.Tensor, torch.Tensor]],
    group,  # .rank, .world_size, .all_reduce(tensor)
) -> float:
    # your code here
    ...
""",
    forbids=(DistributedDataParallel,),
    valid=lambda optimizer, lr, frozen, tokens: (
        tokens.dim() == 5 and all(tokens.shape) and tokens.size(4) > 1
    ),
    mistakes=(
        Mistake(
            "summed, not averaged",
            _ddp_with(divide=False),
            "The gradients were added up over the processes and not divided. With eight of them the step is"
            " that of a learning rate eight times as large: /= group.world_size.",
        ),
        Mistake(
            "nothing is exchanged",
            _alone,
            "all_reduce was not called. Each process took a step by its own gradient and returned its own"
            " loss, as if it were alone: as many separate trainings, each on a small batch.",
        ),
        Mistake(
            "no gradient is exchanged before the step",
            _ddp_with(reduce=False),
            "Each process took a step by its own gradient: none was exchanged, or only after optimizer.step."
            " From then on their weights differ, and that is as many separate trainings, each on a small"
            " batch. all_reduce belongs between backward and step.",
        ),
        Mistake(
            "the weights are averaged instead",
            _weights_averaged,
            "Each took its own step, and the weights were averaged afterwards. For plain SGD that comes to"
            " the same; AdamW divides by each process's own second moment, and its moments drift apart.",
        ),
        Mistake(
            "exchanged after every micro-batch",
            _reduced_each_time,
            "The result is right, but the gradients travelled once for every micro-batch. Let them add up in"
            " .grad and reduce them once, after the last.",
        ),
        Mistake(
            "the micro-batches are not divided",
            _ddp_with(share=1.0),
            "The losses of the micro-batches were not divided by their number, so the gradient is as many"
            " times too long.",
        ),
        Mistake(
            "the micro-batches are not divided, nor is the loss",
            _never_divided,
            "The losses of the micro-batches were added up and never divided by their number: the gradient is"
            " as many times too long, and the loss that is returned as many times too large. Divide each"
            " loss by len(micro_batches) before its backward.",
        ),
        Mistake(
            "the loss is summed over the processes",
            _summed_loss,
            "The weights are right, but the loss is the sum of those of the processes: after all_reduce it"
            " has to be divided by group.world_size, as the gradients are.",
        ),
        Mistake(
            "the loss is summed over everything",
            _summed_loss_of_all,
            "The weights are right, but the loss is the sum over micro-batches and processes. Divide it by"
            " len(micro_batches) and by group.world_size.",
        ),
        Mistake(
            "the gradients are not cleared",
            _ddp_with(clear=False),
            "backward adds to what is there: without zero_grad the last step's gradient is still in it.",
        ),
        Mistake(
            "sums are summed again",
            _reduced_again,
            "all_reduce was called after every micro-batch on .grad, in which the earlier ones already are,"
            " summed over all processes. These sums are added up once more each time. Reduce once, after the"
            " last backward.",
        ),
        Mistake(
            "the loss of the last micro-batch",
            _with_loss(lambda losses: losses[-1]),
            "The weights are right, but the loss is that of the last micro-batch: after the loop, `loss` is"
            " what it was in its last round. Add the losses up in the loop, and divide by their number.",
        ),
        Mistake(
            "the losses are added up",
            _with_loss(lambda losses: torch.stack(losses).sum()),
            "The weights are right, but the loss is the sum of those of the micro-batches. It grows with"
            " their number: divide by it, as the gradient is divided.",
        ),
        Mistake(
            "the loss after the step",
            _loss_after,
            "The weights are right, but the loss is that of the new weights. It costs another forward pass,"
            " and the task asks for the loss before the step, which the loop has computed already.",
        ),
        Mistake(
            "the last loss of its own",
            _own_last_loss,
            "The weights are right, but the loss is that of this process's last micro-batch. Wanted is the"
            " mean over all micro-batches of all processes: add up in the loop, then all_reduce.",
        ),
        Mistake(
            "gradients are cleared in between",
            _cleared_in_between,
            "zero_grad was called before each micro-batch, so only the last one's gradient is left. Clear"
            " once, before the loop.",
        ),
        Mistake(
            "only the first micro-batch",
            _first_alone,
            "Only the first micro-batch was used, or the function returned in the first round of its loop:"
            " the gradient and the loss are those of micro_batches[0], and the other rows were never read.",
        ),
        Mistake(
            "a step for each micro-batch",
            _step_for_each,
            "The optimizer took a step after every micro-batch. They are parts of one batch: their gradients"
            " add up, and one step follows.",
        ),
        Mistake(
            "only rank 0 takes a step",
            _one_steps,
            "The optimizer's step was taken on rank 0 alone, and the weights of the others stay. Every"
            " process has a model of its own, and takes the same step.",
        ),
        Mistake(
            "only its own loss",
            _own_loss,
            "The weights are right, but the loss is that of this process's rows. all_reduce it as well, and"
            " divide: eight processes would otherwise log eight losses.",
        ),
    ),
    hints=(
        "Up to the last backward it is your accumulation loop. What is new comes between it and the step.",
        "After the loop: for each parameter with a gradient, group.all_reduce(p.grad), then p.grad /="
        " group.world_size. The loss travels the same way, as a tensor.",
        "total = torch.zeros(()); in the loop: loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) /"
        " len(micro_batches); loss.backward(); total += loss.detach(). At the end group.all_reduce(total);"
        " return total.item() / group.world_size.",
    ),
)


# ---- 10. how much of the machine is used


def mfu(
    n_layer: int, n_embd: int, vocab_size: int, block_size: int, tokens_per_second: float, peak_flops: float
) -> float:
    return _flops(n_layer, n_embd, vocab_size, block_size) * tokens_per_second / peak_flops


def _flops(n_layer: int, n_embd: int, vocab_size: int, block_size: int) -> int:
    """Of a training step, for each token."""
    return 6 * (12 * n_layer * n_embd**2 + vocab_size * n_embd) + 12 * n_layer * n_embd * block_size


def _mfu_cases(generator: Generator) -> list[tuple]:
    def case() -> tuple:
        sizes = (
            random_int(generator, 2, 24),
            64 * random_int(generator, 1, 12),
            random_int(generator, 256, 50000),
            64 * random_int(generator, 1, 16),
        )
        tokens_per_second = float(random_int(generator, 1000, 100000))
        share_used = random_int(generator, 10, 60) / 100
        return *sizes, tokens_per_second, _flops(*sizes) * tokens_per_second / share_used

    return [
        (12, 768, 50257, 1024, 150e3, 312e12),
        (48, 1600, 50257, 1024, 14e3, 312e12),
        (5, 128, 1024, 128, 30e3, 5e11),
        (1, 1, 1, 1, 1.0, 1000.0),
        (3, 64, 50257, 1, 2.5e4, 1e11),
        case(),
        case(),
        case(),
    ]


def _mfu_with(scores: int, *case: Any, mlp: int = 8, attention: int = 4) -> float:
    """scores: what is counted for the attention's scores, in n_layer n_embd block_size; mlp, attention: the
    weights of each in a block, in n_embd².
    """
    n_layer, n_embd, vocab_size, block_size, tokens_per_second, peak_flops = case
    weights = (mlp + attention) * n_layer * n_embd**2 + vocab_size * n_embd
    flops = 6 * weights + scores * n_layer * n_embd * block_size
    return flops * tokens_per_second / peak_flops


MFU = Exercise(
    task="""Is the machine busy with the model, or with waiting? MFU, model FLOPs utilisation, is the
    arithmetic that training needs in a second over the `peak_flops` (FLOP/s) that the machine could do.

    - For each token, a forward pass takes 2 operations for each weight of a matrix product. A block's linear
      layers are q, k, v and o, n_embd to n_embd each, and an MLP from n_embd to 4 n_embd and back; there are
      `n_layer` blocks. The output layer has vocab_size times n_embd weights. An embedding only looks up.
    - In each block the attention takes 2 · n_embd · block_size operations for a token's scores, and as many
      for the weighted sum of the values.
    - The backward pass takes twice as many as the forward, of both kinds.

    Return the MFU, a float: 0.4 means 40 percent.""",
    reference=mfu,
    stub="""def mfu(
    n_layer: int,
    n_embd: int,
    vocab_size: int,
    block_size: int,
    tokens_per_second: float,
    peak_flops: float,
) -> float:
    # your code here
    ...
""",
    cases=_mfu_cases,
    forbids=(GPT.flops_per_token,),
    valid=lambda n_layer, n_embd, vocab_size, block_size, tokens_per_second, peak_flops: (
        min(n_layer, n_embd, vocab_size, block_size) >= 1 and min(tokens_per_second, peak_flops) > 0
    ),
    mistakes=(
        Mistake(
            "the scores are forgotten",
            lambda n_layer, n_embd, vocab_size, block_size, *rate: mfu(n_layer, n_embd, vocab_size, 0, *rate),
            "Only the weights were counted. Queries times keys and scores times values have none, but are"
            " matrix products too.",
        ),
        Mistake(
            "forward only",
            lambda *case: mfu(*case) / 3,
            "These are the operations of the forward pass, a third of the whole. Training also goes backward,"
            " which costs twice that.",
        ),
        Mistake(
            "the backward counts once",
            lambda *case: mfu(*case) * 2 / 3,
            "You took the backward to cost as much as the forward. It costs twice that: gradients of the"
            " inputs, and gradients of the weights.",
        ),
        Mistake(
            "the embedding is counted as well",
            lambda n_layer, n_embd, vocab_size, *rest: mfu(n_layer, n_embd, 2 * vocab_size, *rest),
            "vocab_size times n_embd was counted twice. Looking up a row of the embedding takes no"
            " multiplication; only the output layer's does.",
        ),
        Mistake(
            "the output layer is forgotten",
            lambda n_layer, n_embd, vocab_size, *rest: mfu(n_layer, n_embd, 0, *rest),
            "Only the blocks were counted. The output layer is a large matrix product: in GPT-2 124M it is"
            " more than a quarter of the work.",
        ),
        Mistake(
            "an output layer in every block",
            lambda n_layer, n_embd, vocab_size, *rest: mfu(n_layer, n_embd, n_layer * vocab_size, *rest),
            "The output layer was counted n_layer times. It stands behind the last block, once.",
        ),
        Mistake(
            "the scores of one block",
            lambda n_layer, n_embd, vocab_size, block_size, *rate: (
                mfu(n_layer, n_embd, vocab_size, 0, *rate) + 12 * n_embd * block_size * rate[0] / rate[1]
            ),
            "The attention's scores were counted once. Every block has an attention: n_layer times.",
        ),
        Mistake(
            "the scores count twice",
            lambda *case: _mfu_with(24, *case),
            "The operations of the scores and of the weighted sum were doubled along with the weights. They"
            " are operations already, a multiplication and an addition each; only a weight still has to be"
            " taken twice.",
        ),
        Mistake(
            "no backward for the scores",
            lambda *case: _mfu_with(4, *case),
            "The backward was counted for the weights only. The scores are matrix products as well, and"
            " their backward also takes twice the forward.",
        ),
        Mistake(
            "half of the scores",
            lambda *case: _mfu_with(6, *case),
            "Half of the scores was counted, since a causal mask hides the other half, or since only one of"
            " the two products was. The task counts both products in full, as is usual for MFU.",
        ),
        Mistake(
            "one matrix in the MLP",
            lambda *case: _mfu_with(12, *case, mlp=4),
            "The MLP was counted with 4 n_embd² weights. It goes from n_embd to 4 n_embd and back: 8.",
        ),
        Mistake(
            "the projection after the attention is forgotten",
            lambda *case: _mfu_with(12, *case, attention=3),
            "Only q, k and v were counted. o, which mixes the heads, has n_embd² weights as well.",
        ),
        Mistake(
            "in percent",
            lambda *case: 100 * mfu(*case),
            "The number is right, but in percent. Return the fraction: 0.4, not 40.",
        ),
    ),
    hints=(
        (
            "Operations for each token first, then times tokens_per_second, then over peak_flops. How many"
            " weights has a block?"
        ),
        (
            "A block has 4 n_embd² + 8 n_embd² weights; the output layer comes once. Forward and backward"
            " together are three times the forward."
        ),
        (
            "flops = 6 * (12 * n_layer * n_embd**2 + vocab_size * n_embd) + 12 * n_layer * n_embd *"
            " block_size; flops * tokens_per_second / peak_flops."
        ),
    ),
)


EXERCISES: tuple[Exercise, ...] = (
    INITIAL_STD,
    SPLIT_C_ATTN,
    LOAD_HF_WEIGHTS,
    SCORE_CHOICES,
    PACK_DOCUMENTS,
    SHARD_READER,
    ACCUMULATED_GRADIENT,
    DECAY_GROUPS,
    DDP_STEP,
    MFU,
)
