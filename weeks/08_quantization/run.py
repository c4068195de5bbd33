"""Week 8: quantization. The learner's own model in 8 and 4 bits: how small, how good, how fast; and a real
one, beside other libraries.

    python weeks/08_quantization/run.py --preset laptop
    # another scheme's checkpoint is kept
    python weeks/08_quantization/run.py --preset laptop --scheme int8
    # with a row of your own layers, as far as they are solved
    python weeks/08_quantization/run.py --preset laptop --mine
    # SmolLM2 beside transformers, bitsandbytes and torchao; or another model, in all studies
    python weeks/08_quantization/run.py --preset laptop --study real
    python weeks/08_quantization/run.py --preset laptop --study real --model gemma3-270m
    # the optimizer's state and the KV cache in 8 bits
    python weeks/08_quantization/run.py --preset laptop --study memory
    # which activations are large, and what SmoothQuant and AWQ do about them
    python weeks/08_quantization/run.py --preset laptop --study outliers
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from figures import draw, write_card
from measure import (
    as_it_decodes,
    compared,
    file_bytes,
    keep,
    memory_limit,
    quantized,
    recovered,
    show,
    size_of,
    window_by_window,
)
from names import MINE, ROWS
from own import in_own_layers
from shared.checks import Checks
from shared.commandline import cli
from shared.course.report import read_runs
from shared.course.workspace import WeekSettings, Workspace
from shared.data.corpus import fixed_windows
from shared.devices import pick_device
from shared.models.names import ModelName
from shared.quantization.modules import save_quantized
from shared.quantization.packing import GROUP_SIZES
from shared.quantization.race import Contender, our_times, race
from shared.runtime import write_atomically
from shared.sampling import generate
from shared.training import TrainConfig
from shared.training.base_model import BASE_PRESETS, trained_base_model
from shared.training.profiling import bandwidth
from studies import STUDIES

TIMED = ("group_size", "prompt_tokens", "new_tokens", "rounds", "sample_tokens")
MODEL = ("model", "blocks", "study_block_size")
MEMORY_SETTINGS = ("memory_steps", "memory_seeds")


@dataclass(frozen=True)
class Settings(WeekSettings):
    ANSWERS_IN: ClassVar = ("run",)

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
    """The same for --study real, whose windows are of `study_block_size` tokens."""
    study_block_size: int = 512
    study_calibration_windows: int = 16
    model: ModelName = "smollm2"
    blocks: int | None = None
    """Of --model only the first so many blocks, to see in seconds that everything runs; None takes all."""
    prompt_tokens: int = 192
    """Read at once to time the prefill."""
    new_tokens: int = 32
    """Written one by one to time the decoding."""
    rounds: int = 3
    """The median of so many rounds counts."""
    sample_tokens: int = 200
    others: bool = True
    """For --study real: also transformers, bitsandbytes and torchao, where they are installed."""
    outlier_windows: int = 2
    """For --study outliers: windows of training text that scales are chosen on, and of held-out text that the
    errors are measured on.
    """
    memory_steps: int = 200
    """For --study memory: how long each small model is trained."""
    memory_seeds: int = 3
    study: Literal["real", "outliers", "memory"] | None = None

    READ_BY: ClassVar = {
        "run": ("scheme", "train", "calibration_windows", "eval_windows", "device", "resume", *TIMED),
        "real": (*MODEL, "study_windows", "study_calibration_windows", "others", *TIMED),
        "memory": (*MODEL, "study_windows", *MEMORY_SETTINGS),
        "outliers": (*MODEL, "outlier_windows"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = Checks(self)
        checks.require(
            self.scheme in ROWS, f"no scheme is called {self.scheme!r}; there are: {', '.join(ROWS)}"
        )
        checks.one_of("group_size", GROUP_SIZES)
        checks.at_least(1, "calibration_windows", "study_calibration_windows", "prompt_tokens")
        checks.at_least(1, "rounds", "sample_tokens", "outlier_windows", *MEMORY_SETTINGS)
        checks.at_least(2, "eval_windows", "study_windows", "study_block_size", "new_tokens")
        checks.finish()


PRESETS = {
    "smoke": Settings(
        preset="smoke",
        train=BASE_PRESETS["smoke"].train,
        calibration_windows=2,
        eval_windows=8,
        study_windows=2,
        study_block_size=32,
        study_calibration_windows=1,
        blocks=1,
        prompt_tokens=16,
        new_tokens=4,
        rounds=1,
        sample_tokens=8,
        outlier_windows=1,
        memory_steps=2,
        memory_seeds=1,
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
    """Quantizes the model of week 6 by every scheme, or runs the study. Returns the week's metrics."""
    if settings.study:
        return STUDIES[settings.study](settings)
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
    models |= in_own_layers(work, model, settings.group_size)
    evaluations = {
        name: window_by_window(m.to(device), corpus, block_size, settings.eval_windows)
        for name, m in models.items()
    }
    prompt = corpus.val[: min(settings.prompt_tokens, block_size - 1)].tolist()
    speed = bandwidth() if device.type == "cpu" else None
    contenders = {name: Contender(m, our_times) for name, m in models.items()}
    times = race(contenders, prompt, settings.new_tokens, settings.rounds)
    rows: dict[str, dict[str, float]] = {}
    for name, m in models.items():
        row = size_of(m, models["fp32"]) | compared(evaluations[name], evaluations["fp32"])
        row |= times[name] | memory_limit(m, speed)
        if name != MINE:  # there is no file of the learner's layers
            row["file_megabytes"] = file_bytes(m) / 1e6
        if name != MINE:  # the learner's layers are multiplied by PyTorch
            windows = (block_size, settings.eval_windows)
            row |= as_it_decodes(m, corpus, *windows, evaluations["fp32"])
        row |= recovered(rows, name, row)
        ids = generate(m, corpus.start, settings.sample_tokens, temperature=0.8, top_p=0.95, seed=1)
        rows[name] = keep(work, name, settings, row, sample=corpus.tokenizer.decode(list(ids)))
    metrics = {key: rows[settings.scheme][key] for key in ("perplexity", "bits_per_byte", "loss")}
    folder = work.checkpoints / settings.scheme
    save_quantized(models[settings.scheme].cpu(), folder, corpus.tokenizer, metrics)
    show(rows)
    runs = read_runs(work.logs)
    print("\nThe same seed, before and after:")
    for name in ("fp32", settings.scheme):
        print(f"\n{name}:\n{runs[name].artifacts['sample'].strip()}")
    finished = work.finish(headline(rows, settings.scheme, speed), draw)
    card = write_card(work.logs, work.reports, settings.scheme, folder)
    write_atomically(folder / "README.md", card.read_text(encoding="utf-8"))
    print(f"kept: {folder}, with its model card ({card.name})")
    return finished


def headline(rows: dict[str, dict[str, float]], scheme: str, speed: float | None) -> dict[str, float | None]:
    """The metrics that the week keeps."""
    metrics: dict[str, float | None] = {
        "kept_of_fp32": rows[scheme]["of_fp32"],
        "perplexity": rows["fp32"]["perplexity"],
    }
    for name in (*ROWS, MINE) if MINE in rows else ROWS:
        for key in ("perplexity", "worse", "of_fp32"):
            metrics[f"{name}_{key}"] = rows[name][key]
    return metrics | {"gptq_recovered": rows["int4-gptq"]["recovered"], "bandwidth": speed}


if __name__ == "__main__":
    cli(main, PRESETS, __doc__)
