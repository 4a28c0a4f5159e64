"""Which room of the house imports which: one way only, from errors up to the commands, and no file in a circle."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A room imports from itself and from the floors before its own, never from its neighbours.
FLOORS = (
    {"precision_scaling.errors"},
    {"precision_scaling.runtime", "precision_scaling.numerics"},
    {"precision_scaling.quantize", "precision_scaling.data"},
    {"precision_scaling.model"},
    {"precision_scaling.training"},
    {"precision_scaling.ptq"},
    {"precision_scaling.config"},
    {"precision_scaling.study"},
    {"precision_scaling.huggingface", "precision_scaling.train", "precision_scaling.layer_stats"}
    | {"precision_scaling.loss", "precision_scaling.sample"}
    | {"precision_scaling.ptq.__main__"},
)
API = "precision_scaling.api"  # the project from Python, above all rooms of both packages
ANALYSIS_FLOORS = (
    {"precision_scaling.errors"},
    {"precision_scaling.runtime", "precision_scaling.numerics"},
    {"analysis.wording"},
    {"analysis.table"},
    {"analysis.laws"},
    {"analysis.fitting"},
    {"analysis.planning"},
    {"analysis.reporting"},
    {"analysis.fit", "analysis.compare", "analysis.plan", "analysis.predict", "analysis.report"},
)


def modules(*packages: str) -> dict[str, Path]:
    """{dotted name: file} of all modules of packages."""
    paths = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules among `known` that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {part if part in known else node.module for part in parts}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known.keys()


def room(module: str, floors) -> tuple[int, str]:
    """The floor and the name of the room that a module is in."""
    names = {name: i for i, floor in enumerate(floors) for name in floor}
    within = [name for name in names if module == name or module.startswith(f"{name}.")]
    assert within, f"{module} is in no room"
    name = max(within, key=len)
    return names[name], name


def test_rooms_import_from_the_floors_below_alone():
    known = modules("precision_scaling", "analysis")
    for module, path in known.items():
        if module in ("precision_scaling", "analysis"):
            assert all(name.startswith(API) for name in imports(path, known))
            continue
        if module.startswith(API):
            continue
        floors = FLOORS if module.startswith("precision_scaling.") else ANALYSIS_FLOORS
        floor, name = room(module, floors)
        for imported in imports(path, known) - {"precision_scaling", "analysis"}:
            below, other = room(imported, floors)
            assert below < floor or other == name, f"{module} imports {imported}"


def test_configs_import_the_package_and_not_each_other():
    known = modules("configs", "precision_scaling", "analysis", "tests", "benchmarks")
    for module, path in modules("configs").items():
        assert all(name.startswith("precision_scaling.") for name in imports(path, known)), module


def test_no_file_imports_itself_by_way_of_others():
    known = modules("precision_scaling", "analysis", "configs", "benchmarks")
    left = {module: imports(path, known) - {module} for module, path in known.items()}
    while done := {module for module, needed in left.items() if not needed & left.keys()}:
        left = {module: needed for module, needed in left.items() if module not in done}
    assert not left, f"in a circle, or above one: {', '.join(left)}"
