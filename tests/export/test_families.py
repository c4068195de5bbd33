"""Today's families in GGUF: read again, and run by llama.cpp."""

import importlib.util

import pytest
import torch

from shared.export import to_gguf
from shared.models.family import canonical
from shared.models.gpt import GPT
from shared.models.pretrained import from_gguf
from shared.sampling import generate
from tests.export.helpers import NEW, TEXT, bpe
from tests.family_configs import FAMILIES
from tests.helpers import shake


@pytest.fixture(params=FAMILIES, scope="module")
def model(request) -> GPT:
    torch.manual_seed(0)
    model = shake(GPT(FAMILIES[request.param]))
    with torch.no_grad():  # or the output, which is the same matrix, only repeats what was read
        model.token_embedding.weight /= model.config.embedding_scale
    return model


def test_it_is_read_again_as_it_was_written(model, tmp_path):
    back = from_gguf(to_gguf(model, tmp_path / "m.gguf", bpe(), "F32"))
    given, read = canonical(model.config), canonical(back.config)
    assert abs(given.norm_eps - read.norm_eps) < 1e-9  # GGUF has it in 32 bits
    assert read.__dict__ | {"norm_eps": given.norm_eps} == given.__dict__
    for (name, before), (_, after) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        torch.testing.assert_close(after, before, atol=1e-6, rtol=0, msg=name)


if importlib.util.find_spec("xllamacpp"):
    from tests.export.test_huggingface import llama_cpp

    def test_llama_cpp_writes_the_same_64_tokens(model, tmp_path):
        ids = bpe().encode(TEXT)[:20]
        new = list(generate(model, ids, NEW, temperature=0))
        with torch.inference_mode():
            best = model(torch.tensor([ids + new]))[0, len(ids) - 1 : -1].topk(2).values
        apart = (best[:, 0] - best[:, 1]).min()
        assert apart > 1e-4 and len(set(new)) > 10, apart
        run = llama_cpp(to_gguf(model, tmp_path / "m.gguf", bpe(), "F32"))
        assert run.complete(ids, NEW)["tokens"] == new
