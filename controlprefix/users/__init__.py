"""Users: training many at once, user codes and their decoder, enrolment, privacy audit."""

from controlprefix.users.decoder_training import DecoderReport
from controlprefix.users.migration import MigrationReport
from controlprefix.users.privacy_audit import PrivacyReport
from controlprefix.users.user_trainer import UserTrainer
from controlprefix.users.user_training import UsersReport, usable_texts

__all__ = [
    "DecoderReport",
    "MigrationReport",
    "PrivacyReport",
    "UserTrainer",
    "UsersReport",
    "usable_texts",
]
