"""A run: its directory, its six stages, and the driver that executes them."""

from utils import surface

__all__, __getattr__ = surface(__name__, stage="open_stage")
