"""Offline generation: many requests through one model, results one by one, files that survive a crash."""

from .engine import Engine
from .parameters import Parameters
from .requests import Request, RequestError
from .results import Choice, Result

__all__ = ["Choice", "Engine", "Parameters", "Request", "RequestError", "Result"]
