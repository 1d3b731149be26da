"""The experiments: one config per table and figure, run with ``python -m tasks``."""
