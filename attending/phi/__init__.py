"""Find and replace identifiers, English and Chinese; if any part fails, nothing passes."""

from attending.phi.actions import Policy
from attending.phi.redact import Stream, find_again, redact
from attending.phi.scan import PhiError, scan
from attending.phi.spans import CATEGORIES, Span

__all__ = ["CATEGORIES", "PhiError", "Policy", "Span", "Stream", "find_again", "redact", "scan"]
