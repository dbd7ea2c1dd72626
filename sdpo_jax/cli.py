"""The `sdpo` command: dispatches to `sdpo_jax.commands` and turns errors into exit codes.

Exit codes: 0 done (or stopped on request and saved), 1 a bug (traceback), 2 bad input (one
message), 130 interrupted at once.
"""

import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from sdpo_jax.commands import convert, discover, env, evaluate, heatmap, report, train
from sdpo_jax.commands.command import parse
from sdpo_jax.errors import UserError

COMMANDS = [module.COMMAND for module in (train, evaluate, report, heatmap, discover, convert, env)]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with the codes above."""
    try:
        code = _dispatch(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"sdpo: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("sdpo: interrupted; the last checkpoint is kept", file=sys.stderr)
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    _exit(code)


def _dispatch(argv: Sequence[str]) -> int:
    arguments = parse(COMMANDS, argv)
    return arguments.command.run(arguments) or 0


def _exit(code: int) -> NoReturn:
    """Ends the process; a job of several ends with it, or the others would wait for ever."""
    if code and "sdpo_jax.distributed" in sys.modules:
        from sdpo_jax.distributed import leave

        leave(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
