"""A run from its configuration to its results: training of both stages, evaluation, prediction."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
