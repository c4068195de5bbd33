"""The numbers in the pictures, against PyTorch and the course's own code."""

import re
from collections import Counter

import pytest
import torch

from shared.adapters.packing import EncodedTalk, Packed, lay_out
from shared.course.pictures import early, formats, tables, training
from shared.evaluation import IGNORED
from shared.models.attention import attention_weights, causal_mask
from shared.quantization.packing import Int4Weight, group_ranges, int4_codes
from shared.tokenizers import BPETokenizer


def numbers(picture, form: str) -> list[float]:
    """Those that a picture shows in this form."""
    return [float(value.replace("−", "-")) for value in re.findall(f">({form})<", picture.svg())]


def test_softmax_is_that_of_pytorch():
    expected = torch.tensor(tables.TABLE[2], dtype=torch.float64).softmax(0)
    assert torch.allclose(torch.tensor(tables.softmax(tables.TABLE[2]), dtype=torch.float64), expected)
    shown = numbers(early.bigram(), r"0\.\d\d")
    assert shown == [round(p, 2) for p in expected.tolist()] and sum(shown) == pytest.approx(1)


def test_the_weights_of_attention_are_those_of_the_course():
    q, k = torch.tensor(tables.QUERIES), torch.tensor(tables.KEYS)
    expected = attention_weights(q, k, causal_mask(4))
    made = torch.tensor(tables.causal_softmax(tables.attention_scores()))
    assert torch.allclose(made, expected, atol=1e-6)
    scores = tables.attention_scores()
    assert torch.allclose(torch.tensor(scores), q @ k.T / 2**0.5, atol=1e-6)
    by_hand = torch.tensor(tables.causal_softmax([[round(score, 1) for score in row] for row in scores]))
    assert torch.equal(by_hand.mul(100).round(), made.mul(100).round())  # from the digits that are printed


def test_the_merges_are_those_that_the_tokenizer_learns_and_makes():
    text = tables.TEXT.replace("␣", " ")
    tokenizer = BPETokenizer.train(text, 256 + len(tables.MERGES), pattern=r"(?s).+")
    assert tuple((a.decode(), b.decode()) for a, b in tokenizer.merges) == tables.MERGES
    tokens = list(tables.TEXT)
    for pair in tables.MERGES:
        ranked = Counter(zip(tokens, tokens[1:])).most_common(2)
        assert ranked[0][0] == pair and ranked[0][1] > ranked[1][1]  # no rule for equals is needed
        tokens = tables.merged(tokens, pair)
    made = [tokenizer.vocab[i].decode().replace(" ", "␣") for i in tokenizer.encode(text)]
    assert tokens == made


def test_the_tokenizer_reads_as_the_picture_does():
    tokenizer = BPETokenizer([(a.encode(), b.encode()) for a, b in tables.ENCODED.merges])
    ids = [int(i) for piece in tables.ENCODED.ids for i in piece]
    assert tokenizer.encode("lower low") == ids
    tokens = [token.replace("␣", " ") for piece in tables.ENCODED.stages[-1] for token in piece]
    assert [tokenizer.vocab[i].decode() for i in ids] == tokens


def test_two_processes_take_the_step_of_the_whole_batch():
    first, second = training.GRADIENTS
    mean = torch.tensor([first, second]).mean(0)
    weights = torch.nn.Parameter(torch.tensor(training.WEIGHTS))
    weights.grad = mean
    torch.optim.SGD([weights], lr=training.LR).step()
    rows = [[*own, *mean.tolist(), *weights.tolist()] for own in (first, second)]
    assert numbers(training.ddp(), r"−?\d\.\d") == pytest.approx(rows[0] + rows[1])


DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8, e4m3": torch.float8_e4m3fn,
    "fp8, e5m2": torch.float8_e5m2,
}


def rounded(words: str) -> float:
    """65504, or a digit and a power of ten in small figures."""
    if "·10" not in words:
        return float(words)
    digit, power = words.split("·10")
    return float(digit) * 10.0 ** int(power.translate(str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")))


@pytest.mark.parametrize("form", formats.FORMATS, ids=lambda form: form.name)
def test_formats_have_the_bits_that_pytorch_says(form):
    # TF32 is a format of products, not of tensors: fp32's exponent, fp16's fraction (NVIDIA's A100 paper).
    info = torch.finfo(DTYPES["fp32"] if form.name == "tf32" else DTYPES[form.name])
    if form.name != "tf32":
        assert 1 + form.exponent + form.fraction == info.bits
        assert 2.0**-form.fraction == info.eps
    assert rounded(form.largest) == pytest.approx(info.max, rel=0.15)
    assert rounded(form.smallest) == pytest.approx(info.smallest_normal, rel=0.3)


def test_what_fp16_loses_is_what_it_loses():
    half = {power: torch.tensor(2.0**power).half().item() for power in formats.gradients_by_size()}
    assert all((half[power] == 0) == (power < formats.FP16[0]) for power in half)
    top = 2.0 ** formats.FP16[1]
    assert torch.tensor(top).half().isfinite() and not torch.tensor(2 * top).half().isfinite()
    assert torch.amp.GradScaler("cpu").get_scale() == 2**formats.SCALE


def test_four_bits_are_those_of_the_course():
    four = tables.FOUR_BITS
    weight = torch.tensor([four.weights])
    scale, zero = group_ranges(weight, 8)
    assert (scale.item(), zero.item()) == (four.scale, four.zero)
    assert int4_codes(weight, scale, zero)[0].tolist() == list(four.codes)
    assert max(abs(a - b) for a, b in zip(four.weights, four.back)) <= four.scale / 2


def test_codes_share_bytes_as_in_the_course():
    codes = torch.tensor(tables.FOUR_BITS.codes)
    weight = torch.cat([torch.tensor(tables.FOUR_BITS.weights), torch.linspace(-1.75, 2, 24)])[None]
    packed = Int4Weight(weight, 32).codes[0, :4].tolist()
    assert packed == [odd << 4 | even for even, odd in zip(codes[::2].tolist(), codes[1::2].tolist())]


def test_packed_talks_are_laid_out_as_in_the_course():
    names = sorted({token for talk in tables.TALKS for token, _ in talk})
    talks = [
        EncodedTalk([names.index(token) for token, _ in talk], [learned for _, learned in talk])
        for talk in tables.TALKS
    ]
    rows, shown = lay_out([talks]), tables.PACKED_ROW
    length = rows.ids.size(1)
    assert [names[i] for i in rows.ids[0].tolist()] == list(shown.ids[:length])
    targets = ["·" if i == IGNORED else names[i] for i in rows.targets[0].tolist()]
    assert targets == list(shown.targets[:length])
    assert rows.texts[0].tolist() == list(shown.texts[:length]) and set(shown.texts[length:]) == {0}
    seen = [[tables.sees(shown.texts, i, j) for j in range(length)] for i in range(length)]
    assert Packed(rows.texts).mask(length, None)[0, 0].tolist() == seen


@pytest.mark.parametrize("schedule", [tables.in_batches, tables.continuous], ids=lambda f: f.__name__)
def test_every_text_is_written_once_in_one_slot(schedule):
    rows = schedule(tables.TEXT_LENGTHS, tables.SLOTS)
    assert len(rows) == tables.SLOTS and len({len(row) for row in rows}) == 1
    for text, length in enumerate(tables.TEXT_LENGTHS):
        places = [
            (slot, step) for slot, row in enumerate(rows) for step, here in enumerate(row) if here == text
        ]
        assert len(places) == length and len({slot for slot, _ in places}) == 1
        assert places[-1][1] - places[0][1] == length - 1  # without a gap
