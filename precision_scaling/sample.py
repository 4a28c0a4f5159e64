"""Text from a trained run, one token after the other.

python -m precision_scaling.sample --workdir=DIR [--run=ID] --prompt='def main(' [--tokens=100] [--temperature=0.8]

The prompt begins a document. For looking at what a model has learned: each token takes a forward pass over a window.
"""

import codecs
import functools
import sys

from absl import flags

from precision_scaling.config import command_line
from precision_scaling.runtime import cli
from precision_scaling.study import generate
from precision_scaling.study.workspace import reopen_workspace

FLAGS = flags.FlagValues()
_WORKDIR = command_line.define_workdir(FLAGS, "The workdir of the run.")
_RUN = flags.DEFINE_string("run", "", "Id of the run; may be left out where there is one.", flag_values=FLAGS)
_PROMPT = flags.DEFINE_string("prompt", "", "Text to continue; empty: the beginning of a document.", flag_values=FLAGS)
_TOKENS = flags.DEFINE_integer("tokens", 100, "Tokens at most.", lower_bound=1, flag_values=FLAGS)
_TEMPERATURE = flags.DEFINE_float(
    "temperature",
    0.0,
    "0: the likeliest token; 1: the model's distribution.",
    lower_bound=0,
    flag_values=FLAGS,
)
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling.", lower_bound=0, flag_values=FLAGS)


def main() -> None:
    """Print the prompt and what follows it, as it is made. Raises UserError."""
    workspace = reopen_workspace(_WORKDIR.value)
    continued = generate.continuation(
        workspace, _PROMPT.value, _TOKENS.value, _TEMPERATURE.value, _SEED.value, _RUN.value
    )
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may be a part of a character
    print(_PROMPT.value, end="", flush=True)
    for piece in continued:
        print(decoder.decode(piece), end="", flush=True)
    print(decoder.decode(b"", final=True))


command = functools.partial(cli.run, main, FLAGS, required=("workdir",))

if __name__ == "__main__":
    sys.exit(command())
