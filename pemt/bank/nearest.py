"""Which entries of a bank are most like a task, by their prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pemt.bank.entries import read_bank
from pemt.bank.manifests import check_one_base, entry_names, manifests_in
from pemt.model import (
    base_shape,
    check_weights,
    checked_base,
    description_prompt,
    load_pretrained,
    rank_by_prompt,
)


def rank_entries(
    bank_dir: str | Path,
    description: str,
    *,
    model_name_or_path: str | None = None,
    tokenizer_name: str | None = None,
) -> list[tuple[str, float]]:
    """The entries of a bank by the similarity of their prompts with a description's, the nearest first.

    It is what `mixture.top_sources` chooses by: see `pemt.model.rank_by_prompt`.

    Args:
        bank_dir: the bank.
        description: the sentence that the target's prompt starts as.
        model_name_or_path: the base model, whose embeddings that prompt is made of; default: as the entries name it.
        tokenizer_name: where the tokenizer lies elsewhere.

    Returns:
        Names and cosines, -1 to 1.

    Raises:
        BankError, StorageError: the bank cannot be used, or not with this base model.
        BaseModelError, TokenizerError: base model or tokenizer cannot be loaded.
        ModelError: the description has no tokens.
    """
    names = entry_names(bank_dir)
    manifests = list(manifests_in(bank_dir).values())
    check_one_base(manifests, where=str(bank_dir))
    base_name = model_name_or_path or str(manifests[0].base.get("name"))
    base, tokenizer = load_pretrained(base_name, tokenizer_name or base_name, lazy=True)
    shape = base_shape(base.config)
    sources = []
    for name in names:  # one after another: of each nothing but the prompt stays in memory
        (source,) = read_bank(bank_dir, base_shape=shape, base_name=base_name, tasks=[name])
        sources.append(replace(source, weights={}))
    check_weights(checked_base(base), sources)
    prompt_PD = description_prompt(tokenizer, base, description)
    ranked = rank_by_prompt(prompt_PD, [source.prompt_PD for source in sources])
    return [(names[k], cosine) for k, cosine in ranked]
