"""A small world that fits a laptop: PEMT's two stages, from a corpus to a table, in minutes."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
