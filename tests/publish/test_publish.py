"""A finished run published: written, described, pushed, pulled, and asked again elsewhere."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForSeq2SeqLM

import pemt
from pemt.commands import COMMANDS
from pemt.config import AdaptConfig, ExpertConfig, MixtureConfig, PemtError
from pemt.data import collate
from pemt.publish.card import Card, model_card
from pemt.publish.export import export_run
from pemt.publish.pemt_model import PemtModel
from pemt.run.finished import load_finished
from pemt.run.train import run_adapt, run_source
from pemt.tasks import get_task
from tests.conftest import python
from tests.support.hub import hub_for_this_process
from tests.support.tiny import adapt_config, make_base, source_config, tiny_task, write_task_files

SOURCES, TARGET = ("tiny-publish-a", "tiny-publish-b-a"), "tiny-publish-target"
TEXTS = ["text : the box is red", "text : the box is white and the lid is blue and a lid", "text :"]
LORA: dict[str, Any] = {"method": "lora", "peft_config": {"r": 2}}
METHODS: dict[str, dict[str, Any]] = {
    "pemt": {},
    "adapter": {"method": "adapter", "mixture": MixtureConfig(train_layer_norms=False)},
    "bitfit": {"method": "bitfit"},
    "lora": LORA,
    "full": {"method": "full"},
}
OWN = ("pemt", "adapter", "bitfit")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a card, a bank of two experts, and a run and an export of every method."""
    folder = tmp_path_factory.mktemp("publish")
    base, bank = make_base(folder / "base"), folder / "bank"
    (folder / "a-plain-file").touch()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    for seed, task in enumerate((*SOURCES, TARGET)):
        tiny_task(task)
        write_task_files(folder / task, seed=seed)
    for rank, task in enumerate(SOURCES, start=2):
        expert = ExpertConfig(rank=rank)
        run_source(
            source_config(
                base,
                folder / task,
                folder / "source" / task,
                bank,
                task,
                expert=expert,
                max_steps=3,
            )
        )
    for method, fields in METHODS.items():
        run_adapt(
            adapt_config(
                base, folder / TARGET, folder / method, bank, TARGET, num_train_epochs=2, **fields
            )
        )
        export_run(folder / method, folder / f"{method}-export")
    return folder


def batch_of(model: Any) -> dict[str, torch.Tensor]:
    ids = model.tokenizer(TEXTS)["input_ids"]
    rows = [{"input_ids": each, "labels": [3, 1]} for each in ids]
    return collate(rows, pad_token_id=model.tokenizer.pad_token_id)


@pytest.mark.parametrize("method", OWN)
def test_what_is_published_answers_as_the_run_does_bit_for_bit(world: Path, method: str) -> None:
    run = load_finished(world / method)
    shutil.move(world / "bank", world / "bank-elsewhere")  # all that it needs is in the export
    try:
        published = PemtModel.from_pretrained(world / f"{method}-export", device="cpu")
    finally:
        shutil.move(world / "bank-elsewhere", world / "bank")
    assert run.config.method == method  # type: ignore[attr-defined]
    batch = batch_of(published)
    with torch.no_grad():
        theirs, ours = run.model(**batch), published.model(**batch)
    assert torch.equal(ours.logits, theirs.logits)
    if method == "pemt":
        assert torch.equal(ours.gates_BLK, theirs.gates_BLK)
        assert (ours.gates_BLK - 0.5).abs().max() > 1e-4, "the gates have not moved"
    else:
        assert ours.gates_BLK is None
    tokens = run.model.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=4)
    expected = run.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert published.generate(TEXTS) == expected


def test_it_computes_something_else_than_the_base(world: Path) -> None:
    published = PemtModel.from_pretrained(world / "pemt-export", device="cpu")
    base = AutoModelForSeq2SeqLM.from_pretrained(world / "base").eval()
    batch = batch_of(published)
    with torch.no_grad():
        difference = published.model(**batch).logits - base(**batch).logits
    assert difference.abs().max() > 0.01


def test_answers_keep_their_order_and_beams_are_passed_on(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = PemtModel.from_pretrained(world / "pemt-export", device="cpu")
    asked: list[dict[str, Any]] = []

    def echo(input_ids: torch.Tensor, attention_mask: torch.Tensor, **given: Any) -> torch.Tensor:
        asked.append(given)
        return input_ids

    assert len(model.generate(TEXTS, num_beams=3, max_new_tokens=2)) == len(TEXTS)
    monkeypatch.setattr(model.model, "generate", echo)
    for size in (1, 2, 3):
        assert model.generate(TEXTS, batch_size=size, num_beams=3) == TEXTS
    assert len(asked) == 3 + 2 + 1
    assert asked[0] == {"do_sample": False, "num_beams": 3, "max_new_tokens": 4}
    assert model.generate(TEXTS[0]) == TEXTS[:1]
    assert model.generate([]) == []


def test_the_card_tells_all_and_its_python_runs(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = world / "pemt-export"
    text = (folder / "README.md").read_text()
    data = ModelCard(text).data
    assert data.license == "apache-2.0"  # type: ignore[attr-defined]
    assert (data.library_name, data.metrics) == ("pemt", ["accuracy"])  # type: ignore[attr-defined]
    (result,) = data.eval_results  # type: ignore[attr-defined]
    scored = json.loads((world / "pemt" / "all_results.json").read_text())
    assert result.metric_value == round(scored["test_accuracy"], 2)
    for told in (TARGET, *SOURCES, "![", "`yes`", "apache-2.0", "text : {text}", "seed 42"):
        assert told in text, told
    with Image.open(folder / "gates.png") as image:
        assert min(image.size) > 100
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(code.splitlines()) == 3
    exec(code.replace("path/to/this/folder", str(folder)), {})
    assert capsys.readouterr().out.startswith("[")


def test_the_card_tells_answers_and_what_they_are_called(world: Path) -> None:
    config = load_finished(world / "adapter").config
    assert isinstance(config, AdaptConfig)
    task = get_task("superglue-cb")
    given = {
        "base_model": "b",
        "model_type": "t5",
        "licence": None,
        "results": {},
        "dtype": "float32",
        "bytes": 1,
    }
    text = model_card(Card(config=config, task=task, **given))
    assert "the answers are `0` (entailment), `1` (contradiction), `2` (neutral)." in text


def test_a_licence_that_is_not_known_is_said_to_be(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pemt.publish.export.base_licence", lambda _: None)
    text = (export_run(world / "bitfit", tmp_path / "out") / "README.md").read_text()
    binds = "The base model's licence also binds what was trained on it."
    assert f"{binds} It is not known here: look it up before you pass this on." in text
    assert f"{binds} It is `apache-2.0`." in (world / "bitfit-export" / "README.md").read_text()


def test_a_base_in_a_folder_of_this_machine_is_told(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    COMMANDS["export"]([str(world / "adapter"), str(tmp_path / "one")])
    told = capsys.readouterr().err
    assert f"the base model is {world / 'base'}, a folder of this machine" in told
    assert "--base_model" in told
    named = ["--base_model", "google-t5/t5-base"]
    COMMANDS["export"]([str(world / "adapter"), str(tmp_path / "two"), *named])
    assert "folder of this machine" not in capsys.readouterr().err
    COMMANDS["export"]([str(world / "full"), str(tmp_path / "three")])
    assert "folder of this machine" not in capsys.readouterr().err, "it holds its base"


def test_a_base_from_the_hub_is_named_in_the_card(world: Path, tmp_path: Path) -> None:
    folder = export_run(world / "adapter", tmp_path / "out", base_model="google-t5/t5-base")
    assert ModelCard.load(folder / "README.md").data.base_model == "google-t5/t5-base"  # type: ignore[attr-defined]
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "google-t5/t5-base"
    assert not (folder / "gates.png").exists()
    model = PemtModel.from_pretrained(folder, base_model=str(world / "base"), device="cpu")
    assert len(model.generate("text : red")) == 1


def test_half_the_size_in_bfloat16(world: Path, tmp_path: Path) -> None:
    folder = export_run(world / "pemt", tmp_path / "half", dtype="bfloat16")
    sizes = [
        (each / "adapter_model.safetensors").stat().st_size
        for each in (folder, world / "pemt-export")
    ]
    assert sizes[0] < 0.75 * sizes[1]  # the header, with the names, is as long
    half = PemtModel.from_pretrained(folder, device="cpu", dtype=torch.bfloat16)
    whole = PemtModel.from_pretrained(world / "pemt-export", device="cpu")
    batch = batch_of(half)
    with torch.no_grad():
        difference = half.model(**batch).logits.float() - whole.model(**batch).logits
    assert difference.abs().max() < 0.1


def test_methods_of_peft_are_exported_as_peft_writes_them(world: Path) -> None:
    folder = world / "lora-export"
    base = AutoModelForSeq2SeqLM.from_pretrained(world / "base").eval()
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    run = load_finished(world / "lora")
    batch = batch_of(run)
    with torch.no_grad():
        assert torch.equal(theirs(**batch).logits, run.model(**batch).logits)
    text = (folder / "README.md").read_text()
    assert "PeftModel.from_pretrained" in text
    assert ModelCard(text).data.library_name == "peft"  # type: ignore[attr-defined]
    with pytest.raises(PemtError, match=r"peft_type: found LORA, allowed is PEMT; peft.PeftModel"):
        PemtModel.from_pretrained(folder)


def test_full_is_exported_as_a_whole_model(world: Path) -> None:
    folder = world / "full-export"
    theirs = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    run = load_finished(world / "full")
    batch = batch_of(run)
    with torch.no_grad():
        assert torch.equal(theirs(**batch).logits, run.model(**batch).logits)
    with pytest.raises(
        PemtError, match="is a full model, not an adapter; load it with transformers"
    ):
        PemtModel.from_pretrained(folder)


@pytest.mark.parametrize("method", METHODS)
def test_others_may_read_what_is_exported(world: Path, method: str) -> None:
    files = list((world / f"{method}-export").iterdir())
    assert {path.stat().st_mode for path in files} == {(world / "a-plain-file").stat().st_mode}


def test_peft_refuses_ours_instead_of_misreading_it(world: Path) -> None:
    base = AutoModelForSeq2SeqLM.from_pretrained(world / "base")
    with pytest.raises((ValueError, KeyError), match="PEMT"):
        peft.PeftModel.from_pretrained(base, world / "pemt-export")


def test_a_source_run_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(PemtError, match=r"is a source run.*`pemt bank export"):
        export_run(world / "source" / SOURCES[0], tmp_path / "out")
    with pytest.raises(PemtError, match="is not empty"):
        export_run(world / "pemt", world / "adapter-export")
    assert list(tmp_path.iterdir()) == []


def test_nothing_half_written_is_left(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pemt.publish.adapter_format.save_file", full_disk)
    with pytest.raises(PemtError, match="out: cannot be written: No space left on device"):
        export_run(world / "pemt", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": 2}, "this version of pemt reads format 1"),
        ({"base_sha256": "0" * 64}, "other weights than the base model at hand"),
        ({"sources": [{"name": "x"}]}, r"sources\.0\.kind: missing"),
        ({"method": None}, "method"),
        ({"reduction_factor": 8}, "does not fit what adapter_config.json says"),
    ],
)
def test_a_damaged_adapter_is_one_line(
    world: Path, tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    folder = Path(shutil.copytree(world / "pemt-export", tmp_path / "copy"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **change}))
    with pytest.raises(PemtError, match=complaint) as raised:
        PemtModel.from_pretrained(folder)
    assert "\n" not in str(raised.value)
    (folder / "adapter_model.safetensors").write_bytes(b"cut")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(PemtError, match=r"adapter_model\.safetensors: cannot be read"):
        PemtModel.from_pretrained(folder)


def test_pushed_pulled_and_loaded_by_its_id(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the real huggingface_hub, against an HTTP server on this machine."""
    out = str(tmp_path / "pulled")
    with hub_for_this_process(tmp_path / "repositories"):
        COMMANDS["push"]([str(world / "pemt-export"), "me/tiny-cb", "--private"])
        COMMANDS["pull"](["me/tiny-cb", out])
        fetched = PemtModel.from_pretrained("me/tiny-cb", device="cpu")
        with pytest.raises(PemtError, match="me/nothing: cannot be fetched from the hub"):
            COMMANDS["pull"](["me/nothing", f"{out}-2"])
    address, pulled = capsys.readouterr().out.splitlines()
    assert "/me/tiny-cb/commit/" in address
    assert pulled == out
    own = PemtModel.from_pretrained(world / "pemt-export", device="cpu")
    assert fetched.generate("text : the box is red") == own.generate("text : the box is red")
    for name in ("adapter_model.safetensors", "README.md", "gates.png"):
        expected = (world / "pemt-export" / name).read_bytes()
        assert (tmp_path / "pulled" / name).read_bytes() == expected


def test_the_commands(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    COMMANDS["export"]([str(world / "pemt"), out, "--license", "mit", "--dtype", "bfloat16"])
    assert f"{out}: 0." in capsys.readouterr().out
    front = (tmp_path / "out" / "README.md").read_text().split("---")[1]
    assert yaml.safe_load(front)["license"] == "mit"
    with pytest.raises(PemtError, match=r"holds no adapter_config\.json"):
        COMMANDS["push"]([str(world / "base" / ".."), "me/x"])


def test_no_bars_in_a_file(world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    transformers.logging.enable_progress_bar()  # a run in this process has switched them off
    COMMANDS["export"]([str(world / "full"), str(tmp_path / "out")])
    told = "".join(capfd.readouterr())
    assert told.count("\n") == 1, told
    assert "%|" not in told, told


def test_importing_pemt_loads_nothing_heavy() -> None:
    program = "import pemt, sys; print('torch' in sys.modules)"
    done = python("-c", program)
    assert done.stdout == "False\n", done.stderr
    assert pemt.PemtModel is PemtModel
    assert set(pemt.__all__) <= set(dir(pemt))
    with pytest.raises(AttributeError, match="attribute PemtModle"):
        pemt.PemtModle  # noqa: B018


def test_transformers_has_no_pipeline_for_a_t5() -> None:
    """docs/publishing.md says so; the day it has one again, this test tells."""
    with pytest.raises(KeyError, match="has been removed from transformers"):
        transformers.pipeline("text2text-generation")
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert "t5" not in names, "what `text-generation` takes"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_it_answers_on_a_gpu_as_on_the_cpu(world: Path) -> None:
    on_gpu = PemtModel.from_pretrained(world / "pemt-export", device="cuda")
    on_cpu = PemtModel.from_pretrained(world / "pemt-export", device="cpu")
    assert on_gpu.device.type == "cuda"
    assert on_gpu.generate(TEXTS) == on_cpu.generate(TEXTS)
