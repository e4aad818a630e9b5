"""A new model family is one entry: this file has a model that moerunner has never seen, and what it takes to run it.

The model takes from the language of entries what the shipped families do not need: weights stored transposed, gate and up
rows alternating, a bias of one row per expert set, a value per layer, a factor on the output, a router module of its own
shape, a second argument, and a tuple as result.
"""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moerunner import ActivationSpec, ExpertsSpec, MoESpec, RoutingSpec, SharedSpec, UnsupportedError
from moerunner.models import Family, Keys, Router, View, patch, registry, runners, unpatch

HIDDEN, WIDTH, EXPERTS, TOP_K = 16, 12, 6, 2


class ToyConfig:
    """As a config of Transformers looks to an entry."""

    def __init__(self, **changes):
        self.hidden_size, self.n_experts, self.experts_per_token = HIDDEN, EXPERTS, TOP_K
        self.expert_width, self.clamp_limits, self.route_scale = WIDTH, [None, 0.5, 1.5], 1.7
        self.moe_dropout = 0.0
        self.__dict__.update(changes)

    def to_dict(self):
        return dict(self.__dict__)


class ToyRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.correction = nn.Parameter(torch.randn(EXPERTS, HIDDEN)), nn.Parameter(torch.randn(1, EXPERTS) * 0.3)

    def forward(self, x):
        logits = x.reshape(-1, HIDDEN).float() @ self.weight.float().T
        score = logits.sigmoid()
        ids = (score + self.correction).topk(TOP_K).indices
        weights = score.gather(1, ids)
        return ids, weights / (weights.sum(-1, keepdim=True) + 1e-9), logits


class ToyExperts(nn.Module):
    def __init__(self, limit):
        super().__init__()
        self.limit = limit
        self.fused = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * WIDTH) * 0.3)
        self.fused_bias = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH))
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) * 0.3)
        self.down_bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for token in range(x.shape[0]):
            for e, w in zip(ids[token].tolist(), weights[token], strict=True):
                h = x[token] @ self.fused[e] + self.fused_bias[e]
                gate, up = h[0::2], h[1::2]
                if self.limit is not None:
                    gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
                out[token] += w * ((F.silu(gate) * up) @ self.down[e] + self.down_bias[e])
        return out


class ToyBlock(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.factor = config.route_scale
        self.chooser, self.experts = ToyRouter(), ToyExperts(config.clamp_limits[layer])
        self.always, self.always_gate = nn.Linear(HIDDEN, 2 * WIDTH, bias=False), nn.Linear(HIDDEN, 1, bias=False)
        self.always_down = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, layer_input, mask=None):
        x = layer_input.reshape(-1, HIDDEN)
        ids, weights, logits = self.chooser(layer_input)
        gate, up = self.always(x).chunk(2, -1)
        shared = self.always_down(F.silu(gate) * up) * self.always_gate(x).sigmoid()
        y = self.experts(x, ids, weights) * self.factor + shared
        return y.reshape(layer_input.shape), logits


class ToyModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([ToyBlock(config, layer) for layer in range(3)])

    def forward(self, x):
        seen = []
        for block in self.layers:
            y, logits = block(x)
            x = x + y
            seen.append(logits)
        return x, seen


def toy(c: Keys) -> MoESpec:
    if c("moe_dropout"):
        raise UnsupportedError("drops experts at random")
    limits = c("clamp_limits")
    assert c.layer is not None
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("n_experts"),
        top_k=c("experts_per_token"),
        routing=RoutingSpec(score="sigmoid", selection_bias=True, renormalise="sum", eps=1e-9),
        experts=ExpertsSpec(intermediate_size=c("expert_width"), activation=ActivationSpec(limit=limits[c.layer]), bias=True),
        shared=SharedSpec(width=c("expert_width"), gate="sigmoid"),
        routed_scaling_factor=c("route_scale"),
        apply_routed_scale_to_output=True,
    )


TOY = Family(
    name="toy",
    blocks=(f"{ToyBlock.__module__}.{ToyBlock.__qualname__}",),
    spec=toy,
    weights={
        "gate": "chooser.weight",
        "selection_bias": View("chooser.correction", "reshaped"),
        "w13": View("experts.fused", "transposed"),
        "b13": "experts.fused_bias",
        "w2": View("experts.down", "transposed"),
        "b2": "experts.down_bias",
        "shared_w13": "always.weight",
        "shared_w2": "always_down.weight",
        "shared_gate": "always_gate.weight",
    },
    gate_up="interleaved",
    router=Router("chooser", logits=2, weights=1, ids=0),
    takes={"layer_input": "x"},
    returns=("hidden", 2),
    holds={"factor": "route_scale"},
)


@pytest.fixture(autouse=True)
def registered():
    registry.register(TOY)
    yield
    registry.unregister("toy")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ToyModel(ToyConfig())


@pytest.fixture
def x():
    return torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1))


def close(got, wanted, bound=1e-5):
    return float((got - wanted).detach().abs().max() / wanted.detach().abs().max()) <= bound


def test_the_model_is_patched_and_computes_the_same(model, x):
    expected, logits = model(x)
    report = patch(model)
    assert [(r.name, r.family, r.copied_bytes) for r in report.replaced] == [(f"layers.{i}", "toy", 0) for i in range(3)]
    assert [r.spec.experts.activation.limit for r in runners(model).values()] == [None, 0.5, 1.5]
    got, seen = model(x)
    assert close(got, expected)
    assert all(close(a, b) for a, b in zip(seen, logits, strict=True))
    unpatch(model)
    assert torch.equal(model(x)[0], expected)


def test_gradients_and_copies_work_as_for_shipped_families(model, x):
    twin = copy.deepcopy(model)
    patch(twin)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(twin)))
    model(x)[0].square().sum().backward()
    twin(x)[0].square().sum().backward()
    wanted = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        if wanted[name].grad is None:
            assert parameter.grad is None, name
        else:
            assert close(parameter.grad, wanted[name].grad, 1e-4), name


def test_a_hook_on_its_router_is_obeyed(model, x):
    for block in model.layers:
        block.chooser.register_forward_hook(lambda _, args, out: (out[0].flip(-1), out[1] * 0.5, out[2]))
    expected, _ = model(x)
    patch(model)
    assert close(model(x)[0], expected)


def test_an_argument_that_the_entry_does_not_know_goes_to_the_blocks_own_forward(model, x):
    block = model.layers[0]
    expected, _ = block(x)
    patch(model)
    assert close(block(layer_input=x, mask=None)[0], expected)
    for call in (lambda: block(x, mask=x), lambda: block(x, x)):
        block.forward._told = False
        with pytest.warns(UserWarning, match="runs its own forward"):
            assert torch.equal(call()[0], expected)


def test_what_the_entry_refuses_is_reported(x):
    report = patch(ToyModel(ToyConfig(moe_dropout=0.1)))
    assert {s.reason for s in report.skipped} == {"drops experts at random"}


def test_a_router_that_no_spec_expresses_stays_the_models_own(model, x):
    """With score="external" the router module is always called, and its weights and ids are taken as they come."""

    def external(c: Keys) -> MoESpec:
        spec = toy(c)
        return MoESpec(
            **{
                **{name: getattr(spec, name) for name in spec.__dataclass_fields__},
                "routing": RoutingSpec(score="external"),
            }
        )

    registry.unregister("toy")
    registry.register(Family(**{**{n: getattr(TOY, n) for n in TOY.__dataclass_fields__}, "spec": external}))
    expected, _ = model(x)
    assert len(patch(model).replaced) == 3
    assert close(model(x)[0], expected)
