"""`coca-video tokenizer`: what it writes and prints, each option by a number, and a sentence for each mistake."""

import json
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from coca_video.cli.__main__ import main
from coca_video.data.image_text import write_shard
from coca_video.tokenizer import Tokenizer, train_tokenizer

TEXT = ["A dog runs on the grass", "two dogs run", "a man and a woman walk a dog on a long road by the sea"]
COCO = ["A cat sits", "the cats sit on a mat"]

Run = Callable[..., dict[str, float]]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Three captions a line, one of them with U+2028 inside, blank lines, Windows line ends and a byte order mark."""
    path = tmp_path / "captions.txt"
    path.write_bytes(("\ufeff" + "\r\n\r\n".join(TEXT).replace("two ", "two\u2028") + "\r\n \r\n").encode())
    return path


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    path = tmp_path / "captions.json"
    rows = [{"image_id": number, "caption": f" {caption}\n"} for number, caption in enumerate(COCO)]
    path.write_text(json.dumps({"images": [], "annotations": [*rows, {"image_id": 9, "caption": " "}]}))
    return path


@pytest.fixture
def tokenizer_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the verb with --out tokenizer.json and gives the printed figures by their names."""

    def call(*arguments: object, status: int = 0) -> dict[str, float]:
        out = ["--out", str(tmp_path / "tokenizer.json")]
        assert main(["tokenizer", *map(str, arguments), *out]) == status
        printed = capsys.readouterr().out
        return {name: float(value) for name, value in re.findall(r"^(\S.*?\S) {2,}([\d.]+)%?$", printed, re.MULTILINE)}

    return call


def fails(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence on standard error, lines of progress aside."""
    assert main(["tokenizer", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    progress = re.compile("reading captions:|.* captions; learning the vocabulary|$")
    lines = [line for line in re.split(r"[\r\n]+", printed.err) if not progress.match(line)]
    assert len(lines) == 1 and lines[0].startswith("coca-video: tokenizer: ") and printed.out == ""
    return lines[0]


def figures(tokenizer: Tokenizer, captions: list[str], *, max_length: int) -> dict[str, float]:
    """What the verb should print, counted caption by caption with an encoder that cuts nothing."""
    uncut = Tokenizer(pickle.loads(pickle.dumps(tokenizer)).backend, max_length=10_000)
    counts = sorted(int(uncut.encode([caption])[1].sum()) for caption in captions)
    return {
        "vocabulary": tokenizer.vocab_size,
        "captions": len(captions),
        "tokens, mean": round(float(np.mean(counts)), 2),
        "tokens, 99th pct.": counts[-(-99 * len(counts) // 100) - 1],
        f"cut to {max_length}": round(100 * sum(count > max_length for count in counts) / len(counts), 2),
    }


def test_text_annotations_and_shards_mixed(
    text: Path, coco: Path, pictures: Path, tmp_path: Path, tokenizer_verb: Run
) -> None:
    shards = sorted(pictures.glob("*.tar"))
    drawn: list[str] = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            details = [tar.extractfile(name) for name in tar.getnames() if name.endswith(".json")]
            drawn += [caption for file in details if file for caption in json.load(file)["captions"]]
    captions = [*(caption.replace("two ", "two\u2028") for caption in TEXT), *COCO, *drawn]
    expected = train_tokenizer(captions, vocab_size=64_000, max_length=64)
    for sources in ([pictures], [f"{pictures}/*.tar"], shards):  # a folder, a glob, tars
        printed = tokenizer_verb(text, coco, *sources, "--overwrite")
        assert (tmp_path / "tokenizer.json").read_text() == expected.backend.to_str(pretty=True)
        assert printed == figures(expected, captions, max_length=64)


def test_two_shards_with_the_same_keys(pictures: Path, tmp_path: Path, tokenizer_verb: Run) -> None:
    """Flickr8k's train and test shards number their pairs from 0 alike."""
    shard = min(pictures.glob("*.tar"))
    once = tokenizer_verb(shard)
    twice = tokenizer_verb(shard, shard, "--overwrite")
    assert twice["captions"] == 2 * once["captions"] and twice["tokens, mean"] == once["tokens, mean"]


def test_every_option_changes_a_number(text: Path, tmp_path: Path, tokenizer_verb: Run) -> None:
    plain = tokenizer_verb(text)
    assert plain["vocabulary"] > 265 and plain["cut to 64"] == 0
    assert tokenizer_verb(text, "--overwrite", "--vocab-size", 265)["vocabulary"] == 265

    short = tokenizer_verb(text, "--overwrite", "--max-length", 12)
    assert short["cut to 12"] == 33.33 and short["tokens, mean"] == plain["tokens, mean"]
    assert Tokenizer.load(tmp_path / "tokenizer.json").max_length == 12

    unigram = tokenizer_verb(text, "--overwrite", "--algorithm", "unigram")
    captions = [caption.replace("two ", "two\u2028") for caption in TEXT]
    expected = train_tokenizer(captions, algorithm="unigram", vocab_size=64_000, max_length=64)
    assert unigram == figures(expected, captions, max_length=64) != plain
    assert (tmp_path / "tokenizer.json").read_text() == expected.backend.to_str(pretty=True)


def test_the_99th_percentile_and_the_share_cut(tmp_path: Path, tokenizer_verb: Run) -> None:
    """200 captions: 197 of one word, 3 longer. 198 of 200 have the length of the 198th or less, and so on."""
    words = [1] * 197 + [5, 6, 7]
    (tmp_path / "captions.txt").write_text("\n".join(" ".join(["dog"] * count) for count in words))
    printed = tokenizer_verb(tmp_path / "captions.txt", "--max-length", 7)
    assert printed["tokens, mean"] == round((sum(words) + 2 * 200) / 200, 2)  # a word is a token; begin and end
    assert printed["tokens, 99th pct."] == 7
    assert printed["cut to 7"] == 1.0  # two of 200


def test_an_existing_file_is_kept(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tokenizer.json"
    out.write_text("mine")
    assert "exists already" in fails([text, "--out", out], capsys)
    assert out.read_text() == "mine"
    assert "is a folder" in fails([text, "--out", tmp_path], capsys)


def test_a_pair_without_captions_is_counted(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(min(pictures.glob("*.tar"))) as tar:
        jpeg = tar.extractfile(next(name for name in tar.getnames() if name.endswith(".jpg")))
        assert jpeg is not None
        image = jpeg.read()
    write_shard(tmp_path / "a.tar", pairs=[("0", image, ["a dog"]), ("1", image, [" "])])
    assert main(["tokenizer", str(tmp_path / "a.tar"), "--out", str(tmp_path / "t.json")]) == 1
    printed = capsys.readouterr()
    assert "1 pairs have no caption" in printed.err
    assert re.search(r"^captions +1$", printed.out, re.MULTILINE)


def test_mistakes_are_sentences_and_leave_nothing(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {
        "latin.txt": "a café\n".encode("latin-1"),
        "blank.txt": b" \n\n",
        "cut.json": b'{"annotations": [{"caption": ',
        "list.json": b"[1]",
        "none.json": b'{"annotations": [{"caption": "a"}, {"image_id": 1}]}',
        "clips.csv": b"a,b\n",
        "broken.tar": b"no tar",
    }
    folder = tmp_path / "bad"
    folder.mkdir()
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    out = tmp_path / "new" / "tokenizer.json"
    sentences: list[tuple[list[object], str]] = [
        ([], "expected one or more sources"),
        ([folder / "missing.txt"], "There is no file"),
        ([folder / "missing.tar"], "No shards at"),
        ([text, folder / "latin.txt"], "latin.txt is not UTF-8 text"),
        ([folder / "blank.txt"], "expected some, got none"),
        ([text, folder / "cut.json"], "cut.json is no JSON"),
        ([folder / "list.json"], "has no list of annotations"),
        ([folder / "none.json"], "annotation 1 has no caption"),
        ([folder / "clips.csv"], "Expected captions in a .tar, a .txt or a .json"),
        ([folder / "broken.tar"], "is not a whole, uncompressed tar file"),
        ([text, "--vocab-size", 100], "vocab_size of 259 or more; got 100"),
        ([text, "--vocab-size", 262, "--algorithm", "unigram"], "and a unigram vocabulary has an id for each"),
        ([text, "--max-length", 2], "max_length of 3 or more; got 2"),
    ]
    before = sorted(tmp_path.iterdir())
    for arguments, sentence in sentences:
        assert sentence in fails([*arguments, "--out", out], capsys)
    assert "is one of the sources of captions" in fails([text, "--overwrite", "--out", text], capsys)
    assert "which is a file and no folder" in fails([text, "--out", text / "tokenizer.json"], capsys)
    assert sorted(tmp_path.iterdir()) == before  # not even the folder of --out
