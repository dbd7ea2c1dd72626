"""The exception for bad input.

The message of a `UserError` names the place, the value, the expectation and a remedy. The command
line prints it without a traceback and exits with code 2.
"""


class UserError(Exception):
    """Bad input that the user must correct; the message names place, value and remedy."""
