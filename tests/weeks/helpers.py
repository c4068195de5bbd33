"""The weeks, and their scripts with other settings."""

import dataclasses
import sys
from dataclasses import fields, replace
from typing import Any

from shared import checks, commandline, runtime
from shared.course import report, runs
from shared.data.corpus import named_by_content

WEEKS = runs.weeks()
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


COPYING = {"<string>", *(module.__file__ for module in (dataclasses, checks, commandline, runtime))}
"""Code that reads every setting: to copy, compare, check and keep it."""
ASKING = {"__post_init__", "idle", "part"}


def noting_reads(settings: Any) -> tuple[Any, set[str]]:
    """The same settings, and the names of those among them that a run with them reads, as it goes on."""
    names = {field.name for field in fields(settings)}
    read = set()

    def get(self, name):
        code = sys._getframe(1).f_code
        if name in names and code.co_filename not in COPYING and code.co_name not in ASKING:
            read.add(name)
        return object.__getattribute__(self, name)

    kind = type(settings)
    noting = type(kind.__name__, (kind,), {"__getattribute__": get, "__module__": kind.__module__})
    return noting(**{name: getattr(settings, name) for name in names}), read


EVERYWHERE = {
    *("preset", "data", "text", "device", "resume", "run_name", "tracker", "reference", "study", "mine")
}
"""Settings that say where a run's files are, whose code runs, or that a finished run has no use for."""
ONLY_CHECKED = {
    ("04_mini_gpt", "speedrun"): {"train"},  # a text that is too short is refused before anything is trained
    ("04_mini_gpt", "ablation"): {"train"},
    ("04_mini_gpt", "cache"): {"train"},
    ("04_mini_gpt", "length"): {"train"},
    ("07_amp", "loss"): {"vocab_size"},  # the text is opened, and only its name is used
    ("10_ppo_dpo", "hacking"): {"dpo"},  # one of the methods' settings is taken out of a dict of all
    ("12_deploy", None): {"study_load"},  # the longest prompt must fit
    ("12_deploy", "real"): {"load"},
    ("12_deploy", "real-programs"): {"load", "study_load", "shared_tokens"},
}
"""By week and study: settings without effect that are looked at."""


def assert_flags_have_effects(topic: str, settings: Any, read: set[str]) -> None:
    """That a run has read all the settings that are not idle, and no idle one."""
    idle = {path for path in commandline.idle_settings(settings) if "." not in path}
    rest = {field.name for field in fields(settings)} - idle - EVERYWHERE
    checked = ONLY_CHECKED.get((topic, getattr(settings, "study", None)), set())
    assert not rest - read, f"{sorted(rest - read)} can be given and are not read"
    assert not idle & read - checked - EVERYWHERE, f"{sorted(idle & read)} are refused and are read"
