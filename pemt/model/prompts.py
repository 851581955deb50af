"""Task prompts: rows of embeddings put before the encoder's input.

Shapes: D d_model, N tokens of all source prompts, P tokens of the prompt, Q of one source prompt,
M the prompt and the source prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from pemt.model.experts import ExpertSource, ModelError, Trainable
from pemt.model.lazy import value_of


def description_prompt(tokenizer: Any, base: PreTrainedModel, description: str) -> Tensor:
    """Embeddings [P,D] of the description's tokens: what a task prompt starts as.

    Raises:
        ModelError: the description has no tokens.
    """
    ids = tokenizer(description, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ModelError(
            f"description: found {description!r}, which has no tokens; write a sentence on the task"
        )
    embedding: Any = base.get_input_embeddings().weight
    rows = torch.tensor(ids, device=embedding.device)
    return value_of(embedding)[rows].to(embedding.dtype)


class TaskPrompt(Trainable):
    """A trained prompt, in stage 2 with its correlation to the frozen source prompts.

    prompt = P_t + Σ_k dropout(softmax(P_t P_kᵀ)) P_k   (arXiv 2402.15082)

    The source prompts, which may differ in length, are one parameter of this module, so that
    ZeRO-3 gathers them for this module's forward pass. In evaluation that pass leaves
    `similarity_MM`: cosines between the mean prompts, this one's first.
    """

    similarity_MM: Tensor | None = None

    def __init__(
        self, prompt_PD: Tensor, *, sources: Sequence[Tensor] = (), dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.prompt = nn.Parameter(prompt_PD.detach().clone())
        self.dropout = dropout
        self.lengths = [len(source_QD) for source_QD in sources]
        if sources:
            sources_ND = torch.cat([source_QD.detach().to(prompt_PD) for source_QD in sources])
            self.sources = nn.Parameter(sources_ND, requires_grad=False)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        yield self.prompt

    def forward(self) -> Tensor:
        """The prompt [P,D]; its attention over source prompts is computed in fp32."""
        if not self.lengths:
            return self.prompt.clone()  # ZeRO-3 takes the parameter's own memory away afterwards
        with torch.autocast(self.prompt.device.type, enabled=False):
            target_PD, sources_ND = self.prompt.float(), self.sources.float()
            if not self.training:
                self.similarity_MM = mean_cosines([target_PD, *sources_ND.split(self.lengths)])
            # each prompt has a softmax of its own; all else is one product for all of them
            scores = (target_PD @ sources_ND.T).split(self.lengths, dim=-1)
            attention_PN = torch.cat([score_PQ.softmax(dim=-1) for score_PQ in scores], dim=-1)
            attention_PN = F.dropout(attention_PN, self.dropout, self.training)
            mixed_PD = torch.addmm(target_PD, attention_PN, sources_ND)
        return mixed_PD.to(self.prompt.dtype)


def top_sources(
    prompt_PD: Tensor, sources: Sequence[ExpertSource], most: int | None
) -> tuple[list[ExpertSource], list[str]]:
    """Of these experts, in their order, the `mixture.top_sources` whose prompts are most like the target's.

    Args:
        prompt_PD: the target's prompt as it starts.
        most: how many; None for all.

    Returns:
        Those that are mixed, and the names of the others.
    """
    if most is None or most >= len(sources):
        return list(sources), []
    ranked = rank_by_prompt(prompt_PD, [source.prompt_PD for source in sources])
    nearest = [k for k, _ in ranked[:most]]
    left_out = [source.name for k, source in enumerate(sources) if k not in nearest]
    return [sources[k] for k in sorted(nearest)], left_out


def rank_by_prompt(prompt_PD: Tensor, prompts: Sequence[Tensor]) -> list[tuple[int, float]]:
    """Which of these prompts, each [Q,D], are most like one prompt: their places, the nearest first, and how like.

    Similarity is the cosine of the means over tokens, from -1 to 1, rounded to six digits, so that machines that add
    in another order rank alike; equal ones stay in their order.
    """
    found = mean_cosines([prompt_PD, *prompts])[0, 1:].tolist()
    rounded = [(k, round(cosine, 6)) for k, cosine in enumerate(found)]
    return sorted(rounded, key=lambda each: -each[1])


@torch.no_grad()
def mean_cosines(prompts: Sequence[Tensor]) -> Tensor:
    """Cosines [M,M] between the means over tokens of M prompts, each [P,D]."""
    means_MD = F.normalize(torch.stack([prompt_PD.mean(dim=0) for prompt_PD in prompts]), dim=-1)
    return means_MD @ means_MD.T
