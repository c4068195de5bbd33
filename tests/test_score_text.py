"""shared.evaluation.score_text against plain loops, `evaluate`, and the loss of transformers."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from shared.evaluation import Evaluation, TextScore, evaluate, score_text, score_texts
from shared.models.bigram import BigramModel, count_bigrams
from shared.models.gpt import GPT, GPTConfig
from shared.tokenizers import CharTokenizer
from tests.helpers import shake
from tests.zero_shot.helpers import BLOCK, TEXT, TOKENIZER, gpt2, llama, one_token

# ---- a long text


def measures(score: TextScore) -> dict[str, float]:
    return {name: getattr(score, name) for name in asdict(Evaluation(0, 0, 0, 0, 0))}


CHARS = CharTokenizer.train(TEXT + "Bär")


@pytest.fixture(scope="module")
def by_characters() -> GPT:
    return shake(GPT(GPTConfig(vocab_size=CHARS.vocab_size, block_size=16, n_layer=2, n_head=2, n_embd=16)))


@pytest.mark.parametrize(
    "length, block_size, stride",
    [(100, 16, 1), (100, 16, 5), (100, 16, 15), (100, 16, 16), (17, 16, 4), (2, 16, 16), (40, 3, 2)],
)
def test_a_sliding_window_scores_each_token_once_with_enough_before_it(
    by_characters, length, block_size, stride
):
    text = "Bär " + TEXT[: length - 4] if length > 4 else TEXT[:length]
    ids = CHARS.encode(text)
    expected = []
    for i in range(1, length):
        begin = max(
            0, math.ceil((i - block_size) / stride) * stride
        )  # of the first window that reaches token i
        assert min(i, block_size - stride + 1) <= i - begin <= block_size
        expected.append(one_token(by_characters, ids[begin : i + 1]))
    loss = -sum(e[0] for e in expected) / len(expected)
    for max_tokens in (1, 100):
        result = score_text(
            by_characters, text, tokenizer=CHARS, stride=stride, block_size=block_size, max_tokens=max_tokens
        )
        assert result.loss == pytest.approx(loss, rel=1e-5) and result.perplexity == pytest.approx(
            math.exp(loss), rel=1e-4
        )
        assert result.bits_per_byte == pytest.approx(
            loss * (length - 1) / math.log(2) / len(text[1:].encode()), rel=1e-5
        )
        assert (
            result.accuracy == pytest.approx(sum(e[1] for e in expected) / len(expected))
            and result.tokens == length - 1
        )


def test_with_a_stride_of_a_whole_block_it_is_evaluate(by_characters):
    text = TEXT[: 16 * 20 + 1]
    tokens = np.array(CHARS.encode(text), dtype=np.uint16)
    expected = evaluate(
        by_characters, tokens, 16, torch.tensor([len(CHARS.vocab[i]) for i in range(CHARS.vocab_size)])
    )
    got = score_text(by_characters, text, tokenizer=CHARS, stride=16)
    assert measures(got) == pytest.approx(asdict(expected), rel=1e-5)
    assert score_text(by_characters, text, tokenizer=CHARS, stride=4).loss != pytest.approx(
        got.loss, rel=1e-3
    )


@pytest.mark.parametrize("stride, block_size", [(1, 1), (7, 7), (3, 50), (64, 64), (10**4, None)])
def test_a_model_that_sees_one_token_only_does_not_care_for_the_window(stride, block_size):
    tokens = np.array(CHARS.encode(TEXT), dtype=np.uint16)
    model = BigramModel.from_counts(count_bigrams(tokens[:500], CHARS.vocab_size))
    expected = evaluate(
        model, tokens, len(tokens) - 1, torch.tensor([len(CHARS.vocab[i]) for i in range(CHARS.vocab_size)])
    )
    got = score_text(model, TEXT, tokenizer=CHARS, stride=stride, block_size=block_size)
    assert measures(got) == pytest.approx(asdict(expected), rel=1e-5)


@pytest.mark.parametrize(
    "text, stride, block_size, message",
    [
        ("abc", 0, None, "stride=0: must be from 1 .* to block_size=16"),
        ("abc", 17, None, "stride=17: must be"),
        ("abc", 9, 8, "stride=9: must be from 1 .* to block_size=8"),
        ("abc", 1, 17, "block_size=17: must be from 1 to the model's 16"),
        ("abc", 1, 0, "block_size=0: must be"),
        ("a", 1, None, "the text has 1 tokens: at least 2 are needed"),
        ("", 1, None, "the text has 0 tokens"),
    ],
)
def test_a_window_that_cannot_be_is_refused(by_characters, text, stride, block_size, message):
    with pytest.raises(ValueError, match=message):
        score_text(by_characters, text, tokenizer=CHARS, stride=stride, block_size=block_size)


# ---- against transformers


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_text_that_fits_has_the_loss_of_transformers(make):
    ours, theirs = make()
    ours.tokenizer = TOKENIZER
    ids = torch.tensor([TOKENIZER.encode(TEXT)[:BLOCK]])
    text = TOKENIZER.decode(ids[0].tolist())
    with torch.no_grad():
        out = theirs(ids, labels=ids)
    score = ours.score(text)
    assert score.loss == pytest.approx(out.loss.item(), rel=1e-5)
    assert score.perplexity == pytest.approx(out.loss.exp().item(), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(
        out.loss.item() * (BLOCK - 1) / math.log(2) / len(TOKENIZER.decode_bytes(ids[0, 1:].tolist()))
    )
    expected = out.logits[0, :-1].log_softmax(-1)
    assert score.ids == tuple(ids[0, 1:].tolist())
    assert score.logprobs == pytest.approx(expected.gather(1, ids[0, 1:, None])[:, 0].tolist(), abs=1e-4)
    assert score.greedy == tuple((expected.argmax(-1) == ids[0, 1:]).tolist())
    assert score.total == pytest.approx(-out.loss.item() * score.tokens, rel=1e-5)


def test_a_long_text_has_the_loss_of_transformers_strided_windows():
    """Their recipe: targets that an earlier window has scored are masked. Half a window is our default."""
    ours, theirs = gpt2()
    ids = torch.tensor([TOKENIZER.encode(TEXT)[: 4 * BLOCK + 5]])
    block_size = BLOCK - 1  # of what is read; their windows hold the last token to be predicted too
    total, done = 0.0, 1
    for begin in range(0, ids.size(1), block_size // 2):
        end = min(begin + BLOCK, ids.size(1))
        labels = ids[:, begin:end].clone()
        labels[:, : done - begin] = -100
        with torch.no_grad():
            total += theirs(ids[:, begin:end], labels=labels).loss.item() * (end - done)
        done = end
        if end == ids.size(1):
            break
    score = score_text(ours, TOKENIZER.decode(ids[0].tolist()), tokenizer=TOKENIZER, block_size=block_size)
    assert score.tokens == ids.size(1) - 1
    assert score.loss == pytest.approx(total / score.tokens, rel=1e-5)


def test_texts_together_have_the_scores_that_they_have_alone(by_characters):
    texts = [TEXT[:90], "Bär", TEXT[30:47], TEXT[5:70]]
    by_characters.tokenizer = CHARS
    for together, text in zip(by_characters.score(texts, stride=4), texts, strict=True):
        alone = by_characters.score(text, stride=4)
        assert together.ids == alone.ids == tuple(CHARS.encode(text)[1:])
        assert together.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
        assert together.text_bytes == alone.text_bytes == len(text[1:].encode())


def test_after_a_beginning_token_the_first_token_is_scored_too(by_characters):
    class Begun(CharTokenizer):
        begins_with = "<s>"
        special_tokens = {"<s>": 0}

    tokenizer = Begun(CHARS.chars)
    score = score_text(by_characters, "Mix", tokenizer=tokenizer)
    assert score.ids == tuple(CHARS.encode("Mix"))
    expected = [one_token(by_characters, [0, *CHARS.encode("Mix")[:n]])[0] for n in (1, 2, 3)]
    assert score.logprobs == pytest.approx(expected, abs=1e-5) and score.text_bytes == 3


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "at least one text"),
        ("abc", "texts='abc': must be a list"),
        (["Mix", 3], "text 1 of 2 is 3: must be a str"),
        (["Mix", "M"], "text 1 of 2 has 1 tokens: at least 2"),
    ],
)
def test_texts_that_cannot_be_scored(by_characters, texts, message):
    with pytest.raises(ValueError, match=message):
        score_texts(by_characters, texts, tokenizer=CHARS)


def test_without_a_tokenizer_nothing_is_scored():
    model = GPT(GPTConfig(vocab_size=9, block_size=4, n_layer=1, n_head=1, n_embd=4))
    with pytest.raises(ValueError, match="no tokenizer"):
        model.score("abc")
