"""Random weights, written straight in GGUF's quantised formats.

Quantising real floats costs seconds per gigabyte; a block of random bytes with a
sane scale is just as good a weight for a model whose weights mean nothing. Every
byte apart from the scales is random, so no two experts are alike and nothing in the
file compresses or deduplicates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

Blocks = NDArray[np.uint8]
Q = GGMLQuantizationType

# Small enough to stay in a core's cache while it is filled and written.
CHUNK_BYTES = 1 << 18

# Standard deviation of the weights of a random block whose scale is 1.
# Q4_K:  w = d*sc*q - dmin*m with q in 0..15, sc and m in 0..63, dmin = 7.5*d.
# Q6_K:  w = d*sc*q with sc in -128..127, q in -32..31.
# Q8_0:  w = d*q with q in -127..127.
# MXFP4: w = 2^e * {0, .5, 1, 1.5, 2, 3, 4, 6}, F16: w = 2^e * (1..2), both signed.
UNIT_STD = {Q.Q4_K: 258.3, Q.Q6_K: 1366.0, Q.Q8_0: 73.6, Q.MXFP4: 2.93, Q.F16: 1.53}
RANDOM_TYPES = (*UNIT_STD, Q.F32)


def nbytes(qtype: GGMLQuantizationType, n_weights: int) -> int:
    """Return the size of `n_weights` weights; ValueError for a part of a block."""
    block, block_bytes = GGML_QUANT_SIZES[qtype]
    if n_weights % block:
        raise ValueError(f"{n_weights} weights: no multiple of {qtype.name}'s {block}")
    size: int = n_weights // block * block_bytes
    return size


def random_weights(qtype: GGMLQuantizationType, n_weights: int, std: float, seed: tuple[int, ...]) -> Iterator[Blocks]:
    """Yield the bytes of random weights in chunks of at most `CHUNK_BYTES`.

    `std` is the standard deviation that the weights have once dequantised; MXFP4 and
    F16 round it to a power of two. The same `seed` gives the same bytes.
    """
    rng = np.random.Generator(np.random.SFC64(seed))
    block_bytes = GGML_QUANT_SIZES[qtype][1]
    total = nbytes(qtype, n_weights) // block_bytes
    step = max(1, CHUNK_BYTES // block_bytes)
    for start in range(0, total, step):
        yield _blocks(qtype, min(step, total - start), std, rng).reshape(-1)


def _blocks(qtype: GGMLQuantizationType, count: int, std: float, rng: np.random.Generator) -> Blocks:
    """Return `count` random blocks, one per row."""
    if qtype == Q.F32:
        values = rng.standard_normal(count, dtype=np.float32) * np.float32(std)
        return values.view(np.uint8)
    size = GGML_QUANT_SIZES[qtype][1]
    words = rng.integers(0, 1 << 64, -(-count * size // 8), dtype=np.uint64)
    blocks: Blocks = words.view(np.uint8)[: count * size].reshape(count, size)
    scale = std / UNIT_STD[qtype]
    exponent = round(math.log2(scale))
    if qtype == Q.F16:
        # Keep sign and mantissa, replace the exponent (bias 15).
        bits = blocks.view(np.uint16)
        bits &= np.uint16(0x83FF)
        bits |= np.uint16(max(1, exponent + 15) << 10)
    elif qtype == Q.MXFP4:
        blocks[:, 0] = exponent + 127
    elif qtype == Q.Q4_K:
        blocks[:, :4] = _half(scale, 7.5 * scale)
    elif qtype == Q.Q6_K:
        blocks[:, 208:] = _half(scale)
    elif qtype == Q.Q8_0:
        blocks[:, :2] = _half(scale)
        # ggml's own quantiser never writes -128, so no kernel needs to cope with it.
        quants = blocks[:, 2:].view(np.int8)
        np.maximum(quants, -127, out=quants)
    else:
        raise ValueError(f"no random blocks of type {qtype.name}")
    return blocks


def _half(*values: float) -> Blocks:
    """Return the bytes of little-endian half floats."""
    return np.array(values, dtype="<f2").view(np.uint8)
