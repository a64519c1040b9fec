"""Time and peak memory of reading a long prompt, with a prefix and without."""

from collections.abc import Callable, Sequence
from functools import partial

from controlprefix.model.steering import Steering

from lib.interleaved import Measures, compare, now, peak_mib
from lib.models import add_model_options, load_from, mixed_batch, random_prompts
from lib.results import arguments, save_comparisons


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=3)
    add_model_options(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 4000, 8000])
    parser.add_argument("--num-slots", type=int, default=16)
    options = parser.parse_args(argv)

    frozen = load_from(options)
    steering = Steering.for_model(frozen.model)
    slots = mixed_batch(frozen.model, 1, options.num_slots)
    no_slots = mixed_batch(frozen.model, 1, 0)

    def read(num_tokens: int, has_slots: bool) -> Measures:
        ids = random_prompts(1, num_tokens, options.device)["input_ids"]
        seconds: list[float] = []

        def work() -> None:
            start = now()
            with steering.attached(slots if has_slots else no_slots):
                frozen.model(input_ids=ids, logits_to_keep=1)
            seconds.append(now() - start)

        peak = peak_mib(work)
        return {"seconds": seconds[0], "peak MiB": peak}

    results = []
    for num_tokens in options.tokens:
        contenders: dict[str, Callable[[], Measures]] = {
            "no prefix": partial(read, num_tokens, False),
            f"{options.num_slots} slots": partial(read, num_tokens, True),
        }
        results += compare(f"{num_tokens} tokens", contenders, rounds=options.rounds)
    save_comparisons(
        options.results,
        f"long-prompts-{options.model}-{options.device}",
        results,
        reference="no prefix",
        model=frozen,
    )


if __name__ == "__main__":
    main()
