"""A smaller quickstart: learn two voices, then mix them.

Run it with `python examples/quickstart.py`.
"""

from controlprefix import ControlPrefix, Example, Request

VOICES = {
    "formal": ("Dear Sam, I regret that I shall be late.", "I should be grateful for your help."),
    "casual": ("hey sam, running late, sorry!!", "hey can you gimme a hand? thx"),
}
PROMPTS = ("Tell Sam I will be late.", "Ask for help.")


def main(cp: ControlPrefix, *, steps: int = 20) -> None:
    """Learn from four examples; a real use has hundreds."""
    examples = [
        Example(prompt=prompt, task="note", attributes={"formality": label}, completion=completion)
        for label, completions in VOICES.items()
        for prompt, completion in zip(PROMPTS, completions, strict=True)
    ]
    cp.train(
        examples, learn=("task", "attributes"), num_slots=8, batch_size=4, steps=steps, validation=0
    )
    choices: list[dict[str, float]] = [{"formal": 1}, {"formal": 0.5, "casual": 0.5}, {"casual": 1}]
    requests = [
        Request(prompt="Tell Sam the parcel has come.", task="note", attributes={"formality": mix})
        for mix in choices
    ]
    for mix, completion in zip(choices, cp.generate(requests), strict=True):
        print(mix, "->", completion.text)


if __name__ == "__main__":
    main(ControlPrefix.from_pretrained("smollm2", tenant="examples"))
