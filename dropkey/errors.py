"""Errors that end a run with one clear line. Each class carries the process's exit code."""


class RunError(Exception):
    """Base class.

    Attributes:
        exit_code: what the process returns.
        one_process: whether only this process of a job knows the error, so that it must print it itself.
    """

    exit_code = 1
    one_process = False

    def __str__(self) -> str:
        return str(self.args[0])


class ConfigError(RunError):
    """A key, value or combination of the config that cannot work."""

    exit_code = 2


class DataError(RunError):
    """Images that are missing, unreadable, or unlike what the config says of them."""

    exit_code = 3


class Diverged(RunError):
    """Loss or gradient is NaN or infinite."""

    exit_code = 4


class StorageError(RunError):
    """A checkpoint or record that cannot be written or read."""

    exit_code = 5


class Busy(RunError):
    """Another process is training the same run."""

    exit_code = 6


class Interrupted(RunError):
    """A signal asked the run to stop; its state is saved. `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message, signal_number)  # what pickle calls the class with
        self.exit_code = 128 + signal_number
