"""What greedy decoding, sampling and beam search share: the decoder with its caches, the constraints, the result."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from coca_video.models.attention import KeyValueCache, keep_rows
from coca_video.models.coca import CoCa

MAX_RUNNING_SHARE = 0.75  # finished samples leave the batch when no more than this share still runs


class Generated(NamedTuple):
    """Generated texts, without BEGIN and prompt, one a row.

    `mask` is True for real tokens, END included; what stands behind them is END too. `log_probability` is the sum over
    the real tokens of their log probability under the model, whatever was done to its scores to choose them. `ended`
    is False where `max_length` came before END.
    """

    tokens: Int64[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"]
    log_probability: Float[Tensor, "batch"]
    ended: Bool[Tensor, "batch"]


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What holds for every text, however it is chosen. Lengths count generated tokens, END included."""

    end_id: int
    min_length: int
    max_length: int
    repetition_penalty: float

    def forbids_end(self, length: int) -> bool:
        """Whether a text of `length` tokens would be too short if END were its last."""
        return length < self.min_length


class CachedDecoder:
    """The text decoder, fed a few tokens at a time: it keeps keys and values of all tokens and of the image.

    A sample has `num_beams` running texts. They are queries of ONE cache: every step appends a key a beam and moves
    none, and `visible` says which keys are a beam's own past. So beams copy neither their pasts nor the image's keys.

    Prompts of different lengths stand padded on the right. They are read in one causal pass, the first prediction is
    that of each one's last real token, padding stays invisible, and a sample's new tokens take the positions that
    follow its own prompt: exactly what the sample alone would have.

    Args:
        image_tokens: of `model.encode_image`, or of `model.pool` over the tokens of several frames.
        prompt: BEGIN and what follows it, padded on the right; `prompt_mask` is True for real tokens.
        max_steps: how often `feed` will be called at most.
    """

    def __init__(
        self,
        model: CoCa,
        *,
        image_tokens: Float[Tensor, "batch image_tokens dim"],
        prompt: Int64[Tensor, "batch prompt"],
        prompt_mask: Bool[Tensor, "batch prompt"],
        num_beams: int,
        max_steps: int,
    ) -> None:
        self._model = model
        self._images = model.multimodal.project_image(image_tokens)
        max_keys = prompt.shape[1] + num_beams * max_steps
        self._unimodal = [KeyValueCache(max_keys=max_keys) for _ in model.unimodal.layers]
        self._multimodal = [KeyValueCache(max_keys=max_keys) for _ in model.multimodal.layers]
        self._prompt, self._prompt_mask = prompt, prompt_mask
        self._next_position = prompt_mask.sum(dim=1, keepdim=True)
        # One text a sample and no padding: all is visible, and a mask would only cost time.
        self._masked = num_beams > 1 or not bool(prompt_mask.all())
        self._visible = prompt_mask.new_zeros(len(prompt), num_beams, max_keys)
        self._visible[:, :, : prompt.shape[1]] = prompt_mask.unsqueeze(1)

    def feed_prompt(self) -> Float[Tensor, "batch vocabulary"]:
        """Reads the prompts; returns the logits of the first token after each."""
        length = self._prompt.shape[1]
        positions = torch.arange(length, device=self._prompt.device).expand_as(self._prompt)
        causal = positions.unsqueeze(2) >= positions.unsqueeze(1)
        hidden = self._hidden(self._prompt, positions=positions, mask=causal & self._prompt_mask.unsqueeze(1))
        last = (self._next_position - 1).unsqueeze(2).expand(-1, -1, hidden.shape[2])
        return self._logits(hidden.gather(1, last)).squeeze(1)

    def feed(
        self, tokens: Int64[Tensor, "batch beams"], *, parents: Int64[Tensor, "batch beams"] | None = None
    ) -> Float[Tensor, "batch beams vocabulary"]:
        """Appends a token to every text; returns the logits of the next.

        `parents` says which beam of the step before each beam goes on from; None: each from itself.
        """
        visible = None
        if self._masked:
            if parents is not None:
                self._visible = self._visible.gather(1, parents.unsqueeze(2).expand_as(self._visible))
            start, num_beams = self._unimodal[0].length, tokens.shape[1]
            itself = torch.eye(num_beams, dtype=torch.bool, device=tokens.device)
            self._visible[:, :, start : start + num_beams] = itself
            visible = self._visible[:, :, : start + num_beams]
        hidden = self._hidden(tokens, positions=self._next_position.expand_as(tokens), mask=visible)
        self._next_position = self._next_position + 1
        return self._logits(hidden)

    def keep(self, rows: Int64[Tensor, "kept"]) -> None:
        """Makes `rows` the whole batch, in this order."""
        self._images = [(keep_rows(key, rows=rows), keep_rows(value, rows=rows)) for key, value in self._images]
        for cache in (*self._unimodal, *self._multimodal):
            cache.keep(rows)
        self._visible, self._next_position = self._visible[rows], self._next_position[rows]

    def _hidden(
        self,
        tokens: Int64[Tensor, "batch new"],
        *,
        positions: Int64[Tensor, "batch new"],
        mask: Bool[Tensor, "batch new keys"] | None,
    ) -> Float[Tensor, "batch new dim"]:
        features = self._model.unimodal.step(tokens, positions=positions, caches=self._unimodal, mask=mask)
        return self._model.multimodal.step(features, images=self._images, caches=self._multimodal, mask=mask)

    def _logits(self, hidden: Float[Tensor, "batch new dim"]) -> Float[Tensor, "batch new vocabulary"]:
        """In fp32 at least: sums of log probabilities decide."""
        logits = self._model.vocabulary.logits(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def rows_to_keep(running: Bool[Tensor, "rows"]) -> Int64[Tensor, "kept"]:
    """The running rows, in an order that moves few: the holes that others leave are filled from the end.

    Where the whole caches were copied, dropping 4 of 16 samples took longer than a step.
    """
    kept = running.nonzero().squeeze(1)
    rows = torch.arange(len(kept), device=running.device)
    rows[~running[: len(kept)]] = kept[kept >= len(kept)]
    return rows


def penalize_repetition(
    scores: Float[Tensor, "*rows vocabulary"], *, seen: Int[Tensor, "*rows tokens"], penalty: float
) -> Float[Tensor, "*rows vocabulary"]:
    """Divides positive scores of tokens in `seen` by `penalty` and multiplies negative ones, each once.

    The rule of CTRL (arXiv 1909.05858, section 4.1) with Hugging Face's treatment of signs.
    """
    found = scores.gather(-1, seen)
    return scores.scatter(-1, seen, torch.where(found < 0, found * penalty, found / penalty))
