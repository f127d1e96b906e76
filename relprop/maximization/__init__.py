"""Activation maximisation: parametrisations of the input, priors and experts, random transformations."""

from . import transforms
from .ascent import ForEach, Maximum, maximize
from .boltzmann import GaussianRBM, fit_rbm
from .parametrisations import (
    IMAGENET_COLOURS,
    Code,
    Fourier,
    Maco,
    Parametrisation,
    Pixel,
    Several,
    bounded,
    colour_matrix,
    colours,
)
from .presets import dgn_am, facets, mean_normalized
from .priors import L2, Diversity, Gaussian, TotalVariation

__all__ = [
    "IMAGENET_COLOURS",
    "L2",
    "Code",
    "Diversity",
    "ForEach",
    "Fourier",
    "Gaussian",
    "GaussianRBM",
    "Maco",
    "Maximum",
    "Parametrisation",
    "Pixel",
    "Several",
    "TotalVariation",
    "bounded",
    "colour_matrix",
    "colours",
    "dgn_am",
    "facets",
    "fit_rbm",
    "maximize",
    "mean_normalized",
    "transforms",
]
