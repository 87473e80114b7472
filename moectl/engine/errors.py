"""The ways a command can end before its work is done."""


class UserError(Exception):
    """Something the user can mend: a flag, a setting, a file. Exit code 2.

    Args:
        message: one sentence with the place, the value found and what was expected.
        hint: what to do about it; may be empty.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class RunFailed(Exception):  # noqa: N818 - a state of the run, like Interrupted
    """The run cannot go on, through no fault of the settings. Exit code 1."""


class Interrupted(Exception):  # noqa: N818 - not an error: the run can be resumed
    """Stopped early by a signal or a time limit, with everything saved. Exit code 75.

    Args:
        message: why and where.
        hint: how to go on.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
