"""Users trained by two actors of a Ray cluster against one, a thread each, on this machine.

Both train the same users, in turns; seconds include the start of the actors, which load the model.
"""

import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import ray

from controlprefix.interop.ray_users import RayCluster

from lib.interleaved import Measures, compare
from lib.models import add_model_options, folder_of, load_from
from lib.results import arguments, save_comparisons

WORDS = "the sea is wide and we sail on it every day with old friends and new maps of far towns"


def texts_of(num_users: int, num_texts: int) -> dict[str, list[str]]:
    """Invented texts of users; what they say does not matter for speed."""
    rng = random.Random(0)
    words = WORDS.split()
    return {
        f"u{i}": [" ".join(rng.choices(words, k=24)) for _ in range(num_texts)]
        for i in range(num_users)
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=1)
    add_model_options(parser)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--texts", type=int, default=4, help="of each user")
    parser.add_argument("--steps", type=int, default=6, help="of each user's training")
    options = parser.parse_args(argv)
    texts = texts_of(options.users, options.texts)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model = folder_of(options, folder / "m")
            stores = iter(range(1 << 30))

            def trained_by(num_actors: int) -> Callable[[], Measures]:
                def train() -> Measures:
                    store = f"sqlite:///{folder}/{next(stores)}.db"
                    cluster = RayCluster(model=model, store=store, num_actors=num_actors)
                    report = cluster.train_users(
                        texts, num_slots=8, steps=options.steps, concurrent_users=4, progress=False
                    )
                    if report.failed:
                        raise SystemExit(f"users that could not be trained: {report.failed}")
                    print(f"{num_actors} actors: {report.seconds:.1f} s", flush=True)
                    return {"seconds": report.seconds}

                return train

            results = compare(
                f"{options.users} users",
                {"one actor": trained_by(1), "two actors": trained_by(2)},
                rounds=options.rounds,
                warm_up=0,  # actors are new each time
            )
    finally:
        ray.shutdown()
    save_comparisons(
        options.results, "ray-users", results, reference="one actor", model=load_from(options)
    )


if __name__ == "__main__":
    main()
