"""Answers to the build exercises of week 2, written by people who did not write its grader."""

import math
from collections.abc import Callable, Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.course.foreign.register import right, wrong


def learning_rate(step: int, steps: int, warmup_steps: int, peak: float, final_fraction: float) -> float:
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))


def clip_gradients(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
    if norm <= max_norm:
        return list(gradients)
    return [g * (max_norm / norm) for g in gradients]


@wrong("kaiming_normal_ with its default nonlinearity has the gain sqrt(2), not 5/3")
class WindowMLP(nn.Module):
    def __init__(self, vocab_size: int, window: int, n_embd: int, n_hidden: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.window = window
        self.token_embedding = nn.Embedding(vocab_size + 1, n_embd)
        self.position_embedding = nn.Embedding(window, n_embd)
        self.hidden = nn.Linear(window * n_embd, n_hidden)
        self.lm_head = nn.Linear(n_hidden, vocab_size)
        nn.init.normal_(self.token_embedding.weight, std=1.0)
        nn.init.normal_(self.position_embedding.weight, std=0.1)
        nn.init.kaiming_normal_(self.hidden.weight)
        nn.init.normal_(self.lm_head.weight, std=0.01)
        nn.init.zeros_(self.hidden.bias)
        nn.init.zeros_(self.lm_head.bias)

    def activations(self, idx: Tensor) -> Tensor:
        padded = F.pad(idx, (self.window - 1, 0), value=self.vocab_size)
        windows = padded.unfold(1, self.window, 1)
        x = self.token_embedding(windows) + self.position_embedding.weight
        return torch.tanh(self.hidden(x.flatten(2)))

    def forward(self, idx: Tensor) -> Tensor:
        return self.lm_head(self.activations(idx))


@wrong("pads with id 0, a real token, and never uses the padding's own embedding")
class WindowMLP(nn.Module):
    def __init__(self, vocab_size: int, window: int, n_embd: int, n_hidden: int):
        super().__init__()
        self.window = window
        self.token_embedding = nn.Embedding(vocab_size + 1, n_embd)
        self.position_embedding = nn.Embedding(window, n_embd)
        self.hidden = nn.Linear(window * n_embd, n_hidden)
        self.lm_head = nn.Linear(n_hidden, vocab_size)
        with torch.no_grad():
            self.position_embedding.weight.normal_(0, 0.1)
            self.hidden.weight.normal_(0, (5 / 3) / (window * n_embd) ** 0.5)
            self.hidden.bias.zero_()
            self.lm_head.weight.normal_(0, 0.01)
            self.lm_head.bias.zero_()

    def activations(self, idx: Tensor) -> Tensor:
        batch, time = idx.shape
        pad = torch.zeros(batch, self.window - 1, dtype=idx.dtype, device=idx.device)
        padded = torch.cat([pad, idx], dim=1)
        windows = torch.stack([padded[:, t : t + self.window] for t in range(time)], dim=1)
        x = self.token_embedding(windows)
        x = x + self.position_embedding(torch.arange(self.window, device=idx.device))
        return torch.tanh(self.hidden(x.view(batch, time, -1)))

    def forward(self, idx: Tensor) -> Tensor:
        return self.lm_head(self.activations(idx))


@wrong("joins the vectors channel by channel instead of one token's vector after the other")
class WindowMLP(nn.Module):
    def __init__(self, vocab_size: int, window: int, n_embd: int, n_hidden: int):
        super().__init__()
        self.vocab_size, self.window = vocab_size, window
        self.token_embedding = nn.Embedding(vocab_size + 1, n_embd)
        self.position_embedding = nn.Embedding(window, n_embd)
        self.hidden = nn.Linear(window * n_embd, n_hidden)
        self.lm_head = nn.Linear(n_hidden, vocab_size)
        nn.init.normal_(self.position_embedding.weight, 0.0, 0.1)
        nn.init.kaiming_normal_(self.hidden.weight, nonlinearity="tanh")
        nn.init.normal_(self.lm_head.weight, 0.0, 0.01)
        nn.init.zeros_(self.hidden.bias)
        nn.init.zeros_(self.lm_head.bias)

    def activations(self, idx: Tensor) -> Tensor:
        padded = F.pad(idx, (self.window - 1, 0), value=self.vocab_size)
        places = []
        for k in range(self.window):
            tokens = padded[:, k : k + idx.shape[1]]
            places.append(self.token_embedding(tokens) + self.position_embedding.weight[k])
        x = torch.stack(places, dim=-1)
        return torch.tanh(self.hidden(x.flatten(start_dim=2)))

    def forward(self, idx: Tensor) -> Tensor:
        return self.lm_head(self.activations(idx))


@wrong("padding_idx makes the padding's row zero instead of N(0, 1), and it never gets a gradient")
class WindowMLP(nn.Module):
    def __init__(self, vocab_size: int, window: int, n_embd: int, n_hidden: int):
        super().__init__()
        self.window = window
        self.pad = vocab_size
        self.token_embedding = nn.Embedding(vocab_size + 1, n_embd, padding_idx=vocab_size)
        self.position_embedding = nn.Embedding(window, n_embd)
        self.hidden = nn.Linear(window * n_embd, n_hidden)
        self.lm_head = nn.Linear(n_hidden, vocab_size)
        fan_in = window * n_embd
        self.position_embedding.weight.data.normal_(0, 0.1)
        self.hidden.weight.data = torch.randn(n_hidden, fan_in) * (5 / 3) / fan_in**0.5
        self.lm_head.weight.data.normal_(0, 0.01)
        self.hidden.bias.data.zero_()
        self.lm_head.bias.data.zero_()

    def activations(self, idx: Tensor) -> Tensor:
        B, T = idx.shape
        padded = F.pad(idx, (self.window - 1, 0), value=self.pad)
        windows = padded.unfold(1, self.window, 1)
        emb = self.token_embedding(windows) + self.position_embedding.weight
        return self.hidden(emb.reshape(B, T, -1)).tanh()

    def forward(self, idx: Tensor) -> Tensor:
        return self.lm_head(self.activations(idx))


@wrong("builds the windows with roll, so the first positions see the row's last tokens instead of padding")
class WindowMLP(nn.Module):
    def __init__(self, vocab_size: int, window: int, n_embd: int, n_hidden: int):
        super().__init__()
        self.window = window
        self.token_embedding = nn.Embedding(vocab_size + 1, n_embd)
        self.position_embedding = nn.Embedding(window, n_embd)
        self.hidden = nn.Linear(window * n_embd, n_hidden)
        self.lm_head = nn.Linear(n_hidden, vocab_size)
        nn.init.normal_(self.token_embedding.weight, std=1.0)
        nn.init.normal_(self.position_embedding.weight, std=0.1)
        nn.init.normal_(self.hidden.weight, std=(5 / 3) / math.sqrt(self.hidden.in_features))
        nn.init.normal_(self.lm_head.weight, std=0.01)
        nn.init.constant_(self.hidden.bias, 0.0)
        nn.init.constant_(self.lm_head.bias, 0.0)

    def activations(self, idx: Tensor) -> Tensor:
        shifts = range(self.window - 1, -1, -1)
        windows = torch.stack([torch.roll(idx, shifts=k, dims=1) for k in shifts], dim=-1)
        x = self.token_embedding(windows) + self.position_embedding.weight
        return torch.tanh(self.hidden(x.flatten(-2)))

    def forward(self, idx: Tensor) -> Tensor:
        return self.lm_head(self.activations(idx))


@wrong("Kaiming's rule with the layer's outputs (fan_out) in place of its inputs")
class WindowMLP(nn.Module):
    def __init__(self, vocab_size: int, window: int, n_embd: int, n_hidden: int):
        super().__init__()
        self.window = window
        self.vocab_size = vocab_size
        self.token_embedding = nn.Embedding(vocab_size + 1, n_embd)
        self.position_embedding = nn.Embedding(window, n_embd)
        self.hidden = nn.Linear(window * n_embd, n_hidden)
        self.lm_head = nn.Linear(n_hidden, vocab_size)
        nn.init.normal_(self.token_embedding.weight)
        nn.init.normal_(self.position_embedding.weight, std=0.1)
        nn.init.normal_(self.hidden.weight, std=(5 / 3) / math.sqrt(self.hidden.weight.shape[0]))
        nn.init.normal_(self.lm_head.weight, std=0.01)
        nn.init.zeros_(self.hidden.bias)
        nn.init.zeros_(self.lm_head.bias)

    def activations(self, idx: Tensor) -> Tensor:
        windows = F.pad(idx, (self.window - 1, 0), value=self.vocab_size).unfold(1, self.window, 1)
        x = self.token_embedding(windows) + self.position_embedding.weight
        return torch.tanh(self.hidden(x.flatten(-2)))

    def forward(self, idx: Tensor) -> Tensor:
        return self.lm_head(self.activations(idx))


@right
class WindowMLP(nn.Module):
    def __init__(self, vocab_size: int, window: int, n_embd: int, n_hidden: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size + 1, n_embd)
        self.position_embedding = nn.Embedding(window, n_embd)
        self.hidden = nn.Linear(window * n_embd, n_hidden)
        self.lm_head = nn.Linear(n_hidden, vocab_size)
        self.position_embedding.weight.data.mul_(0.1)
        nn.init.kaiming_normal_(self.hidden.weight, mode="fan_in", nonlinearity="tanh")
        self.lm_head.weight.data.normal_().mul_(0.01)
        for layer in (self.hidden, self.lm_head):
            layer.bias.data.zero_()

    def activations(self, idx: Tensor) -> Tensor:
        batch, time = idx.shape
        window, n_embd = self.position_embedding.weight.shape
        pad = self.token_embedding.num_embeddings - 1
        total = self.hidden.bias.expand(batch, time, -1)
        for place in range(window):
            back = window - 1 - place
            tokens = torch.full_like(idx, pad)
            if back < time:
                tokens[:, back:] = idx[:, : time - back]
            vectors = self.token_embedding(tokens) + self.position_embedding.weight[place]
            columns = self.hidden.weight[:, place * n_embd : (place + 1) * n_embd]
            total = total + vectors @ columns.T
        return total.tanh()

    def forward(self, idx: Tensor) -> Tensor:
        return self.lm_head(self.activations(idx))


@wrong("takes one batch too many from the iterator before it stops")
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
    for step, (x, y) in enumerate(batches):
        if step == steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, warmup_steps, peak, final_fraction)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        parameters = list(model.parameters())
        for p, g in zip(parameters, clip_gradients([p.grad for p in parameters], max_norm), strict=True):
            p.grad = g
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % eval_every == 0 or step + 1 == steps:
            model.eval()
            with torch.no_grad():
                evaluations.append((step + 1, evaluate(model)))
            model.train()
    return losses, evaluations


@wrong("clears the gradients only after each step, so old gradients count into the first one")
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
    losses = []
    evaluations = []
    model.train()
    for step in range(steps):
        x, y = next(batches)
        lr = learning_rate(step, steps, warmup_steps, peak, final_fraction)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        logits = model(x)
        loss = F.cross_entropy(logits.reshape(-1, logits.size(-1)), y.reshape(-1))
        loss.backward()
        params = list(model.parameters())
        clipped = clip_gradients([p.grad for p in params], max_norm)
        for p, g in zip(params, clipped, strict=True):
            p.grad = g
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % eval_every == 0 or step == steps - 1:
            model.eval()
            with torch.no_grad():
                evaluations.append((step + 1, evaluate(model)))
            model.train()
    return losses, evaluations


@wrong("calls train() once before the loop, so all steps after the first evaluation run in eval mode")
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
    parameters = list(model.parameters())
    model.train()
    for step in range(1, steps + 1):
        x, y = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, steps, warmup_steps, peak, final_fraction)
        loss = F.cross_entropy(model(x).transpose(1, 2), y)
        optimizer.zero_grad()
        loss.backward()
        gradients = clip_gradients([p.grad for p in parameters], max_norm)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad.copy_(gradient)
        optimizer.step()
        losses.append(loss.item())
        if step % eval_every == 0 or step == steps:
            model.eval()
            with torch.no_grad():
                evaluations.append((step, evaluate(model)))
    model.train()
    return losses, evaluations


@wrong("clips each parameter's gradient by its own norm instead of all by the norm of the whole")
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
    for step in range(steps):
        model.train()
        x, y = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, warmup_steps, peak, final_fraction)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        for p in model.parameters():
            p.grad = clip_gradients([p.grad], max_norm)[0]
        optimizer.step()
        losses.append(loss.item())
        done = step + 1
        if done % eval_every == 0 or done == steps:
            model.eval()
            with torch.no_grad():
                evaluations.append((done, evaluate(model)))
            model.train()
    return losses, evaluations


@wrong("sets the learning rate of the first parameter group only")
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
    for step in range(steps):
        x, y = next(batches)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, warmup_steps, peak, final_fraction)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        params = list(model.parameters())
        for p, g in zip(params, clip_gradients([p.grad for p in params], max_norm), strict=True):
            p.grad = g
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % eval_every == 0 or step + 1 == steps:
            model.eval()
            with torch.no_grad():
                evaluations.append((step + 1, evaluate(model)))
            model.train()
    return losses, evaluations


@wrong("evaluates a second time after the loop where steps is a multiple of eval_every")
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
    @torch.no_grad()
    def run_evaluation(done):
        model.eval()
        evaluations.append((done, evaluate(model)))
        model.train()

    losses, evaluations = [], []
    model.train()
    for step, (x, y) in zip(range(steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, warmup_steps, peak, final_fraction)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        model.zero_grad()
        loss.backward()
        params = list(model.parameters())
        for p, g in zip(params, clip_gradients([p.grad for p in params], max_norm), strict=True):
            p.grad = g
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % eval_every == 0:
            run_evaluation(step + 1)
    run_evaluation(steps)
    return losses, evaluations


@right
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
    model.train()
    losses, evaluations = [], []
    parameters = list(model.parameters())
    for done, (x, y) in enumerate(islice(batches, steps), start=1):
        logits = model(x)
        loss = F.nll_loss(logits.log_softmax(dim=-1).flatten(0, 1), y.flatten())
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        rate = learning_rate(done - 1, steps, warmup_steps, peak, final_fraction)
        for group in optimizer.param_groups:
            group.update(lr=rate)
        optimizer.step()
        losses.append(float(loss.detach()))
        if not done % eval_every or done == steps:
            with torch.no_grad():
                evaluations.append((done, evaluate(model.eval())))
            model.train()
    return losses, evaluations
