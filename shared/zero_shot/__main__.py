"""Week 6. Zero-shot accuracy of a GPT, from the command line.

python -m shared.zero_shot --model smollm2 --tasks lambada piqa --limit 200
"""

import sys
from dataclasses import dataclass
from typing import Literal

from shared.checks import Checks
from shared.commandline import errors_for_people, parse_args
from shared.devices import pick_device
from shared.evaluation import MAX_TOKENS
from shared.models.names import ModelName
from shared.models.pretrained import load_model
from shared.runtime import table
from shared.zero_shot.tasks import Result, load_task, run_task


@dataclass(frozen=True)
class Settings:
    """Zero-shot accuracy of a GPT."""

    model: ModelName
    tasks: tuple[Literal["lambada", "piqa", "hellaswag"], ...] = ("lambada", "piqa")
    limit: int | None = None
    """Only the first so many examples of each task."""
    hellaswag: str | None = None
    """HellaSwag's file hellaswag_val.jsonl, downloaded by hand."""
    max_tokens: int = MAX_TOKENS
    """Tokens in one forward pass: less takes less memory."""
    device: str = "auto"

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.at_least(1, "limit", "max_tokens")
        checks.finish()


def main(settings: Settings) -> list[Result]:
    """Prints a table with a line for each task and metric."""
    tasks = {task: load_task(task, settings.hellaswag)[: settings.limit] for task in settings.tasks}
    model = load_model(settings.model, pick_device(settings.device))
    if model.tokenizer is None:
        raise ValueError(f"{settings.model} comes without a tokenizer of ours: its ids have no text to score")
    results = [
        run_task(model, model.tokenizer, task, examples, settings.max_tokens, progress=True)
        for task, examples in tasks.items()
    ]
    rows = []
    for result in results:
        for name, value in result.metrics.items():
            rows.append(
                {
                    "task": result.task,
                    "metric": name,
                    "value": value,
                    "standard error": result.standard_errors.get(name),
                    "examples": len(result.records),
                    "seconds": result.seconds,
                }
            )
    print(table(rows))
    return results


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
