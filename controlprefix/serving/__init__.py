"""An OpenAI-compatible server of one frozen model and many tenants' prefixes."""

from controlprefix.serving.app import create_app
from controlprefix.serving.server import Server
from controlprefix.serving.settings import ServerLimits

__all__ = ["Server", "ServerLimits", "create_app"]
