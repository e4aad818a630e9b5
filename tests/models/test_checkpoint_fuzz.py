"""Random damage to a checkpoint's files ends in one clear error, or in the model that was saved."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from tiny import build

from moerunner.errors import MoEError
from moerunner.models import load

VALUES = (
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    10**6,
    2**70,
    1e30,
    -0.5,
    float("nan"),
    "",
    "x",
    "silu",
    "float16",
    [],
    [1],
    {},
    {"a": 1},
)
DIGITS = b"0123456789"


@pytest.fixture(scope="module", params=["mixtral-top2", "deepseek_v3-groups"])
def saved(request, tmp_path_factory):
    """A model of one layer beside its folder of shards, and one of a single file."""
    model = build(request.param, num_hidden_layers=2, vocab_size=24)
    shards, single = tmp_path_factory.mktemp("shards"), tmp_path_factory.mktemp("single")
    model.save_pretrained(shards, max_shard_size="40KB")
    model.save_pretrained(single)
    return model, (shards, single)


def damage_bytes(data: bytes, end: int) -> bytes:
    """Between one and three small changes in the first `end` bytes."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 3))):
        at = random.randrange(min(end, len(changed)) or 1)
        match random.randrange(6):
            case 0:
                changed[at : at + 1] = bytes([random.randrange(256)])
            case 1:
                changed[at : at + 1] = bytes([changed[at] ^ 1 << random.randrange(8)]) if changed else b""
            case 2:
                del changed[at : at + random.choice((1, 1, 8, 100))]
            case 3:
                changed[at:at] = changed[at : at + random.choice((1, 1, 8, 100))]
            case 4:
                digits = [i for i in range(min(end, len(changed))) if changed[i] in DIGITS]
                if digits:
                    changed[random.choice(digits)] = random.choice(DIGITS)
            case 5:
                del changed[random.randrange(len(changed) or 1) :]
    return bytes(changed)


def damage_json(text: str, *, swap: bool = True) -> str:
    """One value replaced, removed, put under another name or swapped with another, at any depth."""
    data = json.loads(text)
    places = []

    def walk(value):
        if isinstance(value, dict):
            places.extend((value, key) for key in value)
        for below in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(below)

    walk(data)
    holder, key = random.choice(places)
    match random.randrange(4 if swap else 3):
        case 0:
            del holder[key]
        case 1:
            holder[random.choice([k for _, k in places])] = holder[key]
        case 2:
            holder[key] = random.choice(VALUES)
        case 3:
            other, name = random.choice(places)
            holder[key], other[name] = other[name], holder[key]
    return json.dumps(data)


def damage(folder: Path) -> str:
    """Changes one file of the folder; says how."""
    file = random.choice(sorted(folder.iterdir()))
    data = file.read_bytes()
    if file.suffix == ".json" and random.random() < 0.6:
        file.write_text(damage_json(data.decode()))
        return f"JSON of {file.name}: {file.read_text()}"
    end = len(data)
    if file.suffix == ".safetensors":
        end = 8 + int.from_bytes(data[:8], "little")
        if random.random() < 0.4:
            # Two tensors that swap places in the header make a sound file of another model: no reader can tell.
            changed = damage_json(data[8:end].decode(), swap=False).encode()
            file.write_bytes(len(changed).to_bytes(8, "little") + changed + data[end:])
            return f"header of {file.name}: {changed.decode()}"
    file.write_bytes(damage_bytes(data, end))
    return f"bytes of {file.name}: {file.read_bytes()[:end]!r}"


def check_one(saved, tmp_path, number):
    model, folders = saved
    folder = tmp_path / str(number)
    shutil.copytree(random.choice(folders), folder)
    how = damage(folder)
    reason = ""
    try:
        loaded = load(folder)
    except MoEError as error:
        reason = str(error)
    except Exception as error:
        raise AssertionError(how) from error
    finally:
        shutil.rmtree(folder)
    assert "\n" not in reason, how
    if reason:
        return False
    wanted = model.state_dict()
    assert loaded.state_dict().keys() == wanted.keys(), how
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, wanted[name].to(tensor.dtype)), f"{name} after {how}"
    return True


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_end_in_an_error_or_in_the_model(saved, tmp_path):
    survived = sum(check_one(saved, tmp_path, number) for number in range(120))
    assert 0 < survived < 120


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")
def test_thousands_of_damaged_files(saved, tmp_path):
    for number in range(3000):
        check_one(saved, tmp_path, number)
