"""Week 2. The training loop, and what later weeks hand to it."""

from shared.training.batches import BatchesTask
from shared.training.callbacks import Callback, SampleText
from shared.training.config import TrainConfig, lr_at
from shared.training.fused_modules import fuse
from shared.training.tasks import NextToken, Task
from shared.training.trainer import Trainer

__all__ = [
    "BatchesTask",
    "Callback",
    "NextToken",
    "SampleText",
    "Task",
    "TrainConfig",
    "Trainer",
    "fuse",
    "lr_at",
]
