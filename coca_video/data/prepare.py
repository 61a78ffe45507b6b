"""From a data set as it lies on disk to a manifest: its list, the files found, what decodes, what is wrong with it."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from coca_video.data.annotations import (
    ClassNames,
    check_class_order,
    is_peer_list,
    path_keys,
    read_class_folders,
    read_peer_list,
    read_text,
)
from coca_video.data.layout import FileKeys, Matches, VideoFiles, find_videos, match_files
from coca_video.data.leaks import OtherClip, find_leaks, read_other
from coca_video.data.manifest import CLASSES_FILE, read_classes
from coca_video.data.prepare_report import PrepareReport, ScanRow, Status, manifest_row, write_report
from coca_video.data.recipe import Entry, Recipe, Request, recipe_classes
from coca_video.data.scan import Check, FileCheck, Progress, content_bytes, hash_contents, scan
from coca_video.data.workers import num_usable_cpus

JOURNAL_FILE = "scan.jsonl"
SHORT_SHARE = 0.9  # of the nominal length; clips cut at key frames are a little shorter than their list says


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What to prepare, from what, and how closely to look."""

    videos: Path
    """Folder that holds the video files, in any layout."""
    out: Path
    """Folder for manifest.csv, classes.txt, scan.csv, summary.json and the journal that lets a stopped run go on."""
    annotations: tuple[Path, ...] = ()
    """The data set's own lists, or lists of other projects (path label); without any, class folders below --videos."""
    version: str | None = None
    """Version of the data set; the recipe's first when not given."""
    split: str | None = None
    """Of a list that does not say its split, or of folders, the split they are; otherwise the only split to take."""
    classes: Path | None = None
    """The label map that came with such a list, to be checked; for a recipe without classes, the order of classes."""
    check: Check = "quick"
    """How every file is tried: first, middle and last frame (quick), every frame (full), or not at all (none)."""
    num_workers: int | None = None
    """Processes that decode; one for each processor when not given."""
    timeout_seconds: float = 60.0
    """A file that takes longer counts as corrupt."""
    min_seconds: float | None = None
    """Clips that last less are too short; 0.9 of what the list says when not given."""
    drop_short: bool = False
    """Leave clips that are too short out of the manifest."""
    against: Path | None = None
    """Another manifest, or an official CSV of Kinetics: clips that both share are listed in leaks.csv."""

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError(f"--num-workers must be at least 1; got {self.num_workers}.")
        for name, seconds in (("timeout", self.timeout_seconds), ("min", self.min_seconds)):
            if seconds is not None and not seconds > 0:
                raise ValueError(f"--{name}-seconds must be above 0; got {seconds:g}.")
        if self.check == "none" and (self.min_seconds is not None or self.drop_short):
            raise ValueError("--min-seconds and --drop-short need the length of every file; leave out --check none.")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The clips to look for, the classes in their order, and by which keys files are known.

    `is_list` is False where the clips are the files themselves, in folders of classes: none of these can be missing.
    """

    entries: tuple[Entry, ...]
    classes: tuple[str, ...]
    file_keys: FileKeys
    is_list: bool = True
    notices: tuple[str, ...] = ()


def prepare(recipe: Recipe, *, folder: Path, config: PrepareConfig, progress: Progress) -> PrepareReport:
    """Finds and checks the files of a data set's list, and writes the manifest and the tables into `config.out`.

    What was checked is kept as it comes: stopped at any moment, the same call goes on where it was.

    Raises:
        ValueError: the list, the folder or an option is wrong, or no file or no readable file of the list was found.
    """
    version = next(iter(recipe.versions)) if config.version is None else config.version
    others = None if config.against is None else read_other(config.against)
    listing = list_entries(recipe, folder=folder, version=version, config=config)
    videos = config.videos.absolute()
    found = find_videos(videos)
    matches = match_files(listing.entries, found=found, file_keys=listing.file_keys)
    if listing.file_keys is path_keys:
        matches = _without_other_classes(matches, listing=listing)
    if not matches.files:
        raise ValueError(_nothing_found(listing, found=found, videos=config.videos))
    checks = _scan(matches, videos=videos, config=config, progress=progress)
    nominal_seconds = recipe.versions[version].nominal_seconds
    rows = _clip_rows(listing.entries, matches=matches, checks=checks, nominal_seconds=nominal_seconds, config=config)
    alike = _of_equal_size(rows, others=others or (), videos=videos)
    hashes = _hash(alike, config=config, progress=progress)
    rows = _with_contents(rows, hashes=hashes, videos=videos)
    kept: tuple[Status, ...] = ("ok",) if config.drop_short else ("ok", "short")
    manifest_rows = tuple(manifest_row(row, videos=videos) for row in rows if row.status in kept)
    report = PrepareReport(
        name=f"{recipe.name} {version}" if len(recipe.versions) > 1 else recipe.name,
        videos=config.videos,
        out=config.out,
        against=config.against,
        check=config.check,
        is_list=listing.is_list,
        classes=listing.classes,
        official=recipe.versions[version].official,
        rows=(*rows, *(ScanRow(entry=None, status="extra", path=path.as_posix()) for path in matches.extra)),
        manifest_rows=manifest_rows,
        leaks=None if others is None else tuple(find_leaks(manifest_rows, others=others, hashes=hashes)),
        notices=(*listing.notices, *_not_compared(alike, hashes=hashes)),
    )
    write_report(report)
    return report


def list_entries(recipe: Recipe, *, folder: Path, version: str, config: PrepareConfig) -> Listing:
    """The clips of the annotations given, of the split asked for; those without a source have the recipe's.

    Raises:
        ValueError: an annotation file is missing or wrong, or no clip has the split.
    """
    _check_annotations(recipe, config=config)
    official = recipe_classes(recipe, folder=folder, version=version)
    classes = official
    if config.classes is not None and official:
        check_class_order(read_text(config.classes).splitlines(), ours=official, source=str(config.classes))
    elif config.classes is not None:
        classes = read_classes(config.classes)
    peers = [is_peer_list(path) for path in config.annotations]
    if any(peers):
        listing = _read_peer_lists(recipe, config=config, peers=peers, classes=classes)
    elif config.annotations or not official:
        request = Request(annotations=config.annotations, videos=config.videos, version=version, classes=classes)
        entries = tuple(recipe.list_clips(request))
        classes = classes or _own_classes(entries, videos=config.videos)
        is_list = bool(config.annotations)
        listing = Listing(entries=entries, classes=classes, file_keys=recipe.file_keys, is_list=is_list)
    else:
        listing = _read_class_folders(recipe, config=config, classes=classes)
    _check_ids(listing.entries)
    listing = replace(listing, entries=tuple(_with_source(entry, recipe=recipe) for entry in listing.entries))
    return listing if config.split is None else _select(listing, split=config.split)


def _check_annotations(recipe: Recipe, *, config: PrepareConfig) -> None:
    missing = [path for path in config.annotations if not path.exists()]
    if missing:
        raise ValueError(f"There is no file {missing[0]}; {_annotations(recipe)}.")


def _annotations(recipe: Recipe) -> str:
    """For messages: what --annotations takes."""
    return f"--annotations of {recipe.name} takes: {recipe.annotations_help.rstrip('.')}"


def _with_source(entry: Entry, *, recipe: Recipe) -> Entry:
    """Other projects' lists and folders give no source; the clip's path may tell it."""
    if entry.source_id is not None:
        return entry
    return replace(entry, source_id=recipe.source_id(PurePosixPath(entry.keys[0] if entry.keys else entry.video_id)))


def _read_class_folders(recipe: Recipe, *, config: PrepareConfig, classes: tuple[str, ...]) -> Listing:
    lists = recipe.annotations_help.rstrip(".")
    entries = tuple(read_class_folders(config.videos, classes=classes, annotations_help=lists))
    if recipe.versions_are_splits and not all(entry.split for entry in entries):
        raise ValueError(
            f"{config.videos} does not tell which clips are of which official split of {recipe.name}: give its lists, "
            f"or folders of splits above those of classes; {_annotations(recipe)}."
        )
    notice = (
        f"{config.videos}: without --annotations the clips are those found in class folders, so missing ones cannot be "
        "told."
    )
    return Listing(entries=entries, classes=classes, file_keys=path_keys, is_list=False, notices=(notice,))


def _read_peer_lists(
    recipe: Recipe, *, config: PrepareConfig, peers: Sequence[bool], classes: tuple[str, ...]
) -> Listing:
    for path, is_peer in zip(config.annotations, peers, strict=True):
        if not is_peer:
            raise ValueError(
                f"{path} is no list of lines 'path label', and {config.annotations[peers.index(True)]} is one; give "
                f"such lists alone, or the data set's own files alone; {_annotations(recipe)}."
            )
    if config.split is None:
        raise ValueError(f"{config.annotations[0]} does not say of which split its clips are; name it with --split.")
    if not classes:
        raise ValueError(f"{config.annotations[0]} holds numbers of classes; give the classes with --classes FILE.")
    lists = [read_peer_list(path, classes=classes, split=config.split) for path in config.annotations]
    return Listing(
        entries=tuple(entry for one in lists for entry in one.entries),
        classes=classes,
        file_keys=path_keys,
        # a label map that was given has been checked itself
        notices=tuple(one.notice for one in lists if one.notice is not None and config.classes is None),
    )


def _own_classes(entries: Sequence[Entry], *, videos: Path) -> tuple[str, ...]:
    """Of one's own clips: classes.txt beside them, else their names sorted, since no other order is meant."""
    own = videos / CLASSES_FILE
    return read_classes(own) if own.is_file() else tuple(sorted({entry.label for entry in entries if entry.label}))


def _check_ids(entries: Sequence[Entry]) -> None:
    ids = Counter(entry.video_id for entry in entries)
    twice = [video_id for video_id, count in ids.items() if count > 1]
    if twice:
        raise ValueError(
            f"{len(twice)} clips are listed more than once, the first is {twice[0]!r}; give lists that share no clip."
        )


def _select(listing: Listing, *, split: str) -> Listing:
    """The entries of one split; entries that have none are of this one."""
    named = [entry if entry.split else replace(entry, split=split) for entry in listing.entries]
    chosen = tuple(entry for entry in named if entry.split == split)
    if not chosen:
        there = ", ".join(repr(name) for name in sorted({entry.split for entry in named}))
        raise ValueError(f"No clip of the list has the split {split!r}; the splits there are: {there or 'none'}.")
    return replace(listing, entries=chosen)


def _without_other_classes(matches: Matches, *, listing: Listing) -> Matches:
    """Of further files those fall out that lie in another class's folder: run/1.mp4 is no second jump/1.mp4."""
    names = ClassNames(listing.classes)
    labels = {entry.video_id: entry.label for entry in listing.entries}
    files, extra = dict[str, tuple[PurePosixPath, ...]](), set(matches.extra)
    for video_id, (first, *others) in matches.files.items():
        strange = {path for path in others if names.find(path.parent.name) not in (None, labels[video_id])}
        files[video_id] = (first, *(path for path in others if path not in strange))
        extra |= strange
    return replace(matches, files=files, extra=tuple(sorted(extra)))


def _nothing_found(listing: Listing, *, found: VideoFiles, videos: Path) -> str:
    keys = [key for entry in listing.entries for key in entry.keys]  # a clip may have none that is its alone
    expected = repr(keys[0]) if keys else "none, since the list tells no clip from the others"
    names = [*found.videos, *found.image_folders]
    shown = ", ".join(path.as_posix() for path in names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"None of the {len(listing.entries):,} listed clips is below {videos}: expected names like {expected}, and "
        f"the {len(found.videos):,} video files there have names like: {shown or 'none'}."
    )


def _scan(
    matches: Matches, *, videos: Path, config: PrepareConfig, progress: Progress
) -> dict[PurePosixPath, FileCheck]:
    paths = {videos / path: path for paths in matches.files.values() for path in paths}
    checks = scan(
        list(paths),
        check=config.check,
        journal=config.out / JOURNAL_FILE,
        num_workers=_num_workers(config),
        timeout_seconds=config.timeout_seconds,
        progress=progress,
    )
    return {paths[path]: check for path, check in checks.items()}


def _num_workers(config: PrepareConfig) -> int:
    return num_usable_cpus() if config.num_workers is None else config.num_workers


def _clip_rows(
    entries: Sequence[Entry],
    *,
    matches: Matches,
    checks: Mapping[PurePosixPath, FileCheck],
    nominal_seconds: float | None,
    config: PrepareConfig,
) -> list[ScanRow]:
    """A row for each entry, and after it one for each further file of it."""
    rows = []
    for entry in entries:
        paths = matches.files.get(entry.video_id)
        if paths is None:
            rows.append(ScanRow(entry=entry, status="missing", cause=matches.causes.get(entry.video_id, "")))
            continue
        chosen = next((path for path in paths if checks[path].status == "ok"), paths[0])
        nominal = nominal_seconds if entry.nominal_seconds is None else entry.nominal_seconds
        least = config.min_seconds if config.min_seconds is not None else SHORT_SHARE * (nominal or 0.0)
        rows.append(_judge(entry, path=chosen, check=checks[chosen], min_seconds=least))
        for path in paths:
            if path != chosen:
                check = checks[path]
                cause = check.cause or f"{chosen} was taken"
                rows.append(ScanRow(entry=entry, status="duplicate_id", cause=cause, path=path.as_posix(), check=check))
    return rows


def _judge(entry: Entry, *, path: PurePosixPath, check: FileCheck, min_seconds: float) -> ScanRow:
    found = ScanRow(entry=entry, status="ok", path=path.as_posix(), check=check)
    if check.status == "corrupt":
        return replace(found, status="corrupt", cause=check.cause)
    if check.duration_seconds is not None and check.duration_seconds < min_seconds:
        return replace(found, status="short", cause=f"{check.duration_seconds:.2f} s of at least {min_seconds:g} s")
    return found


def _of_equal_size(rows: Sequence[ScanRow], *, others: Sequence[OtherClip], videos: Path) -> list[Path]:
    """The files that share their size with another: the rest cannot have equal content."""
    by_size = defaultdict[int, dict[Path, None]](dict)
    for row in rows:
        if row.check is not None and row.check.status == "ok":
            by_size[row.check.num_bytes][videos / row.path] = None
    for other in others:
        size = None if other.path is None else content_bytes(other.path)
        if other.path is not None and size is not None and size in by_size:
            by_size[size][other.path] = None
    return [path for group in by_size.values() if len(group) > 1 for path in group]


def _hash(paths: Sequence[Path], *, config: PrepareConfig, progress: Progress) -> dict[Path, str]:
    if not paths:
        return {}
    return hash_contents(
        paths,
        journal=config.out / JOURNAL_FILE,
        num_workers=_num_workers(config),
        timeout_seconds=config.timeout_seconds,
        progress=progress,
    )


def _not_compared(paths: Sequence[Path], *, hashes: Mapping[Path, str]) -> list[str]:
    """A sentence for the user if the bytes of some files could not be read in time, or any more."""
    missed = [path for path in paths if path not in hashes]
    if not missed:
        return []
    files = f"{len(missed)} files could not be compared by content, the first is {missed[0]}"
    return [f"{files}: they took too long (--timeout-seconds) or are gone."]


def _with_contents(rows: Sequence[ScanRow], *, hashes: Mapping[Path, str], videos: Path) -> list[ScanRow]:
    """The rows with their hashes, and with the first clip of the same content."""
    first: dict[str, str] = {}
    done = []
    for row in rows:
        content_hash = hashes.get(videos / row.path, "") if row.path else ""
        same = first.setdefault(content_hash, row.name) if content_hash else row.name
        done.append(replace(row, content_hash=content_hash, same_content_as="" if same == row.name else same))
    return done
