"""Our numbers against those that the published code gave: `python -m tests.parity FILE ...`."""
