"""A flipped bit in a file of weights is found, wherever a checksum of the file is kept."""

import random
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from moerunner.errors import CheckpointError
from moerunner.verify import damaged_weights, tiny_model, verify
from moerunner.verify.digests import SUMS, compare_digests, digest_of, record

WEIGHTS = "model.safetensors"
FEW = {"num_tokens": 8, "oracle_tokens": 1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_model("mixtral").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def flip(file):
    """One bit of the payload: the header's length stands in the first eight bytes."""
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    place = random.randrange(start * 8, len(data) * 8)
    data[place // 8] ^= 1 << place % 8
    file.unlink()
    file.write_bytes(data)


def by_sums(folder):
    record(folder)


def by_link(folder):
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    blob = blobs / digest_of(folder / WEIGHTS)
    shutil.move(folder / WEIGHTS, blob)
    (folder / WEIGHTS).symlink_to(blob)


def by_metadata(folder):
    kept = folder / ".cache" / "huggingface" / "download"
    kept.mkdir(parents=True)
    (kept / f"{WEIGHTS}.metadata").write_text(f"{'ab' * 20}\n{digest_of(folder / WEIGHTS)}\n1730000000.0\n")


@pytest.mark.parametrize("keep", [by_sums, by_link, by_metadata])
def test_every_flipped_bit_is_found(folder, keep):
    keep(folder)
    assert compare_digests(folder) == ([], [])
    for _ in range(20):
        good = (folder / WEIGHTS).read_bytes()
        flip((folder / WEIGHTS).resolve())
        assert compare_digests(folder) == ([f"{WEIGHTS}: its bytes are not those of its checksum"], [])
        (folder / WEIGHTS).resolve().write_bytes(good)
    assert compare_digests(folder) == ([], [])


def test_verify_says_it_and_says_where_it_cannot_know(folder):
    report = verify(folder, **FEW)
    assert report.ok
    assert any("no checksum of model.safetensors" in note for note in report.notes)
    record(folder)
    report = verify(folder, **FEW)
    assert report.ok
    assert not any("checksum" in note for note in report.notes)
    flip(folder / WEIGHTS)
    report = verify(folder, **FEW)
    assert not report.ok
    assert report.damaged[0] == f"{WEIGHTS}: its bytes are not those of its checksum"


@pytest.mark.parametrize("text", ["no digest\n", f"{'a' * 64}\n", f"{'a' * 64}  ../elsewhere\n", "\0\xff"])
def test_sums_that_are_none(folder, text):
    (folder / SUMS).write_text(text)
    with pytest.raises(CheckpointError, match="line 1 is no digest"):
        compare_digests(folder)


def test_sums_of_a_file_that_is_gone(folder):
    record(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"names model\.safetensors, which is not there"):
        compare_digests(folder)


def test_nothing_to_record(tmp_path):
    with pytest.raises(CheckpointError, match="holds no file"):
        record(tmp_path)


def test_a_value_that_no_weight_has():
    model = tiny_model("mixtral")
    assert not damaged_weights(model)
    weight = model.lm_head.weight
    weight.data[3, 5] = 2e15
    assert damaged_weights(model) == ["lm_head.weight: a value of 2e+15"]
    weight.data[3, 5] = torch.nan
    assert "not finite" in damaged_weights(model)[0]


def test_the_shipped_model_has_its_checksums():
    assert compare_digests(Path(verify.__code__.co_filename).parents[1] / "assets" / "demo") == ([], [])
