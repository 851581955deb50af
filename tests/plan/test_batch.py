"""A global batch over ranks: it stays, whatever the cluster, or is refused with the numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from pemt.commands import COMMANDS
from pemt.config import PemtError
from pemt.plan import Division, PlanError, divide

small = st.integers(1, 40)


@settings(max_examples=300, deadline=None)
@given(small, small, st.integers(1, 9), st.integers(1, 9), st.none() | small, st.none() | small)
def test_what_comes_out_is_what_was_wanted(
    micro: int, rounds: int, nodes: int, ranks: int, fixed: int | None, accumulation: int | None
) -> None:
    """Or nothing does, and then no number of ranks would."""
    total = micro * rounds
    wanted: dict[str, Any] = {"most": micro, "micro_batch": fixed, "accumulation": accumulation}
    possible = [
        (ranks_of_node, each, count)
        for ranks_of_node in range(1, ranks + 1)
        for each in ([fixed] if fixed else range(1, micro + 1))
        for count in ([accumulation] if accumulation else range(1, total + 1))
        if nodes * ranks_of_node * each * count == total
    ]
    if not possible:
        with pytest.raises(PlanError, match=f"global batch of {total};"):
            divide(total, nodes=nodes, ranks_per_node=ranks, **wanted)
        return
    found = divide(total, nodes=nodes, ranks_per_node=ranks, **wanted)
    assert found.global_batch == total
    # as many ranks as can be, then as few micro-batches
    assert (found.ranks_per_node, found.micro_batch, found.accumulation) == max(possible)


RUN = ["--method", "adapter", "--task_name", "rte", "--output_dir", "new"]


@pytest.mark.parametrize(
    ("cluster", "typed", "numbers"),
    [
        ("1 1", "", "1 32 1"),
        ("2 8", "", "8 2 1"),
        ("4 8", "", "8 1 1"),
        ("8 8", "", "4 1 1"),
        ("1 2", "--per_device_train_batch_size 4", "2 4 4"),
        ("1 2", "--gradient_accumulation_steps=4", "2 4 4"),
        ("2 8", "--global_batch_size 512", "8 32 1"),
        ("2 8", "--global_batch_size 1024", "8 32 2"),
        ("2 8", "--per_device_train_batch_size=16 --global_batch_size 512", "8 16 2"),
        ("3 8", "", "3 nodes x 8 ranks = 24 examples at least"),
        ("2 8", "--per_device_train_batch_size 4", "x per_device_train_batch_size 4 = 64"),
        ("1 2", "--per_device_train_batch_size 4 --gradient_accumulation_steps 8", "= 64 examples"),
    ],
)
def test_for_launchers(
    cluster: str, typed: str, numbers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes, ranks = cluster.split()
    command = ["batch", "adapt", "--num_nodes", nodes, "--ranks_per_node", ranks, *typed.split()]
    command += ["--config", "adapt", *RUN]
    if "=" in numbers:
        with pytest.raises(PemtError, match=re.escape(numbers)) as error:
            COMMANDS["plan"](command)
        assert "\n" not in str(error.value)
        return
    COMMANDS["plan"](command)
    out, err = capsys.readouterr()
    assert out == f"{numbers}\n"
    assert "pemt: global batch " in err
    assert ("4 of 8 ranks a node are used" in err) == (cluster == "8 8")


def test_a_run_that_was_begun_keeps_its_micro_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It cannot resume with another; on fewer ranks it accumulates, on more some are left out."""
    (tmp_path / "config.yaml").write_text("per_device_train_batch_size: 4\n")
    for ranks, numbers in ((8, "8 4 1"), (4, "4 4 2"), (16, "8 4 1")):
        command = ["batch", "adapt", "--ranks_per_node", str(ranks), "--config", "adapt", *RUN]
        COMMANDS["plan"]([*command, "--output_dir", str(tmp_path)])
        assert capsys.readouterr().out == f"{numbers}\n"
    (tmp_path / "config.yaml").write_text("per_device_train_batch_size: 32\n")
    with pytest.raises(PemtError, match="the run in output_dir was begun: resume on fewer nodes"):
        COMMANDS["plan"]([*command, "--num_nodes", "2", "--output_dir", str(tmp_path)])


def test_a_division_reads_as_a_product() -> None:
    one = Division(nodes=1, ranks_per_node=1, micro_batch=1, accumulation=1)
    assert str(one) == "1 rank on 1 node x 1 example x 1 micro-batch = 1"
