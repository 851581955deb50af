"""PEMT on real text with a small T5 that is pre-trained here: `python -m tests.real_text DATA`."""
