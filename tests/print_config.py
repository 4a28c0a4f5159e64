"""A command that prints its config, options of one line each: what the command line makes of a value."""

import sys

from absl import flags

from precision_scaling.config import command_line, options
from precision_scaling.runtime import cli

FLAGS = flags.FlagValues()
_CONFIG = command_line.define_config(FLAGS)


def main() -> None:
    options.check(_CONFIG.value)
    for section, values in _CONFIG.value.to_dict().items():
        for name, value in values.items() if isinstance(values, dict) else ():
            print(f"{section}.{name} = {value!r}")


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS))
