"""Runs commands in the process of the tests, which keeps what was traced and compiled for the next one."""

import runpy
import sys
import warnings

import pytest


def do(module: str, *arguments: str, status: int = 0) -> None:
    """`python -m MODULE ARGUMENTS`; status: what it must end with."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in a process of its own
        patch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__")
    assert (ended.value.code or 0) == status, (module, arguments)
