"""Quantizes every trained run of a workdir after training and adds a row per bit-width to its runs.csv.

python -m precision_scaling.ptq --workdir=DIR --method=gptq --bits=3,4,5,6 [--group_size=32 --act_order --save]
"""

import functools
import sys

from absl import flags

from precision_scaling.config import command_line, options
from precision_scaling.errors import UserError
from precision_scaling.ptq import layers, packed, registry
from precision_scaling.ptq.scheme import GRANULARITIES, Scheme
from precision_scaling.runtime import cli, files, paths
from precision_scaling.study import locks, results
from precision_scaling.study.ptq import memory_text, quantize_missing
from precision_scaling.study.workspace import Workspace, reopen_workspace

FLAGS = flags.FlagValues()
_WORKDIR = command_line.define_workdir(FLAGS, "A workdir of train or study.")
_METHOD = flags.DEFINE_enum(
    "method", "gptq", list(registry.METHODS), "Post-training quantization method.", flag_values=FLAGS
)
_BITS = flags.DEFINE_list(
    "bits", None, "Bit-widths of integers, 2 to 8; 3,4,5,6 if neither these nor formats are given.", flag_values=FLAGS
)
_FORMATS = flags.DEFINE_list("formats", [], "Other formats of kernels, e.g. e4m3,nvfp4.", flag_values=FLAGS)
_SAVE = flags.DEFINE_bool(
    "save",
    False,
    "Keep the quantized models, packed, in runs/<id>/quantized: formats of 8 bits at most.",
    flag_values=FLAGS,
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print what it takes in memory, by the compiler, and stop.", flag_values=FLAGS
)
# Options of the method; what is not given is as in the workdir's config.
_GROUP_SIZE = flags.DEFINE_integer(
    "group_size", None, "Inputs that share a scale; 0: all of an output channel.", flag_values=FLAGS
)
_ASYMMETRIC = flags.DEFINE_bool("asymmetric", None, "Integer grids with a zero point.", flag_values=FLAGS)
_FULL_RANGE = flags.DEFINE_bool(
    "full_range", None, "Symmetric integer grids with all 2^b levels, not ±(2^(b-1) - 1) alone.", flag_values=FLAGS
)
_ACT_ORDER = flags.DEFINE_bool("act_order", None, "GPTQ: inputs by decreasing Hessian diagonal.", flag_values=FLAGS)
_CLIP = flags.DEFINE_bool(
    "clip",
    None,
    "Shrink ranges to the least squared rounding error, for GPTQ weighed by the Hessian.",
    flag_values=FLAGS,
)
_ROTATE = flags.DEFINE_bool(
    "rotate", None, "Rotate the residual stream first, by a matrix that goes into the weights.", flag_values=FLAGS
)
_CORRECT_INPUTS = flags.DEFINE_float(
    "correct_inputs",
    None,
    "GPTQ: share, 0 to 1, of the error of a kernel's inputs, as what makes them is quantized, that it is corrected for "
    "before it is rounded (GPTAQ).",
    flag_values=FLAGS,
)
_LAYERS = flags.DEFINE_string(
    "layers",
    None,
    "Bits or formats by layer and projection (qkv, out, gate_up, down), in place of the others: "
    "first:1=8,last:1=8,3-5.qkv=3,*.down=4.",
    flag_values=FLAGS,
)
_TARGET_BITS = flags.DEFINE_float(
    "target_bits",
    None,
    "Mean bits of a weight, e.g. 3.5: each projection gets one of --bits (2,3,4,5,6,8 if not given), by the loss that "
    "it is expected to cost.",
    flag_values=FLAGS,
)
_TARGET_BYTES = flags.DEFINE_float(
    "target_bytes",
    None,
    "The same from the size of the model exported with --dtype=bfloat16: codes, scales and all that is not quantized.",
    flag_values=FLAGS,
)
_SMOOTHING = flags.DEFINE_float(
    "smoothing", None, "SmoothQuant: share of the range that is moved, alpha.", flag_values=FLAGS
)
_GRANULARITY = flags.DEFINE_enum(
    "granularity", None, GRANULARITIES, "What shares a scale in activations, keys and values.", flag_values=FLAGS
)


def _bits(texts: list[str]) -> list[int]:
    for text in texts or [""]:
        if text.strip() not in map(str, range(2, 9)):
            raise UserError(f"--bits={','.join(texts)}: {text!r} is not allowed, whole numbers from 2 to 8 are")
    return sorted({int(text) for text in texts})


def _given() -> dict[str, object]:
    """The method's options that the flags give; checked."""
    values: dict[str, object] = {
        "group_size": _GROUP_SIZE.value,
        "symmetric": None if _ASYMMETRIC.value is None else not _ASYMMETRIC.value,
        "full_range": _FULL_RANGE.value,
        "act_order": _ACT_ORDER.value,
        "clip": _CLIP.value,
        "rotate": _ROTATE.value,
        "correct_inputs": _CORRECT_INPUTS.value,
        "layers": _LAYERS.value,
        "target_bits": _TARGET_BITS.value,
        "smoothing": _SMOOTHING.value,
        "granularity": _GRANULARITY.value,
    }
    given = {name: value for name, value in values.items() if value is not None}
    for name, value in given.items():
        options.check_option(f"ptq.{name}", value, shown=f"--{name}")
    return given


def _scheme(method: str, config, given: dict[str, object]) -> Scheme:
    """The scheme of a method with the config's options and, in their place, those given."""
    scheme = registry.of_method(method, {**config, **given})
    for name, value in given.items():
        if getattr(scheme, name) != value:  # the scheme keeps what its method has
            raise UserError(f"ptq.{name} = {value!r} with --method={method}: it has no such option")
    return scheme


def _target(workspace: Workspace, given: dict[str, object]) -> dict[str, object]:
    """The target in bits of --target_bytes, of which the whole model in 16 bits counts, beside its codes."""
    if _TARGET_BYTES.value is None:
        return {}
    if "target_bits" in given:
        raise UserError(f"--target_bytes={_TARGET_BYTES.value:g}: allowed without --target_bits, which says the same")
    if len(workspace.experiment.runs) != 1:
        raise UserError(
            f"--target_bytes={_TARGET_BYTES.value:g}: allowed with a workdir of one run; --target_bits has none"
        )
    (run,), scheme = workspace.experiment.runs, _scheme(_METHOD.value, workspace.experiment.config.ptq, given)
    bits, least = registry.target_bits(scheme, run.shape.model, _TARGET_BYTES.value)
    if not 2 <= bits <= 8:
        most = least + (8 - 2) / 8 * sum(registry.sizes(run.shape.model).values()) * run.shape.model.depth
        raise UserError(
            f"--target_bytes={_TARGET_BYTES.value:.6g}: allowed is {least:.6g} (2 bits) to {most:.6g} (8 bits)"
        )
    return {"target_bits": bits}


def _sizes(workspace: Workspace, scheme: Scheme) -> list[str]:
    """A line for each packed model of a scheme: where it is and what it takes."""
    lines = []
    for run in workspace.experiment.models(workspace.experiment.runs):
        for row in results.read_rows(workspace.directory(run), scheme.name):
            path = paths.packed(workspace.directory(run), scheme.name, row["P_post"])
            if files.exists(path / paths.DESCRIPTION):
                loaded = packed.load(path)
                arrays = packed.packed_bytes(loaded.model, loaded.bits)
                lines.append(f"{path}: {packed.bytes_on_disk(path):,} bytes on disk for {arrays:,} of packed arrays")
    return lines


def main() -> None:
    """Quantize and evaluate as the flags say, and print where the rows are. Raises UserError."""
    workdir, given, formats = _WORKDIR.value, _given(), tuple(name.strip() for name in _FORMATS.value)
    options.check_option("ptq.formats", formats, shown="--formats")
    wanted = None if _BITS.value is None else _bits(_BITS.value)
    workspace = reopen_workspace(workdir)
    given |= _target(workspace, given)
    usual = [2, 3, 4, 5, 6, 8] if given.get("target_bits") else [3, 4, 5, 6]
    bits = wanted if wanted is not None else [] if formats else usual
    chosen = {**workspace.experiment.config.ptq, **given, "methods": (_METHOD.value,), "bits": bits, "formats": formats}
    _scheme(_METHOD.value, chosen, given)
    options.check_ptq(chosen)
    if _DRY_RUN.value:
        print(memory_text(workspace, chosen, _SAVE.value))
        return
    try:
        with locks.hold(workdir, (0, 1)):  # no study may be writing rows of the same runs
            warnings = quantize_missing(
                workspace, [_METHOD.value], bits, everything=True, options=given, save=_SAVE.value, formats=formats
            )
    finally:
        rows = results.gather(workdir)
    schemes = [scheme for scheme, _ in registry.planned(chosen)]
    runs = workspace.experiment.models(workspace.experiment.runs)
    figures = [layers.draw(workspace.directory(run), scheme.name) for run in runs for scheme in schemes]
    drawn = [f"error by layer: {figure}" for figure in figures if figure]
    sizes = [line for scheme in schemes for line in _sizes(workspace, scheme)] if _SAVE.value else []
    print("\n".join([*warnings, *drawn, *sizes, f"{rows} measured losses in {workdir / paths.TABLE}"]))


command = functools.partial(cli.run, main, FLAGS, required=("workdir",))

if __name__ == "__main__":
    sys.exit(command())
