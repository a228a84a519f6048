"""Measure prompt-lookup drafts: answers that copy their prompt and answers that do not, with and without, in turn.

usage: python scripts/bench_drafts.py MODEL [--budget 25%] [--rounds 3]

Prints a JSON line per kind of text: tokens per second with drafts over without, the median of
the rounds, tokens per decode, megabytes read per token of each, and whether the answers are
the same. They need not be: a batch of several tokens is computed with other bits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from gguf_pager import Llama
from gguf_pager.bench.tokens import TEXT
from gguf_pager.doctor import physical_cores


def prompts() -> dict[str, str]:
    """Return a prompt whose answer is in it, and one whose answer is not."""
    text = " ".join(TEXT.read_text("utf-8").split())[:600]
    ask = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    return {
        "copied": ask.format(f"Repeat this text word by word, twice: {text}") + text[:200],
        "plain": ask.format("Tell me a story about a lighthouse, with many details."),
    }


def answer(llm: Llama, prompt: str, n_tokens: int) -> dict[str, Any]:
    """Return what an answer took, its prompt computed before the clock starts."""
    ids = llm.tokenize(prompt.encode(), special=True)
    llm.reset()
    llm.eval(ids[:-1])
    before, begun = llm.pager.stats(), time.perf_counter()
    made = []
    for token in llm.generate(ids, temp=0.0, reset=True):
        made.append(token)
        if len(made) == n_tokens:
            break
    seconds, after = time.perf_counter() - begun, llm.pager.stats()
    visits = after.layers[0].visits - before.layers[0].visits
    return {"tokens": made, "speed": n_tokens / seconds, "per_decode": n_tokens / visits,
            "mb": (after.bytes_read - before.bytes_read) / n_tokens / 1e6}


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description="Measure prompt-lookup drafts.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--drafted", type=int, default=4, help="tokens that are guessed at once")
    options = parser.parse_args()

    def opened(**more: Any) -> Llama:
        return Llama(str(options.model), budget=options.budget, n_ctx=2048, n_threads=physical_cores(), verbose=False,
                     profile=False, adapt_threads=False, **more)

    drafts = LlamaPromptLookupDecoding(num_pred_tokens=options.drafted)
    with opened() as without, opened(draft_model=drafts) as with_drafts:
        for name, prompt in prompts().items():
            pairs = [(answer(without, prompt, options.tokens), answer(with_drafts, prompt, options.tokens))
                     for _ in range(options.rounds)]
            print(json.dumps({
                "text": name, "budget": options.budget, "drafted": options.drafted,
                "speed_ratio": round(statistics.median(w["speed"] / o["speed"] for o, w in pairs), 2),
                "tokens_per_decode": round(statistics.median(w["per_decode"] for _, w in pairs), 2),
                "mb_per_token": [round(statistics.median(p[i]["mb"] for p in pairs), 1) for i in (0, 1)],
                "same_tokens": all(o["tokens"] == w["tokens"] for o, w in pairs),
            }))


if __name__ == "__main__":
    main()
