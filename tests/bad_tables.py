"""Inputs that the analysis commands must refuse, as data: arguments, changes to the files, words that must be said.

A case adds its arguments to those of GOOD, of which the last of a flag counts. A change is a function from the good
file's bytes to the bad one's; the good files are made in test_bad_tables.py.
"""

import functools
import gzip
import json

GOOD = {
    "fit": ("--runs=runs.csv", "--law=chinchilla", "--out=out.json", "--starts=4", "--noprofile"),
    "compare": ("--runs=runs.csv", "--out=out", "--laws=chinchilla,ptq", "--starts=4"),
    "report": ("--runs=runs.csv", "--out=out", "--laws=chinchilla", "--bootstrap=0"),
    "plan": ("--fit=loss.json,delta.json", "--flops=1e15", "--out=out.json"),
    "predict": ("--fit=loss.json,delta.json", "--runs=runs.csv", "--out=out.csv"),
}


def text(content):
    return lambda old: content if isinstance(content, bytes) else content.encode()


def replace(old, new, count=-1):
    return lambda data: data.decode().replace(old, new, count).encode()


def column(name, value):
    """Every cell of a column; `value` may be a function of the old cell and its row (a list of cells)."""

    def change(data):
        header, *rows = [line.split(",") for line in data.decode().splitlines()]
        at = header.index(name)
        for row in rows:
            row[at] = value(row[at], row) if callable(value) else value
        return "\n".join(",".join(row) for row in [header, *rows]).encode() + b"\n"

    return change


def cell(row, name, value):
    """One cell, rows counted from 0."""

    def change(data):
        header, *rows = [line.split(",") for line in data.decode().splitlines()]
        rows[row][header.index(name)] = value
        return "\n".join(",".join(cells) for cells in [header, *rows]).encode() + b"\n"

    return change


def every(*changes):
    """One change after the other."""
    return lambda data: functools.reduce(lambda old, change: change(old), changes, data)


def separated(separator):
    return lambda data: data.replace(b",", separator)


def first(count):
    """The header and the first rows alone."""
    return lambda data: b"\n".join(data.splitlines()[: count + 1]) + b"\n"


def entry(path, value):
    """An entry of a JSON file; `path` has dots between keys, and the value GONE takes the entry out."""

    def change(data):
        whole = json.loads(data)
        *parents, last = path.split(".")
        place = whole
        for key in parents:
            place = place[key]
        if value is GONE:
            del place[last]
        else:
            place[last] = value
        return json.dumps(whole).encode()

    return change


GONE = object()
HUGE = 10**400  # a whole number that no float holds


def cases_of_tables():
    """Tables that no command can use; each is given to one of the commands in turn."""
    yield text(b""), "not a readable CSV"
    yield text(b"\n\n\n"), "not a readable CSV"
    yield text("N,D,loss\n"), "the table has no rows"
    yield text("N,D,loss\n1e6,1e8,nan\n"), "no usable row of 1: 1 row left out: 1 loss is empty or NaN"
    yield text("N,D,loss\n1e6,1e8,3.1,7\n"), "not a readable CSV"
    yield text('N,D,loss\n"1e6,1e8,3.1\n'), "not a readable CSV"
    yield text('"N,D,loss\n1e6,1e8,3.1\n'), "not a readable CSV"
    yield cell(3, "seed", '"0'), "not a readable CSV"
    yield every(cell(3, "seed", '"0'), cell(5, "seed", '0"')), "row 4 has a line break in column 'seed'"
    yield text("1e6,1e8,3.1\n2e6,1e8,3.0\n"), "missing column N, D, loss"
    yield text("<html><body>Not found</body></html>"), "missing column"
    yield text('{"N": 3}'), "missing column"
    yield text(b"\x00\x01\x02\x03"), "NUL"
    yield text(b"N,D,loss\n1e6,1e8,3\xff\n"), "not UTF-8 text"
    yield text(b"\xff\xfeN\x00,"), "not UTF-16 text"
    yield text(b"PK\x03\x04 and the rest of a workbook"), "a zip archive or a workbook"
    yield text(b"PAR1 and the rest"), "a Parquet file"
    yield text(b"BZh9 and the rest"), "bzip2"
    yield text(b"\xfd7zXZ\x00 and the rest"), "xz"
    yield text(b"\x28\xb5\x2f\xfd and the rest"), "zstd"
    yield text(b"\x1f\x8b\x08 no gzip after all"), "gzip data are damaged"
    yield lambda data: gzip.compress(data)[:-20], "gzip data are damaged"
    yield separated(b";"), "separated by semicolons; want commas"
    yield separated(b"\t"), "separated by tabs; want commas"
    yield separated(b"|"), "separated by bars; want commas"
    yield replace("loss", "Loss", 1), "column 'Loss': did you mean 'loss'?"
    yield replace("N,D", "n,D", 1), "column 'n': did you mean 'N'?"
    yield replace("N,D", "N,d", 1), "column 'd': did you mean 'D'?"
    yield replace("P_post", "P_Post", 1), "column 'P_Post': did you mean 'P_post'?"
    yield replace("P_post", "ppost", 1), "column 'ppost': did you mean 'P_post'?"
    yield replace("P_post", "P_pots", 1), "column 'P_pots': did you mean 'P_post'?"
    yield replace("P_w", "p_w", 1), "column 'p_w': did you mean 'P_w'?"
    yield replace("run", "Run", 1), "column 'Run': did you mean 'run'?"
    yield replace("seed", "SEED", 1), "column 'SEED': did you mean 'seed'?"
    yield replace("loss", "val_loss", 1), "missing column loss", "did you mean val_loss?"
    yield replace("N,D", "params,tokens", 1), "missing column N, D", "did you mean params, tokens?"
    yield replace("N,D", "N,N", 1), "column N appears more than once"
    yield replace("seed", "loss", 1), "column loss appears more than once"
    yield column("N", "30M"), "N is not a number (such as '30M')"
    yield column("N", '"1,000,000"'), "N is not a number (such as '1,000,000')"
    yield column("N", "1_000_000"), "N is not a number (such as '1_000_000')"
    yield column("N", "1,000,000"), "not a readable CSV"
    yield column("loss", '"3,25"'), "loss is not a number (such as '3,25')"
    yield column("D", "10B"), "D is not a number (such as '10B')"
    yield column("D", "nan"), "D is empty or NaN"
    yield column("D", "inf"), "D is infinite"
    yield column("D", "-1e9"), "D is zero or negative"
    yield column("D", "0"), "D is zero or negative"
    yield column("N", "0.03"), "N is below 1"
    yield column("N", "1e300"), "N is above 1e+20"
    yield column("loss", "1e308"), "loss is above 1e+06"
    yield column("loss", "1e400"), "loss is infinite"
    yield column("loss", "-3"), "loss is zero or negative"
    yield column("P_w", "int4"), "P_w is not a number (such as 'int4')"
    yield column("P_w", "1e9"), "P_w is above 256"
    yield column("P_w", "-4"), "P_w is zero or negative"
    yield column("run", ""), "run is empty"
    yield every(column("run", "x"), column("N", "1e6"), column("D", "1e8")), "several losses for the same run and sett"


def cases_of_numbers():
    """(command, argument, words): numbers that a flag cannot take."""
    for command, flag in (("fit", "bootstrap"), ("fit", "starts"), ("report", "bootstrap"), ("compare", "starts")):
        for value in ("-1", "nan", "1e3", "1.5", "", "1000000000"):
            yield command, f"--{flag}={value}", flag
    for command in ("fit", "compare", "report", "predict"):
        for value in ("-1", "nan", "0.5"):
            yield command, f"--seed={value}", "seed"
    yield "fit", "--starts=0", "starts"
    yield "fit", "--bootstrap=1", "a 95 % interval takes at least 40 resamples"
    yield "fit", "--bootstrap=39", "at least 40"
    yield "report", "--bootstrap=1", "allowed is 40 or more"
    for command in ("fit", "predict"):
        for value in ("nan", "inf", "0", "1", "-0.95", "95", "half"):
            yield command, f"--level={value}", "level"
    for value in ("nan", "inf", "-1", "0", "x"):
        yield "fit", f"--huber_delta={value}", "huber_delta"
    for value in ("nan", "inf", "-4", "0", "5"):
        yield "fit", f"--serve_bits={value}", "serve_bits" if value in ("nan", "inf") else "bits"
    for value in ("nan", "inf", "-1", "0", "x"):
        yield "fit", f"--delta_floor={value}", "delta_floor"
        yield "compare", f"--huber_delta={value}", "huber_delta"
    for value in ("nan", "-inf", "-1", "0", "x", ""):
        yield "fit", f"--sweep_huber=1,{value}", "sweep_huber"
    for value in ("nan", "-1", "1.5", "100000"):
        yield "fit", f"--drop_worst={value}", "drop_worst"
    for value in ("nan", "inf", "x", "-1", "1e99"):
        yield "fit", f"--fixed=E={value}", "E"
    for flag in ("flops", "params", "tokens", "inference_tokens", "serve_bits", "context", "batch"):
        for value in ("nan", "inf", "-1", "1e400", "x"):
            yield "plan", f"--{flag}={value}", flag
    for flag in ("flops", "params", "tokens", "serve_bits", "batch"):
        yield "plan", f"--{flag}=0", flag
    for value in ("0", "-4", "nan", "inf", "33", "x", ""):
        yield "plan", f"--precision={value}", f"--precision={value}: format"
    for value in ("0", "nan", "fp", "33"):
        yield "plan", f"--kv-bits={value}", f"--kv_bits={value}: format"
    for value in ("", "24", "0GB", "-1GB", "24Gib", "24 gigabytes", "nanGB", "1e400GB", "1e99GB", "GiB", "1e13TB"):
        yield "plan", f"--memory={value}", f"--memory={value}: want"
    for value in ("", "32", "32x8", "32x8x0", "32x8x128x2", "32xfewx128", "-1x8x128", "32x8x1e3", "999999x8x128"):
        yield "plan", f"--layout={value}", f"--layout={value}: want layers x KV heads"
    for flag in ("vocab", "serve_group"):
        for value in ("-1", "1.5", "nan", "x", "1000000000"):
            yield "plan", f"--{flag}={value}", flag
    for value in ("bf16", "bf16:nan", "bf16:-1", "bf16:0", "bf16:inf", "bf16:1,fp16:2", ":1", "fp8:1e400"):
        yield "plan", f"--speeds={value}", "--speeds="
    for value in ("group_size", "group_size:", "group_size:nan", "group_size:inf", "group_size:-1", ":3", "foo:x"):
        yield "plan", f"--columns={value}", "--columns="
    for value in ("foo:1", "N:5", "P_w:4", "group_size:128"):
        yield "plan", f"--columns={value}", f"--columns={value.split(':')[0]}: no column that"


def cases_of_arguments():
    """(command, arguments, words): words that a flag cannot take, and outputs that cannot be written."""
    for command in GOOD:
        yield command, ("--out=runs.csv/x",), "--out=runs.csv/x cannot be written"
        yield command, (f"--out={'x' * 300}/out",), "--out="
        yield command, (f"--out={'x' * 300}",), "--out="
        yield command, ("--nothing=3",), "nothing"
        yield command, ("stray",), "unexpected argument 'stray'"
        yield command, ("--out=/proc/nowhere/out",), "--out=/proc/nowhere/out cannot be written"
    for command in ("fit", "plan", "predict"):
        yield command, ("--out=.",), "is a directory"
        yield command, ("--out=pipe",), "is not a regular file"
    for command in ("fit", "predict"):
        yield command, ("--out=runs.csv",), "runs.csv is what the command reads"
        yield command, ("--out=./runs.csv",), "runs.csv is what the command reads"
    for command in ("compare", "report"):
        yield command, ("--out=runs.csv",), "is not a directory"
    for command in ("plan", "predict"):
        yield command, ("--out=loss.json",), "loss.json is what the command reads"
    for command in ("fit", "compare", "report", "predict"):
        yield command, ("--runs=",), "--runs is required"
        yield command, ("--out=",), "--out is required"
        yield command, ("--runs=missing.csv",), "no table at missing.csv"
        yield command, ("--runs=.",), "a directory"
        yield command, ("--runs=pipe",), "pipe"
        yield command, ("--runs=/dev/null",), "/dev/null: is a device"
        yield command, ("--where=P_w",), "--where=P_w: allowed is name=value"
        yield command, ("--where=colour=red",), "no column colour"
        yield command, ("--where=N=many",), "column N holds numbers"
        yield command, ("--where=N=nan",), "no row has N=nan"
        yield command, ("--where=run=nobody",), "no row has run=nobody"
    for command in ("plan", "predict"):
        yield command, ("--fit=",), "--fit is required"
        yield command, ("--fit=missing.json",), "cannot read fit missing.json: No such file"
        yield command, ("--fit=.",), "a directory"
        yield command, ("--fit=pipe",), "pipe: is a pipe"
        yield command, ("--fit=runs.csv",), "runs.csv is not a fit: not JSON"
        yield command, ("--fit=loss.json,loss.json",), "loss"
        yield command, ("--fit=loss.json,",), "."
    yield "fit", ("--law=",), "--law is required"
    yield "fit", ("--law=chinchila",), "unknown law 'chinchila'"
    yield "fit", ("--loss=l1",), "loss"
    yield "fit", ("--stages=two",), "stages"
    yield "fit", ("--delta_residual=x",), "delta_residual"
    yield "fit", ("--fixed=A",), "--fixed=A: allowed is name=value"
    yield "fit", ("--fixed=E=1,E=2",), "each name once"
    yield "fit", ("--fixed=F=1",), "no parameter 'F'"
    yield "fit", ("--free=F",), "no parameter 'F'"
    yield "fit", ("--tied=beta=F",), "no parameter 'F'"
    yield "fit", ("--tied=beta=beta",), "the left one follows"
    yield "fit", ("--law=quartet",), "no row was trained below 16 bits"
    yield "fit", ("--law=qat",), "needs column group_size"
    yield "fit", ("--sigma_column=sigma",), "sigma"
    yield "fit", ("--sigma_column=run",), "run"
    yield "fit", ("--test=F=1",), "no parameter 'F'"
    yield "fit", ("--test=E",), "--test=E: allowed is name=value"
    for flag in ("fit_where", "test_where"):
        yield "fit", (f"--{flag}=N < 1e99",), "leaves no row of chinchilla"
        for expression in ("N <", "colour == 3", "N", "import os", "__class__", "N < (", "", "1", "run"):
            yield "fit", (f"--{flag}={expression}",), f"expression {expression!r}"
    yield "compare", ("--laws=precisoin",), "unknown law 'precisoin'"
    yield "compare", ("--laws=ptq,ptq",), "ptq is given more than once"
    yield "compare", ("--laws=ptq_unbiased",), "has no biases"
    yield "report", ("--laws=nope",), "'nope' is not one of"
    yield "plan", ("--fit=delta.json",), "no law of the loss"
    yield "plan", ("--fit=paper", "--flops=1e-3"), "--flops=0.001: want 1 to 1e+40"
    yield "plan", ("--fit=paper", "--flops=10"), "no model meets"
    yield "plan", ("--parts=w,x",), "'x' is not one of w, a, kv"
    yield "plan", ("--parts=w",), "--parts"
    yield "plan", ("--memory=1kB", "--vocab=32000"), "no model meets --flops=1e+15 --memory=1kB"
    yield "plan", ("--fit=loss.json,loss.json,delta.json",), "the same fit of the loss twice"
    yield "plan", ("--fit=loss.json,delta.json,delta.json",), "more than one law of δ"
    yield "plan", ("--precision=nvfp4",), "describes training in 16 bits only"
    yield "predict", ("--before=guessed",), "before"


def cases_of_fits():
    """Changes to loss.json, a fit of chinchilla with intervals, that nobody may read."""
    yield text(""), "not JSON"
    yield text("[]"), 'a fit needs "law"'
    yield text("[" * 100_000), "not JSON"
    yield text('{"law": "chinchilla"}'), 'a fit needs "law"'
    yield text('{"law": "nonsense", "params": {}}'), "unknown law 'nonsense'"
    yield text('{"law": "chinchilla", "params": {"A": 1, "A": 2}}'), "'A' appears twice"
    yield text('{"law": "chinchilla", "params": {"A": NaN}}'), "NaN is not a number"
    yield text('{"law": "chinchilla", "params": {"A": -Infinity}}'), "-Infinity is not a number"
    yield text(b"\xff\xfe{}"), "cannot read fit"
    yield entry("law", 3), 'a fit needs "law"'
    yield entry("law", GONE), 'a fit needs "law"'
    yield entry("params", GONE), 'a fit needs "law"'
    yield entry("params", [1]), 'a fit needs "law"'
    yield entry("law", "ptq"), "law ptq has no parameter"
    yield entry("params.A", 3.5), "params.A is 3.5, but values.A is"
    yield entry("values.E", 0.5), "but values.E is 0.5"
    yield entry("values.E", GONE), "values has no E"
    yield entry("params.E", GONE), "but params has no E"
    yield entry("params.F", 1.0), "no parameter 'F'"
    yield entry("values.F", 1.0), "no parameter 'F'"
    yield entry("params.A", "many"), 'params.A is "many": it must be a finite number or null'
    yield entry("params.A", True), "params.A is true"
    yield entry("params.A", HUGE), "params.A is 1000"
    yield entry("params.A", [1]), "params.A is [1]"
    yield entry("params.A", -3.0), "params.A is -3: it must not be negative"
    yield entry("values.A", None), "values.A is null"
    yield entry("values", [1, 2]), "values is [1, 2]: it must be an object"
    yield entry("refused", {"E": "for a reason"}), "but refused says that the table does not identify it"
    yield entry("refused", {"E": 3}), "refused.E is 3: it must be a text"
    yield entry("refused", {"F": "x"}), "no parameter 'F'"
    yield entry("ci", 3), "ci is 3: it must be an object"
    yield entry("ci.A", [1.0, 2.0]), "ci.A ends at 1, but its samples say"
    yield entry("reporting.level", 2.0), "reporting.level is 2"
    yield entry("ci", {"A": 3}), "ci.A is 3: it must be [low, high]"
    yield entry("ci", {"A": [1]}), "ci.A is [1]: it must be [low, high]"
    yield entry("ci", {"A": [2, 1]}), "ci.A is [2, 1]: it must be [low, high]"
    yield entry("ci", {"A": ["x", 1]}), 'ci.A is "x"'
    yield entry("ci", {"F": [1, 2]}), "no parameter 'F'"
    yield entry("r2", "good"), 'r2 is "good"'
    yield entry("r2", 0.1), "r2 is 0.1, but metrics.r2 is"
    yield entry("objective", {}), "objective is {}"
    yield entry("n", 7), "n is 7, but reporting counts"
    yield entry("n", -1), "n is -1: it must be a whole number from 0 up"
    yield entry("n", 2.5), "n is 2.5"
    yield entry("n", None), "n is null"
    yield entry("starts", "4"), 'starts is "4"'
    yield entry("seconds", None), "seconds is null"
    yield entry("columns", "N"), 'columns is "N": it must be a list of texts'
    yield entry("columns", ["N", 3]), "columns is 3"
    yield entry("columns", ["N", "P_w"]), "columns are N, P_w, but law chinchilla reads N, D"
    yield entry("notes", "a note"), "notes is"
    yield entry("notes", [3]), "notes is 3"
    yield entry("left_out", {"a reason": "many"}), "left_out.a reason is"
    yield entry("starts_at_best", "all"), "starts_at_best is"
    yield entry("metrics", []), "metrics is []: it must be an object"
    yield entry("identifiability", 1), "identifiability is 1"
    yield entry("reporting", "x"), "reporting is"
    yield entry("reporting.ranges", {"N": [1]}), "reporting.ranges.N is [1]"
    yield entry("reporting.ranges", {"N": 4}), "reporting.ranges.N is 4"
    yield entry("reporting.ranges", [1]), "reporting.ranges is [1]"
    yield entry("reporting.ranges", None), "reporting.ranges is null"
    yield entry("reporting.ranges", {"N": [None, 1]}), "reporting.ranges.N is [null, 1]: it must be [least, most]"
    yield entry("reporting.ptq_method", 3), "reporting.ptq_method is 3"
    yield entry("samples", [1]), "samples is [1]"
    yield entry("samples.A", 1), "samples.A is 1: it must be a list of numbers"
    yield entry("samples.A", ["x"]), "samples.A[0] is"
    yield entry("samples.A", [1.0, 2.0]), "samples hold 2 to"
    yield entry("samples.F", []), "no parameter 'F'"
    yield entry("samples", {"A": [1.0, -2.0]}), "samples.A holds -2"
    yield entry("residuals", [1]), "residuals is [1]"
    yield entry("residuals", {"before": "x"}), "residuals.before is"
    yield entry("serve_bits", "4"), 'serve_bits is "4"'
    yield entry("parms", {}), "key 'parms': did you mean 'params'?"
    yield entry("sample", {}), "key 'sample': did you mean 'samples'?"


def all_cases():
    """(command, arguments, {file: change}, words)."""
    readers = ("fit", "compare", "report", "predict")
    for i, (change, *words) in enumerate(cases_of_tables()):
        yield readers[i % 3], (), {"runs.csv": change}, tuple(words)
    for i, (change, *words) in enumerate(cases_of_fits()):
        yield ("plan", "predict")[i % 2], (), {"loss.json": change}, ("loss.json", *words)
    for command, argument, words in cases_of_numbers():
        yield command, (argument,), {}, (words,)
    for command, arguments, words in cases_of_arguments():
        yield command, arguments, {}, (words,)
    yield "fit", (), {"runs.csv": first(5)}, ("law chinchilla", "too few")
    yield (
        "fit",
        ("--law=ptq",),
        {"runs.csv": column("seed", lambda seed, row: "0" if row[6] else "1")},
        ("none usable",),
    )
    yield "fit", ("--law=qat",), {"runs.csv": replace("seed", "group_size", 1)}, ("group_size is zero or negative",)
    yield "predict", (), {"runs.csv": column("P_w", "4")}, ("no row of runs.csv can be predicted",)
    yield "predict", (), {"delta.json": entry("law", "ptk")}, ("delta.json is not a fit",)
    yield "plan", ("--serve-bits=4",), {"delta.json": every(entry("params.C_T", GONE), entry("values", GONE))}, ("C_T",)
