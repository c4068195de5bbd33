"""shared/training/trainer.py: steps against loops written out, accumulation against the large batch, and the
best checkpoint.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shared import checkpoint
from shared.data.corpus import batches
from shared.evaluation import evaluate
from shared.models.bigram import BigramConfig, BigramModel
from shared.training import Trainer, lr_at
from shared.training.distributed import Processes
from shared.training.tasks import NextToken
from tests.training.helpers import QUICK, small_gpt, timeless

# ---- what a step does


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
    logged = {row["step"]: row["lr"] for row in trainer.history if "lr" in row}
    assert logged == pytest.approx({step + 1: rate for step, rate in enumerate(seen[::2])})


def test_muon_gets_its_momentum_and_its_decay_from_the_settings(corpus):
    config = replace(QUICK, optimizer="muon", muon_momentum=0.8, muon_lr=0.03, weight_decay=0.2)
    group = Trainer(small_gpt(corpus), corpus, config).optimizers[1].param_groups[0]
    assert (group["momentum"], group["lr"], group["weight_decay"]) == (0.8, 0.03, 0.2)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulated_gradients_equal_those_of_the_large_batch(corpus, accumulate, optimizer):
    """The same windows in pieces: in float64, so that what differs is the arithmetic and not the rounding."""
    config = replace(QUICK, batch_size=8, optimizer=optimizer)
    in_pieces = replace(config, batch_size=8 // accumulate, grad_accum_steps=accumulate)
    large = Trainer(small_gpt(corpus).double(), corpus, config)
    pieces = Trainer(small_gpt(corpus).double(), corpus, in_pieces)
    large.fit()
    pieces.fit()
    for a, b in zip(large.history, pieces.history):
        assert timeless(a) == pytest.approx(timeless(b), rel=1e-6)
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


@pytest.mark.slow
def test_the_loss_falls_below_what_counting_single_characters_reaches(corpus):
    config = replace(QUICK, steps=150, batch_size=16, eval_every=150, eval_windows=None)
    summary = Trainer(small_gpt(corpus), corpus, config).fit()
    counts = torch.bincount(torch.from_numpy(corpus.train.astype("int64"))).double()
    shares = counts / counts.sum()
    entropy = -(shares * shares.log()).sum().item()
    assert summary["first_loss"] == pytest.approx(math.log(corpus.tokenizer.vocab_size), abs=0.05)
    assert summary["val_loss"] < entropy - 0.3


def test_clipping_shortens_the_gradient_and_zero_leaves_it(corpus):
    seen = {}
    for clip in (0.0, 1e-3):
        trainer = Trainer(small_gpt(corpus), corpus, replace(QUICK, steps=1, grad_clip=clip))

        def measure(optimizer, args, kwargs, clip=clip):
            gradients = [p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]
            seen[clip] = torch.cat(gradients).norm().item()

        trainer.optimizers[0].register_step_pre_hook(measure)
        trainer.fit()
        assert trainer.history[0]["grad_norm"] > 0.1  # what is logged is the length before
    assert seen[1e-3] <= 1.001e-3
    assert seen[0.0] > 0.1


def test_the_update_ratio_is_the_updates_std_over_the_weights(corpus):
    trainer = Trainer(small_gpt(corpus), corpus, replace(QUICK, steps=1, log_updates=True))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.fit()
    row = trainer.history[0]
    matrices = {n: p.detach() for n, p in trainer.model.named_parameters() if p.dim() >= 2}
    for n, p in matrices.items():
        ratio = (p - before[n]).std() / before[n].std()
        assert row[f"update/{n}"] == pytest.approx(math.log10(ratio), abs=1e-4)
    assert sum(name.startswith("update/") for name in row) == len(matrices)


def test_any_model_of_the_course_can_be_trained(corpus):
    model = BigramModel(BigramConfig(corpus.tokenizer.vocab_size))
    summary = Trainer(model, corpus, replace(QUICK, optimizer="muon", steps=40, lr=0.1)).fit()
    assert summary["val_loss"] < summary["first_loss"] - 0.2
    assert summary["parameters"] == corpus.tokenizer.vocab_size**2


def test_rows_come_when_the_settings_say(corpus):
    trainer = Trainer(small_gpt(corpus), corpus, replace(QUICK, steps=11, log_every=4, eval_every=5))
    trainer.fit()
    assert [row["step"] for row in trainer.history if "train_loss" in row] == [1, 4, 8]
    assert [row["step"] for row in trainer.history if "val_loss" in row] == [5, 10, 11]


def test_the_logged_loss_is_that_before_the_steps_update(corpus):
    """Step n is logged with the loss of batch n under the weights of step n - 1."""
    trainer = Trainer(small_gpt(corpus).double(), corpus, replace(QUICK, steps=4))
    weights_before = []
    trainer.optimizers[0].register_step_pre_hook(
        lambda *_: weights_before.append({n: t.clone() for n, t in trainer.model.state_dict().items()})
    )
    summary = trainer.fit()
    losses = []
    model = small_gpt(corpus).double()
    for weights, (x, y) in zip(weights_before, batches(corpus.train, 8, 4, seed=1337)):
        model.load_state_dict(weights)
        losses.append(torch.nn.functional.cross_entropy(model(x).transpose(1, 2), y).item())
    logged = [row["train_loss"] for row in trainer.history if "train_loss" in row]
    assert logged == pytest.approx(losses, rel=1e-9)
    assert summary["first_loss"] == logged[0] and trainer.last_loss == logged[-1]


def test_a_rate_counts_every_token_and_only_the_seconds_of_the_steps(corpus, monkeypatch):
    config = replace(QUICK, grad_accum_steps=3)
    ticks = iter(range(1000))
    monkeypatch.setattr("shared.training.trainer.clock", lambda: 0.5 * next(ticks))
    summary = Trainer(small_gpt(corpus), corpus, config).fit()
    assert summary["seconds"] == 0.5 * config.steps  # each step asks the clock twice
    assert summary["tokens_per_second"] == pytest.approx(3 * 4 * 8 / 0.5)


def test_training_with_a_seed_is_repeatable_and_leaves_eval_mode_out_of_it(corpus):
    runs = []
    for seed in (1, 1, 2):
        trainer = Trainer(small_gpt(corpus, dropout=0.2), corpus, replace(QUICK, seed=seed))
        trainer.fit()
        runs.append(torch.cat([p.flatten() for p in trainer.model.parameters()]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.slow
def test_a_compiled_model_is_trained_and_saved_like_the_model_in_it(corpus, tmp_path):
    compiled = torch.compile(small_gpt(corpus), backend="eager")
    config = replace(QUICK, fused=False)  # the compiled model is not fused either
    trainer = Trainer(compiled, corpus, config, checkpoints=tmp_path / "c")
    assert trainer.call is compiled
    summary = trainer.fit()
    assert timeless(summary) == timeless(Trainer(small_gpt(corpus), corpus, config).fit())
    assert checkpoint.load(tmp_path / "c" / "best").metrics["val_loss"] == summary["best_val_loss"]
    with pytest.raises(ValueError, match="wrapped by torch.compile .* already: give the model itself"):
        Trainer(compiled, corpus, QUICK, processes=Processes(compile_model=True))


# ---- the best checkpoint


class WorseAfterStep7(NextToken):
    """Learns in the first seven steps, and unlearns in all others."""

    def batches(self, config, start_step, rank, world_size, *, every=1):
        stream = super().batches(config, start_step, rank, world_size, every=every)
        for step, batch in enumerate(stream, start_step):
            yield *batch, torch.tensor(1.0 if step < 7 else -1.0)

    def loss(self, call, *batch: Tensor) -> Tensor:
        *batch, sign = batch
        return sign * super().loss(call, *batch)

    def learned_tokens(self, *batch: Tensor) -> int:
        return super().learned_tokens(*batch[:-1])


class NanAtFirst(NextToken):
    """Its first evaluation is not a number."""

    evaluations = 0

    def evaluate(self, model, config, device):
        self.evaluations += 1
        metrics = super().evaluate(model, config, device)
        return metrics | {"val_loss": math.nan} if self.evaluations == 1 else metrics


def test_a_nan_is_not_the_best_evaluation_where_there_is_a_number(corpus, tmp_path):
    config = replace(QUICK, steps=4, eval_every=2)
    trainer = Trainer(small_gpt(corpus), NanAtFirst(corpus), config, checkpoints=tmp_path / "c")
    summary = trainer.fit()
    assert summary["best_step"] == 4 and summary["best_val_loss"] == summary["val_loss"]
    assert checkpoint.load(tmp_path / "c" / "best").metrics["val_loss"] == summary["val_loss"]


def test_the_best_checkpoint_has_the_lowest_validation_loss_and_is_not_just_the_last(corpus, tmp_path):
    config = replace(QUICK, steps=12, eval_every=1)
    trainer = Trainer(small_gpt(corpus), WorseAfterStep7(corpus), config, checkpoints=tmp_path / "c")
    summary = trainer.fit()
    losses = {row["step"]: row["val_loss"] for row in trainer.history if "val_loss" in row}
    best = min(losses, key=losses.get)
    assert len(losses) == 12
    assert 1 < best < 12
    assert summary["best_step"] == best
    assert summary["best_val_loss"] == losses[best]
    assert summary["val_loss"] == losses[12]
    for name, step in (("best", best), ("last", 12)):
        loaded = checkpoint.load(tmp_path / "c" / name)
        again = evaluate(loaded.model, corpus.val, 8, corpus.token_bytes, max_windows=10)
        assert again.loss == losses[step] == loaded.metrics["val_loss"]


def test_without_a_folder_nothing_is_kept(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    Trainer(small_gpt(corpus), corpus, QUICK).fit()
    assert sorted(tmp_path.rglob("*")) == before


def test_without_a_folder_there_is_no_best_to_take(corpus):
    trainer = Trainer(small_gpt(corpus), corpus, QUICK)
    with pytest.raises(ValueError, match="keeps no checkpoints: give it a folder"):
        trainer.take_best()


def test_a_new_trainer_has_all_its_state(corpus):
    """Before a step is taken, and then with other values under the same names."""
    trainer = Trainer(small_gpt(corpus), corpus, QUICK)
    names = set(vars(trainer))
    assert trainer.step == trainer.seconds == 0
    assert math.isnan(trainer.first_loss) and math.isnan(trainer.last_loss)
    assert trainer.history == [] and trainer.final == {} and trainer.best == {}
    trainer.fit()
    assert set(vars(trainer)) == names
    assert trainer.step == QUICK.steps and trainer.final["val_loss"] >= trainer.best["val_loss"]
