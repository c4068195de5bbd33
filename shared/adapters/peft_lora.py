"""Week 9. LoRA adapters in the format of the library PEFT: names of layers, settings, and joined layers.

Layers have the names that they have in Hugging Face's Llama or GPT-2 where our model has such an equivalent,
and else its own. GPT-2 has queries, keys and values in one layer, `c_attn`: its A belongs to all three, and
its B is theirs one below the other. The other way round, adapters with an A of their own each go into one of
the sum of their ranks, whose B is zero where it would mix them: exactly the same product.

Nothing here knows how an adapter is computed: `shared.adapters.lora` does.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shared.adapters.lora import BaseLayer, lora_scale
from shared.adapters.peft_files import WEIGHTS, check_base, read_files, sketch, write_files
from shared.models.families import hf_config
from shared.models.family import refuse
from shared.models.formats import Layout
from shared.models.gpt import GPT, GPTConfig
from shared.registry import without_memory

PREFIX = "base_model.model."
FIELDS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude"}
"""The ends of PEFT's names of tensors, with the fields of `Weights`."""
OWN_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""First values that come with a change of the base itself, which is not in the file."""
SETTING_TYPES: dict[str, type | tuple[type, ...]] = {
    "r": int,
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "use_rslora": bool,
    "use_dora": bool,
    "modules_to_save": (list, type(None)),
    "rank_pattern": dict,
    "alpha_pattern": dict,
}
COMPUTED = {*SETTING_TYPES, "modules_to_save", "peft_type", "target_modules"}
"""Settings of PEFT's that are taken into account here."""
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
"""Settings of PEFT's that say which layers there are, which the tensors say too, or how training began."""


class Weights(NamedTuple):
    """One adapter of one layer: scale · B A, where scale is alpha / r, or alpha / √r for rsLoRA."""

    a: Tensor
    """[r, in_features]"""
    b: Tensor
    """[out_features, r]"""
    alpha: float
    magnitude: Tensor | None = None
    """[out_features], for DoRA."""


# ---- names


def _layout(model: nn.Module) -> Layout | None:
    """Hugging Face's names for a GPT.

    None for a model that has no exact equivalent there; PEFT can be put on it as it is.
    """
    if not isinstance(model, GPT):
        return None
    try:
        return hf_config(with_their_biases(model.config))[1]
    except ValueError:
        return None


def with_their_biases(config: GPTConfig) -> GPTConfig:
    """The configuration of the same model as Hugging Face has it: a GPT-2 without biases has some of zero."""
    if config.norm == "layernorm" and config.position == "learned":
        return replace(config, bias=True)
    return config


def _paths(layout: Layout | None, linears: Iterable[str]) -> dict[str, list[str]]:
    """The file's layers, each with ours that it consists of, in order."""
    if layout is None:
        return {name: [name] for name in linears}
    groups = layout.groups(f"{name}.weight" for name in linears)
    return {
        path.removesuffix(".weight"): [name.removesuffix(".weight") for name in names]
        for path, names in groups.items()
    }


def _last_part(path: str) -> str:
    return path.rpartition(".")[2]


def _short_names(paths: Sequence[str], existing: Sequence[str]) -> list[str]:
    """`paths` for target_modules: by their last part where that names none but them."""
    ambiguous = {_last_part(path) for path in existing if path not in paths}
    return sorted({path if _last_part(path) in ambiguous else _last_part(path) for path in paths})


# ---- several of our layers in one of theirs


def _fuse(
    parts: Sequence[Weights | None], linears: Sequence[BaseLayer], use_rslora: bool
) -> tuple[Weights, list[int]]:
    """One adapter for layers that lie one below the other, and where in its A that of each part begins.

    parts: the adapter of each layer, None for a layer without one; at least one has one.
    """
    given = [part for part in parts if part is not None]
    first = given[0]
    if len(parts) == 1:
        return first, [0]
    a, starts = _fuse_a(parts)
    scale = lora_scale(first.alpha, len(first.a), use_rslora)
    rows = []
    for part, start, linear in zip(parts, starts, linears):
        b = a.new_zeros(linear.out_features, len(a))
        if part is not None:
            own_scale = lora_scale(part.alpha, len(part.a), use_rslora)
            b[:, start : start + len(part.a)] = part.b * (own_scale / scale)
        rows.append(b)
    alpha = scale * (math.sqrt(len(a)) if use_rslora else len(a))
    return Weights(a, torch.cat(rows), alpha, _fuse_magnitudes(parts, linears)), starts


def _fuse_a(parts: Sequence[Weights | None]) -> tuple[Tensor, list[int]]:
    """An A for all parts, shared or theirs one below the other, and where that of each part begins in it."""
    given = [part.a for part in parts if part is not None]
    first = given[0]
    if all(a.shape == first.shape and torch.equal(a, first) for a in given):
        return first, [0] * len(parts)
    starts = []
    rank = 0
    for part in parts:
        starts.append(rank)
        rank += 0 if part is None else len(part.a)
    return torch.cat(given), starts


def _fuse_magnitudes(parts: Sequence[Weights | None], linears: Sequence[BaseLayer]) -> Tensor | None:
    """DoRA's lengths of all rows; None for LoRA."""
    if all(part is None or part.magnitude is None for part in parts):
        return None
    magnitudes = []
    for part, linear in zip(parts, linears):
        if part is None or part.magnitude is None:
            magnitudes.append(linear.weight.float().norm(dim=1))  # rows without an adapter keep their length
        else:
            magnitudes.append(part.magnitude)
    return torch.cat(magnitudes)


def _split(
    fused: Weights, names: Sequence[str], linears: Sequence[BaseLayer], own: Mapping[str, Any]
) -> dict[str, Weights]:
    """The way back from `_fuse`. Layers with the same A get the same tensor.

    own: what `write_lora` noted of ours, [start, r, alpha] by name.
    """
    sizes = [linear.out_features for linear in linears]
    magnitudes: Sequence[Tensor | None] = [None] * len(names)
    if fused.magnitude is not None:
        magnitudes = fused.magnitude.split(sizes)
    parts: dict[str, Weights] = {}
    slices: dict[tuple[int, int], Tensor] = {}
    for name, b, magnitude in zip(names, fused.b.split(sizes), magnitudes):
        if own and name not in own:
            continue
        start, r, alpha = own.get(name, (0, len(fused.a), fused.alpha))
        a = slices.setdefault((start, r), fused.a[start : start + r])
        parts[name] = Weights(a, b[:, start : start + r].contiguous(), alpha, magnitude)
    return parts


# ---- writing


def write_lora(
    model: nn.Module,
    folder: Path,
    *,
    linears: Mapping[str, BaseLayer],
    layers: Mapping[str, Weights],
    whole: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    base_model: str | None,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Writes an adapter.

    linears: all linear layers of `model`; layers: the adapter's, by the same names; whole: the parameters of
    modules that it trains whole, by their names in the plain model; settings: lora_dropout,
    use_rslora and use_dora; base_model: the base's name on the hub, or its folder; quantization: how it is
    rounded. A call that is killed leaves a folder
    without adapter_config.json. Raises ValueError for a folder that holds a model.
    """
    layout = _layout(model)
    groups = _paths(layout, linears)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    own: dict[str, list[float]] = {}
    for path, names in groups.items():
        parts = [layers.get(name) for name in names]
        if all(part is None for part in parts):
            continue
        fused, starts = _fuse(parts, [linears[name] for name in names], settings["use_rslora"])
        ranks[path] = len(fused.a)
        alphas[path] = fused.alpha
        if None in parts or any(starts):
            own.update(_own_notes(names, parts, starts))
        for ending, field in FIELDS.items():
            tensor = getattr(fused, field)
            if tensor is not None:
                tensors[f"{PREFIX}{path}.{ending}"] = tensor.detach().cpu().contiguous().clone()
    theirs = _whole_as_theirs(model, layout, whole)
    tensors |= {PREFIX + name: tensor.cpu().contiguous().clone() for name, tensor in theirs.items()}
    (r, alpha), _ = Counter(zip(ranks.values(), alphas.values())).most_common(1)[0]
    config = {
        **settings,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if layout else None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in theirs}) or None,
        "r": r,
        "lora_alpha": alpha,
        "fan_in_fan_out": layout is not None and layout.conv1d,
        "target_modules": _short_names(list(ranks), list(groups)),
        "rank_pattern": {path: other for path, other in ranks.items() if other != r},
        "alpha_pattern": {path: other for path, other in alphas.items() if other != alpha},
    }
    base = sketch({name: linears[name] for name in layers})
    noted = {"quantization": quantization} if quantization else {}
    write_files(folder, tensors, config, {"own": own, "base": base, **noted})


def _whole_as_theirs(
    model: nn.Module, layout: Layout | None, whole: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The parameters of whole modules under the file's names and in its form. Raises ValueError where one is
    only a part of one of theirs.
    """
    if layout is None or not whole:
        return dict(whole)
    assert isinstance(model, GPT)
    for theirs, ours in layout.groups(_plain_names(model)).items():
        missing = [name for name in ours if name not in whole]
        if missing and len(missing) < len(ours):
            raise ValueError(
                f"modules_to_save: at Hugging Face {', '.join(ours)} are one, {theirs}: name {missing[0]} too"
            )
    return layout.theirs(whole, model.config.head_dim)


def _plain_names(model: GPT) -> list[str]:
    """The parameters of the model as it is without adapters."""
    with without_memory():
        return [name for name, _ in GPT(with_their_biases(model.config)).named_parameters()]


def _own_notes(
    names: Sequence[str], parts: Sequence[Weights | None], starts: Sequence[int]
) -> dict[str, list[float]]:
    """[start, r, alpha] of each layer that has an adapter: by these `_split` finds them again."""
    notes: dict[str, list[float]] = {}
    for name, part, start in zip(names, parts, starts):
        if part is not None:
            notes[name] = [start, len(part.a), part.alpha]
    return notes


# ---- reading


def read_lora(
    model: nn.Module, folder: Path, linears: Mapping[str, BaseLayer]
) -> tuple[dict[str, Any], dict[str, Weights], dict[str, Tensor]]:
    """The configuration of an adapter, its weights for each of our layers, and the parameters of modules that
    it trains whole.

    linears: all linear layers of `model`. Raises ValueError for files that are missing or damaged, for layers
    that `model` does not have, other shapes or another rank than the configuration's, for a base that is
    another than the adapter was trained on, and for what PEFT can compute and we cannot.
    """
    config, tensors, notes = read_files(folder)
    where = str(folder)
    _check_config(config, where)
    whole = _whole_as_ours(config, tensors, model, where)
    by_path = _tensors_by_path(tensors, where)
    groups = _groups(by_path, model, linears, where)
    problems: list[str] = []
    layers: dict[str, Weights] = {}
    for path, fields in by_path.items():
        names = groups[path]
        modules = [linears[name] for name in names]
        rank = _of_pattern(config.get("rank_pattern", {}), path, config.get("r", 8))
        alpha = _of_pattern(config.get("alpha_pattern", {}), path, config.get("lora_alpha", 8))
        own = {name: note for name, note in notes.get("own", {}).items() if name in names}
        wrong = _shape_problems(path, fields, modules, rank, bool(config.get("use_dora")))
        if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
            wrong.append(f"{path}: alpha={alpha!r} must be a number above 0")
        if not all(_is_own_note(note, rank) for note in own.values()):
            wrong.append(f"{path}: the notes in the header of {WEIGHTS} are damaged")
        problems += wrong
        if not wrong:
            fused = Weights(fields["a"], fields["b"], alpha, fields.get("magnitude"))
            layers.update(_split(fused, names, modules, own))
    if problems:
        raise ValueError(f"{where}: an adapter of another base or rank: {'; '.join(sorted(problems)[:4])}")
    check_base(notes.get("base", {}), sketch({name: linears[name] for name in layers}), where)
    return {**config, "use_rslora": config.get("use_rslora", False)}, layers, whole


def _whole_as_ours(
    config: Mapping[str, Any], tensors: dict[str, Tensor], model: nn.Module, where: str
) -> dict[str, Tensor]:
    """Takes the parameters of whole modules out of `tensors`, as ours.

    Raises ValueError where one is missing, of another shape, or none of the model's.
    """
    modules = config.get("modules_to_save") or []
    shapes, layout = _shapes_by_theirs(model) if modules else ({}, None)
    ours: dict[str, Tensor] = {}
    problems = []
    for module in modules:
        wanted = [name for name in shapes if name.rpartition(".")[0].endswith(module)]
        if not wanted:
            problems.append(f"modules_to_save: this model has no {module!r}")
        for name in wanted:
            tensor = tensors.pop(PREFIX + name, None)
            rows = sum(shape[0] for shape in shapes[name].values())
            if tensor is None or tensor.numel() != math.prod(next(iter(shapes[name].values()))[1:]) * rows:
                problems.append(f"modules_to_save: {name} is missing, or of another shape")
            elif layout is None:
                ours[name] = tensor
            else:
                assert isinstance(model, GPT)
                ours |= layout.ours(tensor, shapes[name], model.config.head_dim)
    refuse(problems, where)
    return ours


def _shapes_by_theirs(model: nn.Module) -> tuple[dict[str, dict[str, torch.Size]], Layout | None]:
    """Our parameters of the plain model, with their shapes, by the file's name of what they are parts of."""
    layout = _layout(model)
    if not isinstance(model, GPT):
        return {}, None
    with without_memory():
        shapes = {name: p.shape for name, p in GPT(model.config).named_parameters()}
    if layout is None:
        return {name: {name: shape} for name, shape in shapes.items()}, None
    groups = layout.groups(shapes)
    return {theirs: {name: shapes[name] for name in names} for theirs, names in groups.items()}, layout


def _check_config(config: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for settings under which PEFT would compute something that we do not."""
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{where}: peft_type={config.get('peft_type')!r}; read here are LORA (with DoRA and rsLoRA) and"
            " PROMPT_TUNING"
        )
    problems = []
    for name, kind in SETTING_TYPES.items():
        if name in config and not isinstance(config[name], kind):
            problems.append(f"{name}={config[name]!r} is of the wrong kind")
    for name, value in config.items():
        if name not in COMPUTED | HARMLESS and value not in (None, False, "none", {}, []):
            problems.append(f"{name}={value!r} is more than is done here")
    for pattern in (*config.get("rank_pattern", {}), *config.get("alpha_pattern", {})):
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"{pattern!r} is no pattern ({error})")
    first_values = config.get("init_lora_weights")
    if isinstance(first_values, str) and first_values.startswith(OWN_BASE):
        problems.append(
            f"init_lora_weights={first_values!r} changes the base itself: convert the adapter with PEFT's"
            " path_initial_model_for_weight_conversion"
        )
    r = config.get("r", 8)
    if not isinstance(r, int) or r < 1:
        problems.append(f"r={r!r} must be at least 1")
    refuse(problems, where)


def _of_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the path, or its end, as a regular expression."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _tensors_by_path(tensors: Mapping[str, Tensor], where: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of each of the file's layers, by the fields of `Weights`.

    Raises ValueError for tensors that are not a LoRA's.
    """
    by_path: dict[str, dict[str, Tensor]] = {}
    foreign = []
    for key, tensor in tensors.items():
        ending = next((ending for ending in FIELDS if key.endswith(f".{ending}")), None)
        if ending is None or not key.startswith(PREFIX):
            foreign.append(f"{key} is no tensor of a LoRA on linear layers")
        else:
            path = key.removeprefix(PREFIX).removesuffix(f".{ending}")
            by_path.setdefault(path, {})[FIELDS[ending]] = tensor
    refuse(foreign, where)
    return by_path


def _groups(
    paths: Iterable[str], model: nn.Module, linears: Mapping[str, BaseLayer], where: str
) -> dict[str, list[str]]:
    """The layers that `model` has, under our names if the file uses those, each with ours it consists of.

    Raises ValueError where the file has none, or one that `model` does not have.
    """
    groups = {name: [name] for name in linears}
    if not set(paths) <= groups.keys():
        groups = _paths(_layout(model), linears)
    unknown = sorted(set(paths) - groups.keys())
    if unknown or not set(paths):
        raise ValueError(
            f"{where}: this adapter is for another base: it has {', '.join(unknown[:3]) or 'no layers'}, and"
            f" this model {', '.join(list(groups)[:8])}, …"
        )
    return groups


def _shape_problems(
    path: str, fields: Mapping[str, Tensor], linears: Sequence[BaseLayer], rank: Any, use_dora: bool
) -> list[str]:
    """What is missing, left over, or of another shape than an adapter of this rank on these layers has."""
    out_features = sum(linear.out_features for linear in linears)
    shapes = {"a": [rank, linears[0].in_features], "b": [out_features, rank]}
    if use_dora:
        shapes["magnitude"] = [out_features]
    problems = [f"{path}: {field} is missing" for field in shapes.keys() - fields.keys()]
    for field, tensor in fields.items():
        shape = list(tensor.shape)
        if field not in shapes:
            problems.append(f"{path}: {field} is left over")
        elif shape != shapes[field]:
            problems.append(f"{path}: {field} is {shape}, not {shapes[field]}")
    return problems


def _is_own_note(note: Any, rank: int) -> bool:
    """Whether this is [start, r, alpha] of a part of an adapter of this rank."""
    if not isinstance(note, list) or len(note) != 3 or any(type(n) not in (int, float) for n in note):
        return False
    start, r, _ = note
    return type(start) is int and type(r) is int and 0 <= start < start + r <= rank
