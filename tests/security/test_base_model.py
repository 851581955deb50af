"""A base model from disk or hub: its pickles run nothing, its index leads nowhere, its own code stays unread."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pemt.model.base import BaseModelError, load_pretrained
from pemt.model.tokenizer import TokenizerError
from tests.support.evil import Evil
from tests.support.tiny import make_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_malicious_pytorch_model(base: Path, tmp_path: Path, lazy: bool, legacy: bool) -> None:
    (base / "model.safetensors").unlink()
    saved = {"shared.weight": Evil(os.mkdir, str(tmp_path / "made"))}
    path = base / "pytorch_model.bin"
    torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(BaseModelError, match=r"refused: it would call posix\.mkdir when") as raised:
        load_pretrained(str(base), str(base), lazy=lazy)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("part", ["../secret.safetensors", "/etc/passwd", "..", "a/b", "", 7, None])
@pytest.mark.parametrize("lazy", [False, True])
def test_an_index_that_leads_outside(base: Path, lazy: bool, part: Any) -> None:
    (base / "model.safetensors").rename(base.parent / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"shared.weight": part}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseModelError) as raised:
        load_pretrained(str(base), str(base), lazy=lazy)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": []}}', "[" * 9999]
)
def test_a_broken_index(base: Path, text: str) -> None:
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BaseModelError, match=r"model\.safetensors\.index\.json"):
        load_pretrained(str(base), str(base), lazy=True)


@pytest.mark.parametrize("model_type", ["evil", "bert", None, 7, ["t5"]])
def test_code_of_an_unknown_model_type_is_not_even_offered(
    base: Path, tmp_path: Path, model_type: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask on stdin whether to run it; whoever says yes has run it."""
    config = json.loads((base / "config.json").read_text()) | {"model_type": model_type}
    plant(base, tmp_path / "made", config)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(BaseModelError, match=r"is a .* model; PEMT needs one of t5, mt5, umt5"):
        load_pretrained(str(base), str(base))
    assert not (tmp_path / "made").exists()


def test_code_of_an_unknown_tokenizer_is_not_even_offered(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(base, tmp_path / "made", json.loads((base / "config.json").read_text()))
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "Tokenizer"}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    load_pretrained(str(base), str(base))  # what stands in tokenizer.json does
    assert not (tmp_path / "made").exists()
    (base / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError):
        load_pretrained(str(base), str(base))
    assert not (tmp_path / "made").exists()


def plant(base: Path, made: Path, config: dict[str, Any]) -> None:
    """Code beside a model, and `auto_map`, which names it."""
    classes = "".join(f"class {name}: pass\n" for name in ("Config", "Model", "Tokenizer"))
    (base / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(made)!r})\n{classes}")
    config["auto_map"] = {
        "AutoConfig": "modeling_evil.Config",
        "AutoModelForSeq2SeqLM": "modeling_evil.Model",
    }
    (base / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["modeling_evil.Tokenizer", None]}
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def test_code_beside_the_weights_is_not_run(base: Path, tmp_path: Path) -> None:
    """`auto_map` in config.json names Python files of the repository: they are the hub's way to run code."""
    made = tmp_path / "made"
    plant(base, made, json.loads((base / "config.json").read_text()))
    model, _ = load_pretrained(str(base), str(base))
    assert type(model).__name__ == "T5ForConditionalGeneration"
    assert not made.exists()
