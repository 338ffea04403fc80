"""The one exception that a user is meant to see."""


class InputError(Exception):
    """Something the user gave cannot be used.

    Its text is one line that names the key (or file), the value and what to do; the commands print it
    without a traceback and exit with code 2.
    """
