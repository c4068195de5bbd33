"""shared/training/callbacks.py: when hooks are called, that none changes the training, what they may do."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from shared.runtime import RunLog
from shared.sampling import generate
from shared.training import BatchesTask, Callback, SampleText, Trainer
from tests.training.helpers import QUICK, all_equal, at_training_step, small_gpt, timeless, weights

HOOKS = ("on_start", "on_step_start", "on_step", "on_evaluation", "on_end")


class Diary(Callback):
    """Notes each call, with the steps done."""

    def __init__(self):
        self.calls = []


def _noting(hook: str):
    def note(self, trainer):
        self.calls.append((hook, trainer.step))

    return note


for _hook in HOOKS:
    setattr(Diary, _hook, _noting(_hook))


class Stop(Callback):
    """Ends the training after a step."""

    def __init__(self, step: int, hook: str = "on_step"):
        self.step = step
        setattr(self, hook, self.ask)

    def ask(self, trainer):
        if trainer.step == self.step:
            trainer.stop("enough")


class Count(Callback):
    """A number that a resumed run goes on with."""

    def __init__(self):
        self.steps = 0

    def on_step(self, trainer):
        self.steps += 1

    def state(self):
        return {"steps": self.steps}

    def restore(self, state):
        self.steps = state["steps"]


def test_each_hook_is_called_at_its_moment(corpus):
    diary = Diary()
    Trainer(small_gpt(corpus), corpus, replace(QUICK, steps=4, eval_every=2), callbacks=[diary]).fit()
    expected = [("on_start", 0)]
    for step in range(1, 5):
        expected += [("on_step_start", step - 1), ("on_step", step)]
        if step in (2, 4):
            expected.append(("on_evaluation", step))
    assert diary.calls == [*expected, ("on_end", 4)]


def test_they_are_called_in_their_order_and_see_the_evaluation_and_the_best_weights(corpus, tmp_path):
    order = []

    class Named(Callback):
        def __init__(self, name):
            self.name = name

        def on_evaluation(self, trainer):
            order.append((self.name, trainer.final["val_loss"], (tmp_path / "best").exists()))

    config = replace(QUICK, eval_every=6)
    trainer = Trainer(
        small_gpt(corpus), corpus, config, checkpoints=tmp_path, callbacks=[Named("a"), Named("b")]
    )
    loss = trainer.fit()["val_loss"]
    assert order == [("a", loss, True), ("b", loss, True)]


def test_what_only_looks_changes_nothing(corpus):
    runs = []
    for callbacks in ([], [Diary(), SampleText("a", every=1, max_new_tokens=5, say=len)]):
        trainer = Trainer(small_gpt(corpus, dropout=0.2), corpus, QUICK, callbacks=callbacks)
        trainer.fit()
        runs.append((weights(trainer.model), [timeless(row) for row in trainer.history]))
    assert all_equal(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]


@pytest.mark.parametrize("hook", ["on_step", "on_step_start", "on_evaluation"])
def test_a_callback_can_end_the_training_which_is_saved_and_goes_on_when_resumed(
    corpus, tmp_path, capsys, hook
):
    step = 2 if hook == "on_step_start" else 3  # the step that begins is finished
    diary = Diary()
    first = Trainer(
        small_gpt(corpus, dropout=0.2),
        corpus,
        QUICK,
        checkpoints=tmp_path / "a",
        callbacks=[Stop(step, hook), diary],
    )
    summary = first.fit()
    assert (summary["steps"], summary["stopped"], first.stopped) == (3, "enough", "enough")
    assert "stopped at step 3 of 6: enough" in capsys.readouterr().out
    assert diary.calls[-1] == ("on_end", 3)
    again = Trainer(small_gpt(corpus, dropout=0.2), corpus, QUICK, checkpoints=tmp_path / "a")
    resumed = again.fit(resume=True)
    whole = Trainer(small_gpt(corpus, dropout=0.2), corpus, QUICK)
    assert timeless(resumed) == timeless(whole.fit()) and "stopped" not in resumed
    assert all_equal(weights(again.model), weights(whole.model))


def test_the_same_trainer_can_go_on_after_a_stop(corpus, tmp_path):
    trainer = Trainer(small_gpt(corpus), corpus, QUICK, checkpoints=tmp_path, callbacks=[Stop(2)])
    trainer.fit()
    assert trainer.fit(resume=True)["steps"] == 6 and trainer.stopped is None


def test_after_an_error_or_ctrl_c_there_is_no_end(corpus):
    class Fails(Callback):
        def on_step(self, trainer):
            raise RuntimeError("no more")

    diary = Diary()
    with pytest.raises(RuntimeError, match="no more"):
        Trainer(small_gpt(corpus), corpus, QUICK, callbacks=[diary, Fails()]).fit()
    assert diary.calls[-1] == ("on_step", 1)
    diary = Diary()
    trainer = Trainer(small_gpt(corpus), corpus, QUICK, callbacks=[diary, Stop(2)])
    at_training_step(trainer.model, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):  # Ctrl-C, although the same step was the last
        trainer.fit()
    assert diary.calls[-1] == ("on_step", 2)


def test_their_state_is_kept_by_name_and_taken_up(corpus, tmp_path):
    counts = [Count(), Count()]
    counts[1].steps = 100
    first = Trainer(small_gpt(corpus), corpus, QUICK, checkpoints=tmp_path, callbacks=[*counts, Stop(4)])
    first.fit()
    saved = json.loads((tmp_path / "last" / "training.json").read_text())["callbacks"]
    assert saved == {"Count": {"steps": 4}, "Count 2": {"steps": 104}}
    again, fresh = [Count(), Count()], Diary()
    callbacks = [fresh, *again]
    Trainer(small_gpt(corpus), corpus, QUICK, checkpoints=tmp_path, callbacks=callbacks).fit(resume=True)
    assert [count.steps for count in again] == [6, 106]
    assert fresh.calls[0] == ("on_start", 4)


def test_metrics_that_a_callback_records_are_in_the_history_and_the_log(corpus, tmp_path):
    class Norm(Callback):
        def on_evaluation(self, trainer):
            trainer.record({"first_weight": trainer.step / 2})

    with RunLog(tmp_path) as log:
        trainer = Trainer(small_gpt(corpus), corpus, QUICK, log, callbacks=[Norm()])
        trainer.fit()
        kept = [row for row in log.rows() if "first_weight" in row]
    assert kept == [{"step": 3, "first_weight": 1.5}, {"step": 6, "first_weight": 3.0}]
    assert [row for row in trainer.history if "first_weight" in row] == kept


@pytest.mark.parametrize("callbacks", [[print], [Diary], ["sample"], Diary()])
def test_what_is_no_callback_is_refused_when_the_trainer_is_made(corpus, callbacks):
    with pytest.raises(ValueError, match="is no Callback|give a list"):
        Trainer(small_gpt(corpus), corpus, QUICK, callbacks=callbacks)


# ---- samples


def test_a_sample_is_what_generate_gives_at_that_step(corpus):
    said = []
    sampler = SampleText("ab", 2, 12, temperature=0.7, top_p=0.9, seed=4, say=said.append)

    class Check(Callback):
        def on_step(self, trainer):
            if trainer.step % 2 == 0:
                assert trainer.model.training
                ids = corpus.tokenizer.encode("ab")
                new = generate(trainer.model, ids, 12, 0.7, top_p=0.9, seed=4)
                expected.append((trainer.step, corpus.tokenizer.decode(list(new))))

    expected = []
    Trainer(small_gpt(corpus), corpus, QUICK, callbacks=[sampler, Check()]).fit()
    assert [step for step, _ in expected] == [2, 4, 6] and sampler.samples == expected
    assert said == [f"  step {step}: ab{text}" for step, text in expected]


def test_a_sampler_that_cannot_write_says_so_before_the_first_step(corpus):
    data = [torch.zeros(4, 9, dtype=torch.int64)]
    for task, prompt, message in (
        (BatchesTask(data, data), "a", "needs a tokenizer, and the task batches has none"),
        (corpus, "", "at least one token"),
        (corpus, "\N{SNOWMAN}", "\N{SNOWMAN}"),
    ):
        trainer = Trainer(small_gpt(corpus), task, QUICK, callbacks=[SampleText(prompt, 1)])
        with pytest.raises(ValueError, match=message):
            trainer.fit()
        assert trainer.step == 0
    with pytest.raises(ValueError, match="every=0"):
        SampleText("a", 0)
    with pytest.raises(ValueError, match="temperature=-1"):
        SampleText("a", 1, temperature=-1)
