"""An OpenAI-compatible server of one frozen model and many tenants' prefixes."""

from controlprefix.serving.app import create_app
from controlprefix.serving.tenants import Gateway, Limits

__all__ = ["Gateway", "Limits", "create_app"]
