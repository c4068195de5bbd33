"""Week 8's study of outliers: which channels of a model's activations are large, what that does to rounding,
and what SmoothQuant and AWQ do about it.

Sources: Dettmers et al., "LLM.int8()" (2022); Xiao et al., "SmoothQuant" (2023); Lin et al., "AWQ" (2024).
"""

import statistics
from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from figures import draw
from measure import load_studied
from names import OUTLIERS, WAYS
from shared.course.workspace import Workspace
from shared.data.corpus import fixed_windows, load_corpus
from shared.models.gpt import GPT
from shared.models.names import named_run
from shared.quantization.gptq import gptq_round
from shared.quantization.packing import absmax_int8, group_ranges, int4_codes
from shared.runtime import table

if TYPE_CHECKING:
    from run import Settings

GROUP_OF_4_BITS = 64
AWQ_STEPS = 10
"""So many steps from no scaling (0) to scaling by the whole mean (1) are tried for each layer."""


def study_outliers(settings: "Settings") -> dict[str, float]:
    """The error of every linear layer's output on held-out text, by each of `WAYS`."""
    model = load_studied(settings)
    corpus = load_corpus(settings.data, model.tokenizer, settings.study_block_size)
    work = Workspace(__file__, settings, corpus.name, torch.device("cpu"))
    texts = (corpus.train, corpus.val)
    windows = [fixed_windows(text, settings.study_block_size, settings.outlier_windows)[0] for text in texts]
    linears = {n: m for n, m in model.blocks.named_modules() if isinstance(m, nn.Linear)}
    seen, held_out = (inputs_of(model, linears, part) for part in windows)
    errors: dict[str, list[dict[str, float]]] = defaultdict(list)
    ratios: dict[str, float] = {}
    with work.log(named_run(settings.model, OUTLIERS), settings) as log:
        for name, linear in tqdm(linears.items(), desc="layers"):
            weight = linear.weight.detach()
            row = errors_of(weight, seen[name], held_out[name])
            largest = seen[name].abs().amax(0)
            ratios[name] = (largest.max() / largest.median()).item()
            row |= {"activation_ratio": ratios[name], "weight_ratio": _ratio(weight.abs().amax(0))}
            errors[name.split(".", 1)[1]].append(row)
            log.log(len(ratios), **row)
        worst = max(ratios, key=ratios.__getitem__)
        log.artifact(
            layer=f"blocks.{worst}",
            activations=seen[worst].abs().amax(0).tolist(),
            weights=linears[worst].weight.detach().abs().amax(0).tolist(),
            errors={kind: {way: [r[way] for r in rows] for way in WAYS} for kind, rows in errors.items()},
        )
        everything = [row for rows in errors.values() for row in rows]
        summary = {way: statistics.median(row[way] for row in everything) for way in WAYS}
        summary |= {"worst_ratio": ratios[worst], "median_ratio": statistics.median(ratios.values())}
        weight_ratio = statistics.median(row["weight_ratio"] for row in everything)
        summary |= {"median_weight_ratio": weight_ratio, "tokens": float(windows[1].numel())}
        log.finish(**summary)
    print(table({"": label, "error of the output": f"{summary[way]:.2%}"} for way, label in WAYS.items()))
    draw(work.logs, work.reports)
    return summary


def _ratio(largest: Tensor) -> float:
    """The largest channel over the median one."""
    return (largest.max() / largest.median()).item()


@torch.no_grad()
def inputs_of(model: GPT, linears: dict[str, nn.Linear], windows: Tensor) -> dict[str, Tensor]:
    """What each linear layer reads of these texts: fp32 [tokens, in_features], by its name."""
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def note(name: str, args: tuple[Tensor, ...]) -> None:
        seen[name].append(args[0].flatten(0, -2))

    hooks = [
        linear.register_forward_pre_hook(lambda _, args, name=name: note(name, args))
        for name, linear in linears.items()
    ]
    for window in windows:
        model(window[None])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def errors_of(weight: Tensor, seen: Tensor, held_out: Tensor) -> dict[str, float]:
    """The relative error of x · weightᵀ on `held_out`, by each of `WAYS`; scales are chosen on `seen`.

    weight: [out, in]. seen, held_out: [tokens, in].
    """
    exact = held_out @ weight.T
    smooth = smooth_scales(weight, seen)
    ranges = group_ranges(weight, GROUP_OF_4_BITS)
    hessian = seen.T @ seen
    outputs = {
        "int8_both": _rows_in_int8(held_out) @ _rows_in_int8(weight).T,
        "int8_smooth": _rows_in_int8(held_out / smooth) @ _rows_in_int8(weight * smooth).T,
        "int4_nearest": held_out @ _in_int4(weight).T,
        "int4_awq": held_out @ awq_rounded(weight, seen).T,
        "int4_gptq": held_out @ gptq_round(weight, hessian, *ranges).T,
    }
    return {way: ((y - exact).norm() / exact.norm()).item() for way, y in outputs.items()}


def smooth_scales(weight: Tensor, seen: Tensor, alpha: float = 0.5) -> Tensor:
    """SmoothQuant's scale of each channel, max|x|^α / max|w|^(1 - α): [in].

    x / s and weight · s have the same product, and what was large in x alone is shared between the two.
    """
    largest_x = seen.abs().amax(0).clamp(min=1e-5)
    largest_w = weight.abs().amax(0).clamp(min=1e-5)
    return largest_x**alpha / largest_w ** (1 - alpha)


def awq_rounded(weight: Tensor, seen: Tensor) -> Tensor:
    """AWQ: weight · s in int4, divided by s again: [out, in].

    s = mean|x|^α, so that the columns that large channels read are rounded more finely; the α of those tried
    that changes the products with `seen` least.
    """
    mean = seen.abs().mean(0).clamp(min=1e-5)
    exact = seen @ weight.T
    candidates = []
    for step in range(AWQ_STEPS + 1):
        scale = mean ** (step / AWQ_STEPS)
        scale = scale / (scale.max() * scale.min()).sqrt()
        rounded = _in_int4(weight * scale) / scale
        candidates.append(((seen @ rounded.T - exact).norm().item(), step, rounded))
    return min(candidates, key=lambda candidate: candidate[:2])[2]


def _rows_in_int8(rows: Tensor) -> Tensor:
    """Each row, a token's or a weight's, in int8 with a scale of its own."""
    codes, scale = absmax_int8(rows)
    return codes.float() * scale[:, None]


def _in_int4(weight: Tensor) -> Tensor:
    scale, zero = (part[..., None] for part in group_ranges(weight, GROUP_OF_4_BITS))
    groups = weight.unflatten(-1, (-1, GROUP_OF_4_BITS))
    return ((int4_codes(groups, scale, zero) - 8) * scale.float() + zero.float()).flatten(-2)
