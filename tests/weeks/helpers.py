"""The weeks, and their scripts with other settings."""

from dataclasses import replace

from shared.course import report, workspace
from shared.data.corpus import named_by_content

WEEKS = workspace.weeks()
LADDER = WEEKS[:6]
"""The weeks that train the model; from week 7 on something is done to it."""
RHYME = "Round about the cauldron go;\nIn the poison'd entrails throw.\nToad, that under cold stone\n" * 200
"""A small text, so that nothing is fetched."""
DATA = named_by_content("rhyme.txt", RHYME.encode())
"""What runs on it are kept under, from a file rhyme.txt."""
TEXT = {"09_lora": "text", "11_rag": "text"}
"""What a week calls the text its model is trained on, where `data` is something else."""


def script(topic, preset="smoke", **changes):
    module = report.load_script(topic)
    return module, replace(module.PRESETS[preset], **changes)
