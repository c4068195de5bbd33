"""shared/training/precision.py: fp16 against the recipe of torch's documentation, memory against torch's own
tracker, tricks against what is really called.
"""

import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.autograd import DeviceType
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from shared.data.corpus import Corpus, batches
from shared.evaluation import cross_entropy
from shared.models.gpt import GPT, GPTConfig
from shared.tokenizers import CharTokenizer
from shared.training import TrainConfig, Trainer, lr_at, tricks
from shared.training import precision as formats
from shared.training.distributed import Processes
from shared.training.execution import FP32, Precision
from shared.training.memory import estimate_memory, find_batch, largest_batch
from shared.training.optim import build_optimizers
from shared.training.precision import Float16, bf16_units, precision
from shared.training.profiling import in_own_process, saved_bytes
from shared.training.trainer import TrainingStopped
from shared.training.tricks import (
    KINDS,
    LADDER,
    PRECISIONS,
    USUAL,
    Tricks,
    measure_ladder,
    profile_training,
    time_by_kind,
)

BF16 = Precision(torch.bfloat16)
QUICK = TrainConfig(
    steps=6, batch_size=4, block_size=8, lr=1e-2, grad_clip=0.1, log_every=1, eval_every=3, eval_windows=10
)


def small_gpt(corpus) -> GPT:
    torch.manual_seed(0)
    return GPT(
        GPTConfig(vocab_size=corpus.tokenizer.vocab_size, block_size=8, n_layer=2, n_head=2, n_embd=16)
    )


def float16(scale: float = 2.0**16, growth_interval: int = 2000) -> Float16:
    return Float16(scaler=GradScaler("cpu", init_scale=scale, growth_interval=growth_interval))


def random_corpus(vocab_size: int) -> Corpus:
    tokens = np.random.default_rng(0).integers(vocab_size, size=5000).astype(np.uint16)
    return Corpus(
        "random", CharTokenizer.train("".join(chr(0x10000 + i) for i in range(vocab_size))), tokens, tokens
    )


def spoil(parameter: nn.Parameter, steps: tuple[int, ...], value: float = math.inf) -> None:
    """In these backwards, counted from 1, one number of the parameter's gradient is `value`."""
    seen = []

    def hook(grad: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        return grad.index_fill(0, torch.tensor([0]), value) if len(seen) in steps else grad

    parameter.register_hook(hook)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# ---- number formats


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
        ("fp8", "cpu", "precision='fp8': must be fp32, bf16 or fp16"),
        ("fp16", "meta", "precision='fp16' does not work on meta: use fp32 there, or another device"),
        ("bf16", "meta", "precision='bf16' does not work on meta"),
    ],
)
def test_a_precision_that_does_not_exist_or_work_is_refused(name, device, message):
    with pytest.raises(ValueError, match=message):
        precision(name, device)


@pytest.mark.parametrize(("scale", "bad"), [(2.0**16, ()), (2.0**16, (3, 4)), (2.0**36, (3,))])
def test_fp16_is_the_recipe_of_torchs_documentation(corpus, scale, bad):
    """Scale, backward, unscale, clip, step, update. The scale that is too large at first has real overflows."""
    ours, theirs = small_gpt(corpus), small_gpt(corpus)
    for model in (ours, theirs):
        spoil(model.blocks[0].mlp.up_proj.weight, bad)
    config = replace(QUICK, steps=10)
    trainer = Trainer(ours, corpus, config, precision=float16(scale, growth_interval=2))
    trainer.fit()

    scaler = GradScaler("cpu", init_scale=scale, growth_interval=2)
    (optimizer,) = build_optimizers(
        theirs, "adamw", config.lr, weight_decay=config.weight_decay, betas=(config.beta1, config.beta2)
    )
    stream, scales = batches(corpus.train, 8, 4, config.seed), []
    for step in range(10):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, config)
        x, y = next(stream)
        with torch.autocast("cpu", torch.float16):
            loss = cross_entropy(theirs(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(theirs.parameters(), config.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    assert [row["loss_scale"] for row in trainer.history if "lr" in row] == scales
    assert len(set(scales)) > 3
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


def test_the_length_of_fp16s_gradients_is_that_of_fp32s(corpus):
    norms = []
    for chosen in (FP32, float16()):
        trainer = Trainer(small_gpt(corpus), corpus, QUICK, precision=chosen)
        trainer.fit()
        norms.append([row["grad_norm"] for row in trainer.history if "lr" in row])
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_step_with_an_overflow_moves_no_weight_and_the_training_goes_on(corpus, optimizer, value):
    """With two optimizers too, of which one alone has seen the overflow."""
    model = small_gpt(corpus)
    spoil(model.blocks[1].mlp.up_proj.weight, (2,), value)
    trainer = Trainer(model, corpus, replace(QUICK, optimizer=optimizer), precision=float16())
    seen, step = [weights(model)], trainer.precision.step
    object.__setattr__(
        trainer.precision, "step", lambda optimizers: (step(optimizers), seen.append(weights(model)))
    )
    trainer.fit()
    moved = [
        any(not torch.equal(a, b) for a, b in zip(before, after)) for before, after in zip(seen, seen[1:])
    ]
    assert moved == [True, False, True, True, True, True]
    rows = [row for row in trainer.history if "lr" in row]
    assert [row["loss_scale"] for row in rows] == [2.0**16] + 5 * [2.0**15]
    assert [row["steps_since_skip"] for row in rows] == [1, 0, 1, 2, 3, 4]
    assert all(math.isfinite(v) for row in trainer.history for v in row.values())  # JSON has no inf


def test_a_loss_that_overflows_is_skipped_too(corpus):
    model, calls = small_gpt(corpus), []
    model.lm_head.register_forward_hook(
        lambda m, args, out: (calls.append(1), out * math.inf if len(calls) == 2 else out)[1]
    )
    trainer = Trainer(model, corpus, QUICK, precision=float16())
    trainer.fit()
    rows = [row for row in trainer.history if "lr" in row]
    assert [row["loss_scale"] for row in rows] == [2.0**16] + 5 * [2.0**15]
    assert ["train_loss" in row for row in rows] == [True, False, True, True, True, True]


def test_a_step_left_out_halves_the_scale_though_no_gradient_overflowed():
    chosen, p = float16(scale=8.0), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=1.0)
    chosen.backward(p.sum())
    chosen.unscale([optimizer])
    chosen.step([])
    assert chosen.state()["loss_scale"] == 4 and torch.equal(p.detach(), torch.ones(2))


@pytest.mark.parametrize(("chosen", "step"), [(FP32, 1), (BF16, 1), ("fp16", 4)])
def test_overflows_without_end_stop_the_training(corpus, chosen, step):
    """In fp16 when the scale, 4 at first, has fallen below 1."""
    model = small_gpt(corpus)
    spoil(model.blocks[0].mlp.up_proj.weight, tuple(range(1, 10)))
    with pytest.raises(
        TrainingStopped,
        match=(
            f"step {step}: a gradient is not finite; it began in the gradient of blocks.0.mlp.up_proj.weight"
        ),
    ):
        Trainer(model, corpus, QUICK, precision=float16(4.0) if chosen == "fp16" else chosen).fit()


def test_what_overflows_in_fp16_alone_is_named(corpus):
    model = small_gpt(corpus)
    model.blocks[1].mlp.down_proj.weight.data.fill_(7e4)  # fp16 ends at 65504
    with pytest.raises(
        TrainingStopped, match="the loss is nan; it began in the output of blocks.1.mlp.down_proj"
    ):
        Trainer(model, corpus, QUICK, precision=float16(1.0)).fit()


def test_a_resumed_fp16_run_equals_one_that_was_left_alone(corpus, tmp_path):
    config = replace(QUICK, steps=12, checkpoint_every=5)

    def make(name: str) -> Trainer:
        return Trainer(
            small_gpt(corpus),
            corpus,
            config,
            checkpoints=tmp_path / name,
            precision=float16(2.0**20, growth_interval=3),
        )

    whole, begun = make("whole"), make("begun")
    whole.fit()
    save = begun._save

    def save_and_die(name: str) -> None:
        save(name)
        if name == "last":
            raise KeyboardInterrupt

    begun._save = save_and_die
    with pytest.raises(KeyboardInterrupt):
        begun.fit()
    resumed = make("begun")
    resumed.fit(resume=True)
    without_time = lambda rows: [
        {k: v for k, v in row.items() if k != "seconds"} for row in rows if row["step"] > 5
    ]
    assert without_time(resumed.history) == without_time(whole.history)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters()))
    scales = [row["loss_scale"] for row in whole.history if "lr" in row]
    assert scales[0] > scales[4] and scales[-1] > min(
        scales
    )  # it fell before the checkpoint, and has grown since
    with pytest.raises(ValueError, match="dtype=torch.float16 then, torch.float32 now"):
        Trainer(small_gpt(corpus), corpus, config, checkpoints=tmp_path / "begun").fit(resume=True)


@pytest.mark.parametrize(
    ("flags", "found", "said"),
    [
        ("fpu avx2 avx512f", False, "names neither avx512_bf16 nor amx_bf16"),
        ("fpu avx512f avx512_bf16 sse", True, "names avx512_bf16"),
        ("amx_tile amx_bf16 avx512_bf16", True, "names amx_bf16, avx512_bf16"),
        ("fp asimd i8mm bf16", True, "names bf16"),
    ],
)
def test_a_cpu_on_linux_says_whether_it_has_bf16_units(monkeypatch, tmp_path, flags, found, said):
    (tmp_path / "cpuinfo").write_text(f"model name : X\nflags : {flags}\n")
    monkeypatch.setattr(formats, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(formats.platform, "system", lambda: "Linux")
    has, sentence = bf16_units()
    assert has == found and said in sentence and ("costs time" in sentence) != found


@pytest.mark.parametrize(("speed", "found"), [(0.3, False), (1.0, False), (1.9, True)])
def test_elsewhere_bf16_units_are_found_by_measuring(monkeypatch, speed, found):
    monkeypatch.setattr(formats.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(
        tricks,
        "matmul_peak",
        lambda device, dtype=torch.float32: 1e9 * (speed if dtype == torch.bfloat16 else 1),
    )
    has, sentence = bf16_units()
    assert has == found and f"{speed:.2f} × the speed of fp32" in sentence


# ---- memory

NANO = GPTConfig.preset("nano")
WIDE = GPTConfig(vocab_size=2000, block_size=64, n_layer=3, n_head=4, n_embd=128)
MODERN = GPTConfig.preset("mini", vocab_size=300, n_embd=64)
GROUPED = GPTConfig(
    vocab_size=1000,
    block_size=128,
    n_layer=3,
    n_head=4,
    n_kv_head=2,
    n_embd=96,
    mlp="relu2",
    tie_weights=False,
)
CELLS = [  # config, batch, time, dtype, recompute, optimizer, grad_accum_steps
    (NANO, 12, 64, torch.float32, False, "adamw", 1),
    (NANO, 12, 64, torch.bfloat16, False, "adamw", 1),
    (NANO, 12, 64, torch.float32, True, "adamw", 1),
    (NANO, 1, 8, torch.float32, False, "muon", 1),
    (NANO, 4, 32, torch.bfloat16, True, "muon", 2),
    (WIDE, 1, 16, torch.float32, False, "adamw", 1),
    (WIDE, 8, 64, torch.float32, False, "muon", 1),
    (WIDE, 8, 64, torch.bfloat16, True, "adamw", 1),
    (replace(WIDE, tie_weights=False), 1, 16, torch.bfloat16, False, "adamw", 1),
    (replace(WIDE, tie_weights=False, mlp="swiglu"), 4, 64, torch.float32, True, "adamw", 1),
    (MODERN, 8, 128, torch.float32, False, "adamw", 1),
    (MODERN, 8, 128, torch.bfloat16, False, "muon", 1),
    (MODERN, 4, 128, torch.float32, True, "muon", 1),
    (MODERN, 2, 64, torch.bfloat16, True, "adamw", 2),
    (GROUPED, 4, 128, torch.float32, False, "adamw", 2),
    (GROUPED, 8, 100, torch.bfloat16, False, "adamw", 1),
    (GROUPED, 8, 100, torch.float32, True, "muon", 1),
]


@pytest.mark.parametrize(("config", "batch", "time", "dtype", "recompute", "optimizer", "accumulate"), CELLS)
def test_the_estimated_memory_is_what_a_step_takes(
    config, batch, time, dtype, recompute, optimizer, accumulate
):
    train = TrainConfig(
        steps=2, batch_size=batch, block_size=time, optimizer=optimizer, grad_accum_steps=accumulate
    )
    tracker, chosen = MemTracker(), Precision(dtype)

    class Tracked(Processes):
        @contextmanager
        def accumulating(self, call):  # the tracker knows one forward of a module at a time
            yield
            tracker.reset_mod_stats()

    trainer = Trainer(
        GPT(config),
        random_corpus(config.vocab_size),
        train,
        precision=chosen,
        processes=Tracked(recompute=recompute),
    )
    trainer.model.train()
    stream = trainer.task.batches(train, 0, 0, 1)
    trainer.train_step(stream)
    tracker.track_external(trainer.model, *trainer.optimizers)
    with tracker:
        trainer.train_step(stream)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    found = estimate_memory(config, train, dtype, recompute)
    assert found.peak == pytest.approx(peak, rel=0.1)
    state = sum(t.nbytes for o in trainer.optimizers for s in o.state.values() for t in s.values())
    assert found.optimizer == pytest.approx(state, rel=1e-3)

    x, y = next(stream)
    with chosen.autocast(torch.device("cpu")):
        if not recompute:
            assert found.activations == pytest.approx(
                saved_bytes(trainer.model, lambda: cross_entropy(trainer.model(x), y)), rel=0.1
            )
        cross_entropy(trainer.model(x), y).backward()
    assert found.parameters == sum(p.nbytes for p in trainer.model.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in trainer.model.parameters())


@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"window": 8}])
def test_what_the_estimate_does_not_know_is_refused(changes):
    with pytest.raises(ValueError, match="the estimate knows neither"):
        estimate_memory(replace(NANO, **changes), QUICK)


# ---- the ladder

TINY = GPTConfig(vocab_size=20, block_size=16, n_layer=1, n_head=2, n_embd=16)
TRAIN = TrainConfig(steps=3, batch_size=2, block_size=16)


class Calls(TorchDispatchMode):
    """The names of the operations that are carried out."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name().split("::")[1].split(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.fixture
def here(monkeypatch):
    """What else has a process of its own is done in this one; gives the operations of each."""
    calls = []

    def call(function, *args):
        with Calls() as mode:
            calls.append(mode.names)
            return function(*args)

    monkeypatch.setattr(tricks, "in_own_process", call)
    monkeypatch.setattr(
        tricks,
        "matmul_peak",
        lambda device, dtype: {torch.float32: 1e9, torch.bfloat16: 1e8, torch.float16: 1e8}[dtype],
    )
    return calls


@pytest.mark.parametrize("units", [True, False])
def test_each_step_of_the_ladder_does_what_it_says(here, monkeypatch, units):
    monkeypatch.setattr(tricks, "bf16_units", lambda device: (units, "why"))
    ladder = [rung for rung in LADDER if rung[0] != "compile"]
    rows = measure_ladder(TINY, TRAIN, seeds=(1, 2), ladder=ladder)
    assert [row["step"] for row in rows] == [
        "eager fp32",
        "SDPA",
        "bf16",
        "fused AdamW",
        "larger batch",
        "gradient checkpointing",
    ]
    sdpa, narrow, fused = ("_scaled_dot_product_flash_attention_for_cpu", "_to_copy", "_fused_adamw_")
    assert [sdpa in names for names in here] == [False] + 5 * [True]
    assert [fused in names for names in here] == 3 * [False] + 3 * [True]
    assert narrow in here[2] and (narrow in here[3]) == units  # autocast goes on where there are units for it
    assert [row["note"] for row in rows] == [
        None,
        None,
        None if units else "left out below: why",
        None,
        None,
        None,
    ]
    for row in rows:
        assert row["tokens/s"] == pytest.approx(
            1000 / row["ms"] * 32 * (4 if row["step"] in ("larger batch", "gradient checkpointing") else 1)
        )
        assert row["MFU"] > 0 and row["spread"] > 0
    assert rows[1]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5)
    assert rows[2]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-2)
    assert rows[3]["loss"] == pytest.approx(rows[2 if units else 1]["loss"], rel=1e-5)
    assert rows[5]["loss"] == rows[4]["loss"]


def test_the_spread_is_that_of_the_seeds(here):
    one, two, both = (
        measure_ladder(TINY, TRAIN, seeds=seeds, ladder=LADDER[:1])[0] for seeds in ((1,), (2,), (1, 2))
    )
    assert one["spread"] == two["spread"] == 0
    assert both["loss"] == pytest.approx((one["loss"] + two["loss"]) / 2) and both["spread"] == pytest.approx(
        abs(one["loss"] - two["loss"])
    )


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
        ("fused", {"fused": True}),
    ]
    plain, compiled, fp8, fused = measure_ladder(TINY, TRAIN, seeds=(1,), ladder=ladder)
    assert compiled == {
        "step": "compile",
        "note": "not measured, and left out below: torch.compile does not work here (no C++ compiler)",
    }
    assert fp8 == {
        "step": "fp8",
        "note": "not measured, and left out below: precision='fp8': must be fp32, bf16 or fp16",
    }
    assert fused["loss"] == pytest.approx(plain["loss"], rel=1e-5)


def out_of_memory(*args) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_step_that_is_out_of_memory_is_said(monkeypatch):
    monkeypatch.setattr(tricks, "measure", out_of_memory)  # really in a process of its own
    rows = measure_ladder(TINY, TRAIN, ladder=[("larger batch", {"batch": 4})])
    assert rows == [
        {"step": "larger batch", "note": "not measured, and left out below: out of memory with batch_size=8"}
    ]


def test_a_process_of_its_own_gives_the_same_losses(here):
    (row,) = measure_ladder(TINY, TRAIN, seeds=(1,), ladder=PRECISIONS[:1])
    costs, held = in_own_process(tricks.measure, USUAL, TINY, TRAIN, torch.device("cpu"), (1,), None)
    assert row["loss"] == costs[0].losses[-1] and 0 < held < 2**30


def test_peaks_that_are_given_are_not_measured_again(here, monkeypatch):
    monkeypatch.setattr(tricks, "matmul_peak", None)
    (row,) = measure_ladder(TINY, TRAIN, seeds=(1,), ladder=PRECISIONS[:1], peaks={torch.float32: 1e12})
    with torch.device("meta"):
        flops = GPT(TINY).flops_per_token(TRAIN.block_size)
    assert row["MFU"] == pytest.approx(row["tokens/s"] * flops / 1e12)
    assert row["first loss"] == pytest.approx(math.log(TINY.vocab_size), abs=0.1)


# ---- where the time of a step goes

KIND_OF = {  # what an operation is when it is done on its own
    "matrix products": lambda x: x @ x.T,
    "attention": lambda x: nn.functional.scaled_dot_product_attention(
        x[None, None], x[None, None], x[None, None]
    ),
    "loss": lambda x: nn.functional.cross_entropy(x, torch.arange(len(x))),
    "norms": lambda x: nn.functional.rms_norm(x, x.shape[-1:]),
    "copies and casts": lambda x: x.bfloat16(),
    "activation and other elementwise": lambda x: nn.functional.silu(x),
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
    found = time_by_kind(profiler.events())
    assert (
        next(k for k in found if k != "other") == kind
    )  # "other" is the autograd engine, which takes as long as a small operation
    assert sum(found.values()) == pytest.approx(
        sum(event.self_cpu_time_total for event in profiler.events()) / 1000
    )


def test_the_optimizers_operations_are_the_optimizers():
    x = nn.Parameter(torch.randn(300, 300))
    x.grad = torch.ones_like(x)
    for fused in (True, False):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            torch.optim.AdamW([x], fused=fused).step()
        assert next(iter(time_by_kind(profiler.events()))) == "optimizer and clipping"


def test_on_a_gpu_the_time_is_that_of_the_kernels_each_counted_once():
    def event(name, parent=None, node=-1, device=DeviceType.CPU, cuda=0, cpu=0):
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


@pytest.mark.parametrize(
    "tricks", [USUAL, Tricks("bf16"), Tricks("fp16", sdpa=True, recompute=True, batch=2)]
)
def test_a_profile_has_the_whole_step(tricks):
    rows = profile_training(TINY, replace(TRAIN, steps=6), random_corpus(TINY.vocab_size), tricks=tricks)
    kinds = [row["kind"] for row in rows]
    assert (
        {"matrix products", "norms", "loss", "optimizer and clipping"}
        <= set(kinds)
        <= {*KINDS, "other", "between operations"}
    )
    assert kinds[-1] == "between operations" and "attention" in kinds
    assert all(row["ms"] >= 0 for row in rows) and sum(row["share"] for row in rows) == pytest.approx(1)
    assert rows[:-1] == sorted(rows[:-1], key=lambda row: -row["ms"])


def test_a_profile_of_too_few_steps_or_of_what_cannot_be_done_is_refused():
    corpus = random_corpus(TINY.vocab_size)
    with pytest.raises(ValueError, match="steps=3: a profile needs at least 4"):
        profile_training(TINY, TRAIN, corpus)
    with pytest.raises(ValueError, match="precision='fp8': must be"):
        profile_training(TINY, replace(TRAIN, steps=4), corpus, tricks=Tricks("fp8"))


# ---- the batch size


@pytest.mark.parametrize("limit", [1, 5, 64, 1000])
@pytest.mark.parametrize("most", [1, 2, 3, 31, 32, 33, 500, 5000])
def test_the_largest_batch_is_found_in_few_tries(most, limit):
    tried = []
    assert largest_batch(lambda batch: tried.append(batch) or batch <= most, limit) == min(most, limit)
    assert max(tried) <= limit and len(tried) == len(set(tried)) <= 2 * math.log2(2 * min(most, limit)) + 2


def test_a_model_of_which_not_one_sequence_fits_is_refused():
    with pytest.raises(ValueError, match="not even a batch of one sequence fits"):
        find_batch(TINY, TRAIN, memory=1000)


def test_on_a_cpu_the_batch_is_the_largest_whose_estimate_is_within_the_limit(here):
    estimate = lambda batch: estimate_memory(TINY, replace(TRAIN, batch_size=batch)).peak
    largest, fastest, rows = find_batch(TINY, TRAIN, memory=estimate(6) + 10)
    assert largest == 6 and [row["batch_size"] for row in rows] == [1, 2, 4, 6]
    assert [row["estimate"] for row in rows] == [estimate(batch) for batch in (1, 2, 4, 6)]
    assert fastest == max(rows, key=lambda row: row["tokens/s"])["batch_size"]


def test_a_cpu_needs_to_be_told_how_much_memory():
    with pytest.raises(ValueError, match="find_batch on cpu needs memory=, in bytes"):
        find_batch(TINY, TRAIN)


@pytest.mark.parametrize(("memory", "largest"), [(None, 11), (700, 7)])
def test_on_cuda_the_batch_is_found_by_trying(here, monkeypatch, memory, largest):
    def pretend(tricks, config, train, device, seeds, corpus):
        if train.batch_size > 11:
            out_of_memory()
        cost = memory.StepCost(1.0, 1000 - abs(train.batch_size - 4), 1.0, 0, 0, [1.0])
        return [cost], 100 * train.batch_size

    monkeypatch.setattr(memory, "measure", pretend)
    monkeypatch.setattr(memory, "precision", lambda name, device: FP32)
    found, fastest, rows = find_batch(TINY, TRAIN, "cuda", memory, Tricks())
    assert (found, fastest) == (largest, 4) and rows[-1]["memory"] == 100 * largest
