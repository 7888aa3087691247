"""Makes PEFT know the method LREG. The only file that touches PEFT's tables.

PEFT keeps its methods in the str-enum `PeftType` and has no plugin discovery, so importing this package has to add a
member. PEFT is not imported at module level: `add_enum_member` is plain Python and is tested on every interpreter.
"""

import re
from enum import Enum
from importlib.metadata import version
from typing import Any

METHOD = "lreg"
#: The newest versions that the tests have passed with; a later one is warned of when the package is imported.
TESTED = {"transformers": (5, 24), "peft": (0, 21)}
_OWN_PACKAGE = __name__.partition(".")[0]


def add_enum_member(enum_class: type[Enum], name: str) -> Enum:
    """Add the member `name = "name"` to a str-enum whose members equal their names, or return the one it has.

    The member behaves like one from the class body: lookup by name, value and attribute, iteration, pickle, deepcopy
    and JSON. Works on CPython 3.11 to 3.14.
    """
    if name in enum_class.__members__:
        return enum_class[name]
    member = str.__new__(enum_class, name)  # type: ignore[type-var]
    member._name_ = name
    member._value_ = name
    member.__objclass__ = enum_class  # type: ignore[attr-defined]
    member._sort_order_ = len(enum_class._member_names_)  # type: ignore[attr-defined]
    # From 3.12 on members are found as class attributes. EnumType refuses to set those, so its __setattr__ is bypassed.
    type.__setattr__(enum_class, name, member)
    enum_class._member_names_.append(name)
    enum_class._member_map_[name] = member
    enum_class._value2member_map_[name] = member
    return member


def upstream_has_lreg() -> bool:
    """Whether PEFT itself (not this package) provides a method called LREG."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import PeftType

    if METHOD.upper() not in PeftType.__members__:
        return False
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[METHOD.upper()])
    return config_class is not None and config_class.__module__.partition(".")[0] != _OWN_PACKAGE


def untested_versions() -> list[str]:
    """What is installed beyond `TESTED`, in words."""
    found = []
    for package, newest in TESTED.items():
        installed = version(package)
        match = re.match(r"(\d+)\.(\d+)", installed)
        if match and (int(match[1]), int(match[2])) > newest:
            found.append(f"{package} {installed} (tested: up to {newest[0]}.{newest[1]})")
    return found


def register(config_class: type, model_class: type) -> bool:
    """Register LReg with PEFT; safe to call again, also after this package was re-imported.

    Returns:
        False, after a warning, if PEFT has an LREG of its own: that one is left in place.

    Warns:
        UserWarning: if transformers or PEFT are later than what was tested.
    """
    import warnings

    from peft import mapping
    from peft.utils import register_peft_method
    from peft.utils.peft_types import PeftType

    if upstream_has_lreg():
        warnings.warn(
            "This version of PEFT ships its own LREG method, which lreg_peft leaves in place: "
            "use peft.LRegConfig, or an earlier PEFT together with lreg_peft.",
            UserWarning,
            stacklevel=3,
        )
        return False
    if untested := untested_versions():
        warnings.warn(
            f"lreg_peft was tested with earlier versions than {' and '.join(untested)}. If something fails, install "
            "those.",
            UserWarning,
            stacklevel=3,
        )
    peft_type: Any = add_enum_member(PeftType, METHOD.upper())
    # A second import of this package made new classes: PEFT must not go on with the old ones.
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING.pop(peft_type, None)
    mapping.PEFT_TYPE_TO_TUNER_MAPPING.pop(peft_type, None)
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING.pop(peft_type, None)
    register_peft_method(name=METHOD, config_cls=config_class, model_cls=model_class)
    return True
