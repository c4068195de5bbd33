"""What week 10's runs are called: in the logs, in tables and in plots."""

METHODS = ("ppo", "grpo", "dpo")
SMOL = "smollm2"
NAMES = {"base": "week 6's model", "ppo": "PPO", "grpo": "GRPO", "dpo": "DPO"}
