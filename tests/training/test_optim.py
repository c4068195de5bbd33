"""shared/training/optim.py against torch's Muon and AdamW, and against Muon written out plainly in fp32."""

import pytest
import torch
from torch import nn
from torch.optim._muon import _zeropower_via_newtonschulz

from shared.models.bigram import BigramConfig, BigramModel
from shared.models.gpt import GPT, GPTConfig
from shared.models.mlp import WindowMLP, WindowMLPConfig
from shared.training.optim import Muon, build_optimizers, orthogonalize

SHAPES = [(8, 8), (16, 8), (8, 16), (16, 8), (5, 7), (1, 6)]
BETAS = (0.9, 0.99)
DECAY = 0.1


def matrices(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(9)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return params


def plain_muon(
    params: list[torch.Tensor], steps: int, lr: float, momentum: float, weight_decay: float
) -> list[torch.Tensor]:
    """Jordan's algorithm, one matrix at a time, in fp32."""
    generator = torch.Generator().manual_seed(9)
    params = [p.detach().clone() for p in params]
    buffers = [torch.zeros_like(p) for p in params]
    for _ in range(steps):
        for p, buffer in zip(params, buffers):
            grad = torch.randn(p.shape, generator=generator)
            buffer.mul_(momentum).add_(grad, alpha=1 - momentum)
            update = (1 - momentum) * grad + momentum * buffer
            x = update / (update.norm() + 1e-12)
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            p.mul_(1 - lr * weight_decay).sub_(lr * max(1, p.size(0) / p.size(1)) ** 0.5 * x)
    return params


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_equals_the_algorithm_written_out_in_fp32(weight_decay):
    expected = plain_muon(matrices(), 8, lr=0.02, momentum=0.95, weight_decay=weight_decay)
    params = matrices()
    for got, want in zip(run(Muon(params, lr=0.02, weight_decay=weight_decay), params, 8), expected):
        torch.testing.assert_close(got.detach(), want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_equals_torchs_up_to_its_bf16(weight_decay):
    theirs = matrices()
    ours = matrices()
    start = matrices()
    run(torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=weight_decay), theirs, 8)
    run(Muon(ours, lr=0.02, momentum=0.95, weight_decay=weight_decay), ours, 8)
    for a, b, s in zip(ours, theirs, start):
        moved = (b - s).norm()
        assert (a - b).norm() < 0.02 * moved, tuple(a.shape)  # bf16 has 8 bits


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_in_bf16_equals_torchs(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    theirs = _zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
    torch.testing.assert_close(
        orthogonalize(matrix[None], dtype=torch.bfloat16)[0], theirs, atol=0.03, rtol=0
    )


@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64), (7, 50)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_singular_vectors(shape):
    count, small = 6, min(shape)
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(count, shape[0], small, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(count, shape[1], small, generator=generator)).Q
    values = torch.logspace(0, -2, small)  # from 1 down to 0.01
    out = orthogonalize(u @ torch.diag(values) @ v.mT)
    inside = u.mT @ out @ v  # diagonal if the singular vectors are the same ones
    kept = inside.diagonal(dim1=1, dim2=2)
    assert 0.6 < kept.min() and kept.max() < 1.3
    torch.testing.assert_close(inside, torch.diag_embed(kept), atol=1e-4, rtol=0)
    torch.testing.assert_close(u @ inside @ v.mT, out, atol=1e-4, rtol=0)


def test_orthogonalize_treats_each_matrix_of_a_batch_alone_and_ignores_scale():
    batch = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(0))
    together = orthogonalize(batch * torch.tensor([1.0, 1e-4, 1e4, 7.0])[:, None, None])
    for i in range(4):
        torch.testing.assert_close(together[i], orthogonalize(batch[i : i + 1])[0], atol=1e-5, rtol=1e-5)
    assert orthogonalize(torch.zeros(1, 3, 4)).abs().max() == 0
    torch.testing.assert_close(orthogonalize(batch.mT), orthogonalize(batch).mT, atol=1e-6, rtol=1e-5)


def test_muon_leaves_a_parameter_without_a_gradient_alone():
    params = matrices()
    optimizer = Muon(params, weight_decay=0.1)
    before = [p.detach().clone() for p in params]
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert [torch.equal(a, b) for a, b in zip(params, before)] == [True, False, True, True, True, True]


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), ()])
def test_muon_refuses_what_is_no_matrix(shape):
    with pytest.raises(ValueError, match="Muon is for matrices"):
        Muon([nn.Parameter(torch.zeros(shape))])


def names_in(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[float, set[str]]:
    """Weight decay -> names of the parameters that get it."""
    names = {p: n for n, p in model.named_parameters()}
    return {g["weight_decay"]: {names[p] for p in g["params"]} for g in optimizer.param_groups}


def build(model: nn.Module, kind: str) -> list[torch.optim.Optimizer]:
    return build_optimizers(model, kind, 1e-3, muon_lr=0.02, weight_decay=DECAY, betas=BETAS)


SMALL = dict(vocab_size=20, block_size=8, n_layer=2, n_head=2, n_embd=8)
MODELS = {
    "GPT": lambda: GPT(GPTConfig(**SMALL)),
    "untied GPT": lambda: GPT(GPTConfig(**SMALL, tie_weights=False, mlp="swiglu", position="rope")),
    "WindowMLP": lambda: WindowMLP(WindowMLPConfig(vocab_size=20)),
    "BigramModel": lambda: BigramModel(BigramConfig(20)),
}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_exactly_one_optimizer_and_decay_falls_on_matrices_alone(name, kind):
    model = MODELS[name]()
    optimizers = build(model, kind)
    given = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(given) == len(set(given)) == len(list(model.parameters()))
    for optimizer in optimizers:
        for decay, names in names_in(model, optimizer).items():
            for n in names:
                assert decay == (DECAY if model.get_parameter(n).dim() >= 2 else 0.0), n


def test_muon_gets_exactly_the_matrices_inside_the_model():
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    inside = {
        "GPT": (*attention, "up_proj", "down_proj"),
        "untied GPT": (*attention, "gate_proj", "up_proj", "down_proj"),
        "WindowMLP": ("hidden",),
    }
    for name, inner in inside.items():
        model = MODELS[name]()
        adamw, muon = build(model, "muon")
        assert isinstance(muon, Muon)
        assert isinstance(adamw, torch.optim.AdamW)
        expected = {n for n, _ in model.named_parameters() if n.endswith(tuple(f"{i}.weight" for i in inner))}
        assert names_in(model, muon) == {DECAY: expected}
        assert len(expected) in (1, 12, 14)
        assert adamw.param_groups[0]["peak_lr"] == 1e-3
        assert muon.param_groups[0]["peak_lr"] == 0.02
    assert [type(o) for o in build(MODELS["BigramModel"](), "muon")] == [torch.optim.AdamW]


@pytest.mark.parametrize(
    ("kind", "kept", "expected"),
    [
        ("adamw", "mlp_norm", [torch.optim.AdamW]),
        ("muon", "mlp_norm", [torch.optim.AdamW]),
        ("muon", "proj.weight", [Muon]),
        ("muon", "up_proj", [torch.optim.AdamW, Muon]),
    ],
)
def test_frozen_parameters_are_left_out(kind, kept, expected):
    model = MODELS["GPT"]()
    for n, p in model.named_parameters():
        p.requires_grad_(kept in n)
    optimizers = build(model, kind)
    assert [type(o) for o in optimizers] == expected
    given = set().union(*(names for o in optimizers for names in names_in(model, o).values()))
    assert given == {n for n, _ in model.named_parameters() if kept in n}


def test_adamw_with_our_groups_moves_as_torchs_with_groups_made_by_hand():
    ours, theirs = MODELS["GPT"](), MODELS["GPT"]()
    theirs.load_state_dict(ours.state_dict())
    (optimizer,) = build_optimizers(ours, "adamw", 1e-2, weight_decay=0.3, betas=BETAS)
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    rest = [p for p in theirs.parameters() if p.dim() < 2]
    reference = torch.optim.AdamW(
        [{"params": matrices}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-2,
        betas=BETAS,
        weight_decay=0.3,
        foreach=False,
        fused=False,
    )
    idx = torch.randint(20, (2, 8), generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        # One gradient for both: Adam blows the rounding noise of a gradient that is zero in theory up to a
        # whole step.
        ours.zero_grad()
        nn.functional.cross_entropy(ours(idx).flatten(0, 1), idx.flatten()).backward()
        for p, q in zip(ours.parameters(), theirs.parameters()):
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    for (n, a), b in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=lambda m, n=n: f"{n}: {m}")


def test_another_kind_of_optimizer_is_refused():
    with pytest.raises(ValueError, match="kind='sgd': must be adamw or muon"):
        build_optimizers(nn.Linear(2, 2), "sgd", 1e-3)
