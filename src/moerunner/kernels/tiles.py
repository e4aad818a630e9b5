"""Which tiles to run, from the shape alone: no tuning file, no measurement at run time.

Few rows per expert: the time is the reading of weights, so tiles of rows are as small as the matrix unit takes (16) while they
still hold an expert's rows, so that its weights are read once. Many rows: the time is the matrix unit, so tiles are large.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """Tile of one product: block_n rows of the weight, block_k of the contraction.

    tma: the weight is read through a tensor descriptor where its strides allow it.
    """

    block_n: int
    block_k: int
    warps: int
    stages: int
    tma: bool = False


@dataclass(frozen=True)
class Grouped:
    """Tiles for `grouped.py`. block_m rows per tile for both products."""

    block_m: int
    up: Product
    down: Product


@dataclass(frozen=True)
class Specialised:
    """Ring stages of the two products of `hopper.py`, whose tiles are fixed; both product's weights are read by TMA."""

    up_stages: int = 4
    down_stages: int = 4


@dataclass(frozen=True)
class Few:
    """Tiles for `few.py`; stages and tma are not used there."""

    up: Product
    down: Product


def choose(tokens: int, top_k: int, experts: int, hidden: int, inter: int, *, itemsize: int) -> Few | Grouped:
    """The tiles for `tokens` tokens that choose `top_k` of `experts`, spread evenly."""
    slots = tokens * top_k
    if tokens == 1 or 8 * slots <= experts:
        return few(tokens, top_k, hidden, inter)
    rows = slots / min(experts, slots)
    if itemsize == 4:
        product = Product(64, 32, 4, 3)
        return Grouped(16 if rows <= 16 else 64, product, product)
    if rows <= 10:
        down = Product(64, 256, 4, 3, tma=True) if inter >= 2048 else Product(128, 128, 4, 3, tma=True)
        return Grouped(16, Product(64, 256, 4, 3, tma=True), down)
    if rows <= 20:
        return Grouped(32, Product(128, 128, 4, 3, tma=True), Product(128, 64, 4, 4, tma=True))
    if rows <= 80:
        return Grouped(64, Product(128, 64, 4, 3, tma=True), Product(128, 64, 4, 3, tma=True))
    return Grouped(128, Product(256, 64, 8, 4, tma=True), Product(256, 64, 8, 3, tma=True))


def few(tokens: int, top_k: int, hidden: int, inter: int) -> Few:
    """Programs that read 8 to 32 KiB at once, many enough to fill the device."""
    kp = _power_of_2(top_k)
    block_k = min(512 if kp <= 2 else 256 if kp <= 8 else 2048 // kp, _power_of_2(inter))
    block_n = max(1, min(16, 16384 // (kp * block_k)))
    up_k, up_warps = (1024, 4) if tokens == 1 else (512, 2)
    return Few(Product(2, min(up_k, _power_of_2(hidden)), up_warps, 1), Product(block_n, block_k, 4, 1))


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
