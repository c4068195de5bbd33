"""Any model of sentence-transformers, against transformers: a tiny one with random weights is saved here."""

import json

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from shared.retrieval.documents import Chunk
from shared.retrieval.embedders import SentenceEmbedder
from shared.retrieval.evidence import supporting
from shared.retrieval.index import Index
from tests.retrieval.helpers import CHUNKS

pytestmark = pytest.mark.slow

WORDS = sorted({word for chunk in CHUNKS for word in chunk.text.lower().split() if word.isalpha()})
TEXTS = ["the ferry leaves the harbour", "a dog", "the last ferry " * 40]
PROMPTS = {"query": "the question of a dog ", "document": "harbour "}


def bert(folder, seed=0):
    """A model of transformers with random weights, and its tokenizer, in a folder."""
    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=48,
        initializer_range=0.5,
    )
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=48).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that has prompts, and that gives vectors of all lengths."""
    made = tmp_path_factory.mktemp("models")
    modules = [Transformer(str(bert(made / "bert")), max_seq_length=32), Pooling(16, "mean")]
    SentenceTransformer(modules=modules, prompts=PROMPTS, device="cpu").save(str(made / "tiny"))
    return made / "tiny"


def expected(folder, texts, most=32):
    """The mean of transformers' last hidden states."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    found = []
    for text in texts:
        tokens = tokenizer(text, truncation=True, max_length=most, return_tensors="pt")
        with torch.no_grad():
            found.append(model(**tokens).last_hidden_state.mean(1)[0].numpy())
    return np.stack(found)


def test_the_models_prompts_stand_before_questions_and_passages(folder):
    embedder = SentenceEmbedder(folder, "cpu")
    assert (embedder.dim, embedder.max_tokens, embedder.measure) == (16, 32, "cosine")
    passages = [PROMPTS["document"] + text for text in TEXTS]
    questions = [PROMPTS["query"] + text for text in TEXTS]
    assert embedder.embed(TEXTS) == pytest.approx(expected(folder, passages), abs=1e-5)
    assert embedder.embed_questions(TEXTS) == pytest.approx(expected(folder, questions), abs=1e-5)
    assert embedder.embed([]).shape == embedder.embed_questions([]).shape == (0, 16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert embedder.count_tokens(TEXTS) == [len(tokenizer(text)["input_ids"]) for text in passages]


def test_prompts_and_the_length_can_be_chosen(folder):
    embedder = SentenceEmbedder(str(folder), "cpu", query_prompt="", document_prompt="dog ", max_tokens=8)
    assert embedder.embed(TEXTS) == pytest.approx(expected(folder, ["dog " + t for t in TEXTS], 8), abs=1e-5)
    assert embedder.embed_questions(TEXTS) == pytest.approx(expected(folder, TEXTS, 8), abs=1e-5)


def test_the_scores_of_an_index_are_cosines(folder):
    embedder = SentenceEmbedder(folder, "cpu")
    chunks = [Chunk(f"{n}.md", "", (), text) for n, text in enumerate([*WORDS[:9], *TEXTS])]
    index = Index(embedder)
    index.add(chunks)
    vectors = expected(folder, [f"{PROMPTS['document']}. {chunk.text}" for chunk in chunks])
    question = expected(folder, [f"{PROMPTS['query']}dog"])[0]
    lengths = np.linalg.norm(vectors, axis=1)
    assert lengths.max() > 1.05 * lengths.min() > 0 and abs(lengths.min() - 1) > 0.1
    cosines = vectors @ question / lengths / np.linalg.norm(question)
    found = {hit.chunk.source: hit.score for hit in index.search("dog", len(chunks))}
    assert found == pytest.approx({c.source: s for c, s in zip(chunks, cosines)}, abs=1e-5)
    (source,) = supporting(embedder, "dog", chunks[0].text, [(chunks[0], 0.5)])
    assert source.sentences[0].score == pytest.approx(cosines[0], abs=1e-5)


def test_a_model_for_inner_products_is_compared_so(folder, tmp_path):
    model = SentenceTransformer(str(folder), device="cpu", similarity_fn_name="dot")
    model.save(str(tmp_path / "dots"))
    embedder = SentenceEmbedder(tmp_path / "dots", "cpu")
    index = Index(embedder)
    index.add([Chunk("a.md", "", (), "a dog")])
    product = embedder.embed([". a dog"])[0] @ embedder.embed_questions(["ferry"])[0]
    assert index.search("ferry", 1)[0].score == pytest.approx(product, rel=1e-5)
    assert SentenceEmbedder(tmp_path / "dots", "cpu", measure="cosine").measure == "cosine"
    model.similarity_fn_name = "manhattan"
    model.save(str(tmp_path / "blocks"))
    with pytest.raises(
        ValueError, match="blocks: no store has the measure 'manhattan'; choose cosine or dot"
    ):
        SentenceEmbedder(tmp_path / "blocks", "cpu")


def test_vectors_are_kept_by_model(folder, tmp_path):
    """Whatever changes them changes the name: an index is not searched with others."""
    name = SentenceEmbedder(folder, "cpu").name
    assert name == SentenceEmbedder(str(folder), "cpu").name and name.startswith("tiny ")
    modules = [Transformer(str(bert(tmp_path / "bert", seed=1)), max_seq_length=32), Pooling(16, "mean")]
    SentenceTransformer(modules=modules, prompts=PROMPTS, device="cpu").save(str(tmp_path / "tiny"))
    first = SentenceTransformer(str(folder), device="cpu")
    SentenceTransformer(modules=[first[0], Pooling(16, "cls")], prompts=PROMPTS).save(
        str(tmp_path / "cls" / "tiny")
    )
    others = [
        SentenceEmbedder(tmp_path / "tiny", "cpu"),
        SentenceEmbedder(tmp_path / "cls" / "tiny", "cpu"),
        SentenceEmbedder(folder, "cpu", document_prompt="x "),
        SentenceEmbedder(folder, "cpu", max_tokens=9),
    ]
    assert len({name, *(other.name for other in others)}) == 5
    Index.kept(tmp_path / "index", SentenceEmbedder(folder, "cpu"), CHUNKS[:2])
    with pytest.raises(ValueError, match=f"made with the embedder {name} .* cannot be searched with tiny "):
        Index.load(tmp_path / "index", others[0])


def test_a_model_of_mere_word_vectors(tmp_path):
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu").save(
        str(tmp_path)
    )
    embedder = SentenceEmbedder(tmp_path, "cpu")
    assert embedder.embed(TEXTS).shape == (3, 8) and embedder.count_tokens(TEXTS) == [5, 2, 120]
    with pytest.raises(ValueError, match="max_tokens=9: this model reads all of a text, leave it out"):
        SentenceEmbedder(tmp_path, "cpu", max_tokens=9)


@pytest.mark.parametrize("tokens", [0, 33])
def test_no_more_is_read_than_the_model_can(folder, tokens):
    with pytest.raises(ValueError, match=f"max_tokens={tokens}: must be from 1 to 32, which the model reads"):
        SentenceEmbedder(folder, "cpu", max_tokens=tokens)


def test_what_is_no_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "config.json").write_text(json.dumps({"what": "ever"}), encoding="utf-8")
    for missing in (tmp_path / "none", str(tmp_path / "none"), "./none"):
        with pytest.raises(ValueError, match="there is no folder .*none: give one with a model"):
            SentenceEmbedder(missing, "cpu")
    for model in (tmp_path, "nobody/has-this-model"):
        with pytest.raises(
            ValueError, match=r"cannot be loaded with sentence-transformers \(.+\): give a folder"
        ):
            SentenceEmbedder(model, "cpu")
