"""The report as a whole on tables that come from known constants (the verdicts themselves: test_verdicts.py)."""

import base64
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from analysis import laws
from analysis import report as analysis_report
from analysis.fitting import fit
from analysis.laws import paper
from analysis.reporting import laws as reporting_laws
from analysis.reporting import report
from analysis.reporting.verdicts import finding
from analysis.table import from_columns
from tests.conftest import once

pytestmark = pytest.mark.usefixtures("simple_loops")

TRUTH = {
    **paper.PUBLISHED,
    "A": 7.2,
    "alpha": 0.2,
    "B": 48.0,
    "beta": 0.3,
    "E": 0.9,
    "C_T": 0.25,
    "C_w": 0.5,
    "C_a": 0.5,
    "C_kv": 0.5,
}
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


def table_of(rows):
    return from_columns({name: [r[name] for r in rows] for name in rows[0]})


def write_csv(path, rows):
    names = list(rows[0])
    path.write_text("\n".join([",".join(names), *(",".join(str(r[n]) for n in names) for r in rows)]) + "\n")
    return path


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
def written(session_directory):
    """(directory of a report, what its command printed), made once for all workers."""
    folder = session_directory / "report"
    with once(folder) as first:
        if first:
            folder.mkdir()
            runs = write_csv(folder / "runs.csv", [*small_rows(), {**small_rows()[0], "run": "lost", "loss": "nan"}])
            arguments = [f"--runs={runs}", f"--out={folder / 'out'}", "--bootstrap=40"]
            command = [sys.executable, "-m", "analysis.report", *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            (folder / "printed.txt").write_text(done.stdout)
    return folder / "out", (folder / "printed.txt").read_text()


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
    for word in ("F1", "F2", "F3", "F4", "gamma_D", "1 loss is empty or NaN", "sha256", "--bootstrap=40", "jax"):
        assert word in said, word


@pytest.mark.slow
def test_files_beside_the_page_hold_the_fits_and_the_findings(written):
    folder, _ = written
    for law in reporting_laws.LAWS:
        loaded = fit.load(folder / f"fit_{law}.json")
        assert loaded.law == law and loaded.n > 0
    ptq = fit.load(folder / "fit_ptq.json")
    assert ptq.ci["gamma_D"][0] < TRUTH["gamma_D"] < ptq.ci["gamma_D"][1]
    record = json.loads((folder / "findings.json").read_text())
    keys = [f["key"] for f in record["findings"]]
    assert keys[0] == "F1" and keys[-1] == "Challenge" and {"F1 D_crit", "F2", "F3", "F4"} <= set(keys)
    assert record["findings"][0]["verdict"] == "supported"
    assert all(f["by_form"] and f["by_table"] for f in record["findings"])
    for drawn in record["figures"].values():
        assert isinstance(drawn, str) or all((folder / name).stat().st_size > 1000 for name in drawn)


@pytest.mark.slow
def test_output_ends_with_the_growth_of_degradation_and_the_place_of_the_report(written):
    folder, out = written
    last = out.strip().splitlines()
    assert last[-1] == f"report: {folder / 'index.html'}"
    assert last[-2].startswith("δ at 3 bits grew with D/N at every N")
    assert "ptq: R²" in out and "gamma_post" in out
    assert "C_w" in out and "not identified by this table" in out


@pytest.mark.slow
def test_a_fit_of_the_report_can_be_planned_with(written, capsys):
    from analysis import plan

    folder, _ = written
    out = folder / "plan.json"
    both = f"--fit={folder / 'fit_precision.json'},{folder / 'fit_ptq.json'}"
    assert plan.command(["plan", both, "--flops=1e15", "--serve-bits=4", f"--out={out}"]) == 0
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
    assert {f.verdict for f in made.findings} == {finding.UNDECIDED}
    assert "cannot be said" in made.sentence
    assert "fit_chinchilla.json" in {p.name for p in tmp_path.iterdir()}
    assert "E " in report.describe(made)


TRUTH_CHINCHILLA = {"A": 400.0, "alpha": 0.34, "B": 410.0, "beta": 0.28, "E": 1.69}


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--runs=missing.csv", "--out=x"),
        ("--runs=missing.csv", "--out=x", "--laws=nope"),
        ("--runs=missing.csv", "--out=x", "--bootstrap=-1"),
        ("--runs=missing.csv", "--out=x", "--where=method"),
    ],
)
def test_command_refuses_bad_input_in_one_line(options, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = analysis_report.FLAGS.flag_values_dict()
    assert analysis_report.command(["report", *options]) == 2
    told = capsys.readouterr().err
    assert len(told.strip().splitlines()) == 1 and told.startswith("error: ")
    assert not list(tmp_path.iterdir())
    for name, value in saved.items():
        analysis_report.FLAGS[name].value = value


@pytest.mark.slow
@pytest.mark.skipif(not QUEST.exists(), reason="public measurements not at hand")
def test_public_measurements_are_reported(tmp_path):
    from analysis import table as tables

    made = report.write(tables.load(QUEST), tmp_path, bootstrap=0, names=("chinchilla", "precision"))
    assert made.index.exists() and {"chinchilla", "precision"} <= set(made.evidence.fits)
    assert next(f for f in made.findings if f.key == "F1").verdict == finding.UNDECIDED
