"""Holds what is claimed of low-precision recipes against `study_recipes` and `study_optimizers`, seed by seed.

    python -m results.recipes.verdicts [--rows=DIR]      # prints tables in markdown; DIR has the tables of the studies

Two choices are compared on runs of one seed: they begin with the same parameters and see the same text in the same
order. Brackets are 95 % intervals of the mean difference, by Student's t with a standard deviation that is pooled over
the comparisons of one kind at one size. A difference is a verdict where its interval leaves out 0, and else undecided.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from configs import study_recipes
from precision_scaling.quantize.parsing import parse

HERE = Path(__file__).parent
M = study_recipes.M
RECIPE = "nvfp4_train"
RATE = 1.6e-2  # the peak rate of the study
# Methods and bits of PTQ, the first before it: of the optimizers' own rates, and of others.
POST = (("", 0), ("gptq", 4), ("gptq", 3), ("rtn", 4), ("rtn", 3))
RATED = (("", 0), ("gptq", 4), ("gptq", 3), ("smoothquant", 8), ("smoothquant", 4))


class Pair(NamedTuple):
    """Two choices, the second held against the first, on the rows where the columns have these values."""

    name: str
    before: dict
    after: dict
    where: dict


def table(path: Path) -> pd.DataFrame:
    """Rows of a study, whole numbers of tokens in millions, "" where nothing is said."""
    rows = pd.read_csv(path, low_memory=False)
    for column in ("method", "average", "optimizer"):
        rows[column] = rows[column].astype(object).fillna("")
    rows["M"] = (rows.D / M).round(2)
    return rows[rows.status == "ok"]


def said(text: str) -> dict:
    """The column that a precision of a grid comes to."""
    return {"precision": parse(text, study_recipes.get_config().precision).describe()}


def chosen(rows: pd.DataFrame, values: dict) -> pd.Series:
    """Losses by seed of the rows with these values. ValueError where a seed is there twice."""
    mask = np.logical_and.reduce([rows[name] == value for name, value in values.items()])
    found = rows[mask].set_index("seed").loss
    if not found.index.is_unique:
        raise ValueError(f"several rows of a seed with {values}")
    return found


def differences(rows: pd.DataFrame, pair: Pair) -> np.ndarray:
    """Of the seeds that both have."""
    after, before = chosen(rows, pair.where | pair.after), chosen(rows, pair.where | pair.before)
    return (after - before).dropna().to_numpy()


def compared(rows: pd.DataFrame, pairs: Iterable[Pair]) -> list[str]:
    """A line for each pair: (name, mean difference and its interval), with the spread of all of them."""
    found = [(pair.name, differences(rows, pair)) for pair in pairs]
    spread, degrees = pooled([values for _, values in found])
    return [f"| {name} | {shown(values, spread, degrees)} |" for name, values in found if len(values)]


def pooled(samples: list[np.ndarray]) -> tuple[float, int]:
    """(standard deviation of one value about its sample's mean, degrees of freedom)."""
    several = [sample for sample in samples if len(sample) > 1]
    degrees = sum(len(sample) - 1 for sample in several)
    squares = sum(float(np.sum((sample - sample.mean()) ** 2)) for sample in several)
    return (np.sqrt(squares / degrees) if degrees else np.nan), degrees


def shown(values: np.ndarray, spread: float, degrees: int) -> str:
    """The mean difference, its interval, and what it says."""
    half = stats.t.ppf(0.975, max(degrees, 1)) * spread / np.sqrt(len(values))
    verdict = "undecided" if not abs(values.mean()) > half else "lower" if values.mean() < 0 else "higher"
    return f"{values.mean():+.4f} ± {half:.4f} | {verdict} | {len(values)}"


def recipe_pairs(size: str) -> list[Pair]:
    """FP4 training against bf16 and its parts against the whole."""
    where = {"size": size, "M": 1.0, "schedule": "cosine"}
    bf16, nvfp4, whole = said("bf16"), said("nvfp4"), said(RECIPE)
    pairs = [
        Pair("nvfp4 over bf16", bf16, nvfp4, where),
        Pair("nvfp4_train over bf16", bf16, whole, where),
        Pair("nvfp4_train over nvfp4", nvfp4, whole, where),
    ]
    pairs += [
        Pair(f"nvfp4_train, {name}, over nvfp4_train", whole, said(text), where)
        for name, text in study_recipes.PARTS.items()
    ]
    for text in study_recipes.LAYERS:
        rules = text.partition(" ")[2].replace("=bf16", "")
        pairs.append(Pair(f"nvfp4 with {rules} in bf16 over nvfp4", nvfp4, said(text), where))
    return pairs


def block_pairs(size: str) -> list[Pair]:
    """Integers against floats in the same blocks, rotated or not."""
    where = {"size": size, "M": 1.0, "schedule": "cosine"}
    pairs = []
    for integer, floating in (("nvint4", "nvfp4"), ("mxint8", "mxfp8")):
        for rotation in ("", " rotation=hadamard"):
            texts = (f"w{name}_a{name}{rotation}" for name in (floating, integer))
            what = "rotated" if rotation else "plain"
            pairs.append(Pair(f"{integer} over {floating}, {what}", *map(said, texts), where))
        for name in (integer, floating):
            texts = (f"w{name}_a{name}{rotation}" for rotation in ("", " rotation=hadamard"))
            pairs.append(Pair(f"{name} rotated over plain", *map(said, texts), where))
            pairs.append(Pair(f"{name} over bf16", said("bf16"), said(f"w{name}_a{name}"), where))
    return pairs


def begin_lines(rows: pd.DataFrame) -> list[str]:
    """w4_a4 from a share of the steps on, over bf16 and over the share before it, at three D/N."""
    rows = rows[(rows["size"] == "53k") & (rows.schedule == "wsd")]
    rows = rows.assign(begin=rows.switched_share.fillna(0.0).where(rows.w_format == "int4", -1.0))
    lines, samples, steps = [], {}, {}
    for tokens in sorted(rows.M.unique()):
        at = rows[rows["M"] == tokens]
        bf16 = at[at.begin == -1.0].set_index("seed").loss
        before = None
        for begin in sorted(set(at.begin) - {-1.0}):
            low = at[at.begin == begin].set_index("seed").loss
            samples[tokens, begin] = (low - bf16).dropna().to_numpy()
            if before is not None:
                steps[tokens, begin] = (low - before).dropna().to_numpy()
            before = low
    of_bf16, of_step = pooled(list(samples.values())), pooled(list(steps.values()))
    for key, values in samples.items():
        step = shown(steps[key], *of_step) if key in steps else "| |"
        lines.append(f"| {key[0]:g}M | {key[1]:.2f} | {shown(values, *of_bf16)} | {step} |")
    return lines


def optimizer_lines(adamw: pd.DataFrame, muon: pd.DataFrame, of_delta: bool) -> list[str]:
    """Muon over AdamW, and averages over the last parameters: the loss before and after PTQ, or what PTQ adds to it."""
    rows = pd.concat([adamw, muon])
    rows["post"] = rows.P_post.fillna(0)
    lines = []
    for (size, tokens), at in rows.groupby(["size", "M"]):
        for low in ("bf16", "int4"):
            of, samples = at[at.w_format == low], {}
            for method, post in POST:
                measured = of[(of.method == method) & (of.post == post)]
                take = lambda o, a, measured=measured: chosen(measured, {"optimizer": o, "average": a})
                samples["Muon over AdamW", method, post] = take("muon", "") - take("adamw", "")
                for optimizer in ("adamw", "muon"):
                    for average in sorted(set(of.average) - {""}):
                        differs = take(optimizer, average) - take(optimizer, "")
                        samples[f"{optimizer}: {average} over the last", method, post] = differs
            if of_delta:
                samples = {key: values - samples[key[0], "", 0] for key, values in samples.items() if key[1]}
            found = {key: values.dropna().to_numpy() for key, values in samples.items()}
            spread, degrees = pooled(list(found.values()))
            for what in dict.fromkeys(what for what, *_ in found):
                cells = [cell(found[key], spread, degrees) for key in found if key[0] == what]
                lines.append(f"| {size} | {tokens:g}M | {low} | {what} | {' | '.join(cells)} |")
    return lines


def rate_lines(rows: pd.DataFrame) -> list[str]:
    """The loss by peak rate, before PTQ and after it, and Muon over AdamW, each at its best rate of those tried.

    smoothquant, of weights and activations, was asked of bf16 models at the rates near the best.
    """
    rows = rows[rows.average == ""].assign(post=lambda of: of.P_post.fillna(0))
    lines = []
    for (size, tokens), at in rows.groupby(["size", "M"]):
        for low in ("bf16", "int4"):
            means, samples = {}, {}
            for method, post in RATED:
                of = at[(at.w_format == low) & (at.method == method) & (at.post == post)]
                means[method, post] = of.groupby(["optimizer", "peak_rate"]).loss.mean()
                if of.empty:
                    continue
                best = lambda o, of=of, mean=means[method, post]: chosen(
                    of, {"optimizer": o, "peak_rate": mean[o].idxmin()}
                )
                samples[method, post] = (best("muon") - best("adamw")).dropna().to_numpy()
            # With activations in 4 bits seeds differ ten times as much: a spread of its own.
            alike = pooled([values for key, values in samples.items() if key != RATED[-1]])
            cells = {
                key: cell(values, *(pooled([values]) if key == RATED[-1] else alike)) for key, values in samples.items()
            }
            for optimizer, rate in means["", 0].index:
                found = [of.get((optimizer, rate), np.nan) for of in means.values()]
                numbers = " | ".join("" if np.isnan(mean) else f"{mean:.3f}" for mean in found)
                lines.append(f"| {size} | {tokens:g}M | {low} | {optimizer}, {rate:g} | {numbers} |")
            last = " | ".join(cells.get(key, "") for key in means)
            lines.append(f"| {size} | {tokens:g}M | {low} | Muon over AdamW, each at its best | {last} |")
    return lines


def recipe_rate_lines(rows: pd.DataFrame) -> list[str]:
    """53k at 1M: the loss of some choices by peak rate, and each at its best rate over bf16 at its best."""
    rates = [*sorted(rows[rows.peak_rate < RATE].peak_rate.unique()), RATE]
    tried = {}
    for schedule, texts in (("wsd", ("bf16", "w4_a4", "w4_a4 @decay")), ("cosine", ("bf16", "nvfp4", RECIPE))):
        for text in texts:
            where = {"size": "53k", "M": 1.0, "schedule": schedule, "average": "", **said(text)}
            of = {rate: chosen(rows, where | {"peak_rate": rate}) for rate in rates}
            tried[schedule, text] = {rate: losses for rate, losses in of.items() if len(losses)}
    best = {key: min(of.values(), key=lambda losses: losses.mean()) for key, of in tried.items()}
    over = {key: (best[key] - best[key[0], "bf16"]).dropna() for key in tried if key[1] != "bf16"}
    samples = {key: values.to_numpy() for key, values in over.items()}
    spread, degrees = pooled(list(samples.values()))
    lines = ["| schedule | | " + " | ".join(f"{rate:g}" for rate in rates) + " | over bf16, each at its best |"]
    lines.append("|---|---|" + "---:|" * (len(rates) + 1))
    for (schedule, text), of in tried.items():
        numbers = " | ".join(f"{of[rate].mean():.3f}" if rate in of else "" for rate in rates)
        last = cell(samples[schedule, text], spread, degrees) if (schedule, text) in samples else ""
        lines.append(f"| {schedule} | {text} | {numbers} | {last} |")
    return lines


def head(schemes: Iterable[tuple[str, int]]) -> str:
    """The two lines above `optimizer_lines` and `rate_lines`."""
    columns = [f"{method} {post}" if method else "before PTQ" for method, post in schemes]
    return f"| size | D | trained at | | {' | '.join(columns)} |\n|---|---:|---|---|" + "---:|" * len(columns)


def cell(values: np.ndarray, spread: float, degrees: int) -> str:
    """The mean difference and its interval, bold where it leaves out 0."""
    number, verdict, _ = shown(values, spread, degrees).split(" | ")
    return f"**{number}**" if verdict != "undecided" else number


def main() -> None:
    """Prints all tables that the rows allow."""
    folder = Path(next((word.partition("=")[2] for word in sys.argv[1:] if word.startswith("--rows=")), HERE))
    rows = table(folder / "recipes.csv.gz")
    for size in study_recipes.SIZES:
        for title, pairs in (("NVFP4 and its parts", recipe_pairs(size)), ("Integers or floats", block_pairs(size))):
            if lines := compared(rows, pairs):
                print(f"\n{title}, {size}\n\n| difference | nats | the loss is | seeds |\n|---|---:|---|---:|")
                print("\n".join(lines))
    print("\nWhen w4_a4 begins, 53k\n")
    print("| D | begins at | over bf16 | the loss is | seeds | over the share before | the loss is | seeds |")
    print("|---:|---:|---:|---|---:|---:|---|---:|")
    print("\n".join(begin_lines(rows)))
    if (folder / "recipes_rates.csv.gz").exists():
        both = pd.concat([rows, table(folder / "recipes_rates.csv.gz")], ignore_index=True)
        print("\nRates of recipes, 53k at 1M\n\n" + "\n".join(recipe_rate_lines(both)))
    if (folder / "muon.csv.gz").exists():
        adamw, muon = (table(folder / f"{name}.csv.gz") for name in ("adamw", "muon"))
        for title, of_delta in (("loss", False), ("what PTQ adds to the loss", True)):
            print(f"\nOptimizers and averages: {title}\n\n{head(POST[of_delta:])}")
            print("\n".join(optimizer_lines(adamw, muon, of_delta)))
        if (folder / "rates.csv.gz").exists():
            print(f"\nRates\n\n{head(RATED)}")
            print("\n".join(rate_lines(pd.concat([adamw, muon, table(folder / "rates.csv.gz")]))))


if __name__ == "__main__":
    main()
