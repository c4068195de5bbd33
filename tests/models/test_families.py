"""Each family of shared/models/families.py against transformers and PEFT: logits, gradients, cached decoding,
an adapter, and its way to Hugging Face and back.
"""

from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.adapters import LoRAConfig, add_lora, save_adapter
from shared.models.families import hf_config
from shared.models.pretrained import from_hf, to_hf
from tests.adapters.helpers import learn, load_strictly
from tests.models.families import DYNAMIC, FAMILIES, as_trained, build, ids
from tests.models.helpers import same_tensors


@pytest.fixture(params=FAMILIES, scope="module")
def pair(request):
    """A model of transformers', and the same as ours."""
    theirs = build(request.param)
    return theirs, from_hf(theirs)


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    """Ours, written for Hugging Face."""
    return to_hf(pair[1], tmp_path_factory.mktemp("written") / "m")


@pytest.fixture(scope="module")
def written(folder):
    """The model of transformers' that ours is written as: of the same family; a plain Phi-3 is a Llama."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def test_its_logits_are_transformers(pair):
    theirs, ours = pair
    with torch.no_grad():
        expected, got = theirs(ids()).logits, ours(ids())
    assert expected.std() > 0.3  # the comparison is worth something
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_its_gradients_are_transformers(pair, written):
    theirs, ours = written, pair[1]
    for model, logits in ((theirs, theirs(ids()).logits), (ours, ours(ids()))):
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten()).backward()
    _, layout = hf_config(ours.config)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    named = layout.theirs(gradients, ours.config.head_dim)  # fused and renamed as the weights are
    there = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert named.keys() == there.keys()
    for name, expected in there.items():
        torch.testing.assert_close(named[name], expected, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("size", [1, 7, 13])
def test_read_in_pieces_it_says_what_it_says_of_the_whole(pair, size):
    _, ours = pair
    cache = ours.new_cache(batch_size=2)
    with torch.no_grad():
        pieces = [ours(piece, cache) for piece in ids().split(size, dim=1)]
        whole = ours(ids())
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_its_adapter_is_loaded_by_peft(pair, written, tmp_path):
    ours = pair[1]
    config = LoRAConfig(r=3, lora_alpha=5, target_modules=("all-linear",))
    adapted = learn(add_lora(deepcopy(ours), config))
    loaded = load_strictly(written, save_adapter(adapted, tmp_path))
    with torch.no_grad():
        assert (adapted(ids()) - ours(ids())).abs().max() > 0.01
        torch.testing.assert_close(loaded(ids()).logits, adapted(ids()), atol=1e-4, rtol=1e-4)


def test_it_goes_to_hugging_face_and_back(pair, folder, written):
    theirs, ours = pair
    with torch.no_grad():
        torch.testing.assert_close(written(ids()).logits, theirs(ids()).logits, atol=1e-5, rtol=1e-5)
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
