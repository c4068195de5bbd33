"""Week 9. Adapters on disk, in the format of the library PEFT: `adapter_model.safetensors` and
`adapter_config.json`.

Layers have the names that they have in Hugging Face's Llama or GPT-2 where our model has such an equivalent,
and else its own. GPT-2 has queries, keys and values in one layer, `c_attn`: its A belongs to all three, and
its B is theirs one below the other. The other way round, adapters with an A of their own each go into one of
the sum of their ranks, whose B is zero where it would mix them: exactly the same product.

Nothing here knows how an adapter is computed: `shared.adapters` does.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from shared.adapters.lora import lora_scale
from shared.models.families import hf_config, refuse
from shared.models.formats import Layout
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import write_atomically, write_json

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
KINDS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude"}
OWN_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""First values that come with a change of the base itself, which is not in the file."""
COMPUTED = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "peft_type",
    "target_modules",
}
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
    """Hugging Face's names for a GPT; None for a model that has no exact equivalent there, on which PEFT can
    be put as it is.
    """
    if not isinstance(model, GPT):
        return None
    try:
        return hf_config(model.config)[1]
    except ValueError:
        return None


def _paths(layout: Layout | None, linears: Iterable[str]) -> dict[str, list[str]]:
    """The file's layers, each with ours that it consists of, in order."""
    if layout is None:
        return {name: [name] for name in linears}
    groups = layout.groups(f"{name}.weight" for name in linears)
    return {
        path.removesuffix(".weight"): [name.removesuffix(".weight") for name in names]
        for path, names in groups.items()
    }


def _short_names(paths: Sequence[str], existing: Sequence[str]) -> list[str]:
    """`paths` for target_modules: by their last part where that names none but them."""
    last = lambda path: path.rpartition(".")[2]
    return sorted({last(p) if all(e in paths for e in existing if last(e) == last(p)) else p for p in paths})


# ---- several of our layers in one of theirs


def _fuse(
    parts: Sequence[Weights | None], linears: Sequence[nn.Module], use_rslora: bool
) -> tuple[Weights, list[int]]:
    """One adapter for layers that lie one below the other, and where the A of each begins in its A. None:
    that layer has no adapter.
    """
    given = [part for part in parts if part is not None]
    if len(parts) == 1:
        return given[0], [0]
    scales = [lora_scale(part.alpha, len(part.a), use_rslora) for part in given]
    first = given[0]
    if all(part.a.shape == first.a.shape and torch.equal(part.a, first.a) for part in given):
        a, starts = first.a, [0] * len(given)
    else:
        a = torch.cat([part.a for part in given])
        starts = [sum(len(p.a) for p in given[:i]) for i in range(len(given))]
    rows, places = [], iter(zip(starts, scales))
    for part, linear in zip(parts, linears):
        row = a.new_zeros(linear.out_features, len(a))
        if part is not None:
            start, scale = next(places)
            row[:, start : start + len(part.a)] = part.b * (scale / scales[0] if scales[0] else 1)
        rows.append(row)
    magnitude = None
    if first.magnitude is not None:  # a row without an adapter keeps the length it has
        magnitude = torch.cat(
            [
                linear.weight.float().norm(dim=1) if p is None else p.magnitude
                for p, linear in zip(parts, linears)
            ]
        )
    alpha = scales[0] * (math.sqrt(len(a)) if use_rslora else len(a))
    return Weights(a, torch.cat(rows), alpha, magnitude), starts


def _split(
    fused: Weights, names: Sequence[str], linears: Sequence[nn.Module], own: Mapping[str, Any]
) -> dict[str, Weights]:
    """The way back. Layers with the same A get the same tensor. own: what `write_lora` noted of ours ([start,
    r, alpha] by name).
    """
    sizes, found = [linear.out_features for linear in linears], {}
    lengths: Sequence[Tensor | None] = (
        [None] * len(names) if fused.magnitude is None else fused.magnitude.split(sizes)
    )
    slices: dict[tuple[int, int], Tensor] = {}
    for name, b, magnitude in zip(names, fused.b.split(sizes), lengths):
        if own and name not in own:
            continue
        start, r, alpha = own.get(name, (0, len(fused.a), fused.alpha))
        a = slices.setdefault((start, r), fused.a[start : start + r])
        found[name] = Weights(a, b[:, start : start + r].contiguous(), alpha, magnitude)
    return found


# ---- writing


def write_lora(
    folder: Path,
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    layers: Mapping[str, Weights],
    settings: Mapping[str, Any],
    base_model: str | None,
) -> None:
    """Writes an adapter. linears: all linear layers of `model`; layers: the adapter's; settings: dropout,
    use_rslora, use_dora.

    Of a killed call the folder is left without adapter_config.json.
    """
    tensors, ranks, alphas, own = {}, {}, {}, {}
    layout = _layout(model)
    groups = _paths(layout, linears)
    for path, names in groups.items():
        parts = [layers.get(name) for name in names]
        if not any(parts):
            continue
        fused, starts = _fuse(parts, [linears[name] for name in names], settings["use_rslora"])
        ranks[path], alphas[path] = len(fused.a), fused.alpha
        given = [(name, part) for name, part in zip(names, parts) if part is not None]
        if len(given) < len(names) or any(starts):
            own |= {name: [start, len(part.a), part.alpha] for (name, part), start in zip(given, starts)}
        for kind, field in KINDS.items():
            if (tensor := getattr(fused, field)) is not None:
                tensors[f"{PREFIX}{path}.{kind}"] = tensor.detach().cpu().contiguous().clone()
    (r, alpha), _ = Counter(zip(ranks.values(), alphas.values())).most_common(1)[0]
    config = dict(settings) | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if layout else None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "r": r,
        "lora_alpha": alpha,
        "fan_in_fan_out": layout is not None and layout.conv1d,
        "target_modules": _short_names(list(ranks), list(groups)),
        "rank_pattern": {path: n for path, n in ranks.items() if n != r},
        "alpha_pattern": {path: n for path, n in alphas.items() if n != alpha},
    }
    write_files(
        folder, tensors, config, {"own": own, "base": sketch({name: linears[name] for name in layers})}
    )


def write_files(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], notes: Mapping[str, Any]
) -> None:
    """Writes the two files. notes: JSON in the header of the tensors' file, where PEFT does not look."""
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a model: choose another folder for its adapter")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    write_atomically(
        folder / WEIGHTS,
        save(tensors, metadata={"format": "pt"} | {name: json.dumps(note) for name, note in notes.items()}),
    )
    write_json(folder / CONFIG, config)


# ---- reading


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """The configuration, the tensors in fp32, and our notes in their header ({} in PEFT's files). Raises
    ValueError for damaged files.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            notes = {
                name: json.loads(note)
                for name, note in (file.metadata() or {}).items()
                if name in ("own", "base")
            }
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{folder} holds no adapter, or a damaged one: expected {CONFIG} and {WEIGHTS} ({error})"
        ) from None
    if not isinstance(config, dict) or not all(isinstance(note, dict) for note in notes.values()):
        raise ValueError(f"{folder}: {CONFIG} or the header of {WEIGHTS} is damaged: expected JSON objects")
    # What is not finite, or not a number, would come to light much later, as a loss of NaN.
    refuse(
        [f"{name} is of type {t.dtype}" for name, t in tensors.items() if not t.is_floating_point()],
        str(folder / WEIGHTS),
    )
    refuse(
        [f"{name} has values that are NaN or inf" for name, t in tensors.items() if not t.isfinite().all()],
        str(folder / WEIGHTS),
    )
    return config, {name: t.float() for name, t in tensors.items()}, notes


def _check_config(config: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for settings under which PEFT would compute something that we do not."""
    kinds = {
        "r": int,
        "lora_alpha": (int, float),
        "use_rslora": bool,
        "use_dora": bool,
        "lora_dropout": (int, float),
    }
    kinds |= {"rank_pattern": dict, "alpha_pattern": dict}
    problems = [
        f"{name}={config[name]!r} is of the wrong kind"
        for name, kind in kinds.items()
        if name in config and not isinstance(config[name], kind)
    ]
    problems += [
        f"{name}={value!r} is more than is done here"
        for name, value in config.items()
        if name not in COMPUTED | HARMLESS and value not in (None, False, "none", {}, [])
    ]
    for key in (*config.get("rank_pattern", {}), *config.get("alpha_pattern", {})):
        try:
            re.compile(key)
        except re.error as error:
            problems.append(f"{key!r} is no pattern ({error})")
    first = config.get("init_lora_weights")
    if isinstance(first, str) and first.startswith(OWN_BASE):
        problems.append(
            f"init_lora_weights={first!r} changes the base itself: convert the adapter with PEFT's"
            " path_initial_model_for_weight_conversion"
        )
    if not isinstance(config.get("r", 8), int) or config.get("r", 8) < 1:
        problems.append(f"r={config.get('r')!r} must be at least 1")
    refuse(problems, where)


def _of_pattern(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the path, or its end, as a regular expression."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def read_lora(
    folder: Path, model: nn.Module, linears: Mapping[str, nn.Module]
) -> tuple[dict[str, Any], dict[str, Weights]]:
    """The configuration of an adapter, and its weights for each of our layers.

    Raises ValueError for files that are missing or damaged, for layers that `model` does not have, other
    shapes or another rank than the configuration's, for a base that is another than the adapter was trained
    on, and for what PEFT can compute and we cannot.
    """
    config, tensors, notes = read_files(folder)
    where = str(folder)
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{where}: peft_type={config.get('peft_type')!r}; read here are LORA (with DoRA and rsLoRA) and"
            " PROMPT_TUNING"
        )
    _check_config(config, where)
    found: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        path, kind = next(
            ((key[len(PREFIX) : -len(k) - 1], k) for k in KINDS if key.endswith(f".{k}")), (key, "")
        )
        if not key.startswith(PREFIX) or not kind:
            strange.append(f"{key} is no tensor of a LoRA on linear layers")
        found.setdefault(path, {})[KINDS.get(kind, "")] = tensor
    refuse(strange, where)
    groups = {name: [name] for name in linears}
    if not found.keys() <= groups.keys():
        groups = _paths(_layout(model), linears)
    unknown = sorted(found.keys() - groups.keys())
    if unknown or not found:
        raise ValueError(
            f"{where}: this adapter is for another base: it has {', '.join(unknown[:3]) or 'no layers'}, and"
            f" this model {', '.join(list(groups)[:8])}, …"
        )
    rslora, wanted = (
        config.get("use_rslora", False),
        {
            "a",
            "b",
            *(["magnitude"] if config.get("use_dora") else []),
        },
    )
    problems, layers = [], {}
    for path, parts in found.items():
        modules = [linears[name] for name in groups[path]]
        r, size = (
            _of_pattern(config.get("rank_pattern", {}), path, config.get("r", 8)),
            sum(m.out_features for m in modules),
        )
        shapes = {"a": [r, modules[0].in_features], "b": [size, r], "magnitude": [size]}
        wrong = [
            f"{path}: {kind} is {'missing' if kind in wanted else 'left over'}"
            for kind in wanted ^ parts.keys()
        ]
        wrong += [
            f"{path}: {k} is {list(t.shape)}, not {shapes[k]}"
            for k, t in parts.items()
            if list(t.shape) != shapes[k]
        ]
        alpha = _of_pattern(config.get("alpha_pattern", {}), path, config.get("lora_alpha", 8))
        if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
            wrong.append(f"{path}: alpha={alpha!r} must be a number above 0")
        problems += wrong
        own = {name: note for name, note in notes.get("own", {}).items() if name in groups[path]}
        if not all(_is_note(note, r) for note in own.values()):
            problems.append(f"{path}: the notes in the header of {WEIGHTS} are damaged")
        elif not wrong:
            layers |= _split(
                Weights(parts["a"], parts["b"], alpha, parts.get("magnitude")), groups[path], modules, own
            )
    if problems:
        raise ValueError(f"{where}: an adapter of another base or rank: {'; '.join(sorted(problems)[:4])}")
    check_base(notes.get("base", {}), sketch({name: linears[name] for name in layers}), where)
    return {**config, "use_rslora": rslora}, layers


def _is_note(note: Any, r: int) -> bool:
    numbers = isinstance(note, list) and len(note) == 3 and all(type(n) in (int, float) for n in note)
    return numbers and type(note[0]) is type(note[1]) is int and 0 <= note[0] < note[0] + note[1] <= r


# ---- soft prompts


def write_prompt(
    folder: Path, prompt: Tensor, config: GPTConfig, embedding: nn.Module, base_model: str | None
) -> None:
    """Writes a soft prompt [tokens, n_embd] for a GPT of `config`."""
    settings = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_virtual_tokens": len(prompt),
        "token_dim": config.n_embd,
        "num_transformer_submodules": 1,
        "num_attention_heads": config.n_head,
        "num_layers": config.n_layer,
        "prompt_tuning_init": "RANDOM",
    }
    notes = {"base": sketch({"token_embedding": embedding})}
    write_files(folder, {"prompt_embeddings": prompt.detach().cpu().contiguous().clone()}, settings, notes)


def is_prompt(folder: Path) -> bool:
    """Whether the folder holds a soft prompt. Raises ValueError where it holds no adapter."""
    return read_files(folder)[0].get("peft_type") == "PROMPT_TUNING"


def read_prompt(folder: Path, config: GPTConfig, embedding: nn.Module) -> Tensor:
    """A soft prompt, fp32 [tokens, n_embd]. Raises ValueError for damaged files, and one of another width or
    base.
    """
    settings, tensors, notes = read_files(folder)
    expected, where = [settings.get("num_virtual_tokens"), config.n_embd], str(folder)
    found = {name: list(t.shape) for name, t in tensors.items()}
    if found != {"prompt_embeddings": expected}:
        raise ValueError(
            f"{where}: a soft prompt of another base or length: it has {found}, where prompt_embeddings of"
            f" {expected} are expected"
        )
    check_base(notes.get("base", {}), sketch({"token_embedding": embedding}), where)
    return tensors["prompt_embeddings"]


# ---- is it the same base?


@torch.no_grad()
def sketch(layers: Mapping[str, nn.Module], rows: int = 8) -> dict[str, list[float]]:
    """A few products of each layer's weight with a fixed vector: enough to tell two bases apart, and nearly
    the same when one is rounded.
    """
    found = {}
    for name, layer in layers.items():
        weight = layer.weight[:rows].float().cpu()
        found[name] = [
            float(f"{value:.4g}") for value in (weight @ torch.arange(weight.size(1)).cos()).tolist()
        ]
    return found


def check_base(noted: Mapping[str, Any], ours: Mapping[str, list[float]], where: str) -> None:
    """Raises ValueError where two sketches are further apart than rounding to four bits can move them (by
    about a tenth).
    """
    try:
        pairs = [
            (torch.tensor(noted[name], dtype=torch.float32), torch.tensor(ours[name]))
            for name in ours
            if name in noted
        ]
        theirs, here = (
            (torch.cat(side) for side in zip(*pairs)) if pairs else (torch.zeros(1), torch.zeros(1))
        )
        far = bool((theirs - here).norm() > 0.5 * theirs.norm())
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where}: the header of {WEIGHTS} is damaged ({error})") from None
    if far:
        raise ValueError(
            f"{where}: this adapter was trained on another base: the weights here are others. Load the model"
            " that it belongs to"
        )
