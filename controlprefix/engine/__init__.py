"""`ControlPrefix`, the public class; each file has its methods for one purpose."""

from controlprefix.engine.control_prefix import ControlPrefix

__all__ = ["ControlPrefix"]
