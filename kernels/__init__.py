"""The Triton kernels, installed as `simctg_fast.kernels`.

Hugging Face publishes a package called `kernels`, and transformers imports it. With the root of this repository on
`sys.path` that name finds this folder first, so when it is imported as top-level `kernels` it steps aside: the other
package takes over where it is installed, and an empty module answers where it is not. Other clones of this repository
are passed over. Nothing else may be written here; the kernels' own modules use relative imports.
"""

if __name__ == "kernels":

    def _step_aside() -> None:
        import importlib.util
        import sys

        def is_ours(loader: object) -> bool:
            """This file or that of another clone, whatever its version, from a folder, a zip file or compiled."""
            get_code = getattr(loader, "get_code", None)
            code = None if get_code is None else get_code("kernels")
            return code is not None and "_step_aside" in code.co_names

        for finder in sys.meta_path:
            if not hasattr(finder, "find_spec"):
                continue
            # A finder of paths stops at the first: each entry is asked for itself, so that the others come up too.
            by_path = getattr(finder, "__name__", None) == "PathFinder"
            for search in [[entry] for entry in sys.path] if by_path else [None]:
                spec = finder.find_spec("kernels", search)
                if spec is None or spec.loader is None or spec.origin is None:  # no package without __init__.py
                    continue
                if is_ours(spec.loader):
                    continue
                module = importlib.util.module_from_spec(spec)
                sys.modules["kernels"] = module
                spec.loader.exec_module(module)
                return

    _step_aside()
    # Where nothing took over: no submodule of this folder may be loaded a second time under this name.
    __path__ = []
    del _step_aside
