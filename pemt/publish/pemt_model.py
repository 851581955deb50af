"""A published adaptation, loaded and asked: `PemtModel`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from pemt.config import PemtError
from pemt.data import collate, encode_sources, encode_targets, eval_batches
from pemt.model import TrainedT5, load_pretrained
from pemt.publish.adapter_format import (
    CONFIG,
    TENSORS,
    Settings,
    read_model,
    read_settings,
)
from pemt.storage import local_folder

T = TypeVar("T")
LONGEST_LABEL = 256  # tokens; a run refuses longer ones


@dataclass(frozen=True, kw_only=True)
class Classified:
    """Which of its labels a model answers to one text.

    Args:
        label: what the task calls the most likely one; the label itself where that has no name.
        probabilities: label -> how likely it is among the task's, by teacher-forced log-likelihood; they sum to 1.
    """

    label: str
    probabilities: dict[str, float]


@dataclass(eq=False, repr=False)
class PemtModel:
    """A published adaptation.

        from pemt import PemtModel
        model = PemtModel.from_pretrained("runs/cb-export")      # or an id on the hub
        model.generate(["premise: It rains. hypothesis: It is wet."])

    Args:
        model: a T5 with what was trained and mixed in it.
        tokenizer: the base model's.
        settings: the task, and how it was scored.
    """

    model: TrainedT5
    tokenizer: PreTrainedTokenizerBase
    settings: Settings

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        revision: str | None = None,
        base_model: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> PemtModel:
        """Load what `pemt export` wrote, and the base model that it names.

        Args:
            path_or_id: the folder, or `owner/name` on the hub.
            revision: branch, tag or commit on the hub.
            base_model: where the base model lies now; default: as the adapter says.
            device: default: a GPU where there is one, else the CPU.
            dtype: float32, or bfloat16 for half the memory; T5 overflows in float16.

        Raises:
            HubError: neither such a folder nor such a repository.
            PemtError: what is there is no published adaptation, is damaged, or is another base's.
            BaseModelError, TokenizerError: base model or tokenizer cannot be loaded.
        """
        folder = local_folder(str(path_or_id), files=(CONFIG, TENSORS), revision=revision)
        settings = read_settings(folder)
        name = base_model or settings.base_model_name_or_path
        base, tokenizer = load_pretrained(name, settings.tokenizer_name or name)
        model, _ = read_model(folder, settings, base)
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device=chosen, dtype=dtype), tokenizer, settings)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.base.device

    def generate(
        self,
        texts: str | Sequence[str],
        *,
        batch_size: int = 32,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
    ) -> list[str]:
        """An answer to every text, in their order.

        Args:
            texts: one or several, in the form of the task's template.
            batch_size: texts in one pass; those of like length go together.
            num_beams, max_new_tokens: default: as the run was scored.
        """

        def answers(batch: dict[str, torch.Tensor]) -> list[str]:
            tokens_BT = self.model.generate(
                batch["input_ids"],
                batch["attention_mask"],
                do_sample=False,
                num_beams=num_beams or self.settings.num_beams,
                max_new_tokens=max_new_tokens or self.settings.max_new_tokens,
            )
            return self.tokenizer.batch_decode(tokens_BT, skip_special_tokens=True)

        return self._in_batches(texts, batch_size, answers)

    def classify(self, texts: str | Sequence[str], *, batch_size: int = 32) -> list[Classified]:
        """The most likely label for every text, and how likely each is; always one of the task's labels.

        Args:
            texts, batch_size: as of `generate`.

        Raises:
            PemtError: the task has no labels.
        """
        settings = self.settings
        if not settings.labels:
            raise PemtError(f"task {settings.task_name} has no labels; `generate` answers it")
        names = settings.label_names or settings.labels
        ids, _ = encode_targets(settings.labels, self.tokenizer, max_length=LONGEST_LABEL)

        def likely(batch: dict[str, torch.Tensor]) -> list[Classified]:
            scores_BC, _ = self.model.label_log_likelihoods(
                batch["input_ids"], batch["attention_mask"], ids
            )
            return [
                Classified(
                    label=names[int(scores_C.argmax())],
                    probabilities=dict(zip(names, scores_C.softmax(dim=0).tolist(), strict=True)),
                )
                for scores_C in scores_BC
            ]

        return self._in_batches(texts, batch_size, likely)

    def _in_batches(
        self,
        texts: str | Sequence[str],
        batch_size: int,
        answer: Callable[[dict[str, torch.Tensor]], list[T]],
    ) -> list[T]:
        """What `answer` gives of every text, in their order; texts of like length go together."""
        asked = [texts] if isinstance(texts, str) else list(texts)
        if not asked:
            return []
        limit = self.settings.max_source_length
        ids, _ = encode_sources(asked, self.tokenizer, max_length=limit)
        found: dict[int, T] = {}
        for chosen in eval_batches(
            [len(each) for each in ids], batch_size=batch_size, world_size=1, rank=0
        ):
            batch = collate(
                [{"input_ids": ids[i]} for i in chosen],
                pad_token_id=self.tokenizer.pad_token_id,
                device=self.device,
            )
            found |= zip(chosen, answer(batch), strict=True)
        return [found[i] for i in range(len(asked))]
