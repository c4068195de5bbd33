"""Week 9. Fine-tuning on one's own conversations by one call: it says first what will happen, and ends with a
folder that others load.

    fine_tune(SFTSettings(model="smollm2", data="mine.jsonl", out="checkpoints/mine"))

`python -m shared.adapters` is the same from the command line. Supervised fine-tuning (SFT) is the field's
name for it.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tqdm import tqdm

from shared.adapters.artefacts import (
    AdapterCard,
    base_on_the_hub,
    save_artefact,
    save_base,
)
from shared.adapters.attach import adapted_layers
from shared.adapters.conversations import Conversation, read_conversations, split_off
from shared.adapters.instructions import Instructions, answer, template_for
from shared.adapters.lora import LoRAConfig
from shared.adapters.methods import (
    count_trained_and_frozen,
    estimate_tuning_memory,
    make_trainable,
)
from shared.checks import Checks
from shared.data.corpus import load_corpus
from shared.evaluation import evaluate
from shared.models.gpt import GPT
from shared.models.names import BY_NAME, ModelName
from shared.models.pretrained import load_model
from shared.quantization.modules import quantization_of
from shared.quantization.packing import SCHEMES
from shared.registry import LanguageModel
from shared.runtime import RunLog
from shared.tokenizers.base import Tokenizer
from shared.trackers import TrackerName, check_tracker
from shared.training.callbacks import Callback
from shared.training.config import TrainConfig
from shared.training.distributed import Processes, process_group
from shared.training.precision import precision
from shared.training.trainer import Trainer

USUAL_RATES = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4, "dora": 2e-4}
"""Where people begin: an adapter takes about ten times the rate of all weights. A small model, or few steps,
often want several times more: try three, and let the held-out loss choose.
"""
TEXT_WINDOWS = 128
"""So many windows of the old text are read, spread over its held-out part."""


@dataclass(frozen=True)
class SFTSettings:
    """Fine-tunes a model on conversations: its answers are learned."""

    model: ModelName
    data: str
    """Conversations, as JSONL or a JSON array: {"messages"}, {"prompt", "response"} or {"prompt",
    "completion"}, Alpaca's {"instruction", "input", "output"}, or ShareGPT's {"conversations"}.
    """
    out: str
    """The folder for what is trained. The run's log and its checkpoints lie in it, too."""
    held_out: str | None = None
    """The same for measuring; none: a tenth of `data`, drawn by chance."""
    skip_bad_lines: bool = False
    """Leave out what cannot be read of the data, and count it, instead of stopping."""
    method: Literal["lora", "qlora", "dora", "full"] = "lora"
    adapter: LoRAConfig = field(
        default_factory=lambda: LoRAConfig(r=16, lora_alpha=32.0, target_modules=("all-linear",))
    )
    """For lora, qlora and dora."""
    scheme: Literal["nf4", "int4", "int8"] = "nf4"
    """How qlora's base is packed."""
    lr: float | None = None
    """The peak learning rate; none: what is usual for the method."""
    schedule: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    """After the warmup, down to 0 at the last step; constant: not at all."""
    warmup_steps: int | None = None
    """none: a tenth of an epoch's, and no more than `steps`."""
    epochs: float = 3.0
    """How often each example is read. A finished run goes on with --resume and more of them."""
    steps: int | None = None
    """So many instead of `epochs`."""
    batch_size: int = 8
    """Rows at a time."""
    grad_accum_steps: int = 1
    """Batches of a step; each counts by the tokens that are learned in it."""
    block_size: int = 512
    """Tokens in a row; the model's own context where that is shorter."""
    pack: bool = True
    """Several examples share a row, and do not see each other."""
    truncate: bool = False
    """Cut off what is too long for a row; without it, such an example is left out, and counted."""
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    """Longest gradient; 0: any."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What a step computes in; weights and adapters stay in fp32."""
    recompute: bool = False
    """Keep only each block's input, and compute the rest again in the backward: less memory, more time."""
    eval_every: int | None = None
    """Steps from one held-out loss to the next; none: half an epoch's. The state with the lowest is kept."""
    patience: int | None = None
    """Stop after so many evaluations without a new lowest loss; none: never."""
    sample_every: int | None = None
    """Steps from one answer to a held-out question to the next, printed while it trains; none: none."""
    sample_tokens: int = 40
    """The length of such an answer, at most."""
    answers: int = 0
    """So many held-out questions are answered at the end, at length."""
    old_text: str | None = None
    """Measure what is forgotten: the perplexity, before and after, of the held-out part of this text
    (tinyshakespeare, shakespeare, or a file).
    """
    tracker: TrackerName = "none"
    """Where the metrics go beside the log: none, tensorboard, wandb (offline unless WANDB_MODE says online)
    or trackio.
    """
    device: str = "auto"
    seed: int = 1337
    resume: bool = False
    """Go on with an interrupted run, or with a finished one that is to have more epochs."""

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.one_of("method", tuple(USUAL_RATES))
        checks.one_of("scheme", tuple(SCHEMES))
        checks.at_least(1, "batch_size", "grad_accum_steps", "block_size", "steps", "sample_tokens")
        checks.at_least(1, "eval_every", "sample_every", "patience")
        checks.not_negative("warmup_steps", "answers", "weight_decay", "grad_clip")
        checks.above(0, "epochs", "lr")
        checks.seed()
        checks.finish()
        check_tracker(self.tracker)

    @property
    def peak_lr(self) -> float:
        """The peak learning rate."""
        return USUAL_RATES[self.method] if self.lr is None else self.lr


# ---- what will happen


@dataclass(frozen=True)
class SFTPlan:
    """What a run will do, counted before it starts."""

    train: TrainConfig
    facts: dict[str, str]
    """A line each, for people."""

    def __str__(self) -> str:
        return "\n".join(f"{name}: {fact}" for name, fact in self.facts.items())


def plan_steps(settings: SFTSettings, task: Instructions) -> TrainConfig:
    """The Trainer's settings. But for the steps, none depends on the number of epochs (where these are at
    least a tenth of one): so a finished run can be resumed with more.
    """
    rows = len(task.rows(task.train, range(len(task.train))))
    rows_per_step = settings.batch_size * settings.grad_accum_steps
    epoch = max(1, math.ceil(rows / rows_per_step))
    steps = settings.steps or max(1, math.ceil(settings.epochs * rows / rows_per_step))
    usual = min(steps, math.ceil(epoch / 10))
    warmup = usual if settings.warmup_steps is None else settings.warmup_steps
    every = settings.eval_every or max(1, epoch // 2)
    return TrainConfig(
        steps=steps,
        batch_size=settings.batch_size,
        block_size=task.block_size,
        grad_accum_steps=settings.grad_accum_steps,
        lr=settings.peak_lr,
        schedule=settings.schedule,
        final_lr=0.0,
        warmup_steps=warmup,
        weight_decay=settings.weight_decay,
        grad_clip=settings.grad_clip,
        beta2=0.99,
        seed=settings.seed,
        eval_every=every,
        checkpoint_every=every,
        log_every=1,
        patience=settings.patience,
    )


def plan(settings: SFTSettings, model: LanguageModel, task: Instructions, dtype: torch.dtype) -> SFTPlan:
    """What fine-tuning `model`, which `make_trainable` has prepared, on `task` will do. dtype: a step's."""
    config = plan_steps(settings, task)
    rows = len(task.rows(task.train, range(len(task.train))))
    read = sum(len(example.ids) - 1 for example in task.train)
    learned = sum(sum(example.mask[1:]) for example in task.train)
    rows_per_step = config.batch_size * config.grad_accum_steps
    trained, frozen = count_trained_and_frozen(model)
    try:
        memory = estimate_tuning_memory(model, config, dtype, settings.recompute).in_words()
    except ValueError as error:
        memory = f"not estimated ({error})"
    facts = {
        "data": f"{len(task.train):,} conversations to learn from, {len(task.val):,} held out",
        "tokens": f"{read:,} an epoch, {learned:,} of them learned ({learned / read:.0%})",
        "rows": f"{rows:,} of {config.block_size} tokens, {read / (rows * config.block_size):.0%} full",
        "steps": (
            f"{config.steps:,}, each of {config.grad_accum_steps} x {config.batch_size} rows:"
            f" {config.steps * rows_per_step / rows:.1f} epochs; measured every {config.eval_every}"
        ),
        "rate": f"{config.lr:g}, {config.schedule} after {config.warmup_steps} steps of warmup",
        "method": _method_in_words(settings, model),
        "trained": f"{trained:,} of {trained + frozen:,} numbers ({trained / (trained + frozen):.2%})",
        "precision": settings.precision + (", activations recomputed" if settings.recompute else ""),
        "memory": memory,
    }
    return SFTPlan(config, facts)


def _method_in_words(settings: SFTSettings, model: LanguageModel) -> str:
    if settings.method == "full":
        return "all weights"
    adapter = settings.adapter
    base = quantization_of(model)
    on = f" on a base in {base['scheme']}" if base else ""
    return (
        f"{settings.method}, rank {adapter.r}, alpha {adapter.lora_alpha:g} (B A times {adapter.scale:g}), on"
        f" {len(adapted_layers(model))} layers{on}"
    )


# ---- doing it


@dataclass(frozen=True)
class SFTResult:
    """What fine-tuning gave."""

    model: LanguageModel
    """In its best state, on the device it was trained on."""
    folder: Path
    """What was trained, as others load it."""
    usage: str
    """Python that does; "" in all processes but the first."""
    summary: dict[str, Any]
    """The Trainer's, and what was measured on request."""


def fine_tune(settings: SFTSettings) -> SFTResult:
    """Trains, and writes the folder `out`. Under torchrun, several processes share each step (DDP).

    Raises ValueError for files, a model, or settings that cannot be; KeyboardInterrupt once Ctrl-C's step is
    saved.
    """
    _check_out(settings)
    talks = sft_talks(settings)  # before the model is loaded
    with process_group(settings.device) as (device, rank, world_size):
        number_format = precision(settings.precision, device)
        processes = Processes("ddp" if world_size > 1 else "none", device, recompute=settings.recompute)
        base = load_model(settings.model, device, torch.float32)  # stored in less or not, it is trained
        task = sft_task(settings, base, talks)
        base_name = _name_of_base(settings, base, rank)
        before = _forgetting(settings, base, task.tokenizer, "before")
        model = make_trainable(
            base, settings.method, settings.adapter, scheme=settings.scheme, seed=settings.seed
        ).to(device)
        planned = plan(settings, model, task, number_format.dtype)
        print(planned, flush=True)
        out = Path(settings.out)
        usage = ""
        with _log(settings, device) if rank == 0 else nullcontext() as log:
            trainer = Trainer(
                model,
                task,
                planned.train,
                log,
                out / "checkpoints",
                device=device,
                description=out.name,
                precision=number_format,
                processes=processes,
                callbacks=[_Sampler(settings, task, talks, rank)],
            )
            summary = trainer.fit(settings.resume)
            trainer.take_best().eval()
            summary |= before | _forgetting(settings, model, task.tokenizer, "after")
            if log is not None:
                usage = save_artefact(model, out, base_name, _card(settings, planned, summary))
                log.artifact(answers=_answers(settings, model, task, talks))
                log.finish(**summary)
        processes.barrier()
    return SFTResult(model, out, usage, summary)


def _check_out(settings: SFTSettings) -> None:
    """Raises ValueError where `out` has a model, beside which no adapter can lie."""
    if settings.method != "full" and (Path(settings.out) / "config.json").exists():
        raise ValueError(f"{settings.out} holds a model: choose another folder for its adapter")


class Talks(NamedTuple):
    """The conversations to learn from, and those to measure on."""

    train: list[Conversation]
    held_out: list[Conversation]


def sft_talks(settings: SFTSettings) -> Talks:
    """The conversations of the settings' files. Raises ValueError for files that cannot be read."""
    train = read_conversations(settings.data, settings.skip_bad_lines)
    if settings.held_out is not None:
        return Talks(train, read_conversations(settings.held_out, settings.skip_bad_lines))
    train, held_out = split_off(train, seed=settings.seed)
    print(f"{len(held_out)} of {len(train) + len(held_out)} conversations are held out, drawn by chance")
    return Talks(train, held_out)


def sft_task(settings: SFTSettings, model: GPT, talks: Talks) -> Instructions:
    """What there is to learn, in the model's tokens and template. Raises ValueError for a model without a
    tokenizer.
    """
    if model.tokenizer is None:
        raise ValueError(
            f"{settings.model} has no tokenizer: the conversations cannot be cut into its tokens"
        )
    return Instructions(
        talks.train,
        talks.held_out,
        template_for(model.tokenizer),
        min(settings.block_size, model.config.block_size),
        f"{Path(settings.data).stem}-{len(talks.train)}",
        pack=settings.pack,
        truncate=settings.truncate,
    )


def _name_of_base(settings: SFTSettings, base: GPT, rank: int) -> str | None:
    """By what name PEFT finds the base. One that only this course reads is written into `out` first."""
    name = base_on_the_hub(settings.model, base.config)
    if name is None and settings.method != "full" and rank == 0:
        return save_base(base, Path(settings.out) / "base")
    return name


def _log(settings: SFTSettings, device: torch.device) -> RunLog:
    folder = Path(settings.out) / "log"
    return RunLog(folder, settings, device, resume=settings.resume, tracker=settings.tracker)


class _Sampler(Callback):
    """Prints the answer to a held-out question every so many steps, each time to the next one."""

    def __init__(self, settings: SFTSettings, task: Instructions, talks: "Talks", rank: int):
        self._every = settings.sample_every if rank == 0 else None
        self._tokens = settings.sample_tokens
        self._task = task
        self._questions = [talk[:-1] for talk in talks.held_out]

    def on_step(self, trainer: Trainer) -> None:
        if self._every is None or trainer.step % self._every:
            return
        question = self._questions[trainer.step // self._every % len(self._questions)]
        trainer.model.eval()
        said = answer(trainer.model, self._task.template, question, self._tokens)
        trainer.model.train()
        tqdm.write(f"  step {trainer.step}\n  > {question[-1]['content']}\n  {said}")


def _answers(
    settings: SFTSettings, model: LanguageModel, task: Instructions, talks: Talks
) -> list[list[str]]:
    """The held-out questions that were asked for, with the model's answers, printed too."""
    pairs = []
    for talk in talks.held_out[: settings.answers]:
        said = answer(model, task.template, talk[:-1])
        print(f"\n> {talk[-2]['content']}\n{said}")
        pairs.append([talk[-2]["content"], said])
    return pairs


def _forgetting(
    settings: SFTSettings, model: LanguageModel, tokenizer: Tokenizer, when: str
) -> dict[str, float]:
    """The perplexity on the old text, where it was asked for."""
    if settings.old_text is None:
        return {}
    time = min(settings.block_size, model.config.block_size)
    corpus = load_corpus(settings.old_text, tokenizer, time)
    evaluation = evaluate(model, corpus.val, time, corpus.token_bytes, max_windows=TEXT_WINDOWS)
    return {f"old_text_perplexity_{when}": evaluation.perplexity}


def _card(settings: SFTSettings, planned: SFTPlan, summary: Mapping[str, Any]) -> AdapterCard:
    facts = {name: planned.facts[name] for name in ("method", "trained", "tokens", "steps", "rate")}
    figures = [{"measured": "held-out loss (nats per token)", "value": f"{summary['best_val_loss']:.4g}"}]
    for when in ("before", "after"):
        value = summary.get(f"old_text_perplexity_{when}")
        if value is not None:
            figures.append({"measured": f"perplexity on the old text, {when}", "value": f"{value:.4g}"})
    about = {"Base": settings.model, "Data": Path(settings.data).name}
    if settings.model in BY_NAME:
        about["Base"] += (
            f", {BY_NAME[settings.model].hub}, as its file in 4 bits; on the hub's own weights the adapter"
            " computes a little differently"
        )
    return AdapterCard(
        f"{Path(settings.model).name}, fine-tuned on {Path(settings.data).stem}",
        about | {name.capitalize(): fact for name, fact in facts.items()},
        figures,
    )
