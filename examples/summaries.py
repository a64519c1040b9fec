"""Summaries whose number of words is requested, and a long document as a prefix.

Run it with `python examples/summaries.py`.
"""

from controlprefix import ControlPrefix, Example, Request

# Notes and summaries of them, written for this example.
NOTES = {
    "The harbour board met on Monday. It heard two reports on the old crane. The crane will be "
    "taken down in March, and its place becomes a square.": [
        "The old crane goes in March.",
        "The harbour board will replace the old crane by a square in March.",
    ],
    "The library opens on Sundays from May. It found five volunteers, who were trained last week. "
    "Books can be returned at all hours.": [
        "The library opens on Sundays.",
        "With five trained volunteers the library opens on Sundays from May.",
    ],
    "Rain kept most farmers from the market. Those who came sold eggs and cheese within an hour. "
    "The next market is on Saturday.": [
        "Few farmers came to the market.",
        "Because of rain few farmers came to the market, and they sold out within an hour.",
    ],
}
NEW = (
    "The school got a new roof over the summer. Pupils return a week late, since the paint must "
    "dry. Parents were told by letter."
)


def main(cp: ControlPrefix, *, steps: int = 12) -> None:
    """Train on six summaries, and write one of another note at two lengths."""
    rows = [
        Example(
            prompt=f"Summarize: {note}",
            completion=text,
            task="summarize",
            attributes={"words": str(len(text.split()))},
        )
        for note, texts in NOTES.items()
        for text in texts
    ]
    cp.train(rows, steps=steps, batch_size=6, num_slots=8, validation=0)
    lengths = sorted(int(str(row.attributes["words"])) for row in rows)
    for words in (lengths[0], lengths[-1]):
        request = Request(
            prompt=f"Summarize: {NEW}",
            task="summarize",
            attributes={"words": str(words)},
            max_new_tokens=32,
        )
        text = cp.generate(request).text.strip().split("\n")[0]
        print(f"{words} words requested, {len(text.split())} written: {text}")
    # What is longer than a context is read in pieces, into slots matched to all of its tokens.
    cp.put("user", "archive", cp.prefix_from_text("\n\n".join([*NOTES, NEW]), max_slots=24))
    question = Request(prompt="What happened to the roof?", user="archive", max_new_tokens=24)
    print("from the archive:", cp.generate(question).text)


if __name__ == "__main__":
    main(ControlPrefix.from_pretrained("smollm2", tenant="examples"))
