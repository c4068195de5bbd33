"""shared/training/tricks.py: each trick against the operations that are really carried out."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from shared.models.gpt import GPT
from shared.training import Trainer, tricks
from shared.training.profiling import in_own_process
from shared.training.tricks import (
    KINDS,
    LADDER,
    PRECISIONS,
    USUAL,
    Tricks,
    measure_ladder,
    measure_tricks,
    profile_training,
    time_by_kind,
)
from tests.training.helpers import TINY, TRAIN, out_of_memory, random_corpus

# ---- the ladder


@pytest.mark.slow
@pytest.mark.parametrize("units", [True, False])
def test_each_step_of_the_ladder_does_what_it_says(here, monkeypatch, units):
    monkeypatch.setattr(tricks, "bf16_units", lambda device: (units, "why"))
    ladder = [rung for rung in LADDER if rung[0] != "compile"]
    rows = measure_ladder(TINY, TRAIN, seeds=(1, 2), ladder=ladder)
    steps = ["eager fp32", "SDPA", "bf16", "fused AdamW", "larger batch", "gradient checkpointing"]
    assert [row["step"] for row in rows] == steps
    assert ["_scaled_dot_product_flash_attention_for_cpu" in names for names in here] == [False] + 5 * [True]
    assert ["_fused_adamw_" in names for names in here] == 3 * [False] + 3 * [True]
    assert "_to_copy" in here[2]
    assert ("_to_copy" in here[3]) == units  # autocast goes on where there are units for it
    notes = dict.fromkeys(steps)
    if not units:
        notes["bf16"] = "left out below: why"
    assert {row["step"]: row["note"] for row in rows} == notes
    for row, batch in zip(rows, (1, 1, 1, 1, 4, 4)):
        assert row["tokens/s"] == pytest.approx(1000 / row["ms"] * 32 * batch)
        assert row["MFU"] > 0
        assert row["spread"] > 0
    losses = [row["loss"] for row in rows]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-2)
    assert losses[3] == pytest.approx(losses[2 if units else 1], rel=1e-5)
    assert losses[5] == losses[4]


def test_the_memory_is_what_came_on_top(monkeypatch):
    cost = SimpleNamespace(memory=700)
    monkeypatch.setattr(tricks, "peak_memory", lambda device: 300)
    monkeypatch.setattr(tricks, "measure_training", lambda *settings, **options: cost)
    device = torch.device("cpu")
    costs, memory = measure_tricks(Tricks(), TINY, TRAIN, device=device, seeds=(1, 2), corpus=None)
    assert (costs, memory) == ([cost, cost], 400)


def test_the_spread_is_that_of_the_seeds(here):
    (one,) = measure_ladder(TINY, TRAIN, seeds=(1,), ladder=LADDER[:1])
    (two,) = measure_ladder(TINY, TRAIN, seeds=(2,), ladder=LADDER[:1])
    (both,) = measure_ladder(TINY, TRAIN, seeds=(1, 2), ladder=LADDER[:1])
    assert one["spread"] == two["spread"] == 0
    assert both["loss"] == pytest.approx((one["loss"] + two["loss"]) / 2)
    assert both["spread"] == pytest.approx(abs(one["loss"] - two["loss"]))


def test_a_corpus_is_trained_on_as_the_trainer_does(here, corpus):
    config = replace(TINY, vocab_size=corpus.tokenizer.vocab_size)
    (row,) = measure_ladder(config, TRAIN, seeds=(1,), corpus=corpus, ladder=PRECISIONS[:1])
    torch.manual_seed(1)
    trainer = Trainer(GPT(config), corpus, replace(TRAIN, seed=1, eval_windows=1))
    trainer.fit()
    assert row["loss"] == trainer.last_loss


def test_what_the_machine_cannot_do_is_said_and_left_out_below(here, monkeypatch):
    def no_compiler(function):
        raise RuntimeError("no C++ compiler\nand a long trace")

    monkeypatch.setattr(torch, "compile", no_compiler)
    ladder = [
        ("plain", {}),
        ("compile", {"compiled": True}),
        ("fp8", {"precision": "fp8"}),
        ("fp4", {"precision": "fp4"}),
        ("fused", {"fused": True}),
    ]
    plain, compiled, fp8, fp4, fused = measure_ladder(TINY, TRAIN, seeds=(1,), ladder=ladder)
    start = "not measured, and left out below: "
    reason = "torch.compile does not work here (no C++ compiler)"
    assert compiled == {"step": "compile", "note": start + reason}
    assert fp8 == {
        "step": "fp8",
        "note": start + "needs an NVIDIA card of compute capability 8.9 (Ada) or newer",
    }
    assert fp4["note"].startswith(start + "precision='fp4': must be one of")
    assert fused["loss"] == pytest.approx(plain["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_step_that_is_out_of_memory_is_said(monkeypatch):
    monkeypatch.setattr(tricks, "measure_tricks", out_of_memory)  # really in a process of its own
    rows = measure_ladder(TINY, TRAIN, ladder=[("larger batch", {"batch": 4})])
    note = "not measured, and left out below: out of memory with batch_size=8"
    assert rows == [{"step": "larger batch", "note": note}]


@pytest.mark.slow
def test_a_process_of_its_own_gives_the_same_losses(here):
    (row,) = measure_ladder(TINY, TRAIN, seeds=(1,), ladder=PRECISIONS[:1])
    cpu = torch.device("cpu")
    costs, held = in_own_process(measure_tricks, USUAL, TINY, TRAIN, device=cpu, seeds=(1,), corpus=None)
    assert row["loss"] == costs[0].losses[-1]
    assert 0 < held < 2**30


def test_peaks_that_are_given_are_not_measured_again(here, monkeypatch):
    monkeypatch.setattr(tricks, "format_peak", None)
    (row,) = measure_ladder(TINY, TRAIN, seeds=(1,), ladder=PRECISIONS[:1], peaks={"fp32": 1e12})
    with torch.device("meta"):
        flops = GPT(TINY).flops_per_token(TRAIN.block_size)
    assert row["MFU"] == pytest.approx(row["tokens/s"] * flops / 1e12)
    assert row["first loss"] == pytest.approx(math.log(TINY.vocab_size), abs=0.1)


# ---- where the time of a step goes


def attend(x: torch.Tensor) -> torch.Tensor:
    heads = x[None, None]
    return F.scaled_dot_product_attention(heads, heads, heads)


KIND_OF = {  # what an operation is when it is done on its own
    "matrix products": lambda x: x @ x.T,
    "attention": attend,
    "loss": lambda x: F.cross_entropy(x, torch.arange(len(x))),
    "norms": lambda x: F.rms_norm(x, x.shape[-1:]),
    "copies and casts": lambda x: x.bfloat16(),
    "activation and other elementwise": lambda x: F.silu(x),
}


@pytest.mark.parametrize("kind", KIND_OF)
@pytest.mark.parametrize("backward", [False, True])
def test_an_operation_and_its_backward_are_of_one_kind(kind, backward):
    x = torch.randn(300, 300, requires_grad=True)
    ones = torch.ones_like(KIND_OF[kind](x))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        out = KIND_OF[kind](x)
        if backward:
            out.backward(ones)
    times = time_by_kind(profiler.events())
    # "other" is the autograd engine, which takes as long as a small operation.
    assert next(name for name in times if name != "other") == kind
    microseconds = sum(event.self_cpu_time_total for event in profiler.events())
    assert sum(times.values()) == pytest.approx(microseconds / 1000)


def test_the_optimizers_operations_are_the_optimizers():
    x = nn.Parameter(torch.randn(300, 300))
    x.grad = torch.ones_like(x)
    for fused in (True, False):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            torch.optim.AdamW([x], fused=fused).step()
        assert next(iter(time_by_kind(profiler.events()))) == "optimizer and clipping"


def test_on_a_gpu_the_time_is_that_of_the_kernels_each_counted_once():
    def event(name, parent=None, *, node=-1, device=DeviceType.CPU, cuda=0, cpu=0):
        return SimpleNamespace(
            name=name,
            cpu_parent=parent,
            sequence_nr=node,
            device_type=device,
            self_device_time_total=cuda,
            self_cpu_time_total=cpu,
        )

    linear = event("aten::linear", cpu=9000)
    product = event("aten::mm", linear, node=1, cuda=2000, cpu=50)
    backward = event("autograd::engine::evaluate_function: MmBackward0", node=1)
    events = [
        linear,
        product,
        backward,
        event("something new", backward, cuda=3000),
        event("sgemm_kernel", device=DeviceType.CUDA, cuda=5000),
    ]
    assert time_by_kind(events, cuda=True) == {"matrix products": 5.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    "tricks", [USUAL, Tricks("bf16"), Tricks("fp16", sdpa=True, recompute=True, batch=2)]
)
def test_a_profile_has_the_whole_step(tricks):
    rows = profile_training(TINY, replace(TRAIN, steps=6), random_corpus(TINY.vocab_size), tricks=tricks)
    kinds = [row["kind"] for row in rows]
    assert {"matrix products", "norms", "loss", "optimizer and clipping", "attention"} <= set(kinds)
    assert set(kinds) <= {*KINDS, "other", "between operations"}
    assert kinds[-1] == "between operations"
    assert all(row["ms"] >= 0 for row in rows)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert rows[:-1] == sorted(rows[:-1], key=lambda row: -row["ms"])


def test_a_profile_of_too_few_steps_or_of_what_cannot_be_done_is_refused():
    corpus = random_corpus(TINY.vocab_size)
    with pytest.raises(ValueError, match="steps=3: a profile needs at least 4"):
        profile_training(TINY, TRAIN, corpus)
    with pytest.raises(ValueError, match="precision='fp4': must be"):
        profile_training(TINY, replace(TRAIN, steps=4), corpus, tricks=Tricks("fp4"))
