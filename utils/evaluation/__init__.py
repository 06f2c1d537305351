"""What both models are asked, what they answered, and what the difference lets one say."""

from importlib import import_module

_SURFACE = {
    "any_letter": "answer_parsing",
    "ask": "own_question",
    "build_questions": "questions",
    "check_batching": "generate",
    "collect_references": "questions",
    "compare_models": "compare",
    "detectable_difference": "statistics",
    "evaluate_model": "evaluate",
    "keep_ratings": "rating",
    "load_for_inference": "evaluate",
    "load_questions": "questions",
    "load_tutorial_question": "questions",
    "read_evaluation": "evaluate",
    "read_sentence": "results",
    "register": "questions",
    "require_adapter": "own_question",
    "show_p": "statistics",
    "tokenize_row": "loss",
    "write_comparison": "compare",
}
__all__ = list(_SURFACE)


def __getattr__(name):
    if name in _SURFACE:
        return getattr(import_module(f"{__name__}.{_SURFACE[name]}"), name)
    raise AttributeError(name)
