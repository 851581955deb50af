"""PEMT: a frozen T5 adapted to a new task by mixing experts learned on other tasks.

What `__init__.pyi` lists is the public interface; importing it costs nothing until it is used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
