"""Every error a user can cause, by what the user should do about it.

A message says what is wrong (with the value), what was expected, and the remedy. The command line
prints these without a traceback; anything else is a crash of ours and shows one.
"""


class AttendingError(Exception):
    """Base of all errors that a user can act on. Exit code 1 unless a subclass says otherwise."""

    exit_code = 1


class UsageError(AttendingError, ValueError):
    """An argument is wrong: change the command."""

    exit_code = 2


class ConfigError(AttendingError, ValueError):
    """A recipe or a `--set` is wrong: change the recipe."""

    exit_code = 2


class SourceError(AttendingError, ConnectionError):
    """A model or data set cannot be found, reached or verified: check its name, pull it again."""


class CheckpointError(AttendingError, RuntimeError):
    """A model folder or file is incomplete, damaged or of an unknown kind: replace it."""


class TokenizerError(AttendingError, ValueError):
    """A tokenizer or chat template is absent or cannot do what was asked."""


class ContextError(AttendingError, ValueError):
    """A prompt does not fit the model's context: shorten it."""


class EndpointError(AttendingError, ConnectionError):
    """A model endpoint failed after its bounded retries: check the address, the key, the limits."""

    status: int | None = None
    """The HTTP status of the last try, where there was one."""


class ReplyError(AttendingError, ValueError):
    """An endpoint answered, but the answer cannot be used; it is never scored as if it could."""


class TrainingError(AttendingError, RuntimeError):
    """Training cannot go on from here; the state saved last is whole. The message has a remedy."""


class CheckFailed(AttendingError, RuntimeError):  # noqa: N818  (a result, not a fault)
    """A gate or a verification ran to its end and said no."""

    exit_code = 3
