"""Pictures, pages and tracking: what people look at."""

from utils import surface

__all__, __getattr__ = surface(
    __name__,
    figures="draw_comparison draw_lengths",
    answers_page="write_answers_page write_rating_page",
    tracking="Tracker",
    index="write_report",
)
