"""shared/adapters/attach.py: targets, and several adapters switched, added up, by row, and combined."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from shared.adapters import LoRAConfig, add_lora, load_adapter, merge_lora, save_adapter
from shared.adapters.attach import (
    adapters_by_row,
    adapters_of,
    combine_adapters,
    linear_layers,
    remove_adapter,
    use_adapters,
)
from shared.adapters.lora import LoRALinear
from shared.models.pretrained import from_hf
from shared.quantization import quantize
from tests.adapters.helpers import (
    GPT2,
    KINDS,
    LLAMA,
    adapted,
    assert_same_bits,
    bits,
    change,
    close,
    gpt,
    hf,
    peft_model,
    three,
)


def test_switching_uses_one_and_trains_only_that(idx):
    model = three()
    alone = {}
    for name in "abc":
        alone[name] = use_adapters(model, name)(idx)
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        assert {n.split(".adapters.")[1][0] for n in trainable} == {name}
    assert not torch.equal(alone["a"], alone["b"])
    assert torch.equal(use_adapters(model, "a")(idx), alone["a"])
    assert torch.equal(use_adapters(model, ())(idx), gpt()(idx))


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_adapters_add_up_in_their_shares(kind, idx):
    model = three(**KINDS[kind])
    parts = {name: change(use_adapters(model, name)) for name in "abc"}
    use_adapters(model, ["a", "b"])
    close(change(model), parts["a"] + parts["b"])
    use_adapters(model, {"a": 0.5, "b": -2.0, "c": 1.0})
    close(change(model), 0.5 * parts["a"] - 2 * parts["b"] + parts["c"])
    expected = model(idx)
    close(merge_lora(model)(idx), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_of_a_batch_has_its_own_adapter(kind, idx):
    model = three(**KINDS[kind])
    rows = ["b", None, "a"]
    expected = torch.cat([use_adapters(model, name or ())(idx[i : i + 1]) for i, name in enumerate(rows)])
    use_adapters(model, "c")
    together = model(idx)
    with adapters_by_row(model, rows):
        close(model(idx), expected)
    assert torch.equal(model(idx), together)


def test_rows_must_be_as_many_as_named(idx):
    model = three()
    with adapters_by_row(model, ["a", "b"]):
        with pytest.raises(ValueError, match="set for 2 rows, and the batch has 3"):
            model(idx)
    with pytest.raises(ValueError, match="no adapter is called 'x'; there are: a, b, c"):
        with adapters_by_row(model, ["x"]):
            pass


def test_a_removed_adapter_is_gone_and_with_the_last_the_layer_too():
    model = three()
    for name in "abc":
        remove_adapter(model, name)
        assert name not in adapters_of(model)
    assert_same_bits(bits(model), bits(gpt()))
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


# ---- combined into one


def test_cat_is_exact(idx):
    model = three()
    shares = {"a": 0.7, "b": -1.5}
    expected = use_adapters(model, shares)(idx)
    product = change(model)
    combine_adapters(model, shares, "ab")
    assert adapters_of(model)["ab"].r == 6
    close(change(model), product, 1e-6)
    close(model(idx), expected)


@pytest.mark.parametrize("rank", [1, 3, 6, None])
def test_svd_loses_what_eckart_and_young_say_and_no_more(rank):
    model = three()
    shares = {"a": 0.7, "b": -1.5}
    sum_of_both = change(use_adapters(model, shares))
    combine_adapters(model, shares, "ab", "svd", rank)
    singular = torch.linalg.svdvals(sum_of_both.double())
    lost = singular[rank or 4 :].square().sum().sqrt().item()
    assert torch.linalg.matrix_rank(change(model), tol=1e-5) == (rank or 4) == adapters_of(model)["ab"].r
    assert (change(model) - sum_of_both).norm().item() == pytest.approx(lost, rel=1e-4, abs=1e-5)


def test_linear_is_the_sum_and_its_cross_terms():
    model = three()
    shares = {"a": 0.7, "c": -0.4}
    layer = model.get_submodule("blocks.1.mlp.down_proj")
    a = layer.adapters["a"]
    c = layer.adapters["c"]
    wanted = change(use_adapters(model, shares))
    combine_adapters(model, shares, "ac", "linear")
    cross = 2 * math.sqrt(0.7 * 0.4) * (c.lora_B @ a.lora_A - a.lora_B @ c.lora_A)
    close(change(model), (wanted + cross).detach(), 1e-6)
    assert cross.norm() > 0.1 * wanted.norm()
    with pytest.raises(ValueError, match="same rank"):
        combine_adapters(model, {"a": 1, "b": 1}, "ab", "linear")


def test_linear_is_exact_for_one_adapter_with_a_share():
    model = adapted()
    combine_adapters(model, {"default": 1.0}, "again")
    for layer in linear_layers(model).values():
        if isinstance(layer, LoRALinear):
            assert layer.adapters["again"].config.scale == 1
    wanted = change(use_adapters(model, "default"))
    combine_adapters(model, {"default": 0.3}, "less", "linear")
    close(change(model), 0.3 * wanted, 1e-6)


@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
@pytest.mark.parametrize("weights", [[0.7, 0.5], [1.0, -0.6]])
def test_combinations_are_pefts(method, weights, tmp_path):
    names = ["default", "other"]
    theirs = peft_model("llama", "lora")
    theirs.add_adapter("other", replace(theirs.peft_config["default"]))
    train_all_of_pefts(theirs)
    theirs.add_weighted_adapter(names, weights, "sum", combination_type=method, svd_full_matrices=False)
    theirs.save_pretrained(tmp_path, selected_adapters=names)
    model = from_hf(hf("llama"))
    load_adapter(model, tmp_path, "default")
    load_adapter(model, tmp_path / "other", "other")
    combine_adapters(model, dict(zip(names, weights)), "sum", method)
    for i in range(2):
        layer = theirs.base_model.model.model.layers[i].mlp.down_proj
        close(change(model, f"blocks.{i}.mlp.down_proj"), layer.get_delta_weight("sum").detach())


@torch.no_grad()
def train_all_of_pefts(model: nn.Module) -> None:
    """As if all adapters had been trained, those too that are not in use."""
    generator = torch.Generator().manual_seed(9)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


def test_dora_is_not_combined_into_one():
    with pytest.raises(ValueError, match="use several at once"):
        combine_adapters(three(use_dora=True), {"a": 1, "b": 1}, "ab")


# ---- what a user can get wrong


@pytest.mark.parametrize(
    "targets", [("c_attn",), ("q_proj", "gate"), ("proj",), ("attn",), ("token_embedding",)]
)
def test_a_target_that_matches_nothing_is_an_error_with_the_names_that_exist(targets):
    model = gpt()
    existing = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(ValueError, match=f"no linear layer is called .*; there are: {existing}"):
        add_lora(model, LoRAConfig(target_modules=targets))
    assert not adapters_of(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("prepare", [lambda m: m, lambda m: quantize(m, "int8", say=lambda line: None)])
def test_a_layer_that_shares_its_weight_is_refused(prepare):
    with pytest.raises(ValueError, match="lm_head shares its weight"):
        add_lora(prepare(gpt(GPT2)), LoRAConfig(target_modules=("q_proj", "lm_head")))
    add_lora(prepare(gpt(LLAMA)), LoRAConfig(target_modules=("q_proj", "lm_head")))


@pytest.mark.parametrize(
    "do, message",
    [
        (lambda m: add_lora(m, LoRAConfig(), "a"), "there is an adapter 'a' on this model already"),
        (lambda m: add_lora(m, LoRAConfig(), "keys"), "cannot be called 'keys'"),
        (lambda m: add_lora(m, LoRAConfig(), "a.b"), "cannot be called 'a.b'"),
        (lambda m: use_adapters(m, ["a", "x"]), "no adapter is called 'x'; there are: a, b, c"),
        (lambda m: remove_adapter(m, "x"), "no adapter is called 'x'"),
        (lambda m: save_adapter(m, "nowhere", "x"), "no adapter is called 'x'"),
        (lambda m: combine_adapters(m, {"a": 1, "x": 1}, "n"), "no adapter is called 'x'"),
        (lambda m: combine_adapters(m, {"a": 1}, "b"), "there is an adapter 'b'"),
        (lambda m: combine_adapters(m, {"a": 1}, "n", "mean"), "choose cat, svd or linear"),
        (lambda m: combine_adapters(m, {}, "n"), "at least one adapter"),
        (lambda m: combine_adapters(m, {"a": 1}, "n", "cat", 3), "only svd has it"),
        (lambda m: use_adapters(merge_lora(m, keep=True), "a"), "unmerge_lora it"),
        (lambda m: add_lora(merge_lora(m, keep=True), LoRAConfig(), "n"), "unmerge_lora it"),
        (lambda m: remove_adapter(merge_lora(m, keep=True), "a"), "unmerge_lora it"),
        (lambda m: adapters_by_row(merge_lora(m, keep=True), ["a"]).__enter__(), "unmerge_lora it"),
    ],
)
def test_what_cannot_be_done_is_said(do, message):
    with pytest.raises(ValueError, match=message):
        do(three())
