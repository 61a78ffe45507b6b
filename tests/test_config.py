"""Configs as JSON: round trips with unions, and what is said when a file does not fit."""

import json

import pytest

from coca_video.config import differing_fields, from_json, to_json
from coca_video.models.coca import CoCaConfig
from coca_video.models.image import TimmConfig, VitConfig
from coca_video.models.video import VideoClassifierConfig


@pytest.mark.parametrize(
    "config",
    [
        CoCaConfig.tiny(),
        CoCaConfig.giant(),
        VideoClassifierConfig(image=TimmConfig(name="vit_tiny_patch16_224"), num_classes=3, num_frames=2),
        VideoClassifierConfig(image=VitConfig.tiny(), num_classes=3, num_frames=2),
    ],
)
def test_round_trip_through_text(config: CoCaConfig | VideoClassifierConfig) -> None:
    assert from_json(type(config), json.loads(json.dumps(to_json(config)))) == config


def test_union_members_carry_their_names() -> None:
    assert to_json(CoCaConfig.tiny())["image"]["type"] == "VitConfig"


def test_what_does_not_fit_is_a_sentence() -> None:
    data = to_json(CoCaConfig.tiny())
    with pytest.raises(ValueError, match=r"CoCaConfig.image: expected one of VitConfig, TimmConfig; got 'Other'"):
        from_json(CoCaConfig, {**data, "image": {**data["image"], "type": "Other"}})
    with pytest.raises(ValueError, match=r"CoCaConfig has no field \['colour'\]"):
        from_json(CoCaConfig, {**data, "colour": 1})
    with pytest.raises(ValueError, match=r"CoCaConfig.text: TextConfig .* needs \['width'\]"):
        from_json(CoCaConfig, {**data, "text": {k: v for k, v in data["text"].items() if k != "width"}})


def test_differing_fields_name_every_leaf() -> None:
    old = {"a": 1, "b": {"c": 2.0, "device": "cpu"}, "gone": True}
    new = {"a": 1, "b": {"c": 3.0, "device": "cuda"}}
    assert differing_fields(old, new, ignored=frozenset({"device"})) == ["b.c: 2.0 -> 3.0", "gone: true -> null"]
