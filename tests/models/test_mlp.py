"""shared/models/mlp.py against a plain loop over windows, and its initial values against their table."""

import math

import pytest
import torch

from shared.evaluation import cross_entropy
from shared.models.mlp import WindowMLP, WindowMLPConfig

VOCAB, WINDOW = 17, 5


def model(seed: int = 0, **changes) -> WindowMLP:
    torch.manual_seed(seed)
    made = WindowMLP(
        WindowMLPConfig(**(dict(vocab_size=VOCAB, window=WINDOW, n_embd=6, n_hidden=20) | changes))
    )
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.4)
    return made


@pytest.mark.parametrize("window", [1, 2, WINDOW])
def test_it_equals_a_plain_loop_over_windows(window):
    net = model(window=window)
    idx = torch.randint(VOCAB, (3, 12))
    got = net(idx)
    assert got.shape == (3, 12, VOCAB)
    table, places = net.token_embedding.weight, net.position_embedding.weight
    for b in range(3):
        for t in range(12):
            seen = [VOCAB] * window + idx[b, : t + 1].tolist()  # VOCAB is the padding's row
            x = torch.cat([table[token] + places[i] for i, token in enumerate(seen[-window:])])
            hidden = torch.tanh(net.hidden.weight @ x + net.hidden.bias)
            torch.testing.assert_close(
                got[b, t], net.lm_head.weight @ hidden + net.lm_head.bias, atol=1e-5, rtol=1e-5
            )
            torch.testing.assert_close(net.activations(idx)[b, t], hidden, atol=1e-5, rtol=1e-5)


def test_a_change_is_seen_from_its_own_position_on_and_no_further_than_the_window():
    net = model()
    idx = torch.randint(VOCAB, (1, 15))
    before = net(idx)
    for t in range(15):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % VOCAB
        difference = (net(changed) - before).abs().amax((0, 2))
        assert difference[:t].eq(0).all()
        assert difference[t : t + WINDOW].gt(1e-5).all() and difference[t + WINDOW :].eq(0).all()


def test_before_the_text_stands_a_token_that_is_none_of_the_vocabulary():
    net = model()
    idx = torch.randint(VOCAB, (1, 8))
    before = net(idx)
    with torch.no_grad():
        net.token_embedding.weight[VOCAB] += 1
    difference = (net(idx) - before).abs().amax((0, 2))
    assert difference[: WINDOW - 1].gt(1e-4).all() and difference[WINDOW - 1 :].eq(0).all()


def first_loss(init: str) -> float:
    torch.manual_seed(0)
    net = WindowMLP(WindowMLPConfig(vocab_size=65, init=init))
    idx = torch.randint(65, (16, 65))
    return cross_entropy(net(idx[:, :-1]), idx[:, 1:]).item()


def test_the_first_loss_is_ln_of_the_vocabulary_size_when_scaled_and_far_from_it_when_naive():
    assert first_loss("scaled") == pytest.approx(math.log(65), abs=0.05)
    assert first_loss("naive") > 3 * math.log(65)


def test_scaled_initial_values_keep_tanh_out_of_saturation_and_naive_ones_do_not():
    idx = torch.randint(65, (8, 64), generator=torch.Generator().manual_seed(1))
    saturated = {}
    for init in ("scaled", "naive"):
        torch.manual_seed(0)
        activations = WindowMLP(WindowMLPConfig(vocab_size=65, init=init)).activations(idx)
        saturated[init] = (activations.abs() > 0.97).float().mean().item()
    assert saturated["scaled"] < 0.3 and saturated["naive"] > 0.8


@pytest.mark.parametrize("init", ["scaled", "naive"])
def test_initial_values_are_those_of_the_table(init):
    torch.manual_seed(0)
    net = WindowMLP(WindowMLPConfig(vocab_size=500, n_embd=64, n_hidden=256, window=20, init=init))
    expected = {
        "token_embedding": 1,
        "position_embedding": 0.1,
        "hidden": 5 / 3 / math.sqrt(64 * 20),
        "lm_head": 0.01,
    }
    if init == "naive":
        expected = dict.fromkeys(expected, 1)
    for name, std in expected.items():
        assert getattr(net, name).weight.std().item() == pytest.approx(std, rel=0.05), name
    for bias in (net.hidden.bias, net.lm_head.bias):
        assert bias.std().item() == pytest.approx(0 if init == "scaled" else 1, rel=0.15)


def test_a_config_names_all_its_problems_at_once():
    sizes = "vocab_size=0: must be at least 1; window=-1: must be at least 1"
    with pytest.raises(ValueError, match=f"{sizes}; init='best': must be scaled or naive"):
        WindowMLPConfig(vocab_size=0, window=-1, init="best")
