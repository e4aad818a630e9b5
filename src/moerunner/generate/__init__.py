"""Text from a model. `moerunner.generate(model, tokenizer, prompt)` is the function; this module is called as if it were it."""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

from moerunner.generate.text import Generated, generate

__all__ = ["Generated", "generate"]


class _Callable(ModuleType):
    """`moerunner.generate` is this module once anything imports it, and the public function at all times."""

    @functools.wraps(generate)
    def __call__(self, *args: Any, **kwargs: Any) -> Generated:
        return generate(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
