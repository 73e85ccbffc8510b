"""The one exception for what a user can mend."""


class UserError(ValueError):
    """Bad input: the text says what was wrong, what was expected and which flag to change.

    The commands end with this text and exit status 1 in place of a traceback, see
    ``cli.command_line`` and, for fairseq's own commands, ``plugin.commands``.
    """
