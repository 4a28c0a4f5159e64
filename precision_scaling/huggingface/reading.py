"""What a directory of others may hold: regular files of a bounded size, and JSON in which every key counts.

Used by `directory` and `safetensors`, which say what the content means.
"""

import json
import reprlib
from pathlib import Path
from typing import Any

from precision_scaling.errors import UserError
from precision_scaling.runtime import files

MAX_JSON = 100_000_000  # bytes; safetensors' own limit for a header, and far above any config.json


def regular_size(path: Path) -> int:
    """Size of a file in bytes. UserError for what is missing or no regular file: reading a pipe would never end.

    Symbolic links are followed: Hugging Face's cache keeps every file behind one.
    """
    try:
        files.check_regular(path)
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; allowed is a Hugging Face model directory") from None


def parse_json(text: bytes) -> dict[str, Any]:
    """An object of JSON. ValueError, in words, for anything else and for a key that stands twice in an object."""
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from None
    if not isinstance(found, dict):
        raise ValueError("not an object")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} stands there twice")
        found[key] = value
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. UserError, one line, where there is none."""
    size = regular_size(path)
    if size > MAX_JSON:
        raise UserError(f"{path}: {size} bytes; allowed is a JSON file of {MAX_JSON} bytes at most")
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; allowed is a file that can be read") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; allowed is a JSON object") from None


def shown(value: Any) -> str:
    """A value of a file in a message: in one line, and short, however long it is."""
    text = _SHORT.repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxdict = _SHORT.maxlist = 8
