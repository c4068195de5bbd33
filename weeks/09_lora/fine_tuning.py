"""The steps of week 9's experiment: the model and the data, what is trained, what is measured and kept."""

import gc
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from names import STEWARD, kept_under, model_name
from own import compute_with
from shared import checkpoint
from shared.adapters import save_adapter
from shared.adapters.artefacts import base_on_the_hub, save_tokenizer
from shared.adapters.conversations import Conversation, read_conversations, split_off
from shared.adapters.instructions import Instructions, Template, answer, template_for
from shared.adapters.methods import count_trained_and_frozen, make_trainable
from shared.adapters.sft import Talks
from shared.course.workspace import Workspace
from shared.data.corpus import Corpus, load_corpus
from shared.evaluation import evaluate
from shared.models.gpt import GPT
from shared.models.pretrained import load_model
from shared.registry import LanguageModel
from shared.runtime import ROOT
from shared.training import TrainConfig, Trainer
from shared.training.base_model import trained_base_model
from shared.training.profiling import peak_memory, reset_peak_memory

if TYPE_CHECKING:
    from run import Settings

LEARNING_RATES = {
    "course": {"full": 5e-4, "lora": 2e-3, "qlora": 2e-3, "dora": 2e-3, "prompt": 0.5},
    "other": {"full": 1e-4, "lora": 2e-3, "qlora": 2e-3, "dora": 2e-3, "prompt": 0.05},
}
"""What suits a method: for the course's small model chosen on the held-out answers, from values two to three
times apart; for others a guess.
"""
TEXT_WINDOW = 128


def tune_and_observe(settings: "Settings", device: torch.device) -> tuple[Workspace, dict[str, Any], Path]:
    """One run: observes the model, trains what the method trains, and observes it again.

    Returns the week's folders, the run's metrics, and the folder with what was trained.
    """
    talks = read_talks(settings)  # before the model is loaded, or trained
    model, corpus = load_base(settings)
    task = task_of(settings, model, talks)
    asked_for = settings.questions if settings.measures_change else 0
    questions = [talk[:-1] for talk in talks.held_out[:asked_for]]
    model.to(device)
    base_loss = task.evaluate(model, TrainConfig(), device)["val_loss"]
    before = observe(model, corpus, task.template, questions, settings)
    first_tokens = task.template.prompt([{"role": "user", "content": "?"}])
    model = trainable(model, settings, first_tokens).to(device)
    trained, frozen = count_trained_and_frozen(model)
    print(f"{settings.run}: {trained:,} numbers are trained, {frozen:,} stay as they are")
    work = Workspace(__file__, settings, corpus.name, device, name=kept_under(settings))
    her_layer = work.mine("LoRALinear", None)
    if her_layer is not None:
        compute_with(model, her_layer)
    with work.log(settings.run, settings) as log:
        config = train_config(settings, task)
        print(f"{settings.run}: {config.in_words()}")
        gc.collect()
        reset_peak_memory(device)
        folder = work.checkpoints / settings.run
        trainer = Trainer(model, task, config, log, folder, device=device, description=settings.run)
        summary = trainer.fit(settings.resume)
        memory = peak_memory(device)
        model = trainer.take_best()
        after = observe(model, corpus, task.template, questions, settings)
        kept = save_trained(model, folder, settings)
        result = summary | {
            "trainable": trained,
            "share_trainable": trained / (trained + frozen),
            "megabytes": sum(path.stat().st_size for path in kept.glob("*.safetensors")) / 1e6,
            "peak_memory_gb": memory / 1e9 if memory else None,
            "lr": config.lr,
            "examples": len(task.train),
            "base_loss": base_loss,
            **change(before, after, settings),
        }
        asked = [question[-1]["content"] for question in questions]
        if asked:
            log.artifact(talk=[list(talk) for talk in zip(asked, before.answers, after.answers)])
        return work, log.finish(**{key: v for key, v in result.items() if v is not None}), kept


def change(before: "Behaviour", after: "Behaviour", settings: "Settings") -> dict[str, float | None]:
    """What became of the old text, and of the answers; {} where that was not measured."""
    if before.text_perplexity is None or after.text_perplexity is None:
        return {}
    return {
        "text_perplexity_before": before.text_perplexity,
        "text_perplexity": after.text_perplexity,
        "forgotten": after.text_perplexity / before.text_perplexity - 1,
        "in_form_before": share_in_form(before.answers, settings),
        "in_form": share_in_form(after.answers, settings),
    }


def load_base(settings: "Settings") -> tuple[GPT, Corpus]:
    """The model that is to learn, and the text on which forgetting is measured.

    Raises ValueError where there is no such model, or it has no tokenizer.
    """
    if settings.model == "course":
        return trained_base_model(
            settings.preset,
            data=settings.text,
            device=settings.device,
            train=settings.base,
            resume=settings.resume,
        )
    model = load_model(settings.model, "cpu", torch.float32)
    if model.tokenizer is None:
        raise ValueError(f"{settings.model} has no tokenizer: the text cannot be cut into its tokens")
    return model, load_corpus(settings.text, model.tokenizer, TEXT_WINDOW)


def read_talks(settings: "Settings") -> Talks:
    """The conversations of the settings' files. Raises ValueError for files that cannot be read."""
    shipped = settings.data == STEWARD
    skip = settings.skip_bad_lines
    train = read_conversations(ROOT / STEWARD if shipped else settings.data, skip)
    if settings.held_out or shipped:
        own = Path(__file__).with_name("steward_held_out.jsonl")
        return Talks(train, read_conversations(settings.held_out or own, skip))
    train, held_out = split_off(train, seed=settings.seed)
    print(f"{len(held_out)} of {len(train) + len(held_out)} conversations are held out, drawn by chance")
    return Talks(train, held_out)


def task_of(settings: "Settings", model: GPT, talks: Talks) -> Instructions:
    """What there is to learn, in the model's tokens and template."""
    train, held_out = talks
    name = f"{Path(settings.data).stem}-{len(train)}"
    # A soft prompt stands once in front of a row: each example has a row of its own.
    pack = settings.method != "prompt"
    template = template_for(model.tokenizer)
    return Instructions(train, held_out, template, room_for_text(settings, model), name, pack=pack)


def room_for_text(settings: "Settings", model: GPT) -> int:
    """Tokens in a row. Raises ValueError where a soft prompt leaves none of them."""
    room = min(settings.block_size, model.config.block_size)
    if settings.method != "prompt":
        return room
    if settings.virtual_tokens >= room:
        raise ValueError(
            f"virtual_tokens={settings.virtual_tokens} leaves no room for text in a context of {room} tokens:"
            " take fewer"
        )
    return room - settings.virtual_tokens


def trainable(model: GPT, settings: "Settings", prompt: list[int]) -> LanguageModel:
    """The model as the method wants it: what is trained requires gradients, the rest does not.

    prompt: the tokens that prompt tuning begins with.
    """
    options: dict[str, Any] = {}
    if settings.method == "qlora":
        options["scheme"] = settings.scheme
    if settings.method == "prompt":
        options |= {"virtual_tokens": settings.virtual_tokens, "prompt": prompt}
    return make_trainable(model, settings.method, settings.adapter, seed=settings.seed, **options)


def peak_rate(settings: "Settings") -> float:
    """The peak learning rate: the settings', or what suits the method."""
    rates = LEARNING_RATES.get(model_name(settings.model), LEARNING_RATES["other"])
    return settings.lr or rates[settings.method]


def train_config(settings: "Settings", task: Instructions) -> TrainConfig:
    """Steps and batch size, from the number of examples and how many of them fit in a row."""
    rows = len(task.rows(task.train, range(len(task.train))))
    batch_size = max(1, round(settings.examples_per_step * rows / len(task.train)))
    steps = settings.steps or math.ceil(settings.epochs * rows / batch_size)
    every = max(1, math.ceil(steps / settings.evaluations))
    return TrainConfig(
        steps=steps,
        batch_size=batch_size,
        block_size=task.block_size,
        lr=peak_rate(settings),
        schedule="linear",
        final_lr=0.0,
        warmup_steps=math.ceil(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        beta2=0.99,
        seed=settings.seed,
        eval_every=every,
        checkpoint_every=every,
        log_every=1,
    )


@dataclass(frozen=True)
class Behaviour:
    """How a model writes, before or after."""

    text_perplexity: float | None
    """On the old text's held-out part; None where that was not measured."""
    answers: list[str]
    """To the held-out questions."""


def observe(
    model: nn.Module,
    corpus: Corpus,
    template: Template,
    questions: list[Conversation],
    settings: "Settings",
) -> Behaviour:
    """The perplexity on the old text, where it is to be measured, and the answers to `questions`,
    conversations that lack one.
    """
    perplexity = text_perplexity(model, corpus, settings) if settings.measures_change else None
    return Behaviour(perplexity, [answer(model, template, question) for question in questions])


def text_perplexity(model: nn.Module, corpus: Corpus, settings: "Settings") -> float:
    """Perplexity on the old text's held-out part."""
    evaluation = evaluate(
        model,
        corpus.val,
        TEXT_WINDOW,
        corpus.token_bytes,
        batch_size=8,
        max_windows=settings.text_windows,
    )
    return evaluation.perplexity


def share_in_form(replies: list[str], settings: "Settings") -> float | None:
    """Share of answers in the steward's form: "Good friend, ...", and at the end a sentence that begins with
    "For". None for other data.
    """
    if settings.data != STEWARD:
        return None
    in_form = [
        reply.startswith("Good friend, ") and ". For " in reply and reply.endswith(".") for reply in replies
    ]
    return sum(in_form) / len(replies)


def save_trained(model: LanguageModel, folder: Path, settings: "Settings") -> Path:
    """Saves what was trained: the adapter in PEFT's form, or the whole model. Returns its folder."""
    if settings.method == "full":
        return checkpoint.save(model, folder / "model", model.tokenizer)
    base = None if settings.model == "course" else base_on_the_hub(settings.model, model.config)
    save_adapter(model, folder / "adapter", base_model=base)
    save_tokenizer(model.tokenizer, folder / "adapter", model.config.block_size)
    return folder / "adapter"
