"""The flags that commands share: --workdir, and --config=FILE with its overrides --config.section.option=VALUE.

The overrides are those of ml_collections. A mistake in the file or in a name is one line; lists may be written
gptq,rtn and whole numbers 1e6.
"""

import ast
import importlib.machinery
import importlib.util
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any, cast

import ml_collections
from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import config_path, tuple_parser

from precision_scaling.config import base, options
from precision_scaling.errors import UserError
from precision_scaling.runtime import files


def define_workdir(values: flags.FlagValues, text: str) -> flags.FlagHolder[Path]:
    """Defines --workdir among `values`, which the command requires; the path may not exist yet and be in a bucket."""
    return cast("flags.FlagHolder[Path]", flags.DEFINE(_Directory(), "workdir", None, text, flag_values=values))


def define_config(
    values: flags.FlagValues, text: str = "Config file; any option in it can be overridden."
) -> flags.FlagHolder[ml_collections.ConfigDict]:
    """Defines --config among `values`; the holder's value is the config with its overrides.

    It has the options of config/base.py; their values are yet to be checked by `options.check`.
    """
    parsers = {bool: _Bool(), int: _Whole(), float: _Number(), tuple: _Tuple(), object: _WholeOrAuto()}
    for kind, parser in {**parsers, ml_collections.ConfigDict: _Section()}.items():
        config_flags.register_flag_parser_for_type(kind, parser)
    # Where ml_collections looks for overrides. It does so here, too, where a mistake would not be one line yet.
    arguments: list[str] = []
    holder = config_flags.DEFINE_config_file("config", None, text, values, sys_argv=arguments)
    values["config"].parser = _ConfigFile(arguments)
    return holder


class _Directory(flags.ArgumentParser):
    """A path that is a directory, or nothing yet, on this machine or in a bucket."""

    def parse(self, argument: str) -> Path:
        if not argument.strip():
            raise ValueError("allowed is the name of a directory")
        path = files.place(argument, "--workdir")
        if files.is_remote(path):
            return path
        try:
            there = next(place for place in (path, *path.absolute().parents) if place.exists())
            if not there.is_dir():
                raise ValueError(f"{there} is no directory; allowed is one, or a new one in one")
        except OSError as error:  # a name that is too long
            raise ValueError(f"{error.strerror}; allowed is a directory") from None
        return path

    def flag_type(self) -> str:
        return "directory"


class _ConfigFile(flags.ArgumentParser):
    """A config by `load_config`, with the names of its overrides checked.

    arguments: filled with those of the command line.
    """

    def __init__(self, arguments: list[str]):
        self._arguments = arguments

    def parse(self, argument: str) -> ml_collections.ConfigDict:
        self._arguments[:] = flags.FLAGS.read_flags_from_files(sys.argv[1:], force_gnu=False)
        if sum(bool(re.match(r"--?config(=|$)", given)) for given in self._arguments) > 1:
            raise UserError("--config is there twice; allowed is one config")
        config = load_config(argument)
        for given in self._arguments:
            if match := re.match(r"--?(?:no)?config\.([^=]*)(=auto$)?", given):
                _check_override(config, match[1], bool(match[2]))
        return config

    def flag_type(self) -> str:
        return "config file"


def load_config(argument: str) -> ml_collections.ConfigDict:
    """The config that a file's get_config() returns; "FILE:TEXT" passes it a text. Raises UserError."""
    path, *text = argument.split(":", 1)
    config = _load(path, text)
    if not isinstance(config, ml_collections.ConfigDict):
        found = type(config).__name__
        raise UserError(f"get_config() returns a {found}: allowed is a ConfigDict made from configs/base.py")
    options.check_names(config)
    config.lock()
    return config


def _load(path: str, arguments: list[str]) -> Any:
    """What get_config() in a file returns. UserError, with the line, for whatever goes wrong in there."""
    allowed = "allowed is a Python file with a function get_config(), e.g. configs/base.py"
    if not os.path.isfile(path):  # a pipe or a device would be waited for
        raise UserError(f"{'it is no regular' if os.path.exists(path) else 'there is no such'} file; {allowed}")
    loader = importlib.machinery.SourceFileLoader("config_file", path)
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None  # a loader is given
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module
    try:
        loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise UserError(f"there is no get_config() in it; {allowed}")
        return module.get_config(*arguments)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{_place(error, path)}{type(error).__name__}: {error}") from None


def _place(error: BaseException, path: str) -> str:
    """Where in the file it went wrong: "line 3: "."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"line {error.lineno}: "
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f"line {lines[-1]}: " if lines else ""


def _check_override(config: ml_collections.ConfigDict, name: str, automatic: bool) -> None:
    def refuse(said: str) -> None:
        raise flags.IllegalFlagValueError(f"--config.{name}: {said}")

    try:
        keys = config_path.split(name)
    except (ValueError, TypeError, SyntaxError):
        refuse("not the name of an option; allowed is --config.section.option=VALUE")
    section, prefix = config, ""
    for key in keys:
        if not isinstance(section, ml_collections.ConfigDict):
            refuse(f"config.{prefix.rstrip('.')} has no parts; allowed is --config.{prefix.rstrip('.')}=VALUE")
        if not isinstance(key, str) or key not in section:
            refuse(options.unknown(section, prefix, key))
        section, prefix = section[key], f"{prefix}{key}."
    if automatic and isinstance(section, ml_collections.ConfigDict) and name != "mesh":
        refuse("a section, of which mesh alone may be auto; allowed is --config.section.option=VALUE")


class _Bool(flags.BooleanParser):
    def parse(self, argument: str | int) -> bool:
        try:
            return super().parse(argument)
        except ValueError:
            raise ValueError("allowed is true or false") from None


class _Whole(flags.IntegerParser):
    """A whole number, which may be written as a float: 1e6."""

    def parse(self, argument: str | int) -> int:
        try:
            return super().parse(argument)
        except (ValueError, TypeError):
            pass
        try:
            value = float(argument)
            if value.is_integer():
                return int(value)
        except (ValueError, TypeError):
            pass
        raise ValueError("allowed is a whole number, e.g. 1000000, 1_000_000 or 1e6")


class _WholeOrAuto(_Whole):
    def parse(self, argument: str | int) -> Any:
        if argument == base.AUTO:
            return argument
        try:
            return super().parse(argument)
        except ValueError as error:
            raise ValueError(f"{error}, or {base.AUTO}") from None


class _Section(flags.ArgumentParser):
    """A section as Python writes a dict; of `mesh`, "auto" stands for what there is to choose."""

    def parse(self, argument: Any) -> ml_collections.ConfigDict:
        if isinstance(argument, ml_collections.ConfigDict):
            return argument
        if argument == base.AUTO:
            mesh = base.get_config().mesh
            mesh.run = mesh.fsdp = base.AUTO
            return mesh
        try:
            value = ast.literal_eval(argument)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise ValueError("a section; allowed is --config.section.option=VALUE")
        return ml_collections.ConfigDict(value)


class _Number(flags.FloatParser):
    def parse(self, argument: str | float) -> float:
        try:
            return super().parse(argument)
        except ValueError:
            raise ValueError("allowed is a number, e.g. 0.001 or 1e-3") from None


class _Tuple(tuple_parser.TupleParser):
    """A tuple as Python writes it, or its elements with commas between them: gptq,rtn or 3,4."""

    def parse(self, argument: Any) -> tuple:
        if not isinstance(argument, str):
            return super().parse(argument)
        try:
            value = ast.literal_eval(argument.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = tuple(element.strip() for element in argument.split(",") if argument.strip())
        if isinstance(value, dict | set):
            raise ValueError("allowed are elements with commas between them")
        return tuple(value) if isinstance(value, tuple | list) else (value,)
