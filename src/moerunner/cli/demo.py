"""`moerunner demo`: the model that is shipped, proved layer by layer, then writing."""

from __future__ import annotations

import json as jsonlib
import time
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from moerunner.cli.drawing import show_loads
from moerunner.cli.generate import load_tokenizer, speed
from moerunner.cli.shell import (
    MISMATCH,
    OK,
    Answer,
    DebugOption,
    JsonOption,
    Screen,
    SeedOption,
    count,
    quiet_transformers,
    torch_device,
    verb,
)
from moerunner.cli.verify import show
from moerunner.errors import CheckpointError

SAMPLE_TOKENS = 512


@verb
def run(
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "def quicksort(",
    max_new_tokens: Annotated[int, typer.Option(parser=count, metavar="N", help="At most so many tokens; 1k works.")] = 120,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token, above it samples.")] = 0.8,
    seed: SeedOption = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> Answer:
    """Load the shipped model, compare every MoE layer with Transformers and float64, show where tokens go, write code."""
    start = time.perf_counter()
    quiet_transformers()
    import torch

    from moerunner.generate import generate
    from moerunner.models import load, runners, unpatch
    from moerunner.verify import verify

    screen, folder = Screen(quiet=json), shipped_model()
    log = jsonlib.loads((folder / "training_log.json").read_text(encoding="utf-8"))
    # A model this small gains nothing from a second thread, and on a busy machine threads wait for each other.
    torch.set_num_threads(1)
    with screen.progress("loading the shipped model"):
        model = load(folder, dtype=torch.float32, device=torch_device(None))
        tokenizer = load_tokenizer(folder)
    screen.heading("The model")
    screen.say(describe(model, runners(model), log))

    screen.heading("Is it right? Each MoE layer on the same input, in float32")
    with screen.progress("comparing each layer with Transformers and with float64"):
        report = verify(folder, num_tokens=SAMPLE_TOKENS, dtype=torch.float32, device=model.device)
    show(screen, report)

    screen.heading(f"Where {report.tokens} tokens of Python code go, one bar for each expert")
    show_loads(screen, report.layers)

    screen.heading("What it writes")
    how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    screen.write(prompt)
    made = generate(model, tokenizer, prompt, stream=screen.write, **how)
    screen.say(f"\n\n{speed(made)}")
    unpatch(model)
    with screen.progress("writing it again with Transformers alone"):
        alone = generate(model, tokenizer, prompt, **how)
    same = made.text == alone.text
    verdict = "the same text" if same else "another text, where two tokens were nearly as likely"
    seconds = time.perf_counter() - start
    screen.say(f"Transformers alone writes {verdict}, {alone.tokens_per_second:.1f} tokens/s\n{seconds:.1f} s in all")
    data = {
        "ok": report.ok,
        "verify": report.to_dict(),
        "prompt": prompt,
        "generated": made.to_dict(),
        "transformers": alone.to_dict(),
        "same_text": same,
        "training": log,
        "seconds": seconds,
    }
    return Answer(data, OK if report.ok else MISMATCH)


def shipped_model() -> Path:
    """The folder of the model that comes with the package."""
    folder = Path(str(resources.files("moerunner"))) / "assets" / "demo"
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            "the shipped model is not in this installation", where="demo", next_step="Install moerunner again"
        )
    return folder


def describe(model: Any, runners: dict[str, Any], log: dict[str, Any]) -> str:
    """What the model is, where it comes from and how good it is."""
    specs = [runner.spec for runner in runners.values()]
    total = sum(p.numel() for p in model.parameters())
    idle = sum((s.num_experts - s.top_k) * s.experts.intermediate_size * s.hidden_size * 3 for s in specs)
    spec, trained = specs[0], log["data"]["train"]
    shared = f", and {spec.shared.count} shared by all" if spec.shared else ""
    return (
        f"{model.config.model_type}: {total / 1e6:.1f} million weights, {(total - idle) / 1e6:.1f} million at work on a token\n"
        f"{len(specs)} MoE layers of {spec.num_experts} experts, {spec.top_k} of them for each token{shared}\n"
        f"trained from scratch on the standard library of Python {log['python_of_the_stdlib']}, "
        f"{trained['bytes'] / 1e6:.1f} MB, {log['training_seconds'] / 60:.0f} minutes on {log['device']}\n"
        f"held-out loss, on files it has never seen: {log['heldout_loss']:.3f} {log['loss_unit']}, "
        f"{log['heldout_bits_per_byte']:.2f} bits per byte (by token frequency alone {log['heldout_unigram_entropy']:.3f})"
    )
