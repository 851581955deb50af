"""The expert bank: entries in our own format, the published code's and PEFT's."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
