"""How likely each of a task's labels is as the answer, with teacher forcing.

Shapes: B batch, T tokens of a label, V vocabulary, C labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def decoder_of(base: Any, states: Any, mask_BS: Tensor) -> Callable[[Tensor], Tensor]:
    """What gives the logits [B,T,V] for targets [B,T], after the encoder has run.

    Args:
        base: a T5.
        states: the encoder's output.
        mask_BS: what of it is there.
    """

    def logits_of(targets_BT: Tensor) -> Tensor:
        logits: Tensor = base(
            encoder_outputs=states,
            attention_mask=mask_BS,
            decoder_input_ids=base.prepare_decoder_input_ids_from_labels(targets_BT),
            use_cache=False,
        ).logits
        return logits

    return logits_of


def log_likelihoods(
    logits_of: Callable[[Tensor], Tensor], labels: Sequence[Sequence[int]], like_B: Tensor
) -> Tensor:
    """Summed log-probabilities of the tokens of each label, its end of sequence included [B,C], in fp32.

    Not their mean: it is the probability that the model writes just this label and ends there.

    Args:
        logits_of: the decoder's logits [B,T,V] with these targets [B,T].
        labels: token ids of each label.
        like_B: any tensor of the batch, for its size and device.
    """
    columns = []
    for ids in labels:
        targets_BT = torch.tensor(ids, device=like_B.device).expand(len(like_B), -1)
        logs_BTV = logits_of(targets_BT).float().log_softmax(dim=-1)
        columns.append(logs_BTV.gather(-1, targets_BT[..., None]).squeeze(-1).sum(dim=1))
    return torch.stack(columns, dim=1)
