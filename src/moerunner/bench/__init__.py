"""How fast the experts run, next to what the hardware allows and to what else is installed: `moerunner bench`."""

from moerunner.bench.experts import ROUTINGS, Measured, Routing, measure
from moerunner.bench.layer import LAYERS, measure_layer
from moerunner.bench.peers import versions
from moerunner.bench.shapes import SHAPES, Peaks, Shape, floor_seconds, measure_peaks

__all__ = [
    "LAYERS", "ROUTINGS", "SHAPES", "Measured", "Peaks", "Routing", "Shape", "floor_seconds", "measure", "measure_layer",
    "measure_peaks", "versions",
]  # fmt: skip
