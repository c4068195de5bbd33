"""The graded exercises of week 9: LoRA's first values, output, training step, merge and scale; DoRA; loss on
answers only; two adapters in one.
"""

import math
from typing import Any

import torch
from torch import Generator, Tensor

from shared.course.exercise import Exercise, Mistake, random_int


def _adapter(generator: Generator, inputs: int, outputs: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, and an A and a B that have been trained."""
    weight = torch.randn(outputs, inputs, generator=generator)
    a = torch.randn(r, inputs, generator=generator)
    b = torch.randn(outputs, r, generator=generator)
    return weight, a, b


# ---- 1. first values


def first_values(noise_a: Tensor, noise_b: Tensor) -> tuple[Tensor, Tensor]:
    return noise_a / math.sqrt(noise_a.shape[1]), torch.zeros_like(noise_b)


def _first_cases(generator: Generator) -> list[tuple[Tensor, Tensor]]:
    def case(inputs: int, outputs: int, r: int) -> tuple[Tensor, Tensor]:
        noise_a = torch.randn(r, inputs, generator=generator)
        return noise_a, torch.randn(outputs, r, generator=generator)

    return [case(6, 4, 2), case(8, 5, 3), case(16, 16, 4), case(12, 7, 2), case(10, 3, 5)]


FIRST_VALUES = Exercise(
    task="""LoRA adds B A to a weight. Before the first step the model must compute exactly what it did, and
    yet have something to learn from. `noise_a` is float32 [r, in] and `noise_b` float32 [out, r], both drawn
    from N(0, 1). Return (A, B), of these shapes: A has a variance of 1/in, so that A x is about as large as
    x, and B is what makes the sum start where the base is. You need not use both noises.""",
    reference=first_values,
    cases=_first_cases,
    mistakes=(
        Mistake(
            "A and B both random",
            lambda a, b: (a / math.sqrt(a.shape[1]), b / math.sqrt(b.shape[1])),
            "Both are random, so B A is not zero: the model starts as a damaged one, and has first to unlearn"
            " the noise. Make B zero.",
        ),
        Mistake(
            "A and B both zero",
            lambda a, b: (torch.zeros_like(a), torch.zeros_like(b)),
            "Both are zero. The gradient of A is a product with B, and that of B one with A: both stay zero,"
            " and nothing is ever learned.",
        ),
        Mistake(
            "A zero instead of B",
            lambda a, b: (torch.zeros_like(a), b / math.sqrt(b.shape[1])),
            "B A is zero, as it should be, and A would learn. But by convention it is B that starts at zero,"
            " in the paper and in PEFT.",
        ),
        Mistake(
            "B nearly zero",
            lambda a, b: (a / math.sqrt(a.shape[1]), 1e-3 * b),
            "B is small but not zero. The start is then not exactly the base, which is the one thing that can"
            " be tested.",
        ),
        Mistake(
            "divided by the rank",
            lambda a, b: (a / math.sqrt(len(a)), torch.zeros_like(b)),
            "A has a variance of 1/r. Each of its outputs is a sum over the inputs, so it is their number"
            " that must be divided out.",
        ),
        Mistake(
            "variance for standard deviation",
            lambda a, b: (a / a.shape[1], torch.zeros_like(b)),
            "A was divided by in. Its variance is then 1/in²: divide by the square root.",
        ),
    ),
    hints=(
        "B A must be zero, and the gradients of A and B must not both be. Which one of the two is zero?",
        (
            "B is torch.zeros_like(noise_b). Dividing noise by a number divides its variance by the number's"
            " square."
        ),
        "return noise_a / noise_a.shape[1] ** 0.5, torch.zeros_like(noise_b).",
    ),
)


# ---- 2. the output


def lora_output(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    return _output(x, weight, a, b, alpha / len(a))


def _output(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, *, base: float = 1.0) -> Tensor:
    """base: what the base's own output is multiplied by."""
    return base * (x @ weight.T) + scale * (x @ a.T @ b.T)


def _output_cases(generator: Generator) -> list[tuple]:
    def case(rows: int, inputs: int, outputs: int, r: int, alpha: float) -> tuple:
        x = torch.randn(rows, inputs, generator=generator)
        return x, *_adapter(generator, inputs, outputs, r), alpha

    return [
        case(2, 6, 4, 2, 3.0),
        case(3, 5, 5, 3, 8.0),
        case(4, 8, 3, 4, 12.0),
        case(1, 7, 9, 2, 5.0),
        case(5, 16, 10, 8, 16.0),
    ]


LORA_OUTPUT = Exercise(
    task="""A linear layer with an adapter. `x` is float32 [batch, in], `weight` [out, in] is the layer's, as
    nn.Linear has it, `a` [r, in] and `b` [out, r] are the adapter's. Return x weightᵀ plus the adapter's
    part, which is multiplied by alpha / r: float32 [batch, out].""",
    reference=lora_output,
    cases=_output_cases,
    mistakes=(
        Mistake(
            "scale forgotten",
            lambda x, w, a, b, alpha: _output(x, w, a, b, 1.0),
            "B A was added as it is. With alpha / r, the same alpha and learning rate are about right for"
            " another rank.",
        ),
        Mistake(
            "alpha / √r for alpha / r",
            lambda x, w, a, b, alpha: _output(x, w, a, b, alpha / math.sqrt(len(a))),
            "The adapter's part was multiplied by alpha / √r. That is rsLoRA: a good choice, but another one;"
            " a file trained with one scale is wrong with the other.",
        ),
        Mistake(
            "not divided by the rank",
            lambda x, w, a, b, alpha: _output(x, w, a, b, alpha),
            "The adapter's part was multiplied by alpha alone. The scale is alpha / r.",
        ),
        Mistake(
            "divided by the number of inputs",
            lambda x, w, a, b, alpha: _output(x, w, a, b, alpha / a.shape[1]),
            "alpha was divided by a's second dimension, the inputs. The rank is its first.",
        ),
        Mistake(
            "scale on both parts",
            lambda x, w, a, b, alpha: _output(x, w, a, b, alpha / len(a), base=alpha / len(a)),
            "The base's output was multiplied by the scale too. The base stays what it is.",
        ),
        Mistake(
            "base left out",
            lambda x, w, a, b, alpha: _output(x, w, a, b, alpha / len(a), base=0.0),
            "Only the adapter's part is there. It is what changes: add it to x @ weight.T.",
        ),
    ),
    hints=(
        (
            "First down to r numbers with a, then up to out with b. Both are stored as nn.Linear's weight,"
            " [to, from]."
        ),
        "The adapter's part is x @ a.T @ b.T. The rank is a.shape[0].",
        "return x @ weight.T + alpha / a.shape[0] * (x @ a.T @ b.T).",
    ),
    tolerance=1e-4,
)


# ---- 3. a step of training


def lora_step(  # noqa: PLR0917  # what a learner writes, called by position
    x: Tensor, grad: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, lr: float
) -> tuple[Tensor, Tensor, Tensor]:
    new_a = a - lr * scale * (b.T @ grad.T @ x)
    new_b = b - lr * scale * (grad.T @ (x @ a.T))
    return weight, new_a, new_b


def _base_too(x: Tensor, grad: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, new_a, new_b = lora_step(x, grad, weight, *rest)
    lr = rest[-1]
    return weight - lr * grad.T @ x, new_a, new_b


def _b_before_a(
    x: Tensor, grad: Tensor, weight: Tensor, a: Tensor, b: Tensor, *rest: float
) -> tuple[Tensor, Tensor, Tensor]:
    new_b = lora_step(x, grad, weight, a, b, *rest)[2]
    return weight, lora_step(x, grad, weight, a, new_b, *rest)[1], new_b


def _only_b(x: Tensor, grad: Tensor, weight: Tensor, a: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return weight, a, lora_step(x, grad, weight, a, *rest)[2]


def _step_cases(generator: Generator) -> list[tuple]:
    def case(rows: int, inputs: int, outputs: int, r: int, *, scale: float, lr: float) -> tuple:
        x = torch.randn(rows, inputs, generator=generator)
        grad = torch.randn(rows, outputs, generator=generator)
        return x, grad, *_adapter(generator, inputs, outputs, r), scale, lr

    return [
        case(3, 6, 4, 2, scale=0.5, lr=0.1),
        case(4, 5, 7, 3, scale=2.0, lr=0.05),
        case(2, 8, 8, 2, scale=4.0, lr=0.02),
        case(6, 4, 9, 1, scale=0.25, lr=0.2),
        case(5, 7, 3, 3, scale=1.5, lr=0.1),
    ]


LORA_STEP = Exercise(
    task="""One step of gradient descent for y = x weightᵀ + scale · x aᵀ bᵀ. `x` is float32 [n, in], `grad`
    [n, out] is the loss's gradient with respect to y, `weight` is [out, in], `a` [r, in], `b` [out, r]. What
    LoRA trains moves against its gradient, `lr` times; the rest stays. Return (weight, a, b) after the step.
    Change none of the arguments in place.""",
    reference=lora_step,
    cases=_step_cases,
    mistakes=(
        Mistake(
            "base not frozen",
            _base_too,
            "The weight moved as well. Then it is full fine-tuning: the adapter alone no longer holds what"
            " was learned, and the file that you save and put on the original base is worthless.",
        ),
        Mistake(
            "scale forgotten in the gradient",
            lambda x, grad, weight, a, b, scale, lr: lora_step(x, grad, weight, a, b, scale=1.0, lr=lr),
            "The gradients lack the factor `scale`: y contains scale times B A, so by the chain rule each"
            " gradient does too.",
        ),
        Mistake(
            "A with the new B",
            _b_before_a,
            "B moved first, and A's gradient was computed with the new B. All gradients belong to the values"
            " before the step.",
        ),
        Mistake(
            "only B is trained",
            _only_b,
            "A stayed as it was. LoRA trains both; with B alone it is another method, LoRA-FA.",
        ),
        Mistake(
            "uphill",
            lambda x, grad, weight, a, b, scale, lr: lora_step(x, grad, weight, a, b, scale=scale, lr=-lr),
            "The step goes along the gradient, so that the loss grows. Subtract.",
        ),
        Mistake(
            "mean over the rows",
            lambda x, grad, *rest: lora_step(x, grad / len(x), *rest),
            "The gradients were divided by n. `grad` is that of the loss as it is, and any mean is in it"
            " already.",
        ),
    ),
    hints=(
        "Which two of the three are trained? For y = x mᵀ the gradient of m is gradᵀ x.",
        (
            "b reads x aᵀ: its gradient is scale · gradᵀ (x aᵀ). What comes back through b is grad b: a's"
            " gradient is scale · (grad b)ᵀ x."
        ),
        "return weight, a - lr * scale * (grad @ b).T @ x, b - lr * scale * grad.T @ (x @ a.T).",
    ),
    tolerance=1e-4,
)


# ---- 4. merging, once


def merge_once(weight: Tensor, a: Tensor, b: Tensor, scale: float, merged: bool) -> tuple[Tensor, bool]:
    if merged:
        return weight.clone(), True
    return weight + scale * (b @ a), True


def _merge_cases(generator: Generator) -> list[tuple]:
    def case(size: int, r: int, scale: float, merged: bool) -> tuple:
        return *_adapter(generator, size, size, r), scale, merged

    return [
        case(4, 2, 0.5, False),
        case(6, 3, 2.0, True),
        case(5, 1, 3.0, False),
        case(8, 4, 0.25, True),
        case(7, 2, 1.5, False),
    ]


MERGE_ONCE = Exercise(
    task="""Merged into the weight, an adapter costs nothing when the model runs. `weight` is float32 [size,
    size], `a` [r, size], `b` [size, r]. If `merged` is False, add the adapter to the weight, times `scale`.
    If it is True, that has been done already: calling twice must change nothing. Return (weight, merged) as
    they are afterwards. Do not change the arguments in place.""",
    reference=merge_once,
    cases=_merge_cases,
    mistakes=(
        Mistake(
            "merged twice",
            lambda weight, a, b, scale, merged: (weight + scale * (b @ a), True),
            "The adapter was added although `merged` was True. Each call moves the weights further: a model"
            " that is evaluated, saved and evaluated again gets worse each time.",
        ),
        Mistake(
            "scale forgotten",
            lambda weight, a, b, scale, merged: merge_once(weight, a, b, 1.0, merged),
            "B A was added without its scale. The merged model then differs from the one that was trained.",
        ),
        Mistake(
            "A B for B A",
            lambda weight, a, b, scale, merged: merge_once(weight, b.T, a.T, scale, merged),
            "What was added is transposed. The weight is [out, in]: b [out, r] comes first. With a square"
            " weight no error tells you.",
        ),
        Mistake(
            "not noted",
            lambda weight, a, b, scale, merged: (merge_once(weight, a, b, scale, merged)[0], merged),
            "The second value is still what it was. If nobody notes the merge, the next call does it again.",
        ),
        Mistake(
            "the other way round",
            lambda weight, a, b, scale, merged: merge_once(weight, a, b, scale, not merged),
            "It was added when `merged` was True, and left out when it was False.",
        ),
        Mistake(
            "merged, then unmerged",
            lambda weight, a, b, scale, merged: (
                weight + (-scale if merged else scale) * (b @ a),
                not merged,
            ),
            "A second call takes the adapter out again. Merging is not a switch: what is merged stays"
            " merged.",
        ),
    ),
    hints=(
        "What should the weight be if `merged` is True when the function is called?",
        "b @ a has the shape of the weight. The second value is True in either case.",
        "if merged: return weight, True; otherwise return weight + scale * b @ a, True.",
    ),
    tolerance=1e-4,
)


# ---- 5. the same scale at another rank


def alpha_for_rank(alpha: float, r: int, new_r: int, use_rslora: bool) -> float:
    ratio = new_r / r
    return alpha * math.sqrt(ratio) if use_rslora else alpha * ratio


def _alpha_cases(generator: Generator) -> list[tuple[float, int, int, bool]]:
    cases: list[tuple[float, int, int, bool]] = [
        (16.0, 8, 32, False),
        (16.0, 8, 32, True),
        (6.0, 4, 12, True),
        (6.0, 12, 4, False),
    ]
    for use_rslora in (False, True):
        r = random_int(generator, 2, 20)
        cases.append((float(random_int(generator, 3, 40)), r, r + random_int(generator, 1, 50), use_rslora))
    return cases


ALPHA_FOR_RANK = Exercise(
    task="""An adapter of rank `r` was trained with `alpha`. It is rewritten as one of rank `new_r` that
    computes the same: rows of A and columns of B that are zero are added or taken away. The scale of B A,
    which is alpha / r for LoRA and alpha / √r for rsLoRA (`use_rslora`), must not change. Return the alpha to
    write into the new file, a float.""",
    reference=alpha_for_rank,
    cases=_alpha_cases,
    mistakes=(
        Mistake(
            "alpha / r and alpha / √r mixed up",
            lambda alpha, r, new_r, rs: alpha_for_rank(alpha, r, new_r, not rs),
            "You took LoRA's rule for rsLoRA and the other way round. With use_rslora the scale has the"
            " square root.",
        ),
        Mistake(
            "alpha / r always",
            lambda alpha, r, new_r, rs: alpha * new_r / r,
            "use_rslora makes no difference here. With it the scale is alpha / √r, so that alpha grows only"
            " with the square root of the rank.",
        ),
        Mistake(
            "alpha / √r always",
            lambda alpha, r, new_r, rs: alpha * math.sqrt(new_r / r),
            "The square root is taken without use_rslora too. Plain LoRA divides by the rank itself.",
        ),
        Mistake(
            "alpha unchanged",
            lambda alpha, r, new_r, rs: alpha,
            "alpha is what it was. Divided by a larger rank it gives a smaller scale, and the adapter loses"
            " strength.",
        ),
        Mistake(
            "ranks exchanged",
            lambda alpha, r, new_r, rs: alpha_for_rank(alpha, new_r, r, rs),
            "The ratio of the ranks is upside down: a higher rank divides by more, so alpha must be larger.",
        ),
        Mistake(
            "the scale, not alpha",
            lambda alpha, r, new_r, rs: alpha / (math.sqrt(r) if rs else r),
            "This is the scale. Multiply it by new_r, or its root, to get the alpha that gives this scale at"
            " the new rank.",
        ),
    ),
    hints=(
        "Write down the scale before and after, and put them equal.",
        "LoRA: alpha / r = new_alpha / new_r. rsLoRA: alpha / √r = new_alpha / √new_r.",
        "return alpha * (new_r / r) ** (0.5 if use_rslora else 1).",
    ),
)


# ---- 6. DoRA


def dora_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    return _dora(weight + scale * (b @ a), magnitude)


def _dora(directed: Tensor, magnitude: Tensor, lengths: Tensor | None = None) -> Tensor:
    """lengths: what each row is divided by, its own length if not given."""
    if lengths is None:
        lengths = directed.norm(dim=1)
    return (magnitude / lengths)[:, None] * directed


def _normed_columns(w: Tensor, a: Tensor, b: Tensor, s: float, m: Tensor) -> Tensor:
    directed = w + s * (b @ a)
    return directed / directed.norm(dim=0) * m[:, None]


def _dora_cases(generator: Generator) -> list[tuple]:
    def case(inputs: int, outputs: int, r: int, scale: float) -> tuple:
        weight, a, b = _adapter(generator, inputs, outputs, r)
        magnitude = weight.norm(dim=1) * (0.5 + torch.rand(outputs, generator=generator))
        return weight, a, b, scale, magnitude

    return [
        case(4, 4, 2, 0.5),
        case(6, 6, 1, 2.0),
        case(5, 8, 3, 0.25),
        case(9, 3, 2, 1.5),
        case(7, 7, 4, 3.0),
    ]


DORA_WEIGHT = Exercise(
    task="""DoRA learns a row's direction and its length apart. `weight` is float32 [out, in], `a` [r, in],
    `b` [out, r], `magnitude` [out], one length for each output. The direction of a row is that of weight +
    scale · b a; its length is the magnitude. Return the weight that the layer computes with: float32 [out,
    in].""",
    reference=dora_weight,
    cases=_dora_cases,
    mistakes=(
        Mistake(
            "length of the base",
            lambda w, a, b, s, m: _dora(w + s * (b @ a), m, w.norm(dim=1)),
            "The rows were divided by the length that the base's rows have. Once B A is added their lengths"
            " are others, so that the result's are not the magnitudes.",
        ),
        Mistake(
            "columns instead of rows",
            _normed_columns,
            "The lengths were taken along dim 0. The paper speaks of columns; its code and PEFT take one"
            " length for each output, and in nn.Linear an output is a row.",
        ),
        Mistake(
            "magnitude forgotten",
            lambda w, a, b, s, m: _dora(w + s * (b @ a), torch.ones_like(m)),
            "All rows have length 1. Multiply each by its magnitude.",
        ),
        Mistake(
            "not normalised",
            lambda w, a, b, s, m: m[:, None] * (w + s * (b @ a)),
            "The rows were multiplied by the magnitude, but not divided by their own length first, so that it"
            " counts twice.",
        ),
        Mistake(
            "scale forgotten", lambda w, a, b, s, m: _dora(w + b @ a, m), "b a was added without its scale."
        ),
        Mistake(
            "one length for the whole matrix",
            lambda w, a, b, s, m: _dora(w + s * (b @ a), m, (w + s * (b @ a)).norm()),
            "The whole matrix was divided by one number, its norm over all elements. Each row has a length of"
            " its own: dim=1.",
        ),
        Mistake(
            "only B A is normalised",
            lambda w, a, b, s, m: w + _dora(s * (b @ a), m),
            "The adapter's part got the length, and the weight was added afterwards. The direction is that of"
            " the sum.",
        ),
    ),
    hints=(
        "First the sum, then its rows' lengths. What length should each row have in the end?",
        (
            "v = weight + scale * b @ a; v.norm(dim=1) has a length for each row. v divided by them has rows"
            " of length 1."
        ),
        "v = weight + scale * b @ a; return (magnitude / v.norm(dim=1))[:, None] * v.",
    ),
    tolerance=1e-4,
)


# ---- 7. loss on the answer only


def answer_targets(prompt: Tensor, answer: Tensor, length: int) -> tuple[Tensor, Tensor]:
    return _targets(prompt, answer, length, len(prompt) - 1)


def _targets(
    prompt: Tensor, answer: Tensor, length: int, hidden: int, *, shift: int = 1, padding: int = -100
) -> tuple[Tensor, Tensor]:
    """hidden: how many targets at the beginning do not count. shift: how far a target is ahead of what is
    read. padding: the targets behind the text.
    """
    ids = torch.cat([prompt, answer])
    inputs = torch.zeros(length, dtype=torch.int64)
    targets = torch.full((length,), padding)
    inputs[: len(ids) - 1] = ids[:-1]
    targets[: len(ids) - 1] = ids[shift : len(ids) - 1 + shift]
    targets[:hidden] = -100
    return inputs, targets


def _prompt_counts(prompt: Tensor, answer: Tensor, length: int) -> tuple[Tensor, Tensor]:
    inputs, right = answer_targets(prompt, answer, length)
    everything = _targets(prompt, answer, length, 0)[1]
    return inputs, torch.where(right == -100, everything, -100)


def _target_cases(generator: Generator) -> list[tuple[Tensor, Tensor, int]]:
    def case(prompt: int, answer: int, padding: int) -> tuple[Tensor, Tensor, int]:
        prompt_ids = torch.randint(1, 50, (prompt,), generator=generator)
        answer_ids = torch.randint(1, 50, (answer,), generator=generator)
        return prompt_ids, answer_ids, prompt + answer - 1 + padding

    return [case(3, 2, 2), case(4, 4, 0), case(2, 6, 3), case(6, 1, 1), case(5, 3, 4)]


ANSWER_TARGETS = Exercise(
    task="""A model is to learn to answer, not to ask. `prompt` and `answer` are int64 [n] and [m], tokens of
    one text, of which the answer comes second. Return (inputs, targets), both int64 [length]: position t
    reads inputs[t] and is to predict targets[t], the next token. Where that token belongs to the prompt, the
    target is -100, which cross_entropy leaves out. The text gives n + m - 1 positions; those up to `length`
    are padded, inputs with 0 and targets with -100.""",
    reference=answer_targets,
    cases=_target_cases,
    mistakes=(
        Mistake(
            "loss on the prompt",
            lambda prompt, answer, length: _targets(prompt, answer, length, 0),
            "The targets of the prompt count too. The model then spends its few numbers on learning to write"
            " questions, often the same template over and over.",
        ),
        Mistake(
            "the answer's first token does not count",
            lambda prompt, answer, length: _targets(prompt, answer, length, len(prompt)),
            "One target too many is -100. The prompt's last position predicts the first token of the answer,"
            " the one that decides how it begins.",
        ),
        Mistake(
            "the prompt's last token counts",
            lambda prompt, answer, length: _targets(prompt, answer, length, len(prompt) - 2),
            "One target too few is -100: the prompt's last token is predicted from the one before it.",
        ),
        Mistake(
            "not shifted",
            lambda prompt, answer, length: _targets(prompt, answer, length, len(prompt), shift=0),
            "targets[t] is inputs[t]. A position that reads a token can copy it, and the loss falls to zero"
            " without anything learned.",
        ),
        Mistake(
            "the padding counts",
            lambda prompt, answer, length: _targets(prompt, answer, length, len(prompt) - 1, padding=0),
            "The targets behind the text are 0, which is a token like any other. The model learns to write it"
            " without end. Pad with -100.",
        ),
        Mistake(
            "the answer is hidden, not the prompt",
            _prompt_counts,
            "The targets of the answer are -100 and those of the prompt count: it is the other way round.",
        ),
    ),
    hints=(
        (
            "Put both together, and take inputs without the last token and targets without the first. At"
            " which positions is the target in the prompt?"
        ),
        "The prompt has n tokens. The first is nobody's target, so n - 1 targets belong to it.",
        (
            "ids = torch.cat([prompt, answer]); inputs begins with ids[:-1], targets with ids[1:]; then"
            " targets[: len(prompt) - 1] = -100."
        ),
    ),
)


# ---- 8. two adapters in one


def join_adapters(
    a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, factors: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    return torch.cat([factors[0] * a1, factors[1] * a2]), torch.cat([b1, b2], dim=1)


def _join_cases(generator: Generator) -> list[tuple]:
    def case(inputs: int, outputs: int, r: int, factors: tuple[float, float]) -> tuple:
        _, a1, b1 = _adapter(generator, inputs, outputs, r)
        _, a2, b2 = _adapter(generator, inputs, outputs, r)
        return a1, b1, a2, b2, factors

    return [
        case(5, 4, 2, (0.7, 1.5)),
        case(6, 6, 3, (2.0, 0.3)),
        case(4, 7, 1, (0.5, 0.4)),
        case(8, 3, 2, (1.2, 3.0)),
        case(9, 9, 4, (0.25, 0.6)),
    ]


JOIN_ADAPTERS = Exercise(
    task="""Two adapters of rank r become one of rank 2 r that adds exactly factors[0] · b1 a1 + factors[1] ·
    b2 a2 (a factor is an adapter's share times its scale). `a1` and `a2` are float32 [r, in], `b1` and `b2`
    [out, r]. Return (a, b): a is [2 r, in] and has the factors in it, b is [out, 2 r]. The first adapter
    comes first.""",
    reference=join_adapters,
    cases=_join_cases,
    mistakes=(
        Mistake(
            "added, with cross terms",
            lambda a1, b1, a2, b2, f: (
                math.sqrt(f[0]) * a1 + math.sqrt(f[1]) * a2,
                math.sqrt(f[0]) * b1 + math.sqrt(f[1]) * b2,
            ),
            "The matrices were added up. (b1 + b2)(a1 + a2) has b1 a2 and b2 a1 in it as well: each adapter's"
            " input goes to the other's output. PEFT has this as `linear`; `cat` has no such terms.",
        ),
        Mistake(
            "factors in both",
            lambda a1, b1, a2, b2, f: (
                torch.cat([f[0] * a1, f[1] * a2]),
                torch.cat([f[0] * b1, f[1] * b2], dim=1),
            ),
            "a and b both have the factors, so that the product has their squares.",
        ),
        Mistake(
            "factors forgotten",
            lambda a1, b1, a2, b2, f: (torch.cat([a1, a2]), torch.cat([b1, b2], dim=1)),
            "The factors are in neither. Shares and scales are gone, and the new adapter is the plain sum.",
        ),
        Mistake(
            "one order in a, another in b",
            lambda a1, b1, a2, b2, f: (torch.cat([f[0] * a1, f[1] * a2]), torch.cat([b2, b1], dim=1)),
            "a begins with the first adapter and b with the second: what one reads, the other writes.",
        ),
        Mistake(
            "factors exchanged",
            lambda a1, b1, a2, b2, f: (torch.cat([f[1] * a1, f[0] * a2]), torch.cat([b1, b2], dim=1)),
            "Each adapter has the other's factor.",
        ),
        Mistake(
            "halved",
            lambda a1, b1, a2, b2, f: (torch.cat([f[0] * a1, f[1] * a2]) / 2, torch.cat([b1, b2], dim=1)),
            "The mean was taken. The new adapter adds the sum.",
        ),
    ),
    hints=(
        "A product of [out, 2 r] and [2 r, in] is a sum over 2 r terms: r of them are the first adapter's.",
        "a's one below the other (dim 0), b's side by side (dim 1).",
        "return torch.cat([factors[0] * a1, factors[1] * a2]), torch.cat([b1, b2], dim=1).",
    ),
)


EXERCISES: tuple[Exercise, ...] = (
    FIRST_VALUES,
    LORA_OUTPUT,
    LORA_STEP,
    MERGE_ONCE,
    ALPHA_FOR_RANK,
    DORA_WEIGHT,
    ANSWER_TARGETS,
    JOIN_ADAPTERS,
)
