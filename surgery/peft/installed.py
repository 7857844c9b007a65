"""Whether PEFT is there, and its list of methods, to which ours is added."""

from __future__ import annotations

from typing import Any

from surgery.errors import MissingExtra
from surgery.models.transformers_api import imported
from surgery.names import SPECTRAL


def check_peft() -> None:
    """Import transformers and PEFT.

    Raises:
        MissingExtra: one is not installed, or cannot be imported.
    """
    imported("the adapters of PEFT are trained in models of")
    try:
        import peft  # noqa: F401
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "peft"
        raise MissingExtra(
            "surgery.peft is a method of PEFT, which " + ("is not installed" if missing else "cannot be imported"),
            got=None if missing else error,
            hint="pip install 'peft>=0.18'",
        ) from error


def spectral_type() -> Any:
    """The member of PEFT's ``PeftType`` for adapters of scales and cores; made when it is first asked for.

    PEFT registers methods under the members of this enumeration only. A member is made as the class statement makes it.
    """
    from peft import PeftType

    kind: Any = PeftType
    if SPECTRAL not in kind.__members__:
        member = str.__new__(kind, SPECTRAL)
        member._name_ = member._value_ = SPECTRAL
        member.__objclass__ = kind
        member._sort_order_ = len(kind._member_names_)
        kind._member_names_.append(SPECTRAL)
        kind._member_map_[SPECTRAL] = member
        kind._value2member_map_[SPECTRAL] = member
        type.__setattr__(kind, SPECTRAL, member)
    return kind.__members__[SPECTRAL]
