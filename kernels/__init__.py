"""The Triton kernels, installed as `simctg_fast.kernels`.

Hugging Face publishes a package called `kernels`, and transformers imports it. With the root of this repository on
`sys.path` that name finds this folder first, so when it is imported as top-level `kernels` it steps aside: the other
package takes over where it is installed, and an empty module answers where it is not. Nothing else may be written
here; the kernels' own modules use relative imports.
"""

if __name__ == "kernels":

    def _step_aside() -> None:
        import importlib.util
        import os
        import sys

        here = os.path.realpath(os.path.dirname(__file__))
        elsewhere = [p for p in sys.path if os.path.realpath(os.path.join(p or os.getcwd(), "kernels")) != here]
        for finder in sys.meta_path:
            search = elsewhere if getattr(finder, "__name__", None) == "PathFinder" else None
            spec = finder.find_spec("kernels", search) if hasattr(finder, "find_spec") else None
            if spec is None or spec.loader is None or spec.origin is None:  # a folder without __init__.py is no package
                continue
            if os.path.realpath(os.path.dirname(spec.origin)) == here:
                continue
            module = importlib.util.module_from_spec(spec)
            sys.modules["kernels"] = module
            spec.loader.exec_module(module)
            return

    _step_aside()
    # Where nothing took over: no submodule of this folder may be loaded a second time under this name.
    __path__ = []
    del _step_aside
