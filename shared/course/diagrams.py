"""Week 0. How data flows through the models of weeks 1 to 6, as pictures with shapes.

python -m shared.course.diagrams

writes docs/images/*.svg. The numbers in them are computed here, from a few that are given.
"""

import math
from collections.abc import Callable, Sequence

from shared.course.drawing import Box, Picture
from shared.runtime import ROOT, write_atomically

FOLDER = ROOT / "docs" / "images"
WIDTH = 880


def softmax(logits: Sequence[float]) -> list[float]:
    """Probabilities from logits."""
    powers = [math.exp(logit) for logit in logits]
    return [power / sum(powers) for power in powers]


def bigram() -> Picture:
    """Week 1: a token picks its row, softmax, a draw."""
    letters = ["e", "h", "l", "o", "␣"]
    table = [
        [0.3, -2.0, 0.4, -0.9, 1.6],
        [2.1, -1.8, -1.5, 0.9, 0.4],
        [1.2, -1.6, 1.0, 0.7, 0.1],
        [-0.8, -1.2, 0.5, -0.3, 0.8],
        [-0.5, 0.9, -0.4, 0.6, -2.2],
    ]
    present, drawn = 2, 0
    p = softmax(table[present])
    picture = Picture(
        WIDTH,
        350,
        "The bigram: a token picks its row of the table",
        "The token l picks its row of a table of logits, one row and one column for each of the letters e, h,"
        f" l, o and space. A softmax turns the row into probabilities ({_listed(letters, p)}). The next token"
        " is drawn from them, here e, and picks its own row in turn.",
    )
    middle = 195
    token = picture.box(Box(30, middle - 22, 74, 44), f"{letters[present]}, id {present}", "values")
    picture.write(67, middle - 34, "present token", soft=True, size=12)
    for i, letter in enumerate(letters):
        picture.write(172, middle - 56 + 28 * i + 4.5, letter, bold=True)
        picture.write(202 + 40 * i, 112, letter, bold=True)
    picture.write(282, 86, "logits of the next token")
    grid = picture.grid(182, middle - 70, table, cell=(40, 28), kind="learned", largest=2.2)
    row = Box(182, middle - 14, 200, 28)
    picture.frame(row)
    picture.shape(282, middle + 92, "[vocab_size, vocab_size]")
    step = picture.box(Box(430, middle - 22, 84, 44), "softmax")
    picture.arrow(token.right, (160, middle))
    picture.arrow((grid.right[0] + 4, middle), step.left)
    picture.write(634, 112, "probabilities, sum 1")
    for i, letter in enumerate(letters):
        y = middle - 56 + 28 * i
        picture.write(562, y + 4.5, letter, bold=True)
        bar = Box(576, y - 9, max(130 * p[i] / max(p), 2), 18)
        picture.box(bar, "", "values")
        picture.write(bar.right[0] + 22, y + 4.5, f"{p[i]:.2f}", size=12)
    picture.arrow(step.right, (548, middle))
    picture.shape(634, middle + 92, "[vocab_size]")
    result = picture.box(Box(786, middle - 22, 74, 44), f"{letters[drawn]}, id {drawn}", "chosen")
    picture.arrow((744, middle), result.left)
    picture.write(764, middle - 10, "draw", size=12, soft=True)
    picture.write(823, middle - 34, "next token", soft=True, size=12)
    picture.arrow(result.bottom, (823, 316), (67, 316), token.bottom, again=True)
    picture.write(445, 336, "and again, with the token that was drawn", size=12, soft=True)
    return picture


def _listed(letters: Sequence[str], p: Sequence[float]) -> str:
    return ", ".join(
        f"{letter.replace('␣', 'space')} {share:.2f}" for letter, share in zip(letters, p, strict=True)
    )


def window_mlp() -> Picture:
    """Week 2: a window of ids, their embeddings side by side, a hidden layer, logits."""
    picture = Picture(
        WIDTH,
        400,
        "The fixed window: embeddings side by side, then a hidden layer",
        "The ids of the last three tokens, t, h and e, each pick a row of the embedding table, and the vector"
        " of their place in the window is added. The three vectors stand one after the other as one long"
        " vector. A linear layer with tanh makes the hidden values of it, and another linear layer the"
        " logits of the next token.",
    )
    vectors = [[0.2, -0.7, 1.1, 0.4], [0.9, 0.1, -0.3, -1.2], [-0.6, 0.8, 0.5, 0.3]]
    picture.box(Box(124, 78, 116, 246), "embedding\ntable\n\n+ place in\nthe window", "learned")
    picture.shape(182, 344, "[vocab_size + 1, n_embd]")
    long = [[value] for vector in vectors for value in vector]
    parts = [[i // 4] for i in range(12)]
    column = picture.grid(462, 81, long, cell=(44, 20), parts=parts)
    for i, (letter, vector) in enumerate(zip("the", vectors, strict=True)):
        y = 121 + 80 * i
        token = picture.box(Box(30, y - 18, 52, 36), letter, "values")
        picture.arrow(token.right, (124, y))
        grid = picture.grid(276, y - 14, [vector], cell=(36, 28), parts=[[i] * 4])
        picture.arrow((240, y), grid.left)
        picture.arrow(grid.right, (462, y))
    picture.write(56, 92, "ids", size=12, soft=True)
    picture.shape(56, 344, "[window]")
    picture.write(348, 92, "a vector each", size=12, soft=True)
    picture.shape(348, 344, "[window, n_embd]")
    picture.shape(484, 344, "[window · n_embd]")
    picture.write(484, 68, "side by side", size=12, soft=True)
    y = 201
    hidden = picture.box(Box(546, y - 32, 84, 64), "Linear\ntanh", "learned")
    values = picture.grid(660, y - 78, [[0.8], [-0.2], [0.5], [-0.9], ["⋮"], [0.1]], cell=(44, 26))
    head = picture.box(Box(732, y - 32, 64, 64), "Linear", "learned")
    logits = picture.grid(818, y - 65, [[1.3], [-0.4], [2.0], ["⋮"], [0.6]], cell=(40, 26), kind="chosen")
    picture.arrow(column.right, hidden.left)
    picture.arrow(hidden.right, values.left)
    picture.arrow(values.right, head.left)
    picture.arrow(head.right, logits.left)
    picture.write(682, 108, "hidden", size=12, soft=True)
    picture.shape(682, 314, "[n_hidden]")
    picture.write(838, 108, "logits", size=12, soft=True)
    picture.shape(826, 314, "[vocab_size]")
    picture.legend(30, 380, "values", "learned", "chosen")
    return picture


WORDS = ("the", "cat", "sat", "down")
QUERIES = ((1.0, 0.4), (0.2, 1.6), (1.8, -0.4), (0.6, 1.2))
KEYS = ((1.2, 0.2), (0.4, 1.8), (1.3, 0.6), (-0.4, 1.0))
"""With these the weights that are printed follow from the scores that are, with one digit."""


def attention_scores() -> list[list[float]]:
    """The scores of the picture: q kᵀ / √head_dim."""
    return [
        [sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(len(q)) for k in KEYS] for q in QUERIES
    ]


def causal_softmax(scores: Sequence[Sequence[float]]) -> list[list[float]]:
    """Each row's weights: a softmax over the positions up to its own, 0 after it."""
    return [[*softmax(row[: i + 1]), *[0.0] * (len(row) - i - 1)] for i, row in enumerate(scores)]


def attention() -> Picture:
    """Week 3: q, k, v, scores, mask, softmax, mix."""
    scores = attention_scores()
    weights = causal_softmax(scores)
    hidden: list[list[float | str]] = [
        [value if j <= i else "−∞" for j, value in enumerate(row)] for i, row in enumerate(scores)
    ]
    picture = Picture(
        WIDTH,
        470,
        "Causal self-attention: each position mixes what the earlier ones offer",
        "The input x goes through three linear layers, which give queries q, keys k and values v. The product"
        " of q and the transposed k, over the square root of head_dim, is a table of scores: a row for each"
        " position that looks, a column for each that is looked at. The mask sets the scores of later"
        " positions to minus infinity; the softmax of each row gives weights that sum to 1, with zeros"
        " above the diagonal. The weights times v are the output.",
    )
    x = picture.box(Box(24, 200, 46, 60), "x", "values")
    picture.shape(48, 280, "[T, C]")
    for name, y in (("q", 120), ("k", 200), ("v", 380)):
        layer = picture.box(Box(112, y - 20, 66, 40), f"{name}_proj", "learned")
        made = picture.box(Box(212, y - 20, 46, 40), name, "values")
        picture.arrow(x.right, (90, 230), (90, y), layer.left)
        picture.arrow(layer.right, made.left)
        picture.shape(235, y + 38, "[T, D]")
    tables: tuple[tuple[Sequence[Sequence[float | str]], str, str], ...] = (
        (scores, "scores", "q kᵀ / √D"),
        (hidden, "masked", "later: −∞"),
        (weights, "weights", "softmax of each row"),
    )
    y, top = 160, 104
    for at, (rows, name, how) in enumerate(tables):
        left = 338 + 184 * at
        picture.write(left + 72, 62, name, bold=True)
        picture.write(left + 72, 80, how, size=12, soft=True)
        for j, word in enumerate(WORDS):
            picture.write(left + 18 + 36 * j, 98, word, size=12, soft=True)
        largest = 1.0 if name == "weights" else 0.0
        kind = "chosen" if name == "weights" else "values"
        digits = 2 if name == "weights" else 1
        picture.grid(left, top, rows, cell=(36, 28), kind=kind, largest=largest, digits=digits)
        picture.shape(left + 72, 234, "[T, T]")
    for i, word in enumerate(WORDS):
        picture.write(332, top + 18.5 + 28 * i, word, size=12, anchor="end", soft=True)
    times = picture.box(Box(270, y - 20, 24, 40), "×")
    picture.arrow((258, 120), (282, 120), times.top)
    picture.arrow((258, 200), (282, 200), times.bottom)
    picture.arrow(times.right, (336, y))
    picture.arrow((482, y), (520, y))
    picture.arrow((666, y), (704, y))
    mix = picture.box(Box(560, 358, 116, 44), "weights @ v")
    result = picture.box(Box(746, 358, 64, 44), "out", "chosen")
    picture.arrow((778, 244), (778, 300), (618, 300), mix.top)
    picture.arrow((258, 380), mix.left)
    picture.arrow(mix.right, result.left)
    picture.shape(778, 422, "[T, D]")
    meaning = "T positions, C numbers each (n_embd), D in a head (head_dim)"
    picture.write(24, 452, meaning, size=12, anchor="start", soft=True)
    picture.legend(478, 452, "values", "learned", "chosen")
    return picture


def heads() -> Picture:
    """Week 3: split into heads, attended, merged."""
    picture = Picture(
        WIDTH,
        400,
        "Several heads: split the channels, attend in each part, merge again",
        "A table of three positions and six channels, shape batch, time, n_embd, is cut along the channels"
        " into three heads of two channels each: shape batch, n_head, time, head_dim. Attention works in"
        " each head by itself. The results stand side by side again, batch, time, n_embd, and a linear"
        " layer, o_proj, mixes the heads.",
    )
    owners = [[0, 0, 1, 1, 2, 2]] * 3
    names = [[f"{t}{c}" for c in "abcdef"] for t in (1, 2, 3)]
    y = 196
    whole = picture.grid(30, y - 39, names, cell=(28, 26), parts=owners)
    picture.write(114, 100, "q (and k, and v)", bold=True)
    picture.write(114, 118, "a row for each position", size=12, soft=True)
    picture.shape(114, 352, "[B, T, C]")
    merged = picture.grid(570, y - 39, [[""] * 6] * 3, cell=(28, 26), parts=owners)
    for head in range(3):
        middle = 110 + 86 * head
        rows = [row[2 * head : 2 * head + 2] for row in names]
        part = picture.grid(264, middle - 39, rows, cell=(28, 26), parts=[[head] * 2] * 3)
        picture.write(254, middle + 4.5, f"{head + 1}", bold=True, anchor="end")
        attend = picture.box(Box(354, middle - 18, 84, 36), "attention")
        done = picture.grid(472, middle - 39, [[""] * 2] * 3, cell=(28, 26), parts=[[head] * 2] * 3)
        if middle == y:
            picture.arrow(whole.right, (240, y))
        else:
            picture.arrow((220, y), (220, middle), (240, middle))
        picture.arrow(part.right, attend.left)
        picture.arrow(attend.right, done.left)
        if middle != y:
            picture.line(done.right, (549, middle), (549, y))
    picture.arrow((528, y), merged.left)
    picture.shape(292, 352, "[B, H, T, D]")
    picture.shape(500, 352, "[B, H, T, D]")
    picture.write(654, 118, "side by side again", size=12, soft=True)
    picture.shape(654, 352, "[B, T, C]")
    layer = picture.box(Box(758, y - 20, 66, 40), "o_proj", "learned")
    picture.arrow(merged.right, layer.left)
    picture.arrow(layer.right, (862, y))
    picture.shape(822, 352, "[B, T, C]")
    meaning = (
        "B texts, T positions, C channels (n_embd), H heads (n_head), D = C / H channels in each (head_dim)"
    )
    picture.write(30, 382, meaning, size=12, anchor="start", soft=True)
    return picture


def block() -> Picture:
    """Week 4: norm, attention, residual, norm, MLP, residual."""
    picture = Picture(
        WIDTH,
        330,
        "A block: two branches read the stream and add to it",
        "The stream x, shape batch, time, n_embd, runs straight through. The first branch takes its norm and"
        " attention, which mixes positions, and is added to the stream. The second branch takes the norm of"
        " that and an MLP, which works at each position by itself, and is added as well. The shape never"
        " changes.",
    )
    y, below = 112, 218
    x = picture.box(Box(30, y - 20, 56, 40), "x", "values")
    first, second = picture.plus(400, y), picture.plus(726, y)
    result = picture.box(Box(794, y - 20, 56, 40), "x", "chosen")
    for start, end in ((x.right, first.left), (first.right, second.left), (second.right, result.left)):
        picture.arrow(start, end)
    branches = (
        (124, first, "attention", "mixes positions"),
        (450, second, "MLP", "each position by itself"),
    )
    for left, plus, name, what in branches:
        norm = picture.box(Box(left + 24, below - 22, 70, 44), "norm", "learned")
        layer = picture.box(Box(left + 130, below - 22, 104, 44), name, "learned")
        picture.arrow((left, y), (left, below), norm.left)
        picture.arrow(norm.right, layer.left)
        picture.arrow(layer.right, (plus.bottom[0], below), plus.bottom)
        picture.write(layer.top[0], below + 42, what, size=12, soft=True)
    picture.write(240, y - 14, "the residual stream", size=12, soft=True)
    picture.shape(58, y + 42, "[B, T, C]")
    picture.shape(822, y + 42, "[B, T, C]")
    picture.legend(30, 306, "values", "learned", "chosen")
    return picture


def gpt() -> Picture:
    """Week 4: ids, embeddings and positions, blocks, norm, head, logits."""
    picture = Picture(
        WIDTH,
        360,
        "The GPT: from ids to the logits of each next token",
        "Ids, shape batch, time, pick rows of the token embedding; the rows of their positions are added."
        " The stream, batch, time, n_embd, goes through n_layer blocks, a last norm and the head, a linear"
        " layer, which gives the logits of the next token at each position: batch, time, vocab_size. The"
        " head may share its weights with the token embedding.",
    )
    y = 150
    ids = picture.box(Box(26, y - 20, 60, 40), "ids", "values")
    tokens = picture.box(Box(124, y - 30, 96, 60), "token\nembedding", "learned")
    places = picture.box(Box(124, 232, 96, 60), "position\nembedding", "learned")
    picture.write(56, 258, "0 … T − 1", size=12)
    picture.write(56, 276, "positions", size=12, soft=True)
    picture.arrow((92, 262), places.left)
    plus = picture.plus(252, y)
    stack = picture.box(Box(348, y - 52, 190, 104), "", "learned", behind=2)
    picture.write(stack.top[0], y - 20, "block", bold=True)
    picture.write(stack.top[0], y + 4, "attention: mixes positions", size=12)
    picture.write(stack.top[0], y + 22, "MLP: each by itself", size=12)
    picture.write(stack.top[0] + 8, y + 76, "n_layer of them", size=12, soft=True)
    norm = picture.box(Box(590, y - 20, 62, 40), "norm", "learned")
    head = picture.box(Box(686, y - 20, 62, 40), "head", "learned")
    logits = picture.box(Box(782, y - 20, 74, 40), "logits", "chosen")
    picture.arrow(ids.right, tokens.left)
    picture.arrow(tokens.right, plus.left)
    picture.arrow(places.right, (252, 262), plus.bottom)
    picture.arrow(plus.right, stack.left)
    picture.arrow((554, y), norm.left)
    picture.arrow(norm.right, head.left)
    picture.arrow(head.right, logits.left)
    picture.shape(56, y + 42, "[B, T]")
    picture.shape(172, y + 50, "[V, C]")
    picture.shape(172, 312, "[block_size, C]")
    picture.shape(306, y - 12, "[B, T, C]")
    picture.shape(621, y + 42, "[C]")
    picture.shape(717, y + 42, "[V, C]")
    picture.shape(819, y + 42, "[B, T, V]")
    picture.line(tokens.top, (172, 72), (717, 72), head.top, again=True)
    picture.write(440, 66, "the same table, where they share their weights", size=12, soft=True)
    for y, words in (
        (296, "[B, T, C] is what flows; under learned weights"),
        (314, "stands their own shape"),
    ):
        picture.write(854, y, words, size=12, anchor="end", soft=True)
    picture.legend(26, 342, "values", "learned", "chosen")
    return picture


TEXT = "the␣hen␣then␣the"
MERGES = (("h", "e"), ("t", "he"))
"""The most frequent pairs of neighbours in TEXT, one after the other; no other pair is as frequent."""


def merged(tokens: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """Tokens in which each place of the pair has become one."""
    made: list[str] = []
    for token in tokens:
        if made and (made[-1], token) == pair:
            made[-1] += token
        else:
            made.append(token)
    return made


def bpe_merge() -> Picture:
    """Week 5: a text, its most frequent pair, and the text after the merge; twice."""
    picture = Picture(
        WIDTH,
        400,
        "Byte-pair encoding: the most frequent pair becomes one token, again and again",
        f"The text {TEXT.replace('␣', ' ')} as {len(TEXT)} single letters and spaces. h and e stand side by"
        " side most often, and become one token everywhere. In the text after that, t and he stand side by"
        " side most often, and become one token in turn.",
    )
    tokens = list(TEXT)
    for step, y in enumerate((96, 206, 316)):
        picture.write(30, y - 13, f"{len(tokens)} tokens", anchor="start", bold=True)
        boxes = _row_of_tokens(picture, tokens, y)
        if step == len(MERGES):
            break
        left, right = MERGES[step]
        places = [i for i, both in enumerate(zip(tokens, tokens[1:])) if both == (left, right)]
        for i in places:
            start, stop = boxes[i].x + 3, boxes[i + 1].right[0] - 3
            picture.line((start, y + 40), (start, y + 46), (stop, y + 46), (stop, y + 40))
        says = f"the pair {left}, {right} occurs {len(places)} times, more often than any other"
        picture.write(30, y + 62, f"{says}: it becomes one token", anchor="start", soft=True)
        tokens = merged(tokens, MERGES[step])
    picture.write(30, 384, "␣ is a space", size=12, anchor="start", soft=True)
    return picture


def _row_of_tokens(picture: Picture, tokens: Sequence[str], y: float) -> list[Box]:
    boxes = []
    x = 30.0
    for token in tokens:
        width = 50.0 * len(token) + 2 * (len(token) - 1)
        kind = "chosen" if len(token) > 1 else "values"
        boxes.append(picture.box(Box(x, y, width, 34), token, kind))
        x += width + 2
    return boxes


WEIGHTS = (1.0, 0.5)
GRADIENTS = ((0.2, -0.4), (0.6, 0.0))
LR = 0.5


def ddp() -> Picture:
    """Week 6: two processes, half a batch each, the mean of their gradients, the same step."""
    mean = [sum(pair) / 2 for pair in zip(*GRADIENTS, strict=True)]
    after = [w - LR * g for w, g in zip(WEIGHTS, mean, strict=True)]
    picture = Picture(
        WIDTH,
        400,
        "Two processes: half of the batch each, one mean gradient, the same step",
        "One batch is cut in two. Both processes hold the same weights. Each computes the gradients of its"
        " half, which differ. all_reduce takes the mean of both, and both get it. So both take the same step"
        " and hold the same weights again.",
    )
    batch = picture.box(Box(26, 166, 84, 76), "one batch", "values")
    picture.shape(68, 262, "[2B, T]")
    picture.box(Box(468, 98, 92, 212), "all_reduce\n\nthe mean\nof both")
    for process, y in enumerate((136, 272)):
        picture.write(190, y - 50, f"process {process}", bold=True)
        half = picture.box(Box(148, y - 26, 84, 52), "half of it", "values")
        picture.shape(190, y + 46, "[B, T]")
        picture.arrow(batch.right, (128, 204), (128, y), half.left)
        model = picture.box(Box(264, y - 26, 84, 52), "forward,\nbackward", "learned")
        gradients = picture.grid(378, y - 14, [GRADIENTS[process]], cell=(34, 28))
        mine = picture.grid(588, y - 14, [mean], cell=(34, 28))
        step = picture.box(Box(682, y - 26, 62, 52), "step")
        weights = picture.grid(778, y - 14, [after], cell=(38, 28), kind="chosen")
        chain = (half, model, gradients, Box(468, y - 14, 92, 28), mine, step, weights)
        for one, other in zip(chain, chain[1:]):
            picture.arrow(one.right, other.left)
        picture.write(306, y + 46, f"weights {WEIGHTS[0]:g}, {WEIGHTS[1]:g}", size=12, soft=True)
        picture.write(412, y + 46, "its gradients", size=12, soft=True)
        picture.write(622, y + 46, "the same", size=12, soft=True)
        picture.write(713, y + 46, f"lr {LR:g}", size=12, soft=True)
        picture.write(816, y + 46, "the same", size=12, soft=True)
    picture.legend(26, 380, "values", "learned", "step", "chosen")
    return picture


PICTURES: tuple[Callable[[], Picture], ...] = (
    bigram,
    window_mlp,
    attention,
    heads,
    block,
    gpt,
    bpe_merge,
    ddp,
)
"""Each is the file of its name."""


def main() -> None:
    """Draws all pictures again."""
    for draw in PICTURES:
        write_atomically(FOLDER / f"{draw.__name__}.svg", draw().svg())
        print(f"drew docs/images/{draw.__name__}.svg")


if __name__ == "__main__":
    main()
