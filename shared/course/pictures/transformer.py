"""Week 0. Pictures of weeks 3 and 4: attention, heads, the block, the whole GPT, the cache."""

from collections.abc import Sequence

from shared.course.pictures.drawing import Box, Picture, around
from shared.course.pictures.tables import WORDS, attention_scores, causal_softmax

BTC = "[B, T, C]"


def gpt() -> Picture:
    """Week 4: the whole model on one page, and the week in which each part is written."""
    picture = Picture(
        "The whole GPT",
        "and the week in which you write each part of it",
        "From top to bottom. A text becomes ids in the tokenizer (weeks 1 and 5). Each id picks a row of"
        " the token embedding, and the row of its position is added (week 2). The sum goes through"
        " n_layer blocks (week 4); in each, attention (week 3) and an MLP (weeks 2 and 4) add to it. A"
        " last norm and the lm_head give logits, from which the next token is drawn (week 1); it is put"
        " behind the text, and all begins again. Beside the parts stands what later weeks do to them:"
        " week 8 packs the matrices of the blocks into few bits, week 9 puts thin ones beside them, week"
        " 11 puts passages before the question. Of the whole: week 6 trains it at the size of GPT-2,"
        " week 7 in half the bits, week 10 by rewards, and week 12 serves it.",
    )
    x, right = 136, 262
    text = picture.box(around(x, 96, 160, 32), "the cat sat", "values")
    picture.week(right, 96, 11, "passages before\nthe question")
    cut = picture.box(around(x, 150, 160, 34), "tokenizer")
    picture.week(right, 137, 1, "characters")
    picture.week(right, 163, 5, "byte pairs (BPE)")
    picture.arrow(text.bottom, cut.top)
    tokens = picture.box(around(x, 222, 160, 34), "token_embedding", "learned", of="gpt.token_embedding")
    picture.arrow(cut.bottom, tokens.top, shape=("[B, T]", "gpt.in"))
    picture.week(right, 222, 2, "a vector for each id,\none for each place")
    plus = picture.plus(x, 276)
    places = picture.box(
        around(362, 276, 160, 34), "position_embedding", "learned", of="gpt.position_embedding"
    )
    picture.arrow(tokens.bottom, plus.top)
    picture.arrow(places.left, plus.right)
    end = _open_block(picture, x, 330)
    picture.arrow(plus.bottom, (x, 330), shape=(BTC, "gpt.dropout.out"))
    picture.week(right, 350, 4, "the block, n_layer\ntimes")
    picture.week(right, 392, 3, "positions look at\nearlier ones")
    picture.week(right, 434, 8, "its matrices in 8\nand 4 bits")
    picture.week(right, 476, 9, "LoRA: thin matrices\nbeside them")
    norm = picture.box(around(x, end + 48, 160, 32), "norm", "learned", of="gpt.norm")
    picture.arrow((x, end), norm.top, shape=(BTC, "gpt.blocks.1.out"))
    head = picture.box(around(x, end + 106, 160, 34), "lm_head", "learned", of="gpt.lm_head")
    picture.arrow(norm.bottom, head.top)
    draw = picture.box(around(x, end + 178, 160, 34), "softmax, draw")
    picture.arrow(head.bottom, draw.top, shape=("[B, T, V]", "gpt.out"))
    picture.week(right, end + 178, 1, "probabilities of the\nnext token")
    new = picture.box(around(x, end + 236, 160, 36), "on", "chosen")
    picture.arrow(draw.bottom, new.top)
    picture.arrow(new.left, (24, end + 236), (24, 96), text.left, again=True)
    picture.note(right, end + 232, "the new token goes behind\nthe text, and so on")
    _later_weeks(picture, end + 292)
    return picture.close()


def _open_block(picture: Picture, x: float, y: float) -> float:
    """A block with its two parts and their ways round; returns where it ends."""
    picture.group(Box(44, y, 190, 190), behind=2)
    for top, name in ((y + 24, "attn"), (y + 112, "mlp")):
        part = picture.box(around(x + 6, top + 17, 108, 34), name, "learned", of=f"gpt.blocks.0.{name}")
        plus = picture.plus(x, top + 58)
        picture.arrow((x, top - 10), (x, part.top[1]))
        picture.arrow((x, part.bottom[1]), plus.top)
        picture.arrow((x, top - 10), (62, top - 10), (62, top + 58), plus.left)
    picture.line((x, y), (x, y + 14))
    picture.line((x, y + 93), (x, y + 102))
    picture.line((x, y + 181), (x, y + 190))
    return y + 190


def _later_weeks(picture: Picture, y: float) -> None:
    """What is done to the whole of it."""
    picture.write(24, y, "and of the whole:", size=13, anchor="start", bold=True)
    rows = (
        ((6, "trained at GPT-2's size,\nby several processes"), (7, "in half the bits:\nbf16, fp16, fp8")),
        ((10, "learns from rewards\nand preferences"), (12, "serves many people\nat once")),
    )
    for i, row in enumerate(rows):
        for j, (number, words) in enumerate(row):
            picture.week(24 + 238 * j, y + 28 + 40 * i, number, words)


def block() -> Picture:
    """Week 4: norm, attention, residual, norm, MLP, residual."""
    picture = Picture(
        "A block",
        "Two branches read the stream and add what they found to it",
        "The residual stream runs straight down. The first branch takes its norm (attn_norm) and"
        " attention (attn), which mixes positions; its output is added to the stream. The second branch"
        " takes the norm of that (mlp_norm) and the MLP: up_proj makes four times as many numbers, an"
        " activation bends them, and down_proj makes n_embd of them again; it works at each position by"
        " itself, and is added as well. What enters and what leaves have the same shape.",
    )
    x = 68
    top, first, second, bottom = 104, 262, 466, 530
    source = picture.box(around(x, top, 64, 34), "x", "values")
    plus, plus_two = picture.plus(x, first), picture.plus(x, second)
    result = picture.box(around(x, bottom, 64, 36), "x", "chosen")
    ways = ((source.bottom, plus.top), (plus.bottom, plus_two.top), (plus_two.bottom, result.top))
    for start, end in ways:
        picture.arrow(start, end, stream=True)
    picture.note(120, top - 2, "the residual stream: nothing\nis ever taken out of it")
    picture.shape(x, bottom + 36, BTC, "block.out")
    norm = picture.box(around(186, 168, 104, 36), "attn_norm", "learned", of="block.attn_norm")
    picture.arrow((x, 168), norm.left)
    picture.box(Box(310, 146, 152, 138), "", "learned")
    picture.name(386, 210, "attn", "block.attn")
    picture.note(386, 230, "mixes positions", anchor="middle")
    picture.arrow(norm.right, (310, 168), shape=(BTC, "block.attn_norm.out"))
    picture.arrow((310, first), plus.right, shape=(BTC, "block.attn.out"))
    norm = picture.box(around(186, 346, 104, 36), "mlp_norm", "learned", of="block.mlp_norm")
    picture.arrow((x, 346), norm.left)
    picture.group(Box(310, 318, 152, 190))
    picture.name(386, 502, "mlp", "block.mlp")
    up = picture.box(around(374, 346, 106, 36), "up_proj", "learned", of="block.mlp.up_proj")
    bend = picture.box(around(374, 412, 106, 32), "activation", of="block.mlp.activation")
    down = picture.box(around(374, 466, 106, 36), "down_proj", "learned", of="block.mlp.down_proj")
    picture.arrow(norm.right, up.left)
    picture.shape(277, 338, BTC, "block.mlp_norm.out")
    picture.arrow(up.bottom, bend.top)
    picture.shape(383, 384, "[B, T, 4C]", "block.mlp.up_proj.out", anchor="start")
    picture.arrow(bend.bottom, down.top)
    picture.arrow(down.left, plus_two.right, shape=(BTC, "block.mlp.out"))
    picture.note(194, second + 20, "each position by itself", anchor="middle")
    return picture.close()


def heads() -> Picture:
    """Week 3: split into heads, attended, merged."""
    picture = Picture(
        "Several heads",
        "Channels are split, each part attends by itself, then all join",
        "The queries of three positions, six channels each, are cut along the channels into three heads of"
        " two; keys and values likewise. Attention works in each head by itself. What the heads found stands"
        " side by side again, and a linear layer, o_proj, mixes it.",
    )
    owners = [[0, 0, 1, 1, 2, 2]] * 3
    names = [[f"{t}{c}" for c in "abcdef"] for t in (1, 2, 3)]
    x, cell = 240, (40, 22)
    layer = picture.box(around(x, 96, 120, 34), "q_proj", "learned", of="block.attn.q_proj")
    picture.note(332, 92, "k_proj and v_proj\nlikewise")
    whole = picture.grid(x - 120, 154, names, cell=cell, parts=owners)
    picture.arrow(layer.bottom, whole.top, shape=(BTC, "block.attn.q_proj.out"))
    merged = picture.grid(x - 120, 486, [[""] * 6] * 3, cell=cell, parts=owners)
    for head, middle in enumerate((94, 240, 386)):
        rows = [row[2 * head : 2 * head + 2] for row in names]
        part = picture.grid(middle - 40, 262, rows, cell=cell, parts=[[head] * 2] * 3)
        attend = picture.box(around(middle, 364, 104, 34), "attention")
        done = picture.grid(middle - 40, 398, [[""] * 2] * 3, cell=cell, parts=[[head] * 2] * 3)
        picture.write(middle - 52, 299, f"{head + 1}", bold=True, anchor="end")
        picture.arrow(part.bottom, attend.top)
        picture.line(attend.bottom, done.top)
        if head == 1:
            picture.arrow(whole.bottom, part.top)
            picture.shape(368, 230, "[B, H, T, D]", "attention.q", anchor="start")
            picture.arrow(done.bottom, merged.top)
        else:
            picture.arrow((x, 236), (middle, 236), part.top)
            picture.line(done.bottom, (middle, 474), (x, 474))
    picture.shape(368, 492, "[B, H, T, D]", "attention.out", anchor="start")
    mix = picture.box(around(x, 604, 120, 34), "o_proj", "learned", of="block.attn.o_proj")
    picture.arrow(merged.bottom, mix.top, shape=(BTC, "block.attn.o_proj.in"))
    picture.arrow(mix.bottom, (x, 660), shape=(BTC, "block.attn.o_proj.out"))
    picture.write(24, 500, "side by side", size=12, anchor="start", soft=True)
    picture.write(24, 516, "again", size=12, anchor="start", soft=True)
    return picture.close("values")


def kv_cache() -> Picture:
    """Week 4: one new token, its own key and value, and all those of the past."""
    picture = Picture(
        "The key/value cache",
        "A new token computes only its own key and value",
        "The cache has a place for the key and the value of each position, up to max_length. The first three,"
        " of the tokens the, cat and sat, are filled. The new token, down, alone goes through q_proj, k_proj"
        " and v_proj. Its key and its value go into the fourth place; nothing else is computed again. Its"
        " query meets all four keys, and mixes the four values.",
    )
    new = picture.box(around(240, 96, 130, 34), "down", "chosen")
    picture.note(320, 92, "the new token,\nalone")
    layers = {}
    for name, x in (("q", 74.0), ("k", 240.0), ("v", 408.0)):
        layers[name] = picture.box(
            around(x, 190, 96, 34), f"{name}_proj", "learned", of=f"block.attn.{name}_proj"
        )
    picture.arrow(new.bottom, layers["k"].top, shape=("[B, 1, C]", "cached.x"))
    for name in ("q", "v"):
        x = layers[name].top[0]
        picture.arrow((240, 152), (x, 152), layers[name].top)
    cells = [*WORDS, "", "", "", ""]
    strips = {}
    for name, y in (("k", 284), ("v", 364)):
        strip = picture.grid(140, y, [cells], cell=(32, 30), parts=[[0, 0, 0, 2, -1, -1, -1, -1]])
        picture.frame(Box(140 + 3 * 32, y, 32, 30))
        strips[name] = strip
    _names_of_strips(picture)
    place = 140 + 3.5 * 32
    picture.arrow(layers["k"].bottom, (240, 246), (place, 246), (place, 284))
    picture.shape(228, 238, "[B, H, 1, D]", "cached.k_new", anchor="end")
    picture.arrow(layers["v"].bottom, (408, 340), (place, 340), (place, 364))
    attend = picture.box(around(256, 474, 250, 40), "attention over 4 keys, values")
    picture.arrow(layers["q"].bottom, (74, 474), attend.left)
    picture.shape(83, 430, "[B, H, 1, D]", "cached.q", anchor="start")
    picture.arrow((200, 394), (200, 454))
    picture.shape(209, 430, "[B, H, T, D]", "cached.k_all", anchor="start")
    picture.arrow(attend.bottom, (256, 534), shape=("[B, H, 1, D]", "cached.out"))
    picture.note(
        24,
        566,
        "Without a cache, the keys and values of all positions would be\ncomputed again for each"
        " token. The cache of all layers:",
    )
    picture.shape(24, 602, "[L, B, H, M, D]", "cache.k", anchor="start")
    picture.note(150, 602, "of keys, and as much of values")
    return picture.close()


def _names_of_strips(picture: Picture) -> None:
    """What the cache's two strips hold."""
    for y, what in ((299, "keys"), (379, "values")):
        picture.write(128, y + 5, what, anchor="end", bold=True)
    picture.note(396, 330, "empty", anchor="end")


def attention() -> Picture:
    """Week 3: q, k, v, scores, mask, softmax, mix."""
    scores = attention_scores()
    weights = causal_softmax(scores)
    hidden: list[list[float | str]] = [
        [value if j <= i else "−∞" for j, value in enumerate(row)] for i, row in enumerate(scores)
    ]
    picture = Picture(
        "Causal self-attention",
        "Each position mixes what the earlier ones offer",
        "The input x goes through three linear layers, which give queries q, keys k and values v. The product"
        " of q and the transposed k, over the square root of head_dim, is a table of scores: a row for each"
        " position that looks, a column for each that is looked at. The mask sets the scores of later"
        " positions to minus infinity; the softmax of each row gives weights that sum to 1, with zeros"
        " above the diagonal. The weights times v are the output.",
    )
    source = picture.box(around(160, 94, 60, 32), "x", "values")
    picture.shape(199, 98, BTC, "block.attn_norm.out", anchor="start")
    for name, x in (("q", 62), ("k", 160), ("v", 412)):
        layer = picture.box(around(x, 158, 84, 34), f"{name}_proj", "learned", of=f"block.attn.{name}_proj")
        if name == "k":
            picture.arrow(source.bottom, layer.top)
        else:
            picture.arrow((160, 126), (x, 126), layer.top)
        if name == "v":
            picture.line(layer.bottom, (x, 620))
        else:
            picture.arrow(layer.bottom, (x, 214), (111, 214), (111, 240))
    picture.shape(111, 202, "[B, H, T, D]", "attention.k")
    picture.shape(403, 208, "[B, H, T, D]", "attention.v", anchor="end")
    tables: tuple[tuple[Sequence[Sequence[float | str]], str, str, float, float], ...] = (
        (scores, "scores", "q kᵀ / √D", 64, 280),
        (hidden, "masked", "later: −∞", 256, 280),
        (weights, "weights", "softmax of each row", 64, 462),
    )
    for rows, name, how, left, top in tables:
        kind, digits = ("chosen", 2) if name == "weights" else ("values", 1)
        largest = 1.0 if name == "weights" else 0.0
        picture.grid(left, top, rows, cell=(34, 26), kind=kind, largest=largest, digits=digits)
        for i, word in enumerate(WORDS):
            picture.write(left + 17 + 34 * i, top - 7, word, size=12, soft=True)
            if left == 64:
                picture.write(left - 6, top + 17.5 + 26 * i, word, size=12, anchor="end", soft=True)
        picture.write(left, top - 26, name, size=13, anchor="start", bold=True)
        picture.note(left + 62, top - 26, how)
    return _mix(picture)


def _mix(picture: Picture) -> Picture:
    """The ways between the tables, and what follows from the last."""
    picture.arrow((200, 332), (256, 332))
    picture.arrow((324, 384), (324, 410), (270, 410), (270, 514), (200, 514))
    picture.shape(279, 518, "[B, H, T, T]", "attention.weights", anchor="start")
    times = picture.box(around(240, 620, 130, 34), "weights @ v")
    picture.arrow((132, 566), (132, 620), times.left)
    picture.arrow((412, 620), times.right)
    mix = picture.box(around(240, 690, 100, 34), "o_proj", "learned", of="block.attn.o_proj")
    picture.arrow(times.bottom, mix.top, shape=("[B, H, T, D]", "attention.out"))
    picture.arrow(mix.bottom, (240, 738), shape=(BTC, "block.attn.o_proj.out"))
    picture.note(24, 690, "the tables are those of\none text and one head")
    return picture.close()
