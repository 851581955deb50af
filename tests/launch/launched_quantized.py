"""What every launched rank runs: ZeRO-3 with quantised gathers, its CUDA quantiser written in torch.

    accelerate launch ... -m tests.launch.launched_quantized FOLDER

report.json goes to FOLDER: how far a frozen layer's outputs are off in each step, and the losses.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from deepspeed.runtime.zero import partition_parameters
from torch import Tensor, nn

from pemt.config.schema import RunConfig
from pemt.engine import Engine, shut_down
from pemt.engine.exit import run_and_exit

WIDTH = 64


class TorchQuantizer:
    """What DeepSpeed's CUDAQuantizer does: int8 in groups, symmetric, a scale a group; fp16 comes back."""

    calls = 0

    def quantize(self, param: Tensor, groups: int | None = None) -> tuple[Tensor, Tensor]:
        TorchQuantizer.calls += 1
        rows = param.detach().float().view(groups or 1, -1)
        scales = (rows.abs().amax(dim=1) / 127).clamp(min=1e-12)
        return (rows / scales[:, None]).round().to(torch.int8).view(param.shape), scales

    def dequantize(
        self, quantized: Tensor, scales: Tensor, dtype: torch.dtype = torch.float16
    ) -> Tensor:
        rows = quantized.float().view(scales.numel(), -1)
        return (rows * scales.view(-1, 1)).view(quantized.shape).to(dtype)


def main(folder: Path) -> None:
    partition_parameters.CUDAQuantizer = TorchQuantizer
    config = RunConfig(
        model_name_or_path="none",
        output_dir="none",
        task_name="none",
        per_device_train_batch_size=1,
        bf16=True,
    )
    engine = Engine(config)
    engine.seed(0, per_rank=False)
    frozen, trained = nn.Linear(WIDTH, WIDTH).requires_grad_(False), nn.Linear(WIDTH, WIDTH)
    inputs = torch.randn(1, WIDTH)
    wanted = frozen(inputs)
    engine.prepare(nn.Sequential(frozen, trained), torch.optim.AdamW(trained.parameters(), lr=1e-2))
    errors: list[float] = []
    frozen.register_forward_hook(
        lambda module, given, out: errors.append(float((out.float() - wanted).abs().max()))
    )
    losses = []
    for _ in range(3):
        loss = engine.model(inputs.bfloat16()).float().square().mean()
        engine.backward(loss, last=True)
        engine.step()
        losses.append(float(loss.detach()))
    if engine.is_main:
        report = {
            "errors": errors,
            "largest": float(wanted.abs().max()),
            "losses": losses,
            "quantised": TorchQuantizer.calls,
            "second_copies": sum(
                parameter.ds_secondary_tensor is not None
                for parameter in engine.module.parameters()
            ),
        }
        (folder / "report.json").write_text(json.dumps(report))
    shut_down()


if __name__ == "__main__":
    run_and_exit(lambda: main(Path(sys.argv[1])))
