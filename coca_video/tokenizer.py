"""Captions to token ids and back, in one `tokenizer.json`: byte-level BPE, unigram, or CLIP's vocabulary."""

import gzip
import html
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from torch import Tensor

PADDING, BEGIN, END, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
CLIP_BEGIN, CLIP_END = "<start_of_text>", "<end_of_text>"
CLIP_MERGES = "bpe_simple_vocab_16e6.txt.gz"
CLIP_NUM_MERGES = 49_152 - 256 - 2  # the file lists more; CLIP stops here
WORD_END = "</w>"
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # the names that tokenizers' byte fallback looks up
UNIGRAM_RESERVED = (PADDING, BEGIN, END, UNKNOWN, *BYTE_PIECES)
UNIGRAM_ROUNDS = 10  # of EM between prunings; 2, the default, left 17.4 tokens a caption of Flickr8k, 5 15.7, 60 15.7
SURROGATE = re.compile("[\ud800-\udfff]")


class _Marks(NamedTuple):
    padding: str
    begin: str
    end: str


_OWN = _Marks(padding=PADDING, begin=BEGIN, end=END)
_CLIP = _Marks(padding="!", begin=CLIP_BEGIN, end=CLIP_END)  # CLIP pads with id 0, which is also "!"


class Tokenizer:
    """Encodes captions as begin, tokens, end, cut to `max_length`; padding is told by the mask, never by its id.

    A backend with CLIP's begin mark is CLIP's: its captions are cleaned and parted into words in Python, as open_clip
    does, since `tokenizer.json` has no words for ftfy. That needs ftfy and regex, which come with the extra open-clip.
    """

    def __init__(self, backend: Backend, *, max_length: int) -> None:
        _check_max_length(max_length)
        self.backend = backend
        self.max_length = max_length
        self._clip_words = _clip_words() if backend.token_to_id(CLIP_BEGIN) is not None else None
        marks = _OWN if self._clip_words is None else _CLIP
        self.padding_id, self.begin_id, self.end_id = (self._special_id(name) for name in marks)
        # Ours takes a mark spelled in a caption as plain text, open_clip as the mark: its ids are to be the same.
        self.backend.encode_special_tokens = self._clip_words is None
        self.backend.enable_truncation(max_length)
        self.backend.enable_padding(pad_id=self.padding_id, pad_token=marks.padding)

    def __getstate__(self) -> dict[str, object]:
        return {"backend": self.backend.to_str(), "max_length": self.max_length}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickled as it is, the backend would forget encode_special_tokens.
        self.__init__(Backend.from_str(state["backend"]), max_length=state["max_length"])  # type: ignore[misc]

    def _special_id(self, name: str) -> int:
        token_id = self.backend.token_to_id(name)
        if token_id is None:
            raise ValueError(f"Expected a tokenizer with the special token {name}; this one has none.")
        return int(token_id)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return int(self.backend.get_vocab_size())

    def encode(self, captions: Sequence[str]) -> tuple[Int[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
        """Token ids and their mask (True for real tokens), padded on the right to the longest caption."""
        if not captions:
            raise ValueError("Expected one caption or more to encode; got none.")
        encodings = self._encodings(captions)
        ids = torch.tensor([encoding.ids for encoding in encodings], dtype=torch.int64)
        mask = torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.bool)
        return ids, mask

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption before it is cut to `max_length`, begin and end included."""
        return [
            2 + sum(sum(part.attention_mask) - 2 for part in (encoding, *encoding.overflowing))
            for encoding in self._encodings(captions)
        ]

    def _encodings(self, captions: Sequence[str]) -> list[Any]:
        if self._clip_words is not None:
            words = [self._clip_words(caption) for caption in captions]
            return list(self.backend.encode_batch(words, is_pretokenized=True))
        return list(self.backend.encode_batch([_well_formed(caption) for caption in captions]))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` up to the first end mark; special tokens leave no trace.

        CLIP's vocabulary gives words apart by spaces, "a dog runs .", since it does not know what stood between them.
        """
        before_end: list[int] = []
        for token_id in ids:
            if token_id == self.end_id:
                break
            before_end.append(int(token_id))
        text: str = self.backend.decode(before_end, skip_special_tokens=True)
        return text.strip()

    def save(self, path: Path) -> None:
        """Writes `tokenizer.json`, whole or not at all; its truncation length is `max_length`."""
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(self.backend.to_str(pretty=True), encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Reads what `save` wrote.

        Raises:
            ValueError: no such file, no tokenizer of this package, or CLIP's without the extra open-clip.
        """
        if not path.is_file():
            raise ValueError(f"Expected a tokenizer file at {path}; there is none.")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # JSON and Unicode errors are ValueErrors
            raise ValueError(f"Expected {path} to be a tokenizer.json; it is no JSON: {error}.") from error
        if not (isinstance(document, dict) and {"model", "added_tokens", "truncation"} <= document.keys()):
            raise ValueError(f"Expected {path} to be a tokenizer.json with model, added_tokens and truncation.")
        if document["truncation"] is None:
            raise ValueError(
                f"Expected {path} to state its truncation length, as a saved tokenizer of this package does."
            )
        return cls(Backend.from_file(str(path)), max_length=document["truncation"]["max_length"])


def train_tokenizer(
    captions: Iterable[str],
    *,
    algorithm: Literal["bpe", "unigram"] = "bpe",
    vocab_size: int,
    max_length: int,
) -> Tokenizer:
    """A lower-casing tokenizer of at most `vocab_size` ids (fewer where the captions give no more), for any text.

    bpe: byte-level BPE. Every text comes back as it was after Unicode NFC, lower-casing and stripping.
    unigram: the algorithm of SentencePiece (Kudo 2018), which CoCa's vocabulary of 64k is made by. Text is put into
    Unicode NFKC, lower-cased, and its whitespace (and ▁, which stands for it) becomes single spaces. A character that
    the captions do not have is spelled by its UTF-8 bytes, so that it comes back too.

    The same captions give the same tokenizer. For unigram that was found, not proved: tokenizers sums its scores in
    another order each time, which moves them by 1e-14, and so they are rounded to 1e-4.

    Raises:
        ValueError: no captions, a vocabulary too small for its bytes and marks (for unigram, also for every
            character of the captions), or max_length below 3.
    """
    _check_max_length(max_length)
    smallest = 256 + 3 if algorithm == "bpe" else len(UNIGRAM_RESERVED) + 1
    if vocab_size < smallest:
        raise ValueError(
            f"A {algorithm} vocabulary has 256 bytes and {smallest - 256} more ids at least: "
            f"vocab_size of {smallest} or more; got {vocab_size}."
        )
    train = _train_bpe if algorithm == "bpe" else _train_unigram
    backend = train(_not_none(captions), vocab_size=vocab_size)
    _put_marks(backend, begin=BEGIN, end=END)
    return Tokenizer(backend, max_length=max_length)


def _check_max_length(max_length: int) -> None:
    if max_length < 3:
        raise ValueError(
            f"A caption needs room for begin, one token and end: max_length of 3 or more; got {max_length}."
        )


def _not_none(captions: Iterable[str]) -> Iterator[str]:
    """The captions as text that UTF-8 can hold; a sentence when there is none, or none but blank ones."""
    found = False
    for caption in captions:
        found = found or bool(caption.strip())
        yield _well_formed(caption)
    if not found:
        raise ValueError("A tokenizer is trained on captions; expected some, got none that is not blank.")


def _well_formed(text: str) -> str:
    """Surrogates, which JSON lets in and UTF-8 has no bytes for, joined in pairs; one alone becomes U+FFFD."""
    if SURROGATE.search(text) is None:
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _put_marks(backend: Backend, *, begin: str, end: str) -> None:
    marks = [(name, backend.token_to_id(name)) for name in (begin, end)]
    backend.post_processor = processors.TemplateProcessing(single=f"{begin} $A {end}", special_tokens=marks)


def _train_bpe(captions: Iterable[str], *, vocab_size: int) -> Backend:
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PADDING, BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer=trainer)
    return backend


def _train_unigram(captions: Iterable[str], *, vocab_size: int) -> Backend:
    spaces = normalizers.Replace(Regex(r"[\s▁]+"), " ")
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), spaces, normalizers.Strip()])
    pieces = _unigram_pieces(
        (normalizer.normalize_str(caption) for caption in captions), most=vocab_size - len(UNIGRAM_RESERVED)
    )
    vocabulary = [*((name, 0.0) for name in UNIGRAM_RESERVED), *pieces]
    backend = Backend(models.Unigram(vocabulary, unk_id=UNIGRAM_RESERVED.index(UNKNOWN), byte_fallback=True))
    backend.normalizer = normalizer
    # The model would find the reserved pieces in text that spells them: their "<" is parted from the rest.
    marks = Regex("<(?=(?:pad|bos|eos|unk|0x[0-9A-Fa-f]{2})>)")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(marks, behavior="isolated")]
    )
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " ")])
    backend.add_special_tokens([PADDING, BEGIN, END])
    return backend


def _unigram_pieces(texts: Iterable[str], *, most: int) -> list[tuple[str, float]]:
    """At most `most` pieces and their log probabilities, the most probable first; texts are normalised."""
    learner = Backend(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=most + 1, unk_token=UNKNOWN, n_sub_iterations=UNIGRAM_ROUNDS, show_progress=False
    )
    learner.train_from_iterator(_few_characters(texts, most=most), trainer=trainer)
    learned = json.loads(learner.to_str())["model"]["vocab"]
    pieces = [(piece, round(score, 4)) for piece, score in learned if piece not in UNIGRAM_RESERVED]
    # Characters that earned no place are kept all the same, 1e-4 apart from the lowest score up in a random order.
    lowest = min(score for _, score in pieces)
    random_below = lowest + 1e-4 * sum(len(piece) == 1 for piece, _ in pieces)
    pieces = [(piece, lowest if len(piece) == 1 and score < random_below else score) for piece, score in pieces]
    return sorted(pieces, key=lambda entry: (-entry[1], entry[0]))


def _few_characters(texts: Iterable[str], *, most: int) -> Iterator[str]:
    """The texts; a sentence at their end if they have more than `most` characters, each of which takes a piece."""
    characters = {"▁"}  # the space
    for text in texts:
        characters.update(text)
        yield text
    characters.discard(" ")
    if len(characters) > most:
        least = len(characters) + len(UNIGRAM_RESERVED)
        raise ValueError(
            f"The captions have {len(characters)} characters, and a unigram vocabulary has an id for each: "
            f"vocab_size of {least} or more; got {most + len(UNIGRAM_RESERVED)}."
        )


def clip_tokenizer(*, max_length: int = 76) -> Tokenizer:
    """CLIP's vocabulary of 49,408 ids; ids, begin 49406, end 49407 and padding 0 are those of open_clip's tokenizer.

    76 tokens are what open_clip's CoCa takes (77: its CLIP). The merges are read from the installed open_clip_torch,
    which is not imported. A mark spelled in a caption becomes the mark, as there.

    Raises:
        ValueError: the extra open-clip is not installed.
    """
    merges = _clip_merges()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # by code point, which is CLIP's order
    tokens = [*alphabet, *(letter + WORD_END for letter in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    assert len(vocabulary) == len(tokens) == 49_406
    backend = Backend(models.BPE(vocabulary, merges, end_of_word_suffix=WORD_END))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(WORD_END, " ")])
    backend.add_special_tokens([CLIP_BEGIN, CLIP_END])
    _put_marks(backend, begin=CLIP_BEGIN, end=CLIP_END)
    return Tokenizer(backend, max_length=max_length)


def _clip_merges() -> list[tuple[str, str]]:
    spec = find_spec("open_clip")  # looks without importing, which would take seconds and all of torchvision
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = [file for file in (Path(folder) / CLIP_MERGES for folder in folders) if file.is_file()]
    if not files:
        raise ValueError(
            f"CLIP's vocabulary is read from the file {CLIP_MERGES} of open_clip_torch, which is not here: "
            "pip install 'coca_video[open-clip]'."
        )
    with gzip.open(files[0], mode="rt", encoding="utf-8", newline="\n") as file:
        lines = file.read().split("\n")[1 : CLIP_NUM_MERGES + 1]  # the first line tells the version
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    assert len(merges) == CLIP_NUM_MERGES
    return merges


def _clip_words() -> Callable[[str], list[str]]:
    """The function from a caption to its words as open_clip finds them: cleaned, lower-cased, parted by CLIP's pattern.

    The pattern is matched by regex and not in the backend: there, letters and digits are those of an older Unicode, and
    17,481 code points part words differently.
    """
    try:
        import ftfy
        import regex  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError(
            f"CLIP's vocabulary cleans captions with ftfy and regex, and {error.name} is not here: "
            "pip install 'coca_video[open-clip]'."
        ) from error
    contractions = "'s|'t|'re|'ve|'m|'ll|'d"
    word = regex.compile(
        rf"{CLIP_BEGIN}|{CLIP_END}|{contractions}|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE
    )

    def words(text: str) -> list[str]:
        # ftfy changes nothing in printable ASCII without entities, and would take 12 of 17 us a caption
        if not (text.isascii() and text.isprintable() and "&" not in text):
            text = html.unescape(html.unescape(ftfy.fix_text(text)))
        found: list[str] = word.findall(" ".join(text.split()).lower())
        return found

    return words
