"""Joules: one file per source, read the same way (source.py), a model for where there is none, and the meter.

Where this machine has a counter it is read; where it has none a model may answer, and says so (model.py). What is not
known is None with a reason, never 0.
"""
