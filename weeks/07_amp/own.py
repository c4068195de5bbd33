"""What of week 7 can run on the learner's code: a training in fp16 with her scaler, a search, a loss."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.amp import GradScaler

from measures import Bench
from shared.models.gpt import GPT
from shared.runtime import table
from shared.training import Trainer
from shared.training.precision import Float16, precision
from shared.training.tricks import USUAL, carried_out

if TYPE_CHECKING:
    from run import Settings

FIRST_SCALE = 2.0**25
"""Too large at first, so that a scaler has something to do."""
GROWTH_INTERVAL = 4


class OwnScaler:
    """The learner's LossScaler with what the Trainer's fp16 asks of PyTorch's beside it."""

    def __init__(self, scaler: Any):
        self.scaler = scaler

    def scale(self, loss: Tensor) -> Tensor:
        return self.scaler.scale(loss)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler.unscale_(optimizer)

    def update(self, new_scale: float | None = None) -> None:
        if new_scale is not None:
            raise ValueError(
                "the loss overflowed and no gradient did, which your scaler cannot be told: leave out --mine"
            )
        self.scaler.update()

    def get_scale(self) -> float:
        return self.scaler.get_scale()

    def get_backoff_factor(self) -> float:
        return 0.5

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scaler.get_scale(), "_growth_tracker": self.scaler.good_steps}


def check_own_scaler(settings: "Settings") -> None:
    """Raises ValueError for settings that the exercise's scaler does not know."""
    if settings.mine and settings.train.optimizer != "adamw":
        raise ValueError(
            "your scaler serves one optimizer, and train.optimizer=muon makes two: leave it out, or --mine"
        )


def scaled_training(bench: Bench) -> dict[str, Any] | None:
    """A short training in fp16 whose first scale is too large, as a run; with --mine, by the learner's
    LossScaler. Returns its summary, or None where fp16 does not work on this device.
    """
    device = bench.work.device
    try:
        precision("fp16", device)
    except ValueError as error:
        print(f"no training with a scaled loss: {error}\n")
        return None
    hers = bench.work.mine("LossScaler", None)
    scaler: Any = GradScaler(device.type, init_scale=FIRST_SCALE, growth_interval=GROWTH_INTERVAL)
    if hers is not None:
        scaler = OwnScaler(hers(scale=FIRST_SCALE, growth_interval=GROWTH_INTERVAL))
    train = replace(
        bench.settings.train, batch_size=1, log_every=1, eval_every=bench.settings.train.steps, eval_windows=1
    )
    torch.manual_seed(train.seed)
    trainer = Trainer(
        GPT(bench.config).to(device),
        bench.corpus,
        train,
        device=device,
        description="fp16, a scaled loss",
        precision=Float16(scaler=scaler),
    )
    with carried_out(USUAL):
        trainer.fit()
    rows = []
    before = FIRST_SCALE
    for row in (row for row in trainer.history if "loss_scale" in row):
        scale = row["loss_scale"]
        rows.append(
            {"step": row["step"], "scale": scale, "loss": row.get("train_loss"), "skipped": scale < before}
        )
        before = scale
    with bench.work.log("scaler", bench.settings) as log:
        log.artifact(rows=rows)
        return log.finish(
            first_scale=FIRST_SCALE,
            last_scale=before,
            skipped=sum(row["skipped"] for row in rows),
            loss=trainer.last_loss,
        )


def searching_with(hers: Callable[..., Any]) -> Callable[[Callable[[int], bool], int], int]:
    """The learner's `largest_batch` as `find_batch` takes it."""

    def search(fits: Callable[[int], bool], limit: int) -> int:
        largest, tried = hers(fits, limit)
        print(f"your search tried {', '.join(map(str, tried))}")
        if largest == 0:
            raise ValueError("not even a batch of one sequence fits: take a shorter block_size")
        return largest

    return search


def show_scales(summary: dict[str, Any]) -> None:
    """The scaled training's summary, printed."""
    print(table([{name: summary[name] for name in ("first_scale", "last_scale", "skipped", "loss")}]))
