"""`pemt report`: what runs did, as one page that needs no network, and as Markdown."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
