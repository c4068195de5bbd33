"""The graded exercises of week 2: windows, initialization, the window MLP as a module, a gradient by hand,
the learning rate, AdamW, clipping, and the whole training loop.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from shared.course.exercise import Exercise, Mistake, NotRight, building
from shared.evaluation import cross_entropy
from shared.models import mlp
from shared.runtime import seed_everything
from shared.training import TrainConfig, Trainer, lr_at

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


def _windows_of_one_text(idx: Tensor, window: int, padding: int) -> Tensor:
    joined = context_windows(idx.reshape(1, -1), window, padding)
    return joined.view(*idx.shape, window)


CONTEXT_WINDOWS = Exercise(
    task="""The MLP sees the last few tokens, so each position needs a window. `idx` is int64 [batch, time].
    Return int64 [batch, time, window]: the window of position t holds the tokens t - window + 1 to t, in the
    order of the text, the present one last. Where the window reaches back to before the text, it holds
    `padding`. The text may be shorter than the window.""",
    reference=context_windows,
    cases=_windows_cases,
    valid=lambda idx, window, padding: idx.dim() == 2 and window >= 1,
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
        Mistake(
            "a window reaches into the row before",
            _windows_of_one_text,
            "The rows were joined to one text before the windows were cut, so the first windows of a row end"
            " the row before it. The rows of a batch come from different places of the text: before each"
            " stands padding.",
        ),
        Mistake(
            "the text's first token repeated",
            lambda idx, window, padding: torch.cat([idx[:, :1].expand(-1, window - 1), idx], 1).unfold(
                1, window, 1
            ),
            "The places before the text hold its first token. The model cannot know then whether a text began"
            " or the token really stood there that often; `padding` says that nothing was there.",
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


# ---- 2. initialization


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
    task="""The initialization of a layer: weights that are too large push the tanh to its flat ends, weights
    that are too small let the signal die out. `noise` is float32 [outputs, inputs], drawn from N(0, 1), in
    the layout of nn.Linear's weight. Scale it by Kaiming's rule: the variance of each weight should be
    $gain^2 / inputs$, so that outputs have the variance of the inputs times $gain^2$. Return float32
    [outputs, inputs], and leave `noise` as it is. For tanh the gain is 5/3.""",
    reference=scaled_weights,
    cases=_scaled_weights_cases,
    valid=lambda noise, gain: noise.dim() == 2 and gain > 0,
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
            "multiplied by the variance",
            lambda noise, gain: noise * (gain**2 / noise.size(1)),
            "The noise was multiplied by gain² / inputs. That is the variance that is asked for, and"
            " multiplying by s makes the variance s²: the factor is its root, the standard deviation.",
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
            " it pushes tanh further to its flat ends.",
        ),
        Mistake(
            "multiplied by the root",
            lambda noise, gain: noise * gain * math.sqrt(noise.size(1)),
            "The weights grow with the number of inputs, and they should shrink: a sum over more inputs is"
            " larger already. Here nearly every tanh would be stuck at -1 or 1, where its gradient is 0.",
        ),
        Mistake(
            "Xavier's rule",
            lambda noise, gain: noise * gain * math.sqrt(2 / (noise.size(0) + noise.size(1))),
            "This is Xavier's (Glorot's) rule, with the mean of inputs and outputs. Kaiming's takes the"
            " inputs alone, so that the signal forward keeps its size whatever the layer's width.",
        ),
        Mistake(
            "normalised by the noise itself",
            lambda noise, gain: noise / noise.norm(dim=1, keepdim=True) * gain,
            "Each row was divided by its own length. That is near the rule, but every unit gets weights of"
            " exactly the same length, whatever was drawn: the factor comes from the number of inputs alone.",
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


# ---- 3. the window MLP


class WindowMLP(nn.Module):
    def __init__(self, vocab_size: int, window: int, n_embd: int, n_hidden: int):
        super().__init__()
        self.window = window
        self.padding = vocab_size
        self.token_embedding = nn.Embedding(vocab_size + 1, n_embd)
        self.position_embedding = nn.Embedding(window, n_embd)
        self.hidden = nn.Linear(window * n_embd, n_hidden)
        self.lm_head = nn.Linear(n_hidden, vocab_size)
        self.initialize()

    def initialize(self) -> None:
        nn.init.normal_(self.token_embedding.weight)
        nn.init.normal_(self.position_embedding.weight, std=0.1)
        nn.init.normal_(self.hidden.weight, std=5 / 3 / math.sqrt(self.hidden.in_features))
        nn.init.normal_(self.lm_head.weight, std=0.01)
        nn.init.zeros_(self.hidden.bias)
        nn.init.zeros_(self.lm_head.bias)

    def embedded(self, idx: Tensor) -> Tensor:
        windows = context_windows(idx, self.window, self.padding)
        return self.token_embedding(windows) + self.position_embedding.weight

    def activations(self, idx: Tensor) -> Tensor:
        return torch.tanh(self.hidden(self.embedded(idx).flatten(-2)))

    def forward(self, idx: Tensor) -> Tensor:
        return self.lm_head(self.activations(idx))


WINDOW_MLP_STUB = """class WindowMLP(nn.Module):
    def __init__(self, vocab_size: int, window: int, n_embd: int, n_hidden: int):
        super().__init__()
        # your code here: self.token_embedding, self.position_embedding,
        # self.hidden and self.lm_head, and their initialization
        ...

    def activations(self, idx: Tensor) -> Tensor:
        # int64 [batch, time] -> tanh outputs, [batch, time, n_hidden]
        # your code here
        ...

    def forward(self, idx: Tensor) -> Tensor:
        # int64 [batch, time] -> logits, [batch, time, vocab_size]
        # your code here
        ...
"""


def _window_mlp_cases(generator: Generator) -> list[tuple]:
    def case(sizes: tuple[int, int, int, int], batch: int, time: int) -> tuple:
        return *sizes, torch.randint(sizes[0], (batch, time), generator=generator)

    return [
        case((3, 2, 2, 3), 1, 3),
        case((4, 1, 3, 2), 2, 2),
        case((5, 3, 2, 4), 3, 5),
        case((7, 4, 3, 6), 2, 2),  # shorter than the window
        case((6, 3, 4, 5), 2, 1),
        case((65, 8, 4, 10), 2, 12),
    ]


def _observe_window_mlp(
    answer: Callable, vocab_size: int, window: int, n_embd: int, n_hidden: int, idx: Tensor
) -> Iterator[tuple[str, Any]]:
    building.takes(answer, "vocab_size", "window", "n_embd", "n_hidden")
    reference = WindowMLP(vocab_size, window, n_embd, n_hidden)
    with torch.no_grad():
        for number, parameter in enumerate(reference.parameters(), 1):
            values = torch.arange(parameter.numel(), dtype=torch.float32) * 0.7 * number
            parameter.copy_(values.sin().view(parameter.shape))
    module = building.built(answer, reference, vocab_size, window, n_embd, n_hidden)
    yield "the activations", building.method(module, "activations")(idx)
    logits = module(idx)
    yield "the logits", logits
    if logits.shape != (*idx.shape, vocab_size):
        return
    yield from building.gradients_of(module, building.weighted(logits))
    yield "the losses of three training steps", _three_steps(module, idx)
    _check_initialization(answer)


def _three_steps(module: nn.Module, idx: Tensor) -> list[float]:
    """The losses on tokens that are their own targets: enough to see whether training changes the outputs."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = cross_entropy(module(idx), idx)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


INITIAL_STD = {
    "hidden.weight": 5 / 3 / math.sqrt(16 * 64),
    "lm_head.weight": 0.01,
    "position_embedding.weight": 0.1,
    "token_embedding.weight": 1.0,
    "hidden.bias": 0.0,
    "lm_head.bias": 0.0,
}
"""Of WindowMLP(65, 16, 64, 96): so large that one standard deviation can be told from another."""
PYTORCHS_STD = {
    **dict.fromkeys(("hidden.weight", "hidden.bias"), 1 / math.sqrt(3 * 16 * 64)),
    **dict.fromkeys(("lm_head.weight", "lm_head.bias"), 1 / math.sqrt(3 * 96)),
    "position_embedding.weight": 1.0,
}
"""What they have where nothing is initialized: nn.Linear draws uniformly from ±1/sqrt(inputs)."""


def _check_initialization(answer: Callable) -> None:
    """Raises NotRight where a new module's parameters do not have the standard deviations of the task.

    Of the smallest matrix, 1,024 numbers, a tenth is more than four standard errors.
    """
    seed_everything(0)
    parameters = dict(answer(65, 16, 64, 96).named_parameters())
    wrong = []
    for name, wanted in INITIAL_STD.items():
        values = parameters[name].detach()
        spread = values.square().mean().sqrt().item()
        if abs(spread - wanted) > 0.1 * wanted:
            size = "large" if spread > wanted else "small"
            wrong.append(
                f"`{name}` is too {size} ({spread:.3g}, and the task asks for {wanted:.3g}"
                f"{_where_from(name, spread)})"
            )
    if wrong:
        raise NotRight(
            "the outputs are right, but the initialization is not. That was measured in a larger model than"
            " the one below, WindowMLP(65, 16, 64, 96), in which `hidden` has 16 * 64 = 1024 inputs. By its"
            f" standard deviation, {'; '.join(wrong)}."
        )


def _where_from(name: str, spread: float) -> str:
    """Where a wrong standard deviation comes from, where that can be told."""
    by_pytorch = PYTORCHS_STD.get(name, 0.0)
    if math.isclose(spread, by_pytorch, rel_tol=0.1):
        return "; it is as PyTorch draws it"
    if math.isclose(spread, by_pytorch * INITIAL_STD[name], rel_tol=0.1):
        return "; it is what comes of scaling PyTorch's own weights, and not N(0, 1) noise"
    return ""


class _LooksAhead(WindowMLP):
    def embedded(self, idx: Tensor) -> Tensor:
        windows = F.pad(idx, (0, self.window - 1), value=self.padding).unfold(1, self.window, 1)
        return self.token_embedding(windows) + self.position_embedding.weight


class _NewestFirst(WindowMLP):
    def embedded(self, idx: Tensor) -> Tensor:
        windows = context_windows(idx, self.window, self.padding).flip(-1)
        return self.token_embedding(windows) + self.position_embedding.weight


class _PaddedWithZero(WindowMLP):
    def embedded(self, idx: Tensor) -> Tensor:
        windows = context_windows(idx, self.window, 0)
        return self.token_embedding(windows) + self.position_embedding.weight


class _WithoutPositions(WindowMLP):
    def embedded(self, idx: Tensor) -> Tensor:
        return self.token_embedding(context_windows(idx, self.window, self.padding))


class _WithoutTanh(WindowMLP):
    def activations(self, idx: Tensor) -> Tensor:
        return self.hidden(self.embedded(idx).flatten(-2))


class _WithRelu(WindowMLP):
    def activations(self, idx: Tensor) -> Tensor:
        return self.hidden(self.embedded(idx).flatten(-2)).relu()


class _JoinedByChannel(WindowMLP):
    def activations(self, idx: Tensor) -> Tensor:
        return torch.tanh(self.hidden(self.embedded(idx).transpose(-1, -2).flatten(-2)))


class _ReturnsProbabilities(WindowMLP):
    def forward(self, idx: Tensor) -> Tensor:
        return super().forward(idx).softmax(-1)


class _AtTheLastPosition(WindowMLP):
    def forward(self, idx: Tensor) -> Tensor:
        return super().forward(idx)[:, -1]


class _InitializedByPyTorch(WindowMLP):
    def initialize(self) -> None:
        pass


class _HiddenLeftToPyTorch(WindowMLP):
    def initialize(self) -> None:
        super().initialize()
        self.hidden.reset_parameters()
        nn.init.zeros_(self.hidden.bias)


class _PyTorchsWeightsScaled(WindowMLP):
    def initialize(self) -> None:
        super().initialize()
        self.hidden.reset_parameters()
        nn.init.zeros_(self.hidden.bias)
        with torch.no_grad():
            self.hidden.weight.copy_(scaled_weights(self.hidden.weight, 5 / 3))


class _PaddingNeverLearns(WindowMLP):
    def initialize(self) -> None:
        super().initialize()
        self.token_embedding.padding_idx = self.padding


class _InitializedNaively(WindowMLP):
    def initialize(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter)


WINDOW_MLP = Exercise(
    task="""Build the window MLP. `WindowMLP(vocab_size, window, n_embd, n_hidden)` is an nn.Module with
    `token_embedding`, an nn.Embedding of vocab_size + 1 rows of n_embd numbers, of which the last belongs to
    the padding before the text (it is drawn and learned like the others); `position_embedding`, an
    nn.Embedding with a row for each place of the window, the oldest first; `hidden`, an nn.Linear from window
    * n_embd to n_hidden; and `lm_head`, an nn.Linear from n_hidden to vocab_size. `activations(idx)` takes
    int64 [batch, time]. Each position looks its window up in the token embedding (your `context_windows`,
    padding with the id vocab_size), adds the place's vector to each token's, joins the vectors of the window
    in the order of the text, sends them through `hidden` and a tanh, and returns float32 [batch, time,
    n_hidden]. `forward(idx)` returns the logits, float32 [batch, time, vocab_size], by `lm_head`. The
    initialization, each with mean 0: the token embedding has standard deviation 1, the position embedding
    0.1, `hidden.weight` follows Kaiming's rule with the gain 5/3 (your `scaled_weights`), `lm_head.weight`
    has 0.01, and both biases are 0.""",
    reference=WindowMLP,
    cases=_window_mlp_cases,
    observe=_observe_window_mlp,
    stub=WINDOW_MLP_STUB,
    points=3,
    forbids=(mlp.WindowMLPConfig,),  # the promoted model cannot be made without one
    valid=lambda vocab_size, window, n_embd, n_hidden, idx: (
        min(vocab_size, window, n_embd, n_hidden) >= 1 and idx.dim() == 2 and int(idx.max()) < vocab_size
    ),
    mistakes=(
        Mistake(
            "the windows look ahead",
            _LooksAhead,
            "The windows begin at the present token and reach into the future, where the answer stands."
            " Training would look excellent, and the model could write nothing.",
        ),
        Mistake(
            "the newest token first",
            _NewestFirst,
            "The window is in reverse: its oldest token belongs in the first place, the present one in the"
            " last. Weights that were trained the other way round cannot be used.",
        ),
        Mistake(
            "padded with token 0",
            _PaddedWithZero,
            "What lies before the text was looked up as token 0, a real one. Its id is vocab_size: the last"
            " row of the token embedding is kept for it.",
        ),
        Mistake(
            "the positions are not added",
            _WithoutPositions,
            "The position embedding is not used. Each token's vector gets the vector of its place in the"
            " window added: self.position_embedding.weight is [window, n_embd] and broadcasts.",
        ),
        Mistake(
            "the tanh is missing",
            _WithoutTanh,
            "There is no tanh after the hidden layer. Two linear layers, one after the other, are one linear"
            " layer: the model could not learn that two characters mean something together.",
        ),
        Mistake(
            "relu instead of tanh",
            _WithRelu,
            "The hidden layer ends in a relu, and the task asks for tanh: the initialization is made for it,"
            " and weights learned with the one do not fit the other.",
        ),
        Mistake(
            "joined in another order",
            _JoinedByChannel,
            "The vectors of the window are interleaved: all first numbers, then all second numbers. Joined"
            " in the order of the text means one whole vector after the other, flatten(-2) of"
            " [batch, time, window, n_embd].",
        ),
        Mistake(
            "probabilities instead of logits",
            _ReturnsProbabilities,
            "forward returns the softmax. The loss takes a softmax itself, so it would be taken twice.",
        ),
        Mistake(
            "only the last position",
            _AtTheLastPosition,
            "forward returns the logits of the last position. In training every position is an example.",
        ),
        Mistake(
            "the initialization is left to PyTorch",
            _InitializedByPyTorch,
            "The outputs are right, but the parameters are initialized as PyTorch does it: nn.Linear draws"
            " from a uniform distribution that is smaller than Kaiming's rule for tanh, lm_head is too large,"
            " and the first loss lies above ln V.",
        ),
        Mistake(
            "the hidden layer's weights are left to PyTorch",
            _HiddenLeftToPyTorch,
            "The outputs are right, and so is every other initialization, but hidden.weight is as nn.Linear"
            " drew it, smaller than Kaiming's rule for tanh. scaled_weights changes nothing by itself: it"
            " returns a new tensor, which has to be put into the layer, with torch.no_grad():"
            " self.hidden.weight.copy_(...).",
        ),
        Mistake(
            "PyTorch's own weights are scaled",
            _PyTorchsWeightsScaled,
            "The outputs are right, and so is every other initialization, but hidden.weight is far too small."
            " scaled_weights was given the weights that nn.Linear had drawn, which are small already, and it"
            " expects noise from N(0, 1): torch.randn of the weight's shape. The case below is too small to"
            " show it: it was measured in WindowMLP(65, 16, 64, 96).",
        ),
        Mistake(
            "the padding's row never learns",
            _PaddingNeverLearns,
            "padding_idx keeps the gradient away from the padding's row of the token embedding (and begins it"
            " at 0). In this model that the text has not begun yet tells something, and its row is learned"
            " like any other: nn.Embedding without padding_idx.",
        ),
        Mistake(
            "all weights from N(0, 1)",
            _InitializedNaively,
            "The outputs are right, but every parameter is drawn from N(0, 1). The hidden layer saturates and"
            " the first loss is several times ln V; section 4 shows it.",
        ),
    ),
    hints=(
        "In forward: windows, embeddings plus positions, flatten, hidden, tanh, lm_head. Print the shape"
        " after each.",
        "self.token_embedding(windows) is [batch, time, window, n_embd]; position_embedding.weight,"
        " [window, n_embd], can be added to it; .flatten(-2) joins the vectors. Initialize under"
        " torch.no_grad(), or with nn.init.normal_(p, std=...).",
        "With x = self.token_embedding(windows) + self.position_embedding.weight, the activations are"
        " torch.tanh(self.hidden(x.flatten(-2))). nn.init.normal_(self.hidden.weight, std=s) draws weights"
        " with the standard deviation s.",
    ),
)


# ---- 4. a gradient by hand


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
        case(2, 3, 4, scale=200.0),  # exp(200) does not fit in float32
    ]


def _every_target_everywhere(logits: Tensor, targets: Tensor) -> Tensor:
    gradient = logits.softmax(-1)
    gradient[..., targets.flatten()] -= 1
    return gradient / targets.numel()


def _overflowing_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    powers = logits.exp()
    p = powers / powers.sum(-1, keepdim=True)
    return (p - F.one_hot(targets, logits.size(-1))) / targets.numel()


LOGIT_GRADIENT = Exercise(
    task="""All learning begins at the last layer: how should each logit change to lower the loss? `logits` is
    float32 [batch, time, vocab_size], `targets` int64 [batch, time]. The loss is the mean of
    $-\\ln \\mathrm{softmax}(logits)_{target}$ over all batch * time positions. Derive its gradient with
    respect to the logits on paper, and return it as float32 [batch, time, vocab_size]. Do it without
    autograd. Logits may be above 100, and 200 apart.""",
    reference=logit_gradient,
    cases=_gradient_cases,
    forbids=(torch.autograd.grad, torch.autograd.backward),
    valid=lambda logits, targets: logits.dim() == 3 and logits.shape[:2] == targets.shape,
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
        Mistake(
            "every target is subtracted at every position",
            _every_target_everywhere,
            "The 1 was subtracted at the targets of all positions, not at the position's own. A position"
            " knows nothing of its neighbours' targets: gradient[b, t, targets[b, t]] is meant, and indexing"
            " with all targets at once needs an index for b and t too.",
        ),
        Mistake(
            "the softmax runs over time",
            lambda logits, targets: (
                (logits.softmax(1) - F.one_hot(targets, logits.size(-1))) / targets.numel()
            ),
            "The softmax has to run over the vocabulary, the last dimension. Here it ran over the positions.",
        ),
        Mistake(
            "exp overflows",
            _overflowing_gradient,
            "The formula is right, but exp of a logit above 88 is infinite in float32, and infinity over"
            " infinity is nan. logits.softmax(-1) takes the largest logit away first.",
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


# ---- 5. the learning rate


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
        (60, 100, 20, peak, 0.2),  # halfway down
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
    cosine: Callable[[float], float] = lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
) -> Callable:
    """The schedule with one of its parts exchanged. value: from a cosine that falls from 1 to 0 to a fraction
    of the peak.
    """

    def rate(step: int, steps: int, warmup_steps: int, peak: float, final_fraction: float) -> float:
        if step < warmup_steps:
            return peak * warmup(step, warmup_steps)
        return peak * value(cosine(progress(step, steps, warmup_steps)), final_fraction)

    return rate


def _falling_to_the_fraction(
    step: int, steps: int, warmup_steps: int, peak: float, final_fraction: float
) -> float:
    cosine = _schedule(value=lambda c, _: c)(step, steps, warmup_steps, 1.0, 0.0)
    return peak * cosine if step < warmup_steps else final_fraction + (peak - final_fraction) * cosine


LEARNING_RATE_STUB = """def learning_rate(
    step: int,
    steps: int,
    warmup_steps: int,
    peak: float,
    final_fraction: float,
) -> float:
    # your code here
    ...
"""


LEARNING_RATE = Exercise(
    task="""A schedule that begins and ends with small steps. Return the learning rate at `step`, a float;
    steps are counted from 0. During the warmup (step < warmup_steps) it is peak * (step + 1) / warmup_steps,
    so the first step already moves. From step warmup_steps on it falls along half a cosine, the curve of cos
    from 0 to π, shifted and scaled so that it leads from `peak` there to final_fraction * peak at step
    `steps`; halfway through, it is halfway between the two. After that it stays at final_fraction * peak.
    warmup_steps may be 0, and it is always below `steps`.""",
    reference=learning_rate,
    cases=_learning_rate_cases,
    stub=LEARNING_RATE_STUB,
    forbids=(lr_at,),
    valid=lambda step, steps, warmup_steps, peak, final_fraction: (
        step >= 0 and 0 <= warmup_steps < steps and peak > 0 and 0 <= final_fraction <= 1
    ),
    mistakes=(
        Mistake(
            "the warmup starts at zero",
            _schedule(warmup=lambda step, warmup_steps: step / warmup_steps),
            "The first step has learning rate 0: a batch is read, and nothing is learned from it. Counted"
            " from 0, step number `step` is the one after `step` others.",
        ),
        Mistake(
            "no floor",
            _schedule(value=lambda c, final_fraction: c),
            "The rate falls to 0, and it should end at final_fraction * peak. The last steps hardly learn"
            " anything.",
        ),
        Mistake(
            "the floor is added on top",
            _schedule(value=lambda c, final_fraction: final_fraction + c),
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
        Mistake(
            "a quarter of a cosine",
            _schedule(cosine=lambda progress: math.cos(math.pi / 2 * progress)),
            "The cosine runs from 0 to π/2 only, so it is still falling fast at its end, and halfway it is"
            " too high. The schedule is the curve from 0 to π, which ends flat: 0.5 * (1 + cos(π * progress))"
            " falls from 1 to 0 along it.",
        ),
        Mistake(
            "the cosine is not lifted",
            _schedule(cosine=lambda progress: math.cos(math.pi * progress)),
            "cos(π * progress) falls from 1 to -1, so the rate falls below its floor, and even below 0, where"
            " training walks uphill. 0.5 * (1 + cos(π * progress)) falls from 1 to 0.",
        ),
        Mistake(
            "final_fraction taken for a learning rate",
            _falling_to_the_fraction,
            "The rate falls to final_fraction itself. It is a share of the peak: the schedule ends at"
            " final_fraction * peak, whatever the peak is.",
        ),
        Mistake(
            "the warmup is one step too long",
            _schedule(warmup=lambda step, warmup_steps: (step + 1) / (warmup_steps + 1)),
            "The warmup was divided by warmup_steps + 1, so its last step is still below the peak. Step"
            " warmup_steps - 1 is the warmup's last one, and (step + 1) / warmup_steps is 1 there.",
        ),
        Mistake(
            "the end is at the last step",
            _schedule(
                progress=lambda step, steps, warmup_steps: min(
                    1.0, (step - warmup_steps) / (steps - 1 - warmup_steps)
                )
            ),
            "The floor is reached one step too early, at step steps - 1. The progress is (step -"
            " warmup_steps) / (steps - warmup_steps).",
        ),
        Mistake(
            "the distance is the whole run",
            _schedule(progress=lambda step, steps, warmup_steps: min(1.0, (step - warmup_steps) / steps)),
            "The progress was divided by all `steps`, so at the end it is below 1 and the rate above the"
            " floor. The decay has steps - warmup_steps steps.",
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
    eps_before_correction: bool = False,
    root: bool = True,
    decay_with_lr: bool = True,
    decay_afterwards: bool = False,
    means_corrected: bool = False,
    squared: bool = True,
    one_beta: bool = False,
) -> Callable:
    """AdamW's step with one of its parts wrong."""

    def step_once(
        weight, gradient, first, second, step, lr, beta1, beta2, eps, weight_decay
    ) -> tuple[Tensor, Tensor, Tensor]:
        if decay_in_gradient:
            gradient = gradient + weight_decay * weight
        beta2 = beta1 if one_beta else beta2
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * (gradient**2 if squared else gradient)
        m = first / (1 - beta1**step) if correct else first
        v = second / (1 - beta2**step) if correct else second
        below = (v.sqrt() if root else v) + eps
        if eps_inside:
            below = (v + eps).sqrt()
        if eps_before_correction:
            below = (second.sqrt() + eps) / math.sqrt(1 - beta2**step)
        decay = 0.0 if decay_in_gradient else weight_decay * (lr if decay_with_lr else 1.0)
        moved = weight - lr * m / below
        new = moved - decay * (moved if decay_afterwards else weight)
        return (new, m, v) if means_corrected else (new, first, second)

    return step_once


ADAMW_STUB = """def adamw_step(
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
    # your code here
    ...
"""


ADAMW_STEP = Exercise(
    task="""Write one step of AdamW. All tensors are float32 of one shape: `weight`, its `gradient`, and the
    running means of the gradient (`first`) and of its square (`second`). Each mean is renewed as
    beta * old + (1 - beta) * new, `first` with beta1 and `second` with beta2. `step` counts from 1, and the
    means began at zero, so for the step each renewed mean is divided by $1 - \\beta^{step}$: call the results
    $m$ and $v$. The weight moves by $-lr \\cdot m / (\\sqrt{v} + eps)$, and besides by -lr * weight_decay *
    weight, with the weight as it was given. Return (new weight, new first, new second): the means renewed,
    but not divided. What was given stays as it is.""",
    reference=adamw_step,
    cases=_adamw_cases,
    stub=ADAMW_STUB,
    forbids=(torch.optim.Adam, torch.optim.AdamW),
    valid=lambda weight, gradient, first, second, step, *rates: (
        weight.shape == gradient.shape == first.shape == second.shape and step >= 1
    ),
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
        Mistake(
            "eps before the bias correction",
            _adamw(eps_before_correction=True),
            "eps was added to the root of the uncorrected mean square, and then scaled by the correction with"
            " it. First divide by 1 - beta2**step, then take the root, then add eps.",
        ),
        Mistake(
            "the corrected means come back",
            _adamw(means_corrected=True),
            "The means that are returned are the corrected ones. They would be renewed from these in the next"
            " step, and corrected once more: keep the corrected ones for the step alone.",
        ),
        Mistake(
            "the mean of the gradient in place of its square's",
            _adamw(squared=False),
            "The second mean was renewed with the gradient, and it is the mean of its square: gradient**2."
            " Without the square it can be negative, and the root of that is nan.",
        ),
        Mistake(
            "both means with beta1",
            _adamw(one_beta=True),
            "The mean of the squares was renewed with beta1. It has a rate of its own, beta2, and is"
            " corrected with 1 - beta2**step.",
        ),
        Mistake(
            "the decay uses the moved weight",
            _adamw(decay_afterwards=True),
            "The decay was taken from the weight after the step. It belongs to the weight as it was given:"
            " both changes are computed from the old weight.",
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
            "`m = first / (1 - beta1**step)`, `v = second / (1 - beta2**step)`, and the new weight is"
            " `weight - lr * m / (v.sqrt() + eps) - lr * weight_decay * weight`."
        ),
    ),
)


# ---- 7. clipping


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


def _clipped(norm_of: Callable[[list[Tensor]], float]) -> Callable:
    """Clipping with another norm."""

    def clip(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
        factor = min(1.0, max_norm / norm_of(gradients))
        return [g * factor for g in gradients]

    return clip


def _spectral(gradients: list[Tensor]) -> float:
    norms = [torch.linalg.matrix_norm(g, 2).max() if g.dim() > 1 else g.norm() for g in gradients]
    return torch.stack(norms).norm().item()


CLIP_STUB = """def clip_gradients(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    # your code here
    ...
"""


CLIP_GRADIENTS = Exercise(
    task="""One strange batch can give a gradient so long that its step ruins the model. Clipping shortens it.
    `gradients` is a list of float32 tensors of one or two dimensions, one per parameter. Take all their
    numbers together as one long vector. Where its Euclidean norm (the root of the sum of all squares) is
    above `max_norm`, return all gradients scaled by one factor, so that the norm becomes max_norm; otherwise
    return them with the values they have. The result is a list of tensors of the same shapes, in the same
    order. The tensors that were given stay unchanged; where nothing is scaled, they may come back
    themselves. The norm is never 0 here.""",
    reference=clip_gradients,
    cases=_clip_cases,
    stub=CLIP_STUB,
    forbids=(nn.utils.clip_grad_norm_,),
    valid=lambda gradients, max_norm: max_norm > 0 and sum(g.square().sum() for g in gradients) > 0,
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
            _clipped(lambda gradients: sum(g.norm().item() for g in gradients)),
            "The norms of the tensors were added. Lengths at right angles add as squares (3 and 4 make 5, not"
            " 7), so this is too large, and too much is clipped.",
        ),
        Mistake(
            "the root is missing",
            _clipped(lambda gradients: sum(g.square().sum().item() for g in gradients)),
            "The sum of squares was taken for the norm. The norm is its square root; without it long"
            " gradients are cut far too short.",
        ),
        Mistake(
            "the spectral norm of matrices",
            _clipped(_spectral),
            "torch.linalg.norm(g, ord=2) of a matrix is its largest singular value, the spectral norm. The"
            " Euclidean norm is the root of the sum of the squares of all entries: g.norm(), without an"
            " order, or g.square().sum().sqrt().",
        ),
        Mistake(
            "the norm of the longest tensor",
            _clipped(lambda gradients: max(g.norm().item() for g in gradients)),
            "The largest norm of a single tensor was taken for the norm of all. The squares of all tensors"
            " have to be added up before the root is taken.",
        ),
        Mistake(
            "the mean square instead of the sum",
            _clipped(
                lambda gradients: torch.cat([g.flatten() for g in gradients]).square().mean().item() ** 0.5
            ),
            "The mean of the squares was taken where their sum is meant. The length of a vector grows with"
            " the number of its entries; its mean square does not.",
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


# ---- 8. the training loop


def train(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    *,
    optimizer: torch.optim.Optimizer,
    peak: float,
    warmup_steps: int,
    final_fraction: float,
    max_norm: float,
    evaluate: Callable[[nn.Module], float],
    eval_every: int,
) -> tuple[list[float], list[tuple[int, float]]]:
    losses, evaluations = [], []
    model.train()
    for step, (x, y) in zip(range(steps), batches):
        rate = learning_rate(step, steps, warmup_steps, peak, final_fraction)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        parameters = list(model.parameters())
        clipped = clip_gradients([p.grad for p in parameters], max_norm)
        for p, gradient in zip(parameters, clipped):
            p.grad = gradient
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % eval_every == 0 or step + 1 == steps:
            model.eval()
            with torch.no_grad():
                evaluations.append((step + 1, evaluate(model)))
            model.train()
    return losses, evaluations


TRAIN_STUB = """def train(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    *,
    optimizer: torch.optim.Optimizer,
    peak: float,
    warmup_steps: int,
    final_fraction: float,
    max_norm: float,
    evaluate: Callable[[nn.Module], float],
    eval_every: int,
) -> tuple[list[float], list[tuple[int, float]]]:
    # your code here
    ...
"""


class _Probe(nn.Module):
    """A bigram with a bias, whose logits are half as large in eval mode: a forgotten train() or eval() shows
    in the losses.
    """

    def __init__(self, vocab_size: int):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)
        self.bias = nn.Parameter(torch.linspace(-1, 1, vocab_size))
        with torch.no_grad():
            values = torch.arange(vocab_size**2, dtype=torch.float32).sin()
            self.table.weight.copy_(values.view(vocab_size, vocab_size))

    def forward(self, idx: Tensor) -> Tensor:
        logits = self.table(idx) + self.bias
        return logits if self.training else logits / 2


def _train_cases(generator: Generator) -> list[tuple]:
    def case(optimizer: str, steps: int, warmup_steps: int, eval_every: int, **changes: float) -> tuple:
        vocab_size = 3 + steps % 3
        peak = 0.5 + torch.rand(1, generator=generator).item()
        text = torch.randint(vocab_size, (steps + 1, 2, 3), generator=generator)
        rates = {"peak": peak, "final_fraction": 0.1, "max_norm": 10.0, **changes}
        batches = [(rows[:, :-1].clone(), rows[:, 1:].clone()) for rows in text]
        return optimizer, batches, steps, warmup_steps, eval_every, *rates.values()

    return [
        case("SGD", 1, 0, 1),
        case("SGD", 2, 0, 1, max_norm=0.2),
        case("SGD", 3, 1, 2),
        case("SGD", 4, 2, 2, max_norm=0.2),
        case("SGD", 6, 2, 4, final_fraction=0.5, max_norm=0.3),
        case("SGD", 5, 0, 10),
        case("AdamW", 5, 3, 2, max_norm=0.1),
    ]


def _observe_train(
    answer: Callable,
    optimizer: str,
    batches: list[tuple[Tensor, Tensor]],
    steps: int,
    warmup_steps: int,
    eval_every: int,
    peak: float,
    final_fraction: float,
    max_norm: float,
) -> Iterator[tuple[str, Any]]:
    watched = _Watched(optimizer, batches)
    result = watched.run(
        answer,
        steps,
        peak=peak,
        warmup_steps=warmup_steps,
        final_fraction=final_fraction,
        max_norm=max_norm,
        eval_every=eval_every,
    )
    if not (isinstance(result, tuple | list) and len(result) == 2 and isinstance(result[0], list)):
        raise NotRight(f"it returns {type(result).__name__}, and (losses, evaluations) is wanted: two lists.")
    losses, evaluations = result
    if not isinstance(evaluations, list) or any(not _is_pair(item) for item in evaluations):
        raise NotRight(
            f"the evaluations are {evaluations!r:.80}, and a list of pairs (steps done, what `evaluate`"
            " returned) is wanted."
        )
    if any(isinstance(loss, Tensor) for loss in losses):
        raise NotRight(
            "there are tensors among the losses, and each holds its whole graph in memory: .item() makes a"
            " plain number."
        )
    yield "how many losses", len(losses)
    watched.complain_of_modes()
    yield "the first loss", losses[:1]
    yield "the learning rates at each optimizer.step()", watched.rates
    yield "the losses", losses
    for name, parameter in watched.model.named_parameters():
        yield f"{name} after the last step", parameter.detach().clone()
    yield "the steps after which it evaluates", [done for done, _ in evaluations]
    watched.complain(steps)
    yield "the evaluations", evaluations


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple | list) and len(item) == 2


class _Watched:
    """What the learner's loop is run on: a model, an optimizer and batches that note what happens."""

    def __init__(self, optimizer: str, batches: list[tuple[Tensor, Tensor]]):
        self._batches = batches
        self.model = _Probe(1 + max(int(part.max()) for batch in batches for part in batch))
        groups = [{"params": [self.model.table.weight]}, {"params": [self.model.bias]}]
        self._optimizer = getattr(torch.optim, optimizer)(groups, lr=7.0)
        self._optimizer.register_step_pre_hook(self._note_step)
        self.rates: list[list[float]] = []
        """Of each step, that of every group."""
        self._modes: list[bool] = []
        """Of each step, whether the model was in train mode."""
        self._taken = 0
        self._problems: list[str] = []

    def run(self, answer: Callable, steps: int, **options: float) -> Any:
        """The answer's result. Before it, the model is in eval mode and has gradients from somewhere else."""
        self.model.eval()
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        try:
            result = answer(
                self.model,
                self._counted(),
                steps,
                optimizer=self._optimizer,
                evaluate=self._evaluate,
                **options,
            )
            if not torch.is_grad_enabled():
                self._problems.append(
                    "gradients are still switched off when it returns: `with torch.no_grad():` switches them"
                    " on again at its end."
                )
        finally:
            torch.set_grad_enabled(True)
        return result

    def _counted(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self._batches:
            self._taken += 1
            yield x, y

    def _note_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.rates.append([float(group["lr"]) for group in optimizer.param_groups])
        self._modes.append(self.model.training)

    def _evaluate(self, model: nn.Module) -> float:
        if model.training:
            self._problems.append(
                "`evaluate` is called while the model is in train mode: model.eval() before it, model.train()"
                " after it."
            )
        if torch.is_grad_enabled():
            self._problems.append(
                "`evaluate` runs with gradients on, and keeps a graph that nobody needs: with"
                " torch.no_grad() around it."
            )
        x, y = self._batches[0]
        return cross_entropy(model(x), y).item()

    def complain_of_modes(self) -> None:
        """Raises NotRight where a step is taken in eval mode."""
        if False not in self._modes:
            return
        first = self._modes.index(False)
        if first == 0:
            raise NotRight("the first step is taken in eval mode: model.train() before the loop.")
        raise NotRight(
            f"step {first}, counted from 0, is taken in eval mode: model.train() again after each evaluation."
        )

    def complain(self, steps: int) -> None:
        """Raises NotRight for what no comparison of results shows."""
        if self._taken > steps:
            self._problems.append(
                f"it takes {self._taken} batches from the iterator for {steps} steps. The last is lost to"
                " whoever goes on with `batches`: zip(range(steps), batches) asks the range first."
            )
        if not self.model.training:
            self._problems.append(
                "when it returns, the model is in eval mode: model.train() after evaluating."
            )
        if self._problems:
            raise NotRight(self._problems[0])


def _is_due(done: int, steps: int, every: int) -> bool:
    return done % every == 0 or done == steps


@dataclass(frozen=True)
class _Loop:
    """The training loop with one of its parts exchanged."""

    rate: Callable = learning_rate
    clip: Callable = clip_gradients
    due: Callable[[int, int, int], bool] = _is_due
    zero: bool = True
    zero_after: bool = False
    groups: int = 2
    """How many of them get the learning rate."""
    rate_after: bool = False
    loss_after: bool = False
    """Whether the loss that is noted is that of the batch after the step."""
    train_first: bool = True
    eval_mode: bool = True
    train_again: bool = True
    no_grad: bool = True
    fewer: int = 0
    """Steps that are left out at the end."""
    range_first: bool = True

    def __call__(self, model, batches, steps, *, optimizer, evaluate, eval_every, max_norm, **schedule):
        losses, evaluations = [], []
        if self.train_first:
            model.train()
        for step, (x, y) in self._numbered(batches, steps):
            rate = self.rate(step, steps, **schedule)
            losses.append(self._step(model, optimizer, x, y, rate=rate, max_norm=max_norm))
            if self.due(step + 1, steps, eval_every):
                evaluations.append((step + 1, self._evaluated(model, evaluate)))
        return losses, evaluations

    def _numbered(self, batches: Iterator, steps: int) -> Iterator[tuple[int, Any]]:
        if self.range_first:
            yield from zip(range(steps - self.fewer), batches)
        else:
            yield from ((step, batch) for batch, step in zip(batches, range(steps)))

    def _step(self, model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, *, rate: float, max_norm: float):
        if not self.rate_after:
            self._set_rate(optimizer, rate)
        loss = cross_entropy(model(x), y)
        if self.zero:
            optimizer.zero_grad()
        loss.backward()
        self._clip(model, max_norm)
        optimizer.step()
        if self.zero_after:
            optimizer.zero_grad()
        if self.rate_after:
            self._set_rate(optimizer, rate)
        return (cross_entropy(model(x), y) if self.loss_after else loss).item()

    def _set_rate(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        for group in optimizer.param_groups[: self.groups]:
            group["lr"] = rate

    def _clip(self, model: nn.Module, max_norm: float) -> None:
        parameters = list(model.parameters())
        for p, gradient in zip(parameters, self.clip([p.grad for p in parameters], max_norm)):
            p.grad = gradient

    def _evaluated(self, model: nn.Module, evaluate: Callable[[nn.Module], float]) -> float:
        model.train(not self.eval_mode)
        with torch.set_grad_enabled(not self.no_grad):
            value = evaluate(model)
        model.train(self.train_again or not self.eval_mode)
        return value


TRAIN = Exercise(
    task="""Write the whole training loop: your step of week 1, with the schedule, clipping and evaluation.
    `batches` is an iterator of (x, y), both int64 [batch, time], and may go on for ever; train on exactly the
    next `steps` of them. At each step, counted from 0:

    1. set the learning rate of every group of the optimizer, `group["lr"]` for each group in
    `optimizer.param_groups`, to your `learning_rate(step, steps, warmup_steps, peak, final_fraction)`;

    2. compute the mean cross-entropy of `model(x)` and `y`, and note it;

    3. clear the old gradients (there may be some from before) and compute the new ones;

    4. replace the gradients of all of `model.parameters()` by what your `clip_gradients(..., max_norm)` makes
    of them (every parameter has one);

    5. let the optimizer step;

    6. where the steps done are a multiple of `eval_every`, and after the last step, call `evaluate(model)`,
    which returns a float: in eval mode and under torch.no_grad(), once where both fall together.

    The steps are done in train mode, whatever mode the model comes in; leave it in train mode. Return
    (losses, evaluations): the loss of each batch before its step, as a list of `steps` floats, and a list of
    (steps done, what `evaluate` returned).""",
    reference=train,
    cases=_train_cases,
    observe=_observe_train,
    stub=TRAIN_STUB,
    points=3,
    forbids=(Trainer,),
    valid=lambda optimizer, batches, steps, warmup_steps, eval_every, peak, final_fraction, max_norm: (
        0 <= warmup_steps < steps < len(batches)
        and eval_every >= 1
        and peak > 0
        and 0 <= final_fraction <= 1
        and max_norm > 0
        and all(len(batch) == 2 and batch[0].shape == batch[1].shape for batch in batches)
        and all(part.dim() == 2 for batch in batches for part in batch)
    ),
    mistakes=(
        Mistake(
            "the last batch is skipped",
            _Loop(fewer=1),
            "There is one step too few: the last batch is never learned from. Steps 0 to steps - 1 make"
            " `steps` of them.",
        ),
        Mistake(
            "the learning rate never changes",
            _Loop(groups=0),
            "The optimizer keeps the learning rate that it was built with. A schedule acts only where it is"
            ' written into the optimizer, before step(): group["lr"] = ... for each group of'
            " optimizer.param_groups.",
        ),
        Mistake(
            "only the first group gets the learning rate",
            _Loop(groups=1),
            "The new learning rate was given to the first of optimizer.param_groups only. Matrices and biases"
            " are often in different groups: loop over all of them.",
        ),
        Mistake(
            "the learning rate is set after the step",
            _Loop(rate_after=True),
            "Each learning rate was set after the optimizer's step, so it acts one step late, and the first"
            " step is taken with whatever the optimizer was built with.",
        ),
        Mistake(
            "the steps are counted from 1",
            _Loop(rate=lambda step, *rest, **schedule: learning_rate(step + 1, *rest, **schedule)),
            "learning_rate was asked for step + 1. It counts from 0: the first step has step = 0.",
        ),
        Mistake(
            "the gradients are not cleared",
            _Loop(zero=False),
            "backward adds to the gradients that are there, those of the step before and those that the model"
            " came with. optimizer.zero_grad() before backward().",
        ),
        Mistake(
            "the gradients are cleared after the step only",
            _Loop(zero=False, zero_after=True),
            "The gradients are cleared after each step, and never before the first: those that the model came"
            " with count into it. optimizer.zero_grad() belongs before backward().",
        ),
        Mistake(
            "the gradients are not clipped",
            _Loop(clip=lambda gradients, max_norm: gradients),
            "The optimizer steps with the gradients as they are. clip_gradients returns new tensors, so they"
            " have to be put in the place of the old ones, p.grad = ... for each parameter, after backward()"
            " and before step().",
        ),
        Mistake(
            "each tensor is clipped by its own norm",
            _Loop(clip=lambda gradients, max_norm: [clip_gradients([g], max_norm)[0] for g in gradients]),
            "clip_gradients was called for one gradient at a time. The norm is that of all gradients"
            " together: one call, with the list of all.",
        ),
        Mistake(
            "the loss is taken after the step",
            _Loop(loss_after=True),
            "The loss was computed once more after the optimizer's step. The batch has been learned from by"
            " then, so it looks better than the model is on new text, and the forward pass is paid for twice:"
            " note the loss that backward() started from.",
        ),
        Mistake(
            "the steps before the first evaluation are in eval mode",
            _Loop(train_first=False),
            "The model may come in eval mode, and then all steps up to the first evaluation are taken in it:"
            " model.train() before the loop.",
        ),
        Mistake(
            "no evaluation at the end",
            _Loop(due=lambda done, steps, every: done % every == 0),
            "Where `steps` is no multiple of eval_every, the finished model is never evaluated, and it is the"
            " one that you want to know about.",
        ),
        Mistake(
            "the evaluation is one step late",
            _Loop(due=lambda done, steps, every: (done - 1) % every == 0 or done == steps),
            "It evaluates where the step's number, counted from 0, is a multiple of eval_every: after 1 step"
            " already. Count the steps that are done, step + 1.",
        ),
        Mistake(
            "the evaluation is in train mode",
            _Loop(eval_mode=False),
            "The model is in train mode while it is evaluated. Layers such as dropout (week 6) act otherwise"
            " in training: model.eval() before, model.train() after.",
        ),
        Mistake(
            "training goes on in eval mode",
            _Loop(train_again=False),
            "After the first evaluation the model stays in eval mode, and all later steps are taken in it:"
            " model.train() after each evaluation.",
        ),
        Mistake(
            "the evaluation keeps a graph",
            _Loop(no_grad=False),
            "The evaluation runs with gradients on. The numbers are the same, but every forward pass keeps"
            " what backward would need, and nobody calls it: with torch.no_grad().",
        ),
        Mistake(
            "one batch too many is taken",
            _Loop(range_first=False),
            "One batch more than `steps` is taken from the iterator, and thrown away. A loop that asks for a"
            " batch first, and only then looks whether all steps are done, does that: enumerate(batches) with"
            " a break, and zip(batches, range(steps)), too. zip(range(steps), batches) asks the range first.",
        ),
    ),
    hints=(
        "Begin with model.train() and a loop: for step, (x, y) in zip(range(steps), batches). Inside: rate,"
        " loss, zero_grad, backward, clip, step, and sometimes an evaluation.",
        "Rate: a loop over optimizer.param_groups. Clipping: a list of p.grad for p in model.parameters(),"
        " and a loop that puts the clipped ones back. Evaluation: if done % eval_every == 0 or done == steps,"
        " with done = step + 1.",
        "for p, g in zip(model.parameters(), clip_gradients([p.grad for p in model.parameters()], max_norm)):"
        " p.grad = g. And: model.eval(); with torch.no_grad(): evaluations.append((done, evaluate(model)));"
        " then model.train().",
    ),
)


EXERCISES: tuple[Exercise, ...] = (
    CONTEXT_WINDOWS,
    SCALED_WEIGHTS,
    WINDOW_MLP,
    LOGIT_GRADIENT,
    LEARNING_RATE,
    ADAMW_STEP,
    CLIP_GRADIENTS,
    TRAIN,
)
