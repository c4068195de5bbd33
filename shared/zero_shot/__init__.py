"""Week 6. Zero-shot evaluation: what a GPT knows without being trained on the task.

A task is scored by likelihood: the model never writes, it is asked how probable given continuations are.
"""

from shared.zero_shot.adapter import LMEvalAdapter

__all__ = ["LMEvalAdapter"]
