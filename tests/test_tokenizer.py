"""The tokenizer: marks, masks, round trips, truncation, saving."""

import pickle
from pathlib import Path

import pytest

from coca_video.tokenizer import BEGIN, Tokenizer, train_tokenizer

CAPTIONS = ["A dog runs.", "a dog runs on the grass", "The cat! sat on the mat", "naïve café 日本 🎈"] * 3


@pytest.fixture
def tokenizer() -> Tokenizer:
    return train_tokenizer(CAPTIONS, vocab_size=320, max_length=12)


def test_marks_and_mask(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer.encode(["a dog runs", "a"])
    assert (ids[:, 0] == tokenizer.begin_id).all()
    lengths = mask.sum(dim=1).tolist()
    assert lengths[1] == 3 and ids[1, 2] == tokenizer.end_id
    assert ids.shape[1] == max(lengths) and ids[0, lengths[0] - 1] == tokenizer.end_id
    assert (ids[1, 3:] == tokenizer.padding_id).all() and not mask[1, 3:].any()


@pytest.mark.parametrize("text", ["a dog runs", "the cat! sat", "naïve café", "日本 🎈", "zebra"])
def test_round_trip_of_any_unicode(text: str) -> None:
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=320, max_length=64)
    ids, mask = tokenizer.encode([f"  {text.upper()} "])
    assert mask.all()
    assert tokenizer.decode(ids[0].tolist()) == text.upper().lower()


def test_decoding_stops_at_the_end_mark(tokenizer: Tokenizer) -> None:
    (dog, cat), _ = tokenizer.encode(["dog", "cat"])
    assert tokenizer.decode([*dog.tolist(), *cat.tolist()]) == "dog"


def test_truncation_keeps_both_marks(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer.encode(["x " * 40])
    assert ids.shape == (1, 12) and mask.all()
    assert (ids[0, 0], ids[0, -1]) == (tokenizer.begin_id, tokenizer.end_id)


def test_marks_written_in_a_caption_are_plain_text(tokenizer: Tokenizer) -> None:
    ids, _ = tokenizer.encode([f"a {BEGIN} b"])
    assert (ids[0] == tokenizer.begin_id).sum() == 1


def test_pickled_for_another_process(tokenizer: Tokenizer) -> None:
    """A loader's worker gets a pickled copy: it must give the same tokens, also for marks written in a caption."""
    copy = pickle.loads(pickle.dumps(tokenizer))
    captions = [*CAPTIONS, f"a {BEGIN} b <eos> c"]
    for ours, theirs in zip(copy.encode(captions), tokenizer.encode(captions), strict=True):
        assert ours.equal(theirs)


def test_saved_and_loaded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.vocab_size, loaded.max_length) == (tokenizer.vocab_size, 12)
    for ours, theirs in zip(loaded.encode(CAPTIONS), tokenizer.encode(CAPTIONS), strict=True):
        assert ours.equal(theirs)


def test_training_twice_gives_the_same(tokenizer: Tokenizer) -> None:
    again = train_tokenizer(CAPTIONS, vocab_size=320, max_length=12)
    assert again.backend.to_str() == tokenizer.backend.to_str()


def test_vocabulary_size_is_kept() -> None:
    assert train_tokenizer(CAPTIONS, vocab_size=262, max_length=12).vocab_size == 262
    with pytest.raises(ValueError, match="vocab_size of 259 or more; got 100"):
        train_tokenizer(CAPTIONS, vocab_size=100, max_length=12)
    with pytest.raises(ValueError, match="max_length of 3 or more; got 2"):
        train_tokenizer(CAPTIONS, vocab_size=300, max_length=2)


def test_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected a tokenizer file"):
        Tokenizer.load(tmp_path / "none.json")
