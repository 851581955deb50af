"""The tokenizer of a base model, also from a bare SentencePiece file."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Tokenizer

from pemt.config import PemtError


class TokenizerError(PemtError):
    """A tokenizer that cannot be loaded."""


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a hub name or a folder.

    A folder with `spiece.model` alone is read as T5's (with the 100 sentinels, no network), which
    AutoTokenizer does not do.

    Raises:
        TokenizerError: nothing can be loaded, or what is loaded knows no text: of a T5 without a tokenizer's files
            transformers makes one of special tokens alone.
    """
    folder = Path(name_or_path)
    bare = (folder / "spiece.model").is_file() and not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")
    )
    try:
        if bare:
            return T5Tokenizer.from_pretrained(name_or_path)
        # Left unsaid, transformers asks on stdin whether to run code that a repository brings along.
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        # `▁` starts a word
        if set(tokenizer.get_vocab()) <= {*tokenizer.all_special_tokens, "▁"}:
            raise ValueError("there are no tokenizer's files")
        return tokenizer
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"tokenizer_name: nothing could be loaded from {name_or_path}: "
            f"{str(error).splitlines()[0]}; give a hub name or a folder with a tokenizer's files"
        ) from None
