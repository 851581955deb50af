"""Writes files of the golden format for other sizes, from PEMT's equations in their plainest form.

Nothing of `pemt` is used: every expert's output is made, one after the other, and autograd does the
rest. The parameters have their published names.

Shapes: B batch, S tokens, P prompt tokens, D d_model, F d_ff, K experts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.activations import ACT2FN

Parameters = dict[str, nn.Parameter]
TASKS = ("mnli", "qnli", "qqp", "sst2", "record", "squad")  # not in the order of the alphabet
GELU = ACT2FN["gelu_new"]


@dataclass
class Pass:
    """What one forward pass collects: gates and sparsity losses, encoder FFNs first."""

    prompt: int
    encoder_states: Tensor | None = None
    gates: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)


class PlainFfn(nn.Module):
    """A T5 FFN layer of one stage, in place of the stock one."""

    def __init__(
        self, stock: Any, place: str, stage: str, values: Parameters, config: dict[str, Any]
    ) -> None:
        super().__init__()
        self.stock, self.place, self.stage, self.config = stock, place, stage, config
        self.values = values
        self.run = Pass(0)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        norm_BSD = self.stock.layer_norm(hidden_BSD)
        dense = self.stock.DenseReluDense
        if self.config["feed_forward_proj"] == "relu":
            x_BSF = F.relu(dense.wi(norm_BSD))
        else:
            x_BSF = GELU(dense.wi_0(norm_BSD)) * dense.wi_1(norm_BSD)
        y_BSD = dense.wo(x_BSF)
        outputs = [self.expert(k, x_BSF, norm_BSD) for k in range(self.config["experts"])]
        if self.stage.startswith("stage1"):
            return hidden_BSD + y_BSD + outputs[0]
        gate_BK = self.gate(x_BSF)
        for k, output_BSD in enumerate(outputs):
            y_BSD = y_BSD + gate_BK[:, k, None, None] * output_BSD
        adapter = f"{self.place}.adapter_controller.adapters.superglue-cb"
        z_BSD = y_BSD + self.adapter(adapter, y_BSD)
        cosines = [F.cosine_similarity(z_BSD, output_BSD, dim=-1) for output_BSD in outputs]
        self.run.gates.append(gate_BK)
        self.run.losses.append(
            sum(gate_BK[:, k].mean() * (1 - cosine).mean() for k, cosine in enumerate(cosines))
        )
        return hidden_BSD + z_BSD

    def expert(self, k: int, x_BSF: Tensor, norm_BSD: Tensor) -> Tensor:
        dense = f"{self.place}.DenseReluDense"
        if self.stage.endswith("bottleneck"):
            return self.adapter(f"{dense}.adapter_controller.adapters.{TASKS[k]}", x_BSF) + norm_BSD
        index = "" if self.stage == "stage1" else f".{k}"
        down, up = (
            self.values[f"{dense}.wo.lora_A{index}"],
            self.values[f"{dense}.wo.lora_B{index}"],
        )
        return self.config["lora_alpha"] / self.config["lora_rank"] * (x_BSF @ down.T @ up.T)

    def adapter(self, name: str, x: Tensor) -> Tensor:
        down = F.linear(
            x, self.values[f"{name}.down_sampler.weight"], self.values[f"{name}.down_sampler.bias"]
        )
        return F.linear(
            GELU(down),
            self.values[f"{name}.up_sampler.weight"],
            self.values[f"{name}.up_sampler.bias"],
        )

    def gate(self, x_BSF: Tensor) -> Tensor:
        states = x_BSF if self.run.encoder_states is None else self.run.encoder_states
        owner = "DenseReluDense" if self.stage.endswith("bottleneck") else "DenseReluDense.wo"
        logits_BPK = states[:, : self.run.prompt] @ self.values[f"{self.place}.{owner}.w_gate"]
        return logits_BPK.mean(dim=1).softmax(dim=-1)


def write_plain(path: Path, config: dict[str, Any], *, seed: int, inner: int = 4) -> None:
    """Write a file of all four stages; `config` is its metadata, `inner` a bottleneck's width."""
    generator = torch.Generator().manual_seed(seed)
    inputs = _inputs(config, generator)
    tensors = {f"inputs.{key}": value for key, value in inputs.items()}
    for stage in ("stage1", "stage2", "stage1_bottleneck", "stage2_bottleneck"):
        of_stage = {**config, "experts": 1} if stage.startswith("stage1") else config
        tensors |= _run_stage(stage, of_stage, inputs, inner, generator)
    save_file(tensors, path, metadata={"config": json.dumps(config)})


def _inputs(config: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(2, config["vocab_size"], (3, 9), generator=generator)
    labels = torch.randint(2, config["vocab_size"], (3, 5), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:], mask[2, 4:], labels[1, 3:] = 0, 0, -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def _run_stage(
    stage: str,
    config: dict[str, Any],
    inputs: dict[str, Tensor],
    inner: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    base = random_base(config, generator)
    values = random_values(stage, config, inner, generator)
    run = Pass(len(values["task_shared"]))
    base.encoder.register_forward_hook(lambda *args: setattr(run, "encoder_states", args[-1][0]))
    for stack, layer in (("encoder", 1), ("decoder", 2)):
        for i, block in enumerate(getattr(base, stack).block):
            place = f"{stack}.block.{i}.layer.{layer}"
            ffn = PlainFfn(block.layer[layer], place, stage, values, config)
            ffn.run = run
            block.layer[layer] = ffn
    state = {key.replace(".stock.", "."): value for key, value in base.named_parameters()}
    prompt_PD = values["task_shared"]
    for k in range(config["experts"] if stage.startswith("stage2") else 0):
        source_QD = values[f"task_list.{k}"]
        prompt_PD = prompt_PD + (values["task_shared"] @ source_QD.T).softmax(-1) @ source_QD
    embeds = base.shared(inputs["input_ids"])
    embeds = torch.cat([prompt_PD.expand(len(embeds), -1, -1), embeds], dim=1)
    mask = torch.cat([inputs["attention_mask"].new_ones(embeds.shape[0], len(prompt_PD)),
                      inputs["attention_mask"]], dim=1)  # fmt: skip
    out = base(inputs_embeds=embeds, attention_mask=mask, labels=inputs["labels"])
    loss = out.loss
    if run.losses:
        loss = loss + config["tsl_weight"] * torch.stack(run.losses).mean()
    loss.backward()
    results = {
        "loss": loss,
        "ce_loss": out.loss,
        "logits": out.logits,
        "encoder_last_hidden_state": out.encoder_last_hidden_state,
        **{f"gate.{i}": gate_BK[:, None] for i, gate_BK in enumerate(run.gates)},
    }
    state = {**state, "lm_head.weight": base.lm_head.weight}
    state |= {
        f"{stack}.embed_tokens.weight": base.shared.weight for stack in ("encoder", "decoder")
    }
    state |= values
    trained = [key for key in state if _is_trained(stage, key)]
    tensors = {f"{stage}.param.{key}": value for key, value in state.items()}
    tensors |= {f"{stage}.out.{key}": value for key, value in results.items()}
    tensors |= {f"{stage}.grad.{key}": state[key].grad for key in trained}
    return {key: value.detach().clone().contiguous() for key, value in tensors.items()}


def _is_trained(stage: str, name: str) -> bool:
    if stage.startswith("stage1"):
        return "lora_" in name or "adapter_controller" in name or name == "task_shared"
    return name == "task_shared" or any(
        part in name for part in ("layer_norm", "w_gate", "superglue-cb")
    )


def random_base(config: dict[str, Any], generator: torch.Generator) -> T5ForConditionalGeneration:
    """A T5 none of whose parts is without effect."""
    base = T5ForConditionalGeneration(T5Config(**config))
    if config.get("tie_word_embeddings") is False:
        base.lm_head.weight = nn.Parameter(torch.empty_like(base.lm_head.weight))
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "layer_norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                spread = 1.0 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
                parameter.normal_(
                    0, 1.0 if name == "shared.weight" else spread, generator=generator
                )
    return base.eval()


def random_values(
    stage: str,
    config: dict[str, Any],
    inner: int,
    generator: torch.Generator,
    *,
    prompts: Sequence[int] = (5, *range(3, 9)),
) -> Parameters:
    """PEMT's own parameters of a stage by their published names.

    Args:
        prompts: tokens of the task's own prompt, then of each source's.
    """
    d_model, d_ff, experts = config["d_model"], config["d_ff"], config["experts"]
    values: Parameters = {}

    def add(name: str, *shape: int, spread: float | None = None) -> None:
        spread = shape[-1] ** -0.5 if spread is None else spread
        values[name] = nn.Parameter(torch.randn(*shape, generator=generator) * spread)

    def add_adapter(name: str, inputs: int, width: int) -> None:
        add(f"{name}.down_sampler.weight", width, inputs)
        add(f"{name}.down_sampler.bias", width, spread=0.1)
        add(f"{name}.up_sampler.weight", d_model, width)
        add(f"{name}.up_sampler.bias", d_model, spread=0.1)

    add("task_shared", prompts[0], d_model, spread=1.0)
    bottleneck, target = stage.endswith("bottleneck"), stage.startswith("stage2")
    for k in range(experts if target else 0):
        add(f"task_list.{k}", prompts[1 + k], d_model, spread=1.0)
    for place, in_decoder in _places(config):
        dense = f"{place}.DenseReluDense"
        for k in range(experts):
            if bottleneck:
                add_adapter(f"{dense}.adapter_controller.adapters.{TASKS[k]}", d_ff, inner)
            else:
                index = f".{k}" if target else ""
                add(f"{dense}.wo.lora_A{index}", config["lora_rank"], d_ff)
                add(f"{dense}.wo.lora_B{index}", d_model, config["lora_rank"])
        if target:
            owner = dense if bottleneck else f"{dense}.wo"
            add(f"{owner}.w_gate", d_model if in_decoder else d_ff, experts, spread=0.3)
            adapters = f"{place}.adapter_controller.adapters"
            add_adapter(f"{adapters}.superglue-cb", d_model, d_model // config["reduction_factor"])
    return values


def _places(config: dict[str, Any]) -> Sequence[tuple[str, bool]]:
    decoder = config.get("num_decoder_layers", config["num_layers"])
    return [(f"encoder.block.{i}.layer.1", False) for i in range(config["num_layers"])] + [
        (f"decoder.block.{i}.layer.2", True) for i in range(decoder)
    ]
