"Sphinx, over the pages that docs/prepare.py makes; `make docs` runs both."
import re
import warnings

from docutils.nodes import SkipNode
from fastcore.docments import docments
from latex2mathml.converter import convert

import fd_focus

warnings.filterwarnings("ignore")
project, author, release = "fd_focus", "fd_focus developers", fd_focus.__version__
copyright = f"2026, {author}"
extensions = ["myst_nb", "sphinx_design", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
html_theme, html_title, html_static_path, html_css_files = "furo", "fd_focus", ["static"], ["site.css"]
html_theme_options = dict(source_repository="https://github.com/fd-focus/fd_focus", footer_icons=[])
html_show_sourcelink = html_copy_source = False
nb_execution_mode, nb_merge_streams, nb_render_markdown_format = "off", True, "myst"
html_math_renderer = "mathml"              # browsers draw it themselves: no script from elsewhere
myst_enable_extensions, myst_heading_anchors = ["dollarmath", "amsmath", "colon_fence"], 3
autodoc_default_options = {"exclude-members": "encodes, decodes"}     # fastcore dispatches those by type
autodoc_member_order, autodoc_typehints, autodoc_typehints_description_target = "bysource", "description", "documented"
MARKS = re.compile(r"\$([^$\n]+)\$|`([^`]+)`|(?<!\S)(\*\w[^*\n]*\*)|([*_|\\`])")


def rst(text: str) -> str:
    "Our docstrings are plain words with `code` and $formulas$; what else reStructuredText would read is escaped."
    def mark(found):
        formula, code, stressed, sign = found.groups()
        return rf":math:`{formula}`\ " if formula else rf"``{code}``\ " if code else stressed or f"\\{sign}"
    return MARKS.sub(mark, text)


def describe(app, what, name, thing, options, lines):
    "A docstring as reStructuredText, and below it the comments that stand beside the arguments."
    lines[:] = [rst(line) for line in lines]
    if what not in ("function", "class", "method"): return
    try: said = docments(thing)
    except Exception: return                # without source: made by a decorator or by Python
    words = {argument: " ".join(text.split()) for argument, text in said.items() if text and argument != "self"}
    lines += ["", *[f":param {argument}: {rst(text)}" for argument, text in words.items() if argument != "return"]]
    if "return" in words and what != "class": lines += [f":returns: {rst(words['return'])}"]
    lines.append("")


def draw_formula(display: str):
    def visit(translator, node):
        formula = convert(node.astext(), display=display)
        translator.body.append(f'<div class="formula">{formula}</div>' if display == "block" else formula)
        raise SkipNode
    return visit, None


def setup(app):
    app.connect("autodoc-process-docstring", describe)
    app.add_html_math_renderer("mathml", draw_formula("inline"), draw_formula("block"))
