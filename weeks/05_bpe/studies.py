"""Week 5's study, which `--study vocab` runs, and the training that it shares with the week's run."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from figures import draw
from shared.course.workspace import Workspace
from shared.data.corpus import Corpus, load_corpus, split_text
from shared.models.gpt import GPT, GPTConfig
from shared.registry import without_memory
from shared.runtime import RunLog, table
from shared.tokenizers import BPETokenizer
from shared.training import TrainConfig, Trainer

if TYPE_CHECKING:
    from run import Settings


def fit(
    config: GPTConfig,
    train: TrainConfig,
    corpus: Corpus,
    work: Workspace,
    log: RunLog,
    *,
    resume: bool = False,
) -> dict[str, float]:
    """Trains a model on a corpus; its summary.

    `wall_seconds` in it counts everything from the first step to the last evaluation.
    """
    torch.manual_seed(train.seed)
    block_size = max(config.block_size, train.block_size)
    model = GPT(replace(config, vocab_size=corpus.tokenizer.vocab_size, block_size=block_size))
    run = log.folder.name
    name = "GPT on tokens" if run == "bpe" else run
    trainer = Trainer(model, corpus, train, log, work.checkpoints / run, device=work.device, description=name)
    return {**trainer.fit(resume), "wall_seconds": trainer.wall_seconds}


def study_vocab(settings: "Settings", text: str, work: Workspace) -> dict[str, float]:
    """The same model on characters and on tokens of vocabularies of several sizes.

    Each gets the compute that characters get.
    """
    train_text, val_text = split_text(text)
    text_bytes = len(val_text.encode())
    block_size = settings.train.block_size
    budget = 0.0  # floating-point operations, set by the first model, which reads characters
    rows = []
    for size in (None, *settings.vocab_sizes):
        tokenizer = BPETokenizer.train(train_text, size) if size else None
        corpus = load_corpus(settings.data, tokenizer, block_size)
        config = replace(settings.model, vocab_size=corpus.tokenizer.vocab_size)
        with without_memory():
            cost = GPT(config).flops_per_token(block_size)
        if not budget:
            budget = cost * settings.study_steps
        steps = round(budget / cost)
        train = replace(
            settings.train,
            steps=steps,
            warmup_steps=min(settings.train.warmup_steps, steps),
            weight_decay=0.0,  # so short a run learns nothing by heart
            eval_every=10**9,
            checkpoint_every=10**9,
        )
        name = f"vocab-{size}" if size else "chars"
        facts = {
            "vocab_size": corpus.tokenizer.vocab_size,
            "bytes_per_token": text_bytes / len(corpus.val),
        }
        print(f"{name}: {train.in_words()}")
        with work.log(name, settings) as log:
            result = fit(config, train, corpus, work, log, resume=settings.resume)
            log.finish(**result, **facts)
        bits = result["val_bits_per_byte"]
        rows.append({"tokens": name, **facts, "steps": steps, "bits per byte": bits})
    print("\n" + table(rows))
    draw(work.logs, work.reports)
    return {row["tokens"]: row["bits per byte"] for row in rows}


STUDIES = {"vocab": study_vocab}
