"""What week 12's models and programs are called: in the logs, in tables and in plots."""

from collections.abc import Iterable

from shared.models.names import model_label

OWN = "own"
"""What the runs of week 6's model begin with; those of the studies begin with the slug of their model's name.
"""
INT8 = "-int8"
"""Behind a model that was served in int8."""
PROGRAMS = {
    "pytorch": "ours, shared.sampling",
    "transformers": "transformers",
    "onnx": "ONNX Runtime",
    "llama.cpp-F32": "llama.cpp, F32",
    "llama.cpp-F16": "llama.cpp, F16",
    "llama.cpp-Q8_0": "llama.cpp, Q8_0",
}


def label_of_runs(model: str) -> str:
    """A model, as the names of its runs begin, for people.

    >>> label_of_runs("own"), label_of_runs("smollm2")
    ("week 6's model", 'SmolLM2-135M')
    """
    return "week 6's model" if model == OWN else model_label(model)


def server_label(run: str) -> str:
    """A served model for people.

    >>> server_label("own"), server_label("gemma3-270m"), server_label("gemma3-270m-int8")
    ("week 6's model", 'Gemma 3 270M, fp32', 'Gemma 3 270M, int8')
    """
    if run == OWN:
        return label_of_runs(run)
    return f"{label_of_runs(run.removesuffix(INT8))}, {'int8' if run.endswith(INT8) else 'fp32'}"


def models_in(runs: Iterable[str], suffix: str) -> list[str]:
    """The models of which there is a run with this suffix: week 6's first, then SmolLM2.

    >>> models_in(["slots", "gemma3-270m-alone", "smollm2-alone", "own-alone"], "-alone")
    ['own', 'smollm2', 'gemma3-270m']
    """
    models = [run.removesuffix(suffix) for run in runs if run.endswith(suffix)]
    return sorted(models, key=lambda model: (model != OWN, model != "smollm2", model))


def servers_in(runs: Iterable[str]) -> list[str]:
    """The runs in which a model was served, in the same order, in fp32 and in int8.

    >>> servers_in(["smollm2-int8", "smollm2", "smollm2-alone", "own", "own-alone"])
    ['own', 'smollm2', 'smollm2-int8']
    """
    names = set(runs)
    models = models_in(names, "-alone")
    return [run for model in models for run in (model, f"{model}{INT8}") if run in names]
