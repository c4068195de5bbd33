"""Week 12. A step of writing whose shapes never change, so that a GPU can replay it as one CUDA graph.

A token's step is some hundreds of short kernels, and with a small model Python takes longer to start them
than the GPU to carry them out. A CUDA graph is recorded once and then started as a whole. It repeats what was
recorded: the same kernels with the same shapes on the same memory. So nothing in the step may depend on how
long Python knows the text to be: attention always reads the whole cache, what has not been written yet is
hidden by a mask, and the length is a tensor on the GPU, which the step itself counts up. torch.compile, too,
compiles such a step once, and not again for each length.

    decoder = StaticDecoder(model, max_length=512, compiled=True, captured=True)  # on CUDA
    for token in decoder.generate(ids, max_new_tokens=400):
        print(token)

The whole cache is read for every token: give no more `max_length` than the texts need.

Sources: Nguyen et al., "Accelerating PyTorch with CUDA Graphs" (2021); He and the PyTorch team,
"Accelerating Generative AI with PyTorch II: GPT, Fast" (2023).
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from shared.devices import device_of
from shared.models.cache import checked_length
from shared.models.gpt import GPT, GPTConfig
from shared.sampling.generate import NEW_TOKENS, Row, Sampling, check_new_tokens, check_prompt
from shared.serving.slots import KEYS

WARMUP = 3
"""Steps before the one that is recorded: libraries set up then what they keep."""


class StaticCache:
    """Keys and values of `batch_size` texts, all of one length, up to `max_length` tokens (the model's
    block_size if not given): a `shared.models.attention.Cache` whose tensors keep their shapes and places.

    Its length is a tensor, and is not looked at: the owner counts, and sees to it that the tokens fit. Raises
    ValueError for a `max_length` that the model cannot have.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int = 1,
        max_length: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.max_length = checked_length(config, max_length)
        self.places = KEYS * math.ceil(self.max_length / KEYS)  # fast kernels want rows of even addresses
        shape = (batch_size, config.kv_heads, self.places, config.head_dim)
        # Hidden keys are read too, and multiplied by zero: they must not be NaN.
        self.layers = [
            (torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))
            for _ in range(config.n_layer)
        ]
        self.length = torch.zeros((), device=device, dtype=torch.int64)
        self._positions = self.length[None]
        self._masks: dict[int | None, Tensor] = {}

    def positions(self, time: int) -> Tensor:
        """The positions of the next `time` tokens: int64 [time]."""
        self._positions = self.length + torch.arange(time, device=self.length.device)
        self._masks = {}
        return self._positions

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values [batch, n_kv_head, time, head_dim] of `layer`.

        Returns all that the layer has room for, [batch, n_kv_head, places, head_dim] each.
        """
        all_k, all_v = self.layers[layer]
        all_k.index_copy_(2, self._positions, k)
        all_v.index_copy_(2, self._positions, v)
        return all_k, all_v

    def mask(self, time: int, window: int | None) -> Tensor:
        """The keys that each query may see (True: may): bool [time, places]."""
        if window not in self._masks:
            distance = self._positions[:, None] - torch.arange(self.places, device=self.length.device)
            mask = distance >= 0
            if window is not None:
                mask &= distance < window
            self._masks[window] = mask
        return self._masks[window]

    def advance(self, time: int) -> None:
        """Counts `time` tokens as read, once all layers have stored theirs."""
        self.length.add_(time)

    def clear(self) -> None:
        """Forgets all tokens."""
        self.length.zero_()


class StaticDecoder:
    """Writes `batch_size` texts at a time, of up to `max_length` tokens each, in steps of one shape.

    compiled: the step by torch.compile, at its first use. captured: as a CUDA graph, recorded here. Raises
    ValueError for another model than a GPT, for one whose rotation depends on the text's length (RoPE with
    dynamic scaling), and for `captured` elsewhere than on CUDA.
    """

    def __init__(
        self,
        model: GPT,
        batch_size: int = 1,
        max_length: int | None = None,
        *,
        compiled: bool = False,
        captured: bool = False,
    ):
        if not isinstance(model, GPT):
            raise ValueError(f"a StaticDecoder runs a GPT, not a {type(model).__name__}")
        scaling = model.config.rope_scaling
        if scaling is not None and scaling.kind == "dynamic":
            raise ValueError(
                "rope_scaling.kind='dynamic' turns by other angles in longer texts, so that no step is like"
                " another: use generate(), or a model with another scaling"
            )
        self.device = device_of(model)
        if captured and self.device.type != "cuda":
            raise ValueError(
                f"CUDA graphs need a model on CUDA, and this one is on {self.device}: leave out captured=True"
            )
        self.model = model.eval()
        self.cache = StaticCache(model.config, batch_size, max_length, self.device, model.norm.weight.dtype)
        self.length = 0
        """Tokens in the cache, of each text."""
        self._idx = torch.zeros(batch_size, 1, device=self.device, dtype=torch.int64)
        self._next_logits: Callable[[], Tensor] = self._computed
        if compiled:
            self._next_logits = torch.compile(self._computed, fullgraph=True)
        if captured:
            self._capture()

    def _computed(self) -> Tensor:
        """The step: logits [batch, vocab_size] after the tokens in `_idx`."""
        return self.model(self._idx, self.cache)[:, -1]

    @torch.inference_mode()
    def _capture(self) -> None:
        """Records the step, which from here on is replayed."""
        step = self._next_logits
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                self.cache.clear()
                step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.cache.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()

        def replayed() -> Tensor:
            graph.replay()
            return logits

        self._next_logits = replayed

    @torch.inference_mode()
    def read(self, idx: Tensor) -> Tensor:
        """Begins new texts with these tokens, int64 [batch, time]: logits [batch, vocab_size] for what
        follows.

        Raises ValueError where they do not fit.
        """
        batch_size = len(self._idx)
        if idx.dim() != 2 or len(idx) != batch_size or not idx.size(1):
            raise ValueError(
                f"idx {list(idx.shape)}: must be [{batch_size}, time], with at least one token of each text"
            )
        self.length = 0
        self._count(idx.size(1))
        self.cache.clear()
        return self.model(idx.to(self.device), self.cache)[:, -1]

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Reads one more token of each text, int64 [batch]: logits [batch, vocab_size] for what follows.

        With `captured` they lie where the next step will write its own. Raises ValueError where there is no
        room left.
        """
        self._count(1)
        self._idx.copy_(tokens.view_as(self._idx))
        return self._next_logits()

    def _count(self, time: int) -> None:
        if self.length + time > self.cache.max_length:
            raise ValueError(
                f"the cache holds {self.length} of {self.cache.max_length} tokens and {time} more do not fit:"
                " make a StaticDecoder with a larger max_length, or begin anew with `read`"
            )
        self.length += time

    def generate(
        self, ids: Sequence[int], max_new_tokens: int = NEW_TOKENS, sampling: Sampling | None = None
    ) -> Iterator[int]:
        """Yields new token ids as they are drawn: those of `shared.sampling.generate` with these settings,
        none being its own.

        For a decoder of one text. Raises ValueError as that does, and where prompt and new tokens do not fit.
        """
        if len(self._idx) != 1:
            raise ValueError(
                f"this decoder writes {len(self._idx)} texts at a time, by `read` and `step`: make one of a"
                " single text for `generate`"
            )
        check_prompt(ids, self.model)
        check_new_tokens(max_new_tokens)
        total = len(ids) + max_new_tokens - 1  # the last one is not read
        if total > self.cache.max_length:
            raise ValueError(
                f"{len(ids)} tokens of prompt and {max_new_tokens} new ones do not fit in"
                f" max_length={self.cache.max_length}: make a StaticDecoder with a larger one"
            )
        return self._drawn(Row(ids, sampling or Sampling()), max_new_tokens)

    def _drawn(self, row: Row, max_new_tokens: int) -> Iterator[int]:
        for number in range(max_new_tokens):
            if number:
                logits = self.step(torch.tensor(row.tokens[-1:], device=self.device))
            else:
                logits = self.read(torch.tensor([row.tokens]))
            row.draw(logits[0])
            yield row.tokens[-1]
