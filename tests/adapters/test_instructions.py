"""shared/adapters/instructions.py and packing.py: templates, rows, and training on answers only."""

import string
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shared import checkpoint
from shared.adapters import LoRAConfig, add_lora, load_adapter, save_adapter
from shared.adapters.conversations import read_conversations
from shared.adapters.instructions import (
    Instructions,
    PlayTemplate,
    answer,
    encode,
    template_for,
)
from shared.adapters.packing import EncodedTalk, Packed, lay_out, pack
from shared.adapters.prompts import add_prompt
from shared.assets import fetch
from shared.evaluation import IGNORED
from shared.models.gpt import GPT, GPTConfig
from shared.models.pretrained import from_gguf
from shared.runtime import ROOT
from shared.tokenizers import BPETokenizer, CharTokenizer, Tokenizer
from shared.training import TrainConfig, Trainer
from tests.helpers import made, shake

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
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": reply})
    return messages


TALKS = [
    talk("What is a fire?", "Good friend, 'tis hot."),
    talk("Who?", "The wine."),
    talk("And the bread?", "So it is, and ever was."),
    talk("Is it so?", "Ever."),
]


def model_of(config, seed=0):
    torch.manual_seed(seed)
    return GPT(config).eval()


def task(talks=TALKS, val=TALKS[:2], block_size=96, **settings):
    return Instructions(talks, val, PlayTemplate(TOKENIZER), block_size, **settings)


def learned_text(tokenizer: Tokenizer, example: EncodedTalk) -> str:
    """The tokens that the mask lets through."""
    return tokenizer.decode([i for i, learned in zip(example.ids, example.mask) if learned])


# ---- templates


def test_a_play_reads_as_the_corpus_does():
    example = encode(PlayTemplate(TOKENIZER), TALKS[0])
    text = TOKENIZER.decode(example.ids)
    assert text == "QUESTION:\nWhat is a fire?\n\nANSWER:\nGood friend, 'tis hot.\n\n"
    running_text = text + "QUESTION"
    assert TOKENIZER.encode(running_text)[: len(example.ids)] == example.ids
    assert learned_text(TOKENIZER, example) == "Good friend, 'tis hot.\n\n"


def test_every_answer_of_a_longer_talk_is_learned():
    messages = [*talk("What?", "Fire.\n\nAnd wine.", system="Hot."), *TALKS[1]]
    chars = CharTokenizer.train(TEXT + "SCENE Hm")
    example = encode(PlayTemplate(chars), messages)
    first = "SCENE:\nHot.\n\nQUESTION:\nWhat?\n\nANSWER:\nFire.\nAnd wine.\n\n"
    second = "QUESTION:\nWho?\n\nANSWER:\nThe wine.\n\n"
    assert chars.decode(example.ids) == first + second
    assert learned_text(chars, example) == "Fire.\nAnd wine.\n\nThe wine.\n\n"


@pytest.mark.slow
def test_smollm2s_template_is_the_one_that_transformers_writes():
    """The template's text, from SmolLM2's own file, written by transformers' renderer."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = template_for(from_gguf(fetch("smollm2")).tokenizer)
    jinja = (
        "{% for message in messages %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    messages = [*talk("What?", "Fire, 3 of them.", system="Be brief."), *TALKS[1]]
    (expected,), _ = render_jinja_template(conversations=[messages], chat_template=jinja)
    example = encode(template, messages)
    assert template.tokenizer.decode(example.ids) + "\n" == expected
    assert learned_text(template.tokenizer, example) == "Fire, 3 of them.<|im_end|>The wine.<|im_end|>"


# ---- rows


@pytest.mark.parametrize("seed", range(5))
def test_packing_loses_nothing_and_overfills_nothing(seed):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 50, 300).tolist()
    order = draw.permutation(300).tolist()
    rows = pack(lengths, order, 60)
    assert sorted(i for row in rows for i in row) == list(range(300))
    assert all(sum(lengths[i] for i in row) <= 60 for row in rows)
    assert len(rows) <= 1.15 * sum(lengths) / 60  # an empty place costs as much as a learned one
    assert not set(map(tuple, rows)) & {tuple(row) for row in pack(lengths, order[::-1], 60) if len(row) > 1}


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_text_is_computed_as_if_it_were_alone(name):
    model = model_of(MODELS[name])
    examples = [encode(PlayTemplate(TOKENIZER), t) for t in TALKS]
    rows = lay_out([examples[:2], examples[2:3]])  # the second ends in padding
    with torch.no_grad():
        together = model(rows.ids, Packed(rows.texts))
        for row, number, example in ((0, 1, examples[0]), (0, 2, examples[1]), (1, 1, examples[2])):
            alone = model(torch.tensor([example.ids[:-1]]))[0]
            torch.testing.assert_close(together[row][rows.texts[row] == number], alone, rtol=1e-5, atol=1e-5)


def test_without_the_mask_texts_leak():
    """The law above can fail."""
    model = model_of(SMALL)
    rows = lay_out([[encode(PlayTemplate(TOKENIZER), t) for t in TALKS[:2]]])
    with torch.no_grad():
        assert not torch.allclose(model(rows.ids), model(rows.ids, Packed(rows.texts)), atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_texts_one_by_one(name):
    model = model_of(MODELS[name])
    work = task()
    total = 0.0
    count = 0
    for messages in TALKS:
        example = encode(work.template, messages)
        ids = torch.tensor(example.ids)
        mask = torch.tensor(example.mask)
        logits = model(ids[None, :-1])[0]
        total = total + F.cross_entropy(logits[mask[1:]], ids[1:][mask[1:]], reduction="sum")
        count += mask.sum().item()
    expected = torch.autograd.grad(total / count, list(model.parameters()))
    batch = lay_out(work.rows(work.train, range(len(work.train))))
    loss = work.loss(model, *batch)
    assert len(batch.ids) < len(TALKS)
    assert loss.item() == pytest.approx(total.item() / count, rel=1e-5)
    for gradient, wanted in zip(torch.autograd.grad(loss, list(model.parameters())), expected):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("packed", [True, False])
def test_evaluating_depends_on_no_batch_size(packed):
    model = model_of(LLAMA)
    work = task(val=TALKS, pack=packed)
    metrics = [work.evaluate(model, TrainConfig(batch_size=n)) for n in (1, 2, 4)]
    for others in metrics[1:]:
        assert others == pytest.approx(metrics[0], rel=1e-5)
    alone = [task(val=[t], pack=packed).evaluate(model, TrainConfig())["val_loss"] for t in TALKS]
    counts = [sum(encode(work.template, t).mask) for t in TALKS]
    assert metrics[0]["val_loss"] == pytest.approx(np.average(alone, weights=counts), rel=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_an_epoch_has_every_example_once_and_goes_on_where_it_was(packed):
    talks = [talk(f"Who is {'so ' * n}?", "wine") for n in range(20)]
    work = task(talks, pack=packed, block_size=80)
    config = TrainConfig(batch_size=2, seed=3)
    stream = work.batches(config, 0)
    batches = [next(stream) for _ in range(60)]
    texts = []
    for batch in batches:
        for ids, numbers in zip(batch.ids, batch.texts):
            texts += sorted(tuple(ids[numbers == n].tolist()) for n in numbers.unique() if n)
    first_epoch = texts[:20]
    assert len(first_epoch) == len(work.train)
    assert sorted(first_epoch) == sorted(tuple(example.ids[:-1]) for example in work.train)
    assert sorted(texts[20:40]) == sorted(first_epoch) and texts[20:40] != first_epoch
    later = work.batches(config, 7)
    for expected in batches[7:10]:
        assert all(torch.equal(a, b) for a, b in zip(next(later), expected))
    halves = [next(work.batches(config, 7, rank, 2)) for rank in range(2)]
    learned_by_rank = [half.targets[half.targets != IGNORED].tolist() for half in halves]
    assert learned_by_rank == [row[row != IGNORED].tolist() for row in batches[7].targets]
    with pytest.raises(ValueError, match="cannot be shared by 3 processes"):
        next(work.batches(config, 0, 0, 3))


def test_what_is_too_long_is_counted_and_said():
    said = []
    work = task([*TALKS, talk("fire " * 60, "wine")], block_size=50, say=said.append)
    assert len(work.train) == 4
    assert len(said) == 1
    assert said[0].startswith("1 of 5 training examples are longer than the context of 50 tokens")
    assert "left out" in said[0]
    with pytest.raises(ValueError, match="no training example fits into a context of 3 tokens"):
        task(block_size=3, say=said.append)
    with pytest.raises(ValueError, match="held-out example 2: .*'X'"):
        Instructions(TALKS, [TALKS[0], talk("X?", "wine")], PlayTemplate(CharTokenizer.train(TEXT)), 96)


@pytest.mark.parametrize("packed", [True, False])
def test_an_evaluation_in_parts_is_the_whole_one_and_its_memory_has_a_bound(packed, monkeypatch):
    held_out = [talk("What is a fire?" * n, "Good friend, 'tis hot." * (1 + n % 2)) for n in range(1, 9)]
    instructions = task(val=held_out, pack=packed, say=pytest.fail)
    model = model_of(LLAMA)
    config = TrainConfig(batch_size=32)
    whole = instructions.evaluate(model, config)
    row = instructions.block_size * TOKENIZER.vocab_size
    rows = len(instructions.rows(instructions.val, range(len(held_out))))
    assert rows > 2
    for limit in (1, row, 2 * row):
        monkeypatch.setattr("shared.adapters.instructions.LOGITS_AT_ONCE", limit)
        assert instructions.evaluate(model, config) == pytest.approx(whole, rel=1e-6)
        sizes = made(lambda: instructions.evaluate(model, config))
        assert max(sizes) <= 4 * max(limit, row)


def test_each_epoch_reads_every_row_once_in_an_order_of_its_own():
    instructions = task([talk("?" * n, "Ever." * n) for n in range(1, 13)], pack=False)
    batches = instructions.batches(TrainConfig(batch_size=12, seed=3), 0)
    epochs = [[row.tolist() for row in next(batches).ids] for _ in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_is_without_dropout_and_leaves_the_mode_as_it_was(training):
    model = model_of(replace(SMALL, dropout=0.5)).train(training)
    measured = task().evaluate(model, TrainConfig())
    assert {module.training for module in model.modules()} == {training}
    assert measured == task().evaluate(model.eval(), TrainConfig())


# ---- training


QUICK = TrainConfig(
    steps=12, batch_size=2, block_size=96, lr=1e-2, eval_every=4, checkpoint_every=6, weight_decay=0.0
)


def weights(model):
    return {name: t.clone() for name, t in checkpoint.learned(model).items()}


def without_times(metrics):
    return {name: value for name, value in metrics.items() if "second" not in name}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora", "prompt"])
def test_resuming_equals_never_having_stopped(tmp_path, method):
    def start(folder, stop=None):
        model = model_of(SMALL)
        if method == "lora":
            add_lora(model, LoRAConfig(r=2, target_modules=("all-linear",), lora_dropout=0.2))
        if method == "prompt":
            model = add_prompt(model, 4)
        work = task(pack=method != "prompt", block_size=model.config.block_size)
        if stop:
            all_batches = work.batches

            def batches(*arguments, **options):
                for number, batch in enumerate(all_batches(*arguments, **options)):
                    if number == stop:
                        raise RuntimeError("power cut")
                    yield batch

            work.batches = batches
        return Trainer(model, work, QUICK, checkpoints=folder)

    uninterrupted = start(tmp_path / "uninterrupted")
    expected = uninterrupted.fit()
    with pytest.raises(RuntimeError, match="power cut"):
        start(tmp_path / "cut", stop=8).fit()
    again = start(tmp_path / "cut")
    result = again.fit(resume=True)
    resumed = weights(again.model)
    wanted = weights(uninterrupted.model)
    assert resumed.keys() == wanted.keys()
    assert all(torch.equal(resumed[name], t) for name, t in wanted.items())
    assert without_times(result) == without_times(expected)
    early = uninterrupted.history[1]
    if "val_loss" in early:
        assert result["val_loss"] < early["val_loss"]


def test_adapters_are_resumed_on_the_same_base_with_the_same_settings_and_talks_only(tmp_path):
    def start(seed=0, talks=TALKS, **changes):
        lora = LoRAConfig(**{"r": 2, "lora_alpha": 4.0, **changes})
        model = add_lora(shake(model_of(SMALL), seed), lora)
        return Trainer(model, task(talks), replace(QUICK, steps=2), checkpoints=tmp_path / "c")

    first = start().fit()
    assert start().fit(resume=True) == first
    refused = {
        "frozen weights=": dict(seed=1),
        'added parts=.*"lora_alpha": 4.0.* then, .*"lora_alpha": 8.0.* now': dict(lora_alpha=8.0),
        "training data=": dict(talks=[*TALKS[:-1], talk("Who?", "Someone else.")]),
    }
    for message, changes in refused.items():
        with pytest.raises(ValueError, match=f"cannot be resumed on other contents: {message}"):
            start(**changes).fit(resume=True)


def test_of_a_frozen_model_only_what_is_trained_is_kept(tmp_path):
    base = model_of(SMALL)
    before = weights(base)
    trainer = Trainer(add_lora(base, LoRAConfig(r=2)), task(), QUICK, checkpoints=tmp_path / "c")
    trainer.fit()
    size = (tmp_path / "c/last/model.safetensors").stat().st_size
    assert size < 0.3 * sum(t.nbytes for t in before.values())
    with pytest.raises(ValueError, match="only what was trained beside a frozen model"):
        checkpoint.load(tmp_path / "c/last")
    after = base.state_dict()
    for name, t in before.items():
        now = name if name in after else name.replace("_proj.", "_proj.base.")
        assert torch.equal(after[now], t)


def test_accumulated_gradients_count_every_learned_token_alike():
    """Rows of few and of many learned tokens, in one batch or in two; in float64."""
    talks = [talk("Who?", "I."), talk("What?", "So it is, and ever was. " * 3)]
    trainers = []
    for batch_size, grad_accum_steps in ((2, 1), (1, 2)):
        config = replace(QUICK, steps=2, batch_size=batch_size, grad_accum_steps=grad_accum_steps)
        trainer = Trainer(model_of(SMALL).double(), task(talks, talks, pack=False), config)
        trainer.fit()
        trainers.append(trainer)
    together, apart = trainers
    assert [row["train_loss"] for row in together.history if "train_loss" in row] == pytest.approx(
        [row["train_loss"] for row in apart.history if "train_loss" in row], rel=1e-6
    )
    for ours, theirs in zip(together.model.parameters(), apart.model.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


class WorseAfterStep8(Instructions):
    """Learns in the first eight steps, and unlearns in all others: the end is not the best."""

    def batches(self, config, start_step, rank=0, world_size=1, *, every=1):
        stream = super().batches(config, start_step, rank, world_size, every=every)
        for step, batch in enumerate(stream, start_step):
            yield *batch, torch.tensor(1.0 if step < 8 else -1.0)

    def loss(self, call, *batch):
        *batch, sign = batch
        return sign * super().loss(call, *batch)

    def learned_tokens(self, *batch):
        return super().learned_tokens(*batch[:-1])


def test_the_best_evaluation_can_be_taken_and_saved_as_an_adapter(tmp_path):
    config = replace(QUICK, steps=16, schedule="constant", eval_every=2)
    work = WorseAfterStep8(TALKS, TALKS[:2], PlayTemplate(TOKENIZER), 96)
    trainer = Trainer(add_lora(model_of(SMALL), LoRAConfig(r=2)), work, config, checkpoints=tmp_path / "c")
    summary = trainer.fit()
    assert summary["best_val_loss"] < summary["val_loss"]
    model = trainer.take_best()
    assert trainer.task.evaluate(model, config)["val_loss"] == summary["best_val_loss"]
    loaded = load_adapter(model_of(SMALL), save_adapter(model, tmp_path / "a"))
    assert trainer.task.evaluate(loaded, config)["val_loss"] == summary["best_val_loss"]
    smaller = add_lora(model_of(replace(SMALL, n_layer=1)), LoRAConfig(r=2))
    with pytest.raises(ValueError, match="is of another model"):
        Trainer(smaller, task(), config, checkpoints=tmp_path / "c").take_best()
    other_rank = add_lora(model_of(SMALL), LoRAConfig(r=3))
    with pytest.raises(ValueError, match="does not fit"):
        Trainer(other_rank, task(), config, checkpoints=tmp_path / "c").take_best()


@pytest.mark.slow
def test_answers_are_learned_by_heart():
    """Four talks, four answers: what is learned comes back word for word, and ends."""
    model = model_of(LLAMA)
    work = task(val=TALKS)
    Trainer(model, work, replace(QUICK, steps=120, eval_every=120)).fit()
    assert [answer(model, work.template, t[0]["content"]) for t in TALKS] == [t[1]["content"] for t in TALKS]
    beginning = TOKENIZER.decode(TOKENIZER.encode(TALKS[0][1]["content"])[:3])
    assert answer(model, work.template, TALKS[0][:1], max_new_tokens=3) == beginning


def test_the_courses_instruction_set_is_whole():
    train = read_conversations(ROOT / "weeks/09_lora/steward.jsonl")
    val = read_conversations(ROOT / "weeks/09_lora/steward_held_out.jsonl")
    assert len(train) >= 300
    assert len(val) >= 30
    assert not {t[0]["content"] for t in train} & {t[0]["content"] for t in val}
    for question, reply in train + val:
        assert reply["content"].startswith("Good friend, ")
        assert ". For " in reply["content"]
        assert reply["content"].endswith(".")
        assert set(question["content"] + reply["content"]) <= set(string.ascii_letters + " !&',-.:;?")
