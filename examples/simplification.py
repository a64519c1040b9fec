"""Simplification with a dial for the length, learned from the ratios of the rows themselves.

Run it with `python examples/simplification.py` (extra `simplification`).
"""

from controlprefix import ControlPrefix, Example, Request
from controlprefix.data import control_ratios, with_ratios
from controlprefix.evaluation import grade_level, sari

# Sentences and shorter or plainer ones, written for this example.
PAIRS = [
    ("The physician administered the medication to the patient.", "The doctor gave the drug."),
    ("The physician administered the medication to the patient.", "The doctor gave him a drug."),
    ("He resided in an opulent domicile near the harbour.", "He lived in a rich home."),
    ("He resided in an opulent domicile near the harbour.", "He lived in a rich home by the sea."),
    ("The committee deferred its decision until spring.", "They will decide later."),
    ("The committee deferred its decision until spring.", "The group will decide in spring."),
]
NEW = "The inhabitants evacuated the village because of the flood."
REFERENCES = ["People left the village because of the flood.", "People left the village."]


def main(cp: ControlPrefix, *, steps: int = 8) -> None:
    """Train on six pairs, and write one sentence at three lengths."""
    rows = [
        Example(prompt=f"Simplify: {source}", completion=text, task="simplify")
        for source, text in PAIRS
    ]
    labelled = with_ratios(rows, [source for source, _ in PAIRS], ["length"])
    for row in labelled:
        print(row.attributes["length"], row.completion)
    cp.train(labelled, steps=steps, batch_size=6, num_slots=8, validation=0)
    lengths = sorted({float(str(row.attributes["length"])) for row in labelled})
    for length in (lengths[0], lengths[len(lengths) // 2], lengths[-1]):
        request = Request(
            prompt=f"Simplify: {NEW}",
            task="simplify",
            attributes={"length": str(length)},
            max_new_tokens=24,
        )
        text = cp.generate(request).text.strip().split("\n")[0] or "-"
        print(f"length {length}: {text}")
        print(f"  {control_ratios(NEW, text)}")
        print(f"  SARI {sari([NEW], [text], [REFERENCES]):.0f}")
    print(f"grade level: source {grade_level([NEW]):.0f}, people {grade_level(REFERENCES):.0f}")


if __name__ == "__main__":
    main(ControlPrefix.from_pretrained("smollm2", tenant="examples"))
