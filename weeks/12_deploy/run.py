"""Week 12: deployment. The learner's own model behind a server, measured from outside, and in the files that
other programs read.

    python weeks/12_deploy/run.py --preset laptop
    # delays by your percentile, and your engine writes the texts that other programs are held to
    python weeks/12_deploy/run.py --preset laptop --mine
    # a real model behind the server, in fp32 and in int8: SmolLM2, or another
    python weeks/12_deploy/run.py --preset laptop --study real
    python weeks/12_deploy/run.py --preset laptop --study real --model gemma3-270m
    # and in other programs
    python weeks/12_deploy/run.py --preset laptop --study real-programs
    # serves your model, until Ctrl-C
    python -m shared.serving --model checkpoints/06_gpt2/laptop/tinyshakespeare/gpt2/best
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from figures import draw
from measures import CHUNK, measure_server, same_alone, show_served, watch_slots
from names import OWN
from programs import race_programs
from prompts import Prompts
from shared.checks import Checks
from shared.commandline import cli
from shared.course.workspace import WeekSettings, Workspace
from shared.devices import pick_device
from shared.models.names import ModelName
from shared.serving.load import Load
from shared.serving.reading import same_bits_in_every_row
from shared.training import TrainConfig
from shared.training.base_model import BASE_PRESETS, trained_base_model
from studies import STUDIES

WAITING = ("first_p50", "first_p95", "between_p50", "between_p95", "health_p95", "fresh", "reused")
"""The metrics of delays that the week keeps."""
SERVED = ("shared_tokens", "shared_prompts")
EXPORTED = ("compared", "rounds")


@dataclass(frozen=True)
class Settings(WeekSettings):
    ANSWERS_IN: ClassVar = ("run",)

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
    study_load: Load = Load(at_once=(1, 2, 4, 8), tokens=32, requests=24)
    """For --study real."""
    model: ModelName = "smollm2"
    blocks: int | None = None
    """Of --model only the first so many blocks, to see in seconds that everything runs; None takes all."""
    study: Literal["real", "real-programs"] | None = None

    READ_BY: ClassVar = {
        "run": ("train", "resume", "load", *SERVED, *EXPORTED),
        "real": ("model", "blocks", "study_load", *SERVED),
        "real-programs": ("model", "blocks", *EXPORTED),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = Checks(self)
        checks.at_least(1, "prompt_tokens", "shared_prompts", "compared", "rounds")
        checks.require(
            self.shared_tokens >= CHUNK,
            f"shared_tokens={self.shared_tokens}: must be at least {CHUNK}, as many as the server reads at a"
            " time",
        )
        checks.at_least(2, "new_tokens")
        checks.finish()


def _smoke() -> Settings:
    tiny = Load(tokens=4, texts=2, at_once=(1, 2), turns=1, requests=4, clients=2)
    return replace(
        Settings(),
        preset="smoke",
        train=BASE_PRESETS["smoke"].train,
        load=tiny,
        study_load=tiny,
        prompt_tokens=8,
        shared_tokens=40,
        shared_prompts=1,
        compared=1,
        new_tokens=4,
        rounds=1,
        blocks=1,
    )


PRESETS = {
    "smoke": _smoke(),
    "laptop": Settings(),
    "gpu": Settings(
        preset="gpu",
        data=BASE_PRESETS["gpu"].data,
        train=BASE_PRESETS["gpu"].train,
        load=Load(texts=32, at_once=(1, 2, 4, 8, 16, 32), clients=32),
    ),
}


def main(settings: Settings) -> dict[str, float]:
    """Serves and exports the model of week 6, or does the study. Returns the week's metrics."""
    same_bits_in_every_row()
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
    prompts = Prompts(model, corpus.val[:1_000_000].tolist(), settings)
    server = measure_server(OWN, model, prompts, settings.load, work)
    slots = watch_slots(model, prompts, settings, work)
    alone = same_alone(OWN, model.to(device), prompts, settings, work)
    programs = race_programs(OWN, model.cpu(), prompts, settings, work)
    show_served(work.logs)
    metrics = {
        "ratio": server["ratio"],
        "tokens_per_second": server["many"],
        "one_after_another": server["one"],
        "same_alone": alone["same"] / alone["texts"],
    }
    metrics |= {key: server[key] for key in WAITING}
    metrics["slots_saved"] = slots["saved"]
    metrics["programs_alike"] = min(row["alike"] for row in programs.values() if "alike" in row)
    return work.finish(metrics, draw)


if __name__ == "__main__":
    cli(main, PRESETS, __doc__)
