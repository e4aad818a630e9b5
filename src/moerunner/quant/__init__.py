"""Formats that experts' weights come in, one file each. A format gives `dequantize`, so that every backend can run it."""

from moerunner.quant.registry import PLAIN, Format, dequantized, get, names, register, unregister

__all__ = ["PLAIN", "Format", "dequantized", "get", "names", "register", "unregister"]
