"""NVIDIA GPU backend; imported only when an array on a GPU is passed or its availability is asked for."""

from .device import availability

__all__ = ["availability"]
