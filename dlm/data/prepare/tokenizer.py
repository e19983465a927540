"""Load a tokenizer, a function from documents to token ids, by name or from a file.

Plain bytes, files of Hugging Face's tokenizers, and sentencepiece models (Llama-2) are supported. The tokenizer adds no
special tokens, and truncation or padding in the file is disabled: the module encode adds the tokens between documents.
Text that spells the name of a control token is encoded as text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlm.core.errors import UserError
from dlm.core.files import read_json
from dlm.data.prepare.plain_text import as_text, control_names

END_OF_DOCUMENT = 0  # in bytes, NUL ends every document; documents that contain NUL are left out


# The usual names of the eos and bos tokens, for files without a tokenizer_config.json: Llama, GPT-2, Llama-3, Gemma.
EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")


BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>")


Encode = Callable[[list[str]], Sequence[Sequence[int] | np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A function from documents to token ids, with the facts that a manifest records about it."""

    name: str
    library: str | None = None  # the library that encodes; None for bytes
    sha256: str | None = None  # hash of the tokenizer's file; None for bytes
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    encode: Encode  # documents -> the token ids of each document
    control: tuple[str, ...] = ()  # of Hugging Face's: the names that are encoded as text, not as control tokens

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest dtype of a packed file that can hold every id."""
        return np.dtype("<u1" if self.vocab_size <= 2**8 else "<u2" if self.vocab_size <= 2**16 else "<i4")


def load_tokenizer(name: str, *, threads: int = 1, control_ids: Collection[int] = ()) -> Tokenizer:
    """Load a tokenizer.

    Args:
        name: ``bytes``, or the path of a tokenizer's file or of the folder that holds it.
        threads: How many threads sentencepiece may use.
        control_ids: Ids that are used as control tokens although the tokenizer does not say so. No document is encoded
            with them, unless they stand for single characters.

    Raises:
        UserError: There is no such file, or it is not a tokenizer.
    """
    if name == "bytes":
        return Tokenizer(
            name="bytes",
            vocab_size=256,
            bos_id=END_OF_DOCUMENT,
            eos_id=END_OF_DOCUMENT,
            encode=_bytes,
        )
    path = find_tokenizer(Path(name))
    return _sentencepiece(path, threads) if path.suffix == ".model" else _hugging_face(path, control_ids)


def find_tokenizer(path: Path) -> Path:
    """Return the file of a tokenizer.

    This is ``path`` itself or, if ``path`` is a folder, its tokenizer.json or else its tokenizer.model. Raises
    UserError if there is none.
    """
    found = [path] if path.is_file() else [path / file for file in ("tokenizer.json", "tokenizer.model")]
    for file in found:
        if file.is_file() and file.suffix in (".json", ".model"):
            return file
    raise UserError(
        f"no tokenizer in {path}: give --tokenizer bytes, a tokenizer.json (Hugging Face), a .model (sentencepiece) or "
        "a folder that holds one of them"
    )


def _bytes(texts: list[str]) -> list[np.ndarray]:
    return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]


def _named(path: Path) -> dict[str, Any]:
    stem = path.parent.name if path.stem == "tokenizer" else path.stem
    return {"name": stem, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _hugging_face(path: Path, control_ids: Collection[int]) -> Tokenizer:
    import tokenizers

    try:
        as_stored = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower type
        raise UserError(f"{path} is no Hugging Face tokenizer ({error}): give another --tokenizer") from error
    config = path.with_name("tokenizer_config.json")
    stated = read_json(config) if config.is_file() else {}
    bos_id = _special(as_stored, stated.get("bos_token"), BOS_NAMES)
    eos_id = _special(as_stored, stated.get("eos_token"), EOS_NAMES)
    content = json.loads(as_stored.to_str())
    used = [as_stored.id_to_token(token) for token in {bos_id, eos_id, *control_ids} if token is not None]
    control = control_names(content, stated, [name for name in used if name is not None])
    found = tokenizers.Tokenizer.from_str(json.dumps(as_text(content, control)))
    found.encode_special_tokens = True
    found.no_truncation()
    found.no_padding()
    return Tokenizer(
        **_named(path),
        library="tokenizers",
        vocab_size=max(as_stored.get_vocab(with_added_tokens=True).values()) + 1,
        bos_id=bos_id,
        eos_id=eos_id,
        encode=lambda texts: [item.ids for item in found.encode_batch_fast(texts, add_special_tokens=False)],
        control=tuple(sorted(control)),
    )


def _special(found: Any, stated: Any, names: Sequence[str]) -> int | None:
    """Return the id of a special token, or None.

    The token is the one that the tokenizer's config states, or else the one of the usual ``names`` that is in the
    vocabulary, provided that only one is.
    """
    if isinstance(stated, dict):
        stated = stated.get("content")
    if stated is not None:
        names = (stated,)
    ids = {found.token_to_id(name) for name in names} - {None}
    return ids.pop() if len(ids) == 1 else None


def _sentencepiece(path: Path, threads: int) -> Tokenizer:
    import sentencepiece

    try:
        found = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError, ValueError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{path} is no sentencepiece model ({line}): give another --tokenizer") from error
    return Tokenizer(
        **_named(path),
        library="sentencepiece",
        vocab_size=found.vocab_size(),
        bos_id=_known(found.bos_id()),
        eos_id=_known(found.eos_id()),
        encode=lambda texts: found.encode(texts, num_threads=threads),
    )


def _known(token: int) -> int | None:
    """Return a token id of sentencepiece, or None for -1, which stands for a token that the model does not have."""
    return None if token < 0 else token
