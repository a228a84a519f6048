"""Recorded expert choices, and the embeddings and routers that repeat them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Experts = NDArray[np.int64]

TRACES = Path(__file__).parent / "traces"
RECORDINGS = {
    "code": TRACES / "qwen3-30b-a3b" / "code.npz",
    "general": TRACES / "qwen3-30b-a3b" / "general.npz",
    "gpt-oss": TRACES / "gpt-oss-20b" / "decode.npz",
}
# Router logits: 0 for experts not chosen, from just above 2 to 4 for the chosen.
LOGIT_SCALE = 2.0
# What a wrong choice adds to them, roughly: too little to change one.
WRONG_LOGIT = 0.3
# Logit of the right next token; the others' spread around 0 is this / sqrt(n_embd).
NEXT_TOKEN_LOGIT = 25.0


def recorded_experts(trace: str, layers: range, positions: int, top_k: int, n_expert: int) -> Experts:
    """Return the experts to be chosen, [layer, position, rank], in the router's order.

    `trace` is a key of `RECORDINGS` or the path of an .npz file with such an array
    `experts`; `layers` and the first `positions` of it are taken. With fewer experts
    than recorded, ids are taken modulo their number and a clash within a position
    moves on to the next free id. Raises ValueError when more is asked for than was
    recorded.
    """
    path = RECORDINGS.get(trace) or Path(trace)
    with np.load(path) as recording:
        experts: Experts = recording["experts"].astype(np.int64)
    n_recorded = int(experts.max()) + 1
    for name, want, have in (
        ("layers", layers.stop, experts.shape[0]),
        ("positions", positions, experts.shape[1]),
        ("top-k", top_k, experts.shape[2]),
        ("experts", n_expert, n_recorded),
    ):
        if not 0 < want <= have:
            raise ValueError(f"{name} {want}: the recording {path.name} has {have}")
    if top_k > n_expert or not layers or layers.start < 0:
        raise ValueError(f"top-k {top_k} of {n_expert} experts in layers {layers}")
    experts = experts[layers.start : layers.stop, :positions, :top_k].copy()
    if n_expert < n_recorded:
        for chosen in experts.reshape(-1, top_k):
            for rank, expert in enumerate(chosen):
                chosen[rank] = _free_expert(int(expert), chosen[:rank], n_expert)
    return experts


def _free_expert(expert: int, taken: Experts, n_expert: int) -> int:
    """Return the first id from `expert` modulo `n_expert` on that is not taken."""
    expert %= n_expert
    while expert in taken:
        expert = (expert + 1) % n_expert
    return expert


def embeddings(positions: int, n_embd: int, seed: int) -> Floats:
    """Return one embedding per position, orthogonal, its root mean square 1.

    Orthogonal, because then no token's routing is bought at the cost of another's:
    with 1,500 random embeddings of 2,048 dimensions, 3 selections in 100 went astray.
    Raises ValueError when there are more positions than dimensions.
    """
    if positions > n_embd:
        raise ValueError(f"positions {positions}: only n_embd {n_embd} are orthogonal")
    # The discrete Hartley transform is orthogonal, and stays so when columns change
    # sign; a QR decomposition of random numbers would take seconds.
    turns = np.outer(np.arange(positions), np.arange(n_embd)) % n_embd / n_embd
    rows = np.cos(2 * math.pi * turns) + np.sin(2 * math.pi * turns)
    rows *= np.random.default_rng((seed, 1)).choice((-1.0, 1.0), n_embd)
    return rows.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Parts:
    """How an embedding of `n_embd` numbers is cut, so that a layer's input says nothing of the next one's choice.

    With `n` above 1, layer l's norm lets through part l % n and a small one that all layers share, and sets the rest to zero. The
    routing is in the former. In the latter lies a choice that is wrong: what foretells from one layer's input is sure of it.
    """

    n: int
    n_embd: int

    @property
    def n_shared(self) -> int:
        """Numbers that all layers see."""
        return self.n_embd // 16 if self.n > 1 else 0

    def own(self, layer: int) -> slice:
        """Return where the numbers of a layer's routing are."""
        width = (self.n_embd - self.n_shared) // self.n
        return slice(layer % self.n * width, (layer % self.n + 1) * width)

    def embeddings(self, positions: int, seed: int) -> Floats:
        """Return one embedding per position; each part of them is orthogonal. Raises ValueError as `embeddings` does."""
        rows = np.random.default_rng((seed, 4)).standard_normal((positions, self.n_embd), dtype=np.float32)
        for part in range(self.n):
            own = self.own(part)
            rows[:, own] = embeddings(positions, own.stop - own.start, seed + part)
        return rows

    def norm(self, layer: int) -> Floats:
        """Return the weight of the norm in front of a layer's experts."""
        weight = np.zeros(self.n_embd, dtype=np.float32)
        weight[self.own(layer)] = 1
        weight[self.n_embd - self.n_shared :] = 1
        return weight

    def router(self, layer: int, chosen: Experts, n_expert: int, embedded: Floats, seed: int) -> Floats:
        """Return a layer's router weights, as `router` does."""
        own = self.own(layer)
        weights = np.zeros((n_expert, self.n_embd), dtype=np.float32)
        weights[:, own] = router(chosen, n_expert, embedded[:, own])
        if self.n_shared:
            spread = WRONG_LOGIT / math.sqrt(self.n_shared)
            wrong = np.random.default_rng((seed, 5, layer)).standard_normal((n_expert, self.n_shared), dtype=np.float32)
            weights[:, self.n_embd - self.n_shared :] = np.float32(spread) * wrong
        return weights


def vocabulary_rows(embedded: Floats, n_other: int, seed: int) -> tuple[Floats, Floats]:
    """Return the rows of the token embedding and of the output head.

    The head's row of a token is the embedding of the one before it. The `n_other`
    tokens outside the recording share a direction, and it leads to the first
    position: after any text the model starts to recite. They are never predicted.
    """
    n_embd = embedded.shape[1]
    rng = np.random.default_rng((seed, 2))
    shared = rng.standard_normal(n_embd, dtype=np.float32)
    own = rng.standard_normal((n_other, n_embd), dtype=np.float32)
    others = np.float32(0.6) * shared + np.float32(0.8) * own
    predecessors = np.roll(embedded, 1, axis=0)
    predecessors[0] += shared
    head = np.concatenate([np.zeros_like(others), predecessors])
    head *= np.float32(NEXT_TOKEN_LOGIT / n_embd)
    return np.concatenate([others, embedded]), head


def router(chosen: Experts, n_expert: int, embedded: Floats) -> Floats:
    """Return a layer's router weights, given its chosen experts [position, rank].

    The least-squares solution from embeddings to target logits, which is this simple
    because the embeddings are orthogonal.
    """
    positions, top_k = chosen.shape
    targets = np.zeros((positions, n_expert), dtype=np.float32)
    ranked = 2 - np.arange(top_k, dtype=np.float32) / top_k
    np.put_along_axis(targets, chosen, ranked[None] * np.float32(LOGIT_SCALE), axis=1)
    return targets.T @ embedded / np.float32(embedded.shape[1])
