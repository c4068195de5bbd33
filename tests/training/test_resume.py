"""shared/training/resume.py with the Trainer: a run that died and was resumed equals one that was left alone,
bit for bit.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shared import checkpoint
from shared.data.corpus import Corpus
from shared.runtime import RunLog, read_jsonl
from shared.training import Trainer
from tests.helpers import synthetic_text
from tests.training.helpers import QUICK, all_equal, at_training_step, small_gpt, timeless, weights

pytestmark = pytest.mark.slow

# ---- killed


def cases() -> dict[str, tuple[str, list]]:
    """By name: the optimizer, and how the run dies (see train_and_die.py)."""
    cases: dict[str, tuple[str, list]] = {}
    moments = {0: "before", 1: "torn", 2: "after"}
    words = {"before": "before", "torn": "half way through", "after": "after"}
    for n in range(1, 16):
        moment = moments[n % 3]
        cases[f"adamw, killed {words[moment]} line {n}"] = ("adamw", ["log", n, moment])
    for n in range(1, 13):
        cases[f"adamw, killed before rename {n}"] = ("adamw", ["rename", n, "before"])
    cases["adamw, killed after the last rename"] = ("adamw", ["rename", 12, "after"])
    for n in (2, 5, 8):
        cases[f"adamw, killed before tensors are written for the {n}th time"] = ("adamw", ["write", n])
    for n in (1, 5, 12):
        cases[f"adamw, killed in the update of step {n}"] = ("adamw", ["update", n])
        cases[f"muon, killed between the two optimizers' updates in step {n}"] = ("muon", ["update", n])
    cases["muon, killed half way through line 7"] = ("muon", ["log", 7, "torn"])
    cases["muon, killed before rename 5"] = ("muon", ["rename", 5, "before"])
    for name, number in (("Ctrl-C", signal.SIGINT), ("SIGTERM", signal.SIGTERM)):
        cases[f"adamw, {name} in step 5"] = ("adamw", ["signal", 6, int(number), 1])
    cases["muon, Ctrl-C in step 2"] = ("muon", ["signal", 2, int(signal.SIGINT), 1])
    cases["adamw, Ctrl-C in the last step"] = ("adamw", ["signal", 15, int(signal.SIGINT), 1])
    cases["adamw, Ctrl-C twice in step 5"] = ("adamw", ["signal", 6, int(signal.SIGINT), 2])
    return cases


CASES = cases()


@pytest.fixture(scope="module")
def fates(tmp_path_factory):
    """Every case killed and resumed, and each optimizer's run that nobody disturbed.

    The folder of all of them, and by name the exit codes.
    """
    root = tmp_path_factory.mktemp("fates")
    text = root / "text.txt"
    text.write_text(synthetic_text(), encoding="utf-8")
    jobs = []
    names = []

    def add(name: str, optimizer: str, *deaths) -> None:
        (root / name).mkdir()
        for number, die in enumerate(deaths):
            names.append(name)
            job = {"folder": str(root / name), "optimizer": optimizer, "resume": number > 0, "die": die}
            jobs.append(job)

    for optimizer in ("adamw", "muon"):
        add(optimizer, optimizer, None)
    for name, (optimizer, die) in CASES.items():
        add(name, optimizer, die, None)
    add("thrice", "adamw", ["log", 5, "torn"], ["rename", 3, "before"], ["log", 4, "after"], None)
    environment = {**os.environ, "LLM_WEEKS_DATA": str(root / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name("train_and_die.py"), text, json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    codes = {name: [] for name in names}
    for name, exit_code in zip(names, json.loads(done.stdout)):
        codes[name].append(exit_code)
    return root, codes


def outcome(folder: Path) -> dict:
    """All that a run leaves, without what depends on the clock."""

    def read(path: str) -> dict:
        return json.loads((folder / path).read_text())

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
        ours = load_file(folder / "checkpoints" / f"{name}.safetensors")
        theirs = load_file(undisturbed / "checkpoints" / f"{name}.safetensors")
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
        assert loaded.model.config.dropout > 0
        assert loaded.state["step"] == 12
        assert len(outcome(root / optimizer)["rows"]) == 15
        assert any("momentum_buffer" in k for k in loaded.tensors) == (optimizer == "muon")


# ---- interrupted


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


# ---- resumed, or refused


def trainer_in(folder: Path, corpus: Corpus, *, data: Corpus | None = None, **changes) -> Trainer:
    """A trainer that keeps its checkpoints there. data: what it trains on, if not the corpus."""
    config = replace(QUICK, **changes)
    return Trainer(small_gpt(corpus), data or corpus, config, checkpoints=folder)


HOLDER = """
import sys
from pathlib import Path
from shared.locks import process_lock

with process_lock(Path(sys.argv[1]), "training other", name=".last.lock"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_training_with_the_same_checkpoints_is_refused(corpus, tmp_path, resume):
    trainer_in(tmp_path / "c", corpus, steps=3).fit()
    before = (tmp_path / "c" / "last" / "training.json").read_bytes()
    trainer = trainer_in(tmp_path / "c", corpus)
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "c")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"in use by process {other.pid} on .* \(training other, since"):
            trainer.fit(resume)
        other.communicate("go on\n", timeout=60)
    assert trainer.step == 0 and (tmp_path / "c" / "last" / "training.json").read_bytes() == before
    trainer_in(tmp_path / "c", corpus).fit()
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["best", "last"]


class Watching(RunLog):
    """Looks, at every row, which locks are held."""

    def log(self, step, **values):
        self.locks = sorted(path.name for path in self.watched.glob(".*.lock"))
        super().log(step, **values)


def test_a_training_holds_its_checkpoints_from_its_first_step_to_its_last(corpus, tmp_path):
    with Watching(tmp_path / "log") as log:
        log.watched = tmp_path / "c"
        Trainer(small_gpt(corpus), corpus, QUICK, log, tmp_path / "c").fit()
    assert log.locks == [".last.lock"]


def test_resuming_without_a_checkpoint_starts_anew_and_says_so(corpus, tmp_path, capsys):
    fresh = Trainer(small_gpt(corpus, dropout=0.2), corpus, QUICK, checkpoints=tmp_path / "a")
    fresh.fit()
    capsys.readouterr()
    with RunLog(tmp_path / "log", resume=True) as log:
        log.log(1, train_loss=99.0)  # a run that was killed before its first checkpoint
        resumed = Trainer(small_gpt(corpus, dropout=0.2), corpus, QUICK, log, checkpoints=tmp_path / "b")
        resumed.fit(resume=True)
    assert "no checkpoint to resume from, so it starts from the beginning" in capsys.readouterr().out
    assert all_equal(weights(fresh.model), weights(resumed.model))
    assert [row["step"] for row in read_jsonl(tmp_path / "log" / "metrics.jsonl")] == [1, 2, 3, 3, 4, 5, 6, 6]


def test_lines_written_before_a_resume_are_not_lost(corpus, tmp_path):
    """A script may log something of its own before it hands the log to the trainer."""
    trainer_in(tmp_path / "c", corpus).fit()
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
        (dict(steps=5), "steps=6 then, 5 now"),
        (dict(seed=1, batch_size=2), "batch_size=4 then, 2 now; seed=1337 then, 1 now"),
    ],
)
def test_resuming_with_other_settings_is_refused_with_both_values(corpus, tmp_path, changes, message):
    trainer_in(tmp_path / "c", corpus).fit()
    with pytest.raises(ValueError, match=f"cannot be resumed with other settings: {message}"):
        trainer_in(tmp_path / "c", corpus, **changes).fit(resume=True)


def test_a_finished_run_with_more_steps_goes_on_as_one_that_was_that_long_from_the_start(
    corpus, tmp_path, capsys
):
    level = dict(schedule="constant")
    trainer_in(tmp_path / "c", corpus, **level).fit()
    longer = trainer_in(tmp_path / "c", corpus, steps=9, **level)
    longer.fit(resume=True)
    said = capsys.readouterr().out
    assert "finished with 6 steps and goes on to 9: what follows from the number of steps" in said
    whole = trainer_in(tmp_path / "d", corpus, steps=9, **level)
    whole.fit()
    assert longer.step == 9 and all_equal(weights(longer.model), weights(whole.model))
    assert "jumps" not in said


def test_a_run_of_20_steps_extended_to_40_equals_one_of_40_bit_for_bit(corpus, tmp_path):
    """At a constant rate after a warmup, with dropout: weights, moments, random numbers and metrics."""
    config = replace(QUICK, steps=20, warmup_steps=5, schedule="constant", eval_every=10)

    def trainer(folder: str, steps: int) -> Trainer:
        model = small_gpt(corpus, dropout=0.2)
        return Trainer(model, corpus, replace(config, steps=steps), checkpoints=tmp_path / folder)

    trainer("a", 20).fit()
    extended, whole = trainer("a", 40), trainer("b", 40)
    summary = extended.fit(resume=True)
    assert timeless(summary) == timeless(whole.fit())
    assert [timeless(r) for r in extended.history] == [timeless(r) for r in whole.history if r["step"] > 20]
    for name in ("model", "training"):
        a, b = (load_file(tmp_path / run / "last" / f"{name}.safetensors") for run in ("a", "b"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_schedule_that_depends_on_the_steps_jumps_and_says_from_where_to_where(corpus, tmp_path, capsys):
    falling = dict(schedule="linear", final_lr=0.0)
    trainer_in(tmp_path / "c", corpus, **falling).fit()
    longer = trainer_in(tmp_path / "c", corpus, steps=12, **falling)
    longer.fit(resume=True)
    last, following = 1e-2 / 6, 1e-2 / 2
    assert longer.history[0]["lr"] == pytest.approx(following)
    expected = f"jumps from {last:.3g}, where the schedule ended, to {following:.3g}, where that of 12 steps"
    assert expected in capsys.readouterr().out


def test_an_interrupted_run_is_not_resumed_with_more_steps(corpus, tmp_path):
    trainer = trainer_in(tmp_path / "c", corpus)
    at_training_step(trainer.model, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    with pytest.raises(ValueError, match="with other settings: steps=6 then, 9 now"):
        trainer_in(tmp_path / "c", corpus, steps=9).fit(resume=True)


def test_wall_seconds_count_all_parts_of_a_run_and_not_the_time_between(corpus, tmp_path, monkeypatch):
    """By a clock that moves by a second at each look, and by a thousand between the parts."""
    ticks = itertools.count()
    monkeypatch.setattr("shared.training.trainer.clock", lambda: float(next(ticks)))
    first = trainer_in(tmp_path / "c", corpus)
    assert first.wall_seconds == 0
    at_training_step(first.model, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    kept = json.loads((tmp_path / "c" / "last" / "training.json").read_text(encoding="utf-8"))["wall_seconds"]
    ticks = itertools.count(1000)
    second = trainer_in(tmp_path / "c", corpus)
    second.fit(resume=True)
    ended = second.wall_seconds
    assert second.wall_seconds == ended  # the clock stands once fit has returned
    assert 0 < kept < ended < 1000
    again = trainer_in(tmp_path / "c", corpus)
    again.fit(resume=True)
    assert again.wall_seconds - ended < 10  # a finished run adds what it takes to look at it, no more


def test_resuming_with_another_model_is_refused(corpus, tmp_path):
    trainer_in(tmp_path / "c", corpus).fit()
    with pytest.raises(ValueError, match=r"is of another model: it had n_layer=2\. Build"):
        Trainer(small_gpt(corpus, n_layer=1), corpus, QUICK, checkpoints=tmp_path / "c").fit(resume=True)


def test_resuming_on_other_data_is_refused(corpus, tmp_path):
    trainer_in(tmp_path / "c", corpus).fit()
    other = Corpus("other.txt", corpus.tokenizer, corpus.train, corpus.val)
    with pytest.raises(ValueError, match=r"data=text\.txt-\w+ then, other\.txt now"):
        trainer_in(tmp_path / "c", corpus, data=other).fit(resume=True)


@pytest.mark.parametrize("split", ["training data", "held-out data"])
def test_resuming_on_another_text_of_the_same_name_and_characters_is_refused(corpus, tmp_path, split):
    """Nothing but the order of one split's tokens is another."""
    trainer_in(tmp_path / "c", corpus).fit()
    part = "train" if split == "training data" else "val"
    other = replace(corpus, **{part: np.asarray(getattr(corpus, part))[::-1]})
    with pytest.raises(ValueError, match=rf"on other contents: {split}=\w+ then, \w+ now\. Restore"):
        trainer_in(tmp_path / "c", corpus, data=other).fit(resume=True)


def test_a_copy_of_the_text_is_the_same_text(corpus, tmp_path):
    first = trainer_in(tmp_path / "c", corpus).fit()
    copied = replace(corpus, train=corpus.train.astype(np.int64), val=np.array(corpus.val))
    assert trainer_in(tmp_path / "c", corpus, data=copied).fit(resume=True) == first


def test_a_state_without_hashes_is_resumed_and_what_was_not_checked_is_said(corpus, tmp_path, capsys):
    first = trainer_in(tmp_path / "c", corpus).fit()
    path = tmp_path / "c" / "last" / "training.json"
    state = json.loads(path.read_text())
    del state["training data"], state["held-out data"]
    state["data"] = "text.txt"  # names had no hash then
    del state["config"]["fused"]  # nor did a step compute anything in C
    path.write_text(json.dumps(state))
    assert trainer_in(tmp_path / "c", corpus).fit(resume=True) == first
    said = capsys.readouterr().out
    assert "resumed at step 6" in said
    assert "could not be checked: training data, held-out data\n" in said


def test_a_checkpoint_without_training_state_is_not_resumed(corpus, tmp_path):
    checkpoint.save(small_gpt(corpus), tmp_path / "c" / "last", corpus.tokenizer)
    with pytest.raises(ValueError, match="saved without training state"):
        trainer_in(tmp_path / "c", corpus).fit(resume=True)


@pytest.mark.parametrize("name", ["step", "best", "config"])
def test_a_training_state_that_lacks_something_is_refused(corpus, tmp_path, name):
    trainer_in(tmp_path / "c", corpus).fit()
    path = tmp_path / "c" / "last" / "training.json"
    state = json.loads(path.read_text())
    del state[name]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=f"last lacks '{name}', which this run needs to be resumed"):
        trainer_in(tmp_path / "c", corpus).fit(resume=True)


def test_a_finished_run_resumed_gives_its_summary_again(corpus, tmp_path):
    first = trainer_in(tmp_path / "c", corpus).fit()
    assert trainer_in(tmp_path / "c", corpus).fit(resume=True) == first
