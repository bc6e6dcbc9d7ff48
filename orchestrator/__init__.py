"""One owner for the GPU memory of a house: see README.md, then core/planner.py."""

__version__ = "0.1.0"
