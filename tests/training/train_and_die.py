"""Runs small trainings that die as they are told, each in a process of its own. Called by test_resume.py:

    python train_and_die.py TEXT JOBS

JOBS is a JSON list of objects. Prints a JSON list of exit codes, a signal as its negative.

A job: folder; optimizer; resume (or false); and at most one way to die, `die`:
  ["log", n, "before" | "torn" | "after"]   SIGKILL before, half way through or after the n-th line of metrics
  ["rename", n, "before" | "after"]         SIGKILL before or after the n-th rename of a checkpoint's folder
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
from collections.abc import Callable
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


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def nothing(*args) -> None:
    pass


def at_call(owner: object, name: str, n: int, before: Callable = nothing, after: Callable = nothing) -> None:
    """Lets the n-th call of a function do more: before(*args) and after(*args)."""
    original = getattr(owner, name)
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            before(*args)
        original(*args, **kwargs)
        if len(calls) == n:
            after(*args)

    setattr(owner, name, wrapped)


def die_at_log(n: int, moment: str) -> None:
    def tear_and_kill(log: RunLog, step: int) -> None:
        metrics = log.folder / "metrics.jsonl"
        os.truncate(metrics, metrics.stat().st_size - 9)
        kill()

    if moment == "before":
        at_call(RunLog, "log", n, before=lambda *args: kill())
    elif moment == "torn":
        at_call(RunLog, "log", n, after=tear_and_kill)
    else:
        at_call(RunLog, "log", n, after=lambda *args: kill())


def die_at_rename(n: int, moment: str) -> None:
    if moment == "before":
        at_call(Path, "rename", n, before=lambda *args: kill())
    else:
        at_call(Path, "rename", n, after=lambda *args: kill())


def die_at_write(n: int) -> None:
    at_call(checkpoint, "save_file", n, before=lambda *args: kill())


def die_at_update(n: int) -> None:
    at_call(torch.optim.AdamW, "step", n, after=lambda *args: kill())


def signal_at_log(n: int, number: int, times: int) -> None:
    def send(*args) -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)

    at_call(RunLog, "log", n, before=send)


WAYS_TO_DIE = {
    "log": die_at_log,
    "rename": die_at_rename,
    "write": die_at_write,
    "update": die_at_update,
    "signal": signal_at_log,
}


def train(job: dict, text: str) -> None:
    if job["die"] is not None:
        kind, *how = job["die"]
        WAYS_TO_DIE[kind](*how)
    corpus = load_corpus(text)
    torch.manual_seed(0)
    shape = GPTConfig(
        vocab_size=corpus.tokenizer.vocab_size, block_size=8, n_layer=1, n_head=2, n_embd=8, dropout=0.2
    )
    folder = Path(job["folder"])
    settings = config(job["optimizer"])
    with errors_for_people(), RunLog(folder / "log", settings, resume=job["resume"]) as log:
        trainer = Trainer(GPT(shape), corpus, settings, log, folder / "checkpoints")
        log.finish(**trainer.fit(resume=job["resume"]))


def run_in_this_process(job: dict, text: str) -> int:
    """Trains in silence; returns the exit code. An error of the course's own goes to a file."""
    try:
        with open(os.devnull, "w") as null:
            sys.stdout = sys.stderr = null
            train(job, text)
        return 0
    except SystemExit as stop:
        return stop.code
    except BaseException:
        (Path(job["folder"]) / "error.txt").write_text(traceback.format_exc())
        return 99


def main(text: str, jobs: list[dict]) -> list[int]:
    codes = []
    for job in jobs:
        child = os.fork()
        if child == 0:
            os._exit(run_in_this_process(job, text))
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return codes


if __name__ == "__main__":
    runtime.commit = lambda: None  # asking git takes as long as the training
    os.fsync = (
        nothing  # processes die here, not the machine: waiting for the disk would take half of the time
    )
    torch.set_num_threads(1)  # a forked process cannot use its parent's threads
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
