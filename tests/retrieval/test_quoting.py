"""shared/retrieval/quoting.py and spans.py: whatever the model prefers, what is written stands in the
sentence word for word; the question's likelihood is the model's own.
"""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.models.gpt import GPT, GPTConfig
from shared.retrieval.documents import Chunk
from shared.retrieval.evidence import Window
from shared.retrieval.quoting import EXAMPLES, Quoter, SpanForm, examples_for, quoting_parts, relevance
from shared.retrieval.spans import spans
from shared.tokenizers import BPETokenizer
from tests.helpers import shake

TEXT = 'A dog pays 3 tallies, "Aunt Maud" 1,700. | free | 5.1 percent |'
CHUNK = Chunk("fares.md", "Fares", ("Dogs",), f"Nobody swims. {TEXT}")
TOKENIZER = BPETokenizer.train([CHUNK.passage, "Question: Answer:\n"], 290, special_tokens=("<|end|>",))
WINDOW = Window(CHUNK, 14, len(CHUNK.text), 0.5)
CONFIG = GPTConfig(vocab_size=TOKENIZER.vocab_size, block_size=512, n_layer=1, n_head=2, n_embd=16)


def quoter(seed: int = 0) -> Quoter:
    torch.manual_seed(seed)
    return Quoter(shake(GPT(CONFIG)).eval(), TOKENIZER)


def all_spans(text: str, most_words: int = 8) -> set[str]:
    return {text[a:b] for a, ends in spans(text, most_words).items() for b in ends}


def test_spans_stay_in_a_sentence_and_in_a_cell_and_drop_the_marks_around_words():
    found = all_spans(TEXT)
    assert {"3 tallies", "A dog pays 3 tallies", "Aunt Maud", "1,700", "free", "5.1 percent"} <= found
    assert all("|" not in span and not span.endswith((",", ".", '"')) for span in found)
    assert not any("1,700" in span and "free" in span for span in found)
    assert max(len(span.split()) for span in all_spans("one two three four", 3)) == 3
    assert all_spans("| -- |") == {"--"} and all_spans(' . "" ') == set()


@given(st.text(alphabet='ab1 .,|"é渡\n', max_size=40), st.integers(1, 5))
def test_a_span_is_words_of_the_text(text, most_words):
    for start, ends in spans(text, most_words).items():
        assert ends and all(start < end <= len(text) for end in ends)
        assert all(a < b for a, b in pairwise(ends))
        assert all(len(text[start:end].split()) <= most_words for end in ends)


@given(st.data())
def test_what_a_form_allows_is_a_span_of_its_text_whatever_is_drawn(data):
    form = SpanForm(TEXT, TOKENIZER, {TOKENIZER.special_tokens["<|end|>"]})
    written: list[int] = []
    while not form.complete:
        token = data.draw(st.sampled_from(form.allowed()))
        form.push(token)
        if token != TOKENIZER.special_tokens["<|end|>"]:
            written.append(token)
    start, end = form.place
    assert TOKENIZER.decode(written) == f" {TEXT[start:end]}" and TEXT[start:end] in all_spans(TEXT)


def test_a_form_rules_out_all_other_tokens_and_its_copy_goes_its_own_way():
    form = SpanForm(TEXT, TOKENIZER, {TOKENIZER.special_tokens["<|end|>"]})
    masked = form.mask(torch.zeros(TOKENIZER.vocab_size))
    assert masked.isfinite().nonzero().flatten().tolist() == form.allowed()
    other = form.copy()
    other.push(other.allowed()[0])
    assert form.mask(torch.zeros(TOKENIZER.vocab_size)).equal(masked)
    with pytest.raises(ValueError, match="it leaves the text that is quoted"):
        form.push(TOKENIZER.special_tokens["<|end|>"])
    with pytest.raises(ValueError, match="no span to quote"):
        SpanForm(" | ", TOKENIZER, ()).mask(torch.zeros(TOKENIZER.vocab_size))


@pytest.mark.parametrize("seed", range(4))
def test_a_quote_stands_in_its_sentence_and_its_log_probability_is_the_models(seed):
    quote = quoter(seed).quote("What does a dog pay?", [WINDOW])
    assert quote.text in all_spans(TEXT) and CHUNK.text[quote.start : quote.end] == quote.text
    assert WINDOW.start <= quote.start < quote.end <= WINDOW.end and quote.logprob < 0


def test_the_likelihood_is_that_of_the_questions_tokens_after_the_sentence():
    reader = quoter()
    (read,) = reader.ranked("What does a dog pay?", [WINDOW])
    parts = quoting_parts("What does a dog pay?", WINDOW, TOKENIZER)
    ids = [*examples_for(TOKENIZER, 256), *parts.ids]
    logits = reader.model(torch.tensor([ids])).log_softmax(-1)[0]
    first = len(ids) - len(parts.after) - len(parts.question)
    expected = sum(logits[first + i - 1, token].item() for i, token in enumerate(parts.question))
    assert read.likelihood == pytest.approx(expected / len(parts.question), abs=1e-4)
    assert read.relevance == relevance(WINDOW, read.likelihood)
    torch.testing.assert_close(read.logits.log_softmax(-1), logits[-1], atol=1e-4, rtol=1e-4)


def test_sentences_are_ranked_by_relevance_and_only_the_first_are_read():
    windows = [WINDOW, WINDOW._replace(start=0, end=13, score=0.9), WINDOW._replace(score=0.1)]
    reader = quoter()
    found = [read.relevance for read in reader.ranked("Who swims?", windows)]
    assert found == sorted(found, reverse=True) and len(found) == 3
    reader.sentences = 1
    assert reader.quote("Who swims?", windows).window is WINDOW


def test_a_short_context_reads_fewer_examples_and_an_empty_question_is_refused():
    lengths = [len(examples_for(TOKENIZER, room)) for room in (0, 120, 300, 10_000)]
    assert lengths[0] == 0 and lengths == sorted(lengths) and lengths[-1] > 300
    first = TOKENIZER.prompt(EXAMPLES[0])
    assert examples_for(TOKENIZER, len(first)) == first and examples_for(TOKENIZER, len(first) - 1) == []
    with pytest.raises(ValueError, match="there is no question"):
        quoter().quote(" ", [WINDOW])
    assert quoter().quote("Who?", [WINDOW._replace(start=0, end=0)]) is None
    with pytest.raises(ValueError, match="sentences=0: must be at least 1"):
        Quoter(GPT(CONFIG), TOKENIZER, 0)
    assert Quoter(GPT(CONFIG), TOKENIZER, 1).sentences == 1
