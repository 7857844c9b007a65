"""The command ``demo``, and what it prints."""

from surgery.cli.demo.command import demo

__all__ = ["demo"]
