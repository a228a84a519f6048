"""Energy per token of arXiv 2508.06978, again, from its constants: experts in HBM, in DDR5 or on an SSD, or cached.

Kyung, Yun and Ahn report that decoding with experts on an SSD takes 3.8 to 12.5 times (Mixtral 8x7B) and 4.7 to 9.8
times (DeepSeek-R1) the energy per token of HBM, from a simulator. Here is a roofline of our own with the simulator's
constants. It lists the matrix products that a device does for each layer of one decode step. Each takes the longer of
operations / peak and bytes / bandwidth, and messages between devices take their time too. Copying experts into HBM
runs beside the MoE layers, so that the longer of both counts, and takes its bandwidth away from HBM. The energy is

    bytes of HBM, DDR5, SSD x energy per bit     experts: read where they are, written to HBM, read from HBM
    + multiplications, bytes of L2 and L1        what the paper calls computing
    + (70 W + 57 W) x devices x time of a step   background, also while experts lie in HBM

Two things come from the simulator's code and from no constant: routing is uniform and random, and all devices wait for
the one with most experts to read. Here both are expected values. Nothing was fitted. `gguf-pager energy --model-paper`
gives 3.82 to 12.47 and 4.60 to 9.73: each end within 2.2 %, of which rounding in the paper can be 1 %. Without the wait
for the busiest device it would be 3.82 to 12.54 and 4.91 to 10.06.

Left out: softmax apart from its time, norms, embeddings and the last layer, as in the paper's figures; that one expert
gets more tokens than another; energy of messages, which the simulator counts neither. The paper's figures for single
batch sizes are not known to us, so only the ends of its ranges are compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from gguf_pager.energy.model import Constant
from gguf_pager.errors import PagerError

Medium = Literal["hbm", "ddr5", "ssd"]
Cache = Literal["ddr5", "hbm"]

CODE = "ssd_offloading.patch of github.com/scale-snu/SSD-offloading"
"""The code of the paper, which most constants are from."""

_BASE = "scale-snu/LLMSimulator, which that patch changes, read in its forks HeliosZhou/LLMSimulator and " \
        "caoslab-postech/LLMSimulator_HBF"


def _fact(value: float, unit: str, source: str) -> Constant:
    return Constant(value, value, value, unit, source)


CONSTANTS: Mapping[str, Constant] = MappingProxyType({
    "hbm3_pj_per_bit": _fact(4.2, "pJ/bit", f"{CODE}, module_graph.cpp: HBM3, read and write alike"),
    "ddr5_pj_per_bit": _fact(9.2, "pJ/bit", f"{CODE}, module_graph.cpp: DDR5 read"),
    "ssd_pj_per_bit": _fact(102.4, "pJ/bit", f"{CODE}, module_graph.cpp: read of an M.2 NVMe SSD"),
    "l2_pj_per_bit": _fact(0.3, "pJ/bit", f"{CODE}, module_graph.cpp: L2 cache of the GPU"),
    "l1_pj_per_bit": _fact(0.16, "pJ/bit", f"{CODE}, module_graph.cpp: L1 cache of the GPU"),
    "mac_pj": _fact(0.32, "pJ per multiplication and addition", f"{CODE}, power.h: bf16, from the TPUv4i paper of "
                                                                "ISCA 2021"),
    "gpu_background_w": _fact(70, "W per device", f"{CODE}, figure_4_and_5.py: one H100 SXM 80 GB with its HBM"),
    "ddr5_background_w": _fact(57, "W per device", f"{CODE}, figure_4_and_5.py: 256 GB of DDR5-7200; that of the SSD "
                                                   "is left out there too"),
    "peak_flops": _fact(989.4e12, "operations/s per device", f"{CODE}, hardware_config.h: H100, 16 bit"),
    "hbm_bytes_per_s": _fact(3.352e12, "bytes/s per device", f"{CODE}, hardware_config.h: H100"),
    "link_bytes_per_s": _fact(900e9, "bytes/s per device", f"{CODE}, hardware_config.h and figure_4_and_5.py: NVLink "
                                                           "5, from both DDR5 and SSD; taken away from HBM meanwhile"),
    "nvlink_bytes_per_s": _fact(450e9, "bytes/s per device", f"{CODE}, test.cpp: NVLink 4 between GPUs"),
    "nvlink_s": _fact(0.8e-6, "s per message", f"{CODE}, test.cpp"),
    "infiniband_bytes_per_s": _fact(50e9, "bytes/s per device", f"{CODE}, test.cpp: NDR, between nodes"),
    "infiniband_s": _fact(0.13e-6, "s per message", f"{CODE}, test.cpp"),
    "context_tokens": _fact(1025, "tokens", f"{CODE}, figure_4_and_5.py: first decode step after 1024 tokens"),
    "value_bytes": _fact(2, "bytes per weight and activation", f"{CODE}, config.yaml and model_config.h"),
    "register_tile": _fact(16, "rows and columns", f"{CODE}, tile.h: what L1 is read in"),
    "l1_tile": _fact(320, "rows and columns", f"an assumption: the largest square tile, in steps of 64, that fits into "
                                              f"the 256 KiB of L1 with operands 32 deep; tile.h of {CODE} searches"),
})
"""Facts of the paper's code, unless their source says assumption. Where low equals high the source gives no range."""

RANGES_SOURCE = ("arXiv 2508.06978, over its batch sizes, as this project's design quotes them; of the paper itself only the "
                 "abstract could be checked, which says up to about 12")
"""Where `paper_low` and `paper_high` of a geometry come from."""

ROUTING_SOURCE = f"uniform and random, and all devices wait for the one with most experts: {_BASE}"
"""How tokens are taken to choose experts, and from where that is known."""

ASSUMPTIONS = (
    ("A hit rate is a share of the experts' bytes, the same for each batch size and layer. With the uniform routing of "
    "the paper it is at best the share of experts that fit; only models that prefer some experts hit more often."),
    "A hit in DDR5 crosses the same link as a miss, at 900 GB/s per device as in the paper: only reading it is cheaper.",
    "A hit in HBM is not copied; HBM is taken to have room for it, which costs nothing here.",
    "A miss goes from the SSD to HBM. Filling the cache is not counted: writing DDR5 too would make it 9 % dearer.",
    "Background power is the same whatever the medium, as in the paper.",
)
"""Of the cache before the SSD; the paper has none."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """A model, spread over devices: weights outside experts over `tensor_parallel` of them, experts over all.

    `kv_rank` is zero for grouped-query attention, else attention is DeepSeek's latent one in its absorbed form.
    """

    name: str
    layers: int
    dense_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    experts: int
    top_k: int
    expert_hidden: int
    devices: int
    tensor_parallel: int
    nodes: int
    batches: tuple[int, ...]
    paper_low: float
    paper_high: float
    source: str
    shared_experts: int = 0
    dense_hidden: int = 0
    q_rank: int = 0
    kv_rank: int = 0
    rope_size: int = 0

    def expert_bytes(self, constants: Mapping[str, Constant] = CONSTANTS) -> float:
        """Return the bytes of one expert of one layer: three matrices."""
        return 3 * self.hidden * self.expert_hidden * constants["value_bytes"].value


MIXTRAL = Geometry(
    "Mixtral 8x7B", layers=32, dense_layers=0, hidden=4096, heads=32, kv_heads=8, head_size=128, experts=8, top_k=2,
    expert_hidden=14336, devices=4, tensor_parallel=4, nodes=1, batches=(1, 4, 16, 64, 256, 1024), paper_low=3.8,
    paper_high=12.5, source=f"{CODE}, model_config.h; devices and batch sizes: figure_4_and_5.py")

DEEPSEEK_R1 = Geometry(
    "DeepSeek-R1", layers=60, dense_layers=3, hidden=7168, heads=128, kv_heads=128, head_size=128, experts=256,
    top_k=8, expert_hidden=2048, devices=32, tensor_parallel=8, nodes=4, batches=(4, 16, 64, 256, 1024), paper_low=4.7,
    paper_high=9.8, shared_experts=1, dense_hidden=18432, q_rank=1536, kv_rank=512, rope_size=64,
    source=f"{CODE}, model_config.h (60 layers there, without the one for several tokens); devices and batch sizes: "
           f"figure_4_and_5.py; which matrices are split and which repeated: {_BASE}")

GEOMETRIES = (MIXTRAL, DEEPSEEK_R1)


@dataclass(frozen=True, slots=True)
class Matmul:
    """`count` products of rows x inputs with inputs x outputs."""

    rows: float
    inputs: float
    outputs: float
    count: float = 1

    def traffic_bytes(self, value_bytes: float, tile: float = math.inf) -> float:
        """Return the bytes that cross a level whose upper neighbour holds square tiles of `tile`: operands again for
        each tile of the result, and the result once."""
        down, across = (max(1, math.ceil(length / tile)) for length in (self.rows, self.outputs))
        return self.count * value_bytes * (down * self.inputs * self.outputs + across * self.rows * self.inputs
                                           + self.rows * self.outputs)


@dataclass(frozen=True, slots=True)
class Work:
    """What devices did: joules of computing, bytes of HBM, and the time it took."""

    compute_j: float = 0.0
    hbm_bytes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.compute_j + other.compute_j, self.hbm_bytes + other.hbm_bytes, self.seconds + other.seconds)

    def times(self, factor: float, seconds_factor: float) -> Work:
        """Return the work repeated, where time may repeat less often because devices work side by side."""
        return Work(self.compute_j * factor, self.hbm_bytes * factor, self.seconds * seconds_factor)


@dataclass(frozen=True, slots=True)
class Energy:
    """Joules per token, part by part, and the time of the step that made a token for each sequence of the batch."""

    expert_reads_j: float
    other_reads_j: float
    compute_j: float
    background_j: float
    step_s: float

    @property
    def total_j(self) -> float:
        """All parts together."""
        return self.expert_reads_j + self.other_reads_j + self.compute_j + self.background_j


def active_share(geometry: Geometry, batch: int) -> float:
    """Return the expected share of a layer's experts that a batch needs, each token routed uniformly on its own."""
    return 1 - (1 - geometry.top_k / geometry.experts) ** batch


def active_experts(geometry: Geometry, batch: int) -> float:
    """Return the expected number of distinct experts of a layer that a batch needs."""
    return geometry.experts * active_share(geometry, batch)


def busiest_experts(geometry: Geometry, batch: int) -> float:
    """Return the expected number of active experts on the device that has most of them; all others wait for it.

    Experts count as active independently of each other: 1 % low for one token of Mixtral 8x7B (8/7), less for batches.
    """
    held = geometry.experts // geometry.devices
    share = active_share(geometry, batch)
    at_most, expected = 0.0, 0.0
    for number in range(held):
        at_most += math.comb(held, number) * share ** number * (1 - share) ** (held - number)
        expected += 1 - min(1.0, at_most) ** geometry.devices
    return expected


def joules(size_bytes: float, pj_per_bit: float) -> float:
    """Return what moving bytes takes."""
    return size_bytes * 8 * pj_per_bit * 1e-12


def _do(products: Sequence[Matmul], hbm_bytes_per_s: float, constants: Mapping[str, Constant]) -> Work:
    """Return what one device does in these products, one after the other."""
    value_bytes = constants["value_bytes"].value
    work = Work()
    for product in products:
        operations = 2 * product.rows * product.inputs * product.outputs * product.count
        hbm_bytes = product.traffic_bytes(value_bytes)
        caches_j = sum(joules(product.traffic_bytes(value_bytes, constants[tile].value), constants[pj_per_bit].value)
                       for tile, pj_per_bit in (("register_tile", "l1_pj_per_bit"), ("l1_tile", "l2_pj_per_bit")))
        work += Work(operations / 2 * constants["mac_pj"].value * 1e-12 + caches_j, hbm_bytes,
                     max(operations / constants["peak_flops"].value, hbm_bytes / hbm_bytes_per_s))
    return work


def _feed_forward(rows: float, hidden: int, width: float) -> list[Matmul]:
    return [Matmul(rows, hidden, width, 2), Matmul(rows, width, hidden)]


def _attention(geometry: Geometry, rows: float, context: float) -> list[Matmul]:
    """Return what one device does for the attention of `rows` sequences, of which it has a part of the heads."""
    shape, split = geometry, geometry.tensor_parallel
    heads = shape.heads / split
    if not shape.kv_rank:
        pairs, group = rows * shape.kv_heads / split, shape.heads / shape.kv_heads
        return [Matmul(rows, shape.hidden, (shape.heads + 2 * shape.kv_heads) * shape.head_size / split),
                Matmul(group, shape.head_size, context, pairs), Matmul(group, context, shape.head_size, pairs),
                Matmul(rows, heads * shape.head_size, shape.hidden)]
    return [*(Matmul(rows, shape.hidden, size) for size in (shape.q_rank, shape.kv_rank, shape.rope_size)),
            *(Matmul(rows, shape.q_rank, size, heads) for size in (shape.head_size, shape.rope_size)),
            Matmul(rows, shape.head_size, shape.kv_rank, heads), Matmul(rows, shape.kv_rank, shape.head_size, heads),
            *(Matmul(heads, size, context, rows) for size in (shape.kv_rank, shape.rope_size)),
            Matmul(heads, context, shape.kv_rank, rows), Matmul(rows, heads * shape.head_size, shape.hidden)]


def _softmax_s(geometry: Geometry, rows: float, hbm_bytes_per_s: float, constants: Mapping[str, Constant]) -> float:
    """Return the time in which scores are read and written once more."""
    scores = rows * geometry.heads / geometry.tensor_parallel * constants["context_tokens"].value
    return 2 * scores * constants["value_bytes"].value / hbm_bytes_per_s


def _messages_s(geometry: Geometry, rows: float, constants: Mapping[str, Constant]) -> tuple[float, float]:
    """Return the time of messages in a dense and in a MoE layer: ring all-reduces, and tokens to experts and back."""
    split, devices = geometry.tensor_parallel, geometry.devices
    row_bytes = geometry.hidden * constants["value_bytes"].value
    reduce_s = 2 * (split - 1) * (constants["nvlink_s"].value
                                  + rows * row_bytes / split / constants["nvlink_bytes_per_s"].value)
    wire = "infiniband" if geometry.nodes > 1 else "nvlink"
    sent_bytes = rows * geometry.top_k * row_bytes / split
    exchange_s = sum(constants[f"{wire}_s"].value + share * sent_bytes / constants[f"{wire}_bytes_per_s"].value
                     for share in (1 - split / devices, 1 - 1 / devices) if share > 0)
    return 2 * reduce_s, (2 + geometry.shared_experts) * reduce_s + exchange_s


def _layers(geometry: Geometry, batch: int, hbm_bytes_per_s: float, constants: Mapping[str, Constant]
            ) -> tuple[Work, Work, Work]:
    """Return a device's work in a dense layer, in a MoE layer apart from routed experts, and theirs on all devices."""
    rows, split = batch * geometry.tensor_parallel / geometry.devices, geometry.tensor_parallel
    attention = _do(_attention(geometry, rows, constants["context_tokens"].value), hbm_bytes_per_s, constants)
    attention += Work(seconds=_softmax_s(geometry, rows, hbm_bytes_per_s, constants))
    dense_message_s, moe_message_s = _messages_s(geometry, rows, constants)
    dense = _do(_feed_forward(rows, geometry.hidden, geometry.dense_hidden / split), hbm_bytes_per_s, constants)
    shared = _feed_forward(rows, geometry.hidden, geometry.expert_hidden / split) * geometry.shared_experts
    beside = _do([Matmul(rows, geometry.hidden, geometry.experts), *shared], hbm_bytes_per_s, constants)
    active = active_experts(geometry, batch)
    expert = _do(_feed_forward(batch * geometry.top_k / active, geometry.hidden, geometry.expert_hidden),
                 hbm_bytes_per_s, constants)
    return (attention + dense + Work(seconds=dense_message_s), attention + beside + Work(seconds=moe_message_s),
            expert.times(active, busiest_experts(geometry, batch)))


def _copies(medium: Medium, hit_rate: float, cache: Cache, constants: Mapping[str, Constant]) -> tuple[float, float]:
    """Return which share of the needed experts' bytes is copied into HBM, and the pJ per bit of reading them."""
    if not 0 <= hit_rate <= 1:
        raise PagerError(f"A hit rate is between 0 and 1, not {hit_rate}.")
    ddr5, ssd = constants["ddr5_pj_per_bit"].value, constants["ssd_pj_per_bit"].value
    if medium == "hbm":
        return 0.0, 0.0
    if medium == "ddr5":
        return 1.0, ddr5
    return (1 - hit_rate, ssd) if cache == "hbm" else (1.0, hit_rate * ddr5 + (1 - hit_rate) * ssd)


def energy(geometry: Geometry, batch: int, medium: Medium, constants: Mapping[str, Constant] = CONSTANTS,
           hit_rate: float = 0.0, cache: Cache = "ddr5") -> Energy:
    """Return the energy per token with experts in a medium, and for the SSD a cache before it that hits so often.

    The hit rate, a share of the experts' bytes, is ignored for other media. A hit is read from DDR5 over the same link,
    or lies in HBM and is not copied, so that HBM keeps its bandwidth in proportion; a miss goes from the SSD to HBM.
    Raises PagerError for a hit rate outside 0 to 1.
    """
    value = {name: constant.value for name, constant in constants.items()}
    copied, source_pj_per_bit = _copies(medium, hit_rate, cache, constants)
    dense, beside, experts = _layers(geometry, batch, value["hbm_bytes_per_s"] - copied * value["link_bytes_per_s"],
                                     constants)
    n_dense, n_moe = geometry.dense_layers, geometry.layers - geometry.dense_layers
    copied_bytes = copied * geometry.expert_bytes(constants)
    copy_s = busiest_experts(geometry, batch) * copied_bytes / value["link_bytes_per_s"]
    step_s = n_dense * dense.seconds + n_moe * max(beside.seconds + experts.seconds, copy_s)

    others = (dense.times(n_dense, 1) + beside.times(n_moe, 1)).times(geometry.devices, 1)
    expert_reads_j = n_moe * (joules(experts.hbm_bytes, value["hbm3_pj_per_bit"])
                              + joules(active_experts(geometry, batch) * copied_bytes,
                                       source_pj_per_bit + value["hbm3_pj_per_bit"]))
    background_w = geometry.devices * (value["gpu_background_w"] + value["ddr5_background_w"])
    return Energy(expert_reads_j / batch, joules(others.hbm_bytes, value["hbm3_pj_per_bit"]) / batch,
                  (n_moe * experts.compute_j + others.compute_j) / batch, background_w * step_s / batch, step_s)


def ratios(geometry: Geometry, medium: Medium, constants: Mapping[str, Constant] = CONSTANTS, hit_rate: float = 0.0,
           cache: Cache = "ddr5") -> dict[int, float]:
    """Return, per batch size of the paper, how many times the energy per token of HBM a medium takes."""
    return {batch: energy(geometry, batch, medium, constants, hit_rate, cache).total_j
            / energy(geometry, batch, "hbm", constants).total_j for batch in geometry.batches}


def override(given: Mapping[str, float]) -> Mapping[str, Constant]:
    """Return the constants with some of them set by the user; raises PagerError for one that is none or cannot be."""
    constants = dict(CONSTANTS)
    for name, value in given.items():
        if name not in constants:
            raise PagerError(f"There is no constant {name!r}: choose from {', '.join(constants)}.")
        unit = constants[name].unit
        is_divisor = not unit.startswith(("pJ", "W ", "s "))
        if not math.isfinite(value) or value < 0 or (is_divisor and value == 0):
            raise PagerError(f"{name} cannot be {value}.")
        constants[name] = _fact(value, unit, "given by the user")
    if constants["link_bytes_per_s"].value >= constants["hbm_bytes_per_s"].value:
        raise PagerError("link_bytes_per_s is taken away from hbm_bytes_per_s, so it must be the smaller.")
    return constants
