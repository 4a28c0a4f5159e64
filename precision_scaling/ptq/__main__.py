"""Quantizes every trained run of a workdir after training and adds a row per bit-width to its runs.csv.

python -m precision_scaling.ptq --workdir=DIR --method=gptq|awq|rtn --bits=3,4,5,6
"""

from pathlib import Path

from absl import flags

from precision_scaling import bench as bench_lib
from precision_scaling import errors, results
from precision_scaling.errors import UserError
from precision_scaling.ptq import METHODS
from precision_scaling.ptq.runs import quantize_missing


def _bits(texts: list[str]) -> list[int]:
    for text in texts:
        if not text.strip().isdigit() or not 2 <= int(text) <= 8:
            raise UserError(f"--bits={','.join(texts)}: {text!r} is not allowed, whole numbers from 2 to 8 are")
    return sorted({int(text) for text in texts})


def _main(argv) -> None:
    del argv
    workdir, bits = Path(_WORKDIR.value).expanduser(), _bits(_BITS.value)
    bench = bench_lib.reopen_bench(workdir)
    try:
        warnings = quantize_missing(bench, [_METHOD.value], bits, everything=True)
    finally:
        rows = results.gather(workdir)
    print("\n".join([*warnings, f"{rows} measured losses in {workdir / 'runs.csv'}"]))


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "A workdir of train or study.")
    _METHOD = flags.DEFINE_enum("method", "gptq", METHODS, "Post-training quantization method.")
    _BITS = flags.DEFINE_list("bits", ["3", "4", "5", "6"], "Bit-widths of the weights.")
    flags.mark_flags_as_required(["workdir"])
    errors.run(_main)
