"""The weeks, and their scripts with other settings."""

from dataclasses import replace

from shared.course import report, workspace

WEEKS = workspace.weeks()
LADDER = WEEKS[:6]
"""The weeks that train the model; from week 7 on something is done to it."""
TEXT = {"09_lora": "text", "11_rag": "text"}
"""What a week calls the text its model is trained on, where `data` is something else."""


def script(topic, preset="smoke", **changes):
    module = report.load_script(topic)
    return module, replace(module.PRESETS[preset], **changes)
