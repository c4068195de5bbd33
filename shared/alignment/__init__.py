"""Week 10. Learning from preferences and rewards."""

from shared.alignment.losses import dpo_loss, gae, grpo_loss, ppo_loss

__all__ = ["dpo_loss", "gae", "grpo_loss", "ppo_loss"]
