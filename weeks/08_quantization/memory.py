"""Week 8's study of what else fills the memory: the optimizer's state while a model learns, and the keys and
values while it writes; both in 8 bits.
"""

import math
import statistics
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from measure import load_studied
from names import MEMORY
from shared.course.workspace import Workspace
from shared.data.corpus import Corpus, fixed_windows, load_corpus
from shared.evaluation import cross_entropy, evaluate, perplexity
from shared.models.gpt import GPT, GPTConfig, KVCache
from shared.models.names import named_run
from shared.quantization.adamw import AdamW8bit, state_bytes
from shared.quantization.cache import Int8Cache
from shared.runtime import seed_everything, table
from shared.training.base_model import BASE_PRESETS, open_corpus

if TYPE_CHECKING:
    from run import Settings

OPTIMIZERS = {"fp32": torch.optim.AdamW, "int8": AdamW8bit}
BATCH = 4
"""Windows in each step."""
CACHES = {"fp32": KVCache, "int8": Int8Cache}


def study_memory(settings: "Settings") -> dict[str, float]:
    """Loss and bytes with each kind of optimizer state, perplexity and bytes with each kind of cache."""
    base = replace(BASE_PRESETS[settings.preset], data=settings.data)
    corpus = open_corpus(base)
    config = replace(base.model, vocab_size=corpus.tokenizer.vocab_size)
    work = Workspace(__file__, settings, corpus.name, torch.device("cpu"))
    with work.log(named_run(settings.model, MEMORY), settings) as log:
        rows = [
            trained_by(config, corpus, kind, seed, settings.memory_steps)
            for seed in range(settings.memory_seeds)
            for kind in OPTIMIZERS
        ]
        log.artifact(training=rows)
        summary = {}
        for kind in OPTIMIZERS:
            of_kind = [row for row in rows if row["kind"] == kind]
            summary[f"{kind}_loss"] = statistics.fmean(row["loss"] for row in of_kind)
            summary[f"{kind}_state_megabytes"] = of_kind[0]["megabytes"]
        differences = [a["loss"] - b["loss"] for a, b in zip(rows[1::2], rows[::2])]
        summary |= {"smallest_difference": min(differences), "largest_difference": max(differences)}
        summary |= read_through_caches(settings)
        log.finish(**summary)
    print(table(rows))
    print(table({"cache": kind, **_of_kind(summary, kind)} for kind in CACHES))
    return summary


def trained_by(config: GPTConfig, corpus: Corpus, kind: str, seed: int, steps: int) -> dict:
    """A model of week 6's form, trained from the same start and on the same text by one kind of optimizer."""
    seed_everything(seed)
    model = GPT(config)
    optimizer = OPTIMIZERS[kind](model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    ids, targets = fixed_windows(corpus.train, config.block_size)
    for step in tqdm(range(steps), desc=f"AdamW in {kind}, seed {seed}"):
        rows = torch.randint(len(ids), (BATCH,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / steps)
        cross_entropy(model(ids[rows]), targets[rows]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    measured = evaluate(model, corpus.val, config.block_size, corpus.token_bytes)
    return {"kind": kind, "seed": seed, "loss": measured.loss, "megabytes": state_bytes(optimizer) / 1e6}


@torch.inference_mode()
def read_through_caches(settings: "Settings") -> dict[str, float]:
    """The perplexity of held-out text, read through each kind of cache, and the cache's bytes."""
    model = load_studied(settings)
    corpus = load_corpus(settings.data, model.tokenizer, settings.study_block_size)
    ids, targets = fixed_windows(corpus.val, settings.study_block_size, settings.study_windows)
    losses: dict[str, list[float]] = {kind: [] for kind in CACHES}
    summary = {}
    for kind, cache_type in CACHES.items():
        model.cache_type = cache_type
        for window, wanted in zip(tqdm(ids, desc=f"cache in {kind}"), targets):
            cache = model.new_cache(max_length=len(window))
            losses[kind].append(cross_entropy(model(window[None], cache), wanted[None]).item())
        summary[f"{kind}_perplexity"] = perplexity(statistics.fmean(losses[kind]))
        summary[f"{kind}_cache_megabytes"] = cache.num_bytes / 1e6
    increase = [a - b for a, b in zip(losses["int8"], losses["fp32"])]
    summary["cache_worse"] = math.expm1(statistics.fmean(increase))
    summary["cache_worse_error"] = statistics.stdev(increase) / math.sqrt(len(increase))
    return summary | {"cache_tokens": float(ids.size(1)), "tokens": float(ids.numel())}


def _of_kind(summary: dict[str, float], kind: str) -> dict[str, float]:
    return {name: summary[f"{kind}_{name}"] for name in ("perplexity", "cache_megabytes")}
