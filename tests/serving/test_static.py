"""shared/serving/static.py against the model that reads a text at once, the ordinary cache and `generate`;
what a CUDA graph repeats is held on a CPU, by a stand-in that repeats recorded operations.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from shared.models.bigram import BigramConfig, BigramModel
from shared.models.config import RopeScaling
from shared.models.gpt import GPT, GPTConfig
from shared.sampling import generate
from shared.sampling.generate import Sampling
from shared.serving.static import StaticCache, StaticDecoder
from tests.helpers import shake
from tests.serving.helpers import CONFIG

GPT2 = GPTConfig(vocab_size=300, block_size=128, n_layer=2, n_head=2, n_embd=32)
MODELS = {
    "GPT-2": GPT2,
    "Llama": CONFIG,
    "window and norms": replace(CONFIG, window=5, qk_norm=True, embedding_scale=3.0, logit_softcap=20.0),
    "soft cap": replace(CONFIG, attention_softcap=10.0),
}
IDX = torch.randint(300, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=list(MODELS))
def model(request) -> GPT:
    return shake(GPT(MODELS[request.param]))


def step_by_step(decoder: StaticDecoder, idx: torch.Tensor, begun: int) -> torch.Tensor:
    """Logits [batch, time - begun + 1, vocab_size]: after the first `begun` tokens and after each other."""
    logits = [decoder.read(idx[:, :begun]).clone()]
    logits += [decoder.step(tokens).clone() for tokens in idx[:, begun:].unbind(1)]
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("begun", [1, 10, 23])
def test_logits_are_those_of_the_text_read_at_once_and_of_the_ordinary_cache(model, begun):
    decoder = StaticDecoder(model, batch_size=3, max_length=24)
    found = step_by_step(decoder, IDX, begun)
    cache = model.new_cache(3)
    with torch.inference_mode():
        torch.testing.assert_close(found, model(IDX)[:, begun - 1 :])
        ordinary = [model(part, cache)[:, -1] for part in (IDX[:, :begun], *IDX[:, begun:].split(1, dim=1))]
    torch.testing.assert_close(found, torch.stack(ordinary, dim=1))


def test_a_new_text_knows_nothing_of_the_one_before(model):
    decoder = StaticDecoder(model, batch_size=3, max_length=64)
    first = step_by_step(decoder, IDX, 4)
    decoder.read(IDX.flip(1))
    assert torch.equal(step_by_step(decoder, IDX, 4), first)


def test_keys_and_values_keep_their_places_and_shapes(model):
    decoder = StaticDecoder(model, batch_size=3, max_length=65)

    def layout() -> list[tuple]:
        tensors = [t for pair in decoder.cache.layers for t in pair] + [decoder.cache.length]
        return [(t.data_ptr(), t.shape) for t in tensors]

    before = layout()
    assert before[0][1][2] == 128  # blocks of 64 places
    step_by_step(decoder, IDX, 4)
    assert layout() == before and decoder.length == 24 and decoder.cache.length == 24


@pytest.mark.slow
def test_the_step_is_compiled_once_for_all_lengths_and_as_a_whole(model):
    decoder = StaticDecoder(model, batch_size=3, max_length=64)
    right = step_by_step(decoder, IDX, 4)
    counter = CompileCounter()
    decoder._next_logits = torch.compile(decoder._computed, backend=counter, fullgraph=True)
    assert torch.equal(step_by_step(decoder, IDX, 4), right)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "how",
    [{"temperature": 0}, {"seed": 5}, {"temperature": 0.7, "top_k": 9, "repetition_penalty": 1.3, "seed": 1}],
    ids=["greedy", "drawn", "filtered"],
)
def test_texts_are_those_of_generate(model, how):
    prompt = IDX[0, :9].tolist()
    decoder = StaticDecoder(model, max_length=48)
    for _ in range(2):
        assert list(decoder.generate(prompt, 40, Sampling(**how))) == list(generate(model, prompt, 40, **how))
    assert list(decoder.generate(prompt, 0)) == []


class Repeated(TorchDispatchMode):
    """Does what a CUDA graph does: `replay` repeats the operations that were carried out inside, each on the
    tensors that it had then, and writes into those that it gave.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            results = zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (result, again)))
            for old, new in results:
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Waits:
    """A stream that has nothing to wait for."""

    def __init__(self, device: torch.device):
        pass

    def wait_stream(self, other: "Waits") -> None:
        pass


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", Waits)
    monkeypatch.setattr(torch.cuda, "current_stream", Waits)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Repeated)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)


def test_a_recorded_step_can_be_repeated_for_every_token(model, graphs):
    decoder = StaticDecoder(model, batch_size=3, max_length=64)
    decoder._capture()
    for _ in range(2):
        with torch.inference_mode():
            right = model(IDX)
        torch.testing.assert_close(step_by_step(decoder, IDX, 4), right[:, 3:])


def test_the_ordinary_cache_could_not_be_recorded(model, graphs):
    """Against a stand-in that would let everything pass."""
    decoder = StaticDecoder(model, batch_size=3, max_length=64)
    decoder.cache = model.new_cache(3, 64)
    decoder.cache.clear = lambda: setattr(decoder.cache, "length", 0)
    decoder._capture()
    found = step_by_step(decoder, IDX, 4)
    with torch.inference_mode():
        assert not torch.allclose(found[:, 1:], model(IDX)[:, 4:], atol=0.1)


def test_what_does_not_fit_is_refused():
    model = shake(GPT(GPT2))
    decoder = StaticDecoder(model, max_length=8)
    with pytest.raises(ValueError, match="holds 0 of 8 tokens and 9 more do not fit"):
        decoder.read(IDX[:1, :9])
    decoder.read(IDX[:1, :8])
    with pytest.raises(ValueError, match="holds 8 of 8 tokens and 1 more do not fit"):
        decoder.step(IDX[0, :1])
    with pytest.raises(ValueError, match="5 tokens of prompt and 5 new ones do not fit in max_length=8"):
        decoder.generate([1, 2, 3, 4, 5], 5)
    assert len(list(decoder.generate([1, 2, 3, 4, 5], 4, Sampling(seed=0)))) == 4
    with pytest.raises(ValueError, match="writes 3 texts at a time"):
        StaticDecoder(model, batch_size=3).generate([1], 1)
    for idx in (IDX[:2], IDX[0], IDX[:1, :0]):
        with pytest.raises(ValueError, match=r"must be \[1, time\]"):
            decoder.read(idx)
    with pytest.raises(ValueError, match="max_length=129: must be from 1 to the model's block_size=128"):
        StaticCache(GPT2, max_length=129)


def test_models_and_devices_without_such_a_step_are_refused():
    with pytest.raises(ValueError, match="CUDA graphs need a model on CUDA, and this one is on cpu"):
        StaticDecoder(GPT(GPT2), captured=True)
    with pytest.raises(ValueError, match="runs a GPT, not a BigramModel"):
        StaticDecoder(BigramModel(BigramConfig(vocab_size=5)))
    stretched = replace(CONFIG, rope_scaling=RopeScaling(kind="dynamic", factor=2.0, original_length=64))
    with pytest.raises(ValueError, match="'dynamic' turns by other angles in longer texts"):
        StaticDecoder(GPT(stretched))
