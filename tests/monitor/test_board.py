"""TensorBoard beyond scalars: gates, prompts, layout, texts, the table of runs; of a real run, too."""

from __future__ import annotations

import json
import math
import re
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata

from pemt.config.schema import AdaptConfig, SourceConfig
from pemt.model.prompts import mean_cosines
from pemt.monitor import GateNames, Monitor, board, figures
from pemt.monitor.entropy import entropy_NL, mixture_scalars
from pemt.monitor.gates import by_layer
from pemt.monitor.hparams import columns
from pemt.monitor.layout import layout
from pemt.monitor.provenance import config_text, environment_text, git_state
from pemt.run.train import run_adapt
from tests.support.tiny import adapt_config
from tests.support.trained import train_sources

SOURCES, TARGET = ("tiny-board-a", "tiny-board-b"), "tiny-board-target"
SITES = dict.fromkeys(("encoder/0", "decoder/0"), ("mnli", "qqp.x"))
NAMES = GateNames(sources=("mnli", "qqp.x"), sites=SITES)
GATES_NLK = torch.tensor([[[0.5, 0.5], [1.0, 0.0]], [[0.25, 0.75], [1.0, 0.0]]])
SIMILARITY_MM = torch.tensor([[1.0, 0.5, -0.25], [0.5, 1.0, 0.0], [-0.25, 0.0, 1.0]])


def events_of(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    return events


def last(events: EventAccumulator, tag: str) -> float:
    return events.Scalars(tag)[-1].value


def test_entropy_is_a_share_of_the_largest() -> None:
    entropy = entropy_NL(GATES_NLK, NAMES)
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    assert entropy.tolist() == [[1.0, 0.0], [pytest.approx(quarter), 0.0]]
    alone = GateNames(sources=("mnli",), sites=dict.fromkeys(SITES, ("mnli",)))
    assert entropy_NL(torch.ones(3, 2, 1), alone).tolist() == [[0.0, 0.0]] * 3


class TestSourcesThatAreNotEverywhere:
    """Three sites: two sources, two, one; and a stack without gates."""

    names = GateNames(
        sources=("a", "b", "c"),
        sites={"encoder/0/self/q": ["a", "b"], "encoder/0": ["a", "c"], "encoder/1/self/q": ["c"]},
    )
    gates_NLK = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])

    def test_names(self) -> None:
        assert self.names.by_site(self.gates_NLK[0]) == {
            "encoder/0/self/q": {"a": 0.5, "b": 0.5},
            "encoder/0": {"a": 1.0, "c": 0.0},
            "encoder/1/self/q": {"c": 1.0},
        }
        tags = self.names.scalars(self.gates_NLK[0])
        assert tags["gate/encoder/0/self/q/b"] == 0.5
        assert "gate/encoder/0/b" not in tags
        assert (tags["gate_mean/a"], tags["gate_mean/b"], tags["gate_mean/c"]) == (0.75, 0.5, 0.5)

    def test_of_many_weights_the_log_gets_each_layers_mean(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = self.names.scalars(self.gates_NLK[0])
        assert self.names.weights == 5
        monkeypatch.setattr("pemt.monitor.gates.MOST_TAGS", 4)
        found = self.names.scalars(self.gates_NLK[0])
        assert {tag: value for tag, value in found.items() if tag.startswith("gate/")} == {
            "gate/encoder/0/a": 0.75,
            "gate/encoder/0/b": 0.5,
            "gate/encoder/0/c": 0.0,
            "gate/encoder/1/c": 1.0,
        }
        means = {tag for tag in whole if tag.startswith("gate_mean/")}
        assert {tag: found[tag] for tag in means} == {tag: whole[tag] for tag in means}

    def test_no_chart_of_a_stack_that_a_source_is_not_in(self) -> None:
        charts = layout("cb", self.names)["3 where each source acts, by layer"]
        assert list(charts) == ["a, encoder", "b, encoder", "c, encoder"]

    def test_means_are_over_the_sites_that_have_a_source(self) -> None:
        assert self.names.over_sites(self.gates_NLK).tolist() == [[0.75, 0.5, 0.5]]
        named = self.names.by_site(self.gates_NLK[0])
        assert by_layer(named) == {
            "encoder/0": {"a": 0.75, "b": 0.5, "c": 0.0},
            "encoder/1": {"c": 1.0},
        }

    def test_entropy_is_over_the_sources_of_a_site(self) -> None:
        assert entropy_NL(self.gates_NLK, self.names).tolist() == [[1.0, 0.0, 0.0]]
        found = mixture_scalars(self.names, self.gates_NLK, torch.eye(4))
        assert found["gate_entropy/encoder"] == pytest.approx(1 / 3)
        assert "gate_entropy/decoder" not in found

    def test_a_validation_is_drawn(self, tmp_path: Path) -> None:
        with Monitor(
            tmp_path, total_steps=2, is_main=True, description="adapt cb", gates=self.names
        ) as watch:
            watch.log_mixture(1, self.gates_NLK, torch.eye(4))
        assert "gates/encoder_validation" in events_of(tmp_path).Tags()["images"]


def test_cosines_of_mean_prompts() -> None:
    right, up = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    assert torch.equal(
        mean_cosines([right, up, -right]), torch.tensor([[1.0, 0, -1], [0, 1, 0], [-1, 0, 1]])
    )


def test_a_validation_leaves_numbers_histograms_and_pictures(tmp_path: Path) -> None:
    with Monitor(
        tmp_path, total_steps=2, is_main=True, description="adapt cb", gates=NAMES
    ) as watch:
        watch.log_mixture(1, GATES_NLK, SIMILARITY_MM)
    events = events_of(tmp_path)
    (line,) = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert line["prompt_similarity/mnli"] == last(events, "prompt_similarity/mnli") == 0.5
    assert line["prompt_similarity/qqp.x"] == -0.25
    assert line["gate_entropy/decoder"] == 0.0
    assert 0.5 < line["gate_entropy/encoder"] < 1.0
    tags = events.Tags()
    assert set(tags["images"]) == {
        "gates/encoder_validation",
        "gates/decoder_validation",
        "prompts/validation",
    }
    picture = events.Images("gates/encoder_validation")[0]
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    assert min(picture.width, picture.height) > 100
    (histogram,) = events.Histograms("gate_entropy_validation/encoder")
    assert histogram.histogram_value.num == 2, "one entropy an example and layer"


def test_drawing_takes_a_hundredth_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock of our own, by which a validation's pictures take three seconds."""
    clock = SimpleNamespace(now=0.0)

    def takes_a_second(*_: Any, **__: Any) -> np.ndarray:
        clock.now += 1.0
        return np.zeros((4, 4, 3), dtype=np.uint8)

    monkeypatch.setattr(board, "time", SimpleNamespace(monotonic=lambda: clock.now, time=time.time))
    monkeypatch.setattr(figures, "gate_map", takes_a_second)
    monkeypatch.setattr(figures, "similarity_map", takes_a_second)
    with Monitor(
        tmp_path, total_steps=3, is_main=True, description="adapt cb", gates=NAMES
    ) as watch:
        for step, now in enumerate((1.0, 100.0, 599.0, 601.0, 899.0, 901.0), start=1):
            clock.now = now
            watch.log_mixture(step, GATES_NLK, SIMILARITY_MM)
    events = events_of(tmp_path)
    assert [each.step for each in events.Images("gates/encoder_validation")] == [1, 4, 6]
    assert [each.step for each in events.Scalars("gate_entropy/encoder")] == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    for arguments in (
        ["init", "-b", "trunk"],
        ["config", "user.email", "a@b"],
        ["config", "user.name", "a"],
        ["remote", "add", "origin", "https://user:hf_secret@example.org/x.git"],
        ["commit", "--allow-empty", "-m", "first"],
    ):
        subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)
    return folder


def test_git_state_without_secrets(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    state = git_state(repository)
    assert len(state["git commit"]) == 40
    assert (state["git branch"], state["git changes"]) == ("trunk", "none")
    for number in range(30):
        (repository / f"new-{number:02}.py").write_text("")
    text = environment_text({"device": "cpu"}, folder=repository)
    assert "?? new-00.py" in text
    assert "and 10 more" in text
    assert "device" in text
    assert "torch" in text
    assert "hf_secret" not in text


def test_no_repository_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_state(tmp_path) == {}
    monkeypatch.setenv("PATH", "")
    assert git_state(Path.cwd()) == {}


def test_every_field_that_tells_runs_apart_is_a_column() -> None:
    names = columns()
    assert {
        "learning_rate",
        "mixture.prompt_dropout",
        "expert.rank",
        "method",
        "seed",
    } <= names.keys()
    assert not {"output_dir", "mixture", "resume_from_checkpoint"} & names.keys()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources and an adapt run, for real, on the tiny base."""
    seen: dict[str, Any] = {"report_to": ["tensorboard"]}
    folder = train_sources(tmp_path_factory.mktemp("board"), SOURCES, TARGET, **seen)
    paths = (folder / "base", folder / TARGET, folder / "adapt", folder / "bank")
    run_adapt(adapt_config(*paths, TARGET, **seen, few_shot=8))
    return folder


def test_a_real_run_answers_what_one_asks(runs: Path) -> None:
    events = events_of(runs / "adapt")
    results = json.loads((runs / "adapt" / "all_results.json").read_text())
    scalars = events.Tags()["scalars"]
    assert {
        f"gate/{stack}/1/{source}" for stack in ("encoder", "decoder") for source in SOURCES
    } <= {*scalars}
    assert sum(last(events, f"gate_mean/{source}") for source in SOURCES) == pytest.approx(1)
    assert last(events, "test/accuracy") == pytest.approx(results["test_accuracy"])
    assert 0.01 < last(events, "memory/rss_gb") <= last(events, "memory/peak_rss_gb") < 100
    assert 0 <= last(events, "train/padding_waste") < 0.9
    # Target and second source began with the same sentence.
    first, second = (last(events, f"prompt_similarity/{source}") for source in SOURCES)
    assert first < 0.8 < second
    assert "gates/decoder_test" in events.Tags()["images"]
    # one run, not a folder of runs
    assert all(path.is_file() for path in (runs / "adapt" / "tensorboard").iterdir())


def text_of(events: EventAccumulator, tag: str) -> str:
    return events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()


def test_texts_and_layout_of_a_real_run(runs: Path) -> None:
    events = events_of(runs / "adapt")
    assert f"    task_name: {TARGET}" in text_of(events, "config")
    assert "rank(s)" in text_of(events, "environment")
    content = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    charts = layout_pb2.Layout.FromString(content)
    tags = [
        tag
        for category in charts.category
        for chart in category.chart
        for tag in chart.multiline.tag
    ]
    scalars = events.Tags()["scalars"]
    for tag in tags:
        assert any(re.search(tag, scalar) for scalar in scalars), f"the chart of {tag} is empty"


def hparams_of(run: Path) -> tuple[Any, dict[str, Any]]:
    plugin = events_of(run).summary_metadata
    read = {
        tag: each.plugin_data.content for tag, each in plugin.items() if tag.startswith("_hparams_")
    }
    experiment = metadata.parse_experiment_plugin_data(read[metadata.EXPERIMENT_TAG])
    started = metadata.parse_session_start_info_plugin_data(read[metadata.SESSION_START_INFO_TAG])
    return experiment, {name: started.hparams[name] for name in started.hparams}


def test_runs_can_be_compared(runs: Path) -> None:
    experiment, adapted = hparams_of(runs / "adapt")
    other, trained = hparams_of(runs / f"run-{SOURCES[0]}")
    assert experiment == other, "of several runs TensorBoard shows the columns of any one"
    assert adapted["method"].string_value == "pemt"
    assert adapted["few_shot"].number_value == 8
    assert "few_shot" not in trained, "null is no number"
    assert trained["expert.rank"].number_value == 2
    scalars = events_of(runs / "adapt").Tags()["scalars"]
    assert {info.name.tag for info in experiment.metric_infos} <= {*scalars}


def test_a_text_cannot_leave_its_block() -> None:
    fields = {"model_name_or_path": "m", "output_dir": "o", "task_name": "cb", "bank_dir": "b"}
    config = AdaptConfig(**fields, description="```\n\n<script>alert(1)</script>\n# title")
    assert all(line.startswith("    ") for line in config_text(config).splitlines())
    assert SourceConfig(**fields).task_name in config_text(SourceConfig(**fields))
