"""Concepts: channels with their reference examples, directions and subspaces of a layer that carry relevance."""

from .references import Ranking, References, crops, receptive_field, references
from .subspaces import Components, Moments, Subspaces, drsa, prca, projector, subspace_relevance

__all__ = [
    "Components",
    "Moments",
    "Ranking",
    "References",
    "Subspaces",
    "crops",
    "drsa",
    "prca",
    "projector",
    "receptive_field",
    "references",
    "subspace_relevance",
]
