"""What the tests of this folder share: fixtures."""

import pytest
from lm_eval.models.huggingface import HFLM

from shared.models.gpt import GPT
from tests.zero_shot.helpers import BLOCK, gpt2, llama, same_tokenizer


@pytest.fixture(scope="module", params=[gpt2, llama], ids=["GPT-2", "Llama"])
def pair(request) -> tuple[GPT, HFLM]:
    """A random model of ours, and lm-eval's own wrapper round the same one of Hugging Face's."""
    ours, theirs = request.param()
    return ours, HFLM(pretrained=theirs, tokenizer=same_tokenizer(), batch_size=3, max_length=BLOCK)


@pytest.fixture(scope="module")
def model() -> GPT:
    return gpt2()[0]
