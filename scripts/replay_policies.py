"""Replays recorded routing through candidate policies: MB read per token, the cold start included.

    $ python scripts/replay_policies.py

A model in Python of what native/slots.c does when it decodes token by token: one pool of slots, a floor of k slots per layer
that other layers may not take. It is not the C code: no batches, no halving of counts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

TRACE = Path(__file__).resolve().parent / "traces" / "qwen3-30b-a3b" / "code.npz"
N_LAYERS, N_TOKENS, N_EXPERTS = 16, 1500, 128
EXPERT_BYTES = 3 * 884_736  # gate, up and down of 2048 x 768 in Q4_K

Worth = Callable[..., npt.NDArray[Any]]

POLICIES: dict[str, Worth] = {
    "LRU by time": lambda step, **_: step,
    "LRU by tokens, ties by distance": lambda age, away, **_: -(age * N_LAYERS + away),
    "uses / (age + 1), uses since it came": lambda age, fresh, **_: fresh / (age + 1),
    "uses / (age + 1), uses since the start": lambda age, uses, **_: uses / (age + 1),
    "sqrt(uses) / (age + 1)": lambda age, uses, **_: np.sqrt(uses) / (age + 1),
    "log(1 + uses) / (age + 1)": lambda age, uses, **_: np.log1p(uses) / (age + 1),
}


def replay(routing: npt.NDArray[np.int64], share: float, worth: Worth) -> float:
    """Return MB read per token for `routing` [layer, token, rank] with this share of the experts in slots."""
    n_slots, floor = int(N_LAYERS * N_EXPERTS * share), routing.shape[2]
    layer_of, expert_of = np.full(n_slots, -1), np.zeros(n_slots, int)
    last, step_of, fresh = np.zeros(n_slots), np.zeros(n_slots), np.zeros(n_slots)
    slot_of, uses = np.full((N_LAYERS, N_EXPERTS), -1), np.zeros((N_LAYERS, N_EXPERTS))
    resident, free, misses, step = np.zeros(N_LAYERS, int), list(range(n_slots)), 0, 0
    for token in range(N_TOKENS):
        for layer in range(N_LAYERS):
            step += 1
            wanted = routing[layer, token]
            uses[layer, wanted] += 1
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
                    value = worth(age=age, away=np.where(away == 0, N_LAYERS, away), step=step_of, fresh=fresh,
                                  uses=uses[layer_of, expert_of]).astype(float)
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
    return misses * EXPERT_BYTES / 1e6 / N_TOKENS


def main() -> None:
    """Print the table."""
    routing = np.load(TRACE)["experts"][:N_LAYERS, :N_TOKENS].astype(np.int64)
    print("| MB per token | 25 % | 50 % |\n|---|---|---|")
    for name, worth in POLICIES.items():
        print(f"| {name} | {replay(routing, 0.25, worth):.1f} | {replay(routing, 0.5, worth):.1f} |", flush=True)


if __name__ == "__main__":
    main()
