"""Every error of the package: what was wrong, where, and what to do next."""

from __future__ import annotations


class MoEError(Exception):
    """Base of all moerunner errors.

    Args:
        what: the fact that is wrong, with the values seen.
        where: the layer, tensor, file or step it was found in.
        next_step: what the reader can do about it.
    """

    def __init__(self, what: str, *, where: str = "", next_step: str = "") -> None:
        self.what, self.where, self.next_step = what, where, next_step
        text = f"{where}: {what}" if where else what
        super().__init__(f"{text}. {next_step}" if next_step else text)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.next_step, dict(self.__dict__))


def _rebuild(kind: type[MoEError], what: str, where: str, next_step: str, state: dict[str, object]) -> MoEError:
    error = kind.__new__(kind)
    MoEError.__init__(error, what, where=where, next_step=next_step)
    error.__dict__.update(state)
    return error


class SpecError(MoEError, ValueError):
    """A spec holds an impossible value, or an input does not fit the spec."""


class PlanError(MoEError, ValueError):
    """Two steps of a plan contradict each other; both are named."""

    def __init__(self, what: str, *, first: str, second: str, next_step: str = "") -> None:
        self.first, self.second = first, second
        super().__init__(what, where=f"step '{second}' after step '{first}'", next_step=next_step)


class WeightsError(MoEError, ValueError):
    """Weights are missing, extra, of the wrong shape, dtype or device."""


class CheckpointError(MoEError):
    """A checkpoint's files are damaged, incomplete or contradict its config."""


class UnsupportedError(MoEError):
    """What was asked for is understood but not offered; the reason is given."""


class DistributedError(MoEError, RuntimeError):
    """A rank failed, or ranks disagree."""


class Changed(Exception):
    """A source of weights declines: its module is no longer what the runner was made for; the message says how.

    Not an error by itself: the module's own forward is right then.
    """


class ReferenceWarning(UserWarning):
    """Transformers' code of a block is none that its family was verified with."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, without the tale behind it; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
