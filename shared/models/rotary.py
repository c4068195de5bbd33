"""Week 4. Rotary position embedding (RoPE), and how it is stretched for longer texts.

Sources: Su et al., "RoFormer" (2021); for the scalings see `shared.models.config.RopeScaling`.
"""

import math

import torch
from torch import Tensor, nn

from shared.models.attention import Rotation
from shared.models.config import RopeScaling


def frequencies(
    dim: int, theta: float, scaling: RopeScaling | None = None, length: int | Tensor = 0
) -> Tensor:
    """By how much each pair of `dim` channels turns from one position to the next, in radians: [dim / 2].

    Channel pair i turns by theta^(-2i / dim), which `scaling` changes. length: of the text, in tokens; only
    dynamic scaling asks for it, and may be given one for each row: [rows, 1] -> [rows, dim / 2].
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    if scaling is None:
        return theta**-exponents
    if scaling.kind == "dynamic":
        return _slower_theta(dim, theta, scaling, length) ** -exponents
    plain = theta**-exponents
    if scaling.kind == "linear":
        return plain / scaling.factor
    return torch.lerp(plain / scaling.factor, plain, _share_of_fast(plain, dim, theta, scaling))


def _slower_theta(dim: int, theta: float, scaling: RopeScaling, length: int | Tensor) -> Tensor:
    """theta for a text of this length: the plain one up to the length of the first training."""
    original = scaling.original_length or 0
    times = torch.as_tensor(length, dtype=torch.float32).clamp(min=original) / original
    return theta * (scaling.factor * times - (scaling.factor - 1)) ** (dim / (dim - 2))


def _share_of_fast(plain: Tensor, dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """1 for channels that turn as before, 0 for those that turn by 1 / factor, and what lies between."""
    original = scaling.original_length or 0
    if scaling.kind == "llama3":
        turns = original * plain / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        return ((turns - low) / (high - low)).clamp(0, 1)

    def pair_with(turns: float) -> float:
        """Which pair of channels, as a fraction, makes so many turns in the original length."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    last = last if last != first else first + 0.001  # as in the reference
    return 1 - ((torch.arange(dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)


class Rotary(nn.Module):
    """Rotary position embedding, in the layout of Hugging Face's Llama.

    Turns each pair of channels (i, i + dim/2) by the angle position · frequency. The score of two positions
    then depends only on their distance. dim: the first so many channels of a head are turned.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, dim: int, block_size: int, theta: float, scaling: RopeScaling | None = None):
        super().__init__()
        self.dim = dim
        self.theta = theta
        self.scaling = scaling
        self.strength = 1.0
        if scaling is not None and scaling.kind == "yarn":
            usual = 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0
            self.strength = usual if scaling.attention_factor is None else scaling.attention_factor
        # Lengths for which the table holds: with dynamic scaling, longer texts turn by other frequencies.
        self.table_length = block_size
        if scaling is not None and scaling.kind == "dynamic":
            self.table_length = min(block_size, scaling.original_length or 0)
        cos, sin = self._table()
        # The tables follow from the configuration, so checkpoints do not keep them.
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _table(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines for every position that the table is for: fp32 [table_length, dim] each."""
        if torch.get_default_device().type == "meta":  # no values (see registry.without_memory)
            return torch.empty(self.table_length, self.dim), torch.empty(self.table_length, self.dim)
        positions = torch.arange(self.table_length, dtype=torch.float32)
        return self._turns(positions, frequencies(self.dim, self.theta, self.scaling))

    def _turns(self, positions: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of position · frequency: [..., dim] each."""
        angle = positions[..., None] * frequency  # [..., dim / 2]
        cos, sin = angle.cos() * self.strength, angle.sin() * self.strength
        # Both halves of a head turn by the same angles; the minus of rotate-half is in the sine's table.
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)

    def _beyond_table(self, positions: Tensor | slice) -> tuple[Tensor, Tensor]:
        """The same for a text that is longer than the table, with dynamic scaling; a row for each length."""
        if isinstance(positions, slice):
            positions = torch.arange(positions.start, positions.stop, device=self.cos.device)
        lengths = positions.amax(-1, keepdim=True) + 1  # [1], or [batch, 1]
        frequency = frequencies(self.dim, self.theta, self.scaling, lengths.cpu()).to(positions.device)
        return self._turns(positions.float(), frequency.unsqueeze(-2) if positions.dim() == 2 else frequency)

    def _is_beyond_table(self, positions: Tensor | slice) -> bool:
        """Whether a text is longer than the table; what does not fit the model is refused elsewhere."""
        if self.scaling is None or self.scaling.kind != "dynamic":
            return False
        longest = positions.stop if isinstance(positions, slice) else int(positions.max()) + 1
        return longest > self.table_length

    def at(self, positions: Tensor | slice) -> Rotation:
        """The rotation for tokens at `positions` ([time] or [batch, time]): a function of [batch, head, time,
        head_dim].
        """
        if self._is_beyond_table(positions):
            cos, sin = self._beyond_table(positions)
        else:
            cos, sin = self.cos[positions], self.sin[positions]
        dim = cos.size(-1)
        half = dim // 2
        if cos.dim() == 3:  # positions differ by row: [batch, time, dim] -> [batch, 1, time, dim]
            cos = cos.unsqueeze(1)
            sin = sin.unsqueeze(1)

        def turned(x: Tensor) -> Tensor:
            y = torch.addcmul(x * cos, x.roll(half, dims=-1), sin)
            return y if y.dtype == x.dtype else y.to(x.dtype)  # the tables are fp32, whatever x is

        def rotate(x: Tensor) -> Tensor:
            if x.size(-1) == dim:
                return turned(x)
            return torch.cat([turned(x[..., :dim]), x[..., dim:]], dim=-1)

        return rotate
