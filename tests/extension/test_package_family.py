"""A package brings a model that Transformers does not have, made of Transformers' own parts, and its family: it runs like any
other, from its folder too."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from moerunner.models import patch, registry  # noqa: E402
from moerunner.verify import tiny_model, verify  # noqa: E402

MODULE = """
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts, OlmoeForCausalLM, OlmoeMLP, OlmoeTopKRouter

from moerunner import ExpertsSpec, MoESpec, RoutingSpec, SharedSpec
from moerunner.models import Family, Router
from moerunner.models.entry import activation


class PebbleConfig(OlmoeConfig):
    model_type = "pebble"
    route_cap: float = 5.0
    route_scale: float = 1.7


class PebbleRouter(OlmoeTopKRouter):
    def __init__(self, config):
        super().__init__(config)
        self.correction, self.cap = nn.Parameter(torch.zeros(config.num_experts)), config.route_cap

    def forward(self, rows):
        logits = nn.functional.linear(rows, self.weight)
        scores = (self.cap * torch.tanh(logits.float() / self.cap)).softmax(-1)
        ids = (scores + self.correction).topk(self.top_k).indices
        weights = scores.gather(1, ids)
        return logits, (weights / weights.norm(dim=-1, keepdim=True)).to(rows.dtype), ids


class PebbleMoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate, self.experts = PebbleRouter(config), OlmoeExperts(config)
        self.common, self.common_gate = OlmoeMLP(config), nn.Linear(config.hidden_size, 1, bias=False)
        self.factor = config.route_scale

    def forward(self, hidden_states):
        rows = hidden_states.flatten(0, -2)
        _, weights, ids = self.gate(rows)
        y = self.experts(rows, ids, weights) * self.factor + self.common_gate(rows).sigmoid() * self.common(rows)
        return y.view_as(hidden_states)


class PebbleForCausalLM(OlmoeForCausalLM):
    config_class = PebbleConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = PebbleMoE(config)


AutoConfig.register("pebble", PebbleConfig)
AutoModelForCausalLM.register(PebbleConfig, PebbleForCausalLM)


def pebble(c):
    act, width = activation(c("hidden_act")), c("intermediate_size")
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("num_experts"),
        top_k=c("num_experts_per_tok"),
        routing=RoutingSpec(
            selection_bias=True, renormalise="p_norm", p=2.0, logit_softcap=c("route_cap"), logits_dtype="model"
        ),
        experts=ExpertsSpec(intermediate_size=width, activation=act),
        shared=SharedSpec(width=width, activation=act, gate="sigmoid"),
        routed_scaling_factor=c("route_scale"),
        apply_routed_scale_to_output=True,
    )


FAMILY = Family(
    name="pebble",
    blocks=(f"{__name__}.PebbleMoE",),
    spec=pebble,
    weights={
        "gate": "gate.weight",
        "selection_bias": "gate.correction",
        "w13": "experts.gate_up_proj",
        "w2": "experts.down_proj",
        "shared_gate_proj": "common.gate_proj.weight",
        "shared_up_proj": "common.up_proj.weight",
        "shared_w2": "common.down_proj.weight",
        "shared_gate": "common_gate.weight",
    },
    router=Router(flat=True),
    holds={"gate.top_k": "num_experts_per_tok", "gate.cap": "route_cap", "factor": "route_scale"},
    ignored={"norm_topk_prob": "of the parent class: weights are divided by their 2-norm always"},
)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder for sys.path with the package and its metadata, as pip installs it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "pebble_package.py").write_text(MODULE)
    info = folder / "pebble_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pebble-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\npebble = pebble_package:FAMILY\n")
    return folder


@pytest.fixture
def installed(package, monkeypatch):
    """The package, found in this process, and forgotten afterwards."""
    monkeypatch.syspath_prepend(package)
    monkeypatch.setattr(registry, "_plugins_loaded", False)
    yield
    registry.unregister("pebble")
    for mapping, key in ((transformers.CONFIG_MAPPING, "pebble"), (transformers.AutoModelForCausalLM._model_mapping, None)):
        mapping._extra_content.pop(key or sys.modules["pebble_package"].PebbleConfig, None)
    del sys.modules["pebble_package"]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tiny_model_of_the_family_is_right(dtype):
    report = verify(family="pebble", dtype=dtype, num_tokens=64)
    assert report.ok, str(report)
    assert len(report.layers) == 3


@pytest.mark.usefixtures("installed")
def test_what_the_entry_says_wrong_is_seen():
    family = registry.of_model_type("pebble")
    registry.unregister("pebble")
    wrong = {
        "it has no router chooser": {"router": dataclasses.replace(family.router, path="chooser")},
        "it has no tensor experts.down": {"weights": {**family.weights, "w2": "experts.down"}},
    }
    for reason, change in wrong.items():
        registry.register(dataclasses.replace(family, **change))
        report = patch(tiny_model("pebble"))
        assert [skipped.reason for skipped in report.skipped] == [reason] * 3
        registry.unregister("pebble")
    scaled = dataclasses.replace(family, spec=lambda c: dataclasses.replace(family.spec(c), apply_routed_scale_to_output=False))
    registry.register(scaled)
    assert "routing weights" in str(verify(family="pebble", num_tokens=32))


@pytest.mark.slow
def test_the_command_line_reads_a_folder_of_it(package, tmp_path):
    """In a process of its own: nothing but the entry point names the package."""
    path = os.pathsep.join([str(package), str(Path(__file__).parents[2] / "src")])
    program = "import sys; from moerunner.verify import tiny_model; tiny_model('pebble').save_pretrained(sys.argv[1])"
    command = (
        "import sys; from moerunner.cli import main; sys.argv = ['moerunner', 'verify', sys.argv[1], '--tokens', '16']; main()"
    )
    for code in (program, command):
        run = [sys.executable, "-c", code, str(tmp_path / "model")]
        done = subprocess.run(run, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    assert "\nok: 3 MoE layers" in done.stdout
