"""Answers to the build exercises of week 1, written by people who did not write its grader."""

from bisect import bisect_right
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tests.course.foreign.register import right, wrong


@wrong("takes the first token whose sum is at least u, so a u on a border, or u = 0, gives the piece before")
def draw_token(probabilities: torch.Tensor, u: float) -> int:
    cumulative = torch.cumsum(probabilities, dim=0)
    return int((cumulative >= u).nonzero()[0])


@wrong("compares u with each single probability instead of the running sum")
def draw_token(probabilities: torch.Tensor, u: float) -> int:
    for token, p in enumerate(probabilities.tolist()):
        if u < p:
            return token
    return len(probabilities) - 1


@wrong("lays the pieces in order of falling probability instead of by token id, as in top-p sampling")
def draw_token(probabilities: torch.Tensor, u: float) -> int:
    sorted_probs, sorted_ids = torch.sort(probabilities, descending=True)
    cumulative = sorted_probs.cumsum(dim=-1)
    position = min(int((cumulative <= u).sum()), len(probabilities) - 1)
    return int(sorted_ids[position])


@wrong("compares the running sum before the token's own probability is added, so it returns the next token")
def draw_token(probabilities: torch.Tensor, u: float) -> int:
    total = 0.0
    for i in range(len(probabilities)):
        if total > u:
            return i
        total += probabilities[i].item()
    return len(probabilities) - 1


@wrong("returns a tensor of one number, not an int")
def draw_token(probabilities: torch.Tensor, u: float) -> int:
    return torch.argmax((probabilities.cumsum(0) > u).int())


@right
def draw_token(probabilities: torch.Tensor, u: float) -> int:
    borders = list(accumulate(probabilities.tolist()))
    last = max(i for i, p in enumerate(probabilities.tolist()) if p > 0)
    return min(bisect_right(borders, u), last)


@wrong("applies a softmax to rows that are probabilities already, which flattens the distribution")
def write(
    probabilities: torch.Tensor,
    start: int,
    length: int,
    generator: torch.Generator,
) -> list[int]:
    out = [start]
    for _ in range(length):
        probs = F.softmax(probabilities[out[-1]], dim=-1)
        out.append(torch.multinomial(probs, num_samples=1, generator=generator).item())
    return out


@wrong("draws from the column of the current token instead of its row")
def write(
    probabilities: torch.Tensor,
    start: int,
    length: int,
    generator: torch.Generator,
) -> list[int]:
    token = start
    out = [token]
    for _ in range(length):
        p = probabilities[:, token]
        token = int(torch.multinomial(p, 1, generator=generator))
        out.append(token)
    return out


@wrong("stops when the list has `length` numbers, start included, so one draw is missing")
def write(
    probabilities: torch.Tensor,
    start: int,
    length: int,
    generator: torch.Generator,
) -> list[int]:
    out = [start]
    while len(out) < length:
        row = probabilities[out[-1]]
        out.append(torch.multinomial(row, 1, generator=generator).item())
    return out


@wrong("resets the generator to its seed before each draw, so every draw uses the same random number")
def write(
    probabilities: torch.Tensor,
    start: int,
    length: int,
    generator: torch.Generator,
) -> list[int]:
    seed = generator.initial_seed()
    tokens = [start]
    for _ in range(length):
        generator.manual_seed(seed)
        nxt = torch.multinomial(probabilities[tokens[-1]], 1, generator=generator)
        tokens.append(nxt.item())
    return tokens


@wrong("always draws from the row of the start token")
def write(
    probabilities: torch.Tensor,
    start: int,
    length: int,
    generator: torch.Generator,
) -> list[int]:
    row = probabilities[start]
    drawn = torch.multinomial(row, max(length, 1), replacement=True, generator=generator)
    return [start] + drawn.tolist()[:length]


@right
def write(
    probabilities: torch.Tensor,
    start: int,
    length: int,
    generator: torch.Generator,
) -> list[int]:
    borders = probabilities.double().cumsum(dim=1)
    tokens = [start]
    for u in torch.rand(length, generator=generator, dtype=torch.float64):
        border = borders[tokens[-1]]
        tokens.append(int((border <= u * border[-1]).sum()))
    return tokens


@wrong("normal_(weight, 0.02) sets the mean to 0.02 and leaves the standard deviation at 1")
class Bigram(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)
        nn.init.normal_(self.table.weight, 0.02)

    def forward(self, idx: Tensor) -> Tensor:
        return self.table(idx)

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        length: int,
        generator: Generator | None = None,
    ) -> Tensor:
        for _ in range(length):
            logits = self(idx)[:, -1, :]
            probs = F.softmax(logits, dim=-1)
            idx_next = torch.multinomial(probs, num_samples=1, generator=generator)
            idx = torch.cat((idx, idx_next), dim=1)
        return idx


@wrong("forward returns probabilities, by a softmax, instead of logits")
class Bigram(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)
        nn.init.normal_(self.table.weight, mean=0.0, std=0.02)

    def forward(self, idx: Tensor) -> Tensor:
        return F.softmax(self.table(idx), dim=-1)

    def generate(
        self,
        idx: Tensor,
        length: int,
        generator: Generator | None = None,
    ) -> Tensor:
        for _ in range(length):
            probs = self.forward(idx)[:, -1]
            new = torch.multinomial(probs, 1, generator=generator)
            idx = torch.cat([idx, new], dim=1)
        return idx


@wrong("generate draws all tokens from the row of the last given token, not one after the other")
class Bigram(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)
        with torch.no_grad():
            self.table.weight.normal_(0, 0.02)

    def forward(self, idx: Tensor) -> Tensor:
        return self.table(idx)

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        length: int,
        generator: Generator | None = None,
    ) -> Tensor:
        if length == 0:
            return idx
        probs = self(idx)[:, -1].softmax(dim=-1)
        new = torch.multinomial(probs, length, replacement=True, generator=generator)
        return torch.cat([idx, new], dim=1)


@wrong("the softmax in generate runs over the batch, not over the vocabulary")
class Bigram(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)
        self.table.weight.data *= 0.02

    def forward(self, idx: Tensor) -> Tensor:
        return self.table(idx)

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        length: int,
        generator: Generator | None = None,
    ) -> Tensor:
        for _ in range(length):
            logits = self(idx)
            probs = torch.softmax(logits[:, -1, :], dim=0)
            idx = torch.cat([idx, torch.multinomial(probs, 1, generator=generator)], dim=1)
        return idx


@wrong("generate draws one token from the first row's distribution and gives it to every row of the batch")
class Bigram(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, idx: Tensor) -> Tensor:
        return self.table(idx)

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        length: int,
        generator: Generator | None = None,
    ) -> Tensor:
        out = idx.clone()
        for _ in range(length):
            logits = self(out[:, -1:])[0, -1]
            token = torch.multinomial(torch.softmax(logits, dim=0), 1, generator=generator)
            out = torch.cat([out, token.expand(out.shape[0], 1)], dim=1)
        return out


@right
class Bigram(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(0.02 * torch.randn(vocab_size, vocab_size), freeze=False)

    def forward(self, idx: Tensor) -> Tensor:
        one_hot = F.one_hot(idx, num_classes=self.table.num_embeddings)
        return one_hot.to(self.table.weight.dtype) @ self.table.weight

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        length: int,
        generator: Generator | None = None,
    ) -> Tensor:
        batch, time = idx.shape
        out = idx.new_empty(batch, time + length)
        out[:, :time] = idx
        for t in range(time, time + length):
            probabilities = self(out[:, t - 1]).softmax(dim=-1)
            waiting = torch.empty_like(probabilities).exponential_(generator=generator)
            out[:, t] = (probabilities / waiting).argmax(dim=-1)
        return out


@wrong("clears the gradients between backward and step, so the optimizer has nothing to apply")
def training_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    y: torch.Tensor,
) -> float:
    logits = model(x)
    loss = F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()
    return loss.item()


@wrong("uses view to bring the vocabulary to axis 1, which mixes up positions and classes")
def training_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    y: torch.Tensor,
) -> float:
    logits = model(x)
    batch, time, vocab = logits.shape
    loss = F.cross_entropy(logits.view(batch, vocab, time), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@wrong("backward runs on the sum over the positions, only the returned loss is the mean")
def training_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    y: torch.Tensor,
) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
    loss.backward()
    optimizer.step()
    return loss.item() / y.numel()


@wrong("gives softmax probabilities to cross_entropy, which expects logits")
def training_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    y: torch.Tensor,
) -> float:
    optimizer.zero_grad()
    probs = torch.softmax(model(x), dim=-1)
    loss = F.cross_entropy(probs.reshape(-1, probs.shape[-1]), y.reshape(-1))
    loss.backward()
    optimizer.step()
    return loss.item()


@wrong("clips the gradient to norm 1, which the task does not ask for, so the step is shorter")
def training_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    y: torch.Tensor,
) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x).transpose(1, 2), y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


@right
def training_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    y: torch.Tensor,
) -> float:
    logits = model(x)
    of_target = logits.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    loss = (logits.logsumexp(dim=-1) - of_target).mean()
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    return loss.item()
