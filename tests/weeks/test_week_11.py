"""Week 11's script: folders of documents, questions and kept indexes."""

import sys
from dataclasses import replace
from functools import cache
from random import Random

import numpy as np
import pytest
import torch

from shared.course import report
from shared.retrieval.documents import chunk_documents, load_documents
from shared.retrieval.ranking import holds_answer
from shared.tokenizers import gpt2_tokenizer
from tests.weeks.helpers import script

pytestmark = pytest.mark.slow

WRONG_IN_WEEK_11 = {
    "no such folder": (["--data", "nowhere", "--ask", "Who?"], "nowhere does not exist: give a folder"),
    "an empty folder": (["--data", "EMPTY", "--ask", "Who?"], "has no files in it: put documents there"),
    "nothing that can be read": (
        ["--data", "BINARY", "--ask", "Who?"],
        "no document that can be read: noise.txt: it is",
    ),
    "a folder without known answers": (["--data", "GOOD"], "no questions with known answers on"),
    "an unknown store": (
        ["--store", "shelf"],
        "no store is called 'shelf'; there are: flat, ivf, hnsw, pq, qdrant",
    ),
    "no questions": (["--questions", "0"], "questions=0: must be at least 1"),
    "chunks that only overlap": (
        ["--size", "20", "--overlap", "20"],
        "chunks of 20 tokens with 20 of overlap",
    ),
    "pq learns from too little": (["--data", "GOOD", "--store", "pq", "--ask", "Who?"], "too few: use flat"),
    "no question": (["--data", "GOOD", "--ask", " "], "a search needs a question"),
}


@cache
def quoter():
    """SmolLM2, loaded once for all tests: what it reads does not change it."""
    _, settings = script("11_rag")
    return sys.modules["weeks.11_rag.library"].make_quoter(
        replace(settings, blocks=None), torch.device("cpu")
    )


def script_with_one_quoter(monkeypatch, **changes):
    module, settings = script("11_rag", **changes)
    asking = sys.modules["weeks.11_rag.asking"]
    monkeypatch.setattr(asking, "make_quoter", lambda settings, device: quoter())
    return module, settings


@pytest.fixture
def folders(tmp_path):
    """Documents in a folder each: none, one that is noise, one that can be read among such."""
    for name in ("EMPTY", "BINARY", "GOOD"):
        (tmp_path / name).mkdir()
    for name in ("BINARY", "GOOD"):
        (tmp_path / name / "noise.txt").write_bytes(bytes(range(256)))
    (tmp_path / "GOOD" / "boats.md").write_text(
        "# Boats\n\nThe captain of the green boat is Basil Thornquist.\n"
    )
    return tmp_path


@pytest.mark.parametrize("case", WRONG_IN_WEEK_11)
def test_week_11_says_what_is_wrong(case, refuses, text_file, folders):
    arguments, words = WRONG_IN_WEEK_11[case]
    arguments = [str(folders / a) if a.isupper() else a for a in arguments]
    if "--ask" not in arguments:  # which reads no text
        arguments += ["--text", text_file]
    refuses("11_rag", arguments, words)


@pytest.mark.parametrize("store", ["flat", "qdrant"])
def test_week_11_answers_from_a_folder_and_names_what_it_leaves_out(
    store, output, folders, capsys, monkeypatch
):
    module, settings = script_with_one_quoter(
        monkeypatch,
        data=str(folders / "GOOD"),
        ask="Who is the captain of the green boat?",
        store=store,
    )
    module.main(settings)
    said = capsys.readouterr()
    assert "left out: noise.txt: it is" in said.err
    sentence = "The captain of the green boat is Basil Thornquist."
    assert said.out == f'Basil Thornquist\n  [1] boats.md\n      "{sentence}"\n'
    (folders / "GOOD" / "boats.md").write_text("# Boats\n\nThe captain of the green boat is Edmund Molloy.\n")
    module.main(replace(settings, verbose=True))  # the index is kept, and what changed is changed in it
    said = capsys.readouterr().out
    assert "0 added, 1 changed" in said and "Edmund Molloy" in said and "(score 0." in said


def test_week_11_refuses_a_question_about_the_world_and_cites_nothing(output, folders, capsys, monkeypatch):
    asked = "Who is the mayor of Paris?"
    module, settings = script_with_one_quoter(monkeypatch, data=str(folders / "GOOD"), ask=asked)
    module.main(settings)
    assert capsys.readouterr().out == "Nothing in the documents answers this.\n"
    module.main(replace(settings, verbose=True))
    assert "nearest: Boats (score " in capsys.readouterr().out


def test_week_11_refuses_an_index_of_another_model(output, folders, text_file, monkeypatch):
    module, settings = script_with_one_quoter(
        monkeypatch,
        data=str(folders / "GOOD"),
        ask="Who?",
        text=text_file,
        index=str(folders / "index"),
    )
    module.main(settings)
    with pytest.raises(
        ValueError,
        match=r"made with the embedder all-MiniLM-L6-v2 \(384 numbers\), and cannot be searched with week 6",
    ):
        module.main(replace(settings, embedder="own"))
    before = {path.name: path.read_bytes() for path in (folders / "index").iterdir()}
    (folders / "GOOD" / "boats.md").write_text("# Boats\n\nThere are none.\n")
    with pytest.raises(ValueError, match="is kept in flat, not hnsw: choose that store, or another folder"):
        module.main(replace(settings, store="hnsw"))
    assert before == {path.name: path.read_bytes() for path in (folders / "index").iterdir()}


def test_week_11_keeps_a_section_of_pythons_reference_once(tmp_path):
    from pydoc_data.topics import topics

    week = report.load_script("11_rag", "library")
    week.write_python_reference(tmp_path)
    documents = load_documents(tmp_path).documents
    texts = [tuple(s.text.split()) for d in documents for s in d.sections]
    assert len(set(texts)) == len(texts) and len(documents) > 0.9 * len(topics)
    chunks = chunk_documents(documents, gpt2_tokenizer())
    asked, _ = week.read_questions("python", chunks)
    library = week.Library("python", chunks, None, asked, [])
    assert len(asked) >= 40 and all(holds_answer(library.right(q).text, q["answers"]) for q in asked)


@pytest.mark.parametrize("damage", [lambda content: content[:99], lambda content: bytes(len(content))])
def test_week_11_makes_vectors_that_were_damaged_again(damage, output, monkeypatch, capsys):
    studies = report.load_script("11_rag", "studies")
    _, settings = script("11_rag", vectors=1000)
    calls = []

    class Lengths:
        def __init__(self, device, batch_size):
            pass

        def embed(self, texts):
            calls.append(len(texts))
            return np.array([[len(text), 1] for text in texts], np.float32)

    monkeypatch.setattr(studies, "MiniLM", Lengths)
    made = studies.line_vectors(settings, torch.device("cpu"))
    (file,) = output.rglob("lines-1000.safetensors")
    assert np.array_equal(studies.line_vectors(settings, torch.device("cpu")), made) and len(calls) == 1
    file.write_bytes(damage(file.read_bytes()))
    capsys.readouterr()
    assert np.array_equal(studies.line_vectors(settings, torch.device("cpu")), made)
    assert len(calls) == 2 and f"{file} is cut or damaged" in capsys.readouterr().out


def test_the_answer_to_every_made_up_fact_stands_in_its_sentence_alone():
    """Alone: another span of the same words would be as right."""
    copying = report.load_script("11_rag", "copying")
    for fact in copying.FACTS:
        for wanted, ways in fact["asked"].items():
            slots = copying.slot_values(fact["said"], Random(0))
            answer = " ".join(slots[slot] for slot in wanted.split())
            assert fact["said"].format_map(slots).count(answer) == 1
            assert not any("{" in way.format_map(slots) or answer in way.format_map(slots) for way in ways)
    chance = Random(1)
    drawn = [copying.made_up(chance) for _ in range(500)]
    assert all(f" {answer}" in f" {sentence.partition('. ')[2]}" for sentence, _, answer in drawn)
    assert len(set(drawn)) == 500 and drawn[0] == copying.made_up(Random(1))


@pytest.mark.slow
def test_what_week_6s_model_quotes_is_a_span_of_the_sentence(output, text_file):
    _, settings = script("11_rag", text=text_file)
    reading = report.load_script("11_rag", "learned_reading")
    model = sys.modules["weeks.11_rag.library"].own_model(settings)
    sentence = "The ferry. Winter. It leaves at 07:40, and the mason Joan Tervill rings a bell."
    quoted = reading.quote(model, sentence, "Who rings a bell?")
    assert quoted and quoted in sentence.partition(". ")[2]
