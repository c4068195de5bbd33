"""Week 1. Checkpoints: a model in a folder, from which a run can be resumed.

The folder has `model.safetensors`, `config.json`, `tokenizer.json`, and for a run that may be resumed
`training.safetensors` and `training.json`. Nothing in it is executed on loading. A save is all or nothing:
the folder is written under another name, synced, and only then takes the old one's place.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shared.devices import resolve_device
from shared.locks import folder_lock
from shared.registry import MODELS, LanguageModel, WithoutValues, made_by, unwrapped, without_memory
from shared.runtime import os_error_in, read_json
from shared.tokenizers.base import Tokenizer

SAVING_SECONDS = 600
"""For so long a save waits for another of the same folder."""
FORMS: dict[str, Callable[[LanguageModel, Any], LanguageModel]] = {}
"""By entry of config.json: what gives a new model the form that the saved tensors are for.

Filled by `register_form`.
"""


def register_form(entry: str, rebuild: Callable[[LanguageModel, Any], LanguageModel]) -> None:
    """Lets `load` open checkpoints that were saved with `more={entry: value}`.

    rebuild(new model, value) returns the model in that form. Its parameters may lie on PyTorch's device
    "meta", without values: they are filled afterwards.
    """
    FORMS[entry] = rebuild


@dataclass(frozen=True)
class Checkpoint:
    """What `load` finds in a folder."""

    model: LanguageModel
    tokenizer: Tokenizer | None
    metrics: dict[str, float]
    """What was measured when it was saved."""
    tensors: dict[str, Tensor] | None
    """Training state by name: optimizer moments, random state. None where none was saved."""
    state: dict[str, Any] | None
    """Training state in JSON (step, best loss, settings)."""


def save(
    model: LanguageModel,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    metrics: dict[str, float] | None = None,
    *,
    tensors: dict[str, Tensor] | None = None,
    state: dict[str, Any] | None = None,
    weights: dict[str, Tensor] | None = None,
    more: dict[str, Any] | None = None,
) -> Path:
    """Writes `folder`, replacing what was there, and returns it.

    On a full disk or a kill at any moment, the old or the new checkpoint is there, whole. tokenizer: None
    takes the model's. tensors, state: the
    training state of a run that may be resumed; both are kept where `state` is given. weights: the model's
    tensors, where `model` has not all of each in this process, or a run will take them up (`load_learned`);
    None takes them from `model`. more: further entries of config.json: what a later week did to the model.
    `load` undoes none of it and needs a form of that name (`register_form`). Raises ValueError, where
    `weights` is None, for a model that `load` could not build again: of a class that is not registered, or
    with layers other than its class and `more` give it (adapters, quantization).
    """
    model = unwrapped(model)
    if tokenizer is None:
        tokenizer = model.tokenizer
    config = {
        "model": _kind(model),
        "config": asdict(model.config),
        "metrics": metrics or {},
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
        **(more or {}),
    }
    if weights is None:
        weights = unshared(model)
        _check_loadable(config, weights, Path(folder))
    with whole_folder(folder) as new:
        _write_tensors(new / "model.safetensors", weights)
        if tokenizer is not None:
            tokenizer.save(new / "tokenizer.json")
        (new / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        if state is not None:
            _write_tensors(new / "training.safetensors", tensors or {})
            (new / "training.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
    return Path(folder)


def _check_loadable(config: dict[str, Any], weights: Mapping[str, Tensor], folder: Path) -> None:
    """Raises ValueError where `load` would not find these tensors in the model that `config` describes."""
    if config["model"] not in MODELS:
        raise ValueError(
            f"a {config['model']} could not be loaded again, so it is not saved: its class is not registered"
            " (shared.registry.register_model). A soft prompt is saved alone (save_adapter)"
        )
    with without_memory():
        model = _rebuilt(folder, json.loads(json.dumps(config)))
    problems = _misfits({name: tensor.shape for name, tensor in weights.items()}, unshared(model))
    if problems:
        raise ValueError(
            f"this model could not be loaded again, so it is not saved: {problems}. Its layers are not those"
            f" of a {config['model']}: merge adapters (merge_lora), or save them alone (save_adapter); save a"
            " quantized model with save_quantized"
        )


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Gives a new, empty folder, which takes the place of `folder` once the block is done.

    After an error in the block, the old one stays. Those who save the same folder take turns: the last one's
    stays. Raises ValueError for "." and the like, and where another has been saving it for SAVING_SECONDS.
    """
    folder = Path(folder)
    if not _is_named(folder):
        raise ValueError(f"{folder} cannot be replaced as a whole: give a folder with a name, such as model")
    lock = f".{folder.name}.saving"
    with folder_lock(folder.parent, f"saving {folder.name}", name=lock, wait=SAVING_SECONDS):
        yield from _replaced(folder)


def _replaced(folder: Path) -> Iterator[Path]:
    """What `whole_folder` does while nobody else does it."""
    new = _beside(folder, ".new")
    old = _beside(folder, ".old")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir()
        yield new
        for path in [*new.iterdir(), new]:
            _sync(path)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        refused = os_error_in(error)
        if isinstance(error, SafetensorError) and refused is not None:
            raise OSError(refused.errno, refused.strerror, str(folder)) from None
        raise
    # From here on, a kill leaves `folder` or `old` complete, if there was one before; `find` looks for them
    # in this order.
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _beside(folder: Path, ending: str) -> Path:
    """The folder that has this one's name with the ending."""
    if not _is_named(folder):
        folder = folder.resolve()
    return folder.parent / f"{folder.name}{ending}"


def _is_named(folder: Path) -> bool:
    """Whether the path ends in the folder's name; "." and ".." do not."""
    return folder.name not in ("", "..")


def unshared(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without a tensor's second name (tied weights): safetensors stores each tensor once."""
    model = unwrapped(model)
    first_names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: tensor for name, tensor in model.state_dict().items() if name in first_names}


def _kind(model: nn.Module) -> str:
    """The name of the model's class, without the one that FSDP puts in front."""
    own = [kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch.")]
    return own[0].__name__


def learned(model: nn.Module) -> dict[str, Tensor]:
    """Of `unshared` what a run must keep.

    That is all of it, or, where parameters are frozen, only what is trained beside them (adapters).
    """
    model = unwrapped(model)
    tensors = unshared(model)
    if all(p.requires_grad for p in model.parameters()):
        return tensors
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return {name: tensor for name, tensor in tensors.items() if name in trained}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of tensors and their names: values, shapes and types."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find(folder: str | Path) -> Path | None:
    """The folder with a whole checkpoint; None if there is none.

    It is `folder` itself, or what a kill in the middle of a save left beside it.
    """
    folder = Path(folder)
    for path in (folder, _beside(folder, ".old")):
        if (path / "config.json").is_file():
            return path
    return None


def load(
    folder: str | Path, tokenizer: Tokenizer | None = None, device: torch.device | str = "auto"
) -> Checkpoint:
    """Builds the model that `save` wrote, in eval mode, with its tokenizer and training state.

    The model's class must be imported: that registers it, and likewise the form of a quantized model.
    tokenizer: if given, the checkpoint must have been made with this one. Raises ValueError for a folder that
    is no checkpoint, a file that is cut or damaged, a model or a form that nothing has registered, tensors of
    another shape, and another tokenizer.
    """
    path, meta = _open(folder)
    if "beside" in meta:
        raise ValueError(
            f"{folder} has only what was trained beside {meta['beside']}: a run can be resumed with it, it is"
            " no model by itself"
        )
    _check_sizes(path, meta)
    with WithoutValues():
        model = _rebuilt(path, meta)
    load_weights(model, path / "model.safetensors")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        # A buffer that no checkpoint keeps got its values in a way that cannot be seen.
        model = _rebuilt(path, meta)
        load_weights(model, path / "model.safetensors")
    tensors = None
    state = None
    if (path / "training.json").exists():
        state = _read_json(path / "training.json")
        tensors = _read_tensors(path / "training.safetensors")
    model.tokenizer = _tokenizer(path, tokenizer)
    return Checkpoint(
        model=model.to(resolve_device(device)).eval(),
        tokenizer=model.tokenizer,
        metrics=meta.get("metrics", {}),
        tensors=tensors,
        state=state,
    )


def _check_sizes(path: Path, meta: dict[str, Any]) -> None:
    """Raises ValueError where config.json does not fit what model.safetensors says of its tensors.

    Nothing is computed or read for it but names and shapes.
    """
    file = path / "model.safetensors"
    shapes = _shapes(file)
    layers = meta["config"].get("n_layer") if isinstance(meta.get("config"), dict) else None
    if isinstance(layers, int) and layers > len(shapes):  # each takes memory, even without values
        raise ValueError(
            f"{file} does not fit the model: {len(shapes)} tensors are too few for {layers} layers"
        )
    try:
        with without_memory():
            model = _rebuilt(path, meta)
    except RuntimeError as error:
        raise ValueError(f"{path / 'config.json'} describes no model: {error}") from None
    problems = _misfits(shapes, unshared(model))
    if problems:
        raise ValueError(f"{file} does not fit the model: {problems}")
    check_tables(model, str(path / "config.json"))


LARGE_TABLES = 1 << 28
"""So many bytes of tables a model may have beside its weights, or as many as these have."""


def check_tables(model: nn.Module, where: str) -> None:
    """Raises ValueError for a model whose tables, which no file holds, would take far more than its weights.

    model: one on PyTorch's device "meta". Weights do not depend on the number of rotary positions: that the
    tables would be huge is the only sign of a damaged one.
    """
    kept = model.state_dict().keys()
    in_tables = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in kept)
    in_weights = sum(tensor.nbytes for tensor in unshared(model).values())
    if in_tables > max(LARGE_TABLES, in_weights):
        raise ValueError(
            f"{where}: its tables of positions would take {in_tables / 1e9:.1f} GB, its weights"
            f" {in_weights / 1e9:.1f} GB: the longest sequence that its settings give is damaged; lower it"
        )


def _rebuilt(path: Path, meta: dict[str, Any]) -> LanguageModel:
    """A model of the kind, the shape and the form that a checkpoint's config.json names."""
    model = _new_model(path, meta)
    for entry in meta.keys() - {"model", "config", "metrics", "tokenizer"}:
        model = _in_form(model, entry, meta[entry], path)
    return model


def _new_model(path: Path, meta: dict[str, Any]) -> LanguageModel:
    """A model of the kind and shape that a checkpoint's config.json names."""
    name = meta.get("model")
    if not isinstance(name, str) or name not in MODELS:
        known = ", ".join(MODELS) or "none"
        raise ValueError(
            f"{path / 'config.json'} names a model {name!r}; known are: {known}. "
            "A model is known once the module that defines it is imported, such as shared.models.gpt"
        )
    model_class, config_class = MODELS[name]
    try:
        return model_class(config_class(**meta["config"]))
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path / 'config.json'} does not describe a {name}: {error}") from None


def _in_form(model: LanguageModel, entry: str, value: Any, path: Path) -> LanguageModel:
    """The model as the registered form makes it from an entry of config.json."""
    if entry not in FORMS:
        raise ValueError(
            f"the model in {path} was saved with {entry}, which no module imported so far can rebuild: "
            "import the one that does (for quantization: shared.quantization)"
        )
    try:
        return FORMS[entry](model, value)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path / 'config.json'} does not describe a model with {entry}: {error}") from None


def read_metrics(folder: str | Path) -> dict[str, float]:
    """What was measured when the checkpoint in `folder` was saved; {} where there is none of ours."""
    path = find(folder)
    if path is None:
        return {}
    return _read_json(path / "config.json").get("metrics", {})


def load_learned(
    model: LanguageModel, folder: str | Path, tokenizer: Tokenizer | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """What a run kept of `model`: its weights, the training state's tensors, and its JSON.

    The weights are the tensors that `learned` names; the training state is empty where none was saved. The
    model itself stays as it is. Raises ValueError as `load` does, and for a model of another kind or shape.
    """
    path, meta = _open(folder)
    _tokenizer(path, tokenizer)
    now = {"model": _kind(model), **json.loads(json.dumps(asdict(model.config)))}
    then = {"model": meta.get("model"), **meta["config"]}
    changed = [f"{k}={then.get(k)!r}" for k in now | then if now.get(k) != then.get(k)]
    if changed:
        raise ValueError(
            f"{folder} is of another model: it had {', '.join(changed)}. Build that one, or start anew"
        )
    weights = _fitting(path / "model.safetensors", learned(model))
    if not (path / "training.json").exists():
        return weights, {}, {}
    return weights, _read_tensors(path / "training.safetensors"), _read_json(path / "training.json")


def _open(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    path = find(folder)
    if path is None:
        raise ValueError(
            f"no checkpoint in {folder}: expected a folder with config.json and model.safetensors"
            f"{made_by(folder)}"
        )
    return path, _read_json(path / "config.json")


def _tokenizer(path: Path, wanted: Tokenizer | None) -> Tokenizer | None:
    """The checkpoint's tokenizer, which must be the wanted one if there is one."""
    file = path / "tokenizer.json"
    saved = Tokenizer.load(file) if file.exists() else None
    if wanted is not None and (saved is None or saved.fingerprint != wanted.fingerprint):
        was = "no tokenizer" if saved is None else f"a tokenizer of {saved.vocab_size} tokens"
        raise ValueError(
            f"the checkpoint in {path} was made with {was}, another than the one in use ({wanted.vocab_size}"
            " tokens): use the data it was trained on, or train a new one"
        )
    return saved


def load_weights(model: nn.Module, path: Path) -> None:
    """Fills `model` from a safetensors file. What is on PyTorch's device "meta" gets its memory only now.

    Raises ValueError unless every parameter is there, none is left over, and every shape is the same.
    """
    own = unshared(model)
    tensors = _fitting(path, own)
    tied: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(parameter, []).append(name)
    on_meta = any(tensor.is_meta for tensor in own.values())
    model.load_state_dict(tensors, strict=False, assign=on_meta)  # a tied weight has one name in the file
    for first, *others in tied.values():
        for name in others:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, model.get_parameter(first))


def _fitting(path: Path, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, which must have the names and shapes of `own`, on the CPU and in its types.

    An open file lies in memory as far as it was read: it is opened for each tensor anew, so that no more than
    one of them is there twice.
    """
    problems = _misfits(_shapes(path), own)
    if problems:
        raise ValueError(f"{path} does not fit the model: {problems}")
    tensors = {}
    for name, tensor in own.items():
        with _opened(path) as file:
            tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(file.get_tensor(name))
    return tensors


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def _misfits(shapes: Mapping[str, Sequence[int]], own: Mapping[str, Tensor]) -> str:
    """Which tensors of these names and shapes are not those of `own`, for people; "" where all are."""
    problems = [f"{n} is missing" for n in own if n not in shapes]
    problems += [f"{n} is not in the model" for n in shapes if n not in own]
    problems += [
        f"{n} is {list(shape)}, the model's {list(own[n].shape)}"
        for n, shape in shapes.items()
        if n in own and tuple(shape) != own[n].shape
    ]
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file. Raises ValueError for one that is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is missing, cut or damaged ({error}): train again, or use another checkpoint"
        ) from None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is missing, cut or damaged ({error}): train again, or use another checkpoint"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        return values
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is missing, cut or damaged ({error}): train again, or use another checkpoint"
        ) from None
