"""What both models are asked, what they answered, and what the difference lets one say."""

from utils import surface

__all__, __getattr__ = surface(
    __name__,
    questions="build_questions collect_references load_questions load_tutorial_question questions_that_fit register",
    generate="check_batching",
    evaluate="evaluate_model load_for_inference read_evaluation",
    own_question="ask require_adapter",
    answer_parsing="any_letter",
    statistics="detectable_difference show_p",
    compare="compare_models write_comparison",
    rating="keep_ratings state_preference",
)
