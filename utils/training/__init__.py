"""Training: `train_adapter(run, load_with_lora, make_trainer)` is all that notebook 03 needs."""

from utils import surface

__all__, __getattr__ = surface(__name__, launch="train_adapter")
