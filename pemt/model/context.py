"""What one forward pass of PEMT shares between modules that T5 itself does not connect.

Shapes: B batch, S tokens of a stack (prompt included), D d_model, K experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Record:
    """What one FFN's mixture reports: its gates [B,K] and its task sparsity loss (a scalar)."""

    gates_BK: Tensor
    sparsity_loss: Tensor


@dataclass
class PassContext:
    """Shared by all FFNs of one model.

    `encoder_prompt_BD` is written by a pre-hook on every decoder block's cross-attention, hence inside the
    region that activation checkpointing recomputes: the recompute of a block always sees the encoder states of
    its own forward pass, and `generate` sees them expanded over beams.
    """

    prompt_length: int
    encoder_prompt_BD: Tensor | None = None
    encoder_mask_BS: Tensor | None = None
    decoder_mask_BS: Tensor | None = None
    _records: list[Record] | None = field(default=None, repr=False)

    @contextmanager
    def recording(
        self, *, encoder_mask_BS: Tensor | None = None, decoder_mask_BS: Tensor | None = None
    ) -> Iterator[list[Record]]:
        """Collect every FFN's record, encoder first; the masks limit the sparsity loss to real tokens.

        The masks stay after the block, for the recompute of this same pass.
        """
        self.encoder_mask_BS, self.decoder_mask_BS = encoder_mask_BS, decoder_mask_BS
        self._records = records = []
        try:
            yield records
        finally:
            self._records = None
            self.encoder_prompt_BD = None

    @property
    def wants_sparsity(self) -> bool:
        """False in `generate`. True in a recompute, which must save the very tensors that the first pass saved."""
        return self._records is not None or torch.is_grad_enabled()

    def record(self, gates_BK: Tensor, sparsity_loss: Tensor) -> None:
        """Keep the record in the forward pass proper; a recompute's is dropped, so each counts once."""
        if self._records is not None:
            self._records.append(Record(gates_BK.detach(), sparsity_loss))
