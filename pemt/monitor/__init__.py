"""What a run tells while it trains, from rank 0: TensorBoard, log.jsonl and one progress bar."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
