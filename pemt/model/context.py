"""What one forward pass shares between modules that T5 itself does not connect.

Shapes: B batch, S tokens of a stack (prompt included), D d_model, K experts of a site.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pemt.ops import prompt_mean, token_weights


@dataclass(frozen=True)
class SiteRecord:
    """What a site's mixture reports: its gates, and at an FFN's output, but for `generate`, its task sparsity loss.

    The loss is a scalar. In the decoder's part of `generate` the rows of the gates are repeated for beams.
    """

    gates_BK: Tensor
    sparsity_loss: Tensor | None = None


@dataclass
class PassContext:
    """Shared by all sites of one model.

    `encoder_prompt_BD` is written by a hook on the decoder. Activation checkpointing recomputes blocks alone:
    `keep_for_recompute` lets a recomputed block see the encoder's states of its own forward pass, however many
    passes have run since. In `generate` it is expanded over beams, and taken once: beams change places, but only
    with beams of the same sample.

    The weights, made of the masks once a pass, limit the sparsity loss to real tokens; without them every
    position counts.
    """

    prompt_length: int
    is_generating: bool = False
    encoder_prompt_BD: Tensor | None = None
    encoder_weights_BS: Tensor | None = None
    decoder_weights_BS: Tensor | None = None
    _records: list[SiteRecord] | None = field(default=None, repr=False)

    @contextmanager
    def recording(
        self, *, encoder_mask_BS: Tensor | None = None, decoder_mask_BS: Tensor | None = None
    ) -> Iterator[list[SiteRecord]]:
        """Collect every site's record, in the order in which the pass comes to them.

        The weights outlive the block, for the recompute of this pass: with masks and checkpointing,
        a pass must be followed by its own backward before the next.
        """
        self.encoder_weights_BS = token_weights(encoder_mask_BS)
        self.decoder_weights_BS = token_weights(decoder_mask_BS)
        records: list[SiteRecord] = []
        self._records = records
        try:
            yield records
        finally:
            self._records = self.encoder_prompt_BD = None

    @contextmanager
    def generating(self) -> Iterator[list[SiteRecord]]:
        """One `generate`: what is constant over its steps is computed, and recorded, at the first."""
        records: list[SiteRecord] = []
        self.is_generating, self._records, self.encoder_prompt_BD = True, records, None
        try:
            yield records
        finally:
            self.is_generating, self._records, self.encoder_prompt_BD = False, None, None

    def keep_encoder_prompt(self, states_BSD: Tensor) -> None:
        """Take the mean over the prompt of the encoder's last states."""
        kept_BD = self.encoder_prompt_BD
        if not (self.is_generating and kept_BD is not None and len(kept_BD) == len(states_BSD)):
            self.encoder_prompt_BD = prompt_mean(states_BSD, self.prompt_length)

    @property
    def wants_sparsity(self) -> bool:
        """False in `generate`. True in a recompute, which must save what the first pass saved."""
        return not self.is_generating and (self._records is not None or torch.is_grad_enabled())

    def record(self, gates_BK: Tensor, sparsity_loss: Tensor | None = None) -> None:
        """Keep a record, its gates detached, of the pass proper; a recompute's is dropped: each counts once."""
        if self._records is not None:
            self._records.append(SiteRecord(gates_BK, sparsity_loss))
