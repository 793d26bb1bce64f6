"""Reading weights slice by slice, from files and from nothing."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from saqqara.workers import safetensors_file
from saqqara.workers.models import weights
from saqqara.workers.models.reading.rope_spec import RopeSpec
from saqqara.workers.models.spec import ModelSpec
from saqqara.workers.models.weights import (
    DummyWeights,
    SafetensorsWeights,
    open_weights,
    weight_shapes,
)

SPEC = ModelSpec(
    family="qwen3",
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=64,
    rms_norm_eps=1e-6,
    rope=RopeSpec(),
    qkv_bias=True,
    output_bias=True,
    qk_norm=True,
)
SHAPES = weight_shapes(SPEC)
EMBEDDING = "model.embed_tokens.weight"
QUERY = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def single(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder = tmp_path / "single"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def sharded(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    files = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    weight_map = {name: files[index % 3] for index, name in enumerate(tensors)}
    for file in files:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_single_file_and_shards_are_the_same_model(
    single: Path, sharded: Path, tensors: dict[str, torch.Tensor]
) -> None:
    with open_weights(single, SPEC) as one, open_weights(str(sharded), SPEC) as three:
        for name, tensor in tensors.items():
            assert torch.equal(one.read(name), tensor)
            assert torch.equal(three.read(name), tensor)


def test_slices_are_those_of_the_whole(single: Path, tensors: dict[str, torch.Tensor]) -> None:
    with open_weights(single, SPEC) as source:
        assert torch.equal(
            source.read(f"{QUERY}.weight", rows=range(8, 24)), tensors[f"{QUERY}.weight"][8:24]
        )
        assert torch.equal(
            source.read(f"{QUERY}.bias", rows=range(8, 24)), tensors[f"{QUERY}.bias"][8:24]
        )
        columns = source.read(DOWN, cols=range(16, 40))
        assert torch.equal(columns, tensors[DOWN][:, 16:40])
        assert columns.is_contiguous()
        both = source.read(DOWN, rows=range(2, 5), cols=range(3, 4))
        assert torch.equal(both, tensors[DOWN][2:5, 3:4])


def test_rows_beyond_the_vocabulary_are_zeros(
    single: Path, tensors: dict[str, torch.Tensor]
) -> None:
    for opened in (SafetensorsWeights(single, SHAPES), DummyWeights(SHAPES)):
        with opened as source:
            padded = source.read(EMBEDDING, rows=range(40, 50), pad_rows_to=20)
            assert padded.shape == (20, 24)
            assert torch.equal(padded[:10], source.read(EMBEDDING)[40:50])
            assert not padded[10:].any()
            assert not source.read(EMBEDDING, rows=range(50, 50), pad_rows_to=20).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_come_in_the_dtype_asked_for(
    single: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    with open_weights(single, SPEC, dtype=dtype) as source:
        assert torch.equal(source.read(DOWN), tensors[DOWN].to(dtype))
    with open_weights("any/name", SPEC, "dummy", dtype=dtype) as source:
        assert source.read(DOWN).dtype == source.read(NORM).dtype == dtype


def test_a_checkpoint_in_bfloat16_is_widened(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    save_file({n: t.bfloat16() for n, t in tensors.items()}, tmp_path / "model.safetensors")
    with open_weights(tmp_path, SPEC) as source:
        assert torch.equal(source.read(DOWN), tensors[DOWN].bfloat16().float())


@pytest.mark.parametrize("piece_bytes", [1, 100, 1 << 20])
def test_a_slice_is_the_same_in_whatever_pieces_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
    single: Path,
    tensors: dict[str, torch.Tensor],
    piece_bytes: int,
) -> None:
    monkeypatch.setattr(safetensors_file, "_PIECE_BYTES", piece_bytes)
    with open_weights(single, SPEC, dtype=torch.bfloat16) as source:
        for name, tensor in tensors.items():
            assert torch.equal(source.read(name), tensor.bfloat16())
        some = source.read(DOWN, rows=range(3, 22), cols=range(16, 23))
        assert torch.equal(some, tensors[DOWN][3:22, 16:23].bfloat16())
        weight = f"{QUERY}.weight"
        joined = source.read_joined([(weight, range(8, 24)), (weight, range(1, 3))])
        expected = torch.cat([tensors[weight][8:24], tensors[weight][1:3]])
        assert torch.equal(joined, expected.bfloat16())


def test_the_log_has_a_bar_of_what_is_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, single: Path
) -> None:
    monkeypatch.setattr(safetensors_file, "_LOG_SECONDS", 0.0)
    sizes = [4 * math.prod(shape) for shape in SHAPES.values()]
    with caplog.at_level("INFO"), open_weights(single, SPEC, total_bytes=sum(sizes)) as source:
        for name in SHAPES:
            source.read(name)
    bars = [message.split()[1] for message in caplog.messages]
    filled = [20 * sum(sizes[: count + 1]) // sum(sizes) for count in range(len(sizes))]
    assert bars == [f"[{'#' * length}{'-' * (20 - length)}]" for length in filled]
    assert (
        safetensors_file.loaded_bar(3 * 2**30, 12 * 2**30)
        == "[#####---------------] 3.0 of 12.0 GiB"
    )


def test_what_was_read_does_not_change_with_the_file(
    single: Path, tensors: dict[str, torch.Tensor]
) -> None:
    with open_weights(single, SPEC) as source:
        embedding = source.read(EMBEDDING)
    file = single / "model.safetensors"
    file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(embedding, tensors[EMBEDDING])


def test_a_file_that_became_shorter_is_named(single: Path) -> None:
    file = single / "model.safetensors"
    with open_weights(single, SPEC) as source:
        with file.open("r+b") as opened:
            opened.truncate(file.stat().st_size - 4096)
        with pytest.raises(ValueError, match=r"model\.safetensors ends too early"):
            [source.read(name) for name in SHAPES]


@pytest.mark.parametrize("block_elements", [1, 100, 1 << 22])
def test_dummy_weights_are_one_model_however_they_are_cut(
    monkeypatch: pytest.MonkeyPatch, block_elements: int
) -> None:
    monkeypatch.setattr(weights, "_DUMMY_BLOCK_ELEMENTS", block_elements)
    source = DummyWeights(SHAPES)
    for name, shape in SHAPES.items():
        whole = source.read(name)
        assert whole.shape == shape
        assert torch.equal(whole, DummyWeights(SHAPES).read(name))
        for parts in (2, 3):
            edges = [shape[0] * part // parts for part in range(parts + 1)]
            pieces = [source.read(name, rows=range(a, b)) for a, b in pairwise(edges)]
            assert torch.equal(torch.cat(pieces), whole)
            if len(shape) == 2:
                edges = [shape[1] * part // parts for part in range(parts + 1)]
                pieces = [source.read(name, cols=range(a, b)) for a, b in pairwise(edges)]
                assert torch.equal(torch.cat(pieces, dim=1), whole)


def test_dummy_weights_look_like_a_fresh_model() -> None:
    source = DummyWeights({"a": (512, 256), "b": (512, 256), "x.norm.weight": (8,)})
    a, b = source.read("a"), source.read("b")
    assert torch.equal(source.read("x.norm.weight"), torch.ones(8))
    # 131,072 numbers: standard errors are 0.3% of each figure's scale.
    assert a.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(a.mean().item()) < 0.02 * 0.02
    assert abs((a * b).mean().item()) < 0.02 * 0.02 * 0.02
    assert not torch.equal(DummyWeights(source.shapes, seed=1).read("a"), a)


def test_missing_tensors_are_named_with_their_file(
    single: Path, sharded: Path, tensors: dict[str, torch.Tensor]
) -> None:
    some = {name: tensor for name, tensor in tensors.items() if name != DOWN}
    save_file(some, single / "model.safetensors")
    with pytest.raises(ValueError, match=rf"single/model\.safetensors lacks tensor '{DOWN}',"):
        open_weights(single, SPEC)
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][DOWN]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"index\.json lacks tensor '{DOWN}', which the config"):
        open_weights(sharded, SPEC)
    deeper = weight_shapes(replace(SPEC, num_layers=3)).keys() - SHAPES.keys()
    with pytest.raises(ValueError, match=rf"lacks tensors .* and {len(deeper) - 5 + 1} more"):
        open_weights(single, replace(SPEC, num_layers=3))


def test_tensors_that_nobody_reads_are_named(single: Path, sharded: Path) -> None:
    """A config of fewer layers would run another model than was saved."""
    flatter = replace(SPEC, num_layers=1)
    unread = len(SHAPES.keys() - weight_shapes(flatter).keys())
    for folder in (single, sharded):
        with pytest.raises(
            ValueError, match=rf"holds tensors 'model\.layers\.1\..* and {unread - 5} more, which"
        ):
            open_weights(folder, flatter)


def test_what_checkpoints_hold_without_harm_is_left_alone(
    single: Path, tensors: dict[str, torch.Tensor]
) -> None:
    """Rotary frequencies of old checkpoints, and the head beside an embedding it is tied to."""
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**tensors, **rotary}, single / "model.safetensors")
    with open_weights(single, replace(SPEC, tie_embeddings=True)) as source:
        assert torch.equal(source.read(NORM), tensors[NORM])


def test_a_tensor_of_another_shape_is_named(single: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({**tensors, NORM: torch.ones(25)}, single / "model.safetensors")
    with (
        open_weights(single, SPEC) as source,
        pytest.raises(ValueError, match=r"model\.norm\.weight.*shape \[25\].*implies \[24\]"),
    ):
        source.read(NORM)


def test_a_quantized_tensor_is_refused(single: Path, tensors: dict[str, torch.Tensor]) -> None:
    int8 = torch.zeros(SHAPES[DOWN], dtype=torch.int8)
    save_file({**tensors, DOWN: int8}, single / "model.safetensors")
    with open_weights(single, SPEC) as source, pytest.raises(ValueError, match="has dtype I8"):
        source.read(DOWN)


def test_what_is_not_a_model_folder_is_an_error(tmp_path: Path, sharded: Path) -> None:
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor .*only safetensors"):
        open_weights(tmp_path, SPEC)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        open_weights(tmp_path, SPEC).read(NORM)
    next(sharded.glob("*-00002-*")).unlink()
    with pytest.raises(ValueError, match=r"00002-of-00003.* not in the folder"):
        open_weights(sharded, SPEC)
    with pytest.raises(ValueError, match="load_format='pickle'"):
        open_weights(sharded, SPEC, "pickle")


def test_an_index_cannot_point_outside_its_folder(sharded: Path, single: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][NORM] = "../single/model.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not in the folder"):
        open_weights(sharded, SPEC)
