"""Week 1. What a model with a tokenizer can be asked in text: to go on, as a whole or bit by bit, and for the
probability of a text.
"""

from collections.abc import Iterator, Sequence
from typing import overload

from shared.evaluation import TextScore, score_text, score_texts
from shared.registry import LanguageModel
from shared.sampling.completion import generate_batch, generate_stream
from shared.sampling.generate import NEW_TOKENS
from shared.sampling.speculation import Speculation


class TextModel(LanguageModel):
    """A language model that is asked in text; it needs its `tokenizer` for it."""

    @overload
    def generate(
        self,
        prompt: str,
        max_new_tokens: int = NEW_TOKENS,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        use_cache: bool = True,
        speculate: Speculation | None = None,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        max_new_tokens: int = NEW_TOKENS,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        use_cache: bool = True,
        speculate: Speculation | None = None,
    ) -> list[str]: ...

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = NEW_TOKENS,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        use_cache: bool = True,
        speculate: Speculation | None = None,
    ) -> str | list[str]:
        """The text that the model adds to a prompt, or to each of several: only what is new.

        temperature: 1 draws as the model believes, 0 takes the likeliest token. top_k, top_p: draw only from
        the likeliest tokens. repetition_penalty: above 1, what stands there already is less likely to come.
        stop: a text or several, at which to end; the tokenizer's end tokens end a text too. seed: None draws
        differently each time. speculate: writes the same in fewer steps, see
        `shared.sampling.speculation`. For log-probabilities, and for prompts in tokens, see
        `shared.sampling.generate_batch`, which has the errors too.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        for text in prompts:
            if not isinstance(text, str):
                raise ValueError(
                    f"a prompt is {text!r}: each must be a text; tokens go to shared.sampling.generate_batch"
                )
        written = generate_batch(
            self,
            prompts,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            stop=stop,
            seed=seed,
            use_cache=use_cache,
            speculate=speculate,
        )
        return written[0].text if isinstance(prompt, str) else [one.text for one in written]

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = NEW_TOKENS,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        use_cache: bool = True,
        speculate: Speculation | None = None,
    ) -> Iterator[str]:
        """Pieces of what `generate` returns, as they are written: whole characters, none of a stop text."""
        return generate_stream(
            self,
            prompt,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            stop=stop,
            seed=seed,
            use_cache=use_cache,
            speculate=speculate,
        )

    @overload
    def score(self, text: str, *, stride: int | None = None) -> TextScore: ...

    @overload
    def score(self, text: list[str] | tuple[str, ...], *, stride: int | None = None) -> list[TextScore]: ...

    def score(self, text: str | Sequence[str], *, stride: int | None = None) -> TextScore | list[TextScore]:
        """How probable the model finds a text, or each of several: log-probabilities, perplexity, bits per
        byte. See `shared.evaluation.score_text`.
        """
        if isinstance(text, str):
            return score_text(self, text, stride=stride)
        return score_texts(self, text, stride=stride)
