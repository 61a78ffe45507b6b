"""Captions from a CoCa: greedy, sampled or by beam search, with the image encoded once and all keys and values kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from coca_video.models.beam import beam_search
from coca_video.models.coca import CoCa
from coca_video.models.decoding import (
    MAX_RUNNING_SHARE,
    CachedDecoder,
    Constraints,
    Generated,
    penalize_repetition,
    rows_to_keep,
)

NUM_BEAMS = 6  # open_clip's default


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How tokens are chosen. Lengths count generated tokens: neither BEGIN nor a prompt, but END.

    ValueError for values outside their bounds, and for an option that has no effect with the method.
    """

    method: Literal["greedy", "sample", "beam"] = "greedy"
    """The most probable token at every step; a random one; or the best text that a beam search finds."""
    max_length: int = 30
    """A text ends here without END; with the prompt it must fit the model's `text.max_length`."""
    min_length: int = 1
    """END is forbidden where it would end a shorter text (Hugging Face's min_new_tokens, which leaves END out, + 1)."""
    repetition_penalty: float = 1.0
    """Scores of tokens that are there already, BEGIN and prompt included: positive ones are divided by it, negative
    ones multiplied. Scores are logits; log probabilities in a beam search."""
    temperature: float = 1.0
    """Of sample: logits are divided by it."""
    top_k: int | None = None
    """Of sample: only the most probable k."""
    top_p: float | None = None
    """Of sample: only the most probable tokens up to this mass, the one that crosses it included; after top_k."""
    seed: int = 0
    """Of sample."""
    num_beams: int | None = None
    """Of beam: running texts a sample; 6 when not given."""
    length_penalty: float = 1.0
    """Of beam: a text's score is its sum of log probabilities / length ** length_penalty; above 0 favours long ones."""

    def __post_init__(self) -> None:
        _check_bounds(self)
        owners = {
            "sample": {"temperature": 1.0, "top_k": None, "top_p": None, "seed": 0},
            "beam": {"num_beams": None, "length_penalty": 1.0},
        }
        for method, options in owners.items():
            for name, neutral in options.items():
                if method != self.method and getattr(self, name) != neutral:
                    raise ValueError(
                        f"{name} {getattr(self, name)} has no effect with method {self.method!r}; leave it out, "
                        f"or take method {method!r}."
                    )


def _check_bounds(config: GenerateConfig) -> None:
    bounds = (
        ("min_length", config.min_length >= 1, "at least 1 (END)"),
        ("max_length", config.min_length <= config.max_length, f"at least min_length ({config.min_length})"),
        ("repetition_penalty", 0 < config.repetition_penalty < float("inf"), "a positive number"),
        ("temperature", 0 < config.temperature < float("inf"), "a positive number"),
        ("top_k", config.top_k is None or config.top_k >= 1, "at least 1"),
        ("top_p", config.top_p is None or 0 < config.top_p <= 1, "above 0 and at most 1"),
        ("seed", config.seed >= 0, "0 or more"),
        ("num_beams", config.num_beams is None or config.num_beams >= 1, "at least 1"),
        ("length_penalty", abs(config.length_penalty) < float("inf"), "a finite number"),
    )
    for name, within, expected in bounds:
        if not within:
            raise ValueError(f"{name} must be {expected}; got {getattr(config, name)}.")


def generate(
    model: CoCa,
    images: Float[Tensor, "batch 3 height width"],
    *,
    config: GenerateConfig,
    begin_id: int,
    end_id: int,
    prompt: Int64[Tensor, "batch prompt"] | None = None,
    prompt_mask: Bool[Tensor, "batch prompt"] | None = None,
    keys: Sequence[int] | None = None,
) -> Generated:
    """Captions of normalised images, one each; precision is that of an autocast around it. See `generate_from_tokens`.

    A clip's frames go through the encoder one by one, and their tokens together through
    `generate_from_tokens(model, model.pool(tokens)[1], ...)`.
    """
    with torch.no_grad():
        _, image_tokens = model.encode_image(images)
    return generate_from_tokens(
        model,
        image_tokens,
        config=config,
        begin_id=begin_id,
        end_id=end_id,
        prompt=prompt,
        prompt_mask=prompt_mask,
        keys=keys,
    )


@torch.no_grad()
def generate_from_tokens(
    model: CoCa,
    image_tokens: Float[Tensor, "batch image_tokens dim"],
    *,
    config: GenerateConfig,
    begin_id: int,
    end_id: int,
    prompt: Int64[Tensor, "batch prompt"] | None = None,
    prompt_mask: Bool[Tensor, "batch prompt"] | None = None,
    keys: Sequence[int] | None = None,
) -> Generated:
    """Captions from the image tokens that the decoder attends to.

    Args:
        prompt: tokens between BEGIN and what is generated, each row its own, padded on the right; `prompt_mask` is True
            for real ones (all, when not given). A row's result does not depend on the others' lengths.
        keys: of sample: a number of 0 or more for each row. Its random numbers are a pure function of
            (config.seed, key), so that the rows of any batch can be drawn again alone. The row's index when not given.

    Raises:
        ValueError: prompt and max_length do not fit the model, the mask is not right-padded, an option without effect,
            or the model's scores are not finite.
    """
    batch, device = len(image_tokens), image_tokens.device
    if keys is not None and (config.method != "sample" or len(keys) != batch):
        raise ValueError(f"keys are for method 'sample', one a row; got {len(keys)} for {batch} and {config.method!r}.")
    prompt, prompt_mask = _with_begin(prompt, mask=prompt_mask, begin_id=begin_id, batch=batch, device=device)
    _check_room(model, prompt_length=prompt.shape[1], max_length=config.max_length)
    constraints = Constraints(
        end_id=end_id,
        min_length=config.min_length,
        max_length=config.max_length,
        repetition_penalty=config.repetition_penalty,
    )
    num_beams = (NUM_BEAMS if config.num_beams is None else config.num_beams) if config.method == "beam" else 1
    decoder = CachedDecoder(
        model,
        image_tokens=image_tokens,
        prompt=prompt,
        prompt_mask=prompt_mask,
        num_beams=num_beams,
        max_steps=config.max_length - 1,
    )
    seen = prompt.where(prompt_mask, begin_id)  # padding is no token that could be repeated
    if config.method == "beam":
        result = beam_search(
            decoder, prompt=seen, constraints=constraints, num_beams=num_beams, length_penalty=config.length_penalty
        )
    else:
        choose: Callable[[Tensor, Tensor, int], Tensor] = _most_probable
        if config.method == "sample":
            choose = _Sampler(config, keys=range(batch) if keys is None else keys, device=device)
        result = _extend(decoder, prompt=seen, constraints=constraints, choose=choose)
    if not result.log_probability.isfinite().all():
        raise ValueError("Some scores of the model are not finite, so its weights or the images are broken.")
    return result


def _with_begin(
    prompt: Int64[Tensor, "batch prompt"] | None,
    *,
    mask: Bool[Tensor, "batch prompt"] | None,
    begin_id: int,
    batch: int,
    device: torch.device,
) -> tuple[Int64[Tensor, "batch begin_and_prompt"], Bool[Tensor, "batch begin_and_prompt"]]:
    begin = torch.full((batch, 1), begin_id, device=device)
    if prompt is None:
        if mask is not None:
            raise ValueError("A prompt_mask has no effect without a prompt.")
        return begin, torch.ones_like(begin, dtype=torch.bool)
    mask = torch.ones_like(prompt, dtype=torch.bool) if mask is None else mask
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError("Expected prompts padded on the right; some real token stands behind padding.")
    return torch.cat([begin, prompt], dim=1), torch.cat([torch.ones_like(begin, dtype=torch.bool), mask], dim=1)


def _check_room(model: CoCa, *, prompt_length: int, max_length: int) -> None:
    room = model.config.text.max_length - prompt_length
    if max_length > room:
        raise ValueError(
            f"BEGIN and prompt ({prompt_length}) with max_length {max_length} must fit the text decoder's "
            f"{model.config.text.max_length} tokens; take a max_length of at most {room}."
        )


def _extend(
    decoder: CachedDecoder,
    *,
    prompt: Int64[Tensor, "batch prompt"],
    constraints: Constraints,
    choose: Callable[[Tensor, Tensor, int], Tensor],
) -> Generated:
    """One text a sample, a token a step. `choose(scores, rows, step)` names each row's next token.

    `rows` are the samples still in the batch; finished ones leave it in groups, and are fed END until then.
    """
    batch, device, end_id = len(prompt), prompt.device, constraints.end_id
    rows, running = torch.arange(batch, device=device), torch.ones(batch, dtype=torch.bool, device=device)
    tokens = torch.full((batch, constraints.max_length), end_id, device=device)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    logits = decoder.feed_prompt()
    log_probability = logits.new_zeros(batch)
    for step in range(constraints.max_length):
        seen = torch.cat([prompt[rows], tokens[rows, :step]], dim=1)
        scores = _constrain(logits, seen=seen, constraints=constraints, length=step + 1)
        chosen = choose(scores, rows, step).where(running, end_id)
        chosen_logit = logits.gather(1, chosen.unsqueeze(1)).squeeze(1)
        log_probability[rows] += (chosen_logit - logits.logsumexp(dim=1)).where(running, 0.0)
        tokens[rows, step], mask[rows, step] = chosen, running
        running = running & (chosen != end_id)
        num_running = int(running.sum())
        if num_running == 0 or step + 1 == constraints.max_length:
            break
        if num_running <= MAX_RUNNING_SHARE * len(rows):
            kept = rows_to_keep(running)
            rows, chosen, running = rows[kept], chosen[kept], running[kept]
            decoder.keep(kept)
        logits = decoder.feed(chosen.unsqueeze(1)).squeeze(1)
    ended = (mask & (tokens == end_id)).any(dim=1)
    return Generated(
        tokens=tokens[:, : step + 1], mask=mask[:, : step + 1], log_probability=log_probability, ended=ended
    )


def _constrain(
    logits: Float[Tensor, "rows vocabulary"],
    *,
    seen: Int64[Tensor, "rows seen"],
    constraints: Constraints,
    length: int,
) -> Float[Tensor, "rows vocabulary"]:
    """Scores of the token that makes a text `length` long; `logits` stay as they are."""
    scores = logits
    if constraints.repetition_penalty != 1.0:
        scores = penalize_repetition(scores, seen=seen, penalty=constraints.repetition_penalty)
    if constraints.forbids_end(length):
        scores = scores.index_fill(1, torch.tensor([constraints.end_id], device=scores.device), float("-inf"))
    return scores


def _most_probable(
    scores: Float[Tensor, "rows vocabulary"], rows: Int64[Tensor, "rows"], step: int
) -> Int64[Tensor, "rows"]:
    return scores.argmax(dim=1)


class _Sampler:
    """Draws tokens by temperature, top_k and top_p, from random numbers that are drawn beforehand for each row."""

    def __init__(self, config: GenerateConfig, *, keys: Sequence[int], device: torch.device) -> None:
        self._config = config
        draws = [np.random.default_rng([config.seed, key]).random(config.max_length, dtype=np.float32) for key in keys]
        self._uniform = torch.from_numpy(np.stack(draws)).to(device)

    def __call__(
        self, scores: Float[Tensor, "rows vocabulary"], rows: Int64[Tensor, "rows"], step: int
    ) -> Int64[Tensor, "rows"]:
        """By inverting the distribution function of the tokens kept, most probable first."""
        config = self._config
        num_kept = scores.shape[1] if config.top_k is None else min(config.top_k, scores.shape[1])
        values, tokens = (scores / config.temperature).topk(num_kept, dim=1)
        probabilities = values.softmax(dim=1)
        if config.top_p is not None:
            mass_before = probabilities.cumsum(dim=1) - probabilities
            probabilities = probabilities.masked_fill(mass_before >= config.top_p, 0.0)
        cumulative = probabilities.cumsum(dim=1)
        drawn = self._uniform[rows, step].to(cumulative.dtype).unsqueeze(1) * cumulative[:, -1:]
        place = torch.searchsorted(cumulative, drawn, right=True)
        last = (probabilities > 0).sum(dim=1, keepdim=True) - 1  # where rounding brought the draw to the very end
        return tokens.gather(1, place.minimum(last).clamp(min=0)).squeeze(1)
