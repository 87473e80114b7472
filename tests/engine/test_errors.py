"""Errors carry what the user needs."""

from moectl.engine.errors import Interrupted, RunFailed, UserError


def test_user_error_has_message_and_hint() -> None:
    error = UserError("lr = -1: expected more than 0", "set optim.lr")
    assert (str(error), error.message, error.hint) == (error.message, *error.args, "set optim.lr")
    assert UserError("x").hint == ""


def test_kinds_are_not_each_other() -> None:
    kinds = (UserError, RunFailed, Interrupted)
    assert not any(issubclass(a, b) for a in kinds for b in kinds if a is not b)
