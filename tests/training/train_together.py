"""Trains the same small GPT in every way that several processes can, for test_distributed.py:

    torchrun --standalone --nproc_per_node=2 train_together.py TEXT FOLDER

FOLDER/one-ddp/last and FOLDER/one-fsdp/last are checkpoints of one process, stopped half way. Writes
FOLDER/losses.json, and checkpoints to FOLDER/{ddp,fsdp,...}.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from shared.data.corpus import Corpus, load_corpus
from shared.evaluation import IGNORED
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import RunLog
from shared.training import TrainConfig, Trainer
from shared.training.distributed import Processes, process_group
from shared.training.execution import OneProcess
from shared.training.tasks import NextToken

CONFIG = TrainConfig(
    steps=8,
    batch_size=4,
    block_size=16,
    grad_accum_steps=2,
    lr=1e-2,
    warmup_steps=2,
    log_every=1,
    eval_every=4,
    eval_windows=8,
    checkpoint_every=4,
)


class SomeTokens(NextToken):
    """Learns one token of a row whose first id is even, and all of another."""

    def batches(self, *arguments, **options) -> Iterator[tuple]:
        for ids, targets in super().batches(*arguments, **options):
            learned = targets.clone()
            learned[ids[:, 0] % 2 == 0, 1:] = IGNORED
            yield ids, learned

    def learned_tokens(self, *batch: Tensor) -> int:
        _, targets = batch
        return int((targets != IGNORED).sum())


class StoppedAtStep4(RunLog):
    """Asks its own process to stop, as a cluster does, once four steps are done."""

    def log(self, step: int, **values: float) -> None:
        super().log(step, **values)
        if step == 4 and "val_loss" in values:
            os.kill(os.getpid(), signal.SIGTERM)


def train(
    corpus: Corpus | SomeTokens,
    folder: Path,
    processes: OneProcess,
    stop: bool = False,
    resume: bool = False,
) -> list[float]:
    """The training losses, step by step. Only the first process keeps a log, and only it is asked to stop."""
    torch.manual_seed(0)
    # Without biases: a key's bias has no gradient but rounding, which AdamW would blow up to full steps.
    shape = GPTConfig(
        vocab_size=corpus.tokenizer.vocab_size, block_size=16, n_layer=2, n_head=2, n_embd=16, bias=False
    )
    log = None
    if processes.rank == 0:
        kind = StoppedAtStep4 if stop else RunLog
        log = kind(folder / "log", CONFIG, resume=resume)
    trainer = Trainer(GPT(shape), corpus, CONFIG, log, folder, processes=processes)
    try:
        trainer.fit(resume)
    except KeyboardInterrupt:
        assert stop
    return [row["train_loss"] for row in trainer.history if "train_loss" in row]


def main(text: str, folder: Path) -> None:
    """Everything in one start, since importing torch takes longer than the training."""
    corpus = load_corpus(text)
    losses = {}
    with process_group("cpu") as (device, rank, _):
        for parallel in ("ddp", "fsdp"):

            def run(folder: Path, recompute: bool = False, parallel=parallel, **how) -> list[float]:
                # Padded too where it recomputes: neither may change anything.
                processes = Processes(parallel, device, recompute=recompute, pad_vocabulary=recompute)
                return train(corpus, folder, processes, **how)

            half = folder / f"{parallel}-half"
            losses[parallel] = run(folder / parallel)
            losses[f"{parallel}, recomputed"] = run(folder / f"{parallel}-recomputed", recompute=True)
            run(half, stop=True)
            losses[f"{parallel}, resumed"] = run(half, resume=True)
            losses[f"{parallel}, resumed from one process"] = run(folder / f"one-{parallel}", resume=True)
            run(folder / f"{parallel}-for-one", stop=True)
            some = train(SomeTokens(corpus), folder / f"{parallel}-some", Processes(parallel, device))
            losses[f"{parallel}, some tokens"] = some
        if rank == 0:
            (folder / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
