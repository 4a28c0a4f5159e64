"""A table gives the same δ, fits and intervals for any order of its rows, any duplicates and any names of its runs;
or it is an error.
"""

import dataclasses
import gzip

import numpy as np
import pandas as pd
import pytest

from analysis import laws
from analysis import table as tables
from analysis.fitting import caveats, comparison
from analysis.fitting.fit import fit
from analysis.fitting.multistart import least_resamples, too_few_runs
from analysis.fitting.options import FitError
from analysis.fitting.setup import set_up
from analysis.table.columns import SETTINGS
from analysis.table.reading import TableError

TRUTH = {"A": 30.0, "alpha": 0.3, "B": 200.0, "beta": 0.4, "E": 0.9}
DELTA = {"C_T": 0.01, "gamma_D": 0.4, "gamma_N": 0.3, "gamma_post": 0.7}


def study(rng, sizes=3, budgets=4, seeds=2, posts=(3, 4), methods=("gptq", "rtn")) -> pd.DataFrame:
    """Every run under a name of its own, quantized by each method to each number of bits; losses with noise."""
    rows = []
    for n in np.geomspace(1e5, 3e6, sizes).round():
        for d in np.geomspace(1e6, 6e7, budgets).round():
            for seed in range(seeds):
                loss = laws.predict("chinchilla", TRUTH, N=n, D=d) * np.exp(rng.normal(0, 0.01))
                at = {"run": f"{n:g}-{d:g}-{seed}", "N": n, "D": d, "seed": seed, "dataset": "c4"}
                rows.append({**at, "P_post": np.nan, "method": "", "loss": loss, "seconds": rng.uniform(1, 9)})
                for method in methods:
                    for post in posts:
                        delta = laws.predict("ptq", DELTA, N=n, D=d, P_post=post) * np.exp(rng.normal(0, 0.1))
                        rows.append({**at, "P_post": post, "method": method, "loss": loss + delta, "seconds": 1.0})
    return pd.DataFrame(rows)


def shuffled(frame, rng):
    return frame.sample(frac=1, random_state=rng).reset_index(drop=True)


def repeated(frame, rng):
    return shuffled(pd.concat([frame, frame.sample(frac=rng.uniform(0.1, 2), replace=True, random_state=rng)]), rng)


def renamed(frame, rng):
    names = frame["run"].unique()
    return frame.assign(run=frame["run"].map(dict(zip(names, rng.permutation(len(names)), strict=True))))


def copied(frame, rng):
    return shuffled(pd.concat([frame, frame.assign(run="again " + frame["run"])]), rng)


def with_base_at_every_method(frame, rng):
    """A long table: the loss before PTQ stands at every method again."""
    before = frame[frame["P_post"].isna()]
    return shuffled(
        pd.concat([frame[frame["P_post"].notna()], *(before.assign(method=m) for m in ("gptq", "rtn"))]), rng
    )


SAME = [shuffled, repeated, renamed, copied, with_base_at_every_method]


def deltas_by_loss(table) -> dict[float, float]:
    """δ of every row after PTQ by its own loss, which no other row has."""
    deltas = table.deltas()
    return dict(zip(deltas["loss"], deltas["delta"], strict=True))


def load(frame) -> tables.Table:
    return tables.from_columns(dict(frame.items()))


@pytest.mark.parametrize("change", SAME, ids=lambda change: change.__name__)
def test_deltas_are_those_of_the_clean_table(change):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        clean = study(rng, seeds=1 + seed % 3)
        changed = load(change(clean, rng))
        assert deltas_by_loss(changed) == deltas_by_loss(load(clean))
        assert len(set(changed.models)) == clean["run"].nunique()


@pytest.mark.parametrize("law", [pytest.param("chinchilla", marks=pytest.mark.slow), "ptq"])
def test_fits_and_intervals_are_those_of_the_clean_table(law):
    rng = np.random.default_rng(0)
    clean = study(rng, seeds=1)
    wanted = fit(law, load(clean), starts=4, bootstrap_resamples=40, profile=False)
    for change in SAME:
        found = fit(law, load(change(clean, rng)), starts=4, bootstrap_resamples=40, profile=False)
        assert (found.n, found.params, found.ci, found.samples) == (wanted.n, wanted.params, wanted.ci, wanted.samples)


@pytest.mark.slow
def test_comparisons_are_those_of_the_clean_table():
    rng = np.random.default_rng(0)
    clean = study(rng, seeds=1)
    wanted, *found = (
        comparison.compare(load(table), ("ptq", "qid"), starts=8, resamples=100)
        for table in (clean, *(change(clean, rng) for change in SAME))
    )
    for one in found:
        for row, other in zip(one.rows, wanted.rows, strict=True):
            assert (row.law, row.held_out, row.difference) == (other.law, other.held_out, other.difference)


def test_runs_that_share_a_name_are_told_apart_by_their_settings():
    rng = np.random.default_rng(1)
    clean = study(rng)
    names = {"one": "x", "by seed": "seed " + clean["seed"].astype(str), "by size": clean["N"].astype(str)}
    for name in names.values():
        table = load(shuffled(clean.assign(run=name), rng))
        assert deltas_by_loss(table) == deltas_by_loss(load(clean))
        assert len(set(table.models)) == 3 * 2  # sizes and seeds; the budgets may be checkpoints of one model
        assert any("of several models" in note for note in caveats.shared_names(set_up("ptq", table)))
    assert caveats.shared_names(set_up("ptq", load(clean))) == ()


def test_what_nothing_tells_apart_is_refused():
    rng = np.random.default_rng(0)
    clean = study(rng, sizes=2, budgets=2)
    lost = clean.drop(columns="seed").assign(run=[name.rsplit("-", 1)[0] for name in clean["run"]])
    with pytest.raises(TableError, match=f"{len(lost)} several losses for the same run and settings"):
        load(shuffled(lost, rng))
    before = lost[lost["P_post"].isna()].assign(dataset=["c4", "pile"] * 4)
    one_after = lost[lost["P_post"].notna()].drop_duplicates(["run", "P_post", "method"]).assign(dataset="wiki")
    table = load(shuffled(pd.concat([before, one_after]), rng))
    assert table.left_out == {"after PTQ, and its run has several losses before PTQ": len(one_after)}


def by_hand(rows: list[dict]) -> dict[float, float]:
    """δ row by row, as the contract has it: of the same run, N, D, precision and seed, of several the same dataset."""
    settings = lambda row: tuple(v for k, v in row.items() if k not in ("loss", "seconds"))
    losses = {}
    for row in rows:
        losses.setdefault(settings(row), set()).add(row["loss"])
    rows = [row for row in rows if len(losses[settings(row)]) == 1]
    out = {}
    for row in rows:
        if row["P_post"] == "":
            continue
        place = lambda other: [other[k] for k in ("run", "N", "D", "P_w", "seed")]
        before = [other for other in rows if other["P_post"] == "" and place(other) == place(row)]
        if len({other["loss"] for other in before}) > 1:
            before = [other for other in before if other["dataset"] == row["dataset"]]
        if len({other["loss"] for other in before}) == 1:
            out[row["loss"]] = row["loss"] - before[0]["loss"]
    return out


def test_random_tables_pair_as_by_hand():
    """Names, settings and losses from small pools, so that everything collides; 300 such tables in one."""
    rng, rows, wanted = np.random.default_rng(0), [], {}
    pick = lambda *values: values[rng.integers(len(values))]
    for i in range(300):
        some = [
            {
                **{"run": pick(f"{i}a", f"{i}b"), "N": pick(1e6, 2e6), "D": pick(1e8, 2e8), "P_w": pick(16, 4)},
                **{"P_post": pick("", 3, 4), "seed": pick(0, 1), "dataset": pick("c4", "pile")},
                **{"loss": 3 + rng.random(), "seconds": rng.random()},
            }
            for _ in range(rng.integers(2, 40))
        ]
        wanted |= by_hand(some)
        rows += some
    assert len(wanted) > 300
    assert deltas_by_loss(load(shuffled(pd.DataFrame(rows), rng))) == pytest.approx(wanted)


def test_the_same_rows_twice_without_names_are_counted_once():
    clean = study(np.random.default_rng(0), seeds=1)
    clean = clean[clean["P_post"].isna()][["N", "D", "loss"]]
    twice = load(pd.concat([clean, clean]))
    assert len(twice) == len(clean) and twice.left_out == {"the same row once more": len(clean)}


def test_a_bootstrap_of_too_few_models_says_so_and_gives_no_interval():
    clean = study(np.random.default_rng(0), seeds=1)
    one_name = load(clean.assign(run="x"))
    setup = set_up("ptq", one_name)
    assert setup.run_n.max() + 1 == 3
    why = too_few_runs(setup)
    assert "are of 3" in why and "at least 5" in why
    found = fit("ptq", one_name, starts=4, bootstrap_resamples=40, profile=False)
    assert found.ci == {} and found.samples == {} and found.notes[0] == why
    assert found.reporting["intervals"] == "none (no bootstrap draws)"
    assert too_few_runs(set_up("ptq", load(clean))) is None


def test_resamples_reach_beyond_both_ends_of_the_interval():
    assert [least_resamples(level) for level in (0.5, 0.9, 0.95, 0.99)] == [4, 20, 40, 200]
    with pytest.raises(FitError, match="a 95 % interval takes at least 40 resamples"):
        fit("chinchilla", load(study(np.random.default_rng(0))), bootstrap_resamples=39)


def test_seeds_that_one_of_two_rows_leaves_empty_do_not_part_them():
    rows = {"run": ["a"] * 4, "N": [1e6] * 4, "D": [1e8, 1e8, 2e8, 2e8], "loss": [3.0, 3.1, 2.9, 3.1]}
    rows |= {"P_post": ["", 4, "", 4], "seed": [0, "", "", 0]}
    np.testing.assert_allclose(tables.from_columns(rows).deltas()["delta"], [0.1, 0.2])
    other = tables.from_columns({**rows, "seed": [0, 1, 0, 0]})
    assert other.deltas().left_out == {"after PTQ, but its run has no loss before PTQ": 1}


def test_rows_after_ptq_may_have_been_measured_on_another_machine():
    rows = {"run": ["a", "a"], "N": [1e6] * 2, "D": [1e8] * 2, "loss": [3.0, 3.1], "P_post": ["", 4]}
    table = tables.from_columns({**rows, "device": ["cpu", "gpu"]})
    np.testing.assert_allclose(table.deltas()["delta"], [0.1])
    assert len(set(table.models)) == 1


# --- files ----------------------------------------------------------------------------------------------------------

FORMS = {
    "as it is": lambda text: text.encode(),
    "gzipped": lambda text: gzip.compress(text.encode()),
    "with CR alone": lambda text: text.replace("\n", "\r").encode(),
    "with CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "with a byte order mark": lambda text: text.encode("utf-8-sig"),
    "in UTF-16": lambda text: text.encode("utf-16"),
    "without a last line end": lambda text: text.rstrip("\n").encode(),
    "with empty lines": lambda text: ("\n" + text.replace("\n", "\n\n")).encode(),
    "with blanks": lambda text: text.replace(",", " , ").encode(),
    "with quotes": lambda text: "\n".join(
        ",".join(f'"{cell}"' for cell in line.split(",")) for line in text.splitlines()
    ).encode(),
    "gzipped with a byte order mark and CR": lambda text: gzip.compress(text.replace("\n", "\r").encode("utf-8-sig")),
    "with other words for empty": lambda text: text.replace(",,", ",NaN,").encode(),
    "with columns in another order": lambda text: "\n".join(
        ",".join(line.split(",")[::-1]) for line in text.splitlines()
    ).encode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_table_is_the_same_table(form, tmp_path):
    clean = study(np.random.default_rng(0), sizes=2, budgets=2).assign(method=lambda f: f["method"].replace("", "none"))
    text = clean.to_csv(index=False)
    wanted = load(clean)
    for name in ("runs.csv", "runs.csv.gz", "runs.txt"):  # by its content, not by its name
        (tmp_path / name).write_bytes(FORMS[form](text))
        found = tables.load(tmp_path / name)
        assert set(found.columns) == set(wanted.columns) and not found.left_out
        for column in wanted.columns:
            np.testing.assert_array_equal(found[column].astype(str), wanted[column].astype(str), err_msg=column)


def test_rows_whose_format_has_no_known_error_are_left_out_and_the_others_fitted():
    n, d = np.repeat([1e5, 1e6, 1e7], 12), np.tile(np.repeat([1e8, 1e9], 6), 3)
    p = np.tile([16.0, 1.0, 1.58, 3.0, 4.0, 6.0], 6)
    table = tables.from_columns({"N": n, "D": d, "P_w": p, "loss": 3 + np.random.default_rng(0).random(36)})
    for law, column in (("capacity_gmse", "gmse_w"), ("noise", "s_w")):
        setup = set_up(law, table)
        lost = setup.left_out[f"{column} is not known of its format"]
        assert lost >= 6 and len(setup.rows) == 36 - lost and 1.0 not in setup.rows["P_w"]
    with pytest.raises(FitError, match="no row was trained below 16 bits"):
        set_up("capacity_gmse", table.select((p == 16) | (p == 1)))


def test_every_column_that_a_law_reads_tells_rows_apart():
    """Else two rows of a run that a law takes for two settings would be repeats in the table."""
    derived = ("gmse_", "s_")
    read = {name for law in laws.LAWS.values() for name in law.columns if not name.startswith(derived)}
    assert read <= set(SETTINGS)


def test_columns_that_a_law_reads_hold_numbers_it_can_use():
    base = {"run": list("abcdef"), "N": [1e6] * 6, "D": [1e8] * 6, "P_w": [4] * 6, "loss": np.linspace(2, 3, 6)}
    table = tables.from_columns({**base, "group_size": [32, 0, -1, "inf", "", 1e30]})
    kept = table.usable("group_size")
    assert list(kept["run"]) == ["a"]
    assert kept.left_out == {
        **{"group_size is empty": 1, "group_size is infinite": 1, "group_size is zero or negative": 2},
        **{"group_size is too large": 1},
    }
    assert dataclasses.replace(table).usable("N").left_out == {}
