"""What a run is asked for: its fields, read from YAML, command line and DeepSpeed JSON. Needs no torch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
