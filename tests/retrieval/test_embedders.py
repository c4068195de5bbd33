"""shared/retrieval/embedders.py against transformers."""

import numpy as np
import pytest
import torch
import transformers

from shared.assets import fetch
from shared.models.gpt import GPT, GPTConfig
from shared.retrieval.documents import chunk_documents
from shared.retrieval.embedders import HiddenStates, MiniLM
from shared.retrieval.index import WAYS, Index
from shared.retrieval.ranking import rank_scores
from shared.tokenizers import gpt2_tokenizer
from tests.retrieval.helpers import DOCUMENTS, QUESTIONS, TOKENIZER


@pytest.mark.parametrize("changes", [{}, {"position": "rope", "norm": "rmsnorm"}])
def test_hidden_states_are_the_mean_over_a_texts_own_tokens(changes):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig.preset("nano", vocab_size=600, block_size=24, n_layer=2, dropout=0.1, **changes)
    ).train()
    texts = ["The ferry leaves.", "Boats", " ".join(["harbour"] * 60), "It rains again on the pier today"]
    found = HiddenStates(model, TOKENIZER, "nano", batch_size=3).embed(texts)
    assert model.training and found.shape == (4, 128) and found.dtype == np.float32
    model.eval()
    states = []
    model.norm.register_forward_hook(lambda module, inputs, output: states.append(output))
    with torch.no_grad():
        for text in texts:
            assert (
                model(torch.tensor([TOKENIZER.encode(text)[:24]])).size(-1) == 600
            )  # the model itself keeps its head
    expected = torch.cat([torch.nn.functional.normalize(s.mean(1), dim=-1) for s in states])
    assert found == pytest.approx(expected.numpy(), abs=1e-5)
    with pytest.raises(ValueError, match="empty text"):
        HiddenStates(model, TOKENIZER, "nano").embed(["a", ""])


@pytest.fixture(scope="module")
def minilm():
    return MiniLM()


@pytest.mark.slow
def test_minilm_is_what_transformers_computes(minilm):
    texts = ["When does the last tram leave?", "Cats. " * 300, "The tram runs until 23:10."]
    folder = fetch("minilm-config").parent
    tokenizer, model = (
        transformers.AutoTokenizer.from_pretrained(folder),
        transformers.AutoModel.from_pretrained(folder).eval(),
    )
    expected = []
    for text in texts:
        with torch.no_grad():
            states = model(
                **tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            ).last_hidden_state
        expected.append(torch.nn.functional.normalize(states.mean(1), dim=-1)[0].numpy())
    found = minilm.embed(texts)
    assert found == pytest.approx(np.stack(expected), abs=1e-5)
    assert found[0] @ found[2] > 0.5 > found[0] @ found[1]
    assert minilm.embed([]).shape == (0, 384)


@pytest.mark.slow
def test_the_right_section_is_among_the_first_five(minilm):
    index = Index(minilm)
    index.add(chunk_documents(DOCUMENTS, gpt2_tokenizer()))
    found = {
        by: [
            [(hit.chunk.source, *hit.chunk.headings) for hit in index.search(q["question"], 10, by)]
            for q in QUESTIONS
        ]
        for by in WAYS
    }
    scores = {
        by: rank_scores(rankings, [{(q["document"], q["section"])} for q in QUESTIONS])
        for by, rankings in found.items()
    }
    assert scores["dense"]["recall@5"].mean >= 0.95
    assert scores["bm25"]["recall@5"].mean >= 0.7


@pytest.mark.slow
def test_tokens_are_counted_past_what_is_read(minilm):
    texts = ["When does the last tram leave?", "Cats. " * 300]
    tokenizer = transformers.AutoTokenizer.from_pretrained(fetch("minilm-config").parent)
    assert minilm.count_tokens(texts) == [len(tokenizer(text)["input_ids"]) for text in texts]
    assert minilm.count_tokens(texts)[1] > minilm.max_tokens
