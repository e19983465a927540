"""Take the content of a tokenizer.json and return it such that no text is encoded as a control token.

A control token, such as ``</s>``, has a meaning only where a program places it. A document that spells its name holds
text. By default, the library tokenizers encodes such text as the control token, as if the document ended there. Its
option ``encode_special_tokens`` prevents this only for added tokens that are marked as special, and only if the model
does not find the name in its own vocabulary, as WordPiece, Unigram and WordLevel models do. Therefore control tokens
get names here that no document holds; their ids stay the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")  # the names by which models with byte_fallback look up their bytes
BELOW_ALL = -1e9  # a score that Unigram models choose only where nothing else fits


def control_names(content: Mapping[str, Any], stated: Mapping[str, Any], others: Collection[str]) -> set[str]:
    """Return the names of the control tokens of a tokenizer.

    Args:
        content: The content of its tokenizer.json.
        stated: The content of its tokenizer_config.json; empty if there is none.
        others: Names of tokens that are used as control tokens, for example at the end of every document. A single
            character or a byte piece among them is text, which documents also need, and stays text.

    Returns:
        The names of the added tokens that are marked as special, of the tokens that the config names (such as
        ``pad_token``) or marks as special, and ``others``.
    """
    added = [*(content.get("added_tokens") or []), *(stated.get("added_tokens_decoder") or {}).values()]
    named = [value for key, value in stated.items() if key.endswith("_token")]
    named += stated.get("additional_special_tokens") or []
    names = {*(_name(item) for item in named), *others}
    texts = {name for name in names if len(name) <= 1 or BYTE_PIECE.fullmatch(name)}
    return (names - texts) | {token["content"] for token in added if token.get("special")}


def _name(token: Any) -> str:
    """Return the name of a token of a config: the token itself, or its ``content``. Other values give ''."""
    name = token.get("content") if isinstance(token, Mapping) else token
    return name if isinstance(name, str) else ""


def as_text(content: Mapping[str, Any], control: Collection[str]) -> dict[str, Any]:
    """Return the content of a tokenizer.json with which the names in ``control`` are encoded as ordinary text.

    Other text is encoded as before, with the same ids. Only the spaces next to an added token, which its flags lstrip
    and rstrip would remove, are kept.
    """
    hidden = {name: f"\U0010ffff{number}\U0010ffff{name}" for number, name in enumerate(sorted(control))}
    added = [{**token, "lstrip": False, "rstrip": False} for token in content.get("added_tokens") or []]
    for token in added:
        if token["content"] in hidden:
            token |= {"content": hidden[token["content"]], "special": True, "normalized": False}
    return {**content, "added_tokens": added, "model": _model(content["model"], hidden)}


def _model(model: Mapping[str, Any], hidden: Mapping[str, str]) -> dict[str, Any]:
    """Return a model without dropout that has other names of tokens, and no merges that lead to one of these."""
    changed = dict(model)
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram
        changed["vocab"] = [[hidden.get(name, name), _score(name, score, model)] for name, score in vocab]
    else:
        changed["vocab"] = {hidden.get(name, name): token for name, token in vocab.items()}
    if model.get("unk_token") in hidden:
        changed["unk_token"] = hidden[model["unk_token"]]
    if "dropout" in model:  # with it, the same text gives other tokens every time
        changed["dropout"] = None
    if "merges" in model:
        changed["merges"] = [pair for pair in model["merges"] if not _leads_to(pair, model, hidden)]
    return changed


def _score(name: str, score: float, model: Mapping[str, Any]) -> float:
    """Return the score of a piece of a Unigram model.

    The pieces of single bytes have the score 0, the best of all, so that a document that spells ``<0x0A>`` would hold a
    newline there. sentencepiece never matches their names with text.
    """
    return BELOW_ALL if model.get("byte_fallback") and BYTE_PIECE.fullmatch(name) else score


def _leads_to(pair: Any, model: Mapping[str, Any], hidden: Mapping[str, str]) -> bool:
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    whole = left + right.removeprefix(model.get("continuing_subword_prefix") or "")
    return not hidden.keys().isdisjoint((left, right, whole))
