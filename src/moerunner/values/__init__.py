"""The records that carry tensors through the layer or describe them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moerunner.values.runs import Run, Runs, joined, length, take, width_runs
from moerunner.values.state import AXES, Partial, Placement, Replicate, Shard, ValueState
from moerunner.values.weights import (
    EXPERT_NAMES,
    RECORD_NAMES,
    ExpertTensor,
    ExpertWeights,
    GateUp,
    LayerWeights,
    TensorMeta,
    cut_width,
    kept_runs,
    register,
)

__all__ = [
    "AXES",
    "EXPERT_NAMES",
    "RECORD_NAMES",
    "ExpertTensor",
    "ExpertWeights",
    "GateUp",
    "LayerWeights",
    "Partial",
    "Placement",
    "Replicate",
    "Run",
    "Runs",
    "Shard",
    "TensorMeta",
    "TopK",
    "ValueState",
    "cut_width",
    "joined",
    "kept_runs",
    "length",
    "register",
    "take",
    "width_runs",
]


@dataclass(frozen=True)
class TopK:
    """The router's answer.

    ids: [T, K] int64, -1 for no expert. weights: [T, K] float32. space: whether ids are the model's experts
    (`logical`) or slots of a placement with copies (`physical`). scaled: the routed scaling factor is already in the
    weights. shared_weights: [T, S] float32, the weights of shared experts that take part in the gate.
    """

    ids: Tensor
    weights: Tensor
    space: Literal["logical", "physical"] = "logical"
    scaled: bool = False
    shared_weights: Tensor | None = None
