"""A finished run as a folder for others: written, described, and used again in three lines of Python.

`pemt_model` knows nothing of `export`: who only asks a published model does not load the engine."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
