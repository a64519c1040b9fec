"""What a prefix of one's own is worth: authors, other ways to the same end, and shuffled authors.

Data are JSON Lines, gzipped, in the folder given first: authors_blogs, each post cut to its
first words. A decoder is learned from the posts of some authors; others, whom nothing has
seen, are evaluated: from their 1, 4, 16 oldest posts to their newest. Beside each figure
stands the same with the prefixes of the authors dealt out wrongly: the difference is what is
personal. The judge of written texts learned from posts that no way was given.

Run it with `python benchmarks/personal.py DATA`. The decoder is kept in `--store`, and what is
done already is not done again; `--fresh` begins the figures anew.
"""

import argparse
import copy
import gzip
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text
from quality import CAUSAL, LORA, padded, peft_steps
from rich.console import Console
from safetensors.torch import load_file
from side_by_side import RESULTS, record
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline, make_union

from controlprefix import ControlPrefix, Example, Request
from controlprefix.embeddings import embed
from controlprefix.prefixes import PrefixDecoder, PrefixKey, UserCode
from controlprefix.training import TrainingSettings, checkpoint
from controlprefix.users.decoder_training import CODE_LEARNING_RATE

FILE = RESULTS / "personal.json"
DECODER = "bloggers"
SLOTS = 16
Posts = dict[str, list[str]]


@cache
def posts(folder: Path, split: str, words: int) -> Posts:
    """The posts of each author, oldest first."""
    path = folder / f"authors_blogs.{split}.jsonl.gz"
    if not path.is_file():
        raise SystemExit(f"{path} is missing; give the folder of the data sets")
    found: Posts = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            text = " ".join(row["text"].split()[:words])
            found.setdefault(row["author"], []).append(text)
    return found


def judge(given: Posts) -> Pipeline:
    """Who wrote it: words, and pieces of words."""
    made = make_pipeline(
        make_union(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True),
        ),
        LogisticRegression(C=10, max_iter=1000),
    )
    pairs = [(text, author) for author, texts in given.items() for text in texts]
    return made.fit([text for text, _ in pairs], [author for _, author in pairs])


class Personal:
    """The authors, and ways to learn each one's voice from some posts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        read = partial(posts, options.folder, words=options.words)
        train, dev, test = read("train"), read("dev"), read("test")
        names = sorted(train)
        random.Random(0).shuffle(names)
        # The first ones were used to choose the recipe: neither learned from nor evaluated.
        chosen, others = names[24 : 24 + options.authors], names[24 + options.authors :]
        self.learned_from = {one: train[one][: options.posts] for one in others[: options.users]}
        self.given = {one: train[one] for one in chosen}
        self.test = {one: test[one][: options.rows] for one in chosen}
        self.authors = chosen
        self.wrong = dict(zip(chosen, chosen[1:] + chosen[:1], strict=True))
        self.judge = judge({one: train[one][20:] + dev[one] for one in chosen})
        self.cp = ControlPrefix.from_pretrained("smollm2", store=options.store)

    def decoder(self) -> dict[str, float]:
        """Learn the decoder, unless it is there."""
        began = time.perf_counter()
        report = self.cp.learn_decoder(
            self.learned_from,
            name=DECODER,
            num_slots=SLOTS,
            epochs=self.options.epochs,
            validation=0.03,
            seed=0,
            folder=self.options.work,
            resume=True,
        )
        return {
            "users": report.num_users,
            "r2": report.r2,
            "best loss": report.training.best_loss,
            "tokens": report.training.num_tokens,
            "seconds": time.perf_counter() - began,
        }

    # --- ways: authors' posts in, what is asked with out ---

    def nothing(self, given: Posts) -> dict[str, str]:
        return {}

    def common(self, given: Posts) -> dict[str, str]:
        """What the decoder's users have in common, for everyone."""
        decoder = self._decoder()
        return {one: self._put(one, decoder.decode(decoder.mean_code)) for one in given}

    def in_the_prompt(self, given: Posts) -> dict[str, str]:
        """Exactly what prompting with the texts gives: their keys and values."""
        return {
            one: self._put(one, self.cp.prefix_from_text("\n\n".join(texts) + "\n\n"))
            for one, texts in given.items()
        }

    def enrolled(self, given: Posts) -> dict[str, str]:
        for one, texts in given.items():
            self.cp.enroll(one, texts, decoder=DECODER)
        return {one: one for one in given}

    def nearest(self, given: Posts) -> dict[str, str]:
        """The mean code of the eight most alike of those the decoder was learned from."""
        decoder = self._decoder()
        known = torch.stack([embed(texts).mean(0) for texts in self.learned_from.values()])
        state = load_file(self.options.work / checkpoint.FILE)
        changes = [state[f"best.changes.{i}"] for i in range(len(self.learned_from))]
        codes = CODE_LEARNING_RATE / TrainingSettings().peak_learning_rate * torch.stack(changes)
        for one, texts in given.items():
            alike = torch.nn.functional.normalize(known, dim=1) @ embed(texts).mean(0)
            numbers = codes[alike.topk(8).indices].mean(0)
            self._put(one, decoder.decode(UserCode(decoder.content_hash, numbers)))
        return {one: one for one in given}

    def trained(self, given: Posts, **how: Any) -> dict[str, str]:
        usual = {"num_slots": SLOTS, "epochs": 3, "validation": 0, "progress": False}
        report = self.cp.train_users(given, **{**usual, **how})
        assert not report.failed, report.failed
        return {one: one for one in given}

    def _decoder(self) -> PrefixDecoder:
        models = self.cp.store.for_model(self.cp.geometry.fingerprint)
        decoder = models.get(PrefixKey("decoder", DECODER)).value
        assert isinstance(decoder, PrefixDecoder)
        return decoder

    def _put(self, user: str, prefix: Any) -> str:
        self.cp.put("user", user, prefix)
        return user

    # --- figures ---

    def measure(
        self, way: Callable[[Posts], dict[str, str]], num_texts: int, *, judged: bool = True
    ) -> dict[str, float]:
        """Of a way that puts prefixes into the store."""
        given = {one: self.given[one][:num_texts] for one in self.authors}
        began = time.perf_counter()
        users = way(given)
        seconds = time.perf_counter() - began
        for user in users.values():  # so that no figure includes reading them
            self.cp.resolve(Request(prompt="x", user=user))
        found = {"nats": self.nats(users)}
        if users:
            found["nats, shuffled"] = self.nats({o: users[self.wrong[o]] for o in self.authors})
            sizes = [self._size(user) for user in users.values()]
            found["seconds a user"] = seconds / len(given)
            found["bytes a user"] = sum(sizes) / len(sizes)
        if judged and num_texts in (0, 16):
            found["authorship"] = self.authorship(self.written(users))
        for user in users.values():
            self.cp.forget_user(user)
        return found

    def nats(self, users: Mapping[str, str]) -> float:
        """A token of the authors' newest posts."""
        scores = self.cp.score(
            [
                Example(prompt="", raw=True, completion=text, user=users.get(one))
                for one in self.authors
                for text in self.test[one]
            ]
        )
        return -sum(s.log_likelihood for s in scores) / sum(s.num_tokens for s in scores)

    def written(self, users: Mapping[str, str]) -> dict[str, list[str]]:
        """Posts under each author's prefix."""
        start = self.cp.tokenizer.bos_token
        done = self.cp.generate(
            [
                Request(
                    prompt=start,
                    raw=True,
                    user=users.get(one),
                    max_new_tokens=48,
                    temperature=0.8,
                    seed=i,
                )
                for one in self.authors
                for i in range(self.options.texts)
            ],
            batch_size=32,
        )
        texts = [one.text for one in done]
        size = self.options.texts
        return {one: texts[i * size : (i + 1) * size] for i, one in enumerate(self.authors)}

    def authorship(self, texts: Mapping[str, Sequence[str]]) -> float:
        """How often the judge says who was meant."""
        hits = [
            float(found == one)
            for one, written in texts.items()
            for found in self.judge.predict([text or " " for text in written])
        ]
        return sum(hits) / len(hits)

    def _size(self, user: str) -> int:
        return next(v.size_bytes for v in self.cp.versions("user", user) if v.current)

    def peft(self, kind: str, num_texts: int, *, judged: bool = True) -> dict[str, float]:
        """An adapter of PEFT for each author, one after the other, in as many steps."""
        config, rate = {
            "LoRA": (
                LoraConfig(task_type=CAUSAL, r=8, lora_alpha=16, target_modules=LORA),
                3e-3,
            ),
            "prefix": (PrefixTuningConfig(task_type=CAUSAL, num_virtual_tokens=SLOTS), 3e-2),
        }[kind]
        own, wrong, count, seconds, size = 0.0, 0.0, 0, 0.0, 0
        texts: dict[str, list[str]] = {}
        encode = self.cp.frozen_model.request_tokenizer.example_ids
        for one in self.authors:
            rows = [
                encode(Example(prompt="", raw=True, completion=text))
                for text in self.given[one][:num_texts]
            ]
            torch.manual_seed(0)
            model = get_peft_model(copy.deepcopy(self.cp.model), config)
            began = time.perf_counter()  # one who has many users would not copy the model
            if kind == "prefix":
                text = "\n".join(self.given[one][:num_texts])
                initialize_kv_prefix_from_text(
                    model, self.cp.tokenizer, text=text, use_chat_template=False
                )
            peft_steps(model, rows, 4, rate, 3 * -(-len(rows) // 4), 0)
            model.eval()
            seconds += time.perf_counter() - began
            size = sum(p.numel() * 2 for p in model.parameters() if p.requires_grad)
            right = [encode(Example(prompt="", raw=True, completion=t)) for t in self.test[one]]
            # Whose adapter this one is given to when they are dealt out wrongly.
            victim = next(a for a in self.authors if self.wrong[a] == one)
            theirs = [encode(Example(prompt="", raw=True, completion=t)) for t in self.test[victim]]
            own += _nats(model, right)
            wrong += _nats(model, theirs)
            count += sum(len(row.completion) for row in right)
            if judged and num_texts == 16:
                texts[one] = self._write_with(model)
        found = {
            "nats": own / count,
            "nats, shuffled": wrong / count,
            "seconds a user": seconds / len(self.authors),
            "bytes a user": float(size),
        }
        if texts:
            found["authorship"] = self.authorship(texts)
        return found

    def _write_with(self, model: Any) -> list[str]:
        torch.manual_seed(0)
        start = torch.tensor([[self.cp.tokenizer.bos_token_id]] * self.options.texts)
        written = model.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=48,
            do_sample=True,
            temperature=0.8,
            top_k=0,
        )
        return self.cp.tokenizer.batch_decode(written[:, 1:], skip_special_tokens=True)


def _nats(model: Any, rows: Sequence[Any]) -> float:
    ids, mask, targets = padded(rows, end=False)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :].float()
    return float(
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), reduction="sum"
        )
    )


ORDER = (
    "no personalization",
    "what users have in common",
    "the texts in the prompt",
    "nearest users",
    "ours, enrolled",
    "ours, code",
    "ours, full",
    "ours, full, no decoder",
    "PEFT LoRA r8",
    "PEFT prefix tuning from text",
)
COLUMNS = (
    ("nats", "nats", 3),
    ("nats, shuffled", "shuffled", 3),
    ("authorship", "authorship", 2),
    ("seconds a user", "s a user", 2),
    ("bytes a user", "bytes a user", 0),
)


def page(results: dict[str, Any]) -> str:
    """The results as Markdown, written by this script alone."""
    about, learned = results["options"], results["decoder"]
    parts = [
        "# What a prefix of one's own is worth",
        f"SmolLM2-135M in bfloat16; {about['authors']} bloggers whom nothing has seen, "
        f"{about['rows']} of each one's newest posts, cut to {about['words']} words. The decoder "
        f"was learned from {learned['users']:.0f} other bloggers, {about['posts']} posts each, "
        f"in {learned['seconds'] / 60:.0f} minutes. {SLOTS} slots; three passes where something is "
        f"trained. Written by `{results['command']}` with `personal.json` beside it.",
        "**nats**: a token of the newest posts under the author's own prefix; **shuffled**: under "
        "another author's, made in the same way (the difference is what is personal). "
        f"**authorship**: how often a judge finds the author, of {about['authors']}, in "
        f"{about['texts']} posts written under the prefix. Seconds are of a machine shared with "
        "others.",
    ]
    for num_texts in sorted({int(n) for ways in results["ways"].values() for n in ways}):
        table = [
            f"| {num_texts or 'no'} texts | " + " | ".join(title for _, title, _ in COLUMNS) + " |",
            "| --- |" + " --- |" * len(COLUMNS),
        ]
        for way, by_count in results["ways"].items():
            found = by_count.get(str(num_texts))
            if found is None:
                continue
            cells = [f"{found[key]:,.{d}f}" if key in found else "" for key, _, d in COLUMNS]
            table.append(f"| {way} | {' | '.join(cells)} |")
        parts.append("\n".join(table))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the data sets")
    parser.add_argument("--store", default="sqlite:///personal.db", help="for the decoder")
    parser.add_argument("--work", type=Path, default=Path("personal.run"), help="for its run")
    parser.add_argument("--users", type=int, default=160, help="that the decoder learns from")
    parser.add_argument("--posts", type=int, default=16, help="of each of them")
    parser.add_argument("--epochs", type=float, default=2.0, help="of the decoder's training")
    parser.add_argument("--authors", type=int, default=16, help="that are evaluated")
    parser.add_argument("--rows", type=int, default=6, help="newest posts of each")
    parser.add_argument("--texts", type=int, default=8, help="written for each author")
    parser.add_argument("--words", type=int, default=40, help="of a post")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--fresh", action="store_true", help="measure all again")
    options = parser.parse_args()
    kept = ("users", "posts", "epochs", "authors", "rows", "texts", "words")
    about = {name: getattr(options, name) for name in kept}
    results: dict[str, Any] = {"options": about, "ways": {}}
    if FILE.exists() and not options.fresh:
        before = json.loads(FILE.read_text())
        if before["options"] != about:
            raise SystemExit(f"{FILE} was measured with {before['options']}; give --fresh")
        results = before
    personal = Personal(options)
    if DECODER not in personal.cp.names("decoder") or "decoder" not in results:
        results["decoder"] = personal.decoder()
    ways: dict[str, Callable[[int], dict[str, float]]] = {
        "no personalization": partial(personal.measure, personal.nothing),
        "what users have in common": partial(personal.measure, personal.common),
        "the texts in the prompt": partial(personal.measure, personal.in_the_prompt),
        "nearest users": partial(personal.measure, personal.nearest),
        "ours, enrolled": partial(personal.measure, personal.enrolled),
        "ours, code": partial(personal.measure, partial(personal.trained, decoder=DECODER)),
        "ours, full": partial(
            personal.measure, partial(personal.trained, decoder=DECODER, as_codes=False)
        ),
        "ours, full, no decoder": partial(personal.measure, personal.trained),
        "PEFT LoRA r8": partial(personal.peft, "LoRA"),
        "PEFT prefix tuning from text": partial(personal.peft, "prefix"),
    }
    alone = ("no personalization", "what users have in common")
    for num_texts in (0, *options.counts):
        for name, way in ways.items():
            runs = results["ways"].setdefault(name, {})
            if str(num_texts) in runs or (name in alone) != (num_texts == 0):
                continue
            runs[str(num_texts)] = way(num_texts)
            shown = {key: round(value, 4) for key, value in runs[str(num_texts)].items()}
            Console(width=200).print(f"{name}, {num_texts} texts: {shown}")
            results["ways"] = {one: results["ways"][one] for one in ORDER if one in results["ways"]}
            path = record("personal", results)
            results = json.loads(path.read_text())
            path.with_suffix(".md").write_text(page(results))


if __name__ == "__main__":
    main()
