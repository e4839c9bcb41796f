"""Errors that end a run with one clear line. Each class carries the process's exit code."""


class RunError(Exception):
    """Base: `str(error)` is the whole message (what, where, how to mend), `exit_code` what the process returns."""

    exit_code = 1
    one_process = False  # whether only this process of a job knows of it, so that it must speak for itself


class ConfigError(RunError):
    """A key, value or combination of the config that cannot work."""

    exit_code = 2


class DataError(RunError):
    """Images missing, unreadable, or unlike what the config says of them."""

    exit_code = 3


class Diverged(RunError):
    """Loss or gradient is NaN or infinite."""

    exit_code = 4


class StorageError(RunError):
    """A checkpoint or record that could not be written or read."""

    exit_code = 5


class Busy(RunError):
    """Another process is training the same run."""

    exit_code = 6


class Interrupted(RunError):
    """A signal asked the run to stop; its state is saved. `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number

    def saying(self, more: str) -> "Interrupted":
        """The same with a longer message."""
        return Interrupted(f"{self}{more}", self.exit_code - 128)
