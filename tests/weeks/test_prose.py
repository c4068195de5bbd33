"""Figures in the course's prose and in its model cards, held to the logs."""

import pytest

from shared.course import report
from shared.runtime import ROOT

REFERENCE = ROOT / "logs"


@pytest.mark.parametrize("path", report.documents(), ids=lambda p: str(p.relative_to(ROOT)))
def test_figures_in_prose_come_from_the_logs(path):
    text = path.read_text(encoding="utf-8")
    assert report.refill(text) == text, (
        f"{path.relative_to(ROOT)} is not what the logs say: run python -m shared.course.report"
    )


@pytest.mark.parametrize("text", ["tinyshakespeare", "shakespeare"])
@pytest.mark.parametrize("topic", ["06_gpt2", "08_quantization", "09_lora", "10_ppo_dpo"])
def test_model_cards_are_what_the_logs_say(topic, text, tmp_path):
    settings = report.load_script(topic).PRESETS["laptop"]
    figures = report.load_script(topic, "figures")
    logs = REFERENCE / topic / "reference" / text
    kept = ROOT / "checkpoints" / topic / "laptop" / text
    if topic == "06_gpt2":
        card = figures.write_base_card(report.read_runs(logs)["gpt2"], text, tmp_path)
    elif topic == "08_quantization":
        card = figures.write_card(logs, tmp_path, settings.scheme, kept / settings.scheme)
    elif topic == "09_lora":
        card = figures.write_adapter_card(logs, tmp_path, settings, kept / settings.run / "adapter")
    else:
        card = figures.write_aligned_card(logs, tmp_path, settings, kept / settings.keep)
    committed = ROOT / "reports" / topic / ("" if text == "tinyshakespeare" else text) / "model_card.md"
    assert card.read_text(encoding="utf-8") == committed.read_text(encoding="utf-8")
