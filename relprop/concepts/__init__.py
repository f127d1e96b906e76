"""Concepts: directions and subspaces of a layer that carry the relevance of a decision."""

from .subspaces import Components, Moments, Subspaces, drsa, prca, projector, subspace_relevance

__all__ = ["Components", "Moments", "Subspaces", "drsa", "prca", "projector", "subspace_relevance"]
