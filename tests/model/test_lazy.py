"""A base model whose weights stay in their files is the same model, once they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5ForConditionalGeneration

from pemt.config.schema import AdapterConfig, ExpertConfig, MixtureConfig
from pemt.engine.placement import materialize_on_device
from pemt.model import ExpertSource, PemtT5, base_digest, base_shape
from pemt.model.base import BaseModelError, load_pretrained
from pemt.model.experts import expert_shapes
from pemt.model.gated import GatedLinear
from pemt.model.lazy import is_lazy, materialize, materialize_all, read_lazy, value_of
from tests.support.tiny import make_base

BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 1]]),
    "attention_mask": torch.ones(1, 4).long(),
    "labels": torch.tensor([[11, 1]]),
}


def both(folder: Path) -> tuple[T5ForConditionalGeneration, T5ForConditionalGeneration]:
    whole, _ = load_pretrained(str(folder), str(folder))
    lazy, _ = load_pretrained(str(folder), str(folder), lazy=True)
    return whole, lazy


def as_one_file(folder: Path, base: T5ForConditionalGeneration) -> None:
    base.save_pretrained(folder)


def as_shards(folder: Path, base: T5ForConditionalGeneration) -> None:
    base.save_pretrained(folder, max_shard_size="10KB")
    assert (folder / "model.safetensors.index.json").exists()


def as_bfloat16(folder: Path, base: T5ForConditionalGeneration) -> None:
    base.to(torch.bfloat16).save_pretrained(folder)


def as_torch_file(folder: Path, base: T5ForConditionalGeneration) -> None:
    torch.save(base.state_dict(), folder / "pytorch_model.bin")


def as_old_torch_file(folder: Path, base: T5ForConditionalGeneration) -> None:
    """Of torch's format before 1.6, which cannot be mapped: read whole."""
    path = folder / "pytorch_model.bin"
    torch.save(base.state_dict(), path, _use_new_zipfile_serialization=False)


WAYS = (as_one_file, as_shards, as_bfloat16, as_torch_file, as_old_torch_file)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("tied", [True, False])
def test_the_same_model_from_every_kind_of_file(way, tied: bool, tmp_path: Path) -> None:
    make_base(tmp_path)
    base = T5ForConditionalGeneration.from_pretrained(tmp_path)
    if (
        not tied
    ):  # as T5 v1.1 and Flan: transformers ties them too, and sees in the files that they are not
        base.lm_head.weight = torch.nn.Parameter(base.shared.weight.flip(0))
        base.all_tied_weights_keys.pop("lm_head.weight")
    (tmp_path / "model.safetensors").unlink()
    way(tmp_path, base)
    whole, lazy = both(tmp_path)
    unread = [is_lazy(each) for each in lazy.parameters()]
    assert all(unread) == (way is not as_old_torch_file)
    assert base_digest(lazy) == base_digest(whole)
    materialize_all(lazy)
    ours, theirs = lazy.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert [name for name, _ in lazy.named_parameters()] == [
        name for name, _ in whole.named_parameters()
    ]
    for base in (lazy, whole):
        assert (base.lm_head.weight is base.shared.weight) == tied
        assert base.decoder.embed_tokens.weight is base.shared.weight
    assert lazy.all_tied_weights_keys == whole.all_tied_weights_keys
    assert lazy.generation_config.to_dict() == whole.generation_config.to_dict()
    assert not lazy.training
    assert lazy.config.to_dict() == whole.config.to_dict()


def test_unread_weights_take_no_memory_and_poison_what_they_touch(tmp_path: Path) -> None:
    _, lazy = both(make_base(tmp_path))
    for parameter in lazy.parameters():
        assert parameter.untyped_storage().nbytes() == 4
    with torch.no_grad():
        assert torch.isnan(lazy(**BATCH).loss)
    with pytest.raises(RuntimeError), torch.no_grad():
        lazy.shared.weight.add_(1)


def test_placing_reads_what_is_frozen_in_half_precision(tmp_path: Path) -> None:
    whole, lazy = both(make_base(tmp_path))
    lazy.requires_grad_(False)
    norm = lazy.encoder.final_layer_norm.weight.requires_grad_(True)
    materialize_on_device(
        lazy, read_lazy=read_lazy, frozen_dtype=torch.bfloat16, device=torch.device("cpu")
    )
    assert norm.dtype == torch.float32
    for name, parameter in lazy.named_parameters():
        assert not is_lazy(parameter)
        if parameter is not norm:
            assert parameter.dtype == torch.bfloat16
            assert torch.equal(parameter, whole.get_parameter(name).to(torch.bfloat16)), name


def test_modules_are_built_around_what_is_not_read_yet(tmp_path: Path) -> None:
    """The same weights, trained or frozen, as around a base that was read first."""
    losses = []
    for base in both(make_base(tmp_path)):
        torch.manual_seed(0)
        prompt_PD = torch.randn(3, 16)
        model = PemtT5.source(base, expert=ExpertConfig(rank=4), prompt_PD=prompt_PD)
        assert not any(is_lazy(each) for _, each in model.trainable_parameters())
        materialize_all(model)
        losses.append(model(**BATCH).loss)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_experts_are_laid_side_by_side_where_the_base_is_read(kind: str, tmp_path: Path) -> None:
    """Around an unread base they take no memory; the model is the same one in the end."""
    bases = both(make_base(tmp_path))
    shape = base_shape(bases[0].config)
    sources = [source_of(kind, rank, shape) for rank in (2, 3)]
    models = []
    for base in bases:
        torch.manual_seed(0)
        model = PemtT5.target(
            base,
            sources=sources,
            mixture=MixtureConfig(),
            adapter=AdapterConfig(reduction_factor=4),
            prompt_PD=torch.randn(3, 16),
        )
        models.append(model.eval())
    whole, lazy = models
    packed = [
        each
        for module in lazy.modules()
        if isinstance(module, GatedLinear)
        for name, each in module.named_parameters(recurse=False)
        if kind == "lora" or name != "weight"  # the factors are under it
    ]
    assert len(packed) == 4 * (2 if kind == "lora" else 4)
    assert all(is_lazy(each) and each.untyped_storage().nbytes() == 4 for each in packed)
    materialize_all(lazy)
    for name, tensor in (*whole.named_parameters(), *whole.named_buffers()):
        ours = dict((*lazy.named_parameters(), *lazy.named_buffers()))[name]
        assert torch.equal(ours, tensor), name
    assert lazy(**BATCH).loss == whole(**BATCH).loss


def source_of(kind: str, rank: int, shape: dict[str, Any]) -> ExpertSource:
    """In bf16, as a bank may hold it."""
    return ExpertSource(
        name=f"rank-{rank}",
        kind="lora" if kind == "lora" else "bottleneck",
        rank=rank,
        alpha=4.0,
        weights={
            key: torch.randn(size, dtype=torch.bfloat16)
            for key, size in expert_shapes(kind, rank, shape).items()
        },
        prompt_PD=torch.randn(4, shape["d_model"]),
    )


def test_a_value_given_first_is_not_read_again(tmp_path: Path) -> None:
    _, lazy = both(make_base(tmp_path))
    norm = lazy.encoder.final_layer_norm.weight
    materialize(norm, torch.full((16,), 3.0))
    materialize_all(lazy)
    assert value_of(norm).tolist() == [3.0] * 16


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.pop("encoder.final_layer_norm.weight"), "is missing"),
        (
            lambda tensors: tensors.update({"encoder.final_layer_norm.weight": torch.ones(7)}),
            r"is \[7\] in its weight files, its config.json needs \[16\]",
        ),
    ],
)
def test_files_that_do_not_fit_are_told_in_one_line(change, told: str, tmp_path: Path) -> None:
    file = make_base(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=told) as caught:
        load_pretrained(str(tmp_path), str(tmp_path), lazy=True)
    assert "`encoder.final_layer_norm.weight`" in str(caught.value)


def test_a_file_cut_short_is_told_in_one_line(tmp_path: Path) -> None:
    file = make_base(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match=r"cannot be loaded \(.*\); give a hub id"):
        load_pretrained(str(tmp_path), str(tmp_path), lazy=True)


def test_an_index_that_names_a_missing_file(tmp_path: Path) -> None:
    (make_base(tmp_path) / "model.safetensors").unlink()
    index = {"weight_map": {"shared.weight": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load_pretrained(str(tmp_path), str(tmp_path), lazy=True)
