"""Measurements on the exact shapes of the real model, with weights that need no download."""
