"""Who holds what, the collectives, and the dispatch/combine pairs."""

from moerunner.parallel.layout import BoundLayout, Layout

__all__ = ["BoundLayout", "Layout"]
