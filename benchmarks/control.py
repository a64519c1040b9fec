"""Control of several attributes at once, dials, unseen labels and conflicts.

Two sets of attributes, learned from rows that have one label each, and asked for in every
combination: `aspects` (sentiment of film reviews, topic of news, toxicity) and `styles`
(formality, sentiment of restaurant reviews, politeness). All ways see the same rows in as many
steps. Texts begin at nothing, so all that they are comes from what steers them. Two judges of
each attribute, linear over words and over sentence embeddings, learn from rows that no way
sees; one says the average control, the other checks it. What a way can be tuned in (a
coefficient) is chosen by other draws than those reported.

repeng asks for NumPy 1, and is left out unless it is there: `pip install --no-deps repeng==0.4.0`.

Run it with `python benchmarks/control.py DATA`, or a part with `--part aspects`. What is done
already is not done again; `--fresh` begins anew.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dials import STRENGTHS, conflicts, cross_talk, dials
from quality import loaded
from rich.console import Console
from side_by_side import RESULTS, record
from unseen import held_back, unseen_categories
from ways import SETS, WAYS, Combination, Ours, Study, Way, learned, study

from controlprefix import ControlPrefix
from controlprefix.evaluation.harness import base_model_nlls
from controlprefix.evaluation.metrics import distinct_n

FILE = RESULTS / "control.json"


def judged(
    study: Study, texts: Sequence[tuple[Combination, str]], cp: ControlPrefix
) -> dict[str, float]:
    """Control by both judges, fluency and variety of texts that were asked with labels."""
    found: dict[str, float] = {}
    written = [text or " " for _, text in texts]
    right: dict[str, list[bool]] = {}
    for attribute in study.labels:
        wanted = [combination.get(attribute) for combination, _ in texts]
        said = list(study.words[attribute].predict(written))
        asked = [i for i, label in enumerate(wanted) if label]
        right[attribute] = [said[i] == wanted[i] for i in asked]
        if not asked:
            continue
        found[f"control, {attribute}"] = statistics.fmean(right[attribute])
        other = study.meanings[attribute]
        best = other.probabilities(written).argmax(dim=1).tolist()
        hits = [other.labels[best[i]] == wanted[i] for i in asked]
        found[f"other judge, {attribute}"] = statistics.fmean(hits)
    for name in ("control", "other judge"):
        some = [value for key, value in found.items() if key.startswith(f"{name}, ")]
        found[f"{name}, mean"] = statistics.fmean(some)
    if len({len(one) for one in right.values()}) == 1:
        found["all right"] = statistics.fmean(map(all, zip(*right.values(), strict=True)))
    found["fluency"] = statistics.fmean(base_model_nlls(cp, written))
    found["distinct-2"] = distinct_n(written, 2)
    found["words"] = statistics.fmean(len(text.split()) for text in written)
    return found


def measure(way: Way, study: Study, options: argparse.Namespace) -> dict[str, float]:
    combinations = study.combinations()
    chosen: dict[str, float] = {}
    if way.coefficients:
        tried = {}
        for coefficient in way.coefficients:
            way.coefficient = coefficient
            texts = drawn_texts(way, combinations, max(2, options.texts // 4), seed=1)
            tried[coefficient] = judged(study, texts, way.cp)
        most = study.base_model_nll
        if way.as_plain_as is not None:
            other = WAYS[way.as_plain_as](study, options)
            texts = drawn_texts(other, combinations, max(2, options.texts // 4), seed=1)
            most = judged(study, texts, way.cp)["fluency"]
        fluent = {c: one for c, one in tried.items() if one["fluency"] <= most}
        plainest = min(tried, key=lambda c: tried[c]["fluency"])
        way.coefficient = max(
            fluent or [plainest], key=lambda coefficient: tried[coefficient]["control, mean"]
        )
        chosen["coefficient"] = way.coefficient
    texts = drawn_texts(way, combinations, options.texts, seed=0)
    for combination, text in texts[:: options.texts]:
        Console(width=200, highlight=False, markup=False).print(combination, repr(text))
    found = {**judged(study, texts, way.cp), **chosen}
    if isinstance(way, Ours):  # each label alone: what do the others take from it?
        alone = [{a: label} for a, labels in study.labels.items() for label in labels]
        texts = drawn_texts(way, alone, options.texts, seed=2)
        found["alone, mean"] = judged(study, texts, way.cp)["control, mean"]
    return found


def drawn_texts(
    way: Way, combinations: Sequence[Combination], count: int, seed: int
) -> list[tuple[Combination, str]]:
    return [
        (combination, text)
        for i, combination in enumerate(combinations)
        for text in way.write(combination, count, seed * 100 + i)
    ]


# --- the page -----------------------------------------------------------------------------

COLUMNS = (
    ("control, mean", "control", 3),
    ("other judge, mean", "other judge", 3),
    ("all right", "all right", 3),
    ("alone, mean", "alone", 3),
    ("fluency", "fluency", 2),
    ("distinct-2", "distinct-2", 2),
    ("coefficient", "coefficient", 2),
)


def page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    about = results["options"]
    parts = [
        "# Several attributes at once, dials, unseen labels",
        f"SmolLM2-135M in bfloat16, {about['steps']} steps of 8 rows in all (labels of a way that "
        f"learns each alone share them), {about['slots']} slots a prefix, {about['texts']} texts a "
        f"combination, {about['new_tokens']} tokens at most. Seed 0. Mixing in logits rules out "
        "tokens a hundred times less likely than the likeliest: of that and a thousand, which were "
        "tried on `aspects`, the better one. Written by "
        f"`{results['command']}` with `control.json` beside it.",
    ]
    for name in SETS:
        found = results.get(name, {}).get("ways", {})
        if not found:
            continue
        attributes = ", ".join(SETS[name])
        accuracy = "; ".join(
            f"{attribute} {one:.2f}" for attribute, one in results[name]["judges"].items()
        )
        parts += [
            f"## {name}: {attributes}",
            "**control**: how often a judge (linear over words) finds the label that was asked "
            "for, in the mean over attributes; **all right**: all at once; **alone**: each label "
            "asked for without others. **other judge**: linear over sentence embeddings (right "
            f"on held-out rows: {accuracy}). **fluency**: nats per token under the plain model, "
            f"lower is plainer; real texts have {results[name]['fluency']:.2f}. **coefficient**: "
            "chosen by control on other draws, of those no less fluent than real texts; *as "
            "plain*: than the instruction's.",
            table(found, [c for c in COLUMNS if any(c[0] in one for one in found.values())]),
        ]
        each = [(f"control, {attribute}", attribute, 2) for attribute in SETS[name]]
        parts.append(table(found, each))
    if "cross-talk" in results:
        parts += [
            "## Cross-talk",
            "What a label alone, at strength 1, adds to the judge's chance of that label (*own*), "
            "and at most to that of a label of another attribute (*other*), against the task "
            "alone (`controlprefix eval`); in real texts, against those with the other labels. "
            "Learned jointly on `styles`.",
            table(*cross_talk_rows(results["cross-talk"])),
        ]
    if "dials" in results:
        columns = [(f"{w:g}", f"{w:g}", 2) for w in STRENGTHS]
        columns += [("spearman", "Spearman", 2), ("uneven", "uneven", 2), ("fluency", "fluency", 2)]
        parts += [
            "## Dials",
            f"Formality learned alone, in {about['steps'] // 2} steps. Chance that the judge "
            f"gives the label in {about['curve_texts']} texts at each position, for each kind of "
            "dial on one prefix. **uneven**: the farthest from a straight line between 0 and 1, as "
            "a share of the effect. **fluency** at 1.",
        ]
        for label, found in results["dials"].items():
            rows = {
                name: {
                    **{f"{w:g}": chance for w, chance, _ in one["points"]},
                    "spearman": one["spearman"],
                    "uneven": one["uneven"],
                    "fluency": {w: f for w, _, f in one["points"]}[1.0],
                }
                for name, one in found.items()
            }
            parts += [f"### {label}", table(rows, columns)]
    if "conflicts" in results:
        lines = [f"| {name} | {chance:.2f} |" for name, chance in results["conflicts"].items()]
        parts += [
            "## A conflict",
            "A user learned from informal texts, asked for `formality=formal`: the chance that the "
            "judge gives it, at strengths of both.",
            "\n".join(["| strengths | formal |", "| --- | --- |", *lines]),
        ]
    if {"held back", "unseen categories"} & results.keys():
        parts.append("## Labels that nobody learned")
    if "held back" in results:
        labels = list(next(iter(results["held back"].values())))
        columns = [(label, label, 2) for label in labels]
        parts += [
            "A topic is left out of training and then asked for: how often the judge finds it.",
            table(results["held back"], [*columns, ("mean", "mean", 2)]),
        ]
    if "unseen categories" in results:
        lines = [f"| {name} | {nats:.3f} |" for name, nats in results["unseen categories"].items()]
        parts += [
            "WebNLG's unseen categories: nats per token of the reference.",
            "\n".join(["| in their place | nats |", "| --- | --- |", *lines]),
        ]
    return "\n\n".join(parts) + "\n"


def cross_talk_rows(
    found: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> tuple[dict[str, dict[str, float]], list[tuple[str, str, int]]]:
    rows: dict[str, dict[str, float]] = {}
    for source, matrix in found.items():
        for wanted, added in matrix.items():
            attribute = wanted.partition("=")[0]
            others = [abs(x) for label, x in added.items() if label.partition("=")[0] != attribute]
            rows.setdefault(wanted, {})[f"own, {source}"] = added[wanted]
            rows[wanted][f"other, {source}"] = max(others)
    names = {"attention": "side by side", "logits": "in logits", "real texts": "real texts"}
    columns = [
        (f"{what}, {source}", f"{what}, {names[source]}", 2)
        for source in found
        for what in ("own", "other")
    ]
    rows["mean"] = {
        key: statistics.fmean(row[key] for row in rows.values()) for key, _, _ in columns
    }
    return rows, columns


def table(rows: Mapping[str, Mapping[str, float]], columns: Sequence[tuple[str, str, int]]) -> str:
    lines = [
        f"| way | {' | '.join(title for _, title, _ in columns)} |",
        "| --- |" + " --- |" * len(columns),
    ]
    for name, one in rows.items():
        shown = {**one}
        if "mean" in {key for key, _, _ in columns} and "mean" not in shown:
            shown["mean"] = statistics.fmean(one.values())
        cells = [f"{shown[key]:.{digits}f}" if key in shown else "" for key, _, digits in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


# --- all of it ----------------------------------------------------------------------------


PARTS = (
    "aspects",
    "styles",
    "cross-talk",
    "dials",
    "conflicts",
    "held back",
    "unseen categories",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the data sets")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--num-slots", type=int, default=8)
    parser.add_argument("--texts", type=int, default=16, help="a combination")
    parser.add_argument("--dial-texts", type=int, default=48, help="a setting elsewhere")
    parser.add_argument("--curve-texts", type=int, default=96, help="a position of a dial")
    parser.add_argument("--topics", type=int, default=2, help="held back, each in its turn")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--fresh", action="store_true", help="measure all again")
    options = parser.parse_args()
    kept = ("steps", "num_slots", "texts", "dial_texts", "curve_texts", "new_tokens")
    about: dict[str, Any] = {name.removeprefix("num_"): getattr(options, name) for name in kept}
    about["coefficients"] = "by control, of the fluent"  # a file of another rule is not mixed in
    if FILE.exists() and not options.fresh:
        before = json.loads(FILE.read_text())
        if before["options"] != about:
            raise SystemExit(f"{FILE} was measured with {before['options']}; give --fresh")
    elif options.fresh:
        FILE.unlink(missing_ok=True)

    def save(found: Mapping[str, Any], *names: str) -> None:
        """Add results under some names, one inside the other."""
        results = json.loads(FILE.read_text()) if FILE.exists() else {"options": about}
        inner = results
        for name in names:
            inner = inner.setdefault(name, {})
        inner.update(found)
        path = record(
            "control", {k: v for k, v in results.items() if k not in {"machine", "command"}}
        )
        path.with_suffix(".md").write_text(page(json.loads(path.read_text())))

    def is_done(*names: str) -> bool:
        found = json.loads(FILE.read_text()) if FILE.exists() else {}
        for name in names:
            found = found.get(name, {})
        return bool(found)

    loaded()
    for name in [part for part in options.part if part in SETS]:
        one = study(options.folder, name, options.steps * 8)
        accuracy = {attribute: judge.accuracy for attribute, judge in one.meanings.items()}
        of_set = {"judges": accuracy, "fluency": round(one.base_model_nll, 3)}
        save(of_set, name)
        known: dict[str, Way] = {}
        for label in WAYS:
            if is_done(name, "ways", label) or (label == "repeng" and not find_spec("repeng")):
                continue
            figures = measure(learned(label, one, options, known), one, options)
            print(name, label, {k: round(v, 3) for k, v in figures.items()}, flush=True)
            save({label: figures}, name, "ways")
    if "cross-talk" in options.part and not is_done("cross-talk"):
        ours = Ours(study(options.folder, "styles", options.steps * 8), options)
        ours.learn()
        result = cross_talk(ours, options)
        save({"cross-talk": result})
    on_styles: dict[str, Callable[[Ours, argparse.Namespace], dict[str, Any]]] = {
        "dials": dials,
        "conflicts": conflicts,
    }
    wanted = [part for part in on_styles if part in options.part and not is_done(part)]
    if wanted:
        whole = study(options.folder, "styles", options.steps * 8)
        rows = [row for row in whole.rows if str(row.label).startswith("formality=")]
        alone = replace(whole, labels={"formality": whole.labels["formality"]}, rows=rows)
        ours = Ours(alone, argparse.Namespace(**{**vars(options), "steps": options.steps // 2}))
        ours.learn()
        for part in wanted:
            result = on_styles[part](ours, options)
            save({part: result})
    of_data: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
        "held back": held_back,
        "unseen categories": unseen_categories,
    }
    for part in [part for part in of_data if part in options.part and not is_done(part)]:
        result = of_data[part](options.folder, options)
        print(part, result, flush=True)
        save({part: result})


if __name__ == "__main__":
    main()
