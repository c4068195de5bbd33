"""Week 2. Optimizers: AdamW with decay on matrices only, and Muon for the matrices inside a model.

Sources: Loshchilov & Hutter (AdamW, 2019); Jordan et al., "Muon: An optimizer for hidden layers" (2024).
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shared.training.config import TrainConfig
from shared.training.fused import is_plain, muon_step, why_unfused

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Jordan's coefficients of x, x³ and x⁵: steepest at 0, so that small singular values grow fastest."""


def orthogonalize(matrices: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Moves every singular value of each matrix near 1, and keeps its singular vectors: U S Vᵀ -> about U Vᵀ.

    They end between about 0.7 and 1.2. matrices: [count, rows, columns]. dtype: what to compute in; None
    takes bf16 on CUDA, where it is fast, fp32 elsewhere.
    """
    if dtype is None:
        dtype = torch.bfloat16 if matrices.is_cuda else torch.float32
    x = matrices.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every direction of a matrix is moved by about the same amount.

    For parameters of two dimensions; ValueError for any other. `torch.optim.Muon` computes the same update
    one matrix at a time, in bf16; this one takes matrices of one shape together and in fp32 on a CPU, which
    is several times faster there. fused: matrices in fp32 on a CPU are updated by `fused.muon_step`, which is
    faster still and differs by rounding; RuntimeError where it does not work.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
        *,
        fused: bool = False,
    ):
        if fused and (reason := why_unfused()):
            raise RuntimeError(f"Muon(fused=True) does not work here: {reason}")
        self.fused = fused
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, ns_steps=ns_steps)
        super().__init__(params, defaults)
        for group in self.param_groups:
            if any(p.dim() != 2 for p in group["params"]):
                raise ValueError("Muon is for matrices: give parameters of any other shape to AdamW")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a loss is not computed again
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            learning = [p for p in group["params"] if p.grad is not None]
            if self.fused:
                learning = self._update_fused(learning, group)
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in learning:
                # Tall and wide matrices share a batch: a transpose's update is the update's transpose.
                by_shape[torch.Size(sorted(p.shape))].append(p)
            for parameters in by_shape.values():
                self._update(parameters, group)

    def _buffers(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Their momentum, 0 at first."""
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return [self.state[p]["momentum_buffer"] for p in parameters]

    def _update_fused(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> list[nn.Parameter]:
        """Updates those that `fused.muon_step` can; returns the others."""
        buffers = self._buffers(parameters)
        fit = [is_plain((p, p.grad, buffer)) for p, buffer in zip(parameters, buffers)]
        muon_step(
            [p for p, fits in zip(parameters, fit) if fits],
            [p.grad for p, fits in zip(parameters, fit) if fits and p.grad is not None],
            [buffer for buffer, fits in zip(buffers, fit) if fits],
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            ns_steps=group["ns_steps"],
        )
        return [p for p, fits in zip(parameters, fit) if not fits]

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Updates matrices that have one shape, or its transpose, and a gradient each."""
        buffers = self._buffers(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        momentum = group["momentum"]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        # Nesterov: the gradient as it will look after this step.
        updates = torch._foreach_lerp(gradients, buffers, momentum)
        stacked = torch.stack([u if u.size(0) <= u.size(1) else u.mT for u in updates])
        directions = orthogonalize(stacked, group["ns_steps"]).unbind()
        torch._foreach_mul_(tuple(parameters), 1 - group["lr"] * group["weight_decay"])
        for p, direction in zip(parameters, directions):
            scale = max(1.0, p.size(0) / p.size(1)) ** 0.5
            p.add_(direction if p.size(0) <= p.size(1) else direction.mT, alpha=-group["lr"] * scale)


def build_optimizers(
    model: nn.Module,
    kind: str,
    lr: float,
    *,
    muon_lr: float = 0.02,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.99),
    muon_momentum: float = 0.95,
    fused: bool = False,
) -> list[torch.optim.Optimizer]:
    """The optimizers of a model: AdamW alone ("adamw"), or AdamW and Muon ("muon").

    Muon takes the weights of linear layers inside the model; embeddings, the output layer, biases and norms
    remain AdamW's. Weight decay falls on parameters of two or more dimensions only. Each group keeps its peak
    learning rate under "peak_lr". Parameters that need no gradient are left out. fused: as of `Muon`. Raises
    ValueError for another kind.
    """
    if kind not in ("adamw", "muon"):
        raise ValueError(f"kind={kind!r}: must be adamw or muon")
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for_muon = _inner_matrices(model) if kind == "muon" else set()
    inner = [p for n, p in parameters.items() if n in for_muon]
    rest = [p for n, p in parameters.items() if n not in for_muon]
    optimizers: list[torch.optim.Optimizer] = []
    if rest:
        groups = [
            {"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        at_once = all(p.device.type in ("cpu", "cuda") for p in rest)
        optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=betas, fused=at_once))
    if inner:
        optimizers.append(
            Muon(inner, lr=muon_lr, momentum=muon_momentum, weight_decay=weight_decay, fused=fused)
        )
    _keep_peaks(optimizers)
    return optimizers


def optimizers_of(config: TrainConfig, model: nn.Module, fused: bool = False) -> list[torch.optim.Optimizer]:
    """`build_optimizers` with the settings of a training."""
    return build_optimizers(
        model,
        config.optimizer,
        config.lr,
        muon_lr=config.muon_lr,
        weight_decay=config.weight_decay,
        betas=(config.beta1, config.beta2),
        muon_momentum=config.muon_momentum,
        fused=fused,
    )


def own_optimizers(
    optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer], model: nn.Module
) -> list[torch.optim.Optimizer]:
    """Optimizers that somebody made for `model`, one or several, as the Trainer takes them.

    The learning rate that each group has is kept as its peak, under "peak_lr". Raises ValueError for what is
    no torch optimizer, for LBFGS, for parameters that are not the model's, and where there are none.
    """
    found = list(optimizers) if isinstance(optimizers, Sequence) else [optimizers]
    for optimizer in found:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"optimizers: {optimizer!r} is no torch optimizer: give one that is made, such as"
                " torch.optim.SGD(model.parameters(), lr=0.1), or a list of them"
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("optimizers: LBFGS computes a step's loss several times, the Trainer once")
    own = {id(parameter) for parameter in model.parameters()}
    given = [id(p) for optimizer in found for group in optimizer.param_groups for p in group["params"]]
    strange = sum(number not in own for number in given)
    if strange or not given:
        raise ValueError(
            f"optimizers: {strange} of their {len(given)} parameters are not the model's: make them of the"
            " parameters of the model that is trained, after all that exchanges them (adapters, FSDP)"
        )
    if len(set(given)) < len(given):
        raise ValueError("optimizers: two of them have the same parameter, which would be updated twice")
    _keep_peaks(found)
    return found


def describe_optimizers(optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """Their classes and their groups' settings, in JSON: what a resumed run must have in common."""
    described = []
    for optimizer in optimizers:
        groups = [
            {
                name: value if isinstance(value, (int, float, bool, type(None))) else str(value)
                for name, value in group.items()
                if name not in ("params", "lr")  # the present rate; the peak is the setting
            }
            for group in optimizer.param_groups
        ]
        described.append({"class": type(optimizer).__name__, "groups": groups})
    return described


def _keep_peaks(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]


def _inner_matrices(model: nn.Module) -> set[str]:
    """The names of the weights of all linear layers but the output layer."""
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return {f"{n}.weight" for n in linears if not n.endswith("lm_head")}
