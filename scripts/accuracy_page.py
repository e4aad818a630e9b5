"""The page of `accuracy.py`: docs/accuracy.md, from nothing but the numbers in the JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_INTRO = """\
# Accuracy against Transformers

{verdict}

Each of {count} model families is built with random weights at a real depth and runs {tokens:,} tokens of real text (the
beginnings of {sequences} modules of Python's standard library) through Transformers and through the same model after
`moerunner.patch(model)`. This page and [its numbers](results/accuracy.json) are made by one command:

    make accuracy                                        # or: python scripts/accuracy.py --device cuda
    python scripts/accuracy.py --families olmoe mixtral  # some of them; the others' numbers stay

"Transformers" alone means its plain loop over the experts (`experts_implementation="eager"`). `grouped_mm` is its other
implementation, and the yardstick: how far apart may two right answers be?

Weights are drawn so that every matrix keeps the size of what passes through it, and rounded to bf16, so that the float32 and
the bf16 model hold the same numbers. Random weights have not learned the text: the perplexities say nothing about quality, but
they depend on every expert of every layer all the same, and so do routings and greedy tokens.
"""

_FLOAT32 = """\
## float32: every disagreement has a reason

Both sides route for themselves. If float32 arithmetic in another order is the only difference, a routing or a greedy token
differs only where it was nearly tied. Of each one that differs, the margin is held against the error measured at that place:

- **A routing** differs if other experts are chosen, or if a weight moves by more than 1/1000 and more than its logits explain.
  The error is the largest difference of the router's logits at that token and layer, plus the measured rounding of the gate's
  product. It is explained if the float64 oracle, too, chooses otherwise once the logits move by the error. *First*: no routing
  at or before this position went the other way in an earlier layer. *Later*: one did, and this follows from it. *A threshold in
  the rule*: PhiMoE weighs an expert against those within 2% of it, so that a weight jumps where another crosses that line.
- **A greedy token** is explained if the margin of the two largest logits is at most twice the largest error of a logit there.
- **A large error explains nothing.** So on *untouched* positions, where no routing at or before them differs, the errors of
  logits and of router logits must be at most 1e-5 of the largest one, or twice what Transformers' own are, from the same model
  in float64 with the same experts (its norms stay in float32). Recurrent layers and sharp attention make that more than 1e-5.
"""

_GENERATION = """\
## Greedy generation with the cache, float32

{new} new tokens after a prompt of {prompt}, for each of the {sequences} texts; judged as above, up to where a text differs.
"""

_BFLOAT16 = """\
## bf16, with the experts replayed

In bf16 several percent of the tokens tie in the router, and two right implementations go separate ways. So the ids and weights
that Transformers' routers gave are replayed in every run. Three distances from Transformers' plain loop are judged, each at
most {factor} times that of `grouped_mm`:

- **perplexity**: of its logarithm. The errors of {tokens:,} tokens cancel to almost nothing, and whose cancel better is luck:
  where the yardstick's difference is smaller than two standard errors of moerunner's, these take its place.
- **loss**: the mean over tokens of the absolute change of the loss, where nothing cancels.
- **KL**: the mean divergence of the predicted distributions.

{exact}
"""

_EXACT = """\
`grouped_mm` rounds to bf16 in the same places as the plain loop (after the product with gate and up, after the activation,
after each expert, after the sum), so that much of their error is the same; moerunner rounds in fewer places. A distance above
{factor} is therefore accepted where, in the same measure, moerunner is closer than the plain loop to the float32 model with the
same weights and the same experts: what is seen then is the plain loop's error. Such numbers are in *italics*. Where
Transformers' two implementations are one, or give the same bits (marked †), the yardstick is that float32 model, too:
moerunner's distance from it over the plain loop's."""


def write_page(record: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(record))


def page(record: dict[str, Any]) -> str:
    families = record["families"]
    measured = {name: f for name, f in families.items() if "float32" in f}
    wrong = {name: f for name, f in families.items() if not f["ok"]}
    some = next(iter(measured.values()), None)
    if some is None:
        return "# Accuracy against Transformers\n\nNothing was measured.\n\n" + _problems(wrong)
    verdict = f"**{len(families) - len(wrong)} of {len(families)} families pass: every disagreement is explained.**"
    if wrong:
        verdict = f"**{len(wrong)} of {len(families)} families have a disagreement that is not explained: {', '.join(wrong)}.**"
    settings = some["settings"]
    parts = [
        _INTRO.format(verdict=verdict, count=len(families), tokens=some["tokens"], sequences=settings["sequences"]),
        _problems(wrong),
        "## Where and what\n\n" + _environments(families),
        _models(measured),
        _FLOAT32,
        _float32(measured),
        _disagreements(measured),
        _GENERATION.format(new=settings["new_tokens"], prompt=settings["prompt"], sequences=settings["sequences"]),
        _generation(measured),
        _BFLOAT16.format(factor=settings["factor"], tokens=some["tokens"], exact=_EXACT.format(factor=settings["factor"])),
        _bfloat16(measured),
    ]
    return "\n".join(part.strip("\n") + "\n" for part in parts if part)


def _problems(wrong: dict[str, Any]) -> str:
    lines = [f"- {name}: {problem}" for name, f in wrong.items() for problem in f["problems"]]
    return "## Not explained\n\n" + "\n".join(lines) if lines else ""


def _environments(families: dict[str, Any]) -> str:
    same: dict[str, list[str]] = {}
    for name, f in families.items():
        same.setdefault(json.dumps(f["environment"]), []).append(name)
    rows = []
    for key, names in same.items():
        e = json.loads(key)
        of = "all" if len(same) == 1 else ", ".join(names)
        rows.append([of, e["device"], e["torch"], e["transformers"], e["python"], e["seed"], e["date"]])
    return _table(["families", "device", "torch", "Transformers", "Python", "seed", "date"], rows)


def _models(measured: dict[str, Any]) -> str:
    rows = []
    for name, f in measured.items():
        m, load = f["model"], f["float32"]["load"]
        rows.append(
            [
                name,
                f"{m['parameters'] / 1e6:.0f} M",
                f"{m['layers']} ({m['moe_layers']})",
                f"{m['top_k']} of {m['experts']}",
                f"{load['least_used_share']:.0%}",
                f"{load['busiest_over_mean']:.1f}",
                m["backend"],
            ]
        )
    head = ["family", "parameters", "layers (MoE)", "experts", "in use, worst layer", "busiest / mean", "backend"]
    return _table(head, rows)


def _float32(measured: dict[str, Any]) -> str:
    rows = []
    for name, f in measured.items():
        x = f["float32"]
        unexplained = x["routings_unexplained"] + x["greedy_unexplained"]
        rows.append(
            [
                name,
                f"{x['perplexity']['eager']:.4f}",
                f"{x['perplexity_difference']:+.1e}",
                f"{x['untouched_logits_error']:.1e}",
                f"{x['grouped_mm']['untouched_logits_error']:.1e}",
                f"{x['float64']['untouched_logits_error']:.1e}",
                f"{x['logits_error']:.1e}",
                f"{x['routings_differ_first']} + {x['routings_differ_later']} of {x['routings']:,}",
                f"{x['grouped_mm']['routings_differ_first']} + {x['grouped_mm']['routings_differ_later']}",
                f"{x['greedy_differ']} ({x['grouped_mm']['greedy_differ']})",
                "all" if not unexplained else f"{unexplained} not",
            ]
        )
    head = ["family", "perplexity", "moerunner's differs by", "logits error, untouched", "grouped_mm's", "float64's"]
    head += [
        "on all positions",
        "routings that differ, first + later",
        "grouped_mm's",
        "greedy tokens that differ (grouped_mm's)",
        "explained",
    ]
    return _table(head, rows)


def _disagreements(measured: dict[str, Any]) -> str:
    rows = []
    for name, f in measured.items():
        for x in f["float32"]["routings_listed"]:
            if x["first"]:
                margin = "a threshold in the rule" if x["margin"] is None else f"{x['margin']:.1e}"
                rows.append([name, f"routing, {x['layer']}", f"{x['sequence']}:{x['position']}", margin, f"{x['error']:.1e}"])
        for x in f["float32"]["greedy_listed"]:
            rows.append([name, "greedy token", f"{x['sequence']}:{x['position']}", f"{x['margin']:.1e}", f"{x['error']:.1e}"])
    if not rows:
        return "No routing and no greedy token differs."
    return "The first disagreements of each family one by one (at most 12 of a kind):\n\n" + _table(
        ["family", "what", "text:position", "margin", "error there"], rows
    )


def _generation(measured: dict[str, Any]) -> str:
    rows = []
    for name, f in measured.items():
        x = f["generation"]
        firsts = [f"token {n}" for n in x["first_difference"] if n is not None]
        found = [f"margin {t['margin']:.1e}, error {t['error']:.1e}" for t in x["greedy_listed"]]
        rows.append(
            [
                name,
                f"{x['identical']} of {x['sequences']}",
                "; ".join(f"{a}: {b}" for a, b in zip(firsts, found, strict=False)) or "-",
                f"{x['untouched_logits_error']:.1e}",
                f"{x['routings_differ_first']} + {x['routings_differ_later']}",
            ]
        )
    head = ["family", "identical texts", "first difference of the others", "logits error, untouched", "routings that differ"]
    return _table(head, rows)


def _bfloat16(measured: dict[str, Any]) -> str:
    rows = []
    for name, f in measured.items():
        x = f["bfloat16"]
        p, excused = x["perplexity"], x["excused"]
        ratios = [f"*{r:.2f}*" if n in excused else f"{r:.2f}" for n, r in x["judged"].items()]
        rows.append(
            [
                name if x["has_grouped_mm"] else f"{name} †",
                f"{p['eager']:.2f}",
                f"{p['grouped_mm'] - p['eager']:+.3f}",
                f"{p['moerunner'] - p['eager']:+.3f}",
                *ratios,
                " / ".join(f"{x[f'{who}_to_float32']['token_loss']:.4f}" for who in ("eager", "grouped_mm", "moerunner")),
                f"{x['moerunner_to_eager']['greedy_differ']} ({x['grouped_mm_to_eager']['greedy_differ']})",
            ]
        )
    head = ["family", "perplexity", "grouped_mm's differs by", "moerunner's differs by", "perplexity ratio", "loss ratio"]
    head += ["KL ratio", "loss from float32: eager / grouped_mm / moerunner", "greedy tokens that differ (grouped_mm's)"]
    return _table(head, rows)


def _table(head: list[str], rows: Iterable[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
