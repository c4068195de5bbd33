"""Week 2. The training loop, and what later weeks hand to it."""

from shared.training.config import TrainConfig, lr_at
from shared.training.trainer import Trainer

__all__ = ["TrainConfig", "Trainer", "lr_at"]
