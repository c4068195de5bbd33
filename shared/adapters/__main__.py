"""Week 9. Fine-tunes a model on your own conversations, from the command line.

    python -m shared.adapters --model smollm2 --data mine.jsonl --out checkpoints/mine
    # all that is wanted for a longer run: stop by itself, watch it, see what it forgets
    python -m shared.adapters --model smollm2 --data mine.jsonl --out checkpoints/mine --epochs 10 \
--patience 3 --sample-every 20 --tracker tensorboard --old-text tinyshakespeare
    # a base in 4 bits, a GPU's number format, less memory; several GPUs
    torchrun --standalone --nproc_per_node=2 -m shared.adapters --model my-llama --data mine.jsonl \
--out checkpoints/mine --method qlora --precision bf16 --recompute
    # it ended too early: two epochs more
    python -m shared.adapters --model smollm2 --data mine.jsonl --out checkpoints/mine --epochs 5 --resume

Before the first step it prints what will happen. What is trained lies in --out in PEFT's form, with its base
named, tokenizer, chat template and card; `python -m shared.export --model smollm2 --adapter checkpoints/mine
--format gguf` makes one file of both. With --resume and more epochs a finished run goes on: with --schedule
constant as if it had had them from the start; with the others the rate follows the longer schedule from there
on, after having fallen once.
"""

import os
import sys
from contextlib import ExitStack, redirect_stdout

from shared.adapters.sft import SFTSettings, fine_tune
from shared.commandline import errors_for_people, parse_args


def main(settings: SFTSettings) -> None:
    """Trains, and says where the result lies and how others load it."""
    result = fine_tune(settings)
    summary = result.summary
    print(
        f"\nheld-out loss {summary['best_val_loss']:.4f} at step {summary['best_step']} of {summary['steps']}"
        f" (kept in {result.folder})"
    )
    for when in ("before", "after"):
        if f"old_text_perplexity_{when}" in summary:
            print(f"old text, perplexity {when}: {summary[f'old_text_perplexity_{when}']:.2f}")
    print(f"\nload it elsewhere:\n\n{result.usage}")


if __name__ == "__main__":
    with errors_for_people(), ExitStack() as stack:
        if os.environ.get("RANK", "0") != "0":  # of several processes the first one speaks
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
        main(parse_args(SFTSettings, sys.argv[1:], __doc__))
