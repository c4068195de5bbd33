"""The weeks' studies of real models with any model by its path: a GGUF file, a Hugging Face folder, a
checkpoint. All are tiny, and nothing is fetched for them.
"""

import pytest
import torch

from shared import checkpoint
from shared.course import report
from shared.models import pretrained
from shared.models.chat import IM_END, IM_START
from shared.models.names import run_slug
from shared.models.pretrained import from_hf
from tests.helpers import shake
from tests.models.helpers import TOKENS, gguf_tokenizer, llama, train_bpe, write_gguf
from tests.weeks.helpers import DATA, TEXT, script

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unrendered_plots")]

STUDIES = [
    ("08_quantization", "real", "gguf"),
    ("08_quantization", "memory", "folder"),
    ("08_quantization", "outliers", "checkpoint"),
    ("09_lora", "rounding", "gguf"),
    ("10_ppo_dpo", "real", "folder"),
    ("11_rag", "answers", "checkpoint"),
    ("11_rag", "quotes", "gguf"),
    ("11_rag", "followups", "folder"),
    ("12_deploy", "real", "gguf"),
    ("12_deploy", "real-programs", "checkpoint"),
]
"""Each with one of the forms, so that each form is tried in several weeks."""


def make_models(folder, special):
    """The same model in each form, of two layers. special: its tokenizer's special tokens."""
    torch.manual_seed(0)
    theirs = shake(llama(vocab_size=TOKENS, max_position_embeddings=2048, intermediate_size=128))
    tokenizer = train_bpe(special=special)
    theirs.save_pretrained(folder / "folder")
    tokenizer.save(str(folder / "folder" / "tokenizer.json"))
    ours = from_hf(folder / "folder")
    checkpoint.save(ours, folder / "checkpoint", ours.tokenizer)
    gguf = write_gguf(folder / "tiny.gguf", theirs, tokenizer=gguf_tokenizer(tokenizer))
    return {
        "gguf": str(gguf),
        "folder": str(folder / "folder"),
        "checkpoint": str(folder / "checkpoint"),
    }


@pytest.fixture(scope="module")
def chat_models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("chat"), (IM_START, IM_END))


@pytest.fixture(scope="module")
def base_models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("base"), ("<|end|>",))


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model on this machine is not fetched")

    monkeypatch.setattr(pretrained, "fetch", refuse)
    monkeypatch.setattr(pretrained, "snapshot_download", refuse)


def runs_of(topic, output):
    return report.read_runs(output / "logs" / topic / "mine" / "smoke" / DATA)


@pytest.mark.parametrize("case", STUDIES, ids="-".join)
def test_a_study_takes_any_model_by_its_path(case, chat_models, output, text_file):
    topic, study, form = case
    model = chat_models[form]
    changes = {TEXT.get(topic, "data"): text_file, "study": study, "model": model}
    if (topic, study) == ("08_quantization", "real"):
        changes["others"] = False
    if topic == "09_lora":
        changes["block_size"] = 1024  # the tokenizer has hardly more than bytes
    module, settings = script(topic, **changes)
    assert module.main(settings)
    if topic == "09_lora":
        logs = output / "logs" / topic / "mine" / "smoke" / run_slug(model) / DATA
        runs = report.read_runs(logs)
        assert runs.keys() == {"rounding-tiny"}
        return
    runs = runs_of(topic, output)
    named = [run for run in runs.values() if run.name.startswith(run_slug(model))]
    assert named and all(run.summary and run.run["settings"]["model"] == model for run in named)
    by_rule = {"as-is", "both", "title", "rule", "alone"}  # in week 11, whatever the model
    assert all(name.rpartition("followups-")[2] in by_rule for name in runs.keys() - {r.name for r in named})


def test_a_base_model_is_asked_by_plain_text_and_that_is_said(base_models, output, text_file, capsys):
    changes = {"data": text_file, "study": "real", "model": base_models["folder"], "others": False}
    module, settings = script("08_quantization", **changes)
    module.main(settings)
    assert "is a base model, which was never trained to converse" in capsys.readouterr().out
    run = runs_of("08_quantization", output)[f"{run_slug(settings.model)}-fp32"]
    assert all("\n" not in answer for _, answer in run.artifacts["talk"])


def test_week_10_refuses_a_base_model(base_models, refuses):
    flags = ["--study", "real", "--model", base_models["gguf"]]
    refuses("10_ppo_dpo", flags, "was never trained to converse (its tokenizer has no chat template)")
