"""README and the pages of docs/ as what can be run: files to write, snippets in their order, commands one by one.

A comment `<!-- run: WORD -->` above a block says how: `slow` in the long tier, `server` with `moerunner serve` running,
`torchrun N` on so many ranks, `lm-eval` where that is installed.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"(?:^<!-- run: ([^>]+) -->\n)?^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """how: the word of the comment above it, empty for none."""

    kind: str
    text: str
    how: str = ""

    @property
    def file(self) -> str:
        """The name in its first line, if it is a file: `# toy_model.py`."""
        found = re.match(r"# (\w+\.py)\n", self.text)
        return found[1] if found and self.kind == "python" else ""

    def commands(self) -> list[list[str]]:
        """The words of each command, continued lines joined, comments left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


@dataclass(frozen=True)
class Page:
    path: Path
    blocks: list[Block] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    def files(self) -> dict[str, str]:
        return {block.file: block.text for block in self.blocks if block.file}

    def snippets(self, how: str = "") -> list[str]:
        return [b.text for b in self.blocks if b.kind == "python" and not b.file and b.how == how]


def read(name: str) -> Page:
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    return Page(path, [Block(kind, code, how or "") for how, kind, code in _BLOCK.findall(text)])


def all_pages() -> list[Page]:
    """Those that people write; generated ones and the log have nothing to run."""
    written = [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
    left_out = {"docs/families.md", "docs/accuracy.md", "docs/log.md", "docs/architecture.md", "docs/api.md"}
    return [read(name) for name in ["README.md", *written] if name not in left_out]
