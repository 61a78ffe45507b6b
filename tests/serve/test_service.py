"""The service: the answers of predictor and captioner, whoever else asks, and whatever a clip does to its reader."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coca_video.data.manifest import read_manifest
from coca_video.data.video import load_clip
from coca_video.serve.answers import Busy, ReadClip, Refused
from coca_video.serve.fair_queue import Client
from coca_video.serve.limits import Limits
from coca_video.serve.models import ServedModel
from coca_video.serve.reading import DisplayRequest, ReadRequest, work
from coca_video.serve.service import Job, Service
from tests.serve.models import classifier, coca

pytestmark = pytest.mark.slow
LIMITS = Limits(read_seconds=12.0, read_megabytes=300.0)
ME = Client(session="me", host="here")
PATIENCE = 600.0  # seconds that no test here comes near


def work_or_worse(request: ReadRequest | DisplayRequest) -> ReadClip | str | None:
    """Reads a clip, unless its name says what goes wrong."""
    match Path(request.path).stem:
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            time.sleep(PATIENCE)
        case "bomb":
            np.ones((1000, 1000, 1000)).sum()  # 8 GB
    return work(request)


@pytest.fixture(scope="module")
def models() -> list[ServedModel]:
    return [classifier(), classifier("other", seed=1), coca()]


@pytest.fixture(scope="module")
def service(models: list[ServedModel]) -> Iterator[Service]:
    with Service(models, limits=LIMITS, num_workers=2, max_waiting=12, max_batch=4, read=work_or_worse) as service:
        yield service


@pytest.fixture(scope="module")
def clips(drawn_clips: Path) -> list[Path]:
    return [Path(row.path) for row in read_manifest(drawn_clips).rows[:6]]


def in_time(job: Job[Any]) -> Any:
    return job.future.result(timeout=PATIENCE)


def refusal(job: Job[Any]) -> str:
    with pytest.raises(Refused) as refused:
        in_time(job)
    return str(refused.value)


def test_scores_are_those_of_the_predictor_for_everybody_at_once(
    service: Service, models: list[ServedModel], clips: list[Path]
) -> None:
    jobs = {
        (name, clip): service.classify(clip, model=name, client=Client(session=f"{clip}", host="here"))
        for clip in clips
        for name in ("probe", "other")
    }
    for (name, clip), job in jobs.items():
        predictor = service.model(name).predictor
        assert predictor is not None
        answer, expected = in_time(job), dict(predictor(clip))
        assert answer.model == name
        assert dict(answer.scores) == pytest.approx(expected, abs=1e-6)
        scores = [score for _, score in answer.scores]
        assert scores == sorted(scores, reverse=True)
        assert {"wait", "decode", "encode", "pool"} == answer.seconds.keys()
        assert torch.equal(answer.clip.frames[0], load_clip(clip, config=predictor.clip).frames)
        assert answer.attention.shape[0] == 4 and answer.attention.sum().item() == pytest.approx(1.0, abs=1e-5)


def test_what_waits_is_answered_together(service: Service, models: list[ServedModel], clips: list[Path]) -> None:
    """While the model is held up by one clip, the next ones gather; no batch is above max_batch clips."""
    sizes: list[int] = []
    predictor = models[0].predictor
    assert predictor is not None
    forward = predictor.model.encoder.forward

    def slow(frames: torch.Tensor, **arguments: Any) -> torch.Tensor:
        sizes.append(len(frames) // 4)
        time.sleep(0.5)
        return forward(frames, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor.model.encoder, "forward", slow)
        jobs = [service.classify(clips[index % 6], model="probe", client=ME) for index in range(10)]
        for job in jobs:
            in_time(job)
    assert sum(sizes) == 10 and 1 < max(sizes) <= 4, sizes


def test_a_clip_comes_through_a_pipe_by_value(service: Service, clips: list[Path]) -> None:
    clip = in_time(service.classify(clips[0], model="probe", client=ME)).clip
    pickled = ForkingPickler.dumps(clip)
    back = ForkingPickler.loads(pickled)
    assert len(pickled) > clip.frames.numel()  # torch's way is a handle of some hundred bytes
    assert torch.equal(back.frames, clip.frames) and back.box == clip.box
    assert np.array_equal(back.times_seconds, clip.times_seconds) and back.segments == clip.segments


def test_captions_of_the_clip_and_of_its_parts(service: Service, models: list[ServedModel], clips: list[Path]) -> None:
    captioner = models[2].captioner
    assert captioner is not None
    one = in_time(service.caption(clips[0], model="coca", num_segments=1, client=ME))
    three = in_time(service.caption(clips[0], model="coca", num_segments=3, client=ME))
    whole = captioner(clips[0]).text
    assert one.caption == three.caption == whole
    assert [segment.caption for segment in one.segments] == [whole]
    assert len(three.segments) == 3
    ends = [(segment.start_seconds, segment.end_seconds) for segment in three.segments]
    length = three.clip.duration_seconds
    assert ends == [pytest.approx((length * k / 3, length * (k + 1) / 3)) for k in range(3)]
    by_hand = [captioner.caption_frames(frames.unsqueeze(0))[0].text for frames in three.clip.frames[1:]]
    assert [segment.caption for segment in three.segments] == by_hand


def test_no_more_clips_at_once_than_asked_for(models: list[ServedModel], clips: list[Path]) -> None:
    """The segments of one clip may be more, and go in parts."""
    captioner = models[2].captioner
    assert captioner is not None
    sizes: list[int] = []
    pool = captioner.model.pool

    def counted(tokens: torch.Tensor) -> Any:
        sizes.append(len(tokens))
        return pool(tokens)

    with (
        Service(models[2:], limits=LIMITS, num_workers=1, max_batch=3) as service,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(captioner.model, "pool", counted)
        answer = in_time(service.caption(clips[0], model="coca", num_segments=6, client=ME))
    assert sizes == [3, 3, 1] and len(answer.segments) == 6


def test_a_video_for_every_browser(service: Service, clips: list[Path], tmp_path: Path) -> None:
    from coca_video.data.decode import open_video

    out = in_time(service.display(clips[0], out=tmp_path / "shown.mp4", client=ME))
    with open_video(clips[0]) as source, open_video(out) as shown:
        assert shown.num_frames == source.num_frames


@pytest.mark.parametrize(
    ("fault", "says"), [("crash", "signal 11"), ("hang", "longer than 12 s"), ("bomb", "memory")], ids=str
)
def test_a_clip_that_breaks_its_reader_is_refused_and_the_others_are_answered(
    service: Service, models: list[ServedModel], clips: list[Path], tmp_path: Path, fault: str, says: str
) -> None:
    bad = tmp_path / f"{fault}.mp4"
    bad.write_bytes(clips[0].read_bytes())
    jobs = [service.classify(path, model="probe", client=ME) for path in (bad, *clips)]
    sentence = refusal(jobs[0])
    assert says in sentence and str(tmp_path) not in sentence and fault not in sentence
    predictor = models[0].predictor
    assert predictor is not None
    for clip, job in zip(clips, jobs[1:], strict=True):
        assert dict(in_time(job).scores) == pytest.approx(dict(predictor(clip)), abs=1e-6)


@pytest.fixture
def hang(clips: list[Path], tmp_path: Path) -> Path:
    """A clip on which its reader hangs."""
    path = tmp_path / "hang.mp4"
    path.write_bytes(clips[0].read_bytes())
    return path


def wait_until_read(job: Job[Any]) -> None:
    while job.stage == "waiting":
        time.sleep(0.01)


def test_what_is_cancelled_makes_room(models: list[ServedModel], clips: list[Path], hang: Path) -> None:
    limits = Limits(read_seconds=PATIENCE)  # so that no time limit makes room
    with Service(models[:1], limits=limits, num_workers=2, read=work_or_worse) as service:
        hanging = [service.classify(hang, model="probe", client=ME) for _ in range(3)]
        behind = service.classify(clips[0], model="probe", client=ME)
        for job in hanging[:2]:
            wait_until_read(job)
        assert hanging[2].position == 0 and behind.position == 1
        for job in hanging:
            job.cancel()
        in_time(behind)
        for job in hanging:
            with pytest.raises(CancelledError):
                in_time(job)


def test_past_the_bound_everybody_is_told_at_once(models: list[ServedModel], clips: list[Path], hang: Path) -> None:
    with Service(models[:1], limits=LIMITS, num_workers=1, max_waiting=2, read=work_or_worse) as service:
        jobs = [service.classify(hang, model="probe", client=ME)]
        wait_until_read(jobs[0])
        jobs += [service.classify(hang, model="probe", client=ME) for _ in range(2)]
        with pytest.raises(Busy, match="busy: 2 clips wait"):
            service.classify(clips[0], model="probe", client=ME)
        jobs[1].cancel()
        jobs.append(service.classify(clips[0], model="probe", client=ME))
    for job in (jobs[0], *jobs[2:]):
        assert refusal(job) == "The server is stopping; try again later."


def test_one_host_does_not_keep_all_others_out(models: list[ServedModel], clips: list[Path], hang: Path) -> None:
    """The host with most places gives one up to a host that has at least two fewer."""
    you, they = Client(session="you", host="there"), Client(session="they", host="elsewhere")
    with Service(models[:1], limits=LIMITS, num_workers=1, max_waiting=3, read=work_or_worse) as service:
        first = service.classify(hang, model="probe", client=ME)
        wait_until_read(first)
        mine = [service.classify(clips[number], model="probe", client=ME) for number in range(3)]
        yours = service.classify(clips[3], model="probe", client=you)
        assert isinstance(mine[2].future.exception(timeout=PATIENCE), Busy)
        theirs = service.classify(clips[4], model="probe", client=they)  # one each now
        assert isinstance(mine[1].future.exception(timeout=PATIENCE), Busy)
        with pytest.raises(Busy):
            service.classify(clips[5], model="probe", client=ME)
        first.cancel()
        assert [in_time(job).model for job in (mine[0], yours, theirs)] == ["probe"] * 3


def test_models_are_asked_for_what_they_can(service: Service, clips: list[Path]) -> None:
    assert service.names == ("probe", "other", "coca")
    assert service.classifiers == ("probe", "other") and service.captioners == ("coca",)
    with pytest.raises(Refused, match="no model 'nobody' here; expected one of probe, other, coca"):
        service.classify(clips[0], model="nobody", client=ME)
    with pytest.raises(Refused, match="'coca' names no actions; expected one of probe, other"):
        service.classify(clips[0], model="coca", client=ME)
    with pytest.raises(Refused, match="'probe' writes no captions; expected one of coca"):
        service.caption(clips[0], model="probe", num_segments=1, client=ME)


def test_a_model_that_fails_fails_for_that_batch_alone(
    service: Service, models: list[ServedModel], clips: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    predictor = models[1].predictor
    assert predictor is not None

    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("out of memory at /secret")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor.model.encoder, "forward", fail)
        sentence = refusal(service.classify(clips[0], model="other", client=ME))
    assert "could not answer" in sentence and "secret" not in sentence
    assert "secret" in capsys.readouterr().err  # whoever runs the server is told
    assert dict(in_time(service.classify(clips[0], model="other", client=ME)).scores) == pytest.approx(
        dict(predictor(clips[0])), abs=1e-6
    )


@pytest.mark.parametrize("option", ["num_workers", "max_waiting", "max_batch"])
def test_numbers_below_one_are_refused(models: list[ServedModel], option: str) -> None:
    with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} must be at least 1; got 0"):
        Service(models, limits=LIMITS, **{option: 0})
