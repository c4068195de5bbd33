"""shared/adapters/instructions.py: reading, templates, packing, and training on answers only."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shared import checkpoint
from shared.adapters import LoRAConfig, add_lora, load_adapter, save_adapter
from shared.adapters.instructions import (
    IGNORED,
    Instructions,
    Packed,
    PlayTemplate,
    answer,
    conversation,
    encode,
    lay_out,
    pack,
    read_conversations,
    split_off,
    template_for,
)
from shared.adapters.prompts import add_prompt
from shared.assets import fetch
from shared.models.gpt import GPT, GPTConfig
from shared.models.pretrained import from_gguf
from shared.runtime import ROOT
from shared.tokenizers import BPETokenizer, CharTokenizer
from shared.training import TrainConfig, Trainer

TEXT = (
    "QUESTION:\nWhat is a fire? Who keeps the bread and the wine?\n\nANSWER:\nGood friend, 'tis hot.\n\nFor"
    " so it is, and ever was.\n\n"
)
TOKENIZER = BPETokenizer.train(TEXT * 3, 300)
SMALL = GPTConfig(vocab_size=TOKENIZER.vocab_size, block_size=96, n_layer=2, n_head=4, n_embd=32, bias=False)
LLAMA = replace(SMALL, norm="rmsnorm", position="rope", mlp="swiglu", n_kv_head=2, tie_weights=False)
MODELS = {
    "learned positions": SMALL,
    "rope, grouped queries": LLAMA,
    "window": replace(LLAMA, window=5),
    "qk_norm": replace(LLAMA, qk_norm=True),
}


def talk(question, reply, system=None):
    return [{"role": "system", "content": system}] * bool(system) + [
        {"role": "user", "content": question},
        {"role": "assistant", "content": reply},
    ]


TALKS = [
    talk(q, a)
    for q, a in [
        ("What is a fire?", "Good friend, 'tis hot."),
        ("Who?", "The wine."),
        ("And the bread?", "So it is, and ever was."),
        ("Is it so?", "Ever."),
    ]
]


def model_of(config, seed=0):
    torch.manual_seed(seed)
    return GPT(config).eval()


def task(talks=TALKS, val=TALKS[:2], **settings):
    return Instructions(talks, val, PlayTemplate(TOKENIZER), settings.pop("block_size", 96), **settings)


# ---- files


@pytest.mark.parametrize(
    "entry, expected",
    [
        ({"prompt": " Who? ", "response": "I.\n"}, talk("Who?", "I.")),
        ({"prompt": "Who?", "response": "I.", "source": "more keys do no harm"}, talk("Who?", "I.")),
        ({"instruction": "Add.", "input": "2, 3", "output": "5"}, talk("Add.\n\n2, 3", "5")),
        ({"instruction": "Who?", "input": "", "output": "I."}, talk("Who?", "I.")),
        ({"instruction": "Who?", "output": "I."}, talk("Who?", "I.")),
        ({"messages": talk("Who?", "I.", system="Be brief.")}, talk("Who?", "I.", system="Be brief.")),
    ],
)
def test_the_forms_of_a_conversation(entry, expected):
    assert conversation(entry) == expected


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"prompt": "Who?", "response": ', "Expecting value"),
        ('{"question": "Who?"}', "expected an object with .* found 'question'"),
        ("[1]", "found list"),
        ('{"prompt": "Who?", "response": "  "}', "the assistant's text is empty"),
        ('{"prompt": 3, "response": "I."}', "the user's text is no text"),
        ('{"instruction": "Who?", "input": 3, "output": "I."}', "must be texts"),
        ('{"messages": "Who?"}', "must be a list"),
        ('{"messages": []}', "must end with an answer"),
        ('{"messages": [{"role": "user", "content": "Who?"}]}', "must end with an answer"),
        (
            '{"messages": [{"role": "human", "content": "Who?"}]}',
            "role must be one of system, user, assistant, not 'human'",
        ),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path, line, words):
    path = tmp_path / "talks.jsonl"
    path.write_text('{"prompt": "Who?", "response": "I."}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=f"talks.jsonl, line 3: .*{words}"):
        read_conversations(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_conversations(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no conversation"):
        read_conversations(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9", "response": "a"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        read_conversations(tmp_path / "latin.jsonl")


def test_json_escapes_and_unicode_survive(tmp_path):
    path = tmp_path / "talks.jsonl"
    path.write_text(
        json.dumps({"prompt": "Où?", "response": "Là\u2028bas"}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    assert read_conversations(path) == [talk("Où?", "Là\u2028bas")]


@pytest.mark.parametrize("count", [2, 3, 10, 101])
def test_splitting_off_keeps_every_conversation_once(count):
    talks = [talk(f"{i}?", f"{i}.") for i in range(count)]
    train, val = split_off(talks)
    assert sorted(str(t) for t in train + val) == sorted(map(str, talks)) and len(val) == -(-count // 10)
    assert (train, val) == split_off(talks) != split_off(talks, seed=1) or count == 2
    with pytest.raises(ValueError, match="cannot be split"):
        split_off(talks[:1])


# ---- templates


def test_a_play_reads_as_the_corpus_does():
    example = encode(PlayTemplate(TOKENIZER), TALKS[0])
    assert (
        TOKENIZER.decode(example.ids) == "QUESTION:\nWhat is a fire?\n\nANSWER:\nGood friend, 'tis hot.\n\n"
    )
    text = TOKENIZER.decode(example.ids) + "QUESTION"  # as it stands in running text
    assert TOKENIZER.encode(text)[: len(example.ids)] == example.ids
    assert (
        TOKENIZER.decode([i for i, t in zip(example.ids, example.told) if t]) == "Good friend, 'tis hot.\n\n"
    )


def test_every_answer_of_a_longer_talk_is_learned():
    messages = [*talk("What?", "Fire.\n\nAnd wine.", system="Hot."), *TALKS[1]]
    example = encode(PlayTemplate(CharTokenizer.train(TEXT + "SCENE Hm")), messages)
    chars = CharTokenizer.train(TEXT + "SCENE Hm")
    assert (
        chars.decode(example.ids)
        == "SCENE:\nHot.\n\nQUESTION:\nWhat?\n\nANSWER:\nFire.\nAnd wine.\n\nQUESTION:\nWho?\n\nANSWER:\nThe"
        " wine.\n\n"
    )
    assert (
        chars.decode([i for i, t in zip(example.ids, example.told) if t])
        == "Fire.\nAnd wine.\n\nThe wine.\n\n"
    )


def test_smollm2s_template_is_the_one_that_transformers_writes():
    """The template's text, from SmolLM2's own file, written by transformers' renderer."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = template_for(from_gguf(fetch("smollm2")).tokenizer)
    jinja = (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] +"
        " '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%"
        " endif %}"
    )
    messages = [*talk("What?", "Fire, 3 of them.", system="Be brief."), *TALKS[1]]
    (expected,), _ = render_jinja_template(conversations=[messages], chat_template=jinja)
    example = encode(template, messages)
    assert template.tokenizer.decode(example.ids) + "\n" == expected
    told = template.tokenizer.decode([i for i, t in zip(example.ids, example.told) if t])
    assert told == "Fire, 3 of them.<|im_end|>The wine.<|im_end|>"


# ---- rows


@pytest.mark.parametrize("seed", range(5))
def test_packing_loses_nothing_and_overfills_nothing(seed):
    draw = np.random.default_rng(seed)
    lengths, order = draw.integers(1, 50, 300).tolist(), draw.permutation(300).tolist()
    rows = pack(lengths, order, 60)
    assert sorted(i for row in rows for i in row) == list(range(300))
    assert all(sum(lengths[i] for i in row) <= 60 for row in rows)
    assert len(rows) <= 1.15 * sum(lengths) / 60  # an empty place costs as much as a learned one
    assert not set(map(tuple, rows)) & {tuple(row) for row in pack(lengths, order[::-1], 60) if len(row) > 1}


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_text_is_computed_as_if_it_were_alone(name):
    model, examples = model_of(MODELS[name]), [encode(PlayTemplate(TOKENIZER), t) for t in TALKS]
    rows = lay_out([examples[:2], examples[2:3]])  # the second ends in padding
    with torch.no_grad():
        together = model(rows.ids, Packed(rows.texts))
        for row, number, example in ((0, 1, examples[0]), (0, 2, examples[1]), (1, 1, examples[2])):
            alone = model(torch.tensor([example.ids[:-1]]))[0]
            torch.testing.assert_close(together[row][rows.texts[row] == number], alone, rtol=1e-5, atol=1e-5)


def test_without_the_mask_texts_leak():
    """The law above can fail."""
    model, examples = model_of(SMALL), [encode(PlayTemplate(TOKENIZER), t) for t in TALKS]
    rows = lay_out([examples[:2]])
    with torch.no_grad():
        assert not torch.allclose(model(rows.ids), model(rows.ids, Packed(rows.texts)), atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_texts_one_by_one(name):
    model, work = model_of(MODELS[name]), task()
    total, count = 0.0, 0
    for messages in TALKS:
        example = encode(work.template, messages)
        ids, told = torch.tensor(example.ids), torch.tensor(example.told)
        logits = model(ids[None, :-1])[0]
        total = total + F.cross_entropy(logits[told[1:]], ids[1:][told[1:]], reduction="sum")
        count += told.sum().item()
    expected = torch.autograd.grad(total / count, list(model.parameters()))
    batch = lay_out(work.rows(work.train, range(len(work.train))))
    loss = work.loss(model, *batch)
    assert len(batch.ids) < len(TALKS) and loss.item() == pytest.approx(total.item() / count, rel=1e-5)
    for got, wanted in zip(torch.autograd.grad(loss, list(model.parameters())), expected):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("packed", [True, False])
def test_evaluating_depends_on_no_batch_size(packed):
    model, work = model_of(LLAMA), task(val=TALKS, pack=packed)
    found = [work.evaluate(model, TrainConfig(batch_size=n)) for n in (1, 2, 4)]
    for one in found[1:]:
        assert one == pytest.approx(found[0], rel=1e-5)
    alone = [task(val=[t], pack=packed).evaluate(model, TrainConfig()) for t in TALKS]
    counts = [sum(encode(work.template, t).told) for t in TALKS]
    assert found[0]["val_loss"] == pytest.approx(
        np.average([a["val_loss"] for a in alone], weights=counts), rel=1e-5
    )


@pytest.mark.parametrize("packed", [True, False])
def test_an_epoch_has_every_example_once_and_goes_on_where_it_was(packed):
    work, config = (
        task([talk(f"Who is {'so ' * n}?", "wine") for n in range(20)], pack=packed, block_size=80),
        TrainConfig(batch_size=2, seed=3),
    )
    stream = work.batches(config, 0)
    batches = [next(stream) for _ in range(60)]
    rows = [
        sorted(tuple(row[texts == n].tolist()) for n in texts.unique() if n)
        for b in batches
        for row, texts in zip(b.ids, b.texts)
    ]
    first = [text for row in rows for text in row][:20]
    assert len(first) == len(work.train) and sorted(first) == sorted(tuple(e.ids[:-1]) for e in work.train)
    later = work.batches(config, 7)
    for expected in batches[7:10]:
        assert all(torch.equal(a, b) for a, b in zip(next(later), expected))
    halves = [next(work.batches(config, 7, rank, 2)) for rank in range(2)]
    assert [tuple(t for t in h.targets.flatten().tolist() if t != IGNORED) for h in halves] == [
        tuple(t for t in row.tolist() if t != IGNORED) for row in batches[7].targets
    ]
    with pytest.raises(ValueError, match="cannot be shared by 3 processes"):
        next(work.batches(config, 0, 0, 3))


def test_what_is_too_long_is_counted_and_said():
    said = []
    work = task([*TALKS, talk("fire " * 60, "wine")], block_size=50, say=said.append)
    assert len(work.train) == 4 and len(said) == 1
    assert (
        said[0].startswith("1 of 5 training examples are longer than the context of 50 tokens")
        and "left out" in said[0]
    )
    with pytest.raises(ValueError, match="no training example fits into a context of 3 tokens"):
        task(block_size=3, say=said.append)
    with pytest.raises(ValueError, match="held-out example 2: .*'X'"):
        Instructions(TALKS, [TALKS[0], talk("X?", "wine")], PlayTemplate(CharTokenizer.train(TEXT)), 96)


# ---- training


QUICK = TrainConfig(
    steps=12, batch_size=2, block_size=96, lr=1e-2, eval_every=4, checkpoint_every=6, weight_decay=0.0
)


def weights(model):
    return {name: t.clone() for name, t in checkpoint.learned(model).items()}


@pytest.mark.parametrize("method", ["full", "lora", "prompt"])
def test_resuming_equals_never_having_stopped(tmp_path, method):
    def start(folder, stop=None):
        model = model_of(SMALL)
        if method == "lora":
            add_lora(model, LoRAConfig(r=2, target_modules=("all-linear",), lora_dropout=0.2))
        model = add_prompt(model, 4) if method == "prompt" else model
        work = task(pack=method != "prompt", block_size=model.config.block_size)
        if stop:
            whole = work.batches

            def batches(*arguments):
                for number, batch in enumerate(whole(*arguments)):
                    if number == stop:
                        raise RuntimeError("power cut")
                    yield batch

            work.batches = batches
        return Trainer(model, work, QUICK, checkpoints=folder)

    whole = start(tmp_path / "whole")
    expected = whole.fit()
    with pytest.raises(RuntimeError, match="power cut"):
        start(tmp_path / "cut", stop=8).fit()
    again = start(tmp_path / "cut")
    result = again.fit(resume=True)
    found, wanted = weights(again.model), weights(whole.model)
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], t) for n, t in wanted.items())
    assert {k: v for k, v in result.items() if "second" not in k} == {
        k: v for k, v in expected.items() if "second" not in k
    }
    assert result["val_loss"] < whole.history[1]["val_loss"] if "val_loss" in whole.history[1] else True


def test_of_a_frozen_model_only_what_is_trained_is_kept(tmp_path):
    base = model_of(SMALL)
    before = weights(base)
    trainer = Trainer(add_lora(base, LoRAConfig(r=2)), task(), QUICK, checkpoints=tmp_path / "c")
    trainer.fit()
    assert (tmp_path / "c/last/model.safetensors").stat().st_size < 0.3 * sum(
        t.nbytes for t in before.values()
    )
    with pytest.raises(ValueError, match="only what was trained beside a frozen model"):
        checkpoint.load(tmp_path / "c/last")
    after = base.state_dict()
    assert all(
        torch.equal(after[n if n in after else n.replace("_proj.", "_proj.base.")], t)
        for n, t in before.items()
    )


def test_the_best_evaluation_can_be_taken_and_saved_as_an_adapter(tmp_path):
    config = replace(
        QUICK, steps=16, lr=1.0, schedule="constant", eval_every=2
    )  # far too high: the end is not the best
    trainer = Trainer(add_lora(model_of(SMALL), LoRAConfig(r=2)), task(), config, checkpoints=tmp_path / "c")
    summary = trainer.fit()
    assert summary["best_val_loss"] < summary["val_loss"]
    model = trainer.take_best()
    assert trainer.task.evaluate(model, config)["val_loss"] == summary["best_val_loss"]
    loaded = load_adapter(save_adapter(tmp_path / "a", model), model_of(SMALL))
    assert trainer.task.evaluate(loaded, config)["val_loss"] == summary["best_val_loss"]
    with pytest.raises(ValueError, match="is of another model"):
        Trainer(
            add_lora(model_of(replace(SMALL, n_layer=1)), LoRAConfig(r=2)),
            task(),
            config,
            checkpoints=tmp_path / "c",
        ).take_best()
    with pytest.raises(ValueError, match="does not fit"):
        Trainer(
            add_lora(model_of(SMALL), LoRAConfig(r=3)), task(), config, checkpoints=tmp_path / "c"
        ).take_best()


def test_answers_are_learned_by_heart():
    """Four talks, four answers: what is learned comes back word for word, and ends."""
    model, work = model_of(LLAMA), task(val=TALKS)
    Trainer(model, work, replace(QUICK, steps=120, eval_every=120)).fit()
    assert [answer(model, work.template, t[0]["content"]) for t in TALKS] == [t[1]["content"] for t in TALKS]
    assert answer(model, work.template, TALKS[0][:1], max_new_tokens=3) == TOKENIZER.decode(
        TOKENIZER.encode(TALKS[0][1]["content"])[:3]
    )


def test_the_courses_instruction_set_is_whole():
    train, val = (
        read_conversations(ROOT / "weeks/09_lora" / name)
        for name in ("steward.jsonl", "steward_held_out.jsonl")
    )
    assert len(train) >= 300 and len(val) >= 30
    assert not {t[0]["content"] for t in train} & {t[0]["content"] for t in val}
    for question, reply in train + val:
        assert (
            reply["content"].startswith("Good friend, ")
            and ". For " in reply["content"]
            and reply["content"].endswith(".")
        )
        assert set(question["content"] + reply["content"]) <= set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ !&',-.:;?"
        )
