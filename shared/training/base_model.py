"""Week 6. The course's own model: a small GPT-2 on its own tokens, which weeks 7 to 12 go on with.

    model, corpus = trained_base_model("laptop", data="tinyshakespeare")

That is the best checkpoint; where there is none, the model is trained first.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from shared import checkpoint
from shared.course.runs import output_root
from shared.course.workspace import WeekSettings, Workspace
from shared.data.corpus import Corpus, TokenDataset, load_corpus, read_text, split_text
from shared.data.shards import INDEX, open_shards
from shared.devices import device_name
from shared.evaluation import known_words
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import ROOT, RunLog, read_json
from shared.sampling.generate import generate
from shared.tokenizers.bpe import BPETokenizer
from shared.training.config import TrainConfig
from shared.training.distributed import Processes, process_group
from shared.training.execution import OneProcess, Precision
from shared.training.trainer import Trainer

TOPIC = "06_gpt2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Draw = Callable[[Path, Path], list[Path]]
"""Makes plots from logs, given the folders of logs and of plots; returns their files."""
ReadWith = Callable[[Workspace, Corpus], Corpus]
"""The same corpus, whose tokens are read in another way."""
NumberFormat = Callable[[str, torch.device], Precision]
"""What a step computes in, by the name of its dtype."""


@dataclass(frozen=True)
class BaseModelSettings(WeekSettings):
    """How the course's model is trained.

    `data` may also be a folder of shards, as `python -m shared.data.shards` writes it.
    """

    vocab_size: int = 1024
    """Of our own tokenizer, trained on the text; shards bring theirs."""
    model: GPTConfig = GPTConfig.preset("mini", block_size=256)
    """A small GPT-2 with today's blocks; its vocabulary is the tokenizer's. --study shape has GPT-2's own."""
    train: TrainConfig = TrainConfig(
        steps=3600,
        batch_size=3,
        block_size=256,
        optimizer="muon",
        lr=0.006,
        muon_lr=0.02,
        muon_momentum=0.9,
        schedule="linear",
        warmup_steps=30,
        final_lr=0.0,
        weight_decay=0.2,
        beta2=0.95,
        grad_clip=0.0,
        eval_every=600,
        checkpoint_every=600,
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What a step computes in; the weights stay float32. float16 is for GPUs that have no bfloat16, such as a
    T4.
    """
    compile_model: bool = False
    parallel: Literal["none", "ddp", "fsdp"] | None = None
    """How processes share the work; None: ddp where torchrun started several."""
    recompute: bool = False
    """Gradient checkpointing: keep less, compute it again on the way back."""
    pad_vocabulary: bool = False
    """Compute the output layer with rows of zeros up to a multiple of 64, which suits a GPU's matrix units.
    Logits and files stay as they are.
    """
    sample_tokens: int = 600
    """Of the text that the trained model writes."""

    def idle(self) -> dict[str, str]:
        idle = super().idle()
        idle["model.vocab_size"] = "it is the tokenizer's"
        if (Path(self.data) / INDEX).exists():
            idle["vocab_size"] = "shards bring their tokenizer"
        return idle


def _smoke() -> BaseModelSettings:
    laptop = BaseModelSettings()
    train = replace(
        laptop.train,
        steps=30,
        batch_size=4,
        block_size=32,
        eval_every=10,
        eval_windows=20,
        checkpoint_every=10,
    )
    model = replace(laptop.model, n_layer=2, n_head=2, n_embd=64)
    return replace(laptop, preset="smoke", vocab_size=280, model=model, train=train, sample_tokens=100)


BASE_PRESETS = {
    "smoke": _smoke(),
    "laptop": BaseModelSettings(),
    "gpu": BaseModelSettings(
        preset="gpu",
        data="data/fineweb-edu",
        model=GPTConfig.preset("gpt2"),
        train=TrainConfig(
            steps=19_073,
            batch_size=32,
            block_size=1024,
            grad_accum_steps=16,
            lr=6e-4,
            warmup_steps=715,
            beta2=0.95,
            weight_decay=0.1,
            eval_every=250,
            eval_windows=1024,
            checkpoint_every=250,
        ),
        dtype="bfloat16",
        compile_model=True,
        pad_vocabulary=True,
    ),
}


def open_corpus(settings: BaseModelSettings) -> Corpus:
    """Shards as they are; a text with a tokenizer trained on its training part."""
    if (Path(settings.data) / INDEX).exists():
        shards = open_shards(settings.data)
        if settings.data == BASE_PRESETS["gpu"].data:
            return shards
        return replace(shards, name=f"{shards.name}-{shards.fingerprints['training data'][:8]}")
    if settings.data == BASE_PRESETS["gpu"].data:
        command = f"python -m shared.data.shards --source fineweb-edu --out {settings.data} --tokens 10B"
        raise ValueError(
            f"there are no shards in {settings.data} yet. Make them first (20 GB of tokens): {command}"
        )
    _, text = read_text(settings.data)
    train_text, val_text = split_text(text)
    block_size = settings.train.block_size
    # Before the tokenizer is trained: what is too short in bytes is too short in tokens.
    TokenDataset(np.frombuffer(val_text.encode(), np.uint8), block_size)
    return load_corpus(settings.data, BPETokenizer.train(train_text, settings.vocab_size), block_size)


def trained_base_model(preset: str, **changes: Any) -> tuple[GPT, Corpus]:
    """The model and its text: the best checkpoint at this preset; trained first where there is none.

    changes: settings other than the preset's, such as data, device, train and resume.
    """
    settings = replace(BASE_PRESETS[preset], **changes)
    corpus = open_corpus(settings)
    folder = output_root() / "checkpoints" / TOPIC / settings.preset / corpus.name / "gpt2" / "best"
    if checkpoint.find(folder) is None:
        print(
            f"this needs the model of week 6, and there is no checkpoint in {folder}: training it first, "
            f"at the preset {settings.preset}"
        )
        train_base_model(settings)
    else:
        _refuse_another_training(settings.train, BASE_PRESETS[preset].train, folder.parent)
    model = checkpoint.load(folder, corpus.tokenizer, "cpu").model
    if not isinstance(model, GPT):
        raise ValueError(f"{folder} holds a {type(model).__name__}, not a GPT")
    model.tokenizer = corpus.tokenizer
    return model, corpus


def _refuse_another_training(wanted: TrainConfig, usual: TrainConfig, kept: Path) -> None:
    """Raises ValueError where what is wanted otherwise than usual is not how the model in `kept` was trained:
    it is taken as it is, and the settings would have no effect.
    """
    last = checkpoint.find(kept / "last")
    then: dict[str, Any] = {}
    if last is not None and (last / "training.json").exists():
        then = read_json(last / "training.json")["config"]
    asked = {name: value for name, value in asdict(wanted).items() if value != getattr(usual, name)}
    unlike = [
        f"{n}={then.get(n, 'unknown')} then, {now} now" for n, now in asked.items() if then.get(n) != now
    ]
    if unlike:
        raise ValueError(
            f"week 6's model is there already, trained with other settings: {'; '.join(unlike)}. Leave them"
            f" out to go on with it, or delete {kept} to train it anew"
        )


def _draw_nothing(logs: Path, reports: Path) -> list[Path]:
    return []


def unscaled_format(dtype: str, device: torch.device) -> Precision:
    """float32 or bfloat16. Raises ValueError for float16, whose loss has to be scaled: week 7 has that."""
    if dtype not in DTYPES:
        raise ValueError(
            f"dtype={dtype}: here it must be one of {', '.join(DTYPES)}; float16 is for week 6's own script,"
            " which scales the loss"
        )
    return Precision(DTYPES[dtype])


def _as_it_is(work: Workspace, corpus: Corpus) -> Corpus:
    return corpus


def train_base_model(
    settings: BaseModelSettings,
    draw: Draw = _draw_nothing,
    read_with: ReadWith = _as_it_is,
    number_format: NumberFormat = unscaled_format,
) -> dict[str, float]:
    """Trains the model, lets it write, and keeps the week's figures.

    They are returned, on the first process; on the others an empty dict is. draw: makes the week's plots from
    its logs, given the folders of logs and of plots; without it none are drawn. read_with: gives the corpus
    another way to its tokens. number_format: makes a step's precision.
    """
    with process_group(settings.device) as (device, rank, size):
        corpus = open_corpus(settings)
        work = Workspace(ROOT / "weeks" / TOPIC / "run.py", settings, corpus.name, device)
        corpus = read_with(work, corpus)
        kind = settings.parallel or ("ddp" if size > 1 else "none")
        processes = Processes(
            kind,
            device,
            settings.compile_model,
            settings.recompute,
            pad_vocabulary=settings.pad_vocabulary,
        )
        if rank > 0:
            train_model(settings, corpus, work, None, processes, number_format=number_format)
            return {}
        with work.log("gpt2", settings) as log:
            result = train_model(settings, corpus, work, log, processes, number_format=number_format)
            return _finish(corpus, work, log, result, draw, sample_tokens=settings.sample_tokens)


def train_model(
    settings: BaseModelSettings,
    corpus: Corpus,
    work: Workspace,
    log: RunLog | None,
    processes: OneProcess,
    *,
    name: str = "gpt2",
    number_format: NumberFormat = unscaled_format,
) -> dict[str, float]:
    """Trains on a corpus; returns the summary, with `wall_seconds` for everything, evaluations included."""
    torch.manual_seed(settings.train.seed)
    block_size = max(settings.model.block_size, settings.train.block_size)
    model = GPT(replace(settings.model, vocab_size=corpus.tokenizer.vocab_size, block_size=block_size))
    trainer = Trainer(
        model,
        corpus,
        settings.train,
        log,
        work.checkpoints / name,
        device=work.device,
        description=name,
        precision=number_format(settings.dtype, work.device),
        processes=processes,
    )
    return {**trainer.fit(settings.resume), "wall_seconds": trainer.wall_seconds}


def _finish(
    corpus: Corpus,
    work: Workspace,
    log: RunLog,
    result: dict[str, float],
    draw: Draw,
    *,
    sample_tokens: int,
) -> dict[str, float]:
    """Lets the best checkpoint write, and closes the week."""
    model = GPT.from_checkpoint(work.checkpoints / "gpt2" / "best", work.device)
    tokenizer = corpus.tokenizer
    ids = generate(model, corpus.start, sample_tokens, temperature=0.8, top_p=0.95, seed=1)
    sample = tokenizer.decode(list(ids))
    words = known_words(sample, tokenizer.decode(corpus.train[: 2**20].tolist()))
    log.artifact(sample=sample)
    log.finish(**result, known_words=words, vocab_size=tokenizer.vocab_size)
    print(f"\nIts text ({words:.0%} of its words occur in the text it learned):\n\n{sample.strip()}")
    print(f"\nhardware: {device_name(work.device)}; {result['tokens_per_second']:,.0f} tokens/s")
    return work.finish(
        {
            "bits_per_byte": result["best_val_bits_per_byte"],
            "val_loss": result["best_val_loss"],
            "perplexity": result["best_val_perplexity"],
            "accuracy": result["best_val_accuracy"],
            "first_loss": result["first_loss"],
            "ln_vocab_size": math.log(tokenizer.vocab_size),
            "vocab_size": tokenizer.vocab_size,
            "known_words": words,
            "parameters": result["parameters"],
            "tokens_per_second": result["tokens_per_second"],
            "train_seconds": result["seconds"],
            "wall_seconds": result["wall_seconds"],
        },
        draw,
    )
