"""A user's prefix beside a task's, trained apart: what each adds, and whose prefix it is.

The task is to say a neutral sentence as a tweet (the form of LaMP-7, Salemi et al., 2023,
https://arxiv.org/abs/2304.11406), learned from the pairs of some users. Others have a prefix from
their own earlier tweets alone; their pairs are what is measured: under the task, under the user,
under both, and under both with another user's prefix. DATA holds `authors_tweets.*.jsonl.gz`.
"""

import argparse
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rouge_score.rouge_scorer import RougeScorer
from sklearn.feature_extraction.text import TfidfVectorizer

from controlprefix import Example, Request
from controlprefix.evaluation.metrics import bootstrap_mean

from lib.datasets import read_rows
from lib.models import add_model_options, engine, load_from
from lib.results import ResultFile, arguments
from lib.tables import Column, table

TASK = "tweet"
DECODER = "tweets"
MIN_TWEETS = 12
COLUMNS: tuple[Column, ...] = (
    ("task", "task", 3),
    ("user", "user", 3),
    ("both", "both", 3),
    ("half", "both, user at .5", 3),
    ("another's", "task, another user", 3),
    ("personal", "personal", 3),
    ("low", "from", 3),
    ("high", "to", 3),
    ("rougeL", "ROUGE-L, task", 1),
    ("rougeL, both", "ROUGE-L, both", 1),
    ("own", "own style", 2),
    ("own, another's", "own style, another user", 2),
)


class Tweeter(NamedTuple):
    """A user: earlier tweets, and pairs of a neutral sentence and the tweet."""

    tweets: Sequence[str]
    pairs: Sequence[tuple[str, str]]


def tweeters(data: Path, splits: Sequence[str], least: int) -> dict[str, Tweeter]:
    """Users with at least so many tweets."""
    return {
        row["author"]: Tweeter(
            row["profile"], [(task["input"], task["output"]) for task in row["tasks"]]
        )
        for split in splits
        for row in read_rows(data, "authors_tweets", split)
        if len(row["profile"]) >= least
    }


def pair_row(pair: tuple[str, str], **names: Any) -> Example:
    sentence, tweet = pair
    return Example(prompt=f"Write this as a tweet: {sentence}", completion=tweet, **names)


def _user(name: str | None, strength: float) -> dict[str, Any]:
    """Fields of a row with a user, if there is one."""
    return {} if name is None else {"user": name, "strengths": {"user": strength}}


class Study:
    """The users, and what is measured of their prefixes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cp = engine(load_from(options))
        others = tweeters(options.data, ("train",), MIN_TWEETS)
        names = random.Random(0).sample(sorted(others), min(options.users, len(others)))
        self.decoder_tweets = {name: others[name].tweets[:MIN_TWEETS] for name in names}
        self.task_rows = [
            pair_row(pair, task=TASK)
            for user in tweeters(options.data, ("train",), 1).values()
            for pair in user.pairs
        ]
        measured = tweeters(options.data, ("dev", "test"), MIN_TWEETS)
        chosen = random.Random(1).sample(sorted(measured), min(options.measured, len(measured)))
        self.users = {name: measured[name] for name in chosen}
        self.swapped = dict(zip(chosen, chosen[1:] + chosen[:1], strict=True))
        self.vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True)
        self.profiles = self.vectorizer.fit_transform(
            ["\n".join(user.tweets) for user in self.users.values()]
        )

    def train_task(self) -> None:
        """Train the task prefix, and the decoder of user codes."""
        self.cp.train(
            self.task_rows,
            learn="task",
            num_slots=self.options.num_slots,
            steps=self.options.steps,
            validation=0,
            progress=False,
        )
        self.cp.learn_decoder(
            self.decoder_tweets,
            name=DECODER,
            num_slots=self.options.num_slots,
            epochs=self.options.epochs,
            validation=0,
            progress=False,
        )

    # --- ways to make a user's prefix ---

    def enrolled(self) -> None:
        """A code that is predicted from the tweets."""
        for name, user in self.users.items():
            self.cp.enroll(name, user.tweets, decoder=DECODER)

    def matched(self) -> None:
        """Slots matched to all of the tweets, without training."""
        for name, user in self.users.items():
            self.cp.enroll(name, user.tweets, num_slots=self.options.num_slots)

    def trained(self) -> None:
        """Slots trained on the tweets."""
        self.train_users()

    def trained_codes(self) -> None:
        """Codes trained on the tweets."""
        self.train_users(decoder=DECODER)

    def trained_beside_the_task(self) -> None:
        """Slots trained on the tweets with the task's prefix beside them."""
        rows = [
            Example(prompt="", raw=True, completion=tweet, task=TASK, user=name)
            for name, user in self.users.items()
            for tweet in user.tweets
        ]
        self.cp.train(
            rows,
            learn="user",
            parameterization="direct",
            num_slots=self.options.num_slots,
            epochs=3,
            validation=0,
            progress=False,
        )

    def train_users(self, **options: Any) -> None:
        """`train_users` on the tweets."""
        tweets = {name: user.tweets for name, user in self.users.items()}
        if not options:
            options = {"num_slots": self.options.num_slots}
        report = self.cp.train_users(tweets, epochs=3, validation=0, progress=False, **options)
        if report.failed:
            raise SystemExit(f"users that could not be trained: {report.failed}")

    # --- figures ---

    def measure(self) -> dict[str, float]:
        """Figures of the users' prefixes that are stored now."""
        own = {name: name for name in self.users}
        nats = {
            "task": self.nats({}, TASK),
            "user": self.nats(own, None),
            "both": self.nats(own, TASK),
            "half": self.nats(own, TASK, 0.5),
            "another's": self.nats(self.swapped, TASK),
        }
        gaps = [other - both for both, other in zip(nats["both"], nats["another's"], strict=True)]
        interval = bootstrap_mean(gaps)
        task, both = self.texts({}), self.texts(own)
        figures = {name: statistics.fmean(values) for name, values in nats.items()}
        figures |= {"personal": interval.mean, "low": interval.low, "high": interval.high}
        figures |= {"rougeL": self.rouge(task), "rougeL, both": self.rouge(both)}
        figures |= {
            "own": self.nearer_to_own(both),
            "own, another's": self.nearer_to_own(self.texts(self.swapped)),
        }
        return {name: round(value, 5) for name, value in figures.items()}

    def nats(
        self, users: Mapping[str, str], task: str | None, strength: float = 1.0
    ) -> list[float]:
        """Nats per token of each user's pairs."""
        names = {} if task is None else {"task": task}
        rows = [
            [pair_row(pair, **names, **_user(users.get(name), strength)) for pair in user.pairs]
            for name, user in self.users.items()
        ]
        scores = iter(self.cp.score([row for own in rows for row in own]))
        return [
            -sum(s.log_likelihood for s in own) / sum(s.num_tokens for s in own)
            for own in ([next(scores) for _ in of_user] for of_user in rows)
        ]

    def texts(self, users: Mapping[str, str]) -> list[str]:
        """A text for the first pair of each user, by the task and a user's prefix."""
        requests = [
            Request(
                **pair_row(user.pairs[0]).model_dump(include={"prompt"}),
                task=TASK,
                user=users.get(name),
                max_new_tokens=self.options.new_tokens,
            )
            for name, user in self.users.items()
        ]
        return [c.text for c in self.cp.generate(requests, batch_size=32)]

    def rouge(self, texts: Sequence[str]) -> float:
        """Mean ROUGE-L F against the tweets that were written."""
        scorer = RougeScorer(["rougeL"])
        pairs = [user.pairs[0] for user in self.users.values()]
        return 100 * statistics.fmean(
            scorer.score(tweet, text)["rougeL"].fmeasure
            for (_, tweet), text in zip(pairs, texts, strict=True)
        )

    def nearer_to_own(self, texts: Sequence[str]) -> float:
        """How often a text is more like its user's tweets than another's (chance: one half).

        By the cosine of character n-grams; the mean over all other users.
        """
        similarities = (self.vectorizer.transform(texts) @ self.profiles.T).toarray()
        return statistics.fmean(
            float(row[i] > value)
            for i, row in enumerate(similarities)
            for j, value in enumerate(row)
            if j != i
        )


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    options = results["options"]
    return "\n\n".join(
        [
            "# A user beside a task",
            f"{results['model']}; a task prefix ({options['steps']} steps of 8 pairs of other "
            f"users) and prefixes of {options['measured']} users from 12 or more tweets of each, "
            f"trained apart, {options['num_slots']} slots each; codes by a decoder of "
            f"{options['users']} other users. Written by `{results['command']}` at commit "
            f"{results['commit']}, {results['date']}.",
            "Nats per token of the tweet that each user wrote, given a neutral sentence, under "
            "the task's prefix, the user's, both (the user's at full and at half strength), and "
            "the task's with another user's. "
            "**Personal**: the difference of the last two, the mean over users with a 95 % "
            "interval (bootstrap). **ROUGE-L** of greedy texts with that tweet. **Own style**: how "
            "often such a text is more like its user's tweets than like another user's, by "
            "character n-grams (chance: .50).",
            table("user's prefix", results["ways"], COLUMNS),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, resumable=True)
    add_model_options(parser)
    parser.add_argument("data", metavar="DATA", type=Path)
    parser.add_argument("--users", type=int, default=200, help="users the decoder is trained on")
    parser.add_argument("--measured", type=int, default=80, help="users that are measured")
    parser.add_argument("--steps", type=int, default=100, help="of the task prefix")
    parser.add_argument("--epochs", type=float, default=2.0, help="of the decoder's training")
    parser.add_argument("--num-slots", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=40)
    options = parser.parse_args(argv)
    study = Study(options)
    file = ResultFile(
        "user-and-task",
        options,
        settings=("users", "measured", "steps", "epochs", "num_slots", "new_tokens"),
        model=study.cp.frozen_model,
        page=page,
    )
    ways: dict[str, Callable[[], None]] = {
        "code, enrolled": study.enrolled,
        "code, trained": study.trained_codes,
        "matched to the texts": study.matched,
        "trained": study.trained,
        "trained beside the task": study.trained_beside_the_task,
    }
    if all(file.get("ways", name) for name in ways):
        return
    study.train_task()
    for name, way in ways.items():
        if file.get("ways", name) is None:
            way()
            file.set("ways", name, value=study.measure())


if __name__ == "__main__":
    main()
