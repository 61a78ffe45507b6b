"""To the Hub: a model folder with its card, in one commit."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from coca_video.hub.card import PUBLIC_SOURCE, find_results, model_card, read_measurement
from coca_video.hub.folder import CLASSES, CONFIG, TOKENIZER, WEIGHTS, find_model, load_folder
from coca_video.hub.sources import hub_errors
from coca_video.models.image import TimmConfig


def push(
    folder: Path,
    *,
    repo: str,
    license: str | None = None,
    private: bool = False,
    results: Sequence[Path] | None = None,
    datasets: Sequence[str] = (),
) -> str:
    """Uploads the model of a run, or of a model folder, with its card to `repo` (`org/name`); returns its address.

    `license` is that of the weights; the one that the model folder records when None, and ValueError when it records
    none. The card carries the figures of `results`; when None, those of the run's `test.json` and of the `evaluation/`
    folders beside the model. `datasets` are the Hub's names of what the model was trained on. Nothing local is changed.
    """
    model_folder = find_model(folder)
    saved = load_folder(model_folder)
    license = license or saved.license
    if license is None:
        raise ValueError(f"{folder} does not say under which licence its weights are: give one, such as apache-2.0.")
    license = license.strip().lower()
    if not re.fullmatch(r"[\w.+-]+", license):
        raise ValueError(f"Expected the short name of a licence, such as apache-2.0; got {license!r}.")
    image = saved.encoder.config
    if isinstance(image, TimmConfig) and image.name.startswith("local-dir:"):
        raise ValueError(f"{folder} can only be rebuilt with {image.name}, which nobody else has; push that one first.")
    files = find_results(model_folder) if results is None else results
    measurements = [read_measurement(path) for path in files]
    card = model_card(saved, repo=repo, license=license, measurements=measurements, datasets=datasets)
    document = {**json.loads((model_folder / CONFIG).read_text()), "license": license}
    if saved.source is not None and not PUBLIC_SOURCE.fullmatch(saved.source):
        del document["source"]
    operations = [
        CommitOperationAdd("README.md", card.encode()),
        CommitOperationAdd(CONFIG, (json.dumps(document, indent=2) + "\n").encode()),
        *(
            CommitOperationAdd(name, model_folder / name)
            for name in (WEIGHTS, CLASSES, TOKENIZER)
            if (model_folder / name).is_file()
        ),
    ]
    api = HfApi(library_name="coca_video")
    with hub_errors(f"hf:{repo}"):
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.create_commit(repo, operations, commit_message="Model and card")
    return str(address)
