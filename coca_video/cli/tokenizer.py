"""`coca-video tokenizer CAPTIONS... --out tokenizer.json`: a vocabulary learned from captions."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

import tyro

from coca_video.cli.arguments import parse_options, say

if TYPE_CHECKING:
    from coca_video.tokenizer import Tokenizer

CAPTIONS_AT_A_TIME = 1_000
COCO_LAYOUT = 'COCO\'s caption annotations, {"annotations": [{"caption": "..."}, ...]}'


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Learns a vocabulary from captions and writes it as tokenizer.json, for pretraining's option tokenizer."""

    captions: tyro.conf.Positional[tuple[str, ...]]
    """Tar shards (a .tar, a folder, a glob or a range {000..005}), .txt files with a caption a line, COCO's .json."""
    out: Path
    """The file to write."""
    algorithm: Literal["bpe", "unigram"] = "bpe"
    """Byte-level BPE, or SentencePiece's unigram as in CoCa."""
    vocab_size: int = 64_000
    """Ids at most, special ones included; captions may give fewer."""
    max_length: int = 64
    """Tokens a caption is cut to, begin and end included."""
    overwrite: bool = False
    """Whether a file at --out may be replaced."""


class _Reader:
    """The captions of `files`, one after the other; what was read is kept in `spool`, a JSON text a line."""

    def __init__(self, files: Sequence[Path], *, spool: TextIO) -> None:
        self._files, self._spool = files, spool
        self.num_captions = self.num_without = 0

    def __iter__(self) -> Iterator[str]:
        from coca_video.train.loop import progress_bar

        with progress_bar("reading captions", total=len(self._files)) as bar:
            for file in self._files:
                for caption in self._read(file):
                    self._spool.write(json.dumps(caption) + "\n")
                    self.num_captions += 1
                    yield caption
                bar.update()
        say(f"{self.num_captions:,} captions; learning the vocabulary.")

    def _read(self, file: Path) -> Iterator[str]:
        match file.suffix:
            case ".txt":
                yield from _text_captions(file)
            case ".json":
                yield from _coco_captions(file)
            case _:
                yield from self._shard_captions(file)

    def _shard_captions(self, shard: Path) -> Iterator[str]:
        from coca_video.data.image_text import PairDataset

        # Shard by shard: two sets may use the same keys, which matters to nobody here.
        for captions in PairDataset([shard], image_size=1, seed=0, augment=False).all_captions():
            self.num_without += not captions
            yield from captions


def run(arguments: Sequence[str]) -> int:
    """Learns, writes, prints. Status 1 when some pair of a shard has no caption that can be read."""
    options = parse_options(TokenizerOptions, verb="tokenizer", arguments=arguments)
    if not options.captions:
        raise ValueError("expected one or more sources of captions; none was given.")
    if options.out.is_dir():
        raise ValueError(f"--out {options.out} is a folder; expected the name of a file, as tokenizer.json.")
    if options.out.exists() and not options.overwrite:
        raise ValueError(f"{options.out} exists already; give another --out, or --overwrite.")
    from coca_video.tokenizer import train_tokenizer

    files = [file for source in options.captions for file in _files(source)]
    if options.out.resolve() in {file.resolve() for file in files}:
        raise ValueError(f"--out {options.out} is one of the sources of captions; give another.")
    if blocking := next((parent for parent in options.out.parents if parent.is_file()), None):
        raise ValueError(f"--out {options.out} lies below {blocking}, which is a file and no folder; give another.")
    with tempfile.TemporaryFile("w+", encoding="utf-8") as spool:
        captions = _Reader(files, spool=spool)
        tokenizer = train_tokenizer(
            captions, algorithm=options.algorithm, vocab_size=options.vocab_size, max_length=options.max_length
        )
        spool.seek(0)
        _print_counts(tokenizer, lines=spool, num_captions=captions.num_captions)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(options.out)
    say(f"Written: {options.out}")
    if captions.num_without:
        say(f"{captions.num_without} pairs have no caption that can be read; they are named above and left out.")
    return 1 if captions.num_without else 0


def _files(source: str) -> list[Path]:
    """The files that one argument names."""
    from coca_video.data.image_text import open_shards

    path = Path(source)
    if path.suffix in (".txt", ".json") and not path.is_dir():
        if not path.is_file():
            raise ValueError(f"There is no file {source}.")
        return [path]
    if path.is_file() and path.suffix != ".tar":
        raise ValueError(f"Expected captions in a .tar, a .txt or a .json; got {source}.")
    return open_shards(source)


def _text_captions(file: Path) -> Iterator[str]:
    """A caption a line; blank lines are left out."""
    with file.open(encoding="utf-8-sig") as lines:
        try:
            yield from (stripped for line in lines if (stripped := line.strip()))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text ({error.reason}); convert it first.") from error


def _coco_captions(file: Path) -> Iterator[str]:
    try:
        document: Any = json.loads(file.read_bytes())
    except ValueError as error:  # JSON and Unicode errors are ValueErrors
        raise ValueError(f"{file} is no JSON ({error}); expected {COCO_LAYOUT}.") from error
    rows = document.get("annotations") if isinstance(document, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f"{file} has no list of annotations; expected {COCO_LAYOUT}.")
    for number, row in enumerate(rows):
        caption = row.get("caption") if isinstance(row, dict) else None
        if not isinstance(caption, str):
            raise ValueError(f"{file}: annotation {number} has no caption; expected {COCO_LAYOUT}.")
        if caption.strip():
            yield caption.strip()


def _print_counts(tokenizer: "Tokenizer", *, lines: TextIO, num_captions: int) -> None:
    """Size of the vocabulary, and tokens a caption: the mean, and how many 99% of the captions do not exceed."""
    import numpy as np

    from coca_video.train.loop import progress_bar

    parts = []
    with progress_bar("counting tokens", total=num_captions) as bar:
        while some := [json.loads(line) for line in islice(lines, CAPTIONS_AT_A_TIME)]:
            parts.append(np.array(tokenizer.token_counts(some), dtype=np.int32))
            bar.update(len(some))
    counts = np.concatenate(parts)
    print(f"vocabulary         {tokenizer.vocab_size}")
    print(f"captions           {num_captions}")
    print(f"tokens, mean       {counts.mean():.2f}")
    print(f"tokens, 99th pct.  {np.quantile(counts, 0.99, method='inverted_cdf')}")
    print(f"cut to {tokenizer.max_length:<11} {(counts > tokenizer.max_length).mean():.2%}")
