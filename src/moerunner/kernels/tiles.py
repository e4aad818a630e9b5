"""Which tiles to run: what was measured for this very shape on this device (`tables`), else a choice from the shape alone.

Few rows per expert: the time is the reading of weights, so tiles of rows are as small as the matrix unit takes (16) while they
still hold an expert's rows, so that its weights are read once. Many rows: the time is the matrix unit, so tiles are large.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


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
    """For `hopper.py`. rows: of a block's tile, 128 or 192. copied: the tokens are put in expert order first."""

    rows: int = 192
    copied: bool = False


@dataclass(frozen=True)
class Transposed:
    """For `hopper.py`, with tokens as columns of the products: an expert's rows are cut evenly, and not padded."""


@dataclass(frozen=True)
class Few:
    """Tiles for `few.py`; stages and tma are not used there.

    prefetch: `few_down` fetches its weights while the first kernel still runs. each: of `few_down_each`, which serves where the
    experts' results are summed; None: `few_down` does.
    """

    up: Product
    down: Product
    prefetch: bool = False
    each: Product | None = None


Tiles = Few | Grouped | Specialised | Transposed
KINDS: dict[str, type] = {"few": Few, "grouped": Grouped, "specialised": Specialised, "transposed": Transposed}


def to_dict(tiles: Tiles) -> dict[str, Any]:
    """Plain data, for JSON."""
    kind = next(name for name, of in KINDS.items() if type(tiles) is of)
    return {"kind": kind, **dataclasses.asdict(tiles)}


def from_dict(data: dict[str, Any]) -> Tiles:
    """What `to_dict` made. Raises KeyError or TypeError for anything else."""
    fields = {n: Product(**v) if isinstance(v, dict) else v for n, v in data.items() if n != "kind"}
    return KINDS[data["kind"]](**fields)


_HALF = (  # 16-bit dtypes, from few rows per expert to many
    Grouped(16, Product(64, 256, 4, 3, tma=True), Product(128, 128, 4, 3, tma=True)),
    Grouped(32, Product(128, 128, 4, 3, tma=True), Product(128, 64, 4, 4, tma=True)),
    Grouped(64, Product(128, 64, 4, 3, tma=True), Product(128, 64, 4, 3, tma=True)),
    Grouped(128, Product(256, 64, 8, 4, tma=True), Product(256, 64, 8, 4, tma=True)),
)


def few_tokens(top_k: int, experts: int) -> int:
    """Up to how many tokens `Few` tiles serve: few experts are chosen twice."""
    return max(1, experts // (8 * top_k))


def choose(
    tokens: int,
    top_k: int,
    experts: int,
    hidden: int,
    inter: int,
    *,
    itemsize: int,
    specialised: bool = False,
    rows: bool = True,
) -> Tiles:
    """The tiles for `tokens` tokens that choose `top_k` of `experts`, spread evenly.

    specialised: `hopper.py` can run here. rows: of the weights lie in one piece each, which is how `few.py` reads them.
    """
    slots = tokens * top_k
    if rows and tokens <= few_tokens(top_k, experts):
        return few(tokens, top_k, hidden, inter)
    each = slots / min(experts, slots)
    if itemsize == 4:
        product = Product(64, 32, 4, 3)
        return Grouped(16 if each <= 16 else 64, product, product)
    if specialised and 96 < each <= 144:  # one such tile holds them, two of 128 rows would be half empty
        return Transposed()
    if specialised and each > 144:
        # Where experts are wide, tokens copied into expert order cost less than to gather them for each of their columns.
        return Specialised(192 if each <= 192 else 128, copied=inter >= 2560)
    if each <= 10:
        return dataclasses.replace(_HALF[0], down=_HALF[0].up) if inter >= 2048 else _HALF[0]
    return _HALF[1] if each <= 20 else _HALF[2] if each <= 48 else _HALF[3]


def invariant(itemsize: int) -> Grouped:
    """Tiles for every number of tokens. Each value of a row is then summed in one order, whatever else its tile holds."""
    return Grouped(64, *(2 * [Product(64, 32, 4, 3)])) if itemsize == 4 else _HALF[2]


_FEW_UP = (Product(2, 256, 1, 1), Product(2, 512, 2, 1), Product(2, 1024, 4, 1), Product(4, 1024, 4, 1))
_EACH = (
    None,
    Product(1, 512, 1, 1),
    Product(2, 1024, 4, 1),
    Product(2, 1024, 2, 1),
    Product(1, 256, 1, 1),
    Product(4, 128, 1, 1),
)
_THIN = (Product(64, 256, 4, 3, tma=True), Product(128, 128, 4, 3, tma=True), Product(64, 128, 4, 4, tma=True),
         Product(32, 256, 4, 4, tma=True), Product(128, 64, 4, 4, tma=True))  # fmt: skip
_MIDDLE = (Product(128, 64, 4, 3, tma=True), Product(128, 64, 4, 4, tma=True), Product(128, 128, 4, 3, tma=True),
           Product(256, 64, 8, 3, tma=True), Product(128, 64, 8, 4, tma=True))  # fmt: skip
_WIDE = (Product(256, 64, 8, 4, tma=True), Product(256, 64, 8, 3, tma=True), Product(128, 64, 8, 4, tma=True),
         Product(128, 64, 4, 4, tma=True))  # fmt: skip
_ALTERNATIVES = {16: _THIN, 32: _MIDDLE, 64: _MIDDLE, 128: _WIDE}


def alternatives(tiles: Tiles) -> Iterator[tuple[str, list[Tiles]]]:
    """What is worth measuring beside a choice, one part of it at a time: (which, the same with another such part)."""
    if isinstance(tiles, Specialised | Transposed):
        return  # they are few: `specialised` has them all
    if isinstance(tiles, Few):
        dn = tiles.down
        parts: dict[str, list[Any]] = {"up": list(_FEW_UP), "each": list(_EACH)}
        if tiles.each is None:  # else `few_down` does not run
            sizes = (dn.block_n // 2, dn.block_n, 2 * dn.block_n)
            downs = [dataclasses.replace(dn, block_n=n, warps=w) for n in sizes if n for w in (4, 8)]
            parts |= {"down": downs, "prefetch": [True, False]}
    else:
        parts = {"up": list(_ALTERNATIVES[tiles.block_m]), "down": list(_ALTERNATIVES[tiles.block_m])}
    for part, products in parts.items():
        yield part, [dataclasses.replace(tiles, **{part: p}) for p in products if p != getattr(tiles, part)]


def neighbours(tiles: Tiles) -> list[Tiles]:
    """Choices that `choose` makes for a few more or fewer rows, or without `hopper.py`."""
    if isinstance(tiles, Specialised | Transposed):
        return [_HALF[3]]
    return [other for other in _HALF if isinstance(tiles, Grouped) and other.block_m in (tiles.block_m // 2, 2 * tiles.block_m)]


def specialised(tiles: Tiles) -> list[Tiles]:
    """What `hopper.py` offers in place of tiles for many rows."""
    every: list[Tiles] = [Transposed(), *(Specialised(rows, copied) for copied in (False, True) for rows in (192, 128))]
    many = isinstance(tiles, Specialised | Transposed) or (isinstance(tiles, Grouped) and tiles.block_m >= 64)
    return every if many else []


def few(tokens: int, top_k: int, hidden: int, inter: int) -> Few:
    """Programs that read 1 to 32 KiB at once, many enough to fill the device."""
    kp = _power_of_2(top_k)
    block_k = min(512 if kp <= 2 else 256 if kp <= 8 else 2048 // kp, _power_of_2(inter))
    block_n = max(1, min(16, 16384 // (kp * block_k)))
    up_k, up_warps = (512, 2) if tokens > 1 or hidden <= 4096 else (1024, 4)
    each = None
    if top_k <= 16 and not 256 < inter <= 1024:
        each_k = 512 if top_k <= 6 else 256 if top_k <= 12 else 128  # as much as its one warp has registers for
        each = Product(1, min(each_k, _power_of_2(inter)), 1, 1)
    return Few(Product(2, min(up_k, _power_of_2(hidden)), up_warps, 1), Product(block_n, block_k, 4, 1), each=each)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
