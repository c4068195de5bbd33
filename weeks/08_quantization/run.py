"""Week 8: quantization. The learner's own model in 8 and 4 bits: how small, how good, how fast; and a real
one, beside other libraries.

python weeks/08_quantization/run.py --preset laptop
python weeks/08_quantization/run.py --preset laptop --scheme int8            # another scheme's checkpoint is kept
python weeks/08_quantization/run.py --preset laptop --study smollm2          # SmolLM2 beside transformers, bitsandbytes and torchao
"""

import logging
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from shared import checkpoint
from shared.commandline import cli
from shared.course.report import (
    COLOURS,
    MARKERS,
    LoggedRun,
    figure,
    model_card,
    read_runs,
    save_figure,
)
from shared.course.workspace import WeekSettings, Workspace
from shared.data.corpus import Corpus, TokenDataset, fixed_windows, load_corpus, read_text, split_text
from shared.evaluation import Evaluation, evaluate, perplexity
from shared.models.gpt import GPT
from shared.models.layers import swap_modules
from shared.models.pretrained import IM_END, QUESTIONS, chat_prompt, load_smollm2, to_hf
from shared.quantization import quantize
from shared.quantization.gptq import gptq
from shared.quantization.modules import num_bytes, quantization_of, save_quantized
from shared.quantization.packing import GROUP_SIZES
from shared.quantization.race import SHORT_PROMPT, Contender, our_times, race, their_times
from shared.runtime import ROOT, device_name, device_of, pick_device, table, write_atomically
from shared.sampling import generate
from shared.training import TrainConfig
from shared.training.base_model import BASE_PRESETS, trained_base_model
from shared.training.profiling import bandwidth

ROWS = ("int8", "int8-groups", "int4", "int4-gptq", "int4-wide", "int4-wide-gptq", "nf4")
GPTQ = "-gptq"
GROUP = 64
"""Weights that share a scale in rows with "groups" in their name; int8 has one scale for each row of a matrix
otherwise, int4 settings.group_size.
"""
SMOL = "smollm2-"
"""What the study's runs begin with."""


@dataclass(frozen=True)
class Settings(WeekSettings):
    scheme: str = "int4-gptq"
    """Whose checkpoint is kept: int8, int8-groups, int4, int4-gptq, int4-wide, int4-wide-gptq or nf4."""
    group_size: int = 32
    """How many weights share a scale in int4; nf4 has 64."""
    train: TrainConfig = BASE_PRESETS["laptop"].train
    """Of week 6's model, where its checkpoint is not there yet."""
    calibration_windows: int = 512
    """Of training text, from which GPTQ learns what the layers read."""
    eval_windows: int | None = None
    """So many windows of the held-out text, spread over it; None takes it all."""
    study_windows: int = 16
    """The same for --study smollm2, whose windows are of `study_block_size` tokens."""
    study_block_size: int = 512
    study_calibration_windows: int = 16
    study_blocks: int | None = None
    """Of SmolLM2 only the first so many blocks, to see in seconds that everything runs; None takes all."""
    prompt_tokens: int = 192
    """Read at once to time the prefill."""
    new_tokens: int = 32
    """Written one by one to time the decoding."""
    rounds: int = 3
    """The median of so many rounds counts."""
    sample_tokens: int = 200
    others: bool = True
    """For --study smollm2: also transformers, bitsandbytes and torchao, where they are installed."""
    study: Literal["smollm2"] | None = None

    def __post_init__(self) -> None:
        problems = [f"no scheme is called {self.scheme!r}; there are: {', '.join(ROWS)}"] * (
            self.scheme not in ROWS
        )
        problems += [f"group_size={self.group_size}: must be one of {', '.join(map(str, GROUP_SIZES))}"] * (
            self.group_size not in GROUP_SIZES
        )
        counts = (
            "calibration_windows",
            "study_calibration_windows",
            "prompt_tokens",
            "rounds",
            "sample_tokens",
        )
        problems += [
            f"{name}={getattr(self, name)}: must be at least 1" for name in counts if getattr(self, name) < 1
        ]
        counts = ("eval_windows", "study_windows", "study_block_size", "new_tokens")
        problems += [
            f"{name}={n}: must be at least 2"
            for name in counts
            if (n := getattr(self, name)) is not None and n < 2
        ]
        if problems:
            raise ValueError("; ".join(problems))


PRESETS = {
    "smoke": Settings(
        preset="smoke",
        train=BASE_PRESETS["smoke"].train,
        calibration_windows=2,
        eval_windows=8,
        study_windows=2,
        study_block_size=32,
        study_calibration_windows=1,
        study_blocks=2,
        prompt_tokens=16,
        new_tokens=4,
        rounds=1,
        sample_tokens=8,
    ),
    "laptop": Settings(),
    "gpu": Settings(
        preset="gpu",
        data=BASE_PRESETS["gpu"].data,
        train=BASE_PRESETS["gpu"].train,
        eval_windows=256,
        prompt_tokens=512,
    ),
}


def main(settings: Settings) -> dict[str, float]:
    """Quantizes the model of week 6 by every scheme, or runs the study. Returns the week's figures."""
    if settings.study:
        return study_real_model(settings)
    device = pick_device(settings.device)
    model, corpus = trained_base_model(
        settings.preset,
        data=settings.data,
        device=settings.device,
        train=settings.train,
        resume=settings.resume,
    )
    work = Workspace(__file__, settings, corpus.name, device)
    block_size = model.config.block_size
    calibration = fixed_windows(corpus.train, block_size, settings.calibration_windows)[0]
    models = quantized(model, calibration, settings.group_size)
    read = {
        name: window_by_window(m.to(device), corpus, block_size, settings.eval_windows)
        for name, m in models.items()
    }
    prompt = corpus.val[: min(settings.prompt_tokens, block_size - 1)].tolist()
    speed = bandwidth() if device.type == "cpu" else None
    times = race(
        {name: Contender(m, our_times) for name, m in models.items()},
        prompt,
        settings.new_tokens,
        settings.rounds,
    )
    rows = {}
    for name, m in models.items():
        row = size_of(m, models["fp32"]) | compared(read[name], read["fp32"]) | times[name] | limit(m, speed)
        row |= {"file_megabytes": file_bytes(m) / 1e6} | recovered(rows, name, row)
        sample = corpus.tokenizer.decode(
            list(generate(m, corpus.start, settings.sample_tokens, temperature=0.8, top_p=0.95, seed=1))
        )
        rows[name] = keep(work, name, settings, row, sample=sample)
    kept = rows[settings.scheme]
    metrics = {key: kept[key] for key in ("perplexity", "bits_per_byte", "loss")}
    folder = save_quantized(
        work.checkpoints / settings.scheme, models[settings.scheme].cpu(), corpus.tokenizer, metrics
    )
    show(rows)
    print(
        "\nThe same seed, before and"
        f" after:\n\nfp32:\n{sample_of(work, 'fp32')}\n\n{settings.scheme}:\n{sample_of(work, settings.scheme)}"
    )
    finished = work.finish(
        {
            "kept_of_fp32": kept["of_fp32"],
            "perplexity": rows["fp32"]["perplexity"],
            **{
                f"{name}_{key}": row[key]
                for name, row in rows.items()
                if name != "fp32"
                for key in ("perplexity", "worse", "of_fp32")
            },
            "gptq_recovered": rows["int4-gptq"]["recovered"],
            "bandwidth": speed,
        },
        draw,
    )
    card = write_card(work.logs, work.reports, settings.scheme, folder)
    write_atomically(folder / "README.md", card.read_text(encoding="utf-8"))
    print(f"kept: {folder}, with its model card ({card.name})")
    return finished


def quantized(model: GPT, calibration: Tensor, group_size: int) -> dict[str, GPT]:
    """The model itself and its quantized forms, by row. "wide" is the largest group that divides all its
    layers' in_features.
    """
    wide = max(
        g
        for g in GROUP_SIZES
        if all(m.in_features % g == 0 for m in model.modules() if isinstance(m, nn.Linear))
    )
    return {
        "fp32": model,
        "int8": quantize(deepcopy(model), "int8"),
        "int8-groups": quantize(deepcopy(model), "int8", GROUP, say=lambda line: None),
        "int4": quantize(deepcopy(model), "int4", group_size),
        "int4-gptq": gptq(
            deepcopy(model), calibration, group_size, say=lambda line: None
        ),  # int4 has said it
        "int4-wide": quantize(deepcopy(model), "int4", wide, say=lambda line: None),
        "int4-wide-gptq": gptq(deepcopy(model), calibration, wide, say=lambda line: None),
        "nf4": quantize(deepcopy(model), "nf4"),
    }


# ---- how good


def window_by_window(
    model: nn.Module, corpus: Corpus, block_size: int, windows: int | None
) -> list[Evaluation]:
    """`evaluate`, window by window of the held-out text, so that two models can be compared on each."""
    dataset = TokenDataset(corpus.val, block_size)
    count = (len(corpus.val) - 1) // block_size
    if count < 2:
        raise ValueError(
            f"the held-out text has {count} window of {block_size} tokens, and to compare takes 2: give a"
            " longer text"
        )
    begins = np.linspace(0, count - 1, min(windows or count, count)).round().astype(int) * block_size
    device = device_of(model)
    return [
        evaluate(
            model, dataset.tokens[at : at + block_size + 1], block_size, corpus.token_bytes, device=device
        )
        for at in begins
    ]


def compared(read: Sequence[Evaluation], base: Sequence[Evaluation]) -> dict[str, float]:
    """Loss, perplexity and bits per byte over all windows; `worse`, the perplexity's increase over `base`'s,
    with its standard error.
    """
    bits = [e.loss * e.tokens / math.log(2) for e in read]
    loss = statistics.fmean(e.loss for e in read)  # windows are of one size
    more = [e.loss - b.loss for e, b in zip(read, base)]
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": sum(bits) / sum(b / e.bits_per_byte for b, e in zip(bits, read)),
        "worse": math.expm1(statistics.fmean(more)),
        "worse_error": statistics.stdev(more) / math.sqrt(len(more)),
        "tokens": sum(e.tokens for e in read),
    }


def recovered(rows: dict[str, dict[str, float]], name: str, row: dict[str, float]) -> dict[str, float]:
    """For a row of GPTQ's, how much it brings back of the perplexity that rounding to nearest loses: 1 is all
    of it, 0 nothing.
    """
    if not name.endswith(GPTQ):
        return {}
    nearest, whole = rows[name.removesuffix(GPTQ)]["perplexity"], rows["fp32"]["perplexity"]
    return {"recovered": (nearest - row["perplexity"]) / (nearest - whole) if nearest != whole else 0.0}


# ---- how small


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all tensors in the state dict, others' packed ones included, what is shared counted once."""
    found: dict[int, int] = {}

    def add(tensor: Tensor) -> None:
        if hasattr(tensor, "__tensor_flatten__"):  # torchao's: a tensor of tensors
            for name in tensor.__tensor_flatten__()[0]:
                add(getattr(tensor, name))
        elif tensor.numel():
            found[tensor.data_ptr()] = tensor.nbytes

    for value in model.state_dict().values():
        if isinstance(value, Tensor):
            add(value)
    return sum(found.values())


def size_of(model: nn.Module, whole: GPT) -> dict[str, float]:
    """Megabytes, bits for each parameter, and the share of fp32's size."""
    size = num_bytes(model) if model is whole or quantization_of(model) else stored_bytes(model)
    return {
        "megabytes": size / 1e6,
        "bits": 8 * size / whole.num_parameters(),
        "of_fp32": size / num_bytes(whole),
    }


def file_bytes(model: GPT) -> int:
    """Bytes of the checkpoint's model.safetensors, as it is really written."""
    with tempfile.TemporaryDirectory() as folder:
        save = save_quantized if quantization_of(model) else checkpoint.save
        return (save(Path(folder) / "model", model) / "model.safetensors").stat().st_size


# ---- how fast


def limit(model: nn.Module, speed: float | None, size: int | None = None) -> dict[str, float]:
    """Tokens per second that memory allows, where each reads every weight once; of an embedding table only a
    row. KV cache left out.
    """
    tables = {m.weight.data_ptr(): m.weight.nbytes for m in model.modules() if isinstance(m, nn.Embedding)}
    shared = {
        m.weight.data_ptr()
        for m in model.modules()
        if isinstance(m, nn.Linear) and type(m.weight) is nn.Parameter
    }
    size = (size or num_bytes(model)) - sum(n for place, n in tables.items() if place not in shared)
    return {"read_megabytes": size / 1e6} | ({"memory_limit": speed / size} if speed else {})


# ---- a real model, and other libraries


def study_real_model(settings: Settings) -> dict[str, float]:
    """SmolLM2 by every scheme and by other libraries, on a CPU: size, perplexity of held-out text, speed, and
    what it says.
    """
    for library in (
        "bitsandbytes",
        "torch.utils._pytree",
    ):  # warnings of each product, and of torchao's import
        logging.getLogger(library).setLevel(logging.ERROR)
    device = torch.device("cpu")  # where there are kernels of ours
    name, text = read_text(settings.data)
    TokenDataset(np.frombuffer(split_text(text)[1].encode(), np.uint8), settings.study_block_size)
    work = Workspace(__file__, settings, name, device)
    model, tokenizer = load_smollm2(settings.study_blocks)
    corpus = load_corpus(settings.data, tokenizer, settings.study_block_size)
    calibration = fixed_windows(corpus.train, settings.study_block_size, settings.study_calibration_windows)[
        0
    ]
    models: dict[str, nn.Module] = quantized(model, calibration, settings.group_size)
    prompt, speed = corpus.train[: settings.prompt_tokens].tolist(), bandwidth()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        contenders = {row: Contender(m, our_times) for row, m in models.items()}
        if settings.others:
            contenders = with_transformers(model, folder) | contenders | with_others(model)
        times = race(contenders, prompt, settings.new_tokens, settings.rounds)
        theirs = [row for row in contenders if row not in models]
        read = lambda m: window_by_window(m, corpus, settings.study_block_size, settings.study_windows)
        base = read(model)
        for row in ["fp32", *(r for r in contenders if r != "fp32")]:
            m = contenders[row].model
            values = times[row] | {"ours": float(row not in theirs)}
            if row == "transformers-fp32":
                values |= size_of(model, model) | limit(
                    model, speed
                )  # the same weights, so the same perplexity
            else:
                values |= size_of(m, model) | compared(base if m is model else read(m), base)
                values |= limit(m, speed, None if row in models else stored_bytes(m))
            if row in models:
                values["file_megabytes"] = file_bytes(m) / 1e6
                values |= recovered(found, row, values)
            if "transformers-fp32" in times:
                values["over_transformers"] = (
                    times[row]["decode_tokens_per_second"]
                    / times["transformers-fp32"]["decode_tokens_per_second"]
                )
            talk = answers(m, settings.sample_tokens) if row in models else []
            found[row] = keep(work, SMOL + row, settings, values, talk=talk)
            print(f"{row}: measured", flush=True)
    with work.log("smollm2", settings) as log:
        log.finish(bandwidth=speed, parameters=model.num_parameters(), tokens=found["fp32"]["tokens"])
    show(found)
    print(
        f"({device_name(device)}, {speed / 1e9:.1f} GB/s; a prompt of {len(prompt)} tokens;"
        f" {settings.new_tokens} new ones after {SHORT_PROMPT})"
    )
    for row in models:
        print(
            f"\n{row}:\n"
            + "\n".join(
                f"> {question}\n{answer}"
                for question, answer in read_runs(work.logs)[SMOL + row].artifacts["talk"]
            )
        )
    draw(work.logs, work.reports)
    return {
        f"{row}_{key}": values[key]
        for row, values in found.items()
        for key in ("decode_tokens_per_second", "worse")
        if key in values
    }


def answers(model: GPT, tokens: int) -> list[tuple[str, str]]:
    """Week 6's questions and what the model says, greedily."""
    tokenizer, talk = model.tokenizer, []
    for question in QUESTIONS:
        ids = chat_prompt(tokenizer, [{"role": "user", "content": question}])
        answer = generate(model, ids, min(tokens, 40), temperature=0, stop=[tokenizer.special_tokens[IM_END]])
        talk.append((question, tokenizer.decode(list(answer)).strip()))
    return talk


def installed(package: str) -> bool:
    """Whether a library is there; says so where it is not."""
    there = find_spec(package) is not None
    if not there:
        print(f"{package} is not installed, so it has no row: pip install {package}")
    return there


def with_transformers(model: GPT, folder: str) -> dict[str, Contender]:
    """The same weights in Hugging Face's own Llama."""
    if not installed("transformers"):
        return {}
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(to_hf(model, folder), dtype=torch.float32)
    return {"transformers-fp32": Contender(theirs.eval(), their_times)}


def with_others(model: GPT) -> dict[str, Contender]:
    """Our GPT with the linear layers of bitsandbytes and torchao: all but the output layer, which stays tied
    to the embedding, in fp32.

    Transformers leaves the output layer out as well.
    """
    build = {"bitsandbytes": (bitsandbytes_int8, bitsandbytes_nf4), "torchao": (torchao_int8, torchao_int4)}
    found = {}
    for package, functions in build.items():
        for function in functions if installed(package) else ():
            row = function.__name__.replace("_", "-")
            try:
                other = function(deepcopy(model))
                list(generate(other, [1, 2], 1))
                found[row] = Contender(other, our_times)
            except (
                ImportError,
                NotImplementedError,
                RuntimeError,
                AssertionError,
                ValueError,
            ) as error:  # not for this processor
                print(f"{row} does not run here, so it has no row: {str(error).splitlines()[0]}")
    return found


def _swap_inner(model: GPT, swapped: Callable[[nn.Linear], nn.Module]) -> GPT:
    inner = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    swap_modules(model, {name: swapped(linear) for name, linear in inner.items()})
    return model


def bitsandbytes_nf4(model: GPT) -> GPT:
    import bitsandbytes as bnb

    def swapped(linear: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        new.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4")
        return new.to("cpu")

    return _swap_inner(model, swapped)


def bitsandbytes_int8(model: GPT) -> GPT:
    import bitsandbytes as bnb

    def swapped(linear: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=6.0
        )
        new.weight = bnb.nn.Int8Params(linear.weight.detach(), requires_grad=False, has_fp16_weights=False)
        return new.to("cpu").eval()

    return _swap_inner(model, swapped)


class InBFloat16(nn.Module):
    """A linear layer whose product is computed in bfloat16, fp32 around it."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner = inner.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.bfloat16()).float()


def _torchao(model: GPT, config: Any) -> GPT:
    from torchao.quantization import quantize_

    quantize_(
        model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != "lm_head"
    )
    return model


def torchao_int8(model: GPT) -> GPT:
    from torchao.quantization import Int8WeightOnlyConfig

    return _torchao(model, Int8WeightOnlyConfig())


def torchao_int4(model: GPT) -> GPT:
    from torchao.prototype.quantization.int4 import (
        PrototypeInt4WeightOnlyConfig,  # the one whose layout its CPU kernel reads
    )

    return _torchao(
        _swap_inner(model, InBFloat16), PrototypeInt4WeightOnlyConfig(group_size=32)
    )  # with fp32 that kernel is ten times slower


# ---- logs, tables, plots, the card


COLUMNS = {
    "bits": ("bits/weight", 1),
    "megabytes": ("MB", 1),
    "file_megabytes": ("file MB", 1),
    "of_fp32": ("of fp32", 3),
    "perplexity": ("perplexity", 2),
    "bits_per_byte": ("bits/byte", 3),
    "prefill_tokens_per_second": ("prefill tok/s", 0),
    "first_token_ms": ("first token ms", 0),
    "decode_tokens_per_second": ("decode tok/s", 1),
    "over_transformers": ("times transformers", 2),
    "memory_limit": ("memory allows tok/s", 0),
}


def keep(
    work: Workspace, name: str, settings: Settings, row: dict[str, float], **artifacts: Any
) -> dict[str, float]:
    """A row as a run of its own in the logs."""
    with work.log(name, settings) as log:
        log.artifact(**artifacts)
        return log.finish(**row)


def sample_of(work: Workspace, name: str) -> str:
    return read_runs(work.logs)[name].artifacts["sample"].strip()


def show(rows: dict[str, dict[str, float]]) -> None:
    """The table for people."""
    shown = []
    for name, row in rows.items():
        cells = {label: f"{row[key]:,.{digits}f}" for key, (label, digits) in COLUMNS.items() if key in row}
        if name not in ("fp32", "transformers-fp32"):
            cells["perplexity worse by"] = f"{100 * row['worse']:.2f} ± {100 * row['worse_error']:.2f} %"
        shown.append({"row": label_of(name)} | cells)
    print("\n" + table(shown))
    for name, row in rows.items():
        if "recovered" in row:
            print(
                f"{label_of(name)}: brings back {row['recovered']:.0%} of the perplexity that rounding to"
                " nearest loses"
            )


def label_of(name: str) -> str:
    """A row's name for people.

    >>> label_of("smollm2-int4-gptq"), label_of("torchao-int8")
    ('int4 GPTQ', 'torchao int8')
    """
    return (
        name.removeprefix(SMOL)
        .replace("groups", f"groups of {GROUP}")
        .replace("wide", "wide groups")
        .replace(GPTQ, " GPTQ")
        .replace("-", " ")
    )


def rows_of(logs: Path) -> dict[str, dict[str, LoggedRun]]:
    """The measured rows of each model that the logs have, by what a plot calls the model."""
    runs = {name: run for name, run in read_runs(logs).items() if run.summary}
    order = ("transformers-fp32", "fp32", *ROWS)
    place = lambda name: order.index(name) if name in order else len(order)
    found = {}
    for model, prefix in (("week 6's model", ""), ("SmolLM2-135M", SMOL)):
        own = {
            n.removeprefix(prefix): r
            for n, r in runs.items()
            if n.startswith(prefix) and "decode_tokens_per_second" in r.summary
        }
        own = {n: own[n] for n in sorted(own, key=place) if prefix or not n.startswith(SMOL)}
        if "fp32" in own:
            found[model] = own
    return found


def draw(logs: Path, out: Path) -> list[Path]:
    """The week's plots, from its logs."""
    models = {
        model: {name: run.summary for name, run in rows.items()} for model, rows in rows_of(logs).items()
    }
    if not models:
        return []
    plots = [save_figure(tradeoff_figure(models), out / "tradeoff.png")]
    for model, rows in models.items():
        plots.append(
            save_figure(
                speed_figure(model, rows),
                out / ("smollm2_speed.png" if model.startswith("SmolLM2") else "speed.png"),
            )
        )
    return plots


def tradeoff_figure(models: dict[str, dict[str, dict[str, float]]]) -> Any:
    """Bits against perplexity, a bubble's area the decoding speed; a panel for each model."""
    fig, axes = figure(7.2 * len(models), 6.6, ncols=len(models), squeeze=False)
    for ax, (model, rows) in zip(axes[0], models.items()):
        rows = {name: row for name, row in rows.items() if "worse" in row}
        fastest = max(row["decode_tokens_per_second"] for row in rows.values())
        for i, (name, row) in enumerate(rows.items()):
            speed, worse = row["decode_tokens_per_second"], 100 * row["worse"]
            look = dict(
                color=COLOURS[i % 8],
                alpha=0.55,
                edgecolor="black",
                marker=MARKERS[0 if row.get("ours", 1) else 1],
            )
            ax.errorbar(
                row["bits"], worse, 100 * row["worse_error"], color=COLOURS[i % 8], capsize=3, zorder=3
            )
            ax.scatter(row["bits"], worse, s=40 + 560 * speed / fastest, zorder=2, **look)
            ax.annotate(str(i + 1), (row["bits"], worse), ha="center", va="center", fontsize=9, zorder=4)
            ax.scatter([], [], s=60, label=f"{i + 1}. {label_of(name)}: {speed:,.0f}", **look)
        ax.set_xscale("log", base=2)
        ax.set_xticks((4, 8, 16, 32), ("4", "8", "16", "32"))
        ax.minorticks_off()
        ax.set(
            title=f"Bits, perplexity and speed: {model}",
            xlabel="bits for each weight (logarithmic)",
            ylabel="perplexity, increase over fp32 (%)",
        )
        ax.set_xlim(3.4, 44)
        ax.margins(y=0.15)
        if max(row["worse"] for row in rows.values()) > 0.05:
            ax.set_yscale("symlog", linthresh=1)
            ax.set_yticks((0, 0.5, 1, 5, 10, 50), ("0", "0.5", "1", "5", "10", "50"))
            ax.set_ylim(-0.5, 100)
            ax.set_ylabel("perplexity, increase over fp32 (%, logarithmic above 1)")
        title = "tokens a second, as the area shows" + (
            "" if all(row.get("ours", 1) for row in rows.values()) else " (squares: other libraries)"
        )
        ax.legend(
            frameon=False, fontsize=10, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=3, title=title
        )
    return fig


def speed_figure(model: str, rows: dict[str, dict[str, float]]) -> Any:
    """Decode with what memory allows, and prefill, side by side."""
    fig, axes = figure(12.5, 1.8 + 0.46 * len(rows), ncols=2, sharey=True)
    names = [label_of(name) for name in rows]
    colours = [COLOURS[0] if row.get("ours", 1.0) else COLOURS[1] for row in rows.values()]
    for ax, key, title in zip(
        axes,
        ("decode_tokens_per_second", "prefill_tokens_per_second"),
        ("writing, token by token", "reading the prompt"),
    ):
        values = [row[key] for row in rows.values()]
        limits = [row.get("memory_limit", math.inf) for row in rows.values()]
        bound = ax is axes[0] and max(limits) < 10 * max(
            values
        )  # a model that a cache holds is not bound by memory
        right = 1.15 * max(values + limits * bound)
        ax.barh(names, values, color=colours)
        for i, value in enumerate(values):  # inside its bar, where no tick is, unless the bar is too short
            inside = value > 0.08 * right
            ax.annotate(
                f"{value:,.0f}",
                (value, i),
                xytext=(-5 if inside else 5, 0),
                textcoords="offset points",
                va="center",
                fontsize=10,
                ha="right" if inside else "left",
                color="white" if inside else "black",
            )
        ax.set(title=f"{model}: {title}", xlabel="tokens a second", xlim=(0, right))
        if not bound:
            continue
        ax.plot(
            limits, names, "|", color="black", markersize=18, markeredgewidth=2, label="what memory allows"
        )
        for label, colour in (("ours", COLOURS[0]), ("others'", COLOURS[1])):
            ax.barh(names[:1], [0], color=colour, label=label)
        ax.legend(frameon=False, loc="lower right")
    axes[0].invert_yaxis()
    return fig


def write_card(logs: Path, out: Path, scheme: str, folder: Path) -> Path:
    """The kept model's card, from the logs."""
    runs = read_runs(logs)
    before, after = runs["fp32"].summary, runs[scheme].summary
    settings, where = (
        runs[scheme].run["settings"],
        (folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder),
    )
    how = {
        "int4-gptq": f"int4 in groups of {settings['group_size']}, rounded by GPTQ",
        "int4": f"int4 in groups of {settings['group_size']}",
        "int8": "int8, one scale for each row",
        "int8-groups": f"int8 in groups of {GROUP}",
        "int4-wide": "int4 in the largest groups that fit",
        "int4-wide-gptq": "int4 in the largest groups that fit, rounded by GPTQ",
        "nf4": "NF4 in blocks of 64, with double quantization",
    }[scheme]
    figures = [
        {
            "": "size in memory",
            "fp32": f"{before['megabytes']:.2f} MB",
            scheme: f"{after['megabytes']:.2f} MB",
        },
        {
            "": "file",
            "fp32": f"{before['file_megabytes']:.2f} MB",
            scheme: f"{after['file_megabytes']:.2f} MB",
        },
        {"": "bits for each weight", "fp32": f"{before['bits']:.1f}", scheme: f"{after['bits']:.1f}"},
        {"": "perplexity", "fp32": f"{before['perplexity']:.2f}", scheme: f"{after['perplexity']:.2f}"},
        {
            "": "bits per byte",
            "fp32": f"{before['bits_per_byte']:.3f}",
            scheme: f"{after['bits_per_byte']:.3f}",
        },
    ]
    return model_card(
        out / "model_card.md",
        f"Week 6's GPT in {scheme}",
        {
            "What": (
                "a small GPT that writes like its training text and knows nothing else, with quantized linear"
                " layers. For learning only"
            ),
            "From": f"the checkpoint of week 6, preset {settings['preset']}, trained on {logs.name}",
            "Scheme": how,
            "Not quantized": "norms, and the token embedding unless the output layer shares its weight",
            "Measured on": f"{after['tokens']:,} tokens of held-out text",
            "Licence": "that of this repository",
        },
        figures,
        "from shared.quantization import load_quantized\nmodel ="
        f' load_quantized("{where.as_posix()}").model\nprint(model.generate("ROMEO:"))',
        runs[scheme].artifacts["sample"],
    )


if __name__ == "__main__":
    cli(main, PRESETS, __doc__)
