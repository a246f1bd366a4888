"""The one kind of exception that entry points turn into a single line and exit code 2."""


class UserError(ValueError):
    """A mistake in a config, a file or an argument: one line that names what and how to mend it."""


class FunctionError(UserError):
    """A function of the user's own failed in the middle of a run; what was done is saved first."""
