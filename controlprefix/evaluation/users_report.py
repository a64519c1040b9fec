"""UsersEvaluation: the result of an evaluation of users, with its page and its plot."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from controlprefix._io import finite
from controlprefix.evaluation.metrics import Estimate
from controlprefix.evaluation.revealed_groups import RevealedGroups
from controlprefix.reports import few_rows_note, figure_of, render, to_png, write_report


@dataclass(frozen=True, slots=True)
class UserResult:
    """What one user's prefix does for their own rows.

    Attributes:
        num_rows: Rows of the user.
        gain: By how many nats per token their rows are likelier with their prefix than with
            those of other users, a mean over rows.
        gain_over_none: The same over no user prefix.
        off_context: KL(without || with the prefix), nats per token, on what the model without
            the prefix answers to impersonal prompts; lower is better.
    """

    num_rows: int
    gain: Estimate
    gain_over_none: Estimate
    off_context: float

    @property
    def is_harmed(self) -> bool:
        """Whether the user's rows are less likely than with others' prefixes, beyond chance."""
        return self.gain.high < 0


@dataclass(frozen=True, slots=True)
class UsersEvaluation:
    """The distribution over users of what their prefixes do.

    Attributes:
        users: The results of each user.
        gain: Mean gain over users, with an interval over users.
        worst_decile: Mean gain of the tenth of the users with the lowest.
        harmed: Share of users who are harmed, of those who have an interval; NaN, from 0 to 1, if
            nobody has one.
        num_too_few: Users with too few rows for an interval.
        groups: Per grouping and group, the mean gain of its users.
        too_small: Groups with fewer users than are reported.
        about: What it was made with: model, store, command, date.
        revealed: Per grouping, how well users' groups are told from texts written under their
            prefixes, if texts were written.
    """

    users: dict[str, UserResult]
    gain: Estimate
    worst_decile: float
    harmed: Estimate
    num_too_few: int
    groups: dict[str, dict[str, Estimate]]
    too_small: tuple[str, ...]
    about: dict[str, Any]
    revealed: dict[str, RevealedGroups] = field(default_factory=dict)

    def save(self, folder: str | Path) -> Path:
        """Write `users.json`, `users.png` (the gain of each user, in order) and `users.html`.

        Returns:
            The HTML file.

        Raises:
            StoreError: If the folder cannot be written.
            MissingDependencyError: If matplotlib or jinja2 is not installed.
        """
        image = plot_of(self)
        results = json.dumps(finite(asdict(self)), indent=2) + "\n"
        html = page_of(self, image)
        write_report(folder, {"users.json": results, "users.png": image, "users.html": html})
        return Path(folder) / "users.html"


def harmed_text(result: UsersEvaluation) -> str:
    """The share of users who are harmed, in words where nobody has rows enough."""
    return "cannot tell" if math.isnan(result.harmed.mean) else result.harmed.text(".0%")


def page_of(result: UsersEvaluation, image: bytes) -> str:
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
        *(
            (f"{grouping}, {title} (chance {own.chance:.0%})", accuracy.text(".0%"))
            for grouping, own in result.revealed.items()
            for title, accuracy in (
                ("told from texts written with users' prefixes", own.written),
                ("told from texts to the same prompts without users", own.without),
                ("told from users' own rows", own.own),
            )
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


def plot_of(evaluation: UsersEvaluation) -> bytes:
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
