"""The rows of week 8's tables: what they are called in the logs, and for people."""

import re

ROWS = ("int8", "int8-groups", "int4", "int4-gptq", "int4-wide", "int4-wide-gptq", "nf4")
GPTQ = "-gptq"
MINE = "mine"
"""The row of the learner's own layers, with --mine; what they hold is int4."""
GROUP = 64
"""Weights that share a scale in rows with "groups" in their name. int8 has otherwise one scale for each row
of a matrix, and int4 groups of `settings.group_size`.
"""
LIBRARY = "(?:transformers|bitsandbytes|torchao)-"
RUN = re.compile(
    rf"(?:(?P<model>(?!{LIBRARY}).+?)-)?"
    rf"(?P<row>(?:{LIBRARY})?(?:fp32|int8|int4|nf4)(?:-groups|-wide)?(?:-gptq)?"
    rf"|{MINE})"
)
"""A run's name: its row, behind the slug of the model of `--study real`."""

MEMORY = "memory"
OUTLIERS = "outliers"
"""The other studies, and what their runs are called with SmolLM2."""
WAYS = {
    "int8_both": "weights and activations in int8",
    "int8_smooth": "the same after SmoothQuant",
    "int4_nearest": "weights in int4, to nearest",
    "int4_awq": "weights in int4, AWQ",
    "int4_gptq": "weights in int4, GPTQ",
}
"""What the study of outliers compares, by its name in the logs."""


def model_and_row(name: str) -> tuple[str, str]:
    """The slug of a run's model, "" for the learner's own, and its row.

    >>> model_and_row("gemma3-270m-int4-gptq"), model_and_row("smollm2-torchao-int8")
    (('gemma3-270m', 'int4-gptq'), ('smollm2', 'torchao-int8'))
    >>> model_and_row("int4-gptq"), model_and_row("torchao-int8")
    (('', 'int4-gptq'), ('', 'torchao-int8'))
    """
    match = RUN.fullmatch(name)
    return (match["model"] or "", match["row"]) if match else ("", name)


def label_of(name: str) -> str:
    """A row's name for people.

    >>> label_of("smollm2-int4-gptq"), label_of("torchao-int8")
    ('int4 GPTQ', 'torchao int8')
    """
    if name == MINE:
        return "int4, your layers"
    label = model_and_row(name)[1].replace("groups", f"groups of {GROUP}").replace("wide", "wide groups")
    return label.replace(GPTQ, " GPTQ").replace("-", " ")
