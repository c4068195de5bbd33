"""shared/training/precision.py: fp16 against the recipe of torch's documentation, and who has bf16 units."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from shared.data.corpus import batches
from shared.evaluation import cross_entropy
from shared.training import Trainer, lr_at
from shared.training import precision as formats
from shared.training.execution import FP32, Precision
from shared.training.optim import build_optimizers
from shared.training.precision import TF32, Float8, Float16, bf16_units, needed_card, precision
from shared.training.trainer import TrainingStopped
from tests.training import helpers
from tests.training.helpers import all_equal, small_gpt, timeless, weights

BF16 = Precision(torch.bfloat16)
QUICK = replace(helpers.QUICK, grad_clip=0.1, checkpoint_every=250)


def float16(scale: float = 2.0**16, growth_interval: int = 2000) -> Float16:
    return Float16(scaler=GradScaler("cpu", init_scale=scale, growth_interval=growth_interval))


def spoil(parameter: nn.Parameter, steps: tuple[int, ...], value: float = math.inf) -> None:
    """In these backwards, counted from 1, one number of the parameter's gradient is `value`."""
    seen = []

    def hook(grad: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        return grad.index_fill(0, torch.tensor([0]), value) if len(seen) in steps else grad

    parameter.register_hook(hook)


def training_rows(trainer: Trainer) -> list[dict]:
    return [row for row in trainer.history if "lr" in row]


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_precision_by_name_computes_in_its_format(name, dtype):
    chosen = precision(name)
    with chosen.autocast(torch.device("cpu")):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
    assert chosen.skips == (name == "fp16")


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("fp4", "cpu", "precision='fp4': must be one of fp32, tf32, bf16, fp16, fp8"),
        (
            "tf32",
            "cpu",
            r"'tf32' needs an NVIDIA card of compute capability 8.0 \(Ampere\) or newer, not cpu",
        ),
        ("fp8", "cpu", r"'fp8' needs an NVIDIA card of compute capability 8.9 \(Ada\) or newer, not cpu"),
        ("fp16", "meta", "precision='fp16' does not work on meta: use fp32 there, or another device"),
        ("bf16", "meta", "precision='bf16' does not work on meta"),
    ],
)
def test_a_precision_that_does_not_exist_or_work_is_refused(name, device, message):
    with pytest.raises(ValueError, match=message):
        precision(name, device)


def by_the_documentation(model, corpus, config, scaler) -> list[float]:
    """Trains as torch's documentation has it: scale, backward, unscale, clip, step, update; gives the scales
    after each step.
    """
    betas = (config.beta1, config.beta2)
    (optimizer,) = build_optimizers(model, "adamw", config.lr, weight_decay=config.weight_decay, betas=betas)
    stream = batches(corpus.train, 8, 4, config.seed)
    scales = []
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, config)
        x, y = next(stream)
        with torch.autocast("cpu", torch.float16):
            loss = cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize(("scale", "bad"), [(2.0**16, ()), (2.0**16, (3, 4)), (2.0**36, (3,))])
def test_fp16_is_the_recipe_of_torchs_documentation(corpus, scale, bad):
    """The scale that is too large at first has real overflows."""
    ours = small_gpt(corpus)
    theirs = small_gpt(corpus)
    for model in (ours, theirs):
        spoil(model.blocks[0].mlp.up_proj.weight, bad)
    config = replace(QUICK, steps=10)
    trainer = Trainer(ours, corpus, config, precision=float16(scale, growth_interval=2))
    trainer.fit()
    scaler = GradScaler("cpu", init_scale=scale, growth_interval=2)
    scales = by_the_documentation(theirs, corpus, config, scaler)
    assert [row["loss_scale"] for row in training_rows(trainer)] == scales
    assert len(set(scales)) > 3
    assert all_equal(weights(ours), weights(theirs))


def test_the_length_of_fp16s_gradients_is_that_of_fp32s(corpus):
    norms = []
    for chosen in (FP32, float16()):
        trainer = Trainer(small_gpt(corpus), corpus, QUICK, precision=chosen)
        trainer.fit()
        norms.append([row["grad_norm"] for row in training_rows(trainer)])
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_step_with_an_overflow_moves_no_weight_and_the_training_goes_on(corpus, optimizer, value):
    """With two optimizers too, of which one alone has seen the overflow."""
    model = small_gpt(corpus)
    spoil(model.blocks[1].mlp.up_proj.weight, (2,), value)
    trainer = Trainer(model, corpus, replace(QUICK, optimizer=optimizer), precision=float16())
    after_each_step = [weights(model)]
    step = trainer.precision.step

    def watched(optimizers):
        step(optimizers)
        after_each_step.append(weights(model))

    object.__setattr__(trainer.precision, "step", watched)  # a frozen dataclass
    trainer.fit()
    moved = [not all_equal(a, b) for a, b in zip(after_each_step, after_each_step[1:])]
    assert moved == [True, False, True, True, True, True]
    rows = training_rows(trainer)
    assert [row["loss_scale"] for row in rows] == [2.0**16] + 5 * [2.0**15]
    assert [row["steps_since_skip"] for row in rows] == [1, 0, 1, 2, 3, 4]
    assert all(math.isfinite(v) for row in trainer.history for v in row.values())  # JSON has no inf


def test_a_loss_that_overflows_is_skipped_too(corpus):
    model = small_gpt(corpus)
    calls = []

    def overflow_once(module, args, out):
        calls.append(1)
        return out * math.inf if len(calls) == 2 else out

    model.lm_head.register_forward_hook(overflow_once)
    trainer = Trainer(model, corpus, QUICK, precision=float16())
    trainer.fit()
    rows = training_rows(trainer)
    assert [row["loss_scale"] for row in rows] == [2.0**16] + 5 * [2.0**15]
    assert ["train_loss" in row for row in rows] == [True, False, True, True, True, True]


def test_a_step_left_out_halves_the_scale_though_no_gradient_overflowed():
    chosen = float16(scale=8.0)
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=1.0)
    chosen.backward(p.sum())
    chosen.unscale([optimizer])
    chosen.step([])
    assert chosen.state()["loss_scale"] == 4
    assert torch.equal(p.detach(), torch.ones(2))


@pytest.mark.parametrize(("chosen", "step"), [(FP32, 1), (BF16, 1), ("fp16", 4)])
def test_overflows_without_end_stop_the_training(corpus, chosen, step):
    """In fp16 when the scale, 4 at first, has fallen below 1."""
    model = small_gpt(corpus)
    spoil(model.blocks[0].mlp.up_proj.weight, tuple(range(1, 10)))
    if chosen == "fp16":
        chosen = float16(4.0)
    place = "the gradient of blocks.0.mlp.up_proj.weight"
    with pytest.raises(TrainingStopped, match=f"step {step}: a gradient is not finite; it began in {place}"):
        Trainer(model, corpus, QUICK, precision=chosen).fit()


def test_what_overflows_in_fp16_alone_is_named(corpus):
    model = small_gpt(corpus)
    model.blocks[1].mlp.down_proj.weight.data.fill_(7e4)  # fp16 ends at 65504
    message = "the loss is nan; it began in the output of blocks.1.mlp.down_proj"
    with pytest.raises(TrainingStopped, match=message):
        Trainer(model, corpus, QUICK, precision=float16(1.0)).fit()


@pytest.mark.slow
def test_a_resumed_fp16_run_equals_one_that_was_left_alone(corpus, tmp_path):
    config = replace(QUICK, steps=12, checkpoint_every=5)

    def make(name: str) -> Trainer:
        chosen = float16(2.0**20, growth_interval=3)
        return Trainer(small_gpt(corpus), corpus, config, checkpoints=tmp_path / name, precision=chosen)

    def rows_after_step_5(trainer: Trainer) -> list[dict]:
        return [timeless(row) for row in trainer.history if row["step"] > 5]

    uninterrupted = make("uninterrupted")
    uninterrupted.fit()
    begun = make("begun")
    save = begun._save

    def save_and_die() -> None:
        save()
        raise KeyboardInterrupt

    begun._save = save_and_die
    with pytest.raises(KeyboardInterrupt):
        begun.fit()
    resumed = make("begun")
    resumed.fit(resume=True)
    assert rows_after_step_5(resumed) == rows_after_step_5(uninterrupted)
    assert all_equal(weights(uninterrupted.model), weights(resumed.model))
    scales = [row["loss_scale"] for row in training_rows(uninterrupted)]
    # It fell before the checkpoint, and has grown since.
    assert scales[0] > scales[4]
    assert scales[-1] > min(scales)
    with pytest.raises(ValueError, match="dtype=torch.float16 then, torch.float32 now"):
        Trainer(small_gpt(corpus), corpus, config, checkpoints=tmp_path / "begun").fit(resume=True)


@pytest.mark.parametrize(
    ("flags", "expected", "words"),
    [
        ("fpu avx2 avx512f", False, "names neither avx512_bf16 nor amx_bf16"),
        ("fpu avx512f avx512_bf16 sse", True, "names avx512_bf16"),
        ("amx_tile amx_bf16 avx512_bf16", True, "names amx_bf16, avx512_bf16"),
        ("fp asimd i8mm bf16", True, "names bf16"),
    ],
)
def test_a_cpu_on_linux_says_whether_it_has_bf16_units(monkeypatch, tmp_path, flags, expected, words):
    (tmp_path / "cpuinfo").write_text(f"model name : X\nflags : {flags}\n")
    monkeypatch.setattr(formats, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(formats.platform, "system", lambda: "Linux")
    has_units, sentence = bf16_units()
    assert has_units == expected
    assert words in sentence
    assert ("costs time" in sentence) != expected


@pytest.mark.parametrize(("speed", "expected"), [(0.3, False), (1.0, False), (1.9, True)])
def test_elsewhere_bf16_units_are_found_by_measuring(monkeypatch, speed, expected):
    def pretended_peak(device, dtype=torch.float32):
        return 1e9 * speed if dtype == torch.bfloat16 else 1e9

    monkeypatch.setattr(formats.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(formats, "matmul_peak", pretended_peak)
    has_units, sentence = bf16_units()
    assert has_units == expected
    assert f"{speed:.2f} × the speed of fp32" in sentence


# ---- what needs a card


@pytest.mark.parametrize(
    ("name", "capability", "hip", "has_it"),
    [
        ("tf32", (7, 5), None, False),
        ("tf32", (8, 0), None, True),
        ("fp8", (8, 6), None, False),
        ("fp8", (8, 9), None, True),
        ("fp8", (12, 0), None, True),
        ("fp8", (9, 4), "6.2", False),  # AMD's numbers are others
        ("bf16", (7, 5), None, True),
    ],
)
def test_which_cards_have_a_format(monkeypatch, name, capability, hip, has_it):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    needed = needed_card(name, "cuda")
    assert (needed is None) == has_it
    assert has_it or needed.startswith("needs an NVIDIA card of compute capability 8.")


def test_tf32_is_asked_for_in_forward_and_backward_alone(corpus):
    """On a CPU it changes nothing, so that the switch is all there is to see."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    seen = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(settings.fp32_precision)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(settings.fp32_precision)
            return grad

    models = [small_gpt(corpus), small_gpt(corpus)]
    models[1].norm.register_forward_hook(lambda module, args, out: Watch.apply(out))
    for model, chosen in zip(models, (FP32, TF32())):
        Trainer(model, corpus, replace(QUICK, steps=1, eval_every=250), precision=chosen).fit()
    assert "tf32" in seen[0]
    assert "tf32" in seen[1]
    assert settings.fp32_precision == before
    assert all_equal(weights(models[0]), weights(models[1]))


def test_fp8_trains_nearly_as_fp32_does(corpus):
    """On a CPU, in torch's slow product of fp8 matrices."""
    runs = []
    for chosen in (FP32, Float8()):
        trainer = Trainer(small_gpt(corpus), corpus, replace(QUICK, steps=20), precision=chosen)
        trainer.fit()
        runs.append(trainer)
    exact, rough = (t.summary() for t in runs)
    assert rough["first_loss"] == pytest.approx(exact["first_loss"], abs=0.01)
    assert rough["val_loss"] == pytest.approx(exact["val_loss"], abs=0.1)
    assert [n for n, _ in runs[0].model.named_parameters()] == [
        n for n, _ in runs[1].model.named_parameters()
    ]
    assert all(p.dtype == torch.float32 for p in runs[1].model.parameters())
