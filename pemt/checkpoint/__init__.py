"""A run's folder while it trains: checkpoints of the trained state, lock and status."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
