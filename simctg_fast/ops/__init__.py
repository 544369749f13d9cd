"""Operators: one file each, with schema, fake and the choice of backend. The only floor that knows about backends."""

from ._backends import backend_info as backend_info
