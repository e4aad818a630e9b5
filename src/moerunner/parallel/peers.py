"""What a rank says of itself, what another one can see of its process, and whether all ranks say the same."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moerunner.errors import DistributedError

_START_TIME = 19  # fields of /proc/PID/stat behind the name: 0 is the state, 19 when the process began


@dataclass
class Peer:
    """What a rank last said of itself. seen: when it last said something new, changed: when it last came to a collective."""

    said: dict[str, Any] = field(default_factory=dict)
    seen: float = field(default_factory=time.monotonic)
    changed: float = field(default_factory=time.monotonic)

    def hear(self, said: dict[str, Any]) -> None:
        now = time.monotonic()
        if said.get("beat") != self.said.get("beat"):
            self.seen = now
        if said.get("issued") != self.said.get("issued"):
            self.changed = now
        self.said = said

    @property
    def left(self) -> bool:
        """Its program has come to its end, without an error."""
        return bool(self.said.get("left"))

    def issued(self, key: str) -> int:
        return int(self.said.get("issued", {}).get(key, 0))

    def process(self) -> str:
        """`ended` or `stopped` for a process of this machine that is; "" for any other."""
        if not self.said or self.said["machine"] != _machine():
            return ""
        facts = _stat(self.said["pid"])
        if not facts or facts[_START_TIME] != self.said["began"] or facts[0] in "ZX":
            return "ended"
        return "stopped" if facts[0] in "Tt" else ""


def key_of(members: Sequence[int]) -> str:
    """The name of a group of ranks."""
    return ",".join(map(str, members))


def first_of_chain(peers: Mapping[int, Peer], rank: int) -> int:
    """Whom a late rank waits for, if it waits, and that one in turn: of another group, perhaps."""
    seen = {rank}
    while peers[rank].said.get("waits"):
        issued = peers[rank].said.get("issued", {})
        late = (r for key in issued for r in map(int, key.split(",")) if r in peers and peers[r].issued(key) < issued[key])
        found = next(late, rank)
        if found in seen:
            break
        seen.add(rank := found)
    return rank


def here() -> dict[str, Any]:
    """What tells this process from all others."""
    facts = _stat(os.getpid())
    return {"machine": _machine(), "pid": os.getpid(), "began": facts[_START_TIME] if facts else ""}


def compare(rank: int, facts: Sequence[Mapping[str, Any]]) -> None:
    """Raises a `DistributedError` if the ranks, in order, did not all give the same facts."""
    wrong = [r for r, of in enumerate(facts) if of != facts[0]]
    if not wrong:
        return
    differences = list(_differences("", facts[wrong[0]], facts[0]))
    said = "; ".join(f"{name} is {one}, on rank 0 it is {other}" for name, one, other in differences[:3])
    raise DistributedError(
        f"ranks {wrong} disagree with rank 0: {said}" if len(wrong) > 1 else f"rank {wrong[0]} disagrees with rank 0: {said}",
        where=f"rank {rank}",
        next_step="Give every rank the same spec, layout, options and weights of the same shapes",
    )


def _differences(name: str, one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two pieces of plain data differ: the path, and what each has there."""
    if one == other:
        return
    if isinstance(one, dict) and isinstance(other, dict):
        for part in {**one, **other}:
            yield from _differences(f"{name}.{part}".lstrip("."), one.get(part), other.get(part))
    else:
        yield name, one, other


def _machine() -> str:
    """The same for processes that see each other's numbers, "" where that cannot be known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return f"process {os.getpid()}"


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name; none where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
