"""Where a frame stands in its clip, added to its tokens: without it a pooler sees a set of frames, and no order."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

LONGEST_WAVELENGTH = 10_000.0  # over 2 pi frames (Vaswani et al., 1706.03762, section 3.5)


class TimeEmbedding(nn.Module):
    """A vector for each frame of a clip: learned for `num_frames` frames, or sines and cosines, which learn nothing.

    A clip of another number of frames covers the same span of time: frame t of T stands at
    (t + 1/2) * num_frames / T - 1/2 among the frames trained with, the middle of its share. Between two of these a
    learned embedding is interpolated linearly, and beyond the first and the last it stays as it is; sines are
    evaluated there.
    """

    def __init__(self, dim: int, *, kind: Literal["learned", "sincos"], num_frames: int) -> None:
        super().__init__()
        if kind == "sincos" and dim % 2:
            raise ValueError(f"A sine and a cosine need an even width; got {dim}: take time_embedding learned.")
        self.dim = dim
        self.num_frames = num_frames
        self.embedding: nn.Parameter | None = None
        if kind == "learned":
            self.embedding = nn.Parameter(torch.empty(num_frames, dim))
            nn.init.trunc_normal_(self.embedding, std=0.02)  # as timm's position embeddings

    def forward(
        self, tokens: Float[Tensor, "batch frames tokens dim"], *, mask: Bool[Tensor, "batch frames"] | None
    ) -> Float[Tensor, "clips frames dim"]:
        """What to add to the tokens of each frame: one row for all clips, or with `mask` one a clip.

        `mask` is True for real frames; these alone are counted. At least fp32.
        """
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        if mask is None:
            mask = torch.ones(1, tokens.shape[1], dtype=torch.bool, device=tokens.device)
        rank, count = mask.cumsum(dim=1) - 1, mask.sum(dim=1, keepdim=True)
        positions = (rank.to(dtype) + 0.5) * self.num_frames / count - 0.5
        return sincos(positions, dim=self.dim) if self.embedding is None else _interpolate(self.embedding, positions)


def sincos(positions: Float[Tensor, "*places"], *, dim: int) -> Float[Tensor, "*places dim"]:
    """sin(p w_i) for the first half of the features and cos(p w_i) for the other, w_i = 10000^(-2i / dim)."""
    exponents = torch.arange(0, dim, 2, dtype=positions.dtype, device=positions.device) / dim
    angles = positions.unsqueeze(-1) * LONGEST_WAVELENGTH**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _interpolate(
    embedding: Float[Tensor, "trained dim"], positions: Float[Tensor, "clips frames"]
) -> Float[Tensor, "clips frames dim"]:
    """The rows at fractional places, by gathers and no boolean indexing, so that it compiles and has a gradient."""
    places = positions.clamp(0, len(embedding) - 1)
    before = places.floor().long()
    after = (before + 1).clamp(max=len(embedding) - 1)
    share = (places - before).unsqueeze(-1)
    return embedding[before] * (1 - share) + embedding[after] * share
