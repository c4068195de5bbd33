"""Each family of shared/models/families.py against transformers: logits, gradients, cached decoding, and its
way to Hugging Face and back.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.models.pretrained import from_hf, to_hf
from tests.models.families import DYNAMIC, FAMILIES, as_trained, build, ids
from tests.models.helpers import same_tensors


@pytest.fixture(params=FAMILIES, scope="module")
def pair(request):
    """A model of transformers', and the same as ours."""
    theirs = build(request.param)
    return theirs, from_hf(theirs)


def test_its_logits_are_transformers(pair):
    theirs, ours = pair
    with torch.no_grad():
        expected, got = theirs(ids()).logits, ours(ids())
    assert expected.std() > 0.3  # the comparison is worth something
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_its_gradients_are_transformers(pair):
    theirs, ours = pair
    for model, logits in ((theirs, theirs(ids()).logits), (ours, ours(ids()))):
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten()).backward()
    there, here = theirs.get_input_embeddings().weight.grad, ours.token_embedding.weight.grad
    torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("size", [1, 7, 13])
def test_read_in_pieces_it_says_what_it_says_of_the_whole(pair, size):
    _, ours = pair
    cache = ours.new_cache(batch_size=2)
    with torch.no_grad():
        pieces = [ours(piece, cache) for piece in ids().split(size, dim=1)]
        whole = ours(ids())
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_it_goes_to_hugging_face_and_back(pair, tmp_path):
    theirs, ours = pair
    folder = to_hf(ours, tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids()).logits, theirs(ids()).logits, atol=1e-5, rtol=1e-5)
    back = from_hf(folder)
    assert back.config == ours.config and same_tensors(back, ours)


@pytest.mark.parametrize("time", [20, 24, 25, 40, 48])
def test_dynamic_scaling_is_transformers_on_either_side_of_the_first_length(time, tmp_path):
    theirs = as_trained(DYNAMIC)
    ours = from_hf(theirs)
    assert ours.config.block_size == 48
    with torch.no_grad():
        torch.testing.assert_close(ours(ids(time=time)), theirs(ids(time=time)).logits, atol=1e-4, rtol=1e-4)
    assert from_hf(to_hf(ours, tmp_path / "m")).config == ours.config
