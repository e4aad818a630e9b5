"""Where the tokens of a text go: how often each expert of each layer is chosen, and which experts are chosen together."""

from moerunner.loads.measure import LayerLoads, Loads, measure

__all__ = ["LayerLoads", "Loads", "measure"]
