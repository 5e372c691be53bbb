"""Lower floors never import higher ones, and extras stay in their rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cnf

ROOT = Path(cnf.__file__).parent

FLOORS = [
    {
        "registry",
        "arrays",
        "files",
        "compiling",
        "onednn",
        "brgemm",
        "tanh",
        "bijections",
        "nets",
        "divergence",
        "ode",
        "distributions",
        "data",
    },
    {"costs"},
    {"transforms"},
    {"flow", "storage", "torch_distribution"},
    {"models", "objectives", "plots", "measure", "importers"},
    {"training"},
    {"runs", "trial"},
    {"compare", "estimator"},
    {"cli", "__main__"},
]
HOMES = {
    "torchdiffeq": "ode",
    "matplotlib": "plots",
    "typer": "cli",
    "tqdm": "training",
    "pyarrow": "data",
}


def modules() -> dict[str, Path]:
    paths = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def imports(path: Path) -> set[str]:
    """What a file imports when it runs; annotations may look upstairs."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    ]
    skipped = {id(inner) for node in typing for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def floor(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("name", sorted(modules()))
def test_no_import_goes_upstairs(name):
    own = floor(name.split(".")[0])
    for imported in imports(modules()[name]):
        head, _, rest = imported.partition(".")
        room = rest.split(".")[0]
        if head == "cnf" and (ROOT / room).exists() | (ROOT / f"{room}.py").exists() and room:
            assert floor(room) <= own, f"cnf.{name} imports {imported} from a higher floor"


def test_first_floor_rooms_keep_to_themselves():
    shared = {"registry", "arrays", "files", "compiling", "onednn", "brgemm", "tanh"}
    allowed = shared | set(sys.stdlib_module_names)
    for name, path in modules().items():
        room = name.split(".")[0]
        if room not in FLOORS[0]:
            continue
        for imported in imports(path):
            head, _, rest = imported.partition(".")
            target = rest.split(".")[0]
            if head == "cnf" and target:
                assert target in {room, *allowed}, f"cnf.{name} imports {imported}"


@pytest.mark.parametrize(("library", "home"), HOMES.items())
def test_libraries_stay_in_their_rooms(library, home):
    for name, path in modules().items():
        if name.split(".")[0] != home:
            heads = {imported.split(".")[0] for imported in imports(path)}
            assert library not in heads, f"cnf.{name} imports {library}; its room is {home}"


def test_importing_needs_the_core_only_and_changes_nothing():
    code = """
import sys, torch
class Wall:
    def find_spec(self, name, path=None, target=None):
        extras = {"matplotlib", "typer", "tqdm", "sklearn", "pyarrow"}
        if name.split(".")[0] in extras:
            raise ImportError(name)
sys.meta_path.insert(0, Wall())
state, dtype, threads = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
import cnf
assert torch.equal(torch.get_rng_state(), state)
assert torch.get_default_dtype() == dtype and torch.get_num_threads() == threads
cnf.ffjord(2).log_prob(torch.zeros(2))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_file_is_too_long():
    for name, path in modules().items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 505, f"cnf.{name} has {lines} lines"
