"""`pemt sweep`: methods × tasks × seeds from one YAML, with a table and a chart."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
