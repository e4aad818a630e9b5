"""Measured tiles: tables that are shipped for a GPU, and those that `moerunner tune` put in the user's cache.

A table holds tiles for exact shapes at the numbers of tokens that were measured, and only where they beat the choice from the
shape alone, so reading it never costs time. A table of another GPU, Triton or CUDA is another file and not read.
"""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
import triton

from moerunner.kernels import hopper
from moerunner.kernels import tiles as tile_choice
from moerunner.kernels.common import INTERPRETING, cache_folder, write_whole
from moerunner.kernels.tiles import Tiles

_DRIVER = Path("/sys/module/nvidia/version")
_NEAR = math.sqrt(2)
"""A measurement serves up to this many times more or fewer tokens."""


def key(*, experts: int, top_k: int, hidden: int, inter: int, gated: bool, dtype: torch.dtype) -> str:
    """The name of a shape in a table."""
    return f"{experts} {top_k} {hidden} {inter} {'gated' if gated else 'plain'} {str(dtype).removeprefix('torch.')}"


@functools.lru_cache(4096)
def choose(
    tokens: int, top_k: int, experts: int, hidden: int, inter: int, *, gated: bool, dtype: torch.dtype, device: torch.device
) -> Tiles:
    """The tiles to run: measured ones where there are any, else `tiles.choose`."""
    analytic = tile_choice.choose(
        tokens, top_k, experts, hidden, inter, itemsize=dtype.itemsize, specialised=not hopper.why_not(device)
    )
    if INTERPRETING or device.type != "cuda":
        return analytic
    name = key(experts=experts, top_k=top_k, hidden=hidden, inter=inter, gated=gated, dtype=dtype)
    return nearest(_measured(device).get(name, {}), tokens) or analytic


def nearest(by_tokens: dict[int, Tiles], tokens: int) -> Tiles | None:
    """Those of the nearest number of tokens, if it is near enough. Few tokens are like no other number."""
    best = min(by_tokens, key=lambda n: abs(math.log(n / tokens)), default=None)
    near = best is not None and max(best / tokens, tokens / best) <= _NEAR and (tokens > 1 or best == 1)
    return by_tokens[best] if near and best is not None else None


def cache_file(device: torch.device) -> Path:
    """Where `moerunner tune` keeps what it measured on this device with this Triton and driver."""
    gpu = _slug(torch.cuda.get_device_name(device))
    return cache_folder("tiles") / f"{gpu}-triton{triton.__version__}-driver{_driver()}.json"


def shipped_file(gpu: str) -> Path:
    """Where the table lies that comes with moerunner for the GPU of this name."""
    return Path(__file__).parents[1] / "assets" / "tiles" / f"{_slug(gpu)}.json"


def read(path: Path) -> dict[str, dict[int, Tiles]]:
    """Tiles by shape and number of tokens; nothing where there is no file, or one that this version cannot read."""
    try:
        shapes: dict[str, dict[str, Any]] = json.loads(path.read_text())["shapes"]
        return {s: {int(n): tile_choice.from_dict(e["tiles"]) for n, e in rows.items()} for s, rows in shapes.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write(path: Path, made_on: dict[str, Any], shapes: dict[str, dict[int, dict[str, Any]]]) -> None:
    """Adds measurements to a table: of each shape and number of tokens {"tiles", "seconds", "analytic_seconds"}.

    A shape that is measured again loses what was known of it. The file is replaced in one step.
    """
    kept: dict[str, Any] = {}
    if read(path):
        kept = json.loads(path.read_text())["shapes"]
    write_whole(path, (json.dumps({"made_on": made_on, "shapes": kept | shapes}, indent=1) + "\n").encode())
    forget()


def forget() -> None:
    """Has the next choice read the files anew."""
    _measured.cache_clear()
    choose.cache_clear()


@functools.cache
def _measured(device: torch.device) -> dict[str, dict[int, Tiles]]:
    return read(shipped_file(torch.cuda.get_device_name(device))) | read(cache_file(device))


def _driver() -> str:
    """The version of NVIDIA's kernel module, where the system tells it."""
    try:
        return _DRIVER.read_text().strip()
    except OSError:
        return "unknown"


def _slug(gpu: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", gpu)
