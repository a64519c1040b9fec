"""What a store keeps of users beside their prefixes: texts, feedback and profiles."""

from collections.abc import Collection, Sequence

from sqlalchemy.orm import Session

from controlprefix.prefixes import PrefixKey
from controlprefix.store import profiles, user_texts
from controlprefix.store.database import Database
from controlprefix.store.encryption import TenantCipher
from controlprefix.store.profiles import SimilarUser
from controlprefix.store.records import Profile, user_name
from controlprefix.store.user_texts import UserTextKind


class UserData:
    """The methods of `PrefixStore` for data of users; forgetting a user removes all of it."""

    _database: Database
    _cipher: TenantCipher

    def keep_texts(self, user: str, texts: Sequence[str]) -> None:
        """Keep texts of a user, to train on later."""
        user = user_name(user)
        self._database.run(
            lambda session, tenant: user_texts.add(session, tenant, self._cipher, user, texts),
            write=True,
        )

    def user_texts(self, user: str) -> list[str]:
        """The kept texts of a user, oldest first.

        Raises:
            StoreKeyError: If they cannot be decrypted.
        """
        return self._kept_of(user, "text")

    def users_with_texts(self) -> list[str]:
        """The users with kept texts, sorted."""
        return self._users("text")

    def keep_feedback(self, user: str, entries: Sequence[str]) -> int:
        """Keep feedback of a user, as JSON, to learn from later; the newest 1,000 stay.

        Returns:
            How many entries the user has now.
        """
        user = user_name(user)

        def keep(session: Session, tenant: int) -> int:
            user_texts.add(session, tenant, self._cipher, user, entries, "feedback")
            return user_texts.trim_feedback(session, tenant, user)

        return self._database.run(keep, write=True)

    def feedback(self, user: str) -> list[str]:
        """The kept feedback of a user, oldest first.

        Raises:
            StoreKeyError: If it cannot be decrypted.
        """
        return self._kept_of(user, "feedback")

    def has_feedback(self, user: str) -> bool:
        """Whether feedback of a user is kept."""
        name = user_name(user)
        return self._database.run(
            lambda session, tenant: user_texts.exists(session, tenant, name, "feedback")
        )

    def users_with_feedback(self) -> list[str]:
        """The users with kept feedback, sorted."""
        return self._users("feedback")

    def keep_profile(self, user: str, profile: Profile) -> None:
        """Keep a user's profile, in place of an earlier one of the same embedder."""
        user = user_name(user)
        self._database.run(
            lambda session, tenant: profiles.replace(session, tenant, self._cipher, user, profile),
            write=True,
        )

    def similar_users(
        self,
        embedder: str,
        values: Sequence[float],
        *,
        limit: int = 10,
        exclude: Collection[str] = (),
    ) -> list[SimilarUser]:
        """The users with the most similar kept profiles, the most similar first.

        Args:
            embedder: Name of the embedding model of the profiles.
            values: The embedding to compare with.
            limit: Users at most.
            exclude: Users to leave out.
        """
        return self._database.run(
            lambda session, tenant: profiles.nearest(
                session, tenant, self._cipher, embedder, values, limit=limit, exclude=exclude
            )
        )

    def _kept_of(self, user: str, kind: UserTextKind) -> list[str]:
        user = PrefixKey("user", user).name
        rows = self._database.run(
            lambda session, tenant: user_texts.rows_of(session, tenant, user, kind)
        )
        return [user_texts.decrypt(row, self._cipher) for row in rows]

    def _users(self, kind: UserTextKind) -> list[str]:
        return self._database.run(lambda session, tenant: user_texts.users(session, tenant, kind))
