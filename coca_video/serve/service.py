"""One service for all who ask: clips are read in processes that may die, and one thread per service asks the models.

A job waits in a fair line for a reading process, then in a second one for the models, where what waits for the same
model, and is of one shape, goes together. Both lines share one bound, past which a job is turned away at once.
"""

import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch

from coca_video.data.worker_pool import WorkerPool
from coca_video.data.workers import WorkerFailure
from coca_video.serve.answers import Busy, Captioned, Classified, ReadClip, Refused, Segment
from coca_video.serve.fair_queue import Client, FairQueue
from coca_video.serve.limits import Limits
from coca_video.serve.models import ServedModel
from coca_video.serve.reading import DisplayRequest, ReadRequest, discard_display, warm_up, work

Answer = TypeVar("Answer")
STOPPING = "The server is stopping; try again later."

Stage = Literal["waiting", "reading", "computing", "done"]


@dataclass(eq=False, kw_only=True)
class Job(Generic[Answer]):
    """One request on its way. `future` holds the answer, Refused, or is cancelled, by whoever lost interest in it."""

    request: ReadRequest | DisplayRequest
    client: Client
    model: ServedModel | None
    place: Callable[["Job[Any]"], int | None]
    future: "Future[Answer]" = field(default_factory=Future)
    cancelled: threading.Event = field(default_factory=threading.Event)
    stage: Stage = "waiting"
    clip: ReadClip | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)

    @property
    def position(self) -> int | None:
        """How many go before it in the line that it stands in; None when it is being worked on."""
        return self.place(self)

    def cancel(self) -> None:
        """Ends the job: a process that reads for it is killed, an answer that comes all the same is thrown away."""
        self.future.cancel()

    def spent(self, name: str) -> None:
        """Adds the time since the last call to `name`."""
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now


class Service:
    """Classes and captions of clips. A context manager; all methods may be called from any thread."""

    def __init__(
        self,
        models: Sequence[ServedModel],
        *,
        limits: Limits,
        num_workers: int = 2,
        max_waiting: int = 20,
        max_batch: int = 8,
        read: Callable[[ReadRequest | DisplayRequest], ReadClip | str | None] = work,
    ) -> None:
        """Returns when each model has answered once and a process is ready to read. ValueError for numbers below 1.

        num_workers: processes that read. max_waiting: jobs that wait, in both lines. max_batch: clips at once, of all.
        read: what the processes run.
        """
        for name, value in (("num_workers", num_workers), ("max_waiting", max_waiting), ("max_batch", max_batch)):
            if value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {value}.")
        self.limits = limits
        self._models = {model.name: model for model in models}
        self._max_waiting, self._max_batch = max_waiting, max_batch
        self._submitting = threading.Lock()
        self._to_read: FairQueue[Job[Any]] = FairQueue()
        self._to_compute: FairQueue[Job[Any]] = FairQueue()
        self._pool: WorkerPool[ReadRequest | DisplayRequest, Any] = WorkerPool(
            read,
            num_workers=num_workers,
            timeout_seconds=limits.read_seconds,
            memory_limit_bytes=int(limits.read_megabytes * 1e6),
            warm_up=warm_up,
        )
        try:
            _answer_once(models)
            self._pool.wait_until_warm()
        except BaseException:  # Ctrl-C, too, leaves no process behind
            self._pool.close()
            raise
        targets = [self._read] * num_workers + [self._compute]
        self._threads = [threading.Thread(target=target, daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()

    @property
    def names(self) -> tuple[str, ...]:
        """Of all models, in the order given."""
        return tuple(self._models)

    @property
    def classifiers(self) -> tuple[str, ...]:
        """The names of the models that name actions."""
        return tuple(name for name, model in self._models.items() if model.predictor is not None)

    @property
    def captioners(self) -> tuple[str, ...]:
        """The names of the models that write captions."""
        return tuple(name for name, model in self._models.items() if model.captioner is not None)

    def model(self, name: str) -> ServedModel:
        """The model of this name; Refused where there is none."""
        if name not in self._models:
            raise Refused(f"There is no model {name!r} here; expected one of {', '.join(self._models)}.")
        return self._models[name]

    def classify(self, path: Path, *, model: str, client: Client) -> Job[Classified]:
        """The classes of a clip by a model. Refused for a model without classes, Busy when too many wait."""
        served = self.model(model)
        if served.predictor is None:
            raise Refused(f"The model {model!r} names no actions; expected one of {_listed(self.classifiers)}.")
        request = ReadRequest(path=str(path), clip=served.predictor.clip, limits=self.limits)
        return self._submit(Job(request=request, client=client, model=served, place=self._place))

    def caption(self, path: Path, *, model: str, num_segments: int, client: Client) -> Job[Captioned]:
        """Captions of a clip and of its equal parts. Refused for a model without a decoder, Busy when too many wait."""
        served = self.model(model)
        if served.captioner is None:
            raise Refused(f"The model {model!r} writes no captions; expected one of {_listed(self.captioners)}.")
        request = ReadRequest(path=str(path), clip=served.captioner.clip, limits=self.limits, num_segments=num_segments)
        return self._submit(Job(request=request, client=client, model=served, place=self._place))

    def display(self, path: Path, *, out: Path, client: Client) -> Job[Path]:
        """`out`, an H.264 MP4 of the video that every browser plays. Busy when too many wait."""
        request = DisplayRequest(path=str(path), out=str(out), limits=self.limits)
        return self._submit(Job(request=request, client=client, model=None, place=self._place))

    def close(self) -> None:
        """Ends the processes and threads; whoever still waits is refused."""
        for queue in (self._to_read, self._to_compute):
            for job in queue.close():
                _refuse(job, Refused(STOPPING))
        self._pool.close()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, job: Job[Answer]) -> Job[Answer]:
        with self._submitting:
            self._make_room(job)
            job.future.add_done_callback(lambda future: self._give_up(job) if future.cancelled() else None)
            self._put(self._to_read, job)
        return job

    def _make_room(self, newcomer: Job[Any]) -> None:
        """When all places are taken, the host that has most of them gives one up, if that is fairer; else Busy."""
        waiting = [*self._to_compute.items(), *self._to_read.items()]
        if len(waiting) < self._max_waiting:
            return
        wait = "1 clip waits" if len(waiting) == 1 else f"{len(waiting)} clips wait"
        sentence = f"The server is busy: {wait} already. Try again in a minute."
        of_host = Counter(job.client.host for job in waiting)
        host, most = of_host.most_common(1)[0]
        if of_host[newcomer.client.host] + 1 >= most:
            raise Busy(sentence)
        last = [job for job in waiting if job.client.host == host][-1]
        if self._to_read.remove(last) or self._to_compute.remove(last):
            _refuse(last, Busy(sentence))

    def _put(self, queue: FairQueue[Job[Any]], job: Job[Any]) -> None:
        if not queue.put(job, client=job.client):
            _refuse(job, Refused(STOPPING))
        elif job.cancelled.is_set():  # while it was in neither line
            queue.remove(job)

    def _place(self, job: Job[Any]) -> int | None:
        place = self._to_read.place(job)
        return self._to_compute.place(job) if place is None else place

    def _give_up(self, job: Job[Any]) -> None:
        job.cancelled.set()
        self._to_read.remove(job)
        self._to_compute.remove(job)

    def _read(self) -> None:
        """The life of a thread that has clips read."""
        while jobs := self._to_read.take():
            job = jobs[0]
            job.spent("wait")
            job.stage = "reading"
            try:
                read = self._pool.call(job.request, cancelled=job.cancelled)
            except CancelledError:  # of this job, or of all when the service closes
                read = STOPPING
            except Exception:  # noqa: BLE001, a thread that ended would leave all who wait without an answer
                _report("Reading a clip failed")
                read = "The clip cannot be read: the reader failed."
            job.spent("decode")
            if isinstance(job.request, DisplayRequest) and read is not None:
                discard_display(Path(job.request.out))
            match read:
                case WorkerFailure(cause=cause):
                    _refuse(job, Refused(f"The clip cannot be read: {cause}."))
                case str():
                    _refuse(job, Refused(read))
                case None:
                    assert isinstance(job.request, DisplayRequest)
                    _settle(job, Path(job.request.out))
                case ReadClip():
                    job.clip, job.stage = read, "waiting"
                    self._put(self._to_compute, job)

    def _compute(self) -> None:
        """The life of the thread that asks the models."""
        while jobs := self._to_compute.take(max_size=self._max_batch, size=_num_clips, key=_batch_key):
            for job in jobs:
                job.spent("wait")
                job.stage = "computing"
            self._answer([job for job in jobs if not job.cancelled.is_set()])

    def _answer(self, jobs: Sequence[Job[Any]]) -> None:
        """Jobs of one `_batch_key` together; one by one where that fails, for want of memory, say."""
        if not jobs:
            return
        try:
            answers = _ask(jobs, max_batch=self._max_batch)
        except Exception:  # noqa: BLE001, as above
            _report("A model failed")
            if len(jobs) > 1:
                for job in jobs:
                    self._answer([job])
            else:
                _refuse(jobs[0], Refused("The model could not answer for this clip."))
            return
        for job, answer in zip(jobs, answers, strict=True):
            _settle(job, answer)


def _batch_key(job: Job[Any]) -> Hashable:
    assert job.model is not None and job.clip is not None
    return job.model.name, job.clip.frames.shape


def _num_clips(job: Job[Any]) -> int:
    assert job.clip is not None
    return len(job.clip.frames)


def _ask(jobs: Sequence[Job[Any]], *, max_batch: int) -> list[Classified] | list[Captioned]:
    """The answers to jobs of one `_batch_key`, of max_batch clips at a time: one job may have more in its segments."""
    model = jobs[0].model
    assert model is not None
    clips = [job.clip for job in jobs if job.clip is not None]
    batches = torch.cat([clip.frames for clip in clips]).split(max_batch)  # type: ignore[no-untyped-call]
    if model.predictor is not None:
        predictor = model.predictor
        predictions = [each for frames in batches for each in predictor.predict_frames(frames, attention=True)]
        return [
            Classified(
                model=model.name,
                scores=tuple(predictor.ranked(prediction)),
                clip=clip,
                attention=prediction.attention,
                seconds=job.seconds | {"encode": prediction.encode_seconds, "pool": prediction.pool_seconds},
            )
            for job, clip, prediction in zip(jobs, clips, predictions, strict=True)
        ]
    captioner = model.captioner
    assert captioner is not None
    started = time.monotonic()
    texts = [caption.text for frames in batches for caption in captioner.caption_frames(frames)]
    seconds = {"caption": time.monotonic() - started}
    parts = [texts[start : start + len(clips[0].frames)] for start in range(0, len(texts), len(clips[0].frames))]
    return [
        _captioned(model.name, clip=clip, texts=part, seconds=job.seconds | seconds)
        for job, clip, part in zip(jobs, clips, parts, strict=True)
    ]


def _captioned(name: str, *, clip: ReadClip, texts: Sequence[str], seconds: dict[str, float]) -> Captioned:
    """The first text is the whole clip's."""
    segments = tuple(
        Segment(start_seconds=start, end_seconds=end, caption=text)
        for (start, end), text in zip(clip.segments, texts, strict=True)
    )
    return Captioned(model=name, caption=texts[0], segments=segments[1:] or segments, clip=clip, seconds=seconds)


def _answer_once(models: Sequence[ServedModel]) -> None:
    """The first answer of a model is slow: kernels are chosen, memory is taken."""
    for model in models:
        clip = (model.predictor or model.captioner).clip  # type: ignore[union-attr]
        frames = torch.zeros(1, clip.num_frames, 3, clip.image_size, clip.image_size, dtype=torch.uint8)
        if model.predictor is not None:
            model.predictor.predict_frames(frames, attention=True)
        if model.captioner is not None:
            model.captioner.caption_frames(frames)


def _settle(job: Job[Any], answer: Any) -> None:
    if job.future.set_running_or_notify_cancel():
        job.stage = "done"
        job.future.set_result(answer)


def _refuse(job: Job[Any], refused: Refused) -> None:
    if job.future.set_running_or_notify_cancel():
        job.stage = "done"
        job.future.set_exception(refused)


def _report(what: str) -> None:
    """Tells whoever runs the server of the exception that is being handled; no person who sent a clip sees it."""
    print(f"{what}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none, since no such model is loaded"
