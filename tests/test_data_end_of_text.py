"""Which token ends a text: tokenizers of the `tokenizers` library, learned here, with several to choose from."""

import logging

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from precision_scaling.data import DataError, tokens
from precision_scaling.data import tokenizer as tokenizers
from precision_scaling.errors import UserError

OPTIONS = {
    **{"name": "text", "split": "train", "validation_split": "", "feature": "text", "validation_fraction": 0.3},
    **{"split_seed": 0, "hash": "", "tfds_dir": "", "workers": 1, "beam_options": ""},
}
TEXT = [f"value_{i} <|im_end|> of {i}\n" for i in range(40)]
PLAIN = [text.replace("<|im_end|>", "<im_end>") for text in TEXT]
SPECIAL = ["<pad>", "<|endoftext|>", "<|im_end|>", "7", "</s>"]  # 0 to 4


def saved(path, specials=SPECIAL, plain=(), byte_level=True):
    tokenizer = Tokenizer(models.BPE() if byte_level else models.Unigram())
    tokenizer.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False) if byte_level else pre_tokenizers.Metaspace()
    )
    tokenizer.decoder = decoders.ByteLevel() if byte_level else decoders.Metaspace()
    kind = trainers.BpeTrainer if byte_level else trainers.UnigramTrainer
    alphabet = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()} if byte_level else {}
    options = {"vocab_size": 300 if byte_level else 60, "special_tokens": list(specials), "show_progress": False}
    tokenizer.train_from_iterator(TEXT, kind(**options, **alphabet))
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in plain])
    tokenizer.save(str(path))
    return f"file:{path}"


def prepared(tmp_path, spec, texts=TEXT):
    root = tmp_path / "text"
    root.mkdir(exist_ok=True)
    for i, text in enumerate(texts):
        (root / f"{i:02}.txt").write_text(text)
    own = {"root": str(root), "cache_dir": str(tmp_path / "cache"), "tokenizer": spec}
    return tokens.prepare(**OPTIONS, **own, progress=False)


@pytest.mark.parametrize("byte_level", [True, False])
def test_an_end_of_text_is_chosen_by_name_or_by_id_and_both_are_one_corpus(tmp_path, byte_level, caplog):
    spec = saved(tmp_path / "tokenizer.json", byte_level=byte_level)
    texts = TEXT if byte_level else PLAIN
    by_name = prepared(tmp_path, f"{spec}?end_of_text=<|im_end|>", texts)
    by_id = prepared(tmp_path, f"{spec}?end_of_text=2", texts)
    assert by_name.directory == by_id.directory and by_name.end_of_text == 2
    assert np.sum(by_name.train == 2) == by_name.meta["documents"]["train"]
    assert by_name.train[-1] == by_name.validation[-1] == 2
    assert "several ends" not in caplog.text
    ids = np.asarray(by_name.train)
    assert by_name.load_tokenizer().decode(ids[: np.argmax(ids == 2)]).decode().strip() in map(str.strip, texts)
    # Digits are an id, whatever tokens are called.
    assert tokenizers.given(f"{spec}?end_of_text=7").end_of_text == 7


def test_of_several_usual_names_one_counts_and_a_warning_says_so(tmp_path, caplog):
    spec = saved(tmp_path / "tokenizer.json")
    with caplog.at_level(logging.WARNING):
        assert prepared(tmp_path, spec).end_of_text == 1
    assert "'<|endoftext|>' (1), '</s>' (4)" in caplog.text and "end_of_text=NAME" in caplog.text


@pytest.mark.parametrize("given", ["<|eot|>", "</S>", "4.0", "-1", "300000", str(2**40)])
def test_a_token_that_is_not_there_is_refused_with_those_that_are(tmp_path, given):
    spec = f"{saved(tmp_path / 'tokenizer.json')}?end_of_text={given}"
    with pytest.raises(DataError) as error:
        tokenizers.identify(spec) if not given.isdecimal() else tokenizers.given(spec)
    message = str(error.value)
    assert message.startswith(f"data.tokenizer={spec!r}: no token has the {'id' if given.isdecimal() else 'name'}")
    assert "allowed" in message and "'<|im_end|>' (2)" in message and "\n" not in message


def test_without_a_usual_name_one_must_be_given(tmp_path):
    spec = saved(tmp_path / "tokenizer.json", specials=["<pad>", "<|im_end|>"])
    with pytest.raises(
        DataError, match=r"no token has a usual name .*end_of_text= names it, e.g. '<pad>' \(0\), '<\|im"
    ):
        prepared(tmp_path, spec)
    assert prepared(tmp_path, f"{spec}?end_of_text=<|im_end|>").end_of_text == 1
    with pytest.raises(UserError, match="allowed"):
        tokenizers.identify(f"{spec}?end_of_text=")


def test_a_unigram_model_takes_the_letters_of_a_special_token_for_it(tmp_path):
    spec = saved(tmp_path / "tokenizer.json", byte_level=False)
    with pytest.raises(DataError, match=r"begins with 'value_\d+ <\|im_end.* has the token '<\|im_end\|>' \(2\) in it"):
        prepared(tmp_path, f"{spec}?end_of_text=<|im_end|>")
    assert prepared(tmp_path, f"{spec}?end_of_text=<pad>").end_of_text == 0


@pytest.mark.parametrize("given", ["<stop>", "o"])
def test_a_token_that_documents_have_in_them_ends_none(tmp_path, given):
    # An added token that is not special is found in text, an ordinary one anyway.
    spec = f"{saved(tmp_path / 'tokenizer.json', plain=['<stop>'])}?end_of_text={given}"
    chosen = tokenizers.given(spec)
    assert [ids.tolist() for ids in chosen.encode([b"a"])] == [[chosen._tokenizer.token_to_id("a")]]
    with pytest.raises(DataError, match=r"begins with 'so <stop>' .*'<\|im_end\|>' \(2\)") as error:
        chosen.encode([b"a", b"so <stop>"])
    assert f"'{given}'" in str(error.value) and "allowed" in str(error.value)
