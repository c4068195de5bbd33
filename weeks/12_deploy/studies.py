"""Week 12's studies: the same with a model that people talk to."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from figures import draw
from measures import measure_server, same_alone, show_served
from names import SMOL
from programs import race_programs
from prompts import Prompts
from shared.course.workspace import Workspace
from shared.data.corpus import read_text, split_text
from shared.devices import pick_device
from shared.models.chat import chat_prompt
from shared.models.gpt import GPT
from shared.models.pretrained import load_smollm2
from shared.sampling import generate

if TYPE_CHECKING:
    from run import Settings

QUESTION = "What is a language model?"
INT8 = ("--quantize=int8", "--group-size=64")


def load_smollm2_with_prompts(settings: "Settings") -> tuple[GPT, Prompts, Workspace]:
    """SmolLM2, prompts from the held-out text in its tokens, and the week's folders."""
    device = pick_device(settings.device)
    name, text = read_text(settings.data)
    work = Workspace(__file__, settings, name, device)
    model, tokenizer = load_smollm2(settings.smol_blocks)
    held_out = split_text(text)[1]
    return model, Prompts(model, tokenizer.encode(held_out[:60_000]), settings), work


def study_served_smollm2(settings: "Settings") -> dict[str, float]:
    """SmolLM2 behind the server, in fp32 and in int8."""
    model, prompts, work = load_smollm2_with_prompts(settings)
    metrics = {}
    for run, options in ((SMOL, ()), (f"{SMOL}-int8", INT8)):
        row = measure_server(run, model, prompts, settings.smol_load, work, options=options)
        metrics |= {f"{run}_{key}": row[key] for key in ("ratio", "many", "one", "first_p50", "reused")}
    talk(model.to(work.device), work)
    metrics["same_alone"] = same_alone(SMOL, model.to(work.device), prompts, settings, work)["same"]
    show_served(work.logs)
    draw(work.logs, work.reports)
    return metrics


def talk(model: GPT, work: Workspace) -> None:
    """A question and SmolLM2's answer, the likeliest one, kept for the README."""
    tokenizer = model.tokenizer
    ids = chat_prompt(tokenizer, [{"role": "user", "content": QUESTION}])
    end = tokenizer.special_tokens["<|im_end|>"]
    with work.log(f"{SMOL}-chat") as log:
        answer = list(generate(model, ids, 100, temperature=0, stop=(end,)))
        log.artifact(question=QUESTION, answer=tokenizer.decode(answer))
        log.finish(prompt_tokens=len(ids), answer_tokens=len(answer))


def study_smollm2_in_programs(settings: "Settings") -> dict[str, float]:
    """SmolLM2 in the files of other programs."""
    model, prompts, work = load_smollm2_with_prompts(settings)
    fewer = replace(settings, compared=min(2, settings.compared))
    rows = race_programs(SMOL, model, prompts, fewer, work)
    show_served(work.logs)
    draw(work.logs, work.reports)
    return {f"{program}_decode": row["decode_tokens_per_second"] for program, row in rows.items()}


STUDIES: dict[str, Callable[["Settings"], dict[str, float]]] = {
    "smollm2": study_served_smollm2,
    "smollm2-programs": study_smollm2_in_programs,
}
