"""Week 10's further studies: further betas, no KL term, and DPO on a real model."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Generator, nn

from exclaim import study_exclaim
from figures import draw
from names import METHODS
from policies import SAMPLES, align, show_policies
from preferences import Start, pair_batches
from shared.adapters import LoRAConfig, add_lora, save_adapter
from shared.adapters.artefacts import base_on_the_hub
from shared.adapters.instructions import template_for
from shared.alignment.loops import DPO, draw_answers, pad_prompts
from shared.alignment.rewards import Pair
from shared.course.report import read_runs
from shared.course.workspace import Workspace
from shared.data.corpus import read_text
from shared.devices import device_name, device_of, pick_device
from shared.models.chat import chat_prompt, is_chat
from shared.models.gpt import GPT
from shared.models.names import run_slug
from shared.models.pretrained import load_model
from shared.runtime import clock, table
from shared.sampling import generate

if TYPE_CHECKING:
    from run import Settings

QUESTIONS = Path(__file__).parent / "questions.txt"
BRIEF = "Answer the question in one short sentence."
"""The system prompt under which the model gives the answers that it is then to give without it."""
PROMPTS_AT_ONCE = 32
SHORT = 40
"""Tokens within which its answers count as short."""


# ---- studies of the learner's model


def study_frontier(settings: "Settings", start: Start, work: Workspace) -> dict[str, float]:
    """Each method at the betas that the week's own run has not taken."""
    rows = {}
    for method in METHODS:
        own = settings.config_of(method)
        for beta in settings.dpo_betas if method == "dpo" else settings.online_betas:
            if beta != own.beta:
                name = f"{method}-{beta:g}"
                changed = replace(settings, **{method: replace(own, beta=beta)})
                rows[name] = align(name, method, changed, start, work)
    show_policies(rows)
    draw(work.logs, work.reports)
    return {f"{name}_{key}": row[key] for name, row in rows.items() for key in ("reward", "kl")}


def study_hacking(settings: "Settings", start: Start, work: Workspace) -> dict[str, float]:
    """GRPO twice, held to the reference and free."""
    rows = {}
    for name, beta in (("hacking-held", settings.grpo.beta), ("hacking-free", 0.0)):
        changed = replace(
            settings,
            grpo=replace(settings.grpo, lr=settings.hacking_lr, beta=beta),
            measurements=2 * settings.measurements,
        )
        rows[name] = align(name, "grpo", changed, start, work)
    show_policies(rows)
    runs = read_runs(work.logs)
    for name in rows:
        print(f"\n{name}:")
        print("\n".join(answer for _, answer in runs[name].artifacts["samples"]))
    draw(work.logs, work.reports)
    keys = ("reward", "learned", "kl", "known_words")
    return {f"{name}_{key}": row[key] for name, row in rows.items() for key in keys}


STUDIES: dict[str, Callable[["Settings", Start, Workspace], dict[str, float]]] = {
    "exclaim": study_exclaim,
    "frontier": study_frontier,
    "hacking": study_hacking,
}
"""Those of the learner's own model. `study_brief` has a model of its own."""


# ---- a real model


def study_brief(settings: "Settings") -> dict[str, float]:
    """A chat model learns, from answers of its own, to be brief without being asked to."""
    device = pick_device(settings.device)
    work = Workspace(__file__, settings, read_text(settings.data)[0], device)
    learned_from, held_out = split_questions(settings)
    model = load_chat_model(settings).to(device)
    name = run_slug(settings.model)
    with work.log(name, settings) as log:
        began = clock()
        pairs = brief_pairs(model, learned_from, settings)
        metrics: dict[str, float] = {
            "pairs": len(pairs),
            "left_out": len(learned_from) - len(pairs),
            "drawing_seconds": clock() - began,
            "chosen_cut": count_cut_off([chosen for _, chosen, _ in pairs], end_token(model)),
            "rejected_cut": count_cut_off([rejected for _, _, rejected in pairs], end_token(model)),
        }
        policy = with_adapters(model, settings)
        batches = pair_batches(pairs, settings.brief_rows // 2, settings.brief.seed, device)
        file = work.checkpoints / f"{name}.safetensors"
        loop = DPO(policy, model, batches, settings.brief, log=log, file=file)
        began = clock()
        last = loop.fit(settings.resume)
        metrics["seconds"] = clock() - began
        metrics |= {key: last[key] for key in ("accuracy", "margin", "loss")}
        metrics["trained_parameters"] = sum(p.numel() for p in loop.parameters)
        lengths, talk = {}, {}
        for when, speaker in (("before", model), ("after", policy)):
            answers = answers_to(speaker, [ask(model, q) for q in held_out], settings, seed=3)
            lengths[when] = [len(answer) for answer in answers]
            metrics[f"{when}_cut"] = count_cut_off(answers, end_token(model))
            metrics[f"{when}_length"] = sum(lengths[when]) / len(answers)
            metrics[f"{when}_short"] = share_short(answers, end_token(model))
            talk[when] = [likeliest_answer(speaker, q, settings) for q in held_out[:SAMPLES]]
        conversations = list(zip(held_out, talk["before"], talk["after"]))
        log.artifact(lengths=lengths, talk=conversations, longest=settings.brief_tokens)
        log.finish(**metrics)
    base_model = base_on_the_hub(settings.model, model.config)
    folder = save_adapter(policy, work.checkpoints / f"{name}-brief", base_model=base_model)
    show_brief(metrics, conversations)
    print(
        f"(answers are cut at {settings.brief_tokens} tokens; {device_name(device)},"
        f" {metrics['seconds']:.0f} s; adapter in {folder})"
    )
    draw(work.logs, work.reports)
    return metrics


def load_chat_model(settings: "Settings") -> GPT:
    """`--model` in fp32. Raises ValueError for a base model: asked to be brief, it does not obey."""
    model = load_model(settings.model, "cpu", torch.float32, blocks=settings.blocks)
    if model.tokenizer is None or not is_chat(model.tokenizer):
        raise ValueError(
            f"{settings.model} was never trained to converse (its tokenizer has no chat template), so it does"
            " not answer when it is told how: take a chat model, such as --model smollm2"
        )
    return model


def split_questions(settings: "Settings") -> tuple[list[str], list[str]]:
    """The questions to learn from, the first ones, and those held out, the last ones."""
    questions = QUESTIONS.read_text(encoding="utf-8").splitlines()
    if settings.brief_questions + settings.brief_held_out > len(questions):
        raise ValueError(
            f"brief_questions={settings.brief_questions}, brief_held_out={settings.brief_held_out}: there are"
            f" {len(questions)} questions"
        )
    return questions[: settings.brief_questions], questions[-settings.brief_held_out :]


def brief_pairs(model: GPT, questions: Sequence[str], settings: "Settings") -> list[Pair]:
    """Pairs of answers to the bare question: what the model says when asked to be brief, and what it says
    usually. Questions whose answer was longer when asked to be brief, or the same, are left out.
    """
    prompts = [ask(model, question) for question in questions]
    brief = answers_to(model, [ask(model, question, BRIEF) for question in questions], settings, seed=1)
    usual = answers_to(model, prompts, settings, seed=2)
    pairs = [(p, b, u) for p, b, u in zip(prompts, brief, usual) if len(b) <= len(u) and b != u]
    print(
        f"preferences: {len(pairs)} pairs; {len(questions) - len(pairs)} questions left out, whose answer was"
        " longer when asked to be brief, or the same",
        flush=True,
    )
    return pairs


def ask(model: GPT, question: str, system: str | None = None) -> list[int]:
    """A question as the model's chat has it, up to where the answer begins."""
    messages = [{"role": "user", "content": question}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return chat_prompt(model.tokenizer, messages)


def with_adapters(model: GPT, settings: "Settings") -> nn.Module:
    """The policy: adapters on the model's frozen weights, which it shares with the reference. That has no
    adapters: it is the base below them.
    """
    policy = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    torch.manual_seed(settings.brief.seed)
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    return add_lora(policy, LoRAConfig(r=8, lora_alpha=16, target_modules=targets))


def answers_to(model: GPT, prompts: Sequence[list[int]], settings: "Settings", seed: int) -> list[list[int]]:
    """An answer to each prompt, drawn at temperature 1, its end token with it."""
    generator = Generator().manual_seed(seed)
    answers: list[list[int]] = []
    for part in pad_prompts(prompts).to(device_of(model)).split(PROMPTS_AT_ONCE):
        ids, mask = draw_answers(model, part, settings.brief_tokens, end_token(model), generator)
        answers += [row[in_answer].tolist() for row, in_answer in zip(ids, mask)]
    return answers


def likeliest_answer(model: GPT, question: str, settings: "Settings") -> str:
    """The answer of the likeliest tokens."""
    stop = [end_token(model)]
    ids = generate(model, ask(model, question), settings.brief_tokens, temperature=0, stop=stop)
    return model.tokenizer.decode(list(ids)).strip()


def end_token(model: GPT) -> int:
    """What ends an answer."""
    return template_for(model.tokenizer).stop[0][-1]


def share_short(answers: Sequence[list[int]], end: int) -> float:
    """The share of answers that ended within `SHORT` tokens."""
    return sum(len(answer) <= SHORT and answer[-1] == end for answer in answers) / len(answers)


def count_cut_off(answers: Sequence[Sequence[int]], end: int) -> int:
    """How many answers did not come to their end within the tokens they had."""
    return sum(answer[-1] != end for answer in answers)


def show_brief(metrics: dict[str, float], talk: Sequence[tuple[str, str, str]]) -> None:
    """Prints some questions with the answers before and after, and how long the answers are."""
    for question, before, after in talk:
        print(f"\n> {question}\nbefore: {before}\nafter:  {after}")
    rows = [
        {
            "": name,
            "mean length (tokens)": metrics[f"{name}_length"],
            f"ended within {SHORT}": metrics[f"{name}_short"],
            "cut off": metrics[f"{name}_cut"],
        }
        for name in ("before", "after")
    ]
    print("\n" + table(rows))
