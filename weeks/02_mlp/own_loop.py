"""Week 2's training by the learner's own `train`, for `run.py --mine`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from shared.runtime import RunLog, clock
from shared.training import Trainer

if TYPE_CHECKING:
    from run import Settings


def check_own_loop(settings: "Settings") -> None:
    """Raises ValueError for settings that the exercise's loop does not know."""
    train = settings.train
    known = {"optimizer": "adamw", "schedule": "cosine", "grad_accum_steps": 1}
    other = [
        f"train.{name}={getattr(train, name)}"
        for name, value in known.items()
        if getattr(train, name) != value
    ]
    if settings.resume:
        other.append("resume")
    if train.grad_clip == 0:
        other.append("train.grad_clip=0")
    if train.warmup_steps >= train.steps:
        other.append(f"train.warmup_steps={train.warmup_steps} of {train.steps} steps")
    if other:
        raise ValueError(
            f"your training loop cannot do this: {', '.join(other)}. It takes one batch a step, with AdamW, a"
            " cosine after the warmup and clipping, and starts anew each time. Leave these settings out, or"
            " --mine"
        )


def fit_with(loop: Callable[..., Any], trainer: Trainer, log: RunLog) -> dict[str, Any]:
    """Trains with the learner's loop instead of the Trainer's, on the same batches and with the same
    optimizer, and returns the Trainer's summary. Its seconds include the evaluations.
    """
    config = trainer.config
    found: list[dict[str, float]] = []

    def evaluate(model: torch.nn.Module) -> float:
        found.append(trainer.task.evaluate(model, config, trainer.device))
        return found[-1]["val_loss"]

    batches = trainer.task.batches(config, start_step=0, rank=0, world_size=1)
    started = clock()
    losses, evaluations = loop(
        trainer.model,
        ([part.to(trainer.device) for part in batch] for batch in batches),
        config.steps,
        optimizer=trainer.optimizers[0],
        peak=config.lr,
        warmup_steps=config.warmup_steps,
        final_fraction=config.final_lr,
        max_norm=config.grad_clip,
        evaluate=evaluate,
        eval_every=config.eval_every,
    )
    trainer.seconds = clock() - started
    trainer.step, trainer.first_loss, trainer.last_loss = len(losses), losses[0], losses[-1]
    trainer.final = found[-1]
    for step, loss in enumerate(losses, 1):
        if step == 1 or step % config.log_every == 0:
            log.log(step, train_loss=loss)
    for (done, _), metrics in zip(evaluations, found):
        log.log(done, **metrics)
    return trainer.summary()
