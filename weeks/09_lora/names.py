"""What week 9's runs, methods and models are called: on the command line, in the logs, and for people."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from shared.data.corpus import named_by_content
from shared.models.names import BY_NAME, run_slug
from shared.runtime import ROOT

if TYPE_CHECKING:
    from run import Settings

STEWARD = "weeks/09_lora/steward.jsonl"
"""The course's own questions and answers, with the held-out ones beside them in a file of their own."""
METHODS = ("full", "lora", "qlora", "dora", "prompt")
METHOD_LABELS = {
    "full": "all weights",
    "lora": "LoRA",
    "dora": "DoRA",
    "qlora": "QLoRA",
    "prompt": "soft prompt",
}
MODELS = {"course": "week 6's model"} | {name: known.label for name, known in BY_NAME.items()}
COLUMNS = {
    "lr": "learning rate",
    "trainable": "numbers trained",
    "megabytes": "file (MB)",
    "peak_memory_gb": "peak memory (GB)",
    "seconds": "training (s)",
    "base_loss": "loss before",
    "best_val_loss": "loss after",
    "in_form": "answers in form",
    "forgotten": "old text: perplexity up by",
}
"""The metrics that tables show, with their headings."""
HEADLINE = (
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
"""The metrics that the week keeps."""
TRIAL = "rates-"
"""How the names of the runs of `--study rates` begin."""
RUN_NAME = re.compile(
    r"""(?:^|-)(?:
            (?P<full>full)
          | (?P<method>lora|dora|prompt)-(?P<size>\d+)
          | (?P<qlora>qlora)-(?:(?P<scheme>[a-z]+\d+)-)?(?P<rank>\d+)
        )$""",
    re.VERBOSE,
)


def parts_of(run: str) -> tuple[str, str, str]:
    """Method, scheme (QLoRA's) and size of a run; "" for what it has not. Raises ValueError for another name.

    >>> parts_of("my-model-qlora-nf4-8"), parts_of("full")
    (('qlora', 'nf4', '8'), ('full', '', ''))
    """
    match = RUN_NAME.search(run)
    if match is None:
        raise ValueError(f"{run!r} is none of full, lora-RANK, dora-RANK, qlora-SCHEME-RANK, prompt-NUMBER")
    parts = match.groupdict(default="")
    method = parts["full"] or parts["method"] or parts["qlora"]
    return method, parts["scheme"], parts["size"] or parts["rank"]


def trial_name(run: str, lr: float | None) -> str:
    """What the logs call a run of `--study rates`, which stands beside the week's own runs.

    >>> trial_name("course-lora-8", 0.002)
    'rates-course-lora-8-0.002'
    """
    return f"{TRIAL}{run}-{lr:g}"


def kept_under(settings: "Settings") -> str | None:
    """The name of runs on data or models other than the course's own, which would take each other's place.

    It tells files of one name apart by their content, models of one name by where they are.
    """
    names = []
    if settings.data != STEWARD or settings.held_out is not None:
        files = [ROOT / STEWARD if settings.data == STEWARD else Path(settings.data)]
        if settings.held_out is not None:
            files.append(Path(settings.held_out))
        names.append(named_by_content(files[0].stem, b"".join(file.read_bytes() for file in files)))
    if settings.model not in MODELS:
        names.append(run_slug(settings.model))
    return "-".join(names) or None


def model_name(model: str) -> str:
    """What the logs call a model that `--model` named.

    >>> model_name("smollm2"), model_name("models/mine.gguf"), model_name("Qwen/Qwen3-0.6B")
    ('smollm2', 'mine', 'Qwen3-0.6B')
    """
    return model if model in MODELS else Path(model).resolve().name.removesuffix(".gguf")


def run_label(run: str) -> str:
    """A run's name for people.

    >>> run_label("course-lora-8"), run_label("smollm2-prompt-16"), run_label("smollm2-qlora-nf4-8")
    ('LoRA, rank 8', 'soft prompt of 16', 'QLoRA (nf4), rank 8')
    """
    method, scheme, size = parts_of(run)
    label = METHOD_LABELS[method]
    if scheme:
        label += f" ({scheme})"
    if method == "prompt":
        return f"{label} of {size}"
    return f"{label}, rank {size}" if size else label
