"""The one exception for what a user can mend."""


class UserError(SystemExit, ValueError):
    """Bad input: the text says what was wrong, what was expected and which flag to change.

    It is a ``ValueError`` for code that calls the library, and a ``SystemExit`` so that the stock
    commands (``fairseq-eval-lm``), which catch nothing, end with this text and exit status 1
    instead of a traceback that hides it.
    """
