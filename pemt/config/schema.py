"""Configuration: frozen dataclasses, checked when they are made and never changed.

Names follow Hugging Face's `TrainingArguments` wherever the same thing exists there.
`parse.py` fills them from YAML and the command line.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal

from pemt.config.errors import ConfigError
from pemt.config.parts import TENSORBOARD, TRACKERS, AdapterConfig, ExpertConfig, MixtureConfig
from pemt.config.types import check_types, inherits_docs

# Fields that may change when a run resumes: they say where and how, not what is computed. The
# accumulation is among them because the global batch counts, which checkpoints tell.
NON_IDENTITY_FIELDS = (
    *("output_dir", "gradient_accumulation_steps", "logging_steps", "report_to"),
    *("max_skipped_steps", "save_steps", "save_total_limit", "save_errors"),
    *("resume_from_checkpoint", "overwrite_output_dir", "ddp_timeout"),
)
# Fields that name files or folders: `~` in them is home, as in a shell.
PATHS = (
    *("model_name_or_path", "tokenizer_name", "output_dir", "task_file", "data_dir"),
    *("resume_from_checkpoint", "bank_dir"),
)
# Fields of both stages that are at least 1 where they are given.
COUNTS = (
    *("max_source_length", "max_target_length", "few_shot", "shuffle_buffer_size"),
    *("pad_to_multiple_of", "preprocessing_num_workers", "max_train_samples", "max_eval_samples"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("num_train_epochs", "max_skipped_steps", "logging_steps", "eval_steps", "save_steps"),
    *("save_total_limit", "num_beams", "ddp_timeout"),
)
MOST_SEED = 2**32 - 1  # numpy's


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What both stages share.

    Args:
        model_name_or_path: the frozen base model: a T5, mT5, UMT5 or T5Gemma on the hub, or a local folder.
        tokenizer_name: tokenizer, if it is not the base model's own.
        output_dir: folder of this run: logs, checkpoints, results.
        task_name: the task to train on (`pemt tasks` lists them).
        task_file: YAML file that describes a task of your own.
        data_dir: read the task from local files in this folder instead of the hub.
        data_fingerprint: set by `run_adapt` and `run_source` where data or task are given in Python: a hash of what
            they say, so that a run resumes on the same ones alone.
        validation_split: the share of the training examples (of each class alike, drawn by data_seed) that
            becomes validation, for data that has no validation set; without a test set, half of it becomes that.
        streaming: read the training set while training instead of beforehand, for data larger than memory and
            disk; needs max_steps. Scored are the official validation and test sets; where there is one of them, it is
            the test set, and the first 1000 training examples are validation.
        shuffle_buffer_size: examples of a stream that are mixed and put in order of length together.
        few_shot: train on this many examples per class, drawn by data_seed (all of a class that has fewer); of a
            regression or of open answers on this many in all.
        skip_bad_rows: count and leave out malformed rows instead of stopping at the first.
        max_source_length: longest input, in tokens; longer ones are cut.
        max_target_length: longest target, in tokens; longer ones are cut. Default: the task's own; of open answers for
            which a --task_file says nothing, the longest of its training and validation data, 16 to 256.
        pad_to_multiple_of: fill batches up to a multiple of so many tokens; default: to their longest row.
        preprocessing_num_workers: processes that tokenise; default: one, or up to 8 from 50 000 examples on.
        max_train_samples: keep only this many training examples.
        max_eval_samples: keep only this many examples of validation and of test.
        per_device_train_batch_size: examples per rank and micro-batch, at most: an epoch's longest get what is left.
        per_device_eval_batch_size: examples per rank and evaluation batch.
        gradient_accumulation_steps: micro-batches per optimizer step.
        learning_rate: peak learning rate of AdamW.
        weight_decay: AdamW's decoupled weight decay.
        max_grad_norm: gradients are clipped to this global norm; 0 turns clipping off.
        num_train_epochs: passes over the training data.
        max_steps: if positive, stop after this many optimizer steps, whatever num_train_epochs says.
        max_skipped_steps: stop after this many steps in a row with a non-finite loss or gradient on some
            rank. Such a step changes no weight and no moment; schedule and data advance. fp16 needs up to 17
            to find its loss scale.
        warmup_steps: steps of linear warm-up; where the run has no more than these, that is logged.
        lr_scheduler_type: a schedule of `transformers.get_scheduler`.
        eval_strategy: when to validate: each epoch, every eval_steps, or never.
        eval_steps: validation interval in steps for `eval_strategy: steps`.
        logging_steps: interval of logged scalars, in steps.
        report_to: experiment trackers besides log.jsonl, each by accelerate: tensorboard, wandb, mlflow, trackio,
            comet_ml, aim, clearml, dvclive, swanlab; [] for none. All but the first are packages to install.
        save_steps: save every so many steps too; a checkpoint is written after each validation anyway,
            or after each epoch where there is none.
        save_total_limit: newest checkpoints kept; the best one stays besides.
        save_errors: what a checkpoint that cannot be written does: `stop` ends the run, with `warn` it continues,
            retries with the next one, and fails at its end if the last or the best one is still not written.
        num_beams: beams of the generation that validation and test score.
        seed: seed of initialisation and dropout, 0 to 4294967295, as data_seed.
        data_seed: seed of splits, few-shot draws and data order; default: seed.
        bf16: train in bfloat16 (fp32 for trained weights under DeepSpeed, softmax, norms, losses). Default: true where
            every rank's device computes in it natively (GPUs from sm_80 on, CPUs with avx512_bf16 or amx_bf16), and
            what the run began with where it resumes.
        fp16: train in float16; T5 overflows in it from size large on.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        torch_compile: compile every block with torch.compile, for training; the first steps take minutes. With
            gradient_checkpointing blocks that mix experts run as written; with ZeRO-3 it gains little.
        ddp_timeout: seconds without a heartbeat of a rank after which the job ends and names it.
        resume_from_checkpoint: a checkpoint folder; true: the newest one in output_dir, if there is any;
            false: never. Default: the newest one, if output_dir holds a run of the same configuration.
        overwrite_output_dir: delete the run that output_dir holds.
    """

    model_name_or_path: str
    output_dir: str
    task_name: str
    tokenizer_name: str | None = None
    task_file: str | None = None
    data_dir: str | None = None
    data_fingerprint: str | None = None
    validation_split: float | None = None
    streaming: bool = False
    shuffle_buffer_size: int = 10_000
    few_shot: int | None = None
    skip_bad_rows: bool = False
    max_source_length: int = 256
    max_target_length: int | None = None
    pad_to_multiple_of: int | None = None
    preprocessing_num_workers: int | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 64
    gradient_accumulation_steps: int = 1
    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    num_train_epochs: int = 20
    max_steps: int = -1
    max_skipped_steps: int = 20
    warmup_steps: int = 0
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    eval_strategy: Literal["no", "steps", "epoch"] = "epoch"
    eval_steps: int | None = None
    logging_steps: int = 10
    report_to: list[str] = field(default_factory=lambda: [TENSORBOARD])
    save_steps: int | None = None
    save_total_limit: int = 2
    save_errors: Literal["stop", "warn"] = "stop"
    num_beams: int = 1
    seed: int = 42
    data_seed: int | None = None
    bf16: bool | None = None
    fp16: bool = False
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    ddp_timeout: int = 1800
    resume_from_checkpoint: bool | str | None = None
    overwrite_output_dir: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for name in PATHS:
            value = getattr(self, name, None)
            if isinstance(value, str):
                object.__setattr__(self, name, os.path.expanduser(value))
        for name in self.report_to:
            if name not in TRACKERS:
                raise ConfigError(f"report_to: found `{name}`, allowed are {', '.join(TRACKERS)}")
        self._at_least(1, *COUNTS)
        self._at_least(0, "learning_rate", "weight_decay", "max_grad_norm", "warmup_steps")
        for name in ("seed", "data_seed"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MOST_SEED:
                raise ConfigError(f"{name}: found {value}, allowed is 0 to {MOST_SEED}")
        if self.validation_split is not None and not 0 < self.validation_split < 1:
            raise ConfigError(
                f"validation_split: found {self.validation_split}, a number between 0 and 1 is needed"
            )
        if self.bf16 and self.fp16:
            raise ConfigError(
                "bf16, fp16: both are true, only one may be; set `bf16: false` to train in fp16"
            )
        if (self.eval_strategy == "steps") != (self.eval_steps is not None):
            raise ConfigError(
                f"eval_steps: found {self.eval_steps}, and eval_strategy is `{self.eval_strategy}`; "
                "an interval in steps goes with `steps`, and with it alone"
            )
        if self.streaming:
            self._check_streaming()
        if self.resume_from_checkpoint and self.overwrite_output_dir:
            raise ConfigError(
                "overwrite_output_dir, resume_from_checkpoint: both are given; keep one, "
                "to start over or to resume"
            )

    def _check_streaming(self) -> None:
        if self.max_steps <= 0:
            raise ConfigError(
                f"max_steps: found {self.max_steps}, but a stream's length is not known; give the number of steps"
            )
        if self.eval_strategy == "epoch":
            raise ConfigError(
                "eval_strategy: found epoch, but a stream's length is not known; give `steps` with eval_steps, or `no`"
            )
        for name in ("few_shot", "max_train_samples", "validation_split"):
            if getattr(self, name) is not None:
                raise ConfigError(f"{name}: does not go with streaming; leave one of them out")

    def _at_least(self, least: float, *names: str) -> None:
        for name in names:
            value = attrgetter(name)(self)
            if value is not None and value < least:
                raise ConfigError(f"{name}: found {value}, at least {least} is needed")

    def _positive(self, *names: str) -> None:
        for name in names:
            value = attrgetter(name)(self)
            if value <= 0:
                raise ConfigError(f"{name}: found {value}, it must be positive")

    @property
    def effective_data_seed(self) -> int:
        """`data_seed`, or `seed` where none is given."""
        return self.seed if self.data_seed is None else self.data_seed


@inherits_docs
@dataclass(frozen=True, kw_only=True)
class SourceConfig(RunConfig):
    """Stage 1, `pemt source`: train one source task's expert and prompt.

    Args:
        bank_dir: the expert bank that receives the entry.
        description: one sentence about the task; its tokens' embeddings start the task prompt.
            Default: the task's own.
        expert: the expert's kind, place and size.
    """

    bank_dir: str
    description: str | None = None
    expert: ExpertConfig = field(default_factory=ExpertConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("expert.rank", "expert.alpha", "expert.reduction_factor")
        if self.expert.kind == "bottleneck" and self.expert.target_modules != ["wo"]:
            raise ConfigError(
                f"expert.target_modules: found {self.expert.target_modules}, a bottleneck expert is on [wo]; "
                "`expert.kind: lora` goes on other layers"
            )


PEFT_METHODS = ("lora", "prompt", "peft")


@inherits_docs
@dataclass(frozen=True, kw_only=True)
class AdaptConfig(RunConfig):
    """Stage 2, `pemt adapt`: adapt to a target task, over a bank of frozen experts or by a baseline.

    A method does not read the others' fields, so that one file serves them all; `peft_config` alone
    is refused where it would do nothing.

    Args:
        bank_dir: the expert bank that `method: pemt` reads.
        source_tasks: which of the bank's entries `pemt` mixes, in this order, by name or pattern (`glue-*`); default:
            all, by name.
        method: `pemt`; or a baseline on the same trainer, without experts. `adapter`: PEMT's target adapter,
            prompt and norms alone. `full`: everything is trained. `bitfit`: biases, put into every linear
            layer and layer norm. From the peft library `lora` (on q and v), `prompt` (100 tokens), and
            `peft`: what peft_config says.
        description: one sentence about the task; its tokens' embeddings start the target prompt of `pemt`,
            `adapter` and `prompt`. Default: the task's own.
        adapter: the target adapter's size, for `pemt` and `adapter`.
        mixture: the mixture and its sparsity loss; of `adapter`, whether layer norms are trained.
        peft_config: fields of a peft.PeftConfig, as a mapping in YAML or as a YAML or JSON file: all of it,
            with peft_type, for `peft`; what differs from the default for `lora` and `prompt`.
    """

    bank_dir: str | None = None
    source_tasks: list[str] | None = None
    method: Literal["pemt", "adapter", "lora", "bitfit", "full", "prompt", "peft"] = "pemt"
    description: str | None = None
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    peft_config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "pemt" and self.bank_dir is None:
            raise ConfigError(
                "bank_dir: missing; give the folder that `pemt source` filled, or a method without experts"
            )
        if self.method == "peft" and "peft_type" not in (self.peft_config or {}):
            raise ConfigError(
                "peft_config: `method: peft` needs one with a peft_type, such as {peft_type: IA3}"
            )
        if self.peft_config is not None and self.method not in PEFT_METHODS:
            raise ConfigError(
                f"peft_config: `method: {self.method}` does not read it; "
                f"it goes with {', '.join(PEFT_METHODS)}"
            )
        self._positive("adapter.reduction_factor")
        self._at_least(1, "mixture.top_sources")
        if not 0 <= self.mixture.prompt_dropout < 1:
            raise ConfigError(
                f"mixture.prompt_dropout: found {self.mixture.prompt_dropout}, allowed is [0, 1)"
            )
