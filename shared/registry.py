"""Week 1. Which model classes there are.

Each registers its kind here, and a checkpoint names the kind it holds. So a checkpoint can be opened without
its reader knowing the models of later weeks.
"""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel


class LanguageModel(nn.Module):
    """A model of the course: int64 [batch, time] -> [batch, time, vocab_size], with settings in `config`."""

    config: Any
    """A dataclass; `block_size`, where it has one, is the longest sequence that the model takes."""


Model = TypeVar("Model", bound=LanguageModel)

MODELS: dict[str, tuple[type[LanguageModel], type]] = {}
"""By name: a model class, and the dataclass with its configuration. Filled by `register_model`."""


def register_model(config: type) -> Callable[[type[Model]], type[Model]]:
    """Class decorator: makes a model known to `checkpoint.load` by its class's name.

    The model is built as `Model(config(...))`. Raises ValueError for a name that another class has taken.
    """

    def register(model: type[Model]) -> type[Model]:
        name = model.__name__
        if name in MODELS and MODELS[name][0].__module__ != model.__module__:
            raise ValueError(
                f"a model called {name} is registered by {MODELS[name][0].__module__}: choose another name"
            )
        MODELS[name] = (model, config)
        return model

    return register


Module = TypeVar("Module", bound=nn.Module)


def unwrapped(model: Module) -> Module:
    """The model inside of torch.compile and DistributedDataParallel, or the model itself.

    The wrappers put names of their own before those of the tensors, and have no kind that is registered.
    """
    inner: nn.Module | None = model
    while inner is not None:
        model = cast(Module, inner)
        inner = (
            model.module if isinstance(model, DistributedDataParallel) else model._modules.get("_orig_mod")
        )
    return model


def import_all_models() -> None:
    """Imports every module of `shared.models`, for programs that open a checkpoint of any week."""
    folder = Path(__file__).parent / "models"
    for module in pkgutil.iter_modules([str(folder)]):
        importlib.import_module(f"shared.models.{module.name}")
