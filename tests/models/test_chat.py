"""shared/models/chat.py: the ids of transformers, for the chat templates of public models in TRL."""

import pickle
import re

import pytest

from shared.adapters.instructions import ChatTemplate, encode
from shared.models.chat import IM_END, IM_START, chat_prompt, is_chat
from shared.models.tokenizer_files import tokenizer_from_json
from shared.models.tokenizer_gguf import tokenizer_from_gguf
from shared.models.tokenizer_writing import hf_tokenizer_config
from shared.tokenizers import BPETokenizer, Tokenizer
from shared.tokenizers.base import Chat, ends_of
from tests.helpers import synthetic_text
from tests.models.templates import TEMPLATES, TOOL, tokenizers_with

TALK = [
    {"role": "user", "content": " What is 2 + 2?\n"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And <3 + 3?"},
]


@pytest.fixture(scope="module", params=TEMPLATES)
def both(request, tmp_path_factory):
    """A model's tokenizer in ours and in transformers, from the same files."""
    ours, theirs = tokenizers_with(request.param, tmp_path_factory.mktemp(request.param))
    assert is_chat(ours)
    return ours, theirs


def tool_that_says(description: str) -> dict:
    return {"type": "function", "function": TOOL["function"] | {"description": description}}


def theirs_of(tokenizer, messages, **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)


@pytest.mark.slow
def test_conversations_have_the_ids_of_transformers(both):
    ours, theirs = both
    for talk in (TALK[:1], TALK):
        assert chat_prompt(ours, talk) == theirs_of(theirs, talk)


@pytest.mark.slow
def test_system_messages_and_tools_too(both):
    ours, theirs = both
    with_system = [{"role": "system", "content": "Be brief."}, *TALK]
    try:
        want = theirs_of(theirs, with_system)
    except Exception as error:  # some templates refuse a system message: ours says so
        with pytest.raises(ValueError, match=re.escape(str(error)[:20])):
            chat_prompt(ours, with_system)
    else:
        assert chat_prompt(ours, with_system) == want
    assert chat_prompt(ours, TALK, [TOOL]) == theirs_of(theirs, TALK, tools=[TOOL])


@pytest.mark.slow
def test_nobody_speaks_for_another(both):
    """A special token that a user writes is text: none more than the template itself puts there."""
    ours, _ = both
    special = set(ours.special_tokens.values())
    attack = "hi" + "".join(ours.special_tokens) + "you"
    plain, attacked = (chat_prompt(ours, [{"role": "user", "content": said}]) for said in ("hi you", attack))
    assert [i for i in attacked if i in special] == [i for i in plain if i in special]
    assert attack in ours.decode(attacked)
    described = [chat_prompt(ours, TALK, [tool_that_says(said)]) for said in ("hi you", attack)]
    assert [i for i in described[1] if i in special] == [i for i in described[0] if i in special]


@pytest.mark.slow
def test_an_answer_is_learned_up_to_its_end(both):
    ours, theirs = both
    template = ChatTemplate(ours)
    ids, mask = encode(template, TALK[:2])
    learned = [i for i, is_learned in zip(ids, mask) if is_learned]
    assert ours.decode(learned) == "Four." + "".join(ours.decode([i]) for i in template.stop[0])
    assert learned[-1] in ends_of(ours)


@pytest.mark.slow
def test_the_template_goes_along_into_every_format(both, tmp_path):
    ours, _ = both
    ours.save(tmp_path / "tokenizer.json")
    again = [
        Tokenizer.load(tmp_path / "tokenizer.json"),
        pickle.loads(pickle.dumps(ours)),
        tokenizer_from_json(ours.to_hf_json(), hf_tokenizer_config(ours, 512)).tokenizer,
    ]
    for other in again:
        assert chat_prompt(other, TALK) == chat_prompt(ours, TALK) and ends_of(other) == ends_of(ours)


def test_smollm2s_template_needs_no_library_and_keeps_its_fingerprint():
    plain = BPETokenizer.train(synthetic_text(300), 280, special_tokens=[IM_START, IM_END])
    assert plain.chat is None and is_chat(plain)
    assert BPETokenizer.from_json(plain.to_json()).fingerprint == plain.fingerprint
    with pytest.raises(ValueError, match="no place for tools"):
        chat_prompt(plain, TALK, [TOOL])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no such talk') }}", "refuses this conversation: no such talk"),
        ("{{ messages[0", "refuses this conversation"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
    ],
)
def test_a_template_runs_in_a_sandbox(template, said):
    special = {"special_tokens": [IM_START, IM_END]}
    tokenizer = BPETokenizer([], **special, chat=Chat(template, {}))
    with pytest.raises(ValueError, match=said):
        chat_prompt(tokenizer, TALK)


def test_gguf_names_ends_and_template():
    tokenizer = BPETokenizer.train(synthetic_text(300), 282, special_tokens=["<s>", "</s>", "<end>"])
    tokens = tokenizer.to_hf_json()["model"]["vocab"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": [1] * 279 + [3] * 3,
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 279,
        "tokenizer.ggml.eos_token_id": 280,
        "tokenizer.ggml.eot_token_id": 281,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0]['content'] }}{{ eot_token }}",
    }
    found = tokenizer_from_gguf(metadata, 282, "here").tokenizer
    assert ends_of(found) == [280, 281] and found.chat.tokens["bos_token"] == "<s>"
