"""Week 0. For exercises in which a learner builds a class or a loop: same weights, then same behaviour.

An exercise's `observe` calls these, and says with `NotRight` what no comparison of two values would show.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from shared.course.exercise.definition import NotRight
from shared.runtime import seed_everything

Model = TypeVar("Model", bound=nn.Module)


def built(answer: Callable[..., Any], reference: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
    """The learner's module, made with these arguments, with the reference's weights.

    Raises NotRight where it is no module, its parameters are not those of the reference by name and shape, or
    two of them are one, and are not in the reference.
    """
    seed_everything(0)
    module = answer(*arguments, **options)
    if not isinstance(module, nn.Module):
        raise NotRight(f"it makes {type(module).__name__}, and an nn.Module is wanted: class ...(nn.Module).")
    own, wanted = shapes(module), shapes(reference)
    if own != wanted:
        raise NotRight(_differing_parameters(own, wanted))
    _no_more_shared(module, reference)
    module.load_state_dict(reference.state_dict())
    return module


def computed_by(model: Model, hers: nn.Module) -> Model:
    """A model of the course that computes with the learner's code: her `forward`, on the model's parameters.

    It is trained, saved and loaded as before, since the parameters are the model's own. A call with a cache
    goes to the course's code. Raises ValueError where the parameters differ by name or shape.
    """
    own, wanted = shapes(hers), shapes(model)
    if own != wanted:
        raise ValueError(
            f"your {type(hers).__name__} cannot be used here: {_differing_parameters(own, wanted)}"
        )
    for name, parameter in model.named_parameters(remove_duplicate=False):
        *path, last = name.split(".")
        hers.get_submodule(".".join(path))._parameters[last] = parameter

    def forward(idx: Tensor, cache: Any = None) -> Tensor:
        if cache is not None:
            return type(model).forward(model, idx, cache)
        return hers(idx)

    model.forward = forward
    return model


def shapes(module: nn.Module) -> dict[str, list[int]]:
    """The shape of each parameter and buffer that is saved, by name."""
    return {name: list(value.shape) for name, value in module.state_dict().items()}


def _no_more_shared(module: nn.Module, reference: nn.Module) -> None:
    """Raises NotRight where one parameter stands at two places, and two stand there in the reference."""
    own, wanted = (dict(m.named_parameters(remove_duplicate=False)) for m in (module, reference))
    first: dict[int, str] = {}
    for name, parameter in own.items():
        before = first.setdefault(id(parameter), name)
        if before != name and wanted[before] is not wanted[name]:
            raise NotRight(
                f"`{before}` and `{name}` are one and the same parameter, and should be two: one module, or"
                " one weight, was put at both places. What is trained at one of them then changes at the"
                " other, and the model has fewer weights than it seems. Make a new one for each."
            )


def _differing_parameters(own: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> str:
    missing = [f"{name} {shape}" for name, shape in wanted.items() if name not in own]
    surplus = [f"{name} {shape}" for name, shape in own.items() if name not in wanted]
    other = [
        f"{name} is {own[name]} and should be {shape}"
        for name, shape in wanted.items()
        if name in own and own[name] != shape
    ]
    parts = []
    if missing:
        parts.append(f"missing: {', '.join(missing)}")
    if surplus:
        parts.append(f"not in the task: {', '.join(surplus)}")
    if other:
        parts.append("; ".join(other))
    return (
        f"its parameters are not those of the task; {'; '.join(parts)}. Weights are copied into your module"
        " by name, so that the results can be compared. (PyTorch does not see layers in a plain Python list:"
        " nn.ModuleList holds them.)"
    )


def gradients_of(module: nn.Module, loss: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The gradient of a loss at each parameter, as observations. Raises NotRight where none arrives."""
    named = dict(module.named_parameters())
    if not loss.requires_grad:
        raise NotRight(
            "the result is detached from the graph: no gradient reaches the parameters, so it cannot learn."
        )
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    for name, gradient in zip(named, found):
        if gradient is None:
            raise NotRight(
                f"no gradient reaches `{name}`: it is not used, or the graph is cut on the way to it."
            )
        yield f"the gradient of {name}", gradient


def uses_every_parameter(module: nn.Module, result: Any, right: Tensor, what: str, than: str) -> None:
    """Raises NotRight where a result is wrong, and a parameter of the module has no part in it.

    what: what was called, for the sentence. than: what does use the parameter.
    """
    is_tensor = isinstance(result, Tensor) and result.shape == right.shape and result.dtype == right.dtype
    if not is_tensor or not result.requires_grad or torch.allclose(result, right, atol=1e-4):
        return
    named = dict(module.named_parameters())
    found = torch.autograd.grad(weighted(result), list(named.values()), allow_unused=True, retain_graph=True)
    unused = [name for name, gradient in zip(named, found) if gradient is None]
    if unused:
        raise NotRight(
            f"{what} is wrong, and does not use `{unused[0]}`: change that parameter, and the result stays."
            f" {than}"
        )


def weighted(result: Tensor) -> Tensor:
    """A number made of all of a result, in which each element counts differently: its gradients tell much."""
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)
    return (result * weights).sum()


def takes(answer: Callable[..., Any], *names: str) -> None:
    """Raises NotRight where a function or class does not take these arguments."""
    try:
        own = list(inspect.signature(answer).parameters)
    except (TypeError, ValueError):
        return
    if own[: len(names)] != list(names):
        raise NotRight(f"it takes ({', '.join(own)}), and the task says ({', '.join(names)}).")


def method(module: Any, name: str) -> Callable[..., Any]:
    """A method of the learner's object. Raises NotRight where there is none, or a value hides it."""
    found = getattr(module, name, None)
    if callable(getattr(type(module), name, None)) and not callable(found):
        raise NotRight(
            f"its method `{name}` cannot be called: an attribute of the same name, self.{name} ="
            f" {type(found).__name__}, has taken its place. Give the attribute another name."
        )
    if not callable(found):
        raise NotRight(f"it has no method `{name}`: is it indented as a part of the class, and spelled so?")
    return found


def follows(counts: Tensor, probabilities: Tensor, what: str) -> None:
    """Raises NotRight where drawn tokens do not follow their probabilities.

    counts: int64 [n], how often each was drawn. Allowed are five standard deviations of a binomial count,
    which an honest sampler leaves once in a million times.
    """
    total = int(counts.sum())
    spread = (total * probabilities * (1 - probabilities)).sqrt()
    off = (counts - total * probabilities).abs() > 5 * spread + 1
    if bool(off.any()):
        worst = int(off.int().argmax())
        raise NotRight(
            f"{what} does not follow the probabilities: token {worst} has probability"
            f" {float(probabilities[worst]):.3f}, and was drawn {int(counts[worst])} times in {total}."
        )
