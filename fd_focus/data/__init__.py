"""Pictures and tables. The public names of its modules are here too, as they were when it was one module."""


def __getattr__(name):
    if name.startswith("_"): raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    for part in ("pictures", "splits", "tables", "benchmarks", "truth", "loaders"):
        module = import_module(f"{__name__}.{part}")
        if name in module.__all__: return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
