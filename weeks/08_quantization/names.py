"""The rows of week 8's tables: what they are called in the logs, and for people."""

ROWS = ("int8", "int8-groups", "int4", "int4-gptq", "int4-wide", "int4-wide-gptq", "nf4")
GPTQ = "-gptq"
MINE = "mine"
"""The row of the learner's own layers, with --mine; what they hold is int4."""
GROUP = 64
"""Weights that share a scale in rows with "groups" in their name. int8 has otherwise one scale for each row
of a matrix, and int4 groups of `settings.group_size`.
"""
SMOL = "smollm2-"
"""What the study's runs begin with."""

MEMORY = "memory"
OUTLIERS = "outliers"
"""The other studies and their runs."""
WAYS = {
    "int8_both": "weights and activations in int8",
    "int8_smooth": "the same after SmoothQuant",
    "int4_nearest": "weights in int4, to nearest",
    "int4_awq": "weights in int4, AWQ",
    "int4_gptq": "weights in int4, GPTQ",
}
"""What the study of outliers compares, by its name in the logs."""


def label_of(name: str) -> str:
    """A row's name for people.

    >>> label_of("smollm2-int4-gptq"), label_of("torchao-int8")
    ('int4 GPTQ', 'torchao int8')
    """
    if name == MINE:
        return "int4, your layers"
    label = name.removeprefix(SMOL).replace("groups", f"groups of {GROUP}").replace("wide", "wide groups")
    return label.replace(GPTQ, " GPTQ").replace("-", " ")
