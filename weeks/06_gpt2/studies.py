"""Week 6's studies: GPT-2's own blocks, a model that others trained, and what training GPT-2 costs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from figures import draw
from shared.assets import Unavailable
from shared.course.exercise import Week
from shared.course.exercise.building import computed_by
from shared.course.workspace import Workspace
from shared.data.corpus import read_text, split_text
from shared.data.shards import INDEX
from shared.devices import device_name, pick_device
from shared.evaluation import score_text
from shared.models.chat import IM_END, QUESTIONS, chat_prompt
from shared.models.gpt import GPT, GPTConfig
from shared.models.pretrained import hf_tensors, load_gpt2, load_smollm2
from shared.registry import without_memory
from shared.runtime import clock, table
from shared.sampling import generate
from shared.tokenizers import BPETokenizer, gpt2_tokenizer
from shared.training import TrainConfig
from shared.training.base_model import BASE_PRESETS, open_corpus, train_model
from shared.training.execution import ALONE, FP32, Precision
from shared.training.profiling import (
    CARDS,
    USUAL_MFU,
    StepCost,
    in_own_process,
    matmul_peak,
    measure_training,
)
from shared.zero_shot.tasks import load_task, run_task

if TYPE_CHECKING:
    from run import Settings

TASKS = ("lambada", "piqa")
BEGINNINGS = ("Hello, I'm a language model,", "In a shocking finding, scientists discovered")
"""What OpenAI's GPT-2 goes on with."""
LOGITS_APART = 0.01
"""By how much logits of one model, computed in two ways, may differ: GPT-2's are about 100 in size."""
PUBLISHED = {"piqa_acc_norm": 0.669}
"""SmolLM2-135M-Instruct under lm-eval, unquantized, on all 1,838 examples. Also the baseline in the card of
lldois/SmolLM2-135M-Reasoning-SLERP-Champion.
"""
GPT2 = {"lambada_acc": 0.3256, "lambada_perplexity": 40.06, "piqa_acc": 0.6289}
"""GPT-2 124M under lm-eval, on all examples. LAMBADA: lm-eval's issue 2159; of PIQA there is no page to cite.
OpenAI's paper has 0.4599 on LAMBADA, by another protocol (lm-eval's issue 356).
"""
COMPARED = (
    "bits_per_byte",
    "text_perplexity",
    "lambada_acc",
    "lambada_perplexity",
    "piqa_acc",
    "piqa_acc_norm",
)
"""The metrics that the table shows."""
FULL_RUN = 10_000_000_000
"""Tokens of a full run of GPT-2 124M: 19,073 steps of 524,288, one pass over FineWeb-Edu's sample of 10B.

Published runs of that size end at a validation loss of about 3.07 there. OpenAI's own checkpoint, which
learned from other pages, has 3.29 on that text (karpathy/build-nanogpt).
"""
CLASSIC = ("norm", "position", "mlp", "bias", "tie_weights", "qk_norm", "zero_init")
"""The fields of GPTConfig whose defaults are what GPT-2 had."""
SECONDS_IN_A_YEAR = 365 * 86400
WEEKS_SO_FAR = {
    "01_bigram": "network",
    "02_mlp": "mlp",
    "03_attention": "attention",
    "04_mini_gpt": "headline",
    "05_bpe": "bpe",
    "06_gpt2": "gpt2",
}
"""Each week's own run, by topic."""


def study_text(settings: "Settings") -> tuple[str, str]:
    """The name and the text that a study reads. Shards hold no text: then tinyshakespeare, said aloud."""
    if settings.data == BASE_PRESETS["gpu"].data or (Path(settings.data) / INDEX).exists():
        print(f"{settings.data} is a folder for shards, which hold no text: this study takes tinyshakespeare")
        return read_text("tinyshakespeare")
    return read_text(settings.data)


# ---- GPT-2's own blocks


def study_shape(settings: "Settings") -> dict[str, float]:
    """The same tokens and steps with the blocks that GPT-2 had."""
    corpus = open_corpus(settings)
    work = Workspace(__file__, settings, corpus.name, pick_device(settings.device))
    gpt2 = GPTConfig()
    changed = replace(
        settings, model=replace(settings.model, **{field: getattr(gpt2, field) for field in CLASSIC})
    )
    with work.log("shape-gpt2", changed) as log:
        result = log.finish(**train_model(changed, corpus, work, log, ALONE, name="shape-gpt2"))
    row = {
        "run": "GPT-2's own blocks",
        "bits per byte": result["best_val_bits_per_byte"],
        "seconds": result["seconds"],
    }
    print("\n" + table([row]))
    draw(work.logs, work.reports)
    return result


# ---- a model that others trained


def study_smollm2(settings: "Settings") -> dict[str, float]:
    """A model that others trained, in our GPT: on the week's held-out text, on two tasks, and in
    conversation.

    A task whose examples cannot be had is left out, and that is said.
    """
    device = pick_device(settings.device)
    name, text = study_text(settings)
    work = Workspace(__file__, settings, name, device)
    started = clock()
    model, tokenizer = load_smollm2(settings.blocks)
    metrics: dict[str, float] = {"load_seconds": clock() - started, "parameters": model.num_parameters()}
    model.to(device)
    with work.log("smollm2", settings) as log:
        held_out = split_text(text)[1]
        evaluation = score_text(
            model, held_out, tokenizer=tokenizer, block_size=1024, stride=512, progress=True
        )
        metrics["bits_per_byte"] = evaluation.bits_per_byte
        metrics["text_perplexity"] = evaluation.perplexity
        metrics["text_tokens"] = evaluation.tokens
        for task in TASKS:
            metrics |= score_task(task, model, tokenizer, settings.limit)
        talk, metrics["generated_tokens_per_second"] = ask_questions(model, tokenizer)
        log.artifact(talk=talk)
        log.finish(**metrics)
    print("\n" + "\n\n".join(f"> {question}\n{answer}" for question, answer in talk))
    print("\n" + table(beside_published(metrics, "SmolLM2")))
    draw(work.logs, work.reports)
    return metrics


def score_task(task: str, model: GPT, tokenizer: BPETokenizer, limit: int | None) -> dict[str, float]:
    """The metrics of a zero-shot task, their names headed by its own; none where it cannot be had."""
    try:
        examples = load_task(task)[:limit]
    except Unavailable as error:
        print(f"{task} is left out: {error}")
        return {}
    result = run_task(model, tokenizer, task, examples, progress=True)
    metrics = {f"{task}_{metric}": value for metric, value in result.metrics.items()}
    metrics[f"{task}_examples"] = len(result.records)
    for metric, error in result.standard_errors.items():
        metrics[f"{task}_{metric}_error"] = error
    return metrics


def ask_questions(model: GPT, tokenizer: BPETokenizer) -> tuple[list[tuple[str, str]], float]:
    """The course's questions with the model's answers, greedily; and the tokens that it wrote per second."""
    talk = []
    tokens = 0
    started = clock()
    for question in QUESTIONS:
        prompt = chat_prompt(tokenizer, [{"role": "user", "content": question}])
        stop = [tokenizer.special_tokens[IM_END]]
        answer = list(generate(model, prompt, 60, temperature=0, stop=stop))
        talk.append((question, tokenizer.decode(answer).removesuffix(IM_END).strip()))
        tokens += len(answer)
    return talk, tokens / (clock() - started)


def beside_published(metrics: dict[str, float], model: str) -> list[dict[str, Any]]:
    """A table's rows: what was measured of a model, its standard errors, and what others published."""
    return [
        {
            "what": key,
            f"{model} here": metrics[key],
            "standard error": metrics.get(f"{key}_error"),
            "SmolLM2, published": PUBLISHED.get(key),
            "GPT-2 124M, published": GPT2.get(key),
        }
        for key in COMPARED
        if key in metrics
    ]


# ---- OpenAI's GPT-2


def study_openai(settings: "Settings") -> dict[str, float]:
    """OpenAI's GPT-2 124M from the Hugging Face hub in our GPT, with --mine by the learner's loader and in
    her own `MiniGPT`: it speaks, and is measured as SmolLM2 is. Raises ValueError where the hub cannot be
    reached.
    """
    device = pick_device(settings.device)
    name, text = study_text(settings)
    work = Workspace(__file__, settings, name, device)
    load = work.mine("load_hf_weights", None)
    if load is None:
        model, tokenizer = load_gpt2()
    else:
        config, state = hf_tensors("gpt2")
        model, tokenizer = GPT(config).eval(), gpt2_tokenizer()
        load(model, state)
    model.to(device)
    model.tokenizer = tokenizer
    hers = her_gpt2(work, model)
    with work.log("openai", settings) as log:
        said = []
        for start in BEGINNINGS:
            said.append(start + model.generate(start, 60, temperature=0.8, top_k=50, seed=1))
        if hers is not None:
            said.append(go_on(hers, tokenizer, BEGINNINGS[0], device))
        log.artifact(said=said)
        held_out = split_text(text)[1]
        evaluation = score_text(
            model, held_out, tokenizer=tokenizer, block_size=1024, stride=512, progress=True
        )
        metrics = {"bits_per_byte": evaluation.bits_per_byte, "text_perplexity": evaluation.perplexity}
        for task in TASKS:
            metrics |= score_task(task, model, tokenizer, settings.limit)
        log.finish(**metrics)
    print("\n" + "\n\n".join(said))
    print("\n" + table(beside_published(metrics, "GPT-2")))
    return metrics


def her_gpt2(work: Workspace, model: GPT) -> nn.Module | None:
    """With --mine and once it is solved, the learner's `MiniGPT` on the model's own weights, which from then
    on computes the model's logits (text that is written with a cache stays the course's). Raises ValueError
    where its logits are not the model's.
    """
    gpt = work.mine("MiniGPT", None, week_number=4)
    if gpt is None:
        return None
    block = work.mine("Block", Week(4).exercises["Block"].reference, week_number=4)
    attention = work.mine(
        "MultiHeadAttention", Week(3).exercises["MultiHeadAttention"].reference, week_number=3
    )

    def with_bias(n_embd: int, n_head: int) -> nn.Module:
        """Week 3's attention, each of its four layers with a bias."""
        layer = attention(n_embd, n_head)
        for letter in "qkvo":
            setattr(layer, f"{letter}_proj", nn.Linear(n_embd, n_embd))
        return layer

    idx = torch.arange(20, device=next(model.parameters()).device)[None]
    with torch.no_grad():
        right = model(idx)
        hers = gpt(model.config, with_bias, block).eval()
        apart = (computed_by(model, hers)(idx) - right).abs().max().item()
    print(f"your MiniGPT holds GPT-2's weights; its logits differ from the course's by at most {apart:.1e}")
    if apart > LOGITS_APART:
        raise ValueError(
            f"your MiniGPT's logits differ from the course's by {apart:.2g}: does your attention call its"
            " layers, self.q_proj(x)? With self.q_proj.weight alone GPT-2's biases are left out"
        )
    return hers


@torch.no_grad()
def go_on(hers: Any, tokenizer: BPETokenizer, start: str, device: torch.device) -> str:
    """A text that the learner's `generate` goes on with, by the likeliest tokens."""
    idx = torch.tensor([tokenizer.encode(start)], device=device)
    return tokenizer.decode(hers.generate(idx, 40)[0].tolist())


# ---- what training GPT-2 costs


@dataclass(frozen=True)
class StepKind:
    """How a training step is carried out."""

    precision: Precision = FP32
    compile_model: bool = False
    recompute: bool = False


def step_kinds(device: torch.device) -> dict[str, StepKind]:
    """The kinds of step that are worth measuring on a device, by name."""
    kinds = {"float32": StepKind(), "float32, recomputed": StepKind(recompute=True)}
    if device.type == "cuda":
        bfloat16 = Precision(torch.bfloat16)
        kinds["bfloat16"] = StepKind(bfloat16)
        kinds["bfloat16, compiled"] = StepKind(bfloat16, compile_model=True)
        kinds["bfloat16, compiled, recomputed"] = StepKind(bfloat16, compile_model=True, recompute=True)
    return kinds


def study_cost(settings: "Settings") -> dict[str, float]:
    """What steps of a real size take here, each kind in a process of its own; and a whole run's hours and
    dollars on common cards.
    """
    device = pick_device(settings.device)
    work = Workspace(__file__, settings, study_text(settings)[0], device)
    config = GPTConfig.preset(settings.measured)
    train = TrainConfig(
        steps=6, batch_size=1, block_size=config.block_size, lr=6e-4, warmup_steps=2, beta2=0.95
    )
    if device.type == "cuda":
        train = replace(train, steps=20, batch_size=16)
    own_mfu = work.mine("mfu", None)
    counted = (config.n_layer, config.n_embd, config.vocab_size, config.block_size)
    kinds = step_kinds(device)
    dtypes = dict.fromkeys(kind.precision.dtype for kind in kinds.values())
    peaks = {dtype: matmul_peak(device, dtype) for dtype in dtypes}
    steps = {}
    for name, kind in kinds.items():
        with work.log("cost-" + name.replace(", ", "-"), settings) as log:
            cost = in_own_process(
                measure_training,
                config,
                train,
                device,
                kind.precision,
                compile_model=kind.compile_model,
                recompute=kind.recompute,
            )
            peak = peaks[kind.precision.dtype]
            busy = cost.flops / peak
            if own_mfu is not None:
                busy = own_mfu(*counted, cost.tokens_per_second, peak)
            steps[name] = log.finish(**step_metrics(name, cost, peak, busy))
    tokens = f"{train.batch_size} x {train.block_size} tokens a step"
    print(f"\n{settings.measured}, {tokens}, on {device_name(device)}")
    show_steps(steps, peaks)
    mfu = max(step["mfu"] for step in steps.values())
    speed = max(step["tokens_per_second"] for step in steps.values())
    years = FULL_RUN / speed / SECONDS_IN_A_YEAR
    bill = price_list(config)
    show_bill(bill, years)
    with work.log("cost", settings) as log:
        log.artifact(bill=bill)
        log.finish(mfu=mfu, years_here=years, **flat_bill(bill))
    draw(work.logs, work.reports)
    return {name: step["seconds"] for name, step in steps.items()}


def step_metrics(name: str, cost: StepCost, peak: float, mfu: float) -> dict[str, Any]:
    """What the logs keep of a kind of step. peak: FLOP/s that products of matrices reach in its format."""
    return {
        "name": name,
        "seconds": cost.seconds,
        "tokens_per_second": cost.tokens_per_second,
        "mfu": mfu,
        "peak_flops": peak,
        "gigabytes": None if cost.memory is None else cost.memory / 1e9,
        "kept_gigabytes": cost.kept / 1e9,
        "first_loss": cost.losses[0],
        "last_loss": cost.losses[-1],
    }


def show_steps(steps: dict[str, dict[str, Any]], peaks: dict[torch.dtype, float]) -> None:
    """Prints the table of the kinds of step. peaks: FLOP/s by format."""
    headings = {
        "seconds": "seconds",
        "tokens_per_second": "tokens/s",
        "mfu": "MFU",
        "gigabytes": "peak GB",
        "kept_gigabytes": "kept GB",
        "first_loss": "first loss",
    }
    rows = []
    for name, step in steps.items():
        rows.append({"step": name} | {heading: step[key] for key, heading in headings.items()})
    print(table(rows))
    reached = [
        f"{peak / 1e9:,.0f} GFLOP/s in {str(dtype).removeprefix('torch.')}" for dtype, peak in peaks.items()
    ]
    print(
        f"(MFU: of what products of matrices reach here, {', '.join(reached)}; kept: from the forward pass"
        " for the backward)"
    )


def price_list(config: GPTConfig) -> list[dict[str, Any]]:
    """Hours and dollars for FULL_RUN tokens on each card, computed from the model's FLOPs at USUAL_MFU."""
    with without_memory():
        flops = GPT(config).flops_per_token(config.block_size)
    rows = []
    for card, (teraflops, rent) in CARDS.items():
        hours = FULL_RUN * flops / (teraflops * 1e12 * USUAL_MFU) / 3600
        rows.append(
            {
                "card": card,
                "TFLOP/s": teraflops,
                "$ an hour": rent,
                "hours": round(hours, 1),
                "$": round(hours * rent),
            }
        )
    return rows


def show_bill(bill: list[dict[str, Any]], years: float) -> None:
    """Prints the price list. years: for FULL_RUN tokens on this machine."""
    print(
        f"\n{FULL_RUN / 1e9:.0f} B tokens would take {years:.2f} years here. On cards one can rent, computed,"
        f" not measured:\n{table(bill)}"
    )
    print(f"(at an MFU of {USUAL_MFU}, which is assumed, as the rents are; none of these cards was measured)")


def flat_bill(bill: list[dict[str, Any]]) -> dict[str, float]:
    """The price list as metrics, such as `T4_hours`."""
    metrics = {}
    for row in bill:
        for heading, value in row.items():
            if heading != "card":
                metrics[f"{row['card']} {heading}".replace(" ", "_")] = value
    return metrics


STUDIES: dict[str, Callable[["Settings"], dict[str, float]]] = {
    "shape": study_shape,
    "smollm2": study_smollm2,
    "openai": study_openai,
    "cost": study_cost,
}
