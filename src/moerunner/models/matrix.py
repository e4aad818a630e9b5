"""The support matrix: a row for each family, made from its entry and from its config class in Transformers.

An entry is a function from config keys to a spec. It is called with the default config, for every layer, and again with one
key changed at a time: so a row says what a model of the family has, and which key it depends on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moerunner.errors import MoEError
from moerunner.models import reference, words
from moerunner.models.entry import Family, Keys, pieces
from moerunner.models.families import LEFT_ALONE
from moerunner.models.registry import registered
from moerunner.spec import MoESpec

HEADS = ("family", "router", "weights of the chosen", "factor", "shared experts", "activation", "also", "verified with")
_INTRO = """# Model families

What `moerunner.patch` runs, made from the entries themselves by `moerunner families --markdown`. Each entry is read with the
default config of its class in Transformers {version}, and again with one key changed at a time: the keys in brackets are what
a model changes it by. Names are tried out of a few: {names}.
The last column has the releases of Transformers that every float32 case of the family was compared with; others lack it.
"""
_LEFT = """
## Other blocks

Of a block whose class is not in the table moerunner runs the experts alone, if it keeps them in a module that Transformers'
experts functions can run. `moerunner inspect PATH` says what it would do. These stay as they are:
"""


@dataclass(frozen=True)
class Row:
    """One family in words; `none` where it has no such thing.

    verified: the releases of Transformers that it was verified with. reason: why there are no words.
    """

    name: str
    aliases: list[str]
    blocks: list[str]
    score: str = words.NONE
    choice: str = words.NONE
    groups: str = words.NONE
    renormalise: str = words.NONE
    factor: str = words.NONE
    shared: str = words.NONE
    activation: str = words.NONE
    specials: list[str] = field(default_factory=list)
    verified: list[str] = field(default_factory=list)
    reason: str = ""

    def cells(self) -> list[str]:
        """For a table, under `HEADS`."""
        name = self.name + "".join(f", {alias}" for alias in self.aliases)
        if self.reason:
            return [name, self.reason, *("" for _ in HEADS[3:]), _span(self.verified)]
        router = ", ".join(text for text in (self.score, self.choice, self.groups) if text != words.NONE)
        rest = (self.renormalise, self.factor, self.shared, self.activation, ", ".join(self.specials))
        return [name, router, *("" if text == words.NONE else text for text in rest), _span(self.verified)]


@dataclass(frozen=True)
class Matrix:
    """Every family that is registered, and blocks that are knowingly left alone, with the reason."""

    transformers: str
    rows: list[Row]
    left_alone: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    def cells(self) -> tuple[tuple[str, ...], list[list[str]]]:
        """Heads and rows of a table."""
        return HEADS, [row.cells() for row in self.rows]

    def markdown(self) -> str:
        """The page docs/families.md."""
        heads, rows = self.cells()
        lines = [
            _INTRO.format(version=self.transformers, names=", ".join(_NAMES)),
            _line(heads),
            _line(["---"] * len(heads)),
            *map(_line, rows),
        ]
        left = [f"- `{name}`: {reason}." for name, reason in self.left_alone.items()]
        return "\n".join([*lines, *([_LEFT, *left] if left else [])]) + "\n"


def collect() -> Matrix:
    """The matrix of the families that are registered in this process."""
    import transformers

    left = {name.rpartition(".")[2]: reason for name, reason in LEFT_ALONE.items()}
    return Matrix(transformers.__version__, [row(family) for family in registered()], left)


def row(family: Family) -> Row:
    """A family in words."""
    start = Row(family.name, list(family.aliases), list(family.blocks), verified=reference.releases(family.name))
    reasons: list[str] = []
    for config in _configs(family, reasons):
        for tried in (config, _filled(family, config)):
            specs = _read(family, tried, reasons)
            if specs:
                return dataclasses.replace(start, **_words(family, tried, specs))
    return dataclasses.replace(start, reason=reasons[0] if reasons else "Transformers has no config for it")


def _configs(family: Family, reasons: list[str]) -> Iterator[Any]:
    """Default configs of the family's model types and of the towers inside them. reasons: gets why there are none."""
    import transformers

    for name in (family.name, *family.aliases):
        try:
            config = transformers.AutoConfig.for_model(name)
        except ValueError:
            reasons.append(f"Transformers {transformers.__version__} does not have it")
            continue
        towers = [getattr(config, tower, None) for tower in getattr(config, "sub_configs", {})]
        for found in (config, *(tower for tower in towers if tower is not None)):
            if getattr(found, "is_heterogeneous", False):
                yield from (found.per_layer_config[layer] for layer in range(found.num_hidden_layers))
            else:
                yield found


def _read(family: Family, config: Any, reasons: list[str]) -> dict[MoESpec, int]:
    """The specs of the layers, each with the first layer that has it."""
    found: dict[MoESpec, int] = {}
    for layer in range(getattr(config, "num_hidden_layers", None) or 1):
        try:
            found.setdefault(family.read(config, layer), layer)
        except MoEError as error:
            reasons.append(f"not read from the default config: {error}")
    return found


def _words(family: Family, config: Any, specs: dict[MoESpec, int]) -> dict[str, Any]:
    changed = list(_changed(family, config, *next(iter(specs.items()))))
    said: dict[str, Any] = {}
    for name, (short, full) in _FACETS.items():
        texts = {full(spec) for spec in specs}
        keys = {key: short(spec) for key, spec in changed if full(spec) not in texts}
        seen = dict.fromkeys((*map(short, specs), *keys.values()))
        shown = [text for text in map(short, specs) if text != words.NONE] or [t for t in seen if t != words.NONE][:1]
        said[name] = " or ".join(dict.fromkeys(shown)) or words.NONE
        said[name] += f" [{', '.join(keys)}]" if keys else ""
    specials = {text: text for spec in specs for text in _specials(spec)}
    for key, spec in changed:
        specials |= {text: f"{text} [{key}]" for text in _specials(spec) if text not in specials}
    return {**said, "specials": [*specials.values(), *_stored(family)]}


def _changed(family: Family, config: Any, spec: MoESpec, layer: int) -> list[tuple[str, MoESpec]]:
    """The spec of one layer with one key changed, for each key that the entry reads and each change that it accepts.

    Keys that the config leaves open are changed in pairs too: a number of groups says nothing without the number to keep.
    """
    probe, found = _Probe(config), []
    family.spec(Keys(probe, layer))
    keys = list(dict.fromkeys(probe.asked))
    changes = [{key: value} for key in keys for value in _others(getattr(config, key, None))]
    still_open = [key for key in keys if getattr(config, key, 0) is None]
    changes += [dict.fromkeys(pair, 2) for pair in itertools.combinations(still_open, 2)]
    for change in changes:
        with contextlib.suppress(MoEError):
            found.append((", ".join(change), family.spec(Keys(_Probe(config, change), layer))))
    return [(key, other) for key, other in found if other != spec]


_NAMES = ("gelu", "relu", "sigmoid", "softmax", "sum", "average")  # of activations, scores, joins


def _others(value: Any) -> tuple[Any, ...]:
    """Other values of a config key; an entry refuses those that make no sense for it."""
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int):
        return tuple(n for n in (0, 1, 2) if n != value)
    if isinstance(value, float):
        return (value + 0.5,)
    return _NAMES if isinstance(value, str) else (2,) if value is None else ()


class _Probe:
    """A config with other values for some keys, which remembers what it was asked for."""

    def __init__(self, config: Any, changes: Mapping[str, Any] | None = None) -> None:
        self._config, self._changes = config, changes or {}
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name != "is_heterogeneous":  # whether layers have configs of their own is no key
            self.asked.append(name)
        return self._changes[name] if name in self._changes else getattr(self._config, name)


def _filled(family: Family, config: Any) -> Any:
    """The config with a number for each key that it lacks or leaves open and the entry reads: some have no default sizes.

    The numbers descend, since an entry asks for the number of experts before the number to choose of them.
    """
    probe, filled = _Probe(config), 0
    while True:
        with contextlib.suppress(MoEError):
            family.spec(Keys(probe))
        still_open = [key for key in dict.fromkeys(probe.asked) if getattr(config, key, None) is None]
        if len(still_open) == filled:
            return probe
        filled = len(still_open)  # an entry stops at the first key that is not there: what it asks for then is seen now
        probe = _Probe(config, {key: 2 ** (filled - i) for i, key in enumerate(still_open)})


def _activation(spec: MoESpec) -> str:
    return words.activation(spec.experts.activation, gated=spec.experts.gated)


def _specials(spec: MoESpec) -> list[str]:
    return [*words.extras(spec.routing, sizes=False), *words.specials(spec, sizes=False)]


def _stored(family: Family) -> list[str]:
    """How the block keeps its weights, where that is not the usual way."""
    stored = [where for name, where in family.weights.items() if name.split(".")[0] in ("w13", "w2")]
    changes = [view.change for where in stored for view, _ in pieces(where, (1, 1, 1))]
    named = {
        "gate and up rows interleaved": family.gate_up == "interleaved",
        "weights stored transposed": any("transposed" in change for change in changes),
    }
    return [text for text, on in named.items() if on]


def _span(releases: list[str]) -> str:
    """The first and the last where none of those between was left out."""
    known = reference.releases()
    if len(releases) < 2 or releases != known[known.index(releases[0]) : known.index(releases[-1]) + 1]:
        return ", ".join(releases)
    return f"{releases[0]} to {releases[-1]}"


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


# What a cell says of a spec, and what it says in full: a key that changes the latter is named in the cell.
_FACETS: dict[str, tuple[Callable[[MoESpec], str], Callable[[MoESpec], str]]] = {
    "score": (lambda s: words.score(s.routing), lambda s: words.score(s.routing)),
    "choice": (lambda s: words.choice(s.routing), lambda s: words.choice(s.routing)),
    "groups": (lambda s: words.groups(s.routing, sizes=False), lambda s: words.groups(s.routing)),
    "renormalise": (lambda s: words.renormalise(s.routing), lambda s: words.renormalise(s.routing)),
    "factor": (lambda s: words.factor(s, sizes=False), words.factor),
    "shared": (lambda s: words.shared(s, sizes=False), lambda s: words.shared(s, sizes=False)),
    "activation": (_activation, _activation),
}
