"""Stands in for torchvision, of which there is no CPU build: vLLM imports it for some text models too and never calls it."""

import enum
import importlib.machinery
import sys
import types

__version__ = "0.28.0"


class _Anything(types.ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__class_getitem__": classmethod(lambda cls, _: cls)})
        setattr(self, name, made)
        return made


class _Modes(enum.Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


for _name in ("io", "ops", "utils", "transforms", "transforms.functional", "transforms.v2", "transforms.v2.functional"):
    _module = _Anything(f"{__name__}.{_name}")
    _module.__path__ = []
    _module.__spec__ = importlib.machinery.ModuleSpec(_module.__name__, None, is_package=True)
    _module.InterpolationMode = _Modes
    sys.modules[_module.__name__] = _module
    _parent, _, _leaf = _module.__name__.rpartition(".")
    setattr(sys.modules[_parent], _leaf, _module)
