"""The tasks: what each reads, what the model is asked, what counts as right."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
