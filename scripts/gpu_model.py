"""A whole model on a GPU in under 100 seconds: decode, prefill, generate, small families, loading. Writes JSON.

    python scripts/gpu_model.py results.json [--layers 12] [--seconds 95] [--only as_generate,loading] [--tiny]

Every part is on its own: one that fails says so in its place. Parts that find no time left are named under "skipped".
--tiny: a small model, so that the script itself can be tried on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers

import moerunner
from moerunner.bench import model as bench
from moerunner.env import collect
from moerunner.models.decoding import fused
from moerunner.models.decoding.cache import static_cache
from moerunner.models.decoding.step import Step
from moerunner.verify import tiny_model

NAME = "qwen3-30b-a3b"
FAMILIES = (
    "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "olmoe", "glm4_moe", "qwen2_moe", "ernie4_5_moe", "granitemoe", "phimoe",
    "deepseek_v2", "hunyuan_v1_moe", "minimax_m2", "llama4_text", "qwen3_next", "jamba",
)  # fmt: skip
TINY = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "vocab_size": 512, "num_experts": 16, "num_hidden_layers": 2}  # fmt: skip


class Script:
    def __init__(self, options: argparse.Namespace) -> None:
        self.tiny, self.layers = options.tiny, 2 if options.tiny else options.layers
        self.end = time.monotonic() + options.seconds
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = None
        self.batches, self.prompts = ((1, 2), (32, 64)) if self.tiny else ((1, 8, 32), (2048, 8192))
        if self.tiny:
            bench.MODELS[NAME] |= TINY

    def left(self) -> float:
        return self.end - time.monotonic()

    def build(self) -> dict[str, Any]:
        self.model = bench.build(NAME, layers=self.layers, dtype=torch.bfloat16, device=self.device)
        return {"bytes": sum(p.nbytes for p in self.model.parameters())}

    def as_generate(self) -> dict[str, Any]:
        """What `moerunner.generate` runs, and what its parts cost."""
        return self._measure(["generate"], shares=True)

    def turns(self) -> dict[str, Any]:
        """Every implementation, one after the other, several times: a host's speed changes by a third within a minute."""
        return self._measure(["generate", "patched", "grouped_mm", "batched_mm"], shares=False)

    def _measure(self, names: list[str], shares: bool) -> dict[str, Any]:
        sizes = {"batches": self.batches, "prompts": self.prompts, "shares": shares, "seconds": self.left()}
        found = bench.measure(self.model, dtype=torch.bfloat16, device=self.device, implementations=names, **sizes)
        return {key: found[key] for key in ("decode", "prefill")}

    def generate(self) -> list[dict[str, Any]]:
        """Tokens per second of the public function, with everything around the step."""
        moerunner.patch(self.model)
        found = []
        for batch in self.batches:
            ids = torch.randint(bench.MODELS[NAME]["vocab_size"], (batch, 128), device=self.device)
            for _ in range(2):  # the first compiles
                made = moerunner.generate(self.model, input_ids=ids, max_new_tokens=16 if self.tiny else 128)
            found.append({"batch": batch, **{k: v for k, v in made.to_dict().items() if k not in ("texts", "text")}})
        moerunner.unpatch(self.model)
        return found

    def kernels(self) -> dict[str, Any]:
        """Where the time of a captured step and of a prefill goes, microseconds by kernel."""
        if self.device.type != "cuda":
            return {}
        from torch.profiler import ProfilerActivity, profile

        moerunner.patch(self.model)
        found = {}
        with torch.no_grad(), fused(self.model):
            for batch in self.batches:
                ids = torch.randint(bench.MODELS[NAME]["vocab_size"], (batch, 128), device=self.device)
                given = {"past_key_values": static_cache(self.model, 160), "use_cache": True, "logits_to_keep": 1}
                self.model(input_ids=ids, **given)
                given["position_ids"] = torch.arange(128, device=self.device).expand(batch, -1)
                step = Step(self.model, given, batch, 160, capture=True)
                for _ in range(3):
                    step(ids[:, -1])
                with profile(activities=[ProfilerActivity.CUDA]) as seen:
                    for _ in range(4):
                        step(ids[:, -1])
                    torch.cuda.synchronize()
                found[f"decode, batch {batch}"] = by_kernel(seen, 4)
            ids = torch.randint(bench.MODELS[NAME]["vocab_size"], (1, self.prompts[-1]), device=self.device)
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                self.model(input_ids=ids, logits_to_keep=1, past_key_values=static_cache(self.model, ids.shape[1]))
                torch.cuda.synchronize()
            found[f"prefill, {self.prompts[-1]}"] = by_kernel(seen, 1)
        moerunner.unpatch(self.model)
        return found

    def families(self) -> dict[str, Any]:
        """Greedy tokens of model.generate and of ours, float32, one row shorter than the others."""
        found = {}
        for family in FAMILIES:
            if self.left() < 3:
                found[family] = {"skipped": "no time"}
                continue
            try:
                model = tiny_model(family).to(self.device)
                report = moerunner.patch(model)
                ids = torch.randint(3, 250, (3, 21), device=self.device)
                mask = torch.ones_like(ids)
                mask[0, :6] = 0
                expected = model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0)
                facts: dict[str, Any] = {"replaced": len(report.replaced)}
                for name, chunk in (("whole", None), ("chunks", 8))[: 2 if self.left() > 30 else 1]:
                    made = moerunner.generate(
                        model, input_ids=ids, attention_mask=mask, max_new_tokens=24, pad_token_id=0, prefill_chunk=chunk
                    )
                    facts[name] = {"same": torch.equal(made.sequences, expected), "decode": made.decode, "note": made.note}
                found[family] = facts
            except Exception as error:  # noqa: BLE001 - one family's failure is a result
                found[family] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        return found

    def loading(self) -> dict[str, Any]:
        """A checkpoint from the page cache, to the device and to memory, beside a plain read of its bytes: of the whole model
        where there is room and time, else of two layers."""
        with tempfile.TemporaryDirectory() as folder:
            free = shutil.disk_usage(folder).free
            if free < 12e9:
                return {"skipped": "no room on the disk"}
            layers = self.layers if free > 1.5e9 * self.layers + 8e9 and self.left() > 60 else min(2, self.layers)
            self.model = None  # room for another
            model = bench.build(NAME, layers=layers, dtype=torch.bfloat16, device=self.device)
            model.save_pretrained(folder)
            del model
            files = sorted(Path(folder).glob("*.safetensors"))
            facts: dict[str, Any] = {"bytes": sum(file.stat().st_size for file in files), "files": len(files)}
            for threads in (1, 4, 8):
                facts[f"plain read, {threads} threads"] = min(plain_read(files, threads) for _ in range(2))
            for device in dict.fromkeys((str(self.device), "cpu")):
                times = []
                for _ in range(2):
                    start = time.perf_counter()
                    model = moerunner.load(folder, device=device)
                    if self.device.type == "cuda":
                        torch.cuda.synchronize()
                    times.append(time.perf_counter() - start)
                    del model
                facts[f"load to {device}"] = times
            return facts


def plain_read(files: list[Path], threads: int) -> float:
    """Seconds to read every byte once, into buffers that are there."""
    piece = 64 * 2**20
    spans = [(file, at) for file in files for at in range(0, file.stat().st_size, piece)]

    def read(part: list[tuple[Path, int]]) -> None:
        buffer = memoryview(bytearray(piece))
        for file, at in part:
            with file.open("rb", buffering=0) as opened:
                opened.seek(at)
                opened.readinto(buffer)

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, [spans[i::threads] for i in range(threads)]))
    return time.perf_counter() - start


def by_kernel(seen: Any, steps: int) -> list[dict[str, Any]]:
    rows = sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)[:30]
    return [{"kernel": e.key[:90], "calls": e.count / steps, "us": round(e.self_device_time_total / steps, 1)} for e in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=95.0)
    parser.add_argument("--only", type=lambda s: s.split(","), help="parts, such as as_generate,loading; build is always one")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    script = Script(options)
    found: dict[str, Any] = {"environment": collect() | {"cpus": os.cpu_count()}, "layers": script.layers, "seconds": {}}
    parts: list[tuple[Callable[[], Any], float]] = [  # and the seconds that a part needs at least
        (script.build, 0), (script.as_generate, 8), (script.generate, 6), (script.kernels, 6), (script.families, 8),
        (script.turns, 20), (script.loading, 15),
    ]  # fmt: skip
    for part, needs in parts:
        name, start = part.__name__, time.monotonic()
        if options.only and name not in ("build", *options.only):
            continue
        if script.left() < needs:
            found.setdefault("skipped", []).append(name)
            continue
        try:
            found[name] = part()
        except Exception as error:  # noqa: BLE001 - one part's failure must not cost the others
            traceback.print_exc()
            found[name] = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
        found["seconds"][name] = round(time.monotonic() - start, 1)
        print(f"{name}: {found['seconds'][name]} s", flush=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")  # what is there stays, whatever ends the script
    print(json.dumps(found, indent=1))
    sys.exit(0)


if __name__ == "__main__":
    main()
