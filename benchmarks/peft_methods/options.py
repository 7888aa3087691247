"""What a study takes beside the options of a comparison, of which --budget and --steps are the centre."""

from examples.comparison.options import Parser


def add_study_options(parser: Parser, description: str | None) -> Parser:
    """The same parser with the axes and the search of a study, and a description of its own."""
    parser.description = description
    add = parser.add_argument_group("study").add_argument
    add("--budgets", type=int, nargs="+", default=[], help="further budgets, each at --steps steps")
    add("--step_counts", type=int, nargs="+", default=[], help="further numbers of steps, each at the budget --budget")
    add(
        "--search_only",
        action="store_true",
        help="choose the learning rates on the tuning split with the first seed, and read no test figure",
    )
    add(
        "--lr_refine",
        type=int,
        default=0,
        help="further learning rates for every method: beyond the edge of the grid where the best one is at an edge, "
        "else between the best one and the better of its neighbours",
    )
    add(
        "--lr_extend",
        type=int,
        default=0,
        help="after those, at most so many for methods whose best one is still at an edge",
    )
    add("--eval_steps", type=int, help="also evaluate on the tuning split every so many steps, for curves over time")
    add(
        "--reference",
        default="lora-linear-head",
        help="method to whose last tuning figure the others' time is measured, where --eval_steps is given",
    )
    return parser
