"""A workdir has the files that paths.py and docs/workdir.md say, and nobody else knows their names."""

import ast
import re
from pathlib import Path

import pytest

from precision_scaling.runtime import paths
from precision_scaling.study import results

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "workdir.md").read_text()
NAMES = {value for name, value in vars(paths).items() if name.isupper()}


def test_names_are_in_one_place():
    """No module joins a path with one of the names, or with a name that begins like those made of a run's results."""
    here = {ROOT / "precision_scaling" / "runtime" / "paths.py"}
    # Outside of a workdir: a Hugging Face directory has a config.json, too.
    own = {ROOT / "precision_scaling" / "huggingface" / "directory.py"}
    for path in {*(ROOT / "precision_scaling").rglob("*.py")} - here - own:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                text = "".join(
                    part.value
                    for part in ast.walk(node.right)
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                )
                assert text not in NAMES, f"{path}:{node.lineno}: {text} is a name of paths.py"
                assert not text.startswith(("rows-", "layers-", "layer-stats")), f"{path}:{node.lineno}: {text}"


def documented() -> set[str]:
    """The paths of the tree in the document, relative to the workdir."""
    tree = re.search(r"```\nWORKDIR/\n(.*?)```", DOCUMENT, re.DOTALL)[1]
    parents: dict[int, str] = {}
    names, found = [""], set()
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in line.strip().split("   ")[0].split(", "):
            if name.startswith("."):  # layers-gptq.json, .png
                name = names[-1].partition(".")[0] + name
            names.append(name)
            path = parents.get(depth - 1, "") + name
            parents[depth] = path if path.endswith("/") else parents.get(depth, "")
            found.add(path.rstrip("/"))
    return found


def test_the_tree_of_the_document_has_every_name():
    parts = {part for path in documented() for part in path.split("/")}
    assert parts >= NAMES - {paths.RUNS, paths.COHORTS, paths.LOCKS, paths.QUANTIZED}
    found = documented()
    assert "runs/ID/checkpoint" in found and "cohorts/NAME-0of1/7/lanes.json" in found
    assert {"runs/ID/layers-gptq.json", "runs/ID/layers-gptq.png", "runs/ID/quantized/gptq-3/arrays"} <= found


def test_a_finished_study_has_what_the_document_says(finished_study):
    workspace, workdir = finished_study
    names = {run.id: "ID" for run in workspace.experiment.runs}
    found = set()
    for path in workdir.rglob("*"):
        parts = path.relative_to(workdir).parts
        inside = [i for i, part in enumerate(parts) if part in (paths.CHECKPOINT, paths.STATE, paths.ARRAYS)]
        if (parts[0] in (paths.RUNS, paths.COHORTS) and len(parts) < 3) or (inside and len(parts) > inside[0] + 1):
            continue
        found.add("/".join(re.sub("-(rtn|awq)", "-gptq", names.get(part, part)) for part in parts))
    assert found - {paths.LOCKS} <= documented() and len(found) >= 6
    assert {paths.CONFIG, paths.TABLE, "runs/ID/checkpoint", "runs/ID/rows-trained.json"} <= found


def test_paths_of_a_run():
    directory = paths.run(Path("w"), "a")
    assert directory == Path("w/runs/a") and paths.cohort(Path("w"), "n", "0of2") == Path("w/cohorts/n-0of2")
    assert paths.measurement(paths.rows(directory, "gptq-group32")) == "gptq-group32"
    assert paths.layer_stats(directory).name == "layer-stats.csv"
    assert paths.layer_stats(directory, "w4").name == "layer-stats-w4.csv"
    assert paths.packed(directory, "gptq", 3) == directory / "quantized" / "gptq-3"


def test_the_document_has_the_columns_of_the_table():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", DOCUMENT, re.MULTILINE)
    assert rows == list(results.COLUMNS.items())


def test_a_column_that_the_table_lacks_is_refused(tmp_path):
    row = {"run": "a", "N": 1, "D": 2, "loss": 1.0, "P_post": None, "method": "", "perplexity": 2.7}
    with pytest.raises(ValueError, match=r"no column of runs\.csv: perplexity"):
        results.write_rows(tmp_path, "trained", [row])
    with pytest.raises(ValueError, match="perplexity"):
        results.write_table(tmp_path / "runs.csv", [row])
    assert not list(tmp_path.iterdir())
    known = {name: value for name, value in row.items() if name != "perplexity"}
    results.write_rows(paths.run(tmp_path, "a"), "trained", [known])
    assert results.read_rows(paths.run(tmp_path, "a"), "trained") == [known]
