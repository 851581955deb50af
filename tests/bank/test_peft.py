"""LoRA adapters in PEFT's format, in and out of a bank, held against the real `peft`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM

from pemt.bank.adding import Adapter, add_peft
from pemt.bank.entries import read_bank, read_entry, write_entry
from pemt.bank.peft_files import PROMPT_FILE
from pemt.bank.peft_format import read_peft
from pemt.bank.sharing import merge
from pemt.bank.tools import export_peft, remove, verify
from pemt.commands import COMMANDS
from pemt.config import AdapterConfig, MixtureConfig, PemtError
from pemt.model import ExpertSource, PemtT5, base_digest, base_shape
from pemt.model.experts import expert_shapes
from pemt.model.sites import target_sites
from tests.support.adapters import LORAHUB, make_adapter
from tests.support.damages import flip_a_bit
from tests.support.tiny import make_base
from tests.support.tiny_t5 import tiny_base, tiny_source

SENTENCE = "says whether the box is red"
FIRST = "encoder.block.0.layer.1.DenseReluDense.wo"
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 6},
    "rank-stabilised": {"r": 5, "lora_alpha": 7, "use_rslora": True},
    "patterns": {
        "r": 2,
        "lora_alpha": 8,
        "rank_pattern": {FIRST: 4},
        "alpha_pattern": {"decoder.block.1.layer.2.DenseReluDense.wo": 3},
    },
    "some layers": {"r": 4, "lora_alpha": 4, "target_modules": r".*encoder.*\.wo"},
    "lorahub's": LORAHUB,
    "a pickle": {**LORAHUB, "pickled": True},
    "q and v": {"r": 4, "lora_alpha": 8, "target_modules": ["q", "v"]},
    "everywhere": {
        "r": 2,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "rank_pattern": {"wi_0": 3},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny", feed_forward_proj="gated-gelu")


def load(base: Path) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(base).eval()


def logits_of(model: Any, embeds_BSD: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs_embeds=embeds_BSD, decoder_input_ids=torch.tensor([[0, 5, 6]])).logits


def as_expert(base: Path, source: ExpertSource) -> Any:
    """The base with the source's expert alone, as stage 2 runs it: its gate is 1, and target adapters add nothing."""
    adapter = AdapterConfig(reduction_factor=4)
    model = PemtT5.target(
        load(base), sources=[source], mixture=MixtureConfig(), adapter=adapter, prompt_PD=source.prompt_PD
    ).eval()  # fmt: skip
    for name, parameter in model.named_parameters():
        if "adapter.up" in name:
            nn.init.zeros_(parameter)
    return model.base


def embeds(base: Path) -> Tensor:
    width = json.loads((base / "config.json").read_text())["d_model"]
    return torch.randn(1, 7, width, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_adapter_as_expert_computes_what_it_did_in_peft(
    base: Path, tmp_path: Path, settings: str
) -> None:
    folder = make_adapter(base, tmp_path / "adapter", **SETTINGS[settings])
    (added,) = add_peft([Adapter(str(folder), "red", SENTENCE)], bank_dir=tmp_path / "bank")
    (source,) = read_bank(
        tmp_path / "bank", base_shape=base_shape(load(base).config), base_name=str(base)
    )
    theirs = peft.PeftModel.from_pretrained(load(base), folder).eval()
    inputs = embeds(base)
    expected = logits_of(theirs, inputs)
    assert (logits_of(load(base), inputs) - expected).abs().max() > 0.01, "the adapter does nothing"
    torch.testing.assert_close(
        logits_of(as_expert(base, source), inputs), expected, atol=1e-5, rtol=1e-5
    )
    assert source.base_sha256 == base_digest(load(base))
    assert len(source.prompt_PD) == len(SENTENCE.split())
    assert {key.rpartition(".")[0] for key in source.weights} == set(added.lora.sites)
    assert bool(added.lora.absent) == (settings == "some layers")


@pytest.mark.parametrize(
    ("rank", "modules"), [(1, ["wo"]), (4, ["wo"]), (3, ["q", "v"]), (2, r"encoder.*\.(k|wi_1)")]
)
def test_peft_loads_what_is_exported(base: Path, tmp_path: Path, rank: int, modules: Any) -> None:
    shape = base_shape(load(base).config)
    source = source_for(shape, "red", rank=rank, alpha=rank**0.5, modules=modules)
    write_entry(
        tmp_path / "bank", source, base={"name": str(base), **shape}, description=None, metrics={}
    )
    (folder,) = export_peft(tmp_path / "bank", tmp_path / "out")
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert modes == {(folder / "adapter_config.json").stat().st_mode}, "not all may be read alike"
    theirs = peft.PeftModel.from_pretrained(load(base), folder).eval()
    inputs = embeds(base)
    ours = logits_of(as_expert(base, source), inputs)
    torch.testing.assert_close(logits_of(theirs, inputs), ours, atol=1e-5, rtol=1e-5)
    assert (logits_of(load(base), inputs) - ours).abs().max() > 0.01

    add_peft(
        [Adapter(str(folder), "red")], bank_dir=tmp_path / "again", model_name_or_path=str(base)
    )
    _, back = read_entry(tmp_path / "again" / "red")
    assert (back.rank, back.alpha) == (source.rank, pytest.approx(source.alpha))
    assert torch.equal(back.prompt_PD, source.prompt_PD), "the trained prompt was lost on the way"
    for key, tensor in source.weights.items():
        assert torch.equal(back.weights[key], tensor)
    with pytest.raises(PemtError, match=r"out/red: is not empty"):
        export_peft(tmp_path / "bank", tmp_path / "out")


def source_for(
    shape: dict[str, Any], name: str, *, rank: int, alpha: float, modules: Any
) -> ExpertSource:
    """Random factors; on the first of its layers of half the rank."""
    generator = torch.Generator().manual_seed(6)
    first, *others = target_sites(modules, shape)
    shapes = expert_shapes("lora", max(1, rank // 2), shape, [first])
    shapes |= expert_shapes("lora", rank, shape, others)
    return ExpertSource(
        name=name,
        kind="lora",
        rank=rank,
        alpha=alpha,
        weights={key: torch.randn(size, generator=generator) for key, size in shapes.items()},
        prompt_PD=torch.randn(3, shape["d_model"], generator=generator),
    )


def test_ranks_differ_within_a_bank(base: Path, tmp_path: Path) -> None:
    for name in ("plain", "rank-stabilised"):
        folder = make_adapter(base, tmp_path / name, **SETTINGS[name])
        add_peft([Adapter(str(folder), name, SENTENCE)], bank_dir=tmp_path / "bank")
    loaded = load(base)
    sources = read_bank(
        tmp_path / "bank", base_shape=base_shape(loaded.config), base_name=str(base)
    )
    assert [source.rank for source in sources] == [3, 5]
    model = PemtT5.target(
        loaded,
        sources=sources,
        mixture=MixtureConfig(),
        adapter=AdapterConfig(reduction_factor=4),
        prompt_PD=sources[0].prompt_PD,
    )
    ids = torch.randint(3, 9, (2, 4))
    out = model(ids, torch.ones_like(ids), ids)
    assert out.gates_BLK is not None
    assert torch.isfinite(out.loss)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "head": ({"target_modules": ["q", "lm_head"]}, r"found adapters on lm_head.*train it with"),
    "embeddings": ({"target_modules": ["wo", "shared"]}, r"found adapters on shared"),
    "dora": ({"use_dora": True}, "use_dora: found true, which is more than a plain LoRA"),
    "biases": ({"bias": "lora_only"}, 'bias: found "lora_only"'),
    "whole modules": ({"modules_to_save": ["shared"]}, "modules_to_save: found"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(base: Path, tmp_path: Path, name: str) -> None:
    settings, expected = REFUSED[name]
    folder = make_adapter(base, tmp_path / "adapter", **settings)
    with pytest.raises(PemtError, match=expected) as raised:
        add_peft([Adapter(str(folder), "red", SENTENCE)], bank_dir=tmp_path / "bank")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "bank").exists()


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_refused_of_a_folder(base: Path, tmp_path: Path) -> None:
    good = make_adapter(base, tmp_path / "adapter", r=2)
    shape = base_shape(load(base).config)

    def complaint(**changes: Any) -> str:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        edit(folder, **changes)
        with pytest.raises(PemtError) as raised:
            read_peft(folder, shape)
        return str(raised.value)

    assert "peft_type: found IA3, allowed is LORA" in complaint(peft_type="IA3")
    assert "found `pissa_niter_4`, which changes the base" in complaint(
        init_lora_weights="pissa_niter_4"
    )
    assert "has rank 2, adapter_config.json says 8" in complaint(r=8)
    assert "some_new_method: found" in complaint(some_new_method={"on": True})
    with pytest.raises(PemtError, match=r"this base model has 1 encoder"):
        read_peft(good, {**shape, "num_layers": 1})
    gated = make_adapter(base, tmp_path / "gated", r=2, target_modules=["wi_0"])
    with pytest.raises(
        PemtError, match=r"LoRA on .*wi_0, this base model .* feed_forward_proj relu"
    ):
        read_peft(gated, {**shape, "feed_forward_proj": "relu"})
    with pytest.raises(PemtError, match=r"lora_A of .* is \[2, 33\], this base model needs"):
        read_peft(good, {**shape, "d_ff": 40})
    edit(good, base_model_name_or_path=None)
    with pytest.raises(PemtError, match="give it with model_name_or_path"):
        add_peft([Adapter(str(good), "red")], bank_dir=tmp_path / "bank")
    with pytest.raises(PemtError, match="description"):
        add_peft([Adapter(str(good), "red")], bank_dir=tmp_path / "b", model_name_or_path=str(base))
    (good / "adapter_model.safetensors").unlink()
    (good / "adapter_model.bin").touch()
    with pytest.raises(PemtError, match=r"adapter_model\.bin: cannot be read: it ends too early"):
        read_peft(good, shape)


def test_a_trained_entry_is_not_replaced_unasked(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank, folder = tmp_path / "bank", make_adapter(base, tmp_path / "adapter", r=2)
    fill(bank, "mnli")
    before = (bank / "mnli" / "manifest.json").read_bytes()
    command = ["add", "--peft", str(folder), "--bank_dir", str(bank), "--task", "mnli"]
    with pytest.raises(PemtError, match=r"bank/mnli: there is an entry of that name.*--overwrite"):
        COMMANDS["bank"](command)
    assert (bank / "mnli" / "manifest.json").read_bytes() == before
    COMMANDS["bank"]([*command, "--overwrite"])
    manifest, _ = read_entry(bank / "mnli")
    assert (manifest.rank, manifest.metrics) == (2, {})


def test_a_known_task_brings_its_description(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(base, tmp_path / "adapter", r=2)
    (added,) = add_peft([Adapter(str(folder), "mnli")], bank_dir=tmp_path / "bank")
    manifest, _ = read_entry(tmp_path / "bank" / "mnli")
    assert manifest.description == added.prompt


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    fill(tmp_path / "bank", "boolq", "mnli", "rte")
    return tmp_path / "bank"


def fill(
    folder: Path,
    *names: str,
    kind: str = "lora",
    base_name: str = "google/tiny-t5",
    digest: str | None = None,
) -> None:
    base = {"name": base_name, **base_shape(tiny_base().config)}
    for name in names:
        metrics = {"accuracy": 71.5, "average_metrics": 71.5}
        source = replace(tiny_source(name, kind), base_sha256=digest)
        write_entry(folder, source, base=base, description="Which?", metrics=metrics)


def test_list_and_show(bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    COMMANDS["bank"](["list", str(bank)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "mnli   lora on wo, rank 4, alpha 8, on google/tiny-t5, test score 71.5"
    COMMANDS["bank"](["show", str(bank), "rte"])
    shown = capsys.readouterr().out
    for part in ("Which?", "3 tokens", "d_model 16", "accuracy 71.50", "float32", "torch 2."):
        assert part in shown


def test_show_tells_where_an_expert_is_absent(
    bank: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = tiny_source("some", target_modules=r"encoder\..*(SelfAttention.q|block.0.*wo)")
    base = {"name": "google/tiny-t5", **base_shape(tiny_base().config)}
    write_entry(bank, some, base=base, description=None, metrics={})
    COMMANDS["bank"](["show", str(bank), "some"])
    (line,) = (each for each in capsys.readouterr().out.splitlines() if each.startswith("on "))
    absent = ("encoder.1", "decoder.0.self.q", "decoder.0", "decoder.1.self.q", "decoder.1",
              "decoder.2.self.q", "decoder.2")  # fmt: skip
    assert line.split(maxsplit=1)[1] == f"q, wo (3 of 10 such layers; not on {', '.join(absent)})"
    COMMANDS["bank"](["show", str(bank), "rte"])
    assert "wo (5 layers)\n" in capsys.readouterr().out


def test_verify_tells_every_fault(bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    COMMANDS["bank"](["verify", str(bank)])
    assert capsys.readouterr().out.splitlines() == ["boolq: intact", "mnli: intact", "rte: intact"]
    path = bank / "mnli" / "expert.safetensors"
    flip_a_bit(path)
    with pytest.raises(PemtError, match="1 of 3 entries cannot be used: mnli"):
        COMMANDS["bank"](["verify", str(bank)])
    assert "mnli: " + str(path) in capsys.readouterr().out
    assert verify(bank, ["rte"]) == {"rte": None}


def test_remove_all_or_nothing(bank: Path) -> None:
    with pytest.raises(PemtError, match="has no entry `cb`; it has: boolq, mnli, rte"):
        remove(bank, ["rte", "cb"])
    assert remove(bank, ["rte", "boolq", "boolq"]) == ["rte", "boolq"]
    assert [path.name for path in bank.iterdir()] == ["mnli"]


def test_merge_all_or_nothing(bank: Path, tmp_path: Path) -> None:
    fill(tmp_path / "more", "cb", "wic")
    fill(tmp_path / "clash", "copa", "rte")
    with pytest.raises(PemtError, match="has an entry `rte`, and so has"):
        merge(bank, [tmp_path / "more", tmp_path / "clash"])
    assert len(list(bank.iterdir())) == 3
    assert merge(bank, [tmp_path / "more"]) == ["cb", "wic"]
    for path in (bank / "cb").iterdir():
        assert path.read_bytes() == (tmp_path / "more" / "cb" / path.name).read_bytes()
    assert merge(tmp_path / "new", [bank]) == ["boolq", "cb", "mnli", "rte", "wic"]


@pytest.mark.parametrize(
    ("there", "coming", "fits"),
    [
        (("google/tiny-t5", None), ("copies/tiny-t5", None), True),
        (("google/tiny-t5", None), ("google/flan-tiny-t5", None), False),
        (("google/tiny-t5", None), ("google/flan-tiny-t5", "b" * 64), False),
        (("google/tiny-t5", "a" * 64), ("runs/base", "a" * 64), True),
        (("google/tiny-t5", "a" * 64), ("google/tiny-t5", "b" * 64), False),
    ],
)
def test_a_bank_is_for_one_base_model(
    tmp_path: Path, there: tuple[str, str | None], coming: tuple[str, str | None], fits: bool
) -> None:
    fill(tmp_path / "bank", "rte", base_name=there[0], digest=there[1])
    fill(tmp_path / "more", "cb", base_name=coming[0], digest=coming[1])
    if fits:
        assert merge(tmp_path / "bank", [tmp_path / "more"]) == ["cb"]
        return
    with pytest.raises(PemtError, match=f"`cb` is for {coming[0]} .*`rte` is for {there[0]}"):
        merge(tmp_path / "bank", [tmp_path / "more"])
    assert [path.name for path in (tmp_path / "bank").iterdir()] == ["rte"]


def test_a_bottleneck_is_no_peft_adapter(bank: Path, tmp_path: Path) -> None:
    fill(bank, "wide", kind="bottleneck")
    assert [path.name for path in export_peft(bank, tmp_path / "out")] == ["boolq", "mnli", "rte"]
    with pytest.raises(PemtError, match="source `wide`: is a bottleneck expert"):
        export_peft(bank, tmp_path / "out2", tasks=["wide"])
    tensors = load_file(tmp_path / "out" / "rte" / PROMPT_FILE)
    save_file({"other": tensors["prompt"]}, tmp_path / "out" / "rte" / PROMPT_FILE)
    with pytest.raises(PemtError, match=rf"{PROMPT_FILE}: cannot be read"):
        read_peft(tmp_path / "out" / "rte", base_shape(tiny_base().config))
