"""A block whose source is not the one that its family was verified with is noticed; how it is written down does not count."""

import importlib.util
import json
import linecache
import sys
import warnings

import pytest
import transformers
from test_parity import CASES, CONFIGS, build
from torch import nn

from moerunner import ReferenceWarning, patch, unpatch
from moerunner.models import reference, registry
from moerunner.models.families import TABLE
from moerunner.models.prepare import sites
from moerunner.verify import verify

RELEASE = transformers.__version__
RECORDED = RELEASE in reference.releases()
NAMES = ("Block", "Router", "Experts")
SOURCE = """
def scaled(x):
    return x * 2

class Block:
    def helper(self, x):
        return scaled(x) + 1

    @property
    def bias(self):
        return 1.5

    def _apply_gate(self, x):
        return x / 4

    def forward(self, x):
        return self.helper(x) + self.bias
"""
counter = iter(range(1000))


def defined(source):
    """The class `Block` of a source that can be looked up."""
    file = f"<source {next(counter)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    spec = importlib.util.spec_from_loader(file, loader=None)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file] = module
    exec(compile(source, file, "exec"), module.__dict__)
    return module.Block


def of(source=SOURCE, *changes):
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return reference.fingerprint(defined(source))


@pytest.mark.parametrize(
    "change",
    [
        ("def forward(self, x):\n", 'def forward(self, x):\n        """What it does."""\n        # and why\n\n'),
        ("return self.helper(x) + self.bias", "return (\n            self.helper(x) + self.bias  # both\n        )"),
        ("def forward(self, x):", "def forward(self, x: 'Tensor', ) -> 'Tensor':"),
        ("    def helper(self, x):", "    @staticmethod\n    def unused(x):\n        return 3\n\n    def helper(self, x):"),
        ("class Block:", "class Unused:\n    pass\n\nclass Block:"),
    ],
    ids=["docstring", "layout", "annotations", "method-not-called", "class-beside"],
)
def test_what_does_not_compute_does_not_count(change):
    assert of(SOURCE, change) == of()


@pytest.mark.parametrize(
    "change",
    [
        ("self.helper(x) + self.bias", "self.helper(x) - self.bias"),
        ("scaled(x) + 1", "scaled(x) + 2"),
        ("return 1.5", "return 2.5"),
        ("return x * 2", "return x * 3"),
        ("return x / 4", "return x / 5"),
        ("def forward(self, x):\n", "def forward(self, x, y=None):\n"),
    ],
    ids=["forward", "method", "property", "function-beside", "gate-of-experts", "argument"],
)
def test_what_computes_counts(change):
    assert of(SOURCE, change) != of()


def test_the_fingerprint_is_the_same_everywhere():
    """A literal, since other versions of Python have to find the same."""
    assert of() == "746a9b08"


def test_a_wrapped_forward_counts_as_what_it_wraps():
    source = SOURCE.replace("    def forward", "    @wrapped\n    def forward")
    source = "import functools\n\ndef wrapped(f):\n    return functools.wraps(f)(lambda *args: f(*args))\n" + source
    assert reference.fingerprint(defined(source)) == of()


def test_without_a_source_nothing_is_checked():
    space = {}
    exec(SOURCE, space)
    assert reference.fingerprint(space["Block"]) is None
    assert reference.fingerprint(type("Block", (nn.Module,), {"forward": lambda self, x: x})) is None
    assert reference.fingerprint(type("Block", (nn.Module,), {"forward": len})) is None


# ---- families


@pytest.mark.parametrize("family", [family.name for family in TABLE])
@pytest.mark.rotating(3)
def test_every_family_is_recorded_with_this_release_and_does_not_warn(family):
    if not RECORDED or family not in CONFIGS:
        pytest.skip(f"Transformers {RELEASE} was not verified, or has no {family}")
    assert RELEASE in reference.releases(family), "make it again: make versions"
    case = next(case for case, (name, _) in CASES.items() if name == family)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReferenceWarning)
        report = patch(build(case))
    assert report.replaced
    assert not report.notes
    (now,) = (group.sources for group in reference.verified()[family] if RELEASE in group.releases)
    for site in sites(build(case)):
        assert site.family is None or reference.sources(site.block).items() <= now.items()


def test_releases_are_in_order_and_families_are_known():
    record = reference.verified()
    assert set(record) <= {family.name for family in TABLE}
    for groups in record.values():
        releases = [release for group in groups for release in group.releases]
        assert len(set(releases)) == len(releases)
        assert all(len(print_) == 8 for group in groups for print_ in group.sources.values())
    assert reference.releases()[0] == "5.17.0"
    assert reference.releases("mixtral") == sorted(reference.releases("mixtral"), key=lambda r: [*map(int, r.split("."))])


@pytest.fixture
def model():
    if not RECORDED:
        pytest.skip(f"Transformers {RELEASE} was not verified")
    return build("deepseek_v3-three-groups")


def other_forward(self, hidden_states):
    """Of a later release."""
    return hidden_states


def other_experts(self, hidden_states, top_k_index, top_k_weights):
    return hidden_states * 2


def other_gate(self, gate_up):
    return gate_up * 3


def parts(model):
    block = next(site.block for site in sites(model))
    return {"block": block, "router": block.gate, "experts": block.experts, "shared": block.shared_experts}


@pytest.mark.parametrize("part", ["block", "router", "experts", "shared"])
def test_a_changed_forward_is_told_once_by_class(model, monkeypatch, part):
    kind = type(parts(model)[part])
    monkeypatch.setattr(kind, "forward", other_experts if part == "experts" else other_forward)
    with pytest.warns(ReferenceWarning) as told:
        report = patch(model)
    (note,) = report.notes
    assert [str(one.message) for one in told] == [note]
    assert f"Transformers {RELEASE} has another source of {kind.__name__} than the family 'deepseek_v3'" in note
    assert "moerunner verify --family deepseek_v3" in note
    assert str(report).endswith(f"\nnote: {note}")
    assert len(report.replaced) == 2
    with pytest.warns(ReferenceWarning):
        assert patch(model).notes == [note]
    unpatch(model)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_changed_helper_of_the_experts_is_told(model, monkeypatch):
    kind = type(parts(model)["experts"])
    assert "_apply_gate" in vars(kind)
    monkeypatch.setattr(kind, "_apply_gate", other_gate)
    with pytest.warns(ReferenceWarning, match=f"another source of {kind.__name__} than"):
        patch(model)


def test_an_experts_function_of_the_users_own_is_no_change(model):
    model.set_experts_implementation("eager")
    assert not patch(model).notes


def test_a_family_from_elsewhere_is_not_checked(model, monkeypatch):
    block = parts(model)["block"]
    monkeypatch.setattr(type(block), "forward", other_forward)
    known = registry.of_model_type("deepseek_v3")
    assert reference.unknown(known, block) == [type(block).__name__]
    assert reference.unknown(known.like("of-a-third-party", package="deepseek_v3"), block) == []


def test_verify_tells_whether_a_changed_source_still_matches(model, monkeypatch):
    kind = type(parts(model)["router"])
    right = kind.forward

    def forward(self, hidden_states):
        return right(self, hidden_states)

    monkeypatch.setattr(kind, "forward", forward)
    with pytest.warns(ReferenceWarning):
        report = verify(family="deepseek_v3", num_tokens=16)
    assert report.ok
    assert kind.__name__ in report.notes[0]
    assert json.loads(json.dumps(report.to_dict()))["notes"] == report.notes

    def changed(self, hidden_states):
        logits, weights, ids = right(self, hidden_states)
        return logits, weights * 2, ids

    monkeypatch.setattr(kind, "forward", changed)
    with pytest.warns(ReferenceWarning):
        report = verify(family="deepseek_v3", num_tokens=16)
    assert not report.ok
    assert kind.__name__ in report.notes[0]


# ---- blocks of older releases


def test_fields_of_an_older_source_count_where_the_block_is_that_source(monkeypatch):
    family = registry.of_model_type("mixtral")
    model = build(next(case for case, (name, _) in CASES.items() if name == "mixtral"))
    kind = type(next(site.block for site in sites(model)))
    print_ = reference.fingerprint(kind)
    changes = {"holds": {"nowhere": "num_experts_per_tok"}}
    for source, backs_off in ((print_, True), ("00000000", False)):
        other = family.like(family.name, "MixtralSparseMoeBlock", older={source: changes})
        monkeypatch.setattr(registry, "find", lambda block, other=other: other if block is kind else None)
        report = patch(model)
        assert bool(report.skipped) == backs_off
        assert all("nowhere" in skipped.reason for skipped in report.skipped)
        unpatch(model)


def test_the_sources_of_older_entries_are_recorded():
    """An entry of an older source that no verified release has is never used."""
    recorded = {f.name: {p for g in reference.verified().get(f.name, ()) for p in g.sources.values()} for f in TABLE}
    for family in TABLE:
        if family.older:
            assert set(family.older) & recorded[family.name], family.name
