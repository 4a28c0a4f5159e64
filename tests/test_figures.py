"""Figures from a table and fits alone: drawn where the columns allow it, else skipped with a reason; numbers in them
checked.
"""

import dataclasses
import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from analysis import laws
from analysis.fitting.comparison import Comparison, Row
from analysis.fitting.fit import Fit
from analysis.laws import paper
from analysis.reporting.evidence import Evidence, main_rows
from analysis.reporting.figures import degradation, planning, precision, ptq, style
from analysis.reporting.figures import fits as fit_figures
from analysis.reporting.figures.gallery import GALLERY, draw_all
from analysis.reporting.figures.precision import effective_share
from analysis.table import from_columns

TRUTH = {**paper.PUBLISHED, "C_w": 0.5, "C_a": 0.5, "C_kv": 0.5}
SIZES, BUDGETS, POSTS = (30e6, 60e6, 110e6), (1.5e9, 6e9, 26e9), (3, 4, 5)


def row(run, n, d, w=16, a=16, kv=16, post=np.nan, **more):
    loss = float(laws.predict("unified", TRUTH, N=n, D=d, P_w=w, P_a=a, P_kv=kv, P_post=post))
    return {"run": run, "N": n, "D": d, "P_w": w, "P_a": a, "P_kv": kv, "P_post": post, "loss": loss, **more}


def paper_rows(**more):
    """A noiseless table at the paper's kind of grid: 16-bit runs, each part varied, all parts tied, PTQ of most."""
    rows = []
    for n in SIZES:
        for d in BUDGETS:
            settings = [{}] + [{"w": p} for p in (4, 6, 8)] + [{"a": p} for p in (4, 6)] + [{"kv": 4}, {"kv": 6}]
            for setting in [*settings, {"w": 6, "a": 6, "kv": 6}]:
                run = f"{n:g}-{d:g}-{setting}"
                rows.append(row(run, n, d, **setting, **more))
                rows += [row(run, n, d, **setting, post=p, **more) for p in POSTS if p < setting.get("w", 16)]
    return rows


def table_of(rows):
    names = list(dict.fromkeys(name for r in rows for name in r))
    return from_columns({name: [r.get(name, "") for r in rows] for name in names})


def true_fits(samples=0):
    out = {}
    for law in ("chinchilla", "ptq", "precision", "unified"):
        params = {name: value for name, value in TRUTH.items() if name in laws.get(law).names}
        fit = Fit.from_json(json.dumps({"law": law, "params": params}))
        rng = np.random.default_rng(0)
        drawn = {k: tuple(v * np.exp(rng.normal(0, 0.02, samples))) for k, v in params.items()} if samples else {}
        out[law] = dataclasses.replace(fit, r2=1.0, samples=drawn)
    return out


@pytest.fixture(scope="module")
def evidence():
    rows = paper_rows(method="gptq")
    rtn = [{**r, "method": "rtn", "loss": r["loss"] + 0.01} for r in rows if np.isfinite(r["P_post"])]
    table = table_of(rows + rtn)
    return Evidence(main_rows(table)[0], true_fits(samples=60), table, comparison())


def judged(law, kind, held, aic):
    return Row(law, kind, 40, 5, (), 0.9, 1e-3, 1e-3, aic, aic + 9, held, 0.9, None, 0.5, 10.0, 1.0)


def comparison():
    """Three laws of loss, of which one cannot predict a precision, and one law of δ alone."""
    held = {"N": 0.02, "D": 0.03, "P": 0.04, "compute": 0.05, "joint": 0.055, "largest_N": 0.06}
    rows = (judged("precision", "loss", held, -300.0), judged("d_eff", "loss", held, -290.0))
    rows += (judged("capacity", "loss", {**held, "P": None}, -200.0), judged("ptq", "delta", held, 5.0))
    return Comparison(rows, {}, None, "no joint runs", {}, ())


def drawings():
    return {entry.name: entry.draw for entry in GALLERY}


def test_the_gallery_names_every_figure_once():
    names = [entry.name for entry in GALLERY]
    assert len(names) == len(set(names))
    assert all(entry.caption and entry.title for entry in GALLERY)


@pytest.mark.slow
@pytest.mark.parametrize("name", [entry.name for entry in GALLERY if entry.name != "schedules"])
def test_a_rich_table_gives_the_figure(evidence, name):
    with style.house_style():
        figure = drawings()[name](evidence)
    assert isinstance(figure, Figure)
    visible = [axis for axis in figure.axes if axis.get_visible()]
    assert visible
    drawn = [axis for axis in visible if axis.lines or axis.collections or axis.patches]
    assert drawn == visible, "an empty panel"


def test_files_are_written_as_png_and_svg_and_do_not_change_when_drawn_again(evidence, tmp_path):
    entry = next(e for e in GALLERY if e.name == "delta_vs_tokens")
    first = draw_all(evidence, tmp_path / "a", (entry,))[0].paths
    again = draw_all(evidence, tmp_path / "b", (entry,))[0].paths
    assert [p.name for p in first] == ["delta_vs_tokens.png", "delta_vs_tokens.svg"]
    assert first[0].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and b"<svg" in first[1].read_bytes()
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]


def test_a_bare_chinchilla_table_skips_what_it_cannot_give_and_says_why(tmp_path):
    table = from_columns({"N": [1e6, 2e6, 4e6], "D": [1e8, 2e8, 4e8], "loss": [3.0, 2.8, 2.6]})
    (tmp_path / "loss_vs_precision.svg").write_text("of an earlier table")
    drawn = draw_all(Evidence(table), tmp_path)
    assert all(d.skipped for d in drawn)
    reasons = {d.entry.name: d.skipped for d in drawn}
    assert "P_post" in reasons["delta_vs_tokens"]
    assert "no law was fitted" in reasons["predicted_vs_measured"]
    assert "stayed at 16 bits" in reasons["loss_vs_precision"]
    assert not list(tmp_path.iterdir())  # also what an earlier table had left


def test_points_and_lines_of_degradation_are_the_table_and_the_law(evidence):
    with style.house_style():
        figure = degradation.degradation(evidence)
    axis = next(a for a in figure.axes if a.get_title("left") == "N = 30M")
    points = axis.lines[0]  # 3 bits, the lowest, is drawn first
    expected = [float(laws.predict("ptq", laws.published("ptq"), N=30e6, D=d, P_post=3)) for d in BUDGETS]
    # the synthetic δ is of the unified law: f(16) = 0.994 and C_x 0.5 are within 2 % of law 2
    np.testing.assert_allclose(sorted(points.get_ydata()), expected, rtol=0.02)
    np.testing.assert_allclose(sorted(points.get_xdata()), np.array(BUDGETS) / 30e6)
    assert axis.get_xscale() == "log" and axis.get_yscale() == "log"


def test_measured_effective_parameters_are_those_that_made_the_table(evidence):
    table = evidence.part_alone("P_a")
    share = effective_share(evidence.fits["precision"], table)
    true = lambda p: 1 - np.exp(-p / TRUTH["gamma_a"] + TRUTH["n_a"])
    low = table["P_a"] < 16
    np.testing.assert_allclose(share[low], true(table["P_a"][low]) / true(16.0), rtol=1e-6)


def test_a_bad_floor_does_not_break_the_effective_parameters(evidence):
    high = dataclasses.replace(evidence.fits["precision"], values={**TRUTH, "E": 3.9})
    share = effective_share(high, evidence.losses)
    assert np.isnan(share).any() and not (share[np.isfinite(share)] <= 0).any()


def test_cost_matched_minimum_is_the_published_optimum(evidence):
    with style.house_style():
        figure = planning.cost_matched(evidence)
    left = figure.axes[0]
    bits, excess = left.lines[0].get_data()
    assert bits[np.argmin(excess)] == pytest.approx(7.0, abs=0.06)


def test_predictions_of_a_noiseless_table_lie_on_the_diagonal(evidence):
    for fit in evidence.fits.values():
        table, measured = fit_figures.rows_of(evidence, fit)
        if fit.law in ("precision", "unified"):
            np.testing.assert_allclose(fit_figures.predicted(fit, table), measured, rtol=1e-12)


def test_iso_loss_takes_the_fullest_plane_of_size_and_bits(evidence):
    part, d, table = precision._widest_plane(evidence)
    assert part == "P_w" and len(set(table["N"])) == 3 and len(set(table["P_w"])) == 4 and d in BUDGETS


def test_laws_of_a_kind_are_compared_and_a_law_that_cannot_predict_has_no_mark(evidence):
    with style.house_style():
        figure = drawings()["law_comparison"](evidence)
    held, criteria = figure.axes  # ptq is alone of its kind: nothing to compare
    assert [text.get_text() for text in held.get_yticklabels()] == [
        "precision, k = 5",
        "d_eff, k = 5",
        "capacity, k = 5",
    ]
    points = {line.get_label(): line.get_xdata() for line in held.lines}
    np.testing.assert_allclose(points["out P"], [4.0, 4.0, np.nan])
    np.testing.assert_allclose({line.get_label(): line.get_xdata() for line in criteria.lines}["AIC"], [0, 10, 100])
    with pytest.raises(style.Skipped, match="not compared"):
        drawings()["law_comparison"](dataclasses.replace(evidence, comparison=None))


def test_a_law_that_misses_nothing_stands_at_the_left_end_of_the_axis(evidence):
    """Of a tiny table a held-out error may be exactly 0, which a logarithmic axis has not."""
    compared = evidence.comparison
    first, *others = compared.rows
    first = dataclasses.replace(first, held_out={**first.held_out, "N": 0.0})
    changed = dataclasses.replace(evidence, comparison=dataclasses.replace(compared, rows=(first, *others)))
    held, _ = drawings()["law_comparison"](changed).axes
    left, right = held.get_xlim()
    points = {line.get_label(): line.get_xdata() for line in held.lines}
    assert points["out N"][0] == pytest.approx(left) and 0 < left < 2 < right


def test_lines_of_equal_cost_hold_n_times_p_and_their_star_is_the_best_precision(evidence):
    fit = evidence.fits["precision"]
    law = {**fit.values, "gamma_w": 6.0}  # puts the best precision of weights alone among those of the table
    fits = {"precision": dataclasses.replace(fit, values=law)}
    with style.house_style():
        figure = precision.iso_loss(dataclasses.replace(evidence, fits=fits))
    for axis in figure.axes[:2]:
        dashed = [line for line in axis.lines if line.get_linestyle() == "--"]
        assert len(dashed) == 4
        for line in dashed:
            np.testing.assert_allclose(line.get_xdata() * line.get_ydata(), line.get_xdata()[-1] * 16)
    best = lambda p: (1 - np.exp(-p / law["gamma_w"] + law["n_w"])) / p
    grid = np.linspace(2, 16, 10001)
    stars = [line for line in figure.axes[1].lines if line.get_marker() == "*"]
    assert stars and not [line for line in figure.axes[0].lines if line.get_marker() == "*"]
    for star in stars:
        assert star.get_ydata()[0] == pytest.approx(grid[np.argmax(best(grid))], abs=0.1)


def test_rows_of_other_schedules_and_of_ptq_beyond_the_weights_stay_out_of_fits():
    rows = []
    for schedule in ("cosine", "constant"):
        run = {"schedule": schedule}
        rows.append(row(schedule, 1e8, 1e10, method="", post_parts="", **run))
        for method, parts in (("gptq", "w"), ("smoothquant", "wa"), ("kv_cache", "kv"), ("rtn", "w")):
            rows.append(row(schedule, 1e8, 1e10, post=3, method=method, post_parts=parts, **run))
    table = table_of(rows)
    main, method = main_rows(table)
    assert method == "gptq" and list(main["method"]) == ["", "gptq"] and set(main["schedule"]) == {"cosine"}
    assert main.left_out == {
        "trained under another schedule than cosine": 5,
        "PTQ of activations or KV cache, not of weights alone": 2,
        "PTQ by another method than gptq": 1,
    }
    both = Evidence(main, whole=table).deltas_by_schedule
    assert sorted(both["schedule"]) == ["constant", "cosine"] and set(both["method"]) == {"gptq"}


def test_only_one_method_of_ptq_is_fitted_and_the_other_is_counted():
    rows = [
        row("a", 1e8, 1e10, method=""),
        row("a", 1e8, 1e10, post=3, method="rtn"),
        row("a", 1e8, 1e10, post=3, method="gptq"),
    ]
    main, method = main_rows(table_of(rows))
    assert method == "gptq" and len(main) == 2
    assert main.left_out == {"PTQ by another method than gptq": 1}


def test_schedules_are_drawn_where_there_are_two(evidence):
    rows = paper_rows(schedule="cosine") + [
        {**r, "run": f"c-{r['run']}", "loss": r["loss"] + 0.1} for r in paper_rows(schedule="constant")
    ]
    with style.house_style():
        figure = degradation.schedules(Evidence(table_of(rows)))
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"cosine", "constant"}


def test_names_with_dollar_signs_are_drawn_as_they_stand(tmp_path):
    strange = [r"\frac$\nothing$", "$x$"]
    rows = paper_rows(method="gptq") + [
        {**r, "method": name, "loss": r["loss"] + 0.01}
        for name in strange
        for r in paper_rows()
        if np.isfinite(r["P_post"])
    ]
    entry = next(entry for entry in GALLERY if entry.draw is ptq.methods)
    (drawn,) = draw_all(Evidence(table_of(rows)), tmp_path, (entry,))
    assert [path.suffix for path in drawn.paths] == [".png", ".svg"]


def test_palette_keeps_its_distances_under_colour_blindness():
    """Machado et al. (2009) matrices for severe deuteranopia and protanopia; the first four categories must stay
    apart.
    """
    from matplotlib.colors import to_rgb

    deutan = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    protan = np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]])
    linear = np.array([to_rgb(c) for c in style.CATEGORIES[:4]]) ** 2.2
    for matrix in (np.eye(3), deutan, protan):
        seen = np.clip(linear @ matrix.T, 0, 1) ** (1 / 2.2)
        apart = np.linalg.norm(seen[:, None] - seen[None, :], axis=-1)
        assert apart[np.triu_indices(4, 1)].min() > 0.15
    grey = np.array([np.dot(color[:3], (0.299, 0.587, 0.114)) for color in style.ramp(6)])
    assert (np.diff(grey) < -0.05).all()  # ordered series stay ordered in grey print
