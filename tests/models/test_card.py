import pytest

from shared.models.card import model_card


@pytest.mark.parametrize("sample", [None, "  To be.  "])
def test_a_model_card_has_its_table_and_a_sample_where_there_is_one(sample, tmp_path):
    rows = [{"measure": "loss", "value": "1.5"}, {"measure": "bits", "value": "2"}]
    card = model_card(
        tmp_path / "cards" / "m.md", "Mine", {"made": "here"}, figures=rows, usage="load()", sample=sample
    )
    parts = card.read_text(encoding="utf-8").rstrip().split("\n\n")
    table = "| measure | value |\n| --- | ---: |\n| loss | 1.5 |\n| bits | 2 |"
    assert parts[:4] == ["# Mine", "- **made:** here", table, "```python\nload()\n```"]
    assert parts[4:] == ([] if sample is None else ["A sample:", "```text\nTo be.\n```"])
