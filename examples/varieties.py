"""A variety of language learned from plain text, united with a task learned in another.

Run it with `python examples/varieties.py`.
"""

from controlprefix import ControlPrefix, Example, Request

# Lines written for this example; those of the variety need no translation and no topic.
LINES = {
    "a hat": "Listen: I still look for your hat.",
    "the weather": "Listen: it will rain all week.",
    "the bridge": "Listen: the bridge is closed again.",
    "a debt": "Listen: I will pay you on Friday.",
    "a visit": "Listen: come and see us in May.",
}
ARCHAIC = [
    "Thou art a merry fellow, and I love thee well.",
    "Whither goest thou at this hour, good sir?",
    "I pray thee, speak no more of thy sorrows.",
    "Wherefore dost thou weep, sweet maid?",
    "He hath a heart of stone, and heareth not.",
    "Methinks thou knowest naught of the matter.",
]


def main(cp: ControlPrefix, *, steps: int = 12) -> None:
    """Train a task on modern English and a label on archaic texts, and request both."""
    ask = "Write one line to a friend about {}."
    tasks = [
        Example(prompt=ask.format(topic), completion=text, task="letter")
        for topic, text in LINES.items()
    ]
    cp.train(tasks, steps=steps, batch_size=5, num_slots=8, validation=0)
    # A text without a prompt: what the label is like, whatever the task.
    labels = [
        Example(prompt="", raw=True, completion=text, attributes={"variety": variety})
        for variety, texts in (("archaic", ARCHAIC), ("modern", list(LINES.values())))
        for text in texts
    ]
    cp.train(labels, steps=steps, batch_size=11, num_slots=8, validation=0)
    prompt = ask.format("a brother")
    for attributes in ({}, {"variety": "archaic"}):
        request = Request(prompt=prompt, task="letter", attributes=attributes, max_new_tokens=24)
        print(attributes or "no label", "->", cp.generate(request).text)
    # How much likelier the model finds a text with the label than without.
    for text in ("Listen: thy brother loveth thee well.", "Listen: your brother loves you a lot."):
        without, under = (
            score.log_likelihood / score.num_tokens
            for score in cp.score(
                Example(prompt=prompt, completion=text, task="letter", attributes=attributes)
                for attributes in ({}, {"variety": "archaic"})
            )
        )
        print(f"{text} {under - without:+.2f} nats per token with the label")


if __name__ == "__main__":
    main(ControlPrefix.from_pretrained("smollm2", tenant="examples"))
