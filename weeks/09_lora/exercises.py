"""The graded exercises of week 9: loss on answers only, its labels, packing with its mask; LoRA's first
values, output, training step, merge and scale, and the whole layer; DoRA; two adapters in one.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from shared.adapters import attach, instructions, lora, packing
from shared.course.exercise import Exercise, Mistake, NotRight, building, random_int
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import seed_everything


def _adapter(generator: Generator, inputs: int, outputs: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, and an A and a B that have been trained."""
    weight = torch.randn(outputs, inputs, generator=generator)
    a = torch.randn(r, inputs, generator=generator)
    b = torch.randn(outputs, r, generator=generator)
    return weight, a, b


def _fit(weight: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether an A and a B belong to a weight: [r, in] and [out, r] to [out, in]."""
    if not weight.dim() == a.dim() == b.dim() == 2:
        return False
    outputs, inputs = weight.shape
    return a.shape == (b.size(1), inputs) and len(b) == outputs and min(*a.shape, outputs) >= 1


# ---- 1. loss on the answer only


def answer_targets(prompt: Tensor, answer: Tensor, length: int) -> tuple[Tensor, Tensor]:
    return _targets(prompt, answer, length, len(prompt) - 1)


def _targets(
    prompt: Tensor, answer: Tensor, length: int, hidden: int, *, shift: int = 1, padding: int = -100
) -> tuple[Tensor, Tensor]:
    """hidden: how many targets at the beginning do not count. shift: how far a target is ahead of what is
    read. padding: the targets behind the text.
    """
    ids = torch.cat([prompt, answer])
    inputs = torch.zeros(length, dtype=torch.int64)
    targets = torch.full((length,), padding)
    inputs[: len(ids) - 1] = ids[:-1]
    targets[: len(ids) - 1] = ids[shift : len(ids) - 1 + shift]
    targets[:hidden] = -100
    return inputs, targets


def _prompt_counts(prompt: Tensor, answer: Tensor, length: int) -> tuple[Tensor, Tensor]:
    inputs, right = answer_targets(prompt, answer, length)
    everything = _targets(prompt, answer, length, 0)[1]
    return inputs, torch.where(right == -100, everything, -100)


def _target_cases(generator: Generator) -> list[tuple[Tensor, Tensor, int]]:
    def case(prompt: int, answer: int, padding: int) -> tuple[Tensor, Tensor, int]:
        prompt_ids = torch.randint(1, 50, (prompt,), generator=generator)
        answer_ids = torch.randint(1, 50, (answer,), generator=generator)
        return prompt_ids, answer_ids, prompt + answer - 1 + padding

    return [case(3, 2, 2), case(4, 4, 0), case(2, 6, 3), case(6, 1, 1), case(5, 3, 4)]


def _is_asked_and_answered(prompt: Tensor, answer: Tensor, length: int) -> bool:
    return len(prompt) >= 1 and len(answer) >= 1 and length >= len(prompt) + len(answer) - 1


ANSWER_TARGETS = Exercise(
    task="""A model is to learn to answer, not to ask. `prompt` and `answer` are int64 [n] and [m], tokens of
    one text, of which the answer comes second; neither is empty. Return (inputs, targets), both int64
    [length]: position t reads inputs[t] and is to predict targets[t], the next token. Where that token
    belongs to the prompt, the target is -100, which cross_entropy leaves out. The text gives n + m - 1
    positions; those up to `length` are padded, inputs with 0 and targets with -100.""",
    reference=answer_targets,
    cases=_target_cases,
    forbids=(packing.lay_out, instructions.encode),
    valid=_is_asked_and_answered,
    mistakes=(
        Mistake(
            "loss on the prompt",
            lambda prompt, answer, length: _targets(prompt, answer, length, 0),
            "The targets of the prompt count too. The model then spends its few numbers on learning to write"
            " questions, often the same template over and over.",
        ),
        Mistake(
            "the answer's first token does not count",
            lambda prompt, answer, length: _targets(prompt, answer, length, len(prompt)),
            "One target too many is -100. The prompt's last position predicts the first token of the answer,"
            " the one that decides how it begins.",
        ),
        Mistake(
            "the prompt's last token counts",
            lambda prompt, answer, length: _targets(prompt, answer, length, len(prompt) - 2),
            "One target too few is -100: the prompt's last token is predicted from the one before it.",
        ),
        Mistake(
            "not shifted",
            lambda prompt, answer, length: _targets(prompt, answer, length, len(prompt), shift=0),
            "targets[t] is inputs[t]. A position that reads a token can copy it, and the loss falls to zero"
            " without anything learned.",
        ),
        Mistake(
            "the padding counts",
            lambda prompt, answer, length: _targets(prompt, answer, length, len(prompt) - 1, padding=0),
            "The targets behind the text are 0, which is a token like any other. The model learns to write it"
            " without end. Pad with -100.",
        ),
        Mistake(
            "the answer is hidden, not the prompt",
            _prompt_counts,
            "The targets of the answer are -100 and those of the prompt count: it is the other way round.",
        ),
    ),
    hints=(
        (
            "Put both together, and take inputs without the last token and targets without the first. At"
            " which positions is the target in the prompt?"
        ),
        "The prompt has n tokens. The first is nobody's target, so n - 1 targets belong to it.",
        (
            "ids = torch.cat([prompt, answer]); inputs begins with ids[:-1], targets with ids[1:]; then"
            " targets[: len(prompt) - 1] = -100."
        ),
    ),
)


# ---- 2. the labels of a conversation


_Parts = list[tuple[list[int], bool]]


def answer_labels(
    parts: list[tuple[list[int], bool]], end: list[int], block_size: int
) -> tuple[Tensor, Tensor]:
    return _labels(*_joined(parts, end), block_size)


def _joined(parts: _Parts, end: list[int], *, after_all: bool = False) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and which of them are learned. after_all: `end` after each part."""
    ids: list[int] = []
    learned: list[bool] = []
    for part, is_answer in parts:
        added = part + end if is_answer or after_all else part
        ids += added
        learned += [is_answer] * len(added)
    return ids, learned


def _labels(
    ids: list[int], learned: list[bool], block_size: int, *, ahead: int = 1, ignored: int = -100
) -> tuple[Tensor, Tensor]:
    """ahead: how far the label is ahead of what is read."""
    wanted = [i if is_learned else ignored for i, is_learned in zip(ids, learned)]
    wanted += [ignored] * ahead
    read = len(ids) - 1
    return torch.tensor(ids[:-1])[:block_size], torch.tensor(wanted[ahead : read + ahead])[:block_size]


def _end_not_learned(parts: _Parts, end: list[int], block_size: int) -> tuple[Tensor, Tensor]:
    split = [
        piece for ids, is_answer in parts for piece in ((ids, is_answer), (end if is_answer else [], False))
    ]
    return _labels(*_joined(split, []), block_size)


def _last_answer_only(parts: _Parts, end: list[int], block_size: int) -> tuple[Tensor, Tensor]:
    ids, _ = _joined(parts, end)
    last = max((i for i, (_, is_answer) in enumerate(parts) if is_answer), default=-1)
    before, _ = _joined(parts[:last] if last >= 0 else parts, end)
    through, _ = _joined(parts[: last + 1], end)
    learned = [len(before) <= place < len(through) for place in range(len(ids))]
    return _labels(ids, learned, block_size)


def _from_the_first_answer_on(parts: _Parts, end: list[int], block_size: int) -> tuple[Tensor, Tensor]:
    ids, learned = _joined(parts, end)
    begins = learned.index(True) if True in learned else len(ids)
    return _labels(ids, [place >= begins for place in range(len(ids))], block_size)


def _masked_by_what_is_read(parts: _Parts, end: list[int], block_size: int) -> tuple[Tensor, Tensor]:
    ids, learned = _joined(parts, end)
    inputs, everything = _labels(ids, [True] * len(ids), block_size)
    return inputs, torch.where(torch.tensor(learned[:-1])[:block_size], everything, -100)


def _cut_before_the_shift(parts: _Parts, end: list[int], block_size: int) -> tuple[Tensor, Tensor]:
    ids, learned = _joined(parts, end)
    return _labels(ids[:block_size], learned[:block_size], block_size)


def _cut_on_the_left(parts: _Parts, end: list[int], block_size: int) -> tuple[Tensor, Tensor]:
    inputs, labels = answer_labels(parts, end, 10**9)
    return inputs[-block_size:], labels[-block_size:]


def _only_the_ids_are_cut(parts: _Parts, end: list[int], block_size: int) -> tuple[Tensor, Tensor]:
    inputs, labels = answer_labels(parts, end, 10**9)
    return inputs[:block_size], labels


def _labels_cases(generator: Generator) -> list[tuple[_Parts, list[int], int]]:
    def tokens(count: int) -> list[int]:
        return torch.randint(1, 90, (count,), generator=generator).tolist()

    def talk(*sizes: int, first_is_answer: bool = False) -> _Parts:
        return [(tokens(size), (i % 2 == 1) != first_is_answer) for i, size in enumerate(sizes)]

    return [
        (talk(2, 2), [99], 10),
        (talk(3, 2, 2, 3), [98, 99], 30),
        (talk(2, 3, 4, 2), [99], 8),
        (talk(4), [99], 10),
        (talk(3, 2, 3), [97, 98], 20),
        (talk(2, 3, first_is_answer=True), [99], 9),
        (talk(3, 5), [98, 99], 5),
        (talk(1, 2), [99], 2),
        ([*talk(3), (tokens(2), False), *talk(2, 2, first_is_answer=True)], [99], 12),
        (talk(2, 2, 2, 2, 2, 2), [98, 99], random_int(generator, 9, 14)),
    ]


def _is_a_talk(parts: _Parts, end: list[int], block_size: int) -> bool:
    """A block of one position, or an empty part, would be allowed, but shows little."""
    return bool(end) and block_size >= 2 and all(ids for ids, _ in parts) and len(_joined(parts, end)[0]) >= 2


ANSWER_LABELS = Exercise(
    task="""A conversation may have several answers, and is written out in tokens already: `parts` is a list
    of (ids, is_answer) in the order in which they are said. Its text is all of these ids, one part after the
    other, and after each answer the tokens `end`, which tell that the answer is over.

    Return (ids, labels), both int64 of one length: position t reads ids[t], and labels[t] is the token after
    it in the text (the model does not shift anything by itself). All answers are learned, and with each its
    `end`: a model that never learned to stop goes on for ever. Everywhere else the label is -100. The last
    token of the text is not read, since nothing comes after it.

    A text with more than `block_size` positions is cut off on the right: the first `block_size` positions
    stay, each with the label that it had. A conversation without an answer has no label but -100.""",
    reference=answer_labels,
    cases=_labels_cases,
    forbids=(instructions.encode, packing.lay_out),
    valid=_is_a_talk,
    points=2,
    mistakes=(
        Mistake(
            "unshifted labels",
            lambda parts, end, block_size: _labels(*_joined(parts, end), block_size, ahead=0),
            "labels[t] is ids[t], the token that is read there. Hugging Face's models want labels like that,"
            " and shift them inside; this model does not. It would learn to copy what it sees: the loss falls"
            " to zero, and nothing is learned.",
        ),
        Mistake(
            "shifted twice",
            lambda parts, end, block_size: _labels(*_joined(parts, end), block_size, ahead=2),
            "labels[t] is two tokens ahead of ids[t]. That is what comes out where both the data and the"
            " model shift.",
        ),
        Mistake(
            "the end is not learned",
            _end_not_learned,
            "The answers' tokens are learned, and `end` is not. Nothing then tells the model when to stop,"
            " and it goes on until it is cut off.",
        ),
        Mistake(
            "only the last answer is learned",
            _last_answer_only,
            "The earlier answers have no labels. They are answers like the last one: all are learned.",
        ),
        Mistake(
            "everything after the first answer is learned",
            _from_the_first_answer_on,
            "From the first answer on all labels count, so the later questions are learned too.",
        ),
        Mistake(
            "everything is learned",
            lambda parts, end, block_size: _labels(
                _joined(parts, end)[0], [True] * len(_joined(parts, end)[0]), block_size
            ),
            "The questions have labels too, and the model learns to ask.",
        ),
        Mistake(
            "ignored by what is read",
            _masked_by_what_is_read,
            "A label counts where the token that is read belongs to an answer. It is the label itself that"
            " must: an answer's first token is predicted by the question's last.",
        ),
        Mistake(
            "a token like any other for -100",
            lambda parts, end, block_size: _labels(*_joined(parts, end), block_size, ignored=0),
            "The labels that do not count are 0, which is a token: the model learns to say it. cross_entropy"
            " leaves out -100.",
        ),
        Mistake(
            "an end after each part",
            lambda parts, end, block_size: _labels(*_joined(parts, end, after_all=True), block_size),
            "`end` stands behind the questions too. They are given as they are, ends and all.",
        ),
        Mistake(
            "cut off before the shift",
            _cut_before_the_shift,
            "The text was cut to block_size tokens, and shifted then, so that one position is lost."
            " block_size positions need block_size + 1 tokens: shift first.",
        ),
        Mistake(
            "cut off on the left",
            _cut_on_the_left,
            "The last block_size positions were kept. The answer then stands without its question.",
        ),
        Mistake(
            "only the ids are cut off",
            _only_the_ids_are_cut,
            "ids has block_size positions, and labels has more. Both have the same length.",
        ),
    ),
    hints=(
        "Make two lists of one length first: all tokens, and which of them are learned. Then shift.",
        "With ids and learned of n tokens: position t reads ids[t] and has the label ids[t + 1] if"
        " learned[t + 1], else -100, for t up to n - 2. Cut off after that.",
        "for part, is_answer in parts: added = part + end if is_answer else part; ids += added; wanted +="
        " added if is_answer else [-100] * len(added). Then torch.tensor(ids[:-1])[:block_size] and"
        " torch.tensor(wanted[1:])[:block_size].",
    ),
)


# ---- 3. packing


_Example = tuple[Tensor, Tensor]
_Packing = tuple[Tensor, Tensor, Tensor, Tensor]
VOCAB_SIZE = 12
LONGEST_ROW = 32


def pack_examples(
    examples: list[tuple[Tensor, Tensor]], block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _laid_out(_first_fit(examples, block_size), block_size)


def _first_fit(examples: list[_Example], block_size: int, *, last_only: bool = False) -> list[list[_Example]]:
    """Rows of examples. last_only: an example goes into the last row, or into a new one."""
    rows: list[list[_Example]] = []
    for example in examples:
        if len(example[0]) > block_size:
            continue
        considered = rows[-1:] if last_only else rows
        fitting = [row for row in considered if _length(row) + len(example[0]) <= block_size]
        if fitting:
            fitting[0].append(example)
        else:
            rows.append([example])
    return rows


def _length(row: list[_Example]) -> int:
    return sum(len(ids) for ids, _ in row)


def _laid_out(rows: list[list[_Example]], block_size: int) -> _Packing:
    shape = (len(rows), block_size)
    ids = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, -100)
    positions = torch.zeros(shape, dtype=torch.int64)
    mask = torch.eye(block_size, dtype=torch.bool).repeat(len(rows), 1, 1)
    for r, row in enumerate(rows):
        start = 0
        for example_ids, example_labels in row:
            size = len(example_ids)
            part = slice(start, start + size)
            ids[r, part] = example_ids
            labels[r, part] = example_labels
            positions[r, part] = torch.arange(size)
            mask[r, part, part] = torch.ones(size, size).tril().bool()
            start += size
    return ids, labels, positions, mask


def _only_causal(examples: list[_Example], block_size: int) -> _Packing:
    ids, labels, positions, _ = pack_examples(examples, block_size)
    mask = torch.ones(len(ids), block_size, block_size).tril().bool()
    return ids, labels, positions, mask


def _not_causal(examples: list[_Example], block_size: int) -> _Packing:
    ids, labels, positions, mask = pack_examples(examples, block_size)
    return ids, labels, positions, mask | mask.transpose(1, 2)


def _positions_run_on(examples: list[_Example], block_size: int) -> _Packing:
    ids, labels, _, mask = pack_examples(examples, block_size)
    return ids, labels, torch.arange(block_size).repeat(len(ids), 1), mask


def _shifted_as_a_row(examples: list[_Example], block_size: int) -> _Packing:
    ids, labels, positions, mask = pack_examples(examples, block_size)
    lengths = [_length(row) for row in _first_fit(examples, block_size)]
    for r, length in enumerate(lengths):
        labels[r, : length - 1] = ids[r, 1:length]
    return ids, labels, positions, mask


def _shifted_again(examples: list[_Example], block_size: int) -> _Packing:
    again = [(ids, torch.cat([labels[1:], torch.tensor([-100])])) for ids, labels in examples]
    return pack_examples(again, block_size)


def _padding_counts(examples: list[_Example], block_size: int) -> _Packing:
    ids, labels, positions, mask = pack_examples(examples, block_size)
    for r, row in enumerate(_first_fit(examples, block_size)):
        labels[r, _length(row) :] = 0
    return ids, labels, positions, mask


def _padding_sees_nothing(examples: list[_Example], block_size: int) -> _Packing:
    ids, labels, positions, mask = pack_examples(examples, block_size)
    for r, row in enumerate(_first_fit(examples, block_size)):
        mask[r, _length(row) :] = False
    return ids, labels, positions, mask


def _never_full(examples: list[_Example], block_size: int) -> _Packing:
    ids, labels, positions, mask = _laid_out(_first_fit(examples, block_size - 1), block_size)
    return ids, labels, positions, mask


def _too_long_is_cut(examples: list[_Example], block_size: int) -> _Packing:
    return pack_examples([(ids[:block_size], labels[:block_size]) for ids, labels in examples], block_size)


def _one_stream(examples: list[_Example], block_size: int) -> _Packing:
    """The tokens one after the other, cut into rows; an example that crosses the border goes on."""
    rows: list[list[_Example]] = [[]]
    for ids, labels in examples:
        while len(ids):
            room = block_size - _length(rows[-1])
            if not room:
                rows.append([])
                continue
            rows[-1].append((ids[:room], labels[:room]))
            ids, labels = ids[room:], labels[room:]
    return _laid_out(rows, block_size)


def _examples(generator: Generator, *sizes: int) -> list[_Example]:
    """Each begins with a question, whose tokens are not learned."""
    examples = []
    for size in sizes:
        text = torch.randint(1, VOCAB_SIZE, (size + 1,), generator=generator)
        labels = text[1:].clone()
        labels[: random_int(generator, 0, size)] = -100
        examples.append((text[:-1], labels))
    return examples


def _packing_cases(generator: Generator) -> list[tuple[list[_Example], int]]:
    def some() -> list[_Example]:
        return _examples(generator, *(random_int(generator, 1, 9) for _ in range(7)))

    return [
        (_examples(generator, 2, 2), 6),
        (_examples(generator, 3, 4, 2), 7),
        (_examples(generator, 4, 5, 3, 2, 1), 8),
        (_examples(generator, 3, 9, 4), 8),
        (_examples(generator, 5, 5, 5), 5),
        (_examples(generator, *(3, 3, 2, 4, 1, 3)), 10),
        (_examples(generator, 1, 1, 1), 1),
        (_examples(generator, 6, 2), 12),
        (_examples(generator, 7), 5),
        (some(), 8),
        (some(), 13),
    ]


def _can_be_packed(examples: list[_Example], block_size: int) -> bool:
    if not 1 <= block_size <= LONGEST_ROW:
        return False
    for ids, labels in examples:
        if ids.shape != labels.shape or ids.dim() != 1 or not len(ids):
            return False
        if int(ids.min()) < 0 or int(max(ids.max(), labels.max())) >= VOCAB_SIZE:
            return False
        if bool(((labels < 0) & (labels != -100)).any()):
            return False
    return True


def _observe_packing(answer: Any, examples: list[_Example], block_size: int) -> Iterator[tuple[str, Any]]:
    result = answer([(ids.clone(), labels.clone()) for ids, labels in examples], block_size)
    is_four = isinstance(result, tuple | list) and len(result) == 4
    if not is_four or not all(isinstance(part, Tensor) for part in result):
        raise NotRight("it does not return four tensors: (ids, labels, positions, mask).")
    ids, labels, positions, mask = result
    right = _first_fit(examples, block_size)
    yield "ids", ids
    yield "labels", labels
    if ids.shape != (len(right), block_size):
        return
    is_text = torch.zeros(ids.shape, dtype=torch.bool)
    for r, row in enumerate(right):
        is_text[r, : _length(row)] = True
    if positions.shape != ids.shape or positions.dtype != torch.int64:
        yield "positions", positions
        return
    yield "positions", torch.where(is_text, positions, 0)
    if mask.shape != (*ids.shape, block_size) or mask.dtype != torch.bool:
        yield "mask", mask
        return
    yield "mask", mask & is_text.unsqueeze(2)
    _law_of_packing(result, right, is_text)


def _law_of_packing(result: _Packing, rows: list[list[_Example]], is_text: Tensor) -> None:
    """Raises NotRight where a GPT cannot compute with the rows, or its loss is not that of the examples."""
    ids, labels, positions, mask = result
    if bool((~mask.any(2) & ~is_text).any()):
        raise NotRight(
            "a position of the padding may look at nothing. The softmax over nothing is NaN, and NaN reaches"
            " the gradients of the whole model, though the label is -100. Let the padding see itself."
        )
    if bool(((positions < 0) | (positions >= ids.size(1))).any()):
        raise NotRight("a position of the padding has no embedding: it is not from 0 to block_size - 1.")
    if labels.dtype != torch.int64 or labels.shape != ids.shape or ids.dtype != torch.int64 or not rows:
        return
    model = _tiny_gpt()
    with torch.no_grad():
        packed = _summed_loss(model(ids, _Given(positions, mask)), labels)
        alone = sum(
            _summed_loss(model(example.unsqueeze(0)), wanted.unsqueeze(0))
            for row in rows
            for example, wanted in row
        )
    if abs(packed - alone) > 1e-3 * (1 + alone):
        raise NotRight(
            f"a small GPT's loss, summed over the tokens, is {packed:.3f} on the rows and {alone:.3f} on the"
            " examples one by one. They should be equal: no example sees another, and none is lost."
        )


def _summed_loss(logits: Tensor, labels: Tensor) -> float:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()


@cache
def _tiny_gpt() -> GPT:
    """With learned positions, and weights so large that a wrong one shows."""
    seed_everything(0)
    config = GPTConfig(
        vocab_size=VOCAB_SIZE, block_size=LONGEST_ROW, n_layer=1, n_head=2, n_embd=8, position="learned"
    )
    model = GPT(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model


class _Given(packing.Packed):
    """For a GPT, in the place of a cache: these positions [rows, time], and this mask [rows, time, time]."""

    def __init__(self, positions: Tensor, mask: Tensor):
        super().__init__(positions)
        self.given_positions = positions
        self.given_mask = mask

    def positions(self, time: int) -> Tensor:
        return self.given_positions

    def mask(self, time: int, window: int | None) -> Tensor:
        return self.given_mask.unsqueeze(1)


PACK_EXAMPLES = Exercise(
    task="""Examples differ in length, and a batch is a rectangle. Put several into one row, so that little of
    it is padding, and none sees another. `examples` is a list of (ids, labels), both int64 [n], n at least 1
    and another for each; position t of an example reads ids[t] and predicts labels[t], which is shifted
    already, and -100 where it does not count.

    An example goes whole into the first row that has room for it, behind what is there; where none has, a new
    row begins. They are taken in the order in which they are given. One that is longer than `block_size` is
    left out. What is left of a row is padding.

    Return (ids, labels, positions, mask):

    - ids, int64 [rows, block_size]: the examples' ids, and 0 in the padding;
    - labels, int64 [rows, block_size]: theirs, and -100 in the padding;
    - positions, int64 [rows, block_size]: for each token its place in its own example, from 0;
    - mask, bool [rows, block_size, block_size]: mask[row, i, j] is True where position i may look at
      position j: at its own example alone, and there at itself and what is before it.

    The model then computes for each example what it would compute for it alone. In the padding any position
    from 0 to block_size - 1 will do, and any mask with which each place sees at least one other or itself.
    Where no example is left, there are 0 rows.""",
    reference=pack_examples,
    cases=_packing_cases,
    observe=_observe_packing,
    forbids=(packing.pack, packing.lay_out, packing.Packed.mask, packing.Packed.positions),
    valid=_can_be_packed,
    points=3,
    mistakes=(
        Mistake(
            "the mask is only causal",
            _only_causal,
            "An example sees all that stands before it in the row, other examples too. It then learns to go"
            " on from a stranger's text, and the loss depends on who its neighbours are.",
        ),
        Mistake(
            "an example sees its own future",
            _not_causal,
            "Each position sees its whole example, the tokens after it as well: it can read off what it is to"
            " predict.",
        ),
        Mistake(
            "the positions run on",
            _positions_run_on,
            "The positions count along the row. Each example begins at 0: otherwise it is read as if so much"
            " stood before it, and the same text means something else at another place.",
        ),
        Mistake(
            "shifted across the border",
            _shifted_as_a_row,
            "The labels were made from the row: its ids, one place on. An example's last position then learns"
            " the first token of its neighbour, and the questions are learned too. The labels are given with"
            " each example.",
        ),
        Mistake(
            "the labels are shifted again",
            _shifted_again,
            "The labels are one place further on than they were given. They are shifted already.",
        ),
        Mistake(
            "the padding counts",
            _padding_counts,
            "The padding has the label 0, which is a token, and the model learns to write it. -100 is left"
            " out.",
        ),
        Mistake(
            "the padding sees nothing",
            _padding_sees_nothing,
            "In the padding the mask is False everywhere. The softmax over nothing is NaN, and it reaches the"
            " gradients of the whole model.",
        ),
        Mistake(
            "only the last row is open",
            lambda examples, block_size: _laid_out(
                _first_fit(examples, block_size, last_only=True), block_size
            ),
            "An example goes into the last row, or begins a new one. An earlier row may still have room for"
            " a short one: try them all, the first one first.",
        ),
        Mistake(
            "the longest first",
            lambda examples, block_size: pack_examples(
                sorted(examples, key=lambda example: -len(example[0])), block_size
            ),
            "The examples were sorted by length. Fewer rows may be needed so, but the task takes them in the"
            " order in which they come: that was drawn by chance, so that no two are always neighbours.",
        ),
        Mistake(
            "a row is never full",
            _never_full,
            "A row that would be filled to its last place counted as too short. Up to block_size tokens go"
            " in: compare with <=.",
        ),
        Mistake(
            "what is too long is cut off",
            _too_long_is_cut,
            "An example longer than block_size was cut off. The task leaves it out: half an answer teaches to"
            " stop in the middle.",
        ),
        Mistake(
            "one stream, cut into rows",
            _one_stream,
            "The examples were laid end to end and cut into rows, as in week 6. An example that crosses the"
            " border is then torn: its second half is read without the first.",
        ),
        Mistake(
            "rows no wider than they need",
            lambda examples, block_size: _laid_out(
                _first_fit(examples, block_size),
                max((_length(row) for row in _first_fit(examples, block_size)), default=0),
            ),
            "The rows end with the longest of them. All have block_size places.",
        ),
    ),
    hints=(
        "Two steps: first decide which example goes into which row, then lay the rows out. The first needs"
        " only the lengths.",
        "For each example look for the first row with length + n <= block_size. Then, for an example that"
        " takes the places start to start + n of row r: ids[r, start : start + n] = its ids; the positions"
        " are torch.arange(n); the mask is a lower triangle in the square start : start + n.",
        "mask = torch.eye(block_size, dtype=torch.bool).repeat(rows, 1, 1), and for each example part ="
        " slice(start, start + n); mask[r, part, part] = torch.ones(n, n).tril().bool(); start += n.",
    ),
)


# ---- 4. first values


def first_values(noise_a: Tensor, noise_b: Tensor) -> tuple[Tensor, Tensor]:
    return noise_a / math.sqrt(noise_a.shape[1]), torch.zeros_like(noise_b)


def _first_cases(generator: Generator) -> list[tuple[Tensor, Tensor]]:
    def case(inputs: int, outputs: int, r: int) -> tuple[Tensor, Tensor]:
        noise_a = torch.randn(r, inputs, generator=generator)
        return noise_a, torch.randn(outputs, r, generator=generator)

    return [case(6, 4, 2), case(8, 5, 3), case(16, 16, 4), case(12, 7, 2), case(10, 3, 5)]


def _are_noises(noise_a: Tensor, noise_b: Tensor) -> bool:
    return noise_a.dim() == noise_b.dim() == 2 and len(noise_a) == noise_b.size(1) >= 1


FIRST_VALUES = Exercise(
    task="""LoRA adds B A to a weight. Before the first step the model must compute exactly what it did, and
    yet have something to learn from. `noise_a` is float32 [r, in] and `noise_b` float32 [out, r], both drawn
    from N(0, 1). Return (A, B), of these shapes: A has a variance of 1/in, so that A x is about as large as
    x, and B is what makes the sum start where the base is. You need not use both noises.""",
    reference=first_values,
    cases=_first_cases,
    forbids=(lora.LoRA,),
    valid=_are_noises,
    mistakes=(
        Mistake(
            "A and B both random",
            lambda a, b: (a / math.sqrt(a.shape[1]), b / math.sqrt(b.shape[1])),
            "Both are random, so B A is not zero: the model starts as a damaged one, and has first to unlearn"
            " the noise. Make B zero.",
        ),
        Mistake(
            "A and B both zero",
            lambda a, b: (torch.zeros_like(a), torch.zeros_like(b)),
            "Both are zero. The gradient of A is a product with B, and that of B one with A: both stay zero,"
            " and nothing is ever learned.",
        ),
        Mistake(
            "A zero instead of B",
            lambda a, b: (torch.zeros_like(a), b / math.sqrt(b.shape[1])),
            "B A is zero, as it should be, and A would learn. But by convention it is B that starts at zero,"
            " in the paper and in PEFT.",
        ),
        Mistake(
            "B nearly zero",
            lambda a, b: (a / math.sqrt(a.shape[1]), 1e-3 * b),
            "B is small but not zero. The start is then not exactly the base, which is the one thing that can"
            " be tested.",
        ),
        Mistake(
            "divided by the rank",
            lambda a, b: (a / math.sqrt(len(a)), torch.zeros_like(b)),
            "A has a variance of 1/r. Each of its outputs is a sum over the inputs, so it is their number"
            " that must be divided out.",
        ),
        Mistake(
            "variance for standard deviation",
            lambda a, b: (a / a.shape[1], torch.zeros_like(b)),
            "A was divided by in. Its variance is then 1/in²: divide by the square root.",
        ),
    ),
    hints=(
        "B A must be zero, and the gradients of A and B must not both be. Which one of the two is zero?",
        (
            "B is torch.zeros_like(noise_b). Dividing noise by a number divides its variance by the number's"
            " square."
        ),
        "return noise_a / noise_a.shape[1] ** 0.5, torch.zeros_like(noise_b).",
    ),
)


# ---- 5. the output


def lora_output(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    return _output(x, weight, a, b, alpha / len(a))


def _output(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, *, base: float = 1.0) -> Tensor:
    """base: what the base's own output is multiplied by."""
    return base * (x @ weight.T) + scale * (x @ a.T @ b.T)


def _output_cases(generator: Generator) -> list[tuple]:
    def case(rows: int, inputs: int, outputs: int, r: int, alpha: float) -> tuple:
        x = torch.randn(rows, inputs, generator=generator)
        return x, *_adapter(generator, inputs, outputs, r), alpha

    return [
        case(2, 6, 4, 2, 3.0),
        case(3, 5, 5, 3, 8.0),
        case(4, 8, 3, 4, 12.0),
        case(1, 7, 9, 2, 5.0),
        case(5, 16, 10, 8, 16.0),
    ]


def _are_input_and_adapter(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> bool:
    return _fit(weight, a, b) and x.dim() == 2 and x.size(1) == weight.size(1) and alpha > 0


LORA_OUTPUT = Exercise(
    task="""A linear layer with an adapter. `x` is float32 [batch, in], `weight` [out, in] is the layer's, as
    nn.Linear has it, `a` [r, in] and `b` [out, r] are the adapter's. Return x weightᵀ plus the adapter's
    part, which is multiplied by alpha / r: float32 [batch, out].""",
    reference=lora_output,
    cases=_output_cases,
    forbids=(lora.LoRA.forward, lora.LoRALinear.forward),
    valid=_are_input_and_adapter,
    differentiable=True,
    mistakes=(
        Mistake(
            "scale forgotten",
            lambda x, w, a, b, alpha: _output(x, w, a, b, 1.0),
            "B A was added as it is. The factor alpha / r is meant to let one learning rate suit several"
            " ranks.",
        ),
        Mistake(
            "alpha / √r for alpha / r",
            lambda x, w, a, b, alpha: _output(x, w, a, b, alpha / math.sqrt(len(a))),
            "The adapter's part was multiplied by alpha / √r. That is rsLoRA: a good choice, but another one;"
            " a file trained with one scale is wrong with the other.",
        ),
        Mistake(
            "not divided by the rank",
            lambda x, w, a, b, alpha: _output(x, w, a, b, alpha),
            "The adapter's part was multiplied by alpha alone. The scale is alpha / r.",
        ),
        Mistake(
            "divided by the number of inputs",
            lambda x, w, a, b, alpha: _output(x, w, a, b, alpha / a.shape[1]),
            "alpha was divided by a's second dimension, the inputs. The rank is its first.",
        ),
        Mistake(
            "scale on both parts",
            lambda x, w, a, b, alpha: _output(x, w, a, b, alpha / len(a), base=alpha / len(a)),
            "The base's output was multiplied by the scale too. The base stays what it is.",
        ),
        Mistake(
            "base left out",
            lambda x, w, a, b, alpha: _output(x, w, a, b, alpha / len(a), base=0.0),
            "Only the adapter's part is there. It is what changes: add it to x @ weight.T.",
        ),
    ),
    hints=(
        (
            "First down to r numbers with a, then up to out with b. Both are stored as nn.Linear's weight,"
            " [to, from]."
        ),
        "The adapter's part is x @ a.T @ b.T. The rank is a.shape[0].",
        "return x @ weight.T + alpha / a.shape[0] * (x @ a.T @ b.T).",
    ),
    tolerance=1e-4,
)


# ---- 6. a step of training


def lora_step(  # noqa: PLR0917  # what a learner writes, called by position
    x: Tensor, grad: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, lr: float
) -> tuple[Tensor, Tensor, Tensor]:
    new_a = a - lr * scale * (b.T @ grad.T @ x)
    new_b = b - lr * scale * (grad.T @ (x @ a.T))
    return weight, new_a, new_b


def _base_too(x: Tensor, grad: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, new_a, new_b = lora_step(x, grad, weight, *rest)
    lr = rest[-1]
    return weight - lr * grad.T @ x, new_a, new_b


def _b_before_a(
    x: Tensor, grad: Tensor, weight: Tensor, a: Tensor, b: Tensor, *rest: float
) -> tuple[Tensor, Tensor, Tensor]:
    new_b = lora_step(x, grad, weight, a, b, *rest)[2]
    return weight, lora_step(x, grad, weight, a, new_b, *rest)[1], new_b


def _a_before_b(
    x: Tensor, grad: Tensor, weight: Tensor, a: Tensor, b: Tensor, *rest: float
) -> tuple[Tensor, Tensor, Tensor]:
    new_a = lora_step(x, grad, weight, a, b, *rest)[1]
    return weight, new_a, lora_step(x, grad, weight, new_a, b, *rest)[2]


def _scale_in_b_alone(
    x: Tensor, grad: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, lr: float
) -> tuple[Tensor, Tensor, Tensor]:
    return weight, a - lr * (grad @ b).T @ x, lora_step(x, grad, weight, a, b, scale=scale, lr=lr)[2]


def _scale_in_a_alone(
    x: Tensor, grad: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, lr: float
) -> tuple[Tensor, Tensor, Tensor]:
    return weight, lora_step(x, grad, weight, a, b, scale=scale, lr=lr)[1], b - lr * grad.T @ (x @ a.T)


def _only_b(x: Tensor, grad: Tensor, weight: Tensor, a: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return weight, a, lora_step(x, grad, weight, a, *rest)[2]


def _step_cases(generator: Generator) -> list[tuple]:
    def case(rows: int, inputs: int, outputs: int, r: int, *, scale: float, lr: float) -> tuple:
        x = torch.randn(rows, inputs, generator=generator)
        grad = torch.randn(rows, outputs, generator=generator)
        return x, grad, *_adapter(generator, inputs, outputs, r), scale, lr

    return [
        case(3, 6, 4, 2, scale=0.5, lr=0.1),
        case(4, 5, 7, 3, scale=2.0, lr=0.05),
        case(2, 8, 8, 2, scale=4.0, lr=0.02),
        case(6, 4, 9, 1, scale=0.25, lr=0.2),
        case(5, 7, 3, 3, scale=1.5, lr=0.1),
    ]


def _is_a_step(
    x: Tensor, grad: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, lr: float
) -> bool:
    if not _fit(weight, a, b) or not len(x) or scale <= 0 or lr <= 0:
        return False
    return x.shape == (len(x), weight.size(1)) and grad.shape == (len(x), len(weight))


LORA_STEP = Exercise(
    task="""One step of gradient descent for y = x weightᵀ + scale · x aᵀ bᵀ. `x` is float32 [n, in], `grad`
    [n, out] is the loss's gradient with respect to y, `weight` is [out, in], `a` [r, in], `b` [out, r]. What
    LoRA trains moves against its gradient, `lr` times; the rest stays. Return (weight, a, b) after the step.
    Change none of the arguments in place.""",
    reference=lora_step,
    cases=_step_cases,
    forbids=(torch.autograd.grad, torch.autograd.backward),
    valid=_is_a_step,
    mistakes=(
        Mistake(
            "base not frozen",
            _base_too,
            "The weight moved as well. Then it is full fine-tuning: the adapter alone no longer holds what"
            " was learned, and the file that you save and put on the original base is worthless.",
        ),
        Mistake(
            "scale forgotten in the gradient",
            lambda x, grad, weight, a, b, scale, lr: lora_step(x, grad, weight, a, b, scale=1.0, lr=lr),
            "The gradients lack the factor `scale`: y contains scale times B A, so by the chain rule each"
            " gradient does too.",
        ),
        Mistake(
            "scale missing in A's gradient",
            _scale_in_b_alone,
            "B's gradient has the factor `scale`, and A's lacks it. y contains scale times B A, so the"
            " factor is in the gradient of each of the two.",
        ),
        Mistake(
            "scale missing in B's gradient",
            _scale_in_a_alone,
            "A's gradient has the factor `scale`, and B's lacks it. y contains scale times B A, so the"
            " factor is in the gradient of each of the two.",
        ),
        Mistake(
            "B with the new A",
            _a_before_b,
            "A moved first, and B's gradient was computed with the new A. All gradients belong to the values"
            " before the step.",
        ),
        Mistake(
            "A with the new B",
            _b_before_a,
            "B moved first, and A's gradient was computed with the new B. All gradients belong to the values"
            " before the step.",
        ),
        Mistake(
            "only B is trained",
            _only_b,
            "A stayed as it was. LoRA trains both; with B alone it is another method, LoRA-FA.",
        ),
        Mistake(
            "uphill",
            lambda x, grad, weight, a, b, scale, lr: lora_step(x, grad, weight, a, b, scale=scale, lr=-lr),
            "The step goes along the gradient, so that the loss grows. Subtract.",
        ),
        Mistake(
            "mean over the rows",
            lambda x, grad, *rest: lora_step(x, grad / len(x), *rest),
            "The gradients were divided by n. `grad` is that of the loss as it is, and any mean is in it"
            " already.",
        ),
    ),
    hints=(
        "Which two of the three are trained? For y = x mᵀ the gradient of m is gradᵀ x.",
        (
            "b reads x aᵀ: its gradient is scale · gradᵀ (x aᵀ). What comes back through b is grad b: a's"
            " gradient is scale · (grad b)ᵀ x."
        ),
        "return weight, a - lr * scale * (grad @ b).T @ x, b - lr * scale * grad.T @ (x @ a.T).",
    ),
    tolerance=1e-4,
)


# ---- 7. merging, once


def merge_once(weight: Tensor, a: Tensor, b: Tensor, scale: float, merged: bool) -> tuple[Tensor, bool]:
    if merged:
        return weight.clone(), True
    return weight + scale * (b @ a), True


def _merge_cases(generator: Generator) -> list[tuple]:
    def case(size: int, r: int, scale: float, merged: bool) -> tuple:
        return *_adapter(generator, size, size, r), scale, merged

    return [
        case(4, 2, 0.5, False),
        case(6, 3, 2.0, True),
        case(5, 1, 3.0, False),
        case(8, 4, 0.25, True),
        case(7, 2, 1.5, False),
    ]


def _can_be_merged(weight: Tensor, a: Tensor, b: Tensor, scale: float, merged: bool) -> bool:
    return _fit(weight, a, b) and len(weight) == weight.size(1) and scale > 0


MERGE_ONCE = Exercise(
    task="""Merged into the weight, an adapter costs nothing when the model runs. `weight` is float32 [size,
    size], `a` [r, size], `b` [size, r]. If `merged` is False, add the adapter to the weight, times `scale`.
    If it is True, that has been done already: calling twice must change nothing. Return (weight, merged) as
    they are afterwards. Do not change the arguments in place.""",
    reference=merge_once,
    cases=_merge_cases,
    forbids=(lora.LoRALinear.merge, lora.LoRA.product),
    valid=_can_be_merged,
    mistakes=(
        Mistake(
            "merged twice",
            lambda weight, a, b, scale, merged: (weight + scale * (b @ a), True),
            "The adapter was added although `merged` was True. Each call moves the weights further: a model"
            " that is evaluated, saved and evaluated again gets worse each time.",
        ),
        Mistake(
            "scale forgotten",
            lambda weight, a, b, scale, merged: merge_once(weight, a, b, 1.0, merged),
            "B A was added without its scale. The merged model then differs from the one that was trained.",
        ),
        Mistake(
            "A B for B A",
            lambda weight, a, b, scale, merged: merge_once(weight, b.T, a.T, scale, merged),
            "What was added is transposed. The weight is [out, in]: b [out, r] comes first. With a square"
            " weight no error tells you.",
        ),
        Mistake(
            "not noted",
            lambda weight, a, b, scale, merged: (merge_once(weight, a, b, scale, merged)[0], merged),
            "The second value is still what it was. If nobody notes the merge, the next call does it again.",
        ),
        Mistake(
            "the other way round",
            lambda weight, a, b, scale, merged: merge_once(weight, a, b, scale, not merged),
            "It was added when `merged` was True, and left out when it was False.",
        ),
        Mistake(
            "merged, then unmerged",
            lambda weight, a, b, scale, merged: (
                weight + (-scale if merged else scale) * (b @ a),
                not merged,
            ),
            "A second call takes the adapter out again. Merging is not a switch: what is merged stays"
            " merged.",
        ),
    ),
    hints=(
        "What should the weight be if `merged` is True when the function is called?",
        "b @ a has the shape of the weight. The second value is True in either case.",
        "if merged: return weight, True; otherwise return weight + scale * b @ a, True.",
    ),
    tolerance=1e-4,
)


# ---- 8. the whole layer


class LoRALinear(nn.Module):
    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.r = r
        self.alpha = alpha
        self.p = dropout
        self.original: Tensor | None = None
        """The base's weight, while the adapter is merged."""
        self._make()

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y if self.original is not None else y + self._change(x).to(y.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        if self.original is None:
            self.original = self.base.weight.clone()
            self.base.weight += self._scale() * (self.lora_B @ self.lora_A)

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.original is not None:
            self.base.weight.copy_(self.original)
            self.original = None

    # The parts that mistakes exchange.

    def _make(self) -> None:
        self.lora_A = nn.Parameter(torch.empty(self.r, self.base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(self.base.out_features, self.r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def _scale(self) -> float:
        return self.alpha / self.r

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)

    def _change(self, x: Tensor) -> Tensor:
        return self._scale() * (self._dropped(x.to(self.lora_A.dtype)) @ self.lora_A.T @ self.lora_B.T)


LORA_LINEAR_STUB = """class LoRALinear(torch.nn.Module):
    def __init__(
        self,
        base: torch.nn.Linear,
        r: int,
        alpha: float,
        dropout: float = 0.0,
    ):
        super().__init__()
        # self.base: the layer that is given
        # self.lora_A: [r, in_features]
        # self.lora_B: [out_features, r]
        # your code here
        ...

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # x: [..., in_features]; the result: [..., out_features]
        # your code here
        ...

    def merge(self) -> None:
        # your code here
        ...

    def unmerge(self) -> None:
        # your code here
        ...
"""


class _NotDivided(LoRALinear):
    def _scale(self) -> float:
        return self.alpha


class _DividedByTheRoot(LoRALinear):
    def _scale(self) -> float:
        return self.alpha / math.sqrt(self.r)


class _BothZero(LoRALinear):
    def _make(self) -> None:
        super()._make()
        nn.init.zeros_(self.lora_A)


class _BothRandom(LoRALinear):
    def _make(self) -> None:
        super()._make()
        nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))


class _NormalA(LoRALinear):
    def _make(self) -> None:
        super()._make()
        nn.init.normal_(self.lora_A)


class _BaseTrains(LoRALinear):
    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0):
        super().__init__(base, r, alpha, dropout)
        self.base.requires_grad_(True)


class _Exchanged(LoRALinear):
    """A with the shape of B, and the other way round."""

    def _make(self) -> None:
        self.lora_A = nn.Parameter(torch.randn(self.base.in_features, self.r))
        self.lora_B = nn.Parameter(torch.zeros(self.r, self.base.out_features))


class _BaseDropsToo(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        if self.original is not None:
            return self.base(x)
        x = self._dropped(x)
        change = self._scale() * (x.to(self.lora_A.dtype) @ self.lora_A.T @ self.lora_B.T)
        y = self.base(x)
        return y + change.to(y.dtype)


class _DropsAlways(LoRALinear):
    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p)


class _NeverDrops(LoRALinear):
    def _dropped(self, x: Tensor) -> Tensor:
        return x


class _WholeMatrix(LoRALinear):
    def _change(self, x: Tensor) -> Tensor:
        product = self._scale() * (self.lora_B @ self.lora_A)
        return self._dropped(x.to(self.lora_A.dtype)) @ product.T


class _BaseUnderNoGrad(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.base(x)
        return y if self.original is not None else y + self._change(x).to(y.dtype)


class _MergedWithoutScale(LoRALinear):
    @torch.no_grad()
    def merge(self) -> None:
        if self.original is None:
            self.original = self.base.weight.clone()
            self.base.weight += self.lora_B @ self.lora_A


class _MergedTwice(LoRALinear):
    @torch.no_grad()
    def merge(self) -> None:
        if self.original is None:
            self.original = self.base.weight.clone()
        self.base.weight += self._scale() * (self.lora_B @ self.lora_A)


class _AddedOnceMore(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self._change(x).to(y.dtype)


class _Subtracted(LoRALinear):
    @torch.no_grad()
    def unmerge(self) -> None:
        if self.original is not None:
            self.base.weight -= self._scale() * (self.lora_B @ self.lora_A)
            self.original = None


class _KeptWithoutCopy(LoRALinear):
    @torch.no_grad()
    def merge(self) -> None:
        if self.original is None:
            self.original = self.base.weight.detach()
            self.base.weight += self._scale() * (self.lora_B @ self.lora_A)


class _TakenOutUnasked(LoRALinear):
    @torch.no_grad()
    def unmerge(self) -> None:
        if self.original is None:
            self.base.weight -= self._scale() * (self.lora_B @ self.lora_A)
        super().unmerge()


class _KeptFromTheStart(LoRALinear):
    """Goes back to the first weight that was ever merged."""

    first: Tensor | None = None

    @torch.no_grad()
    def merge(self) -> None:
        if self.first is None:
            self.first = self.base.weight.clone()
        super().merge()

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.original is not None:
            self.original = self.first
        super().unmerge()


class _MergedInTheGraph(LoRALinear):
    def merge(self) -> None:
        if self.original is None:
            self.original = self.base.weight.detach().clone()
            self.base.weight += self._scale() * (self.lora_B @ self.lora_A)


class _HalfAdapter(LoRALinear):
    def _make(self) -> None:
        super()._make()
        self.lora_A = nn.Parameter(self.lora_A.detach().to(self.base.weight.dtype))
        self.lora_B = nn.Parameter(self.lora_B.detach().to(self.base.weight.dtype))


class _WiderOutput(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y if self.original is not None else y + self._change(x)


class _TypesMeet(LoRALinear):
    def _change(self, x: Tensor) -> Tensor:
        return self._scale() * (self._dropped(x) @ self.lora_A.T @ self.lora_B.T)


def _layer_cases(generator: Generator) -> list[tuple]:
    def case(*sizes: int, r: int, alpha: float, dropout: float = 0.0, bias: bool = True) -> tuple:
        """sizes: those of x, and the outputs."""
        *shape, outputs = sizes
        weight, a, b = _adapter(generator, shape[-1], outputs, r)
        biases = torch.randn(outputs, generator=generator) if bias else None
        return weight, biases, a, b, alpha, dropout, torch.randn(*shape, generator=generator)

    return [
        case(1, 3, 2, r=2, alpha=16.0),
        case(2, 5, 4, r=3, alpha=2.0, bias=False),
        case(2, 8, 12, r=4, alpha=8.0, dropout=0.5),
        case(2, 3, 6, 5, r=2, alpha=3.0, dropout=0.25),
        case(7, 9, r=2, alpha=5.0, bias=False),
        case(3, 16, 16, r=1, alpha=6.0, dropout=0.1),
        case(4, 10, 1, r=3, alpha=1.0),
    ]


def _is_a_layer(
    weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, alpha: float, dropout: float, x: Tensor
) -> bool:
    if not _fit(weight, a, b) or not x.dim() or not x.numel() or x.size(-1) != weight.size(1):
        return False
    has_bias = bias is None or bias.shape == (len(weight),)
    return has_bias and alpha > 0 and 0 <= dropout < 1


def _plain_layer(weight: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A layer as one gets it: all its parameters are trained."""
    layer = nn.Linear(weight.size(1), len(weight), bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer.to(dtype)


def _observe_layer(  # noqa: PLR0917  # a case, by position
    answer: Any,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    alpha: float,
    dropout: float,
    x: Tensor,
) -> Iterator[tuple[str, Any]]:
    building.takes(answer, "base", "r", "alpha", "dropout")
    right = LoRALinear(_plain_layer(weight, bias), len(a), alpha, dropout).eval()
    right.load_state_dict(right.state_dict() | {"lora_A": a, "lora_B": b})
    base = _plain_layer(torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias))
    layer = building.built(answer, right, base, len(a), alpha, dropout).eval()
    output = layer(x)
    yield "the output", output
    _check_first_values(answer)
    _check_what_is_trained(layer, base)
    yield from _gradients_beside_the_base(layer, x)
    if dropout:
        seed_everything(0)
        yield "the output in training", layer.train()(x)
    layer.eval()
    _check_products(layer, right, x, "beside the base")
    yield from _observe_merging(layer, right, x)
    yield from _observe_half(answer, right, x)


def _check_first_values(answer: Any) -> None:
    """Raises NotRight where a new adapter does not begin as the task says."""
    seed_everything(1)
    fresh = answer(nn.Linear(256, 8), 64, 16.0)
    a, b = fresh.lora_A.detach(), fresh.lora_B.detach()
    if bool(b.any()):
        raise NotRight("lora_B is not zero at the start: the sum W + scale · B A must begin as W, exactly.")
    if not bool(a.any()):
        raise NotRight(
            "lora_A is zero at the start, and so is lora_B: the gradient of each is a product with the other,"
            " so that both stay zero for ever."
        )
    bound = 1 / math.sqrt(256)
    spread = a.std().item() * math.sqrt(3) / bound
    if a.abs().max() > bound * 1.0001 or not 0.97 < spread < 1.03 or abs(a.mean()) > 0.1 * bound:
        raise NotRight(
            f"lora_A does not begin uniform between -1/√in and 1/√in: with 256 inputs the bound is"
            f" {bound:.3f}, and the largest of its numbers is {a.abs().max():.3f}; their deviation is"
            f" {a.std():.3f} where {bound / math.sqrt(3):.3f} is right."
        )
    with torch.no_grad():
        fresh.lora_B.fill_(1.0)
        x = torch.ones(2, 256)
        if not torch.allclose(fresh.train()(x), fresh.eval()(x), atol=1e-4):
            raise NotRight("where no dropout is given, something is dropped in training. Its default is 0.")


def _check_what_is_trained(layer: nn.Module, base: nn.Linear) -> None:
    """Raises NotRight where it is not A and B, and those alone, or the base is a copy."""
    for name, parameter in layer.named_parameters():
        is_adapter = name.startswith("lora_")
        if is_adapter and not parameter.requires_grad:
            raise NotRight(f"`{name}` requires no gradient, and so it is not trained.")
        if not is_adapter and parameter.requires_grad:
            raise NotRight(
                f"`{name}` still requires a gradient: the base is trained along with the adapter. Freeze it,"
                " weight and bias."
            )
    if layer.get_parameter("base.weight") is not base.weight:
        raise NotRight(
            "base.weight is not the weight of the layer that was given but a copy: a model would then hold"
            " it twice. Keep the layer itself."
        )


def _gradients_beside_the_base(layer: Any, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    x = x.clone().requires_grad_()
    output = layer(x)
    if not output.requires_grad:
        raise NotRight("the output is detached from the graph: no gradient reaches A and B.")
    wanted = {"lora_A": layer.lora_A, "lora_B": layer.lora_B, "x": x}
    found = torch.autograd.grad(building.weighted(output), list(wanted.values()), allow_unused=True)
    for name, gradient in zip(wanted, found):
        if gradient is None:
            raise NotRight(f"no gradient reaches {name}: the graph is cut on the way to it.")
        yield f"the gradient of {name}", gradient


def _multiplications(layer: nn.Module, x: Tensor) -> int:
    """Of the matrix products in a forward pass, twice."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    return counter.get_total_flops()


def _check_products(layer: nn.Module, right: nn.Module, x: Tensor, when: str) -> None:
    """Raises NotRight where a forward pass multiplies more than the reference's."""
    if _multiplications(layer, x) <= _multiplications(right, x):
        return
    if when == "merged":
        raise NotRight(
            "merged, a forward pass still computes more than the base's product. Nothing is gained by merging"
            " then."
        )
    raise NotRight(
        "a forward pass multiplies more than it must: x goes through two thin products, first to r numbers,"
        " then up again. B A would be a matrix as large as the weight."
    )


def _observe_merging(layer: Any, right: LoRALinear, x: Tensor) -> Iterator[tuple[str, Any]]:
    merge, unmerge = building.method(layer, "merge"), building.method(layer, "unmerge")
    before = layer.base.weight.detach().clone()
    unmerge()
    if not torch.equal(layer.base.weight, before):
        raise NotRight("unmerge changed the weight of a layer that was not merged. It should do nothing.")
    merge()
    right.merge()
    yield "base.weight after merge", layer.base.weight.detach().clone()
    if layer.base.weight.requires_grad:
        raise NotRight(
            "after merge, base.weight requires a gradient: it was added within the graph. Do it under"
            " torch.no_grad()."
        )
    yield "the output after merge", layer(x)
    _check_products(layer, right, x, "merged")
    merge()
    yield "base.weight after merge, twice", layer.base.weight.detach().clone()
    unmerge()
    right.unmerge()
    yield "base.weight after unmerge", layer.base.weight.detach().clone()
    if not torch.equal(layer.base.weight, before):
        raise NotRight(
            "after merge and unmerge the weight differs from what it was, by rounding: (W + D) - D is not W"
            " in floating point, and in half precision the error is a large one. Keep W while it is merged."
        )
    yield "the output after unmerge", layer(x)
    with torch.no_grad():  # both are trained on
        layer.base.weight.mul_(0.5)
        layer.lora_B.mul_(3)
    merge()
    yield "base.weight after more training, merged", layer.base.weight.detach().clone()
    unmerge()
    yield "base.weight after more training, unmerged", layer.base.weight.detach().clone()


def _observe_half(answer: Any, right: LoRALinear, x: Tensor) -> Iterator[tuple[str, Any]]:
    """On a base in bfloat16."""
    base = _plain_layer(right.base.weight, right.base.bias, torch.bfloat16)
    layer = answer(base, right.r, right.alpha).eval()
    kinds = {parameter.dtype for parameter in (layer.lora_A, layer.lora_B)}
    if kinds != {torch.float32}:
        raise NotRight(
            "on a base in bfloat16, lora_A and lora_B are bfloat16 too. They are trained, and small steps"
            " vanish in a format with three digits: keep them in float32."
        )
    with torch.no_grad():
        layer.lora_A.copy_(right.lora_A)
        layer.lora_B.copy_(right.lora_B)
        wanted = right(x)
        output = layer(x.bfloat16())
        yield "the output's type on a base in bfloat16", str(output.dtype)
        layer.merge()
        yield "base.weight's type after merge, in bfloat16", str(layer.base.weight.dtype)
        merged = layer(x.bfloat16())
    room = 0.05 * (wanted.abs().max() + right.base.weight.abs().max() * x.abs().max())
    for what, found in (("the output", output), ("the output after merge", merged)):
        if (found.float() - wanted).abs().max() > room:
            raise NotRight(f"on a base in bfloat16, {what} is off by more than rounding.")


LORA_LINEAR = Exercise(
    task="""Now the layer itself, as it goes into a model. `LoRALinear(base, r, alpha, dropout)` wraps an
    nn.Linear, which is kept as `self.base`: the same layer, frozen, no copy. Beside it stand two
    parameters in float32, `lora_A` [r, in_features] and `lora_B` [out_features, r], and no others. lora_A
    begins uniform between -1/√in and 1/√in (`nn.init.kaiming_uniform_` with a = √5 does that, as PEFT),
    lora_B as zeros.

    `forward(x)`, x [..., in_features], gives $base(x) + \\frac{alpha}{r} \\cdot x A^T B^T$, by two thin
    products. In training, dropout with probability `dropout` falls on what goes into A, and on nothing else;
    in eval it does nothing. Gradients reach A, B and x, and the base gets none. The base may be in half
    precision: the adapter then computes in float32, and the output has the type of the base's.

    `merge()` puts the change into base.weight, which keeps its type; from then on a forward pass is the
    base's product and nothing more. `unmerge()` takes it out again, and base.weight is what it was, bit for
    bit. What is merged is not merged again, and what is not is not unmerged: such a call does nothing. After
    unmerge, both may be trained on and merged anew.""",
    reference=LoRALinear,
    cases=_layer_cases,
    observe=_observe_layer,
    stub=LORA_LINEAR_STUB,
    forbids=(lora.LoRALinear, lora.LoRA, attach.add_lora),
    valid=_is_a_layer,
    points=3,
    tolerance=1e-4,
    mistakes=(
        Mistake(
            "alpha is not divided by the rank",
            _NotDivided,
            "The change is multiplied by alpha alone. The scale is alpha / r, meant to let one learning rate"
            " suit several ranks.",
        ),
        Mistake(
            "alpha / √r for alpha / r",
            _DividedByTheRoot,
            "The change is multiplied by alpha / √r. That is rsLoRA; a file that was trained with one scale"
            " is wrong with the other.",
        ),
        Mistake(
            "A and B both zero",
            _BothZero,
            "Both begin at zero. The gradient of A is a product with B, and that of B one with A: nothing is"
            " ever learned.",
        ),
        Mistake(
            "B is random too",
            _BothRandom,
            "B A is not zero at the start, so the model begins as a damaged one. B begins at zero.",
        ),
        Mistake(
            "A with a deviation of 1",
            _NormalA,
            "A was drawn from N(0, 1). What it makes of x is then √in times too large, and the first steps"
            " are wild: torch.randn alone knows nothing of the number of inputs.",
        ),
        Mistake(
            "the base is trained too",
            _BaseTrains,
            "The base's weight requires a gradient. The optimizer moves it, and the adapter that is saved no"
            " longer holds what was learned. self.base.requires_grad_(False).",
        ),
        Mistake(
            "the shapes of A and B are exchanged",
            _Exchanged,
            "A is [in, r] and B [r, out]. As nn.Linear keeps [out, in], A is [r, in] and B [out, r]; files of"
            " adapters have them so.",
        ),
        Mistake(
            "dropout on the base's path",
            _BaseDropsToo,
            "The base reads the dropped x. It was trained without, is frozen, and cannot get used to it: only"
            " A reads what is dropped.",
        ),
        Mistake(
            "dropout in eval as well",
            _DropsAlways,
            "It drops when the model is only used, so that two calls differ. F.dropout drops unless it is"
            " told training=self.training; an nn.Dropout module knows by itself.",
        ),
        Mistake(
            "dropout is forgotten",
            _NeverDrops,
            "In training nothing is dropped.",
        ),
        Mistake(
            "B A as a whole matrix",
            _WholeMatrix,
            "B @ A is computed in each forward pass: a matrix as large as the weight, with its gradient. Two"
            " thin products, x Aᵀ and then Bᵀ, give the same for a fraction.",
        ),
        Mistake(
            "the base under no_grad",
            _BaseUnderNoGrad,
            "base(x) was computed under torch.no_grad(), so the gradient of x lacks the base's part, and"
            " the layers below learn the wrong thing. Frozen means that its weight has no gradient; x still"
            " has one.",
        ),
        Mistake(
            "merged without the scale",
            _MergedWithoutScale,
            "merge adds B A, and forward scale times B A: the merged model is another one than the one that"
            " was trained.",
        ),
        Mistake(
            "merged twice",
            _MergedTwice,
            "A second merge adds the change once more. A model that is evaluated, saved and evaluated again"
            " gets worse each time: note that it is merged.",
        ),
        Mistake(
            "merged, and added as well",
            _AddedOnceMore,
            "After merge, forward still adds the adapter, which is in the weight already: it counts twice.",
        ),
        Mistake(
            "subtracted to unmerge",
            _Subtracted,
            "unmerge subtracts what merge added. (W + D) - D is not W in floating point; in half precision"
            " the base is visibly worse after a few rounds. Keep W while it is merged.",
        ),
        Mistake(
            "the weight is kept without a copy",
            _KeptWithoutCopy,
            "What merge keeps is the same memory as base.weight, so adding to the weight changes what was"
            " kept too, and unmerge puts back the merged weight. Keep a clone().",
        ),
        Mistake(
            "unmerged without having been merged",
            _TakenOutUnasked,
            "unmerge took the change out of a weight that it was never put into.",
        ),
        Mistake(
            "back to the first weight",
            _KeptFromTheStart,
            "unmerge goes back to the weight of the first merge, whatever has happened to it since. Keep it"
            " anew at each merge.",
        ),
        Mistake(
            "merged within the graph",
            _MergedInTheGraph,
            "The change was added with gradients on, so that base.weight is now a result of A and B, and no"
            " frozen parameter. Do it under torch.no_grad().",
        ),
        Mistake(
            "the adapter in half precision",
            _HalfAdapter,
            "On a base in bfloat16, A and B are bfloat16 too. A step of training is often smaller than what"
            " that format can add: keep what is trained in float32.",
        ),
        Mistake(
            "the output gets wider",
            _WiderOutput,
            "On a base in bfloat16 the output is float32: the sum of the two types is the wider one. The next"
            " layer expects what the base gave. Bring the change to the base's type before adding.",
        ),
        Mistake(
            "float32 meets bfloat16",
            _TypesMeet,
            "On a base in bfloat16, x is bfloat16 and A is float32, and a product of the two is an error."
            " Bring x to A's type.",
        ),
    ),
    hints=(
        "forward first, unmerged: base(x) plus the scaled change. Then a note of whether it is merged, which"
        " all three methods look at.",
        "change = dropped @ self.lora_A.T @ self.lora_B.T * (alpha / r), with dropped ="
        " self.dropout(x.to(self.lora_A.dtype)); the output is y + change.to(y.dtype). merge keeps"
        " self.base.weight.clone(), and unmerge copies it back.",
        "In merge, under torch.no_grad(): if self.original is None: self.original ="
        " self.base.weight.clone(); self.base.weight += self.scale * self.lora_B @ self.lora_A. In unmerge:"
        " if it is not None: self.base.weight.copy_(self.original); self.original = None. forward returns"
        " base(x) alone while self.original is not None.",
    ),
)


# ---- 9. the same scale at another rank


def alpha_for_rank(alpha: float, r: int, new_r: int, use_rslora: bool) -> float:
    ratio = new_r / r
    return alpha * math.sqrt(ratio) if use_rslora else alpha * ratio


def _alpha_cases(generator: Generator) -> list[tuple[float, int, int, bool]]:
    cases: list[tuple[float, int, int, bool]] = [
        (16.0, 8, 32, False),
        (16.0, 8, 32, True),
        (6.0, 4, 12, True),
        (6.0, 12, 4, False),
    ]
    for use_rslora in (False, True):
        r = random_int(generator, 2, 20)
        cases.append((float(random_int(generator, 3, 40)), r, r + random_int(generator, 1, 50), use_rslora))
    return cases


ALPHA_FOR_RANK = Exercise(
    task="""An adapter of rank `r` was trained with `alpha`. It is rewritten as one of rank `new_r` that
    computes the same: rows of A and columns of B that are zero are added or taken away. The scale of B A,
    which is alpha / r for LoRA and alpha / √r for rsLoRA (`use_rslora`), must not change. Return the alpha to
    write into the new file, a float.""",
    reference=alpha_for_rank,
    cases=_alpha_cases,
    forbids=(lora.lora_scale, lora.LoRAConfig),
    mistakes=(
        Mistake(
            "alpha / r and alpha / √r mixed up",
            lambda alpha, r, new_r, rs: alpha_for_rank(alpha, r, new_r, not rs),
            "You took LoRA's rule for rsLoRA and the other way round. With use_rslora the scale has the"
            " square root.",
        ),
        Mistake(
            "alpha / r always",
            lambda alpha, r, new_r, rs: alpha * new_r / r,
            "use_rslora makes no difference here. With it the scale is alpha / √r, so that alpha grows only"
            " with the square root of the rank.",
        ),
        Mistake(
            "alpha / √r always",
            lambda alpha, r, new_r, rs: alpha * math.sqrt(new_r / r),
            "The square root is taken without use_rslora too. Plain LoRA divides by the rank itself.",
        ),
        Mistake(
            "alpha unchanged",
            lambda alpha, r, new_r, rs: alpha,
            "alpha is what it was. Divided by a larger rank it gives a smaller scale, and the adapter loses"
            " strength.",
        ),
        Mistake(
            "ranks exchanged",
            lambda alpha, r, new_r, rs: alpha_for_rank(alpha, new_r, r, rs),
            "The ratio of the ranks is upside down: a higher rank divides by more, so alpha must be larger.",
        ),
        Mistake(
            "the scale, not alpha",
            lambda alpha, r, new_r, rs: alpha / (math.sqrt(r) if rs else r),
            "This is the scale. Multiply it by new_r, or its root, to get the alpha that gives this scale at"
            " the new rank.",
        ),
    ),
    hints=(
        "Write down the scale before and after, and put them equal.",
        "LoRA: alpha / r = new_alpha / new_r. rsLoRA: alpha / √r = new_alpha / √new_r.",
        "return alpha * (new_r / r) ** (0.5 if use_rslora else 1).",
    ),
)


# ---- 10. DoRA


def dora_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    return _dora(weight + scale * (b @ a), magnitude)


def _dora(directed: Tensor, magnitude: Tensor, lengths: Tensor | None = None) -> Tensor:
    """lengths: what each row is divided by, its own length if not given."""
    if lengths is None:
        lengths = directed.norm(dim=1)
    return (magnitude / lengths)[:, None] * directed


def _normed_columns(w: Tensor, a: Tensor, b: Tensor, s: float, m: Tensor) -> Tensor:
    directed = w + s * (b @ a)
    return directed / directed.norm(dim=0) * m[:, None]


def _along_the_columns(w: Tensor, a: Tensor, b: Tensor, s: float, m: Tensor) -> Tensor:
    directed = w + s * (b @ a)
    return m * directed / directed.norm(dim=1, keepdim=True)


def _dora_cases(generator: Generator) -> list[tuple]:
    def case(inputs: int, outputs: int, r: int, scale: float) -> tuple:
        weight, a, b = _adapter(generator, inputs, outputs, r)
        magnitude = weight.norm(dim=1) * (0.5 + torch.rand(outputs, generator=generator))
        return weight, a, b, scale, magnitude

    return [
        case(4, 4, 2, 0.5),
        case(6, 6, 1, 2.0),
        case(5, 8, 3, 0.25),
        case(9, 3, 2, 1.5),
        case(7, 7, 4, 3.0),
    ]


def _are_rows_and_lengths(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> bool:
    if not _fit(weight, a, b) or magnitude.shape != (len(weight),) or scale <= 0:
        return False
    return bool((magnitude > 0).all())


DORA_WEIGHT = Exercise(
    task="""DoRA learns a row's direction and its length apart. `weight` is float32 [out, in], `a` [r, in],
    `b` [out, r], `magnitude` [out], one length for each output. The direction of a row is that of weight +
    scale · b a; its length is the magnitude. Return the weight that the layer computes with: float32 [out,
    in].""",
    reference=dora_weight,
    cases=_dora_cases,
    forbids=(lora.LoRA.weight_change,),
    valid=_are_rows_and_lengths,
    differentiable=True,
    mistakes=(
        Mistake(
            "length of the base",
            lambda w, a, b, s, m: _dora(w + s * (b @ a), m, w.norm(dim=1)),
            "The rows were divided by the length that the base's rows have. Once B A is added their lengths"
            " are others, so that the result's are not the magnitudes.",
        ),
        Mistake(
            "columns instead of rows",
            _normed_columns,
            "The lengths were taken along dim 0. The paper speaks of columns; its code and PEFT take one"
            " length for each output, and in nn.Linear an output is a row.",
        ),
        Mistake(
            "a number for each row meets the matrix without `[:, None]`",
            _along_the_columns,
            "A vector [out] times a matrix [out, in], or divided into it, is laid along the last dimension:"
            " one number for each column. That is an error where out and in differ, and silently wrong where"
            " they are equal. With [:, None], or keepdim=True in norm, it is [out, 1]: one for each row.",
        ),
        Mistake(
            "magnitude forgotten",
            lambda w, a, b, s, m: _dora(w + s * (b @ a), torch.ones_like(m)),
            "All rows have length 1. Multiply each by its magnitude.",
        ),
        Mistake(
            "not normalised",
            lambda w, a, b, s, m: m[:, None] * (w + s * (b @ a)),
            "The rows were multiplied by the magnitude, but not divided by their own length first, so that it"
            " counts twice.",
        ),
        Mistake(
            "scale forgotten", lambda w, a, b, s, m: _dora(w + b @ a, m), "b a was added without its scale."
        ),
        Mistake(
            "one length for the whole matrix",
            lambda w, a, b, s, m: _dora(w + s * (b @ a), m, (w + s * (b @ a)).norm()),
            "The whole matrix was divided by one number, its norm over all elements. Each row has a length of"
            " its own: dim=1.",
        ),
        Mistake(
            "only B A is normalised",
            lambda w, a, b, s, m: w + _dora(s * (b @ a), m),
            "The adapter's part got the length, and the weight was added afterwards. The direction is that of"
            " the sum.",
        ),
    ),
    hints=(
        "First the sum, then its rows' lengths. What length should each row have in the end?",
        (
            "v = weight + scale * b @ a; v.norm(dim=1) has a length for each row. v divided by them has rows"
            " of length 1."
        ),
        "v = weight + scale * b @ a; return (magnitude / v.norm(dim=1))[:, None] * v.",
    ),
    tolerance=1e-4,
)


# ---- 11. two adapters in one


def join_adapters(
    a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, factors: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    return torch.cat([factors[0] * a1, factors[1] * a2]), torch.cat([b1, b2], dim=1)


def _join_cases(generator: Generator) -> list[tuple]:
    def case(inputs: int, outputs: int, r: int, factors: tuple[float, float]) -> tuple:
        _, a1, b1 = _adapter(generator, inputs, outputs, r)
        _, a2, b2 = _adapter(generator, inputs, outputs, r)
        return a1, b1, a2, b2, factors

    return [
        case(5, 4, 2, (0.7, 1.5)),
        case(6, 6, 3, (2.0, 0.3)),
        case(4, 7, 1, (0.5, 0.4)),
        case(8, 3, 2, (1.2, 3.0)),
        case(9, 9, 4, (0.25, 0.6)),
    ]


def _can_be_joined(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, factors: tuple[float, float]) -> bool:
    both_fit = a1.dim() == b1.dim() == 2 and len(a1) == b1.size(1) >= 1
    return both_fit and a1.shape == a2.shape and b1.shape == b2.shape and len(factors) == 2


JOIN_ADAPTERS = Exercise(
    task="""Two adapters of rank r become one of rank 2 r that adds exactly factors[0] · b1 a1 + factors[1] ·
    b2 a2 (a factor is an adapter's share times its scale). `a1` and `a2` are float32 [r, in], `b1` and `b2`
    [out, r]. Return (a, b): a is [2 r, in] and has the factors in it, b is [out, 2 r]. The first adapter
    comes first.""",
    reference=join_adapters,
    cases=_join_cases,
    forbids=(attach.combine_adapters,),
    valid=_can_be_joined,
    mistakes=(
        Mistake(
            "added, with cross terms",
            lambda a1, b1, a2, b2, f: (
                math.sqrt(f[0]) * a1 + math.sqrt(f[1]) * a2,
                math.sqrt(f[0]) * b1 + math.sqrt(f[1]) * b2,
            ),
            "The matrices were added up. (b1 + b2)(a1 + a2) has b1 a2 and b2 a1 in it as well: each adapter's"
            " input goes to the other's output. PEFT has this as `linear`; `cat` has no such terms.",
        ),
        Mistake(
            "factors in both",
            lambda a1, b1, a2, b2, f: (
                torch.cat([f[0] * a1, f[1] * a2]),
                torch.cat([f[0] * b1, f[1] * b2], dim=1),
            ),
            "a and b both have the factors, so that the product has their squares.",
        ),
        Mistake(
            "factors forgotten",
            lambda a1, b1, a2, b2, f: (torch.cat([a1, a2]), torch.cat([b1, b2], dim=1)),
            "The factors are in neither. Shares and scales are gone, and the new adapter is the plain sum.",
        ),
        Mistake(
            "one order in a, another in b",
            lambda a1, b1, a2, b2, f: (torch.cat([f[0] * a1, f[1] * a2]), torch.cat([b2, b1], dim=1)),
            "a begins with the first adapter and b with the second: what one reads, the other writes.",
        ),
        Mistake(
            "factors exchanged",
            lambda a1, b1, a2, b2, f: (torch.cat([f[1] * a1, f[0] * a2]), torch.cat([b1, b2], dim=1)),
            "Each adapter has the other's factor.",
        ),
        Mistake(
            "halved",
            lambda a1, b1, a2, b2, f: (torch.cat([f[0] * a1, f[1] * a2]) / 2, torch.cat([b1, b2], dim=1)),
            "The mean was taken. The new adapter adds the sum.",
        ),
    ),
    hints=(
        "A product of [out, 2 r] and [2 r, in] is a sum over 2 r terms: r of them are the first adapter's.",
        "a's one below the other (dim 0), b's side by side (dim 1).",
        "return torch.cat([factors[0] * a1, factors[1] * a2]), torch.cat([b1, b2], dim=1).",
    ),
)


EXERCISES: tuple[Exercise, ...] = (
    ANSWER_TARGETS,
    ANSWER_LABELS,
    PACK_EXAMPLES,
    FIRST_VALUES,
    LORA_OUTPUT,
    LORA_STEP,
    MERGE_ONCE,
    LORA_LINEAR,
    ALPHA_FOR_RANK,
    DORA_WEIGHT,
    JOIN_ADAPTERS,
)
