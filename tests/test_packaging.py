"""The package: a wheel and an editable install hold the same four parts, and the pins are whole."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import registry

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PARTS = ("registry", "registry.store.store", "registry.models", "registry.cli.app")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree without anything that git ignores."""
    place = tmp_path_factory.mktemp("build") / "tree"
    ignored = (".*", "build", "*.egg-info", "__pycache__", "benchmark-*", "*.so", "*.pyd")
    shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(*ignored))
    return place


def built(tree: Path, place: Path, **environment: str) -> Path:
    """The wheel that pip makes of the tree."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(place),
    ]
    subprocess.run([*command, str(tree)], check=True, capture_output=True, env={**os.environ, **environment})
    (found,) = place.glob("*.whl")
    shutil.rmtree(tree / "build")
    return found


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tree, tmp_path_factory.mktemp("wheel"))


def compiled(wheel: Path) -> list[str]:
    return [name for name in zipfile.ZipFile(wheel).namelist() if Path(name).suffix in (".so", ".pyd")]


def test_a_wheel_holds_the_four_parts_under_one_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for folder, target in {"registry": "", "store": "store/", "models": "models/", "cli": "cli/"}.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert f"registry/{target}{path.relative_to(ROOT / folder)}" in names
    for path in (ROOT / "registry").rglob("*"):
        if path.suffix in (".css", ".js"):
            assert f"registry/{path.relative_to(ROOT / 'registry')}" in names
    assert "registry/reports/page.css" in names
    assert "registry/py.typed" in names
    assert {name.split("/")[0] for name in names} == {
        "registry",
        f"torch_registry-{registry.__version__}.dist-info",
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (entry,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "registry = registry.cli:main" in zipfile.ZipFile(wheel).read(entry).decode()


def test_a_wheel_holds_what_the_compiler_built(wheel: Path) -> None:
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip("there is no compiler")
    (name,) = compiled(wheel)
    assert name.startswith("registry/store/_split.")


def test_an_install_without_a_compiler_works(tree: Path, tmp_path: Path) -> None:
    wheel = built(tree, tmp_path, CC="false", LDSHARED="false")
    assert not compiled(wheel)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "from registry.store import classes; print(classes.__file__, classes.WAY.name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tmp_path / "site" / "registry" / "store" / "classes.py"), "numpy"]


def test_a_source_distribution_holds_all_that_a_build_needs(tree: Path, tmp_path: Path) -> None:
    program = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", program], cwd=tree, capture_output=True, check=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"store/_split.c", "store/_split.pyi", "store/splitting.py", "pyproject.toml", "setup.py"} <= names
    assert not any(name.endswith((".so", ".pyd")) for name in names)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the wheel is installed."""
    target = tmp_path_factory.mktemp("installed") / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    return target


def test_an_installed_wheel_works_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        f"sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"import {', '.join(PARTS)}\n"
        "import torch; from registry import Registry\n"
        "assert registry.__file__.startswith(sys.path[0]) and registry.store.store.__file__.startswith(sys.path[0])\n"
        "print(Registry('r').save('net', {'model': {'w': torch.ones(3)}}))\n"
        "from registry.cli import main; sys.argv = ['registry', '--root', 'r', 'list']; main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "net:v1" in done.stdout


@pytest.mark.slow
def test_an_installed_wheel_does_the_work_of_the_demo(installed: Path, tmp_path: Path) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import registry; assert registry.__file__.startswith(sys.path[0])\n"
        "from registry.cli import main; main()\n"
    )

    def run(line: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-c", program, *line.split()],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, f"{line}: {done.stderr}"
        return done.stdout

    run("init")
    few = "--epochs 1 --set samples=100"
    run(f"train lenet5 {few}")
    run("diff lenet5@best lenet6 --format html -o diff.html", status=1)
    assert "<style>" in (tmp_path / "diff.html").read_text()
    run("plan lenet5@best lenet6 --everything --freeze loaded -o plan.json")
    run(f"train lenet6 --from lenet5@best --freeze loaded {few}")
    run("compare lenet5 lenet6 --format html -o compare.html")
    run("export lenet5@best lenet5.pt")
    run("import lenet5.pt --name again")
    assert "again" in run("list")
    for line in ("history lenet5", "best lenet5 --by accuracy", "lineage lenet6", "status", "gc", "verify"):
        run(line)


def test_the_editable_install_serves_the_four_parts_from_the_checkout(tmp_path: Path) -> None:
    program = f"import {', '.join(PARTS)}; print(registry.store.store.__file__, registry.cli.app.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(ROOT / "store" / "store.py"), str(ROOT / "cli" / "app.py")]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    found = {}
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line), line
        name, _, number = line.partition("==")
        found[re.sub("[-_.]+", "-", name).lower()] = number
    return found


def test_every_dependency_is_pinned_by_name_and_version_alone() -> None:
    required = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    for requirement in required:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        assert name is not None
        assert name[0].lower() in pins(), requirement


def test_torch_and_torchvision_are_pinned_as_the_pair_that_runs() -> None:
    import torch
    import torchvision

    assert torchvision.ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5).numel() == 0
    assert pins()["torch"] == version("torch").partition("+")[0]
    assert pins()["torchvision"] == version("torchvision").partition("+")[0]


def test_every_dependency_is_explained() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text()
    for requirement in PROJECT["project"]["dependencies"]:
        name = re.split(r"[<>=]", requirement)[0]
        assert f"| {name} |" in text


def test_the_version_is_the_same_everywhere() -> None:
    assert PROJECT["project"]["version"] == registry.__version__ == version("torch-registry")


def test_what_must_pass_before_landing_is_what_the_readme_says() -> None:
    assert "make test" in (ROOT / "README.md").read_text()
    assert {"make check", "make test"} <= set((ROOT / ".ci" / "run").read_text().splitlines())
