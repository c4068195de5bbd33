"""Week 6. What models are called: on a command line, in the names of runs, for people, and on the hub."""

import re
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from shared.data.corpus import named_by_content


class KnownModel(NamedTuple):
    """A model that the course knows by a short name."""

    label: str
    """For people."""
    hub: str
    """Its name on the Hugging Face hub, where its weights are not rounded."""


BY_NAME = {
    "smollm2": KnownModel("SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "gemma3-270m": KnownModel("Gemma 3 270M", "google/gemma-3-270m"),
}
"""GGUF files that `shared.assets` knows. Gemma's terms are shown, and asked for, before it is fetched."""
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""What a name on the hub looks like: "gpt2", or "someone/my-model"."""

ANY_MODEL = (
    "smollm2 or gemma3-270m, the folder of a checkpoint or of a Hugging Face model, a GGUF file, or a name on"
    " the hub such as gpt2."
)
"""What `load_model` takes, for people."""
ModelName = Annotated[str, tyro.conf.arg(help=ANY_MODEL)]
"""A setting that names a model: its help is the same in every command."""
OwnModelName = Annotated[
    str, tyro.conf.arg(help=f"own (your newest checkpoint; smollm2 where there is none), {ANY_MODEL}")
]
"""The same where `shared.training.own_model.name_and_source` reads it."""


def run_slug(model: str) -> str:
    """What the names of runs with a model begin with. Files and folders of one name are told apart.

    >>> run_slug("smollm2"), run_slug("Qwen/Qwen3-0.6B")
    ('smollm2', 'Qwen-Qwen3-0.6B')
    """
    path = Path(model).resolve()
    if model not in BY_NAME and path.exists():
        return named_by_content(path.name.removesuffix(".gguf"), str(path).encode())
    return model.replace("/", "-")


def named_run(model: str, run: str) -> str:
    """What a run with a model is called that is called `run` with SmolLM2, the course's usual one.

    >>> named_run("smollm2", "memory"), named_run("gemma3-270m", "memory")
    ('memory', 'gemma3-270m-memory')
    """
    return run if model == "smollm2" else f"{run_slug(model)}-{run}"


def model_label(model: str) -> str:
    """A model, or the slug of its runs, for people.

    >>> model_label("gemma3-270m"), model_label("Qwen/Qwen3-0.6B")
    ('Gemma 3 270M', 'Qwen-Qwen3-0.6B')
    """
    return BY_NAME[model].label if model in BY_NAME else run_slug(model)
