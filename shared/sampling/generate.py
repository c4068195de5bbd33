"""Week 1. From logits to text: temperature, top-k, top-p (nucleus; Holtzman et al., 2019), stop sequences, a
seed, one token at a time.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from shared.runtime import check_seed, device_of
from shared.tokenizers import Tokenizer


def filter_logits(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Sets to -inf what may not be drawn. logits: [..., vocab_size].

    top_k keeps the k largest. top_p keeps the smallest set of largest ones whose probabilities reach p, at
    least one.
    """
    if top_k is not None and top_k < logits.size(-1):
        smallest_kept = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all that rank higher
        too_late = before >= top_p
        too_late[..., 0] = False  # a top_p too small for fp32 is a 0 there
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, too_late)
        logits = logits.masked_fill(dropped, float("-inf"))
    return logits


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws one id per row: [..., vocab_size] -> int64 [...]. Temperature 0 takes the largest (the first of
    equals).
    """
    check_sampling(temperature, top_k, top_p)
    if temperature < 1e-6:  # dividing by less would overflow
        return logits.argmax(-1)
    # Drawn on the CPU in fp32, so that a seed means the same on every device.
    probabilities = filter_logits(logits.float().cpu() / temperature, top_k, top_p).softmax(-1)
    drawn = torch.multinomial(
        probabilities.flatten(0, -2) if logits.dim() > 1 else probabilities[None], 1, generator=generator
    )
    return drawn.view(logits.shape[:-1]).to(logits.device)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError for a setting out of range, naming it."""
    if not 0 <= temperature <= 100:
        raise ValueError(
            f"temperature={temperature} is out of range: from 0 (greedy) to 100; 0.8 is a good start"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} is out of range: at least 1, or none for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is out of range: above 0 and at most 1")


def generate(
    model: nn.Module,
    ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[int | Sequence[int]] = (),
    seed: int | None = None,
    use_cache: bool = True,
) -> Iterator[int]:
    """Yields new token ids as they are drawn, up to `max_new_tokens`.

    stop: tokens, or sequences of tokens, at which to end; what ended it is not yielded. seed: None draws
    differently each time. A model with a method `new_cache` is fed only what is new (`use_cache=False` reads
    everything again; the ids are the same). Where the text outgrows the model's block_size, the model goes on
    with its last half. Raises ValueError for no prompt and for settings out of range.
    """
    if not len(ids):
        raise ValueError("generation needs at least one token to start from: give a prompt")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} is out of range: at least 0")
    check_sampling(temperature, top_k, top_p)
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(check_seed(seed))
    stops = [[s] if isinstance(s, int) else list(s) for s in stop]

    def draw() -> Iterator[int]:
        for logits in _next_logits(model, tokens, use_cache):
            yield sample(logits, temperature, top_k, top_p, generator).item()

    tokens = list(ids)
    return _until_stop(draw(), tokens, max_new_tokens, stops)


def _next_logits(model: nn.Module, tokens: list[int], use_cache: bool) -> Iterator[Tensor]:
    """Logits [vocab_size] for what follows `tokens`, a list that grows between one and the next."""
    limit = getattr(model.config, "block_size", None)
    device = device_of(model)
    use_cache = use_cache and hasattr(model, "new_cache")
    start, cache, fed = 0, None, 0
    was_training = model.training
    try:
        while True:
            if limit is not None and len(tokens) - start > limit:
                start, cache = len(tokens) - max(1, limit // 2), None
            if use_cache and cache is None:
                cache, fed = model.new_cache(), start
            with torch.inference_mode():
                if model.training:  # eval() walks all modules, which takes longer than a small model's step
                    model.eval()
                idx = torch.tensor([tokens[fed if use_cache else start :]], device=device)
                logits = (model(idx, cache) if use_cache else model(idx))[0, -1]
            fed = len(tokens)
            yield logits
    finally:
        model.train(was_training)


def split_at_stop(held: Sequence[int], stops: Sequence[Sequence[int]]) -> tuple[int, bool]:
    """Of drawn ids that nobody has seen yet: how many may be shown, and whether a stop sequence ends here (it
    is not shown).

    What may be the beginning of a stop sequence has to wait. Of sequences that end at the same place the
    longest counts.

    >>> split_at_stop([7, 8, 1], stops=[[1, 2]]), split_at_stop([1, 2], stops=[[1, 2]])
    ((2, False), (0, True))
    """
    held = list(held)
    ended = [len(s) for s in stops if held[-len(s) :] == s]
    if ended:
        return len(held) - max(ended), True
    return (
        len(held) - max((n for s in stops for n in range(1, len(s)) if held[-n:] == s[:n]), default=0),
        False,
    )


def _until_stop(
    drawn: Iterator[int], tokens: list[int], max_new_tokens: int, stops: list[list[int]]
) -> Iterator[int]:
    held: list[int] = []  # drawn, but perhaps the beginning of a stop sequence
    for _ in range(max_new_tokens):
        held.append(next(drawn))
        tokens.append(held[-1])
        ready, stopped = split_at_stop(held, stops)
        if stopped:
            drawn.close()
            yield from held[:ready]
            return
        yield from held[:ready]
        del held[:ready]
    drawn.close()
    yield from held


def stream_text(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Pieces of text as ids come in; a character whose bytes are spread over several tokens waits until it is
    whole.
    """
    seen: list[int] = []
    shown = ""
    for i in ids:
        seen.append(i)
        text = tokenizer.decode(seen)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(seen)[len(shown) :]
