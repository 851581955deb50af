"""A job's processes: the only package that imports accelerate or deepspeed; signals, watchdog, exit."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
