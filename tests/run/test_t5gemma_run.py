"""T5Gemma from its folder through both stages, in one process: data, bank, resume, answers, plan, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pemt.bank.entries import read_entry
from pemt.bank.tools import export_peft
from pemt.commands import COMMANDS
from pemt.config import AdapterConfig, ExpertConfig, PemtError
from pemt.data.vocabulary import encode_sources, encode_targets, unknown
from pemt.model import base_digest, checked_base, load_pretrained
from pemt.model.lazy import is_lazy, materialize_all
from pemt.plan.count import sizes, weights
from pemt.plan.job import Job
from pemt.plan.shapes import read_shape
from pemt.publish import PemtModel, export_run
from pemt.run.finished import load_finished
from pemt.run.train import run_adapt, run_source
from tests.support.tiny import adapt_config, losses, make_gemma_base, source_config
from tests.support.trained import train_sources

SOURCES = {"tiny-gemma-a": ["wo"], "tiny-gemma-b": ["q_proj", "up_proj", "down_proj"]}
TARGET = "tiny-gemma-target"
SHARED = {"eval_strategy": "no", "max_eval_samples": 4}
ADAPTER = AdapterConfig(reduction_factor=4)
# As T5Gemma 9b-2b: encoder and decoder are of different widths.
DECODER = {
    "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 3,
    "num_key_value_heads": 3, "query_pre_attn_scalar": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources and a run over both."""
    folder = tmp_path_factory.mktemp("gemma")
    make_gemma_base(folder / "base", **DECODER)
    train_sources(folder, SOURCES, TARGET, **SHARED)
    adapt(folder, "adapt", save_steps=2, save_total_limit=9)
    return folder


def adapt(folder: Path, name: str, **fields: Any) -> dict[str, Any]:
    paths = (folder / "base", folder / TARGET, folder / name, folder / "bank")
    config = adapt_config(*paths, TARGET, adapter=ADAPTER, **{**SHARED, **fields})
    return run_adapt(config)


def test_both_stages_learn_and_the_bank_holds_the_experts(world: Path) -> None:
    for name in (*(f"run-{task}" for task in SOURCES), "adapt"):
        values = losses(world / name)
        assert values[max(values)] < values[1]
    _, source = read_entry(world / "bank" / "tiny-gemma-b")
    layers = {key.rpartition(".")[0] for key in source.weights}
    assert layers == {
        *("encoder.0.self.q", "encoder.0.ffn.wi_1", "encoder.0"),
        *("encoder.1.self.q", "encoder.1.ffn.wi_1", "encoder.1"),
        *("decoder.0.self.q", "decoder.0.cross.q", "decoder.0.ffn.wi_1", "decoder.0"),
    }
    gates = json.loads((world / "adapt" / "all_results.json").read_text())["gates"]
    assert gates["encoder/0/self/q"] == {"tiny-gemma-b": 1.0}
    assert gates["decoder/0"].keys() == SOURCES.keys()


def test_it_resumes_loads_and_is_exported(world: Path, tmp_path: Path) -> None:
    whole = losses(world / "adapt")
    checkpoint = str(world / "adapt" / "checkpoint-2")
    adapt(world, "resumed", save_steps=2, save_total_limit=9, resume_from_checkpoint=checkpoint)
    resumed = losses(world / "resumed")
    assert resumed == pytest.approx({step: whole[step] for step in resumed}, rel=1e-5)
    assert min(resumed) == 3
    finished = load_finished(world / "adapt")
    folder = export_run(world / "adapt", tmp_path / "export")
    published = PemtModel.from_pretrained(folder, device="cpu")
    ours, theirs = dict(finished.model.named_parameters()), dict(published.model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    lines = (world / "adapt" / "predictions.jsonl").read_text().splitlines()
    answers = {row["input"]: row["prediction"] for row in map(json.loads, lines)}
    assert len(set(answers.values()) - {""}) > 0
    texts = list(answers)
    assert published.generate(texts) == list(answers.values())
    assert {each.label for each in published.classify(texts)} <= {"yes", "no"}


def test_full_finetuning_and_peft_are_exported_as_transformers_reads_them(
    world: Path, tmp_path: Path
) -> None:
    for method in ("full", "lora"):
        adapt(world, method, method=method, max_steps=2)
        assert export_run(world / method, tmp_path / method).is_dir()
    whole, _ = load_pretrained(str(tmp_path / "full"), str(tmp_path / "full"))
    trained = load_finished(world / "full").model
    assert base_digest(checked_base(whole)) == base_digest(trained.base)
    modules = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["target_modules"]
    assert sorted(modules) == ["q_proj", "v_proj"]


def test_an_entry_is_an_adapter_of_pefts(world: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    export_peft(world / "bank", tmp_path, tasks=["tiny-gemma-b"])
    base, _ = load_pretrained(str(world / "base"), str(world / "base"))
    model = peft.PeftModel.from_pretrained(base, tmp_path / "tiny-gemma-b")
    assert len(model.targeted_module_names) == 10
    COMMANDS["bank"](
        ["add", "--peft", str(tmp_path / "tiny-gemma-b"), "--bank_dir", str(tmp_path / "bank"),
         "--model_name_or_path", str(world / "base"), "--task", "tiny-gemma-b"]
    )  # fmt: skip
    _, back = read_entry(tmp_path / "bank" / "tiny-gemma-b")
    _, ours = read_entry(world / "bank" / "tiny-gemma-b")
    assert back.weights.keys() == ours.weights.keys()
    for key, tensor in ours.weights.items():
        torch.testing.assert_close(back.weights[key], tensor, msg=key)


def test_an_answer_begins_and_ends_as_the_decoder_wants_it(world: Path) -> None:
    _, tokenizer = load_pretrained(str(world / "base"), str(world / "base"))
    ids, lengths = encode_targets(["yes", "the red box"], tokenizer, max_length=3)
    pad, eos, bos, word = tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>", "yes"])
    assert (ids[0], lengths) == ([word, eos], [2, 4])
    assert ids[1] == [*tokenizer.convert_tokens_to_ids(["the", "red"]), eos]
    (source,), _ = encode_sources(["the red box"], tokenizer, max_length=3)
    assert source == [bos, *tokenizer.convert_tokens_to_ids(["the", "red"])]
    last = tokenizer.unk_token_id
    assert unknown([[bos, word], [bos, last], [bos, word, eos], [bos, pad, word]], tokenizer) == [
        False, True, False, True,
    ]  # fmt: skip


def test_a_model_left_in_its_files_is_the_same(world: Path) -> None:
    whole, _ = load_pretrained(str(world / "base"), str(world / "base"))
    lazy, _ = load_pretrained(str(world / "base"), str(world / "base"), lazy=True)
    assert all(is_lazy(each) for each in lazy.parameters())
    assert base_digest(checked_base(lazy)) == base_digest(checked_base(whole))
    materialize_all(lazy)
    ours, theirs = dict(lazy.named_buffers()), dict(whole.named_buffers())
    assert ours.keys() == theirs.keys()
    assert ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    token = torch.tensor([[5, 6, 7]])
    for each in (whole, lazy):
        each.eval()
    torch.testing.assert_close(
        whole(input_ids=token, decoder_input_ids=token).logits,
        lazy(input_ids=token, decoder_input_ids=token).logits,
    )


def test_positions_are_exact_in_half_precision(world: Path) -> None:
    """DeepSpeed casts a model with its buffers, of which transformers takes care only when it loads one."""
    base, _ = load_pretrained(str(world / "base"), str(world / "base"))
    before = {name: buffer.clone() for name, buffer in checked_base(base).named_buffers()}
    base.bfloat16()
    assert {parameter.dtype for parameter in base.parameters()} == {torch.bfloat16}
    for name, buffer in base.to(torch.float16).named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_the_plan_knows_its_sizes(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = read_shape(str(world / "base"))
    model = load_finished(world / "adapt").model
    ranks = tuple(
        dict.fromkeys(places, 2)
        for places in (
            [name.replace("/", ".") for name, there in model.gate_sites.items() if source in there]
            for source in SOURCES
        )
    )
    lengths = [len(model.prompt.prompt), len(model.prompt.sources)]
    job = Job(
        shape=shape, ranks=(2, 2), ranks_by_site=ranks, prompt_tokens=lengths[0], source_prompt_tokens=lengths[1],
        adapter_reduction=ADAPTER.reduction_factor,
    )  # fmt: skip
    found = {each.name: (each.shape, each.role == "trained") for each in weights(job)}
    assert found == {
        name: (tuple(parameter.shape), parameter.requires_grad)
        for name, parameter in model.named_parameters()
    }
    COMMANDS["plan"](
        ["--model_name_or_path", str(world / "base"), "--bank_dir", str(world / "bank"), "--json",
         "--adapter_reduction_factor", "4", "--prompt_tokens", str(lengths[0])]
    )  # fmt: skip
    assert json.loads(capsys.readouterr().out)["parameters"].items() >= sizes(weights(job)).items()


def test_what_does_not_fit_is_refused(world: Path, tmp_path: Path) -> None:
    task = "tiny-gemma-a"
    paths = (world / "base", world / task, tmp_path / "run", world / "bank")
    with pytest.raises(
        PemtError, match=r"found bottleneck.* d_ff 33 .* of 20 in its decoder; allowed is lora"
    ):
        run_source(source_config(*paths, task, expert=ExpertConfig(kind="bottleneck")))
    with pytest.raises(
        PemtError, match=r"`wi` is on no linear layer of this base model; allowed are .*up_proj"
    ):
        run_source(source_config(*paths, task, expert=ExpertConfig(target_modules=["wi"])))
    config = json.loads((world / "base" / "config.json").read_text())
    for changes, message in (
        ({"model_type": "t5gemma2"}, r"a t5gemma2 model, and its decoder has one attention .*; PEMT needs one of t5"),
        ({"encoder": {**config["encoder"], "attention_bias": True}}, r"has encoder.attention_bias true; allowed"),
        ({"decoder": {**config["decoder"], "bos_token_id": None}}, r"config.json has no decoder.bos_token_id"),
    ):  # fmt: skip
        folder = tmp_path / message[:6].strip("\\ ")
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(PemtError, match=message) as raised:
            _load(folder)
        assert "\n" not in str(raised.value)


def _load(folder: Path) -> None:
    """A random model of a config.json, checked."""
    from transformers import T5GemmaForConditionalGeneration

    from pemt.model import load_config

    checked_base(T5GemmaForConditionalGeneration(load_config(str(folder))))
