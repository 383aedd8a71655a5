"""The examples, each a program of its own: `python examples/NAME.py`."""
