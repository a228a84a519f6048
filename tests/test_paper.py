"""The energy per token of arXiv 2508.06978, again from its constants."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from gguf_pager.energy import paper
from gguf_pager.energy.paper import (
    CONSTANTS,
    DEEPSEEK_R1,
    GEOMETRIES,
    MIXTRAL,
    Cache,
    Geometry,
    Matmul,
    Medium,
    active_experts,
    busiest_experts,
    energy,
    joules,
    override,
    ratios,
)
from gguf_pager.errors import PagerError
from gguf_pager.report.paper import MEASURED, MEASURED_SOURCE, paper_facts, paper_text

each_model = pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: geometry.name)
each_cache = pytest.mark.parametrize("cache", ["ddr5", "hbm"])


# ---- the paper ------------------------------------------------------------------------------------------------------

@each_model
def test_ranges_are_those_of_the_paper(geometry: Geometry) -> None:
    found = ratios(geometry, "ssd")
    assert tuple(found) == geometry.batches
    assert min(found.values()) == pytest.approx(geometry.paper_low, rel=0.025)
    assert max(found.values()) == pytest.approx(geometry.paper_high, rel=0.01)


def ranges_said(pattern: str) -> list[str]:
    found = re.search(pattern.replace("N", r"(\d+\.\d+)").replace(" ", r"\s+"), paper.__doc__ or "")
    assert found
    return list(found.groups())


def ranges_found() -> list[str]:
    return [f"{model[f'ssd_per_hbm_{end}']:.2f}" for model in paper_facts()["models"] for end in ("low", "high")]


def test_docstring_says_what_the_model_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranges_found() == ranges_said("gives N to N and N to N:")
    monkeypatch.setattr(paper, "busiest_experts", lambda geometry, batch: active_experts(geometry, batch)
                        / geometry.devices)
    assert ranges_found() == ranges_said("busiest device it would be N to N and N to N.")


@each_model
def test_ssd_takes_more_than_ddr5_and_ddr5_more_than_hbm(geometry: Geometry) -> None:
    for batch in geometry.batches:
        hbm, ddr5, ssd = (energy(geometry, batch, medium).total_j for medium in ("hbm", "ddr5", "ssd"))
        assert hbm < ddr5 < ssd


def test_every_constant_and_model_has_a_source_and_only_one_is_assumed() -> None:
    assert all(constant.source and constant.unit for constant in CONSTANTS.values())
    assert all(geometry.source for geometry in GEOMETRIES)
    assert [name for name, constant in CONSTANTS.items() if "assumption" in constant.source] == ["l1_tile"]
    assert all(constant.low == constant.value == constant.high for constant in CONSTANTS.values())


# ---- by hand --------------------------------------------------------------------------------------------------------

def test_picojoules_per_bit_become_joules() -> None:
    assert joules(1e9, 102.4) == pytest.approx(0.8192)  # what model.py calls 0.82 J/GB
    assert joules(1e9, 4.2) == pytest.approx(0.0336)
    assert joules(1, 1) == pytest.approx(8e-12)


def test_one_token_needs_two_experts_of_mixtral() -> None:
    assert MIXTRAL.expert_bytes() == 3 * 4096 * 14336 * 2 == 352_321_536
    assert DEEPSEEK_R1.expert_bytes() == 88_080_384
    assert active_experts(MIXTRAL, 1) == pytest.approx(2)
    assert active_experts(DEEPSEEK_R1, 1) == pytest.approx(8)
    assert active_experts(MIXTRAL, 4) == pytest.approx(8 * (1 - 0.75 ** 4))
    assert active_experts(MIXTRAL, 1024) == pytest.approx(8)


def test_one_token_reads_its_experts_from_the_ssd_then_hbm() -> None:
    copied_bytes = 32 * 2 * 352_321_536
    by_hand = copied_bytes * 8e-12 * (102.4 + 4.2 + 4.2)
    made = energy(MIXTRAL, 1, "ssd")
    assert made.expert_reads_j == pytest.approx(by_hand, rel=0.001)  # besides, activations
    assert made.expert_reads_j > by_hand
    # The busiest of four devices with two experts each has 8/7 of the two experts, and copies them at 900 GB/s.
    assert made.step_s == pytest.approx(32 * 8 / 7 * 352_321_536 / 900e9, rel=0.02)
    assert made.background_j == pytest.approx(4 * (70 + 57) * made.step_s)


def test_hbm_is_read_once() -> None:
    by_hand = 32 * 2 * 352_321_536 * 8e-12 * 4.2
    assert energy(MIXTRAL, 1, "hbm").expert_reads_j == pytest.approx(by_hand, rel=0.001)


def test_time_of_large_steps_is_that_of_computing_not_of_copying() -> None:
    copy_s = 32 * 2 * 352_321_536 / 900e9
    assert energy(MIXTRAL, 64, "ssd").step_s == pytest.approx(copy_s, rel=1e-6)
    assert energy(MIXTRAL, 1024, "ssd").step_s > copy_s
    assert energy(MIXTRAL, 1024, "hbm").step_s < energy(MIXTRAL, 1024, "ssd").step_s


def test_busiest_device_has_between_the_mean_and_all_it_holds() -> None:
    assert busiest_experts(MIXTRAL, 1) == pytest.approx(8 / 7, rel=0.02)  # both on one device: once in seven
    for geometry in GEOMETRIES:
        held = geometry.experts // geometry.devices
        for batch in geometry.batches:
            assert active_experts(geometry, batch) / geometry.devices <= busiest_experts(geometry, batch) <= held
        assert busiest_experts(geometry, 10_000) == pytest.approx(held)


def test_traffic_of_a_product_counts_operands_once_per_tile() -> None:
    product = Matmul(rows=32, inputs=10, outputs=48, count=3)
    assert product.traffic_bytes(2) == 3 * 2 * (10 * 48 + 32 * 10 + 32 * 48)
    assert product.traffic_bytes(2, 16) == 3 * 2 * (2 * 10 * 48 + 3 * 32 * 10 + 32 * 48)
    assert Matmul(1, 10, 48).traffic_bytes(1, 16) == 10 * 48 + 3 * 10 + 48


# ---- a cache --------------------------------------------------------------------------------------------------------

@each_model
def test_always_hitting_ddr5_is_ddr5(geometry: Geometry) -> None:
    assert ratios(geometry, "ssd", hit_rate=1, cache="ddr5") == pytest.approx(ratios(geometry, "ddr5"))


@each_model
def test_always_hitting_hbm_is_hbm(geometry: Geometry) -> None:
    assert list(ratios(geometry, "ssd", hit_rate=1, cache="hbm").values()) == pytest.approx([1] * len(geometry.batches))


@each_model
@each_cache
def test_never_hitting_is_the_plain_ssd(geometry: Geometry, cache: Cache) -> None:
    assert ratios(geometry, "ssd", hit_rate=0, cache=cache) == ratios(geometry, "ssd")


@each_model
@each_cache
def test_more_hits_take_less(geometry: Geometry, cache: Cache) -> None:
    for batch in geometry.batches:
        totals_j = [energy(geometry, batch, "ssd", hit_rate=rate / 20, cache=cache).total_j for rate in range(21)]
        assert totals_j == sorted(totals_j, reverse=True) and len(set(totals_j)) == 21


@pytest.mark.parametrize("medium", ["hbm", "ddr5"])
def test_hit_rate_means_nothing_without_an_ssd(medium: Medium) -> None:
    assert energy(MIXTRAL, 4, medium, hit_rate=0.7) == energy(MIXTRAL, 4, medium)


@pytest.mark.parametrize("rate", [-0.01, 1.01, float("nan")])
def test_hit_rate_is_a_share(rate: float) -> None:
    with pytest.raises(PagerError, match="between 0 and 1"):
        energy(MIXTRAL, 1, "ssd", hit_rate=rate)


# ---- constants of the user ------------------------------------------------------------------------------------------

def test_cheaper_flash_takes_less_and_free_flash_still_has_to_be_copied() -> None:
    free = override({"ssd_pj_per_bit": 0})
    assert 1 < max(ratios(MIXTRAL, "ssd", free).values()) < max(ratios(MIXTRAL, "ssd").values())
    assert ratios(MIXTRAL, "ssd", override({"ssd_pj_per_bit": 9.2})) == pytest.approx(ratios(MIXTRAL, "ddr5"))


def test_without_background_only_bytes_and_computing_remain() -> None:
    made = energy(MIXTRAL, 1, "ssd", override({"gpu_background_w": 0, "ddr5_background_w": 0}))
    assert made.background_j == 0 and made.total_j == made.expert_reads_j + made.other_reads_j + made.compute_j


@pytest.mark.parametrize("given", [{"nonesuch": 1}, {"ssd_pj_per_bit": -1}, {"hbm_bytes_per_s": 0}, {"l1_tile": 0},
                                   {"peak_flops": float("inf")}, {"link_bytes_per_s": 4e12}])
def test_constants_that_cannot_be_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(PagerError):
        override(given)


# ---- what is shown --------------------------------------------------------------------------------------------------

def test_facts_are_json_and_their_parts_add_up() -> None:
    facts = json.loads(json.dumps(paper_facts()))
    assert facts["hit_rate"] is None and facts["is_with_constants_of_paper"]
    assert facts == json.loads(json.dumps(paper_facts(override({}))))
    assert set(facts["constants"]) == set(CONSTANTS) and all(row["source"] for row in facts["constants"].values())
    for model, geometry in zip(facts["models"], GEOMETRIES, strict=True):
        assert model["ssd_per_hbm_high"] == max(ratios(geometry, "ssd").values())
        assert model["deviation_low"] == pytest.approx(model["ssd_per_hbm_low"] / geometry.paper_low - 1)
        for row in model["batches"]:
            assert row["ssd_per_hbm"] == row["ssd"]["j_per_token"] / row["hbm"]["j_per_token"]
            parts = [row["ssd"][f"{part}_j_per_token"] for part in ("expert_reads", "other_reads", "compute",
                                                                    "background")]
            assert sum(parts) == pytest.approx(row["ssd"]["j_per_token"])


def test_hit_rate_of_the_user_is_shown_beside_the_measured_ones() -> None:
    measured = set(MEASURED.values())
    facts = paper_facts(hit_rate=0.123)
    for model in facts["models"]:
        assert {row["hit_rate"] for row in model["cached"]} == measured | {0.123}
        assert {row["cache"] for row in model["cached"]} == {"ddr5", "hbm"}
    assert paper_text(facts).count("as asked") == 2 * len(GEOMETRIES)
    assert paper_text(paper_facts()).count("measured, 25% in RAM") == 2 * len(GEOMETRIES)


def test_measured_hit_rates_are_those_of_the_recorded_rows() -> None:
    path = Path(__file__).parent.parent / MEASURED_SOURCE.split(" in ")[-1].removesuffix(" of gguf_pager")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    recorded = {row["budget"]: round(row["hit_rate"], 2) for row in rows if row["mode"] == "paged" and row["n_gen"]}
    assert MEASURED == {share: recorded[share] for share in MEASURED}


def test_text_shows_both_ranges_each_source_and_fits_the_terminal() -> None:
    text = paper_text(paper_facts(hit_rate=0.123))
    assert max(map(len, text.splitlines())) <= 100
    for said in ("in the paper 3.8 to 12.5", "in the paper 4.7 to 9.8", "% off", "module_graph.cpp", "an assumption",
                 "github.com/scale-snu/SSD-offloading", "Filling the cache is not counted", *CONSTANTS):
        assert said in text
    assert "Nothing is fitted" in text and "WITH CONSTANTS" not in text
    assert "WITH CONSTANTS OF YOURS" in paper_text(paper_facts(override({"ssd_pj_per_bit": 10})))


def test_geometry_counts_the_weights_of_the_models() -> None:
    """Experts are the bulk: 45 of Mixtral's 47 billion weights, and 643 of DeepSeek-R1's 671 (57 of its 58 layers)."""
    for geometry, billions in ((MIXTRAL, 45.1), (DEEPSEEK_R1, 642.6)):
        moe_layers = geometry.layers - geometry.dense_layers
        weights = moe_layers * geometry.experts * geometry.expert_bytes() / CONSTANTS["value_bytes"].value
        assert weights == pytest.approx(billions * 1e9, rel=0.001)
    assert dataclasses.replace(MIXTRAL, experts=16).expert_bytes() == MIXTRAL.expert_bytes()
