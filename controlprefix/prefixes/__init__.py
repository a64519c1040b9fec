"""Prefixes as values: slots, their files, their union per request. Needs torch, no model."""

from controlprefix.prefixes.assembly import Part, PrefixBatch, SlotBlock, assemble
from controlprefix.prefixes.container import StorageDtype, content_hash
from controlprefix.prefixes.geometry import SITES, Geometry, LayerShape, Site
from controlprefix.prefixes.key import KINDS, Kind, PrefixKey
from controlprefix.prefixes.prefix import LayerSlots, Prefix
from controlprefix.prefixes.schedule import Schedule
from controlprefix.prefixes.user_code import PrefixDecoder, UserCode

__all__ = [
    "KINDS",
    "SITES",
    "Geometry",
    "Kind",
    "LayerShape",
    "LayerSlots",
    "Part",
    "Prefix",
    "PrefixBatch",
    "PrefixDecoder",
    "PrefixKey",
    "Schedule",
    "Site",
    "SlotBlock",
    "StorageDtype",
    "UserCode",
    "assemble",
    "content_hash",
]
