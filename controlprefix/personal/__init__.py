"""Users: many in one run, codes of a shared decoder, and prefixes at once."""

from controlprefix.personal.leaks import LeakReport
from controlprefix.personal.learning import DecoderReport
from controlprefix.personal.personalizer import Personalizer
from controlprefix.personal.users import UsersReport, usable_texts

__all__ = ["DecoderReport", "LeakReport", "Personalizer", "UsersReport", "usable_texts"]
