"""Table-to-text with a label for the category, and what happens to one that was never seen.

Run it with `python examples/tables.py`.
"""

from controlprefix import ControlPrefix, Request
from controlprefix.data import linearize, parse_table
from controlprefix.evaluation import slot_errors

# Facts, their category, and texts that say them; written for this example.
ROWS = [
    ("Restaurant", {"name": "Blue Fig", "food": "Greek", "area": "harbour"}),
    ("Restaurant", {"name": "Old Mill", "food": "French", "area": "city centre"}),
    ("Restaurant", {"name": "Casa Rosa", "food": "Spanish", "area": "riverside"}),
    ("Building", {"name": "North Tower", "floors": "42", "city": "Oslo"}),
    ("Building", {"name": "Glass House", "floors": "9", "city": "Porto"}),
    ("Building", {"name": "Lark Hall", "floors": "3", "city": "Leeds"}),
]
SENTENCES = {
    "Restaurant": "{name} serves {food} food in the {area}.",
    "Building": "{name} in {city} has {floors} floors.",
}
NEW = [
    ("Restaurant", {"name": "Red Lamp", "food": "Thai", "area": "old town"}),
    ("Building", {"name": "Pine Court", "floors": "12", "city": "Graz"}),
]


def main(cp: ControlPrefix, *, steps: int = 12) -> None:
    """Train on six tables, and write about two others and about an unseen category."""
    rows = [
        {
            "table": facts,
            "completion": SENTENCES[category].format(**facts),
            "task": "describe",
            "attributes": {"category": category},
        }
        for category, facts in ROWS
    ]
    cp.train(rows, steps=steps, batch_size=6, num_slots=8, validation=0)
    requests = [
        Request(
            prompt=linearize(facts),
            task="describe",
            attributes={"category": category},
            max_new_tokens=24,
        )
        for category, facts in NEW
    ]
    texts = [completion.text for completion in cp.generate(requests)]
    for request, text in zip(requests, texts, strict=True):
        print(f"{request.prompt}\n  -> {text}")
    print(slot_errors(texts, [parse_table(request.prompt or "") for request in requests]))

    bridge = Request(
        prompt=linearize({"name": "Long Bridge", "length": "900 metres", "city": "Lyon"}),
        task="describe",
        max_new_tokens=24,
    )
    print("without a category:", cp.generate(bridge).text)


if __name__ == "__main__":
    main(ControlPrefix.from_pretrained("smollm2", tenant="examples"))
