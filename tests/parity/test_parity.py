"""The published numbers, and a check that the comparison would notice others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor

from pemt.ops import select
from tests.ops.emulated import cuda_on_host
from tests.parity.__main__ import main
from tests.parity.golden import Golden, build
from tests.parity.plain import write_plain

CONFIG: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 96, "num_layers": 2, "num_heads": 4,
    "dropout_rate": 0.0, "feed_forward_proj": "relu", "decoder_start_token_id": 0,
    "pad_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": True, "experts": 3,
    "lora_rank": 8, "lora_alpha": 16, "reduction_factor": 4, "non_linearity": "gelu_new",
    "tsl_weight": 0.1,
}  # fmt: skip
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 3}


@pytest.mark.real
@pytest.mark.parametrize("implementation", ["reference", "packed", "cpu", "cuda on the host"])
def test_the_published_numbers(
    shared: Path, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation == "cuda on the host":
        monkeypatch.setitem(select.ANY_DEVICE, implementation, cuda_on_host())
    monkeypatch.setenv("PEMT_OPS", implementation)
    assert main([str(shared / "golden" / "pemt_tiny.safetensors")]) == 0


@pytest.mark.real
@pytest.mark.parametrize("stage", ["stage1_bottleneck", "stage2", "stage2_bottleneck"])
def test_the_published_list_of_trained_parameters(shared: Path, stage: str) -> None:
    """The list was published beside the gradients: the model must train these and no others."""
    listed = json.loads((shared / "golden" / "pemt_tiny.trainable.json").read_text())[stage]
    built = build(Golden.read(shared / "golden" / "pemt_tiny.safetensors"), stage)
    names = {id(parameter): name for name, parameter in built.published.items()}
    assert sorted(names[id(p)] for _, p in built.model.trainable_parameters()) == sorted(listed)


@pytest.mark.parametrize(
    "change",
    [{}, {"experts": 1}, {"experts": 5, **GATED}, {"d_model": 48, "d_ff": 80, "lora_rank": 3}],
    ids=["relu", "one expert", "gated, untied, five experts", "odd sizes"],
)
def test_the_plain_equations(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "plain.safetensors"
    write_plain(path, {**CONFIG, **change}, seed=0)
    assert main([str(path)]) == 0


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    path = tmp_path_factory.mktemp("plain") / "plain.safetensors"
    write_plain(path, CONFIG, seed=1)
    return Golden.read(path)


def _main_on(tensors: dict[str, Tensor], config: dict[str, Any], tmp_path: Path) -> int:
    path = tmp_path / "changed.safetensors"
    save_file(tensors, path, metadata={"config": json.dumps(config)})
    return main([str(path)])


@pytest.mark.parametrize(
    "key",
    [
        "stage1.out.loss",
        "stage2.out.gate.3",
        "stage1_bottleneck.out.logits",
        "stage2_bottleneck.out.encoder_last_hidden_state",
        "stage2.grad.task_shared",
        "stage2.grad.decoder.block.0.layer.2.DenseReluDense.wo.w_gate",
    ],
)
def test_one_changed_number_is_noticed(
    plain: Golden, tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = plain.tensors[key].clone()
    changed.flatten()[0] += 1e-4 * changed.abs().max()
    assert _main_on({**plain.tensors, key: changed}, plain.config, tmp_path) == 1
    assert f"FAILS {key.partition('.')[2].removeprefix('out.')}" in capsys.readouterr().out


def test_a_nan_is_noticed(plain: Golden, tmp_path: Path) -> None:
    bad = plain.tensors["stage1.out.logits"] * float("nan")
    assert _main_on({**plain.tensors, "stage1.out.logits": bad}, plain.config, tmp_path) == 1


def test_another_set_of_trained_parameters_is_noticed(plain: Golden, tmp_path: Path) -> None:
    fewer = dict(plain.tensors)
    del fewer["stage2.grad.encoder.final_layer_norm.weight"]
    assert _main_on(fewer, plain.config, tmp_path) == 1
    more = dict(plain.tensors)
    more["stage1.grad.shared.weight"] = plain.tensors["stage1.param.shared.weight"].clone()
    assert _main_on(more, plain.config, tmp_path) == 1


def test_files_that_cannot_be_compared(plain: Golden, tmp_path: Path) -> None:
    assert main([]) == 2
    assert main([str(tmp_path / "none.safetensors")]) == 2
    assert _main_on(plain.inputs, plain.config, tmp_path) == 2
    assert _main_on(plain.tensors, {**plain.config, "non_linearity": "relu"}, tmp_path) == 2
