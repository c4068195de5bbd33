"""shared/models/config.py: settings that do not go together are refused with what is allowed."""

import pytest

from shared.models.config import GPTConfig, LayerKind, RopeScaling

ROPE = dict(position="rope", norm="rmsnorm")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RopeScaling("ntk", 2.0), "kind='ntk': must be one of linear, dynamic, llama3, yarn"),
        (lambda: RopeScaling("yarn", 2.0), "of kind yarn needs an original_length"),
        (lambda: RopeScaling("llama3", 2.0, 64, low_freq_factor=4.0), "low_freq_factor and beta_slow must"),
        (lambda: LayerKind(window=0), "window=0: must be at least 1"),
        (lambda: LayerKind(rope_theta=0.0), "rope_theta=0.0: must be above 0"),
        (lambda: GPTConfig(**ROPE, head_size=15), "an even head size, not head_size = 15"),
        (
            lambda: GPTConfig(**ROPE, rope_share=0.01),
            "rope_share=0.01 of 64 channels: must be an even",
        ),
        (lambda: GPTConfig(**ROPE, rope_share=1.5), "rope_share=1.5 of 64 channels"),
        (lambda: GPTConfig(window=4, layers=(LayerKind(),)), "window=4 beside layers"),
        (lambda: GPTConfig(layers=(LayerKind(rope=False),)), "need position='rope'"),
        (lambda: GPTConfig(rope_scaling=RopeScaling("linear", 2.0)), "need position='rope'"),
        (lambda: GPTConfig(norm_place="around"), "norm_place='around': must be one of before, after, both"),
        (lambda: GPTConfig(logit_softcap=0.0), "logit_softcap=0.0: must be above 0"),
    ],
)
def test_what_does_not_go_together_is_named(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_kinds_of_layers_are_repeated():
    config = GPTConfig(**ROPE, n_layer=5, layers=(LayerKind(window=4), LayerKind()))
    assert [config.kind_of(layer).window for layer in range(5)] == [4, None, 4, None, 4]
    assert GPTConfig(window=7).kind_of(3) == LayerKind(window=7)
