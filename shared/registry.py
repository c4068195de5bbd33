"""Week 1. Which model classes there are.

Each registers its kind here, and a checkpoint names the kind it holds. So a checkpoint can be opened without
its reader knowing the models of later weeks. `made_by` names the week's command that makes a missing one.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:  # a model alone needs no tokenizers
    from shared.tokenizers.base import Tokenizer


class LanguageModel(nn.Module):
    """A model of the course: int64 [batch, time] -> [batch, time, vocab_size], with settings in `config`."""

    config: Any
    """A dataclass; `block_size`, where it has one, is the longest sequence that the model takes."""
    tokenizer: "Tokenizer | None" = None
    """The one that its ids are of; None until what loads the model sets it."""


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


class SlotReader(Protocol):
    """Reads texts with a model, each in a slot of its own, and remembers what it has read."""

    lengths: list[int]
    """How many tokens each slot holds; a smaller number forgets the last ones."""
    batch_invariant: bool
    """Whether a token's logits have the same bits whatever else is read with it, of its slot or of others."""

    def read(self, new: Sequence[tuple[int, Sequence[int]]], every: bool = False) -> Tensor:
        """Reads the next tokens of some slots, each given once with at least one token.

        Returns logits on the CPU in fp32: [len(new), vocab_size], of what follows the last token of each; or
        with `every` of what follows each token, [tokens, vocab_size]. Raises ValueError where they do not
        fit.
        """

    def copy(self, source: int, target: int, length: int) -> None:
        """Makes `target` hold the first `length` tokens of `source`."""

    def use_adapter(self, slot: int, name: str | None) -> None:
        """From here on this slot's tokens go through the adapter of this name, None being the model alone."""

    def clear(self, slot: int) -> None:
        """Forgets all that a slot holds, also values that are not finite."""

    def close(self) -> None:
        """Leaves the model as it was before the reader was made."""


MakeReader = Callable[[LanguageModel, int, int, Sequence[str]], SlotReader | None]
READERS: list[MakeReader] = []
"""What reads texts faster than a model's own forward, filled by `register_reader`."""


def register_reader(make: MakeReader) -> MakeReader:
    """Decorator: makes a way to read known to `fast_reader`."""
    READERS.append(make)
    return make


def fast_reader(
    model: LanguageModel, slots: int, max_length: int, adapters: Sequence[str] = ()
) -> SlotReader | None:
    """What reads with this model faster than its own forward, or None where nothing known does.

    slots: texts at once. max_length: of each, in tokens. adapters: names that `use_adapter` may give.
    `shared.quantization` brings the course's.
    """
    for make in READERS:
        reader = make(model, slots, max_length, adapters)
        if reader is not None:
            return reader
    return None


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


class _SkipInit(TorchFunctionMode):
    """Inside, functions of torch.nn.init return their tensor untouched."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules that are made in here lie on PyTorch's device "meta": names and shapes, without values.

    Their first values are skipped: even on "meta" PyTorch would import its compiler for them, which takes
    seconds.
    """
    with torch.device("meta"), _SkipInit():
        yield


class WithoutValues(_SkipInit):
    """Inside, what `torch.empty` makes lies on PyTorch's device "meta", and has no memory.

    So do most parameters: they are made empty, and filled by torch.nn.init. What is computed has its values.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.empty:
            kwargs = {**(kwargs or {}), "device": "meta"}
        return super().__torch_function__(func, types, args, kwargs)


WEEKS_CHECKPOINT = re.compile(
    r"checkpoints/(\d\d_\w+)/(smoke|laptop|gpu)/(?:([^/]+)/)?([^/]+)/[^/]+/(?:best|last)/?$"
)


def made_by(folder: str | Path) -> str:
    """The command that makes a week's checkpoint (checkpoints/TOPIC/PRESET/[NAME/]DATA/RUN/...), as the end
    of a sentence; "" for another folder.

    >>> made_by("checkpoints/04_mini_gpt/laptop/tinyshakespeare/headline/best")
    '. It is made by: python weeks/04_mini_gpt/run.py --preset laptop'
    """
    found = WEEKS_CHECKPOINT.search(Path(folder).as_posix())
    if found is None:
        return ""
    topic, preset, name, data = found.groups()
    own = {"tinyshakespeare": "", "shakespeare": " --data shakespeare"}
    flags = f" --run-name {name}" if name else ""
    flags += own.get(data, " --data FILE, with the text it is for")
    return f". It is made by: python weeks/{topic}/run.py --preset {preset}{flags}"


def import_all_models() -> None:
    """Imports every module of `shared.models`, for programs that open a checkpoint of any week."""
    folder = Path(__file__).parent / "models"
    for module in pkgutil.iter_modules([str(folder)]):
        if module.name != "__main__":  # a program, which calls this
            importlib.import_module(f"shared.models.{module.name}")
