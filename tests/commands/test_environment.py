"""Working folder, streams, home and paths of whoever calls: one line, or the right result."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pemt.commands.fields import FILES, FOLDERS
from pemt.config.command_line import command_parser
from pemt.config.parse import parse_config
from pemt.config.schema import PATHS, AdaptConfig, ConfigError
from pemt.data import DataError, load_task_data
from pemt.data.examples import local_examples
from pemt.data.loading import cache_faults
from pemt.engine import Engine
from pemt.engine.environment import (
    can_be_written,
    own_cache,
    temporary_folder,
    use_writable_caches,
)
from pemt.model.base import BaseModelError, load_pretrained
from pemt.model.tokenizer import load_tokenizer
from pemt.run.prepare import warmup_notes
from pemt.storage.hub import local_folder
from pemt.sweep.plan import read_sweep
from pemt.tasks import get_task
from tests.conftest import ROOT
from tests.support.tiny import adapt_config, make_base, make_tokenizer, tiny_task, write_task_files

TASK = "tiny-environment"
# Modules that pemt or its libraries import, of the standard library too.
NAMES = ("evaluate", "tokenizers", "typing", "signal", "select", "queue", "wandb", "tensorflow")
CACHES = (
    *("HF_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_XET_CACHE"),
    *("HF_EVALUATE_CACHE", "HF_METRICS_CACHE"),
    *("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "MPLCONFIGDIR"),
    *("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HUGGINGFACE_HUB_CACHE"),
)


def python(
    *arguments: str,
    cwd: Path,
    environment: dict[str, str] | None = None,
    shell: str = "",
    encoding: str = "utf-8",
) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    command: Any = [sys.executable, *arguments]
    if shell:
        command = ["sh", "-c", f'"$0" "$@" {shell}', *command]
    return subprocess.run(
        command,
        cwd=cwd,
        env=given,
        capture_output=True,
        encoding=encoding,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize("path", [str(ROOT), f":{ROOT}", f"{ROOT}:"])
def test_the_users_modules_are_not_imported(tmp_path: Path, path: str) -> None:
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text("raise SystemExit(f'{__name__} of the user')\n")
    for name in ("datasets", "yaml"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('a folder of the user')\n")
    what = ["tasks"] if path == str(ROOT) else ["--version"]
    start = ["-m", "pemt"]
    if path.startswith(":"):  # the console script, and a PYTHONPATH with an empty entry
        start, what = (
            ["-c", "import sys, pemt.__main__ as m; sys.argv[1:] = ['tasks']; m.program()"],
            [],
        )
    done = python(*start, *what, cwd=tmp_path, environment={"PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "of the user" not in done.stdout + done.stderr


IN_STREAMS = """
import os, sys
from pemt.engine.environment import open_streams
open_streams()
assert [os.fstat(n) and n for n in range(3)] == [0, 1, 2]
file = open({file!r}, "w")
print('{{"text": "naïve 日本 \\U0001f600"}}', flush=True)
print("an error", file=sys.stderr)
assert not sys.stdin.read() or True
os.write(1, b"what a library prints\\n")
assert file.fileno() > 2
"""


@pytest.mark.parametrize("shell", [">&-", ">&- 2>&-", "<&- >&- 2>&-", "2>&-"])
def test_closed_streams(tmp_path: Path, shell: str) -> None:
    file = tmp_path / "data"
    done = python("-c", IN_STREAMS.format(file=str(file)), cwd=tmp_path, shell=shell)
    assert done.returncode == 0, done.stderr
    assert file.read_text() == "", "what was printed went into the next file that was opened"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8", "cp1252"])
def test_narrow_streams_keep_json_json(tmp_path: Path, encoding: str) -> None:
    code = IN_STREAMS.format(file=str(tmp_path / "data"))
    done = python(
        "-c",
        code,
        cwd=tmp_path,
        environment={"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
        encoding=encoding,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0]) == {"text": "naïve 日本 \U0001f600"}


@pytest.fixture
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in which nothing can be made (chmod would not stop root)."""
    (tmp_path / "home").write_text("a file")
    (tmp_path / "tmp").mkdir()
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_caches_go_where_they_can_be_written(
    no_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in CACHES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    use_writable_caches()
    folder = temporary_folder()
    assert Path(folder).parent == no_home / "tmp"
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert os.environ["HF_DATASETS_CACHE"].startswith(folder)
    assert os.environ["TORCH_EXTENSIONS_DIR"].startswith(folder)
    assert own_cache().startswith(folder)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "HF_HOME" in told
    use_writable_caches()
    assert capsys.readouterr().err == ""


def test_a_home_that_can_be_written_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "made-later"))
    use_writable_caches()
    assert "HF_DATASETS_CACHE" not in os.environ
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""
    assert own_cache() == str(tmp_path / "made-later" / ".cache" / "pemt")
    assert not can_be_written("~nobody-of-this-name/.cache")


def test_somebody_elses_temporary_folder_is_not_used(no_home: Path) -> None:
    Path(temporary_folder()).chmod(0o777)
    with pytest.raises(PermissionError, match="TMPDIR"):
        temporary_folder()


def test_a_full_disk_under_the_cache_is_one_line() -> None:
    with (
        pytest.raises(DataError, match=r"No space left on device: /x\); set HF_HOME"),
        cache_faults(),
    ):
        raise OSError(28, "No space left on device", "/x")


@pytest.mark.soak
def test_a_run_in_a_home_that_cannot_be_written(no_home: Path) -> None:
    """And with no stdout: the whole of it, as a user would start it; above each by itself."""
    base = make_base(no_home / "base")
    write_task_files(no_home / "data", seed=0)
    (no_home / "task.yaml").write_text(
        "name: mine\ndescription: Is it red.\ntemplate: 'text : {text}'\nlabels: ['no', 'yes']\nmetrics: [accuracy]\n"
    )
    flags = (
        f"--method adapter --bf16 false --max_steps 2 --per_device_train_batch_size 4 --model_name_or_path {base} "
        "--task_name mine --task_file task.yaml --data_dir data --output_dir out --eval_strategy no --warmup_steps 5"
    )
    start = ["-m", "pemt", "adapt", *flags.split()]
    # nothing is compiled, which would take minutes
    done = python(*start, cwd=no_home, shell=">&-", environment={"PEMT_OPS": "reference"})
    assert done.returncode == 0, done.stderr
    assert (no_home / "out" / "all_results.json").is_file()
    assert done.stderr.count("HF_HOME") == 1
    assert list((no_home / "tmp").glob("pemt-*/hf_datasets_cache")), "no cache was made there"


def test_tilde_is_home_in_every_field_that_names_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    assert {*FILES, *FOLDERS, "resume_from_checkpoint"} - {"peft_config"} == set(PATHS)
    known = {each.name for each in dataclasses.fields(AdaptConfig)}
    assert set(PATHS) <= known
    flags = [f"--{name}=~/{name}" for name in PATHS]
    config = parse_config(
        AdaptConfig, [*flags, "--task_name=rte", "--description=~/x"], prog="pemt adapt"
    )
    for name in PATHS:
        assert getattr(config, name) == f"/h/{name}"
    assert config.description == "~/x"
    assert (
        AdaptConfig(
            model_name_or_path="google/flan-t5-base", output_dir="~", task_name="rte", bank_dir="b"
        ).output_dir
        == "/h"
    )


def test_tilde_in_yaml_files_lists_and_sweeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("data_dir: ~/data\nbank_dir: ~/bank\n")
    (tmp_path / "task.yaml").write_text(
        "name: mine\ndescription: d\ntemplate: '{x}'\nmetrics: [accuracy]\nlabels: ['a', 'b']\n"
        "files: {train: [~/one.jsonl, ~/two.jsonl], test: test.jsonl}\n"
    )
    needed = ["--model_name_or_path=m", "--output_dir=o", "--task_name=mine"]
    config = parse_config(AdaptConfig, ["--config=~/run.yaml", *needed], prog="pemt adapt")
    assert (config.data_dir, config.bank_dir) == (str(tmp_path / "data"), str(tmp_path / "bank"))
    paths = [path for _, path in get_task("mine", "~/task.yaml").files]
    assert paths == [str(tmp_path / name) for name in ("one.jsonl", "two.jsonl", "test.jsonl")]
    (tmp_path / "sweep.yaml").write_text(
        "output_dir: ~/runs\nfields: {model_name_or_path: ~/base, task_file: ~/task.yaml, data_dir: ~/data}\n"
        "methods: [adapter]\ntasks: [mine]\nseeds: [0]\n"
    )
    sweep = read_sweep(Path("~/sweep.yaml"))
    assert sweep.output_dir == tmp_path / "runs"
    (run,) = sweep.runs
    assert run.folder.parent.parent.parent == tmp_path / "runs"
    assert run.config.model_name_or_path == str(tmp_path / "base")
    (tmp_path / "folder").mkdir()
    assert local_folder("~/folder", files=()) == tmp_path / "folder"


def test_tilde_behind_an_equals_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell expands it there."""
    monkeypatch.setenv("HOME", "/h")
    parser = command_parser("x", "about")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--others", nargs="+")
    parser.add_argument("--description")
    options = parser.parse_args(["--folder=~/a", "--others", "~/b", "c~", "--description=~/d"])
    assert options.folder == Path("/h/a")
    assert options.others == ["/h/b", "c~"]
    assert options.description == "~/d"


@pytest.mark.parametrize("name", ["seed", "data_seed"])
@pytest.mark.parametrize("value", [-1, 2**32, 5_000_000_000, -(2**40)])
def test_seeds_out_of_range(name: str, value: int) -> None:
    fields: dict[str, Any] = {"model_name_or_path": "m", "output_dir": "o", "task_name": "t"}
    with pytest.raises(ConfigError, match=rf"^{name}: found {value}, allowed is 0 to 4294967295$"):
        AdaptConfig(**fields, bank_dir="b", **{name: value})


def test_the_greatest_seed_is_one_on_every_rank(tmp_path: Path) -> None:
    engine = Engine(adapt_config(tmp_path, tmp_path, tmp_path / "o", tmp_path, "t", seed=2**32 - 1))
    engine.rank = 3
    engine.seed(2**32 - 1, per_rank=True)
    assert torch.initial_seed() == 2


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"load_in_8bit": True, "quant_method": "bitsandbytes"}, ["bitsandbytes", "8-bit"]),
        ({"load_in_4bit": True}, ["bitsandbytes", "4-bit"]),
        ({"quant_method": "gptq", "bits": 3}, ["gptq", "3-bit"]),
        ({"quant_method": "fp8"}, ["fp8"]),
    ],
)
def test_quantized_bases_are_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], parts: list[str]
) -> None:
    base = make_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(BaseModelError) as raised:
        load_pretrained(str(base), str(base))
    for part in ("model_name_or_path", "quantized", "quantization_config", *parts):
        assert part in str(raised.value)


def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=rf"`{name}` holds I8.*quantized"):
        load_pretrained(str(base), str(base), lazy=True)


def test_a_file_that_changed_under_the_same_size_and_time(tmp_path: Path) -> None:
    tiny_task(TASK)
    path = tmp_path / "train.jsonl"
    found = []
    for word in ("red", "fig"):
        path.write_text(json.dumps({"text": word, "label": 1}) + "\n")
        os.utime(path, (1, 1))
        found.append(local_examples(get_task(TASK), (path,))["source"][0])
    assert found == ["text : red", "text : fig"]


def test_a_class_without_an_example_to_draw(tmp_path: Path) -> None:
    tiny_task(TASK)
    for split in ("train", "validation", "test"):
        rows = [{"text": "red", "label": 1}] * 5
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    make_tokenizer(tmp_path / "base")
    config = adapt_config(tmp_path / "base", tmp_path, tmp_path / "o", tmp_path, TASK, few_shot=2)
    with pytest.raises(
        DataError, match=r"few_shot: found 2, but class no .* has no training example"
    ):
        load_task_data(get_task(TASK), config, load_tokenizer(str(tmp_path / "base")))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"warmup_steps": 0}, None),
        ({"warmup_steps": 9}, None),
        ({"warmup_steps": 10}, "10 steps, so its learning rate never gets beyond 90%"),
        ({"warmup_steps": 100}, "never gets beyond 9% of learning_rate"),
        ({"warmup_steps": 5, "lr_scheduler_type": "constant"}, "constant_with_warmup"),
    ],
)
def test_a_warm_up_beyond_the_run_is_told(
    tmp_path: Path, fields: dict[str, Any], told: str | None
) -> None:
    config = adapt_config(tmp_path, tmp_path, tmp_path, tmp_path, "t", **fields)
    lines = warmup_notes(config, 10)
    assert len(lines) == (told is not None)
    assert told is None or told in lines[0]
