"""What week 10's runs are called: in the logs, in tables and in plots."""

SOLVERS = {
    "base": "the base",
    "form": "supervised, base's lines",
    "solutions": "supervised, solutions",
    "expert": "expert iteration",
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "rloo": "RLOO",
    "ppo": "PPO",
}
"""Of countdown: a base, two controls, and the methods."""
LONGER = "longer_"
"""Before the method, in the names of --study longer's runs."""
METHODS = ("ppo", "grpo", "dpo")
"""Of the exclamations."""
NAMES = {"base": "week 6's model", "ppo": "PPO", "grpo": "GRPO", "dpo": "DPO"}
