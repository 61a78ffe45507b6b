"""The manifest: what is read, in which order, and one sentence for each thing that may be wrong."""

import pickle
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from coca_video.data.manifest import Manifest, VideoRow, read_classes, read_manifest, write_manifest


def csv_file(folder: Path, text: str, *, classes: str | None = "run\njump\n") -> Path:
    if classes is not None:
        (folder / "classes.txt").write_text(classes)
    path = folder / "clips.csv"
    path.write_text(text)
    return path


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def sentence(error: pytest.ExceptionInfo[ValueError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def refusal(source: Path, *, classes: list[str] | None = None) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        read_manifest(source, classes=classes)
    return sentence(error)


def test_a_csv_with_every_column(tmp_path: Path) -> None:
    text = (
        "path,label,video_id,start_seconds,end_seconds,split,subject\n"
        "a/x.mp4,jump,one,0.5,2,train,7\n"
        '"b, c/../y.mp4",run,two,,,test,\n'
        "/abs/z.mp4,,three,1,,,8\n"
    )
    manifest = read_manifest(csv_file(tmp_path, text))
    assert manifest.classes == ("run", "jump")
    assert manifest.rows == (
        VideoRow(
            path=tmp_path / "a/x.mp4",
            label="jump",
            video_id="one",
            start_seconds=0.5,
            end_seconds=2.0,
            split="train",
            extra={"subject": "7"},
        ),
        VideoRow(path=tmp_path / "y.mp4", label="run", video_id="two", split="test"),
        VideoRow(path=Path("/abs/z.mp4"), label=None, video_id="three", start_seconds=1.0, extra={"subject": "8"}),
    )


def test_a_csv_from_a_spreadsheet(tmp_path: Path) -> None:
    """Byte order mark, CRLF, spaces around cells, a blank line."""
    path = csv_file(tmp_path, "", classes="run\r\njump\r\n")
    path.write_bytes(b"\xef\xbb\xbfpath, label\r\nx.mp4, jump\r\n\r\ny.mp4,run\r\n")
    manifest = read_manifest(path)
    assert [(row.video_id, manifest.label_index(row)) for row in manifest.rows] == [("x", 1), ("y", 0)]


def test_paths_are_relative_to_the_manifest_and_not_to_the_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csv_file(tmp_path, "path\nx.mp4\n")
    monkeypatch.chdir(tmp_path)
    assert read_manifest(Path("clips.csv")).rows[0].path == tmp_path.resolve() / "x.mp4"


def test_class_indices_come_from_the_file_and_are_not_sorted(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "path,label\n1.mp4,b\n2.mp4,c\n3.mp4,a\n", classes="c\na\nb\n")
    manifest = read_manifest(path)
    assert manifest.classes == ("c", "a", "b")
    assert [manifest.label_index(row) for row in manifest.rows] == [2, 0, 1]


def test_given_classes_win_over_the_file(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "path,label\n1.mp4,b\n", classes="c\na\nb\n")
    manifest = read_manifest(path, classes=["x", "b"])
    assert manifest.classes == ("x", "b")
    assert manifest.label_index(manifest.rows[0]) == 1


def test_video_ids_default_to_stems_and_to_paths_where_stems_repeat(tmp_path: Path) -> None:
    assert [r.video_id for r in read_manifest(csv_file(tmp_path, "path\na/x.mp4\nb/y.mp4\n")).rows] == ["x", "y"]
    repeated = csv_file(tmp_path, "path\na/x.mp4\nb/x.mp4\nb/y.mp4\n")
    assert [r.video_id for r in read_manifest(repeated).rows] == ["a/x.mp4", "b/x.mp4", "b/y.mp4"]


def test_without_labels_no_classes_are_needed(tmp_path: Path) -> None:
    manifest = read_manifest(csv_file(tmp_path, "path\nx.mp4\n", classes=None))
    assert (manifest.classes, manifest.rows[0].label) == ((), None)
    with pytest.raises(ValueError, match="clip 'x' has no label"):
        manifest.label_index(manifest.rows[0])


def test_a_folder_of_classes(tmp_path: Path) -> None:
    touch(tmp_path, "run/b.MP4", "run/a.mov", "jump/c.webm", "run/notes.txt", "run/._a.mov", ".cache/run/x.mp4")
    (tmp_path / "classes.txt").write_text("run\njump\n")
    manifest = read_manifest(tmp_path)
    assert [(str(r.path.relative_to(tmp_path)), r.label, r.video_id, r.split) for r in manifest.rows] == [
        ("jump/c.webm", "jump", "c", None),
        ("run/a.mov", "run", "a", None),
        ("run/b.MP4", "run", "b", None),
    ]
    assert [manifest.label_index(r) for r in manifest.rows] == [1, 0, 0]


def test_a_folder_of_splits_of_classes(tmp_path: Path) -> None:
    touch(tmp_path, "train/run/1.mp4", "train/jump/1.mp4", "val/run/1.mp4")
    (tmp_path / "classes.txt").write_text("run\njump\n")
    manifest = read_manifest(tmp_path)
    assert [(r.video_id, r.label, r.split) for r in manifest.rows] == [
        ("train/jump/1.mp4", "jump", "train"),
        ("train/run/1.mp4", "run", "train"),
        ("val/run/1.mp4", "run", "val"),
    ]
    assert [r.video_id for r in manifest.select(split="val").rows] == ["val/run/1.mp4"]
    assert manifest.select(split="val").classes == ("run", "jump")


def test_missing_classes_give_the_command_that_writes_them(tmp_path: Path) -> None:
    folder = tmp_path / "my clips"
    touch(folder, "run/1.mp4", "it's a $jump/2.mp4")
    message = refusal(folder)
    assert "any order will do" in message
    command = message[message.index("printf") :]
    subprocess.run(["sh", "-c", command], check=True)
    assert (folder / "classes.txt").read_text() == "it's a $jump\nrun\n"
    assert read_manifest(folder).classes == ("it's a $jump", "run")


def test_missing_classes_beside_a_csv(tmp_path: Path) -> None:
    message = refusal(csv_file(tmp_path, "path,label\nx.mp4,run\ny.mp4,jump\n", classes=None))
    assert message.endswith(f"printf '%s\\n' 'jump' 'run' > {tmp_path}/classes.txt")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", r"needs a column 'path'; the columns found: none"),
        ("file,label\nx.mp4,run\n", r"needs a column 'path'; the columns found: file, label"),
        ("path,label\n", r"is an empty manifest: it has a header but no clips"),
        ("path,path\nx,y\n", r"has the column 'path' more than once"),
        ('path,label\n"x"y.mp4,run\n', r"is not a CSV file: "),
        ("path,label\nx.mp4,run\ny.mp4,jmp\n", r"row 3: label 'jmp' is not one of the 2 classes of .*txt; .*'jump'"),
        ("path,video_id\nx.mp4,a\ny.mp4,a\n", r"row 3: video_id 'a' stands already at .*row 2"),
        ("path,label\nx.mp4,run\nx.mp4,run\n", r"row 3: video_id 'x.mp4' stands already at .*row 2"),
        ("path,start_seconds,end_seconds\nx.mp4,2,2\n", r"row 2: start_seconds 2 must be less than end_seconds 2"),
        ("path,start_seconds,end_seconds\nx.mp4,,0\n", r"row 2: start_seconds 0 must be less than end_seconds 0"),
        ("path,start_seconds\nx.mp4,1:30\n", r"row 2: start_seconds must be a number of seconds, .* got '1:30'"),
        ("path,end_seconds\nx.mp4,nan\n", r"row 2: end_seconds must be a number of seconds, 0 or more, got 'nan'"),
        ("path,start_seconds\nx.mp4,-1\n", r"row 2: start_seconds must be a number of seconds, 0 or more, got '-1'"),
        ("path,label\nx, y.mp4,run\n", r"row 2 has 3 cells where the header has 2"),
        ("path,label\n,run\n", r"row 2 has an empty path"),
    ],
)  # fmt: skip
def test_a_wrong_csv_is_one_sentence(tmp_path: Path, text: str, expected: str) -> None:
    message = refusal(csv_file(tmp_path, text))
    assert re.search(expected, message), message
    assert str(tmp_path / "clips.csv") in message


def test_other_wrong_sources_are_sentences(tmp_path: Path) -> None:
    assert "There is no manifest" in refusal(tmp_path / "no.csv")
    assert "is an empty manifest: it holds no video files" in refusal(tmp_path)
    binary = tmp_path / "clip.mp4"
    binary.write_bytes(b"\x00\x00\x00\x20ftypisom\xff\xfe")
    assert "is not a text file in UTF-8" in refusal(binary)


@pytest.mark.parametrize("other", ["a.mp4", "train/run/x/2.mp4", "train/run/2.mp4"])
def test_a_folder_laid_out_otherwise_is_a_sentence(tmp_path: Path, other: str) -> None:
    touch(tmp_path, "run/1.mp4", other)
    message = refusal(tmp_path)
    assert "must be laid out as <class>/clip.mp4 or <split>/<class>/clip.mp4 throughout" in message
    assert other in message


def test_labels_outside_the_given_classes(tmp_path: Path) -> None:
    message = refusal(csv_file(tmp_path, "path,label\nx.mp4,run\n"), classes=["walking", "running"])
    assert "label 'run' is not one of the 2 classes of the classes given; the nearest class is 'running'" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n\nb\n", "line 2 is empty"),
        ("a\nb\n\n", "line 3 is empty"),
        ("a\nb\na\n", "class 'a' stands on lines 1 and 3"),
        ("", "there are no classes"),
    ],
)
def test_a_wrong_classes_file_is_a_sentence(tmp_path: Path, text: str, expected: str) -> None:
    path = csv_file(tmp_path, "path,label\nx.mp4,a\n", classes=text)
    assert expected in refusal(path)
    with pytest.raises(ValueError, match=expected):
        read_classes(tmp_path / "classes.txt")


def test_no_classes_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no file of classes"):
        read_classes(tmp_path / "classes.txt")


def test_a_split_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    manifest = read_manifest(csv_file(tmp_path, "path,split\nx.mp4,val\ny.mp4,train\nz.mp4,\n"))
    with pytest.raises(ValueError, match=r"has no clips of split 'test'; the splits there are: 'train', 'val'\."):
        manifest.select(split="test")
    with pytest.raises(ValueError, match="no row has a split"):
        read_manifest(csv_file(tmp_path, "path\nx.mp4\n")).select(split="test")


def many_rows(num_rows: int) -> list[VideoRow]:
    return [
        VideoRow(
            path=Path(f"/v/{i}.mp4") if i % 5 else f"s3://b/{i}.mp4",
            label=None if i % 11 == 0 else f"class {i % 7} é",
            video_id=f'video {i} \u2028"',
            start_seconds=None if i % 3 == 0 else i / 7,
            end_seconds=None if i % 4 == 0 else i + 0.5,
            split=[None, "train", "test"][i % 3],
            extra={"n": str(i)} if i % 2 else {},
        )
        for i in range(num_rows)
    ]


def test_fingerprints_are_those_of_earlier_versions() -> None:
    """Golden: blake2b of json.dumps([[[id, label, start, end, split], ...], classes]) as first released.

    Runs, caches and results keep fingerprints, so a change of them orphans all of these.
    """
    manifest = Manifest(source=Path("/m.csv"), rows=many_rows(2500), classes=tuple(f"class {k} é" for k in range(7)))
    assert manifest.fingerprint() == "5e552d23f1cd0e2853391f474bde6271"
    assert manifest.select(split="test").fingerprint() == "11faf7bdcf7fcbbe0d05f74ae6037092"
    one = Manifest(source=Path("elsewhere.csv"), rows=many_rows(1), classes=())
    assert one.fingerprint() == "ed7ec480e5baa266a8b7a474d42c05da"
    moved = [replace(row, path=Path("/w") / row.video_id, extra={}) for row in many_rows(1)]
    assert replace(one, rows=moved).fingerprint() == one.fingerprint()


def test_rows_are_a_sequence_of_what_was_given() -> None:
    given = many_rows(30)
    manifest = Manifest(source=Path("m.csv"), rows=given, classes=tuple(f"class {k} é" for k in range(7)))
    assert len(manifest.rows) == 30 and list(manifest.rows) == given and manifest.rows[-1] == given[-1]
    assert manifest.rows[3:9] == given[3:9] and manifest.rows == tuple(given)
    assert manifest.select(split="test").rows == given[2::3]
    labelled = [row for row in manifest.rows if row.label is not None]
    assert [manifest.label_index(row) for row in labelled] == [i % 7 for i in range(30) if i % 11]
    assert pickle.loads(pickle.dumps(manifest)) == manifest


def test_unlabelled_clips_are_counted_and_the_first_named() -> None:
    manifest = Manifest(source=Path("m.csv"), rows=many_rows(12)[1:], classes=tuple(f"class {k} é" for k in range(7)))
    with pytest.raises(ValueError, match=r"has 1 of 11 clips without a label, the first is 'video 11 "):
        manifest.check_labels()
    replace(manifest, rows=manifest.rows[:10]).check_labels()


def test_places_count_blank_lines_as_a_spreadsheet_does(tmp_path: Path) -> None:
    message = refusal(csv_file(tmp_path, "path,video_id\n\nx.mp4,a\n\n\ny.mp4,a\n"))
    assert re.search("row 6: video_id 'a' stands already at .*row 3", message), message


def test_a_part_of_a_manifest_is_written_without_the_columns_that_it_has_not(tmp_path: Path) -> None:
    rows = [VideoRow(path=tmp_path / name, label=None, video_id=name, extra={name: "1"}) for name in "abc"]
    manifest = Manifest(source=Path("m.csv"), rows=rows, classes=())
    write_manifest(tmp_path / "m.csv", rows=manifest.rows[1:], classes=())
    assert (tmp_path / "m.csv").read_text().splitlines() == [
        "path,label,video_id,start_seconds,end_seconds,split,b,c",
        "b,,b,,,,1,",
        "c,,c,,,,,1",
    ]


def test_missing_files_are_counted_and_three_named(tmp_path: Path) -> None:
    touch(tmp_path, "0.mp4")
    manifest = read_manifest(csv_file(tmp_path, "path\n" + "".join(f"{i}.mp4\n" for i in range(6))))
    with pytest.raises(ValueError, match="names 5 of 6 files that are not on disk") as error:
        manifest.check_files()
    named = re.findall(r"\d\.mp4", sentence(error))
    assert named == ["1.mp4", "2.mp4", "3.mp4"]
    touch(tmp_path, *(f"{i}.mp4" for i in range(6)))
    manifest.check_files()


def made_rows(folder: Path) -> tuple[VideoRow, ...]:
    return (
        VideoRow(path=folder / "clips/a, b.mp4", label="b", video_id="1", start_seconds=0.1, end_seconds=1 / 3),
        VideoRow(path=folder.parent / 'say "so".mp4', label="a", video_id="2", split="x", extra={"n": "L\u2028l"}),
        VideoRow(path=folder / "c.mp4", label=None, video_id="3", extra={"colour": "grün"}),
    )  # fmt: skip


def test_round_trip(tmp_path: Path) -> None:
    rows = made_rows(tmp_path / "set")
    path = tmp_path / "set" / "manifest.csv"
    write_manifest(path, rows=rows, classes=["b", "a"])
    assert read_manifest(path) == Manifest(source=path, rows=rows, classes=("b", "a"))
    assert path.read_text().splitlines()[1].startswith('"clips/a, b.mp4",b,1,0.1,0.333')
    assert sorted(p.name for p in path.parent.iterdir()) == ["classes.txt", "manifest.csv"]
    (tmp_path / "set").rename(tmp_path / "moved")  # paths are relative, so a folder may be moved as one
    assert read_manifest(tmp_path / "moved/manifest.csv").rows[0].path == tmp_path / "moved/clips/a, b.mp4"


def test_round_trip_without_labels(tmp_path: Path) -> None:
    rows = [replace(row, label=None) for row in made_rows(tmp_path)]
    write_manifest(tmp_path / "m.csv", rows=rows, classes=[])
    assert not (tmp_path / "classes.txt").exists()
    assert read_manifest(tmp_path / "m.csv").rows == tuple(rows)


def test_writing_refuses_what_reading_would_refuse(tmp_path: Path) -> None:
    rows = made_rows(tmp_path)
    path = tmp_path / "m.csv"
    with pytest.raises(ValueError, match="row 2: label 'b' is not one of the 1 classes of the classes given"):
        write_manifest(path, rows=rows, classes=["a"])
    with pytest.raises(ValueError, match="video_id '1' stands already at"):
        write_manifest(path, rows=[rows[0], rows[0]], classes=["a", "b"])
    with pytest.raises(ValueError, match="class 'a' stands on lines 1 and 3"):
        write_manifest(path, rows=rows, classes=["a", "b", "a"])
    with pytest.raises(ValueError, match="without clips"):
        write_manifest(path, rows=[], classes=["a"])
    assert list(tmp_path.iterdir()) == []


def test_moments_in_time_keeps_its_own_order(tmp_path: Path, data_folder: Path) -> None:
    """As distributed, its classes start with clapping, dropping, burying; sorted, with adult+female+singing."""
    classes = (data_folder / "labels" / "mit_v2_305.txt").read_text()
    path = csv_file(tmp_path, "path,label\n1.mp4,burying\n2.mp4,clapping\n", classes=classes)
    manifest = read_manifest(path)
    assert len(manifest.classes) == 305
    assert [manifest.label_index(row) for row in manifest.rows] == [2, 0]
