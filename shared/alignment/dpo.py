"""Week 10. DPO's loss (Rafailov et al., 2023) and its relatives, each a formula of its own.

They learn from pairs of a chosen and a rejected answer, without a reward model and without drawing answers.
In the formulas c and r are the log-ratios log pi - log pi_ref of the chosen and the rejected answer, m = beta
· (c - r) is their margin, and e is label_smoothing. A log-ratio stands for a reward: beta times it is, up to
a constant for each prompt, the reward under which pi would be optimal.

>>> chosen, rejected = torch.tensor([-5.0]), torch.tensor([-8.0])
>>> dpo_loss(chosen, rejected, chosen, rejected)  # the policy is still the reference: ln 2
tensor([0.6931])
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.alignment.logprobs import check_same_shapes


@dataclass(frozen=True, eq=False)
class PairLogProbs:
    """Summed log-probabilities of the answers of a batch of pairs, [batch] each, and a loss's settings.

    Raises ValueError where shapes differ, or are other than [batch].
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    ref_chosen: Tensor
    """Without a gradient, as is ref_rejected."""
    ref_rejected: Tensor
    beta: float
    smoothing: float
    tau: float
    chosen_lengths: Tensor | None
    """Tokens of the answers, [batch]."""
    rejected_lengths: Tensor | None

    def __post_init__(self) -> None:
        check_same_shapes(
            policy_chosen=self.policy_chosen,
            policy_rejected=self.policy_rejected,
            ref_chosen=self.ref_chosen,
            ref_rejected=self.ref_rejected,
            chosen_lengths=self.chosen_lengths,
            rejected_lengths=self.rejected_lengths,
        )
        if self.policy_chosen.dim() != 1:
            raise ValueError(
                "log-probabilities must be summed over each answer, [batch], not"
                f" {list(self.policy_chosen.shape)}: see sequence_logprobs"
            )

    @property
    def chosen(self) -> Tensor:
        """c = log pi - log pi_ref of the chosen answers."""
        return self.policy_chosen - self.ref_chosen

    @property
    def rejected(self) -> Tensor:
        """r = log pi - log pi_ref of the rejected answers."""
        return self.policy_rejected - self.ref_rejected

    @property
    def margin(self) -> Tensor:
        """m = beta · (c - r)."""
        return self.beta * (self.chosen - self.rejected)

    @property
    def token_margin(self) -> Tensor:
        """beta · (c / tokens of the chosen answer - r / tokens of the rejected one)."""
        assert self.chosen_lengths is not None and self.rejected_lengths is not None
        return self.beta * (self.chosen / self.chosen_lengths - self.rejected / self.rejected_lengths)


def sigmoid_loss(pairs: PairLogProbs) -> Tensor:
    """-log σ(m); ln 2 at the first step (Rafailov et al., 2023)."""
    return -F.logsigmoid(pairs.margin)


def hinge_loss(pairs: PairLogProbs) -> Tensor:
    """max(0, 1 - m) (Zhao et al., "SLiC-HF", 2023)."""
    return F.relu(1 - pairs.margin)


def ipo_loss(pairs: PairLogProbs) -> Tensor:
    """(c - r - 1 / (2 beta))², c and r per token where lengths are given (Azar et al., 2023)."""
    margin = pairs.margin if pairs.chosen_lengths is None else pairs.token_margin
    return (margin / pairs.beta - 1 / (2 * pairs.beta)).square()


def exo_pair_loss(pairs: PairLogProbs) -> Tensor:
    """KL of (σ(m), σ(-m)) from (1 - e, e) (Ji et al., "EXO", 2024)."""
    log_win = F.logsigmoid(pairs.margin)
    log_loss = F.logsigmoid(-pairs.margin)
    win = log_win.exp() * (log_win - math.log1p(-pairs.smoothing))
    return win + log_loss.exp() * (log_loss - math.log(pairs.smoothing))


def nca_pair_loss(pairs: PairLogProbs) -> Tensor:
    """-log σ(beta c) - ½ log σ(-beta c) - ½ log σ(-beta r) (Chen et al., "NCA", 2024)."""
    chosen_reward = pairs.beta * pairs.chosen
    rejected_reward = pairs.beta * pairs.rejected
    preferred = -F.logsigmoid(chosen_reward)
    return preferred - 0.5 * F.logsigmoid(-chosen_reward) - 0.5 * F.logsigmoid(-rejected_reward)


def robust_loss(pairs: PairLogProbs) -> Tensor:
    """(-(1 - e) log σ(m) + e log σ(-m)) / (1 - 2e) (Chowdhury et al., 2024).

    An unbiased estimate of `sigmoid_loss` on the true labels, where each label is flipped with probability e.
    """
    e = pairs.smoothing
    return (-(1 - e) * F.logsigmoid(pairs.margin) + e * F.logsigmoid(-pairs.margin)) / (1 - 2 * e)


def bco_pair_loss(pairs: PairLogProbs) -> Tensor:
    """-log σ(beta c) - log σ(-beta r) (Jung et al., "BCO", 2024, without its moving mean)."""
    return -F.logsigmoid(pairs.beta * pairs.chosen) - F.logsigmoid(-pairs.beta * pairs.rejected)


def sppo_hard_loss(pairs: PairLogProbs) -> Tensor:
    """(c - 1 / (2 beta))² + (r + 1 / (2 beta))² (Wu et al., "SPPO", 2024)."""
    target = 0.5 / pairs.beta
    return (pairs.chosen - target).square() + (pairs.rejected + target).square()


def _smoothed_sigmoid(margin: Tensor, e: float) -> Tensor:
    """-(1 - e) log σ(margin) - e log σ(-margin)."""
    return -F.logsigmoid(margin) * (1 - e) - F.logsigmoid(-margin) * e


def aot_loss(pairs: PairLogProbs) -> Tensor:
    """-(1 - e) log σ(beta d) - e log σ(-beta d), where d compares whole distributions.

    Over the batch the policy's differences of chosen and rejected are sorted, and so are the reference's; d
    is the difference of the two sorted lists (Melnyk et al., "AOT", 2024).
    """
    policy = (pairs.policy_chosen - pairs.policy_rejected).sort().values
    reference = (pairs.ref_chosen - pairs.ref_rejected).sort().values
    return _smoothed_sigmoid(pairs.beta * (policy - reference), pairs.smoothing)


def aot_unpaired_loss(pairs: PairLogProbs) -> Tensor:
    """As `aot_loss`, with d the difference of the sorted c and the sorted r (Melnyk et al., "AOT", 2024)."""
    difference = pairs.chosen.sort().values - pairs.rejected.sort().values
    return _smoothed_sigmoid(pairs.beta * difference, pairs.smoothing)


def apo_zero_loss(pairs: PairLogProbs) -> Tensor:
    """1 - σ(beta c) + σ(beta r) (D'Oosterlinck et al., "APO", 2024)."""
    return 1 - (pairs.beta * pairs.chosen).sigmoid() + (pairs.beta * pairs.rejected).sigmoid()


def apo_down_loss(pairs: PairLogProbs) -> Tensor:
    """σ(beta c) + 1 - σ(m) (D'Oosterlinck et al., "APO", 2024)."""
    return (pairs.beta * pairs.chosen).sigmoid() + 1 - pairs.margin.sigmoid()


def discopop_loss(pairs: PairLogProbs) -> Tensor:
    """-log σ(m) (1 - s) + exp(-m) s, with s = σ(m / tau) (Lu et al., "DiscoPOP", 2024)."""
    margin = pairs.margin
    share = (margin / pairs.tau).sigmoid()
    return -F.logsigmoid(margin) * (1 - share) + torch.exp(-margin) * share


def sft_loss(pairs: PairLogProbs) -> Tensor:
    """-log pi(chosen), per token over the batch: learning the chosen answers alone, without a reference."""
    assert pairs.chosen_lengths is not None
    return -pairs.policy_chosen * len(pairs.policy_chosen) / pairs.chosen_lengths.sum()


def sigmoid_norm_loss(pairs: PairLogProbs) -> Tensor:
    """`sigmoid_loss` with c and r per token (Meng et al., "SimPO", 2024, which has no reference)."""
    return -F.logsigmoid(pairs.token_margin)


LOSS_FUNCTIONS: dict[str, Callable[[PairLogProbs], Tensor]] = {
    "sigmoid": sigmoid_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "exo_pair": exo_pair_loss,
    "nca_pair": nca_pair_loss,
    "robust": robust_loss,
    "bco_pair": bco_pair_loss,
    "sppo_hard": sppo_hard_loss,
    "aot": aot_loss,
    "aot_unpaired": aot_unpaired_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "discopop": discopop_loss,
    "sft": sft_loss,
    "sigmoid_norm": sigmoid_norm_loss,
}
DPO_LOSSES = tuple(LOSS_FUNCTIONS)
"""What `dpo_loss` takes as its loss_type."""
SMOOTHED_LOSSES = ("robust", "exo_pair", "aot", "aot_unpaired")
"""Those that take a label_smoothing."""


def dpo_problems(loss_type: str, label_smoothing: float = 0.0) -> list[str]:
    """What is wrong with these settings of `dpo_loss`, a clause for each problem; [] for a valid choice.

    >>> dpo_problems("robust", 0.1), dpo_problems("robust", 0.5)
    ([], ['label_smoothing=0.5: for robust it must be from 0 up to, not including, 0.5'])
    """
    if loss_type not in DPO_LOSSES:
        return [f"loss_type={loss_type!r}: must be one of {', '.join(DPO_LOSSES)}"]
    given = f"label_smoothing={label_smoothing}"
    if loss_type == "exo_pair":
        allowed = "above 0 and below 0.5; 0.001 is usual"
        in_range = 0 < label_smoothing < 0.5
    else:
        allowed = "from 0 up to, not including, 0.5"
        in_range = 0 <= label_smoothing < 0.5
    if not in_range:
        return [f"{given}: for {loss_type} it must be {allowed}"]
    if label_smoothing and loss_type not in SMOOTHED_LOSSES:
        return [
            f"{given}: {loss_type} has none; leave it at 0, or choose one of {', '.join(SMOOTHED_LOSSES)}"
        ]
    return []


def dpo_loss(  # noqa: PLR0917 - six positional parameters are the published signature
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    *,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    tau: float = 0.05,
) -> Tensor:
    """Loss for each pair, [batch], from the summed log-probabilities of its two answers.

    The four tensors are [batch]: of the chosen and of the rejected answers, by the policy and by the
    reference, to which no gradient goes. loss_type: one of `DPO_LOSSES`; the function of this module that is
    named after it, such as `hinge_loss`, has its formula and source. label_smoothing: the probability that a
    pair's label is wrong, for `SMOOTHED_LOSSES`. lengths: the answers' numbers of tokens, [batch], which
    sigmoid_norm and sft need and ipo can use. tau: for discopop.

    Raises ValueError for an unknown type, a beta that is not above 0, a label_smoothing that the type does
    not take (see `dpo_problems`), other shapes than [batch], and lengths that are needed and not given.
    """
    problems = dpo_problems(loss_type, label_smoothing)
    if problems:
        raise ValueError("; ".join(problems))
    if not 0 < beta < math.inf:
        raise ValueError(f"beta={beta}: must be above 0; 0.1 is usual")
    _check_lengths(loss_type, chosen_lengths is not None, rejected_lengths is not None)
    pairs = PairLogProbs(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        ref_chosen=ref_chosen.detach(),
        ref_rejected=ref_rejected.detach(),
        beta=beta,
        smoothing=label_smoothing,
        tau=tau,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    return LOSS_FUNCTIONS[loss_type](pairs)


def _check_lengths(loss_type: str, has_chosen: bool, has_rejected: bool) -> None:
    """Raises ValueError where a loss per token lacks the numbers of tokens."""
    if loss_type == "ipo" and has_chosen != has_rejected:
        raise ValueError(
            "ipo is per token where it is given lengths: give both chosen_lengths and rejected_lengths"
            " [batch], or neither"
        )
    needed = {"sft": has_chosen, "sigmoid_norm": has_chosen and has_rejected}
    if not needed.get(loss_type, True):
        raise ValueError(
            f"{loss_type} is per token: give chosen_lengths and rejected_lengths, the answers' numbers of"
            " tokens [batch]"
        )
