"""The exceptions that entry points turn into a single line and an exit code of their own."""

import os


class UserError(ValueError):
    """A mistake in a config, a file or an argument: one line that names what and how to mend it."""

    exit_code = 2


class TransientError(UserError):
    """Something around the program failed (disk, bucket, network, a host): the same line may work later."""

    exit_code = os.EX_TEMPFAIL  # 75


class FunctionError(UserError):
    """A function of the user's own failed in the middle of a run; what was done is saved first."""
