"""Week 12: deployment. The learner's own model behind a server, measured from outside, and in the files that
other programs read.

python weeks/12_deploy/run.py --preset laptop
python weeks/12_deploy/run.py --preset laptop --study smollm2                # a real model behind the server, in fp32 and in int8
python weeks/12_deploy/run.py --preset laptop --study smollm2-programs       # and in other programs
python -m shared.serving --model checkpoints/06_gpt2/laptop/tinyshakespeare/gpt2/best      # serves it, until Ctrl-C
"""

import asyncio
import logging
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import requests
import torch
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from shared import checkpoint
from shared.commandline import cli
from shared.course.report import (
    COLOURS,
    LINES,
    MARKERS,
    LoggedRun,
    figure,
    read_runs,
    save_figure,
)
from shared.course.workspace import WeekSettings, Workspace
from shared.data.corpus import read_text, split_text
from shared.export import save_hf_folder, to_gguf, to_onnx
from shared.export.onnx import OnnxModel
from shared.models.gpt import GPT
from shared.models.pretrained import load_smollm2
from shared.quantization.race import SHORT_PROMPT, Contender, our_times, race, their_times
from shared.runtime import clock, device_name, pick_device, table
from shared.sampling import generate
from shared.serving.engine import Engine, same_bits_in_every_row
from shared.serving.generation import Generation, Request
from shared.serving.load import Load, ask_for_text, client, delays, percentile, served, throughput
from shared.training import TrainConfig
from shared.training.base_model import BASE_PRESETS, trained_base_model

OWN, SMOL = "own", "smollm2"
INT8 = ("--quantize=int8", "--group-size=64")
NAMES = {"own": "your model", "smollm2": "SmolLM2, fp32", "smollm2-int8": "SmolLM2, int8"}
PROGRAMS = {
    "pytorch": "PyTorch, shared.sampling",
    "transformers": "transformers",
    "onnx": "ONNX Runtime",
    "llama.cpp-F32": "llama.cpp, F32",
    "llama.cpp-F16": "llama.cpp, F16",
    "llama.cpp-Q8_0": "llama.cpp, Q8_0",
}
CHUNK, SMALL_CHUNK = 32, 8
"""Tokens of a prompt that are read at a time: by the server, and in the picture of the slots."""


@dataclass(frozen=True)
class Settings(WeekSettings):
    train: TrainConfig = BASE_PRESETS["laptop"].train
    """Of week 6's model, where its checkpoint is not there yet."""
    load: Load = Load(at_once=(1, 2, 4, 8))
    """What the server is asked for."""
    prompt_tokens: int = 24
    """Of each of these requests."""
    shared_tokens: int = 160
    """With which several prompts begin, to see what reading them once is worth."""
    shared_prompts: int = 12
    compared: int = 4
    """Prompts that each program goes on with, greedily."""
    new_tokens: int = 64
    """So many tokens."""
    rounds: int = 3
    """The median of so many rounds of speed counts."""
    smol_load: Load = Load(at_once=(1, 2, 4, 8), tokens=32, requests=24)
    """For --study smollm2."""
    smol_blocks: int | None = None
    """Of SmolLM2 only the first so many blocks, to see in seconds that everything runs; None takes all."""
    study: Literal["smollm2", "smollm2-programs"] | None = None

    def __post_init__(self) -> None:
        counts = ("prompt_tokens", "shared_prompts", "compared", "rounds")
        problems = [
            f"{name}={getattr(self, name)}: must be at least 1" for name in counts if getattr(self, name) < 1
        ]
        problems += [
            f"shared_tokens={self.shared_tokens}: must be at least {CHUNK}, as many as the server reads at a"
            " time"
        ] * (self.shared_tokens < CHUNK)
        problems += [f"new_tokens={self.new_tokens}: must be at least 2"] * (self.new_tokens < 2)
        if problems:
            raise ValueError("; ".join(problems))


def smoke() -> Settings:
    s = Settings()
    tiny = Load(tokens=4, texts=2, at_once=(1, 2), turns=1, requests=4, clients=2)
    return replace(
        s,
        preset="smoke",
        train=BASE_PRESETS["smoke"].train,
        load=tiny,
        smol_load=tiny,
        prompt_tokens=8,
        shared_tokens=40,
        shared_prompts=1,
        compared=1,
        new_tokens=4,
        rounds=1,
        smol_blocks=1,
    )


PRESETS = {
    "smoke": smoke(),
    "laptop": Settings(),
    "gpu": Settings(
        preset="gpu",
        data=BASE_PRESETS["gpu"].data,
        train=BASE_PRESETS["gpu"].train,
        load=Load(texts=32, at_once=(1, 2, 4, 8, 16, 32), clients=32),
    ),
}


def main(settings: Settings) -> dict[str, float]:
    """Serves and exports the model of week 6, or does the study. Returns the week's figures."""
    same_bits_in_every_row()
    if settings.study:
        return study_of_smollm2(settings)
    device = pick_device(settings.device)
    model, corpus = trained_base_model(
        settings.preset,
        data=settings.data,
        device=settings.device,
        train=settings.train,
        resume=settings.resume,
    )
    work = Workspace(__file__, settings, corpus.name, device)
    prompts = Prompts(model, corpus.val[:1_000_000].tolist(), settings)
    found = measure_server(OWN, model, prompts, settings.load, settings, work)
    slots = watch_slots(model, prompts, settings, work)
    alike = same_alone(OWN, model.to(device), prompts, settings, work)
    programs = race_programs(OWN, model.cpu(), prompts, settings, work)
    show_served(work.logs)
    return work.finish(
        {
            "ratio": found["ratio"],
            "tokens_per_second": found["many"],
            "one_after_another": found["one"],
            "same_alone": alike["same"] / alike["texts"],
            **{
                key: found[key]
                for key in (
                    "first_p50",
                    "first_p95",
                    "between_p50",
                    "between_p95",
                    "health_p95",
                    "fresh",
                    "reused",
                )
            },
            "slots_saved": slots["saved"],
            "programs_alike": min(row["alike"] for row in programs.values() if "alike" in row),
        },
        draw,
    )


def study_of_smollm2(settings: Settings) -> dict[str, float]:
    """The same with a model that people talk to: the server, or the other programs."""
    device = pick_device(settings.device)
    name, text = read_text(settings.data)
    work = Workspace(__file__, settings, name, device)
    model, tokenizer = load_smollm2(settings.smol_blocks)
    prompts = Prompts(model, tokenizer.encode(split_text(text)[1][:60_000]), settings)
    figures = {}
    if settings.study == SMOL:
        for run, options in ((SMOL, ()), (f"{SMOL}-int8", INT8)):
            found = measure_server(run, model, prompts, settings.smol_load, settings, work, *options)
            figures |= {f"{run}_{key}": found[key] for key in ("ratio", "many", "one", "first_p50", "reused")}
        figures["same_alone"] = same_alone(SMOL, model.to(device), prompts, settings, work)["same"]
    else:
        programs = race_programs(
            SMOL, model, prompts, replace(settings, compared=min(2, settings.compared)), work
        )
        figures = {f"{name}_decode": row["decode_tokens_per_second"] for name, row in programs.items()}
    show_served(work.logs)
    draw(work.logs, work.reports)
    return figures


class Prompts:
    """Parts of a text, another for each number: `prompts(7)` for the load; with a beginning that several
    share, and without.
    """

    def __init__(self, model: GPT, tokens: Sequence[int], settings: Settings):
        self.tokens, self.settings = list(tokens), settings
        longest = (
            settings.shared_tokens
            + settings.prompt_tokens
            + max(settings.new_tokens, settings.load.tokens, settings.smol_load.tokens)
        )
        if longest > model.config.block_size:
            raise ValueError(
                f"shared_tokens, prompt_tokens and the new tokens make {longest}, more than the model's"
                f" block_size={model.config.block_size}"
            )
        if len(self.tokens) < 2 * longest:
            raise ValueError(
                f"the held-out text has {len(self.tokens)} tokens, and prompts of up to {longest} are cut"
                " from it: take a longer text"
            )

    def part(self, number: int, length: int) -> list[int]:
        start = 97 * number % (len(self.tokens) - length)
        return self.tokens[start : start + length]

    def __call__(self, number: int) -> list[int]:
        return self.part(number, self.settings.prompt_tokens)

    def pair(self, number: int) -> tuple[list[int], list[int]]:
        """A long prompt whose beginning nobody has read, and one whose beginning all of these have."""
        long = self.part(499, self.settings.shared_tokens - 1)
        return [number, *long, *self(number)], [0, *long, *self(number)]


# ---- the server, from outside


def measure_server(
    run: str, model: GPT, prompts: Prompts, load: Load, settings: Settings, work: Workspace, *options: str
) -> dict[str, float]:
    """Tokens a second by how many texts are asked for at once, delays of a busy server, and the first token
    of prompts that begin alike.
    """
    print(f"{NAMES[run]}: serving", flush=True)
    with tempfile.TemporaryDirectory() as folder, work.log(run, settings) as log:
        path = checkpoint.save(Path(folder) / "model", model, model.tokenizer)
        with served(
            str(path), f"--slots={max(load.at_once)}", f"--chunk={CHUNK}", f"--device={work.device}", *options
        ) as url:
            rates = asyncio.run(throughput(url, prompts, load))
            waits = asyncio.run(delays(url, prompts, load))
            fresh, reused = asyncio.run(first_tokens(url, prompts))
        for at_once, values in rates.items():
            log.log(
                at_once, tokens_per_second=statistics.median(values), lowest=min(values), highest=max(values)
            )
        one, many = rates[min(rates)], rates[max(rates)]
        ratios = [b / a for a, b in zip(one, many)]
        found = {
            "one": statistics.median(one),
            "many": statistics.median(many),
            "at_once": max(rates),
            "ratio": statistics.median(ratios),
        }
        found |= {
            "ratio_lowest": min(ratios),
            "ratio_highest": max(ratios),
            "texts": load.texts,
            "tokens": load.tokens,
            "prompt": settings.prompt_tokens,
        }
        for name in ("first", "between", "health"):
            found |= {
                f"{name}_p{round(100 * q)}": 1000 * percentile(getattr(waits, name), q) for q in (0.5, 0.95)
            }
        found |= {"requests": load.requests, "clients": load.clients, "health_asked": len(waits.health)}
        found |= {
            "fresh": 1000 * statistics.median(fresh),
            "reused": 1000 * statistics.median(reused),
            "long_prompt": len(prompts.pair(0)[0]),
        }
        found["reuse_ratio"] = found["fresh"] / found["reused"]
        points = np.linspace(0, 1, 101)
        log.artifact(
            **{
                name: [1000 * percentile(getattr(waits, name), q) for q in points]
                for name in ("first", "between", "health")
            }
        )
        return log.finish(**found)


async def first_tokens(url: str, prompts: Prompts) -> tuple[list[float], list[float]]:
    """Seconds to the first token of long prompts that are all new, and of such whose beginning was read
    before, in turns.
    """
    found: tuple[list[float], list[float]] = [], []
    async with client(url) as http:
        await ask_for_text(http, prompts.pair(0)[1], 2)
        for number in range(1, 1 + prompts.settings.shared_prompts):
            for times, prompt, again in zip(found, prompts.pair(number), (False, True)):
                text = await ask_for_text(http, prompt, 2)
                if bool(text.reused) != again:
                    raise ValueError(
                        f"{text.reused} tokens of a prompt were reused, where {'some' if again else 'none'}"
                        " should be: the text repeats itself"
                    )
                times.append(text.times[0])
    return found


# ---- the engine, from inside


def same_alone(
    name: str, model: GPT, prompts: Prompts, settings: Settings, work: Workspace
) -> dict[str, float]:
    """How many of eight texts have the same tokens alone as all together, each with settings of its own."""
    mixed = [
        Request(
            prompts.part(40 + i, settings.prompt_tokens - i % 4),
            max(1, settings.new_tokens - 3 * i % 7),
            temperature=0.4 * (i % 3),
            top_p=(None, 0.9)[i % 2],
            seed=i,
        )
        for i in range(8)
    ]
    with work.log(f"{name}-alone", settings) as log:
        engine = Engine(model, slots=8, max_length=settings.prompt_tokens + settings.new_tokens)
        try:
            alone = [[token.id for token in engine.submit(request)] for request in mixed]
            together = [
                [token.id for token in generation]
                for generation in [engine.submit(request) for request in mixed]
            ]
        finally:
            engine.close()
        return log.finish(
            texts=len(mixed), same=sum(a == b for a, b in zip(alone, together)), tokens=sum(map(len, alone))
        )


def watch_slots(model: GPT, prompts: Prompts, settings: Settings, work: Workspace) -> dict[str, float]:
    """Steps an engine by hand through ten requests, with one slot and with four, and notes what each slot
    does when.
    """
    new = max(2, settings.new_tokens // 2)
    opening = prompts.part(11, 2 * SMALL_CHUNK)
    requests = [
        Request(
            (opening if i in (4, 7) else []) + prompts.part(60 + i, settings.prompt_tokens - i % 5),
            2 + (7 * i + 3) % new,
            temperature=0,
            seed=i,
        )
        for i in range(10)
    ]
    with work.log("slots", settings) as log:
        spans = {
            slots: list(step_by_step(Engine(model, slots, chunk=SMALL_CHUNK, start=False), requests))
            for slots in (1, 4)
        }
        ends = {slots: max(span["end"] for span in found) for slots, found in spans.items()}
        log.artifact(**{f"spans_{slots}": found for slots, found in spans.items()})
        return log.finish(
            texts=len(requests),
            one_slot=1000 * ends[1],
            four_slots=1000 * ends[4],
            saved=1 - ends[4] / ends[1],
        )


def step_by_step(engine: Engine, requests: Sequence[Request]) -> Iterator[dict[str, Any]]:
    """What happened to each text in each step: its number and slot, whether a part of its prompt was read or
    a token written, and when.
    """
    waiting: list[Generation] = [engine.submit(request) for request in requests]
    before, started = [(0, 0)] * len(waiting), clock()
    while True:
        begin = clock() - started
        if not engine.step():
            return engine.close()
        end = clock() - started
        for number, generation in enumerate(waiting):
            now = generation.read, generation.drawn
            for kind, old, new in zip(("read", "written"), before[number], now):
                if new > old:
                    yield {
                        "text": number,
                        "slot": generation.slot,
                        "kind": kind,
                        "begin": begin,
                        "end": end,
                        "reused": generation.reused,
                    }
            before[number] = now


# ---- other programs


LLAMA_CPP = """
import sys, xllamacpp
path, length, threads = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.fit_params = path, int(length), 1, False, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


class LlamaCpp:
    """llama.cpp's server with a GGUF file, its keys and values in fp32 as ours are. A process of its own, or
    its threads and PyTorch's would be in each other's way.
    """

    def __init__(self, path: Path, length: int):
        command = [sys.executable, "-c", LLAMA_CPP, str(path), str(length), str(torch.get_num_threads())]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.address = self.process.stdout.readline().strip()
        if not self.address:
            self.close()
            raise ValueError(f"llama.cpp cannot serve {path.name}: try it with its own program")

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate()

    def times(self, prompt: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
        """The likeliest tokens, and the moments at which the text began and each came, by llama.cpp's own
        watch: without HTTP.
        """
        greedy = dict(
            temperature=0,
            samplers=["top_k"],
            top_k=1,
            repeat_penalty=1.0,
            cache_prompt=False,
            return_tokens=True,
            ignore_eos=True,
        )
        answer = requests.post(
            f"{self.address}/completion",
            json=dict(prompt=prompt, n_predict=new_tokens, **greedy),
            timeout=600,
        )
        answer.raise_for_status()
        found = answer.json()
        first, rest = found["timings"]["prompt_ms"] / 1000, found["timings"]["predicted_ms"] / 1000
        return found["tokens"], [0.0, *(first + rest * i / max(1, new_tokens - 1) for i in range(new_tokens))]


def onnx_times(model: OnnxModel, prompt: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
    """As `LlamaCpp.times`."""
    tokens, times, past, idx = [], [clock()], model.new_cache(), np.array([prompt], np.int64)
    for _ in range(new_tokens):
        logits, past = model(idx, past)
        idx = logits[:, -1].argmax(-1)[:, None]
        tokens.append(int(idx[0, 0]))
        times.append(clock())
    return tokens, times


def transformers_tokens(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


Write = Callable[[Any, list[int], int], list[int]]


def race_programs(
    name: str, model: GPT, prompts: Prompts, settings: Settings, work: Workspace
) -> dict[str, dict[str, float]]:
    """Exports the model, and lets each program go on with the same prompts: how many tokens are as ours, how
    large, how fast, in turns.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    print(f"{NAMES[name]}: exporting", flush=True)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # what transformers imports warns there
    disable_progress_bar()
    length = max(settings.prompt_tokens, SHORT_PROMPT) + settings.new_tokens
    with tempfile.TemporaryDirectory() as parent, ExitStack() as at_the_end:
        folder = Path(parent)
        save_hf_folder(folder / "hf", model, model.tokenizer)
        to_onnx(folder / "model.onnx", model)
        onnx = OnnxModel(folder / "model.onnx", torch.get_num_threads())
        files = {
            "pytorch": checkpoint.save(folder / "own", model) / "model.safetensors",
            "transformers": folder / "hf",
            "onnx": folder / "model.onnx",
        }
        models: dict[str, Any] = {
            "pytorch": model,
            "transformers": AutoModelForCausalLM.from_pretrained(folder / "hf").eval(),
            "onnx": onnx,
        }
        writes: dict[str, Write] = {
            "pytorch": lambda m, prompt, n: list(generate(m, prompt, n, temperature=0)),
            "transformers": transformers_tokens,
            "onnx": lambda m, prompt, n: onnx_times(m, prompt, n)[0],
        }
        times = {
            "pytorch": our_times,
            "transformers": their_times,
            "onnx": lambda m, prompt, n: onnx_times(m, prompt, n)[1],
        }
        if find_spec("xllamacpp"):
            for kind in ("F32", "F16", "Q8_0"):
                files[f"llama.cpp-{kind}"] = path = to_gguf(
                    folder / f"{kind}.gguf", model, model.tokenizer, kind
                )
                models[f"llama.cpp-{kind}"] = at_the_end.enter_context(closing(LlamaCpp(path, length)))
                writes[f"llama.cpp-{kind}"] = lambda m, prompt, n: m.times(prompt, n)[0]
                times[f"llama.cpp-{kind}"] = lambda m, prompt, n: m.times(prompt, n)[1]
        else:
            print("llama.cpp is not compared: its package xllamacpp is not installed (requirements-test.txt)")
        begins = [prompts.part(300 + i, settings.prompt_tokens) for i in range(settings.compared)]
        texts = {
            program: [writes[program](m, begin, settings.new_tokens) for begin in begins]
            for program, m in models.items()
        }
        speed = race(
            {p: Contender(m, times[p]) for p, m in models.items()},
            prompts.part(200, settings.prompt_tokens),
            settings.new_tokens,
            settings.rounds,
        )
        rows = {}
        for program in models:
            row = speed[program] | {
                "megabytes": size(files[program]) / 1e6,
                "texts": len(begins),
                "new_tokens": settings.new_tokens,
            }
            if program not in (
                "llama.cpp-F16",
                "llama.cpp-Q8_0",
            ):  # which round the weights, and then write another text
                row["alike"] = min(
                    common(ours, theirs) for ours, theirs in zip(texts["pytorch"], texts[program])
                )
            row["over_ours"] = row["decode_tokens_per_second"] / speed["pytorch"]["decode_tokens_per_second"]
            with work.log(f"{name}-{program}", settings) as log:
                log.artifact(text=model.tokenizer.decode(begins[0] + texts[program][0]))
                rows[program] = log.finish(**row)
    return rows


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """With how many equal tokens both begin."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(p.stat().st_size for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file())


def show_served(logs: Path) -> None:
    """The tables for people."""
    runs = read_runs(logs)
    rows = [
        {
            "model": NAMES[n],
            "one after another (tokens/s)": s["one"],
            f"{s['at_once']} at once": s["many"],
            "ratio": s["ratio"],
            "first token p50 / p95 (ms)": f"{s['first_p50']:.0f} / {s['first_p95']:.0f}",
            "between p50 / p95": f"{s['between_p50']:.1f} / {s['between_p95']:.1f}",
            "/health p95": s["health_p95"],
            "long prompt, new / reused (ms)": f"{s['fresh']:.0f} / {s['reused']:.0f}",
        }
        for n in NAMES
        if n in runs and (s := runs[n].summary)
    ]
    print(f"\n{table(rows)}\n({device_name(torch.device('cpu'))}, the client on the same cores)")
    rows = [
        {
            "model": NAMES[n],
            "program": PROGRAMS[p],
            "tokens as ours": f"{s['alike']} of {s['new_tokens']}" if "alike" in s else "",
            "MB": s["megabytes"],
            "decode (tokens/s)": s["decode_tokens_per_second"],
            "first token (ms)": s["first_token_ms"],
        }
        for n in (OWN, SMOL)
        for p in PROGRAMS
        if f"{n}-{p}" in runs and (s := runs[f"{n}-{p}"].summary)
    ]
    print("\n" + table(rows))


# ---- plots


def draw(logs: Path, out: Path) -> list[Path]:
    """The week's plots, from its logs."""
    runs = {name: run for name, run in read_runs(logs).items() if run.summary}
    plots = (
        [draw_throughput(runs, out), draw_delays(runs, out)] if any(name in runs for name in NAMES) else []
    )
    plots += [draw_slots(runs["slots"], out)] if "slots" in runs else []
    for name in (OWN, SMOL):
        if f"{name}-pytorch" in runs:
            plots.append(
                draw_programs(
                    name, {p: run.summary for p in PROGRAMS if (run := runs.get(f"{name}-{p}"))}, out
                )
            )
    return plots


def line_look(i: int) -> dict[str, Any]:
    return dict(color=COLOURS[i], linestyle=LINES[i], marker=MARKERS[i], linewidth=1.8, markersize=6)


def plain_log(axis: Any, ticks: Sequence[int] | None = None) -> None:
    """A logarithmic axis with numbers that are read at a glance."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(FixedLocator(ticks) if ticks else LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_locator(NullLocator())


def draw_throughput(runs: dict[str, LoggedRun], out: Path) -> Path:
    """Tokens a second, and how many times those of one after another, by the number of texts at once."""
    fig, axes = figure(12, 4.8, ncols=2)
    for i, name in enumerate(n for n in NAMES if n in runs):
        at_once, rates = runs[name].series("tokens_per_second")
        axes[0].plot(at_once, rates, **line_look(i), label=NAMES[name])
        for x, rate in zip(at_once, rates):
            axes[0].annotate(
                f"{rate:,.0f}",
                (x, rate),
                xytext=(0, (8, -15, 8)[i]),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=COLOURS[i],
            )
        axes[1].plot(at_once, [r / rates[0] for r in rates], **line_look(i), label=NAMES[name])
    most = max(ax.get_xlim()[1] for ax in axes)
    ideal = [n for n in (1, 2, 4, 8, 16, 32) if n <= most]
    axes[1].plot(ideal, ideal, color="#555555", linestyle=":", linewidth=1.4, label="as many times as texts")
    plain_log(axes[0].yaxis)
    plain_log(axes[1].yaxis, ideal)
    axes[0].margins(y=0.15)
    axes[0].set(title="All texts together", ylabel="tokens/s")
    axes[1].set(title="Against one after another", ylabel="times the tokens/s (of medians)")
    for ax in axes:
        plain_log(ax.xaxis, ideal)
        ax.set(xlabel="texts at once")
    axes[0].legend(frameon=False)
    axes[1].legend(frameon=False)
    fig.suptitle("What serving many texts at once is worth")
    return save_figure(fig, out / "throughput.png")


def draw_delays(runs: dict[str, LoggedRun], out: Path) -> Path:
    """What shares of clients wait how long, and what is saved where prompts begin alike."""
    fig, axes = figure(14, 4.6, ncols=3)
    shown = [n for n in NAMES if n in runs]
    for ax, key, title in (
        (axes[0], "first", "To the first token"),
        (axes[1], "between", "Between two tokens"),
    ):
        for i, name in enumerate(shown):
            values = runs[name].artifacts[key]
            ax.plot(
                values, range(101), color=COLOURS[i], linestyle=LINES[i], linewidth=1.8, label=NAMES[name]
            )
            for q in (50, 95):
                ax.plot(values[q], q, marker=MARKERS[i], color=COLOURS[i], markersize=7)
        plain_log(ax.xaxis)
        ax.set(title=f"{title} (marks: p50, p95)", xlabel="milliseconds", ylabel="% that wait no longer")
    axes[0].legend(loc="best", edgecolor="none", framealpha=0.9)
    places = np.arange(len(shown))
    for i, (key, label) in enumerate((("fresh", "all of it read"), ("reused", "its beginning reused"))):
        values = [runs[n].summary[key] for n in shown]
        axes[2].bar(places + 0.4 * i - 0.2, values, 0.38, color=COLOURS[(1, 0)[i]], label=label)
        for x, value in zip(places, values):
            axes[2].annotate(
                f"{value:.0f}",
                (x + 0.4 * i - 0.2, value),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
    axes[2].set_xticks(places, [NAMES[n].replace(", ", "\n") for n in shown])
    plain_log(axes[2].yaxis)
    values = [runs[n].summary[key] for n in shown for key in ("fresh", "reused")]
    axes[2].set(
        title="First token of a long prompt, alone",
        ylabel="milliseconds",
        ylim=(min(values) / 2, 4 * max(values)),
    )
    axes[2].legend(frameon=False, loc="upper left")
    summary = runs[shown[0]].summary
    fig.suptitle(f"Waiting: {summary['clients']} clients at once")
    return save_figure(fig, out / "delays.png")


def draw_slots(run: LoggedRun, out: Path) -> Path:
    """A time line: what each slot does, with one slot and with four."""
    spans = {slots: run.artifacts[f"spans_{slots}"] for slots in (1, 4)}
    fig, axes = figure(13, 5.4, nrows=2, sharex=True, height_ratios=(1, 3.2))
    for ax, (slots, found) in zip(axes, spans.items()):
        for kind, colour in (("read", COLOURS[1]), ("written", COLOURS[4])):
            for slot in range(slots):
                bars = [
                    (1000 * s["begin"], 1000 * (s["end"] - s["begin"]))
                    for s in found
                    if s["slot"] == slot and s["kind"] == kind
                ]
                ax.broken_barh(
                    bars,
                    (slot - 0.4, 0.8),
                    facecolors=colour,
                    edgecolor="white",
                    linewidth=0.4,
                    label=None if slot else f"{kind} (prompt)" if kind == "read" else "a token written",
                )
        for number in sorted({s["text"] for s in found}):
            own = [s for s in found if s["text"] == number]
            begin, end = 1000 * own[0]["begin"], 1000 * own[-1]["end"]
            ax.plot(
                [begin, begin], [own[0]["slot"] - 0.42, own[0]["slot"] + 0.42], color="black", linewidth=1.4
            )
            label = f"{number}{'*' if own[0]['reused'] else ''}"
            ax.annotate(
                label,
                ((begin + end) / 2, own[0]["slot"]),
                ha="center",
                va="center",
                fontsize=9,
                fontweight="bold",
            )
        ax.set_yticks(range(slots), [f"slot {slot}" for slot in range(slots)])
        ax.set(
            ylim=(slots - 0.45, -0.55),
            title=(
                f"{'One slot' if slots == 1 else f'{slots} slots'}:"
                f" {1000 * max(s['end'] for s in found):.0f} ms"
            ),
            ylabel="",
        )
        ax.grid(axis="y", visible=False)
    axes[0].legend(frameon=False, ncols=2, loc="upper right", bbox_to_anchor=(1, 1.6))
    axes[1].set_xlabel(
        "milliseconds (numbers: texts in the order they came; *: the beginning of its prompt was in a slot"
        " already)"
    )
    fig.suptitle(f"{run.summary['texts']} requests, slot by slot")
    return save_figure(fig, out / "slots.png")


def draw_programs(name: str, rows: dict[str, dict[str, float]], out: Path) -> Path:
    """How large the files are, and how fast each program writes."""
    fig, axes = figure(12, 1.8 + 0.42 * len(rows), ncols=2, sharey=True)
    for ax, key, title, unit, form in (
        (axes[0], "megabytes", "Size", "megabytes", ".3g"),
        (axes[1], "decode_tokens_per_second", "Speed, one text", "tokens/s", ",.0f"),
    ):
        values = [row[key] for row in rows.values()]
        ax.barh(
            [PROGRAMS[p] for p in rows], values, color=[COLOURS[0 if p == "pytorch" else 4] for p in rows]
        )
        for i, value in enumerate(values):
            ax.annotate(
                f"{value:{form}}",
                (value, i),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=10,
            )
        ax.set(title=title, xlabel=unit, xlim=(0, 1.15 * max(values)))
    axes[0].invert_yaxis()
    fig.suptitle(
        f"{NAMES[name].split(',')[0][:1].upper()}{NAMES[name].split(',')[0][1:]} in other programs' files"
    )
    return save_figure(fig, out / f"programs{'' if name == OWN else '-' + name}.png")


if __name__ == "__main__":
    cli(main, PRESETS, __doc__)
