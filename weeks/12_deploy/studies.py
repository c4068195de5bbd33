"""Week 12's studies: the same with a real model."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from figures import draw
from measures import measure_server, same_alone, show_served
from names import INT8, label_of_runs
from programs import race_programs
from prompts import Prompts
from shared.course.workspace import Workspace
from shared.data.corpus import read_text, split_text
from shared.devices import pick_device
from shared.models.chat import BASE_MODEL, answer_to, is_chat
from shared.models.gpt import GPT
from shared.models.names import run_slug
from shared.models.pretrained import load_model

if TYPE_CHECKING:
    from run import Settings

QUESTION = "What is a language model?"
IN_INT8 = ("--quantize=int8", "--group-size=64")


def load_with_prompts(settings: "Settings") -> tuple[GPT, Prompts, Workspace]:
    """The model in fp32, prompts from the held-out text in its tokens, and the week's folders."""
    device = pick_device(settings.device)
    name, text = read_text(settings.data)
    work = Workspace(__file__, settings, name, device)
    model = load_model(settings.model, "cpu", torch.float32, blocks=settings.blocks)
    if model.tokenizer is None:
        raise ValueError(f"{settings.model} has no tokenizer of ours: its ids cannot be turned into text")
    held_out = split_text(text)[1]
    return model, Prompts(model, model.tokenizer.encode(held_out[:60_000]), settings), work


def study_served(settings: "Settings") -> dict[str, float]:
    """The model behind the server, in fp32 and in int8."""
    model, prompts, work = load_with_prompts(settings)
    name = run_slug(settings.model)
    metrics = {}
    for run, options in ((name, ()), (f"{name}{INT8}", IN_INT8)):
        row = measure_server(run, model, prompts, settings.study_load, work, options=options)
        metrics |= {f"{run}_{key}": row[key] for key in ("ratio", "many", "one", "first_p50", "reused")}
    talk(name, model.to(work.device), work)
    metrics["same_alone"] = same_alone(name, model.to(work.device), prompts, settings, work)["same"]
    show_served(work.logs)
    draw(work.logs, work.reports)
    return metrics


def talk(name: str, model: GPT, work: Workspace) -> None:
    """A question and the model's answer, the likeliest one: SmolLM2's is kept for the README.

    name: what the names of its runs begin with.
    """
    with work.log(f"{name}-chat") as log:
        answer = answer_to(model, model.tokenizer, QUESTION, 100)
        log.artifact(question=QUESTION, answer=answer)
        log.finish(answer_tokens=len(model.tokenizer.encode(answer)))
    print(f"\n> {QUESTION}\n{answer}")
    if not is_chat(model.tokenizer):
        print(f"({label_of_runs(name)} is {BASE_MODEL})")


def study_in_programs(settings: "Settings") -> dict[str, float]:
    """The model in the files of other programs."""
    model, prompts, work = load_with_prompts(settings)
    fewer = replace(settings, compared=min(2, settings.compared))
    rows = race_programs(run_slug(settings.model), model, prompts, fewer, work)
    show_served(work.logs)
    draw(work.logs, work.reports)
    return {f"{program}_decode": row["decode_tokens_per_second"] for program, row in rows.items()}


STUDIES: dict[str, Callable[["Settings"], dict[str, float]]] = {
    "real": study_served,
    "real-programs": study_in_programs,
}
