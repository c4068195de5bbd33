"""Week 10. Learning from preferences and rewards: reward models, PPO, DPO and GRPO.

`logprobs`, `policy` and `dpo` hold pure functions, each of which is one formula; `loops` trains with them;
`rewards` has what is to be learned. Throughout the package:

- `ids` are int64 [batch, time]: a prompt, its answer, and padding to the right.
- `mask` is bool [batch, time], True at the answer's tokens.
- What belongs to a prediction (log-probabilities, values, rewards) has the shape [batch, time - 1], and entry
  t is about token t + 1; its mask is mask[:, 1:].
- Log-probabilities and KL divergences are in nats.
"""

from shared.alignment.dpo import dpo_loss
from shared.alignment.policy import gae, grpo_loss, ppo_loss

__all__ = ["dpo_loss", "gae", "grpo_loss", "ppo_loss"]
