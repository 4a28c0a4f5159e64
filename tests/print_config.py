"""A command that prints its config, options of one line each: what the command line makes of a value."""

from precision_scaling.config import command_line, options
from precision_scaling.runtime import cli


def _main(argv) -> None:
    del argv
    options.check(_CONFIG.value)
    for section, values in _CONFIG.value.to_dict().items():
        for name, value in values.items() if isinstance(values, dict) else ():
            print(f"{section}.{name} = {value!r}")


if __name__ == "__main__":
    _CONFIG = command_line.define_config()
    cli.run(_main)
