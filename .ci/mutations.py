"""What .ci/mutants changes: places where an operator applies, and the module with one change.

cosmic-ray makes most changes: other operators, comparisons, numbers and truth values, conditions
turned round, loops left out, decorators removed. Two operators of our own leave out keyword
arguments and statements. Strings are never changed, nor is what no test is to notice: annotations,
imports for type checkers, what a signature takes by position, the words of errors and warnings, and
that `zip` is strict.
"""

import ast
import dataclasses
import functools
import itertools
import pathlib
import random
import re

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "scion_jax"

# cosmic-ray's, but for those that any call would notice: shifts, powers of sums and the like.
_REPLACED = "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_Mul Pow_Mul BitOr_BitAnd BitAnd_BitOr"
_COMPARED = "Eq_NotEq NotEq_Eq Lt_LtE LtE_Lt Gt_GtE GtE_Gt Lt_Gt Gt_Lt Is_IsNot IsNot_Is"
_OTHERS = """
    NumberReplacer AddNot ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr
    ReplaceOrWithAnd ReplaceUnaryOperator_Delete_Not ReplaceUnaryOperator_Delete_USub
    RemoveDecorator ZeroIterationForLoop ReplaceBreakWithContinue ReplaceContinueWithBreak
    ExceptionReplacer
"""


class _DropKeyword:
    """Leaves out a keyword argument."""

    def mutation_positions(self, node):
        if node.type == "argument" and node.children[1] == "=":
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        return _leaf("**{}", node)


class _DropStatement:
    """Leaves out a call made for its effect, or a new value made of a name's old one."""

    def mutation_positions(self, node):
        if node.type == "simple_stmt" and self._may_go(node.children[0]):
            yield node.start_pos, node.end_pos

    def _may_go(self, statement):
        if statement.type != "expr_stmt":
            return statement.type == "atom_expr"
        target, sign, *value = statement.children
        if sign != "=":
            return sign.type == "operator"  # += and the like
        name, code = target.get_code().strip(), "".join(part.get_code() for part in value)
        return name.isidentifier() and re.search(rf"\b{name}\b", code) is not None

    def mutate(self, node, index):
        node.children[0] = _leaf("pass", node)
        return node


def _leaf(code, node):
    from parso.python.tree import Name

    return Name(code, node.start_pos, node.get_first_leaf().prefix)


@functools.cache
def _operators():
    import cosmic_ray.plugins  # here, since the tests read this file without it

    names = [f"ReplaceBinaryOperator_{name}" for name in _REPLACED.split()]
    names += [f"ReplaceComparisonOperator_{name}" for name in _COMPARED.split()]
    names += _OTHERS.split()
    made = {name: cosmic_ray.plugins.get_operator(f"core/{name}")() for name in names}
    return made | {"DropKeyword": _DropKeyword(), "DropStatement": _DropStatement()}


_OPPOSITES = {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is}


class _Essence(ast.NodeTransformer):
    """Takes out what no test is to notice."""

    def visit_arguments(self, node):
        node.args = [*node.posonlyargs, *node.args, *node.kwonlyargs]
        node.defaults += [default for default in node.kw_defaults if default is not None]
        node.posonlyargs, node.kwonlyargs, node.kw_defaults = [], [], []
        return self.generic_visit(node)

    def visit_arg(self, node):
        return ast.arg(node.arg)

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node):
        node.annotation = ast.Name("…")
        return self.generic_visit(node)

    def visit_If(self, node):
        return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    def visit_UnaryOp(self, node):  # so that two ways to say the opposite are one
        self.generic_visit(node)
        match node:
            case ast.UnaryOp(ast.Not(), ast.Compare(ops=[operator])) if (
                type(operator) in _OPPOSITES
            ):
                node.operand.ops = [_OPPOSITES[type(operator)]()]
                return node.operand
        return node

    def visit_Raise(self, node):
        node.exc = getattr(node.exc, "func", node.exc)
        return self.generic_visit(node)

    def visit_Call(self, node):
        function = ast.unparse(node.func)
        if function == "warnings.warn":
            node.args[0] = ast.Name("…")
        unseen = {"zip": "strict", "dataclasses.dataclass": "kw_only"}.get(function, "")
        node.keywords = [
            keyword
            for keyword in node.keywords
            if keyword.arg != unseen and ast.unparse(keyword.value) != "{}"
        ]
        return self.generic_visit(node)


def essence(code):
    """Lists a module's lines, in one form, without what no test is to notice."""
    return ast.unparse(_Essence().visit(ast.parse(code))).splitlines()


def change(before, after, around=24):
    """Writes the difference of two essences as `before` → `after`; empty if there is none."""
    top = _common(before, after)
    bottom = _common(before[top:][::-1], after[top:][::-1])
    parts = (x[top : len(x) - bottom] for x in (before, after))
    old, new = (" ⏎ ".join(line.strip() for line in lines) for lines in parts)
    same = _common(old, new)
    tail = _common(old[same:][::-1], new[same:][::-1])
    start, stop = max(same - around, 0), max(tail - around, 0)
    texts = ("…" * (start > 0) + x[start : len(x) - stop] + "…" * (stop > 0) for x in (old, new))
    return " → ".join(f"`{text}`" for text in texts) if before != after else ""


def spans(module, line):
    """Lists the lines of the statement at a line, less those inside it, and of its definition."""
    definition = range(0)
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):  # outer ones come first
        if isinstance(node, ast.stmt) and line in _lines(node):
            statement = node
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                definition = _lines(node)
    body = getattr(statement, "body", None)
    inside = _lines(body[0]).start if body else statement.end_lineno + 1
    return range(_lines(statement).start, inside), definition


def _lines(node):
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    return range(first, node.end_lineno + 1)


def _common(x, y):
    """Counts the lines, or the letters, in which two agree from their start on."""
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(x, y, strict=False))))


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change: where, what, and the whole module with it."""

    module: str
    definition: str
    operator: str
    line: int
    change: str
    code: str = dataclasses.field(repr=False)

    @property
    def key(self):
        """What tells it from others, although the module may change elsewhere."""
        return self.module, self.definition, self.change

    @property
    def row(self):
        """How tests/mutants.md begins to explain it."""
        escaped = self.change.replace("|", r"\|")
        return f"| `{self.module}` | `{self.definition}` | {escaped} |"

    def __str__(self):
        return f"{self.module}:{self.line} {self.change}"


def places(module):
    """Lists where an operator applies: operator, occurrence, line, definition."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.ast.ast_query import ASTQuery

    nodes = list(ast_nodes(get_ast((PACKAGE / module).read_text())))
    found = []
    for name, operator in _operators().items():
        spots = [(node, at) for node in nodes for at, _ in operator.mutation_positions(node)]
        found += [
            (name, occurrence, line, ASTQuery(node).get_definition_name() or "")
            for occurrence, (node, (line, _)) in enumerate(spots)
        ]
    return found


@functools.cache
def _original(module):
    code = (PACKAGE / module).read_text()
    return code, essence(code)


def make(module, name, occurrence, line, definition):
    """Makes the change; None if the result does not compile, or differs in nothing that counts."""
    from cosmic_ray.mutating import mutate_code

    original, lines = _original(module)
    code = mutate_code(original, _operators()[name], occurrence)
    try:
        text = change(lines, essence(code))
    except SyntaxError:
        return None
    twice = "not not " in code  # is what leaving out `not` makes, too
    return Mutant(module, definition, name, line, text, code) if text and not twice else None


def draw(modules, count=None, seed=0):
    """Draws mutants: one of each module first, then evenly over the code; all without a count."""
    rng = random.Random(seed)
    ranked = []
    for module in modules:
        found = places(module)
        rng.shuffle(found)
        ranked += [(i / len(found), module, place) for i, place in enumerate(found)]
    drawn = {}
    for _, module, place in sorted(ranked):
        if len(drawn) == count:
            break
        if made := make(module, *place):
            drawn.setdefault(made.key, made)
    return list(drawn.values())
