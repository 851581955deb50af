"""Folders of tensors on disk and on the hub: written atomically, with checksums."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
