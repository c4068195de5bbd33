"""Week 6. How a format's settings become a GPTConfig, and a GPTConfig those settings.

A family of models is written down as parts. Each part knows some settings of the format and the fields of
ours that they mean, both ways. So a family has exactly those GPTs that come back as they were when their
settings are written and read again.

>>> sizes = alike(n_layer="num_layers", n_embd="width")
>>> sizes.read({"num_layers": 2, "width": 64}, [])
{'n_layer': 2, 'n_embd': 64}
>>> sizes.write(GPTConfig(n_layer=3))
{'num_layers': 3, 'width': 768}
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from shared.models.config import GPTConfig, LayerKind
from shared.models.formats import Layout

Values = Mapping[str, Any]


def refuse(problems: Sequence[str], where: str) -> None:
    """Raises ValueError with the first few problems, if there are any."""
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ValueError(f"{where}: {'; '.join(problems[:5])}{more}")


@dataclass(frozen=True)
class Part:
    """Some settings of a format, and what they mean."""

    read: Callable[[Values, list[str]], dict[str, Any]]
    """Fields of GPTConfig, from a format's settings. What our GPT cannot express is added to the list."""
    write: Callable[[GPTConfig], dict[str, Any]]
    """The format's settings. What it has no word for is left out: reading shows the difference."""
    reads: tuple[str, ...] = ()
    """The settings that it knows, for a format in which every other one is refused (GGUF)."""


def alike(**names: str) -> Part:
    """Fields whose values the format has as they are; each must be there. names: theirs, by ours."""

    def read(values: Values, problems: list[str]) -> dict[str, Any]:
        problems += [f"{theirs} is missing" for theirs in names.values() if theirs not in values]
        given = {ours: values[theirs] for ours, theirs in names.items() if theirs in values}
        problems += wrong_kinds(given)
        return given

    def write(config: GPTConfig) -> dict[str, Any]:
        return {theirs: _filled_in(config, ours) for ours, theirs in names.items()}

    return Part(read, write, tuple(names.values()))


def _filled_in(config: GPTConfig, name: str) -> Any:
    return config.hidden if name == "mlp_hidden" else getattr(config, name)


def always(**values: Any) -> Part:
    """Fields of ours that all models of the family share."""
    return Part(lambda _, problems: dict(values), lambda config: {})


def only(**values: Any) -> Part:
    """Their settings of which our GPT has one value only, which is also what an absent one means."""
    return only_named(values)


def only_named(wanted: Mapping[str, Any]) -> Part:
    """As `only`, for names that are no Python names."""

    def read(values: Values, problems: list[str]) -> dict[str, Any]:
        problems += [
            f"{name}={values[name]!r} is more than our GPT can express; it has {value!r} only"
            for name, value in wanted.items()
            if values.get(name, value) not in (value, None)
        ]
        return {}

    return Part(read, lambda config: dict(wanted), tuple(wanted))


def optional(default: Any, **names: str) -> Part:
    """As `alike`, with what an absent setting means."""

    def read(values: Values, problems: list[str]) -> dict[str, Any]:
        given = {ours: values.get(theirs, default) for ours, theirs in names.items()}
        problems += wrong_kinds(given)
        return given

    def write(config: GPTConfig) -> dict[str, Any]:
        return {theirs: getattr(config, ours) for ours, theirs in names.items()}

    return Part(read, write, tuple(names.values()))


@dataclass(frozen=True)
class Family:
    """A family of models in a format."""

    layout: Layout
    """How its tensors are stored."""
    parts: tuple[Part, ...]
    more: Mapping[str, Any] = field(default_factory=dict)
    """Settings that are the same for all, and say nothing to us."""

    @property
    def reads(self) -> set[str]:
        """The settings that it knows."""
        return {name for part in self.parts for name in part.reads}

    def config(self, values: Values, where: str, **more: Any) -> GPTConfig:
        """The GPTConfig of these settings. more: fields that are known from elsewhere.

        Raises ValueError, beginning with `where`, for settings that are missing, of a wrong kind, or that our
        GPT does not have.
        """
        problems: list[str] = []
        given: dict[str, Any] = {}
        for part in self.parts:
            given |= part.read(values, problems)
        refuse(problems, where)
        try:
            return GPTConfig(**given | more)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def settings(self, config: GPTConfig) -> dict[str, Any]:
        """The format's settings for a GPT."""
        settings = dict(self.more)
        for part in self.parts:
            settings |= part.write(config)
        return settings

    def lacks(self, config: GPTConfig, **more: Any) -> list[str]:
        """The fields of a GPT that the family cannot express: []: it is one of the family.

        more: fields that the format has in its tensors. Dropout and first values are a matter of training.
        """
        given: dict[str, Any] = {}
        for part in self.parts:
            given |= part.read(self.settings(config), [])
        wanted = canonical(config)
        try:
            back = canonical(GPTConfig(**more | given))
        except ValueError:  # our fields, but not together
            back = canonical(GPTConfig())
        return [
            f"{name}={getattr(wanted, name)!r}"
            for name in (entry.name for entry in fields(GPTConfig))
            if getattr(back, name) != getattr(wanted, name)
        ]


def exact_family(config: GPTConfig, families: Mapping[str, Family], where: str, **more: Any) -> str:
    """The name of the first family that has everything of `config`. more: as in `Family.lacks`.

    Raises ValueError, naming for each family the fields in the way.
    """
    reasons = []
    for kind, family in families.items():
        lacking = family.lacks(config, **more)
        if not lacking:
            return kind
        article = "an" if kind[0] in "aeiou" else "a"
        reasons.append(f"{article} {kind} has no {', '.join(lacking)}")
    raise ValueError(f"this GPT has no exact equivalent {where}: {'; '.join(reasons)}")


def canonical(config: GPTConfig) -> GPTConfig:
    """The same function, written in one way: defaults filled in, what is not used at its default."""
    usual = GPTConfig()
    changes: dict[str, Any] = dict(
        n_kv_head=config.kv_heads,
        head_size=config.head_dim,
        mlp_hidden=config.hidden,
        qkv_bias=config.bias if config.qkv_bias is None else config.qkv_bias,
        attention_scale=_rounded(config.attention_scale or 1 / math.sqrt(config.head_dim)),
        embedding_scale=_rounded(config.embedding_scale),
        dropout=0.0,
        zero_init=False,
    )
    if not config.qk_norm:
        changes["qk_norm_over"] = usual.qk_norm_over
    if config.position == "learned":
        changes |= dict(rope_theta=usual.rope_theta, rope_share=usual.rope_share)
    kinds = [config.kind_of(layer) for layer in range(config.n_layer)]
    return replace(config, **changes, **of_layers(kinds))


def _rounded(value: float) -> float:
    """Without what the last bits of two ways to compute a root differ by."""
    return float(f"{value:.12g}")


def of_layers(kinds: Sequence[LayerKind]) -> dict[str, Any]:
    """`window` and `layers` for layers of these kinds, each of which is given."""
    period = next(n for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds)))
    if period == 1 and kinds[0] == LayerKind(window=kinds[0].window):
        return dict(window=kinds[0].window, layers=())
    return dict(window=None, layers=tuple(kinds[:period]))


def wrong_kinds(given: Mapping[str, Any]) -> list[str]:
    """Problems with numbers and bools for GPTConfig that are of another type than their fields."""
    kinds = {entry.name: entry.type for entry in fields(GPTConfig)}
    checked = (int, int | None, float, float | None, bool, bool | None)
    return [
        f"{name}={value!r} is of the wrong kind"
        for name, value in given.items()
        if kinds[name] in checked and not _fits(value, kinds[name])
    ]


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):  # which isinstance takes for an int
        return kind in (bool, bool | None)
    if kind in (float, float | None):
        return isinstance(value, kind | int)
    return isinstance(value, kind)
