"""Week 9: LoRA. Teaches a model to answer in a certain way without changing its weights: a few numbers beside
them are trained.

python weeks/09_lora/run.py --preset laptop
python weeks/09_lora/run.py --preset laptop --method dora --adapter.r 16 --adapter.lora-alpha 32   # full, lora, qlora, dora or prompt
python weeks/09_lora/run.py --preset laptop --model smollm2 --data my_questions.jsonl  # another model, your own data
python weeks/09_lora/run.py --preset laptop --study compare                            # all methods; with --model smollm2 on the real model
"""

import gc
import math
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from shared import checkpoint
from shared.adapters import LoRAConfig, add_lora, save_adapter
from shared.adapters.instructions import (
    Conversation,
    Instructions,
    answer,
    read_conversations,
    split_off,
    template_for,
)
from shared.adapters.prompts import add_prompt
from shared.commandline import cli, flags
from shared.course.report import (
    COLOURS,
    MARKERS,
    Curve,
    LoggedRun,
    curves,
    figure,
    model_card,
    read_runs,
    save_figure,
)
from shared.course.workspace import WeekSettings, Workspace
from shared.data.corpus import Corpus, load_corpus
from shared.evaluation import evaluate
from shared.models.gpt import GPT
from shared.models.pretrained import load_model
from shared.quantization import quantize
from shared.runtime import (
    ROOT,
    check_seed,
    clock,
    device_name,
    device_of,
    pick_device,
    table,
    write_atomically,
)
from shared.training import TrainConfig, Trainer
from shared.training.base_model import BASE_PRESETS, trained_base_model
from shared.training.profiling import peak_memory, reset_peak_memory

HERE = Path(__file__).resolve().parent
STEWARD = "weeks/09_lora/steward.jsonl"
"""The course's own questions and answers, with the held-out ones beside them in a file of their own."""
METHODS = ("full", "lora", "qlora", "dora", "prompt")
LEARNING_RATES = {
    "course": {"full": 5e-4, "lora": 2e-3, "qlora": 2e-3, "dora": 2e-3, "prompt": 0.5},
    "other": {"full": 1e-4, "lora": 2e-3, "qlora": 2e-3, "dora": 2e-3, "prompt": 0.05},
}
"""What suits a method: for the course's small model chosen on the held-out answers, from values two to three
times apart; for others a guess.
"""
TEXT_WINDOW = 128


def parts_of(run: str) -> tuple[str, str, str]:
    """Method, scheme (QLoRA's) and size of a run. Raises ValueError for another name.

    >>> parts_of("my-model-qlora-nf4-8"), parts_of("full")
    (('qlora', 'nf4', '8'), ('full', '', ''))
    """
    found = re.search(r"(?:^|-)(?:(full)|(lora|dora|prompt)-(\d+)|(qlora)-(?:([a-z]+\d+)-)?(\d+))$", run)
    if not found:
        raise ValueError(f"{run!r} is none of full, lora-RANK, dora-RANK, qlora-SCHEME-RANK, prompt-NUMBER")
    full, method, size, qlora, scheme, rank = found.groups("")
    return full or method or qlora, scheme, size or rank


@dataclass(frozen=True)
class Settings(WeekSettings):
    data: str = STEWARD
    """A JSONL file of conversations: {"prompt", "response"}, Alpaca's {"instruction", "input", "output"}, or
    {"messages"}.
    """
    held_out: str | None = None
    """The same for measuring; None: a tenth of `data`, drawn by chance (the course's own data has a file)."""
    model: str = "course"
    """course (week 6's own), smollm2, or a path: a checkpoint of the course, a GGUF file, a Hugging Face
    folder.
    """
    method: Literal["full", "lora", "qlora", "dora", "prompt"] = "lora"
    adapter: LoRAConfig = LoRAConfig(r=8, lora_alpha=16.0, target_modules=("all-linear",))
    """For lora, qlora and dora."""
    scheme: str = "nf4"
    """How qlora's base is packed: nf4, int4 or int8."""
    virtual_tokens: int = 16
    """Embeddings that prompt tuning puts in front."""
    text: str = "tinyshakespeare"
    """What the course's model was trained on; on its held-out part we see what is forgotten."""
    base: TrainConfig = BASE_PRESETS["laptop"].train
    """How week 6's model is trained, where its checkpoint is not there yet."""
    lr: float | None = None
    """The peak learning rate; None: what suits the method."""
    steps: int | None = None
    """None: as many as `epochs` takes."""
    epochs: float = 4.0
    """How often each example is read."""
    examples_per_step: int = 8
    """About so many; a row of the batch takes as many as fit."""
    block_size: int = 256
    """Tokens in a row; an example that is longer is left out, and counted."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.0
    evaluations: int = 6
    """How often the held-out loss is measured; the best state is kept."""
    seed: int = 1337
    questions: int = 20
    """Held-out ones that are answered before and after."""
    text_windows: int = 128
    """Of the old text, spread over its held-out part."""
    compared: tuple[str, ...] = ("full", "lora-2", "lora-32", "qlora-nf4-8", "dora-8", "prompt-16", "lora-8")
    """The study's runs, a method and its rank or number of embeddings each."""
    study: Literal["compare"] | None = None

    def __post_init__(self) -> None:
        problems = [f"no method is called {self.method!r}; there are: {', '.join(METHODS)}"] * (
            self.method not in METHODS
        )
        counts = ("virtual_tokens", "examples_per_step", "evaluations", "text_windows", "questions")
        problems += [
            f"{name}={getattr(self, name)}: must be at least 1" for name in counts if getattr(self, name) < 1
        ]
        problems += [f"steps={self.steps}: must be at least 1"] * (self.steps is not None and self.steps < 1)
        problems += [f"epochs={self.epochs}: must be above 0"] * (not self.epochs > 0)
        problems += [f"lr={self.lr}: must be above 0"] * (self.lr is not None and not 0 < self.lr < math.inf)
        problems += [f"warmup={self.warmup}: must be from 0 to 1"] * (not 0 <= self.warmup <= 1)
        if problems:
            raise ValueError("; ".join(problems))
        check_seed(self.seed)
        for row in self.compared:
            parts_of(row)

    @property
    def run(self) -> str:
        """What the run is called in the logs."""
        size = {
            "full": "",
            "prompt": f"-{self.virtual_tokens}",
            "qlora": f"-{self.scheme}-{self.adapter.r}",
        }.get(self.method, f"-{self.adapter.r}")
        return f"{model_name(self.model)}-{self.method}{size}"

    def row(self, row: str) -> "Settings":
        """The settings of one of `compared`. Raises ValueError for another name."""
        method, scheme, size = parts_of(row)
        changed = replace(self, study=None, method=method, scheme=scheme or self.scheme)
        if method == "prompt":
            return replace(changed, virtual_tokens=int(size))
        return (
            changed
            if method == "full"
            else replace(changed, adapter=replace(self.adapter, r=int(size), lora_alpha=2.0 * int(size)))
        )


PRESETS = {
    "smoke": Settings(
        preset="smoke",
        base=BASE_PRESETS["smoke"].train,
        steps=6,
        examples_per_step=2,
        evaluations=2,
        questions=2,
        text_windows=8,
        compared=("full", "qlora-int8-2", "prompt-4"),
    ),
    "laptop": Settings(),
    "gpu": Settings(
        preset="gpu",
        model="smollm2",
        epochs=3.0,
        examples_per_step=16,
        block_size=512,
        questions=40,
        text_windows=512,
    ),
}


def main(settings: Settings) -> dict[str, float]:
    """Fine-tunes a model by one method, or by all in turn. Returns what was measured."""
    if settings.study:
        return study_compare(settings)
    device = pick_device(settings.device)
    model, corpus = load_base(settings)
    task, held_out = read_data(settings, model)
    template, questions = task.template, [talk[:-1] for talk in held_out[: settings.questions]]
    model.to(device)
    before = forgotten(model, corpus, settings) | {
        "base_loss": task.evaluate(model, TrainConfig(), device)["val_loss"]
    }
    said_before = [answer(model, template, q) for q in questions]
    model = trainable(model, settings, template.prompt([{"role": "user", "content": "?"}])).to(device)
    base, own = number_of(model, trained=False), number_of(model, trained=True)
    print(f"{settings.run}: {own:,} numbers are trained, {base:,} stay as they are")
    work = Workspace(__file__, settings, corpus.name, device)
    with work.log(settings.run, settings) as log:
        config = train_config(settings, task)
        gc.collect()
        reset_peak_memory(device)
        trainer = Trainer(model, task, config, log, work.checkpoints / settings.run, device, settings.run)
        summary = trainer.fit(settings.resume)
        memory = peak_memory(device)
        model = trainer.take_best()
        after = forgotten(model, corpus, settings)
        said = [answer(model, template, q) for q in questions]
        kept = save_learned(work.checkpoints / settings.run, model, settings)
        result = summary | {
            "trainable": own,
            "share_trainable": own / (own + base),
            "megabytes": sum(p.stat().st_size for p in kept.glob("*.safetensors")) / 1e6,
            "peak_memory_gb": memory / 1e9 if memory else None,
            "lr": config.lr,
            "examples": len(task.train),
            "base_loss": before["base_loss"],
            "text_perplexity_before": before["text_perplexity"],
            "text_perplexity": after["text_perplexity"],
            "forgotten": after["text_perplexity"] / before["text_perplexity"] - 1,
            "in_form_before": in_form(said_before, settings),
            "in_form": in_form(said, settings),
        }
        log.artifact(talk=[[q[-1]["content"], a, b] for q, a, b in zip(questions, said_before, said)])
        result = log.finish(**{k: v for k, v in result.items() if v is not None})
    for question, was, now in read_runs(work.logs)[settings.run].artifacts["talk"][:3]:
        print(f"\n> {question}\nbefore: {was}\nafter:  {now}")
    print(f"\n({device_name(device)}; kept in {kept})")
    if model_name(settings.model) != "course" or settings.method != "lora":
        draw(work.logs, work.reports)
        print("\n" + table([{"metric": k, "value": result[k]} for k in COLUMNS if k in result]))
        return result
    names = (
        "best_val_loss",
        "base_loss",
        "in_form",
        "text_perplexity_before",
        "text_perplexity",
        "trainable",
        "share_trainable",
        "megabytes",
        "seconds",
    )
    finished = work.finish({name: result.get(name) for name in names}, draw)
    card = write_adapter_card(work.logs, work.reports, settings, kept)
    write_atomically(kept / "README.md", card.read_text(encoding="utf-8"))
    return finished


# ---- the model and the data


def model_name(model: str) -> str:
    """What the logs call it."""
    return model if model in ("course", "smollm2") else Path(model).resolve().stem


def load_base(settings: Settings) -> tuple[GPT, Corpus]:
    """The model that is to learn, and the text on which forgetting is measured. Raises ValueError where there
    is no model.
    """
    if settings.model == "course":
        return trained_base_model(
            settings.preset,
            data=settings.text,
            device=settings.device,
            train=settings.base,
            resume=settings.resume,
        )
    model = load_model(settings.model)
    if model.tokenizer is None:
        raise ValueError(f"{settings.model} has no tokenizer: the text cannot be cut into its tokens")
    return model, load_corpus(settings.text, model.tokenizer, TEXT_WINDOW)


def read_data(settings: Settings, model: GPT) -> tuple[Instructions, list[Conversation]]:
    """The task, and the held-out conversations."""
    shipped = settings.data == STEWARD
    train = read_conversations(ROOT / STEWARD if shipped else settings.data)
    if settings.held_out or shipped:
        held_out = read_conversations(settings.held_out or HERE / "steward_held_out.jsonl")
    else:
        train, held_out = split_off(train, seed=settings.seed)
        print(f"{len(held_out)} of {len(train) + len(held_out)} conversations are held out, drawn by chance")
    room = min(settings.block_size, model.config.block_size)
    if settings.method == "prompt":
        if settings.virtual_tokens >= room:
            raise ValueError(
                f"virtual_tokens={settings.virtual_tokens} leaves no room for text in a context of {room}"
                " tokens: take fewer"
            )
        room -= settings.virtual_tokens
    name = f"{Path(settings.data).stem}-{len(train)}"
    # A soft prompt stands once in front of a row: each example has a row of its own.
    return (
        Instructions(
            train, held_out, template_for(model.tokenizer), room, name, pack=settings.method != "prompt"
        ),
        held_out,
    )


def trainable(model: GPT, settings: Settings, prompt: list[int]) -> nn.Module:
    """The model as the method wants it: what is trained requires gradients, the rest does not. prompt: first
    tokens for prompt tuning.
    """
    torch.manual_seed(settings.seed)
    if settings.method == "full":
        return model.requires_grad_(True)
    if settings.method == "prompt":
        return add_prompt(model, settings.virtual_tokens, prompt)
    if settings.method == "qlora":
        model = quantize(model, settings.scheme)
    return add_lora(
        model, replace(settings.adapter, use_dora=settings.method == "dora" or settings.adapter.use_dora)
    )


def number_of(model: nn.Module, trained: bool) -> int:
    """Parameters that are trained, or are not; packed weights count as what they stand for."""
    packed = {
        id(m.packed): m.packed.in_features * m.packed.out_features
        for m in model.modules()
        if hasattr(m, "packed")
    }
    return sum(p.numel() for p in model.parameters() if p.requires_grad == trained) + (
        0 if trained else sum(packed.values())
    )


def train_config(settings: Settings, task: Instructions) -> TrainConfig:
    """Steps and batch size, from the number of examples and how many of them fit in a row."""
    rows = len(task.rows(task.train, range(len(task.train))))
    batch_size = max(1, round(settings.examples_per_step * rows / len(task.train)))
    steps = settings.steps or math.ceil(settings.epochs * rows / batch_size)
    every = max(1, math.ceil(steps / settings.evaluations))
    rates = LEARNING_RATES.get(model_name(settings.model), LEARNING_RATES["other"])
    return TrainConfig(
        steps=steps,
        batch_size=batch_size,
        block_size=task.block_size,
        lr=settings.lr or rates[settings.method],
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


def save_learned(folder: Path, model: nn.Module, settings: Settings) -> Path:
    """What was learned, in a folder: the adapter in PEFT's form, or the whole model."""
    if settings.method == "full":
        return checkpoint.save(folder / "model", model, model.tokenizer)
    return save_adapter(folder / "adapter", model)


# ---- what is measured


def forgotten(model: nn.Module, corpus: Corpus, settings: Settings) -> dict[str, float]:
    """Perplexity on the old text's held-out part."""
    device = device_of(model)
    found = evaluate(
        model,
        corpus.val,
        TEXT_WINDOW,
        corpus.token_bytes,
        batch_size=8,
        max_windows=settings.text_windows,
        device=device,
    )
    return {"text_perplexity": found.perplexity}


def in_form(replies: list[str], settings: Settings) -> float | None:
    """Share of answers in the steward's form: "Good friend, ...", and at the end a sentence that begins with
    "For". None for other data.
    """
    if settings.data != STEWARD:
        return None
    return sum(r.startswith("Good friend, ") and r.endswith(".") and ". For " in r for r in replies) / len(
        replies
    )


def study_compare(settings: Settings) -> dict[str, float]:
    """All methods in turn, each in a process of its own: its peak of memory is then its own too."""
    rows = {}
    for row in settings.compared:
        changed = settings.row(row)
        print(f"\n=== {changed.run} ===", flush=True)
        started, command = clock(), [sys.executable, str(HERE / "run.py"), "--preset", settings.preset]
        done = subprocess.run(command + flags(changed, PRESETS[settings.preset]))
        if done.returncode in (130, -2):
            raise KeyboardInterrupt
        if done.returncode:
            raise ValueError(
                f"{changed.run} ended with exit status {done.returncode} after {clock() - started:.0f} s; the"
                " reason stands above"
            )
        rows[row] = changed
    # Only the name of the text is needed here, and it is where the runs have just written.
    corpus = load_base(settings)[1]
    work = Workspace(__file__, settings, corpus.name, torch.device("cpu"))
    runs = read_runs(work.logs)
    found = {row: runs[changed.run].summary for row, changed in rows.items()}
    print(
        "\n"
        + table(
            [
                {"method": row} | {label: summary.get(key) for key, label in COLUMNS.items()}
                for row, summary in found.items()
            ]
        )
    )
    draw(work.logs, work.reports)
    return {f"{row}_loss": summary["best_val_loss"] for row, summary in found.items()}


# ---- tables, plots, the card


COLUMNS = {
    "trainable": "numbers trained",
    "megabytes": "file (MB)",
    "peak_memory_gb": "peak memory (GB)",
    "seconds": "training (s)",
    "base_loss": "loss before",
    "best_val_loss": "loss after",
    "in_form": "answers in form",
    "forgotten": "old text: perplexity up by",
}
MODELS = {"course": "week 6's model", "smollm2": "SmolLM2-135M"}
LABELS = {"full": "all weights", "lora": "LoRA", "dora": "DoRA", "qlora": "QLoRA", "prompt": "soft prompt"}


def run_label(run: str) -> str:
    """A run's name for people.

    >>> run_label("course-lora-8"), run_label("smollm2-prompt-16"), run_label("smollm2-qlora-nf4-8")
    ('LoRA, rank 8', 'soft prompt of 16', 'QLoRA (nf4), rank 8')
    """
    method, scheme, size = parts_of(run)
    name = f"{LABELS[method]} ({scheme})" if scheme else LABELS[method]
    return name + (f" of {size}" if method == "prompt" else f", rank {size}" if size else "")


def runs_of(logs: Path) -> dict[str, dict[str, LoggedRun]]:
    """The finished runs of each model, by method and size."""
    found: dict[str, dict[str, LoggedRun]] = {}
    place = lambda r: (model_of(r), list(LABELS).index(parts_of(r.name)[0]), r.summary["trainable"], r.name)
    for run in sorted((r for r in read_runs(logs).values() if "best_val_loss" in r.summary), key=place):
        found.setdefault(model_of(run), {})[run.name] = run
    return found


def model_of(run: LoggedRun) -> str:
    """What the logs call a run's model."""
    return model_name(run.run["settings"]["model"])


def draw(logs: Path, out: Path) -> list[Path]:
    """The week's plots, from its logs."""
    models = runs_of(logs)
    plots = []
    for model, runs in models.items():
        lines = [Curve(run, run_label(name)) for name, run in runs.items()]
        if any(len(run.series("val_loss")[0]) > 1 for run in runs.values()):
            title, before = (
                f"Held-out answers while {MODELS.get(model, model)} learns",
                next(iter(runs.values())).summary["base_loss"],
            )
            ylabel = "loss on held-out answers (nats per token)"
            plots.append(
                curves(
                    out / f"{model}_curves.png",
                    lines,
                    title,
                    ylabel=ylabel,
                    levels={"before": before},
                    ylim=(None, 1.1 * before),
                )
            )
    if models:
        plots.append(save_figure(comparison_figure(models), out / "comparison.png"))
    return plots


def comparison_figure(models: dict[str, dict[str, LoggedRun]]) -> Any:
    """Above: how much is trained against how well it answers. Below: what the model forgets. A column for
    each model.
    """
    fig, axes = figure(7.4 * len(models), 9.2, nrows=2, ncols=len(models), squeeze=False)
    labels = list(
        dict.fromkeys(run_label(name) for runs in models.values() for name in runs)
    )  # of one colour in every column
    for column, (model, runs) in zip(axes.T, models.items()):
        top, bottom = column
        largest = max(run.summary["seconds"] for run in runs.values())
        for name, run in runs.items():
            s, i = run.summary, labels.index(run_label(name))
            look = dict(color=COLOURS[i % 8], marker=MARKERS[i % 8], alpha=0.75, edgecolor="black")
            top.scatter(s["trainable"], s["best_val_loss"], s=60 + 300 * s["seconds"] / largest, **look)
            memory = f", {s['peak_memory_gb']:.1f} GB" if "peak_memory_gb" in s else ""
            top.scatter(
                [],
                [],
                s=70,
                label=f"{run_label(name)}: {s['seconds']:.0f} s{memory}, file {s['megabytes']:.3g} MB",
                **look,
            )
        top.set_xscale("log")
        top.margins(x=0.12, y=0.15)
        top.set(
            title=f"{MODELS.get(model, model)}: how much is trained, how well it answers",
            xlabel="numbers trained (logarithmic)",
        )
        top.set_ylabel("loss on held-out answers (nats per token)")
        before = next(iter(runs.values())).summary["base_loss"]
        top.legend(
            frameon=False,
            fontsize=9,
            title=f"area: time. Before training the loss is {before:.2f}",
            title_fontsize=9,
        )
        names = [run_label(name) for name in runs]
        bottom.barh(
            names,
            [100 * run.summary["forgotten"] for run in runs.values()],
            color=[COLOURS[labels.index(n) % 8] for n in names],
        )
        for i, run in enumerate(runs.values()):
            value = 100 * run.summary["forgotten"]
            bottom.annotate(
                f"{value:+.1f} %",
                (max(value, 0), i),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=10,
            )
        bottom.invert_yaxis()
        bottom.margins(x=0.15)
        bottom.set(
            title="What it costs on the old text", xlabel="increase of perplexity on held-out Shakespeare (%)"
        )
    return fig


def write_adapter_card(logs: Path, out: Path, settings: Settings, folder: Path) -> Path:
    """The fine-tuned model's card, from the logs."""
    run, targets = read_runs(logs)[settings.run], settings.adapter.target_modules
    layers = "all linear layers but the output" if targets == ("all-linear",) else ", ".join(targets)
    s, where = run.summary, folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    figures = [
        {
            "": "loss on held-out answers (nats per token)",
            "before": f"{s['base_loss']:.3f}",
            "after": f"{s['best_val_loss']:.3f}",
        },
        {
            "": "perplexity on the text of the base model",
            "before": f"{s['text_perplexity_before']:.2f}",
            "after": f"{s['text_perplexity']:.2f}",
        },
    ]
    if "in_form" in s:
        figures.append(
            {
                "": "answers in the steward's form",
                "before": f"{s['in_form_before']:.0%}",
                "after": f"{s['in_form']:.0%}",
            }
        )
    usage = f"""from shared.adapters import load_adapter
from shared.adapters.instructions import answer, template_for
from shared.models.gpt import GPT

model = GPT.from_checkpoint("checkpoints/06_gpt2/{settings.preset}/{logs.name}/gpt2/best")
model = load_adapter("{where}", model)
print(answer(model, template_for(model.tokenizer), "How do I keep bread from going stale?"))"""
    return model_card(
        out / "model_card.md",
        f"Week 6's GPT, taught to answer {'as a steward' if settings.data == STEWARD else 'by examples'}",
        {
            "What": (
                f"{LABELS[settings.method]} of rank {settings.adapter.r} on {layers}: {s['trainable']:,}"
                f" numbers, {s['megabytes']:.2f} MB, in PEFT's format"
            ),
            "Base": f"week 6's model, preset {settings.preset}, trained on {logs.name}",
            "Data": (
                f"{s['examples']:.0f} questions and answers ({settings.data}); the figures are measured on"
                " others, held out"
            ),
            "Meant for": "learning how adapters work; its advice is not to be relied on",
            "Licence": "that of this repository",
        },
        figures,
        usage,
        "\n\n".join(f"> {q}\n{after}" for q, _, after in run.artifacts["talk"][:3]),
    )


if __name__ == "__main__":
    cli(main, PRESETS, __doc__)
