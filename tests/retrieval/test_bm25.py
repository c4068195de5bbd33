"""shared/retrieval/bm25.py against bm25s and scikit-learn, and on scripts without spaces; fusion by hand."""

import unicodedata

import bm25s
import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer

from shared.retrieval.bm25 import BM25, STOP_WORDS, SYLLABLE, terms
from shared.retrieval.index import reciprocal_rank_fusion
from tests.retrieval.helpers import DOCUMENTS, QUESTIONS

# ---- BM25


@pytest.mark.parametrize("k1, b", [(1.2, 0.75), (0.5, 0.0), (2.0, 1.0), (0.0, 0.5)])
def test_bm25_scores_as_the_library_does(k1, b):
    texts = [" ".join([d.title, *(s.text for s in d.sections)]) for d in DOCUMENTS]
    library = bm25s.BM25(method="lucene", k1=k1, b=b)
    library.index([terms(text) for text in texts], show_progress=False)
    ours = BM25(k1, b)
    ours.add(range(100, 100 + len(texts)), texts)
    for question in [q["question"] for q in QUESTIONS[::10]] + ["ferry ferry harbour"]:
        expected = library.get_scores(terms(question))
        found = ours.search(question, len(texts))
        assert {i - 100 for i, _ in found} == set(np.flatnonzero(expected))
        assert [score for _, score in found] == pytest.approx([expected[i - 100] for i, _ in found], rel=1e-5)
        assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)


def test_bm25_has_lucenes_parameters_if_none_are_given():
    texts = ["the harbour", "the harbour and the town with its harbour", "a town"]
    library = bm25s.BM25(method="lucene", k1=1.2, b=0.75)  # Lucene's defaults; bm25s has others
    library.index([terms(text) for text in texts], show_progress=False)
    ours = BM25()
    ours.add(range(3), texts)
    expected = library.get_scores(terms("harbour town"))
    assert dict(ours.search("harbour town", 3)) == pytest.approx(dict(enumerate(expected)), rel=1e-5)


def test_bm25_after_deleting_is_as_if_it_had_never_been():
    texts = [s.text for d in DOCUMENTS[:8] for s in d.sections]
    left, whole = BM25(), BM25()
    whole.add(range(len(texts)), texts)
    whole.delete(range(0, len(texts), 2))
    left.add(range(1, len(texts), 2), texts[1::2])
    assert whole.search("the harbour and the town", 99) == left.search("the harbour and the town", 99) != []
    assert BM25().search("harbour", 3) == left.search("zzz", 3) == left.search("the and of", 3) == []
    with pytest.raises(ValueError, match="id 1 is there already"):
        left.add([1], ["again"])


def test_at_most_k_are_found_and_equals_come_by_id():
    bm25 = BM25()
    bm25.add([9, 3, 7, 1], ["ferry ferry"] + ["ferry boat"] * 3)
    whole = bm25.search("ferry", 99)
    assert [i for i, _ in whole] == [9, 1, 3, 7]
    for k in range(1, 6):
        assert bm25.search("ferry", k) == whole[:k]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The FERRIES' boss", ["ferry", "boss"]),
        ("a bus, shoes; 17:50", ["bus", "shoes", "17", "50"]),
        ("Zürich's bays", ["zürich", "bay"]),
        ("flies, dies, gas", ["fly", "die", "gas"]),  # too short to lose as much
        ("の, は", ["の", "は"]),  # each stands alone
        ("# Fares\nsee #5, a+b, x[i++], Title#2", ["fare", "see", "5", "b", "x", "i++", "title", "2"]),
        ("iPhone手机 12寸, ３Ｄ", ["iphone", "手机", "手", "机", "12", "寸", "3d"]),
    ],
)
def test_terms(text, expected):
    assert terms(text) == expected


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
@pytest.mark.parametrize(
    "text",
    [
        "Café Zürich",
        "ΟΔΟΣ",
        "Straße",
        "ガーデン",
        "도서관은",
        "नमस्ते दुनिया",
        "tiếng Việt",
        "Ångström ﬁle",
        "น้ำ",
    ],
)
def test_terms_are_the_same_however_a_text_is_written(text, form):
    written = unicodedata.normalize(form, text)
    assert terms(written) == terms(written.upper()) == terms(text) != []
    assert terms("".join(f"{c}\N{SOFT HYPHEN}" for c in unicodedata.normalize("NFC", text))) == terms(text)


def test_words_are_those_that_scikit_learn_cuts():
    cut = CountVectorizer(token_pattern=r"\w+").build_analyzer()
    texts = [s.text for d in DOCUMENTS for s in d.sections] + [q["question"] for q in QUESTIONS]
    stopped = [[w for w in cut(text) if w not in STOP_WORDS] for text in texts]
    assert [len(terms(text)) for text in texts] == list(map(len, stopped))
    for text, words in zip(texts, stopped):
        assert all(word.startswith(term.removesuffix("y")) for word, term in zip(words, terms(text)))


# Sentences as their words, each of which is to find its own.
SENTENCES = {
    "Chinese": ["末班 渡轮 晚上 九点 离开 码头", "图书馆 星期六 开门", "面包师 住 在 山上"],
    "Japanese": [
        "最終 フェリー は 九時 に 港 を 出る",
        "図書館 は 土曜日 に 開く",
        "パン屋 は 丘 の上 に 住む",
    ],
    "Korean": ["마지막 여객선 아홉시 떠난다", "도서관 토요일 열린다", "빵집 언덕 산다"],
    "Thai": ["เรือ ข้ามฟาก ออก จาก ท่า", "ห้องสมุด เปิด วันเสาร์", "คนทำขนมปัง อยู่ บนเขา"],
    "Lao": ["ເຮືອ ອອກ ຈາກ ທ່າ", "ຫໍສະໝຸດ ເປີດ ວັນເສົາ"],
    "Khmer": ["ទូក ចាកចេញ ពី កំពង់ផែ", "បណ្ណាល័យ បើក ថ្ងៃសៅរ៍"],
    "Burmese": ["သင်္ဘော ထွက်ခွာ သည်", "စာကြည့်တိုက် ဖွင့် သည်"],
    "Hindi": ["आख़िरी नाव रात नौ बजे", "पुस्तकालय शनिवार खुलता"],
    "Arabic": ["تغادر العبارة الميناء", "تفتح المكتبة السبت"],
}
SPACED = {"Hindi", "Arabic"}


@pytest.mark.parametrize("language", SENTENCES)
def test_each_word_finds_its_sentence(language):
    sentences = [sentence.split() for sentence in SENTENCES[language]]
    bm25 = BM25()
    space = " " if language in SPACED else ""
    bm25.add(range(len(sentences)), [space.join(sentence) + "." for sentence in sentences])
    asked = 0
    for i, words in enumerate(sentences):
        for word in words:
            if sum(word in other for other in sentences) == 1 and len(SYLLABLE.findall(word)) != 1:
                assert bm25.search(word, 1)[0][0] == i, word
                asked += 1
    assert asked >= 4


def test_a_chinese_character_is_found_within_a_run():
    bm25 = BM25()
    bm25.add([1, 2], ["末班渡轮离开码头", "图书馆"])
    assert [i for i, _ in bm25.search("轮", 9)] == [1] and [i for i, _ in bm25.search("书", 9)] == [2]


def test_words_that_differ_in_their_vowels_or_signs_are_different():
    texts = ["दिन", "दीन", "C", "C++", "C#", "F#", "C++17 と C#", "使用C++编程"]
    bm25 = BM25()
    bm25.add(range(len(texts)), texts)
    found = {q: {i for i, _ in bm25.search(q, 9)} for q in ("दिन", "दीन", "c", "c++", "c#", "f#", "17")}
    assert found == {"दिन": {0}, "दीन": {1}, "c": {2}, "c++": {3, 6, 7}, "c#": {4, 6}, "f#": {5}, "17": {6}}


@pytest.mark.parametrize("settings", [{"k1": -1}, {"b": 1.5}])
def test_bm25_refuses_settings_out_of_range(settings):
    with pytest.raises(ValueError, match="BM25: k1="):
        BM25(**settings)


def test_fusion_by_hand():
    found = reciprocal_rank_fusion([["a", "b", "c"], ["c", "d"]], k=1, weights=[1, 2])
    assert found == [("c", 1 / 4 + 2 / 2), ("d", 2 / 3), ("a", 1 / 2), ("b", 1 / 3)]
    assert reciprocal_rank_fusion([["x", "y"]]) == [("x", 1 / 61), ("y", 1 / 62)]
    assert [name for name, _ in reciprocal_rank_fusion([["a", "b"], ["b", "a"]])] == [
        "a",
        "b",
    ]  # equals as first met
    for weights, k in (([1.0], 60), ([1.0, 1.0], -1)):
        with pytest.raises(ValueError, match="fusion needs a weight for each of the 2"):
            reciprocal_rank_fusion([["a"], ["b"]], k, weights)
