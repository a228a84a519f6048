"""Replays recorded routing through candidate policies, and through what a profile of earlier use can do: MB per token.

    $ python scripts/replay_policies.py             # who leaves, the cold start included
    $ python scripts/replay_policies.py profile     # experts read at the start, pinned, or known to the policy
    $ python scripts/replay_policies.py sequences   # several sequences, each at a place of its own in the recording, in one batch

A model in Python of what native/slots/slots.c does when it decodes token by token: one pool of slots, a floor of k slots per layer
that other layers may not take. It is not the C code; that of several sequences has no floor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

TRACES = Path(__file__).resolve().parent / "traces"
CODE, GENERAL = TRACES / "qwen3-30b-a3b" / "code.npz", TRACES / "qwen3-30b-a3b" / "general.npz"
GPT_OSS = TRACES / "gpt-oss-20b" / "decode.npz"
N_TOKENS = 1500
EXPERT_BYTES = {128: 3 * 884_736, 32: 3 * 4_406_400}  # by experts per layer: Qwen3-30B in Q4_K, gpt-oss-20b in MXFP4
N_LAYERS = {128: 16, 32: 12}

RECENT, LASTING, LASTING_WEIGHT = 32, 512, 1 / 8  # native/slots/policy.c

Floats = npt.NDArray[np.float64]
Routing = npt.NDArray[np.int64]  # [layer, token, rank]
Worth = Callable[..., npt.NDArray[Any]]


def fade(age: Floats, half_life: int) -> Floats:
    """Return what is left of 1 after `age` tokens; straight between halvings, as in native/slots/policy.c."""
    return (1 - age % half_life / half_life / 2) * 0.5 ** (age // half_life)


def fading(age: Floats, away: Floats, recent: Floats, lasting: Floats, power: float = 0.75, weight: float = LASTING_WEIGHT,
           **_: Any) -> Floats:
    """Return what native/slots/policy.c calls uses per age: minus the time until an expert is wanted, as far as is known."""
    uses = recent * fade(age, RECENT) + weight * lasting * fade(age, LASTING)
    return -((age + 1) ** power / np.maximum(uses, 1e-12) + away)


POLICIES: dict[str, Worth] = {
    "LRU by time": lambda step, **_: step,
    "LRU by tokens, ties by distance": lambda age, away, **_: -(age + away),
    "uses / (age + 1), uses since it came": lambda age, fresh, **_: fresh / (age + 1),
    "uses / (age + 1), uses since the start": lambda age, uses, **_: uses / (age + 1),
    "sqrt(uses) / (age + 1)": lambda age, uses, **_: np.sqrt(uses) / (age + 1),
    "log(1 + uses) / (age + 1)": lambda age, uses, **_: np.log1p(uses) / (age + 1),
    "uses that fade by half in 32 tokens / (age + 1)": lambda age, recent, **_: recent * fade(age, RECENT) / (age + 1),
    "the same and the way to its layer": lambda **use: fading(**use, power=1, weight=0),
    "two counts that fade, by half in 32 and 512": lambda **use: fading(**use, power=1),
    "the same by (age + 1) ** 0.75, as in native/slots/policy.c": fading,
}


class Pool:
    """Slots, who is in them, and what is known of every expert."""

    def __init__(self, n_layers: int, n_experts: int, n_slots: int) -> None:
        self.layer_of, self.expert_of = np.full(n_slots, -1), np.zeros(n_slots, int)
        self.last, self.step_of, self.fresh = np.zeros(n_slots), np.zeros(n_slots), np.zeros(n_slots)
        self.is_pinned = np.zeros(n_slots, bool)
        self.slot_of = np.full((n_layers, n_experts), -1)
        self.uses, self.recent, self.lasting = (np.zeros((n_layers, n_experts)) for _ in range(3))
        self.last_use = np.zeros((n_layers, n_experts))
        self.resident = np.zeros(n_layers, int)
        self.free = list(range(n_slots))

    def put(self, slot: int, layer: int, expert: int) -> None:
        """Fill a slot that is free."""
        self.layer_of[slot], self.expert_of[slot], self.slot_of[layer, expert] = layer, expert, slot
        self.resident[layer] += 1

    def use(self, layer: int, experts: Routing, token: int) -> None:
        """Count a token's choices."""
        self.uses[layer, experts] += 1
        since = token - self.last_use[layer, experts]
        for counts, half_life in ((self.recent, RECENT), (self.lasting, LASTING)):
            counts[layer, experts] = counts[layer, experts] * fade(since, half_life) + 1
        self.last_use[layer, experts] = token


def replay(routing: Routing, share: float, worth: Worth, pool: Pool | None = None, n_tokens: int = N_TOKENS) -> Floats:
    """Return the MB read for each token of `routing` with this share of the experts in slots.

    `pool`, for n_slots of that share, may know something and hold experts already.
    """
    n_layers, n_experts = len(routing), int(routing.max()) + 1
    p = pool or Pool(n_layers, n_experts, int(n_layers * n_experts * share))
    floor, step, misses = routing.shape[2], 0, np.zeros(n_tokens)
    for token in range(n_tokens):
        for layer in range(n_layers):
            step += 1
            wanted = routing[layer, token]
            p.use(layer, wanted, token)
            held = [slot for slot in p.slot_of[layer, wanted] if slot >= 0]
            p.last[held], p.step_of[held] = token, step
            p.fresh[held] += 1
            for expert in wanted[p.slot_of[layer, wanted] < 0]:
                misses[token] += 1
                if p.free:
                    slot = p.free.pop()
                else:
                    away = (p.layer_of - layer) % n_layers
                    at = (p.layer_of, p.expert_of)
                    value = worth(age=np.where(p.layer_of <= layer, token - p.last, token - 1 - p.last),
                                  away=np.where(away == 0, n_layers, away) / n_layers, step=p.step_of, fresh=p.fresh,
                                  uses=p.uses[at], recent=p.recent[at], lasting=p.lasting[at]).astype(float)
                    value[held] = value[p.is_pinned] = np.inf
                    guarded = p.resident <= floor
                    guarded[layer] = False
                    value[guarded[p.layer_of]] = np.inf
                    slot = int(np.argmin(value))
                    p.slot_of[at[0][slot], at[1][slot]] = -1
                    p.resident[p.layer_of[slot]] -= 1
                p.put(slot, layer, expert)
                p.last[slot], p.step_of[slot], p.fresh[slot] = token, step, 1
                held.append(slot)
    return misses * EXPERT_BYTES[n_experts] / 1e6


def recorded(path: Path) -> Routing:
    """Return a recording, as many of its layers as the test models have."""
    experts = np.load(path)["experts"].astype(np.int64)
    return experts[: N_LAYERS[int(experts.max()) + 1]]


def prepared(past: Routing, share: float, warm: float = 0, seed: float = 0, pinned: float = 0) -> Pool:
    """Return a pool that has learned from a past recording.

    `warm` is the share of its slots that the most used experts are in from the start, `pinned` that of those that stay;
    `seed` the part of what the policy would have counted in the long run that it counts from the start.
    """
    n_layers, n_experts = len(past), int(past.max()) + 1
    pool = Pool(n_layers, n_experts, int(n_layers * n_experts * share))
    shares = np.array([np.bincount(layer.ravel(), minlength=n_experts) for layer in past]) / past.shape[1]
    pool.recent, pool.lasting = (shares * seed * half_life / np.log(2) for half_life in (RECENT, LASTING))
    pool.uses = pool.recent.copy()
    for place, index in enumerate(np.argsort(-shares, axis=None, kind="stable")[: int(max(warm, pinned) * len(pool.free))]):
        slot = pool.free.pop()
        pool.put(slot, *divmod(int(index), n_experts))
        pool.is_pinned[slot] = place < pinned * len(pool.layer_of)
    return pool


def show_policies() -> None:
    """Print who leaves best."""
    print("| MB per token | code, 25 % | 50 % | general, 25 % | 50 % | gpt-oss, 25 % | 50 % |\n" + "|---" * 7 + "|")
    for name, worth in POLICIES.items():
        cells = [f"{replay(recorded(path), share, worth).mean():.1f}" for path in (CODE, GENERAL, GPT_OSS)
                 for share in (0.25, 0.5)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def show_profiles() -> None:
    """Print what a profile of one text is good for with another."""
    code, general = recorded(CODE), recorded(GENERAL)
    gpt_oss = recorded(GPT_OSS)
    cases = ((general, code), (code[:, 1024:], code), (gpt_oss[:, 1024:], gpt_oss))
    ways: dict[str, dict[str, float]] = {
        "nothing": {},
        "policy told, 0.3 of the long run": {"seed": 0.3},
        "half of the slots warm, policy told 0.02": {"warm": 0.5, "seed": 0.02},
        "half of the slots warm, policy told 0.3": {"warm": 0.5, "seed": 0.3},
        "all slots warm, policy told 0.02": {"warm": 1, "seed": 0.02},
        "5 % of the slots pinned": {"pinned": 0.05},
        "25 % of the slots pinned": {"pinned": 0.25},
    }
    print("MB per token, first 16 / 64 / 1,000 tokens\n\n| | code after general, 25 % | 50 % | code after other code, 25 % "
          "| 50 % | gpt-oss after other texts, 25 % | 50 % |\n" + "|---" * 7 + "|")
    for name, way in ways.items():
        cells = []
        for past, now in cases:
            for share in (0.25, 0.5):
                read = replay(now, share, fading, prepared(past, share, **way), 1000)
                cells.append(" / ".join(f"{read[:n].mean():.1f}" for n in (16, 64, 1000)))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


Key = tuple[int, int]  # layer, expert


def batches(routing: Routing, n_sequences: int, n_steps: int) -> list[list[set[Key]]]:
    """Return what each layer wants in each step, of sequences that begin as far from each other as can be."""
    n_tokens = routing.shape[1]
    starts = [i * n_tokens // n_sequences for i in range(n_sequences)]
    return [[{(layer, int(e)) for start in starts for e in experts[(start + step) % n_tokens]} for layer, experts in enumerate(routing)]
            for step in range(n_steps)]


def misses_with_policy(steps: list[list[set[Key]]], n_slots: int) -> Floats:
    """Return the misses of each step with the worth of native/slots/policy.c; ages in steps."""
    n_layers, held, misses = len(steps[0]), set[Key](), np.zeros(len(steps))
    last, recent, lasting = dict[Key, int](), dict[Key, float](), dict[Key, float]()

    def worth(key: Key, layer: int, step: int) -> float:
        age, away = step - last[key] - (key[0] > layer), (key[0] - layer) % n_layers or n_layers
        uses = recent[key] * fade(np.float64(age), RECENT) + LASTING_WEIGHT * lasting[key] * fade(np.float64(age), LASTING)
        return float(-((age + 1) ** 0.75 / uses + away / n_layers))

    for step, layers in enumerate(steps):
        for layer, wanted in enumerate(layers):
            for key in wanted:
                age = np.float64(step - last.get(key, step))
                recent[key] = recent.get(key, 0) * fade(age, RECENT) + 1
                lasting[key] = lasting.get(key, 0) * fade(age, LASTING) + 1
                last[key] = step
            missed = wanted - held
            misses[step] += len(missed)
            n_over = len(held) + len(missed) - n_slots
            if n_over > 0:
                held -= set(sorted(held - wanted, key=lambda key: worth(key, layer, step))[:n_over])
            held |= missed
    return misses


def misses_at_best(steps: list[list[set[Key]]], n_slots: int) -> Floats:
    """Return the misses of each step where always the one leaves that is wanted last: what no policy can do better (Belady, 1966)."""
    wanted_at: dict[Key, list[int]] = {}
    for i, wanted in enumerate(wanted for layers in steps for wanted in layers):
        for key in wanted:
            wanted_at.setdefault(key, []).append(i)
    for times in wanted_at.values():
        times.reverse()
    held, misses = set[Key](), np.zeros(len(steps))
    for step, layers in enumerate(steps):
        for wanted in layers:
            for key in wanted:
                wanted_at[key].pop()
            missed = wanted - held
            misses[step] += len(missed)
            n_over = len(held) + len(missed) - n_slots
            if n_over > 0:
                held -= set(sorted(held - wanted, key=lambda key: wanted_at[key][-1] if wanted_at[key] else sys.maxsize)[-n_over:])
            held |= missed
    return misses


def show_sequences(n_steps: int = 192, share: float = 0.25) -> None:
    """Print what several sequences want together, and what of it has to be read."""
    print("| sequences | experts over one's: code | MB per token | at best | general | MB per token | at best |\n" + "|---" * 7 + "|")
    alone: dict[Path, float] = {}
    for n_sequences in (1, 2, 4, 8):
        cells = []
        for path in (CODE, GENERAL):
            routing = recorded(path)
            steps = batches(routing, n_sequences, n_steps)
            n_wanted = np.mean([sum(map(len, layers)) for layers in steps])
            n_slots = int(len(routing) * 128 * share)
            cells.append(f"{n_wanted / alone.setdefault(path, float(n_wanted)):.2f}")
            cells += [f"{misses[32:].mean() / n_sequences * EXPERT_BYTES[128] / 1e6:.0f}"
                      for misses in (misses_with_policy(steps, n_slots), misses_at_best(steps, n_slots))]
        print(f"| {n_sequences} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    {"profile": show_profiles, "sequences": show_sequences}.get(" ".join(sys.argv[1:]), show_policies)()
