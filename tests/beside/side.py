"""One side of the comparison, in a process of its own: what the published code and ours do alike.

Run by both Pythons, so nothing newer than Python 3.8, and no import but torch, transformers and safetensors.

Shapes: B batch, P prompt tokens, S source tokens, T target tokens, D d_model.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import re
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from recipe import FROZEN, settings_of
from safetensors.torch import load_file

LEARNING_RATE = 1e-4


class Variant:
    """One model with its batch; subclasses say how it is trained, asked and scored.

    Args:
        model: in training mode.
        trained: its trained parameters.
        batch: `input_ids` and `attention_mask` [B,S], `labels` [B,T].
    """

    def __init__(self, model: Any, trained: list[Any], batch: dict[str, Any]) -> None:
        self.model, self.trained, self.batch = model, trained, batch

    def loss(self) -> Any:
        """A forward pass, in whichever mode the model is."""
        raise NotImplementedError

    def step(self) -> Any:
        """Forward, backward, clipping, optimizer."""
        raise NotImplementedError

    def answer(self) -> Any:
        """Greedy answers of T tokens to the whole batch, [B, 1 + T]."""
        raise NotImplementedError

    def evaluate(self) -> int:
        """Answers, losses and metrics of the rows; how many they were."""
        raise NotImplementedError

    def length(self) -> dict[str, int]:
        """Every answer equally long, on both sides: as many tokens as the labels, behind the decoder's start."""
        tokens = 1 + self.batch["labels"].shape[1]
        return {"max_length": tokens, "min_length": tokens}


class FrozenT5(Variant):
    """transformers' own T5 without experts, behind a trained prompt: forward and backward, the unit of the tables."""

    def __init__(self, world: Path, batch: dict[str, Any]) -> None:
        model = transformers.T5ForConditionalGeneration.from_pretrained(str(world / "base"))
        for parameter in model.parameters():
            parameter.requires_grad = False
        prompt_PD = load_file(str(world / "stage1.safetensors"))["task_shared"]
        self.prompt = torch.nn.Parameter(prompt_PD)
        super().__init__(model.train(), [self.prompt], batch)

    def _inputs(self) -> dict[str, Any]:
        embeds_BSD = self.model.get_input_embeddings()(self.batch["input_ids"])
        prompt_BPD = self.prompt.expand(len(embeds_BSD), -1, -1)
        mask_BS = self.batch["attention_mask"]
        ones_BP = mask_BS.new_ones(prompt_BPD.shape[:2])
        return {
            "inputs_embeds": torch.cat([prompt_BPD, embeds_BSD], dim=1),
            "attention_mask": torch.cat([ones_BP, mask_BS], dim=1),
        }

    def loss(self) -> Any:
        return self.model(**self._inputs(), labels=self.batch["labels"], use_cache=False).loss

    def step(self) -> Any:
        self.loss().backward()
        self.prompt.grad = None

    def answer(self) -> Any:
        self.model.eval()
        with torch.no_grad():
            tokens_BT = self.model.generate(**self._inputs(), **self.length(), do_sample=False)
        self.model.train()
        return tokens_BT


class Side:
    """Models by stage, and the requests about them; subclasses make the models of a stage."""

    def __init__(self, world: str) -> None:
        self.world = Path(world)
        self.settings = settings_of(self.world)
        self.batch = load_file(str(self.world / "batch.safetensors"))
        self.rows = load_file(str(self.world / "rows.safetensors"))
        self.models: dict[str, Variant] = {}

    def make(self, stage: str) -> Variant:
        raise NotImplementedError

    def hello(self) -> dict[str, Any]:
        """Versions and threads."""
        return {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        }

    def load(self, stage: str) -> dict[str, Any]:
        """Make a model, in place of one of the same name; how many parameters it trains."""
        torch.manual_seed(0)
        made = FrozenT5(self.world, self.batch) if stage == FROZEN else self.make(stage)
        self.models[stage] = made
        return {"trained": sum(each.numel() for each in made.trained)}

    def drop(self, stage: str) -> dict[str, Any]:
        """Free a model."""
        self.models.pop(stage)
        gc.collect()
        return {}

    def check(self, stage: str) -> dict[str, Any]:
        """Loss and gradient norm without dropout, which both sides must agree on."""
        variant = self.models[stage]
        variant.model.eval()
        loss = variant.loss()
        loss.backward()
        squares = [float(each.grad.double().square().sum()) for each in variant.trained]
        variant.model.zero_grad()
        variant.model.train()
        return {"loss": float(loss.detach()), "gradient_norm": sum(squares) ** 0.5}

    def run(self, stage: str, what: str) -> dict[str, Any]:
        """Milliseconds of one call on the clock, and computed by all threads; an answer's tokens."""
        call = getattr(self.models[stage], what)
        began = time.perf_counter(), time.process_time()
        result = call()
        clock, computed = time.perf_counter() - began[0], time.process_time() - began[1]
        told = {"milliseconds": 1e3 * clock, "computed": 1e3 * computed}
        if what == "answer":
            told["tokens"] = result.tolist()
        if what == "evaluate":
            told["rows"] = result
        return told

    def memory(self, stage: str, what: str) -> dict[str, Any]:
        """The most bytes resident during one call, above those before it."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
        before = _status("VmRSS")
        getattr(self.models[stage], what)()
        return {"bytes": _status("VmHWM") - before}


def _status(key: str) -> int:
    """A line of this process's status, in bytes."""
    text = Path("/proc/self/status").read_text()
    (kilobytes,) = re.findall(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    return 1024 * int(kilobytes)
