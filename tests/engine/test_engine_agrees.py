"""What DeepSpeed ended up with is held against the run, each value by itself, after DeepSpeed has started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pemt.engine import Engine, EngineError
from tests.support.tiny import adapt_config

RANKS = 2
# what DeepSpeed calls it -> (its value where all is well, another one, the run's name for it)
VIEWS: dict[str, tuple[Any, Any, str]] = {
    "dp_world_size": (RANKS, 1, "world size"),
    "train_micro_batch_size_per_gpu": (4, 3, "micro batch"),
    "gradient_accumulation_steps": (5, 1, "accumulation"),
    "gradient_clipping": (0.7, 1.0, "gradient clipping"),
    "bfloat16_enabled": (True, False, "bf16"),
    "fp16_enabled": (False, True, "fp16"),
}


def started(tmp_path: Path, **views: Any) -> Any:
    """An engine whose DeepSpeed says this of itself."""
    deepspeed = {key: lambda value=value: value for key, value in views.items()}
    deepspeed["dp_world_size"] = views["dp_world_size"]
    config = adapt_config(
        *(tmp_path, tmp_path, tmp_path, tmp_path, "t"),
        bf16=True,
        gradient_accumulation_steps=5,
        max_grad_norm=0.7,
    )
    return SimpleNamespace(
        config=config,
        model=SimpleNamespace(**deepspeed),
        world_size=RANKS,
        _deepspeed_json=Path("ds.json"),
    )


def test_where_all_is_well_nothing_is_said(tmp_path: Path) -> None:
    Engine._check_deepspeed_agrees(
        started(tmp_path, **{key: fine for key, (fine, _, _) in VIEWS.items()})
    )


@pytest.mark.parametrize("key", VIEWS)
def test_a_contradiction_is_an_error_that_names_both(key: str, tmp_path: Path) -> None:
    views = {name: fine for name, (fine, _, _) in VIEWS.items()}
    fine, other, told = VIEWS[key]
    engine = started(tmp_path, **{**views, key: other})
    with pytest.raises(EngineError) as caught:
        Engine._check_deepspeed_agrees(engine)
    assert str(caught.value) == (
        f"ds.json: DeepSpeed runs with {told} {other}, this run wants {fine}"
    )
