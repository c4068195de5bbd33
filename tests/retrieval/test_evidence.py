"""shared/retrieval/evidence.py, followups.py and domain.py: sources are the sentences that hold the answer;
a follow-up question takes what it leaves out; names that no document has are found.
"""

import numpy as np
import pytest

from shared.retrieval.documents import Chunk
from shared.retrieval.domain import default_threshold, is_outside
from shared.retrieval.embedders import Embedder
from shared.retrieval.evidence import Source, Support, supporting
from shared.retrieval.followups import needs_context, self_contained, title_of_best
from shared.retrieval.index import Index
from shared.retrieval.quoting import Quoter
from shared.retrieval.rag import RAG, REFUSAL

FARES = Chunk("fares.md", "Fares", (), "A dog pays 3 tallies. Cats pay 160.", windows=((0, 21), (22, 35)))
BOATS = Chunk("boats.md", "Boats", ("Old",), "Both boats are green.", windows=((0, 21),))


class Letters(Embedder):
    """A text as the counts of its letters."""

    name, dim, max_tokens, least_score = "letters", 26, 100, 0.5

    def embed(self, texts):
        counts = [[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts]
        vectors = np.array(counts, np.float32).reshape(-1, 26) + 1e-3
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def count_tokens(self, texts):
        return [len(text) for text in texts]


@pytest.fixture
def index():
    made = Index(Letters())
    made.add([FARES, BOATS])
    return made


def test_sources_are_the_sentences_that_hold_the_answer_as_whole_words():
    passages = [(FARES, 0.7), (BOATS, 0.6)]
    (source,) = supporting(Letters(), "What does a dog pay?", "3 tallies", passages)
    assert source.chunk == FARES and source.quotes == ["A dog pays 3 tallies."] and source.score == 0.7
    assert source.marked() == "[A dog pays 3 tallies.] Cats pay 160."
    (source,) = supporting(Letters(), "Which colour?", "the green ones: both boats are", passages)
    assert source.chunk == BOATS  # none holds these words: the nearest to question and answer
    assert supporting(Letters(), "Who?", "x", []) == []


def test_a_source_as_json_says_where_its_sentences_stand():
    source = Source(BOATS, 0.51239, (Support(0, 21, 0.4),)).as_json()
    sentence = {"start": 0, "end": 21, "score": 0.4, "text": "Both boats are green."}
    assert source == {
        "document": "boats.md",
        "title": "Boats > Old",
        "metadata": {},
        "text": BOATS.text,
        "score": 0.5124,
        "sentences": [sentence],
    }


def test_nearest_windows_are_the_stores_with_their_places(index):
    vectors = Letters().embed([text for chunk in (FARES, BOATS) for text in chunk.window_texts()])
    scores = vectors @ Letters().embed(["cats pay"])[0]
    found = index.nearest_windows("cats pay", 5)
    assert [window.score for window in found] == pytest.approx(sorted(scores.tolist(), reverse=True))
    assert found[0].text == "Cats pay 160." and len(found) == 3
    assert [window.text for window in index.nearest_windows("cats pay", 1)] == ["Cats pay 160."]
    with pytest.raises(ValueError, match="a search needs a question"):
        index.nearest_windows(" ", 1)


@pytest.mark.parametrize(
    ("question", "names"),
    [
        ("Who is the mayor of Paris?", ["Paris"]),
        ("Paris is what?", []),  # a question's first word has a capital anyway
        ("What do Dogs and Cats pay?", []),
        ("Are the Boats of New York green?", ["New", "York"]),
        ("What is Maud's fare?", ["Maud"]),
    ],
)
def test_names_that_no_document_has_are_found(index, question, names):
    assert index.unknown_names(question) == names


def test_a_question_is_outside_by_its_score_or_by_a_name(index):
    hit = index.search("What does a dog pay?", 1)[0]
    assert not is_outside(index, "What does a dog pay?", hit, hit.score)
    assert is_outside(index, "What does a dog pay?", hit, hit.score + 0.01)
    assert is_outside(index, "What does a dog in Paris pay?", hit, 0.0)
    assert is_outside(index, "What?", None, 0.0)
    assert default_threshold(index) == 0.5 and default_threshold(index, "bm25") == 0.0


@pytest.mark.parametrize(
    ("question", "follows"),
    [
        ("And for how long?", True),
        ("What about a dog?", True),
        ("Who built it?", True),
        ("What is the fare?", True),
        ("How long is the main pool of the Sea Baths?", False),
        ("What does an adult return ticket on the ferry cost?", False),
    ],
)
def test_follow_up_questions_are_told_from_others(question, follows):
    assert needs_context(question) == follows


def test_a_follow_up_takes_what_it_leaves_out():
    def topic(question):
        return f"<{question}>"

    asked = "What does an adult return ticket cost?"
    assert self_contained("And a dog?", [asked], topic) == f"{asked} And a dog?"
    assert self_contained("Who sells it?", [asked], topic) == f"<{asked}>: Who sells it?"
    assert self_contained("Who sells it?", [], topic) == "Who sells it?"
    alone = "How long is the main pool of the Sea Baths?"
    assert self_contained(alone, [asked], topic) == alone
    chained = self_contained("And when?", [asked, "Who sells it?"], topic)
    assert chained == f"<{asked}>: Who sells it? And when?"


def test_the_topic_is_the_title_of_the_nearest_page(index):
    assert title_of_best(index)("Both boats are green") == "Boats"


def test_rag_refuses_quotes_and_follows_up(index, monkeypatch):
    class Fixed(Quoter):
        def __init__(self):
            self.sentences = 2
            self.asked = []

        def quote(self, question, windows):
            self.asked.append(question)
            return None

    rag = RAG(index, Fixed())
    refused = rag.ask("What do dogs pay in Paris?")
    assert refused.text == REFUSAL and refused.abstained and refused.evidence == refused.sources == []
    assert refused.nearest.chunk == FARES and rag.reader.asked == []
    rag.ask("And cats?", earlier=["What does a dog pay?"])
    assert rag.reader.asked == ["What does a dog pay? And cats?"]
