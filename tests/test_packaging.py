"""The package works from a checkout, as an editable install and as a wheel, without any download."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "tri_mpk", "ops", "scheduler")
PROBE = """
import sys
import tri_mpk.ops.embedding, tri_mpk.scheduler, tri_mpk.scheduler.device, tri_mpk.models
for module in (tri_mpk, tri_mpk.ops.embedding, tri_mpk.scheduler):
    print(module.__file__)
try:
    import ops
except ImportError:
    print("no top-level ops")
"""


def run(command: list[object], cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=clean | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command} failed:\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result.stdout


def probe(python: object, cwd: Path, script: Path | None = None, **environment: str) -> list[Path | str]:
    """Where the three modules came from, and whether `ops` is a top-level name too.

    A script's own folder is on its path, the working folder is not; with -c it is the other way round.
    """
    if script is None:
        command = [python, "-c", PROBE]
    else:
        script.write_text(PROBE)
        command = [python, script]
    first, second, third, *rest = run(command, cwd, **environment).splitlines()
    return [Path(first), Path(second), Path(third), *rest]


def files_of_checkout(root: Path) -> list[Path | str]:
    return [root / "tri_mpk/__init__.py", root / "ops/embedding.py", root / "scheduler/__init__.py"]


@pytest.fixture(scope="module")
def build_tools() -> None:
    for name, minimum in (("setuptools", 77), ("pip", 22)):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed, so nothing can be built without a download")
        if int(version.split(".")[0]) < minimum:
            pytest.skip(f"{name} {version} is older than {minimum}")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources: builds leave files beside them."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(build_tools, checkout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    run([*pip, "--wheel-dir", folder, checkout], cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def make_environment(folder: Path, *install: object) -> Path:
    """A virtual environment that sees this interpreter's packages, with something installed; its Python."""
    run([sys.executable, "-m", "venv", "--without-pip", folder], cwd=folder.parent)
    python = folder / "bin/python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=folder).strip())
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "outer.pth").write_text("\n".join(packages) + "\n")  # comes after this environment's own packages
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation"]
    run([*pip, "--no-index", "--ignore-installed", *install], cwd=folder)
    return python


@pytest.mark.parametrize("cwd", [ROOT, Path("/")], ids=["inside", "outside"])
def test_from_a_checkout(cwd):
    assert probe(sys.executable, cwd, PYTHONPATH=str(ROOT))[:3] == files_of_checkout(ROOT)


def test_importing_the_package_loads_no_framework():
    code = "import sys, tri_mpk; print({'torch', 'triton', 'transformers', 'numpy'} & set(sys.modules))"
    assert run([sys.executable, "-c", code], cwd=ROOT) == "set()\n"


def test_editable_install(build_tools, checkout, tmp_path):
    python = make_environment(tmp_path / "environment", "-e", checkout)

    assert probe(python, tmp_path) == [*files_of_checkout(checkout), "no top-level ops"]
    assert probe(python, checkout)[:3] == files_of_checkout(checkout)


def test_wheel_install(wheel, tmp_path):
    python = make_environment(tmp_path / "environment", wheel)

    *paths, ops = probe(python, tmp_path)
    site = paths[0].parents[1]
    assert site.is_relative_to(tmp_path)
    installed = [site / "tri_mpk" / name for name in ("__init__.py", "ops/embedding.py", "scheduler/__init__.py")]
    assert (paths, ops) == (installed, "no top-level ops")
    # in the repository a script still runs the wheel, and whatever looks in the working folder first runs the checkout
    assert probe(python, ROOT, script=tmp_path / "probe.py")[:3] == installed
    assert probe(python, ROOT)[:3] == files_of_checkout(ROOT)


def test_wheel_adds_one_name_and_the_command(wheel):
    version = re.search(r'^__version__ = "(.+)"$', (ROOT / "tri_mpk/__init__.py").read_text(), re.MULTILINE)[1]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = [archive.read(n).decode() for n in names if n.endswith("/entry_points.txt")]

    assert {name.split("/")[0] for name in names} == {"tri_mpk", f"tri_mpk-{version}.dist-info"}
    sources = {f"tri_mpk/{p.relative_to(ROOT)}" for d in ("ops", "scheduler") for p in (ROOT / d).rglob("*.py")}
    sources |= {str(p.relative_to(ROOT)) for p in (ROOT / "tri_mpk").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert {name for name in names if name.endswith(".json")} == {
        f"tri_mpk/gpus/{path.name}" for path in (ROOT / "tri_mpk/gpus").iterdir()
    }
    assert "tri-mpk = tri_mpk.cli:main" in entry_points
