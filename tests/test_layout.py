"""The layout says which bytes of which file are which expert, and leaves out none and counts none twice."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import gguf
import make_zoo
import pytest

from gguf_pager import LayoutError, read_layout
from gguf_pager.model.layout import Layout
from gguf_pager.model.metadata import split_paths

Model = Callable[..., Path]

# Fused gate and up; two sets of experts per block; one expert per token; a table of choices; mixed types; no gate.
VARIED = ("qwen3moe", "gemma4", "grovemoe", "llama4", "deepseek4", "llama", "nemotron_h_moe", "gpt-oss")


def tensors_of(layout: Layout) -> dict[str, gguf.ReaderTensor]:
    """Return all tensors as the gguf package reads them: another reader than ours."""
    return {tensor.name: tensor for path in layout.paths for tensor in gguf.GGUFReader(path).tensors}


def expert_bytes_in_file(layout: Layout, layer: int, piece: int, expert: int) -> bytes:
    part = layout.layers[layer].slices[piece]
    with open(layout.paths[part.file], "rb") as file:
        file.seek(part.offset_bytes + expert * part.slice_bytes)
        return file.read(part.slice_bytes)


@pytest.mark.parametrize("arch", VARIED)
def test_every_expert_is_where_the_layout_says(zoo_model: Model, arch: str) -> None:
    layout = read_layout(zoo_model(arch))
    tensors = tensors_of(layout)
    assert layout.layers
    for at, layer in enumerate(layout.layers):
        for index, piece in enumerate(layer.slices):
            tensor = tensors[piece.name]
            assert piece.ne == tuple(tensor.shape) and piece.type == tensor.tensor_type
            for expert in range(layer.n_experts):
                assert expert_bytes_in_file(layout, at, index, expert) == tensor.data[expert].tobytes()


@pytest.mark.parametrize("arch", VARIED)
def test_every_byte_is_expert_dense_or_idle_and_only_one_of_them(zoo_model: Model, arch: str) -> None:
    layout = read_layout(zoo_model(arch))
    size = layout.paths[0].stat().st_size
    experts = [(piece.offset_bytes, piece.offset_bytes + piece.slice_bytes * layer.n_experts, piece.name)
               for layer in layout.layers for piece in layer.slices]
    dense = [(piece.offset_bytes, piece.offset_bytes + piece.n_bytes, "") for piece in layout.dense]
    spans = sorted(experts + dense)
    assert all(end <= first for (_, end, _), (first, _, _) in itertools.pairwise(spans))
    assert spans[-1][1] <= size
    names = {name for _, _, name in experts}
    idle_bytes = 0
    for tensor in tensors_of(layout).values():
        if tensor.name in names:
            continue
        first, end = tensor.data_offset, tensor.data_offset + tensor.n_bytes
        if not any(begin <= first and end <= stop for begin, stop, _ in dense):
            assert tensor.name.startswith(("token_embd", "per_layer_token_embd"))
            idle_bytes += tensor.n_bytes
    assert layout.idle_bytes == idle_bytes
    assert layout.expert_bytes == sum(end - first for first, end, _ in experts)
    assert layout.dense_bytes == sum(end - first for first, end, _ in dense)
    assert layout.tensor_bytes == layout.expert_bytes + layout.dense_bytes + idle_bytes


def test_numbers_are_those_of_the_metadata(zoo_model: Model) -> None:
    layout = read_layout(zoo_model("qwen3moe"))
    assert layout.architecture == "qwen3moe"
    assert layout.n_vocab == 384
    assert [(layer.block, layer.kind, layer.n_experts, layer.n_used) for layer in layout.layers] == [
        (0, "exps", 10, 3), (1, "exps", 10, 3), (2, "exps", 10, 3)
    ]
    assert [piece.name for piece in layout.layers[0].slices] == [
        f"blk.0.ffn_{role}_exps.weight" for role in ("gate", "up", "down")
    ]
    assert layout.bytes_per_token == sum(3 * layer.expert_bytes for layer in layout.layers)


def test_mixed_types_make_shape_classes(zoo_model: Model) -> None:
    """q4_k_m gives the down slices of every second layer six bits."""
    layout = read_layout(zoo_model("qwen3moe"))
    assert [layout.class_of(layer) for layer in layout.layers] == [0, 1, 0]
    assert layout.shapes == (layout.layers[0].shape, layout.layers[1].shape)
    assert layout.shapes[0][2] < layout.shapes[1][2]


def test_number_of_experts_used_may_differ_by_block(zoo_model: Model) -> None:
    layers = read_layout(zoo_model("nemotron_h_moe")).layers
    assert [(layer.block, layer.n_used) for layer in layers] == [(2, 3), (3, 2)]


def test_two_sets_of_experts_in_a_block_are_two_layers(zoo_model: Model) -> None:
    layers = read_layout(zoo_model("grovemoe")).layers
    assert len({(layer.block, layer.kind) for layer in layers}) == len(layers) == 2 * len({layer.block for layer in layers})
    assert {layer.kind for layer in layers} == {"exps", "chexps"}


def test_blocks_for_multi_token_prediction_are_idle(zoo_model: Model) -> None:
    layout = read_layout(zoo_model("glm4moe"))
    assert [layer.block for layer in layout.layers] == [1, 2]
    unused = sum(tensor.n_bytes for tensor in tensors_of(layout).values() if tensor.name.startswith("blk.3."))
    table = tensors_of(layout)["token_embd.weight"].n_bytes
    assert unused > 0 and layout.idle_bytes == unused + table


@pytest.mark.parametrize(("arch", "rows_per_token"), (("gemma4", 1), ("qwen4exp", 4)))
@pytest.mark.parametrize("parts", (1, 5))
def test_every_row_of_a_table_is_where_the_layout_says(
    zoo_model: Model, tmp_path: Path, arch: str, rows_per_token: int, parts: int
) -> None:
    path = zoo_model(arch)
    layout = read_layout(path if parts == 1 else make_zoo.make_split(path, tmp_path, parts))
    tensors = tensors_of(layout)
    assert {table.name: table.rows_per_token for table in layout.tables} == {
        "token_embd.weight": 1, "per_layer_token_embd.weight": rows_per_token
    }
    for table in layout.tables:
        tensor = tensors[table.name]
        assert table.ne == tuple(tensor.shape) and table.type == tensor.tensor_type
        with open(layout.paths[table.file], "rb") as file:
            for row in (0, 1, table.ne[1] - 1):
                file.seek(table.offset_bytes + row * table.row_bytes)
                assert file.read(table.row_bytes) == tensor.data[row].tobytes()
    assert layout.idle_bytes == sum(table.row_bytes * table.ne[1] for table in layout.tables)


@pytest.mark.parametrize(("value", "rows"), (("many", 1), ([3], 1), (1 << 31, 64), (0, 1), (3, 4)))
def test_rows_per_token_stay_possible_whatever_the_file_says(
    zoo_model: Model, tmp_path: Path, value: object, rows: int
) -> None:
    from test_errors import keep

    reader = gguf.GGUFReader(zoo_model("qwen4exp"))
    key, path = "qwen4exp.ple.ngram_size", tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "qwen4exp")
    reader.fields.pop(key)
    make_zoo.copy_fields(reader, writer)
    kind = {str: gguf.GGUFValueType.STRING, list: gguf.GGUFValueType.ARRAY}.get(type(value), gguf.GGUFValueType.UINT32)
    writer.add_key_value(key, value, kind, gguf.GGUFValueType.UINT32 if isinstance(value, list) else None)
    for tensor in reader.tensors:
        keep(writer, tensor)
    make_zoo.finish(writer)
    (_, table) = read_layout(path).tables
    assert table.rows_per_token == rows


def test_tied_embedding_is_dense(zoo_model: Model, tmp_path: Path) -> None:
    """Without an output matrix the table is the output matrix, which every token multiplies with whole."""
    from test_errors import keep, rewrite

    def change(writer: gguf.GGUFWriter, tensor: gguf.ReaderTensor) -> None:
        if tensor.name != "output.weight":
            keep(writer, tensor)

    tied = read_layout(rewrite(zoo_model("qwen3moe"), tmp_path / "tied.gguf", change))
    untied = read_layout(zoo_model("qwen3moe"))
    table = tensors_of(untied)["token_embd.weight"].n_bytes
    assert untied.idle_bytes == table
    assert tied.idle_bytes == 0 and tied.tables == ()
    assert abs(tied.dense_bytes - untied.dense_bytes) < 4096, "one matrix of that size went, the other came"


def test_model_without_experts_has_no_layers(dense_model: Path) -> None:
    layout = read_layout(dense_model)
    assert layout.layers == () and layout.shapes == () and layout.expert_bytes == 0
    assert layout.dense_bytes > 0


@pytest.mark.parametrize("parts", (2, 7))
def test_split_model_has_the_same_experts(zoo_model: Model, tmp_path: Path, parts: int) -> None:
    whole = read_layout(zoo_model("gemma4"))
    split = read_layout(make_zoo.make_split(zoo_model("gemma4"), tmp_path, parts))
    assert len(split.paths) == parts
    assert split.shapes == whole.shapes and split.expert_bytes == whole.expert_bytes
    assert abs(split.dense_bytes - whole.dense_bytes) < 4096 * parts, "gaps between tensors apart"
    for at, layer in enumerate(whole.layers):
        for index in range(len(layer.slices)):
            for expert in (0, layer.n_experts - 1):
                assert expert_bytes_in_file(split, at, index, expert) == expert_bytes_in_file(whole, at, index, expert)


def test_names_of_split_files_follow_the_first(tmp_path: Path) -> None:
    first = tmp_path / "a-00001-of-00012.gguf"
    paths = split_paths(first, 12)
    assert paths[0] == first and paths[11] == tmp_path / "a-00012-of-00012.gguf" and len(set(paths)) == 12
    for name in ("a-00002-of-00012.gguf", "a-00001-of-00011.gguf", "a.gguf"):
        with pytest.raises(LayoutError, match="-00001-of-00012.gguf"):
            split_paths(tmp_path / name, 12)


@pytest.mark.parametrize("wanted", (1, 7, 10))
def test_number_of_experts_used_may_be_overridden(zoo_model: Model, wanted: int) -> None:
    layout = read_layout(zoo_model("qwen3moe"), {"qwen3moe.expert_used_count": wanted})
    assert {layer.n_used for layer in layout.layers} == {wanted}
    assert layout.bytes_per_token == wanted * sum(layer.expert_bytes for layer in layout.layers)
