"""Errors that a user can mend: one line that names the key, the value and what is allowed."""


class UserError(ValueError):
    """Something the user gave cannot be used; the message is one line, shown without a traceback."""


class ConfigError(UserError):
    """An option of the config cannot be used."""

    def __init__(self, key: str, value: object, allowed: str):
        """key: without "config.", or a flag with its dashes, which stands for an option."""
        name = key if key.startswith("--") else f"config.{key}"
        super().__init__(f"{name} = {_shown(value)}: allowed is {allowed}")


def _shown(value: object) -> str:
    """The value as it is written in Python, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print a whole number of thousands of digits
        return f"a {type(value).__name__} of more digits than can be printed"
    text = " ".join(text.splitlines())
    return text if len(text) <= 200 else f"{text[:200]}..."
