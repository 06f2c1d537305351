"""Kaggle: push the series there and bring its runs home (the command line), and both ends of a session (a kernel)."""

from utils import surface

__all__, __getattr__ = surface(__name__, attach="resume_from_attached finish_session")
