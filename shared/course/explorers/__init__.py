"""Week 0. Explorers: small pages inside a notebook that can be played with, without a kernel or a network."""

from shared.course.explorers.attention import attention_explorer
from shared.course.explorers.bigram import bigram_explorer
from shared.course.explorers.formats import loss_scale_explorer, number_explorer
from shared.course.explorers.frontier import frontier_explorer
from shared.course.explorers.lens import lens_explorer
from shared.course.explorers.page import Explorer
from shared.course.explorers.passages import passages_explorer
from shared.course.explorers.predictions import predictions_explorer
from shared.course.explorers.quantization import quantization_explorer
from shared.course.explorers.rank import rank_explorer
from shared.course.explorers.sampling import sampling_explorer
from shared.course.explorers.slots import slots_explorer
from shared.course.explorers.tokenizer import tokenizer_explorer
from shared.course.explorers.window import window_explorer

__all__ = [
    "Explorer",
    "attention_explorer",
    "bigram_explorer",
    "frontier_explorer",
    "lens_explorer",
    "loss_scale_explorer",
    "number_explorer",
    "passages_explorer",
    "predictions_explorer",
    "quantization_explorer",
    "rank_explorer",
    "sampling_explorer",
    "slots_explorer",
    "tokenizer_explorer",
    "window_explorer",
]
