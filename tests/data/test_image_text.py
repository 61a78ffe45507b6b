"""Image-text shards: the index against tarfile, random reads, captions over epochs, the kept index, faults."""

import io
import json
import logging
import multiprocessing
import os
import pickle
import struct
import tarfile
import warnings
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from coca_video.data import image_text
from coca_video.data.image_text import Pair, PairDataset, index_shards, open_shards, write_shard
from coca_video.data.loader import Order, SampleKey, Unreadable, batches
from coca_video.data.transforms import Box, resize_crop

KINDS = {"jpg": 0, "jpeg": 0, "png": 0, "webp": 0, "json": 1, "txt": 2}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COCA_VIDEO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(number: int, *, height: int = 24, width: int = 32) -> Tensor:
    """Smooth, so that JPEG keeps it, and different for each number."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x * 5 + number, y * 7, (x + y) * 3]).clamp(0, 255).to(torch.uint8)


def encoded(number: int, *, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(number).permute(1, 2, 0).numpy()).save(buffer, kind, quality=95)
    return buffer.getvalue()


def jpeg(number: int) -> bytes:
    return encoded(number)


def torchvision_pixels(data: bytes) -> Tensor:
    """An independent decoder; torchvision 0.29 says that it will move to torchcodec."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The image decoding and encoding", category=DeprecationWarning)
        return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def made_pairs(first: int, last: int) -> list[tuple[str, bytes, Sequence[str]]]:
    return [(f"{n:09d}", jpeg(n), [f"caption {k} of {n}" for k in range(1 + n % 5)]) for n in range(first, last)]


def made_shards(folder: Path, *, sizes: Sequence[int] = (7, 5)) -> list[Path]:
    firsts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    paths = [folder / f"train-{i:05d}.tar" for i in range(len(sizes))]
    for path, first, last in zip(paths, firsts[:-1], firsts[1:], strict=True):
        write_shard(path, pairs=made_pairs(first, last))
    return paths


def raw_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def pairs_of(shards: Sequence[Path], *, augment: bool = False, seed: int = 0, image_size: int = 16) -> PairDataset:
    return PairDataset(shards, image_size=image_size, seed=seed, augment=augment)


def readable(sample: Pair | Unreadable) -> Pair:
    assert isinstance(sample, Pair), sample
    return sample


def cause(sample: Pair | Unreadable) -> str:
    assert isinstance(sample, Unreadable)
    return sample.cause


def check_index_against_tarfile(shards: Sequence[Path]) -> int:
    """Every member that tarfile lists lies where the index says, byte for byte, read in a shuffled order."""
    index = index_shards(shards)
    places = {(index.shards[index.shard_numbers[i]], index.key(i)): i for i in range(len(index))}
    members = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            members += [(shard, m.name, tar.extractfile(m).read()) for m in tar.getmembers() if m.isfile()]
    files = pairs_of(shards)._files
    for at in np.random.default_rng(0).permutation(len(members)):
        shard, name, data = members[at]
        key, suffix = name.split(".")
        offset, size = index.spans[places[shard, key], KINDS[suffix]].tolist()
        assert files.read(shard, offset=offset, size=size) == data
    assert int((index.spans[..., 0] >= 0).sum()) == len(members)
    return len(members)


def test_index_equals_tarfile_on_made_shards(tmp_path: Path) -> None:
    shards = made_shards(tmp_path)
    assert check_index_against_tarfile(shards) == 3 * 12
    index = index_shards(shards)
    assert [index.key(i) for i in range(12)] == [f"{n:09d}" for n in range(12)]
    assert index.shard_numbers.tolist() == [0] * 7 + [1] * 5


def test_index_equals_tarfile_on_flickr8k(data_folder: Path) -> None:
    assert check_index_against_tarfile([data_folder / "flickr8k" / "val-00000.tar"]) == 3000


def test_flickr8k_pairs_equal_tarfile_and_json(data_folder: Path) -> None:
    shard = data_folder / "flickr8k" / "val-00000.tar"
    dataset = pairs_of([shard], image_size=128)
    assert len(dataset) == 1000
    with tarfile.open(shard) as tar:
        for number in (0, 17, 999):
            pair = readable(dataset[SampleKey(0, number)])
            details = json.loads(tar.extractfile(f"{pair.key}.json").read())
            pixels = torchvision_pixels(tar.extractfile(f"{pair.key}.jpg").read())
            assert pair.captions == tuple(c.strip() for c in details["captions"])
            assert (pair.image.int() - pixels.int()).abs().max() <= 3  # two JPEG decoders may round differently


def test_every_caption_is_drawn_about_equally_often(data_folder: Path) -> None:
    """5 captions, 100 pairs x 20 epochs: 400 draws each, standard deviation 18; the draw depends on all three."""
    dataset = pairs_of([data_folder / "flickr8k" / "val-00000.tar"], image_size=8)
    keys = [SampleKey(epoch, index) for epoch in range(20) for index in range(100)]
    drawn = [readable(dataset[key]) for key in keys]
    counts = Counter(pair.captions.index(pair.caption) for pair in drawn)
    assert sorted(counts) == [0, 1, 2, 3, 4]
    assert all(330 < count < 470 for count in counts.values()), counts
    assert [pair.caption for pair in drawn[:100]] == [readable(dataset[key]).caption for key in keys[:100]]
    assert [pair.caption for pair in drawn[:100]] != [pair.caption for pair in drawn[100:200]]


def test_the_image_is_the_central_square_resized(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", pairs=[("0", jpeg(3), ["a"])])
    pair = readable(pairs_of([tmp_path / "0.tar"])[SampleKey(0, 0)])
    expected = resize_crop(torchvision_pixels(jpeg(3))[:, :, 4:28], box=Box(0, 0, 24, 24), size=16)
    assert (pair.image.int() - expected.int()).abs().max() <= 3


def test_png_keeps_every_pixel_and_webp_decodes_as_torchvision_does() -> None:
    assert torch.equal(image_text.decode_image(encoded(9, kind="PNG")), picture(9))
    webp = encoded(9, kind="WEBP")
    assert (image_text.decode_image(webp).int() - torchvision_pixels(webp).int()).abs().max() <= 3


def test_a_picture_of_a_billion_pixels_is_unreadable(tmp_path: Path) -> None:
    """Only its header says so; Pillow refuses to decode it, and training goes on without it."""
    size = struct.pack(">II", 32_000, 32_000) + b"\x08\x02\x00\x00\x00"
    chunks = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", size), (b"IDAT", zlib.compress(b"")))
    )
    shard = raw_tar(tmp_path / "huge.tar", {"a.png": b"\x89PNG\r\n\x1a\n" + chunks, "a.txt": b"a"})
    found = pairs_of([shard])[SampleKey(0, 0)]
    assert isinstance(found, Unreadable) and "exceeds limit" in found.cause


def test_encode_jpeg_keeps_the_picture_and_gives_the_same_bytes() -> None:
    data = image_text.encode_jpeg(picture(9))
    assert data == image_text.encode_jpeg(picture(9))
    assert (torchvision_pixels(data).int() - picture(9).int()).abs().float().mean() < 2


def test_augmentation_is_a_function_of_seed_epoch_and_index(tmp_path: Path) -> None:
    shards = made_shards(tmp_path)
    first, second = (pairs_of(shards, augment=True, seed=1), pairs_of(shards, augment=True, seed=1))
    other = pairs_of(shards, augment=True, seed=2)
    images = [readable(first[SampleKey(epoch, 4)]).image for epoch in range(5)]
    assert all(torch.equal(image, readable(second[SampleKey(e, 4)]).image) for e, image in enumerate(images))
    assert len({image.numpy().tobytes() for image in images}) > 2
    assert any(not torch.equal(image, readable(other[SampleKey(e, 4)]).image) for e, image in enumerate(images))


def test_flips_are_drawn_with_their_probability(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", pairs=made_pairs(0, 1))
    options = {"image_size": 16, "seed": 0, "augment": True, "crop_scale": (1.0, 1.0)}
    plain = PairDataset([tmp_path / "0.tar"], **options)
    flipped = PairDataset([tmp_path / "0.tar"], **options, flip_probability=0.25)
    equal = []
    for epoch in range(200):
        before, after = (readable(d[SampleKey(epoch, 0)]).image for d in (plain, flipped))
        equal.append(torch.equal(before, after))
        assert equal[-1] or torch.equal(before.flip(-1), after)
    assert 30 <= equal.count(False) <= 70  # 50 expected, standard deviation 6


def test_interpolation_of_the_resize(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", pairs=made_pairs(0, 1))
    options = {"image_size": 16, "seed": 0, "augment": False}
    bilinear = readable(PairDataset([tmp_path / "0.tar"], **options)[SampleKey(0, 0)]).image
    bicubic = readable(PairDataset([tmp_path / "0.tar"], **options, interpolation="bicubic")[SampleKey(0, 0)]).image
    source = torchvision_pixels(jpeg(0))
    side = min(source.shape[-2:])
    box = Box((source.shape[-2] - side) // 2, (source.shape[-1] - side) // 2, side, side)
    assert torch.equal(bicubic, resize_crop(source, box=box, size=16, interpolation="bicubic"))
    assert not torch.equal(bicubic, bilinear)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_through_the_loader(tmp_path: Path, workers: int) -> None:
    dataset = pairs_of(made_shards(tmp_path), augment=True)
    readable(dataset[SampleKey(0, 0)])  # opens a file before the workers are forked
    order = Order(num_samples=12, batch_size=5, seed=0)
    found = batches(dataset, order=order, first_step=0, last_step=4, workers=workers, collate=list)
    for step, (batch, unreadable) in enumerate(found):
        expected = [readable(dataset[key]) for key in order.batch(step)]
        assert unreadable == []
        assert [(p.key, p.caption) for p in batch] == [(p.key, p.caption) for p in expected]
        assert all(torch.equal(p.image, q.image) for p, q in zip(batch, expected, strict=True))


def test_a_copy_for_another_process_starts_without_open_files(tmp_path: Path) -> None:
    dataset = pairs_of(made_shards(tmp_path))
    expected = readable(dataset[SampleKey(0, 8)])
    copy = pickle.loads(multiprocessing.reduction.ForkingPickler.dumps(dataset))
    assert len(dataset._files._open) == 1
    assert len(copy._files._open) == 0
    assert torch.equal(readable(copy[SampleKey(0, 8)]).image, expected.image)


def test_no_more_files_are_open_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_text, "MAX_OPEN_SHARDS", 2)
    dataset = pairs_of(made_shards(tmp_path, sizes=(1, 1, 1, 1)))
    keys = [readable(dataset[SampleKey(0, index)]).key for index in (0, 1, 2, 3, 0, 3)]
    assert keys == [f"{n:09d}" for n in (0, 1, 2, 3, 0, 3)]
    assert [path.name for path in dataset._files._open] == ["train-00000.tar", "train-00003.tar"]


def count_scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    scanned: list[Path] = []
    scan = image_text._scan_shard

    def counted(shard: Path) -> image_text._Part:
        scanned.append(shard)
        return scan(shard)

    monkeypatch.setattr(image_text, "_scan_shard", counted)
    return scanned


def test_the_second_opening_scans_nothing(tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = made_shards(tmp_path)
    scanned = count_scans(monkeypatch)
    first = index_shards(shards)
    assert scanned == shards
    kept = {path: path.stat().st_mtime_ns for path in cache_folder.iterdir()}
    second = index_shards(shards)
    assert scanned == shards
    assert {path: path.stat().st_mtime_ns for path in cache_folder.iterdir()} == kept
    assert len(kept) == 2
    assert first.keys.tolist() == second.keys.tolist()
    assert np.array_equal(first.spans, second.spans)


def test_a_changed_shard_is_scanned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = made_shards(tmp_path)
    index_shards(shards)
    scanned = count_scans(monkeypatch)
    os.utime(shards[1], ns=(1, 1))
    index_shards(shards)
    assert scanned == [shards[1]]
    write_shard(shards[0], pairs=made_pairs(50, 59))
    assert index_shards(shards).key(8) == "000000058"
    assert scanned == [shards[1], shards[0]]


@pytest.mark.parametrize("damage", ["emptied", "cut", "garbled", "one byte"])
def test_a_damaged_kept_index_is_built_again(
    tmp_path: Path, cache_folder: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    shards = made_shards(tmp_path, sizes=(7,))
    sound = index_shards(shards)
    (kept,) = cache_folder.iterdir()
    whole = kept.read_bytes()
    at = whole.index(b"000000003") + 4  # inside the array of keys
    damaged = {
        "emptied": b"",
        "cut": whole[: len(whole) // 2],
        "garbled": b"no index at all",
        "one byte": whole[:at] + b"7" + whole[at + 1 :],
    }
    kept.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING):
        again = index_shards(shards)
    assert "is damaged" in caplog.text
    assert again.keys.tolist() == sound.keys.tolist()
    assert np.array_equal(again.spans, sound.spans)
    assert kept.read_bytes() == whole


def test_an_index_that_cannot_be_kept_is_logged_and_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    index = index_shards(made_shards(tmp_path), cache_folder=tmp_path / "file" / "below")
    assert len(index) == 12
    assert caplog.text.count("cannot be kept") == 2


def test_unreadable_pairs_name_shard_key_and_cause(tmp_path: Path) -> None:
    shard = raw_tar(
        tmp_path / "0.tar",
        {
            "good.jpg": jpeg(1), "good.txt": b"fine\n",
            "broken.jpg": jpeg(2)[:100], "broken.txt": b"a",
            "noise.png": b"not a picture", "noise.txt": b"a",
            "empty.jpg": b"", "empty.txt": b"a",
            "silent.jpg": jpeg(3),
            "blank.jpg": jpeg(4), "blank.txt": b" \n",
            "blind.txt": b"a",
            "json.jpg": jpeg(5), "json.json": b'{"captions": ["a"',
            "list.jpg": jpeg(5), "list.json": b"[1]",
            "number.jpg": jpeg(5), "number.json": b'{"captions": [1]}',
        },
    )  # fmt: skip
    dataset = pairs_of([shard])
    samples = {dataset.index.key(i): dataset[SampleKey(0, i)] for i in range(len(dataset))}
    assert readable(samples["good"]).captions == ("fine",)
    assert "cannot be decoded" in cause(samples["broken"])
    assert "cannot be decoded" in cause(samples["noise"])
    assert "its image is empty" in cause(samples["empty"])
    assert "no caption" in cause(samples["silent"])
    assert "no caption" in cause(samples["blank"])
    assert "no image" in cause(samples["blind"])
    assert "caption cannot be read: Expecting" in cause(samples["json"])
    assert "must hold an object, got list" in cause(samples["list"])
    assert "must be a list of texts" in cause(samples["number"])
    assert str(shard) in cause(samples["broken"])
    assert len(samples) == 10


def test_captions_come_from_the_list_then_the_text_then_the_one(tmp_path: Path) -> None:
    png = encoded(1, kind="PNG")
    shard = raw_tar(
        tmp_path / "0.tar",
        {
            "a/1.JPG": jpeg(1), "a/1.txt": b"text", "a/1.json": b'{"caption": "one", "captions": ["x", " y "]}',
            "a/2.png": png, "a/2.txt": "gr\u00fcn".encode(), "a/2.json": b'{"caption": "one", "captions": []}',
            "a/3.jpeg": jpeg(1), "a/3.json": b'{"caption": "one"}',
            "a/.hidden": b"", "readme.md": b"",
        },
    )  # fmt: skip
    dataset = pairs_of([shard])
    pairs = [readable(dataset[SampleKey(0, i)]) for i in range(len(dataset))]
    assert [(p.key, p.captions) for p in pairs] == [("a/1", ("x", "y")), ("a/2", ("grün",)), ("a/3", ("one",))]
    assert torch.equal(pairs[1].image, resize_crop(picture(1), box=Box(0, 4, 24, 24), size=16))


def test_a_shard_cut_after_indexing_is_unreadable_and_not_garbage(tmp_path: Path) -> None:
    shards = made_shards(tmp_path, sizes=(4,))
    dataset = pairs_of(shards)
    os.truncate(shards[0], int(dataset.index.spans[3, 0, 0]) + 10)
    readable(dataset[SampleKey(0, 0)])
    assert "the shard was cut after indexing" in cause(dataset[SampleKey(0, 3)])


def test_wrong_shards_are_sentences(tmp_path: Path) -> None:
    shards = made_shards(tmp_path)
    write_shard(tmp_path / "again.tar", pairs=made_pairs(0, 2))
    with pytest.raises(ValueError, match=r"Key '000000000' stands in .*train-00000.tar and in .*again.tar"):
        index_shards([shards[0], tmp_path / "again.tar"])
    with pytest.raises(ValueError, match=r"holds key 'x' twice \(second time: x.png\)"):
        index_shards([raw_tar(tmp_path / "twice.tar", {"x.jpg": jpeg(1), "x.png": jpeg(1)})])
    with pytest.raises(ValueError, match="holds no images"):
        index_shards([raw_tar(tmp_path / "text.tar", {"x.txt": b"a"})])
    (tmp_path / "no.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(ValueError, match=r"no.tar is not a whole, uncompressed tar file"):
        index_shards([tmp_path / "no.tar"])
    with pytest.raises(ValueError, match="There is no shard"):
        index_shards([tmp_path / "absent.tar"])
    with pytest.raises(ValueError, match="at least one shard"):
        index_shards([])


def test_a_shard_cut_or_damaged_anywhere_is_a_sentence(tmp_path: Path) -> None:
    """Cut at every block, and inside blocks, up to the end mark; a header overwritten. tarfile alone misses some."""
    whole = made_shards(tmp_path, sizes=(3,))[0].read_bytes()
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    shard = tmp_path / "damaged.tar"
    for length in [*range(0, end + 1, 512), *range(256, end, 512)]:
        shard.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"damaged.tar is (cut or damaged at byte|not a whole)"):
            index_shards([shard])
    shard.write_bytes(whole[: last.offset] + b"?" * 512 + whole[last.offset_data :])
    with pytest.raises(ValueError, match=f"cut or damaged at byte {last.offset}"):
        index_shards([shard])


def test_open_shards(tmp_path: Path) -> None:
    shards = made_shards(tmp_path, sizes=(1, 1, 1))
    (tmp_path / "notes.txt").touch()
    assert open_shards(shards[1]) == [shards[1]]
    assert open_shards(tmp_path) == shards
    assert open_shards(f"{tmp_path}/train-*.tar") == shards
    assert open_shards(f"{tmp_path}/train-0000[12].tar") == shards[1:]
    assert open_shards(f"{tmp_path}/train-{{00001..00002}}.tar") == shards[1:]
    with pytest.raises(ValueError, match=r"2 of the 3 shards of .* are missing, first .*train-00003.tar"):
        open_shards(f"{tmp_path}/train-{{00002..00004}}.tar")
    for spec in (f"{tmp_path}/val-*.tar", tmp_path / "absent.tar", tmp_path / "cache", f"{tmp_path}/t-{{3..2}}.tar"):
        (tmp_path / "cache").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="No shards at"):
            open_shards(spec)


def test_write_shard_is_img2datasets_layout_and_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, pairs=made_pairs(0, 3))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames()[3:6] == ["000000001.jpg", "000000001.txt", "000000001.json"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar.getmembers()} == {(0, 0, 0, "", 0o644)}
        assert tar.extractfile("000000001.jpg").read() == jpeg(1)
        assert tar.extractfile("000000001.txt").read() == b"caption 0 of 1"
        assert json.loads(tar.extractfile("000000001.json").read()) == {
            "caption": "caption 0 of 1",
            "captions": ["caption 0 of 1", "caption 1 of 1"],
            "key": "000000001",
            "status": "success",
            "width": 32,
            "height": 24,
        }
    with pytest.raises(ValueError, match="key without dots"):
        write_shard(tmp_path / "c.tar", pairs=[("a.b", jpeg(0), ["x"])])
    with pytest.raises(ValueError, match="some caption"):
        write_shard(tmp_path / "c.tar", pairs=[("a", jpeg(0), [])])
    assert not (tmp_path / "c.tar").exists()


def test_options_without_sense_are_sentences(tmp_path: Path) -> None:
    shards = made_shards(tmp_path)
    with pytest.raises(ValueError, match=r"flip_probability 0.5 has no effect without augment=True"):
        PairDataset(shards, image_size=8, seed=0, augment=False, flip_probability=0.5)
    with pytest.raises(ValueError, match=r"flip_probability must lie in \[0, 1\], got 2"):
        PairDataset(shards, image_size=8, seed=0, augment=True, flip_probability=2.0)
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        PairDataset(shards, image_size=0, seed=0, augment=True)


def test_all_captions_in_order_and_none_of_a_pair_without(tmp_path: Path) -> None:
    """The shards are counted one by one while they are indexed."""
    shards = made_shards(tmp_path)
    counted: list[int] = []
    dataset = PairDataset(shards, image_size=16, seed=0, augment=False, on_shard=lambda: counted.append(1))
    expected = [tuple(captions) for _, _, captions in made_pairs(0, 12)]
    assert list(dataset.all_captions()) == expected and len(counted) == len(shards)
    alone = pairs_of([raw_tar(tmp_path / "silent.tar", {"a.jpg": jpeg(1), "b.jpg": jpeg(2), "b.txt": b"two"})])
    assert list(alone.all_captions()) == [(), ("two",)]
