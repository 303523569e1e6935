"""attending: the open medical language model, end to end.

`attending.load(SOURCE)` gives a model in this process. Importing this package imports neither
torch nor a room.
"""

from importlib.util import find_spec
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attending.engine.local import Model

__version__ = "0.1.0"
ENVIRONMENT = ("ConsultationEnv", "ConsultationTaskset", "TalkHarness")


def load(source: str | PathLike[str], **options: Any) -> "Model":
    """Load a model that is on this machine; see `attending.engine.local.load`."""
    from attending.engine import local

    return local.load(str(source), **options)


def __getattr__(name: str) -> Any:
    """For `verifiers`, which finds an environment by a module's `__all__`; nothing without it."""
    if name not in ("__all__", *ENVIRONMENT) or find_spec("verifiers") is None:
        raise AttributeError(f"module 'attending' has no attribute {name!r}")
    if name == "__all__":
        return ["load", *ENVIRONMENT]
    from attending.verifier import environment

    return getattr(environment, name)
