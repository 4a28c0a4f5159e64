"""What the page of a report shows of a fit and a finding, and what captions say of their figures."""

import dataclasses

import numpy as np
import pytest
from matplotlib.figure import Figure

from analysis import laws
from analysis.fitting.fit import Fit
from analysis.reporting import page
from analysis.reporting.evidence import Evidence
from analysis.reporting.figures import degradation
from analysis.reporting.figures.bands import band, band_words, beyond, said
from analysis.reporting.verdicts.finding import FORCED, Finding
from analysis.table import from_columns

VALUES = {"C_T": 0.1, "gamma_D": 0.5, "gamma_N": 0.3, "gamma_post": 0.6, "b": 0.0}
NOTES = ("C_T is weakly identified: 0.01 to 1 fit equally well (95% profile)", "rows mix seeds")


def fitted(ci=None, samples=None):
    law = laws.get("ptq")
    profile = {"gamma_D": (0.4, 0.6)}
    made = Fit("ptq", VALUES, ci or {}, 0.9, 0.1, 9, 100, 0.0, law.columns, VALUES, notes=NOTES, starts_at_best=0.002)
    return dataclasses.replace(made, identifiability={"profile": profile}, samples=samples or {})


def test_a_constant_has_one_interval():
    bootstrapped, profiled = fitted({"gamma_D": (0.3, 0.7)}), fitted()
    assert page.interval_of(bootstrapped, "gamma_D") == (0.3, 0.7)
    assert page.interval_of(profiled, "gamma_D") == (0.4, 0.6)
    assert page.notes_of(bootstrapped) == ["rows mix seeds"] and len(page.notes_of(profiled)) == 2
    assert "0.01 to 1" not in page._fit(bootstrapped) and "0.2% of 100 starts" in page._fit(bootstrapped)


def test_a_finding_stands_with_its_form_its_table_and_its_numbers():
    rows = ({"law": "a<b", "P": 7.0}, {"law": "c", "P": None})
    text = page._finding(Finding("F3", "claim", FORCED, "by form", "first line\nsecond line", {}, rows))
    assert 'class="finding forced"' in text and "forced by the form" in text
    assert "<li>first line</li><li>second line</li>" in text and "by form" in text
    assert "a&lt;b" in text and '<td class="number">7</td>' in text and text.count("<tr>") == 3


def test_symbols_stand_before_the_findings():
    table = from_columns({"N": [1e5, 2e5, 4e5], "D": [1e6, 2e6, 4e6], "loss": [3.0, 2.5, 2.2]})
    text = page.page(Evidence(table), [], [], {}, "", "none", {})
    assert text.index('id="symbols"') < text.index('id="noise"') < text.index('id="findings"')
    for symbol, _ in page.SYMBOLS:
        assert f"<th>{symbol}</th>" in text
    assert "No setting was run with enough seeds" in text


def test_bands_are_the_quantiles_of_the_samples():
    samples = {name: tuple(np.full(41, value)) for name, value in VALUES.items()}
    samples["gamma_D"] = tuple(np.linspace(0.0, 1.0, 41))
    figure = Figure()
    axis = figure.subplots()
    assert band(
        axis, np.array([1.0, 2.0]), lambda fit: np.full(2, fit.values["gamma_D"]), [fitted(samples=samples)], "k"
    )
    edges = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert (edges.min(), edges.max()) == pytest.approx((0.025, 0.975))
    assert not band(axis, np.array([1.0, 2.0]), lambda fit: np.ones(2), [fitted()], "k")
    assert band_words([fitted()]).startswith("Without a bootstrap") and "ptq 0.2%" in band_words([fitted()])


def test_what_lies_beyond_the_table_is_shaded_and_the_axis_stays():
    axis = Figure().subplots()
    axis.set_xlim(1, 10)
    beyond(axis, 2, 10)
    assert len(axis.patches) == 1 and axis.get_xlim() == (1, 10)
    assert axis.patches[0].get_x() == 1 and axis.patches[0].get_width() == 1


def test_a_delta_of_zero_or_less_is_shown_and_counted():
    rows = [
        ("a", 1e6, np.nan, 2.0),
        ("a", 1e6, 3, 2.1),
        ("a", 1e6, 8, 1.9),
        ("b", 4e6, np.nan, 1.8),
        ("b", 4e6, 3, 2.0),
    ]
    run, d, post, loss = map(list, zip(*rows, strict=True))
    table = from_columns({"run": run, "N": [1e5] * 5, "D": d, "P_post": post, "loss": loss})
    figure = degradation.degradation(Evidence(table))
    assert "1 δ of 0 or less" in said(figure)
    edge = figure.axes[0].get_ylim()[0]
    assert edge > 0 and any(line.get_ydata()[0] == edge for line in figure.axes[0].lines if len(line.get_ydata()) == 1)
