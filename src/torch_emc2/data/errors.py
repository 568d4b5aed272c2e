"""What is said of data that is missing or wrong."""

__all__ = ["BadImageError", "DataError"]


class DataError(ValueError):
    """Data that is missing or wrong; the message is one line and says what to do."""

    def __init__(self, message: str) -> None:
        # A DataLoader raises a worker's error anew with the worker's traceback as its message; our line is its last.
        if message.startswith("Caught "):
            message = message.rstrip().rpartition("\n")[2].partition("Error: ")[2]
        super().__init__(message)


class BadImageError(DataError):
    """A file that should be an image and cannot be read as one; the message names it, and why."""
