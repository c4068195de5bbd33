"""The graded exercises of week 6: first weights, weight decay, accumulated gradients, others' weights,
packing, scoring choices, MFU.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from shared.course.exercise import Exercise, Mistake, random_int
from shared.data.corpus import fixed_windows
from shared.models.formats import HF_GPT2
from shared.models.gpt import GPT, MODERN, GPTConfig
from shared.registry import without_memory

# ---- 1. first weights


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
        case("attn.o_proj.weight", 1, 1),
        case("mlp.down_proj.weight", 1, 4),
        case("mlp.up_proj.weight", 4, 1),
        case("mlp.down_proj.bias", 1),
        case("attn_norm.weight", 1),
    ]


INITIAL_STD = Exercise(
    task="""How large are a GPT's weights before it has learned anything? Return the standard deviation, a
    float, with which the parameter `name` of `shape` starts in a GPT-2 of `n_layer` blocks. The names are
    those of our GPT, such as blocks.3.attn.o_proj.weight. Embeddings and the weights of linear layers are
    drawn with 0.02. Two layers in each block, attn.o_proj and mlp.down_proj, add to the residual stream.
    Their weights are drawn smaller: so that all these additions of the whole model together have the variance
    that a single one would have with 0.02. Biases (0) and the gains of norms (1) start as constants, which
    have a standard deviation of 0.""",
    reference=initial_std,
    cases=_std_cases,
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
            "biases and gains are drawn",
            _vectors_too,
            "Vectors got the deviation of a matrix. A bias starts as 0 and a norm's gain as 1 everywhere:"
            " nothing about them is random.",
        ),
    ),
    hints=(
        (
            "Three kinds of parameter: vectors, the two matrices that write into the stream, and all other"
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


# ---- 2. weight decay


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
    return [case(), case(bias=False), case(**MODERN), (theirs,), ({"weight": (3, 2), "bias": (3,)},)]


DECAY_GROUPS = Exercise(
    task="""Weight decay pulls weights towards 0. That suits matrices, and embeddings are matrices too. It
    does not suit vectors: a bias, or the gain of a norm, which should stay near 1. `shapes` maps the names of
    a model's parameters to their shapes. Return two lists of names, those that AdamW decays and those that it
    does not, each in the order of `shapes`. The model may be another library's, where a norm is called
    ln_1.""",
    reference=decay_groups,
    cases=_decay_cases,
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
            "This is right as long as a norm has norm in its name. Hugging Face calls it ln_1, and its gain"
            " is decayed in silence. Ask the shape.",
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


# ---- 3. accumulated gradients


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

    return [case(5, 3, 4, 4), case(4, 2, 6, 1), case(7, 4, 2, 5, 3), case(3, 3, 1, 1, 8, 2), case(6, 2, 3)]


ACCUMULATED_GRADIENT = Exercise(
    task="""GPT-2 was trained on half a million tokens in each step; few machines hold as many. So a step
    reads them in micro-batches, and adds up their gradients. The model is one layer: `weight` is float32
    [vocab_size, features], its logits are x @ weight.T. `batches` is a list of (x, y), x float32 [n,
    features], y int64 [n], and n differs from one to the next. Return the gradient with respect to weight,
    float32 [vocab_size, features], of the cross-entropy averaged over all examples of all micro-batches.
    Never join them: call backward once for each. `weight` itself should stay as it is: work on
    weight.clone().requires_grad_().""",
    reference=accumulated_gradient,
    cases=_accumulation_cases,
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


# ---- 4. weights that others trained


def split_c_attn(weight: Tensor, bias: Tensor, n_head: int) -> tuple[Tensor, ...]:
    n_embd = len(weight)
    parts = []
    for tensor, kind in ((weight, "weight"), (bias, "bias")):
        shape = torch.Size([n_embd] * tensor.dim())
        shapes = {f"blocks.0.attn.{letter}_proj.{kind}": shape for letter in "qkv"}
        parts += HF_GPT2.ours(tensor, shapes, n_embd // n_head).values()
    return tuple(parts)


def _keys_first(weight: Tensor, bias: Tensor, n_head: int) -> tuple[Tensor, ...]:
    q_weight, k_weight, v_weight, q_bias, k_bias, v_bias = split_c_attn(weight, bias, n_head)
    return k_weight, q_weight, v_weight, k_bias, q_bias, v_bias


def _per_head(weight: Tensor, bias: Tensor, n_head: int) -> tuple[Tensor, ...]:
    n_embd = len(weight)
    weights = weight.T.reshape(n_head, 3, -1, n_embd).transpose(0, 1).reshape(3, -1, n_embd)
    biases = bias.view(n_head, 3, -1).transpose(0, 1).reshape(3, -1)
    return *weights, *biases


def _split_cases(generator: Generator) -> list[tuple]:
    def case(n_embd: int, n_head: int) -> tuple[Tensor, Tensor, int]:
        weight = torch.randn(n_embd, 3 * n_embd, generator=generator)
        return weight, torch.randn(3 * n_embd, generator=generator), n_head

    return [case(6, 2), case(12, 3), case(6, 3), case(9, 1), case(12, 4)]


SPLIT_C_ATTN = Exercise(
    task="""Hugging Face's GPT-2 keeps an attention's three projections in one Conv1D, c_attn: `weight` is
    float32 [n_embd, 3 n_embd], `bias` [3 n_embd], and it computes x @ weight + bias, which is all queries,
    then all keys, then all values. Our GPT has three nn.Linear, which compute x @ weight.T + bias. Return
    what to load into them: (q_weight, k_weight, v_weight, q_bias, k_bias, v_bias), each weight [n_embd,
    n_embd], each bias [n_embd]. The heads have the same order in both; `n_head` is given in case you need
    it.""",
    reference=split_c_attn,
    cases=_split_cases,
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


# ---- 5. packing documents


def pack_documents(documents: list[list[int]], end_of_text: int, block_size: int) -> tuple[Tensor, Tensor]:
    return fixed_windows(np.array(_stream(documents, end_of_text)), block_size)


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


def _pack_cases(generator: Generator) -> list[tuple]:
    def case(count: int, longest: int, end_of_text: int, block_size: int) -> tuple[list[list[int]], int, int]:
        lengths = [random_int(generator, block_size, longest + 1) for _ in range(count)]
        documents = [torch.randint(1, 50, (n,), generator=generator).tolist() for n in lengths]
        return documents, end_of_text, block_size

    small = [[5, 6, 7], [8], [9, 10, 11, 12]]
    return [
        (small, 0, 3),
        (small, 0, 2),
        (small, 50256, 4),
        case(3, 9, 0, 4),
        case(5, 7, 50, 2),
        case(1, 12, 0, 6),
        case(4, 8, 99, 7),
    ]


PACK_DOCUMENTS = Exercise(
    task="""A web page is rarely as long as a row of the batch, so documents are packed. `documents` is a list
    of lists of token ids. Let each begin with the token `end_of_text`, the first one too, and join them all
    into one stream. Cut it into rows, side by side. Return (inputs, targets), int64 [rows, block_size] each,
    where a target is the token after its input. Every token of the stream but the first should be the target
    of exactly one input; only at the very end of the stream, what fills no whole row is left out.""",
    reference=pack_documents,
    cases=_pack_cases,
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


# ---- 6. scoring choices


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

    return [
        case(4, "Use a knife.", "Use the blunt end of a large wooden spoon."),
        case(6, "boil it", "freeze it overnight, then boil it", "throw it away"),
        case(2, "salt", "sugar, two spoons of it"),
        case(5, "a", "ab", "abcdefgh", "abcd"),
        case(1, "Open the window.", "Shut it."),
        case(3, "yes", "no"),
    ]


SCORE_CHOICES = Exercise(
    task="""PIQA asks which of several answers is right. A base model cannot be asked, but it can be measured:
    which answer does it find the most probable for its length? For choice i, `ids[i]` (int64 [time]) holds
    the context, `n_context` tokens, and then the choice's tokens; `logits[i]` (float32 [time, vocab_size]) is
    what the model returned for all of them; `choices[i]` is the choice's text. Its score is the sum of the
    log-probabilities of the choice's tokens, each given all before it, divided by the characters of the text.
    Return (scores, best): a list of floats, and the number of the best choice. This is the measure called
    acc_norm.""",
    reference=score_choices,
    cases=_choice_cases,
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


# ---- 7. how much of the machine is used


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
        case(),
        case(),
        case(),
    ]


MFU = Exercise(
    task="""Is the machine busy with the model, or with waiting? MFU, model FLOPs utilisation, is the
    arithmetic that training needs in a second over the `peak_flops` (FLOP/s) that the machine could do. For
    each token, a forward pass takes 2 operations for each weight of a matrix product, and in each layer 4
    n_embd block_size more for the attention's scores and what they weigh. The backward pass takes twice as
    many. A block's linear layers are q, k, v and o, n_embd to n_embd each, and an MLP from n_embd to 4 n_embd
    and back; the output layer has vocab_size times n_embd weights. An embedding only looks up. Return the
    MFU, a float: 0.4 means 40 percent.""",
    reference=mfu,
    cases=_mfu_cases,
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
    DECAY_GROUPS,
    ACCUMULATED_GRADIENT,
    SPLIT_C_ATTN,
    PACK_DOCUMENTS,
    SCORE_CHOICES,
    MFU,
)
