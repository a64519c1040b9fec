"""Users: many in one run, codes of a shared decoder, and prefixes at once."""

from controlprefix.users.decoder_training import DecoderReport
from controlprefix.users.multi_user import UsersReport, usable_texts
from controlprefix.users.privacy_audit import LeakReport
from controlprefix.users.user_trainer import Personalizer

__all__ = ["DecoderReport", "LeakReport", "Personalizer", "UsersReport", "usable_texts"]
