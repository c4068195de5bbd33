"""shared/serving/chat.py: the answers are the sampler's, and a conversation survives whatever is typed."""

import pytest

from shared import checkpoint
from shared.models.chat import chat_prompt
from shared.sampling import generate
from shared.sampling.penalties import Penalties
from shared.serving import chat
from shared.serving.chat import ChatSettings, Conversation
from shared.serving.engine import Engine
from shared.tokenizers import CharTokenizer
from tests.serving.helpers import ENDS, TOKENIZER, gpt, reference

SHORT = {"system": "x", "temperature": 0, "max_tokens": 8, "repetition_penalty": 1.0}


@pytest.fixture
def engine():
    with_one_slot = Engine(gpt(), slots=1)
    yield with_one_slot
    with_one_slot.close()


def said(ids: list[int], n: int) -> str:
    return TOKENIZER.decode(list(generate(reference(), ids, n, 0, stop=ENDS[1:])))


def test_each_answer_is_the_samplers_after_all_turns(engine):
    conversation = Conversation(engine, TOKENIZER, ChatSettings(**SHORT))
    turns = [{"role": "system", "content": "x"}]
    for question in ("abc", "d"):
        turns.append({"role": "user", "content": question})
        answer = "".join(conversation.answer(question))
        assert answer == said(chat_prompt(TOKENIZER, turns), 8)
        turns.append({"role": "assistant", "content": answer})
        assert conversation.turns == turns[1:]
    conversation.forget()
    assert "".join(conversation.answer("abc")) == turns[2]["content"]


def test_an_answer_that_is_cut_short_stays_a_turn_and_frees_the_slot(engine):
    conversation = Conversation(engine, TOKENIZER, ChatSettings(**SHORT | {"max_tokens": 60}))
    writing = conversation.answer("abc")
    first = next(writing)
    writing.close()
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"]
    assert conversation.turns[1]["content"] == first
    assert engine.wait_idle(10)


def test_the_oldest_turns_go_where_there_is_no_room(engine):
    conversation = Conversation(engine, TOKENIZER, ChatSettings(**SHORT))
    for _ in range(12):
        "".join(conversation.answer("abc"))
    assert conversation.dropped and conversation.turns[0]["role"] == "user"
    ids = chat_prompt(TOKENIZER, [{"role": "system", "content": "x"}, *conversation.turns[:-1]])
    assert len(ids) + 8 <= engine.max_length
    turns = list(conversation.turns)
    with pytest.raises(ValueError, match="say it in fewer words"):
        next(conversation.answer("abc " * 200))
    assert conversation.turns == turns


def test_a_conversation_in_the_terminal(engine, tmp_path, monkeypatch, capsys):
    folder = checkpoint.save(gpt(), tmp_path / "tiny", TOKENIZER)
    typed = iter(["abc", "", "/new", "abc", "abc " * 200])

    def read(_):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    chat.chat_in_terminal(ChatSettings(model=str(folder), device="cpu", **SHORT))
    printed = capsys.readouterr()
    talk = [{"role": "system", "content": "x"}, {"role": "user", "content": "abc"}]
    assert printed.out.count(said(chat_prompt(TOKENIZER, talk), 8)) == 2
    assert "error: that is " in printed.err and printed.err.count("tokens a second") == 2


def test_a_model_that_cannot_converse_is_refused(tmp_path):
    letters = CharTokenizer.train("abc")
    folder = checkpoint.save(gpt(), tmp_path / "letters", letters)
    with pytest.raises(ValueError, match="never trained to converse"):
        chat.chat_in_terminal(ChatSettings(model=str(folder), device="cpu"))


def test_settings_are_checked():
    with pytest.raises(ValueError, match="max_tokens"):
        ChatSettings(max_tokens=0)
    with pytest.raises(ValueError, match="repetition_penalty=0"):
        ChatSettings(repetition_penalty=0)
    assert not Penalties(repetition=ChatSettings().repetition_penalty).change_nothing
