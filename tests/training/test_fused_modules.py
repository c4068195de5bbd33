"""Models and trainings that compute with fused.c against the same with PyTorch's operations."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from shared import checkpoint, compiled
from shared.adapters import LoRAConfig, add_lora
from shared.evaluation import cross_entropy
from shared.models.bigram import BigramConfig, BigramModel
from shared.models.config import LayerKind
from shared.models.gpt import GPT, GPTConfig
from shared.training import Callback, TrainConfig, Trainer, fuse, fused, fused_modules
from shared.training.distributed import Processes
from shared.training.fusing import is_a_reason
from shared.training.precision import precision
from tests.training.helpers import QUICK, random_corpus, small_gpt, timeless, weights
from tests.training.test_fused import COMPILED, trained_by_muon

MINI = GPTConfig.preset("mini", vocab_size=13, block_size=24, n_layer=2, n_head=2, n_embd=32)
GPT2 = GPTConfig(vocab_size=13, block_size=24, n_layer=2, n_head=2, n_embd=32)
CONFIGS = {
    "mini": MINI,
    "an odd head, an odd width": replace(MINI, n_embd=33, n_head=3, head_size=14, mlp_hidden=37),
    "one token in the vocabulary": replace(MINI, vocab_size=1),
    "shared keys": replace(MINI, n_head=4, n_kv_head=2),
    "a window": replace(MINI, window=5),
    "windows by layer": replace(MINI, layers=(LayerKind(window=4), LayerKind(rope=False))),
    "no norms of queries": replace(MINI, qk_norm=False),
    "norms over all heads": replace(MINI, qk_norm_over="width"),
    "part of a head turned": replace(MINI, rope_share=0.5),
    "biases": replace(MINI, bias=True),
    "norms behind": replace(MINI, norm_place="both"),
    "a scale and a soft cap": replace(MINI, attention_scale=0.3, attention_softcap=5.0),
    "gpt2": GPT2,
    "no biases": replace(GPT2, bias=False),
    "the exact gelu": replace(GPT2, mlp="gelu", n_embd=33, n_head=3, mlp_hidden=37),
    "biases of queries, keys and values alone": replace(GPT2, bias=False, qkv_bias=True, window=5),
    "a layer norm in a llama": replace(MINI, norm="layernorm", bias=True),
    "a squared relu": replace(GPT2, mlp="relu2"),
    "gemma": replace(MINI, norm="rmsnorm_plus_one", mlp="geglu"),
}


def shaken(config: GPTConfig) -> GPT:
    """A model of which no weight is 0 or 1."""
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def loss_and_gradients(model: nn.Module, time: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of a batch of three rows."""
    ids = torch.randint(model.config.vocab_size, (3, time + 1), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_against_fp64(model: GPT) -> None:
    """Fused, the model has the loss and the gradients that PyTorch has in fp64."""
    exact, of_exact = loss_and_gradients(deepcopy(model).double(), 7)
    with fuse(model):
        loss, gradients = loss_and_gradients(model, 7)
    assert abs(loss - exact) < 1e-5 and gradients.keys() == of_exact.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, of_exact[name].float(), rtol=1e-4, atol=1e-5)


@COMPILED
@pytest.mark.parametrize("time", [1, 7, 24])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_fused_model_gives_the_loss_and_the_gradients_of_fp64(name, time):
    model = shaken(CONFIGS[name])
    exact, of_exact = loss_and_gradients(deepcopy(model).double(), time)
    with fuse(model):
        loss, gradients = loss_and_gradients(model, time)
    assert abs(loss - exact) < 1e-5
    assert gradients.keys() == of_exact.keys()
    largest = max(g.abs().max().item() for g in of_exact.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, of_exact[name].float(), rtol=1e-4, atol=1e-5 * largest)


@COMPILED
@pytest.mark.parametrize("own", [True, False], ids=["in C", "by PyTorch"])
def test_the_products_of_a_block_are_right_by_c_and_by_pytorch(own, monkeypatch):
    """Whichever of the two this machine would take."""
    monkeypatch.setattr(fused, "has_own_products", lambda inputs, outputs: own)
    for name in ("mini", "an odd head, an odd width", "gpt2", "the exact gelu"):
        model = shaken(CONFIGS[name])
        check_against_fp64(model)


@pytest.mark.slow
@COMPILED
@pytest.mark.parametrize("flags", [[], ["-march=native", "-mno-avx512f"]], ids=["plain", "narrower"])
def test_the_c_for_other_processors_computes_the_same(flags, monkeypatch, tmp_path):
    """Other registers have other tiles. A compiler that does not know the second flags takes none."""
    monkeypatch.setenv("LLM_WEEKS_DATA", str(tmp_path))
    monkeypatch.setattr(compiled, "FLAGS", (flags, []))
    monkeypatch.setattr(fused, "has_own_products", lambda inputs, outputs: True)
    fused.fused_library.cache_clear()
    try:
        for name in ("mini", "an odd head, an odd width", "gpt2", "the exact gelu"):
            model = shaken(CONFIGS[name])
            exact, of_exact = loss_and_gradients(deepcopy(model).double(), 24)
            with fuse(model):
                loss, gradients = loss_and_gradients(model, 24)
            assert abs(loss - exact) < 1e-5
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, of_exact[name].float(), rtol=1e-4, atol=1e-5)
        for got, want in zip(trained_by_muon(fused=True), trained_by_muon()):
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    finally:
        fused.fused_library.cache_clear()


@COMPILED
def test_what_is_computed_in_c_is_that_of_each_configuration(monkeypatch):
    """Against tests that would pass where nothing is fused."""
    calls = []
    for name in ("causal_attention", "gated_silu", "rms_norm"):
        original = getattr(fused_modules, name)
        monkeypatch.setattr(
            fused_modules, name, lambda *a, name=name, f=original: calls.append(name) or f(*a)
        )
    for name in ("AttentionBranch", "GatedMLPBranch", "GELUBranch"):
        original = getattr(fused_modules, name)

        class Counted(original):
            @classmethod
            def apply(cls, *args, name=name, f=original.apply):
                calls.append(name)
                return f(*args)

        monkeypatch.setattr(fused_modules, name, Counted)

    def parts(name: str) -> set[str]:
        calls.clear()
        model = shaken(CONFIGS[name])
        with fuse(model):
            loss_and_gradients(model, 7)
        assert bool(calls) == any(map(is_a_reason, model.modules()))
        return set(calls)

    llama, gpt2 = {"AttentionBranch", "GatedMLPBranch"}, {"AttentionBranch", "GELUBranch"}
    for name in ("mini", "shared keys", "a window", "windows by layer", "no norms of queries", "biases"):
        assert parts(name) == {*llama, "rms_norm"}, name  # the last norm is in no block
    for name in ("norms over all heads", "norms behind"):
        assert parts(name) == {"causal_attention", "gated_silu", "rms_norm"}, name
    assert parts("a scale and a soft cap") == {"gated_silu", "rms_norm"}
    assert parts("a layer norm in a llama") == llama
    for name in ("gpt2", "no biases", "the exact gelu", "biases of queries, keys and values alone"):
        assert parts(name) == gpt2, name
    assert parts("a squared relu") == set()


@COMPILED
def test_outside_of_fuse_the_model_is_what_it_was():
    model = shaken(MINI)
    before = [dict(vars(module)) for module in model.modules()]
    names = list(model.state_dict())
    with fuse(model), fuse(model):  # the second finds all exchanged
        assert list(model.state_dict()) == names
    assert [dict(vars(module)) for module in model.modules()] == before


@COMPILED
def test_without_gradients_and_for_hooks_the_models_own_code_runs():
    for config, part in ((MINI, "mlp"), (GPT2, "mlp_norm"), (GPT2, "attn.o_proj")):
        model = shaken(config)
        ids = torch.arange(7)[None]
        with torch.no_grad():
            expected = model(ids)
            with fuse(model):
                assert torch.equal(model(ids), expected)
        seen = []
        module = model.blocks[0].get_submodule(part)
        module.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        with fuse(model):
            model(ids)
        assert len(seen) == 1


@COMPILED
@pytest.mark.parametrize("config", [MINI, GPT2], ids=["mini", "gpt2"])
def test_what_is_not_fp32_is_left_alone(config):
    model = shaken(config)
    exact, of_exact = loss_and_gradients(deepcopy(model).double(), 7)
    double = deepcopy(model).double()
    with fuse(double):
        loss, gradients = loss_and_gradients(double, 7)
    assert loss == exact and all(torch.equal(gradients[name], of_exact[name]) for name in gradients)
    half, of_half = [], []
    for into in (half, of_half):
        with torch.autocast("cpu", torch.bfloat16):
            into.append(model(torch.arange(7)[None]))
            with fuse(model):
                into.append(model(torch.arange(7)[None]))
    assert torch.equal(half[0], half[1])


@COMPILED
@pytest.mark.parametrize("config", [MINI, GPT2], ids=["mini", "gpt2"])
def test_with_adapters_the_gradients_are_those_of_the_adapters(config):
    model = shaken(config)
    add_lora(model, LoRAConfig(r=2))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    check_against_fp64(model)


class Doubling(nn.Module):
    """A layer of somebody's own round a linear one; it has none of its attributes."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


@COMPILED
@pytest.mark.parametrize("config", [MINI, GPT2], ids=["mini", "gpt2"])
def test_layers_of_somebodys_own_are_left_to_pytorch(config):
    model = shaken(config)
    for block in model.blocks:
        block.attn.q_proj, block.mlp.up_proj = Doubling(block.attn.q_proj), Doubling(block.mlp.up_proj)
    check_against_fp64(model)


# ---- training

CORPUS = random_corpus(20)
MUON = replace(QUICK, optimizer="muon", steps=20, eval_every=20, warmup_steps=2)
SHAPE = dict(norm="rmsnorm", position="rope", mlp="swiglu", bias=False, qk_norm=True)
SHAPES = {"llama": SHAPE, "gpt2": {}, "gpt2 without biases": dict(bias=False)}


def trained(config: TrainConfig, shape: dict = SHAPE, **more) -> Trainer:
    trainer = Trainer(small_gpt(CORPUS, **shape), CORPUS, config, **more)
    trainer.fit()
    return trainer


class Stop(Callback):
    """Stops a training after its eleventh step."""

    def on_step(self, trainer: Trainer) -> None:
        if trainer.step == 11:
            trainer.stop("enough")


def losses(trainer: Trainer) -> list[float]:
    return [row["train_loss"] for row in trainer.history if "train_loss" in row]


@COMPILED
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_fused_training_has_the_losses_of_an_unfused_one(shape, optimizer, capsys):
    config = replace(MUON, optimizer=optimizer, grad_accum_steps=2)
    in_c = trained(config, SHAPES[shape])
    assert "in C; fused=False leaves that to PyTorch" in capsys.readouterr().out
    plain = trained(replace(config, fused=False), SHAPES[shape])
    assert "in C" not in capsys.readouterr().out
    assert losses(in_c) != losses(plain)  # else nothing was fused
    torch.testing.assert_close(losses(in_c), losses(plain), rtol=0, atol=1e-4)
    assert losses(in_c) == losses(trained(config, SHAPES[shape]))
    assert not any("forward" in vars(module) for module in in_c.model.modules())


@COMPILED
@pytest.mark.parametrize(("shape", "optimizer"), [("llama", "muon"), ("gpt2", "adamw")])
def test_a_fused_training_that_is_resumed_equals_one_that_was_left_alone(shape, optimizer, tmp_path):
    config, shape = replace(MUON, optimizer=optimizer), SHAPES[shape]
    alone = trained(config, shape)
    first = Trainer(small_gpt(CORPUS, **shape), CORPUS, config, checkpoints=tmp_path, callbacks=[Stop()])
    first.fit()
    assert first.step == 11
    again = Trainer(small_gpt(CORPUS, **shape), CORPUS, config, checkpoints=tmp_path)
    again.fit(resume=True)
    assert all(map(torch.equal, weights(again.model), weights(alone.model)))
    assert [timeless(row) for row in again.history] == [
        timeless(row) for row in alone.history[-len(again.history) :]
    ]


@COMPILED
def test_the_checkpoint_is_that_of_any_model(tmp_path):
    trainer = Trainer(small_gpt(CORPUS, **SHAPE), CORPUS, QUICK, checkpoints=tmp_path)
    trainer.fit()
    loaded = checkpoint.load(tmp_path / "last", device="cpu").model
    assert all(map(torch.equal, weights(loaded), weights(trainer.model)))


@COMPILED
@pytest.mark.parametrize(
    "more",
    [dict(precision=precision("bf16")), dict(processes=Processes(compile_model=True))],
    ids=["bf16", "compiled"],
)
def test_in_another_format_and_for_a_compiler_only_muon_is_fused(more):
    trainer = Trainer(small_gpt(CORPUS, **SHAPE), CORPUS, MUON, **more)
    assert trainer.fusion.optimizer and not trainer.fusion.modules
    assert "compute Muon in C" in trainer.fusion.message


def test_a_training_with_nothing_to_fuse_says_nothing(monkeypatch):
    monkeypatch.setattr("shared.training.fusing.why_unfused", lambda: pytest.fail("asked for a compiler"))
    others = [small_gpt(CORPUS, dropout=0.1), small_gpt(CORPUS, mlp="relu2")]
    for model in (*others, BigramModel(BigramConfig(20))):
        assert Trainer(model, CORPUS, QUICK).fusion.message is None


def test_without_a_compiler_pytorch_computes_and_that_is_said(monkeypatch, capsys):
    monkeypatch.setattr("shared.training.fusing.why_unfused", lambda: "it needs a C compiler")
    trainer = trained(replace(MUON, steps=2, warmup_steps=1))
    assert "PyTorch alone computes the steps, since fused.c is not used: it needs a C compiler" in (
        capsys.readouterr().out
    )
    assert not trainer.fusion.modules
    with pytest.raises(RuntimeError, match="cannot be fused here: it needs a C compiler"):
        with fuse(trainer.model):
            pass
