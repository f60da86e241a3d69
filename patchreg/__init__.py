"""Plug-in training engine on MMEngine for vision methods that look at an image patch by patch."""

__version__ = "0.1.0"
