"""Several ranks on the GPUs of one machine: NCCL on every layout, models, faults, and what a side stream gains.

    python scripts/gpu_ranks.py results.json [--device cuda] [--seconds 95] [--share]

Starts the ranks itself, on 4 GPUs or 2, whatever there are; `--device cpu` runs the same over gloo. Writes JSON with the
environment; exits 1 if anything is wrong or missing. After `--seconds` whatever still runs is ended, and counts as missing.
`--share`: four ranks on fewer GPUs, each told to be a machine of its own, since NCCL refuses two ranks of one machine on a GPU.
They speak over sockets, as several machines do; nothing is timed then.

Bound of a layer: twice the error of one rank in the same dtype, plus 1e-6 (both against float64). A draw above it is followed
by 15 others of the tokens, and the median of their ratios decides.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import moerunner
from moerunner import DistributedError, LayerWeights, Layout, MoERunner, MoESpec, Options
from moerunner.bench.timing import eager_seconds, graph_seconds
from moerunner.ops.reference import reference
from moerunner.spec import ExpertsSpec, GroupSpec, RMSNorm, RoutingSpec, SharedSpec, TransformSpec

FAULT_TIMEOUT = 12.0  # seconds, of the layout in which a rank fails
SPARE = 10.0  # seconds beyond it until all must have ended
SPECS = {
    "deepseek": MoESpec(
        hidden_size=256,
        num_experts=16,
        top_k=4,
        routing=RoutingSpec(
            score="sigmoid", selection_bias=True, groups=GroupSpec(count=4, kept=2), renormalise="sum", eps=1e-20
        ),
        experts=ExpertsSpec(intermediate_size=128),
        shared=SharedSpec(width=128),
        routed_scaling_factor=2.5,
        apply_routed_scale_to_output=True,
    ),
    "odd": MoESpec(  # nothing divides by the ranks
        hidden_size=80,
        num_experts=7,
        top_k=3,
        routing=RoutingSpec(score="softmax", renormalise="sum"),
        experts=ExpertsSpec(intermediate_size=50, bias=True),
        shared=SharedSpec(width=37, gate="sigmoid", bias=True),
        output_transform=TransformSpec(ops=(RMSNorm(features=80),)),
        apply_routed_scale_to_output=False,
    ),
}


def layouts(world: int) -> Iterator[tuple[Layout, Options]]:
    """Those that are run in this world, each with its dispatch and output."""
    sizes = {2: [(1, 2, 1), (1, 1, 2), (2, 1, 1)], 4: [(1, 4, 1), (1, 1, 4), (1, 2, 2), (2, 2, 1), (2, 1, 2)]}[world]
    for dp, ep, tp in sizes:
        plain = Layout(dp=dp, ep=ep, tp=tp)
        yield plain, Options()
        yield plain, Options(overlap=False)
        if dp == world:
            continue
        yield plain, Options(output="shard")
        sharded = dataclasses.replace(plain, tokens="sharded")
        yield sharded, Options(dispatch="allgather")
        if ep > 1:
            yield sharded, Options(dispatch="alltoall")
            yield sharded, Options(dispatch="alltoall", overlap=False)
            yield dataclasses.replace(sharded, placement="round_robin", redundant=3), Options(dispatch="alltoall")
            yield dataclasses.replace(plain, redundant=2), Options()


class Rank:
    """What one process of a world does; every result is a line of its file, so that none is lost when it is ended."""

    def __init__(self, rank: int, world: int, device: str, told: Path) -> None:
        self.rank, self.world, self.told, self.gpu = rank, world, told, device == "cuda"
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.gpu else torch.device("cpu")

    def note(self, check: str, ok: bool, **facts: Any) -> None:
        with self.told.open("a") as file:
            file.write(json.dumps({"check": check, "rank": self.rank, "world": self.world, "ok": bool(ok), **facts}) + "\n")

    def weights(self, spec: MoESpec, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
        """The same on every rank."""
        generator = torch.Generator().manual_seed(seed)
        shapes = spec.weight_shapes()
        made = {n: torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) for n, shape in shapes.items()}
        return {n: t.to(self.device, torch.float32 if n == "selection_bias" else dtype) for n, t in made.items()}

    def tokens(self, layout: Layout, counts: list[int], width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
        """This rank's, or those of its copy."""
        which = self.rank if layout.tokens == "sharded" else self.rank // (layout.ep * layout.tp)
        generator = torch.Generator().manual_seed(seed + which)
        return torch.randn(counts[which], width, generator=generator).to(self.device, dtype)

    @torch.no_grad()
    def layers(self) -> None:
        seed = int.from_bytes(os.urandom(3), "big") if self.rank == 0 else 0
        told = torch.tensor([seed], device=self.device)
        dist.broadcast(told, src=0)
        seed, dtypes = int(told), (torch.float32, torch.bfloat16)
        mesh = {}
        for number, ((layout, options), name, dtype) in enumerate(itertools.product(layouts(self.world), SPECS, dtypes)):
            if name == "odd" and dtype == torch.bfloat16:  # every new shape is a kernel to compile
                continue
            spec = SPECS[name]
            sizes = (layout.dp, layout.ep, layout.tp)
            if sizes not in mesh:
                names = ("dp", "ep", "tp")
                mesh[sizes] = dist.init_device_mesh(self.device.type, sizes, mesh_dim_names=names)
            bound = layout.bind(mesh[sizes])
            whole = self.weights(spec, dtype, seed)
            one, many = MoERunner(spec, whole), MoERunner(spec, whole, bound, options)
            for counts in ([5] * self.world, [(seed + number + 7 * r) % 3 * 33 for r in range(self.world)]):

                def errors(
                    seed: int,
                    runners: tuple[MoERunner, MoERunner] = (one, many),
                    facts: tuple[Any, ...] = (layout, options, counts, spec, dtype),
                    whole: dict[str, torch.Tensor] = whole,
                ) -> tuple[float, float, int, bool]:
                    (one, many), (layout, options, counts, spec, dtype) = runners, facts
                    x = self.tokens(layout, counts, spec.hidden_size, dtype, seed)
                    alone, y = one(x), many(x)
                    exact = reference(spec, LayerWeights.of(spec, {n: t.double() for n, t in whole.items()}), x).to(x.device)
                    if options.output == "shard":
                        here = self.rank % (layout.ep * layout.tp)
                        alone, exact = (t.split(layout.token_counts(x.shape[0]))[here] for t in (alone, exact))
                    return error(y, exact), error(alone, exact), x.shape[0], y.shape == exact.shape

                errors(seed)
                bound.comm.log.clear()
                bound.comm.counted.clear()
                mine, theirs, tokens, right = errors(seed)
                plan = next(v.plan for v in many._verbs.values() if v.plan.dtype == str(dtype).split(".")[1])
                issued = tuple(bound.comm.log) == plan.collectives and tuple(bound.comm.counted) == plan.counts
                shared = plan.step("shared")
                facts = {"layout": describe(layout, options), "spec": name, "dtype": str(dtype).split(".")[1]}
                facts |= {"tokens": tokens, "error": mine, "one_rank": theirs, "collectives": len(plan.collectives)}
                facts |= {"side": bool(shared and shared.side)}
                above = torch.tensor([float(mine > 2 * theirs + 1e-6)], device=self.device)
                dist.all_reduce(above, op=dist.ReduceOp.MAX)
                if above.item():  # every rank draws again, since all are needed
                    again = [errors(seed + 1 + i)[:2] for i in range(15)]
                    right &= statistics.median((m - 1e-6) / t if t else 0.0 for m, t in again) <= 2
                self.note("layer", right and issued and math.isfinite(mine), **facts, issued=issued)

    @torch.no_grad()
    def model(self, folder: Path) -> None:
        """A Transformers model, cut and loaded: the logits and the greedy tokens of one rank."""
        from moerunner.verify import tiny_model

        whole = tiny_model("deepseek_v3").to(self.device).eval()
        if self.rank == 0:
            whole.save_pretrained(folder)
        dist.barrier()
        ids = torch.randint(whole.config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(1)).to(self.device)
        moerunner.patch(whole)
        expected, text = whole(ids).logits, self.greedy(whole, ids)
        for layout in [Layout(ep=self.world), Layout(tp=self.world), *([Layout(ep=2, tp=2)] if self.world == 4 else [])]:
            bound = layout.bind()
            model = moerunner.load(folder, device=self.device.type, layout=bound)
            far, same = error(model(ids).logits, expected.double()), torch.equal(self.greedy(model, ids), text)
            blocks = len(model.moerunner_report.replaced)
            bound.comm.log.clear()
            model(ids)
            issued = [kind for kind, _ in bound.comm.log]
            ok = far <= 1e-5 and same and blocks > 0 and issued == ["all_reduce"] * blocks
            facts = {"layout": describe(layout, Options()), "error": far, "same_text": same, "blocks": blocks}
            self.note("model", ok, **facts, issued=len(issued))

    def greedy(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        return model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)

    @torch.no_grad()
    def overlap(self) -> None:
        """Time of a layer with shared experts on the side stream and not, the slowest rank's; and that bits are the same."""
        base = SPECS["deepseek"]
        big = dataclasses.replace(
            base,
            hidden_size=2048 if self.gpu else 64,
            num_experts=64,
            top_k=8,
            experts=ExpertsSpec(intermediate_size=1024 if self.gpu else 32),
            shared=SharedSpec(width=2048 if self.gpu else 64),
        )
        dtype = torch.bfloat16
        whole = self.weights(big, dtype, 3)
        for tokens, dispatch in (("replicated", "auto"), ("sharded", "alltoall")):
            bound = Layout(ep=self.world, tokens=tokens, shared="replicated" if tokens == "sharded" else "auto").bind()
            runners = {on: MoERunner(big, whole, bound, Options(dispatch=dispatch, overlap=on)) for on in (True, False)}
            for count in (1, 16, 64, 256, 1024) if self.gpu else (1, 16):
                x = self.tokens(bound.layout, [count] * self.world, big.hidden_size, dtype, count)
                results = {on: runner(x) for on, runner in runners.items()}
                facts: dict[str, Any] = {"tokens": count, "layout": f"ep{self.world} {tokens} {dispatch}"}
                for on, runner in runners.items():
                    seconds = eager_seconds([lambda runner=runner, x=x: runner(x)] * 10, rounds=5)
                    facts["us_on" if on else "us_off"] = round(1e6 * self.slowest(seconds), 1)
                    if self.gpu and dispatch == "auto":
                        captured = self.slowest(graph_seconds([lambda runner=runner, x=x: runner(x)] * 10))
                        facts["graph_us_on" if on else "graph_us_off"] = round(1e6 * captured, 1)
                self.note("overlap", torch.equal(results[True], results[False]), **facts)

    @torch.no_grad()
    def graph(self) -> None:
        """Captured and replayed with other tokens: what it gives when launched from Python."""
        if not self.gpu:
            return
        bound = Layout(ep=self.world).bind()
        spec = SPECS["deepseek"]
        runner = MoERunner(spec, self.weights(spec, torch.bfloat16, 5), bound, Options(capturable=True))
        held = self.tokens(bound.layout, [32] * self.world, spec.hidden_size, torch.bfloat16, 1)
        other = self.tokens(bound.layout, [32] * self.world, spec.hidden_size, torch.bfloat16, 2)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            runner(held)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = runner(held)
        held.copy_(other)
        graph.replay()
        replayed = out.clone()
        self.note("graph", torch.equal(replayed, runner(other)), error=error(replayed, runner(other).double()))

    def slowest(self, seconds: float) -> float:
        told = torch.tensor([seconds], device=self.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return float(told)

    @torch.no_grad()
    def fault(self, kind: str) -> None:
        """Rank 1 is killed or stopped amid layers; the others must tell so in time. On a GPU the result of each is read."""
        layout = Layout(ep=self.world, timeout=FAULT_TIMEOUT)
        bound = layout.bind()
        spec, number = SPECS["deepseek"], {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}.get(kind)
        whole = self.weights(spec, torch.float32, 1)
        runner, x = MoERunner(spec, whole, bound), self.tokens(layout, [5] * self.world, spec.hidden_size, torch.float32, 1)
        expected = MoERunner(spec, whole)(x)
        start, wrong = time.monotonic(), False
        try:
            for count in itertools.count():
                if self.rank == 1 and count == 20:
                    if number is not None:
                        os.kill(os.getpid(), number)
                    raise ValueError("is broken here")
                start = time.monotonic()
                y = runner(x).cpu()
                wrong |= error(y, expected.cpu().double()) > 1e-5
        except DistributedError as told:
            seconds = time.monotonic() - start
            ok = not wrong and bool(re.match("rank 1: ", str(told))) and seconds <= FAULT_TIMEOUT + SPARE
            self.note(f"fault {kind}", ok, seconds=round(seconds, 1), said=str(told), wrong=wrong)
            raise


def error(y: torch.Tensor, exact: torch.Tensor) -> float:
    if exact.numel() == 0:
        return 0.0 if y.shape == exact.shape else math.inf
    value = float((y.double() - exact.double()).abs().max() / exact.double().abs().max())
    return value if math.isfinite(value) else math.inf


def describe(layout: Layout, options: Options) -> str:
    sizes = " ".join(f"{axis}{getattr(layout, axis)}" for axis in ("dp", "ep", "tp") if getattr(layout, axis) > 1)
    more = [options.dispatch] if options.dispatch != "auto" else []
    more += [options.output] if options.output != "replicate" else []
    more += [f"redundant {layout.redundant}"] if layout.redundant else []
    return " ".join([sizes, layout.tokens, *more, *([] if options.overlap else ["no overlap"])])


def work(options: argparse.Namespace) -> None:
    """One rank."""
    device = options.device
    if device == "cuda":
        torch.cuda.set_device((options.rank + options.first) % torch.cuda.device_count())
        torch.backends.cuda.matmul.allow_tf32 = False
    else:
        torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    rank = Rank(options.rank, options.world, device, options.folder / f"{options.job}.{options.rank}.jsonl")
    if options.job.startswith("fault"):
        rank.fault(options.job.split("-")[1])
        return

    def model() -> None:
        rank.model(options.folder / f"model{options.world}")

    for job in (rank.layers, model, rank.graph, *([] if options.share else [rank.overlap])):
        start = time.monotonic()
        try:
            job()
        except Exception as told:
            said, where = f"{type(told).__name__}: {told}", traceback.format_exc()[-1500:]
            rank.note(job.__name__, False, said=said, where=where)
            if isinstance(told, DistributedError):
                raise
        rank.note("time", True, of=job.__name__, seconds=round(time.monotonic() - start, 1))
    rank.note("end", True)
    dist.barrier()
    dist.destroy_process_group()


class World:
    """The processes of one job."""

    def __init__(self, job: str, world: int, first: int, device: str, folder: Path, share: bool) -> None:
        self.job, self.world, self.folder, self.began, self.ended = job, world, folder, time.monotonic(), 0.0
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = []
        for rank in range(world):
            env = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                **(machine(str(rank)) if share else {}),
            }
            command = [sys.executable, __file__, str(folder / "none"), "--rank", str(rank), "--world", str(world), "--job", job]
            command += ["--first", str(first), "--device", device, "--folder", str(folder), *(["--share"] if share else [])]
            words = (folder / f"{job}.{rank}.txt").open("w")
            self.processes.append(subprocess.Popen(command, env=env, stdout=words, stderr=words, start_new_session=True))

    def over(self) -> bool:
        """Whether all have ended; the one that is stopped is killed after the others."""
        running = [rank for rank, p in enumerate(self.processes) if p.poll() is None]
        if running == [1] and self.job.startswith("fault-stop"):
            self.kill()
            running = []
        if not running and not self.ended:
            self.ended = time.monotonic()
        return not running

    def kill(self) -> list[int]:
        left = [rank for rank, p in enumerate(self.processes) if p.poll() is None]
        for rank in left:
            self.processes[rank].kill()
            self.processes[rank].wait()
        return left

    def results(self) -> Iterator[dict[str, Any]]:
        for rank in range(self.world):
            told = self.folder / f"{self.job}.{rank}.jsonl"
            lines = told.read_text().splitlines() if told.exists() else []
            yield from ({"job": self.job, **json.loads(line)} for line in lines if line.endswith("}"))

    def judge(self, hung: list[int]) -> dict[str, Any]:
        """How its processes ended, and whether all results are there."""
        statuses = [p.returncode for p in self.processes]
        fault = self.job.startswith("fault")
        told = {
            f["rank"]
            for f in self.results()
            if f["check"] == (self.job.replace("-", " ", 1).rsplit("-", 1)[0] if fault else "end")
        }
        wanted = set(range(self.world)) - ({1} if fault else set())
        seconds = round((self.ended or time.monotonic()) - self.began, 1)
        ok = not hung and told >= wanted and (fault or not any(statuses))
        facts = {"job": self.job, "check": "processes", "world": self.world, "ok": ok, "seconds": seconds, "statuses": statuses}
        if not ok:
            facts["words"] = {
                r: (self.folder / f"{self.job}.{r}.txt").read_text(errors="replace")[-1500:] for r in range(self.world)
            }
        return facts | {"hung": hung}


def machine(name: str) -> dict[str, str]:
    """The environment of a rank that shares its GPU: NCCL takes it for a machine of this name."""
    return {"NCCL_HOSTID": name, "NCCL_SOCKET_IFNAME": "lo", "LOCAL_RANK": "0"}


def command_line(world: int, seconds: float, share: bool) -> Iterator[dict[str, Any]]:
    """`torchrun -m moerunner` of the shipped model: the verbs that run on several ranks, and what one rank says."""
    alone_there = " ".join(f"{name}={value}" for name, value in machine("$RANK").items())
    each = ["--no-python", "sh", "-c", f'{alone_there} exec "$@"', "rank", sys.executable] if share else []
    path = Path(moerunner.__file__).parent / "assets" / "demo"
    prompt = ["import os", "--max-new-tokens", "12"]
    wide = ["--tp", "2", "--ep", "2"] if world == 4 else ["--tp", str(world)]
    runs = {"verify": wide if world == 4 else ["--ep", str(world)], "generate": [*prompt, *wide], "generate alone": prompt}
    said: dict[str, Any] = {}
    for name, more in runs.items():
        verb, alone = name.split()[0], name.endswith("alone")
        torchrun = [] if alone else ["torch.distributed.run", "--standalone", f"--nproc-per-node={world}", *each, "-m"]
        command = [sys.executable, "-m", *torchrun, "moerunner", verb, str(path), *more, "--dtype", "float32", "--json"]
        began = time.monotonic()
        facts: dict[str, Any] = {"job": f"cli-{world}", "check": f"cli {name}", "world": world}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
            said[name] = json.loads(done.stdout) if done.returncode == 0 else None  # one object: one rank prints
            ok, words = said[name] is not None, done.stderr[:1500] + " ... " + done.stderr[-1500:]
        except (subprocess.TimeoutExpired, ValueError) as error:
            ok, words = False, str(error)[-1500:]
        if name == "generate alone" and ok and said.get("generate"):
            ok = said[name]["texts"] == said["generate"]["texts"]
        yield facts | {"ok": ok, "seconds": round(time.monotonic() - began, 1)} | ({} if ok else {"words": words})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path(os.environ.get("OUT", ".")) / "gpu_ranks.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=95.0)
    parser.add_argument("--ranks", type=int, help="the largest world; default: the GPUs there are, at most 4")
    parser.add_argument("--share", action="store_true", help="several ranks on a GPU, each as a machine of its own")
    parser.add_argument("--jobs", type=lambda s: s.split(","), help="only these, such as all-2,fault-kill-2,cli-4")
    for name, kind in (("rank", int), ("world", int), ("first", int), ("job", str), ("folder", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        work(options)
        return
    start = time.monotonic()
    most = options.ranks or (min(4, torch.cuda.device_count()) if options.device == "cuda" and not options.share else 4)
    folder = Path(tempfile.mkdtemp())
    faults = [(f"fault-{kind}-2", 2, 2 if most >= 4 else 0) for kind in ("kill", "stop", "raise")]
    # Each wave's jobs run at once. Times are taken where no other job has the same GPUs.
    waves = [[("all-4", 4, 0)], [("all-2", 2, 0), *faults]] if most >= 4 else [[("all-2", 2, 0)], faults]
    waves = [[job for job in wave if not options.jobs or job[0] in options.jobs] for wave in waves]
    found: list[dict[str, Any]] = []

    def environment() -> dict[str, Any]:
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if options.device == "cuda" else []
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if gpus else None
        return {
            "gpus": gpus,
            "nccl": nccl,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": options.device,
            "share": options.share,
            "seconds": round(time.monotonic() - start, 1),
        }

    for number, wave in enumerate(waves):
        end = start + options.seconds * (0.6 if number == 0 and all(waves) else 1)
        worlds = [World(*job, options.device, folder, options.share) for job in wave]
        while time.monotonic() < end:
            over = [w.over() for w in worlds]  # each is asked, every time
            if all(over):
                break
            time.sleep(0.05)
        hung = [w.kill() for w in worlds]
        for world, left in zip(worlds, hung, strict=True):
            found += [*world.results(), world.judge(left)]
        options.out.write_text(json.dumps({"environment": environment(), "results": found}, indent=1) + "\n")
    for world in (2, 4)[: most // 2]:
        if options.jobs and f"cli-{world}" not in options.jobs:
            continue
        found += command_line(world, max(20.0, start + options.seconds - time.monotonic()), options.share)
        options.out.write_text(json.dumps({"environment": environment(), "results": found}, indent=1) + "\n")
    wrong = [f for f in found if not f["ok"]]
    for one in wrong[:40]:
        print(json.dumps(one), flush=True)
    for one in found:
        if (
            one["check"] == "processes"
            or one["check"].startswith(("fault", "cli"))
            or (one["check"] in ("overlap", "time") and one["rank"] == 0)
        ):
            print({k: v for k, v in one.items() if k != "words"}, flush=True)
    print(f"{len(found) - len(wrong)} of {len(found)} right, {time.monotonic() - start:.0f} s, {options.out}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
