"""Memory, traffic and time of a run before it is paid for: formulas held against real runs by the tests."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
