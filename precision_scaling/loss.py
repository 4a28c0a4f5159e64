"""The loss of a trained run, or of one of its packed models, on its held-out text or on any other.

python -m precision_scaling.loss --workdir=DIR [--run=ID] [--quantized=gptq-4] [--text=FILE|DIRECTORY|PATTERN]

Text is .txt, .md, .jsonl, .json.gz or .parquet, as of the corpus "text" (docs/data.md); it is cut into windows of the
run's sequence length. Prints nats per token, perplexity, and bits per byte, which does not depend on the tokenizer.
"""

import functools
import sys

from absl import flags

from precision_scaling.config import command_line
from precision_scaling.errors import UserError
from precision_scaling.runtime import cli
from precision_scaling.study import text_loss
from precision_scaling.study.evaluate import evaluator
from precision_scaling.study.generate import trained_run
from precision_scaling.study.workspace import reopen_workspace

FLAGS = flags.FlagValues()
_WORKDIR = command_line.define_workdir(FLAGS, "The workdir of the run.")
_RUN = flags.DEFINE_string("run", "", "Id of the run; may be left out where there is one.", flag_values=FLAGS)
_QUANTIZED = flags.DEFINE_string(
    "quantized", "", "A packed model of the run (runs/ID/quantized/NAME, of ptq --save).", flag_values=FLAGS
)
_TEXT = flags.DEFINE_string("text", "", "Files to evaluate on; empty: the run's held-out text.", flag_values=FLAGS)
_FEATURE = flags.DEFINE_string("feature", "text", "Field or column that holds the text.", flag_values=FLAGS)
_TOKENS = flags.DEFINE_integer(
    "tokens", 0, "With --text: evaluate on the first so many tokens; 0: on all.", lower_bound=0, flag_values=FLAGS
)


def main() -> None:
    """Print the loss. Raises UserError."""
    if not _TEXT.value and (FLAGS["tokens"].present or FLAGS["feature"].present):
        raise UserError("--tokens and --feature: allowed with --text only")
    workspace = reopen_workspace(_WORKDIR.value)
    cohort, run = trained_run(workspace, _RUN.value)
    model = text_loss.model_of(workspace, cohort, run, _QUANTIZED.value)
    name = f"{run.id}{f', {_QUANTIZED.value}' if _QUANTIZED.value else ''}"
    if not _TEXT.value:
        loss = evaluator(workspace, run.shape, model.config.static)(model.params, model.grids)
        print(f"{name}: {loss:.4f} nats per token on its held-out text")
        return
    found = text_loss.on_text(workspace, model, _TEXT.value, _FEATURE.value, _TOKENS.value)
    print(
        f"{name}: {found.loss:.4f} nats per token, perplexity {found.perplexity:.4g}, {found.bits_per_byte:.4f} bits "
        f"per byte, over {found.tokens:,} tokens of {found.documents:,} documents"
    )


command = functools.partial(cli.run, main, FLAGS, required=("workdir",))

if __name__ == "__main__":
    sys.exit(command())
