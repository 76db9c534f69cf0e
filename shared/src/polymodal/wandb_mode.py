"""Whether a run is logged to W&B online, offline or not at all. Imports neither wandb nor lightning."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from polymodal.config import LoggingConfig

__all__ = ["wandb_mode"]


def wandb_mode(config: LoggingConfig) -> Literal["online", "offline", "off"]:
    """``online``, ``offline`` or ``off``: auto is online only where an account is configured; never a prompt.

    ``WANDB_MODE`` set by the user wins over auto. Tests of a terminal or a login are left out on purpose: wandb would
    ask there.
    """
    if config.wandb != "auto":
        return config.wandb
    forced = os.environ.get("WANDB_MODE", "")
    if forced == "online":
        return "online"
    if forced in ("offline", "dryrun"):
        return "offline"
    if forced == "disabled":
        return "off"
    return "online" if _has_account() else "offline"


def _has_account() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        hosts = netrc.netrc(str(file)).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    return address in hosts
