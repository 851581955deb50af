"""`pemt bank show BANK --task_name TASK`: the entries as `mixture.top_sources` would choose them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pemt.bank.adding import Adapter, add_peft
from pemt.bank.entries import read_bank
from pemt.commands import COMMANDS
from pemt.config import PemtError
from pemt.model import base_shape, description_prompt, load_pretrained, top_sources
from tests.support.adapters import LORAHUB, make_adapter
from tests.support.tiny import make_base, tiny_task

SENTENCES = {"lid": "the lid and a box", "red": "says red", "same": "the lid and the box"}


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nearest")
    base = make_base(folder / "base", feed_forward_proj="gated-gelu")
    adapter = str(make_adapter(base, folder / "adapter", pickled=True, **LORAHUB))
    adapters = [Adapter(adapter, name, sentence) for name, sentence in SENTENCES.items()]
    add_peft(adapters, bank_dir=folder / "bank")
    return folder / "bank"


def test_ranked_as_top_sources_chooses(bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = tiny_task("tiny-nearest")
    COMMANDS["bank"](["show", str(bank), "--task_name", task.name])
    told = capsys.readouterr().out
    assert told.startswith(f"{task.name}: `{task.description}`\nsimilarity: the cosine")
    ranked = re.findall(r"^ +(\d)  (\w+) +(-?\d\.\d{6})$", told, re.MULTILINE)
    assert [place for place, _, _ in ranked] == ["1", "2", "3"]
    names = [name for _, name, _ in ranked]
    assert (names[0], ranked[0][2]) == ("same", "1.000000"), "the same sentence"
    assert sorted(names) == sorted(SENTENCES)
    name = str(bank.parent / "base")
    base, tokenizer = load_pretrained(name, name)
    sources = read_bank(bank, base_shape=base_shape(base.config), base_name=name)
    prompt_PD = description_prompt(tokenizer, base, task.description)
    for most in (1, 2):
        mixed, _ = top_sources(prompt_PD, sources, most)
        assert {source.name for source in mixed} == set(names[:most])
    COMMANDS["bank"](["show", "--bank_dir", str(bank), "--task_name", task.name])
    assert capsys.readouterr().out == told


def test_what_cannot_be_ranked(bank: Path, tmp_path: Path) -> None:
    tiny_task("tiny-nearest")
    rank = ["show", str(bank), "--task_name", "tiny-nearest"]
    other = make_base(tmp_path / "other", d_model=8, feed_forward_proj="gated-gelu")
    for arguments, told in (
        ([*rank, "--model_name_or_path", str(other)], "made for a base model with d_model 16"),
        ([*rank[:3], "tiny-neerest"], "tiny-nearest"),
        (["show", str(bank), "red", "--task_name", "tiny-nearest"], "name a bank, and either"),
        (["show", "--task_name", "tiny-nearest"], "name a bank, and either"),
    ):
        with pytest.raises(PemtError, match=told):
            COMMANDS["bank"](arguments)
