"""What a sandbox says about itself."""

from typing import NamedTuple


class Report(NamedTuple):
    """What a sandbox is made of and what it held at its start."""

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
