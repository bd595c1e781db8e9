"""Prints every public name with its signature: ``python tests/package/public_api.py``."""

import importlib
import inspect
import re

MODULES = [
    "torchlinop",
    "torchlinop.callbacks",
    "torchlinop.compare",
    "torchlinop.distributed",
    "torchlinop.errors",
    "torchlinop.losses",
    "torchlinop.testing",
]


def lines():
    """A line a name: functions, then classes with their methods and attributes."""
    modules = [importlib.import_module(name) for name in MODULES]
    public = {m: sorted(getattr(m, "__all__", None) or own(m)) for m in modules}
    listed = {getattr(m, name) for m, names in public.items() for name in names}
    for module, names in public.items():
        yield f"{module.__name__}"
        for name in names:
            yield from (f"    {line}" for line in described(name, getattr(module, name), listed))


def own(module):
    """Public names of a module that were made there."""
    return [n for n, x in vars(module).items() if n[0] != "_" and made_in(x, module.__name__)]


def made_in(thing, name):
    return getattr(thing, "__module__", "") == name


def described(name, thing, listed):
    if not inspect.isclass(thing):
        yield f"{name}{signature(thing)}" if callable(thing) else name
        return
    bases = [base.__name__ for base in thing.__bases__ if base is not object]
    yield f"class {name}({', '.join(bases)}){'' if is_error(thing) else signature(thing)}"
    for member in sorted(members(thing, listed)):
        found = inspect.getattr_static(thing, member)
        found = getattr(found, "__func__", found)  # of a class or static method
        yield f"    {member}{signature(found) if inspect.isfunction(found) else ''}"


def members(thing, listed):
    """Its own, and those of bases of ours that are not listed themselves."""
    ours = [base for base in thing.__mro__ if base.__module__.startswith("torchlinop")]
    bases = [base for base in ours if base is thing or base not in listed]
    return {name for base in bases for name in vars(base) if name[0] != "_"}


def is_error(thing):
    return issubclass(thing, BaseException)


def signature(function):
    """Names, kinds and defaults; the keywords that ``**options`` stands for."""
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError):
        return ""
    plain = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    text = str(found.replace(parameters=plain, return_annotation=found.empty))
    text = re.sub(r"<(?:function|class|object) '?([\w.]+).*?>", r"<\1>", text)
    text = re.sub(r"\{('[^{}]*')\}", lambda m: f"{{{', '.join(sorted(m[1].split(', ')))}}}", text)
    for parameter in found.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            text = text.replace(f"**{parameter.name}", keywords(parameter, function))
    return text


def keywords(parameter, function):
    options = re.fullmatch(r"Unpack\[(\w+)\]", str(parameter.annotation))
    if not options:
        return f"**{parameter.name}"
    space = getattr(function, "__globals__", None) or vars(inspect.getmodule(function))
    names = space[options[1]].__annotations__
    return f"**{{{', '.join(names)}}}"


if __name__ == "__main__":
    print("\n".join(lines()))
