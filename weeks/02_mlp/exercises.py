"""The graded exercises of week 2: windows, first values, a gradient by hand, the learning rate, clipping,
AdamW.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from shared.course.exercise import Exercise, Mistake
from shared.training import TrainConfig, lr_at

# ---- 1. windows


def context_windows(idx: Tensor, window: int, padding: int) -> Tensor:
    return F.pad(idx, (window - 1, 0), value=padding).unfold(1, window, 1)


def _windows_cases(generator: Generator) -> list[tuple]:
    def case(batch: int, time: int, window: int, vocab_size: int) -> tuple[Tensor, int, int]:
        return torch.randint(vocab_size, (batch, time), generator=generator), window, vocab_size

    return [
        case(2, 5, 3, 9),
        case(3, 4, 2, 20),
        case(1, 7, 4, 65),
        case(4, 1, 3, 7),
        case(2, 3, 6, 30),  # longer than the text
        case(2, 6, 1, 5),
        (torch.arange(1, 7).view(1, 6), 3, 50),
    ]


CONTEXT_WINDOWS = Exercise(
    task="""The MLP sees the last few tokens, so each position needs a window. `idx` is int64 [batch, time].
    Return int64 [batch, time, window]: the window of position t holds the tokens t - window + 1 to t, in the
    order of the text, the present one last. Where the window reaches back to before the text, it holds
    `padding`. The text may be shorter than the window.""",
    reference=context_windows,
    cases=_windows_cases,
    mistakes=(
        Mistake(
            "padded on the right",
            lambda idx, window, padding: F.pad(idx, (0, window - 1), value=padding).unfold(1, window, 1),
            "The windows begin at the present token and look ahead. The next token, the one to be predicted,"
            " stands in the window: the training loss falls to nearly nothing, and the model can write"
            " nothing, since when it writes there is no next token yet.",
        ),
        Mistake(
            "the present token is missing",
            lambda idx, window, padding: F.pad(idx, (window, 0), value=padding).unfold(1, window, 1)[:, :-1],
            "The windows end one token too early. The present token is the most useful one for guessing the"
            " next, and the model does not see it.",
        ),
        Mistake(
            "newest token first",
            lambda idx, window, padding: context_windows(idx, window, padding).flip(-1),
            "The tokens are the right ones, but in reverse. Each place in the window has weights of its own,"
            " so a model trained one way cannot read the other.",
        ),
        Mistake(
            "padded with 0",
            lambda idx, window, padding: F.pad(idx, (window - 1, 0), value=0).unfold(1, window, 1),
            "The places before the text hold 0, and 0 is the id of a real token. The model would believe that"
            " every text begins with a row of that token.",
        ),
    ),
    hints=(
        "Put window - 1 paddings before each row. Then every position has a full window.",
        (
            "After padding, position t's window is the slice [t : t + window] of the row. Collect these"
            " slices for all t and stack them along a new dimension 1."
        ),
        (
            "F.pad(idx, (window - 1, 0), value=padding) pads on the left; .unfold(1, window, 1) takes all"
            " windows of dimension 1."
        ),
    ),
)


# ---- 2. first values


def scaled_weights(noise: Tensor, gain: float) -> Tensor:
    return noise * (gain / math.sqrt(noise.size(1)))


def _scaled_weights_cases(generator: Generator) -> list[tuple]:
    def noise(outputs: int, inputs: int) -> Tensor:
        return torch.randn(outputs, inputs, generator=generator)

    return [
        (noise(3, 8), 5 / 3),
        (noise(6, 2), 5 / 3),
        (noise(4, 9), 1.0),
        (noise(5, 5), math.sqrt(2)),
        (noise(1, 16), 0.5),
        (noise(7, 1), 5 / 3),
    ]


SCALED_WEIGHTS = Exercise(
    task="""A layer's first weights decide whether it can learn: too large and tanh saturates, too small and
    the signal dies out. `noise` is float32 [outputs, inputs], drawn from N(0, 1), in the layout of
    nn.Linear's weight. Scale it by Kaiming's rule: the variance of each weight should be gain² / inputs, so
    that outputs have the variance of the inputs times gain². Return float32 [outputs, inputs]. For tanh the
    gain is 5/3.""",
    reference=scaled_weights,
    cases=_scaled_weights_cases,
    mistakes=(
        Mistake(
            "outputs instead of inputs",
            lambda noise, gain: noise * (gain / math.sqrt(noise.size(0))),
            "The scale was taken from the number of outputs. An output is a sum over the inputs, so it is"
            " their number that makes it large; nn.Linear keeps its weight as [outputs, inputs].",
        ),
        Mistake(
            "the root is missing",
            lambda noise, gain: noise * (gain / noise.size(1)),
            "Variance and standard deviation are mixed up. Multiplying noise by s makes its variance s², so s"
            " is the square root of the variance you want. Without the root the signal shrinks from layer to"
            " layer.",
        ),
        Mistake(
            "the gain is missing",
            lambda noise, gain: noise / math.sqrt(noise.size(1)),
            "The gain was not used. It makes up for what the nonlinearity takes away: tanh makes every value"
            " smaller, and without a gain the signal fades with depth.",
        ),
        Mistake(
            "the gain is squared",
            lambda noise, gain: noise * (gain**2 / math.sqrt(noise.size(1))),
            "The variance is to be gain² / inputs, so the factor is its root, with the plain gain. Squared,"
            " it drives tanh further into saturation.",
        ),
        Mistake(
            "multiplied by the root",
            lambda noise, gain: noise * gain * math.sqrt(noise.size(1)),
            "The weights grow with the number of inputs, and they should shrink: a sum over more inputs is"
            " larger already. Here nearly every tanh would be stuck at -1 or 1, where its gradient is 0.",
        ),
    ),
    hints=(
        (
            "If every value of N(0, 1) noise is multiplied by s, its standard deviation is s. Which s gives"
            " the variance asked for?"
        ),
        (
            "The standard deviation is the square root of gain² / inputs. Which of the two sizes of `noise`"
            " is the number of inputs?"
        ),
        "Multiply noise by gain / math.sqrt(noise.size(1)).",
    ),
)


# ---- 3. a gradient by hand


def logit_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.softmax(-1) - F.one_hot(targets, logits.size(-1))) / targets.numel()


def _gradient_cases(generator: Generator) -> list[tuple]:
    def case(batch: int, time: int, vocab_size: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
        return scale * torch.randn(batch, time, vocab_size, generator=generator), torch.randint(
            vocab_size, (batch, time), generator=generator
        )

    return [
        case(2, 3, 5),
        case(3, 2, 4),
        case(1, 4, 6),
        case(5, 1, 3),
        case(1, 1, 2),
        case(2, 2, 3, scale=0.0),
    ]


LOGIT_GRADIENT = Exercise(
    task="""All learning begins at the last layer: how should each logit change to lower the loss? `logits` is
    float32 [batch, time, vocab_size], `targets` int64 [batch, time]. The loss is the mean of -ln
    softmax(logits)[target] over all batch * time positions. Derive its gradient with respect to the logits on
    paper, and return it as float32 [batch, time, vocab_size]. Do it without autograd.""",
    reference=logit_gradient,
    cases=_gradient_cases,
    mistakes=(
        Mistake(
            "not divided by the number of positions",
            lambda logits, targets: logits.softmax(-1) - F.one_hot(targets, logits.size(-1)),
            "This is the gradient of the sum of the losses. The loss is their mean, so each position counts"
            " for only 1 / (batch * time); otherwise the step grows with the batch.",
        ),
        Mistake(
            "divided by the batch only",
            lambda logits, targets: (
                (logits.softmax(-1) - F.one_hot(targets, logits.size(-1))) / logits.size(0)
            ),
            "The mean runs over all positions of all sequences, batch * time of them. Dividing by the number"
            " of sequences alone makes the gradient `time` times too large.",
        ),
        Mistake(
            "divided by the vocabulary too",
            lambda logits, targets: (
                (logits.softmax(-1) - F.one_hot(targets, logits.size(-1))) / logits.numel()
            ),
            "Divided by the number of logits. There is one loss per position, not one per logit: the mean has"
            " batch * time terms.",
        ),
        Mistake(
            "the sign is turned",
            lambda logits, targets: (
                (F.one_hot(targets, logits.size(-1)) - logits.softmax(-1)) / targets.numel()
            ),
            "The gradient points the wrong way: it should be positive for tokens that got too much"
            " probability. Descent subtracts it, so this version would make the targets less likely with"
            " every step.",
        ),
        Mistake(
            "the target's 1 is missing",
            lambda logits, targets: logits.softmax(-1) / targets.numel(),
            "These are the probabilities: the derivative of the softmax's denominator only. The target's own"
            " logit also stands in the numerator, and that term is what pulls it up.",
        ),
        Mistake(
            "the softmax is missing",
            lambda logits, targets: (logits - F.one_hot(targets, logits.size(-1))) / targets.numel(),
            "The target's 1 was taken from the logits themselves. The gradient compares probabilities with"
            " what happened, so the logits have to go through the softmax first.",
        ),
    ),
    hints=(
        (
            "For one position the loss is ln(sum of exp(logit)) minus the target's logit. Differentiate each"
            " of the two terms."
        ),
        (
            "The first term gives the softmax, the second gives 1 at the target and 0 elsewhere. Then think"
            " of the mean."
        ),
        "Subtract F.one_hot(targets, vocab_size) from logits.softmax(-1), and divide by targets.numel().",
    ),
)


# ---- 4. the learning rate


def learning_rate(step: int, steps: int, warmup_steps: int, peak: float, final_fraction: float) -> float:
    return lr_at(step, TrainConfig(steps=steps, warmup_steps=warmup_steps, lr=peak, final_lr=final_fraction))


def _learning_rate_cases(generator: Generator) -> list[tuple]:
    peak = 0.1 + torch.rand(1, generator=generator).item()
    middle = int(torch.randint(30, 90, (1,), generator=generator))
    return [
        (0, 100, 10, peak, 0.1),
        (4, 100, 10, peak, 0.1),
        (9, 100, 10, peak, 0.1),  # the peak
        (10, 100, 10, peak, 0.1),
        (middle, 100, 20, peak, 0.2),
        (75, 100, 20, peak, 0.0),
        (100, 100, 10, peak, 0.1),  # the floor
        (130, 100, 10, peak, 0.1),  # past the end
        (0, 50, 0, peak, 0.3),  # no warmup
        (10, 50, 0, peak, 0.3),
    ]


def _schedule(
    warmup: Callable[[int, int], float] = lambda step, warmup_steps: (step + 1) / warmup_steps,
    progress: Callable[[int, int, int], float] = lambda step, steps, warmup_steps: min(
        1.0, (step - warmup_steps) / (steps - warmup_steps)
    ),
    value: Callable[[float, float], float] = lambda cosine, final_fraction: (
        final_fraction + (1 - final_fraction) * cosine
    ),
) -> Callable:
    """The schedule with one of its parts exchanged. value: from a cosine that falls from 1 to 0 to a fraction
    of the peak.
    """

    def rate(step: int, steps: int, warmup_steps: int, peak: float, final_fraction: float) -> float:
        if step < warmup_steps:
            return peak * warmup(step, warmup_steps)
        return peak * value(
            0.5 * (1 + math.cos(math.pi * progress(step, steps, warmup_steps))), final_fraction
        )

    return rate


LEARNING_RATE = Exercise(
    task="""A good schedule begins gently and ends gently. Return the learning rate at `step`, a float; steps
    are counted from 0. During the warmup (step < warmup_steps) it is peak * (step + 1) / warmup_steps, so the
    first step already moves. From then on it falls along half a cosine, from `peak` at step warmup_steps to
    final_fraction * peak at step `steps`, and stays there ever after. warmup_steps may be 0.""",
    reference=learning_rate,
    cases=_learning_rate_cases,
    mistakes=(
        Mistake(
            "the warmup starts at zero",
            _schedule(warmup=lambda step, warmup_steps: step / warmup_steps),
            "The first step has learning rate 0: a batch is read, and nothing is learned from it. Counted"
            " from 0, step number `step` is the one after `step` others.",
        ),
        Mistake(
            "no floor",
            _schedule(value=lambda cosine, final_fraction: cosine),
            "The rate falls to 0, and it should end at final_fraction * peak. The last steps hardly learn"
            " anything.",
        ),
        Mistake(
            "the floor is added on top",
            _schedule(value=lambda cosine, final_fraction: final_fraction + cosine),
            "The end is right but the beginning is too high: after the warmup the rate jumps to (1 +"
            " final_fraction) * peak. The cosine should run over the distance between peak and floor, not"
            " over the whole peak.",
        ),
        Mistake(
            "the decay is counted from step 0",
            _schedule(progress=lambda step, steps, warmup_steps: min(1.0, step / steps)),
            "The cosine began during the warmup, so when the warmup ends the rate drops at once. Its progress"
            " is 0 at step warmup_steps and 1 at step `steps`.",
        ),
        Mistake(
            "the rate rises again after the end",
            _schedule(
                progress=lambda step, steps, warmup_steps: (step - warmup_steps) / (steps - warmup_steps)
            ),
            "Past the last step the cosine goes up again. A run that is made longer would suddenly take large"
            " steps; progress must stop at 1.",
        ),
        Mistake(
            "a line instead of a cosine",
            lambda step, steps, warmup_steps, peak, final_fraction: lr_at(
                step,
                TrainConfig(
                    steps=steps,
                    warmup_steps=warmup_steps,
                    lr=peak,
                    final_lr=final_fraction,
                    schedule="linear",
                ),
            ),
            "The fall is linear. The cosine stays near the peak for longer, falls fastest in the middle, and"
            " ends flat.",
        ),
    ),
    hints=(
        (
            "Two cases, warmup and decay. For the decay, first compute how far along it we are, a number from"
            " 0 to 1."
        ),
        (
            "progress = (step - warmup_steps) / (steps - warmup_steps), at most 1. Then 0.5 * (1 + cos(pi *"
            " progress)) falls from 1 to 0."
        ),
        (
            "With that cosine c, the rate is peak * (final_fraction + (1 - final_fraction) * c). Use min(1.0,"
            " ...) on the progress."
        ),
    ),
)


# ---- 5. clipping


def clip_gradients(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    return [g * min(1.0, max_norm / norm) for g in gradients]


def _clip_cases(generator: Generator) -> list[tuple]:
    def gradients(*shapes: tuple[int, ...], scale: float = 1.0) -> list[Tensor]:
        return [scale * torch.randn(shape, generator=generator) for shape in shapes]

    return [
        (gradients((3, 4), (4,), (2, 3)), 1.0),
        (gradients((2, 5), (5, 3), scale=10.0), 1.0),
        (gradients((3, 2), (2,), scale=0.01), 1.0),  # short already
        (gradients((4, 3)), 0.5),
        ([torch.tensor([3.0]), torch.tensor([[4.0]])], 2.5),
        ([torch.tensor([30.0, 0.0]), torch.tensor([0.1, 0.2, 0.2])], 1.0),  # one long, one short
        (gradients((1,), (2, 2), scale=0.1), 10.0),
    ]


CLIP_GRADIENTS = Exercise(
    task="""One strange batch can give a gradient so long that its step ruins the model. Clipping shortens it.
    `gradients` is a list of float32 tensors of any shapes, one per parameter. Take all their numbers together
    as one long vector: where its Euclidean norm is above `max_norm`, scale all gradients by the same factor
    so that the norm becomes max_norm; otherwise leave them as they are. Return a list of new tensors of the
    same shapes. The norm is never 0 here.""",
    reference=clip_gradients,
    cases=_clip_cases,
    mistakes=(
        Mistake(
            "each tensor by its own norm",
            lambda gradients, max_norm: [g * min(1.0, max_norm / g.norm().item()) for g in gradients],
            "Each tensor was clipped for itself. That shortens some and leaves others, so the whole gradient"
            " points in another direction; and with many tensors it is still longer than max_norm.",
        ),
        Mistake(
            "single values clipped",
            lambda gradients, max_norm: [g.clamp(-max_norm, max_norm) for g in gradients],
            "The values were cut off at max_norm one by one. That bends the gradient's direction towards a"
            " diagonal; clipping by norm keeps the direction and changes the length only.",
        ),
        Mistake(
            "short gradients are made longer",
            lambda gradients, max_norm: [
                g * (max_norm / math.sqrt(sum(h.square().sum().item() for h in gradients))) for g in gradients
            ],
            "Every gradient was scaled to length max_norm, the short ones too. Near a minimum gradients"
            " become short, and that must stay so, or training never settles.",
        ),
        Mistake(
            "the norms are added up",
            lambda gradients, max_norm: [
                g * min(1.0, max_norm / sum(h.norm().item() for h in gradients)) for g in gradients
            ],
            "The norms of the tensors were added. Lengths at right angles add as squares (3 and 4 make 5, not"
            " 7), so this is too large, and too much is clipped.",
        ),
        Mistake(
            "the root is missing",
            lambda gradients, max_norm: [
                g * min(1.0, max_norm / sum(h.square().sum().item() for h in gradients)) for g in gradients
            ],
            "The sum of squares was taken for the norm. The norm is its square root; without it long"
            " gradients are cut far too short.",
        ),
    ),
    hints=(
        "One norm for all tensors together, and one factor for all of them.",
        (
            "The squared norm is the sum of the squares of all numbers in all tensors. The factor is never"
            " above 1."
        ),
        "norm = sqrt(sum of g.square().sum() over the list); multiply each g by min(1.0, max_norm / norm).",
    ),
)


# ---- 6. AdamW


def adamw_step(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    first = beta1 * first + (1 - beta1) * gradient
    second = beta2 * second + (1 - beta2) * gradient**2
    direction = (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + eps)
    return weight - lr * direction - lr * weight_decay * weight, first, second


def _adamw_cases(generator: Generator) -> list[tuple]:
    def case(
        shape: tuple[int, ...],
        step: int,
        lr: float,
        eps: float,
        weight_decay: float,
        beta1: float = 0.9,
        beta2: float = 0.99,
    ) -> tuple:
        weight, gradient, first = (torch.randn(shape, generator=generator) for _ in range(3))
        second = torch.rand(shape, generator=generator)
        if step == 1:
            first, second = torch.zeros(shape), torch.zeros(shape)
        return weight, gradient, first, second, step, lr, beta1, beta2, eps, weight_decay

    return [
        case((3, 4), 1, 0.1, 1e-8, 0.1),
        case((2, 5), 7, 0.05, 1e-2, 0.5),
        case((4,), 2, 0.1, 0.1, 0.0),
        case((1, 1), 3, 0.2, 1e-2, 0.1, beta1=0.8, beta2=0.95),
        case((2, 3), 1, 0.1, 0.1, 0.2, beta2=0.999),
        case((5,), 1000, 0.01, 1e-8, 1.0),
    ]


def _adamw(
    correct: bool = True,
    decay_in_gradient: bool = False,
    eps_inside: bool = False,
    root: bool = True,
    decay_with_lr: bool = True,
) -> Callable:
    """AdamW's step with one of its parts wrong."""

    def step_once(
        weight, gradient, first, second, step, lr, beta1, beta2, eps, weight_decay
    ) -> tuple[Tensor, Tensor, Tensor]:
        if decay_in_gradient:
            gradient = gradient + weight_decay * weight
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        m = first / (1 - beta1**step) if correct else first
        v = second / (1 - beta2**step) if correct else second
        below = (v + eps).sqrt() if eps_inside else (v.sqrt() if root else v) + eps
        decay = 0.0 if decay_in_gradient else weight_decay * (lr if decay_with_lr else 1.0)
        return weight - lr * m / below - decay * weight, first, second

    return step_once


ADAMW_STEP = Exercise(
    task="""Write one step of AdamW, the optimizer behind nearly every language model. All tensors are float32
    of one shape: `weight`, its `gradient`, and the running means of the gradient (`first`) and of its square
    (`second`), each renewed as beta * old + (1 - beta) * new. `step` counts from 1, and the means began at
    zero, so each is divided by 1 - beta**step before it is used. The weight moves by -lr * mean / (root of
    the mean square + eps), and besides by -lr * weight_decay * weight. Return (new weight, new first, new
    second); the means come back uncorrected.""",
    reference=adamw_step,
    cases=_adamw_cases,
    mistakes=(
        Mistake(
            "no bias correction",
            _adamw(correct=False),
            "The running means start at zero and are too small at first, the mean square most of all. Without"
            " dividing by 1 - beta**step the first steps have the wrong size.",
        ),
        Mistake(
            "L2 instead of decoupled decay",
            _adamw(decay_in_gradient=True),
            "The decay was added to the gradient, which is Adam with an L2 penalty. Then it is divided by the"
            " root of the mean square like the rest, and weights with large gradients hardly decay. In AdamW,"
            " the decay acts on the weight directly: that is the W.",
        ),
        Mistake(
            "eps inside the root",
            _adamw(eps_inside=True),
            "eps was added before the root was taken. The root of 1e-8 is 1e-4, so where gradients are small"
            " it weighs ten thousand times more.",
        ),
        Mistake(
            "the root is missing",
            _adamw(root=False),
            "The mean was divided by the mean square, not by its root. Adam's point is that the step does not"
            " depend on the gradient's size, and for that numerator and denominator need the same unit.",
        ),
        Mistake(
            "the decay ignores the learning rate",
            _adamw(decay_with_lr=False),
            "The weight shrinks by weight_decay itself. It should shrink by lr * weight_decay, a thousand"
            " times less at ordinary settings, and less when the schedule lowers the learning rate.",
        ),
    ),
    hints=(
        (
            "First renew both running means: beta of the old one and 1 - beta of the new value. Then correct"
            " copies of them for the step."
        ),
        (
            "Keep the corrected means apart from those you return. The decay is a term of its own, next to"
            " the step, and uses the weight from before it."
        ),
        (
            "m = first / (1 - beta1**step), v = second / (1 - beta2**step), weight - lr * m / (v.sqrt() +"
            " eps) - lr * weight_decay * weight."
        ),
    ),
)


EXERCISES: tuple[Exercise, ...] = (
    CONTEXT_WINDOWS,
    SCALED_WEIGHTS,
    LOGIT_GRADIENT,
    LEARNING_RATE,
    CLIP_GRADIENTS,
    ADAMW_STEP,
)
