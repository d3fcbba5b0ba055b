"""The arrows of the design: allowed imports, checked in the import statements of all files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "gendiff").rglob("*.py"))
HOMES = {
    "flax": "gendiff/nets",
    "orbax": "gendiff/checkpoint.py",
    "grain": "gendiff/data",
    "tensorflow_datasets": "gendiff/data",
    "starlette": "gendiff/feedback",
    "uvicorn": "gendiff/feedback",
    "PIL": "gendiff/feedback",
    "mujoco": "gendiff/data",
    "shapely": "gendiff/data",
    "libsumo": "gendiff/data",
    "sumolib": "gendiff/data",
    "h5py": "gendiff/data",
    "sklearn": "gendiff/metrics",
}


def imports(file: Path) -> set[str]:
    """Full names of imported modules and objects, also in functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file):
    place, found = str(file.relative_to(ROOT)), imports(file)
    packages = {name.split(".")[0] for name in found}
    assert {name for name, home in HOMES.items() if name in packages and not place.startswith(home)} == set()
    assert not packages & {"experiments", "tests", "tensorflow", "pytest"}
    own = {name.split(".")[1] for name in found if name.startswith("gendiff.")}
    if place.startswith("gendiff/nets"):
        assert own <= {"types", "check", "geometry", "nets"}, "networks know nothing of methods"
    if not place.startswith("gendiff/methods"):
        assert "methods" not in own


def test_the_parse_sees_imports():
    assert "flax.linen" in imports(ROOT / "gendiff" / "nets" / "mlp.py")
    assert len(FILES) > 15
