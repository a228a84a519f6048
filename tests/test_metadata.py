"""A header that contradicts itself or its tensors is refused with a sentence, before llama.cpp would end the process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_metadata
import gguf
import make_zoo
import numpy as np
import pytest
from conftest import ARGUMENTS, Factory, evaluate, some_tokens
from fuzz_metadata import Change
from gguf import GGUFValueType as Kind
from test_errors import leaving_nothing

import gguf_pager
from gguf_pager import LayoutError, PagerError, read_layout
from gguf_pager.errors import printable

Model = Callable[..., Path]

U32, I32 = Kind.UINT32, Kind.INT32


def many(values: list[int], item: Kind = U32) -> tuple[list[int], Kind, Kind]:
    return values, Kind.ARRAY, item


CONTRADICTIONS: list[tuple[str, str, Any, str]] = [
    ("qwen3moe", "expert_count", 11, r"11 experts \(qwen3moe.expert_count\), but the tensors of block 0 hold 10"),
    ("qwen3moe", "expert_count", 9, "hold 10"),
    ("qwen3moe", "expert_count", 0, "uses 3 experts of 0"),
    ("qwen3moe", "expert_count", 5000, "5000 experts .* 1024 at most"),
    ("qwen3moe", "expert_count", None, "uses 3 experts of 0"),
    ("qwen3moe", "expert_count", ("ten", Kind.STRING), "'ten', of type string, but llama.cpp takes a u32"),
    ("qwen3moe", "expert_count", (10, Kind.UINT64), "of type u64"),
    ("qwen3moe", "expert_count", (10.0, Kind.FLOAT32), "of type f32"),
    ("qwen3moe", "expert_count", (True, Kind.BOOL), "of type bool"),
    ("qwen3moe", "expert_count", many([10, 10, 10]), "of type array of u32"),
    ("qwen3moe", "expert_used_count", 11, "uses 11 experts of 10"),
    ("qwen3moe", "expert_used_count", 0, "10 experts, and a token uses none"),
    ("qwen3moe", "expert_used_count", None, "uses none"),
    ("qwen3moe", "expert_used_count", (-3, I32), "-3, of type i32"),
    ("qwen3moe", "expert_used_count", 2**32 - 1, "uses 4294967295 experts of 10"),
    ("qwen3moe", "expert_used_count", many([3, 3]), "array of u32 with 2 elements, but there are 3 blocks"),
    ("qwen3moe", "expert_used_count", many([3] * 5000), "with 5000 elements"),
    ("qwen3moe", "expert_used_count", many([3, -1, 3], I32), "holds -1"),
    ("qwen3moe", "expert_used_count", many([3, 3, 3], Kind.UINT64), "array of u64"),
    ("qwen3moe", "expert_used_count", (["3", "3", "3"], Kind.ARRAY, Kind.STRING), "array of string"),
    ("nemotron_h_moe", "expert_used_count", many([0, 0, 3, 0]), "none of the 10 experts of block 3"),
    ("bailingmoe2", "expert_group_count", 3, "8 experts do not divide into 3 groups"),
    ("bailingmoe2", "expert_group_count", 8, "8 groups of experts, but 8 experts"),
    ("bailingmoe2", "expert_group_count", (4, Kind.UINT16), "of type u16"),
    ("bailingmoe2", "expert_group_used_count", 4, "uses 4 of 4 groups"),
    ("bailingmoe2", "expert_group_used_count", 0, "uses 0 of 4 groups"),
    ("bailingmoe2", "expert_group_used_count", None, "uses 0 of 4 groups"),
    ("bailingmoe2", "expert_gating_func", 0, "no way 0 to choose experts"),
    ("bailingmoe2", "expert_gating_func", 99, "no way 99 to choose experts"),
    ("qwen3moe", "block_count", 2, "2 blocks .* tensors of block 2, counted from 0"),
    ("qwen3moe", "block_count", 4, "4 blocks .* no tensor of block 3"),
    ("qwen3moe", "block_count", 0, "0 blocks"),
    ("qwen3moe", "embedding_length", None, "tokens have 0 values"),
    ("qwen3moe", "block_count", 2**31, "2147483648 blocks"),
    ("qwen3moe", "block_count", None, "0 blocks"),
    ("qwen3moe", "block_count", ("3", Kind.STRING), "of type string"),
    ("glm4moe", "nextn_predict_layers", 4, "4 of its 4 blocks are for multi-token prediction"),
    ("glm4moe", "nextn_predict_layers", 5, "5 of its 4 blocks"),
    ("glm4moe", "nextn_predict_layers", 2**32 - 1, "4294967295 of its 4 blocks"),
    ("glm4moe", "nextn_predict_layers", (-1, I32), "of type i32"),
    ("qwen3moe", "embedding_length", 128, "tokens have 128 values .* 256 in token_embd.weight"),
    ("qwen3moe", "rope.dimension_count", 2**32 - 2, "rope.dimension_count is 4294967294, and 65536 would be too much"),
    ("gemma4", "rope.dimension_count_swa", 2**31, "would be too much"),
    ("grovemoe", "experts_per_group", 0, "do not divide into groups of 0"),
    ("grovemoe", "experts_per_group", 3, "do not divide into groups of 3"),
    ("ernie4_5-moe", "interleave_moe_layer_step", 0, "every 0th block"),
]


def change_of(arch: str, key: str, value: Any) -> Change:
    given = value if isinstance(value, tuple) else (value,)
    return Change(f"{arch}.{key}", *given)


@pytest.mark.parametrize(("arch", "key", "value", "message"), CONTRADICTIONS,
                         ids=lambda value: value if isinstance(value, str) and len(value) < 30 else "")
def test_contradiction_is_refused_with_a_sentence(
    zoo_model: Model, tmp_path: Path, arch: str, key: str, value: Any, message: str
) -> None:
    path = tmp_path / "model.gguf"
    fuzz_metadata.write(zoo_model(arch), path, [change_of(arch, key, value)])
    with pytest.raises(LayoutError, match=message) as raised:
        read_layout(path)
    assert str(path) in str(raised.value) and str(raised.value).endswith("ask who made it.")


@pytest.mark.parametrize("case", (1, 3, 11, 26, 35), ids=lambda at: "-".join(map(str, CONTRADICTIONS[at][:3])))
def test_contradiction_never_reaches_llama_cpp(zoo_model: Model, tmp_path: Path, case: int) -> None:
    """Nor is anything left of it."""
    arch, key, value, message = CONTRADICTIONS[case]
    path = tmp_path / "model.gguf"
    fuzz_metadata.write(zoo_model(arch), path, [change_of(arch, key, value)])
    with leaving_nothing(tmp_path), pytest.raises(LayoutError, match=message):
        gguf_pager.Llama(str(path), budget="min", **ARGUMENTS)


@pytest.mark.parametrize("arch", make_zoo.ARCHITECTURES)
def test_no_architecture_of_the_zoo_contradicts_itself(zoo_model: Model, arch: str) -> None:
    assert read_layout(zoo_model(arch)).layers


FUZZ = "import json, fuzz_metadata as f\nprint(json.dumps(f.fuzz({rounds}, {seed}, {archs}, with_overrides={overrides})))\n"


def fuzzed(rounds: int, seed: int, archs: tuple[str, ...], *, overrides: bool = False) -> dict[str, int]:
    scripts = Path(fuzz_metadata.__file__).parent
    program = FUZZ.format(rounds=rounds, seed=seed, archs=archs, overrides=overrides)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False,
                          env={**os.environ, "PYTHONPATH": str(scripts)})
    assert done.returncode == 0, done.stderr[-2000:]
    *faults, last = done.stdout.splitlines()
    assert not faults, faults
    found: dict[str, int] = json.loads(last)
    return found


def test_changed_headers_end_no_process_and_give_no_wrong_token() -> None:
    """Sixty of them; `python scripts/fuzz_metadata.py` tries as many as one likes."""
    seen = fuzzed(60, 5, ("qwen3moe", "deepseek2", "grovemoe", "llama4", "glm4moe", "nemotron_h_moe", "ernie4_5-moe"))
    assert seen["refused by gguf_pager"] > 15 and seen["equal to stock"] > 10, seen


def test_overrides_end_no_process_and_give_no_wrong_token() -> None:
    seen = fuzzed(25, 6, ("qwen3moe", "deepseek2", "grovemoe", "glm4moe"), overrides=True)
    assert seen["refused by gguf_pager"] > 5 and seen["equal to stock"] > 5, seen


@pytest.mark.parametrize(("arch", "key", "value", "message"), (
    ("qwen3moe", "expert_feed_forward_length", 288, r"block 0 are to be 288 wide \(qwen3moe.expert_feed_forward_length\), and"),
    ("nemotron_h_moe", "expert_feed_forward_length", many([0, 0, 96, 96]), "block 3 are to be 96 wide .* tensors are 160 wide"),
    ("deepseek2", "leading_dense_block_count", 2, "first 2 blocks are to be without experts .* block 1, counted from 0"),
    ("glm4moe", "leading_dense_block_count", 0, "first 0 blocks are to be without experts"),
))
def test_what_only_llama_cpp_can_tell_is_explained_when_it_refuses(
    zoo_model: Model, tmp_path: Path, arch: str, key: str, value: Any, message: str
) -> None:
    path = tmp_path / "model.gguf"
    fuzz_metadata.write(zoo_model(arch), path, [change_of(arch, key, value)])
    read_layout(path)
    with leaving_nothing(tmp_path), pytest.raises(LayoutError, match=message):
        gguf_pager.Llama(str(path), budget="min", **ARGUMENTS)


@pytest.mark.parametrize(("arch", "key", "other", "value", "reason"), (
    ("qwen3moe", "leading_dense_block_count", "attention.head_count", 2, r"blk\.0\.attn_q"),
    ("qwen3moe", "leading_dense_block_count", "attention.layer_norm_rms_epsilon", None, "layer_norm_rms_epsilon"),
    ("olmoe", "expert_feed_forward_length", "attention.layer_norm_rms_epsilon", None, "layer_norm_rms_epsilon"),
    ("deepseek2", "leading_dense_block_count", "attention.head_count", 2, r"blk\.0\.attn"),
))
def test_key_is_not_blamed_for_what_llama_cpp_refuses_for_another_reason(
    zoo_model: Model, tmp_path: Path, arch: str, key: str, other: str, value: int | None, reason: str
) -> None:
    """One that is ignored, or has no part in it: what llama.cpp said was hidden behind it."""
    path = tmp_path / "model.gguf"
    fuzz_metadata.write(zoo_model(arch), path, [change_of(arch, key, 3), change_of(arch, other, value)])
    with leaving_nothing(tmp_path), pytest.raises(LayoutError, match=reason) as raised:
        gguf_pager.Llama(str(path), budget="min", **ARGUMENTS)
    assert "contradicts itself" not in str(raised.value) and key not in str(raised.value)


@pytest.mark.parametrize(("arch", "key"), (("olmoe", "expert_feed_forward_length"), ("qwen3moe", "leading_dense_block_count")))
def test_key_that_an_architecture_ignores_may_say_anything(
    zoo_model: Model, tmp_path: Path, pair: Factory, arch: str, key: str
) -> None:
    path = tmp_path / "model.gguf"
    fuzz_metadata.write(zoo_model(arch), path, [change_of(arch, key, 7)])
    ours, stock = pair(path, "100%", logits_all=True)
    assert (evaluate(ours, some_tokens(6)) == evaluate(stock, some_tokens(6))).all()


# ---- kv_overrides ----

@pytest.mark.parametrize(("key", "value", "message"), (
    ("expert_used_count", 11, "uses 11 experts of 10"),
    ("expert_used_count", 0, "uses none of them"),
    ("expert_used_count", -1, "sets qwen3moe.expert_used_count to -1: it is a number from 0"),
    ("expert_used_count", 2**32 + 3, "sets qwen3moe.expert_used_count to 4294967299"),
    ("expert_used_count", 2.0, "to 2.0"),
    ("expert_used_count", True, "to True"),
    ("expert_used_count", "3", "to '3'"),
    ("expert_count", 8, "8 experts"),
    ("expert_group_count", 3, "do not divide into 3 groups"),
    ("block_count", 2, "tensors of block 2"),
    ("nextn_predict_layers", 7, "7 of its 3 blocks"),
    ("expert_gating_func", 17, "no way 17"),
))
def test_override_that_contradicts_the_file_is_refused(zoo_model: Model, key: str, value: Any, message: str) -> None:
    path = zoo_model("qwen3moe")
    with leaving_nothing(path.parent), pytest.raises(LayoutError, match=message) as raised:
        gguf_pager.Llama(str(path), budget="min", kv_overrides={f"qwen3moe.{key}": value}, **ARGUMENTS)
    assert "kv_overrides" in str(raised.value)


def test_override_that_fits_gives_stocks_tokens(zoo_model: Model, pair: Factory) -> None:
    tokens = some_tokens(12)
    for overrides in ({"qwen3moe.expert_used_count": 5}, {"qwen3moe.expert_used_count": 1, "general.name": "x"}):
        ours, stock = pair(zoo_model("qwen3moe"), "100%", logits_all=True, kv_overrides=overrides)
        assert {layer.n_used for layer in ours.pager.layout.layers} == {overrides["qwen3moe.expert_used_count"]}
        assert (evaluate(ours, tokens, (8,)) == evaluate(stock, tokens, (8,))).all()


# ---- files that are something else ----

def other_file(path: Path, architecture: str | None, keys: dict[str, Any], n_tensors: int = 1) -> Path:
    """Write a GGUF file with these keys; the gguf package cannot leave out the architecture, so it is cut out."""
    writer = gguf.GGUFWriter(path, architecture or "none")
    if architecture is None:
        del writer.kv_data[0]["general.architecture"]
    for key, value in keys.items():
        if isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    for i in range(n_tensors):
        writer.add_tensor(f"blk.{i}.ffn_up.weight", make_zoo.random_values("x", (32, 4), make_zoo.Arch(), 1))
    make_zoo.finish(writer)
    return path


@pytest.mark.parametrize(("architecture", "keys", "n_tensors", "message"), (
    ("clip", {"general.type": "mmproj"}, 1, r"is a projector \(mmproj\), .*: open the model it belongs to\."),
    ("clip", {"clip.has_vision_encoder": 1}, 1, r"is a projector \(mmproj\)"),
    ("qwen3moe", {"general.type": "adapter", "adapter.type": "lora"}, 1, r"is an adapter \(LoRA\): open the model it was made"),
    ("qwen3moe", {"adapter.type": "lora"}, 1, r"is an adapter"),
    (None, {"general.type": "imatrix", "imatrix.chunk_count": 3}, 1, "is an importance matrix, .* it holds no model"),
    (None, {"imatrix.chunk_count": 3}, 1, "is an importance matrix"),
    ("controlvector", {"controlvector.model_hint": "qwen3moe"}, 1, "is a control vector"),
    (None, {"general.name": "nothing"}, 1, r"names no architecture \(general.architecture\)"),
    (None, {}, 0, r"names no architecture"),
    ("qwen3moe", {"general.name": "nothing"}, 0, "has a header but no tensors"),
), ids=lambda value: str(value)[:20])
def test_file_that_is_something_else_is_named(
    tmp_path: Path, architecture: str | None, keys: dict[str, Any], n_tensors: int, message: str
) -> None:
    path = other_file(tmp_path / "other.gguf", architecture, keys, n_tensors)
    with pytest.raises(LayoutError, match=message):
        gguf_pager.Llama(str(path), budget="min", **ARGUMENTS)


# ---- parts ----

def split(zoo_model: Model, folder: Path) -> list[Path]:
    first = make_zoo.make_split(zoo_model("qwen3moe"), folder, 3)
    return [Path(str(first).replace("00001-of", f"{part:05d}-of")) for part in (1, 2, 3)]


@pytest.mark.parametrize(("change", "message"), (
    (Change("split.count", 3 * 10**9, U32), "split.count is 3000000000, of type u32, but llama.cpp takes a u16"),
    (Change("split.count", 65535, Kind.UINT16), "open the file that ends with -00001-of-65535.gguf"),
    (Change("split.count", -3, Kind.INT16), "of type i16"),
    (Change("split.count", "three", Kind.STRING), "'three', of type string"),
    (Change("split.no", None), "split.no is missing"),
    (Change("split.no", 0, U32), "split.no is 0, of type u32"),
    (Change("split.no", 1, Kind.UINT16), r"is part 2 of 3 of a split model: open part 1, the file that ends"),
    (Change("split.tensors.count", 10**9, I32), r"speaks of 1,000,000,000 tensors \(split.tensors.count\)"),
    (Change("split.tensors.count", 30, U32), "split.tensors.count is 30, of type u32"),
), ids=lambda value: "" if isinstance(value, str) else f"{value.key}-{value.value}")
def test_first_part_that_contradicts_the_others_is_refused(
    zoo_model: Model, tmp_path: Path, change: Change, message: str
) -> None:
    first, *_ = split(zoo_model, tmp_path)
    changed = tmp_path / "changed.gguf"
    fuzz_metadata.write(first, changed, [change])
    changed.replace(first)
    with pytest.raises(LayoutError, match=message):
        read_layout(first)


def test_parts_in_each_others_place_are_refused(zoo_model: Model, tmp_path: Path) -> None:
    first, second, third = split(zoo_model, tmp_path)
    whole = second.read_bytes()
    shutil.copy(third, second)
    with pytest.raises(LayoutError, match="says that it is part 3, but its name says 2"):
        read_layout(first)
    second.write_bytes(whole)
    fuzz_metadata.write(second, third, [Change("split.no", 2, Kind.UINT16)])
    with pytest.raises(LayoutError, match="both hold the tensor|speaks of .* tensors"):
        read_layout(first)


def test_65535_parts_of_which_one_exists_are_refused_at_once(zoo_model: Model, tmp_path: Path) -> None:
    first, *_ = split(zoo_model, tmp_path)
    path = tmp_path / "a-00001-of-65535.gguf"
    fuzz_metadata.write(first, path, [Change("split.count", 65535, Kind.UINT16)])
    with pytest.raises(LayoutError, match="Part 2 of 65535 is missing: a-00002-of-65535.gguf"):
        read_layout(path)


# ---- shapes ----

def test_matrices_that_do_not_fit_together_are_refused(zoo_model: Model, tmp_path: Path) -> None:
    from test_errors import keep, rewrite

    def narrow(writer: gguf.GGUFWriter, tensor: gguf.ReaderTensor) -> None:
        if tensor.name == "blk.1.ffn_up_exps.weight":
            writer.add_tensor(tensor.name, tensor.data[:, :-32], raw_dtype=tensor.tensor_type)
        else:
            keep(writer, tensor)

    def leave_out(writer: gguf.GGUFWriter, tensor: gguf.ReaderTensor) -> None:
        if tensor.name != "blk.1.ffn_down_exps.weight":
            keep(writer, tensor)

    for change, message in ((narrow, "experts of block 1 do not fit together: up is 256 x 224, down 256 x 256"),
                            (leave_out, "of block 1 there are only the gate and up tensors")):
        path = rewrite(zoo_model("qwen3moe"), tmp_path / f"{change.__name__}.gguf", change)
        with pytest.raises(LayoutError, match=message):
            read_layout(path)


@pytest.mark.parametrize("shape", ((10, 256, 0), (2, 5, 256, 256), (10, 0, 256)))
def test_expert_tensor_that_is_no_matrix_per_expert_is_refused(zoo_model: Model, tmp_path: Path, shape: tuple[int, ...]) -> None:
    from test_errors import keep, rewrite

    def change(writer: gguf.GGUFWriter, tensor: gguf.ReaderTensor) -> None:
        if tensor.name == "blk.1.ffn_up_exps.weight":
            writer.add_tensor(tensor.name, np.zeros(shape, np.float32))
        else:
            keep(writer, tensor)

    path = rewrite(zoo_model("qwen3moe"), tmp_path / "model.gguf", change)
    with pytest.raises(LayoutError, match=r"ffn_up_exps.weight is .* and no matrix for each expert|do not belong together"):
        read_layout(path)


@pytest.mark.parametrize("align", (8, 64, 4096))
def test_tensors_lie_where_llama_cpp_can_map_them_or_the_file_is_refused(
    zoo_model: Model, tmp_path: Path, pair: Factory, align: int
) -> None:
    """With stock, an alignment of 8 ends the process."""
    source, path = zoo_model("qwen3moe"), tmp_path / "model.gguf"
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_custom_alignment(align)
    make_zoo.copy_fields(reader, writer)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    make_zoo.finish(writer)
    if align < 32:
        with pytest.raises(LayoutError, match="cannot be mapped: its tensors begin at byte .*, no multiple of 32"):
            read_layout(path)
        return
    ours, stock = pair(path, "100%", logits_all=True)
    assert (evaluate(ours, some_tokens(6)) == evaluate(stock, some_tokens(6))).all()


# ---- what a file holds is shown, and steers nothing ----

ESCAPES = "\x1b[31mred\x1b]0;title\x07\r\n\x00\x9b5m\u202eback\udcff"


def test_what_would_steer_a_terminal_is_replaced_and_letters_stay() -> None:
    shown = printable(ESCAPES)
    assert shown == "�[31mred�]0;title�����5m�back�"
    for text in ("Ein schönes Modell", "模型　七", "मॉडल क्‍ष", "نموذج", "👩‍🔬 x", "a b"):
        assert printable(text) == text


def test_names_in_a_file_steer_no_terminal(zoo_model: Model, tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[31m.gguf"
    fuzz_metadata.write(zoo_model("qwen3moe"), path, [Change("general.name", "evil \x1b]0;x\x07 模型", Kind.STRING)])
    layout = read_layout(path)
    assert layout.name == "evil �]0;x� 模型"
    fuzz_metadata.write(zoo_model("qwen3moe"), path, [Change("qwen3moe.expert_count", "\x1b[2J", Kind.STRING)])
    with pytest.raises(PagerError) as raised:
        read_layout(path)
    assert "\x1b" not in str(raised.value) and "[31m.gguf contradicts itself" in str(raised.value)
