"""Week 10. The three loops, PPO, DPO and GRPO: each one page (`update`) that calls the formulas of
`alignment.py`. A reward model's is in `rewards.py`.

The models are those of the course, ids -> logits, handed in and trained in place; a value model gives [batch,
time, 1] (see `scalar_head`). Every number a run draws comes from its own generator, and everything it needs
is in one file, so a resumed run equals an uninterrupted one.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Generator, Tensor, nn
from tqdm import tqdm

from shared.alignment.losses import (
    dpo_loss,
    entropy,
    explained_variance,
    gae,
    group_advantages,
    grpo_loss,
    kl_estimate,
    masked_mean,
    ppo_loss,
    ratio_diagnostics,
    sequence_logprobs,
    token_logprobs,
    token_rewards,
    whiten,
)
from shared.runtime import RunLog, check_seed, finish_first, write_atomically
from shared.sampling.generate import sample
from shared.training.trainer import TrainingStopped


@dataclass(frozen=True)
class LoopConfig:
    """What all loops share, a reward model's (`rewards.py`) too."""

    steps: int = 200
    lr: float = 1e-4
    """Adam's learning rate at the first step; it falls linearly."""
    final_lr: float = 0.0
    """Where it ends, as a fraction of the first."""
    grad_clip: float = 1.0
    """Longest gradient; longer ones are shortened to it. 0: never."""
    seed: int = 1337
    log_every: int = 1
    checkpoint_every: int = 50

    beta_may_be_0: ClassVar[bool] = False

    def __post_init__(self) -> None:
        problems = []
        at_least_1 = ("steps", "log_every", "checkpoint_every", "max_new_tokens", "epochs", "minibatches")
        for name, value in asdict(self).items():
            if name in at_least_1 and value < 1:
                problems.append(f"{name}={value}: must be at least 1")
            if (
                name in ("lr", "beta", "clip", "value_clip")
                and not 0 < value < math.inf
                and not (name == "beta" and value == 0 and self.beta_may_be_0)
            ):
                problems.append(f"{name}={value}: must be above 0")
            if name in ("final_lr", "gamma", "lam") and not 0 <= value <= 1:
                problems.append(f"{name}={value}: must be from 0 to 1")
            if name in ("grad_clip", "value_coef") and not value >= 0:
                problems.append(f"{name}={value}: must not be negative")
        try:
            check_seed(self.seed)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError(f"{type(self).__name__}: " + "; ".join(problems))


@dataclass(frozen=True)
class AlignConfig(LoopConfig):
    """What the three loops share."""

    beta: float = 0.1
    """What a nat of KL to the reference costs, in units of the reward. The optimum is the reference times
    exp(reward / beta).
    """


@dataclass(frozen=True)
class DPOConfig(AlignConfig):
    """How to learn from pairs."""

    loss_type: str = "sigmoid"
    """See `dpo_loss`."""
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class OnlineConfig(AlignConfig):
    """What the two loops share that learn from answers they draw themselves. With beta=0 nothing holds the
    policy to the reference.
    """

    beta_may_be_0: ClassVar[bool] = True

    max_new_tokens: int = 32
    end: int | None = None
    """The token that ends an answer; none: every answer has max_new_tokens."""
    epochs: int = 4
    """How often each batch of answers is learned from."""
    minibatches: int = 1
    """Into how many steps of the optimizer an epoch is cut."""
    clip: float = 0.2


@dataclass(frozen=True)
class PPOConfig(OnlineConfig):
    """How to learn with a value model."""

    gamma: float = 1.0
    lam: float = 0.95
    value_clip: float = 0.2
    value_coef: float = 0.1


@dataclass(frozen=True)
class GRPOConfig(OnlineConfig):
    """How to learn from groups of answers."""

    group_size: int = 8
    """Answers to each prompt."""
    scale: Literal["group", "batch", "none"] = "group"
    loss_type: Literal["grpo", "bnpo", "dr_grpo"] = "grpo"
    kl: Literal["loss", "reward"] = "loss"
    """loss: as published, k3 of each token in the loss. Its gradient is not that of KL(policy ‖ reference),
    and a group's deviation rescales the reward, so this ends near another policy. reward: an answer's whole
    KL is taken off its score; with scale none and dr_grpo the optimum is the reference times exp(reward /
    beta).
    """


@torch.no_grad()
def draw_answers(
    model: nn.Module,
    prompts: Tensor,
    max_new_tokens: int,
    end: int | None = None,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Answers to prompts of one length, int64 [batch, time], drawn at temperature 1 -> (ids, mask), [batch,
    time + max_new_tokens].

    An answer's `end` belongs to it; what comes after is `end` again, outside the mask. The temperature is 1
    because the methods need the probabilities with which the tokens were drawn. With a model that has
    `new_cache`, each token is read once.
    """
    ids, alive = prompts, torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    mask = torch.zeros_like(prompts, dtype=torch.bool)
    cache = (
        model.new_cache(len(prompts), prompts.size(1) + max_new_tokens)
        if hasattr(model, "new_cache")
        else None
    )
    fresh = ids
    for _ in range(max_new_tokens):
        logits = (model(ids) if cache is None else model(fresh, cache))[:, -1]
        fresh = sample(logits, generator=generator).unsqueeze(1)
        if end is not None:
            fresh = fresh.masked_fill(~alive.unsqueeze(1), end)
        ids, mask = torch.cat([ids, fresh], 1), torch.cat([mask, alive.unsqueeze(1)], 1)
        alive = alive & (fresh.squeeze(1) != end) if end is not None else alive
    return ids, mask


class AlignmentLoop:
    """What the loops share: the optimizer, the log, saving and going on. `update` is one step and returns
    what was measured.

    trained: modules by name; they are put in eval mode (no dropout: a ratio of probabilities is to change by
    learning only). reference: what the KL is taken to; None for a loop without. It may share weights that do
    not learn (a base below adapters). file: where the state is kept (`.safetensors`), of what learns; None
    keeps nothing.
    """

    def __init__(
        self,
        config: LoopConfig,
        trained: dict[str, nn.Module],
        reference: nn.Module | None,
        log: RunLog | None,
        file: Path | str | None,
    ):
        self.config, self.trained, self.log, self.file = config, trained, log, Path(file) if file else None
        self.parameters = [
            p for module in trained.values() for p in module.eval().parameters() if p.requires_grad
        ]
        frozen = set() if reference is None else {id(p) for p in reference.parameters()}
        if frozen & {id(p) for p in self.parameters} or not self.parameters:
            raise ValueError(
                "the reference must be a copy of the policy (copy.deepcopy), and the policy must have"
                " parameters that require gradients"
            )
        self.reference = reference and reference.eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.lr, eps=1e-5)
        self.generator = Generator().manual_seed(config.seed)
        self.step, self.history = 0, []

    def update(self) -> dict[str, float]:
        """One step. What it returns is logged."""
        raise NotImplementedError

    def fit(
        self,
        resume: bool = False,
        measure: Callable[[], dict[str, float]] | None = None,
        measure_every: int = 10,
    ) -> dict[str, float]:
        """Trains to the end and returns the last step's measurements.

        measure: further figures for the log, taken every so many steps and at the end; it must draw from a
        generator of its own. resume: go on from `file` as if nothing had happened; without it, start anew,
        said aloud. Ctrl-C ends the present step, saves, and raises KeyboardInterrupt. Raises TrainingStopped
        for a loss or a gradient that is not finite.
        """
        if not (resume and self._restore()) and self.log:
            self.log.rewind(0)
        name = type(self).__name__
        with (
            tqdm(
                total=self.config.steps, initial=self.step, desc=name, disable=None, leave=False
            ) as progress,
            finish_first("the step") as interrupted,
        ):
            while self.step < self.config.steps:
                row = self.update()
                self.step += 1
                progress.update()
                done, stop = self.step == self.config.steps, interrupted()
                if measured := measure is not None and (done or self.step % measure_every == 0):
                    row |= measure()
                if done or measured or self.step % self.config.log_every == 0:
                    self.history.append({"step": self.step, **row})
                    if self.log:
                        self.log.log(self.step, **{k: v for k, v in row.items() if math.isfinite(v)})
                if done or stop or self.step % self.config.checkpoint_every == 0:
                    self._save()
                if stop:
                    raise KeyboardInterrupt
        return self.history[-1] if self.history else {}

    def _descend(self, loss: Tensor) -> dict[str, float]:
        c = self.config
        lr = c.lr * (1 - (1 - c.final_lr) * self.step / c.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, c.grad_clip or math.inf).item()
        if not (math.isfinite(norm) and math.isfinite(loss.item())):
            raise TrainingStopped(
                f"step {self.step + 1}: the loss is {loss.item()}, the gradient's length {norm}. A lower lr"
                f" (now {lr:.3g}) usually helps"
            )
        self.optimizer.step()
        return {"loss": loss.item(), "grad_norm": norm, "lr": lr}

    # ---- state

    def _tensors(self) -> dict[str, Tensor]:
        own = {
            f"{name}.{key}": p
            for name, module in self.trained.items()
            for key, p in module.named_parameters()
            if p.requires_grad
        }
        moments = {
            f"optimizer.{i}.{key}": t
            for i, s in self.optimizer.state_dict()["state"].items()
            for key, t in s.items()
        }
        return own | moments | {"generator": self.generator.get_state()}

    def _save(self) -> None:
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "loop": type(self).__name__,
            "config": asdict(self.config),
            "history": self.history,
        }
        write_atomically(
            self.file,
            save(
                {k: t.detach().cpu().clone() for k, t in self._tensors().items()},
                {"state": json.dumps(state)},
            ),
        )

    def _restore(self) -> bool:
        if self.file is None or not self.file.exists():
            print(f"{type(self).__name__}: no state to resume from, so it starts from the beginning")
            return False
        try:
            with safe_open(self.file, "pt") as f:
                state, tensors = json.loads(f.metadata()["state"]), {k: f.get_tensor(k) for k in f.keys()}
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{self.file} is damaged, or no state of a run ({error}): delete it, and start anew without"
                " --resume"
            ) from None
        now = {"loop": type(self).__name__, **asdict(self.config)}
        then = {"loop": state["loop"], **state["config"]}
        changed = [
            f"{k}={then.get(k)} then, {now.get(k)} now" for k in now | then if then.get(k) != now.get(k)
        ]
        if changed:
            raise ValueError(
                f"{self.file} cannot be resumed with other settings: {'; '.join(changed)}. Restore them, or"
                " start anew without --resume"
            )
        own = self._tensors()
        wrong = [
            k
            for k in own
            if not k.startswith("optimizer.") and (k not in tensors or tensors[k].shape != own[k].shape)
        ]
        if wrong:
            raise ValueError(
                f"{self.file} is the state of another model: {wrong[0]} is missing or has another shape."
                " Start anew without --resume"
            )
        for name, module in self.trained.items():
            module.load_state_dict(
                {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")},
                strict=False,
            )
        moments: dict[int, dict[str, Tensor]] = {}
        for key, t in tensors.items():
            if key.startswith("optimizer."):
                _, i, what = key.split(".")
                moments.setdefault(int(i), {})[what] = t
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self.generator.set_state(tensors["generator"])
        self.step, self.history = state["step"], state["history"]
        if self.log:
            self.log.rewind(self.step)
        return True


class PPO(AlignmentLoop):
    """Proximal policy optimization with a value model and a KL penalty on each token.

    prompts: step -> int64 [batch, time], all of one length. score: (ids, mask) -> float [batch], the answers'
    rewards.
    """

    def __init__(
        self,
        policy: nn.Module,
        value: nn.Module,
        reference: nn.Module,
        prompts: Callable[[int], Tensor],
        score: Callable[[Tensor, Tensor], Tensor],
        config: PPOConfig,
        log: RunLog | None = None,
        file: Path | str | None = None,
    ):
        super().__init__(config, {"policy": policy, "value": value}, reference, log, file)
        self.policy, self.value, self.prompts, self.score = policy, value, prompts, score

    def update(self) -> dict[str, float]:
        c = self.config
        with torch.no_grad():
            # 1. Answers, and what the policy, the reference and the value model thought of each token.
            # [batch, time - 1]
            ids, mask = draw_answers(
                self.policy, self.prompts(self.step), c.max_new_tokens, c.end, self.generator
            )
            told = mask[:, 1:]
            logits = self.policy(ids)
            old_logp, ref_logp = token_logprobs(logits, ids), token_logprobs(self.reference(ids), ids)
            old_values = self.value(ids)[:, :-1, 0]
            # 2. What each token earned, and how much better that was than expected.
            scores = self.score(ids, mask)
            kl = kl_estimate(old_logp, ref_logp, "k1")
            advantages, returns = gae(
                token_rewards(scores, kl, told, c.beta), old_values, c.gamma, c.lam, told
            )
            advantages = whiten(advantages, told)
            row = {
                "score": scores.mean().item(),
                "kl": kl.masked_fill(~told, 0).sum(1).mean().item(),  # of a whole answer
                "entropy": masked_mean(entropy(logits[:, :-1]), told).item(),
                "explained_variance": explained_variance(old_values, returns, told),
                "length": told.sum(1).float().mean().item(),
            }
        # 3. Several steps on these answers, none so far that the ratios leave the clip.
        for _ in range(c.epochs):
            for rows in torch.randperm(len(ids), generator=self.generator).chunk(c.minibatches):
                logp, values = (
                    token_logprobs(self.policy(ids[rows]), ids[rows]),
                    self.value(ids[rows])[:, :-1, 0],
                )
                batch = logp, old_logp[rows], advantages[rows]
                loss = ppo_loss(
                    *batch,
                    values,
                    old_values[rows],
                    returns[rows],
                    told[rows],
                    c.clip,
                    c.value_clip,
                    c.value_coef,
                )
                row |= self._descend(loss)
        return row | ratio_diagnostics(*batch, told[rows], c.clip)


class GRPO(AlignmentLoop):
    """Group-relative policy optimization: no value model; an answer is compared with others to the same
    prompt.

    prompts, score: as PPO's; each prompt gets group_size answers.
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module,
        prompts: Callable[[int], Tensor],
        score: Callable[[Tensor, Tensor], Tensor],
        config: GRPOConfig,
        log: RunLog | None = None,
        file: Path | str | None = None,
    ):
        super().__init__(config, {"policy": policy}, reference, log, file)
        self.policy, self.prompts, self.score = policy, prompts, score

    def update(self) -> dict[str, float]:
        c = self.config
        with torch.no_grad():
            prompts = self.prompts(self.step).repeat_interleave(c.group_size, 0)
            ids, mask = draw_answers(self.policy, prompts, c.max_new_tokens, c.end, self.generator)
            told = mask[:, 1:]
            logits = self.policy(ids)
            old_logp, ref_logp = token_logprobs(logits, ids), token_logprobs(self.reference(ids), ids)
            scores = self.score(ids, mask)
            kl = (old_logp - ref_logp).masked_fill(~told, 0).sum(1)  # k1 of a whole answer
            advantages = group_advantages(
                scores - c.beta * kl if c.kl == "reward" else scores, c.group_size, c.scale
            )
            row = {
                "score": scores.mean().item(),
                "kl": kl.mean().item(),
                "entropy": masked_mean(entropy(logits[:, :-1]), told).item(),
                "length": told.sum(1).float().mean().item(),
            }
        beta = c.beta if c.kl == "loss" else 0.0
        for _ in range(c.epochs):
            for rows in torch.randperm(len(ids), generator=self.generator).chunk(c.minibatches):
                logp = token_logprobs(self.policy(ids[rows]), ids[rows])
                loss = grpo_loss(
                    logp,
                    old_logp[rows],
                    advantages[rows],
                    told[rows],
                    ref_logp[rows],
                    beta,
                    c.clip,
                    loss_type=c.loss_type,
                )
                row |= self._descend(loss)
        return row | ratio_diagnostics(
            logp, old_logp[rows], advantages[rows].unsqueeze(1), told[rows], c.clip
        )


class DPO(AlignmentLoop):
    """Direct preference optimization: neither a reward model nor drawing, only pairs.

    preferences: step -> (ids, mask), the chosen answers first, as `preference_batch` makes them.
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module,
        preferences: Callable[[int], tuple[Tensor, Tensor]],
        config: DPOConfig,
        log: RunLog | None = None,
        file: Path | str | None = None,
    ):
        super().__init__(config, {"policy": policy}, reference, log, file)
        self.policy, self.preferences = policy, preferences

    def update(self) -> dict[str, float]:
        c = self.config
        ids, mask = self.preferences(self.step)
        lengths = mask.sum(1).chunk(2)
        chosen, rejected = sequence_logprobs(self.policy(ids), ids, mask).chunk(2)
        with torch.no_grad():
            ref_chosen, ref_rejected = sequence_logprobs(self.reference(ids), ids, mask).chunk(2)
        loss = dpo_loss(
            chosen, rejected, ref_chosen, ref_rejected, c.beta, c.loss_type, c.label_smoothing, *lengths
        ).mean()
        row = self._descend(loss)
        rewards = c.beta * (chosen - ref_chosen).detach(), c.beta * (rejected - ref_rejected).detach()
        return row | {
            "accuracy": (rewards[0] > rewards[1]).float().mean().item(),
            "margin": (rewards[0] - rewards[1]).mean().item(),
            "chosen_reward": rewards[0].mean().item(),
            "rejected_reward": rewards[1].mean().item(),
            "chosen_logp": chosen.mean().item(),
        }
