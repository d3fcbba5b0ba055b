"""A command for an environment with the installed wheel alone: import every module and read the package's data.

python tests/wheel.py
"""

import importlib
import pkgutil
from importlib import metadata, resources
from pathlib import Path

import gendiff

HERE = Path(__file__).parents[1]
DATA = ("data/crossed_sevens.npz", "data/traffic_smoke.npz", "feedback/page/index.html", "oracles/crossed_seven_32.npz")


def main() -> None:
    """Fail if a module or a data file is missing, or if the modules are the clone's."""
    assert HERE not in Path(gendiff.__file__).resolve().parents, f"gendiff must be installed, got {gendiff.__file__}"
    names = [module.name for module in pkgutil.walk_packages(gendiff.__path__, "gendiff.")]
    for name in names:
        try:
            if not name.endswith("__main__"):
                importlib.import_module(name)
        except ModuleNotFoundError as error:  # of an extra, which the error must name
            if "pip install 'gendiff[" not in str(error):
                raise
    for name in DATA:
        assert resources.files("gendiff").joinpath(name).read_bytes(), name
    top = {file.parts[0] for file in metadata.files("gendiff") or ()}
    assert "experiments" not in top, f"the wheel has {top}: a package of that name would shadow a user's own"
    print(f"gendiff {gendiff.__version__}: {len(names)} modules and the data files are in the wheel")


if __name__ == "__main__":
    main()
