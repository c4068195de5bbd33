"""Runs small trainings that die as they are told, each in a process of its own. Called by test_training.py:

    python train_and_die.py TEXT JOBS      # JOBS: a JSON list of objects; prints a JSON list of exit codes, a signal as its negative

A job: folder; optimizer; resume (or false); and at most one way to die, `die`:
  ["log", n, "before" | "torn" | "after"]   SIGKILL at the n-th line of metrics: before it is written, half way, after it
  ["rename", n, "before" | "after"]         SIGKILL round the n-th rename of a checkpoint's folder
  ["write", n]                              SIGKILL before the n-th file of tensors is written
  ["update", n]                             SIGKILL in the n-th step, when the optimizers have begun to update
  ["signal", n, number, times]              sends itself a signal at the n-th line of metrics, so many times

The processes are forked before torch has computed anything, which saves importing torch for each.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  what the first optimizer would import, once here instead of in every child

from shared import checkpoint, runtime
from shared.commandline import errors_for_people
from shared.data.corpus import load_corpus
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import RunLog
from shared.training import TrainConfig, Trainer

STEPS = 12


def config(optimizer: str) -> TrainConfig:
    return TrainConfig(
        steps=STEPS,
        batch_size=2,
        block_size=8,
        grad_accum_steps=2,
        optimizer=optimizer,
        lr=1e-2,
        warmup_steps=3,
        log_every=1,
        eval_every=4,
        eval_windows=5,
        checkpoint_every=3,
        log_updates=True,
    )


def calls(owner: object, name: str, act) -> None:
    """Replaces a function by one that calls act(number of the call, the original, *args, **kwargs)."""
    original, count = getattr(owner, name), [0]

    def wrapped(*args, **kwargs):
        count[0] += 1
        return act(count[0], original, *args, **kwargs)

    setattr(owner, name, wrapped)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arrange(kind: str, n: int, *how) -> None:
    """Prepares this process's end."""

    def at_log(count, original, log, step, **values):
        if count == n and kind == "log":
            if how[0] == "torn":
                original(log, step, **values)
                metrics = log.folder / "metrics.jsonl"
                os.truncate(metrics, metrics.stat().st_size - 9)
            elif how[0] == "after":
                original(log, step, **values)
            kill()
        if count == n and kind == "signal":
            for _ in range(how[1]):
                os.kill(os.getpid(), how[0])
        original(log, step, **values)

    def at_rename(count, original, *args):
        if count == n and how[0] == "before":
            kill()
        original(*args)
        if count == n:
            kill()

    def at_write(count, original, *args):
        if count == n:
            kill()
        original(*args)

    def at_update(count, original, optimizer):
        original(optimizer)
        if count == n:
            kill()

    if kind in ("log", "signal"):
        calls(RunLog, "log", at_log)
    elif kind == "rename":
        calls(Path, "rename", at_rename)
    elif kind == "write":
        calls(checkpoint, "save_file", at_write)
    elif kind == "update":
        calls(torch.optim.AdamW, "step", at_update)
    else:
        raise AssertionError(kind)


def train(job: dict, text: str) -> None:
    if job.get("die"):
        arrange(*job["die"])
    corpus = load_corpus(text)
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            vocab_size=corpus.tokenizer.vocab_size, block_size=8, n_layer=1, n_head=2, n_embd=8, dropout=0.2
        )
    )
    folder = Path(job["folder"])
    with errors_for_people(), RunLog(folder / "log", config(job["optimizer"]), resume=job["resume"]) as log:
        trainer = Trainer(model, corpus, config(job["optimizer"]), log, folder / "checkpoints")
        log.finish(**trainer.fit(resume=job["resume"]))


def main(text: str, jobs: list[dict]) -> list[int]:
    codes = []
    for job in jobs:
        child = os.fork()
        if child == 0:
            try:
                with open(os.devnull, "w") as null:
                    sys.stdout = sys.stderr = null
                    train(job, text)
                code = 0
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                code = 99
                (Path(job["folder"]) / "error.txt").write_text(traceback.format_exc())
            os._exit(code)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return codes


if __name__ == "__main__":
    runtime.commit = lambda: None  # asking git takes as long as the training
    torch.set_num_threads(1)  # a forked process cannot use its parent's threads
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
