"""insitu: train the model you are serving, in place.

Public names are resolved on first use, so that ``import insitu`` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from insitu.optim import APOLLO, APOLLOMini, ApolloQN, ApolloQNW, GradientRelease, param_groups, preset, quantize

__version__ = "0.1.0"
__all__ = [
    "APOLLO",
    "APOLLOMini",
    "ApolloQN",
    "ApolloQNW",
    "GradientRelease",
    "__version__",
    "param_groups",
    "preset",
    "quantize",
]

_HOMES = {
    "APOLLO": "insitu.optim",
    "APOLLOMini": "insitu.optim",
    "ApolloQN": "insitu.optim",
    "ApolloQNW": "insitu.optim",
    "GradientRelease": "insitu.optim",
    "param_groups": "insitu.optim",
    "preset": "insitu.optim",
    "quantize": "insitu.optim",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'insitu' has no attribute {name!r}; its public names are {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
