"""Token ids to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HELD = 8  # tokens that may wait for the rest of a character; more are no character


class Pieces:
    """One answer's text. stopped: a stop string has come; what follows is dropped, the string too."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), *, special: bool = False) -> None:
        """special: keep special tokens in the text, for who looks for them in it."""
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=not special)
        self._ids: list[int] = []
        self._from = self._told = 0  # the tokens from here on are decoded; up to there their text is out
        self._stop, self._held, self.stopped = tuple(stop), "", False

    def add(self, ids: Sequence[int]) -> str:
        """The new text that is certain now."""
        return "".join(map(self._one, ids))

    def end(self) -> str:
        """What was held back."""
        last = self._pass(self._decode(self._ids[self._from :]))
        rest, self._held = self._held, ""
        return last + ("" if self.stopped else rest)

    def _one(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode(self._ids[self._from :])
        if text.endswith("\ufffd") and len(self._ids) - self._told < _HELD:
            return ""
        return self._pass(text)

    def _pass(self, text: str) -> str:
        new = text[len(self._decode(self._ids[self._from : self._told])) :]
        self._from, self._told = self._told, len(self._ids)
        if self.stopped:
            return ""
        self._held += new
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            out, self._held, self.stopped = self._held[: min(found)], "", True
            return out
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text may begin the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
