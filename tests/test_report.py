"""The report as a whole on tables that come from known constants, and the findings on tables made to support or
refute them.
"""

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from analysis import command, findings, fit, laws, report
from analysis.compare import Comparison
from analysis.evidence import Evidence
from analysis.fit import Fit
from analysis.multiplicativity import Multiplicativity
from analysis.table import from_columns

TRUTH = {**laws.PUBLISHED, "A": 7.2, "alpha": 0.2, "B": 48.0, "beta": 0.3, "E": 0.9, "C_T": 0.25,
         "C_w": 0.5, "C_a": 0.5, "C_kv": 0.5}  # fmt: skip
QUEST = Path(__file__).parents[2] / "shared" / "data" / "quest_runs.csv"


def measure(rng, noise, truth, run, n, d, posts=(), **bits):
    """Rows of one run: its loss with noise, and each δ with ten times that relative noise."""
    at = {"N": n, "D": d, **{"P_w": 16, "P_a": 16, "P_kv": 16, **bits}}
    clean = float(laws.predict("unified", truth, P_post=np.nan, **at))
    loss = clean * np.exp(rng.normal(0, noise))
    rows = [{"run": run, **at, "P_post": "", "loss": loss}]
    for p in posts:
        delta = (float(laws.predict("unified", truth, P_post=p, **at)) - clean) * np.exp(rng.normal(0, 10 * noise))
        rows.append({"run": run, **at, "P_post": p, "loss": loss + delta})
    return rows


def small_rows(truth=TRUTH, noise=0.003):
    """3 sizes x 4 budgets in 16 bits after PTQ to 3-6 bits, and 25 runs of low precision: a first study."""
    rng, rows = np.random.default_rng(0), []
    sizes, budgets = (1e5, 2.5e5, 7e5), (1e6, 2e6, 4e6, 8e6)
    for n in sizes:
        for d in budgets:
            rows += measure(rng, noise, truth, f"{n:g}-{d:g}", n, d, (3, 4, 5, 6))
        for part, values in (("P_w", (3, 4, 6)), ("P_a", (4, 6, 8)), ("P_kv", (4, 6))):
            for p in values:
                rows += measure(rng, noise, truth, f"{n:g}-{part}{p}", n, 4e6, **{part: p})
    rows += measure(rng, noise, truth, "joint", 1e5, 4e6, P_w=4, P_a=4, P_kv=4)
    return rows


def joint_rows(truth=TRUTH, noise=0.001):
    """Marginal and joint runs side by side, with PTQ of the low-precision ones."""
    rng, rows = np.random.default_rng(1), []
    for n in (1e5, 2.5e5, 7e5):
        for d in (1e6, 4e6):
            rows += measure(rng, noise, truth, f"{n:g}-{d:g}", n, d, (3, 4))
            for part, values in (("P_w", (4, 6)), ("P_a", (4, 6)), ("P_kv", (4, 6))):
                for p in values:
                    rows += measure(rng, noise, truth, f"{n:g}-{d:g}-{part}{p}", n, d, (3,), **{part: p})
            for p in (4, 6):
                rows += measure(rng, noise, truth, f"{n:g}-{d:g}-all{p}", n, d, P_w=p, P_a=p, P_kv=p)
    return rows


def table_of(rows):
    return from_columns({name: [r[name] for r in rows] for name in rows[0]})


def write_csv(path, rows):
    names = list(rows[0])
    path.write_text("\n".join([",".join(names), *(",".join(str(r[n]) for n in names) for r in rows)]) + "\n")
    return path


def true_fit(law, truth=TRUTH):
    params = {k: v for k, v in truth.items() if k in laws.get(law).names}
    return Fit.from_json(json.dumps({"law": law, "params": params}))


# --- findings -------------------------------------------------------------------------------------------------------


def evidence_of(rows, *names, truth=TRUTH):
    return Evidence(table_of(rows), {name: true_fit(name, truth) for name in names})


def test_growth_of_degradation_is_read_off_the_series():
    found = findings.growths(evidence_of(small_rows(noise=0.0)).high_precision_deltas)
    assert len(found) == 12  # three sizes, four precisions
    one = next(g for g in found if g.n == 1e5 and g.p_post == 3)
    assert one.exponent == pytest.approx(TRUTH["gamma_D"], abs=1e-6)
    assert one.ratios == (10.0, 80.0)
    assert one.deltas[1] / one.deltas[0] == pytest.approx(8 ** TRUTH["gamma_D"])


def test_f1_is_refuted_where_degradation_falls_with_data():
    falling = {**TRUTH, "gamma_D": -0.4, "C_T": 2e5}
    finding = findings.degradation_grows(evidence_of(small_rows(falling)))
    assert finding.verdict == findings.REFUTED
    assert findings.growth_sentence(evidence_of(small_rows(falling))).startswith("δ at 3 bits did not grow")
    assert findings.degradation_grows(evidence_of(small_rows())).verdict == findings.SUPPORTED


def test_f1_is_not_testable_where_ptq_adds_nothing():
    rows = [{**r, "loss": r["loss"] - (1.0 if r["P_post"] else 0.0)} for r in small_rows()]
    assert findings.degradation_grows(Evidence(table_of(rows))).verdict == findings.NOT_TESTABLE
    assert "did not grow" in findings.growth_sentence(Evidence(table_of(rows)))


def test_f1_speaks_of_the_turn_that_was_measured():
    steep = {**TRUTH, "gamma_D": 1.5, "C_T": 1e-7 * 4}
    finding = findings.degradation_grows(evidence_of(small_rows(steep, noise=0.0), "chinchilla", "ptq", truth=steep))
    worse = int(re.search(r"in (\d+) of 12 series", finding.statistic)[1])
    assert worse > 0


def comparison_with(kappa, low, high, joint=12):
    """A comparison that holds this test of multiplicativity and nothing else."""
    test = Multiplicativity(kappa, (low, high), 0.0, 0.004, 0.003, 0.95, 60, joint, "")
    return Comparison((), {}, test, None, {}, ())


@pytest.mark.parametrize(
    ("test", "verdict"),
    [
        (comparison_with(1.02, 0.9, 1.1), "supported"),
        (comparison_with(1.1, 1.05, 1.15), "supported"),  # a cross term of a tenth of the effect
        (comparison_with(1.6, 1.4, 1.8), "refuted"),
        (comparison_with(0.5, 0.4, 0.7), "refuted"),
        (comparison_with(1.0, 0.2, 2.0), "not testable"),
        (comparison_with(1.0, 0.9, 1.1, joint=2), "not testable"),
    ],
)
def test_f2_is_the_exponent_of_the_product_with_its_interval(test, verdict):
    finding = findings.effects_multiply(Evidence(table_of(small_rows()), comparison=test))
    assert finding.verdict == verdict and finding.numbers["kappa"] == test.multiplicativity.kappa
    assert finding.statistic.startswith(f"κ = {test.multiplicativity.kappa:.2f} [")


def test_f2_says_why_it_cannot_be_tested():
    nothing = Comparison((), {}, None, "no run was trained with two or more parts below 16 bits", {}, ())
    finding = findings.effects_multiply(Evidence(table_of(small_rows()), comparison=nothing))
    assert finding.verdict == findings.NOT_TESTABLE
    assert finding.statistic == "No run was trained with two or more parts below 16 bits."


def spread(fit_, scale):
    rng = np.random.default_rng(0)
    drawn = {k: tuple(v * np.exp(rng.normal(0, scale, 100))) for k, v in fit_.values.items()}
    return Fit(**{**vars(fit_), "samples": drawn})


def test_f3_needs_an_interval_and_all_three_parts():
    table = table_of(small_rows())
    law = true_fit("precision")
    verdict = lambda f: findings.optimal_precision(Evidence(table, {"precision": f}))
    assert verdict(law).verdict == findings.NOT_TESTABLE
    close = verdict(spread(law, 0.01))
    assert close.verdict == findings.SUPPORTED and close.numbers["P_star"] == pytest.approx(7.0, abs=0.01)
    assert close.numbers["N_factor_at_4_bits"] == pytest.approx(5.20, abs=0.01)
    unbiased = {**dict.fromkeys(("gamma_w", "gamma_a", "gamma_kv"), 1.0), **dict.fromkeys(("n_w", "n_a", "n_kv"), 0.0)}
    low = true_fit("precision", {**TRUTH, **unbiased})
    assert verdict(spread(low, 0.01)).verdict == findings.REFUTED  # P* = 1.9 bits
    part = Fit(**{**vars(spread(law, 0.01)), "refused": {"gamma_kv": "no row"}})
    assert verdict(part).verdict == findings.NOT_TESTABLE


def test_f4_compares_with_the_sixteen_bit_model():
    finding = findings.low_precision_robust(evidence_of(joint_rows()))
    assert finding.verdict == findings.SUPPORTED and finding.numbers["median_ratio"] < 1
    fragile = {**TRUTH, "gamma_N": 3.0, "C_T": 1e14, "C_w": 100.0, "C_a": 100.0, "C_kv": 100.0}
    assert findings.low_precision_robust(evidence_of(joint_rows(fragile))).verdict == findings.REFUTED
    assert findings.low_precision_robust(evidence_of(small_rows())).verdict == findings.NOT_TESTABLE


@pytest.mark.parametrize(("constant", "verdict"), [(0.02, "supported"), (0.5, "refuted"), (0.3, "not testable")])
def test_the_challenge_is_decided_by_the_growth_under_a_constant_rate(constant, verdict):
    rows = []
    for schedule, exponent in (("cosine", TRUTH["gamma_D"]), ("constant", constant)):
        truth = {**TRUTH, "gamma_D": exponent, "C_T": TRUTH["C_T"] * 2e6 ** (TRUTH["gamma_D"] - exponent)}
        made = small_rows(truth, noise=0.0)
        rows += [{**r, "run": f"{schedule}-{r['run']}", "schedule": schedule} for r in made]
    assert findings.schedule_or_data(Evidence(table_of(rows))).verdict == verdict


# --- the report -----------------------------------------------------------------------------------------------------


class Links(HTMLParser):
    """Collects what a page asks of the outside, its images and its text."""

    def __init__(self):
        super().__init__()
        self.outside, self.images, self.text, self.open = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        target = attrs.get("src") or attrs.get("href") or ""
        if tag in ("script", "link", "iframe", "object") or (target and not target.startswith(("#", "data:"))):
            self.outside.append((tag, target))
        if tag == "img":
            assert attrs["alt"]
            self.images.append(target)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    runs = write_csv(folder / "runs.csv", [*small_rows(), {**small_rows()[0], "run": "lost", "loss": "nan"}])
    done = subprocess.run(
        [sys.executable, "-m", "analysis.report", f"--runs={runs}", f"--out={folder / 'out'}", "--bootstrap=60"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "out", done.stdout


@pytest.mark.slow
def test_page_is_one_file_with_its_figures_inside(written):
    folder, _ = written
    page = Links()
    text = (folder / "index.html").read_text(encoding="utf-8")
    page.feed(text)
    page.close()
    assert page.outside == [] and not page.open
    assert "url(" not in text and "@import" not in text
    assert len(page.images) >= 10 and 'id="law_comparison"' in text
    for image in page.images:
        assert base64.b64decode(image.removeprefix("data:image/svg+xml;base64,")).lstrip().startswith(b"<?xml")
    said = " ".join(page.text)
    for word in ("F1", "F2", "F3", "F4", "gamma_D", "1 loss is empty or NaN", "sha256", "--bootstrap=60", "jax"):
        assert word in said, word


@pytest.mark.slow
def test_files_beside_the_page_hold_the_fits_and_the_findings(written):
    folder, _ = written
    for law in report.LAWS:
        loaded = fit.load(folder / f"fit_{law}.json")
        assert loaded.law == law and loaded.n > 0
    ptq = fit.load(folder / "fit_ptq.json")
    assert ptq.ci["gamma_D"][0] < TRUTH["gamma_D"] < ptq.ci["gamma_D"][1]
    record = json.loads((folder / "findings.json").read_text())
    assert [f["key"] for f in record["findings"]] == ["F1", "F2", "F3", "F4", "Challenge"]
    assert record["findings"][0]["verdict"] == "supported"
    for drawn in record["figures"].values():
        assert isinstance(drawn, str) or all((folder / name).stat().st_size > 1000 for name in drawn)


@pytest.mark.slow
def test_output_ends_with_the_growth_of_degradation_and_the_place_of_the_report(written):
    folder, out = written
    last = out.strip().splitlines()
    assert last[-1] == f"report: {folder / 'index.html'}"
    assert last[-2].startswith("δ at 3 bits grew with D/N at every N")
    assert "ptq: R²" in out and "gamma_post" in out
    assert "C_w" in out and "not told by this table" in out


@pytest.mark.slow
def test_a_fit_of_the_report_can_be_planned_with(written, capsys):
    from analysis import plan

    folder, _ = written
    out = folder / "plan.json"
    both = f"--fit={folder / 'fit_precision.json'},{folder / 'fit_ptq.json'}"
    assert command.run("", plan.FLAGS, plan.main, ["plan", both, "--flops=1e15", "--serve-bits=4", f"--out={out}"]) == 0
    raw = json.loads(out.read_text())
    assert raw["loss_ci"][0] < raw["loss"] < raw["loss_ci"][1] and 5 < raw["P"] < 9
    assert any("extrapolation: N" in warning for warning in raw["warnings"])
    assert "Warning" in capsys.readouterr().out


@pytest.mark.slow
def test_a_table_of_sizes_and_tokens_alone_is_reported(tmp_path):
    grid = [(n, d) for n in (1e6, 4e6, 16e6) for d in (1e8, 4e8, 16e8)]
    n, d = map(np.array, zip(*grid, strict=True))
    table = from_columns({"N": n, "D": d, "loss": laws.predict("chinchilla", TRUTH_CHINCHILLA, N=n, D=d)})
    made = report.write(table, tmp_path, bootstrap=0, names=("chinchilla", "ptq", "precision"))
    assert list(made.evidence.fits) == ["chinchilla"]
    assert set(made.not_fitted) == {"ptq", "precision"}
    assert {f.verdict for f in made.findings} == {findings.NOT_TESTABLE}
    assert "cannot be said" in made.sentence
    assert "fit_chinchilla.json" in {p.name for p in tmp_path.iterdir()}
    assert "E " in report.describe(made)


TRUTH_CHINCHILLA = {"A": 400.0, "alpha": 0.34, "B": 410.0, "beta": 0.28, "E": 1.69}


@pytest.mark.parametrize("options", [
    (), ("--runs=missing.csv", "--out=x"), ("--runs=missing.csv", "--out=x", "--laws=nope"),
    ("--runs=missing.csv", "--out=x", "--bootstrap=-1"), ("--runs=missing.csv", "--out=x", "--where=method"),
])  # fmt: skip
def test_command_refuses_bad_input_in_one_line(options, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = report.FLAGS.flag_values_dict()
    assert command.run("", report.FLAGS, report.main, ["report", *options]) == 2
    told = capsys.readouterr().err
    assert len(told.strip().splitlines()) == 1 and told.startswith("error: ")
    assert not list(tmp_path.iterdir())
    for name, value in saved.items():
        report.FLAGS[name].value = value


@pytest.mark.slow
@pytest.mark.skipif(not QUEST.exists(), reason="public measurements not at hand")
def test_public_measurements_are_reported(tmp_path):
    from analysis import table as tables

    made = report.write(tables.load(QUEST), tmp_path, bootstrap=0, names=("chinchilla", "precision"))
    assert made.index.exists() and len(made.evidence.fits) == 2
    assert next(f for f in made.findings if f.key == "F1").verdict == findings.NOT_TESTABLE
