"""The tokenizer: marks, masks, round trips, saving; unigram against every segmentation, CLIP's against open_clip."""

import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jaxtyping import Int
from torch import Tensor

from coca_video.tokenizer import BEGIN, CLIP_BEGIN, CLIP_END, Tokenizer, clip_tokenizer, train_tokenizer

CAPTIONS = ["A dog runs.", "a dog runs on the grass", "The cat! sat on the mat", "naïve café 日本 🎈"] * 3
ODD = [
    "",
    " \t\n",
    "it's WE'LL i'D they'RE 'S",
    "snake_case __x__",
    "1234567 ½ ٣ Ⅷ",
    "x" * 500,
    "e " * 200,
    "a" * 73 + "!" * 40,
    "👨‍👩‍👧 🏳️‍🌈 🎈",
    "e\u0301 \u0301 a\u0328\u0301",
    "ＡＢＣ ｶﾀｶﾅ",
    "مرحبا עברית \u200fx",
    "日本語テキスト 한국어",
    "Ã©tÃ© â€œquotedâ€\x9d “curly” …",
    "&amp;amp; &amp;lt; &lt;b&gt; &nbsp;a &#xD800; &eacute &amp;amp;amp;",
    "<b>&amp;</b>",
    "\x00\x07 \x1b[31mred\x1b[0m \x7f \x1c\x1d",
    "İstanbul I ı ß ẞ ſ K Å ﬁ ŉ",
    "a\u0085b\u2028c\u2029d\u00a0e\u3000f\u200bg",
    "\u088f \u1c89 \ua7ce",  # letters of Unicode 16 and 17
    "\ud83c\udf88 \ud800",
    "\ufeffbom",
    "</w> a</w>",
    f"{CLIP_BEGIN} a {CLIP_END.upper()} b",
    f"!!{CLIP_BEGIN} a{CLIP_END}",
    "<ſtart_of_text> don'ſ",
]
SHORT = [text for text in ODD if len(text) < 60]  # open_clip takes a second for the long ones


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


def test_a_bad_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected a tokenizer file"):
        Tokenizer.load(tmp_path / "none.json")
    file = tmp_path / "tokenizer.json"
    for text, sentence in (("{", "it is no JSON"), ("[]", "with model, added_tokens and truncation")):
        file.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            Tokenizer.load(file)
    file.write_text(json.dumps({"model": {}, "added_tokens": [], "truncation": None}))
    with pytest.raises(ValueError, match="to state its truncation length"):
        Tokenizer.load(file)


def test_nothing_is_left_of_a_file_that_cannot_be_written(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        tokenizer.save(tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_no_captions_is_a_sentence(tokenizer: Tokenizer) -> None:
    algorithms: tuple[Literal["bpe", "unigram"], ...] = ("bpe", "unigram")
    for algorithm in algorithms:
        for captions in ([], ["", " \t"]):
            with pytest.raises(ValueError, match="expected some, got none"):
                train_tokenizer(captions, algorithm=algorithm, vocab_size=300, max_length=12)
    with pytest.raises(ValueError, match="one caption or more to encode"):
        tokenizer.encode([])


def test_token_counts_are_those_before_cutting(tokenizer: Tokenizer) -> None:
    captions = ["x " * 40, "", "a dog runs on the grass", *("y " * count for count in range(8, 13))]
    counts = tokenizer.token_counts(captions)
    uncut = Tokenizer(tokenizer.backend, max_length=500).encode(captions)[1].sum(dim=1).tolist()
    assert counts == uncut and counts[1] == 2 and max(counts) > 12


UNIGRAM_CAPTIONS = [
    "A dog runs on the grass .",
    "Two dogs are running",
    "a man in a red shirt walks his dog",
    "the man and the woman are walking on the grass",
    "dog grass red reds running runs walks walking <3",
] * 4


@pytest.fixture(scope="module")
def unigram() -> Tokenizer:
    return train_tokenizer(UNIGRAM_CAPTIONS, algorithm="unigram", vocab_size=320, max_length=500)


def test_unigram_gives_the_most_probable_of_all_segmentations(unigram: Tokenizer) -> None:
    vocabulary = json.loads(unigram.backend.to_str())["model"]["vocab"]
    score = {piece: value for piece, value in vocabulary if not piece.startswith("<")}
    words = sorted({word.lower() for caption in UNIGRAM_CAPTIONS for word in caption.split() if "<" not in word})
    several = 0
    for word in words:
        marked = f"▁{word}"
        ids, _ = unigram.encode([word])
        pieces = [vocabulary[token_id][0] for token_id in ids[0, 1:-1].tolist()]
        assert "".join(pieces) == marked
        totals = [
            sum(score.get(marked[start:stop], -math.inf) for start, stop in zip((0, *cuts), (*cuts, None), strict=True))
            for count in range(len(marked))
            for cuts in combinations(range(1, len(marked)), count)
        ]
        assert sum(score[piece] for piece in pieces) == pytest.approx(max(totals), abs=1e-9)
        several += len(pieces) > 1
    assert several >= 3  # else there was nothing to choose


def test_unigram_learns_fewer_tokens_from_more_ids() -> None:
    totals = []
    for vocab_size in (283, 287, 320):
        tokenizer = train_tokenizer(UNIGRAM_CAPTIONS, algorithm="unigram", vocab_size=vocab_size, max_length=64)
        assert tokenizer.vocab_size <= vocab_size
        totals.append(sum(tokenizer.token_counts(UNIGRAM_CAPTIONS)))
    assert totals[0] > totals[1] > totals[2]


@pytest.mark.slow
def test_unigram_trained_again_with_other_threads_is_the_same(unigram: Tokenizer, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from coca_video.tokenizer import train_tokenizer;"
        "captions = Path(sys.argv[1]).read_text().splitlines();"
        "print(train_tokenizer(captions, algorithm='unigram', vocab_size=320, max_length=500).backend.to_str())"
    )
    (tmp_path / "captions.txt").write_text("\n".join(UNIGRAM_CAPTIONS))
    command = [sys.executable, "-c", program, str(tmp_path / "captions.txt")]
    for threads in ("1", "3"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert done.stdout.strip() == unigram.backend.to_str()


def test_unigram_is_the_same_saved_pickled_and_with_another_length(unigram: Tokenizer, tmp_path: Path) -> None:
    unigram.save(tmp_path / "tokenizer.json")
    ids, mask = unigram.encode(ODD)
    for copy in (Tokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(unigram))):
        assert copy.vocab_size == unigram.vocab_size
        assert copy.encode(ODD)[0].equal(ids) and copy.encode(ODD)[1].equal(mask)
    cut = Tokenizer(pickle.loads(pickle.dumps(unigram)).backend, max_length=4)
    expected = [unigram.begin_id, *ids[2, 1:3].tolist(), unigram.end_id]
    assert cut.encode([ODD[2]])[0][0].tolist() == expected


def test_unigram_has_an_id_for_every_character_or_says_so() -> None:
    captions = ["abc", "日本 c"]  # with the space, 6 characters
    assert train_tokenizer(captions, algorithm="unigram", vocab_size=266, max_length=12).vocab_size == 266
    with pytest.raises(ValueError, match=r"have 6 characters.*vocab_size of 266 or more; got 265"):
        train_tokenizer(captions, algorithm="unigram", vocab_size=265, max_length=12)
    with pytest.raises(ValueError, match="vocab_size of 261 or more; got 260"):
        train_tokenizer(captions, algorithm="unigram", vocab_size=260, max_length=12)


def test_unigram_spells_what_it_never_saw_by_its_bytes(unigram: Tokenizer) -> None:
    ids, _ = unigram.encode(["\U0001f388"])
    names = [unigram.backend.id_to_token(token_id) for token_id in ids[0].tolist()]
    assert [name for name in names[1:-1] if name != "▁"] == ["<0xF0>", "<0x9F>", "<0x8E>", "<0x88>"]


@pytest.mark.parametrize("text", ["<bos>", "a<eos>b", "<unk> <pad>", "<0x41> <0x4a>", "<3 <<bos>>"])
def test_reserved_pieces_spelled_in_a_caption_are_plain_text(unigram: Tokenizer, text: str) -> None:
    ids, _ = unigram.encode([text])
    names = {unigram.backend.id_to_token(token_id) for token_id in ids[0, 1:-1].tolist()}
    assert not names & {"<bos>", "<eos>", "<unk>", "<pad>", "<0x41>", "<0x4A>"}
    assert unigram.decode(ids[0].tolist()) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
@example(text="\ud83c\udf88 \ud800")
def test_every_text_comes_back_normalised(text: str) -> None:
    """BPE: NFC, lower case, stripped. Unigram: NFKC, lower case, single spaces."""
    bpe, unigram = _any_text_tokenizers()
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    for tokenizer in (bpe, unigram):
        ids, mask = tokenizer.encode([text])
        assert mask.all() and (ids < tokenizer.vocab_size).all()
        assert tokenizer.decode(ids[0].tolist()) == tokenizer.backend.normalizer.normalize_str(whole).strip()


@cache
def _any_text_tokenizers() -> tuple[Tokenizer, Tokenizer]:
    return (
        train_tokenizer(CAPTIONS, vocab_size=320, max_length=1000),
        train_tokenizer(CAPTIONS, algorithm="unigram", vocab_size=320, max_length=1000),
    )


def test_normalised_means_what_it_says(unigram: Tokenizer) -> None:
    bpe, _ = _any_text_tokenizers()
    text = " ＡB\u2028 \t e\u0301▁ﬁ "
    assert bpe.decode(bpe.encode([text])[0][0].tolist()) == "ａb\u2028 \t é▁ﬁ"
    assert unigram.decode(unigram.encode([text])[0][0].tolist()) == "ab é fi"


@pytest.fixture(scope="session")
def clip() -> Tokenizer:
    pytest.importorskip("open_clip")
    return clip_tokenizer()


def open_clip_ids(captions: Sequence[str]) -> Int[Tensor, "batch 76"]:
    """What open_clip's tokenizer of its CoCa gives."""
    ids: Tensor = _open_clip_tokenizer()(list(captions))
    return ids


@cache
def _open_clip_tokenizer() -> Callable[[list[str]], Tensor]:
    import open_clip

    return open_clip.get_tokenizer("coca_ViT-L-14")


def padded(tokenizer: Tokenizer, captions: Sequence[str]) -> Int[Tensor, "batch 76"]:
    """Ours, padded to 76 as open_clip does. The mask must be True on a first run of each row and nowhere else."""
    ids, mask = tokenizer.encode(captions)
    assert mask.equal(torch.arange(mask.shape[1]) < mask.sum(dim=1, keepdim=True))
    full = torch.zeros(len(captions), 76, dtype=torch.int64)
    full[:, : ids.shape[1]] = ids
    return full


@pytest.mark.slow
def test_clip_ids_of_captions_equal_open_clips(clip: Tokenizer, data_folder: Path) -> None:
    from coca_video.data.image_text import PairDataset

    captions: list[str] = []
    for shard in sorted(data_folder.glob("flickr8k/train-0000[01].tar")):
        for some in PairDataset([shard], image_size=1, seed=0, augment=False).all_captions():
            captions.extend(some)
    annotations = json.loads((data_folder / "coco_mini/annotations/captions_train2017.json").read_text())
    captions.extend(row["caption"] for row in annotations["annotations"])
    assert len(captions) == 10_400
    assert padded(clip, captions).equal(open_clip_ids(captions))


@pytest.mark.parametrize("text", ODD)
def test_clip_ids_of_odd_unicode_equal_open_clips(clip: Tokenizer, text: str) -> None:
    assert padded(clip, [text]).equal(open_clip_ids([text]))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    text=st.text(max_size=60) | st.lists(st.sampled_from([*SHORT, "'", "<", "&#", ";", "a"]), max_size=6).map("".join)
)
def test_clip_ids_of_any_text_equal_open_clips(clip: Tokenizer, text: str) -> None:
    assert padded(clip, [text]).equal(open_clip_ids([text]))


def test_clip_ids_at_every_length_around_the_cut(clip: Tokenizer) -> None:
    captions = ["dog " * count for count in (73, 74, 75, 76, 150)]
    ids = padded(clip, captions)
    assert ids.equal(open_clip_ids(captions))
    assert ids.argmax(dim=1).tolist() == [74, 75, 75, 75, 75] and (ids.amax(dim=1) == clip.end_id).all()


def test_clip_numbers(clip: Tokenizer) -> None:
    assert (clip.vocab_size, clip.max_length) == (49_408, 76)
    assert (clip.begin_id, clip.end_id, clip.padding_id) == (49_406, 49_407, 0)
    ids, mask = clip.encode(["!", "a dog runs"])
    assert ids[0].tolist() == [49_406, 256, 49_407, 0, 0] and mask[0].tolist() == [True] * 3 + [False] * 2
    assert clip_tokenizer(max_length=10).encode(["dog " * 20])[0].shape == (1, 10)
    assert clip.token_counts(["", "dog " * 100]) == [2, 102]


def test_clip_decodes_as_open_clip_up_to_the_end(clip: Tokenizer) -> None:
    import open_clip

    texts = [text for text in ODD if CLIP_BEGIN not in text]
    for row in open_clip_ids(texts):
        theirs = open_clip.decode(row).split(CLIP_END)[0].removeprefix(CLIP_BEGIN).strip()
        assert clip.decode(row.tolist()) == theirs
    assert clip.decode(clip.encode(["A  dog, runs."])[0][0].tolist()) == "a dog , runs ."


def test_clip_stays_clip_saved_pickled_and_with_another_length(clip: Tokenizer, tmp_path: Path) -> None:
    clip.save(tmp_path / "tokenizer.json")
    expected = open_clip_ids(ODD)
    for copy in (
        Tokenizer.load(tmp_path / "tokenizer.json"),
        pickle.loads(pickle.dumps(clip)),
        Tokenizer(pickle.loads(pickle.dumps(clip_tokenizer(max_length=20))).backend, max_length=76),
    ):
        assert (copy.vocab_size, copy.max_length, copy.padding_id) == (49_408, 76, 0)
        assert padded(copy, ODD).equal(expected)


@pytest.mark.slow
def test_clip_comes_without_importing_open_clip(clip: Tokenizer) -> None:
    program = "import sys; from coca_video.tokenizer import clip_tokenizer as c; c(); print('open_clip' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_clip_without_the_extra_is_a_sentence(clip: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("ftfy", "regex"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)  # as if it were not installed
            with pytest.raises(ValueError, match=rf"{module} is not here: pip install 'coca_video\[open-clip\]'"):
                clip_tokenizer()
            with pytest.raises(ValueError, match=rf"{module} is not here: pip install"):
                pickle.loads(pickle.dumps(clip))
    monkeypatch.setattr("coca_video.tokenizer.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"is not here: pip install 'coca_video\[open-clip\]'"):
        clip_tokenizer()
