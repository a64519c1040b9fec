"""Prefixes as values: slots, their files, their union per request. Needs torch, no model."""

from typing import TYPE_CHECKING

from controlprefix._lazy import lazy_exports

if TYPE_CHECKING:
    from controlprefix.prefixes.assembly import (
        DecoupledBlock,
        Part,
        PrefixBatch,
        SlotBlock,
        assemble,
    )
    from controlprefix.prefixes.file_format import StorageDtype
    from controlprefix.prefixes.geometry import SITES, Form, Geometry, LayerShape, Site
    from controlprefix.prefixes.key import KINDS, Kind, PrefixKey, content_hash
    from controlprefix.prefixes.layer_slots import LayerSlots
    from controlprefix.prefixes.prefix import Prefix
    from controlprefix.prefixes.relevance import Relevance
    from controlprefix.prefixes.schedule import Schedule
    from controlprefix.prefixes.user_code import PrefixDecoder, UserCode

_HOMES = {
    "DecoupledBlock": "assembly",
    "Form": "geometry",
    "Geometry": "geometry",
    "KINDS": "key",
    "Kind": "key",
    "LayerShape": "geometry",
    "LayerSlots": "layer_slots",
    "Part": "assembly",
    "Prefix": "prefix",
    "PrefixBatch": "assembly",
    "PrefixDecoder": "user_code",
    "PrefixKey": "key",
    "Relevance": "relevance",
    "SITES": "geometry",
    "Schedule": "schedule",
    "Site": "geometry",
    "SlotBlock": "assembly",
    "StorageDtype": "file_format",
    "UserCode": "user_code",
    "assemble": "assembly",
    "content_hash": "key",
}

__all__ = [
    "KINDS",
    "SITES",
    "DecoupledBlock",
    "Form",
    "Geometry",
    "Kind",
    "LayerShape",
    "LayerSlots",
    "Part",
    "Prefix",
    "PrefixBatch",
    "PrefixDecoder",
    "PrefixKey",
    "Relevance",
    "Schedule",
    "Site",
    "SlotBlock",
    "StorageDtype",
    "UserCode",
    "assemble",
    "content_hash",
]

__getattr__ = lazy_exports(__name__, _HOMES)
