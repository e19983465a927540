"""Fixtures for the preparation of text."""

import io

import pytest
import sentencepiece
import tokenizers
from support.text_sources import TEXTS


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """A Hugging Face tokenizer as people have them: its file truncates, pads and adds special tokens."""
    folder = tmp_path_factory.mktemp("tokenizers") / "tiny-bpe"
    folder.mkdir()
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(TEXTS, trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    model.enable_truncation(7)
    model.enable_padding(length=9)
    model.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def spm(tmp_path_factory):
    """A sentencepiece model with Llama-2's ids: 0 unknown, 1 begin, 2 end."""
    path = tmp_path_factory.mktemp("tokenizers") / "tiny.model"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=320, model_type="bpe", byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path
