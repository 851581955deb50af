"""The compiled kernels on a GPU, and that what asks them needs torch alone."""

from __future__ import annotations

import sys

import pytest
import torch

from pemt.commands.bench import make_parser
from tests import gpu
from tests.conftest import python
from tests.ops import gpu_checks
from tests.ops.gpu_checks import CHECKS

ALONE = """
import sys
from importlib.metadata import packages_distributions
needed = {"torch", "functorch", "torchgen", "numpy", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock",
          "fsspec", "typing_extensions", "packaging", "setuptools", "pkg_resources", "_distutils_hack"}
for name in {*packages_distributions(), "pemt", "tests"} - needed:
    sys.modules[name] = None  # an import of it is an error
del sys.modules["pemt"], sys.modules["tests"]
from tests.ops import standalone
standalone.package_alone()
from tests.ops import gpu_checks
def wrong(device):
    raise RuntimeError("wrong on purpose")
gpu_checks.BRIEF = {"a wrong one": wrong, **gpu_checks.BRIEF}
sys.exit(standalone.main(["--device", "cpu", "--brief"]))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name, monkeypatch):
    monkeypatch.setenv("PEMT_OPS", "cuda")
    CHECKS[name]("cuda")


def test_torch_alone_is_enough_and_a_failure_stops_no_other_check():
    """On the CPU: what a GPU is asked is the same, on another device."""
    done = python("-c", ALONE)
    assert "FAILED  a wrong one" in done.stdout, done.stderr
    assert "wrong on purpose" in done.stdout
    assert f"{len(gpu_checks.BRIEF)} passed, 1 failed" in done.stdout, done.stdout
    assert done.returncode == 1


@pytest.mark.parametrize("name", sorted(set(CHECKS) - set(gpu_checks.BRIEF)))
def test_what_a_gpu_is_asked_holds_on_the_cpu(name, monkeypatch):
    monkeypatch.setenv("PEMT_OPS", "cpu")
    CHECKS[name]("cpu")


def test_make_gpu_goes_on_after_a_failure_and_tells_what_was_left_out(
    tmp_path, monkeypatch, capsys
):
    programs = {
        "bad": "print('as it went'); raise ValueError('wrong')",
        "foreign": "import a_package_of_nobody",
        "ours": "import pemt.a_module_of_nobody",
        "good": "import sys; print('{}'); print('a note', file=sys.stderr)",
    }
    monkeypatch.setattr(
        gpu, "steps",
        lambda dry_run: [gpu.Step(name=name, words=("-c", text, "--json")) for name, text in programs.items()],
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["gpu", "--output_dir", str(tmp_path)])
    assert gpu.main() == 1
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[-4:])
    assert told["bad"].startswith("FAILED with exit status 1")
    assert told["foreign"] == "left out: no a_package_of_nobody here"
    assert told["ours"].startswith("FAILED with exit status 1")
    assert told["good"].startswith("passed")
    assert (tmp_path / "good.json").read_text() == "{}\n"
    assert (tmp_path / "good.log").read_text() == "a note\n"
    assert "ValueError: wrong" in (tmp_path / "bad.log").read_text()


@pytest.mark.parametrize("dry_run", [False, True])
def test_make_gpu_asks_the_op_first_and_its_benches_are_commands(dry_run):
    first, *others = gpu.steps(dry_run=dry_run)
    assert first.words[:2] == gpu.CHECKS
    benches = [step.words[3:] for step in others if step.words[:3] == ("-m", "pemt", "bench")]
    assert len(benches) == 6
    for words in benches:
        assert make_parser().parse_args(words).verb == words[0]
