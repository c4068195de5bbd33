"""shared/adapters/prompts.py: soft prompts, against text in their place and against the library PEFT."""

from copy import deepcopy

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from shared.adapters import load_adapter, save_adapter
from shared.adapters.peft_files import WEIGHTS
from shared.adapters.prompts import add_prompt
from shared.models.pretrained import from_hf
from shared.quantization import quantize
from shared.sampling import generate
from shared.tokenizers import CharTokenizer
from tests.adapters.helpers import (
    GPT2,
    LLAMA,
    TARGETS,
    assert_same_bits,
    base_bits,
    bits,
    close,
    gpt,
    hf,
    learn,
)


@pytest.mark.parametrize("family", TARGETS)
def test_prompts_are_pefts_both_ways(family, tmp_path, idx):
    base = hf(family)
    config = peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    theirs = learn(peft.get_peft_model(deepcopy(base), config).eval())
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_adapter(from_hf(base), tmp_path / "theirs")
    close(model(idx), theirs(idx).logits[:, 5:])
    learn(model, seed=7)
    save_adapter(model, tmp_path / "ours")
    for side in ("ours", "theirs"):
        assert load_file(tmp_path / side / WEIGHTS).keys() == {"prompt_embeddings"}
    again = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path / "ours").eval()
    close(again(idx).logits[:, 5:], model(idx))


def test_a_prompt_of_tokens_is_those_tokens(idx):
    model = gpt(GPT2)
    text = torch.tensor([[7, 8, 9, 7]]).expand(len(idx), -1)
    expected = model(torch.cat([text, idx], dim=1))[:, 4:]
    plain = model(idx)
    tuned = add_prompt(model, 4, [7, 8, 9])
    assert torch.equal(tuned(idx), expected)
    assert torch.equal(tuned.model(idx), plain)


def test_only_the_prompt_is_trained(idx):
    model = gpt(GPT2)
    before = bits(model)
    tuned = add_prompt(model, 3)
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], 0.1)
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(tuned(idx)[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert [n for n, p in tuned.named_parameters() if p.requires_grad] == ["model.token_embedding.prompt"]
    after = base_bits(tuned.model)
    assert_same_bits({name: t for name, t in after.items() if not name.endswith(".prompt")}, before)


@pytest.mark.parametrize("config", [GPT2, LLAMA])
def test_text_is_written_after_a_prompt(config):
    """Past block_size too, where the model begins anew with the text's last half, behind the prompt."""
    tuned = add_prompt(gpt(config), 6)
    assert tuned.config.block_size == 18
    ids = list(generate(tuned, [1, 2], 40, temperature=0))
    assert ids == list(generate(tuned, [1, 2], 40, temperature=0, use_cache=False))
    assert max(ids) < 53
    tuned.tokenizer = CharTokenizer("".join(map(chr, range(97, 97 + 53))))
    assert tuned.generate("bc", 5, temperature=0) == tuned.tokenizer.decode(ids[:5])


def test_a_prompt_round_a_quantized_model(idx):
    model = quantize(gpt(GPT2), "nf4", 32, say=lambda line: None, kernels=())
    expected = model(torch.cat([torch.full((3, 2), 5), idx], dim=1))[:, 2:]
    close(add_prompt(model, 2, [5])(idx), expected)


TOO_LONG = torch.zeros(1, 21, dtype=torch.int64)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda m: add_prompt(m, 0), "num_virtual_tokens=0: must be at least 1"),
        (lambda m: add_prompt(m, 24), "leaves no room for text in block_size=24"),
        (lambda m: add_prompt(m, 2, [53]), "from 0 to 52"),
        (lambda m: add_prompt(m, 2, []), "at least one"),
        (lambda m: add_prompt(add_prompt(m, 2).model, 2), "has a soft prompt already"),
        (lambda m: add_prompt(m, 4)(TOO_LONG), "21 tokens do not fit in block_size=20"),
    ],
)
def test_prompts_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make(gpt(GPT2))
