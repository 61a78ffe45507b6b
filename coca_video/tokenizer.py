"""Captions to token ids and back: byte-level BPE in a `tokenizer.json`, with begin and end marks."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

PADDING, BEGIN, END = "<pad>", "<bos>", "<eos>"


class Tokenizer:
    """Encodes captions as BEGIN, tokens, END, cut to `max_length`; padding is told by the mask, never by its id."""

    def __init__(self, backend: Backend, *, max_length: int) -> None:
        if max_length < 3:
            raise ValueError(
                f"A caption needs room for begin, one token and end: max_length of 3 or more; got {max_length}."
            )
        self.backend = backend
        self.max_length = max_length
        self.padding_id, self.begin_id, self.end_id = (self._special_id(name) for name in (PADDING, BEGIN, END))
        self.backend.encode_special_tokens = True  # a caption that spells out a mark is plain text
        self.backend.enable_truncation(max_length)
        self.backend.enable_padding(pad_id=self.padding_id, pad_token=PADDING)

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
        encodings = self.backend.encode_batch(list(captions))
        ids = torch.tensor([encoding.ids for encoding in encodings], dtype=torch.int64)
        mask = torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.bool)
        return ids, mask

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` up to the first END; special tokens leave no trace."""
        before_end: list[int] = []
        for token_id in ids:
            if token_id == self.end_id:
                break
            before_end.append(int(token_id))
        text: str = self.backend.decode(before_end, skip_special_tokens=True)
        return text.strip()

    def save(self, path: Path) -> None:
        """Writes `tokenizer.json`; its truncation length is `max_length`."""
        self.backend.save(str(path))

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Reads what `save` wrote."""
        if not path.is_file():
            raise ValueError(f"Expected a tokenizer file at {path}; there is none.")
        backend = Backend.from_file(str(path))
        if backend.truncation is None:
            raise ValueError(
                f"Expected {path} to state its truncation length, as a saved tokenizer of this package does."
            )
        return cls(backend, max_length=backend.truncation["max_length"])


def train_tokenizer(captions: Iterable[str], *, vocab_size: int, max_length: int) -> Tokenizer:
    """A lower-casing byte-level BPE of at most `vocab_size` ids (fewer where the captions give no more merges)."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 3:
        raise ValueError(
            f"A byte-level vocabulary has 256 bytes and 3 special tokens: vocab_size of 259 or more; got {vocab_size}."
        )
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PADDING, BEGIN, END],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer=trainer)
    begin_id, end_id = backend.token_to_id(BEGIN), backend.token_to_id(END)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, begin_id), (END, end_id)]
    )
    return Tokenizer(backend, max_length=max_length)
