"""Week 10: PPO, DPO and GRPO. The learner's own model learns to exclaim: preferences, a reward model, and
three methods side by side.

python weeks/10_ppo_dpo/run.py --preset laptop
python weeks/10_ppo_dpo/run.py --preset laptop --study frontier      # each method at further betas: reward against KL
python weeks/10_ppo_dpo/run.py --preset laptop --study hacking       # the KL term taken away
python weeks/10_ppo_dpo/run.py --preset laptop --study smollm2       # DPO on a real model, which learns to be brief
"""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor, nn

from shared import checkpoint
from shared.adapters import LoRAConfig, add_lora, save_adapter
from shared.alignment.loops import (
    DPO,
    GRPO,
    PPO,
    AlignmentLoop,
    DPOConfig,
    GRPOConfig,
    LoopConfig,
    OnlineConfig,
    PPOConfig,
    draw_answers,
)
from shared.alignment.losses import answer_kl, preference_batch, scalar_head
from shared.alignment.rewards import (
    Pair,
    RewardModel,
    answer_rewards,
    best_and_worst,
    exclamations,
    pair_accuracy,
    shuffled,
    standardise,
)
from shared.commandline import cli
from shared.course.report import (
    COLOURS,
    LINES,
    MARKERS,
    LoggedRun,
    figure,
    model_card,
    read_runs,
    reference_for,
    save_figure,
)
from shared.course.workspace import WeekSettings, Workspace, output_root
from shared.data.corpus import Corpus, read_text
from shared.evaluation import known_words
from shared.models.gpt import GPT
from shared.models.pretrained import IM_END, chat_prompt, load_smollm2
from shared.runtime import RunLog, clock, device_name, device_of, pick_device, table, write_atomically
from shared.sampling import generate
from shared.training import TrainConfig
from shared.training.base_model import BASE_PRESETS, trained_base_model

METHODS = ("ppo", "grpo", "dpo")
NAMES = {"base": "week 6's model", "ppo": "PPO", "grpo": "GRPO", "dpo": "DPO"}
QUESTIONS = Path(__file__).parent / "questions.txt"
BRIEF = "Answer the question in one short sentence."
"""The system prompt under which SmolLM2 gives the answers that it is then to give without it."""
SHORT = 40
"""Tokens within which an answer of SmolLM2's counts as short."""
SMOL, HELD_OUT_SEED, SAMPLES = "smollm2", 5, 4


@dataclass(frozen=True)
class Settings(WeekSettings):
    mark: str = "!"
    """What a phrase must end in to earn a point."""
    min_words: int = 3
    """How many words the phrase must have."""
    prompt_tokens: int = 16
    prompts: int = 768
    """Taken from the training text, each behind a line break; all methods use the same."""
    answers: int = 8
    """Drawn from the untouched model to each prompt. The best and the worst are a pair."""
    held_out: int = 256
    """Prompts from the validation text, on which everything is measured."""
    rows: int = 64
    """Answers in each batch: rows / 2 pairs, rows / group_size prompts for GRPO."""
    train: TrainConfig = BASE_PRESETS["laptop"].train
    """How week 6's model is trained, where its checkpoint is not there yet."""
    reward: LoopConfig = LoopConfig(steps=48, lr=1e-3)
    ppo: PPOConfig = PPOConfig(steps=32, lr=3e-4, beta=0.1, max_new_tokens=48, epochs=2, checkpoint_every=8)
    grpo: GRPOConfig = GRPOConfig(
        steps=32,
        lr=3e-4,
        beta=0.1,
        max_new_tokens=48,
        epochs=2,
        checkpoint_every=8,
        scale="none",
        loss_type="dr_grpo",
        kl="reward",
    )
    dpo: DPOConfig = DPOConfig(steps=64, lr=3e-4, beta=0.3, checkpoint_every=16)
    """Its steps are twice those of the others, which take two for each batch: the same number of answers goes
    backward through the policy.
    """
    measurements: int = 6
    """On held-out prompts, spread over each method's run."""
    keep: Literal["ppo", "grpo", "dpo"] = "ppo"
    """Whose model gets the card."""
    online_betas: tuple[float, ...] = (0.05, 0.1, 0.3)
    """For --study frontier, of PPO and GRPO."""
    dpo_betas: tuple[float, ...] = (0.1, 0.3, 1.0)
    """The same for DPO."""
    hacking_lr: float = 1e-3
    """For --study hacking: GRPO at this learning rate, with its beta and with none."""
    smol: DPOConfig = DPOConfig(steps=40, lr=3e-4, beta=0.1, checkpoint_every=10)
    """For --study smollm2."""
    smol_rows: int = 8
    """Answers in each batch, two for each pair."""
    smol_questions: int = 100
    """How many of questions.txt are learned from."""
    smol_held_out: int = 40
    """How many of the others are measured on."""
    smol_tokens: int = 64
    """Longest answer, in tokens."""
    smol_blocks: int | None = None
    """Use only the first so many blocks of SmolLM2, to see in seconds that everything runs; None: all."""
    study: Literal["frontier", "hacking", "smollm2"] | None = None

    def __post_init__(self) -> None:
        counts = ("min_words", "prompt_tokens", "prompts", "measurements", "smol_questions", "smol_held_out")
        problems = [
            f"{name}={getattr(self, name)}: must be at least 1" for name in counts if getattr(self, name) < 1
        ]
        problems += [
            f"{name}={getattr(self, name)}: must be at least 2"
            for name in ("answers", "held_out", "smol_tokens")
            if getattr(self, name) < 2
        ]
        problems += [
            f"{name}={n}: must be even, a pair has two"
            for name in ("rows", "smol_rows")
            if (n := getattr(self, name)) < 2 or n % 2
        ]
        if self.grpo.group_size < 2 or self.rows % self.grpo.group_size:
            problems.append(
                f"rows={self.rows}: must be a multiple of grpo.group_size={self.grpo.group_size}, which is at"
                " least 2"
            )
        if self.ppo.max_new_tokens != self.grpo.max_new_tokens:
            problems.append(
                f"ppo.max_new_tokens={self.ppo.max_new_tokens},"
                f" grpo.max_new_tokens={self.grpo.max_new_tokens}: must be the same"
            )
        problems += [
            f"{name}: betas must be above 0"
            for name in ("online_betas", "dpo_betas")
            if not all(b > 0 for b in getattr(self, name))
        ]
        if len(self.mark) != 1 or self.mark.isalnum() or self.mark.isspace():
            problems.append(f"mark={self.mark!r}: must be one punctuation mark")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def answer_tokens(self) -> int:
        return self.ppo.max_new_tokens


def smoke() -> Settings:
    s = Settings()
    tiny = dict(steps=4, checkpoint_every=1)
    return replace(
        s,
        preset="smoke",
        mark=".",
        min_words=1,
        prompt_tokens=4,
        prompts=24,
        answers=8,
        held_out=12,
        rows=8,
        train=BASE_PRESETS["smoke"].train,
        reward=replace(s.reward, **tiny),
        ppo=replace(s.ppo, **tiny, max_new_tokens=24),
        dpo=replace(s.dpo, **tiny),
        grpo=replace(s.grpo, **tiny, max_new_tokens=24, group_size=4),
        measurements=2,
        online_betas=(0.1, 0.3),
        dpo_betas=(0.1,),
        smol=replace(s.smol, **tiny),
        smol_rows=2,
        smol_questions=12,
        smol_held_out=3,
        smol_tokens=4,
        smol_blocks=1,
    )


def gpu() -> Settings:
    s, week_6 = Settings(), BASE_PRESETS["gpu"]
    return replace(
        s,
        preset="gpu",
        data=week_6.data,
        train=week_6.train,
        prompts=8192,
        held_out=1024,
        rows=512,
        reward=replace(s.reward, lr=1e-4),
        ppo=replace(s.ppo, steps=200, lr=3e-5),
        grpo=replace(s.grpo, steps=200, lr=3e-5),
        dpo=replace(s.dpo, steps=400, lr=3e-5),
        hacking_lr=1e-4,
        measurements=10,
    )


PRESETS = {"smoke": smoke(), "laptop": Settings(), "gpu": gpu()}


def main(settings: Settings) -> dict[str, float]:
    """Preferences, a reward model, and the three methods; or a study. Returns the week's figures."""
    if settings.study == "smollm2":
        return study_brief(settings)
    device = pick_device(settings.device)
    base, corpus = trained_base_model(
        settings.preset,
        data=settings.data,
        device=settings.device,
        train=settings.train,
        resume=settings.resume,
    )
    base.to(device)
    work = Workspace(__file__, settings, corpus.name, device)
    start = prepare(settings, base, corpus, work)
    if settings.study:
        return {"frontier": study_frontier, "hacking": study_hacking}[settings.study](settings, start, work)
    with work.log("base", settings) as log:
        rows = {"base": log.finish(**measure_policy(base, start, settings, log))}
    for method in METHODS:
        rows[method] = align(method, method, settings, start, work)
    show_policies(rows)
    runs = read_runs(work.logs)
    for i in range(SAMPLES):
        print(f"\n{runs['base'].artifacts['samples'][i][0].strip()} ...")
        for name in rows:
            print(f"  [{NAMES[name]}] {' / '.join(runs[name].artifacts['samples'][i][1].split(chr(10)))}")
    metrics = {
        f"{name}_{key}": row[key]
        for name, row in rows.items()
        for key in ("reward", "kl", "learned", "known_words")
    }
    finished = work.finish(
        {"reward_model_accuracy": runs["reward"].summary["held_out_accuracy"], **metrics}, draw
    )
    card = write_aligned_card(work.logs, work.reports, settings, work.checkpoints / settings.keep)
    write_atomically(work.checkpoints / settings.keep / "README.md", card.read_text(encoding="utf-8"))
    print(f"kept: {work.checkpoints / settings.keep}, with its model card ({card.name})")
    return finished


# ---- prompts, preferences, the reward model


class Start(NamedTuple):
    """What all methods begin with."""

    base: GPT
    corpus: Corpus
    text: str
    """What the model has read, for the words in it."""
    prompts: Tensor
    held_out: Tensor
    pairs: list[Pair]
    reward: nn.Module


def cut_prompts(tokens: np.ndarray, corpus: Corpus, length: int, count: int, seed: int) -> Tensor:
    """So many beginnings of lines, of `length` tokens each: int64 [count, length]. The first four million
    tokens are looked at.
    """
    tokens = np.asarray(tokens[: 2**22])
    breaks = [i for i, b in corpus.tokenizer.vocab.items() if b.endswith(b"\n")]
    places = np.flatnonzero(np.isin(tokens[:-length], breaks)) + 1
    if len(places) < count:
        raise ValueError(
            f"the text of {len(tokens)} tokens has {len(places)} lines to cut prompts from, and {count} are"
            " needed: take fewer"
        )
    chosen = np.random.default_rng(seed).choice(places, count, replace=False)
    return torch.from_numpy(tokens[chosen[:, None] + np.arange(length)].astype(np.int64))


def prepare(settings: Settings, base: GPT, corpus: Corpus, work: Workspace) -> Start:
    """Draws the preferences from the model itself, and trains the reward model; a study takes the week's,
    where it is there.
    """
    length = settings.prompt_tokens + settings.answer_tokens
    if length > base.config.block_size:
        raise ValueError(
            f"prompt_tokens and max_new_tokens make {length}, more than the model's"
            f" block_size={base.config.block_size}"
        )
    prompts = cut_prompts(corpus.train, corpus, settings.prompt_tokens, settings.prompts, 1).to(work.device)
    held_out = cut_prompts(corpus.val, corpus, settings.prompt_tokens, settings.held_out, 2).to(work.device)
    start = Start(
        base,
        corpus,
        corpus.tokenizer.decode(corpus.train[: 2**20].tolist()),
        prompts,
        held_out,
        [],
        scalar_head(base),
    )
    pairs, ties, ids, _ = preferences(start, prompts, settings, 3)
    start = start._replace(pairs=pairs)
    print(
        f"preferences: {settings.answers} answers to each of {len(prompts)} prompts; {len(pairs)} pairs,"
        f" {ties} prompts left out as ties",
        flush=True,
    )
    folder, judges = work.checkpoints / "reward", {"mark": settings.mark, "min_words": settings.min_words}
    kept = checkpoint.find(folder)
    if kept and json.loads((kept / "config.json").read_text(encoding="utf-8")).get("judges") != judges:
        print(f"the reward model in {kept} was not trained for {judges}: it is trained anew", flush=True)
        (work.checkpoints / "reward.safetensors").unlink(missing_ok=True)  # --resume would go on from it
        kept = None
    if kept and settings.study:
        return start._replace(
            reward=checkpoint.load(
                folder, corpus.tokenizer, work.device, lambda model, meta: scalar_head(model)
            ).model
        )
    with work.log("reward", settings) as log:
        model = scalar_head(base, generator=Generator().manual_seed(settings.reward.seed))
        loop = RewardModel(
            model,
            pair_batches(start, settings.rows // 2, 1),
            settings.reward,
            log,
            work.checkpoints / "reward.safetensors",
        )
        loop.fit(settings.resume)
        standardise(model, judged(model, ids[: 32 * settings.answers], settings))
        theirs, left_out, drawn, scores = preferences(start, held_out, settings, 4)
        batch = tuple(t.to(work.device) for t in preference_batch(theirs))
        found = {
            "held_out_accuracy": pair_accuracy(model, *batch),
            "held_out_pairs": len(theirs),
            "held_out_ties": left_out,
            "pairs": len(pairs),
            "ties": ties,
            "answers_drawn": len(ids),
            "base_reward": scores.mean().item(),
            "correlation": (
                torch.corrcoef(torch.stack([judged(model, drawn, settings).cpu(), scores.flatten()]))[
                    0, 1
                ].item()
            ),
        }
        found["held_out_accuracy_error"] = math.sqrt(
            found["held_out_accuracy"] * (1 - found["held_out_accuracy"]) / len(theirs)
        )
        log.finish(**{k: v for k, v in found.items() if math.isfinite(v)})
    print(f"reward model: right on {found['held_out_accuracy']:.1%} of {len(theirs)} held-out pairs")
    checkpoint.save(
        folder,
        model,
        corpus.tokenizer,
        {"held_out_accuracy": found["held_out_accuracy"]},
        more={"judges": judges},
    )
    return start._replace(reward=model.eval())


def preferences(
    start: Start, prompts: Tensor, settings: Settings, seed: int
) -> tuple[list[Pair], int, Tensor, Tensor]:
    """Pairs, prompts left out, all answers with their prompts [prompts · answers, time], and what the rule
    gives them [prompts, answers].
    """
    generator = Generator().manual_seed(seed)
    batches = prompts.repeat_interleave(settings.answers, 0).split(256)
    ids = torch.cat(
        [draw_answers(start.base, batch, settings.answer_tokens, generator=generator)[0] for batch in batches]
    )
    scores = torch.tensor([rule(text, settings) for text in texts(ids, start, settings)]).view(
        len(prompts), -1
    )
    answers = ids[:, settings.prompt_tokens :].view(*scores.shape, -1).tolist()
    return *best_and_worst(prompts.tolist(), answers, scores), ids, scores


def rule(text: str, settings: Settings) -> float:
    """The reward that can be verified: what preferences are labelled by, and what is reported. No method sees
    it.
    """
    return float(exclamations(text, settings.mark, settings.min_words))


def texts(ids: Tensor, start: Start, settings: Settings) -> list[str]:
    """The answers as text."""
    return [start.corpus.tokenizer.decode(row) for row in ids[:, settings.prompt_tokens :].tolist()]


@torch.no_grad()
def judged(reward: nn.Module, ids: Tensor, settings: Settings) -> Tensor:
    """What the reward model gives answers of the full length: [batch]."""
    return torch.cat([answer_rewards(reward, part, answer_mask(part, settings)) for part in ids.split(256)])


def answer_mask(ids: Tensor, settings: Settings) -> Tensor:
    return (torch.arange(ids.size(1), device=ids.device) >= settings.prompt_tokens).expand_as(ids)


def pair_batches(start: Start, count: int, seed: int) -> Any:
    """step -> a batch of `count` pairs, as the loops take them."""
    rows, device = shuffled(len(start.pairs), count, seed), start.prompts.device
    return lambda step: tuple(
        t.to(device) for t in preference_batch([start.pairs[i] for i in rows(step).tolist()])
    )


# ---- the three methods


def align(name: str, method: str, settings: Settings, start: Start, work: Workspace) -> dict[str, float]:
    """One run of a method, measured on held-out prompts as it goes, its model kept. Returns its figures."""
    config = getattr(settings, method)
    print(f"{name}: {config.steps} steps at beta={config.beta:g}", flush=True)
    with work.log(name, settings) as log:
        loop = make_loop(method, settings, start, log, work.checkpoints / f"{name}.safetensors")
        began = clock()
        every = max(1, config.steps // settings.measurements)
        loop.fit(
            settings.resume,
            lambda: {f"held_out_{k}": v for k, v in measure_policy(loop.policy, start, settings).items()},
            every,
        )
        found = (
            measure_policy(loop.policy, start, settings, log)
            | cost(method, settings)
            | {
                "beta": config.beta,
                "seconds": clock() - began,
            }
        )
        checkpoint.save(work.checkpoints / name, loop.policy, start.corpus.tokenizer, found)
        return log.finish(**found)


def make_loop(
    method: str, settings: Settings, start: Start, log: RunLog | None, file: Path | None
) -> AlignmentLoop:
    """A method's loop, its policy a copy of week 6's model. PPO's value model begins as the reward model,
    which knows what an answer will get.
    """
    policy = copy.deepcopy(start.base).requires_grad_()
    score = lambda ids, mask: answer_rewards(start.reward, ids, mask)
    if method == "dpo":
        return DPO(
            policy,
            start.base,
            pair_batches(start, settings.rows // 2, settings.dpo.seed),
            settings.dpo,
            log,
            file,
        )
    each = 1 if method == "ppo" else settings.grpo.group_size
    rows = shuffled(len(start.prompts), settings.rows // each, getattr(settings, method).seed)
    prompts = lambda step: start.prompts[rows(step)]
    if method == "grpo":
        return GRPO(policy, start.base, prompts, score, settings.grpo, log, file)
    return PPO(
        policy,
        copy.deepcopy(start.reward).requires_grad_(),
        start.base,
        prompts,
        score,
        settings.ppo,
        log,
        file,
    )


def cost(method: str, settings: Settings) -> dict[str, float]:
    """Answers drawn, and tokens that went through a model without a gradient and with one, by how often each
    loop's page calls a model.
    """
    config = getattr(settings, method)
    tokens = config.steps * settings.rows * (settings.prompt_tokens + settings.answer_tokens)
    epochs = config.epochs if isinstance(config, OnlineConfig) else 1
    forward = {"ppo": 5, "grpo": 4, "dpo": 1}[
        method
    ]  # drawing, policy, reference, reward model, value model; the reference alone
    return {
        "answers_drawn": config.steps * settings.rows if isinstance(config, OnlineConfig) else 0,
        "forward_tokens": forward * tokens,
        "policy_backward_tokens": epochs * tokens,
        "backward_tokens": epochs * tokens * (2 if method == "ppo" else 1),
    }


@torch.no_grad()
def measure_policy(
    policy: nn.Module, start: Start, settings: Settings, log: RunLog | None = None
) -> dict[str, float]:
    """One answer to each held-out prompt: both rewards, KL to week 6's model, standard errors, words. With a
    log, samples are kept there.

    The seed is always the same, so that two policies differ by what they have learned.
    """
    ids, mask = draw_answers(
        policy, start.held_out, settings.answer_tokens, generator=Generator().manual_seed(HELD_OUT_SEED)
    )
    kl = torch.cat([answer_kl(policy(i), start.base(i), m) for i, m in zip(ids.split(64), mask.split(64))])
    answers = texts(ids, start, settings)
    values = {
        "reward": torch.tensor([rule(t, settings) for t in answers]),
        "learned": judged(start.reward, ids, settings),
        "kl": kl,
    }
    found = {key: v.mean().item() for key, v in values.items()} | {
        f"{key}_error": v.std().item() / math.sqrt(len(v)) for key, v in values.items()
    }
    known = known_words(" ".join(answers), start.text)
    if log:
        prompts = [start.corpus.tokenizer.decode(p) for p in start.held_out[:SAMPLES].tolist()]
        log.artifact(samples=list(zip(prompts, answers)))
    return found | {
        "known_words": known if math.isfinite(known) else 0.0,
        "words": sum(len(t.split()) for t in answers) / len(answers),
    }


def show_policies(rows: dict[str, dict[str, float]]) -> None:
    """The table for people."""
    cells = [
        {
            "policy": NAMES.get(name, name),
            "beta": row.get("beta"),
            "rule's reward": f"{row['reward']:.2f} ± {row['reward_error']:.2f}",
            "learned reward": f"{row['learned']:.2f} ± {row['learned_error']:.2f}",
            "KL (nats)": f"{row['kl']:.2f} ± {row['kl_error']:.2f}",
            "known words": f"{row['known_words']:.1%}",
            "s": row.get("seconds"),
        }
        for name, row in rows.items()
    ]
    print("\n" + table(cells))


# ---- studies of the learner's model


def study_frontier(settings: Settings, start: Start, work: Workspace) -> dict[str, float]:
    """Each method at the betas that the week's own run has not taken."""
    rows = {}
    for method in METHODS:
        own = getattr(settings, method)
        for beta in settings.dpo_betas if method == "dpo" else settings.online_betas:
            if beta != own.beta:
                name = f"{method}-{beta:g}"
                rows[name] = align(
                    name, method, replace(settings, **{method: replace(own, beta=beta)}), start, work
                )
    show_policies(rows)
    draw(work.logs, work.reports)
    return {f"{name}_{key}": row[key] for name, row in rows.items() for key in ("reward", "kl")}


def study_hacking(settings: Settings, start: Start, work: Workspace) -> dict[str, float]:
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
    for name in rows:
        print(
            f"\n{name}:\n"
            + "\n".join(answer for _, answer in read_runs(work.logs)[name].artifacts["samples"])
        )
    draw(work.logs, work.reports)
    return {
        f"{name}_{key}": row[key]
        for name, row in rows.items()
        for key in ("reward", "learned", "kl", "known_words")
    }


# ---- a real model


def study_brief(settings: Settings) -> dict[str, float]:
    """SmolLM2 learns, from answers of its own, to be brief without being asked to."""
    device = pick_device(settings.device)
    work = Workspace(__file__, settings, read_text(settings.data)[0], device)
    questions = QUESTIONS.read_text(encoding="utf-8").splitlines()
    if settings.smol_questions + settings.smol_held_out > len(questions):
        raise ValueError(
            f"smol_questions={settings.smol_questions}, smol_held_out={settings.smol_held_out}: there are"
            f" {len(questions)} questions"
        )
    model, tokenizer = load_smollm2(settings.smol_blocks)
    model.to(device)
    ask = lambda q, *system: chat_prompt(
        tokenizer, [*({"role": "system", "content": s} for s in system), {"role": "user", "content": q}]
    )
    with work.log(SMOL, settings) as log:
        began = clock()
        learn, held_out = questions[: settings.smol_questions], questions[-settings.smol_held_out :]
        prompts = [ask(q) for q in learn]
        brief, usual = (
            answers_to(model, [ask(q, BRIEF) for q in learn], settings, 1),
            answers_to(model, prompts, settings, 2),
        )
        pairs = [(p, b, u) for p, b, u in zip(prompts, brief, usual) if len(b) <= len(u) and b != u]
        print(
            f"preferences: {len(pairs)} pairs; {len(learn) - len(pairs)} questions left out, whose answer was"
            " longer when asked to be brief, or the same",
            flush=True,
        )
        drawing = clock() - began
        # The reference shares the frozen weights with the policy and has no adapters: that is the base below
        # them.
        policy = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        torch.manual_seed(settings.smol.seed)
        add_lora(
            policy, LoRAConfig(r=8, lora_alpha=16, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"))
        )
        rows = shuffled(len(pairs), settings.smol_rows // 2, settings.smol.seed)
        batches = lambda step: tuple(
            t.to(device) for t in preference_batch([pairs[i] for i in rows(step).tolist()])
        )
        loop = DPO(policy, model, batches, settings.smol, log, work.checkpoints / f"{SMOL}.safetensors")
        began = clock()
        last = loop.fit(settings.resume)
        found = {
            "pairs": len(pairs),
            "left_out": len(learn) - len(pairs),
            "drawing_seconds": drawing,
            "seconds": clock() - began,
        }
        found |= {key: last[key] for key in ("accuracy", "margin", "loss")}
        found["trained_parameters"] = sum(p.numel() for p in loop.parameters)
        lengths, talk = {}, {}
        for name, m in (("before", model), ("after", policy)):
            answers = answers_to(m, [ask(q) for q in held_out], settings, 3)
            lengths[name] = [len(a) for a in answers]
            found[f"{name}_length"] = sum(lengths[name]) / len(answers)
            found[f"{name}_short"] = sum(
                len(a) <= SHORT and a[-1] == tokenizer.special_tokens[IM_END] for a in answers
            ) / len(answers)
            talk[name] = [
                tokenizer.decode(list(greedy(m, ask(q), settings))).strip() for q in held_out[:SAMPLES]
            ]
        log.artifact(
            lengths=lengths,
            talk=[*zip(held_out, talk["before"], talk["after"])],
            longest=settings.smol_tokens,
        )
        log.finish(**found)
    folder = save_adapter(
        work.checkpoints / f"{SMOL}-brief", policy, base_model="HuggingFaceTB/SmolLM2-135M-Instruct"
    )
    for question, before, after in zip(held_out, talk["before"], talk["after"]):
        print(f"\n> {question}\nbefore: {before}\nafter:  {after}")
    print(
        "\n"
        + table(
            [
                {
                    "": n,
                    "mean length (tokens)": found[f"{n}_length"],
                    f"ended within {SHORT}": found[f"{n}_short"],
                }
                for n in lengths
            ]
        )
    )
    print(
        f"(answers are cut at {settings.smol_tokens} tokens; {device_name(device)}, {found['seconds']:.0f} s;"
        f" adapter in {folder})"
    )
    draw(work.logs, work.reports)
    return found


def answers_to(model: GPT, prompts: Sequence[list[int]], settings: Settings, seed: int) -> list[list[int]]:
    """An answer to each prompt, drawn at temperature 1, its end token with it; prompts of one length go
    together.
    """
    end, generator, device = model_end(model), Generator().manual_seed(seed), device_of(model)
    found: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for _, same in groupby(order, key=lambda i: len(prompts[i])):
        rows = list(same)
        ids, mask = draw_answers(
            model,
            torch.tensor([prompts[i] for i in rows], device=device),
            settings.smol_tokens,
            end,
            generator,
        )
        found |= {i: row[told].tolist() for i, row, told in zip(rows, ids, mask)}
    return [found[i] for i in range(len(prompts))]


def model_end(model: GPT) -> int:
    return model.tokenizer.special_tokens[IM_END]


def greedy(model: GPT, prompt: list[int], settings: Settings) -> Any:
    return generate(model, prompt, settings.smol_tokens, temperature=0, stop=[model_end(model)])


# ---- plots, the card

LOOK = {m: dict(color=COLOURS[i], linestyle=LINES[i], marker=MARKERS[i]) for i, m in enumerate(METHODS)}
PANELS = {
    "reward": ("The rule's reward", "exclamations in an answer"),
    "learned": ("The reward model's reward", "reward (standard deviations)"),
    "kl": ("Distance from week 6's model", "KL (nats in an answer)"),
    "known_words": ("Words that occur in the text", "share of words"),
}


def draw(logs: Path, out: Path) -> list[Path]:
    """The week's plots, from its logs."""
    runs = {name: run for name, run in read_runs(logs).items() if run.summary}
    plots = []
    if {"base", *METHODS} <= runs.keys():
        plots += [
            draw_curves(runs, reference_for(logs), out),
            draw_diagnostics(runs, out),
            draw_frontier(runs, out),
        ]
    if {"hacking-held", "hacking-free"} <= runs.keys():
        plots.append(draw_hacking(runs, out))
    if SMOL in runs:
        plots.append(draw_lengths(runs[SMOL], out))
    return plots


def held_out_curve(
    ax: Any, run: LoggedRun, base: LoggedRun | None, key: str, share: bool = False, **look: Any
) -> None:
    """Measurements on held-out prompts by step, or by share of the run, from the untouched model on."""
    xs, ys = run.series(f"held_out_{key}")
    xs = [100 * x / xs[-1] for x in xs] if share else xs
    if base:
        xs, ys = [0, *xs], [base.summary[key], *ys]
    ax.plot(xs, ys, **(dict(linewidth=1.8, markersize=6) | look))


def draw_curves(runs: dict[str, LoggedRun], course: dict[str, LoggedRun], out: Path) -> Path:
    """Both rewards and KL on held-out prompts, against the share of the budget."""
    fig, axes = figure(14, 4.6, ncols=3)
    for ax, key in zip(axes, ("reward", "learned", "kl")):
        for method in METHODS:
            if method in course:
                pale = LOOK[method] | dict(alpha=0.4, linewidth=3, label=f"course: {NAMES[method]}")
                held_out_curve(ax, course[method], course.get("base"), key, share=True, **pale)
            held_out_curve(
                ax, runs[method], runs["base"], key, share=True, **LOOK[method], label=NAMES[method]
            )
        title, unit = PANELS[key]
        ax.set(title=title, ylabel=unit, xlabel="answers learned from (% of the budget)")
    axes[0].legend(frameon=False)
    fig.suptitle("Three methods, the same prompts and the same budget: held-out prompts")
    return save_figure(fig, out / "curves.png")


def draw_diagnostics(runs: dict[str, LoggedRun], out: Path) -> Path:
    """What one watches while it trains."""
    fig, axes = figure(14, 8, nrows=2, ncols=3)
    panels = (
        ("approx_kl", "Distance from the policy that drew", "approx_kl (nats per token)", ("ppo", "grpo")),
        ("clipfrac", "Tokens that the clip stops", "clip fraction", ("ppo", "grpo")),
        ("entropy", "Entropy of the next token", "nats", ("ppo", "grpo")),
        ("explained_variance", "What the value model knows of the returns", "explained variance", ("ppo",)),
        ("accuracy", "Pairs in the right order, batch by batch", "accuracy", ("dpo",)),
    )
    for ax, (key, title, unit, methods) in zip(axes.flat, panels):
        for method in methods:
            ax.plot(
                *runs[method].series(key),
                **(LOOK[method] | {"marker": None}),
                linewidth=1.8,
                label=NAMES[method],
            )
        ax.set(title=title, ylabel=unit, xlabel="step")
        ax.legend(frameon=False)
    ax = axes[1, 2]
    for i, key in enumerate(("chosen_reward", "rejected_reward")):
        ax.plot(
            *runs["dpo"].series(key),
            color=COLOURS[3 + 2 * i],
            linestyle=LINES[i],
            linewidth=1.8,
            label=f"{key.split('_')[0]} answers",
        )
    ax.set(title="DPO's own reward", ylabel="beta · log(policy / reference)", xlabel="step")
    ax.legend(frameon=False)
    return save_figure(fig, out / "diagnostics.png")


def draw_frontier(runs: dict[str, LoggedRun], out: Path) -> Path:
    """Reward against KL, a point for each beta."""
    fig, axes = figure(13, 5.4, ncols=2)
    for ax, key in zip(axes, ("reward", "learned")):
        base = runs["base"].summary
        for method in METHODS:
            points = sorted(
                (r.summary for n, r in runs.items() if n == method or n.startswith(f"{method}-")),
                key=lambda s: s["kl"],
            )
            xs, ys = [s["kl"] for s in points], [s[key] for s in points]
            errors = dict(
                xerr=[s["kl_error"] for s in points], yerr=[s[f"{key}_error"] for s in points], capsize=2
            )
            ax.errorbar(xs, ys, **errors, **LOOK[method], markersize=7, linewidth=1.6, label=NAMES[method])
            for x, y, s in zip(xs, ys, points):
                ax.annotate(
                    f"{s['beta']:g}",
                    (x, y),
                    xytext=(6, 7 if method == "ppo" else -13),
                    textcoords="offset points",
                    fontsize=9,
                    color=LOOK[method]["color"],
                    bbox=dict(facecolor="white", edgecolor="none", alpha=0.7, pad=0.5),
                )
        ax.plot(0, base[key], marker="*", markersize=14, color="black", linestyle="none", label=NAMES["base"])
        title, unit = PANELS[key]
        ax.set(title=title, ylabel=unit, xlabel=PANELS["kl"][1])
        ax.margins(y=0.1)
    axes[0].legend(frameon=False, loc="lower right")
    fig.suptitle("What a nat buys: held-out prompts, the numbers are betas, bars one standard error")
    return save_figure(fig, out / "frontier.png")


def draw_hacking(runs: dict[str, LoggedRun], out: Path) -> Path:
    """With the KL term and without."""
    fig, axes = figure(13, 8, nrows=2, ncols=2)
    for ax, key in zip(axes.flat, ("learned", "reward", "kl", "known_words")):
        for i, (name, label) in enumerate(
            (("hacking-held", "with the KL term"), ("hacking-free", "without"))
        ):
            held_out_curve(
                ax,
                runs[name],
                runs.get("base"),
                key,
                color=COLOURS[(0, 5)[i]],
                linestyle=LINES[i],
                marker=MARKERS[i],
                label=label,
            )
        title, unit = PANELS[key]
        ax.set(title=title, ylabel=unit, xlabel="step")
    axes[0, 0].legend(frameon=False)
    fig.suptitle("Reward hacking: the reward model is content, the rule is not")
    return save_figure(fig, out / "hacking.png")


def draw_lengths(run: LoggedRun, out: Path) -> Path:
    """How long SmolLM2's answers to held-out questions are."""
    fig, ax = figure()
    lengths, longest = run.artifacts["lengths"], run.artifacts["longest"]
    labels = [f"{name}: {np.mean(values):.0f} on average" for name, values in lengths.items()]
    ax.hist(list(lengths.values()), np.linspace(0, longest, 17), color=COLOURS[:2], label=labels)
    ax.set(
        title="SmolLM2's answers, before and after DPO",
        xlabel=f"tokens in an answer (cut at {longest})",
        ylabel="held-out questions",
    )
    ax.legend(frameon=False)
    return save_figure(fig, out / "smollm2.png")


def write_aligned_card(logs: Path, out: Path, settings: Settings, folder: Path) -> Path:
    """The kept model's card, from the logs."""
    runs, name = read_runs(logs), NAMES[settings.keep]
    before, after, reward = runs["base"].summary, runs[settings.keep].summary, runs["reward"].summary
    where = folder.relative_to(output_root())
    with_error = lambda row, key: f"{row[key]:.2f} ± {row[f'{key}_error']:.2f}"
    figures = [
        {"": label, "week 6": with_error(before, key), name: with_error(after, key)}
        for key, label in (
            ("reward", "exclamations in an answer"),
            ("learned", "the reward model's reward"),
            ("kl", "KL to week 6's model (nats in an answer)"),
        )
    ]
    figures.append(
        {
            "": "words that occur in the training text",
            "week 6": f"{before['known_words']:.1%}",
            name: f"{after['known_words']:.1%}",
        }
    )
    prompt, answer = runs[settings.keep].artifacts["samples"][0]
    return model_card(
        out / "model_card.md",
        f"Week 6's GPT, aligned by {name}",
        {
            "What": (
                "a small GPT that writes like its training text, exclaims more and knows nothing else. For"
                " learning only"
            ),
            "From": f"the checkpoint of week 6, preset {settings.preset}, trained on {logs.name}",
            "Rewarded": (
                f"phrases of at least {settings.min_words} words that end in '{settings.mark}', as a reward"
                f" model learned it from {reward['pairs']} pairs of the model's own answers (right on"
                f" {reward['held_out_accuracy']:.1%} of {reward['held_out_pairs']} held-out pairs)"
            ),
            "How": (
                f"{name}, {getattr(settings, settings.keep).steps} steps at beta {after['beta']:g}, KL to"
                " week 6's model in the objective"
            ),
            "Measured on": (
                f"{settings.held_out} held-out prompts, one answer of {settings.answer_tokens} tokens to"
                " each, temperature 1"
            ),
            "Limits": (
                "the reward model can be fooled by marks without words; further from week 6's model, reward"
                " and meaning come apart"
            ),
            "Licence": "that of this repository",
        },
        figures,
        "from shared.models.gpt import GPT\nmodel ="
        f' GPT.from_checkpoint("{where.as_posix()}")\nprint(model.generate("ROMEO:"))',
        prompt + answer,
    )


if __name__ == "__main__":
    cli(main, PRESETS, __doc__)
