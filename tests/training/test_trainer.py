"""shared/training/trainer.py: schedules against transformers', accumulation against the large batch, and a
killed and resumed run against one that was left alone.
"""

import copy
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from shared import checkpoint
from shared.data.corpus import Corpus, batches
from shared.evaluation import evaluate
from shared.models.bigram import BigramConfig, BigramModel
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import RunLog, read_jsonl
from shared.training import TrainConfig, Trainer, lr_at
from shared.training.trainer import TrainingStopped
from tests.helpers import synthetic_text

QUICK = TrainConfig(
    steps=6,
    batch_size=4,
    block_size=8,
    lr=1e-2,
    log_every=1,
    eval_every=3,
    eval_windows=10,
    checkpoint_every=2,
)


def small_gpt(corpus, **changes) -> GPT:
    torch.manual_seed(0)
    return GPT(
        GPTConfig(
            **(
                dict(vocab_size=corpus.tokenizer.vocab_size, block_size=8, n_layer=2, n_head=2, n_embd=16)
                | changes
            )
        )
    )


# ---- schedules


def theirs(make, steps: int, **options) -> list[float]:
    """The learning rates of one of transformers' schedules, peak 1, at steps 0 … steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make(optimizer, **options)
    rates = []
    for _ in range(steps + 1):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize(
    ("schedule", "final_lr", "make", "options"),
    [
        ("cosine", 0.0, get_cosine_schedule_with_warmup, dict(num_training_steps=50)),
        (
            "cosine",
            0.1,
            get_cosine_with_min_lr_schedule_with_warmup,
            dict(num_training_steps=50, min_lr_rate=0.1),
        ),
        ("linear", 0.0, get_linear_schedule_with_warmup, dict(num_training_steps=50)),
        ("wsd", 0.0, get_wsd_schedule, dict(num_training_steps=50, num_decay_steps=10, decay_type="linear")),
        (
            "wsd",
            0.2,
            get_wsd_schedule,
            dict(num_training_steps=50, num_decay_steps=10, decay_type="linear", min_lr_ratio=0.2),
        ),
    ],
)
def test_the_learning_rate_equals_transformers(schedule, final_lr, make, options, warmup):
    config = TrainConfig(
        steps=50, lr=1.0, schedule=schedule, final_lr=final_lr, warmup_steps=warmup, decay_fraction=0.2
    )
    expected = theirs(make, 50, num_warmup_steps=warmup, **options)
    assert [lr_at(s, config) for s in range(warmup, 51)] == pytest.approx(expected[warmup:], abs=1e-9)
    # In the warmup ours is a step ahead: a first step with learning rate 0 would be a step for nothing.
    if final_lr == 0:
        assert [lr_at(s, config) for s in range(warmup)] == pytest.approx(expected[1 : warmup + 1], abs=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 20])
def test_every_schedule_climbs_to_the_peak_and_ends_where_it_should(schedule, warmup):
    config = TrainConfig(steps=20, lr=3e-4, schedule=schedule, warmup_steps=warmup, final_lr=0.25)
    rates = [lr_at(s, config) for s in range(21)]
    assert max(rates) == pytest.approx(3e-4) and min(rates) > 0
    if warmup:
        assert rates[:warmup] == pytest.approx([3e-4 * (s + 1) / warmup for s in range(warmup)])
    if warmup < 20:
        assert rates[20] == pytest.approx(3e-4 if schedule == "constant" else 3e-4 * 0.25)
        assert all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1 :]))
    assert lr_at(1000, config) == pytest.approx(3e-4 if schedule == "constant" else 3e-4 * 0.25)  # no further


def test_each_optimizer_follows_the_curve_from_its_own_peak(corpus):
    config = replace(QUICK, optimizer="muon", muon_lr=0.05, warmup_steps=2, steps=5)
    trainer = Trainer(small_gpt(corpus), corpus, config)
    seen = []
    for optimizer in trainer.optimizers:
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(o.param_groups[0]["lr"]))
    trainer.fit()
    for step in range(5):
        assert seen[2 * step] == pytest.approx(lr_at(step, config))
        assert seen[2 * step + 1] == pytest.approx(lr_at(step, config) * 0.05 / config.lr)


def test_muon_gets_its_momentum_and_its_decay_from_the_settings(corpus):
    config = replace(QUICK, optimizer="muon", muon_momentum=0.8, muon_lr=0.03, weight_decay=0.2)
    group = Trainer(small_gpt(corpus), corpus, config).optimizers[1].param_groups[0]
    assert (group["momentum"], group["lr"], group["weight_decay"]) == (0.8, 0.03, 0.2)


# ---- what a step does


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulated_gradients_equal_those_of_the_large_batch(corpus, accumulate, optimizer):
    """The same windows in pieces: in float64, so that what differs is the arithmetic and not the rounding."""
    config = replace(QUICK, batch_size=8, optimizer=optimizer)
    large = Trainer(small_gpt(corpus).double(), corpus, config)
    pieces = Trainer(
        small_gpt(corpus).double(),
        corpus,
        replace(config, batch_size=8 // accumulate, grad_accum_steps=accumulate),
    )
    large.fit(), pieces.fit()
    for a, b in zip(large.history, pieces.history):
        assert {k: v for k, v in a.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in b.items() if k != "seconds"}, rel=1e-6
        )
    for (n, a), b in zip(large.model.named_parameters(), pieces.model.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6, msg=lambda m, n=n: f"{n}: {m}")


def test_a_training_equals_the_loop_written_out(corpus):
    """Ten lines of plain PyTorch on the same windows give the same weights."""
    trainer = Trainer(small_gpt(corpus).double(), corpus, replace(QUICK, grad_clip=0.5, warmup_steps=3))
    trainer.fit()
    model = small_gpt(corpus).double()
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.99),
        fused=True,
    )
    for step, (x, y) in zip(range(6), batches(corpus.train, 8, 4, seed=1337)):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, trainer.config)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x).transpose(1, 2), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    for a, b in zip(trainer.model.parameters(), model.parameters()):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


def test_the_loss_falls_below_what_counting_single_characters_reaches(corpus):
    trainer = Trainer(
        small_gpt(corpus), corpus, replace(QUICK, steps=150, batch_size=16, eval_every=150, eval_windows=None)
    )
    summary = trainer.fit()
    counts = torch.bincount(torch.from_numpy(corpus.train.astype("int64"))).double()
    entropy = -(counts / counts.sum() * (counts / counts.sum()).log()).sum().item()
    assert summary["first_loss"] == pytest.approx(math.log(corpus.tokenizer.vocab_size), abs=0.05)
    assert summary["val_loss"] < entropy - 0.3


def test_clipping_shortens_the_gradient_and_zero_leaves_it(corpus):
    seen = {}
    for clip in (0.0, 1e-3):
        trainer = Trainer(small_gpt(corpus), corpus, replace(QUICK, steps=1, grad_clip=clip))

        def measure(optimizer, args, kwargs, clip=clip):
            seen[clip] = math.sqrt(
                sum(p.grad.square().sum().item() for g in optimizer.param_groups for p in g["params"])
            )

        trainer.optimizers[0].register_step_pre_hook(measure)
        trainer.fit()
        assert trainer.history[0]["grad_norm"] > 0.1  # what is logged is the length before
    assert seen[1e-3] <= 1.001e-3 and seen[0.0] > 0.1


def test_the_update_ratio_is_the_updates_std_over_the_weights(corpus):
    trainer = Trainer(small_gpt(corpus), corpus, replace(QUICK, steps=1, log_updates=True))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.fit()
    row = trainer.history[0]
    for n, p in trainer.model.named_parameters():
        if p.dim() >= 2:
            assert row[f"update/{n}"] == pytest.approx(
                math.log10((p.detach() - before[n]).std() / before[n].std()), abs=1e-4
            )
    assert sum(k.startswith("update/") for k in row) == sum(p.dim() >= 2 for p in trainer.model.parameters())


def test_any_model_of_the_course_can_be_trained(corpus):
    summary = Trainer(
        BigramModel(BigramConfig(corpus.tokenizer.vocab_size)),
        corpus,
        replace(QUICK, optimizer="muon", steps=40, lr=0.1),
    ).fit()
    assert (
        summary["val_loss"] < summary["first_loss"] - 0.2
        and summary["parameters"] == corpus.tokenizer.vocab_size**2
    )


def test_rows_come_when_the_settings_say(corpus):
    trainer = Trainer(small_gpt(corpus), corpus, replace(QUICK, steps=11, log_every=4, eval_every=5))
    trainer.fit()
    assert [row["step"] for row in trainer.history if "train_loss" in row] == [1, 4, 8]
    assert [row["step"] for row in trainer.history if "val_loss" in row] == [5, 10, 11]


def test_training_with_a_seed_is_repeatable_and_leaves_eval_mode_out_of_it(corpus):
    runs = []
    for seed in (1, 1, 2):
        trainer = Trainer(small_gpt(corpus, dropout=0.2), corpus, replace(QUICK, seed=seed))
        trainer.fit()
        runs.append(torch.cat([p.flatten() for p in trainer.model.parameters()]))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


# ---- the best checkpoint


def test_the_best_checkpoint_has_the_lowest_validation_loss_and_is_not_just_the_last(corpus, tmp_path):
    config = replace(
        QUICK, steps=12, lr=0.3, schedule="constant", eval_every=1
    )  # far too high: the loss jumps up and down
    trainer = Trainer(small_gpt(corpus), corpus, config, checkpoints=tmp_path / "c")
    summary = trainer.fit()
    losses = {row["step"]: row["val_loss"] for row in trainer.history if "val_loss" in row}
    best = min(losses, key=losses.get)
    assert len(losses) == 12 and 1 < best < 12
    assert (
        summary["best_step"] == best
        and summary["best_val_loss"] == losses[best]
        and summary["val_loss"] == losses[12]
    )
    for name, step in (("best", best), ("last", 12)):
        loaded = checkpoint.load(tmp_path / "c" / name)
        again = evaluate(loaded.model, corpus.val, 8, corpus.token_bytes, max_windows=10)
        assert again.loss == losses[step] == loaded.metrics["val_loss"]


def test_without_a_folder_nothing_is_kept(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(p for p in tmp_path.rglob("*"))
    Trainer(small_gpt(corpus), corpus, QUICK).fit()
    assert sorted(p for p in tmp_path.rglob("*")) == before


# ---- killed, interrupted, resumed

CASES = {}
for n in range(1, 16):
    CASES[f"adamw, killed {('before', 'half way through', 'after')[n % 3]} line {n}"] = (
        "adamw",
        ["log", n, ("before", "torn", "after")[n % 3]],
    )
for n in range(1, 13):
    CASES[f"adamw, killed before rename {n}"] = ("adamw", ["rename", n, "before"])
CASES["adamw, killed after the last rename"] = ("adamw", ["rename", 12, "after"])
for n in (2, 5, 8):
    CASES[f"adamw, killed before tensors are written for the {n}th time"] = ("adamw", ["write", n])
for n in (1, 5, 12):
    CASES[f"adamw, killed in the update of step {n}"] = ("adamw", ["update", n])
    CASES[f"muon, killed between the two optimizers' updates in step {n}"] = ("muon", ["update", n])
CASES["muon, killed half way through line 7"] = ("muon", ["log", 7, "torn"])
CASES["muon, killed before rename 5"] = ("muon", ["rename", 5, "before"])
for name, number in (("Ctrl-C", signal.SIGINT), ("SIGTERM", signal.SIGTERM)):
    CASES[f"adamw, {name} in step 5"] = ("adamw", ["signal", 6, int(number), 1])
CASES["muon, Ctrl-C in step 2"] = ("muon", ["signal", 2, int(signal.SIGINT), 1])
CASES["adamw, Ctrl-C in the last step"] = ("adamw", ["signal", 15, int(signal.SIGINT), 1])
CASES["adamw, Ctrl-C twice in step 5"] = ("adamw", ["signal", 6, int(signal.SIGINT), 2])


@pytest.fixture(scope="module")
def fates(tmp_path_factory):
    """Every case run, killed and resumed, and each optimizer's run that nobody disturbed: folder, first exit
    code, second exit code.
    """
    root = tmp_path_factory.mktemp("fates")
    text = root / "text.txt"
    text.write_text(synthetic_text(), encoding="utf-8")
    jobs, names = [], []

    def add(name: str, optimizer: str, *deaths) -> None:
        for i, die in enumerate(deaths):
            names.append(name)
            jobs.append({"folder": str(root / name), "optimizer": optimizer, "resume": i > 0, "die": die})

    for optimizer in ("adamw", "muon"):
        add(optimizer, optimizer, None)
    for name, (optimizer, die) in CASES.items():
        add(name, optimizer, die, None)
    add("thrice", "adamw", ["log", 5, "torn"], ["rename", 3, "before"], ["log", 4, "after"], None)
    for name in set(names):
        (root / name).mkdir()
    environment = os.environ | {"LLM_WEEKS_DATA": str(root / "cache"), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("train_and_die.py")
    done = subprocess.run(
        [sys.executable, script, text, json.dumps(jobs)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    codes = {name: [] for name in names}
    for name, code in zip(names, json.loads(done.stdout)):
        codes[name].append(code)
    return root, codes


def outcome(folder: Path) -> dict:
    """All that a run leaves, without what depends on the clock."""
    timeless = lambda values: {k: v for k, v in values.items() if k not in ("seconds", "tokens_per_second")}
    read = lambda path: json.loads((folder / path).read_text())
    return {
        "rows": [timeless(row) for row in read_jsonl(folder / "log" / "metrics.jsonl")],
        "summary": timeless(read("log/summary.json")),
        "state": read("log/run.json")["state"],
        "best": read("checkpoints/best/config.json"),
        "last": read("checkpoints/last/config.json"),
        "training": timeless(read("checkpoints/last/training.json")),
    }


def assert_same_outcome(folder: Path, undisturbed: Path) -> None:
    error = folder / "error.txt"
    assert not error.exists(), error.read_text()
    assert outcome(folder) == outcome(undisturbed)
    for name in ("best/model", "last/model", "last/training"):
        ours, theirs = (load_file(f / "checkpoints" / f"{name}.safetensors") for f in (folder, undisturbed))
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), f"{name}: {key}"  # bit for bit


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_died_and_was_resumed_equals_one_that_was_left_alone(fates, name):
    root, codes = fates
    optimizer, die = CASES[name]
    assert codes[optimizer] == [0]
    assert codes[name] == [130 if die[0] == "signal" else -signal.SIGKILL, 0]
    assert_same_outcome(root / name, root / optimizer)


def test_a_run_that_died_three_times_equals_one_that_was_left_alone(fates):
    root, codes = fates
    assert codes["thrice"] == [-signal.SIGKILL] * 3 + [0]
    assert_same_outcome(root / "thrice", root / "adamw")


def test_the_undisturbed_run_does_use_dropout_and_more_than_one_checkpoint(fates):
    """The comparisons above would be weak without."""
    root, _ = fates
    for optimizer in ("adamw", "muon"):
        loaded = checkpoint.load(root / optimizer / "checkpoints" / "last")
        assert loaded.model.config.dropout > 0 and loaded.state["step"] == 12
        assert len(outcome(root / optimizer)["rows"]) == 15
        assert any("momentum_buffer" in k for k in loaded.tensors) == (optimizer == "muon")


class Interrupting(RunLog):
    """Sends this process a signal when a step is logged."""

    def log(self, step, **values):
        if step == 3 and "train_loss" in values:
            os.kill(os.getpid(), signal.SIGINT)
        super().log(step, **values)


def test_ctrl_c_finishes_the_step_saves_and_says_so(corpus, tmp_path, capsys):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    config = replace(QUICK, checkpoint_every=100, eval_every=100)
    with pytest.raises(KeyboardInterrupt), Interrupting(tmp_path / "log") as log:
        Trainer(small_gpt(corpus), corpus, config, log, tmp_path / "c").fit()
    assert "finishing the step and saving" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "c" / "last").state["step"] == 3
    assert [row["step"] for row in read_jsonl(tmp_path / "log" / "metrics.jsonl")] == [1, 2, 3]
    assert json.loads((tmp_path / "log" / "run.json").read_text())["state"] == "interrupted"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_resuming_without_a_checkpoint_starts_anew_and_says_so(corpus, tmp_path, capsys):
    fresh = Trainer(small_gpt(corpus, dropout=0.2), corpus, QUICK, checkpoints=tmp_path / "a")
    fresh.fit()
    capsys.readouterr()
    with RunLog(tmp_path / "log", resume=True) as log:
        log.log(1, train_loss=99.0)  # a run that was killed before its first checkpoint
        resumed = Trainer(small_gpt(corpus, dropout=0.2), corpus, QUICK, log, checkpoints=tmp_path / "b")
        resumed.fit(resume=True)
    assert "no checkpoint to resume from, so it starts from the beginning" in capsys.readouterr().out
    for a, b in zip(fresh.model.parameters(), resumed.model.parameters()):
        assert torch.equal(a, b)
    assert [row["step"] for row in read_jsonl(tmp_path / "log" / "metrics.jsonl")] == [1, 2, 3, 3, 4, 5, 6, 6]


def test_lines_written_before_a_resume_are_not_lost(corpus, tmp_path):
    """A script may log something of its own before it hands the log to the trainer."""
    Trainer(small_gpt(corpus), corpus, QUICK, checkpoints=tmp_path / "c").fit()
    with RunLog(tmp_path / "log", resume=True) as log:
        log.log(0, note=1.0)
        trainer = Trainer(small_gpt(corpus), corpus, QUICK, log, checkpoints=tmp_path / "c")
        trainer.fit(resume=True)
        log.log(7, note=2.0)
    assert [row["step"] for row in read_jsonl(tmp_path / "log" / "metrics.jsonl")] == [0, 7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lr=2e-2), "lr=0.01 then, 0.02 now"),
        (dict(steps=7), "steps=6 then, 7 now"),
        (dict(seed=1, batch_size=2), "batch_size=4 then, 2 now; seed=1337 then, 1 now"),
    ],
)
def test_resuming_with_other_settings_is_refused_with_both_values(corpus, tmp_path, changes, message):
    Trainer(small_gpt(corpus), corpus, QUICK, checkpoints=tmp_path / "c").fit()
    with pytest.raises(ValueError, match=f"cannot be resumed with other settings: {message}"):
        Trainer(small_gpt(corpus), corpus, replace(QUICK, **changes), checkpoints=tmp_path / "c").fit(
            resume=True
        )


def test_resuming_with_another_model_is_refused(corpus, tmp_path):
    Trainer(small_gpt(corpus), corpus, QUICK, checkpoints=tmp_path / "c").fit()
    with pytest.raises(ValueError, match="is of another model: it had n_layer=2"):
        Trainer(small_gpt(corpus, n_layer=1), corpus, QUICK, checkpoints=tmp_path / "c").fit(resume=True)


def test_resuming_on_other_data_is_refused(corpus, tmp_path):
    Trainer(small_gpt(corpus), corpus, QUICK, checkpoints=tmp_path / "c").fit()
    other = Corpus("other.txt", corpus.tokenizer, corpus.train, corpus.val)
    with pytest.raises(ValueError, match="data=text.txt then, other.txt now"):
        Trainer(small_gpt(corpus), other, QUICK, checkpoints=tmp_path / "c").fit(resume=True)


def test_a_checkpoint_without_training_state_is_not_resumed(corpus, tmp_path):
    checkpoint.save(tmp_path / "c" / "last", small_gpt(corpus), corpus.tokenizer)
    with pytest.raises(ValueError, match="saved without training state"):
        Trainer(small_gpt(corpus), corpus, QUICK, checkpoints=tmp_path / "c").fit(resume=True)


def test_a_finished_run_resumed_gives_its_summary_again(corpus, tmp_path):
    first = Trainer(small_gpt(corpus), corpus, QUICK, checkpoints=tmp_path / "c").fit()
    assert Trainer(small_gpt(corpus), corpus, QUICK, checkpoints=tmp_path / "c").fit(resume=True) == first


# ---- numbers that are not finite


def stopped(trainer: Trainer) -> str:
    """The message of a training that must stop, after a check that the weights are those from before the
    step.
    """
    before = {}

    def remember(module, args):
        if module.training:
            before.update(copy.deepcopy(dict(module.named_parameters())))

    trainer.model.register_forward_pre_hook(remember)
    with pytest.raises(TrainingStopped) as error:
        trainer.fit()
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(p, before[name], atol=0, rtol=0, equal_nan=True)
    return str(error.value)


def at_training_step(trainer: Trainer, step: int, act) -> None:
    count = [0]

    def hook(module, args):
        count[0] += module.training
        if module.training and count[0] == step:
            act()

    trainer.model.register_forward_pre_hook(hook)


def test_a_nan_in_a_parameter_stops_the_training_and_is_named_with_its_step(corpus, tmp_path):
    trainer = Trainer(small_gpt(corpus), corpus, QUICK, checkpoints=tmp_path / "c")
    at_training_step(
        trainer, 4, lambda: trainer.model.blocks[1].attn.k_proj.weight.data[3, 5].fill_(math.nan)
    )
    message = stopped(trainer)
    assert message.startswith(
        "step 4: the loss is nan; it began in the parameter blocks.1.attn.k_proj.weight. Nothing was updated"
    )
    assert f"The last checkpoint is in {tmp_path / 'c' / 'last'}" in message and "(now " in message
    assert checkpoint.load(tmp_path / "c" / "last").state["step"] == 2  # from before, and whole


def test_an_output_that_overflows_is_named(corpus):
    trainer = Trainer(small_gpt(corpus), corpus, QUICK)
    huge = lambda: trainer.model.blocks[1].mlp.up_proj.weight.data.normal_(std=3e37)
    at_training_step(trainer, 2, huge)
    message = stopped(trainer)
    assert message.startswith("step 2: the loss is nan; it began in the output of blocks.1.mlp.up_proj.")
    assert "checkpoint" not in message


def test_an_infinite_loss_from_finite_logits_is_named(corpus):
    trainer = Trainer(small_gpt(corpus, tie_weights=False), corpus, QUICK)
    at_training_step(trainer, 1, lambda: trainer.model.lm_head.weight.data.normal_().mul_(1e38))
    message = stopped(trainer)
    assert message.startswith("step 1: the loss is ") and (
        "lm_head" in message or "the loss itself" in message
    )


def test_a_gradient_that_is_not_finite_is_named(corpus):
    trainer = Trainer(small_gpt(corpus), corpus, QUICK)
    trainer.model.blocks[0].mlp.up_proj.weight.register_hook(lambda grad: grad * math.nan)
    assert (
        "step 1: a gradient is not finite; it began in the gradient of blocks.0.mlp.up_proj.weight."
        in stopped(trainer)
    )


def test_finite_gradients_whose_length_overflows_stop_the_training_too(corpus):
    trainer = Trainer(small_gpt(corpus), corpus, QUICK)
    trainer.model.blocks[0].mlp.up_proj.weight.register_hook(lambda grad: torch.full_like(grad, 1e30))
    message = stopped(trainer)
    assert "step 1: " in message and "blocks.0.mlp.up_proj.weight" in message


# ---- settings


def test_a_config_names_all_its_problems_at_once():
    with pytest.raises(ValueError) as error:
        TrainConfig(
            steps=0,
            batch_size=-1,
            lr=0,
            muon_lr=math.nan,
            final_lr=2,
            beta1=-0.1,
            weight_decay=-1,
            eval_windows=0,
            optimizer="sgd",
            schedule="step",
            seed=-5,
        )
    for part in (
        "steps=0",
        "batch_size=-1",
        "lr=0",
        "muon_lr=nan",
        "final_lr=2",
        "beta1=-0.1",
        "weight_decay=-1",
        "eval_windows=0",
        "'sgd'",
        "'step'",
        "seed -5",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("field", ["final_lr", "weight_decay", "grad_clip", "beta2", "lr"])
def test_a_setting_that_is_not_a_number_is_refused(field):
    with pytest.raises(ValueError, match=f"{field}=nan"):
        TrainConfig(**{field: math.nan})
