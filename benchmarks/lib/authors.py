"""Authors of blogs as users: prefixes from some of their posts, evaluated on their newest posts.

DATA has the files `authors_blogs.<split>.jsonl.gz`. A decoder is trained on the posts of some
authors; others, which nothing is trained on, are evaluated.
"""

import argparse
import copy
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline, make_union

from controlprefix import Example, Prefix, Request
from controlprefix.embeddings import embed
from controlprefix.evaluation.comparison import adapter_training
from controlprefix.evaluation.comparison.measures import TEMPERATURE
from controlprefix.evaluation.comparison.peft_methods import LORA, PEFT_KINDS
from controlprefix.model import FrozenModel
from controlprefix.model.tokenization import TokenizedExample
from controlprefix.prefixes import PrefixDecoder, PrefixKey, UserCode
from controlprefix.training import TrainingSettings
from controlprefix.training.report import CHECKPOINT_FILE
from controlprefix.training.run import learning_rate_schedule
from controlprefix.users.decoder_training import CODE_LEARNING_RATE

from lib.datasets import read_rows
from lib.models import add_model_options, engine, load_from

DECODER = "bloggers"
NUM_SLOTS = 16
EPOCHS = 3
NUM_NEAREST = 8
NUM_RESERVED = 24  # authors that the defaults were chosen with
NUM_UNUSED_AFTER = 20  # posts of an author, at least
POST_TOKENS = 48
PEFT_RATES = {"PEFT LoRA r8": 3e-3, "PEFT prefix tuning from text": 3e-2}
Posts = Mapping[str, Sequence[str]]  # author -> posts, oldest first


def add_author_options(parser: argparse.ArgumentParser) -> None:
    """Add DATA and the options of the decoder's training."""
    add_model_options(parser)
    parser.add_argument("data", metavar="DATA", type=Path)
    parser.add_argument("--store", default="sqlite:///authors.db", help="URL; keeps the decoder")
    parser.add_argument("--work", type=Path, default=Path("authors.run"), help="checkpoints")
    parser.add_argument("--users", type=int, default=160, help="authors the decoder is trained on")
    parser.add_argument("--posts", type=int, default=16, help="posts of each of them")
    parser.add_argument("--epochs", type=float, default=2.0, help="of the decoder's training")
    parser.add_argument("--rows", type=int, default=6, help="newest posts to evaluate on")
    parser.add_argument("--words", type=int, default=40, help="posts are cut to so many words")


@cache
def read_posts(folder: Path, split: str, num_words: int) -> dict[str, list[str]]:
    """The posts of each author, oldest first, cut to their first words."""
    posts: dict[str, list[str]] = {}
    for row in read_rows(folder, "authors_blogs", split):
        text = " ".join(row["text"].split()[:num_words])
        posts.setdefault(row["author"], []).append(text)
    return posts


def authorship_classifier(posts: Posts) -> Pipeline:
    """A linear classifier of authors over words and pieces of words."""
    pipeline = make_pipeline(
        make_union(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True),
        ),
        LogisticRegression(C=10, max_iter=1000),
    )
    pairs = [(text, author) for author, texts in posts.items() for text in texts]
    return pipeline.fit([text for text, _ in pairs], [author for _, author in pairs])


class Authors:
    """The authors, and ways to get each one's prefix from some posts.

    A way is a function from posts to a mapping of author to the name of a stored user.

    Attributes:
        authors: The evaluated authors.
        posts, newest: Posts to train on, and posts to evaluate on, of each.
        decoder_posts: Posts of the authors that the decoder is trained on.
        swapped: Author -> another author, whose prefix is used for comparison.
    """

    def __init__(self, options: argparse.Namespace, frozen: FrozenModel | None = None) -> None:
        self.options = options
        read = partial(read_posts, options.data, num_words=options.words)
        train, dev, test = read("train"), read("dev"), read("test")
        names = sorted(train)
        random.Random(0).shuffle(names)
        names = names[min(NUM_RESERVED, len(names) // 4) :]
        self.authors, others = names[: options.authors], names[options.authors :]
        self.decoder_posts = {a: train[a][: options.posts] for a in others[: options.users]}
        self.posts = {author: train[author] for author in self.authors}
        self.newest = {author: test[author][: options.rows] for author in self.authors}
        self.swapped = dict(zip(self.authors, self.authors[1:] + self.authors[:1], strict=True))
        most = max([NUM_UNUSED_AFTER, *getattr(options, "counts", ())])  # all that a method gets
        later = {author: train[author][most:] + dev[author] for author in self.authors}
        self.classifier = authorship_classifier(later)
        self.cp = engine(frozen or load_from(options), options.store)

    def train_decoder(self, seed: int = 0) -> dict[str, float]:
        """Train the decoder, and return its figures."""
        start = time.perf_counter()
        report = self.cp.learn_decoder(
            self.decoder_posts,
            name=DECODER,
            num_slots=NUM_SLOTS,
            epochs=self.options.epochs,
            validation=0.03,
            seed=seed,
            folder=self.options.work,
            resume=True,
            progress=False,
        )
        return {
            "users": report.num_users,
            "r2": report.r2,
            "best loss": report.training.best_loss,
            "tokens": report.training.num_tokens,
            "seconds": time.perf_counter() - start,
        }

    # --- ways ---

    def no_prefix(self, posts: Posts) -> dict[str, str]:
        """The plain model."""
        return {}

    def mean_code(self, posts: Posts) -> dict[str, str]:
        """The mean of all codes for everyone: what the decoder's users have in common."""
        decoder = self.decoder()
        return {author: self._put(author, decoder.decode(decoder.mean_code)) for author in posts}

    def in_the_prompt(self, posts: Posts) -> dict[str, str]:
        """Keys and values of the posts: equal to prompting with them."""
        return {
            author: self._put(author, self.cp.prefix_from_text("\n\n".join(texts) + "\n\n"))
            for author, texts in posts.items()
        }

    def enrolled(self, posts: Posts) -> dict[str, str]:
        """The code that is predicted from the posts."""
        for author, texts in posts.items():
            self.cp.enroll(author, texts, decoder=DECODER)
        return {author: author for author in posts}

    def nearest(self, posts: Posts) -> dict[str, str]:
        """The mean code of the most similar authors of the decoder's training."""
        decoder, codes = self.decoder(), self.trained_codes()
        profiles = torch.stack([embed(texts).mean(0) for texts in self.decoder_posts.values()])
        for author, texts in posts.items():
            similar = torch.nn.functional.normalize(profiles, dim=1) @ embed(texts).mean(0)
            code = codes[similar.topk(min(NUM_NEAREST, len(codes))).indices].mean(0)
            self._put(author, decoder.decode(UserCode(decoder.content_hash, code)))
        return {author: author for author in posts}

    def trained(self, posts: Posts, **options: Any) -> dict[str, str]:
        """`train_users` on the posts."""
        defaults = {"epochs": EPOCHS, "validation": 0, "progress": False}
        if "decoder" not in options:
            defaults["num_slots"] = NUM_SLOTS
        report = self.cp.train_users(posts, **{**defaults, **options})
        if report.failed:
            raise SystemExit(f"users that could not be trained: {report.failed}")
        return {author: author for author in posts}

    def trained_codes(self) -> torch.Tensor:
        """The codes of the decoder's users, `(users, num_slots, width)`, from its checkpoint."""
        state = load_file(self.options.work / CHECKPOINT_FILE)
        changes = [state[f"best.changes.{i}"] for i in range(len(self.decoder_posts))]
        return CODE_LEARNING_RATE / TrainingSettings().peak_learning_rate * torch.stack(changes)

    def decoder(self) -> PrefixDecoder:
        """The trained decoder."""
        models = self.cp.store.for_model(self.cp.geometry.fingerprint)
        decoder = models.get(PrefixKey("decoder", DECODER)).value
        assert isinstance(decoder, PrefixDecoder)
        return decoder

    def _put(self, user: str, prefix: Prefix) -> str:
        self.cp.put("user", user, prefix)
        return user

    # --- figures ---

    def measure(
        self, way: Callable[[Posts], dict[str, str]], num_posts: int, num_texts: int = 0
    ) -> dict[str, float]:
        """The figures of a way that stores prefixes, from `num_posts` posts per author.

        Args:
            way: The way.
            num_posts: Posts that it gets.
            num_texts: Texts to generate per author for the accuracy of authorship.
        """
        posts = {author: self.posts[author][:num_posts] for author in self.authors}
        start = time.perf_counter()
        users = way(posts)
        seconds = time.perf_counter() - start
        for user in users.values():  # so that no figure includes reading them
            self.cp.resolve(Request(prompt="x", user=user))
        figures = {"nll": self.nll(users)}
        if users:
            other = {author: users[self.swapped[author]] for author in self.authors}
            figures["nll, another's"] = self.nll(other)
            sizes = [self._size(user) for user in users.values()]
            figures["seconds per user"] = seconds / len(posts)
            figures["bytes per user"] = sum(sizes) / len(sizes)
        if num_texts:
            figures["authorship"] = self.authorship(self.generate(users, num_texts))
        for user in users.values():
            self.cp.forget_user(user)
        return {name: round(value, 5) for name, value in figures.items()}

    def nll(self, users: Mapping[str, str]) -> float:
        """Nats per token of the authors' newest posts."""
        examples = [
            Example(prompt="", raw=True, completion=text, user=users.get(author))
            for author in self.authors
            for text in self.newest[author]
        ]
        scores = self.cp.score(examples)
        return -sum(s.log_likelihood for s in scores) / sum(s.num_tokens for s in scores)

    def generate(self, users: Mapping[str, str], num_texts: int) -> dict[str, list[str]]:
        """Posts with each author's prefix."""
        requests = [
            Request(
                prompt=str(self.cp.tokenizer.bos_token),
                raw=True,
                user=users.get(author),
                max_new_tokens=POST_TOKENS,
                temperature=TEMPERATURE,
                seed=i,
            )
            for author in self.authors
            for i in range(num_texts)
        ]
        texts = iter([c.text for c in self.cp.generate(requests, batch_size=32)])
        return {author: [next(texts) for _ in range(num_texts)] for author in self.authors}

    def authorship(self, texts: Posts) -> float:
        """How often the classifier finds the author whose prefix was used."""
        hits = [
            float(prediction == author)
            for author, generated in texts.items()
            for prediction in self.classifier.predict([text or " " for text in generated])
        ]
        return sum(hits) / len(hits)

    def _size(self, user: str) -> int:
        return self.cp.version_info("user", user).size_bytes

    def measure_peft(self, name: str, num_posts: int, num_texts: int = 0) -> dict[str, float]:
        """The figures of a PEFT adapter per author, in as many steps, one author after another."""
        kind = {**PEFT_KINDS, "PEFT LoRA r8": LORA}[name]
        frozen = self.cp.frozen_model
        own, other, num_tokens, seconds, size = 0.0, 0.0, 0, 0.0, 0
        generated: dict[str, list[str]] = {}
        author_before = {other: author for author, other in self.swapped.items()}
        for author in self.authors:
            texts = self.posts[author][:num_posts]
            steps = EPOCHS * -(-len(texts) // 4)
            torch.manual_seed(0)
            copied, rows = copy.deepcopy(self.cp.model), self._tokenized(texts)
            start = time.perf_counter()  # without the copy, which a real service would not make
            model = kind.add_adapter(frozen, copied, rows, NUM_SLOTS)
            adapter_training.train(
                model,
                rows,
                frozen.request_tokenizer,
                batch_size=4,
                learning_rate=PEFT_RATES[name],
                steps=steps,
                seed=0,
                schedule=learning_rate_schedule(steps),
            )
            seconds += time.perf_counter() - start
            size = sum(p.numel() * 2 for p in model.parameters() if p.requires_grad)
            tokenizer = frozen.request_tokenizer
            newest = self._tokenized(self.newest[author])
            nats, count = adapter_training.nll(model, newest, tokenizer)
            own, num_tokens = own + nats, num_tokens + count
            # This adapter is also evaluated on the author who gets it when they are swapped.
            newest = self._tokenized(self.newest[author_before[author]])
            other += adapter_training.nll(model, newest, tokenizer)[0]
            if num_texts:
                start_token = [int(self.cp.tokenizer.bos_token_id)]
                generated[author] = adapter_training.sample(
                    model,
                    self.cp.frozen_model,
                    [start_token] * num_texts,
                    max_new_tokens=POST_TOKENS,
                    seed=0,
                )
        figures = {
            "nll": own / num_tokens,
            "nll, another's": other / num_tokens,
            "seconds per user": seconds / len(self.authors),
            "bytes per user": float(size),
        }
        if generated:
            figures["authorship"] = self.authorship(generated)
        return {key: round(value, 5) for key, value in figures.items()}

    def _tokenized(self, texts: Sequence[str]) -> list[TokenizedExample]:
        encode = self.cp.frozen_model.request_tokenizer.example_ids
        return [encode(Example(prompt="", raw=True, completion=text)) for text in texts]
