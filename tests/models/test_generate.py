"""Generation: the cache against whole passes, every way of choosing against plain loops, open_clip's greedy."""

import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from coca_video.models.attention import keep_rows
from coca_video.models.coca import CoCa, CoCaConfig
from coca_video.models.convert import config_from_open_clip, from_open_clip
from coca_video.models.decoding import CachedDecoder, Generated, penalize_repetition, rows_to_keep
from coca_video.models.generate import GenerateConfig, generate, generate_from_tokens
from coca_video.models.image import VitConfig
from coca_video.models.text import TextConfig

BEGIN, END = 1, 2
Layer = Literal["paper", "open_clip"]
Poolers = Literal["cascade", "parallel", "open_clip"]


def build(
    *, layer: Layer = "paper", poolers: Poolers = "cascade", vocab_size: int = 12, end_bias: float = 1.0, seed: int = 0
) -> CoCa:
    """A small CoCa in float64 with every parameter moved; `end_bias` scales how likely END is."""
    torch.manual_seed(seed)
    config = CoCaConfig(
        image=VitConfig(
            width=24,
            depth=1,
            num_heads=2,
            mlp_width=48,
            image_size=16,
            patch_size=8,
            class_token=poolers == "open_clip",
        ),
        text=TextConfig(
            width=24,
            num_heads=2,
            mlp_width=48,
            num_unimodal_layers=2,
            num_multimodal_layers=2,
            vocab_size=vocab_size,
            max_length=16,
            multimodal_layer=layer,
            cls_mask="open_clip" if poolers == "open_clip" else "correct",
        ),
        num_queries=5,
        poolers=poolers,
    )
    model = CoCa(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        model.vocabulary.weight[END] *= end_bias
    return model


def pictures(batch: int, *, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 16, 16, dtype=torch.float64, generator=generator)


def next_logits(model: CoCa, image: Tensor, *, tokens: list[int]) -> Tensor:
    """Logits of the token after `tokens` (BEGIN first) for one image, by a whole pass without a cache."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        return model.logits(image.unsqueeze(0), tokens=ids, mask=torch.ones_like(ids, dtype=torch.bool))[0, -1]


def texts(generated: Generated) -> list[list[int]]:
    return [row[keep].tolist() for row, keep in zip(generated.tokens, generated.mask, strict=True)]


def run(model: CoCa, images: Tensor, **options: Any) -> Generated:
    """`generate` with the options of the config by name; prompt, prompt_mask and keys go to `generate`."""
    arguments = {name: options.pop(name) for name in ("prompt", "prompt_mask", "keys") if name in options}
    return generate(model, images, config=GenerateConfig(**options), begin_id=BEGIN, end_id=END, **arguments)


# --- the cache


@pytest.mark.parametrize("layer", ["paper", "open_clip"])
@pytest.mark.parametrize("poolers", ["cascade", "parallel", "open_clip"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_cached_equals_uncached(layer: Layer, poolers: Poolers, dtype: torch.dtype, tolerance: float) -> None:
    """At every step, with prompts of 1 to 4 tokens padded to 4, against whole passes over each row alone."""
    model = build(layer=layer, poolers=poolers).to(dtype)
    images = pictures(4).to(dtype)
    prompt = torch.randint(3, 12, (4, 4), generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([4, 1, 3, 2])
    mask = torch.arange(4) < lengths[:, None]
    fed = torch.randint(0, 12, (4, 6), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        image_tokens = model.encode_image(images)[1]
        decoder = CachedDecoder(
            model, image_tokens=image_tokens, prompt=prompt, prompt_mask=mask, num_beams=1, max_steps=6
        )
        steps = [decoder.feed_prompt(), *(decoder.feed(fed[:, step : step + 1]).squeeze(1) for step in range(6))]
    for step, logits in enumerate(steps):
        for row in range(4):
            tokens = prompt[row, : lengths[row]].tolist() + fed[row, :step].tolist()
            expected = next_logits(model, images[row], tokens=tokens)
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_beams_share_one_cache() -> None:
    """Three texts of each image that fork, die out and swap places, then a smaller batch: each as a text of its own."""
    model, images = build(), pictures(3)
    with torch.no_grad():
        decoder = CachedDecoder(
            model,
            image_tokens=model.encode_image(images)[1],
            prompt=torch.full((3, 1), BEGIN),
            prompt_mask=torch.ones(3, 1, dtype=torch.bool),
            num_beams=3,
            max_steps=6,
        )
        decoder.feed_prompt()
        generator = torch.Generator().manual_seed(4)
        rows, past = [0, 1, 2], [[[BEGIN]] * 3 for _ in range(3)]
        for step in range(6):
            if step == 3:
                rows, past = [2, 0], [past[2], past[0]]
                decoder.keep(torch.tensor(rows))
            tokens = torch.randint(0, 12, (len(rows), 3), generator=generator)
            parents = torch.randint(0, 3, (len(rows), 3), generator=generator)
            past = [
                [past[row][parents[row, beam]] + [int(tokens[row, beam])] for beam in range(3)]
                for row in range(len(rows))
            ]
            logits = decoder.feed(tokens, parents=parents)
            for row, beam in itertools.product(range(len(rows)), range(3)):
                expected = next_logits(model, images[rows[row]], tokens=past[row][beam])
                torch.testing.assert_close(logits[row, beam], expected, rtol=0, atol=1e-10)


def test_image_is_encoded_once_and_its_keys_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(end_bias=0.0)
    calls = {"encoder": 0, "cross": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    model.encoder.register_forward_hook(count("encoder"))
    for layer in model.multimodal.layers:
        layer.cross_attention.k_proj.register_forward_hook(count("cross"))
    assert run(model, pictures(2), method="beam", num_beams=3, max_length=6).tokens.shape[1] > 3
    assert calls == {"encoder": 1, "cross": 2}  # of two layers


# --- greedy


def plain_greedy(
    model: CoCa,
    image: Tensor,
    *,
    max_length: int,
    min_length: int = 1,
    penalty: float = 1.0,
    prompt: tuple[int, ...] = (),
) -> tuple[list[int], float]:
    """Argmax after argmax over whole passes; (generated tokens, their log probability)."""
    tokens, total = [BEGIN, *prompt], 0.0
    for length in range(1, max_length + 1):
        logits = next_logits(model, image, tokens=tokens)
        scores = logits.tolist()
        for token in set(tokens):
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        if length < min_length:
            scores[END] = -math.inf
        best = max(range(len(scores)), key=lambda token: scores[token])
        total += float(logits.log_softmax(dim=0)[best])
        tokens.append(best)
        if best == END:
            break
    return tokens[1 + len(prompt) :], total


@pytest.mark.parametrize("layer", ["paper", "open_clip"])
@pytest.mark.parametrize(
    "options", [{}, {"min_length": 5}, {"penalty": 1.7}, {"penalty": 0.6, "min_length": 3}], ids=str
)
def test_greedy_equals_an_uncached_loop(layer: Layer, options: dict[str, Any]) -> None:
    model = build(layer="paper", end_bias=1.6) if layer == "paper" else build(layer=layer, end_bias=1.3, seed=1)
    images = pictures(24)
    renamed = {("repetition_penalty" if name == "penalty" else name): value for name, value in options.items()}
    generated = run(model, images, max_length=9, **renamed)
    expected = [plain_greedy(model, image, max_length=9, **options) for image in images]
    assert texts(generated) == [tokens for tokens, _ in expected]
    if not options:
        assert len({len(tokens) for tokens, _ in expected}) >= 2  # some end early, and not together
    torch.testing.assert_close(
        generated.log_probability, torch.tensor([total for _, total in expected], dtype=torch.float64)
    )
    assert generated.ended.tolist() == [tokens[-1] == END for tokens, _ in expected]
    assert (generated.tokens[~generated.mask] == END).all()


def test_each_row_has_a_prompt_of_its_own() -> None:
    """Lengths 0, 1, 2 and 3 in one batch equal the plain loop on each alone, for greedy and for beams."""
    model, images = build(end_bias=1.6), pictures(4)
    prompt = torch.tensor([[9, 9, 9], [5, 9, 9], [7, 4, 9], [3, 3, 8]])
    mask = torch.arange(3) < torch.tensor([0, 1, 2, 3])[:, None]
    own = [tuple(row[keep].tolist()) for row, keep in zip(prompt, mask, strict=True)]
    found = run(model, images, max_length=6, repetition_penalty=1.5, prompt=prompt, prompt_mask=mask)
    expected = [
        plain_greedy(model, i, max_length=6, penalty=1.5, prompt=p)[0] for i, p in zip(images, own, strict=True)
    ]
    assert texts(found) == expected
    assert expected != [plain_greedy(model, image, max_length=6, penalty=1.5)[0] for image in images]
    beams = run(model, images, method="beam", num_beams=3, max_length=6, prompt=prompt, prompt_mask=mask)
    alone = [
        run(model, images[i : i + 1], method="beam", num_beams=3, max_length=6, prompt=torch.tensor([own[i]]))
        for i in range(1, 4)
    ]
    assert texts(beams)[1:] == [texts(one)[0] for one in alone]


def test_tokens_of_several_frames_serve_too() -> None:
    """A clip's tokens pooled together; and the caption depends on the image."""
    model, frames = build(end_bias=1.3), pictures(6)
    with torch.no_grad():
        tokens = model.encoder(frames).reshape(2, -1, 24)
        image_tokens = model.pool(tokens)[1]
    options: Any = {"config": GenerateConfig(max_length=8), "begin_id": BEGIN, "end_id": END}
    clips = generate_from_tokens(model, image_tokens, **options)
    assert texts(clips)[0] == texts(generate_from_tokens(model, image_tokens[:1], **options))[0]
    assert len({tuple(text) for text in texts(run(model, pictures(24), max_length=8))}) > 3


def test_bf16_autocast_follows_fp32() -> None:
    """The same texts but for near ties; log probabilities of the same texts within bf16's rounding (2**-8 a logit)."""
    model, images = build(end_bias=1.3).float(), pictures(8).float()
    exact = run(model, images, max_length=6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = run(model, images, max_length=6)
        assert run(model, images, method="beam", num_beams=3, max_length=6).log_probability.dtype == torch.float32
    same = [a == b for a, b in zip(texts(exact), texts(rounded), strict=True)]
    assert sum(same) >= 6
    difference = (exact.log_probability - rounded.log_probability)[torch.tensor(same)].abs()
    assert 0 < float(difference.max()) < 0.3


@pytest.mark.parametrize("options", [{}, {"method": "beam", "num_beams": 3, "length_penalty": -1.0}], ids=str)
def test_finished_samples_leave_the_batch(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a quarter of the rows is done, and none is fed when the last one is."""
    model, images = build(end_bias=1.6), pictures(24)
    rows: list[int] = []
    feed = CachedDecoder.feed

    def counted(decoder: CachedDecoder, tokens: Tensor, **options: Any) -> Tensor:
        rows.append(len(tokens))
        return feed(decoder, tokens, **options)

    monkeypatch.setattr(CachedDecoder, "feed", counted)
    found = run(model, images, max_length=9, **options)
    running = [int((found.mask.sum(dim=1) > step).sum()) for step in range(1, 9)]
    if not options:
        assert all(0.75 * fed < alive <= fed for alive, fed in zip(running, rows, strict=True))
    assert rows == sorted(rows, reverse=True) and rows[-1] < 24


@pytest.mark.parametrize("running", [[1, 1, 1, 1], [0, 1, 1, 0, 1], [1, 0, 0, 0, 1, 1, 0, 1], [0, 0, 0, 1]], ids=str)
def test_rows_that_stay_do_not_move(running: list[int]) -> None:
    rows = rows_to_keep(torch.tensor(running, dtype=torch.bool)).tolist()
    alive = [row for row, runs in enumerate(running) if runs]
    assert sorted(rows) == alive
    assert [rows[row] for row in alive if row < len(alive)] == [row for row in alive if row < len(alive)]
    buffer = torch.arange(3.0 * len(running)).reshape(len(running), 3)
    for order in (rows, rows[::-1]):
        assert torch.equal(keep_rows(buffer.clone(), rows=torch.tensor(order)), buffer[order])


# --- sampling


def kept_by_hand(logits: Tensor, *, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """The distribution sampled from, by Hugging Face's rules: temperature, then top-k, then top-p."""
    scores = logits.numpy() / temperature
    order = sorted(range(len(scores)), key=lambda token: -scores[token])
    if top_k is not None:
        order = order[:top_k]
    weights = np.exp(scores[order] - scores[order].max())
    weights /= weights.sum()
    if top_p is not None:
        kept, mass = [], 0.0
        for weight in weights:
            kept.append(weight)
            mass += weight
            if mass >= top_p:
                break
        weights = np.array(kept) / sum(kept)
    distribution = np.zeros(len(scores))
    distribution[order[: len(weights)]] = weights
    return distribution


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.5, None, None), (2.0, None, None), (1.0, 3, None), (1.0, None, 0.6), (1.5, 6, 0.8)],
)
def test_sampled_frequencies(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """4,000 first tokens of one image: no token that is cut, the others within 4.5 standard deviations."""
    model, image = build(), pictures(1)
    num_draws = 4000
    with torch.no_grad():
        image_tokens = model.encode_image(image)[1].expand(num_draws, -1, -1)
    config = GenerateConfig(method="sample", max_length=1, temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = generate_from_tokens(model, image_tokens, config=config, begin_id=BEGIN, end_id=END)
    logits = next_logits(model, image[0], tokens=[BEGIN])
    expected = kept_by_hand(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    counts = np.bincount(drawn.tokens[:, 0].numpy(), minlength=12)
    assert ((counts > 0) <= (expected > 0)).all()
    deviation = np.sqrt(num_draws * expected * (1 - expected))
    assert (np.abs(counts - num_draws * expected) <= 4.5 * deviation + 1e-9).all()
    own = logits.log_softmax(dim=0)[drawn.tokens[:, 0]]
    torch.testing.assert_close(drawn.log_probability, own)  # the model's, not the sharpened one's


def test_a_row_is_drawn_by_its_key_alone() -> None:
    model, images = build(end_bias=1.3), pictures(4)
    options: dict[str, Any] = {"method": "sample", "max_length": 8, "top_p": 0.95, "seed": 3}
    together = run(model, images, **options)
    alone = [run(model, images[row : row + 1], keys=[row], **options) for row in range(4)]
    assert texts(together) == [texts(one)[0] for one in alone]
    torch.testing.assert_close(together.log_probability, torch.cat([one.log_probability for one in alone]))
    assert texts(run(model, images, keys=[3, 2, 1, 0], **options)) != texts(together)
    assert texts(run(model, images, **{**options, "seed": 4})) != texts(together)
    same = run(model, images[:1].expand(3, -1, -1, -1), keys=[5, 5, 6], **options)
    assert texts(same)[0] == texts(same)[1] != texts(same)[2]


def test_the_draw_at_the_very_end_stays_among_the_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A uniform number of 1 - 2**-24 and of 0: the least and the most probable of the tokens kept."""

    class Edge:
        def __init__(self, value: float) -> None:
            self.value = value

        def random(self, size: int, *, dtype: Any) -> np.ndarray:
            return np.full(size, self.value, dtype=dtype)

    model, images = build(), pictures(6)
    orders = [next_logits(model, image, tokens=[BEGIN]).argsort(descending=True) for image in images]
    for value, place in ((1 - 2**-24, 3), (0.0, 0)):
        monkeypatch.setattr(np.random, "default_rng", lambda _, value=value: Edge(value))
        drawn = run(model, images, method="sample", max_length=1, top_k=4)
        assert drawn.tokens[:, 0].tolist() == [int(order[place]) for order in orders]


# --- beams


def log_probabilities(model: CoCa, image: Tensor, *, candidates: list[tuple[int, ...]], length: int) -> list[float]:
    """Of whole texts, all in one pass over BEGIN and text, padded to `length`."""
    ids = torch.tensor([[BEGIN, *text] + [0] * (length - len(text)) for text in candidates])
    mask = torch.arange(length + 1) <= torch.tensor([len(text) for text in candidates])[:, None]
    with torch.no_grad():
        logits = model.logits(image.expand(len(candidates), -1, -1, -1), tokens=ids, mask=mask)
    own = logits.log_softmax(dim=2)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    return (own * mask[:, 1:]).sum(dim=1).tolist()


def all_texts(vocab_size: int, *, min_length: int, max_length: int) -> Iterator[tuple[int, ...]]:
    """Every text that END ends with at least min_length tokens, and every one of max_length without END."""
    others = [token for token in range(vocab_size) if token != END]
    for length in range(min_length, max_length + 1):
        for start in itertools.product(others, repeat=length - 1):
            yield (*start, END)
    yield from itertools.product(others, repeat=max_length)


@pytest.mark.parametrize(
    ("length_penalty", "min_length"), [(1.0, 1), (0.0, 1), (-1.0, 1), (2.5, 1), (1.0, 3), (-0.5, 3)]
)
def test_wide_beams_equal_exhaustive_search(length_penalty: float, min_length: int) -> None:
    """5 words, up to 4 tokens: 64 beams hold every running text, so the best of all 425 texts is found."""
    model, images = build(vocab_size=5, end_bias=1.5), pictures(5)
    found = run(
        model,
        images,
        method="beam",
        num_beams=64,
        max_length=4,
        min_length=min_length,
        length_penalty=length_penalty,
    )
    candidates = list(all_texts(5, min_length=min_length, max_length=4))
    for row, image in enumerate(images):
        totals = log_probabilities(model, image, candidates=candidates, length=4)
        scores = [total / len(text) ** length_penalty for total, text in zip(totals, candidates, strict=True)]
        best = scores.index(max(scores))
        assert texts(found)[row] == list(candidates[best])
        assert float(found.log_probability[row]) == pytest.approx(totals[best], abs=1e-9)
        assert bool(found.ended[row]) == (candidates[best][-1] == END)


def plain_beams(
    model: CoCa,
    image: Tensor,
    *,
    num_beams: int,
    max_length: int,
    min_length: int,
    penalty: float,
    length_penalty: float,
) -> tuple[list[int], float]:
    """Hugging Face's search in plain loops, run to the end without a stopping rule: (text, log probability)."""
    running: list[tuple[float, float, list[int]]] = [(0.0, 0.0, [])]
    finished: list[tuple[float, float, list[int]]] = []
    for length in range(1, max_length + 1):
        candidates = []
        for score, total, text in running:
            own = next_logits(model, image, tokens=[BEGIN, *text]).log_softmax(dim=0).tolist()
            for token, value in enumerate(own):
                processed = value * penalty if token in (BEGIN, *text) else value
                if token == END and length < min_length:
                    continue
                candidates.append((score + processed, total + value, [*text, token]))
        candidates = sorted(candidates, key=lambda c: -c[0])[: 2 * num_beams]
        finished += [(s / length**length_penalty, t, x) for s, t, x in candidates[:num_beams] if x[-1] == END]
        running = [candidate for candidate in candidates if candidate[2][-1] != END][:num_beams]
    finished += [(score / max_length**length_penalty, total, text) for score, total, text in running]
    best = max(finished, key=lambda entry: entry[0])
    return best[2], best[1]


@pytest.mark.parametrize(
    ("num_beams", "penalty", "length_penalty", "min_length"),
    [(1, 1.0, 1.0, 1), (2, 1.0, 1.0, 1), (3, 1.0, 0.0, 1), (3, 1.0, -1.0, 4), (4, 1.4, 0.5, 1), (3, 0.7, 1.0, 3)],
)
def test_narrow_beams_equal_plain_loops(num_beams: int, penalty: float, length_penalty: float, min_length: int) -> None:
    """The exact stopping rule changes no result, whatever the penalties; samples end at different steps."""
    model, images = build(end_bias=1.6), pictures(8)
    found = run(
        model,
        images,
        method="beam",
        num_beams=num_beams,
        max_length=7,
        min_length=min_length,
        repetition_penalty=penalty,
        length_penalty=length_penalty,
    )
    expected = [
        plain_beams(
            model,
            image,
            num_beams=num_beams,
            max_length=7,
            min_length=min_length,
            penalty=penalty,
            length_penalty=length_penalty,
        )
        for image in images
    ]
    assert texts(found) == [text for text, _ in expected]
    assert len({len(text) for text, _ in expected}) >= 2
    torch.testing.assert_close(
        found.log_probability, torch.tensor([total for _, total in expected], dtype=torch.float64)
    )


def test_a_search_stops_when_nothing_can_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """END at 99.9%: one step is enough. Without a length penalty, that is: with one, a long text might still win."""
    model, images = build(), pictures(3)
    fed = []
    feed = CachedDecoder.feed

    def counted(*arguments: Any, **options: Any) -> Tensor:
        fed.append(1)
        return feed(*arguments, **options)

    monkeypatch.setattr(CachedDecoder, "feed", counted)
    with torch.no_grad():
        image_tokens = model.encode_image(images)[1]
        model.vocabulary.weight.zero_()
        hidden_mean = model.multimodal.norm.bias
        model.vocabulary.weight[END] = hidden_mean * 40 / hidden_mean.square().sum()
        model.multimodal.norm.weight.zero_()  # the hidden state is the bias: END has a logit of 40, the others of 0
    config = GenerateConfig(method="beam", num_beams=3, max_length=9, length_penalty=0.0)
    found = generate_from_tokens(model, image_tokens, config=config, begin_id=BEGIN, end_id=END)
    assert texts(found) == [[END]] * 3 and fed == []
    patient = replace(config, length_penalty=-1.0, min_length=4)
    found = generate_from_tokens(model, image_tokens, config=patient, begin_id=BEGIN, end_id=END)
    assert [len(text) for text in texts(found)] == [4] * 3 and len(fed) == 3


# --- every option changes something, or is refused


@pytest.mark.parametrize(
    ("base", "option"),
    [
        ({}, {"max_length": 3}),
        ({}, {"min_length": 9}),
        ({}, {"repetition_penalty": 2.0}),
        ({}, {"method": "beam"}),
        ({}, {"method": "sample"}),
        ({"method": "sample"}, {"temperature": 0.2}),
        ({"method": "sample"}, {"top_k": 2}),
        ({"method": "sample"}, {"top_p": 0.3}),
        ({"method": "sample"}, {"seed": 1}),
        ({"method": "beam"}, {"num_beams": 2}),
        ({"method": "beam"}, {"length_penalty": -2.0}),
        ({"method": "beam"}, {"repetition_penalty": 2.0}),
        ({"method": "beam"}, {"min_length": 9}),
    ],
    ids=str,
)
def test_every_option_changes_texts(base: dict[str, Any], option: dict[str, Any]) -> None:
    model, images = build(end_bias=1.6), pictures(16)
    assert texts(run(model, images, **{"max_length": 10, **base})) != texts(
        run(model, images, **{"max_length": 10, **base, **option})
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": 0.5}, "temperature 0.5 has no effect with method 'greedy'; leave it out, or take .*'sample'"),
        ({"method": "beam", "top_p": 0.5}, "top_p 0.5 has no effect with method 'beam'"),
        ({"method": "beam", "top_k": 5}, "top_k 5 has no effect"),
        ({"seed": 5}, "seed 5 has no effect"),
        ({"method": "sample", "num_beams": 3}, "num_beams 3 has no effect with method 'sample'.*take method 'beam'"),
        ({"length_penalty": 0.5}, "length_penalty 0.5 has no effect"),
        ({"min_length": 0}, "min_length must be at least 1"),
        ({"min_length": 31}, r"max_length must be at least min_length \(31\); got 30"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a positive number; got 0.0"),
        ({"method": "sample", "temperature": 0.0}, "temperature must be a positive number"),
        ({"method": "sample", "top_k": 0}, "top_k must be at least 1; got 0"),
        ({"method": "sample", "top_p": 1.5}, "top_p must be above 0 and at most 1; got 1.5"),
        ({"method": "sample", "seed": -1}, "seed must be 0 or more"),
        ({"method": "beam", "num_beams": 0}, "num_beams must be at least 1"),
        ({"method": "beam", "length_penalty": math.nan}, "length_penalty must be a finite number"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GenerateConfig(**options)


def test_inputs_that_cannot_be() -> None:
    model, images = build(), pictures(2)
    prompt = torch.full((2, 3), 5)
    with pytest.raises(
        ValueError, match=r"BEGIN and prompt \(4\) with max_length 13 must fit .* 16 tokens.* at most 12"
    ):
        run(model, images, max_length=13, prompt=prompt)
    assert run(model, images, max_length=12, min_length=12, prompt=prompt).tokens.shape == (2, 12)
    holes = torch.tensor([[True, False, True], [True, True, True]])
    with pytest.raises(ValueError, match="padded on the right"):
        run(model, images, max_length=3, prompt=prompt, prompt_mask=holes)
    with pytest.raises(ValueError, match="prompt_mask has no effect without a prompt"):
        run(model, images, max_length=3, prompt_mask=holes)
    with pytest.raises(ValueError, match="keys are for method 'sample', one a row; got 1 for 2"):
        run(model, images, method="sample", max_length=3, keys=[1])
    with pytest.raises(ValueError, match="keys are for method 'sample'"):
        run(model, images, max_length=3, keys=[1, 2])
    with torch.no_grad():
        model.vocabulary.weight[4] = math.nan
    for method in ("greedy", "sample", "beam"):
        with pytest.raises(ValueError, match="not finite"):
            run(model, images, method=method, max_length=3)


# --- other libraries


def test_repetition_penalty_equals_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    scores = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    seen = torch.randint(0, 20, (6, 9), generator=torch.Generator().manual_seed(1))
    for penalty in (1.3, 0.8):
        expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(seen, scores.clone())
        assert torch.equal(penalize_repetition(scores, seen=seen, penalty=penalty), expected)


@pytest.fixture
def coca_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """open_clip's CoCa, able to generate greedily: transformers 4.57 and later lack the beam scorer it looks for."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("open_clip")
    monkeypatch.setattr(transformers, "BeamSearchScorer", type("BeamSearchScorer", (), {}), raising=False)
    module = importlib.import_module("open_clip.coca_model")
    yield importlib.reload(module)
    monkeypatch.undo()
    importlib.reload(module)


@pytest.mark.slow  # imports open_clip
def test_greedy_equals_open_clip(coca_model: ModuleType) -> None:
    """Random weights with a likely END; theirs forces END at the last token, so that one is left out."""
    torch.manual_seed(2)
    text = {"context_length": 16, "vocab_size": 40, "width": 128, "heads": 2, "layers": 2}
    theirs = coca_model.CoCa(
        embed_dim=128,
        multimodal_cfg={**text, "mlp_ratio": 4},
        text_cfg={**text, "embed_cls": True, "output_tokens": True},
        vision_cfg={
            "image_size": 32,
            "patch_size": 16,
            "width": 128,
            "layers": 1,
            "head_width": 64,
            "attentional_pool": True,
            "attn_pooler_heads": 8,
            "output_tokens": True,
        },
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            noise = torch.randn_like(parameter) * 0.15
            parameter.copy_(parameter + noise if parameter.ndim == 1 else noise)  # some of theirs is uninitialised
        theirs.text_decoder.text_projection[:, END] *= 2.0
        theirs.text_decoder.text_projection[:, 0] = 0.0  # id 0 is their padding, and would end a text too
    theirs = theirs.double().eval()
    state = theirs.state_dict()
    ours = CoCa(config_from_open_clip(state)).double().eval()
    ours.load_state_dict(from_open_clip(state))
    images = torch.randn(24, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for min_length, penalty in ((1, 1.0), (5, 1.0), (1, 1.5)):
        expected = theirs.generate(
            images,
            generation_type="top_k",
            top_k=1,
            seq_len=14,
            min_seq_len=min_length,
            repetition_penalty=penalty,
            sot_token_id=BEGIN,
            eos_token_id=END,
        )[:, 1:13]
        # Their lengths count BEGIN, and END is forbidden up to min_seq_len tokens.
        config = GenerateConfig(max_length=12, min_length=min_length, repetition_penalty=penalty)
        found = generate(ours, images, config=config, begin_id=BEGIN, end_id=END)
        width = found.tokens.shape[1]
        padded = torch.where(found.mask, found.tokens, 0)
        assert torch.equal(padded, expected[:, :width])
        assert (expected[:, width:] == 0).all()
        assert len({int(length) for length in found.mask.sum(dim=1)}) >= 3
