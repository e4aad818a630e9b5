"""A rank that fails ends all: each raises a `DistributedError` that names it and why, in time, and no process stays."""

from __future__ import annotations

import random
import re
import signal

import pytest
import torch
from tests.parallel.nursery import Nursery

from moerunner.parallel.peers import Peer, first_of_chain

TIMEOUT = {"stop": 8.0, "sleep": 8.0}  # of the layout, seconds, where it has to pass
LONG = 60.0  # of all others, which end before
SPARE = 20.0  # beyond it, for a machine that is busy

LAYOUTS = [
    (2, {"ep": 2}, {}),
    (2, {"tp": 2}, {"output": "shard"}),
    (2, {"ep": 2, "tokens": "sharded"}, {"dispatch": "alltoall"}),
    (2, {"ep": 2, "tokens": "sharded"}, {"dispatch": "allgather"}),
    (3, {"ep": 3}, {}),
    (4, {"ep": 2, "tp": 2}, {}),
    (4, {"dp": 2, "tp": 2}, {}),
    (4, {"ep": 2, "tp": 2, "tokens": "sharded"}, {"dispatch": "alltoall"}),
]
CAUSES = {
    "kill": r"its process.* has ended",
    "stop": r"is stopped|does not answer|no sign of life|has not come",
    "raise": r"Refused: is broken here",
    "memory": r"RuntimeError: .*allocate",
    "outside": r"Refused: is broken here",
    "exit": r"its program has ended before|its process, which keeps the store .*, has ended",
    "sleep": r"has not come to .* within",
    "spec": r"disagrees? with rank 0: spec\.routed_scaling_factor is [\d.]+, on rank 0 it is [\d.]+$",
    "weights": r"disagrees? with rank 0: .*intermediate_size is \d+.*w13 is \[",
    "layout": r"disagrees? with rank 0: layout\.\w+ is",
}
MISMATCHED = ("spec", "weights", "layout")


@pytest.fixture(scope="module")
def nursery():
    made = Nursery()
    yield made
    made.end()


def check(nursery: Nursery, fault: str, choice: int, *, victim: int | None = None) -> None:
    world, layout, options = LAYOUTS[choice]
    timeout = TIMEOUT.get(fault, LONG)
    seed = int(torch.randint(1 << 30, ()))
    victim = random.Random(seed).randrange(world) if victim is None else victim
    case = {"world": world, "layout": layout, "options": options, "fault": fault, "victim": victim, "seed": seed}
    sharded = layout.get("tokens") == "sharded"
    counts = [(seed + r) % 4 for r in range(world)] if sharded else [5] * world
    ended = nursery.run(**case, timeout=timeout, counts=counts)
    told = f"{case}\n" + "\n".join(f"rank {r}: {e}" for r, e in enumerate(ended))
    for rank, one in enumerate(ended):
        assert not one.wrong, told
        if rank == victim and fault in ("kill", "stop", "exit"):
            assert one.status == {"kill": signal.SIGKILL, "stop": None, "exit": 0}[fault], told
            continue
        assert one.status == 1 << 8, told  # of a program that an error has ended
        assert one.error is not None, told
        kind, text = one.error
        if rank == victim and fault == "outside":
            assert (kind, text) == ("Refused", "is broken here"), told
            continue
        assert kind == "DistributedError", told
        cause = re.split(r"\. (?:End all|Give every) ranks?", text)[0]
        assert re.search(CAUSES[fault], cause), told
        if fault in MISMATCHED:  # with rank 0; if it is that one which is wrong, all others do
            assert re.search(rf"ranks? \[?{victim or 1}", cause), told
        else:
            assert text.startswith(f"rank {victim}: "), told
        assert one.seconds <= TIMEOUT.get(fault, 0.0) + SPARE, told


@pytest.mark.parametrize("fault", ["kill", "raise", "weights"])
def test_every_rank_names_the_one_that_failed_and_why(nursery, fault):
    check(nursery, fault, choice=int(torch.randint(4, ())))


@pytest.mark.parametrize("fault", ["stop", "memory"])
def test_a_rank_that_keeps_the_store_of_the_process_group(nursery, fault):
    check(nursery, fault, choice=0, victim=0)


@pytest.mark.parametrize("fault", ["gpu", "gpu, and cannot be reached"])
def test_a_thread_that_waits_for_a_gpu_is_interrupted_or_ended(nursery, fault):
    killed, other = nursery.run(world=2, layout={"ep": 2}, options={}, fault=fault, victim=0, seed=1, timeout=LONG)
    assert (killed.status, other.status) == (signal.SIGKILL, 1 << 8)
    told = "rank 0: its process.* has ended"
    if fault == "gpu":
        assert other.error is not None
        kind, text = other.error
        assert kind == "DistributedError"
        assert re.match(told, text), text
        assert other.seconds < SPARE
    else:
        assert re.search(rf"moerunner\.DistributedError: {told}", other.text)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("fault", list(CAUSES))
def test_twenty_times(nursery, fault):
    copies = fault != "exit"  # other copies go on without a program that has come to its end
    choices = [i for i, (_, layout, _) in enumerate(LAYOUTS) if copies or "dp" not in layout]
    for count in range(20):
        check(nursery, fault, choice=choices[count % len(choices)])


def test_whoever_holds_up_the_others_is_named_though_it_is_in_another_group():
    """Rank 3 waits for rank 1, which waits for rank 0 in a group of those two."""
    peers = {rank: Peer() for rank in range(3)}
    peers[0].said = {"waits": False, "issued": {"0,1": 2, "0,2": 5}}
    peers[1].said = {"waits": True, "issued": {"0,1": 3, "1,3": 4}}
    peers[2].said = {"waits": True, "issued": {"0,2": 5, "2,3": 4}}
    assert first_of_chain(peers, 1) == 0
    assert first_of_chain(peers, 0) == 0
    peers[0].said |= {"waits": True, "issued": {"0,1": 3, "0,2": 5}}
    assert first_of_chain(peers, 1) == 1, "it waits for none that is behind"
