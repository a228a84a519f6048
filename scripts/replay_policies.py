"""Replays recorded routing through candidate policies: MB read per token, the cold start included.

    $ python scripts/replay_policies.py                                      # the "code" trace, from layer 0
    $ python scripts/replay_policies.py gpt-oss-20b/decode
    $ python scripts/replay_policies.py qwen3-30b-a3b/general 16

A model in Python of what native/slots.c does when it decodes token by token: one pool of slots, a floor of k slots per layer
that other layers may not take. It is not the C code: no batches, no rounding to single precision.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

TRACES = Path(__file__).resolve().parent / "traces"
N_LAYERS, N_TOKENS = 16, 1500
N_EXPERTS = {"qwen3-30b-a3b": 128, "gpt-oss-20b": 32}
EXPERT_BYTES = {
    "qwen3-30b-a3b": 3 * 884_736,  # gate, up and down of 2048 x 768 in Q4_K
    "gpt-oss-20b": 3 * 4_406_400,  # of 2880 x 2880 in MXFP4, without the biases, which are not paged
}
RECENT, LASTING = 32, 512  # half-lives in tokens, of native/policy.c

Worth = Callable[..., npt.NDArray[Any]]

POLICIES: dict[str, Worth] = {
    "LRU by time": lambda step, **_: step,
    "LRU by tokens, ties by distance": lambda age, away, **_: -(age * N_LAYERS + away),
    "uses / (age + 1), uses since it came": lambda age, fresh, **_: fresh / (age + 1),
    "uses / (age + 1), uses since the start": lambda age, uses, **_: uses / (age + 1),
    "sqrt(uses) / (age + 1)": lambda age, uses, **_: np.sqrt(uses) / (age + 1),
    "log(1 + uses) / (age + 1)": lambda age, uses, **_: np.log1p(uses) / (age + 1),
    "fading uses / (age + 1)": lambda age, fading, **_: fading / (age + 1),
    "fading uses / (age + 1)^0.75": lambda age, fading, **_: fading / (age + 1) ** 0.75,
    "the same and the way to its layer": lambda age, away, fading, **_: -((age + 1) ** 0.75 / fading + away / N_LAYERS),
}


def fade(age: npt.NDArray[Any], half_life: int) -> npt.NDArray[np.float64]:
    """Return what is left of 1 after `age` tokens, as native/policy.c has it: straight between halvings."""
    halvings, since = np.divmod(age, half_life)
    return np.asarray((1 - since / half_life / 2) / 2.0 ** halvings)


def replay(routing: npt.NDArray[np.int64], n_experts: int, share: float, worth: Worth) -> float:
    """Return misses per token for `routing` [layer, token, rank] with this share of the experts in slots."""
    n_slots, floor = int(N_LAYERS * n_experts * share), routing.shape[2]
    layer_of, expert_of = np.full(n_slots, -1), np.zeros(n_slots, int)
    last, step_of, fresh = np.zeros(n_slots), np.zeros(n_slots), np.zeros(n_slots)
    slot_of, uses = np.full((N_LAYERS, n_experts), -1), np.zeros((N_LAYERS, n_experts))
    recent, lasting, chosen_at = np.zeros_like(uses), np.zeros_like(uses), np.zeros_like(uses)
    resident, free, misses, step = np.zeros(N_LAYERS, int), list(range(n_slots)), 0, 0
    for token in range(N_TOKENS):
        for layer in range(N_LAYERS):
            step += 1
            wanted = routing[layer, token]
            uses[layer, wanted] += 1
            since = token - chosen_at[layer, wanted]
            recent[layer, wanted] = recent[layer, wanted] * fade(since, RECENT) + 1
            lasting[layer, wanted] = lasting[layer, wanted] * fade(since, LASTING) + 1
            chosen_at[layer, wanted] = token
            held = [slot for slot in slot_of[layer, wanted] if slot >= 0]
            last[held], step_of[held] = token, step
            fresh[held] += 1
            for expert in wanted[slot_of[layer, wanted] < 0]:
                misses += 1
                if free:
                    slot = free.pop()
                else:
                    age = np.where(layer_of <= layer, token - last, token - 1 - last)
                    away = (layer_of - layer) % N_LAYERS
                    fading = (recent[layer_of, expert_of] * fade(age, RECENT)
                              + lasting[layer_of, expert_of] * fade(age, LASTING) / 8)
                    value = worth(age=age, away=np.where(away == 0, N_LAYERS, away), step=step_of, fresh=fresh,
                                  uses=uses[layer_of, expert_of], fading=fading).astype(float)
                    value[held] = np.inf
                    guarded = resident <= floor
                    guarded[layer] = False
                    value[guarded[layer_of]] = np.inf
                    slot = int(np.argmin(value))
                    slot_of[layer_of[slot], expert_of[slot]] = -1
                    resident[layer_of[slot]] -= 1
                layer_of[slot], expert_of[slot], slot_of[layer, expert] = layer, expert, slot
                last[slot], step_of[slot], fresh[slot] = token, step, 1
                resident[layer] += 1
                held.append(slot)
    return misses / N_TOKENS


def main() -> None:
    """Print the table."""
    trace = sys.argv[1] if len(sys.argv) > 1 else "qwen3-30b-a3b/code"
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    model = trace.split("/")[0]
    routing = np.load(TRACES / f"{trace}.npz")["experts"][first : first + N_LAYERS, :N_TOKENS].astype(np.int64)
    print(f"| MB per token, {trace}, layers {first} to {first + N_LAYERS - 1} | 25 % | 50 % |\n|---|---|---|")
    for name, worth in POLICIES.items():
        mb = [replay(routing, N_EXPERTS[model], share, worth) * EXPERT_BYTES[model] / 1e6 for share in (0.25, 0.5)]
        print(f"| {name} | {mb[0]:.1f} | {mb[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
