"""Settings of Sphinx for the reference: `make reference` builds it into docs/reference/build."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import shared  # noqa: E402

project = "llm-weeks"
version = release = shared.__version__
copyright = "the authors of llm-weeks"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.viewcode", "pages"]
exclude_patterns = ["build"]
smartquotes = False  # what is quoted is often code
suppress_warnings = ["ref.python"]  # fields of a common name, such as `type`, are not linked

html_theme = "furo"
html_title = f"shared {version}"
html_static_path = ["static"]
html_css_files = ["reference.css"]
html_copy_source = False

add_module_names = False
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

autodoc_default_options = {"members": True, "undoc-members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False  # those of PyTorch's classes are long, and about something else
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
