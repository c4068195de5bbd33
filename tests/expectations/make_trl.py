"""Makes tests/expectations/trl.json: losses and gradients of TRL 1.16.0 (DPO, GRPO) and of TRL 1.12.0, the
last release with PPO, on random numbers.

DPO's and GRPO's losses are called on a stand-in for the trainer. PPO's are inline in `train()`, so the lines
between two landmarks are taken from the file. TRL is not needed for the tests; for this, from the
repository's root and with both unpacked somewhere:
    pip install --no-deps --target /tmp/trl trl==1.16.0; pip download --no-deps trl==1.12.0; unzip it
    PYTHONPATH=/tmp/trl python -m tests.expectations.make_trl .../trl/experimental/ppo/ppo_trainer.py
"""

import json
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

FILE = Path(__file__).parent / "trl.json"
DPO_CASES = [
    *(
        dict(loss_type=t, beta=b)
        for b in (0.1, 0.5)
        for t in (
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
    ),
    *(
        dict(loss_type=t, beta=0.3, label_smoothing=e)
        for t in ("exo_pair", "robust", "aot", "aot_unpaired")
        for e in (0.05, 0.3)
    ),
    *(dict(loss_type=t, beta=0.3) for t in ("robust", "aot", "aot_unpaired")),
]
GRPO_CASES = [
    dict(loss_type=t, beta=b, importance=i, clip_high=h)
    for t in ("grpo", "bnpo", "dr_grpo")
    for b, i, h in ((0.0, "token", 0.2), (0.3, "token", 0.28), (0.0, "sequence", 0.2))
]


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=GENERATOR) * scale


GENERATOR = torch.Generator().manual_seed(0)
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
)


def masks(lengths: list[int], time: int, start: int) -> Tensor:
    places = torch.arange(time)
    return torch.stack([(places >= start) & (places < start + n) for n in lengths])


def dpo() -> dict:
    from trl.trainer.dpo_trainer import DPOTrainer

    pairs, time = 5, 9
    lengths = [6, 3, 1, 5, 2] + [2, 4, 6, 1, 3]
    mask = masks(lengths, time, 3).long()
    logps = (-random(2 * pairs, time - 1).exp() * mask[:, 1:]).requires_grad_()
    ref = (logps.detach().sum(1) + random(2 * pairs, scale=1.5)).chunk(2)
    zeros = torch.zeros(2 * pairs, time - 1, dtype=torch.float64)
    outputs = SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": mask, "completion_mask": mask}
    inputs |= {"ref_chosen_logps": ref[0], "ref_rejected_logps": ref[1]}
    found = []
    for case in DPO_CASES:
        trainer = SimpleNamespace(
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
        loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, dict(inputs), False)
        (gradient,) = torch.autograd.grad(loss, logps)
        found.append(
            case | {"loss": loss.item(), "gradient": gradient[:, 2].tolist()}
        )  # at the answers' first token, where all rows have one
    sums = logps.detach().sum(1).chunk(2)
    return {
        "chosen": sums[0].tolist(),
        "rejected": sums[1].tolist(),
        "ref_chosen": ref[0].tolist(),
        "ref_rejected": ref[1].tolist(),
        "chosen_lengths": lengths[:pairs],
        "rejected_lengths": lengths[pairs:],
        "cases": found,
    }


def grpo() -> dict:
    from trl.trainer.grpo_trainer import GRPOTrainer

    batch, time = 6, 7
    mask = masks([7, 3, 1, 5, 4, 6], time, 0).long()
    logps = (-random(batch, time).exp()).requires_grad_()
    old, ref, advantages = (
        logps.detach() + random(batch, time, scale=0.3),
        logps.detach() + random(batch, time, scale=0.4),
        random(batch),
    )
    ids = torch.zeros(batch, time, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": mask,
    }
    inputs |= {"advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref}
    found = []
    for case in GRPO_CASES:
        trainer = SimpleNamespace(
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
            max_completion_length=time,
            args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
            _metrics={"eval": defaultdict(list)},
            _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
        )
        loss = GRPOTrainer._compute_loss(trainer, None, inputs)
        (gradient,) = torch.autograd.grad(loss, logps)
        found.append(case | {"loss": loss.item(), "gradient": gradient.tolist()})
    given = dict(logp=logps.detach(), old_logp=old, ref_logp=ref, advantages=advantages, mask=mask)
    return {name: t.tolist() for name, t in given.items()} | {"cases": found}


def ppo(source: str) -> dict:
    def lines(start: str, end: str) -> str:
        """From the line that begins with `start` up to the one that begins with `end`, the latter left out."""
        found = source.split("\n")
        first = next(i for i, line in enumerate(found) if line.lstrip().startswith(start))
        last = next(i for i, line in enumerate(found) if i > first and line.lstrip().startswith(end))
        return textwrap.dedent("\n".join(found[first:last]))

    batch, time = 5, 8
    mask = masks([8, 3, 5, 1, 7], time, 0)
    tensors = dict(
        rewards=random(batch, time), values=random(batch, time), logprobs=-random(batch, time).exp()
    )
    tensors = {name: t.masked_fill(~mask, 0) for name, t in tensors.items()}
    new_logprobs = (
        tensors["logprobs"] + random(batch, time, scale=0.3).masked_fill(~mask, 0)
    ).requires_grad_()
    vpred = (tensors["values"] + random(batch, time, scale=0.4).masked_fill(~mask, 0)).requires_grad_()
    settings = SimpleNamespace(gamma=0.98, lam=0.9, cliprange=0.2, cliprange_value=0.25, vf_coef=0.3)
    names = {
        "torch": torch,
        "args": settings,
        "responses": mask,
        "padding_mask": ~mask,
        "padding_mask_p1": ~mask,
        "micro_batch_inds": slice(None),
    }
    names |= tensors | {"new_logprobs": new_logprobs, "vpred": vpred}
    exec(lines("def masked_mean", "# taken from"), names)
    exec(lines("lastgaelam = 0", "advantages = masked_whiten"), names)
    names["plain_advantages"] = names["advantages"].masked_fill(~mask, 0)
    exec(lines("advantages = masked_whiten", "empty_cache()"), names)
    names |= {
        "mb_advantage": names["advantages"],
        "mb_logprobs": names["logprobs"],
        "mb_return": names["returns"],
        "mb_values": names["values"],
    }
    exec(lines("vpredclipped = torch.clamp", "accelerator.backward"), names)
    exec(lines("pg_clipfrac = masked_mean", "prob_dist ="), names)
    exec(
        lines("logr = ref_logprobs", "non_score_reward ="),
        {**names, "ref_logprobs": new_logprobs, "args": SimpleNamespace(kl_estimator="k3")},
        k3 := {},
    )
    gradients = torch.autograd.grad(names["loss"], (new_logprobs, vpred))
    kept = (
        "rewards",
        "values",
        "logprobs",
        "new_logprobs",
        "vpred",
        "plain_advantages",
        "advantages",
        "returns",
    )
    kept += ("pg_loss", "vf_loss", "loss", "pg_clipfrac", "ratio")
    found = {name: names[name].detach().tolist() for name in kept} | {
        "settings": vars(settings),
        "mask": mask.tolist(),
    }
    return found | {"k3": k3["kl"].detach().tolist(), "gradients": [g.tolist() for g in gradients]}


if __name__ == "__main__":
    numbers = {"ppo": ppo(Path(sys.argv[1]).read_text(encoding="utf-8")), "dpo": dpo(), "grpo": grpo()}
    FILE.write_text(json.dumps(numbers, indent=None) + "\n", encoding="utf-8")
