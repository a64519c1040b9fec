"""The report of an evaluation of users: its page and its plot."""

import math
from typing import TYPE_CHECKING, Any

from controlprefix.evaluation.metrics import Estimate
from controlprefix.reports import few_rows_note, figure_of, render, to_png

if TYPE_CHECKING:
    from controlprefix.evaluation.users import UsersEvaluation


def harmed_text(result: "UsersEvaluation") -> str:
    """The share of users who are harmed, in words where nobody has rows enough."""
    return "cannot tell" if math.isnan(result.harmed.mean) else result.harmed.text(".0%")


def page_of(result: "UsersEvaluation", image: bytes) -> str:
    """The report as HTML, with its plot."""

    def interval(estimate: Estimate) -> str:
        return estimate.text("+.3f")

    summary = [
        ("gain ↑", interval(result.gain)),
        ("gain of the tenth of users with the least ↑", f"{result.worst_decile:+.3f}"),
        (
            "users whose texts are less likely with their own prefix, beyond chance ↓",
            harmed_text(result),
        ),
        *(
            [("users with too few rows to tell", str(result.num_too_few))]
            if result.num_too_few
            else []
        ),
        *(
            (f"gain, {grouping} {group}", interval(gain))
            for grouping, groups in result.groups.items()
            for group, gain in groups.items()
        ),
    ]
    users = [
        (
            name,
            user.num_rows,
            interval(user.gain),
            "harmed" if user.is_harmed else "helped" if user.gain.low > 0 else "cannot tell",
            interval(user.gain_over_none),
            f"{user.off_context:.3f}",
        )
        for name, user in sorted(result.users.items(), key=lambda item: item[1].gain.mean)
    ]
    return render(
        "users.html",
        {"plot": image},
        result=result,
        about=result.about,
        few=few_rows_note(sum(user.num_rows for user in result.users.values())),
        summary_header=("", "nats per token, or share"),
        summary=summary,
        user_header=(
            "user",
            "rows",
            ("gain ↑", "over other users' prefixes, nats per token"),
            ("in words", "whether it differs from 0 by more than chance"),
            ("gain over none ↑", "over no user prefix, nats per token"),
            ("off context ↓", "how much it changes answers that are not about the user (KL, nats)"),
        ),
        users=users,
    )


def plot_of(evaluation: "UsersEvaluation") -> bytes:
    """The gain of each user, in order, as PNG."""
    figure: Any = figure_of((6, 3.5))
    axes = figure.subplots()
    results = sorted(evaluation.users.values(), key=lambda result: result.gain.mean)
    places = range(len(results))
    axes.axhline(0, color="0.6", linewidth=1)
    with_interval = [(i, r.gain) for i, r in enumerate(results) if r.gain.has_interval]
    axes.vlines(
        [i for i, _ in with_interval],
        [gain.low for _, gain in with_interval],
        [gain.high for _, gain in with_interval],
        color="0.8",
    )
    axes.plot(places, [r.gain.mean for r in results], "o", markersize=3)
    axes.set(xlabel="users, by gain", ylabel="gain over other users' prefixes, nats/token")
    return to_png(figure)
