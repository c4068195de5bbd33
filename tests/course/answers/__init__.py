"""An answer to each exercise by another way than the reference's: a function of a library, a module of this
course, or a plain loop.
"""

from tests.course.answers import search_and_serving, small_weights, text_and_precision, tokens_and_attention
from tests.course.answers.register import OTHER_ANSWERS

__all__ = [
    "OTHER_ANSWERS",
    "search_and_serving",
    "small_weights",
    "text_and_precision",
    "tokens_and_attention",
]
