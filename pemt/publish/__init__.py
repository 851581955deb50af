"""A finished run as a folder for others: written, described, and used again in three lines of Python.

`pemt_model` knows nothing of `export`: who only asks a published model does not load the engine.
"""
