"""What `pip install .` gives: the command, recipes and C++ sources, outside of any clone."""

from __future__ import annotations

import configparser
import shutil
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.conftest import ROOT, python

BUILD_INPUTS = ("pemt", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def copied(folder: Path) -> Path:
    """What a build reads, in a folder of its own."""
    for name in BUILD_INPUTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def test_an_editable_install_is_a_path_that_checkers_and_editors_follow(tmp_path: Path) -> None:
    """They read `.pth` files and run no import hooks, so `py.typed` counts only where there is a plain path."""
    folder = copied(tmp_path)
    program = "from setuptools.build_meta import build_editable; build_editable('dist')"
    (folder / "dist").mkdir()
    built = python("-c", program, cwd=folder)
    assert built.returncode == 0, built.stderr
    (path,) = (folder / "dist").glob("*.whl")
    editable = zipfile.ZipFile(path)
    inside = [name for name in editable.namelist() if ".dist-info/" not in name]
    assert len(inside) == 1, "no finder beside it"
    place = Path(editable.read(inside[0]).decode().strip())
    assert place.samefile(folder)
    assert (place / "pemt" / "py.typed").is_file()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The package's wheel, built from a copy, since building leaves folders behind."""
    folder = copied(tmp_path_factory.mktemp("wheel"))
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist")
    built = python("-m", "pip", "wheel", *options, ".", cwd=folder)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (folder / "dist").glob("pemt_trainer-*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    package = [path for path in (ROOT / "pemt").rglob("*") if path.is_file()]
    expected = {
        path.relative_to(ROOT).as_posix() for path in package if "__pycache__" not in path.parts
    }
    assert {"pemt/py.typed", "pemt/recipes/source.yaml", "pemt/recipes/adapt.yaml"} <= expected
    assert expected - set(wheel.namelist()) == set()


def test_the_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pemt"}


def test_metadata(wheel: zipfile.ZipFile) -> None:
    (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = HeaderParser().parsestr(wheel.read(f"{folder}/METADATA").decode())
    assert metadata["Name"] == "pemt-trainer"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    entry_points = wheel.read(f"{folder}/entry_points.txt").decode()
    assert "pemt = pemt.__main__:program" in entry_points
    licence = wheel.read(f"{folder}/licenses/LICENSE").decode()
    assert "Apache License" in licence


def test_the_command_runs_from_the_wheel_alone(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    command = ("-m", "pemt", "source", "--config", "source", "--print_config")
    run = python(*command, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert "per_device_train_batch_size: 128" in run.stdout, run.stderr


def test_the_oldest_releases_are_those_that_are_accepted() -> None:
    """What `make test-oldest` installs is the lower end of each range in setup.cfg."""
    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    lines = options["options"]["install_requires"] + options["options.extras_require"]["peft"]
    wanted = [Requirement(line) for line in lines.split("\n") if line and line[0] != "#"]
    pins = (ROOT / ".ci" / "oldest.txt").read_text().split("\n")
    oldest = dict(line.split("==") for line in pins if "==" in line)
    lowest = {
        each.name: specifier.version.removesuffix(".*")
        for each in wanted
        for specifier in each.specifier
        if specifier.operator in (">=", "==")
    }
    assert {"torch", "transformers", "accelerate", "deepspeed"} <= lowest.keys()
    for name, version in lowest.items():
        assert Version(oldest[name]) == Version(version), name
