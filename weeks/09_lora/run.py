"""Week 9: LoRA. Teaches a model to answer in a certain way without changing its weights: a few numbers beside
them are trained.

    python weeks/09_lora/run.py --preset laptop
    # with your own LoRALinear, once it is solved
    python weeks/09_lora/run.py --preset laptop --mine
    # another method: full, lora, qlora, dora or prompt
    python weeks/09_lora/run.py --preset laptop --method dora --adapter.r 16 --adapter.lora-alpha 32
    # another model, your own data (for more than a comparison of methods: python -m shared.adapters)
    python weeks/09_lora/run.py --preset laptop --model smollm2 --data my_questions.jsonl
    # all methods; with --model smollm2 on the real model
    python weeks/09_lora/run.py --preset laptop --study compare
    # each method at three learning rates
    python weeks/09_lora/run.py --preset laptop --study rates
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import tyro

from figures import draw, write_adapter_card
from fine_tuning import tune_and_observe
from names import COLUMNS, HEADLINE, METHODS, STEWARD, model_name, parts_of
from shared.adapters import LoRAConfig
from shared.adapters.methods import Method
from shared.checks import Checks
from shared.commandline import cli
from shared.course.report import read_runs
from shared.course.workspace import WeekSettings
from shared.devices import device_name, pick_device
from shared.models.names import ANY_MODEL
from shared.runtime import table, write_atomically
from shared.training import TrainConfig
from shared.training.base_model import BASE_PRESETS
from studies import STUDIES

TRAINING = (
    *("lr", "steps", "epochs", "examples_per_step", "warmup", "weight_decay", "evaluations"),
    *("adapter", "scheme", "virtual_tokens", "questions"),
)
"""What is not read where nothing is trained."""


@dataclass(frozen=True)
class Settings(WeekSettings):
    ANSWERS_IN: ClassVar = ("run",)

    data: str = STEWARD
    """Conversations, as JSONL or a JSON array: {"prompt", "response"} or {"prompt", "completion"}, Alpaca's
    {"instruction", "input", "output"}, {"messages"}, or ShareGPT's {"conversations"}.
    """
    held_out: str | None = None
    """The same for measuring; None: a tenth of `data`, drawn by chance (the course's own data has a file)."""
    skip_bad_lines: bool = False
    """Leave out what cannot be read of the data, and count it, instead of stopping."""
    model: Annotated[str, tyro.conf.arg(help=f"course (week 6's own), {ANY_MODEL}")] = "course"
    method: Method = "lora"
    adapter: LoRAConfig = LoRAConfig(r=8, lora_alpha=16.0, target_modules=("all-linear",))
    """For lora, qlora and dora."""
    scheme: str = "nf4"
    """How qlora's base is packed: nf4, int4 or int8."""
    virtual_tokens: int = 16
    """Embeddings that prompt tuning puts in front."""
    text: str = "tinyshakespeare"
    """What the course's model was trained on; on its held-out part we see what is forgotten."""
    base: TrainConfig = BASE_PRESETS["laptop"].train
    """How week 6's model is trained, where its checkpoint is not there yet."""
    lr: float | None = None
    """The peak learning rate; None: what suits the method."""
    steps: int | None = None
    """None: as many as `epochs` takes."""
    epochs: float = 4.0
    """How often each example is read."""
    examples_per_step: int = 8
    """About so many; a row of the batch takes as many as fit."""
    block_size: int = 256
    """Tokens in a row; an example that is longer is left out, and counted."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.0
    evaluations: int = 6
    """How often the held-out loss is measured; the best state is kept."""
    seed: int = 1337
    measured: bool | None = None
    """Also answer held-out questions at length and read the old text, before and after; none: only for the
    course's own data.
    """
    questions: int = 20
    """Held-out ones that are answered."""
    text_windows: int = 128
    """Of the old text, spread over its held-out part."""
    compared: tuple[str, ...] = ("full", "lora-2", "lora-32", "qlora-nf4-8", "dora-8", "prompt-16", "lora-8")
    """The study's runs, a method and its rank or number of embeddings each."""
    rate_factors: tuple[float, ...] = (0.3, 1.0, 3.0)
    """What the study of rates multiplies each method's learning rate by."""
    study: Literal["compare", "rates", "rounding"] | None = None

    READ_BY: ClassVar = {
        "run": ("method",),
        "compare": ("compared",),
        "rates": ("compared", "rate_factors"),
    }

    def idle(self) -> dict[str, str]:
        idle = super().idle()
        if self.model != "course":
            idle["base"] = f"with --model {self.model} no base model is trained"
        if self.steps is not None:
            idle["epochs"] = "--steps says how long"
        if not self.measures_change:
            why = "with data of your own, --measured True asks for it"
            idle |= dict.fromkeys(("questions", "text_windows"), why)
        return idle | (self._idle_in_study() if self.study else self._idle_by_method())

    def _idle_in_study(self) -> dict[str, str]:
        if self.study == "rounding":
            return dict.fromkeys(TRAINING, "nothing is trained")
        by_row = ("adapter.r", "adapter.lora_alpha", "adapter.use_dora", "virtual_tokens")
        idle = dict.fromkeys(by_row, "--compared gives it")
        return idle | ({"lr": "--rate-factors give it"} if self.study == "rates" else {})

    def _idle_by_method(self) -> dict[str, str]:
        idle: dict[str, str] = {}
        why = f"the method is {self.method}"
        if self.method != "lora":
            idle["mine"] = f"{why}, and your layer computes LoRA"
        if self.method in ("full", "prompt"):
            idle["adapter"] = why
        if self.method == "dora":
            idle["adapter.use_dora"] = why
        if self.method != "qlora":
            idle["scheme"] = why
        if self.method != "prompt":
            idle["virtual_tokens"] = why
        return idle

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = Checks(self)
        methods = ", ".join(METHODS)
        checks.require(self.method in METHODS, f"no method is called {self.method!r}; there are: {methods}")
        checks.at_least(1, "virtual_tokens", "examples_per_step", "evaluations", "text_windows", "questions")
        checks.at_least(1, "steps")
        checks.above(0, "epochs", "lr")
        checks.require(
            not (self.mine and (self.adapter.use_dora or self.adapter.use_rslora)),
            "your layer has the scale alpha / r and no lengths: leave out use_dora, use_rslora, or --mine",
        )
        checks.between(0, 1, "warmup")
        checks.seed()
        checks.finish()
        for name in self.compared:
            parts_of(name)

    @property
    def measures_change(self) -> bool:
        """Whether it is measured what becomes of the old text, and how answers read."""
        return self.data == STEWARD if self.measured is None else self.measured

    @property
    def part(self) -> str:
        """Several methods may be trained at once."""
        return self.study or self.run

    @property
    def run(self) -> str:
        """What the run is called in the logs."""
        size = ""
        if self.method == "prompt":
            size = f"-{self.virtual_tokens}"
        elif self.method != "full":
            scheme = f"-{self.scheme}" if self.method == "qlora" else ""
            size = f"{scheme}-{self.adapter.r}"
        return f"{model_name(self.model)}-{self.method}{size}"

    def row(self, name: str) -> "Settings":
        """The settings of one of `compared`. Raises ValueError for another name."""
        method, scheme, size = parts_of(name)
        row = replace(self, study=None, method=method, scheme=scheme or self.scheme)
        if method == "full":
            return row
        if method == "prompt":
            return replace(row, virtual_tokens=int(size))
        return replace(row, adapter=replace(self.adapter, r=int(size), lora_alpha=2.0 * int(size)))


PRESETS = {
    "smoke": Settings(
        preset="smoke",
        base=BASE_PRESETS["smoke"].train,
        steps=6,
        examples_per_step=2,
        evaluations=2,
        questions=1,
        text_windows=8,
        compared=("full", "qlora-int8-2", "prompt-4"),
        rate_factors=(1.0, 3.0),
    ),
    "laptop": Settings(),
    "gpu": Settings(
        preset="gpu",
        model="smollm2",
        epochs=3.0,
        examples_per_step=16,
        block_size=512,
        questions=40,
        text_windows=512,
    ),
}


def main(settings: Settings) -> dict[str, float]:
    """Fine-tunes a model by one method, or by all in turn. Returns what was measured."""
    if settings.study:
        return STUDIES[settings.study](settings, PRESETS[settings.preset])
    device = pick_device(settings.device)
    work, result, kept = tune_and_observe(settings, device)
    for question, was, now in read_runs(work.logs)[settings.run].artifacts.get("talk", [])[:3]:
        print(f"\n> {question}\nbefore: {was}\nafter:  {now}")
    print(f"\n({device_name(device)}; kept in {kept})")
    if model_name(settings.model) != "course" or settings.method != "lora":
        draw(work.logs, work.reports)
        print("\n" + table([{"metric": key, "value": result[key]} for key in COLUMNS if key in result]))
        return result
    metrics = work.finish({name: result.get(name) for name in HEADLINE}, draw)
    card = write_adapter_card(work.logs, work.reports, settings, kept)
    write_atomically(kept / "README.md", card.read_text(encoding="utf-8"))
    return metrics


if __name__ == "__main__":
    cli(main, PRESETS, __doc__)
