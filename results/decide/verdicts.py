"""Holds the predictions on record against the losses measured since: which law was right where it was not fitted.

    python results/decide/verdicts.py            # prints; needs pandas only, and none of the project's code

An error is log(predicted / measured). "mapped" predictions are carried to the new corpus by the line that twelve models
trained on both corpora gave before the study began. Brackets are 95 % intervals of a bootstrap over runs, in which two
laws are always compared on the same runs.
"""

from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).parent
INTERCEPT, SLOPE = -0.0731, 1.0943  # log L on the new corpus, from log L on the first
DRAWS = 2000
INTEGERS = {"bf16", "int2", "int3", "int4", "int5", "int6", "int7", "int8", "int10", "int12"}
LAWS = ("capacity_noise", "noise", "power_laws", "capacity_gmse", "d_eff", "n_and_d_eff", "precision")
KEY = ["run", "method", "P_post"]


def mapped(loss):
    """A loss on the first corpus (nats per token) as the new corpus would show it."""
    return np.exp(INTERCEPT + SLOPE * np.log(loss))


def rms(errors: pd.Series) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))


def ratio_of_rms(errors: pd.Series, others: pd.Series) -> str:
    """rms(errors) / rms(others), both indexed by run first, with its interval over runs."""
    squares = pd.DataFrame({"a": errors**2, "b": others**2}).groupby(level="run").sum()
    draws = np.random.default_rng(0).integers(0, len(squares), (DRAWS, len(squares)))
    sums = squares.to_numpy()[draws].sum(axis=1)
    low, high = np.quantile(np.sqrt(sums[:, 0] / sums[:, 1]), (0.025, 0.975))
    return f"{rms(errors) / rms(others):.2f} [{low:.2f}, {high:.2f}]"


def tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rows measured, predictions), each indexed by (run, method, P_post); method "" and P_post 0 before PTQ."""
    index = lambda rows: rows.assign(method=rows.method.fillna(""), P_post=rows.P_post.fillna(0)).set_index(KEY)
    rows = index(pd.read_csv(HERE / "runs.csv.gz", low_memory=False))
    rows = rows[(rows.status == "ok") | rows.status.isna()]
    before = rows.xs(("", 0.0), level=("method", "P_post")).loss
    rows["before"] = before.reindex(rows.index.get_level_values("run")).to_numpy()
    rows["delta"] = rows.loss - rows.before
    predictions = index(pd.read_csv(HERE / "predictions.csv.gz", low_memory=False)).reset_index()
    # Second predictions of four runs in blocks, made before any run had ended, see README.md.
    blocks = pd.read_csv(HERE / "predictions_of_blocks.csv").assign(method="", P_post=0.0)
    key = ["law", *KEY]
    predictions = predictions.set_index(key)
    predictions.update(blocks.set_index(key)[["predicted", "low", "high"]])
    return rows, predictions.reset_index().set_index(KEY)


def kinds(rows: pd.DataFrame) -> pd.Series:
    """What each run asks: bf16, one low part, several (tied or at random), or floating point and blocks."""
    formats = rows[["w_format", "a_format", "k_format"]]
    low = (rows[["P_w", "P_a", "P_kv"]] < 16).sum(axis=1)
    kind = low.map({0: "bf16", 1: "one part", 2: "several parts", 3: "several parts"})
    return kind.mask(~formats.isin(INTEGERS).all(axis=1), "floats, blocks")


def judge_losses(rows: pd.DataFrame, predictions: pd.DataFrame) -> None:
    """The loss before PTQ by every law that reads precision."""
    rows = rows[(rows.index.get_level_values("method") == "") & (rows.schedule == "cosine")]
    kind, measured = kinds(rows), rows.loss
    table = {law: predictions[predictions.law == law].reindex(rows.index) for law in LAWS}
    splits = {
        "all": rows.index == rows.index,
        **{name: kind == name for name in ("bf16", "one part", "several parts", "floats, blocks")},
        **{f"N = {size}": rows["size"] == size for size in rows["size"].unique()},
        "D above 8M (new)": rows.D > 8.1e6,
        "all but 2-bit parts": rows[["P_w", "P_a", "P_kv"]].min(axis=1) > 2,
    }
    for title, change in (("as predicted", lambda loss: loss), ("mapped", mapped)):
        print(f"\nLoss before PTQ, {title}: rms error in %, mean error in % of all, ratio to `precision`, coverage")
        errors = {law: np.log(change(found.predicted)) - np.log(measured) for law, found in table.items()}
        print(f"{'split':22}{'runs':>5}" + "".join(f"{law:>15}" for law in LAWS))
        for name, chosen in splits.items():
            figures = "".join(f"{100 * rms(errors[law][chosen]):15.2f}" for law in LAWS)
            print(f"{name:22}{int(np.sum(chosen)):5}{figures}")
        integers, above_two = kind != "floats, blocks", rows[["P_w", "P_a", "P_kv"]].min(axis=1) > 2
        for law, found in table.items():
            within = (change(found.low) <= measured) & (measured <= change(found.high))
            against = ratio_of_rms(errors[law][integers], errors["precision"][integers])
            chosen = integers & above_two
            without = ratio_of_rms(errors[law][chosen], errors["precision"][chosen])
            print(
                f"  {law:16} mean {100 * errors[law].mean():+6.2f}   over `precision`, integers: {against:20} "
                f"3 bits and more: {without:20} in the interval {100 * within.mean():5.1f} %"
            )


def judge_deltas(rows: pd.DataFrame, predictions: pd.DataFrame) -> None:
    """The loss as served: what was measured before PTQ plus the predicted delta."""
    rows = rows[(rows.index.get_level_values("method") != "") & (rows.schedule == "cosine")]
    high = rows[["P_w", "P_a", "P_kv"]].min(axis=1) >= 16
    for title, chosen, names in (
        ("bf16 models", high, ("ptq", "qid", "ptq_noise")),
        ("all models, GPTQ", slice(None), ("unified", "unified_noise")),
    ):
        print(f"\nLoss as served, {title}: rms error in % (measured loss before PTQ plus predicted delta), by P_post")
        for method in ("gptq", "rtn", "awq") if "ptq" in names else ("gptq",):
            part = rows[chosen].xs(method, level="method", drop_level=False)
            errors = {}
            for law in names:
                found = predictions[predictions.law == f"{law}-{method}"].predicted_delta.reindex(part.index)
                errors[law] = np.log((part.before + found).clip(lower=1e-3)) - np.log(part.loss)
            bits = part.index.get_level_values("P_post")
            for law, error in errors.items():
                by_bits = " ".join(f"{100 * rms(error[bits == b]):7.2f}" for b in sorted(set(bits)))
                against = ratio_of_rms(error.dropna(), errors[names[0]][error.notna()].dropna())
                print(f"  {method:5}{law:14}{100 * rms(error):7.2f} of {error.notna().sum():4}: {by_bits}   {against}")


def best_precisions(rows: pd.DataFrame) -> None:
    """Runs of equal N·D·P with all parts at P bits: the best P at each size and budget, without any law."""
    rows = rows[rows.index.get_level_values("method") == ""]
    integers = kinds(rows) != "floats, blocks"
    tied = rows[(rows.P_w == rows.P_a) & (rows.P_a == rows.P_kv) & (rows.schedule == "cosine") & integers]
    cost = (tied.N * tied.D * tied.P_w / 16).round(-9)
    print("\nEqual N·D·P: loss by bits, all parts")
    for product in (2.7e10, 2.1e11):
        near = tied[(cost > 0.97 * product) & (cost < 1.03 * product)]
        for size, group in near.groupby("size"):
            losses = group.groupby("P_w").loss.mean()
            if len(losses) > 2:
                print(f"  N·D·P/16 = {product:.1e}, {size}: " + "  ".join(f"{b:g}: {v:.4f}" for b, v in losses.items()))


def largest(rows: pd.DataFrame, predictions: pd.DataFrame) -> None:
    """The largest model at its largest budget."""
    run = "1.6M-D16000000-bf16-s0-14afd1"
    if (run, "", 0.0) not in rows.index:
        print(f"\n{run}: not measured yet")
        return
    loss = rows.loss[run, "", 0.0]
    print(f"\n{run}: measured {loss:.4f}")
    for law, found in predictions.xs((run, "", 0.0)).set_index("law").predicted.items():
        print(f"  {law:18}{found:.4f} ({100 * (found / loss - 1):+.1f} %), mapped {mapped(found):.4f} ", end="")
        print(f"({100 * (mapped(found) / loss - 1):+.1f} %)")


if __name__ == "__main__":
    measured, predicted = tables()
    runs = measured.index.get_level_values("run").nunique()
    print(f"{runs} runs, {len(measured)} losses measured; {predicted.law.nunique()} fits predicted them")
    judge_losses(measured, predicted)
    judge_deltas(measured, predicted)
    best_precisions(measured)
    largest(measured, predicted)
