"""The report of a sandbox: its tier, its Python, and the attacks that it was tested with."""

from typing import NamedTuple


class Report(NamedTuple):
    """The parts of a sandbox; `held` lists the attacks that it blocked, `open` the others."""

    tier: str
    interpreter: str
    python: str
    kernel: str
    held: tuple[str, ...]
    open: tuple[str, ...]

    def __str__(self) -> str:
        line = (
            f"sandbox: tier {self.tier}, Python {self.python} ({self.interpreter}), "
            f"kernel {self.kernel}, holds {', '.join(self.held) or 'nothing'}"
        )
        return line + (f"; OPEN: {', '.join(self.open)}" if self.open else "")
