"""How fast the experts run, next to what the hardware allows and to what else is installed.

python -m moerunner.bench --shapes qwen3-30b --tokens 1 32 2048 --json results.json
"""

from moerunner.bench.experts import Measured, measure
from moerunner.bench.shapes import SHAPES, Peaks, Shape, floor_seconds

__all__ = ["SHAPES", "Measured", "Peaks", "Shape", "floor_seconds", "measure"]
