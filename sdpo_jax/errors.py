"""The one exception for bad input.

`UserError` carries a message that says what was expected, what came, where, and what to do; the
command line prints it without a traceback and exits with code 2.
"""


class UserError(Exception):
    """Input that only the user can mend; the message holds place, value, expectation, remedy."""
