"""The parts of loading: files and their headers, the folder, places worked out on shapes, names and conversions."""

from __future__ import annotations

import importlib
import json
import random

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from moerunner.errors import CheckpointError, UnsupportedError
from moerunner.models import places
from moerunner.models.checkpoint import INDEX, ONE_FILE, read_recipe, read_tensors
from moerunner.models.names import Naming
from moerunner.models.tensorfile import Reader, boxes, read_header

transformers = pytest.importorskip("transformers")


# Files


def header(entries, data=b""):
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    return len(text).to_bytes(8, "little") + text + data


def one(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}}


EIGHT = bytes(8)
DAMAGED = {
    "empty": (b"", "ends within its header"),
    "length-cut": (b"\1\0\0", "ends within its header"),
    "length-too-long": ((2**62).to_bytes(8, "little") + b"{}", "claims"),
    "header-cut": (header(one(), EIGHT)[:20], "claims"),
    "not-json": (header("{'a'}"), "not JSON"),
    "not-utf8": (len(b"{\xff}").to_bytes(8, "little") + b"{\xff}", "not JSON"),
    "a-list": (header("[]"), "does not begin"),
    "nested-too-deep": (header("{" + '"a":{' * 100_000), "not JSON"),
    "doubled-name": (header('{"a": {}, "a": {}}'), "'a' is in it twice"),
    "no-dtype": (header({"a": {"shape": [], "data_offsets": [0, 0]}}), "describes 'a' wrongly"),
    "a-number": (header({"a": 3}), "describes 'a' wrongly"),
    "null": (header({"a": None}), "describes 'a' wrongly"),
    "one-offset": (header(one(offsets=(0,)), EIGHT), "describes 'a' wrongly"),
    "negative-shape": (header(one(shape=(-2,)), EIGHT), "describes 'a' wrongly"),
    "fraction-in-shape": (header(one(shape=(2.0,)), EIGHT), "describes 'a' wrongly"),
    "true-in-shape": (header(one(shape=(True, 2)), EIGHT), "describes 'a' wrongly"),
    "huge-shape": (header(one(shape=(2**80,)), EIGHT), "describes 'a' wrongly"),
    "unknown-dtype": (header(one(dtype="F33"), EIGHT), "unknown dtype 'F33'"),
    "list-dtype": (header(one(dtype=["F32"]), EIGHT), "describes 'a' wrongly|unknown dtype"),
    "hole-before": (header(one(offsets=(8, 16)), EIGHT * 2), "bytes .* cannot be"),
    "too-few-bytes": (header(one(offsets=(0, 4)), EIGHT), "bytes .* cannot be"),
    "swapped-offsets": (header(one(offsets=(8, 0)), EIGHT), "bytes .* cannot be"),
    "overlap": (header({**one(), "b": one()["a"]}, EIGHT), "bytes .* cannot be"),
    "cut-short": (header(one(), EIGHT[:7]), "cut short"),
    "more-at-the-end": (header(one(), EIGHT + b"x"), "there is more in it"),
}


@pytest.mark.parametrize(("data", "what"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named_and_so_is_the_damage(data, what, tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"weights\.safetensors: is damaged: .*({what}).*again$"):
        read_header(file)


def test_a_format_that_is_not_read_is_unsupported(tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(header(one(dtype="F4", shape=(16,)), EIGHT))
    with pytest.raises(UnsupportedError, match=r"'a' has the format F4\. Weights are read as .*BF16"):
        read_header(file)


def test_a_header_gives_what_was_saved(tmp_path):
    given = {
        "x": torch.arange(6.0).view(2, 3),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3),
        "b": torch.ones(3).bfloat16(),
    }
    save_file(given, tmp_path / "f", metadata={"format": "pt"})
    found = {tensor.name: tensor for tensor in read_header(tmp_path / "f")}
    assert found.keys() == given.keys()
    with Reader(lambda count: None) as reader:
        for name, tensor in found.items():
            assert (tensor.shape, tensor.dtype) == (tuple(given[name].shape), given[name].dtype)
            assert torch.equal(reader.all(tensor), given[name])


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 7), (4, 1, 1, 9)])
@pytest.mark.parametrize("most", [1, 2, 5, 12, 1000])
def test_boxes_cover_a_tensor_in_the_order_of_memory(shape, most):
    values = torch.arange(torch.Size(shape).numel()).view(shape)
    found = [values[box] for box in boxes(shape, most)]
    assert torch.equal(torch.cat([box.flatten() for box in found]), values.flatten())
    assert all(box.numel() <= most and box.is_contiguous() for box in found)


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    save_file({"a": torch.zeros(1000)}, tmp_path / "f")
    (tensor,) = read_header(tmp_path / "f")
    (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"f: is damaged: it ends within 'a'"), Reader(lambda count: None) as reader:
        reader.all(tensor)


# The folder


@pytest.fixture
def shards(tmp_path):
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "one.safetensors")
    save_file({"c": torch.zeros(1)}, tmp_path / "two.safetensors")

    def index(**where):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))
        return tmp_path

    return index


FILES = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}


def test_an_index_that_fits_its_files(shards):
    assert {n: t.file.name for n, t in read_tensors(shards(**FILES)).items()} == FILES


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"d": "two.safetensors"}, r"names tensors that its files do not have: d \(in two"),
        ({"c": "one.safetensors"}, r"names tensors that its files do not have: c \(in one"),
        ({"b": "two.safetensors"}, r"names the wrong file for: b \(in one.safetensors, not two"),
        ({"b": None}, r"weight_map"),
        ({"c": "three.safetensors"}, r"names the file three.safetensors, which is missing"),
        ({"c": "../two.safetensors"}, r"not a safetensors file beside it"),
        ({"c": "/etc/passwd"}, r"not a safetensors file beside it"),
        ({"c": "two.bin"}, r"not a safetensors file beside it"),
        ({"c": "t\0.safetensors"}, r"not a safetensors file beside it"),
    ],
)
def test_an_index_that_does_not(shards, change, what):
    with pytest.raises(CheckpointError, match=what):
        read_tensors(shards(**(FILES | change)))


def test_a_tensor_that_the_index_leaves_out(shards):
    with pytest.raises(CheckpointError, match=rf"{INDEX}: does not name tensors that its files have: b \(in one"):
        read_tensors(shards(a="one.safetensors", c="two.safetensors"))


def test_a_tensor_in_two_shards(shards, tmp_path):
    save_file({"c": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"tensors twice: b \(in one.safetensors and two.safetensors\)"):
        read_tensors(shards(**FILES))


@pytest.mark.parametrize(
    ("files", "kind", "what"),
    [
        ([], CheckpointError, "empty folder"),
        (["config.json"], CheckpointError, "holds no weights"),
        (["pytorch_model.bin"], UnsupportedError, "Pickle is never read"),
        (["consolidated.00.pth"], UnsupportedError, "Pickle is never read"),
        (["model-00001-of-00002.safetensors"], CheckpointError, f"1 shards and no {INDEX}"),
        (["adapter_model.safetensors"], UnsupportedError, f"must be called {ONE_FILE}"),
        (["model.gguf"], UnsupportedError, "GGUF files are not read"),
    ],
)
def test_a_folder_without_weights_says_what_it_has(tmp_path, files, kind, what):
    for file in files:
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(kind, match=what):
        read_tensors(tmp_path)


@pytest.mark.parametrize("where", ["", "text_config"])
def test_quantised_weights_are_refused_by_name(tmp_path, where):
    given = {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_oss", **({where: given} if where else given)}))
    with pytest.raises(UnsupportedError, match=r"quantised \(mxfp4\).*bfloat16"):
        read_recipe(tmp_path)


def test_code_from_a_checkpoint_is_never_run(tmp_path):
    data = {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(data))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedError, match=r"'mine' .*code from a checkpoint is never run"):
        read_recipe(tmp_path)


# Places


def realise(laid, sources, *, piece):
    """The tensor that a `Laid` describes, from sources that come in boxes of a few numbers; each is written once."""
    target, count = torch.full(laid.shape, torch.nan), 0
    for part in laid.parts:
        source = sources[part.source]
        for box in boxes(tuple(source.shape), piece):
            count += part.write(target, box, source[box])
    assert count == target.numel()
    assert not target.isnan().any()
    return target


def some_tree(depth):
    """A random composition of the verbs, and the same one of torch's functions."""
    sources = {}

    def leaf(shape):
        name = f"t{len(sources)}"
        sources[name] = torch.rand(shape)
        return places.whole(name, tuple(shape)), sources[name]

    def grow(shape, depth):
        ndim = len(shape)
        dim = random.randrange(ndim)
        kind = random.randrange(6) if depth else 0
        if kind == 1 and shape[dim] > 1:
            cut = random.randrange(1, shape[dim])
            both = [grow([*shape[:dim], n, *shape[dim + 1 :]], depth - 1) for n in (cut, shape[dim] - cut)]
            return places.concatenate([a for a, _ in both], dim), torch.cat([b for _, b in both], dim)
        if kind == 2 and ndim > 1:
            many = [grow([*shape[:dim], *shape[dim + 1 :]], depth - 1) for _ in range(shape[dim])]
            return places.stack([a for a, _ in many], dim), torch.stack([b for _, b in many], dim)
        if kind == 3 and ndim > 1:
            other = random.randrange(ndim)
            turned = list(shape)
            turned[dim], turned[other] = turned[other], turned[dim]
            a, b = grow(turned, depth - 1)
            return places.transpose(a, dim, other), b.transpose(dim, other)
        if kind == 4:
            extra = random.randrange(1, 4)
            a, b = grow([*shape[:dim], shape[dim] + extra, *shape[dim + 1 :]], depth - 1)
            which = random.randrange(2)
            sizes = [shape[dim], extra] if which == 0 else [extra, shape[dim]]
            return places.split(a, sizes, dim)[which], b.split(sizes, dim)[which]
        a, b = leaf(shape)
        if kind == 5 and shape[dim] % 2 == 0:
            index = torch.cat([torch.arange(0, shape[dim], 2), torch.arange(1, shape[dim], 2)])
            return places.evens_then_odds(a, dim), b.index_select(dim, index)
        return a, b

    laid, wanted = grow([random.randrange(1, 5) for _ in range(random.randrange(1, 5))], depth)
    return laid, wanted, sources


@pytest.mark.parametrize("depth", [0, 1, 2, 4])
def test_any_composition_of_verbs_equals_torch(depth):
    for _ in range(60):
        laid, wanted, sources = some_tree(depth)
        assert torch.equal(realise(laid, sources, piece=random.choice((1, 3, 100))), wanted)


def test_a_source_that_stays_as_it_is_can_be_read_straight_to_its_place():
    gate, up = (places.whole(name, (3, 4)) for name in ("gate", "up"))
    laid = places.concatenate([places.stack([gate], 0), places.stack([up], 0)], 1)
    all_of = (slice(0, 3), slice(0, 4))
    assert [part.box(all_of) for part in laid.parts] == [(0, slice(0, 3), slice(0, 4)), (0, slice(3, 6), slice(0, 4))]
    assert laid.parts[1].box((slice(1, 2), slice(0, 4))) == (0, slice(4, 5), slice(0, 4))
    assert places.transpose(gate, 0, 1).parts[0].box(all_of) is None
    assert places.split(gate, [1, 2], 0)[0].parts[0].box(all_of) is None
    assert places.evens_then_odds(gate, 1).parts[0].box(all_of) is None


@pytest.mark.parametrize(
    "join",
    [
        lambda a, b: places.stack([a, b], 0),
        lambda a, b: places.concatenate([a, b], 0),
        lambda a, b: places.stack([], 0),
        lambda a, b: places.split(a, [1, 1], 0),
        lambda a, b: places.evens_then_odds(a, 0),
        lambda a, b: places.transpose(a, 0, 7),
    ],
)
def test_shapes_that_do_not_go_together(join):
    with pytest.raises(places.Unfit):
        join(places.whole("a", (3, 4)), places.whole("b", (3, 5)))


# Names and conversions


def naming_of(monkeypatch, shapes, *rules):
    """Names for a bare module with these tensors, under these rules instead of Transformers' table."""
    model = nn.Module()
    for name, shape in shapes.items():
        model.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    table = importlib.import_module("transformers.conversion_mapping")
    monkeypatch.setattr(table, "get_model_conversion_mapping", lambda model, **_: list(rules))
    model.config = transformers.PreTrainedConfig()
    return Naming(model)


def conversions():
    from transformers.core_model_loading import (
        Chunk,
        Concatenate,
        ErnieFuseAndSplitTextVisionExperts,
        Interleave,
        MergeModulelist,
        Transpose,
        WeightConverter,
    )

    experts = {f"e.{i}.{n}.w": (3, 4) for i in range(4) for n in ("g", "u")}
    yield (
        "merge",
        experts,
        {"gu": (4, 6, 4)},
        WeightConverter(["e.*.g.w", "e.*.u.w"], "gu", [MergeModulelist(0), Concatenate(1)]),
    )
    yield (
        "merge-one",
        {f"e.{i}.d.w": (3, 4) for i in range(11)},
        {"d": (11, 3, 4)},
        WeightConverter("e.*.d.w", "d", [MergeModulelist(0)]),
    )
    yield (
        "merge-transpose",
        {f"e.{i}.d.w": (3, 4) for i in range(3)},
        {"d": (3, 4, 3)},
        WeightConverter("e.*.d.w", "d", [MergeModulelist(0), Transpose(1, 2)]),
    )
    yield "chunk", {"qkv": (6, 2)}, {"q": (2, 2), "k": (2, 2), "v": (2, 2)}, WeightConverter("qkv", ["q", "k", "v"], [Chunk(0)])
    yield "interleave", {"w13": (2, 6, 3)}, {"gu": (2, 6, 3)}, WeightConverter("w13", "gu", [Interleave(1)])
    yield (
        "interleave-chunk",
        {"w13": (6, 3)},
        {"g": (3, 3), "u": (3, 3)},
        WeightConverter("w13", ["g", "u"], [Interleave(0), Chunk(0)]),
    )
    yield "transpose", {"w": (2, 3, 5)}, {"t": (2, 5, 3)}, WeightConverter("w", "t", [Transpose(1, 2)])
    yield (
        "transpose-if-needed",
        {"w": (2, 3, 5)},
        {"t": (2, 3, 5)},
        WeightConverter("w", "t", [Transpose(1, 2, check_dims=True)]),
    )
    yield "concatenate", {"q": (4, 2), "k": (1, 2)}, {"qk": (5, 2)}, WeightConverter(["q", "k"], "qk", [Concatenate(0)])
    yield (
        "text-and-vision",
        experts,
        {"text": (2, 6, 4), "vision": (2, 6, 4)},
        WeightConverter(["e.*.g.w", "e.*.u.w"], ["text", "vision"], [ErnieFuseAndSplitTextVisionExperts(0, 1)]),
    )


@pytest.mark.parametrize(("stored", "wanted", "rule"), [c[1:] for c in conversions()], ids=[c[0] for c in conversions()])
def test_a_conversion_on_shapes_equals_transformers_own(monkeypatch, stored, wanted, rule):
    values = {name: torch.rand(shape) for name, shape in stored.items()}
    naming = naming_of(monkeypatch, wanted, rule)
    arranged = naming.arrange(stored)
    assert not arranged.whole
    assert set(arranged.led_by) == set(wanted)
    from moerunner.models.names import Group

    group = Group(next(iter(arranged.led_by.values())), rule)
    for name in stored:
        group.sources.setdefault(naming.find(name)[2], []).append(name)
    theirs = group.convert(values.__getitem__, naming)
    assert theirs.keys() == wanted.keys()
    for target, tensor in theirs.items():
        parts = tuple(part for at in arranged.parts.values() for name, part in at if name == target)
        assert torch.equal(realise(places.Laid(tuple(tensor.shape), parts), values, piece=5), tensor)


def test_an_operation_that_is_not_known_is_left_to_transformers(monkeypatch):
    from transformers.core_model_loading import Transpose, WeightConverter

    class Other(Transpose):
        pass

    naming = naming_of(monkeypatch, {"t": (3, 2)}, WeightConverter("w", "t", [Other(0, 1)]))
    arranged = naming.arrange({"w": (2, 3)})
    assert [group.names() for group in arranged.whole] == [["w"]]
    w = torch.rand(2, 3)
    assert torch.equal(arranged.whole[0].convert({"w": w}.__getitem__, naming)["t"], w.T)


EXPERTS = {f"e.{i}.{n}.w": (3, 4) for i in range(4) for n in ("g", "u")}


@pytest.mark.parametrize(
    ("change", "fault", "names"),
    [
        ({"e.2.u.w": ...}, "missing", ["e.2.u.w"]),
        ({f"e.{i}.u.w": ... for i in range(4)}, "missing", [f"e.{i}.u.w" for i in range(4)]),
        (dict.fromkeys(EXPERTS, ...), "missing", sorted(EXPERTS)),
        ({"e.3.u.w": ..., "e.3.g.w": ...}, "missing", ["e.3.g.w", "e.3.u.w"]),
        ({"e.4.u.w": (3, 4)}, "extra", ["e.4.u.w"]),
        ({"e.4.u.w": (3, 4), "e.4.g.w": (3, 4)}, "extra", ["e.4.g.w", "e.4.u.w"]),
        ({"other": (1,)}, "extra", ["other"]),
        ({"e.1.g.w": (4, 3)}, "misshapen", ["e.1.g.w"]),
        (dict.fromkeys(EXPERTS, (2, 4)), "misshapen", sorted(EXPERTS)),
        ({"gu": (4, 6, 4)}, "doubled", None),
    ],
)
def test_what_is_wrong_with_experts_is_told_by_their_names(monkeypatch, change, fault, names):
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    rule = WeightConverter(["e.*.g.w", "e.*.u.w"], "gu", [MergeModulelist(0), Concatenate(1)])
    naming = naming_of(monkeypatch, {"gu": (4, 6, 4)}, rule)
    given = {name: shape for name, shape in (EXPERTS | change).items() if shape is not ...}
    arranged = naming.arrange(given)
    found = {kind: sorted(getattr(arranged, kind)) for kind in ("missing", "extra", "doubled", "misshapen")}
    assert [kind for kind, listed in found.items() if listed] == [fault]
    assert names is None or found[fault] == names


def test_a_gap_is_not_closed_by_the_expert_after_the_last(monkeypatch):
    from transformers.core_model_loading import MergeModulelist, WeightConverter

    naming = naming_of(monkeypatch, {"d": (3, 2)}, WeightConverter("e.*.w", "d", [MergeModulelist(0)]))
    arranged = naming.arrange({"e.0.w": (2,), "e.1.w": (2,), "e.3.w": (2,)})
    assert (arranged.missing, arranged.extra) == (["e.2.w"], ["e.3.w"])
