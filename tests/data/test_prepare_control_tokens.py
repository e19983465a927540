"""Text that spells the name of a control token stays text, with every kind of tokenizer."""

import io
import json

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from support.text_sources import lines, prepare, tokens_in
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from dlm.data.prepare.tokenizer import load_tokenizer

CONTROL = ["<unk>", "<s>", "</s>", "[SEP]", "<pad>"]
WORDS = [
    "the ",
    "fox",
    " was ",
    "<p>",
    "</p>",
    "<",
    "</",
    "s>",
    "s",
    ">",
    "[",
    "SEP",
    "]",
    "pad",
    "<0x0A>",
    "<code>",
    "\n",
]
LETTERS = sorted(set("".join([*CONTROL, *WORDS])) - {" "})  # WordPiece needs each at the start of a word and inside
TRAINING = [
    "".join(WORDS[n % 7 :: 1 + n % 5]) + "".join(f" {letter} x{letter}" for letter in LETTERS) for n in range(99)
]


def trained(kind):
    """Return a tokenizer of a kind, trained on a small text, whose decoder gives back what it encodes."""
    if kind == "byte-level BPE":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "Unigram":
        made = tokenizers.Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        made.decoder = decoders.Metaspace(prepend_scheme="never", split=False)
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=CONTROL, unk_token="<unk>", show_progress=False
        )
    else:
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(cleanup=False)
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=CONTROL, show_progress=False)
    made.train_from_iterator(TRAINING, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return made


def with_merges(made):
    """Give the model merges that lead to the end token, as converters from sentencepiece make them."""
    content = json.loads(made.to_str())
    vocab = content["model"]["vocab"]
    for left, right in (("<", "/"), ("</", "s"), ("</s", ">"), ("</s>", ">")):
        vocab.setdefault(left + right, len(vocab))
        content["model"]["merges"].insert(0, [left, right])
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def with_bytes(made):
    """Give a Unigram model the pieces of the single bytes, with the score that sentencepiece gives them."""
    content = json.loads(made.to_str())
    content["model"]["vocab"] += [[f"<0x{byte:02X}>", 0.0] for byte in range(256)]
    content["model"]["byte_fallback"] = True
    content["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, content["decoder"]]}
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def with_words_added(made):
    """Add tokens that are no control tokens: text that they spell becomes them, and they decode to it."""
    made.add_tokens([AddedToken("<code>", normalized=False), "fox"])
    return made


def not_marked(made):
    """Mark no token as special, as files do whose control tokens only the config names."""
    content = json.loads(made.to_str())
    content["added_tokens"] = [{**token, "special": False} for token in content["added_tokens"]]
    return tokenizers.Tokenizer.from_str(json.dumps(content))


KINDS = {
    "byte-level BPE": ("byte-level BPE",),
    "BPE with merges of control tokens": ("byte-level BPE", with_merges),
    "BPE with added words": ("byte-level BPE", with_words_added),
    "BPE whose control tokens are not marked": ("byte-level BPE", with_merges, not_marked),
    "Unigram": ("Unigram",),
    "Unigram with bytes": ("Unigram", with_bytes),
    "Unigram whose control tokens are not marked": ("Unigram", not_marked),
    "WordPiece": ("WordPiece",),
    "WordPiece whose control tokens are not marked": ("WordPiece", not_marked),
}
CONFIG = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>"},
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "additional_special_tokens": ["[SEP]"],
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """(kind, the library's tokenizer, dlm's tokenizer)"""
    base, *changes = KINDS[request.param]
    made = trained(base)
    for change in changes:
        made = change(made)
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return request.param, made, load_tokenizer(str(folder))


@given(parts=st.lists(st.sampled_from([*CONTROL, *WORDS]), min_size=1, max_size=12))
def test_no_document_holds_a_control_token_and_decoding_gives_its_text(kind, parts):
    name, made, tokenizer = kind
    text = "".join(parts)
    ids = list(tokenizer.encode([text])[0])
    control = {made.token_to_id(token) for token in CONTROL} - {made.token_to_id("<unk>")}
    assert control.isdisjoint(ids), made.decode(ids, skip_special_tokens=False)
    if name.startswith("WordPiece"):
        assert made.decode(ids, skip_special_tokens=False) == " ".join(text.split())
    else:
        assert made.decode(ids, skip_special_tokens=False) == text
    if not any(token in text for token in (*CONTROL, "<0x0A>")):
        assert ids == made.encode(text, add_special_tokens=False).ids


def test_a_prepared_document_that_spells_the_end_does_not_end_there(bpe, source, tmp_path):
    texts = [f"{n} <p>was <s>10</s> now 8</p>" for n in range(40)]
    (source / "a.jsonl").write_bytes(lines(texts))
    assert prepare(source, "--out", tmp_path / "out", "--tokenizer", bpe, "--validation-share", "0.2") == 0
    model = tokenizers.Tokenizer.from_file(str(bpe / "tokenizer.json"))
    model.decoder = decoders.ByteLevel()
    tokens = [token for split in ("train", "validation") for token in tokens_in(tmp_path / "out", split)]
    assert tokens.count(model.token_to_id("</s>")) == 40 and model.token_to_id("<s>") not in tokens
    found = model.decode(tokens, skip_special_tokens=False).split("</p></s>")[:-1]
    assert sorted(f"{text.strip()}</p>" for text in found) == sorted(texts)


def test_an_end_that_only_an_option_names_is_text_in_documents_too(tmp_path):
    made = trained("byte-level BPE")
    made.add_tokens(["<|end|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    end, newline = made.token_to_id("<|end|>"), made.token_to_id("Ċ")
    text = "a <|end|> b\n"
    assert end in load_tokenizer(str(tmp_path)).encode([text])[0]
    ids = load_tokenizer(str(tmp_path), control_ids=[end]).encode([text])[0]
    assert end not in ids and made.decode(ids) == text
    assert newline in load_tokenizer(str(tmp_path), control_ids=[newline]).encode([text])[0]  # else text would be lost


def test_words_that_sentencepiece_users_define_are_text_and_control_symbols_are_not_found_in_it(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING), model_writer=model, vocab_size=340, model_type="bpe", byte_fallback=True,
        user_defined_symbols=["<code>"], control_symbols=["<pad>"], normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tiny.model").write_bytes(model.getvalue())
    made = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    text = "<s>the <code> of <pad> the fox</s> <0x0A>\n"
    ids = load_tokenizer(str(tmp_path / "tiny.model")).encode([text])[0]
    assert not any(made.is_control(token) for token in ids)
    assert made.piece_to_id("<code>") in ids and made.decode(ids) == text


def test_a_tokenizer_that_was_trained_with_dropout_gives_the_same_tokens_every_time(tmp_path):
    content = json.loads(trained("byte-level BPE").to_str())
    content["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(tmp_path))
    first, *others = tokenizer.encode(TRAINING[:1] * 20)
    assert all(ids == first for ids in others)


def test_the_spaces_next_to_an_added_word_are_kept(tmp_path):
    made = trained("byte-level BPE")
    made.add_tokens([AddedToken("<b>", lstrip=True, rstrip=True, normalized=False)])
    made.save(str(tmp_path / "tokenizer.json"))
    text = "x   <b>   y\n<b>\n z"
    ids = load_tokenizer(str(tmp_path)).encode([text])[0]
    assert ids.count(made.token_to_id("<b>")) == 2 and made.decode(ids) == text
