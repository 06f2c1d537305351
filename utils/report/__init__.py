"""Pictures, pages and tracking: what people look at."""

from importlib import import_module

_SURFACE = {
    "Tracker": "tracking",
    "draw_comparison": "figures",
    "draw_lengths": "figures",
    "draw_loss": "figures",
    "executed_dir": "index",
    "stale_comparison": "index",
    "write_answers_page": "answers_page",
    "write_rating_page": "answers_page",
    "write_report": "index",
}
__all__ = list(_SURFACE)


def __getattr__(name):
    if name in _SURFACE:
        return getattr(import_module(f"{__name__}.{_SURFACE[name]}"), name)
    raise AttributeError(name)
