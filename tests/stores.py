"""What tests of stores share: a geometry, two users, and a version of one."""

from controlprefix import Geometry, Prefix
from controlprefix.store import NewVersion, PrefixKey

GEOMETRY = Geometry.uniform(num_layers=2, num_kv_heads=2, head_dim=4, fingerprint="f" * 64)
ANA, BO = PrefixKey("user", "ana"), PrefixKey("user", "bo")
F = GEOMETRY.fingerprint


def new(key: PrefixKey = ANA, seed: int = 0, geometry: Geometry = GEOMETRY) -> NewVersion:
    return NewVersion(key, Prefix.random(geometry, num_slots=3, seed=seed), {"seed": seed})
