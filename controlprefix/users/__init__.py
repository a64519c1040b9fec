"""Users: training many at once, user codes and their decoder, enrolment, privacy audit."""

from controlprefix.users.decoder_training import DecoderReport
from controlprefix.users.enrolment import EnrolmentReport, enroll_each
from controlprefix.users.migration import MigrationReport
from controlprefix.users.privacy_audit import PrivacyReport
from controlprefix.users.user_auditor import UserAuditor
from controlprefix.users.user_trainer import UserTrainer
from controlprefix.users.user_training import UsersReport, usable_texts

__all__ = [
    "DecoderReport",
    "EnrolmentReport",
    "MigrationReport",
    "PrivacyReport",
    "UserAuditor",
    "UserTrainer",
    "UsersReport",
    "enroll_each",
    "usable_texts",
]
