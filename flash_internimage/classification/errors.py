"""Configuration errors, and error messages on one line."""


class ConfigError(ValueError):
    """Raised for a configuration that cannot be used; the message says where and why."""


def one_line(error: BaseException) -> str:
    """Return an error message on one line, or the type of the error if there is no message."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.500}"


def describe(error: BaseException) -> str:
    """Return an error message without the traceback that DataLoader adds to errors of workers."""
    message = str(error)
    if message.startswith("Caught ") and "\nOriginal Traceback" in message:
        message = message.rstrip().splitlines()[-1].partition(": ")[2]
    return message
