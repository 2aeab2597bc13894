"""Attention as regression at test time: softmax, local linear and Parallax attention for any array framework."""

from ._version import __version__

__all__ = ["__version__"]
