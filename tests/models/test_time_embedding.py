"""Where a frame stands in its clip: closed forms for sines and for places between the frames trained with."""

import math

import pytest
import torch

from coca_video.models.time_embedding import TimeEmbedding


def tokens(*, num_frames: int, dim: int = 8, batch: int = 2) -> torch.Tensor:
    return torch.zeros(batch, num_frames, 3, dim, dtype=torch.float64)


def learned(values: list[float], *, dim: int = 8) -> TimeEmbedding:
    embedding = TimeEmbedding(dim, kind="learned", num_frames=len(values)).double()
    with torch.no_grad():
        embedding.embedding.copy_(torch.tensor(values)[:, None].expand(-1, dim))
    return embedding


def test_sines_by_the_formula() -> None:
    """sin(t / 10000^(2i / dim)) and the cosines behind them."""
    rows = TimeEmbedding(8, kind="sincos", num_frames=5)(tokens(num_frames=5), mask=None)
    assert rows.shape == (1, 5, 8)
    for frame in range(5):
        for i in range(4):
            angle = frame / 10_000 ** (2 * i / 8)
            assert rows[0, frame, i].item() == pytest.approx(math.sin(angle), abs=1e-12)
            assert rows[0, frame, 4 + i].item() == pytest.approx(math.cos(angle), abs=1e-12)


def test_sines_of_twice_the_frames_stand_at_quarters() -> None:
    """Frames 0 and 1 of 8 share the time of frame 0 of 4: they stand at -1/4 and 1/4."""
    rows = TimeEmbedding(8, kind="sincos", num_frames=4)(tokens(num_frames=8), mask=None)
    for frame in range(8):
        place = frame / 2 - 0.25
        assert rows[0, frame, 0].item() == pytest.approx(math.sin(place), abs=1e-12)
        assert rows[0, frame, 5].item() == pytest.approx(math.cos(place / 10), abs=1e-12)


def test_sines_have_nothing_to_learn_and_nothing_to_save() -> None:
    embedding = TimeEmbedding(8, kind="sincos", num_frames=4)
    assert not list(embedding.parameters()) and not embedding.state_dict()
    with pytest.raises(ValueError, match="even width; got 7: take time_embedding learned"):
        TimeEmbedding(7, kind="sincos", num_frames=4)


@pytest.mark.parametrize(
    ("num_frames", "expected"),
    [
        (4, [0, 10, 40, 90]),
        (8, [0, 2.5, 7.5, 17.5, 32.5, 52.5, 77.5, 90]),  # at -1/4, 1/4, 3/4, ...: the ends stay as they are
        (2, [5, 65]),  # at 1/2 and 5/2
        (1, [25]),  # at 3/2
        (3, [10 / 6, 25, 90 - 50 / 6]),  # at 1/6, 3/2, 17/6
    ],
)
def test_learned_rows_between_frames(num_frames: int, expected: list[float]) -> None:
    rows = learned([0.0, 10.0, 40.0, 90.0])(tokens(num_frames=num_frames), mask=None)
    torch.testing.assert_close(rows[0, :, 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert torch.equal(rows, rows[..., :1].expand_as(rows))


def test_interpolation_equals_torch() -> None:
    embedding = TimeEmbedding(6, kind="learned", num_frames=5).double()
    for num_frames in (2, 3, 5, 11, 16):
        rows = embedding(tokens(num_frames=num_frames, dim=6), mask=None)
        expected = torch.nn.functional.interpolate(
            embedding.embedding.T[None], size=num_frames, mode="linear", align_corners=False
        )
        torch.testing.assert_close(rows[0], expected[0].T, rtol=1e-12, atol=1e-12)


def test_a_learned_row_has_the_gradient_of_its_weights() -> None:
    embedding = learned([0.0, 10.0, 40.0, 90.0])
    embedding(tokens(num_frames=2), mask=None).sum().backward()
    assert embedding.embedding.grad[:, 0].tolist() == [0.5, 0.5, 0.5, 0.5]
    embedding.zero_grad()
    embedding(tokens(num_frames=8), mask=None).sum().backward()
    assert embedding.embedding.grad[:, 0].tolist() == [2.0, 2.0, 2.0, 2.0]


def test_only_real_frames_are_counted() -> None:
    """Clip 0 has frames 0 and 2 of 4, clip 1 all of them."""
    mask = torch.tensor([[True, False, True, False], [True, True, True, True]])
    rows = learned([0.0, 10.0, 40.0, 90.0])(tokens(num_frames=4), mask=mask)
    assert rows[0, [0, 2], 0].tolist() == [5, 65]
    assert rows[1, :, 0].tolist() == [0, 10, 40, 90]
    assert bool(rows.isfinite().all())
