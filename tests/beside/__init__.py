"""The published code beside ours, on one machine: `python -m tests.beside CHECKOUT --python PYTHON`."""
