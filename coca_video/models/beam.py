"""Beam search: the text of the highest score among those that a fixed number of running texts can reach."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from coca_video.models.decoding import (
    MAX_RUNNING_SHARE,
    CachedDecoder,
    Constraints,
    Generated,
    penalize_repetition,
    rows_to_keep,
)


def beam_search(
    decoder: CachedDecoder,
    *,
    prompt: Int64[Tensor, "batch prompt"],
    constraints: Constraints,
    num_beams: int,
    length_penalty: float,
) -> Generated:
    """The best text of each sample, by sum of log probabilities / length ** `length_penalty`, END counted in length.

    As in Hugging Face's search: a step looks at the 2 * num_beams best continuations, END finishes a text if it is
    among the first num_beams of them, the best num_beams others run on, and those that run at `max_length` count as
    they are. The repetition penalty acts on log probabilities. Of the finished texts the best is kept. A sample stops
    when no running text can beat it, by an exact bound (`early_stopping="never"` there; the default guesses).

    Args:
        prompt: the tokens that count as repeated from the start.
    """
    logits = decoder.feed_prompt().unsqueeze(1)
    search = _Search(
        prompt, constraints=constraints, num_beams=num_beams, length_penalty=length_penalty, dtype=logits.dtype
    )
    for length in range(1, constraints.max_length + 1):
        search.extend(logits, length=length)
        if length == constraints.max_length:
            search.finish_running()
            break
        active = search.can_improve(length)
        num_active = int(active.sum())
        if num_active == 0:
            break
        if num_active <= MAX_RUNNING_SHARE * len(active):
            rows = rows_to_keep(active)
            search.keep(rows)
            decoder.keep(rows)
        logits = decoder.feed(search.tokens[:, :, length - 1], parents=search.parents)
    return search.result()


class _Search:
    """Running texts of the samples `rows` that are still searched, and the best finished text of every sample.

    score: what chooses, the sum of processed log probabilities. log_probability: the same sum under the model.
    tokens [rows, beams, max_length], filled so far. parents [rows, beams]: from which beam of the step before.
    """

    def __init__(
        self,
        prompt: Int64[Tensor, "batch prompt"],
        *,
        constraints: Constraints,
        num_beams: int,
        length_penalty: float,
        dtype: torch.dtype,
    ) -> None:
        batch, device, max_length = len(prompt), prompt.device, constraints.max_length
        self.constraints, self.num_beams, self.length_penalty = constraints, num_beams, length_penalty
        self.prompt = prompt
        self.rows = torch.arange(batch, device=device)
        self.score = torch.zeros(batch, 1, dtype=dtype, device=device)
        self.log_probability = self.score
        self.tokens = torch.full((batch, 1, max_length), constraints.end_id, device=device)
        self.parents = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.best_score = torch.full((batch,), float("-inf"), dtype=dtype, device=device)
        self.best_log_probability = self.best_score.clone()
        self.best_tokens = self.tokens[:, 0].clone()
        self.best_length = torch.zeros(batch, dtype=torch.int64, device=device)
        self.best_ended = torch.zeros(batch, dtype=torch.bool, device=device)

    def extend(self, logits: Float[Tensor, "rows beams vocabulary"], *, length: int) -> None:
        """One step: offers the texts that END finishes, and lets the best others run on with `length` tokens."""
        score, log_probability, parent, token = self._candidates(logits, length=length)
        ends = token == self.constraints.end_id
        finished, which = score.masked_fill(~ends, float("-inf"))[:, : self.num_beams].max(dim=1, keepdim=True)
        self._offer(
            finished.squeeze(1) / length**self.length_penalty,
            log_probability=log_probability.gather(1, which).squeeze(1),
            tokens=_beams(self.tokens, parent.gather(1, which)).squeeze(1),  # END fills the rest already
            length=length,
            ended=True,
        )
        self.score, which = score.masked_fill(ends, float("-inf")).topk(self.num_beams, dim=1)
        self.log_probability = log_probability.gather(1, which)
        self.parents = parent.gather(1, which)
        self.tokens = _beams(self.tokens, self.parents)
        self.tokens[:, :, length - 1] = token.gather(1, which)

    def _candidates(
        self, logits: Float[Tensor, "rows beams vocabulary"], *, length: int
    ) -> tuple[
        Float[Tensor, "rows candidates"],
        Float[Tensor, "rows candidates"],
        Int64[Tensor, "rows candidates"],
        Int64[Tensor, "rows candidates"],
    ]:
        """The 2 * num_beams best continuations, best first: score, log probability, parent, token.

        Where there are fewer, the rest has a score of -inf. The vocabulary is normalised by its logsumexp after the
        choice within a beam, so that no second tensor of its size is made.
        """
        norm = logits.logsumexp(dim=2, keepdim=True)
        processed, shift = logits, norm
        if self.constraints.repetition_penalty != 1.0:
            prompt = self.prompt.unsqueeze(1).expand(-1, logits.shape[1], -1)
            seen = torch.cat([prompt, self.tokens[:, :, : length - 1]], dim=2)
            penalty = self.constraints.repetition_penalty
            processed, shift = penalize_repetition(logits - norm, seen=seen, penalty=penalty), torch.zeros_like(norm)
        if self.constraints.forbids_end(length):
            processed[:, :, self.constraints.end_id] = float("-inf")
        num_candidates, vocab_size = 2 * self.num_beams, logits.shape[2]
        values, tokens = processed.topk(min(num_candidates, vocab_size), dim=2)
        scores = (self.score.unsqueeze(2) + values - shift).flatten(1)
        missing = max(0, num_candidates - scores.shape[1])
        score, index = F.pad(scores, (0, missing), value=float("-inf")).topk(num_candidates, dim=1)
        index = index.clamp(max=scores.shape[1] - 1)
        parent, token = index // values.shape[2], tokens.flatten(1).gather(1, index)
        chosen = logits.flatten(1).gather(1, parent * vocab_size + token) - norm.squeeze(2).gather(1, parent)
        return score, self.log_probability.gather(1, parent) + chosen, parent, token

    def finish_running(self) -> None:
        """Offers the running texts as they are, at the maximum length."""
        length = self.constraints.max_length
        score, which = self.score.max(dim=1, keepdim=True)
        self._offer(
            score.squeeze(1) / length**self.length_penalty,
            log_probability=self.log_probability.gather(1, which).squeeze(1),
            tokens=_beams(self.tokens, which).squeeze(1),
            length=length,
            ended=False,
        )

    def can_improve(self, length: int) -> Bool[Tensor, "rows"]:
        """Whether a running text of `length` tokens may still beat the best one: scores are sums that never rise."""
        shortest = max(length + 1, self.constraints.min_length)
        most_favourable = self.constraints.max_length if self.length_penalty > 0 else shortest
        bound = self.score.amax(dim=1) / most_favourable**self.length_penalty
        improves: Tensor = bound > self.best_score[self.rows]
        return improves

    def keep(self, rows: Int64[Tensor, "kept"]) -> None:
        """Makes `rows` all that is still searched, in this order."""
        self.rows, self.prompt = self.rows[rows], self.prompt[rows]
        self.score, self.log_probability = self.score[rows], self.log_probability[rows]
        self.tokens, self.parents = self.tokens[rows], self.parents[rows]

    def result(self) -> Generated:
        """The best text of every sample."""
        longest = int(self.best_length.max())
        mask = torch.arange(longest, device=self.best_length.device) < self.best_length.unsqueeze(1)
        return Generated(
            tokens=self.best_tokens[:, :longest],
            mask=mask,
            log_probability=self.best_log_probability,
            ended=self.best_ended,
        )

    def _offer(
        self,
        score: Float[Tensor, "rows"],
        *,
        log_probability: Float[Tensor, "rows"],
        tokens: Int64[Tensor, "rows max_length"],
        length: int,
        ended: bool,
    ) -> None:
        """Takes finished texts over where they beat the best so far."""
        better = score > self.best_score[self.rows]
        rows = self.rows[better]
        self.best_score[rows] = score[better]
        self.best_log_probability[rows] = log_probability[better]
        self.best_tokens[rows] = tokens[better]
        self.best_length[rows] = length
        self.best_ended[rows] = ended


def _beams(
    tokens: Int64[Tensor, "rows beams length"], index: Int64[Tensor, "rows chosen"]
) -> Int64[Tensor, "rows chosen length"]:
    return tokens.gather(1, index.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
