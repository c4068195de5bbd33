"""python -m shared.zero_shot."""

from pathlib import Path

import pytest

from shared import checkpoint
from shared.models.gpt import GPT
from shared.models.pretrained import to_hf
from shared.zero_shot.__main__ import main
from shared.zero_shot.tasks import read_hellaswag, run_task
from tests.zero_shot.helpers import TOKENIZER, hellaswag_rows, same_tokenizer, settings, write_lines


def as_checkpoint(model: GPT, folder: Path) -> None:
    checkpoint.save(model, folder, TOKENIZER)


def as_hugging_faces(model: GPT, folder: Path) -> None:
    to_hf(model, folder)
    same_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("save", [as_checkpoint, as_hugging_faces])
def test_the_command_line_prints_a_table(tmp_path, model, capsys, save):
    folder = tmp_path / "gpt"
    save(model, folder)
    path = write_lines(tmp_path / "hellaswag_val.jsonl", hellaswag_rows())
    flags = ["--tasks", "hellaswag", "--hellaswag", str(path), "--limit", "7"]
    (result,) = main(settings("--model", str(folder), *flags))
    assert result.records == run_task(model, TOKENIZER, "hellaswag", read_hellaswag(path)[:7]).records
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed[1] == ["task", "metric", "value", "standard", "error", "examples", "seconds"]
    for line, metric in zip(printed[2:], ("acc", "acc_norm"), strict=True):
        assert line[:2] == ["hellaswag", metric] and line[4] == "7"
        assert float(line[2]) == pytest.approx(result.metrics[metric], rel=1e-3)
        assert float(line[3]) == pytest.approx(result.standard_errors[metric], rel=1e-3)


@pytest.mark.parametrize("save", [checkpoint.save, to_hf], ids=["ours", "Hugging Face's"])
def test_a_model_without_a_tokenizer_is_refused(tmp_path, model, save):
    save(model, tmp_path / "gpt")
    path = write_lines(tmp_path / "hellaswag_val.jsonl", hellaswag_rows())
    with pytest.raises(ValueError, match="gpt comes without a tokenizer of ours"):
        main(settings("--model", str(tmp_path / "gpt"), "--tasks", "hellaswag", "--hellaswag", str(path)))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--limit", "0"], "limit=0: must be at least 1"),
        (["--max-tokens", "0"], "max_tokens=0: must be at least 1"),
        (["--tasks", "arc"], "arc"),
    ],
)
def test_a_setting_out_of_range_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        settings("--model", "smollm2", *flags)


@pytest.mark.slow
def test_a_mistake_on_the_command_line_is_one_line(run_module):
    done = run_module("shared.zero_shot", "--model", "smollm2", "--tasks", "hellaswag")
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: hellaswag is not fetched for you")
        and done.stderr.count("\n") == 1
    )
