"""Change numbers in the headers of models of the zoo, open them, and see that no process ends and no token is wrong.

    python scripts/fuzz_metadata.py [--rounds N] [--seed N] [--arch NAME ...] [--keys all] [--overrides]

Each round makes a model with one to three of its numbers changed, in value or in type, and opens it in a process of its
own: gguf_pager must refuse it with an error of its own, or llama.cpp refuses it, or three tokens get the logits that stock
llama.cpp gives. A process that ends otherwise, or does not end within a minute, is a fault and is printed; the exit code
is then 1. Without `--keys all` those keys are changed that say how many blocks, experts and parts there are; with it, all
numbers, and what is found is about llama.cpp rather than about us.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import make_zoo
import numpy as np
from gguf import GGUFValueType

import gguf_pager
from gguf_pager import PagerError

COUNTS = (
    "block_count", "nextn_predict_layers", "leading_dense_block_count", "embedding_length", "expert_count",
    "expert_used_count", "expert_group_count", "expert_group_used_count", "expert_feed_forward_length",
    "expert_shared_count", "expert_gating_func", "experts_per_group", "interleave_moe_layer_step", "moe_every_n_layers",
    "feed_forward_length", "expert_shared_feed_forward_length", "expert_chunk_feed_forward_length", "vocab_size",
)
"""Without the name of the architecture before them."""

INTEGERS = (GGUFValueType.UINT8, GGUFValueType.INT8, GGUFValueType.UINT16, GGUFValueType.INT16, GGUFValueType.UINT32,
            GGUFValueType.INT32, GGUFValueType.UINT64, GGUFValueType.INT64)

LIMITS = {GGUFValueType.UINT8: (0, 255), GGUFValueType.INT8: (-128, 127), GGUFValueType.UINT16: (0, 65535),
          GGUFValueType.INT16: (-32768, 32767), GGUFValueType.UINT32: (0, 2**32 - 1),
          GGUFValueType.INT32: (-2**31, 2**31 - 1), GGUFValueType.UINT64: (0, 2**64 - 1),
          GGUFValueType.INT64: (-2**63, 2**63 - 1)}

TOKENS = [7, 300, 42]
REFUSED, LOADS_NOT, EQUAL, UNEQUAL, OTHER = 10, 11, 12, 13, 14
"""What a child's exit code says."""
NAMES = {REFUSED: "refused by gguf_pager", LOADS_NOT: "refused by llama.cpp", EQUAL: "equal to stock",
         UNEQUAL: "unequal to stock", OTHER: "another exception"}
_SECONDS = 60


@dataclass(frozen=True)
class Change:
    """One key's new value; None takes it out. `kind` is its type, `item` that of an array's elements."""

    key: str
    value: Any
    kind: GGUFValueType = GGUFValueType.UINT32
    item: GGUFValueType | None = None


def some_value(rng: random.Random, kind: GGUFValueType, now: Any) -> int:
    """Return a number near to what it was, near to a limit, or small."""
    low, high = LIMITS[kind]
    was = now if type(now) is int else 3
    near = [was - 1, was + 1, was * 2, was // 2, was + 7, -was, 0, 1, 2, 3, 4, 5, 8, 10, 100, 512, 513, 1024, 1025, 65535,
            high, high - 1, low, high // 2, 10**9]
    return min(max(rng.choice(near), low), high)


def some_change(rng: random.Random, keys: list[str], fields: dict[str, gguf.ReaderField]) -> Change:
    """Return what becomes of one of the keys."""
    key = rng.choice(keys)
    now = fields[key].contents() if key in fields else None
    way = rng.random()
    if way < 0.08:
        return Change(key, None)
    if way < 0.6:
        return Change(key, some_value(rng, GGUFValueType.UINT32, now))
    if way < 0.7:
        kind = rng.choice(INTEGERS)
        return Change(key, some_value(rng, kind, now), kind)
    if way < 0.78:
        return Change(key, rng.choice(["", "3", "many", "\x1b[31m"]), GGUFValueType.STRING)
    if way < 0.83:
        return Change(key, rng.choice([0.0, 1.5, -3.0, float("nan"), float("inf")]), GGUFValueType.FLOAT32)
    if way < 0.87:
        return Change(key, rng.random() < 0.5, GGUFValueType.BOOL)
    n = len(now) if isinstance(now, list) else 3
    length = rng.choice([n, n, n, n + 1, max(1, n - 1), 1, 600])
    item = rng.choice([GGUFValueType.UINT32, GGUFValueType.INT32, GGUFValueType.UINT64, GGUFValueType.UINT16])
    return Change(key, [some_value(rng, item, now) for _ in range(length)], GGUFValueType.ARRAY, item)


def write(source: Path | gguf.GGUFReader, path: Path, changes: list[Change]) -> None:
    """Write a model again with these changes."""
    reader = gguf.GGUFReader(source) if isinstance(source, Path) else source
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    new = {change.key: change for change in changes}
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", *new):
            sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    for change in new.values():
        if change.value is not None:
            writer.add_key_value(change.key, change.value, change.kind, change.item)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    make_zoo.finish(writer)


def logits_of(llm: Any) -> Any:
    """Return what llama_decode returns for three tokens, and the logits of the last."""
    from llama_cpp import llama_cpp as low

    batch = low.llama_batch_get_one((low.llama_token * len(TOKENS))(*TOKENS), len(TOKENS))
    status = low.llama_decode(llm.ctx, batch)
    pointer = low.llama_get_logits_ith(llm.ctx, -1) if status == 0 else None
    return status, np.array(pointer[: llm.n_vocab()]) if pointer else None


def compare(path: Path, overrides: dict[str, Any] | None) -> int:
    """Open a file as gguf_pager and then as stock, and return which of the outcomes it was."""
    from llama_cpp import Llama
    from llama_cpp import llama_cpp as low

    arguments: dict[str, Any] = {"n_ctx": 64, "n_batch": 8, "n_ubatch": 8, "n_threads": 1, "n_threads_batch": 1,
                                 "verbose": False, "kv_overrides": overrides}
    try:
        llm = gguf_pager.Llama(str(path), budget="100%", profile=False, **arguments)
    except PagerError:
        return REFUSED
    except ValueError:
        return LOADS_NOT
    ours = logits_of(llm)
    llm.close()
    load = low.llama_model_load_from_file

    def load_unpacked(path_model: bytes, params: Any, /) -> Any:
        params.use_extra_bufts = False
        return load(path_model, params)

    low.llama_model_load_from_file = load_unpacked
    stock = logits_of(Llama(str(path), **arguments))
    is_equal = ours[0] == stock[0] and (
        ours[1] is stock[1] or ours[1] is not None and stock[1] is not None and ours[1].tobytes() == stock[1].tobytes())
    return EQUAL if is_equal else UNEQUAL


def outcome(path: Path, overrides: dict[str, Any] | None = None) -> str:
    """Compare in a child, so that a process which ends is only the child."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = OTHER
        try:
            signal.alarm(_SECONDS)
            os.environ["GGML_NO_BACKTRACE"] = "1"  # which would start a debugger for each process that ends
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 2)
            code = compare(path, overrides)
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return NAMES.get(os.WEXITSTATUS(status), f"exit code {os.WEXITSTATUS(status)}")


GOOD = {NAMES[REFUSED], NAMES[LOADS_NOT], NAMES[EQUAL]}


def fuzz(rounds: int, seed: int, archs: list[str], *, is_all: bool = False, with_overrides: bool = False) -> Counter[str]:
    """Do so many rounds, print each fault, and return how often each outcome came."""
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    readers: dict[str, gguf.GGUFReader] = {}
    with tempfile.TemporaryDirectory(prefix="gguf_pager-fuzz-") as folder:
        for at in range(rounds):
            arch = rng.choice(archs)
            source = Path(folder, f"{arch}.gguf")
            if not source.exists():
                make_zoo.make(arch, source)
                readers[arch] = gguf.GGUFReader(source)
            fields = readers[arch].fields
            keys = [f"{arch}.{key}" for key in COUNTS] + ["split.count", "split.no"]
            if is_all:
                keys = [name for name in fields if name.startswith(f"{arch}.")]
            path = Path(folder, "changed.gguf")
            if with_overrides:
                overrides = {rng.choice(keys)[:120]: rng.choice([
                    some_value(rng, GGUFValueType.INT64, None), some_value(rng, GGUFValueType.INT64, 10), True, 2.5, "3"])
                    for _ in range(rng.randint(1, 2))}
                what: Any = overrides
                found = outcome(source, overrides)
            else:
                changes = [some_change(rng, keys, fields) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
                what = changes
                write(readers[arch], path, changes)
                found = outcome(path)
                path.unlink()
            seen[found] += 1
            if found not in GOOD:
                print(f"round {at}: {arch} {what}: {found}", flush=True)
    return seen


def main() -> int:
    """Parse the command line, fuzz, and print how often each outcome came."""
    parser = argparse.ArgumentParser(description="Change numbers in models' headers and open them.")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--arch", action="append", help="only this architecture; may be repeated")
    parser.add_argument("--keys", choices=("counts", "all"), default="counts")
    parser.add_argument("--overrides", action="store_true", help="set kv_overrides instead of changing the file")
    options = parser.parse_args()
    seen = fuzz(options.rounds, options.seed, options.arch or list(make_zoo.ARCHITECTURES), is_all=options.keys == "all",
                with_overrides=options.overrides)
    for name, n in seen.most_common():
        print(f"{n:6} {name}")
    return 0 if set(seen) <= GOOD else 1


if __name__ == "__main__":
    sys.exit(main())
