"""shared/quantization/cache.py: what a model reads through a cache in 8 bits."""

import pytest
import torch

from shared.models.gpt import KVCache
from shared.quantization.cache import Int8Cache
from shared.sampling import generate
from tests.quantization.helpers import CONFIGS, UNTIED, gpt, random


def test_keys_and_values_come_back_within_half_a_step_and_in_their_places():
    cache, exact = Int8Cache(UNTIED, 3), KVCache(UNTIED, 3)
    for part, time in enumerate((5, 1, 7)):
        for layer in range(UNTIED.n_layer):
            k, v = (
                random(3, UNTIED.kv_heads, time, UNTIED.head_dim, seed=10 * part + layer + i) for i in (0, 5)
            )
            for got, expected in zip(cache.update(layer, k, v), exact.update(layer, k, v)):
                step = expected.abs().amax(-1, keepdim=True) / 127
                assert got.shape == expected.shape and ((got - expected).abs() <= 0.501 * step).all()
        cache.advance(time)
        exact.advance(time)


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_computes_nearly_the_same_whether_it_reads_at_once_or_token_by_token(name):
    model, idx = gpt(CONFIGS[name]), torch.arange(30)[None] % 53
    expected = model(idx)
    model.cache_type = Int8Cache
    at_once = model(idx, model.new_cache())
    cache = model.new_cache()
    stepwise = torch.cat([model(part, cache) for part in idx.split([10] + [1] * 20, 1)], 1)
    torch.testing.assert_close(stepwise, at_once, atol=1e-4, rtol=1e-4)
    off = (at_once - expected).norm() / expected.norm()
    assert 0 < off < 0.02


def test_generate_uses_it_and_it_takes_little_more_than_a_quarter_of_the_memory():
    model = gpt(UNTIED)
    made = []

    class Counted(Int8Cache):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    model.cache_type = Counted
    assert len(list(generate(model, [1, 2, 3], 8, seed=0))) == 8
    assert [cache.length for cache in made] == [10]
    held = sum(t.nbytes for t in vars(made[0]).values() if isinstance(t, torch.Tensor))
    exact = KVCache(UNTIED, max_length=11)  # no longer than the text may become
    assert made[0].num_bytes == held == exact.num_bytes * (UNTIED.head_dim + 4) / (4 * UNTIED.head_dim)


def test_it_is_full_where_the_ordinary_one_is():
    cache = Int8Cache(UNTIED, max_length=4)
    with pytest.raises(ValueError, match="the cache holds 0 of 4 tokens and 5 more do not fit"):
        cache.positions(5)


@torch.inference_mode()
@pytest.mark.parametrize("kind", [KVCache, Int8Cache])
def test_a_text_that_begins_with_anothers_cache_goes_on_as_if_all_had_been_read(kind):
    model, idx = gpt(UNTIED), torch.arange(12)[None]
    model.cache_type = kind
    beginning, whole, longer = (
        model.new_cache(max_length=8),
        model.new_cache(),
        model.new_cache(max_length=20),
    )
    model(idx[:, :8], beginning)
    longer.begin_with(beginning)
    assert longer.length == 8
    model(idx[:, :8], whole)
    assert torch.equal(model(idx[:, 8:], longer), model(idx[:, 8:], whole))
