"""Read a function's signature out of its module's text, so that no code of the module runs.

Example:
    >>> import ast
    >>> str(signature_in(ast.parse("def f(completions, *, target=1, **columns): ..."), "f"))
    '(completions, *, target=None, **columns)'
    >>> signature_in(ast.parse("f = make()"), "f") is None
    True
"""

from __future__ import annotations

import ast
from inspect import Parameter, Signature


def signature_in(module: ast.Module, name: str) -> Signature | None:
    """Return the parameters of a function or lambda that the module defines once; defaults become None.

    None if the text does not say: an imported or decorated function, the result of a call, a class, several definitions.
    """
    if [each for node in ast.walk(module) for each in _names(node)].count(name) != 1:
        return None
    node = next((node for node in module.body if name in [*_names(node), *_assigned(node)]), None)
    if isinstance(node, ast.FunctionDef) and not node.decorator_list:
        return _signature(node.args)
    if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Lambda):
        return _signature(node.value.args)
    return None


def _names(node: ast.AST) -> list[str]:
    """Return the names that this node of the tree defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.ImportFrom | ast.Import):
        return [alias.asname or alias.name for alias in node.names]
    return [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []


def _assigned(node: ast.AST) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _signature(arguments: ast.arguments) -> Signature:
    in_order = [*arguments.posonlyargs, *arguments.args]
    required = len(in_order) - len(arguments.defaults)
    parameters = [
        Parameter(
            argument.arg,
            Parameter.POSITIONAL_ONLY if place < len(arguments.posonlyargs) else Parameter.POSITIONAL_OR_KEYWORD,
            default=Parameter.empty if place < required else None,
        )
        for place, argument in enumerate(in_order)
    ]
    if arguments.vararg:
        parameters.append(Parameter(arguments.vararg.arg, Parameter.VAR_POSITIONAL))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters.append(
            Parameter(argument.arg, Parameter.KEYWORD_ONLY, default=Parameter.empty if default is None else None)
        )
    if arguments.kwarg:
        parameters.append(Parameter(arguments.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(parameters)
