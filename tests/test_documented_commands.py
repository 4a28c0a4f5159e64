"""What the documents tell a reader to type: dry runs print what they show, and every override is an option there is."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from absl import flags

from precision_scaling.config import command_line

ROOT = Path(__file__).parent.parent
LAUNCH = (ROOT / "docs" / "launch.md").read_text()
DOCUMENTS = [
    ROOT / "README.md",
    *(
        path
        for pattern in ("docs/*.md", "configs/*.py", "precision_scaling/config/base.py")
        for path in sorted(ROOT.glob(pattern))
    ),
]
OVERRIDE = re.compile(r"--config\.([\w.]+)=('[^']*'|\"[^\"]*\"|[^\s`'\")]+)")


def sessions(text: str) -> list[tuple[str, str]]:
    """(command, output) of every console block: lines that begin with "$ " and what follows them."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    parts = [part for block in blocks for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return [tuple(part.split("\n", 1)) for part in parts]


@pytest.mark.parametrize(("command", "output"), sessions(LAUNCH), ids=lambda text: text[:60])
def test_a_documented_dry_run_prints_what_the_document_shows(command, output):
    assert "--dry_run" in command
    environment = {key: value for key, value in os.environ.items() if key.startswith(("PATH", "HOME", "LANG"))}
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == output


def test_every_launch_script_has_a_dry_run_in_the_documents():
    scripts = {path.name for path in (ROOT / "launch").iterdir()} - {"arguments.sh", "slurm_job.sh", "tpu_worker.sh"}
    assert {name for command, _ in sessions(LAUNCH) for name in scripts if f"launch/{name} " in command} == scripts


def overrides() -> list[tuple[str, str, str]]:
    found = [
        (path.name, key, value.rstrip(".,;:"))
        for path in DOCUMENTS
        for key, value in OVERRIDE.findall(path.read_text())
        if key != "key"  # --config.key=value stands for any
    ]
    return sorted(set(found))


@pytest.mark.parametrize(("document", "key", "value"), overrides())
def test_a_documented_override_is_parsed(document, key, value, monkeypatch):
    values = flags.FlagValues()
    command_line.define_config(values)
    arguments = ["command", f"--config={ROOT / 'configs' / 'base.py'}", *shlex.split(f"--config.{key}={value}")]
    monkeypatch.setattr("sys.argv", arguments)  # where ml_collections looks for overrides
    values(arguments)
    config = values["config"].value
    for part in key.split("."):
        config = config[part]
    if key == "mesh":  # as a whole it may be "auto" alone
        config = config.run if config.run == config.fsdp else config
    config = ",".join(map(str, config)) if isinstance(config, tuple) else config
    assert str(config) == str(value).strip("'\"") or float(config) == float(value)


def test_overrides_are_found_in_the_documents():
    found = overrides()
    assert ("README.md", "train.tokens", "500_000") in found
    assert {"README.md", "precision.md", "base.py", "paper.py"} <= {document for document, _, _ in found}


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "launch").iterdir()))
def test_a_launch_script_is_bash_that_parses_and_passes_shellcheck_where_there_is_one(script):
    subprocess.run(["bash", "-n", f"launch/{script}"], cwd=ROOT, check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", "-P", "SCRIPTDIR", f"launch/{script}"], cwd=ROOT, check=True)
