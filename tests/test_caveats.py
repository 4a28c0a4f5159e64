"""Notes on mixtures: columns that tell rows apart and that neither the law nor its columns explain."""

import numpy as np

from analysis import laws
from analysis import table as tables
from analysis.fitting import caveats
from analysis.fitting.setup import set_up
from analysis.laws import synthetic


def mixed(**more):
    """Notes on a table of three sizes, four budgets, four precisions and four seeds with the columns of `more`."""
    axes = [np.geomspace(1e5, 3e6, 3), np.geomspace(1e6, 6e7, 4), np.array([16.0, 4.0, 6.0, 8.0]), np.arange(4.0)]
    n, d, p, seed = (axis.ravel() for axis in np.meshgrid(*axes, indexing="ij"))
    rng = np.random.default_rng(0)
    loss = laws.predict("precision", laws.published("precision"), N=n, D=d, P_w=p) * np.exp(
        rng.normal(0, 0.01, n.shape)
    )
    columns = {name: make(n, d, p, seed) for name, make in more.items()}
    table = tables.from_columns({"N": n, "D": d, "P_w": p, "seed": seed, "loss": loss, **columns})
    return caveats.mixed_rows(set_up("precision", table))


def words(index, *names):
    return np.array([names[int(i) % len(names)] for i in index], object)


def test_any_column_that_tells_rows_apart_is_a_mixture_whatever_its_name():
    eleven = [f"recipe {i}" for i in range(11)]
    (note,) = mixed(scheme=lambda n, d, p, seed: words(np.arange(len(n)), *eleven))
    assert note.startswith("the rows mix scheme: recipe 0, recipe 1, recipe 10, recipe 2,")
    (note,) = mixed(scheme=lambda n, d, p, seed: np.arange(len(n)) % 11)
    assert note.startswith("the rows mix scheme: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10; --where=scheme=VALUE")
    (note,) = mixed(scheme=lambda n, d, p, seed: words(np.arange(len(n)), *(f"r{i:02d}" for i in range(30))))
    assert "r11 and 18 more; --where" in note and "r12" not in note
    (note,) = mixed(
        corpus=lambda n, d, p, seed: words(np.log10(n), "c4", "pile")
    )  # goes along with N, but is a mixture
    assert "the rows mix corpus: c4, pile" in note


def test_the_advice_on_a_mixture_keeps_the_rows_in_16_bits():
    quantizer = lambda n, d, p, seed: np.where(p == 16, "none", words(seed, "lsq", "quest"))
    (note,) = mixed(quantizer=quantizer)
    assert note == "the rows mix quantizer: lsq, quest; --where='quantizer=VALUE|none' fits one of them"
    at_4 = lambda n, d, p, seed: np.where(p == 16, "none", np.where(p == 4, "four", words(seed, "lsq", "quest")))
    assert "'quantizer=VALUE|four|none'" in mixed(quantizer=at_4)[0]
    empty = lambda n, d, p, seed: np.where(p == 16, "", words(seed, "lsq", "quest"))  # --where keeps what is empty
    assert "--where=quantizer=VALUE fits" in mixed(quantizer=empty)[0]


def test_labels_measurements_and_seeds_are_no_mixture():
    count = lambda n, d, p, seed: np.arange(len(n))
    notes = mixed(
        size=lambda n, d, p, seed: words(n, *(f"{v:g}" for v in n)),
        budget=lambda n, d, p, seed: np.array([f"{v:g} tokens" for v in d]),
        note=lambda n, d, p, seed: np.array([f"row {i}" for i in count(n, d, p, seed)]),
        layers=lambda n, d, p, seed: np.where(n > 2e5, 4, 2),
        w_format=lambda n, d, p, seed: np.array([f"int{v:g}" if v < 16 else "bf16" for v in p]),
        seconds=lambda n, d, p, seed: 1.5 + count(n, d, p, seed) % 5,
        device=lambda n, d, p, seed: words(seed, "cpu", "gpu"),
        jax_version=lambda n, d, p, seed: words(seed, "0.9", "0.10"),
    )
    assert notes == ()


def test_a_column_that_goes_along_with_a_mixture_is_not_named_again():
    notes = mixed(
        schedule=lambda n, d, p, seed: words(seed, "cosine", "wsd"),
        precision=lambda n, d, p, seed: words(seed, "spec of cosine", "spec of wsd"),
    )
    assert len(notes) == 1 and "schedule" in notes[0]


def test_only_mixtures_that_the_bits_do_not_explain_are_named():
    table = synthetic.table("precision")
    formats = np.where(table["P_w"] < 16, np.char.add("int", table["P_w"].astype(int).astype(str)), "bf16")
    schedules = np.where(np.arange(len(table)) % 2, "cosine", "constant")
    mixed = tables.from_columns({**table.columns, "w_format": formats, "schedule": schedules})
    notes = caveats.mixed_rows(set_up("precision", mixed))
    assert notes == ("the rows mix schedule: constant, cosine; --where=schedule=VALUE fits one of them",)
    assert caveats.mixed_rows(set_up("precision", table)) == ()
