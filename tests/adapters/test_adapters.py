"""shared/adapters/attach.py, lora.py and peft_files.py: the laws of adapters, and the library PEFT, both
ways, on tiny random GPT-2s and Llamas.
"""

import json
import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from shared.adapters import LoRAConfig, add_lora, load_adapter, merge_lora, save_adapter
from shared.adapters.attach import (
    adapters_by_row,
    adapters_of,
    combine_adapters,
    linear_layers,
    remove_adapter,
    unmerge_lora,
    use_adapters,
)
from shared.adapters.lora import LoRALinear, lora_scale
from shared.adapters.peft_files import CONFIG, WEIGHTS
from shared.adapters.prompts import PromptTuned, add_prompt
from shared.checkpoint import unshared
from shared.models.gpt import GPT, GPTConfig
from shared.models.mlp import WindowMLP, WindowMLPConfig
from shared.models.pretrained import from_hf, to_hf
from shared.quantization import quantize
from shared.quantization.modules import QuantizedLinear
from shared.sampling import generate
from shared.tokenizers import CharTokenizer
from tests.helpers import shake

GPT2 = GPTConfig(vocab_size=53, block_size=24, n_layer=2, n_head=4, n_embd=32)
LLAMA = replace(
    GPT2,
    norm="rmsnorm",
    position="rope",
    mlp="swiglu",
    mlp_hidden=64,
    n_kv_head=2,
    bias=False,
    tie_weights=False,
)
OTHER = replace(LLAMA, qk_norm=True, window=16, zero_init=True)  # has no equivalent at Hugging Face
CONFIGS = {"gpt2": GPT2, "llama": LLAMA, "other": OTHER}
KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
ALL = ("all-linear",)


def gpt(config: GPTConfig = LLAMA, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return shake(GPT(config), seed).eval()


def learn(model: nn.Module, seed: int = 1) -> nn.Module:
    """As if what is trainable had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def adapted(config: GPTConfig = LLAMA, name: str = "default", seed: int = 1, **lora) -> GPT:
    return learn(
        add_lora(gpt(config), LoRAConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL} | lora), name),
        seed,
    )


def three(**lora) -> GPT:
    """A model with adapters a, b and c of ranks 4, 2 and 4."""
    model = gpt()
    for seed, (name, r) in enumerate({"a": 4, "b": 2, "c": 4}.items(), 1):
        learn(
            add_lora(model, LoRAConfig(**{"r": r, "lora_alpha": 8, "target_modules": ALL} | lora), name), seed
        )
    return model


@pytest.fixture
def idx() -> Tensor:
    return torch.randint(53, (3, 10), generator=torch.Generator().manual_seed(0))


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def base_bits(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that belong to no adapter, under the names they had before."""
    return {
        n.replace(".base.", "."): t
        for n, t in bits(model).items()
        if ".adapters." not in n and ".merged." not in n
    }


def close(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---- the laws


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_nothing_changes(kind, config, idx):
    model = gpt(CONFIGS[config])
    before, expected = bits(model), model(idx)
    add_lora(model, LoRAConfig(target_modules=ALL, **KINDS[kind]))
    assert torch.equal(model(idx), expected) and len(adapters_of(model)) == 1
    assert_same_bits(base_bits(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_the_adapter_and_leaves_the_base_bit_for_bit(kind, idx):
    model = gpt()
    before = bits(model)
    add_lora(model, LoRAConfig(r=4, target_modules=ALL, lora_dropout=0.1, **KINDS[kind])).train()
    start, optimizer = (
        bits(model),
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01, weight_decay=0.1),
    )
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(idx)[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert_same_bits(base_bits(model), before)
    moved = {name for name, t in bits(model).items() if not torch.equal(t, start[name])}
    assert (
        moved
        == {name for name in start if ".adapters." in name}
        == {name for name, p in model.named_parameters() if p.requires_grad}
    )
    assert all(p.grad is None for name, p in model.named_parameters() if ".adapters." not in name)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_w_plus_scale_b_a(kind, idx):
    model = adapted(**KINDS[kind])
    expected, layers = model(idx), dict(linear_layers(model))
    plain = merge_lora(model)
    for name, layer in layers.items():
        if isinstance(layer, LoRALinear):
            a = layer.adapters["default"]
            weight = layer.base.weight + lora_scale(8, 4, kind == "rslora") * a.lora_B @ a.lora_A
            if kind == "dora":
                weight = a.magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
            close(plain.get_submodule(name).weight, weight, 1e-6)
    close(plain(idx), expected)
    assert bits(plain).keys() == bits(gpt()).keys()


@pytest.mark.parametrize("keep", [False, True])
def test_merging_twice_changes_nothing(keep):
    model = merge_lora(adapted(), keep)
    once = bits(model)
    assert_same_bits(bits(merge_lora(model, keep)), once)


@pytest.mark.parametrize("kind", KINDS)
def test_unmerging_brings_everything_back_bit_for_bit(kind, idx):
    model = adapted(**KINDS[kind])
    before, expected = bits(model), model(idx)
    merge_lora(model, keep=True)
    close(model(idx), expected)
    assert not torch.equal(model(idx), expected), "rounding differs, so it was merged"
    assert_same_bits(bits(unmerge_lora(model)), before)
    assert torch.equal(unmerge_lora(model)(idx), expected)


def test_kept_and_then_taken_away_is_the_same_merge():
    model = adapted()
    assert_same_bits(bits(merge_lora(merge_lora(deepcopy(model), keep=True))), bits(merge_lora(model)))


def test_a_merged_model_is_one_that_others_can_read(tmp_path, idx):
    model = adapted()
    with pytest.raises(ValueError, match="merge adapters"):
        to_hf(model, tmp_path)
    to_hf(merge_lora(model), tmp_path)
    close(LlamaForCausalLM.from_pretrained(tmp_path)(idx).logits, model(idx))


def test_merging_with_no_adapter_in_use_is_the_base():
    model = use_adapters(adapted(), ())
    assert_same_bits(bits(merge_lora(model)), bits(gpt()))


def test_dropout_is_for_training_only(idx):
    model = adapted(lora_dropout=0.5)
    assert torch.equal(model(idx), model(idx)) and torch.equal(model(idx), adapted(lora_dropout=0.0)(idx))
    model.train()
    assert not torch.equal(model(idx), model(idx))


def test_the_scale_of_rslora_keeps_the_size_of_the_change_at_any_rank():
    """Of random A and B the entries of B A grow with √r."""
    generator = torch.Generator().manual_seed(0)
    sizes = {}
    for r in (4, 256):
        product = torch.randn(200, r, generator=generator) @ torch.randn(r, 200, generator=generator)
        sizes[r] = [(lora_scale(8, r, rs) * product).std().item() for rs in (False, True)]
    assert sizes[256][1] == pytest.approx(sizes[4][1], rel=0.05) and sizes[256][0] == pytest.approx(
        sizes[4][0] / 8, rel=0.05
    )


def test_generating_with_a_cache_is_the_same():
    model = adapted()
    assert list(generate(model, [1, 2], 12, temperature=0)) == list(
        generate(model, [1, 2], 12, temperature=0, use_cache=False)
    )


def test_any_model_with_linear_layers_can_be_adapted():
    torch.manual_seed(0)
    model = WindowMLP(WindowMLPConfig(vocab_size=11))
    names = linear_layers(model)
    add_lora(model, LoRAConfig(r=2, target_modules=tuple(names)))
    assert (
        all(isinstance(layer, LoRALinear) for layer in linear_layers(model).values())
        and linear_layers(model).keys() == names.keys()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_in_bfloat16_has_adapters_in_fp32(kind, idx):
    model = learn(add_lora(gpt().bfloat16(), LoRAConfig(r=4, target_modules=ALL, **KINDS[kind])))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    logits = model(idx)
    assert logits.dtype == torch.bfloat16 == merge_lora(model).lm_head.weight.dtype
    assert (model(idx) - logits).norm() < 0.03 * logits.norm()


# ---- QLoRA


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_round_a_quantized_layer_it_is_the_same_adapter(scheme, kind, idx):
    """As round a plain layer with the quantized one's weight."""
    base = quantize(gpt(), scheme, 32, say=lambda line: None, kernels=())
    plain = gpt()
    with torch.no_grad():
        for name, layer in linear_layers(base).items():
            plain.get_submodule(name).weight.copy_(layer.weight)
    packed = {name: t for name, t in bits(base).items()}
    models = [
        learn(add_lora(seeded(m), LoRAConfig(r=4, target_modules=ALL, **KINDS[kind]))) for m in (base, plain)
    ]
    losses = [F.cross_entropy(m(idx)[:, :-1].flatten(0, 1), idx[:, 1:].flatten()) for m in models]
    for loss in losses:
        loss.backward()
    close(models[0](idx), models[1](idx))
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in models]
    assert (
        gradients[0].keys()
        == gradients[1].keys()
        == {n for n, p in base.named_parameters() if ".adapters." in n}
    )
    for name in gradients[0]:
        close(gradients[0][name], gradients[1][name])
    assert_same_bits(base_bits(base), packed)
    expected = base(idx)
    close(merge_lora(base)(idx), expected)
    assert not any(isinstance(m, QuantizedLinear) for n, m in linear_layers(base).items() if n != "lm_head")


def seeded(model: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    return model


def test_an_adapter_learned_on_a_quantized_base_goes_on_the_original(tmp_path, idx):
    base = learn(add_lora(quantize(gpt(), "nf4", 32, say=lambda line: None), LoRAConfig(target_modules=ALL)))
    model = load_adapter(save_adapter(tmp_path, base), gpt())
    for name, layer in linear_layers(model).items():
        if name != "lm_head":
            assert_same_bits(bits(layer.adapters), bits(base.get_submodule(name).adapters))


# ---- several adapters


def change(model: nn.Module, layer: str = "blocks.1.mlp.down_proj") -> Tensor:
    """What the adapters in use add to this layer's weight."""
    found = model.get_submodule(layer)
    return (found.weight - found.base.weight).detach()


def test_switching_uses_one_and_trains_only_that(idx):
    model = three()
    alone = {}
    for name in "abc":
        alone[name] = use_adapters(model, name)(idx)
        assert {n.split(".adapters.")[1][0] for n, p in model.named_parameters() if p.requires_grad} == {name}
    assert not torch.equal(alone["a"], alone["b"]) and torch.equal(use_adapters(model, "a")(idx), alone["a"])
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
    with (
        adapters_by_row(model, ["a", "b"]),
        pytest.raises(ValueError, match="set for 2 rows, and the batch has 3"),
    ):
        model(idx)
    with (
        pytest.raises(ValueError, match="no adapter is called 'x'; there are: a, b, c"),
        adapters_by_row(model, ["x"]),
    ):
        pass


def test_cat_is_exact(idx):
    model, shares = three(), {"a": 0.7, "b": -1.5}
    expected, product = use_adapters(model, shares)(idx), change(model)
    combine_adapters(model, shares, "ab")
    assert adapters_of(model)["ab"].r == 6
    close(change(model), product, 1e-6)
    close(model(idx), expected)


@pytest.mark.parametrize("rank", [1, 3, 6, None])
def test_svd_loses_what_eckart_and_young_say_and_no_more(rank):
    model, shares = three(), {"a": 0.7, "b": -1.5}
    full = change(use_adapters(model, shares))
    combine_adapters(model, shares, "ab", "svd", rank)
    singular = torch.linalg.svdvals(full.double())
    lost = singular[rank or 4 :].square().sum().sqrt().item()
    assert torch.linalg.matrix_rank(change(model), tol=1e-5) == (rank or 4) == adapters_of(model)["ab"].r
    assert (change(model) - full).norm().item() == pytest.approx(lost, rel=1e-4, abs=1e-5)


def test_linear_is_the_sum_and_its_cross_terms():
    model, shares = three(), {"a": 0.7, "c": -0.4}
    layer = model.get_submodule("blocks.1.mlp.down_proj")
    a, c = layer.adapters["a"], layer.adapters["c"]
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
    theirs = peft_model("llama", "lora")
    theirs.add_adapter("other", replaced(theirs, r=4))
    learn_theirs(theirs)
    theirs.add_weighted_adapter(
        ["default", "other"], weights, "sum", combination_type=method, svd_full_matrices=False
    )
    model = from_hf(hf("llama"))
    theirs.save_pretrained(tmp_path, selected_adapters=["default", "other"])
    load_adapter(tmp_path, model, "default"), load_adapter(tmp_path / "other", model, "other")
    combine_adapters(model, dict(zip(["default", "other"], weights)), "sum", method)
    for i in range(2):
        layer = theirs.base_model.model.model.layers[i].mlp.down_proj
        close(change(model, f"blocks.{i}.mlp.down_proj"), layer.get_delta_weight("sum").detach())


def test_a_removed_adapter_is_gone_and_with_the_last_the_layer_too():
    model = three()
    for name in "abc":
        remove_adapter(model, name)
        assert name not in adapters_of(model)
    assert_same_bits(bits(model), bits(gpt()))
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


# ---- PEFT

TARGETS = {
    "gpt2": {"qkv": ["c_attn"], "attention": ["c_attn", "attn.c_proj"], "all": ["c_attn", "c_proj", "c_fc"]},
    "llama": {
        "qkv": ["q_proj", "v_proj"],
        "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "all": "all-linear",
    },
}
BOTH = [(family, targets) for family, kinds in TARGETS.items() for targets in kinds]


def hf(family: str):
    torch.manual_seed(3)
    if family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=53, n_positions=24, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
            )
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=53,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=24,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    return shake(model).eval()


def peft_model(family: str, kind: str, targets: str = "all", **more):
    wanted = TARGETS[family][targets]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=wanted,
        task_type="CAUSAL_LM",
        fan_in_fan_out=family == "gpt2",
        **KINDS[kind],
        **more,
    )
    torch.manual_seed(4)
    return learn(peft.get_peft_model(hf(family), config).eval())


def replaced(model, **changes):
    return replace(model.peft_config["default"], **changes)


def learn_theirs(model) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))


def load_strictly(base, folder: Path):
    """PEFT's own loading; it warns of keys that are missing or left over, and here that is an error."""
    theirs = peft.PeftModel.from_pretrained(deepcopy(base), folder)
    result = theirs.load_adapter(folder, "again")
    assert not result.unexpected_keys and not [
        key for key in result.missing_keys if "lora_" in key and ".again" in key
    ]
    return theirs.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family, targets", BOTH)
def test_we_load_pefts_adapters(family, targets, kind, tmp_path, idx):
    theirs = peft_model(family, kind, targets)
    theirs.save_pretrained(tmp_path)
    model = load_adapter(tmp_path, from_hf(hf(family)))
    assert (model(idx) - from_hf(hf(family))(idx)).abs().max() > 0.01
    close(model(idx), theirs(idx).logits)
    close(merge_lora(deepcopy(model))(idx), theirs(idx).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family, targets", BOTH)
def test_what_we_loaded_we_write_as_peft_did(family, targets, kind, tmp_path):
    peft_model(family, kind, targets).save_pretrained(tmp_path / "theirs")
    save_adapter(tmp_path / "ours", load_adapter(tmp_path / "theirs", from_hf(hf(family))))
    assert_same_bits(load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS))
    ours, theirs = (json.loads((tmp_path / side / CONFIG).read_text()) for side in ("ours", "theirs"))
    for key in (
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "fan_in_fan_out",
        "rank_pattern",
        "alpha_pattern",
        "bias",
    ):
        assert ours[key] == theirs[key], key


OURS = {
    "all": ALL,
    "queries and values": ("q_proj", "v_proj"),
    "keys and up": ("k_proj", "up_proj"),
    "one layer": ("blocks.1.attn.o_proj",),
    "one of three": ("blocks.0.attn.v_proj", "down_proj"),
}


@pytest.mark.filterwarnings("error:.*(missing|unexpected|fan_in_fan_out).*")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", OURS)
@pytest.mark.parametrize("family", TARGETS)
def test_peft_loads_our_adapters(family, targets, kind, tmp_path, idx):
    base = hf(family)
    model = learn(
        add_lora(from_hf(base), LoRAConfig(r=3, lora_alpha=5, target_modules=OURS[targets], **KINDS[kind]))
    )
    theirs = load_strictly(base, save_adapter(tmp_path, model))
    assert (model(idx) - base(idx).logits).abs().max() > 0.01
    close(theirs(idx).logits, model(idx))
    adapted = {name for name, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert {f"base_model.model.{name}" for name in written(tmp_path)} == adapted


@pytest.mark.filterwarnings("error:.*missing.*")
def test_a_key_that_is_missing_would_be_noticed(tmp_path):
    save_adapter(tmp_path, add_lora(from_hf(hf("llama")), LoRAConfig(target_modules=ALL)))
    rewrite(tmp_path, tensors=without_first)
    with pytest.raises(UserWarning, match="missing"):
        load_strictly(hf("llama"), tmp_path)


def written(folder: Path) -> set[str]:
    return {
        key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in load_file(folder / WEIGHTS)
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", OURS)
@pytest.mark.parametrize("config", CONFIGS)
def test_what_we_write_we_read_back_bit_for_bit(config, targets, kind, tmp_path, idx):
    model = adapted(CONFIGS[config], target_modules=OURS[targets], **KINDS[kind])
    again = load_adapter(save_adapter(tmp_path, model), gpt(CONFIGS[config]))
    assert_same_bits(bits(again), bits(model))
    assert torch.equal(again(idx), model(idx))
    settings = [
        [layer.adapters["default"].config.scale for layer in m.modules() if isinstance(layer, LoRALinear)]
        for m in (again, model)
    ]
    assert settings[0] == settings[1]


def test_peft_on_our_own_model_writes_what_we_load(tmp_path, idx):
    """A GPT that has no equivalent at Hugging Face: PEFT swaps the same linear layers in it."""
    theirs = learn(
        peft.get_peft_model(
            gpt(OTHER), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"])
        ).eval()
    )
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_adapter(tmp_path / "theirs", gpt(OTHER))
    close(model(idx), theirs(idx))
    close(load_strictly(gpt(OTHER), save_adapter(tmp_path / "ours", model))(idx), model(idx))


def test_ranks_that_differ_by_layer(tmp_path, idx):
    theirs = peft_model(
        "llama",
        "rslora",
        rank_pattern={"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 7},
        alpha_pattern={"up_proj": 11},
    )
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_adapter(tmp_path / "theirs", from_hf(hf("llama")))
    close(model(idx), theirs(idx).logits)
    close(load_strictly(hf("llama"), save_adapter(tmp_path / "ours", model))(idx).logits, model(idx))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", TARGETS)
def test_training_goes_as_pefts_does(family, kind, tmp_path, idx):
    """GPT-2's A belongs to queries, keys and values, and is trained as one."""
    theirs = peft_model(family, kind)
    theirs.save_pretrained(tmp_path)
    model = load_adapter(tmp_path, from_hf(hf(family)))
    ours = losses(model, lambda: model(idx), idx)
    assert (
        ours == pytest.approx(losses(theirs, lambda: theirs(idx).logits, idx), abs=1e-4)
        and ours[-1] < ours[0] - 0.01
    )


def losses(model: nn.Module, logits: Callable[[], Tensor], idx: Tensor) -> list[float]:
    """Of five steps of gradient descent on `idx`."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.3)
    found = []
    for _ in range(5):
        loss = F.cross_entropy(logits()[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


# ---- soft prompts


@pytest.mark.parametrize("family", TARGETS)
def test_prompts_are_pefts_both_ways(family, tmp_path, idx):
    base = hf(family)
    config = peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    theirs = learn(peft.get_peft_model(deepcopy(base), config).eval())
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_adapter(tmp_path / "theirs", from_hf(base))
    close(model(idx), theirs(idx).logits[:, 5:])
    learn(model, seed=7)
    save_adapter(tmp_path / "ours", model)
    assert (
        load_file(tmp_path / "ours" / WEIGHTS).keys()
        == load_file(tmp_path / "theirs" / WEIGHTS).keys()
        == {"prompt_embeddings"}
    )
    close(
        peft.PeftModel.from_pretrained(deepcopy(base), tmp_path / "ours").eval()(idx).logits[:, 5:],
        model(idx),
    )


def test_a_prompt_of_tokens_is_those_tokens(idx):
    model = gpt(GPT2)
    text = torch.tensor([[7, 8, 9, 7]]).expand(len(idx), -1)
    expected, plain = model(torch.cat([text, idx], dim=1))[:, 4:], model(idx)
    tuned = add_prompt(model, 4, [7, 8, 9])
    assert torch.equal(tuned(idx), expected) and torch.equal(tuned.model(idx), plain)


def test_only_the_prompt_is_trained(idx):
    model = gpt(GPT2)
    before = bits(model)
    tuned = add_prompt(model, 3)
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], 0.1)
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(tuned(idx)[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert [n for n, p in tuned.named_parameters() if p.requires_grad] == ["model.token_embedding.prompt"]
    assert_same_bits({n: t for n, t in base_bits(tuned.model).items() if not n.endswith(".prompt")}, before)


@pytest.mark.parametrize("config", [GPT2, LLAMA])
def test_text_is_written_after_a_prompt(config):
    """Past block_size too, where the model begins anew with the text's last half, behind the prompt."""
    tuned = add_prompt(gpt(config), 6)
    assert tuned.config.block_size == 18
    ids = list(generate(tuned, [1, 2], 40, temperature=0))
    assert ids == list(generate(tuned, [1, 2], 40, temperature=0, use_cache=False)) and max(ids) < 53
    tuned.tokenizer = CharTokenizer("".join(map(chr, range(97, 97 + 53))))
    assert tuned.generate("bc", 5, temperature=0).startswith("bc")


def test_a_prompt_round_a_quantized_model(idx):
    model = quantize(gpt(GPT2), "nf4", 32, say=lambda line: None, kernels=())
    expected = model(torch.cat([torch.full((3, 2), 5), idx], dim=1))[:, 2:]
    close(add_prompt(model, 2, [5])(idx), expected)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda m: add_prompt(m, 0), "num_virtual_tokens=0: must be at least 1"),
        (lambda m: add_prompt(m, 24), "leaves no room for text in block_size=24"),
        (lambda m: add_prompt(m, 2, [53]), "from 0 to 52"),
        (lambda m: add_prompt(m, 2, []), "at least one"),
        (lambda m: add_prompt(add_prompt(m, 2).model, 2), "has a soft prompt already"),
        (
            lambda m: add_prompt(m, 4)(torch.zeros(1, 21, dtype=torch.int64)),
            "21 tokens do not fit in block_size=20",
        ),
    ],
)
def test_prompts_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make(gpt(GPT2))


# ---- what a user can get wrong


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"r": 0}, "r=0: must be at least 1"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"target_modules": "q_proj"}, r"must be a tuple of names, as in \('q_proj',\)"),
        ({"target_modules": ()}, "target_modules is empty"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**settings)


@pytest.mark.parametrize(
    "targets", [("c_attn",), ("q_proj", "gate"), ("proj",), ("attn",), ("token_embedding",)]
)
def test_a_target_that_matches_nothing_is_an_error_with_the_names_that_exist(targets):
    model = gpt()
    with pytest.raises(
        ValueError,
        match=(
            "no linear layer is called .*; there are: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj,"
            " up_proj, v_proj"
        ),
    ):
        add_lora(model, LoRAConfig(target_modules=targets))
    assert not adapters_of(model) and all(p.requires_grad for p in model.parameters())


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
        (lambda m: save_adapter("nowhere", m, "x"), "no adapter is called 'x'"),
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


def test_dora_is_not_combined_into_one():
    with pytest.raises(ValueError, match="use several at once"):
        combine_adapters(three(use_dora=True), {"a": 1, "b": 1}, "ab")


@pytest.mark.parametrize(
    "base, message",
    [
        (lambda: gpt(seed=1), "trained on another base: the weights here are others"),
        (lambda: gpt(replace(LLAMA, n_embd=64)), "another base or rank: .* is \\[4, 32\\], not \\[4, 64\\]"),
        (lambda: gpt(replace(LLAMA, n_layer=1)), "for another base: it has model.layers.1"),
        (lambda: gpt(GPT2), "for another base: it has model.layers.0.* and this model .*c_attn"),
    ],
)
def test_an_adapter_of_another_base_is_refused(base, message, tmp_path):
    save_adapter(tmp_path, adapted())
    model = base()
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path, model)
    assert_same_bits(bits(model), before)


def rewrite(folder: Path, config: Mapping = MappingProxyType({}), tensors=lambda t: t, metadata=None) -> None:
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | dict(config)))
    save_file(tensors(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata)


def without_first(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(list(tensors.items())[1:])


@pytest.mark.parametrize(
    "damage, message",
    [
        (dict(config={"r": 8}), "another base or rank"),
        (dict(config={"r": "4"}), "r='4' is of the wrong kind"),
        (dict(config={"r": 0}), "r=0 must be at least 1"),
        (dict(config={"use_dora": True}), "magnitude is missing"),
        (dict(config={"peft_type": "IA3"}), "peft_type='IA3'"),
        (dict(config={"bias": "all"}), "bias='all' is more than is done here"),
        (dict(config={"modules_to_save": ["lm_head"]}), "modules_to_save"),
        (dict(config={"layer_replication": [[0, 1]]}), "layer_replication"),
        (dict(config={"init_lora_weights": "pissa"}), "changes the base itself"),
        (dict(config={"rank_pattern": {"(": 2}}), "is no pattern"),
        (dict(config={"alpha_pattern": {r"1\.mlp\.up_proj": -1}}), "alpha=-1 must be a number above 0"),
        (dict(config={"alpha_pattern": {"up_proj": "8"}}), "alpha='8' must be a number above 0"),
        (dict(tensors=without_first), "is missing"),
        (dict(tensors=lambda t: {k: v[:, :-1].contiguous() for k, v in t.items()}), "another base or rank"),
        (dict(tensors=lambda t: {k: v * math.nan for k, v in t.items()}), "NaN or inf"),
        (dict(tensors=lambda t: {k: v.int() for k, v in t.items()}), "of type torch.int32"),
        (
            dict(tensors=lambda t: {k.replace("lora_A", "lora_embedding_A"): v for k, v in t.items()}),
            "no tensor of a LoRA on linear layers",
        ),
        (dict(tensors=lambda t: {}), "no layers"),
        (dict(metadata={"own": "{"}), "holds no adapter, or a damaged one"),
        (dict(metadata={"own": "[]"}), "expected JSON objects"),
        (dict(metadata={"own": '{"blocks.0.attn.q_proj": [0, 9, 1]}'}), "notes in the header .* are damaged"),
        (dict(metadata={"base": '{"blocks.0.attn.q_proj": "x"}'}), "header of .* is damaged"),
    ],
)
def test_files_that_do_not_fit_are_refused(damage, message, tmp_path):
    save_adapter(tmp_path, adapted())
    rewrite(tmp_path, **damage)
    model = gpt()
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path, model)
    assert not adapters_of(model)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_cut_or_missing_file_is_named(name, tmp_path):
    save_adapter(tmp_path, adapted())
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="holds no adapter, or a damaged one"):
        load_adapter(tmp_path, gpt())
    path.unlink()
    with pytest.raises(ValueError, match="holds no adapter"):
        load_adapter(tmp_path, gpt())


def test_a_prompt_of_another_base_is_refused(tmp_path):
    save_adapter(tmp_path, add_prompt(gpt(GPT2), 3))
    for other, message in (
        (gpt(GPT2, seed=1), "another base"),
        (gpt(replace(GPT2, n_embd=64)), "another base or length"),
    ):
        with pytest.raises(ValueError, match=message):
            load_adapter(tmp_path, other)
    assert isinstance(load_adapter(tmp_path, gpt(GPT2)), PromptTuned)


def test_a_models_folder_is_not_overwritten(tmp_path):
    to_hf(gpt(), tmp_path)
    with pytest.raises(ValueError, match="holds a model"):
        save_adapter(tmp_path, adapted())
    assert unshared(from_hf(tmp_path)).keys() == unshared(gpt()).keys()
