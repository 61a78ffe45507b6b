"""Retrieval by the command line on drawn pictures, against a loop over single pictures and captions."""

import json
from pathlib import Path

import pytest
import torch

from coca_video.cli.__main__ import main
from coca_video.data.image_text import PairDataset, open_shards
from coca_video.data.loader import SampleKey
from coca_video.hub import save
from coca_video.models.coca import CoCa, CoCaConfig
from coca_video.tokenizer import train_tokenizer


def test_against_one_by_one(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = CoCa(CoCaConfig.tiny()).eval()
    dataset = PairDataset(open_shards(pictures), image_size=48, seed=0, augment=False)
    pairs = [dataset[SampleKey(0, index)] for index in range(len(dataset))]
    tokenizer = train_tokenizer((caption for pair in pairs for caption in pair.captions), vocab_size=512, max_length=32)
    save(tmp_path / "model", model=model, tokenizer=tokenizer)
    with torch.no_grad():
        images = torch.cat([model.encode_image((pair.image.float()[None] / 255 - 0.5) / 0.5)[0] for pair in pairs])
        texts, owners = [], []
        for index, pair in enumerate(pairs):
            for caption in pair.captions:
                tokens, mask = tokenizer.encode([caption])
                texts.append(model.encode_text(tokens, mask=mask)[0])
                owners.append(index)
    similarity = images.double() @ torch.cat(texts).double().T
    hits = dict.fromkeys((1, 5, 10), 0)
    for column, owner in enumerate(owners):
        rank = int((similarity[:, column] > similarity[owner, column]).sum())
        for k in hits:
            hits[k] += rank < k
    arguments = ["evaluate", str(pictures), "--model", str(tmp_path / "model"), "--device", "cpu"]
    assert main([*arguments, "--batch-size", "7"]) == 0
    (path,) = (tmp_path / "model" / "evaluation").glob("*.json")
    document = json.loads(path.read_text())
    assert (document["num_images"], document["num_captions"]) == (24, 72)
    for k, hit in hits.items():
        assert document[f"text_to_image_recall@{k}"] == pytest.approx(hit / 72)
    assert f"{document['image_to_text_recall@5']:.4f}" in capsys.readouterr().out
    assert main(arguments) == 0 and len(list(path.parent.glob("*.json"))) == 1
    assert main([*arguments, "--precision", "bf16"]) == 0  # another result: the first stays as it is
    assert json.loads(path.read_text()) == document
    assert sorted(other.name for other in path.parent.glob("*.json")) == [f"{path.stem}-2.json", path.name]
    capsys.readouterr()
    assert main([*arguments, "--num-frames", "3"]) == 2
    assert "--num-frames is for clips" in capsys.readouterr().err
