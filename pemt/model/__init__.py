"""PEMT on a stock T5, mT5, UMT5 or T5Gemma: experts, gates, prompts, how they are put in; and the baselines."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
