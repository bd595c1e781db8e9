"""Curvature followed along training: in a loop of one's own, Hugging Face's or Lightning's."""

from torchlinop.callbacks.hugging_face import hugging_face_callback
from torchlinop.callbacks.lightning import lightning_callback
from torchlinop.callbacks.measures import Density, Measure, TopEigenvalues, Trace
from torchlinop.callbacks.watch import CurvatureWatch

__all__ = [
    "CurvatureWatch",
    "Density",
    "Measure",
    "TopEigenvalues",
    "Trace",
    "hugging_face_callback",
    "lightning_callback",
]
