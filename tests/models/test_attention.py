"""shared/models/attention.py against torch's own attention, and against the laws of causality."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shared.evaluation import cross_entropy
from shared.models.attention import (
    AttentionLM,
    AttentionLMConfig,
    CausalSelfAttention,
    attention_maps,
    attention_weights,
    causal_mask,
)
from shared.models.gpt import GPT, GPTConfig

BATCH, TIME, N_EMBD, N_HEAD = 2, 9, 24, 4


def layer(seed: int = 0, **options) -> CausalSelfAttention:
    torch.manual_seed(seed)
    made = CausalSelfAttention(N_EMBD, N_HEAD, bias=True, **options).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.4)
    return made


def inputs(seed: int = 1) -> torch.Tensor:
    return torch.randn(BATCH, TIME, N_EMBD, generator=torch.Generator().manual_seed(seed))


def test_it_equals_torchs_multihead_attention():
    ours, x = layer(), inputs()
    theirs = nn.MultiheadAttention(N_EMBD, N_HEAD, batch_first=True).eval()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q_proj.bias, ours.k_proj.bias, ours.v_proj.bias]))
        theirs.out_proj.load_state_dict(ours.o_proj.state_dict())
    hidden = nn.Transformer.generate_square_subsequent_mask(TIME) < 0  # theirs: True is hidden
    expected, weights = theirs(x, x, x, attn_mask=hidden, average_attn_weights=False)
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.weights(x), weights, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_its_weights_applied_to_the_values_equal_scaled_dot_product_attention(n_kv_head):
    ours, x = layer(n_kv_head=n_kv_head), inputs()
    q, k, v = ours.qkv(x)
    assert q.shape == (BATCH, N_HEAD, TIME, 6) and k.shape == v.shape == (BATCH, n_kv_head, TIME, 6)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    values = v.repeat_interleave(N_HEAD // n_kv_head, dim=1)
    torch.testing.assert_close(ours.weights(x) @ values, expected, atol=1e-5, rtol=1e-5)
    mixed = ours.o_proj(expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(ours(x), mixed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 3, TIME])
def test_rows_of_weights_sum_to_one_and_hidden_keys_get_exactly_zero(window):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, BATCH, N_HEAD, TIME, 6, generator=generator) * 20
    weights = attention_weights(q, k, causal_mask(TIME, window=window))
    torch.testing.assert_close(weights.sum(-1), torch.ones(BATCH, N_HEAD, TIME))
    for i in range(TIME):
        for j in range(TIME):
            if j > i or (window and j <= i - window):
                assert (weights[:, :, i, j] == 0).all()


@pytest.mark.parametrize("past", [0, 1, 4])
@pytest.mark.parametrize("window", [None, 1, 2, 5])
def test_the_mask_is_what_its_docstring_says(past, window):
    mask = causal_mask(3, past=past, window=window)
    assert mask.shape == (3, past + 3) and mask.dtype == torch.bool
    for i in range(3):
        for j in range(past + 3):
            assert mask[i, j] == (past + i - (window or 100) < j <= past + i)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_a_change_is_seen_from_its_own_position_on_and_no_further_than_the_window(window):
    ours, x = layer(window=window), inputs()
    before = ours(x)
    for t in range(TIME):
        changed = x.clone()
        changed[:, t] += 1
        difference = (ours(changed) - before).abs().amax((0, 2))
        end = TIME if window is None else min(TIME, t + window)
        assert difference[:t].eq(0).all() and difference[end:].lt(1e-6).all()
        assert difference[t:end].gt(1e-5).all()


def test_a_window_as_long_as_the_text_changes_nothing():
    x = inputs()
    torch.testing.assert_close(layer(window=TIME)(x), layer()(x))
    torch.testing.assert_close(layer(window=TIME - 1)(x)[:, :-1], layer()(x)[:, :-1], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(layer(window=TIME - 1)(x)[:, -1], layer()(x)[:, -1], atol=1e-4)


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_grouped_queries_equal_full_heads_with_repeated_keys_and_values(n_kv_head):
    grouped, full = layer(n_kv_head=n_kv_head), layer()
    state = grouped.state_dict()
    for name in state:
        if name.startswith(("k_proj", "v_proj")):
            heads = state[name].unflatten(0, (n_kv_head, 6))
            state[name] = heads.repeat_interleave(N_HEAD // n_kv_head, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    x = inputs()
    torch.testing.assert_close(grouped(x), full(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grouped.weights(x), full.weights(x), atol=1e-5, rtol=1e-5)


def test_norms_of_queries_and_keys_act_per_head():
    ours = layer(qk_norm=lambda size: nn.RMSNorm(size, eps=0))
    with torch.no_grad():
        ours.q_norm.weight.fill_(1)
        ours.k_norm.weight.fill_(2)
    q, k, _ = ours.qkv(inputs())
    torch.testing.assert_close(q.square().mean(-1), torch.ones(BATCH, N_HEAD, TIME))
    torch.testing.assert_close(k.square().mean(-1), torch.full((BATCH, N_HEAD, TIME), 4.0))


def test_dropout_acts_in_training_only():
    ours, x = layer(dropout=0.5), inputs()
    assert torch.equal(ours(x), ours(x))
    torch.testing.assert_close(ours(x), layer()(x))
    ours.train()
    assert not torch.equal(ours(x), ours(x))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_attention_maps_reproduce_each_layers_output(position, window):
    torch.manual_seed(0)
    sizes = dict(vocab_size=20, block_size=TIME, n_layer=3, n_head=4, n_kv_head=2, n_embd=32)
    model = GPT(GPTConfig(**sizes, position=position, window=window)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    seen = []
    for block in model.blocks:
        block.attn.register_forward_hook(
            lambda module, args, kwargs, out: seen.append((module, args[0], out)), with_kwargs=True
        )
    idx = torch.randint(20, (BATCH, TIME))
    maps = attention_maps(model, idx)
    assert len(maps) == len(seen) == 3
    for weights, (module, x, out) in zip(maps, seen):
        assert weights.shape == (BATCH, 4, TIME, TIME)
        values = module.qkv(x)[2].repeat_interleave(2, dim=1)
        mixed = module.o_proj((weights @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(mixed, out, atol=1e-5, rtol=1e-5)
    assert not any(block.attn._forward_pre_hooks for block in model.blocks)  # nothing is left behind


def test_attention_maps_leave_no_hooks_behind_when_the_model_fails():
    model = GPT(GPTConfig(vocab_size=20, block_size=TIME, n_layer=1, n_head=2, n_embd=16))
    with pytest.raises(ValueError, match="do not fit"):
        attention_maps(model, torch.zeros(1, TIME + 1, dtype=torch.int64))
    assert not model.blocks[0].attn._forward_pre_hooks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((30, 4), "n_embd=30 does not divide into n_head=4 heads"),
        ((32, 4, 3), "n_head=4 query heads cannot share n_kv_head=3 evenly"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CausalSelfAttention(*arguments)


# ---- the language model of attention alone


def test_the_attention_only_model_does_not_see_the_future():
    torch.manual_seed(0)
    config = AttentionLMConfig(vocab_size=20, block_size=TIME, n_layer=2, n_head=4, n_embd=32)
    model = AttentionLM(config).eval()
    idx = torch.randint(20, (1, TIME))
    before = model(idx)
    for t in range(TIME):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % 20
        difference = (model(changed) - before).abs().amax((0, 2))
        assert difference[:t].eq(0).all() and difference[t:].gt(1e-5).all()


def test_the_attention_only_models_first_loss_is_ln_of_the_vocabulary_size():
    torch.manual_seed(0)
    model = AttentionLM(AttentionLMConfig(vocab_size=65))
    idx = torch.randint(65, (8, 65))
    assert cross_entropy(model(idx[:, :-1]), idx[:, 1:]).item() == pytest.approx(math.log(65), abs=0.05)


def test_the_attention_only_model_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="65 tokens do not fit in block_size=64"):
        AttentionLM(AttentionLMConfig(vocab_size=5))(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(ValueError, match="vocab_size=0: must be at least 1; n_layer=-1"):
        AttentionLMConfig(vocab_size=0, n_layer=-1)
    with pytest.raises(ValueError, match="n_embd=30 does not divide"):
        AttentionLM(AttentionLMConfig(vocab_size=5, n_embd=30))
