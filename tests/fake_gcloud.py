"""Stands in for gcloud on the PATH of tests: records every call and plays a TPU slice of two workers, or
$FAKE_WORKERS, on this machine.

State is kept in $FAKE_GCLOUD: `calls` (a JSON list per line), bucket (gs://bucket) and a directory for every slice
with `states` (what `describe` answers, one per line; the last one stays) and worker0 and worker1, the home directories
where `ssh` really runs its commands.
"""

import json
import os
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

HOME = Path(os.environ["FAKE_GCLOUD"])


def option(arguments: list[str], name: str) -> str | None:
    return next((a.split("=", 1)[1] for a in arguments if a.startswith(f"--{name}=")), None)


def fail(message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(1)


def workers(name: str) -> list[Path]:
    return [HOME / name / f"worker{i}" for i in range(int(os.environ.get("FAKE_WORKERS", "2")))]


def nodes(name: str) -> list[str]:
    """The slices of a request."""
    count, prefix = option(sys.argv, "node-count"), option(sys.argv, "node-prefix")
    return [f"{prefix}-{i}" for i in range(int(count))] if count else [name]


def queued_resources(action: str, name: str) -> None:
    states = HOME / name / "states"
    if action == "create":
        if states.exists():
            fail("ERROR: (gcloud) ALREADY_EXISTS: Resource already exists")
        queue = os.environ.get("FAKE_QUEUE", "WAITING_FOR_RESOURCES,PROVISIONING,ACTIVE")
        for node in nodes(name):
            for worker in workers(node):
                worker.mkdir(parents=True)
        states.parent.mkdir(exist_ok=True)
        states.write_text("\n".join(queue.split(",")))
        for node in nodes(name):  # slices that were queued for as one have one state
            if node != name:
                (HOME / node / "states").symlink_to(states)
    elif action == "describe":
        if not states.exists():
            fail("ERROR: (gcloud) NOT_FOUND: Resource 'queued resource' was not found")
        first, *rest = states.read_text().split()
        states.write_text("\n".join(rest or [first]))
        if first == "NO_NETWORK":
            fail("ERROR: (gcloud) There was a problem refreshing your current auth tokens")
        print(first)
    elif action == "delete":
        for node in {name, *(link.parent.name for link in HOME.glob(f"{name}-*/states") if link.is_symlink())}:
            shutil.rmtree(HOME / node)


def tpu_vm(action: str, arguments: list[str]) -> None:
    remote = [a for a in arguments if not a.startswith("--")]
    name = next(a.split(":")[0] for a in remote if ":" in a or action == "ssh")
    states = HOME / name / "states"
    if not states.exists() or states.read_text().split()[0] != "ACTIVE":
        fail("ERROR: (gcloud) SSH failed")
    chosen = option(arguments, "worker")
    chosen = workers(name) if chosen == "all" else [workers(name)[int(chosen)]]
    if action == "ssh":
        command = ["bash", "-c", option(arguments, "command")]
        statuses = [subprocess.run(command, cwd=worker).returncode for worker in chosen]
        sys.exit(int(any(statuses)))
    for worker in chosen:
        source, target = (worker / a.split(":")[1] if ":" in a else Path(a) for a in remote)
        if source.is_dir():
            shutil.copytree(source, target / source.name, dirs_exist_ok=True)
        else:
            shutil.copy(source, target)


def storage(action: str, arguments: list[str]) -> None:
    if host := os.environ.get("STORAGE_EMULATOR_HOST"):
        objects(host, action, arguments[-1])
        return
    paths = [Path(str(HOME) + a.removeprefix("gs:/")) if a.startswith("gs://") else Path(a) for a in arguments]
    paths = [path for path in paths if not str(path).startswith("--")]
    if not paths[0].exists():
        fail("ERROR: (gcloud.storage) One or more URLs matched no objects.")
    if action == "rsync":
        shutil.copytree(*paths, dirs_exist_ok=True)


def objects(host: str, action: str, url: str) -> None:
    """`ls --long` and `cat` of objects of a server."""
    name, path = url.removeprefix("gs://").split("/", 1)
    if action == "cat":
        with urllib.request.urlopen(
            f"{host}/storage/v1/b/{name}/o/{urllib.parse.quote(path, safe='')}?alt=media"
        ) as answer:
            print(answer.read().decode(), end="")
        return
    prefix, end = path.split("**")
    with urllib.request.urlopen(f"{host}/storage/v1/b/{name}/o?prefix={urllib.parse.quote(prefix)}") as answer:
        found = [item for item in json.load(answer).get("items", ()) if item["name"].endswith(end)]
    if not found:
        fail("ERROR: (gcloud.storage.ls) One or more URLs matched no objects.")
    for item in found:
        print(f"{item['size']:>10}  {item['updated']}  gs://{name}/{item['name']}")
    print(f"TOTAL: {len(found)} objects")


if __name__ == "__main__":
    with open(HOME / "calls", "a") as calls:
        calls.write(json.dumps(sys.argv[1:]) + "\n")
    match sys.argv[1:]:
        case ["compute", "tpus", "queued-resources", action, name, *_]:
            queued_resources(action, name)
        case ["compute", "tpus", "tpu-vm", "ssh" | "scp" as action, *rest]:
            tpu_vm(action, rest)
        case ["storage", action, *rest]:
            storage(action, rest)
        case other:
            fail(f"ERROR: (gcloud) Invalid choice: {other}")
