"""Week 6. A GPT for EleutherAI's lm-evaluation-harness, the program lm-eval."""

from typing import Any

from tqdm import tqdm

from shared.evaluation import MAX_TOKENS, longest_sequence
from shared.models.gpt import GPT
from shared.sampling.generate import generate
from shared.sampling.text import stream_text
from shared.tokenizers.base import Tokenizer
from shared.zero_shot.scoring import Likelihood, score_pairs, start_token

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:  # LMEvalAdapter says so when it is made; all else here works without
    TemplateLM = object


class LMEvalAdapter(TemplateLM):
    """A GPT and its tokenizer as a model of lm-eval.

        lm_eval.simple_evaluate(model=LMEvalAdapter(model, tokenizer), tasks=[...])

    Raises ValueError where lm-eval is not installed. An empty context is <|endoftext|>; writing ends at any
    special token.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, max_tokens: int = MAX_TOKENS):
        if TemplateLM is object:
            raise ValueError('LMEvalAdapter needs lm-eval: pip install "llm-weeks[zero-shot]"')
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    @property
    def eot_token_id(self) -> int:
        """What stands before a text without context."""
        return start_token(self.tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The text's ids, after the token that every text begins with, where the tokenizer has one."""
        if add_special_tokens is False:
            return self.tokenizer.encode(string)
        return self.tokenizer.prompt(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Likelihood]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return score_pairs(self.model, pairs, self.max_tokens, not disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows side by side."""
        limit = longest_sequence(self.model)
        sums = []
        for request in requests:
            text = self.tok_encode(*request.args)
            windows = get_rolling_token_windows(text, self.prefix_token_id, limit, context_len=1)
            pairs = [make_disjoint_window(window) for window in windows]
            scores = score_pairs(self.model, pairs, self.max_tokens, not disable_tqdm)
            sums.append(sum(s.loglikelihood for s in scores))
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to one of the texts that end it."""
        limit = longest_sequence(self.model)
        arguments = [request.args for request in requests]
        texts = []
        for context, asked in tqdm(arguments, desc="writing", disable=disable_tqdm):
            settings = normalize_gen_kwargs(asked)
            until = settings["until"]
            new_tokens = settings["max_gen_toks"]
            if new_tokens >= limit:
                raise ValueError(
                    f"max_gen_toks={new_tokens} leaves no room for a prompt in block_size={limit}: ask for"
                    " less"
                )
            ids = generate(
                self.model,
                self.tok_encode(context)[new_tokens - limit :] or [self.prefix_token_id],
                new_tokens,
                settings.get("temperature", 1.0 if settings["do_sample"] else 0.0),
                top_k=settings.get("top_k"),
                top_p=settings.get("top_p"),
                stop=list(self.tokenizer.special_tokens.values()),
                seed=0,
            )
            text = ""
            for piece in stream_text(self.tokenizer, ids):
                text += piece
                if any(stop and stop in text for stop in until):
                    break
            texts.append(postprocess_generated_text(text, until, think_end_token=None))
        return texts
