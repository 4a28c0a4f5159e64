"""A study that moves to another machine with its rows alone; its plan as a table; runs quantized as they end."""

import csv
import gzip
from pathlib import Path

import pytest

from precision_scaling.errors import UserError
from precision_scaling.study import measured, results, run_missing
from precision_scaling.study.ptq import quantize_missing
from precision_scaling.study.workspace import open_workspace

ROOT = Path(__file__).parent.parent


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def packed(table, path, change=lambda text: text):
    path.write_bytes(gzip.compress(change(table.read_text()).encode()))
    return path


def test_a_study_goes_on_elsewhere_from_its_rows_alone(finished_study, tmp_path, quick_compile):
    workspace, there = finished_study
    table = packed(there / "runs.csv", tmp_path / "runs.csv.gz")
    here = open_workspace(workspace.experiment.config, tmp_path / "here")
    assert measured.take_over(table, here) == 4
    run_missing.train_missing(here)
    assert quantize_missing(here, ("rtn",), (3, 4)) == []
    results.gather(here.workdir)
    assert (here.workdir / "runs.csv").read_bytes() == (there / "runs.csv").read_bytes()
    assert not list(here.workdir.glob("runs/*/checkpoint"))  # nothing was trained
    kept = {path: path.stat().st_mtime_ns for path in here.workdir.glob("runs/*/rows-*.json")}
    assert measured.take_over(table, here) == 4
    assert {path: path.stat().st_mtime_ns for path in here.workdir.glob("runs/*/rows-*.json")} == kept


def test_a_table_is_read_by_its_content_and_its_rows_count_once(finished_study, tmp_path):
    workspace, there = finished_study
    header, *rows = (there / "runs.csv").read_text().splitlines(keepends=True)
    for i, content in enumerate([header + "".join(rows * 2), gzip.compress((header + "".join(rows)).encode())]):
        table = tmp_path / "runs.csv"
        table.write_bytes(content if isinstance(content, bytes) else content.encode())
        here = open_workspace(workspace.experiment.config, tmp_path / f"here {i}")
        assert measured.take_over(table, here) == 4
        results.gather(here.workdir)
        assert (here.workdir / "runs.csv").read_bytes() == (there / "runs.csv").read_bytes()


def test_a_table_is_read_that_lacks_the_columns_which_were_added_since(finished_study, tmp_path):
    """Its header is that of a table that was kept."""
    kept = gzip.decompress((ROOT / "results/decide/runs.csv.gz").read_bytes()).decode().splitlines()[0].split(",")
    assert not set(kept) - set(results.COLUMNS)
    workspace, there = finished_study
    table = tmp_path / "runs.csv"
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, kept, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows_of(there / "runs.csv"))
    here = open_workspace(workspace.experiment.config, tmp_path / "here")
    assert measured.take_over(table, here) == 4


def test_a_run_that_lacks_a_row_is_done_anew(finished_study, tmp_path):
    workspace, there = finished_study
    lost = next(run for run in workspace.experiment.runs if "D448" in run.id)
    rows = [row for row in rows_of(there / "runs.csv") if not (row["run"] == lost.id and row["P_post"] == "4")]
    table = tmp_path / "runs.csv"
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, results.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    here = open_workspace(workspace.experiment.config, tmp_path / "here")
    assert measured.take_over(table, here) == 3
    assert results.read_rows(here.directory(lost), "trained") == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("rtn", "gptq"), None),  # other methods than asked for: those runs are not complete
        (lambda text: text.replace(",768,", ",769,"), "has D = '769' there and '768' here"),
        (lambda text: text.replace(",4.43k,", ",4.44k,"), "has size = '4.44k' there and '4.43k' here"),
        (lambda text: "no table\x00", "not a table"),
        (lambda text: text + text.splitlines()[1].replace(",cpu,", ",gpu,") + "\n", "different rows of"),
        (lambda text: "N,D,loss\n1,2,3\n", "not a table"),
    ],
)
def test_a_table_of_another_study_is_refused(finished_study, tmp_path, change, words):
    workspace, there = finished_study
    table = packed(there / "runs.csv", tmp_path / "runs.csv.gz", change)
    here = open_workspace(workspace.experiment.config, tmp_path / "here")
    if words is None:
        assert measured.take_over(table, here) == 1  # the one run that asks for no PTQ
        return
    with pytest.raises(UserError, match=words) as error:
        measured.take_over(table, here)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"\x1f\x8bnot gzip", gzip.compress(b"run,N\na,1\n", mtime=0)])
def test_a_table_that_cannot_be_read_is_one_line(finished_study, tmp_path, content):
    workspace, _ = finished_study
    table = tmp_path / "runs.csv.gz"
    if content is not None:
        table.write_bytes(content)
    with pytest.raises(UserError, match="--rows=") as error:
        measured.take_over(table, workspace)
    assert "\n" not in str(error.value)


def test_the_plan_is_a_table_of_every_loss_to_come(finished_study, tmp_path):
    workspace, there = finished_study
    config = workspace.experiment.config
    planned = [row for run in workspace.experiment.runs for row in results.planned_rows(config, run)]
    results.write_table(tmp_path / "planned.csv", planned)
    unknown = {"loss", "status", "epochs", "corpus", "device", "jax_version"}
    unknown |= {"batches_left_out", "fallback_layers", "stored_bits"}
    known = lambda path: [{k: v for k, v in row.items() if k not in unknown} for row in rows_of(path)]
    assert known(tmp_path / "planned.csv") == known(there / "runs.csv")
    assert {row["status"] for row in rows_of(tmp_path / "planned.csv")} == {""}


def test_each_run_is_handed_on_once_its_row_and_checkpoint_are_there(study_config, tmp_path, quick_compile):
    workspace = open_workspace(study_config, tmp_path)
    seen = []

    def on_row(run):
        (row,) = results.read_rows(workspace.directory(run), "trained")
        seen.append((run.id, row["status"]))
        run_missing.quantize_run(workspace, run)

    run_missing.train_missing(workspace, on_row=on_row)
    assert sorted(seen) == sorted((run.id, "ok") for run in workspace.experiment.runs)
    for run in workspace.experiment.runs:
        rows = results.read_rows(workspace.directory(run), "rtn")
        assert [row["P_post"] for row in rows] == ([3, 4] if run.ptq else [])
