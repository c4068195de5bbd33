"""Week 2. The training loop, and what later weeks hand to it."""

from shared.training.trainer import TrainConfig, Trainer, lr_at

__all__ = ["TrainConfig", "Trainer", "lr_at"]
