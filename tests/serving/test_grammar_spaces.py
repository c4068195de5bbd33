"""shared/serving/grammar.py with tokens of characters, and with a space that is put before a text."""

import json

import pytest
import torch

from shared.models.tokenizer_files import tokenizer_from_json
from shared.serving.grammar import Grammars
from tests.models.tokenizer_forms import FORMS

SCHEMA = {
    "type": "object",
    "properties": {"a b": {"enum": ["ja", "nein"]}, "é": {"type": "boolean"}},
    "required": ["a b", "é"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("form", ["Llama 2", "Gemma", "Llama 3"])
def test_whatever_is_drawn_the_text_is_json_that_the_schema_allows(form):
    tokenizer, _ = tokenizer_from_json(FORMS[form]())
    end = next(iter(tokenizer.special_tokens.values()))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        form_of_text = Grammars(tokenizer, tokenizer.vocab, ends=[end]).json(SCHEMA)
        ids = []
        while not form_of_text.complete and len(ids) < 200:
            logits = form_of_text.mask(torch.randn(tokenizer.vocab_size, generator=generator))
            ids.append(int(logits.argmax()))
            form_of_text.push(ids[-1])
        text = tokenizer.decode([i for i in ids if i != end])
        assert json.loads(text).keys() == {"a b", "é"} and text.startswith("{"), text
