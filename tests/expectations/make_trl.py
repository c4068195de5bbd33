"""Makes tests/expectations/trl.json: losses and gradients of TRL on random numbers.

DPO, GRPO and RLOO are those of TRL 1.16.0. The losses of the first two are called on a stand-in for the
trainer. PPO is that of TRL 1.12.0, the last release that has it; its losses, as RLOO's advantages, are inline
in a method, so the lines between two landmarks are taken from the file. TRL is not needed for the tests; for
this, from the repository's root and with both unpacked somewhere:

    pip install --no-deps --target /tmp/trl trl==1.16.0; pip download --no-deps trl==1.12.0; unzip it
    PYTHONPATH=/tmp/trl python -m tests.expectations.make_trl .../trl/experimental/ppo/ppo_trainer.py
"""

import json
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).parent / "trl.json"
GENERATOR = torch.Generator().manual_seed(0)
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
)


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=GENERATOR) * scale


def masks(lengths: list[int], time: int, start: int) -> Tensor:
    """True for the tokens of each answer, which begins at `start`: bool [answers, time]."""
    places = torch.arange(time)
    return torch.stack([(places >= start) & (places < start + length) for length in lengths])


# ---- DPO

UNSMOOTHED = (
    "sigmoid",
    "hinge",
    "ipo",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")


def dpo_cases() -> list[dict[str, Any]]:
    """The settings of each loss that is computed."""
    cases: list[dict[str, Any]] = []
    for beta in (0.1, 0.5):
        cases += [dict(loss_type=kind, beta=beta) for kind in UNSMOOTHED]
    for kind in SMOOTHED:
        cases += [dict(loss_type=kind, beta=0.3, label_smoothing=e) for e in (0.05, 0.3)]
    return cases + [dict(loss_type=kind, beta=0.3) for kind in SMOOTHED if kind != "exo_pair"]


def dpo_trainer(case: dict[str, Any]) -> SimpleNamespace:
    """What TRL's loss reads of its trainer."""
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[case["loss_type"]],
        loss_weights=[1.0],
        beta=case["beta"],
        label_smoothing=case.get("label_smoothing", 0.0),
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )


def dpo() -> dict[str, Any]:
    from trl.trainer.dpo_trainer import DPOTrainer

    pairs = 5
    time = 9
    chosen_lengths = [6, 3, 1, 5, 2]
    rejected_lengths = [2, 4, 6, 1, 3]
    mask = masks(chosen_lengths + rejected_lengths, time, 3).long()
    logps = (-random(2 * pairs, time - 1).exp() * mask[:, 1:]).requires_grad_()
    sums = logps.detach().sum(1)
    ref_chosen, ref_rejected = (sums + random(2 * pairs, scale=1.5)).chunk(2)
    zeros = torch.zeros(2 * pairs, time - 1, dtype=torch.float64)
    outputs = SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": mask,
        "completion_mask": mask,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    results = []
    for case in dpo_cases():
        loss = DPOTrainer._compute_loss(dpo_trainer(case), lambda **_: outputs, dict(inputs), False)
        (gradient,) = torch.autograd.grad(loss, logps)
        at_first_token = gradient[:, 2]  # of the answers, where all rows have one
        results.append({**case, "loss": loss.item(), "gradient": at_first_token.tolist()})
    chosen, rejected = sums.chunk(2)
    return {
        "chosen": chosen.tolist(),
        "rejected": rejected.tolist(),
        "ref_chosen": ref_chosen.tolist(),
        "ref_rejected": ref_rejected.tolist(),
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
        "cases": results,
    }


# ---- GRPO

GRPO_VARIANTS = [
    dict(beta=0.0, importance="token", clip_high=0.2),
    dict(beta=0.3, importance="token", clip_high=0.28),
    dict(beta=0.0, importance="sequence", clip_high=0.2),
]
GRPO_CASES = [
    {"loss_type": kind, **variant} for kind in ("grpo", "bnpo", "dr_grpo") for variant in GRPO_VARIANTS
]


def grpo_trainer(case: dict[str, Any], logps: Tensor) -> SimpleNamespace:
    """What TRL's loss reads of its trainer."""
    return SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=case["importance"],
        beta=case["beta"],
        loss_type=case["loss_type"],
        epsilon_low=0.2,
        epsilon_high=case["clip_high"],
        use_vllm=False,
        _entropy_bonus_enabled=False,
        max_completion_length=logps.size(1),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        _metrics={"eval": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
    )


def grpo() -> dict[str, Any]:
    from trl.trainer.grpo_trainer import GRPOTrainer

    batch = 6
    time = 7
    mask = masks([7, 3, 1, 5, 4, 6], time, 0).long()
    logps = (-random(batch, time).exp()).requires_grad_()
    old = logps.detach() + random(batch, time, scale=0.3)
    ref = logps.detach() + random(batch, time, scale=0.4)
    advantages = random(batch)
    ids = torch.zeros(batch, time, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
    }
    results = []
    for case in GRPO_CASES:
        loss = GRPOTrainer._compute_loss(grpo_trainer(case, logps), None, inputs)
        (gradient,) = torch.autograd.grad(loss, logps)
        results.append({**case, "loss": loss.item(), "gradient": gradient.tolist()})
    return {
        "logp": logps.tolist(),
        "old_logp": old.tolist(),
        "ref_logp": ref.tolist(),
        "advantages": advantages.tolist(),
        "mask": mask.tolist(),
        "cases": results,
    }


# ---- RLOO


def rloo() -> dict[str, Any]:
    """Its advantages; the lines that compute them are inline in the trainer. The numbers are its own."""
    from trl.trainer import rloo_trainer

    rewards = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    names = {**vars(rloo_trainer), "rewards": rewards, "num_generations": 4}
    source = Source(Path(rloo_trainer.__file__).read_text(encoding="utf-8"))
    source.run("grouped_rewards = rewards.view", "# Normalize advantages", names)
    return {"scores": rewards.tolist(), "group_size": 4, "advantages": names["advantages"].tolist()}


# ---- PPO

PPO_SETTINGS = dict(gamma=0.98, lam=0.9, cliprange=0.2, cliprange_value=0.25, vf_coef=0.3)
PPO_KEPT = (
    "rewards",
    "values",
    "logprobs",
    "new_logprobs",
    "vpred",
    "plain_advantages",
    "advantages",
    "returns",
    "pg_loss",
    "vf_loss",
    "loss",
    "pg_clipfrac",
    "ratio",
)


class Source:
    """The text of a trainer of TRL's, of which some lines are run."""

    def __init__(self, text: str):
        self.lines = text.split("\n")

    def run(self, start: str, end: str, names: dict[str, Any]) -> None:
        """Runs the lines from the one that begins with `start` up to, not including, one that begins with
        `end`; they read and set `names`.
        """
        first = self._find(start, 0)
        last = self._find(end, first + 1)
        exec(textwrap.dedent("\n".join(self.lines[first:last])), names)

    def _find(self, start: str, after: int) -> int:
        return next(
            number
            for number, line in enumerate(self.lines)
            if number >= after and line.lstrip().startswith(start)
        )


def ppo_inputs() -> dict[str, Any]:
    """What the lines of `train()` read, under the names that they use."""
    batch = 5
    time = 8
    mask = masks([8, 3, 5, 1, 7], time, 0)
    rewards = random(batch, time).masked_fill(~mask, 0)
    values = random(batch, time).masked_fill(~mask, 0)
    logprobs = (-random(batch, time).exp()).masked_fill(~mask, 0)
    new_logprobs = logprobs + random(batch, time, scale=0.3).masked_fill(~mask, 0)
    vpred = values + random(batch, time, scale=0.4).masked_fill(~mask, 0)
    return {
        "torch": torch,
        "args": SimpleNamespace(**PPO_SETTINGS),
        "responses": mask,
        "padding_mask": ~mask,
        "padding_mask_p1": ~mask,
        "micro_batch_inds": slice(None),
        "rewards": rewards,
        "values": values,
        "logprobs": logprobs,
        "new_logprobs": new_logprobs.requires_grad_(),
        "vpred": vpred.requires_grad_(),
    }


def ppo(source: Source) -> dict[str, Any]:
    names = ppo_inputs()
    mask = names["responses"]
    source.run("def masked_mean", "# taken from", names)
    source.run("lastgaelam = 0", "advantages = masked_whiten", names)
    names["plain_advantages"] = names["advantages"].masked_fill(~mask, 0)
    source.run("advantages = masked_whiten", "empty_cache()", names)
    names["mb_advantage"] = names["advantages"]
    names["mb_logprobs"] = names["logprobs"]
    names["mb_return"] = names["returns"]
    names["mb_values"] = names["values"]
    source.run("vpredclipped = torch.clamp", "accelerator.backward", names)
    source.run("pg_clipfrac = masked_mean", "prob_dist =", names)
    gradients = torch.autograd.grad(names["loss"], (names["new_logprobs"], names["vpred"]))
    k3_names = {**names, "ref_logprobs": names["new_logprobs"], "args": SimpleNamespace(kl_estimator="k3")}
    source.run("logr = ref_logprobs", "non_score_reward =", k3_names)
    return {
        **{name: names[name].detach().tolist() for name in PPO_KEPT},
        "settings": PPO_SETTINGS,
        "mask": mask.tolist(),
        "k3": k3_names["kl"].detach().tolist(),
        "gradients": [gradient.tolist() for gradient in gradients],
    }


def main(ppo_trainer: Path) -> None:
    numbers = {"ppo": ppo(Source(ppo_trainer.read_text(encoding="utf-8"))), "dpo": dpo(), "grpo": grpo()}
    numbers["rloo"] = rloo()
    FILE.write_text(json.dumps(numbers) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
