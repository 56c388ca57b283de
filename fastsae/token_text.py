"""Tokens as a reader sees them: one piece of text each, white space made visible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍"})


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token's own text; a byte that is no character alone is shown as �."""
    return [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids]


def visible(text: str) -> str:
    """Line breaks and tabs as symbols, and a token of nothing but spaces as that many dots."""
    shown = text.translate(_VISIBLE)
    return shown if shown.strip() else "·" * len(shown)
